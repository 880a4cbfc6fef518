"""
Two things at once, on PostgreSQL.

The first of the two is held open by hand, after it has written and before it commits, until the second is seen to wait
for it. So each of these meets its race every time it is run, and not when the machine happens to be slow.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, text

from identity_service.accounts.access import parse_scope
from identity_service.accounts.refresh_families import MOST_FAMILIES, Audiences, Family, Rejected, Verdict
from identity_service.accounts.users import SignInFacts, User
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import clients, refresh_families, users
from tests.support.races import HeldTransaction, blocked, database_errors, held, loaded
from tests.support.reading import refused
from tests.support.service import ISSUER, PASSWORD, Registered, Service, running, test_settings
from tests.support.waiting import until

KEY = "one-key-one-rotation"
NEW_PASSWORD = "another good password"
DEAD = "The refresh token is not valid."
REUSED = "refresh token reuse detected; session revoked"
WRONG = "The username or the password is wrong."
BUSY = text(
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()"
)


async def signed_in(service: Service, **client: Any) -> tuple[Registered, User, str]:
    """Return a client, a new user and the refresh token of their sign-in."""
    registered, user = await service.a_client(**client), await service.a_user()
    return registered, user, (await service.sign_in(registered, user))["refresh_token"]


async def rotate(
    service: Service, transaction: HeldTransaction, client: Registered, token: str, key: str | None = None
) -> Family | Rejected:
    """Rotate inside a held transaction, as the token endpoint does."""
    return await service.services.families.rotate(
        transaction.tx, Secret(token), await loaded(service, client), retry_key=Secret(key) if key else None
    )


async def rotated(service: Service, transaction: HeldTransaction, client: Registered, token: str, **how: Any) -> str:
    """Rotate inside a held transaction and return the successor."""
    outcome = await rotate(service, transaction, client, token, **how)
    assert isinstance(outcome, Family), outcome
    return outcome.token.reveal()


async def revoke(service: Service, client: Registered, token: str) -> httpx2.Response:
    """`POST /revoke`."""
    return await service.http.post("/revoke", data={"token": token}, auth=client.auth)


async def password_grant(service: Service, client: Registered, user: User) -> httpx2.Response:
    """`POST /token` with the user's (first) password."""
    return await service.token(client, grant_type="password", username=user.username, password=PASSWORD)


async def dead(service: Service, client: Registered, *tokens: str) -> None:
    """Assert that none of these tokens yields anything."""
    for token in tokens:
        assert refused(await service.refresh(client, token), "invalid_grant") == DEAD


async def start(service: Service, transaction: HeldTransaction, client: Registered, user: User) -> Family | None:
    """Start a family inside a held transaction, for a user whose password has just been checked."""
    facts = await service.within(lambda tx: service.services.users.facts(tx, user.username))
    assert isinstance(facts, SignInFacts)
    return await service.services.families.start(
        transaction.tx,
        facts,
        await loaded(service, client),
        scope=parse_scope("account:read") or (),
        audiences=Audiences((ISSUER,), (ISSUER,)),
        amr=("pwd",),
    )


# -- one token, twice -------------------------------------------------------------------------------------------------


@pytest.mark.rfc("9700", "4.14.2")
@pytest.mark.case("REF-02")
async def test_of_two_refreshes_at_once_one_wins_and_the_family_ends(service: Service) -> None:
    """The second waits for the first, finds the token used, and takes the first's successor with it."""
    client, _, token = await signed_in(service)
    async with held(service) as first:
        successor = await rotated(service, first, client, token)
        second = await blocked(service, service.refresh(client, token))
        await first.commit()
        assert refused(await second, "invalid_grant") == REUSED
    (row,) = await service.family_rows()
    assert (row.generation, row.revoked_reason) == (1, "reuse_detected")
    await dead(service, client, successor, token)


@pytest.mark.case("REF-02")
async def test_a_refresh_that_is_rolled_back_leaves_the_token_to_the_other(service: Service) -> None:
    """Nothing was consumed, so the one who waited rotates, and only once."""
    client, _, token = await signed_in(service)
    async with held(service) as first:
        lost = await rotated(service, first, client, token)
        second = await blocked(service, service.refresh(client, token))
        await first.roll_back()
        answer = await second
    assert answer.status_code == 200
    (row,) = await service.family_rows()
    assert (row.generation, row.revoked_at) == (1, None)
    successor = answer.json()["refresh_token"]
    assert successor != lost
    assert (await service.refresh(client, successor)).status_code == 200


@pytest.mark.case("REF-05")
@pytest.mark.parametrize(("window", "key"), [(30, None), (0, KEY)], ids=["retry window", "Idempotency-Key"])
async def test_a_retry_that_overtakes_its_own_request_gets_the_same_successor(
    service: Service, window: int, key: str | None
) -> None:
    """An impatient client forks nothing: both requests answer with one successor, and it is good."""
    client, _, token = await signed_in(service, refresh_retry_window=window)
    async with held(service) as first:
        successor = await rotated(service, first, client, token, key=key)
        second = await blocked(service, service.refresh(client, token, key=key))
        await first.commit()
        answer = await second
    assert answer.status_code == 200
    assert answer.json()["refresh_token"] == successor
    (row,) = await service.family_rows()
    assert (row.generation, row.revoked_at) == (1, None)
    assert (await service.refresh(client, successor)).status_code == 200


@pytest.mark.case("REF-02")
async def test_two_refreshes_at_once_with_different_keys_are_two_holders(service: Service) -> None:
    """A key of one's own is no permission to repeat somebody else's rotation."""
    client, _, token = await signed_in(service)
    async with held(service) as first:
        successor = await rotated(service, first, client, token, key=KEY)
        second = await blocked(service, service.refresh(client, token, key="the-key-of-another"))
        await first.commit()
        assert refused(await second, "invalid_grant") == REUSED
    await dead(service, client, successor)


@pytest.mark.case("REF-02")
async def test_of_fifty_refreshes_at_once_one_wins_and_the_family_ends(service: Service) -> None:
    """Whatever their order: one success, reuse told once and audited once, and no answer that is neither."""
    client, _, token = await signed_in(service)
    answers = await asyncio.gather(*(service.refresh(client, token) for _ in range(50)))
    won = [answer.json()["refresh_token"] for answer in answers if answer.status_code == 200]
    told = Counter(answer.json()["error_description"] for answer in answers if answer.status_code == 400)
    assert len(won) == 1
    assert told == {REUSED: 1, DEAD: 48}
    assert len(await service.events("refresh.reuse_detected")) == 1
    (row,) = await service.family_rows()
    assert row.generation == 1
    await dead(service, client, *won)


@pytest.mark.case("REF-05")
async def test_fifty_retries_at_once_share_one_successor(service: Service) -> None:
    """With one key, all fifty are the same request."""
    client, _, token = await signed_in(service)
    answers = await asyncio.gather(*(service.refresh(client, token, key=KEY) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    successors = {answer.json()["refresh_token"] for answer in answers}
    assert len(successors) == 1
    assert (await service.refresh(client, successors.pop())).status_code == 200


async def test_a_refused_scope_gives_the_token_back_to_whoever_waits(service: Service) -> None:
    """The rotation that the refusal undoes is really undone."""
    client, _, token = await signed_in(service)
    answers = await asyncio.gather(
        *(service.refresh(client, token, scope="admin") for _ in range(10)), service.refresh(client, token)
    )
    assert Counter(answer.status_code for answer in answers) == {400: 10, 200: 1}
    assert {answer.json()["error"] for answer in answers[:10]} <= {"invalid_scope", "invalid_grant"}


# -- a replay against the token of now --------------------------------------------------------------------------------


@pytest.mark.case("REF-12")
async def test_a_replay_that_waits_for_a_refresh_ends_its_successor(service: Service) -> None:
    """The refresh is committed first; its brand-new token is dead all the same."""
    client, _, first = await signed_in(service)
    second = (await service.refresh(client, first)).json()["refresh_token"]
    async with held(service) as refresh:
        third = await rotated(service, refresh, client, second)
        replay = await blocked(service, service.refresh(client, first))
        await refresh.commit()
        assert refused(await replay, "invalid_grant") == REUSED
    await dead(service, client, third, second, first)
    assert len(await service.events("refresh.reuse_detected")) == 1


@pytest.mark.case("REF-12")
async def test_a_refresh_that_waits_for_a_replay_gets_nothing(service: Service) -> None:
    """The family's end is committed first."""
    client, _, first = await signed_in(service)
    second = (await service.refresh(client, first)).json()["refresh_token"]
    async with held(service) as replay:
        outcome = await rotate(service, replay, client, first)
        assert isinstance(outcome, Rejected)
        assert outcome.verdict is Verdict.REUSE
        refresh = await blocked(service, service.refresh(client, second))
        await replay.commit()
        assert refused(await refresh, "invalid_grant") == DEAD
    (row,) = await service.family_rows()
    assert row.generation == 1


@pytest.mark.case("REF-12")
async def test_two_replays_at_once_are_one_end(service: Service) -> None:
    """The one that waits finds the family dead already: it tells nothing and audits nothing."""
    client, _, first = await signed_in(service)
    await service.refresh(client, first)
    async with held(service) as one:
        assert isinstance(await rotate(service, one, client, first), Rejected)
        other = await blocked(service, service.refresh(client, first))
        await one.commit()
        assert refused(await other, "invalid_grant") == DEAD
    assert await service.events("refresh.reuse_detected") == []  # the one in our hand was not the grant's


@pytest.mark.case("REF-12")
async def test_replays_and_refreshes_in_a_heap_always_end_the_family(service: Service) -> None:
    """Twenty rounds: whoever is first, no live descendant is left, and the database refuses nothing."""
    client, user = await service.a_client(), await service.a_user()
    with database_errors() as errors:
        for _ in range(20):
            service.clock.advance(1)
            first = (await service.sign_in(client, user))["refresh_token"]
            second = (await service.refresh(client, first)).json()["refresh_token"]
            answers = await asyncio.gather(
                service.refresh(client, first), service.refresh(client, second), service.refresh(client, first)
            )
            assert {answer.status_code for answer in answers} <= {200, 400}
            newest = [answer.json()["refresh_token"] for answer in answers if answer.status_code == 200]
            await dead(service, client, second, *newest)
    assert errors == []
    assert len(await service.events("refresh.reuse_detected")) == 20


# -- against a revocation ---------------------------------------------------------------------------------------------


@pytest.mark.case("INT-06")
async def test_a_revocation_that_waits_for_a_refresh_ends_its_successor(service: Service) -> None:
    """The client signs out with the token it knows, while its own refresh is under way."""
    client, _, token = await signed_in(service)
    async with held(service) as refresh:
        successor = await rotated(service, refresh, client, token)
        ending = await blocked(service, revoke(service, client, token))
        await refresh.commit()
        assert (await ending).status_code == 200
    await dead(service, client, successor, token)
    assert len(await service.events("token.revoked")) == 1


@pytest.mark.case("INT-06")
async def test_a_refresh_that_waits_for_a_revocation_gets_nothing(service: Service) -> None:
    """And it is no reuse."""
    client, _, token = await signed_in(service)
    families = service.services.families
    async with held(service) as ending:
        presented = families.read(Secret(token))
        assert presented is not None
        await families.revoke(ending.tx, presented, await loaded(service, client))
        refresh = await blocked(service, service.refresh(client, token))
        await ending.commit()
        assert refused(await refresh, "invalid_grant") == DEAD
    (row,) = await service.family_rows()
    assert (row.generation, row.revoked_reason) == (0, "revoked")


@pytest.mark.case("INT-06")
async def test_two_revocations_at_once_are_audited_once(service: Service) -> None:
    """The one that waits finds nothing left to end."""
    client, _, token = await signed_in(service)
    families = service.services.families
    async with held(service) as one:
        presented = families.read(Secret(token))
        assert presented is not None
        assert await families.revoke(one.tx, presented, await loaded(service, client)) is not None
        other = await blocked(service, revoke(service, client, token))
        await one.commit()
        assert (await other).status_code == 200
    assert await service.events("token.revoked") == []  # the one in our hand was not the endpoint's


# -- against a disable, and against a new password --------------------------------------------------------------------


async def end_sessions(
    service: Service, transaction: HeldTransaction, client: Registered, user: User, how: str
) -> None:
    """Do, inside a held transaction, one of the things that end sessions by an epoch."""
    services = service.services
    if how == "disable":
        await services.users.set_enabled(transaction.tx, user.id, False)
    elif how == "password":
        hashed = await services.users.prepare_password(Secret(NEW_PASSWORD), names=())
        await services.users.set_password(transaction.tx, user.id, hashed)
    elif how == "disable and enable":
        await services.users.set_enabled(transaction.tx, user.id, False)
        await services.users.set_enabled(transaction.tx, user.id, True)
    else:
        await services.clients.set_enabled(transaction.tx, client.id, False)
        await services.clients.set_enabled(transaction.tx, client.id, True)


ENDINGS = pytest.mark.parametrize("how", ["disable", "disable and enable", "password", "client"])


@pytest.mark.case("REF-11")
@ENDINGS
async def test_a_refresh_under_way_does_not_survive_the_end_of_all_sessions(service: Service, how: str) -> None:
    """The rotation is written first and committed last; its successor carries the old epoch."""
    client, user, token = await signed_in(service)
    async with held(service) as refresh:
        successor = await rotated(service, refresh, client, token)
        async with held(service) as ending:
            await end_sessions(service, ending, client, user, how)
            await ending.commit()
        await refresh.commit()
    await dead(service, client, successor, token)
    (row,) = await service.family_rows()
    assert row.generation == 1


@pytest.mark.case("REF-11")
@ENDINGS
async def test_a_refresh_before_the_end_of_all_sessions_is_committed_dies_with_it(service: Service, how: str) -> None:
    """It sees the state of before, and what it hands out is dead a moment later."""
    client, user, token = await signed_in(service)
    async with held(service) as ending:
        await end_sessions(service, ending, client, user, how)
        answer = await service.refresh(client, token)
        assert answer.status_code == 200
        await ending.commit()
    await dead(service, client, answer.json()["refresh_token"], token)
    assert (await service.me(answer.json()["access_token"])).status_code == 401


@pytest.mark.case("REF-11")
@ENDINGS
async def test_a_refresh_that_waits_while_all_sessions_end_has_no_survivor(service: Service, how: str) -> None:
    """Its statement began before the end and gets its row after it: whatever it answers, nothing lives on."""
    client, user, token = await signed_in(service)
    async with held(service) as somebody:
        await somebody.tx.execute(select(refresh_families.c.id).with_for_update())
        refresh = await blocked(service, service.refresh(client, token))
        async with held(service) as ending:
            await end_sessions(service, ending, client, user, how)
            await ending.commit()
        await somebody.commit()
        answer = await refresh
    survivors = [answer.json()["refresh_token"]] if answer.status_code == 200 else []
    await dead(service, client, *survivors, token)


# -- a sign-in under way ----------------------------------------------------------------------------------------------


@pytest.mark.case("REF-11")
@ENDINGS
async def test_a_sign_in_that_waits_for_the_end_of_all_sessions_is_refused(service: Service, how: str) -> None:
    """
    The password was right a moment ago, and the end is written but not yet committed.

    Only the user's row is waited for; a client is looked at after that wait.
    """
    client, user = await service.a_client(), await service.a_user()
    async with held(service) as ending:
        await end_sessions(service, ending, client, user, how)
        if how == "client":
            await ending.tx.execute(select(users.c.id).where(users.c.id == user.id).with_for_update())
        signing_in = await blocked(service, password_grant(service, client, user))
        await ending.commit()
        assert refused(await signing_in, "invalid_grant") == WRONG
    assert await service.family_rows() == []
    assert await service.events("grant.password") == []


@asynccontextmanager
async def checked_but_not_signed_in(
    service: Service, monkeypatch: pytest.MonkeyPatch, client: Registered, user: User
) -> AsyncIterator["asyncio.Task[httpx2.Response]"]:
    """Start a sign-in and stop it when its password has been found right; it goes on when the block is left."""
    hasher = service.services.hasher
    verify, reached, goes_on = hasher.verify, asyncio.Event(), asyncio.Event()

    async def stopping(*given: Any, **named: Any) -> Any:
        verification = await verify(*given, **named)
        assert verification.right
        reached.set()
        await goes_on.wait()
        return verification

    monkeypatch.setattr(hasher, "verify", stopping)
    task = asyncio.ensure_future(password_grant(service, client, user))
    await until(reached.is_set, "no password is looked at")
    try:
        yield task
    finally:
        goes_on.set()


@pytest.mark.case("REF-11")
@ENDINGS
async def test_a_sign_in_between_its_check_and_its_family_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The old password opens nothing once the new one is committed, nor does a user who was disabled for a moment."""
    client, user = await service.a_client(), await service.a_user()
    async with checked_but_not_signed_in(service, monkeypatch, client, user) as signing_in, held(service) as ending:
        await end_sessions(service, ending, client, user, how)
        await ending.commit()
    assert refused(await signing_in, "invalid_grant") == WRONG
    assert await service.live_families(user) == 0
    assert await service.family_rows() == []


@pytest.mark.case("REF-22")
async def test_a_sign_in_of_a_user_who_is_switched_off_meanwhile_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Being enabled counts by itself, also where somebody wrote the row by hand and left its epoch alone."""
    client, user = await service.a_client(), await service.a_user()
    async with checked_but_not_signed_in(service, monkeypatch, client, user) as signing_in:
        await service.patch_user(user, enabled=False)
    assert refused(await signing_in, "invalid_grant") == WRONG
    assert await service.family_rows() == []


@pytest.mark.case("REF-25")
async def test_a_sign_in_of_a_user_who_is_deleted_meanwhile_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the answer of a wrong password."""
    client, user = await service.a_client(), await service.a_user()
    async with checked_but_not_signed_in(service, monkeypatch, client, user) as signing_in:
        await service.execute(users.delete().where(users.c.id == user.id))
    assert refused(await signing_in, "invalid_grant") == WRONG
    assert await service.family_rows() == []


@pytest.mark.case("REF-11")
@pytest.mark.parametrize("how", ["disable", "disable and enable", "password"])
async def test_the_end_of_all_sessions_waits_for_a_sign_in_and_ends_it(service: Service, how: str) -> None:
    """A family started first is covered by the epoch that moves on after it."""
    client, user = await service.a_client(), await service.a_user()
    async with held(service) as signing_in, held(service) as ending:
        family = await start(service, signing_in, client, user)
        assert family is not None
        disabling = await blocked(service, end_sessions(service, ending, client, user, how))
        await signing_in.commit()
        await disabling
        await ending.commit()
    await dead(service, client, family.token.reveal())
    assert await service.live_families(user) == 0


async def test_a_sign_in_under_way_while_its_client_is_disabled_dies_with_it(service: Service) -> None:
    """The family is written with the epoch that was read, and the client has moved on from that."""
    client, user = await service.a_client(), await service.a_user()
    async with held(service) as signing_in:
        family = await start(service, signing_in, client, user)
        assert family is not None
        await service.bump_client_epoch(client)
        await signing_in.commit()
    await dead(service, client, family.token.reveal())


# -- the cap ----------------------------------------------------------------------------------------------------------


async def fill(service: Service, client: Registered, user: User, count: int) -> list[str]:
    """Start `count` families, a second apart, and return their tokens, oldest first."""
    tokens = []
    for _ in range(count):
        service.clock.advance(1)
        async with held(service) as signing_in:
            family = await start(service, signing_in, client, user)
            assert family is not None
            tokens.append(family.token.reveal())
            await signing_in.commit()
    return tokens


@pytest.mark.case("REF-32")
async def test_a_sign_in_waits_for_another_one_and_counts_it(service: Service) -> None:
    """Two at once, one below the cap: the one that waits makes room."""
    client, user = await service.a_client(), await service.a_user()
    oldest, *_ = await fill(service, client, user, MOST_FAMILIES - 1)
    service.clock.advance(1)
    async with held(service) as one:
        assert await start(service, one, client, user) is not None
        other = await blocked(service, password_grant(service, client, user))
        await one.commit()
        assert (await other).status_code == 200
    assert await service.live_families(user) == MOST_FAMILIES
    await dead(service, client, oldest)


@pytest.mark.case("REF-32")
async def test_parallel_sign_ins_never_exceed_the_cap(service: Service) -> None:
    """Each of them may be the one too many."""
    client, user = await service.a_client(), await service.a_user()
    await fill(service, client, user, MOST_FAMILIES - 3)
    service.clock.advance(1)
    with database_errors() as errors:
        answers = await asyncio.gather(*(password_grant(service, client, user) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert errors == []
    assert await service.live_families(user) == MOST_FAMILIES
    for answer in answers:
        assert (await service.refresh(client, answer.json()["refresh_token"])).status_code == 200


@pytest.mark.case("REF-32")
async def test_a_family_that_gives_way_while_it_is_refreshed_stays_gone(service: Service) -> None:
    """The sign-in waits for the refresh, and its successor is refused after that."""
    client, user = await service.a_client(), await service.a_user()
    oldest, *_ = await fill(service, client, user, MOST_FAMILIES)
    service.clock.advance(1)
    async with held(service) as refresh:
        successor = await rotated(service, refresh, client, oldest)
        signing_in = await blocked(service, password_grant(service, client, user))
        await refresh.commit()
        assert (await signing_in).status_code == 200
    await dead(service, client, successor)
    assert await service.live_families(user) == MOST_FAMILIES


# -- locks ------------------------------------------------------------------------------------------------------------


async def test_a_refresh_waits_for_nobody_but_its_own_family(service: Service) -> None:
    """Users, clients and other families may be locked as they like: so no circle of waiting can close."""
    client, user, token = await signed_in(service)
    other = (await service.sign_in(client, user))["refresh_token"]
    mine = service.services.families.read(Secret(token))
    assert mine is not None
    async with held(service) as somebody:
        await somebody.tx.execute(select(users.c.id).with_for_update())
        await somebody.tx.execute(select(clients.c.id).with_for_update())
        await somebody.tx.execute(
            select(refresh_families.c.id).where(refresh_families.c.id != mine.family_id).with_for_update()
        )
        async with asyncio.timeout(20):  # who waits for one of these locks waits for longer
            second = await service.refresh(client, token, key=KEY)
            retry = await service.refresh(client, token, key=KEY)
            replay = await service.refresh(client, token)
        assert [second.status_code, retry.status_code] == [200, 200]
        assert refused(replay, "invalid_grant") == REUSED
        stuck = await blocked(service, service.refresh(client, other))
        await somebody.roll_back()
        assert (await stuck).status_code == 200


async def test_a_refresh_that_waits_too_long_is_told_to_come_back(database_url: str) -> None:
    """Never that its token is bad: it would throw a good one away."""
    async with running(test_settings(database_url), patient=False) as service:
        client, _, token = await signed_in(service)
        async with held(service) as somebody:
            await somebody.tx.execute(select(refresh_families.c.id).with_for_update())
            answer = await service.refresh(client, token)
            refused(answer, "temporarily_unavailable", 503)
            assert "retry-after" in answer.headers
        assert (await service.refresh(client, token)).status_code == 200


async def test_everything_at_once_ends_without_a_deadlock(service: Service) -> None:
    """Sign-ins at the cap, refreshes, retries, replays, revocations and a disable: only the protocol's answers."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await fill(service, client, user, MOST_FAMILIES)
    for token in tokens[::2]:
        await service.refresh(client, token)

    async def bulk() -> httpx2.Response:
        await service.disable(user)
        await service.enable(user)
        return await service.http.get("/healthz")

    with database_errors() as errors:
        work = [service.refresh(client, token) for token in tokens]
        work += [service.refresh(client, token, key=KEY) for token in tokens[::3]]
        work += [revoke(service, client, token) for token in tokens[::5]]
        work += [password_grant(service, client, user) for _ in range(8)]
        work.insert(60, bulk())
        answers = await asyncio.gather(
            *work[::7], *work[1::7], *work[2::7], *work[3::7], *work[4::7], *work[5::7], *work[6::7]
        )
    assert errors == []
    assert {answer.status_code for answer in answers} <= {200, 400}
    assert {answer.json()["error"] for answer in answers if answer.status_code == 400} <= {"invalid_grant"}
    assert await service.live_families(user) <= MOST_FAMILIES


@pytest.mark.case("OPS-07")
async def test_a_cancelled_refresh_leaves_no_lock_and_no_transaction(service: Service) -> None:
    """A caller that goes away while its refresh waits, more often than the pool has connections."""
    client, _, token = await signed_in(service)
    for _ in range(2 * service.services.settings.database_pool_size):
        async with held(service) as somebody:
            await somebody.tx.execute(select(refresh_families.c.id).with_for_update())
            task = await blocked(service, service.refresh(client, token))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    async with asyncio.timeout(20):  # who waits for a lock waits for longer
        assert (await service.refresh(client, token)).status_code == 200

    async def nobody_is_busy() -> bool:
        return not (await service.execute(BUSY))[0][0]

    await until(nobody_is_busy, "a transaction is left")  # a background job has one, too, but a short one
    (row,) = await service.family_rows()
    assert (row.generation, row.revoked_at) == (1, None)
