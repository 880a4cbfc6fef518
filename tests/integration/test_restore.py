"""A backup is restored with PostgreSQL's own programs, and nothing that was ended since comes back."""

import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert, select, update

from identity_service.accounts.access import SUPER_ADMIN
from identity_service.infra.database import Transaction
from identity_service.infra.installation import restore_number
from identity_service.infra.parts import in_parts
from identity_service.infra.tables import (
    api_keys,
    audit_events,
    email_tokens,
    spent_bootstrap_secrets,
    users,
)
from identity_service.settings import UnsafeSettings
from identity_service.verifier import TokenRefused, TokenVerifier, VerifiedClaims
from tests.support.backups import Backups
from tests.support.clock import FrozenClock
from tests.support.keys import Key, a_key, an_exchanger, exchange, exchanged, is_active
from tests.support.people import an_app, link, mails, signed_in
from tests.support.reading import key_id, refused
from tests.support.restoring import (
    Place,
    compromise,
    keys_in_use,
    live,
    newest_seal,
    rows_of,
    write,
)
from tests.support.server_process import ServerProcess
from tests.support.service import (
    BOOTSTRAP_SECRET,
    ISSUER,
    PASSWORD,
    SIBLING,
    Registered,
    Service,
    running,
    test_settings,
)

At = Callable[[str], Place]
NEW_PASSWORD = "Nachtigall-88-Nachtigall"


# -- the whole story --------------------------------------------------------------------------------------------------


async def test_what_was_ended_since_the_backup_does_not_come_back(lively_url: str, backups: Backups, at: At) -> None:
    """From a system that lives, over its backup and its loss, to one that lives again."""
    settings = {"registration": "open"}
    async with live(lively_url, **settings) as service:
        app, gateway = await an_app(service), await an_exchanger(service)
        shop = await service.a_client(audiences=[SIBLING], name="Shop")
        ann, eve, bob = [await service.a_user(name) for name in ("ann", "eve", "bob")]
        session = await signed_in(service, ann, app)
        idle = await signed_in(service, bob, app)
        at_work = await service.sign_in(shop, ann)
        stolen, kept = await a_key(service, ann), await a_key(service, ann)
        own = (await service.token(shop, grant_type="client_credentials")).json()["access_token"]
        await service.http.post("/v1/password-reset", json={"email": bob.email})
        reset = await link(service, bob.email, "reset_password")
        [signer] = [key for key in service.services.signing_keys.records if key.kid == key_id(own)]
        await newest_seal(service)

        backup = backups.dump(lively_url)

        used = await service.refresh(app, session.refresh_token)
        used = await service.refresh(app, used.json()["refresh_token"])
        assert used.status_code == 200
        await service.within(lambda tx: service.services.api_keys.revoke(tx, stolen.id, ann.id))
        await service.disable(eve)
        assert (await service.revoke(shop, own)).status_code == 200
        body = {"token": reset, "new_password": NEW_PASSWORD}
        assert (await service.http.post("/v1/password-reset/confirm", json=body)).status_code == 204
        await compromise(service, signer.kid)
        later = await service.a_client(name="New")
        after = await service.sign_in(later, ann)
        late = (await service.token(shop, grant_type="client_credentials")).json()["access_token"]
        assert key_id(late) != signer.kid
        anchor = await newest_seal(service)

    restored = backups.restore_elsewhere(backup)
    place = at(restored)
    with pytest.raises(UnsafeSettings, match="after-restore"):
        async with live(restored):
            pass
    broken = place.cli.run("audit", "verify", "--anchor", anchor)
    assert broken.code == 1
    first, last = re.findall(r"the rows (\d+) to (\d+) are missing", broken.out)[0]
    assert last == anchor.split(":")[0]

    done = place.restored("--compromised", signer.kid, "--disabled-user", "eve", "--anchor", anchor)

    assert (done["users"], done["clients"], done["links"], done["api_keys_suspended"]) == (3, 3, 1, 2)
    assert done["compromised"] == [signer.kid]
    assert signer.kid in done["signing_keys_out_of_use"]
    assert done["users_disabled"] == [str(eve.id)]
    async with live(restored, **settings) as service:
        # The session that had gone on is told from one that had not; neither goes on.
        for token in (session.refresh_token, used.json()["refresh_token"], idle.refresh_token):
            refused(await service.refresh(app, token), "invalid_grant")
        [told] = await service.events("refresh.ahead_of_record")
        assert (told.actor, told.client_id) == (str(ann.id), app.id)
        refused(await service.refresh(app, used.json()["refresh_token"]), "invalid_grant")
        assert len(await service.events("refresh.ahead_of_record")) == 1
        assert (await service.refresh(later, after["refresh_token"])).json()["error"] == "invalid_client"
        # Every access token is over, whenever and by whichever key it was signed.
        for token in (own, late, at_work["access_token"]):
            assert not await is_active(service, gateway, token)
        for token in (used.json()["access_token"], idle.headers["authorization"][7:]):
            assert (await service.me(token)).status_code == 401
        # API keys wait.
        for key in (stolen, kept):
            assert refused(await exchange(service, gateway, key), "invalid_grant")
        # A link works no more, whether it was used or not; who was disabled stays so.
        assert (await service.http.post("/v1/password-reset/confirm", json=body)).status_code == 400
        form = {"grant_type": "password", "password": PASSWORD}
        refused(await service.token(app, **form, username="eve"), "invalid_grant")
        # And honest people sign in again.
        for user in (ann, bob):
            again = await signed_in(service, user, app)
            assert (await again("GET")).status_code == 200
            assert (await service.refresh(app, again.refresh_token)).status_code == 200
        fresh = (await service.token(shop, grant_type="client_credentials")).json()["access_token"]
        assert await is_active(service, gateway, fresh)
        assert not {key_id(own), key_id(late)} & set(await keys_in_use(service))
        assert key_id(fresh) == done["signing_key"]
        await newest_seal(service)
    verified = place.cli.json("audit", "verify", "--anchor", anchor, "--anchor", done["anchor"])
    assert verified["good"]
    [gap] = verified["gaps"]
    assert (gap["from"], gap["to"]) == (int(first), int(last))
    assert (
        gap["goes_on_at"]
        == int(done["anchor"].split(":")[0])
        == restore_number(datetime.fromisoformat(done["restored_at"]))
    )
    said = place.cli.run("audit", "verify").out
    assert f"a restore has lost the rows {first} to {last}; the chain goes on at {gap['goes_on_at']}" in said


# -- epochs -----------------------------------------------------------------------------------------------------------


async def ended(service: Service, claims: VerifiedClaims) -> str | None:
    return await service.within(lambda tx: service.services.issued.ended(tx, claims))


async def test_no_epoch_of_the_lost_time_is_reached_again(lively_url: str, backups: Backups, at: At) -> None:
    """
    One step ahead may be where an epoch has been; a token that names such a one is dead, whoever signed it.

    Clients' own tokens, and those that were exchanged for an API key, say which epochs they belong to.
    """
    async with live(lively_url) as service:
        shop, gateway = await service.a_client(audiences=[SIBLING]), await an_exchanger(service)
        ann = await service.a_user("ann")
        key = await a_key(service, ann)
        backup = backups.dump(lively_url)
        for _ in range(3):
            await service.bump_client_epoch(shop)
            await service.within(lambda tx: service.services.users.end_sessions(tx, ann.id))
        tokens = [
            (await service.token(shop, grant_type="client_credentials")).json()["access_token"],
            await exchanged(service, gateway, key),
        ]
        own, by_key = (service.services.issued.read(token, audiences=[SIBLING]) for token in tokens)
        assert (own.claims["epoch"], by_key.claims["epoch"]) == (3, 3)
        assert [await ended(service, claims) for claims in (own, by_key)] == [None, None]
    place = at(backups.restore_elsewhere(backup))
    number = restore_number(datetime.fromisoformat(place.restored()["restored_at"]))
    assert place.cli.json("confirm-api-keys", key.id)["given_back"][0]["id"] == key.id
    async with live(place.url) as service:
        assert await ended(service, own) == "client_epoch"
        assert await ended(service, by_key) == "actor_ended"
        by_another = VerifiedClaims({**by_key.claims, "actor_epochs": [number]})
        assert await ended(service, by_another) == "api_key_ended"
        assert await ended(service, VerifiedClaims({**by_another.claims, "epoch": number})) is None
        assert await ended(service, VerifiedClaims({**own.claims, "epoch": number})) is None


async def test_two_restores_of_one_backup_have_nothing_in_common(lively_url: str, backups: Backups, at: At) -> None:
    """The first one lived for a while and was lost as well; what it issued is dead in the second."""
    async with live(lively_url) as service:
        shop = await service.a_client(audiences=[SIBLING])
        await newest_seal(service)
    backup = backups.dump(lively_url)
    places = [at(backups.restore_elsewhere(backup)) for _ in range(2)]
    first = places[0].restored()
    async with live(places[0].url) as service:
        token = (await service.token(shop, grant_type="client_credentials")).json()["access_token"]
        claims = service.services.issued.read(token, audiences=[SIBLING])
        anchor = await newest_seal(service)
    second = places[1].restored()
    async with live(places[1].url) as service:
        assert await ended(service, claims) == "client_epoch"
        assert not set(first["signing_keys_out_of_use"]) & set(await keys_in_use(service))
        assert first["signing_key"] not in await keys_in_use(service)
        assert await is_active(service, await an_exchanger(service), token) is False
    assert int(second["anchor"].split(":")[0]) > int(anchor.split(":")[0])
    verified = places[1].cli.json("audit", "verify", "--anchor", anchor)
    assert verified["good"]
    assert verified["gaps"][0]["to"] == int(anchor.split(":")[0])


async def test_everybody_is_reached_however_many_there_are(anywhere: Service) -> None:
    """The table is changed in parts; each row is in one of them, the deleted ones as well."""
    people = [await anywhere.a_user() for _ in range(7)]
    await anywhere.within(lambda tx: anywhere.services.users.delete(tx, people[3].id))
    for size in (1, 2, 3, 6, 7, 8):

        async def work(tx: Transaction, size: int = size) -> list[list[Any]]:
            return [
                list((await tx.execute(select(users.c.id).where(part))).scalars())
                async for part in in_parts(tx, users.c.id, size)
            ]

        parts = await anywhere.within(work)
        assert sorted(each for part in parts for each in part) == sorted(user.id for user in people)
        assert max(map(len, parts)) <= size
    number = restore_number(datetime.now(UTC))
    assert await anywhere.within(lambda tx: anywhere.services.users.end_all_sessions(tx, number)) == 7
    assert {row.epoch for row in await anywhere.execute(select(users.c.epoch))} == {number}
    for end_all in (anywhere.services.users.end_all_sessions, anywhere.services.clients.end_all_sessions):
        await anywhere.a_client()
        await anywhere.within(lambda tx, end_all=end_all: end_all(tx, number + 1))
        for epoch in (number, number + 1):
            with pytest.raises(ValueError, match="as far already"):
                await anywhere.within(lambda tx, end_all=end_all, epoch=epoch: end_all(tx, epoch))


# -- API keys ---------------------------------------------------------------------------------------------------------


async def works(service: Service, gateway: Registered, key: Key) -> bool:
    answer = await exchange(service, gateway, key)
    assert answer.status_code in (200, 400), answer.text
    own = (await service.http.get("/v1/users/me", headers=key.header)).status_code
    assert own == (200 if answer.status_code == 200 else 401)
    return answer.status_code == 200


async def test_api_keys_wait_until_somebody_gives_them_back(lively_url: str, backups: Backups, at: At) -> None:
    """One by one or all; nothing else than what the restore has suspended, and each is in the trail."""
    both = ("account:read", "orders:read")
    async with live(lively_url) as service:
        gateway, ann = await an_exchanger(service), await service.a_user("ann")
        first, second, third = [await a_key(service, ann, *both, name=name) for name in ("one", "two", "three")]
        revoked = await a_key(service, ann, *both)
        await service.within(lambda tx: service.services.api_keys.revoke(tx, revoked.id, ann.id))
        over = await a_key(service, ann, *both, expires_at=datetime.now(UTC) + timedelta(hours=1))
        assert await works(service, gateway, first)
        assert await works(service, gateway, over)
    ended = update(api_keys).where(api_keys.c.id == over.id).values(expires_at=datetime.now(UTC) - timedelta(hours=1))
    await write(lively_url, ended)
    for hours, key in enumerate((third, second, first), 1):  # a clock that is corrected may have turned them round
        made = datetime.now(UTC) - timedelta(hours=hours)
        await write(lively_url, update(api_keys).where(api_keys.c.id == key.id).values(created_at=made))
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    assert "after-restore` first" in place.cli.run("confirm-api-keys").refused()
    assert place.restored()["api_keys_suspended"] == 3
    listed = place.cli.json("confirm-api-keys")["suspended"]
    assert [(key["id"], key["name"], key["user_id"]) for key in listed] == [
        (key.id, name, str(ann.id)) for key, name in ((first, "one"), (second, "two"), (third, "three"))
    ]
    async with live(place.url) as service:
        everything = (first, second, third, revoked, over)
        assert [await works(service, gateway, key) for key in everything] == [False] * 5
        assert [event.detail["reason"] for event in await service.events("api_key.refused")][:2] == ["revoked"] * 2
        assert place.cli.run("confirm-api-keys", "--all", first.id).refused()
        found = place.cli.run("confirm-api-keys", second.id, revoked.id, over.id, "nosuchkey12", "--json")
        assert found.code == 1
        told = json.loads(found.out)
        assert [key["id"] for key in told["given_back"]] == [second.id]
        assert told["left"] == sorted([revoked.id, over.id, "nosuchkey12"])
        assert [await works(service, gateway, key) for key in everything] == [False, True, False, False, False]
        assert {key["id"] for key in place.cli.json("confirm-api-keys", "--all")["given_back"]} == {first.id, third.id}
        assert [await works(service, gateway, key) for key in everything] == [True, True, True, False, False]
        assert {event.target for event in await service.events("api_key.confirmed")} == {first.id, second.id, third.id}
    assert place.cli.json("confirm-api-keys", "--all") == {"given_back": [], "left": []}
    assert "0 API keys are suspended" in place.cli.run("confirm-api-keys").out


async def test_whose_keys_would_have_ended_since_gets_none_back(lively_url: str, backups: Backups, at: At) -> None:
    """A new password by mail ends keys, so does a disabled owner; what was suspended then cannot come back later."""
    async with live(lively_url) as service:
        gateway = await an_exchanger(service)
        shop, closed = await service.a_client(), await service.a_client()
        owners = [await service.a_user(name) for name in ("resets", "signs-out", "disabled", "deleted", "keeps")]
        keys = [await a_key(service, owner) for owner in (*owners, shop, closed)]
        await service.within(lambda tx: service.services.users.set_role(tx, owners[4].id, SUPER_ADMIN))
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    assert place.restored()["api_keys_suspended"] == 7
    async with live(place.url) as service:
        resets, signs_out, disabled, deleted, _ = owners
        await service.http.post("/v1/password-reset", json={"email": resets.email})
        body = {"token": await link(service, resets.email, "reset_password"), "new_password": NEW_PASSWORD}
        assert (await service.http.post("/v1/password-reset/confirm", json=body)).status_code == 204
        await service.within(lambda tx: service.services.users.end_sessions(tx, signs_out.id))
        await service.disable(disabled)
        await service.enable(disabled)
        await service.within(lambda tx: service.services.users.delete(tx, deleted.id))
        await service.bump_client_epoch(closed)
        kept = {keys[4].id, keys[5].id}
        assert {key["id"] for key in place.cli.json("confirm-api-keys")["suspended"]} == kept
        left = place.cli.run("confirm-api-keys", *(key.id for key in keys), "--json")
        assert {key["id"] for key in json.loads(left.out)["given_back"]} == kept
        assert {key.id for key in keys if (await exchange(service, gateway, key)).status_code == 200} == kept


@pytest.mark.parametrize("named", [False, True], ids=["all", "some"])
async def test_many_keys_are_given_back_batch_by_batch(anywhere: Service, named: bool) -> None:
    """Each once, and none is skipped, also where some between them cannot be given back."""
    services, at, epoch = anywhere.services, anywhere.clock.now(), 7
    owners = [await anywhere.a_user() for _ in range(2)]
    keys = [await a_key(anywhere, owners[number % 3 == 2]) for number in range(12)]
    await anywhere.within(lambda tx: services.users.end_all_sessions(tx, epoch))
    assert await anywhere.within(lambda tx: services.api_keys.suspend_all(tx, at=at, earlier=(), for_good=())) == 12
    await anywhere.within(lambda tx: services.users.end_sessions(tx, owners[1].id))
    wanted = [key.id for number, key in enumerate(keys) if number % 3 != 2]
    ids = [*wanted[:5], keys[2].id] if named else None
    returned: list[str] = []

    async def one_batch(tx: Transaction) -> list[str]:
        after = returned[-1] if returned else ""
        some = await services.api_keys.give_back(tx, at=at, epoch=epoch, ids=ids, after=after, batch=3)
        return [key.id for key in some]

    while more := await anywhere.within(one_batch):
        assert len(more) <= 3
        returned += more
    assert sorted(returned) == sorted(wanted[:5] if named else wanted)
    left = await anywhere.execute(select(api_keys.c.id).where(api_keys.c.revoked_at.is_not(None)))
    assert {row.id for row in left} == {key.id for key in keys} - set(returned)


async def test_the_command_goes_on_until_no_key_is_left(lively_url: str, at: At) -> None:
    """More of them than go into one transaction; each has its row."""
    async with live(lively_url) as service:
        await a_key(service, await service.a_user("ann"))
    [row] = await rows_of(lively_url, select(api_keys))
    copies = [{**row._mapping, "id": f"{number:011}"} for number in range(600)]
    await write(lively_url, insert(api_keys).values(copies))
    place = at(lively_url)
    assert place.restored("--unnoticed")["api_keys_suspended"] == 601
    assert len(place.cli.json("confirm-api-keys", "--all")["given_back"]) == 601
    rows = await rows_of(lively_url, select(audit_events.c.target).where(audit_events.c.event == "api_key.confirmed"))
    assert len({row.target for row in rows}) == len(rows) == 601


async def test_a_key_that_has_expired_meanwhile_is_not_given_back(lively_url: str, at: At) -> None:
    """It was live when it was suspended."""
    async with live(lively_url) as service:
        key = await a_key(
            service, await service.a_user("ann"), "orders:read", expires_at=datetime.now(UTC) + timedelta(hours=1)
        )
    place = at(lively_url)
    assert place.restored("--unnoticed")["api_keys_suspended"] == 1
    assert len(place.cli.json("confirm-api-keys")["suspended"]) == 1
    await write(lively_url, update(api_keys).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert place.cli.json("confirm-api-keys", "--all")["given_back"] == []
    assert json.loads(place.cli.run("confirm-api-keys", key.id, "--json").out)["left"] == [key.id]


async def test_keys_that_nobody_gave_back_stay_suspended_through_a_second_restore(
    lively_url: str, backups: Backups, at: At
) -> None:
    """They can be given back then as well; those that had been given back are suspended anew."""
    async with live(lively_url) as service:
        gateway, ann = await an_exchanger(service), await service.a_user("ann")
        waiting, returned = [await a_key(service, ann, "account:read", "orders:read") for _ in range(2)]
    first = at(backups.restore_elsewhere(backups.dump(lively_url)))
    first.restored()
    first.cli.json("confirm-api-keys", returned.id)
    second = at(backups.restore_elsewhere(backups.dump(first.url)))
    assert second.restored()["api_keys_suspended"] == 2
    async with live(second.url) as service:
        assert [await works(service, gateway, key) for key in (waiting, returned)] == [False, False]
        assert len(second.cli.json("confirm-api-keys", "--all")["given_back"]) == 2
        assert [await works(service, gateway, key) for key in (waiting, returned)] == [True, True]


async def test_keys_that_nobody_gives_back_are_deleted_like_revoked_ones(lively_url: str, at: At) -> None:
    """After 90 days, and not before."""
    async with live(lively_url) as service:
        await a_key(service, await service.a_user("ann"))
    place = at(lively_url)
    suspended_at = datetime.fromisoformat(place.restored("--unnoticed")["restored_at"])
    [row] = await rows_of(lively_url, select(api_keys.c.revoked_at))
    assert row.revoked_at == suspended_at
    for days, left in ((89, 1), (91, 0)):
        async with running(test_settings(lively_url), FrozenClock(suspended_at + timedelta(days=days))) as service:
            await service.run_job("cleanup")
            assert len(await service.execute(select(api_keys.c.id))) == left


def test_where_nothing_was_restored_no_key_is_suspended(lively_url: str, at: At) -> None:
    """Nor on a schema that knows nothing of it."""
    assert "no key is suspended" in at(lively_url).cli.run("confirm-api-keys").refused()


# -- links, mails, the bootstrap secret -------------------------------------------------------------------------------


async def test_links_end_with_the_mails_that_would_carry_them(lively_url: str, backups: Backups, at: At) -> None:
    """Notices that wait are sent: at worst a second time, under the same id."""
    async with live(lively_url) as service:
        ann = await service.a_user("ann", verified=False)
        bob = await service.a_user("bob")
        await service.http.post("/v1/email-verification", json={"email": ann.email})
        await service.http.post("/v1/password-reset", json={"email": bob.email})
        tokens = [
            ("email-verification", {"token": await link(service, ann.email, "verify_email")}),
            (
                "password-reset",
                {"token": await link(service, bob.email, "reset_password"), "new_password": NEW_PASSWORD},
            ),
        ]
        await service.within(
            lambda tx: service.services.outbox.enqueue(tx, template="password_changed", recipient=bob.email, context={})
        )
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    assert place.restored()["links"] == 2
    async with live(place.url) as service:
        assert await mails(service) == [("password_changed", bob.email)]
        assert await service.execute(select(email_tokens)) == []
        for path, body in tokens:
            assert (await service.http.post(f"/v1/{path}/confirm", json=body)).status_code == 400
        await service.http.post("/v1/password-reset", json={"email": bob.email})
        assert (await mails(service))[1:] == [("reset_password", bob.email)]


@pytest.mark.case("ADM-22")
@pytest.mark.parametrize("known", [True, False], ids=["the command knows the secret", "only the servers know it"])
async def test_a_bootstrap_secret_works_no_more(lively_url: str, backups: Backups, at: At, known: bool) -> None:
    """It may have been used in the time that is lost; the command need not know it."""
    backup = backups.dump(lively_url)
    root = {"secret": BOOTSTRAP_SECRET, "username": "root", "email": "root@example.org", "password": PASSWORD}
    async with live(lively_url, bootstrap_secret=BOOTSTRAP_SECRET) as service:
        assert (await service.http.post("/v1/bootstrap", json=root)).status_code == 201
    place = at(backups.restore_elsewhere(backup))
    place.restored(**({"IDENTITY_BOOTSTRAP_SECRET": BOOTSTRAP_SECRET} if known else {}))
    for secret in (BOOTSTRAP_SECRET, BOOTSTRAP_SECRET[::-1]):
        async with live(place.url, bootstrap_secret=secret) as service:
            assert (await service.http.post("/v1/bootstrap", json=root | {"secret": secret})).status_code == 404
            assert await service.execute(select(users)) == []
    digests = {bytes(row.digest) for row in await rows_of(place.url, select(spent_bootstrap_secrets.c.digest))}
    own = hashlib.sha256(BOOTSTRAP_SECRET.encode()).digest()
    assert (own in digests) == known  # the version before this one looks for this digest and no other


# -- signing keys -----------------------------------------------------------------------------------------------------


async def test_every_key_of_the_backup_leaves_the_key_set(lively_url: str, backups: Backups, at: At) -> None:
    """Also the one that waited: it may have signed. A sibling that asks has the new ones and refuses old tokens."""
    async with live(lively_url) as service:
        shop = await service.a_client(audiences=[SIBLING])
        before = await keys_in_use(service)
        old = (await service.token(shop, grant_type="client_credentials")).json()["access_token"]
        backup = backups.dump(lively_url)
        await compromise(service, key_id(old))
        late = (await service.token(shop, grant_type="client_credentials")).json()["access_token"]
        assert {key_id(old), key_id(late)} <= set(before)
        [unknown] = set(await keys_in_use(service)) - set(before)
    place = at(backups.restore_elsewhere(backup))
    done = place.restored("--compromised", key_id(old), "--compromised", "-no-key-of-ours", f"--compromised={unknown}")
    assert set(done["signing_keys_out_of_use"]) == set(before)
    assert done["compromised"] == [key_id(old)]
    assert done["unknown"] == ["-no-key-of-ours", unknown]
    with ServerProcess(place.url, issuer=ISSUER) as server:
        verifier = TokenVerifier(ISSUER, SIBLING, jwks_uri=f"{server.url}/.well-known/jwks.json")
        form = {"grant_type": "client_credentials"}
        new = httpx2.post(f"{server.url}/token", data=form, auth=shop.auth, timeout=30).json()["access_token"]
        assert verifier.verify_sync(new, "orders:read").client_id == shop.id
        for token in (old, late):
            with pytest.raises(TokenRefused):
                verifier.verify_sync(token)
    async with live(place.url) as service:
        kids = await keys_in_use(service)
        assert len(kids) == 2
        assert not set(kids) & set(before)
        assert done["signing_key"] in kids
        assert {event.target for event in await service.events("key.compromised")} == set(before)
        assert {event.target for event in await service.events("key.created") if event.actor == "cli"} == set(kids)
    states = {key["kid"]: key["state"] for key in place.cli.json("keys", "list")}
    assert {states[kid] for kid in before} == {"compromised"}
    assert states[done["signing_key"]] == "active"
