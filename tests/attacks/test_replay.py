"""
A refresh token in the wrong hands, at the wrong time, or twice (RFC 9700 §4.14.2).

"The family is over" means here: its newest token is refused, its access tokens open nothing any more, the user's other
sessions notice nothing, and the audit trail says once what happened.
"""

from typing import Any
from urllib.parse import urlencode

import pytest
import redis
from sqlalchemy import delete, select, text, update

from identity_service.accounts.refresh_families import MOST_FAMILIES
from identity_service.accounts.users import User
from identity_service.infra.tables import audit_events, refresh_families, users
from tests.support.clock import FrozenClock
from tests.support.reading import refused, unverified_claims
from tests.support.service import PASSWORD, Registered, Service, running, test_settings

DAY = 86400
KEY = "one-key-one-rotation"
DEAD = "The refresh token is not valid."
REUSED = "refresh token reuse detected; session revoked"
LENIENCIES = pytest.mark.parametrize(("window", "key"), [(30, None), (0, KEY)], ids=["retry window", "Idempotency-Key"])


@pytest.fixture(params=["service", "embedded"])
def either(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL with Redis, then on SQLite with limits in memory."""
    found: Service = request.getfixturevalue(request.param)
    return found


async def signed_in(service: Service, **client: Any) -> tuple[Registered, User, dict[str, Any]]:
    """Return a client, a new user and the tokens of their sign-in."""
    registered, user = await service.a_client(**client), await service.a_user()
    return registered, user, await service.sign_in(registered, user)


async def good(service: Service, client: Registered, token: str, **how: Any) -> dict[str, Any]:
    """Refresh, insist on success, and return the answer's body."""
    answer = await service.refresh(client, token, **how)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def over(service: Service, client: Registered, *tokens: dict[str, Any]) -> None:
    """Assert that neither the refresh nor the access tokens of a family are good for anything."""
    for pair in tokens:
        assert refused(await service.refresh(client, pair["refresh_token"]), "invalid_grant") == DEAD
        assert (await service.me(pair["access_token"])).status_code == 401


async def events(service: Service) -> list[str]:
    """Return what was audited about refresh tokens, oldest first."""
    rows = await service.execute(select(audit_events.c.event).order_by(audit_events.c.id))
    return [row.event for row in rows if not row.event.startswith("grant.")]


# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("9700", "4.14.2")
@pytest.mark.case("REF-02")
async def test_a_replayed_token_ends_its_whole_family(either: Service) -> None:
    """The victim's newest token and every access token are refused; the user's other session is untouched."""
    client, user, first = await signed_in(either)
    other = await either.sign_in(client, user)
    second = await good(either, client, first["refresh_token"])
    assert refused(await either.refresh(client, first["refresh_token"]), "invalid_grant") == REUSED
    await over(either, client, first, second)
    assert (await either.me(other["access_token"])).status_code == 200
    await good(either, client, other["refresh_token"])
    assert await either.live_families(user) == 1


@pytest.mark.rfc("9700", "4.14.2")
@pytest.mark.case("REF-04")
async def test_the_victim_who_comes_second_ends_the_thiefs_session(service: Service) -> None:
    """Nobody can tell who is who, so neither keeps anything."""
    client, _, tokens = await signed_in(service, public=True)
    stolen = tokens["refresh_token"]
    thief = await good(service, client, stolen)
    thief = await good(service, client, thief["refresh_token"])
    assert refused(await service.refresh(client, stolen), "invalid_grant") == REUSED
    await over(service, client, thief, tokens)


@pytest.mark.case("REF-02")
async def test_any_old_generation_is_a_replay(either: Service) -> None:
    """However many rotations ago."""
    client = await either.a_client()
    for age in (1, 2, 7):
        pairs = [await either.sign_in(client, await either.a_user())]
        for _ in range(7):
            pairs.append(await good(either, client, pairs[-1]["refresh_token"]))
        assert refused(await either.refresh(client, pairs[-1 - age]["refresh_token"]), "invalid_grant") == REUSED
        await over(either, client, pairs[-1])


@pytest.mark.case("REF-08")
async def test_rotations_within_one_instant_are_told_apart(service: Service) -> None:
    """Generations count, not seconds: the clock stands still here."""
    client, _, first = await signed_in(service)
    second = await good(service, client, first["refresh_token"])
    third = await good(service, client, second["refresh_token"])
    assert refused(await service.refresh(client, first["refresh_token"]), "invalid_grant") == REUSED
    await over(service, client, third)


@pytest.mark.case("REF-02")
async def test_a_reuse_is_audited_once_with_all_that_is_needed(service: Service) -> None:
    """Who, which family, which client, from where; the replays after it write nothing."""
    client, user, first = await signed_in(service)
    await good(service, client, first["refresh_token"])
    for _ in range(3):
        await service.refresh(client, first["refresh_token"])
    (row,) = await service.events("refresh.reuse_detected")
    (family,) = await service.family_rows()
    assert (row.actor, row.target, row.client_id) == (str(user.id), str(family.id), client.id)
    assert (row.network, row.occurrences) == ("127.0.0.1", 1)
    assert row.request_id
    assert (family.revoked_reason, family.revoked_at) == ("reuse_detected", service.clock.now())
    assert await events(service) == ["refresh.reuse_detected"]


@pytest.mark.case("REF-09")
@pytest.mark.case("OPS-10")
async def test_a_replay_is_caught_after_a_restart_and_an_empty_redis(database_url: str, redis_url: str) -> None:
    """What was used and what was revoked is known from the database alone."""
    settings, clock = test_settings(database_url, redis_url=redis_url), FrozenClock()
    async with running(settings, clock) as before:
        client, _, first = await signed_in(before)
        second = await good(before, client, first["refresh_token"])
        revoked = await before.sign_in(client, await before.a_user())
        answer = await before.http.post("/revoke", data={"token": revoked["refresh_token"]}, auth=client.auth)
        assert answer.status_code == 200
    with redis.Redis.from_url(redis_url) as store:
        store.flushdb()
    async with running(settings, clock) as after:
        await over(after, client, revoked)
        assert refused(await after.refresh(client, first["refresh_token"]), "invalid_grant") == REUSED
        await over(after, client, second)
        with redis.Redis.from_url(redis_url) as store:
            store.flushdb()
        await over(after, client, second)


@pytest.mark.case("REF-09")
async def test_two_replicas_see_one_family(database_url: str, redis_url: str) -> None:
    """Rotated here, replayed there, and dead on both."""
    settings, clock = test_settings(database_url, redis_url=redis_url), FrozenClock()
    async with running(settings, clock) as one, running(settings, clock) as two:
        client, _, first = await signed_in(one)
        second = await good(two, client, first["refresh_token"])
        third = await good(one, client, second["refresh_token"])
        assert refused(await two.refresh(client, second["refresh_token"]), "invalid_grant") == REUSED
        for replica in (one, two):
            await over(replica, client, third)


# -- lost answers -----------------------------------------------------------------------------------------------------


async def losing_the_answer(service: Service, client: Registered, token: str, key: str | None) -> None:
    """Refresh over a connection that breaks when the answer is to be sent, after the commit."""
    body = urlencode({"grant_type": "refresh_token", "refresh_token": token, **client.form}).encode()
    headers = [
        (b"host", b"127.0.0.1:8000"),
        (b"content-type", b"application/x-www-form-urlencoded"),
        (b"content-length", str(len(body)).encode()),
    ]
    headers += [(b"idempotency-key", key.encode())] if key else []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/token",
        "raw_path": b"/token",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: object) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await service.app(scope, receive, send)


@pytest.mark.case("REF-05")
@LENIENCIES
async def test_a_lost_answer_is_repeated(either: Service, window: int, key: str | None) -> None:
    """The same successor again, however often, and one live token in the family throughout."""
    client, _, first = await signed_in(
        either,
        refresh_retry_window=window,
        token_endpoint_auth_method="none",
        grant_types=("password", "refresh_token"),
    )
    await losing_the_answer(either, client, first["refresh_token"], key)
    (row,) = await either.family_rows()
    assert row.generation == 1
    answers = [await good(either, client, first["refresh_token"], key=key) for _ in range(3)]
    assert len({answer["refresh_token"] for answer in answers}) == 1
    assert await either.family_rows() == [row]
    third = await good(either, client, answers[0]["refresh_token"])
    assert (await either.me(third["access_token"])).status_code == 200


@pytest.mark.case("REF-02")
async def test_a_lost_answer_without_leniency_is_a_reuse(service: Service) -> None:
    """Strict is the default: the service cannot know that the first answer reached nobody."""
    client, _, first = await signed_in(service, public=True)
    await losing_the_answer(service, client, first["refresh_token"], None)
    assert refused(await service.refresh(client, first["refresh_token"]), "invalid_grant") == REUSED


@pytest.mark.case("REF-06")
@LENIENCIES
async def test_the_use_of_the_successor_ends_all_leniency(either: Service, window: int, key: str | None) -> None:
    """A retry of what has been moved on from is a replay."""
    client, _, first = await signed_in(either, refresh_retry_window=window)
    second = await good(either, client, first["refresh_token"], key=key)
    third = await good(either, client, second["refresh_token"], key="another-key-for-the-next" if key else None)
    assert refused(await either.refresh(client, first["refresh_token"], key=key), "invalid_grant") == REUSED
    await over(either, client, third)


@pytest.mark.case("REF-02")
@pytest.mark.parametrize("key", [None, "a-guess-at-the-key-0"])
async def test_a_thief_without_the_key_is_caught_at_once(either: Service, key: str | None) -> None:
    """The key was chosen for one rotation and travels with no token."""
    client, _, first = await signed_in(either)
    second = await good(either, client, first["refresh_token"], key=KEY)
    assert refused(await either.refresh(client, first["refresh_token"], key=key), "invalid_grant") == REUSED
    await over(either, client, second)


async def test_a_thief_with_the_key_gets_the_same_successor_and_is_caught_with_it(service: Service) -> None:
    """Two holders of one token: the second to use it gives both away."""
    client, _, first = await signed_in(service)
    victim = await good(service, client, first["refresh_token"], key=KEY)
    thief = await good(service, client, first["refresh_token"], key=KEY)
    assert thief["refresh_token"] == victim["refresh_token"]
    thief = await good(service, client, thief["refresh_token"], key="the-key-of-the-thief")
    answer = await service.refresh(client, victim["refresh_token"], key="the-key-of-the-victim")
    assert refused(answer, "invalid_grant") == REUSED
    await over(service, client, victim, thief)


@pytest.mark.parametrize("how", ["replay", "revoke", "password", "disable"])
@LENIENCIES
async def test_leniency_does_not_revive_a_dead_family(service: Service, how: str, window: int, key: str | None) -> None:
    """A retry that would have been permitted is refused once the family has ended."""
    client, user, first = await signed_in(service, refresh_retry_window=window)
    await good(service, client, first["refresh_token"], key=key)
    if how == "replay":
        family = refresh_families.c
        await service.execute(update(refresh_families).values(revoked_at=service.clock.now(), revoked_reason=how))
        assert (await service.execute(select(family.generation)))[0].generation == 1
    elif how == "revoke":
        await service.http.post("/revoke", data={"token": first["refresh_token"]}, auth=client.auth)
    elif how == "password":
        await service.change_password(user, "another good password")
    else:
        await service.disable(user)
    assert refused(await service.refresh(client, first["refresh_token"], key=key), "invalid_grant") == DEAD


# -- other hands ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "6")
@pytest.mark.case("REF-13")
@pytest.mark.parametrize("generation", ["current", "predecessor"])
@pytest.mark.parametrize("public", [True, False])
async def test_another_client_with_the_token_ends_the_family(either: Service, generation: str, public: bool) -> None:
    """It gets nothing, its owner is warned by losing the session, and the trail names the client that came."""
    client, user, first = await signed_in(either, refresh_retry_window=60)
    second = await good(either, client, first["refresh_token"])
    other = await either.a_client(public=public, refresh_retry_window=60)
    presented = second if generation == "current" else first
    assert refused(await either.refresh(other, presented["refresh_token"]), "invalid_grant") == DEAD
    await over(either, client, second)
    assert refused(await either.refresh(other, presented["refresh_token"]), "invalid_grant") == DEAD
    (row,) = await either.events("refresh.foreign_client")
    assert (row.actor, row.client_id) == (str(user.id), other.id)
    assert await events(either) == ["refresh.foreign_client"]


async def test_a_client_that_may_not_refresh_ends_nothing(service: Service) -> None:
    """It never gets as far as the token."""
    client, _, tokens = await signed_in(service)
    other = await service.a_client(grant_types=("client_credentials",))
    refused(await service.refresh(other, tokens["refresh_token"]), "unauthorized_client")
    await good(service, client, tokens["refresh_token"])


# -- restored databases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presented", ["ahead", "same generation"])
async def test_a_restored_database_is_not_called_reuse(either: Service, presented: str) -> None:
    """Tokens handed out after the backup end the family under a name of their own, once."""
    client, _, first = await signed_in(either)
    (backup,) = await either.family_rows()
    second = await good(either, client, first["refresh_token"])
    third = await good(either, client, second["refresh_token"])
    await either.execute(update(refresh_families).values(backup._asdict()))
    newest = await good(either, client, first["refresh_token"])
    assert newest["refresh_token"] != second["refresh_token"]
    lost = third if presented == "ahead" else second
    for _ in range(2):
        assert refused(await either.refresh(client, lost["refresh_token"], key=KEY), "invalid_grant") == DEAD
    await over(either, client, newest)
    (family,) = await either.family_rows()
    assert family.revoked_reason == "ahead_of_record"
    assert await events(either) == ["refresh.ahead_of_record"]


async def test_a_lost_generation_that_was_passed_again_is_reuse(service: Service) -> None:
    """Behind the row, a token of the lost history is as dangerous as any other old one, window or not."""
    client, _, first = await signed_in(service, refresh_retry_window=60)
    (backup,) = await service.family_rows()
    lost = await good(service, client, first["refresh_token"])
    await service.execute(update(refresh_families).values(backup._asdict()))
    token = first["refresh_token"]
    for _ in range(2):
        token = (await good(service, client, token))["refresh_token"]
    assert refused(await service.refresh(client, lost["refresh_token"]), "invalid_grant") == REUSED


# -- the end of a user, of a client, of all sessions ------------------------------------------------------------------


@pytest.mark.case("REF-22")
async def test_a_disabled_users_sessions_stay_dead(either: Service) -> None:
    """Refused while disabled, refused after; only a new sign-in opens a new family."""
    client, user, tokens = await signed_in(either)
    await either.disable(user)
    await over(either, client, tokens)
    await either.enable(user)
    await over(either, client, tokens)
    again = await either.sign_in(client, user)
    await good(either, client, again["refresh_token"])
    await over(either, client, tokens)
    assert await events(either) == []


@pytest.mark.case("REF-11")
async def test_a_new_password_ends_every_session(either: Service) -> None:
    """At every client, current and predecessor alike, without a scan and without an audit row of each."""
    client, user, first = await signed_in(either)
    second = await good(either, client, first["refresh_token"])
    other = await either.a_client()
    elsewhere = await either.sign_in(other, user)
    await either.change_password(user, "another good password")
    await over(either, client, second, first)
    await over(either, other, elsewhere)
    assert await either.live_families(user) == 0
    await either.sign_in(client, user, password="another good password")


@pytest.mark.case("REF-26")
async def test_moving_the_epoch_on_ends_every_session(service: Service) -> None:
    """Sign-out everywhere is one row, and somebody else's sessions are not concerned."""
    client, user, tokens = await signed_in(service)
    bystander = await service.sign_in(client, await service.a_user())
    await service.execute(update(users).where(users.c.id == user.id).values(epoch=users.c.epoch + 1))
    await over(service, client, tokens)
    await good(service, client, bystander["refresh_token"])


@pytest.mark.case("REF-23")
async def test_a_disabled_client_is_refused_within_a_second(service: Service) -> None:
    """Its own tokens, its users' sessions and its refresh tokens; enabling it brings none of them back."""
    client, _, tokens = await signed_in(service)
    own = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    service.clock.advance(5)
    await service.within(lambda tx: service.services.clients.set_enabled(tx, client.id, False))
    service.clock.advance(1)
    refused(await service.token(client, grant_type="client_credentials"), "invalid_client", 401)
    refused(await service.refresh(client, tokens["refresh_token"]), "invalid_client", 401)
    for access_token in (own, tokens["access_token"]):
        assert (await service.me(access_token)).status_code == 401
    await service.within(lambda tx: service.services.clients.set_enabled(tx, client.id, True))
    service.clock.advance(1)
    await over(service, client, tokens)
    assert (await service.me(own)).status_code == 401
    assert (await service.token(client, grant_type="client_credentials")).status_code == 200


@pytest.mark.case("REF-23")
async def test_a_replica_that_still_caches_a_disabled_client_refreshes_nothing(
    database_url: str, redis_url: str
) -> None:
    """The rotation itself looks at the client's row, so the cache's second gains no token."""
    settings, clock = test_settings(database_url, redis_url=redis_url), FrozenClock()
    async with running(settings, clock) as one, running(settings, clock) as two:
        client, _, first = await signed_in(one)
        second = await good(two, client, first["refresh_token"])
        await one.within(lambda tx: one.services.clients.set_enabled(tx, client.id, False))
        refused(await two.refresh(client, second["refresh_token"]), "invalid_grant")
        password = {"username": "user1", "password": PASSWORD}
        refused(await two.token(client, grant_type="password", **password), "invalid_grant")


@pytest.mark.case("REF-25")
async def test_a_deleted_users_name_leads_to_somebody_else(service: Service) -> None:
    """A new account of the same name has another subject, and the old tokens are nobody's."""
    client, user, tokens = await signed_in(service)
    await service.execute(delete(users).where(users.c.id == user.id))
    again = await service.a_user(user.username)
    await over(service, client, tokens)
    fresh = await service.sign_in(client, again)
    assert unverified_claims(fresh["access_token"])["sub"] != unverified_claims(tokens["access_token"])["sub"]


# -- how many, and for how long ---------------------------------------------------------------------------------------


async def families_of(service: Service, client: Registered, user: User, count: int) -> list[str]:
    """Sign in `count` times, a second apart, and return the refresh tokens."""
    tokens = []
    for _ in range(count):
        service.clock.advance(1)
        tokens.append((await service.sign_in(client, user))["refresh_token"])
    return tokens


@pytest.mark.case("REF-32")
async def test_the_least_recently_used_session_gives_way(either: Service) -> None:
    """Fifty live families for a user at a client; a refresh counts as a use, and other clients count by themselves."""
    client, user = await either.a_client(), await either.a_user()
    other = await either.a_client()
    elsewhere = (await either.sign_in(other, user))["refresh_token"]
    tokens = await families_of(either, client, user, MOST_FAMILIES)
    assert await either.live_families(user) == MOST_FAMILIES + 1
    either.clock.advance(1)
    tokens[0] = (await good(either, client, tokens[0]))["refresh_token"]
    tokens += await families_of(either, client, user, 2)
    assert await either.live_families(user) == MOST_FAMILIES + 1
    for gone in tokens[1:3]:
        assert refused(await either.refresh(client, gone), "invalid_grant") == DEAD
    for kept in (tokens[0], tokens[3], tokens[-1]):
        await good(either, client, kept)
    await good(either, other, elsewhere)
    assert await events(either) == []


@pytest.mark.case("REF-32")
async def test_dead_sessions_are_buried_by_the_sign_ins_after_them(service: Service) -> None:
    """A script that signs in and out for ever does not fill the table, and what is buried stays refused."""
    client, user = await service.a_client(), await service.a_user()
    (live,) = await families_of(service, client, user, 1)
    tokens = []
    for _ in range(2 * MOST_FAMILIES + 5):
        tokens += await families_of(service, client, user, 1)
        await service.http.post("/revoke", data={"token": tokens[-1]}, auth=client.auth)
    assert len(await service.family_rows()) <= 2 * MOST_FAMILIES
    assert refused(await service.refresh(client, tokens[0]), "invalid_grant") == DEAD
    await good(service, client, live)


@pytest.mark.case("OPS-29")
async def test_cleaning_up_deletes_only_what_is_past_its_absolute_end(either: Service) -> None:
    """In batches; a used token is remembered until then, or its replay would go unnoticed."""
    client, _, first = await signed_in(either, refresh_idle_ttl=60, refresh_absolute_ttl=600)
    longer = await either.a_client()
    second = await good(either, client, first["refresh_token"])
    for _ in range(4):
        await either.sign_in(client, await either.a_user())
    lasting = (await either.sign_in(longer, await either.a_user()))["refresh_token"]

    async def clean() -> int:
        return await either.within(lambda tx: either.services.families.clean_up(tx, batch=3))

    either.clock.advance(599)
    assert await clean() == 0
    assert refused(await either.refresh(client, first["refresh_token"]), "invalid_grant") == REUSED
    either.clock.advance(1)
    assert [await clean() for _ in range(3)] == [3, 2, 0]
    await over(either, client, second)
    await good(either, longer, lasting)


# -- what the trail says ----------------------------------------------------------------------------------------------


async def test_an_act_that_cannot_be_audited_does_not_happen(service: Service) -> None:
    """The family's end and its audit row are one transaction: without the row, the replay is simply tried again."""
    client, _, first = await signed_in(service)
    second = await good(service, client, first["refresh_token"])
    await service.execute(text("ALTER TABLE audit_events RENAME TO audit_events_away"))
    answer = await service.refresh(client, first["refresh_token"])
    assert answer.status_code == 500
    assert "error" in answer.json()
    await service.execute(text("ALTER TABLE audit_events_away RENAME TO audit_events"))
    (family,) = await service.family_rows()
    assert family.revoked_at is None
    assert refused(await service.refresh(client, first["refresh_token"]), "invalid_grant") == REUSED
    await over(service, client, second)
