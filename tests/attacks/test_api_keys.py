"""Getting more out of an API key, or of a token exchange, than somebody was given."""

import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import httpx2
import pytest
from sqlalchemy import select, update

from identity_service.accounts.users import User
from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.ids import decode_token, encode_token
from identity_service.infra.tables import api_keys, audit_events, clients, signing_keys
from tests.support.issuer import private_key
from tests.support.keys import (
    OWN,
    Key,
    a_key,
    an_exchanger,
    exchange,
    exchanged,
    is_active,
    tampered,
)
from tests.support.operators import EVERY_SCOPE, an_operator
from tests.support.races import blocked, held
from tests.support.reading import unverified_claims
from tests.support.refusals import refusal
from tests.support.service import ISSUER, SIBLING, Service, running, test_settings
from tests.support.tokens import OMIT, changed, compact, parts_of
from tests.support.wire import post

ORDERS = ["orders:read"]


@pytest.fixture
def api(service: Service) -> Service:
    """The service on PostgreSQL and Redis."""
    return service


async def bearer(api: Service, user: User, scope: str = " ".join(EVERY_SCOPE)) -> dict[str, str]:
    """Sign somebody in for our own API and return the header that says so."""
    client = await api.a_client(scope=(*EVERY_SCOPE, "orders:write"), audiences=(ISSUER,))
    return {"authorization": f"Bearer {(await api.sign_in(client, user, scope=scope))['access_token']}"}


async def made(api: Service, headers: dict[str, str], **changes: Any) -> httpx2.Response:
    """Ask for a key of one's own."""
    return await api.http.post(OWN, json={"name": "A script", "scope": ORDERS, **changes}, headers=headers)


async def me(api: Service, key: Key | str, **headers: str) -> httpx2.Response:
    """`GET /v1/users/me` with a key."""
    shown = key.text if isinstance(key, Key) else key
    return await api.http.get("/v1/users/me", headers={"x-api-key": shown, **headers})


# -- the secret -------------------------------------------------------------------------------------------------------


@pytest.mark.case("KEY-01")
async def test_the_secret_is_in_one_answer_and_nowhere_else(api: Service) -> None:
    """Not in a list, not in the trail, not in the database: what is stored there opens nothing."""
    headers = await bearer(api, await api.a_user())
    answer = await made(api, headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    key = answer.json()["key"]
    secret = key[16:-6]
    rotated = (await api.http.post(f"{OWN}/{answer.json()['id']}/rotate", headers=headers)).json()["key"]
    listed = await api.http.get(OWN, headers=headers)
    assert listed.json()["items"][0]["last4"] == rotated[-10:-6]
    assert "key" not in listed.json()["items"][0]
    [stored] = await api.execute(select(api_keys))
    trail = await api.execute(select(audit_events))
    for seen in (listed.text, repr(stored), repr(trail)):
        assert secret not in seen
        assert rotated[16:-6] not in seen
    for digest in (stored.digest, stored.previous_digest):
        assert len(digest) == 32
        again = f"idk_{stored.id}_"
        for guess in (encode_token(again, digest), again + digest.hex()):
            assert (await me(api, guess)).status_code == 401


@pytest.mark.case("KEY-02")
async def test_a_key_with_any_letter_changed_is_none_and_costs_no_query(api: Service, statements: list[str]) -> None:
    """The checksum tells, at both doors; so do a wrong length and a letter that is none."""
    key = await a_key(api, await api.a_user(), "account:read")
    assert (await me(api, key)).status_code == 200
    gateway = await an_exchanger(api)
    await exchange(api, gateway, key)
    statements.clear()
    wrong = [*list(tampered(key.text))[::5], key.text[:-1], key.text + "A", "idk_", key.text[:16], f" {key.text}"]
    for each in wrong:
        assert api.services.api_keys.read(Secret(each)) is None, each
    for each in wrong[:6]:
        assert (await me(api, each)).status_code == 401
    for each in wrong[6:12]:
        refusal(await exchange(api, gateway, Key(key.id, each)), "invalid_grant", each)
    assert [each for each in statements if "api_keys" in each] == []
    assert (await me(api, key)).status_code == 200
    assert [each for each in statements if "api_keys" in each] != []


@pytest.mark.case("KEY-02")
async def test_a_secret_fits_no_other_id_and_an_id_no_other_secret(api: Service) -> None:
    """Both spelled with a right checksum, so that only the database's digest stands between."""
    person = await api.a_user()
    one, other = await a_key(api, person, "account:read"), await a_key(api, person, "account:read")
    mixed = encode_token(f"idk_{one.id}_", _payload(other.text))
    invented = encode_token(f"idk_{one.id}_", bytes(32))
    nobodys = encode_token("idk_AAAAAAAAAAA_", _payload(one.text))
    gateway = await an_exchanger(api)
    for each in (mixed, invented, nobodys):
        assert (await me(api, each)).status_code == 401
        refusal(await exchange(api, gateway, Key(one.id, each)), "invalid_grant", each)
    for key in (one, other):
        assert (await me(api, key)).status_code == 200
    # Who can write rows, and knows one key, cannot make its secret open another's.
    [row] = await api.execute(select(api_keys.c.digest).where(api_keys.c.id == other.id))
    await api.execute(update(api_keys).where(api_keys.c.id == one.id).values(digest=row.digest))
    assert (await me(api, mixed)).status_code == 401


def _payload(text: str) -> bytes:
    payload = decode_token(text[:16], 32, text)
    assert payload is not None
    return payload


@pytest.mark.case("KEY-02")
async def test_guessing_through_a_client_is_slowed_and_holds_up_nobody_with_a_good_key(api: Service) -> None:
    """Thirty wrong ones at once, then they wait; a right one through the same client never does."""
    key = await a_key(api, await api.a_user())
    gateway = await an_exchanger(api)
    wrong = Key("x", encode_token("idk_AAAAAAAAAAA_", bytes(32)))
    answers = [await exchange(api, gateway, wrong) for _ in range(31)]
    for answer in answers[:30]:
        refusal(answer, "invalid_grant", wrong.text)
    refusal(answers[30], "temporarily_unavailable", wrong.text, status=429)
    refusal(await exchange(api, gateway, Key("x", "idk_nonsense")), "temporarily_unavailable", status=429)
    assert (await exchange(api, gateway, key)).status_code == 200
    refusal(await exchange(api, await an_exchanger(api), wrong), "invalid_grant", wrong.text)
    api.clock.advance(3)  # type: ignore[attr-defined]
    refusal(await exchange(api, gateway, wrong), "invalid_grant", wrong.text)


# -- more than one may ------------------------------------------------------------------------------------------------


@pytest.mark.case("KEY-03")
async def test_nobody_makes_a_key_that_may_more_than_they(api: Service) -> None:
    """Neither what their role holds not, nor what the credential in their hand does not show."""
    person = await bearer(api, await api.a_user(), "account:read account:write orders:read")
    for scope in (["users:read"], ["orders:read", "users:write"], ["orders:write"], ["nonsense"], ["*"]):
        assert (await made(api, person, scope=scope)).status_code == 403
    assert (await made(api, person, scope=["account:read", "orders:read"])).status_code == 201
    boss = await api.a_user(role="super_admin")
    narrow = await bearer(api, boss, "account:write")
    for scope in (["users:read"], ["orders:read"]):
        assert (await made(api, narrow, scope=scope)).status_code == 403
    assert (await made(api, narrow, scope=["account:write"])).status_code == 201
    assert (await made(api, await bearer(api, boss), scope=["users:read"])).status_code == 201
    client = await api.a_client(scope=("openid", "offline_access", "orders:read"))
    operator = await an_operator(api)
    for scope in (["openid"], ["offline_access", "orders:read"]):  # about a person who signs in, not for a key
        assert (await made(api, await bearer(api, boss), scope=scope)).status_code == 403
        answer = await operator("POST", f"/clients/{client.id}/api-keys", {"name": "x", "scope": scope})
        assert answer.status_code == 422


@pytest.mark.case("KEY-03")
async def test_a_narrow_credential_cannot_rotate_itself_a_wide_key(api: Service) -> None:
    """Who is shown the new secret has all that the key may do."""
    boss = await api.a_user(role="super_admin")
    wide = (await made(api, await bearer(api, boss), scope=["users:write", "orders:read"])).json()
    narrow = await bearer(api, boss, "account:write")
    answer = await api.http.post(f"{OWN}/{wide['id']}/rotate", headers=narrow)
    assert answer.status_code == 403, answer.text
    assert (await api.http.get("/v1/admin/users", headers={"x-api-key": wide["key"]})).status_code in (403, 404)
    assert (await api.http.post(f"{OWN}/{wide['id']}/rotate", headers=await bearer(api, boss))).status_code == 200
    assert (await api.http.delete(f"{OWN}/{wide['id']}", headers=narrow)).status_code == 204


@pytest.mark.case("KEY-03")
async def test_an_operator_rotates_no_services_key_that_may_more_than_they(api: Service) -> None:
    """A role that may write clients, and nothing else, does not become whatever a service may be."""
    mighty = await api.a_client(scope=("users:write", "orders:read"))
    key = await a_key(api, mighty, "users:write")
    await api.within(lambda tx: api.services.access.grant(tx, "moderator", ["clients:write", "clients:read"]))
    operator = await an_operator(api, role="moderator")
    assert (await operator("POST", f"/api-keys/{key.id}/rotate")).status_code == 403
    body = {"name": "x", "scope": ["users:write"]}
    assert (await operator("POST", f"/clients/{mighty.id}/api-keys", body)).status_code == 403
    boss = await an_operator(api)
    assert (await boss("POST", f"/api-keys/{key.id}/rotate")).status_code == 200
    assert (await boss("POST", f"/clients/{mighty.id}/api-keys", {**body, "scope": ["stats:read"]})).status_code == 403
    assert (await boss("POST", f"/clients/{mighty.id}/api-keys", body)).status_code == 201


@pytest.mark.case("KEY-03")
async def test_a_demoted_owners_key_opens_no_more_than_they_may_now(api: Service) -> None:
    """At the next request, without a new key."""
    boss = await api.a_user(role="super_admin")
    key = await a_key(api, boss, "roles:read")
    assert (await api.http.get("/v1/admin/roles", headers=key.header)).status_code == 200
    await api.patch_user(boss, role="user")
    assert (await api.http.get("/v1/admin/roles", headers=key.header)).status_code == 403


@pytest.mark.case("KEY-03")
async def test_a_key_makes_rotates_and_ends_no_key(api: Service) -> None:
    """One that leaks must not outlive its end, nor lock its owner out; listing is all it may."""
    boss = await api.a_user(role="super_admin")
    service = await api.a_client(scope=EVERY_SCOPE)
    theirs = await a_key(api, service, *EVERY_SCOPE)
    key = await a_key(api, boss, *EVERY_SCOPE)
    body = {"name": "x", "scope": ORDERS}
    own = (("POST", OWN), ("POST", f"{OWN}/{key.id}/rotate"), ("DELETE", f"{OWN}/{key.id}"))
    for method, path in (
        ("POST", f"/v1/admin/clients/{service.id}/api-keys"),
        ("DELETE", f"/v1/admin/clients/{service.id}/api-keys/{theirs.id}"),
        ("POST", f"/v1/admin/api-keys/{theirs.id}/rotate"),
        ("DELETE", f"/v1/admin/api-keys/{theirs.id}"),
        *own,
    ):
        json = body if path.endswith("api-keys") else None
        for shown in (key,) if (method, path) in own else (key, theirs):
            answer = await api.http.request(method, path, headers=shown.header, json=json)
            assert answer.status_code == 403, f"{method} {path}: {answer.text}"
    assert (await api.http.get(OWN, headers=key.header)).status_code == 200
    assert len(await api.execute(select(api_keys).where(api_keys.c.revoked_at.is_(None)))) == 2


@pytest.mark.case("KEY-03")
async def test_a_key_cannot_launder_itself_into_a_session(api: Service) -> None:
    """What it is exchanged for, even for our own API, stays without a person's sign-in behind it."""
    person = await api.a_user()
    gateway = await an_exchanger(api, exchange_audiences=(ISSUER,))
    token = await exchanged(api, gateway, await a_key(api, person, "account:write", "account:read"))
    headers = {"authorization": f"Bearer {token}"}
    for answer in (await made(api, headers, scope=["account:read"]), await api.http.get(OWN, headers=headers)):
        assert answer.status_code in (401, 403), answer.text
    assert len(await api.execute(select(api_keys))) == 1


@pytest.mark.case("KEY-03")
@pytest.mark.case("TEX-09")
async def test_who_acts_for_somebody_makes_no_keys_in_their_name(api: Service) -> None:
    """A token that a service got in exchange ends with the session; a key would outlive it."""
    boss = await api.a_user(role="super_admin")
    client = await api.a_client(scope=EVERY_SCOPE, audiences=(ISSUER,))
    session = (await api.sign_in(client, boss))["access_token"]
    gateway = await an_exchanger(api, scope=EVERY_SCOPE, exchange_audiences=(ISSUER,))
    acting = {"authorization": f"Bearer {await exchanged(api, gateway, session)}"}
    key, theirs = await a_key(api, boss), await a_key(api, client)
    body = {"name": "x", "scope": ORDERS}
    assert (await api.http.get(OWN, headers=acting)).status_code == 200
    assert (await api.http.get(f"/v1/admin/clients/{client.id}/api-keys", headers=acting)).status_code == 200
    for method, path in (
        ("POST", OWN),
        ("POST", f"{OWN}/{key.id}/rotate"),
        ("DELETE", f"{OWN}/{key.id}"),
        ("POST", f"/v1/admin/clients/{client.id}/api-keys"),
        ("DELETE", f"/v1/admin/clients/{client.id}/api-keys/{theirs.id}"),
        ("POST", f"/v1/admin/api-keys/{theirs.id}/rotate"),
        ("DELETE", f"/v1/admin/api-keys/{key.id}"),
    ):
        json = body if path.endswith("api-keys") else None
        answer = await api.http.request(method, path, headers=acting, json=json)
        assert answer.status_code == 403, f"{method} {path}: {answer.text}"
    own = (await api.token(client, grant_type="client_credentials", scope="clients:write")).json()["access_token"]
    headers = {"authorization": f"Bearer {own}"}
    rotated = await api.http.post(f"/v1/admin/api-keys/{theirs.id}/rotate", headers=headers)
    assert rotated.status_code == 200, rotated.text


@pytest.mark.case("KEY-09")
async def test_somebody_elses_key_is_not_there(api: Service) -> None:
    """Not to be listed, rotated or ended, whoever asks: 404 and no effect, as for a key that never was."""
    owner, other = await api.a_user(), await api.a_user()
    key, theirs = await a_key(api, owner, "account:read"), await a_key(api, await api.a_client())
    headers = await bearer(api, other)
    [before] = await api.execute(select(api_keys).where(api_keys.c.id == key.id))
    for key_id in (key.id, theirs.id, "AAAAAAAAAAA", "a", "A" * 64, "idk_AAAAAAA"):
        assert (await api.http.post(f"{OWN}/{key_id}/rotate", headers=headers)).status_code == 404, key_id
        assert (await api.http.delete(f"{OWN}/{key_id}", headers=headers)).status_code == 404, key_id
    assert (await api.http.get(OWN, headers=headers)).json()["items"] == []
    [after] = await api.execute(select(api_keys).where(api_keys.c.id == key.id))
    assert before == after
    assert (await me(api, key)).status_code == 200
    boss = await an_operator(api)
    assert (await boss("POST", f"/api-keys/{key.id}/rotate")).status_code == 404  # a person's is the person's to rotate
    client = await api.a_client()
    assert (await boss("DELETE", f"/clients/{client.id}/api-keys/{theirs.id}")).status_code == 404
    assert (await boss("DELETE", f"/clients/{client.id}/api-keys/{key.id}")).status_code == 404


async def test_an_operator_ends_no_key_of_somebody_who_may_more(api: Service) -> None:
    """Nor a service's without the right to change clients; others' they do."""
    admin = await an_operator(api, role="admin")
    boss, person = await api.a_user(role="super_admin"), await api.a_user()
    of_boss, of_person = await a_key(api, boss), await a_key(api, person)
    of_service = await a_key(api, await api.a_client())
    assert (await admin("DELETE", f"/api-keys/{of_boss.id}")).status_code == 403
    assert (await admin("DELETE", f"/api-keys/{of_service.id}")).status_code == 403
    assert (await admin("DELETE", f"/api-keys/{of_person.id}")).status_code == 204
    assert (await (await an_operator(api))("DELETE", f"/api-keys/{of_service.id}")).status_code == 204
    moderator = await an_operator(api, role="moderator")
    assert (await moderator("DELETE", f"/api-keys/{of_boss.id}")).status_code == 403
    rows = await api.execute(select(api_keys.c.id).where(api_keys.c.revoked_at.is_(None)))
    assert [row.id for row in rows] == [of_boss.id]


@pytest.mark.case("KEY-08")
async def test_two_credentials_in_one_request_are_refused(api: Service) -> None:
    """Whichever of them would be good; nobody shall have to know which one counts."""
    person = await api.a_user()
    key = await a_key(api, person, "account:read")
    for headers in (
        [("x-api-key", key.text), *(await bearer(api, person)).items()],
        [("x-api-key", key.text), ("authorization", "Bearer x")],
        [("x-api-key", key.text), ("x-api-key", key.text)],
    ):
        assert (await api.http.get("/v1/users/me/api-keys", headers=headers)).status_code == 400


# -- what has ended ---------------------------------------------------------------------------------------------------

Ending = Callable[[Service, User, Key], Awaitable[object]]


async def _revoke(api: Service, person: User, key: Key) -> None:
    assert (await api.http.delete(f"{OWN}/{key.id}", headers=await bearer(api, person))).status_code == 204


async def _delete_owner(api: Service, person: User, key: Key) -> None:
    await api.within(lambda tx: api.services.users.delete(tx, person.id))


async def _expire(api: Service, person: User, key: Key) -> None:
    end = api.clock.now()
    await api.execute(update(api_keys).where(api_keys.c.id == key.id).values(expires_at=end))


ENDINGS: dict[str, Ending] = {
    "revoked": _revoke,
    "owner_disabled": lambda api, person, key: api.disable(person),
    "owner_deleted": _delete_owner,
    "expired": _expire,
}


@pytest.mark.case("KEY-05")
@pytest.mark.case("KEY-10")
@pytest.mark.case("TEX-07")
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_key_that_has_ended_is_dead_on_every_replica_and_so_is_all_it_was_exchanged_for(
    api: Service, database_url: str, redis_url: str, ending: str
) -> None:
    """At once, for nothing remembers a key; also the token that was exchanged on from its token."""
    person = await api.a_user()
    key = await a_key(api, person, "account:read", "orders:read")
    gateway = await an_exchanger(api, exchange_audiences=(SIBLING, ISSUER))
    token = await exchanged(api, gateway, key)
    child = await exchanged(api, gateway, token)
    async with running(test_settings(database_url, redis_url=redis_url), api.clock) as replica:
        for each in (api, replica):
            assert (await me(each, key)).status_code == 200
            assert await is_active(each, gateway, token)
            assert await is_active(each, gateway, child)
        await ENDINGS[ending](api, person, key)
        for each in (replica, api):
            assert (await me(each, key)).status_code == 401
            refusal(await exchange(each, gateway, key), "invalid_grant", key.text)
            for descendant in (token, child):
                assert not await is_active(each, gateway, descendant)
                refusal(await exchange(each, gateway, descendant), "invalid_grant", descendant)
    reason = "owner_disabled" if ending == "owner_deleted" else ending
    rows = {(row.target, row.client_id, row.detail["reason"]) for row in await api.events("api_key.refused")}
    assert rows == {(key.id, None, reason), (key.id, gateway.id, reason)}


@pytest.mark.case("KEY-05")
async def test_a_services_key_ends_with_its_client(api: Service) -> None:
    """Disabled: dead; enabled again: the key works, and the tokens of before do not."""
    owner, gateway = await api.a_client(), await an_exchanger(api)
    key = await a_key(api, owner)
    token = await exchanged(api, gateway, key)
    assert await is_active(api, gateway, token)
    await api.within(lambda tx: api.services.clients.set_enabled(tx, owner.id, False))
    refusal(await exchange(api, gateway, key), "invalid_grant", key.text)
    assert not await is_active(api, gateway, token)
    await api.within(lambda tx: api.services.clients.set_enabled(tx, owner.id, True))
    assert not await is_active(api, gateway, token)
    assert await is_active(api, gateway, await exchanged(api, gateway, key))


@pytest.mark.case("KEY-05")
async def test_tokens_exchanged_for_a_persons_key_stay_dead_when_the_person_comes_back(api: Service) -> None:
    """The key rests while its owner is disabled; what it was exchanged for ends for good."""
    person, gateway = await api.a_user(), await an_exchanger(api)
    key = await a_key(api, person)
    token = await exchanged(api, gateway, key)
    await api.disable(person)
    assert not await is_active(api, gateway, token)
    await api.enable(person)
    assert not await is_active(api, gateway, token)
    assert await is_active(api, gateway, await exchanged(api, gateway, key))


@pytest.mark.case("KEY-05")
async def test_a_replaced_secret_is_exchanged_for_nothing_that_outlives_it(api: Service) -> None:
    """Whoever still has it gets tokens that end with the overlap."""
    person, gateway = await api.a_user(), await an_exchanger(api)
    old = await a_key(api, person)
    new = await api.within(lambda tx: api.services.api_keys.rotate(tx, old.id, person.id, timedelta(seconds=100)))
    assert new is not None
    ends = [(await exchange(api, gateway, key)).json()["expires_in"] for key in (old, Key(old.id, new.text.reveal()))]
    assert ends[0] <= 100 < ends[1]


@pytest.mark.case("KEY-06")
async def test_a_revocation_while_redis_is_away_holds_when_it_is_back(api: Service, database_url: str) -> None:
    """There is no copy of a key anywhere that could come back to life."""
    person = await api.a_user()
    key, gateway = await a_key(api, person, "account:read"), await an_exchanger(api)
    assert (await me(api, key)).status_code == 200
    assert (await exchange(api, gateway, key)).status_code == 200
    settings = test_settings(database_url, redis_url="redis://127.0.0.1:1/0")
    async with running(settings, api.clock) as cut_off:
        assert (await me(cut_off, key)).status_code == 200
        await _revoke(cut_off, person, key)
        assert (await me(cut_off, key)).status_code == 401
    assert (await me(api, key)).status_code == 401
    refusal(await exchange(api, gateway, key), "invalid_grant", key.text)


@pytest.mark.case("TEX-02")
@pytest.mark.case("TEX-07")
@pytest.mark.case("INT-03")
@pytest.mark.parametrize(
    "ending",
    ["revoked", "signed_out", "disabled", "deleted", "password", "app_disabled", "app_epoch", "expired"],
)
async def test_a_token_that_has_ended_is_not_exchanged_and_takes_its_descendants_along(
    api: Service, ending: str
) -> None:
    """Live state is asked, not only the signature: by an exchange, by introspection, by our own API."""
    app, person = await api.a_client(), await api.a_user()
    signed_in = await api.sign_in(app, person)
    subject = signed_in["access_token"]
    gateway = await an_exchanger(api, exchange_audiences=(SIBLING, ISSUER))
    child = await exchanged(api, gateway, subject, resources=[ISSUER])
    grandchild = await exchanged(api, await an_exchanger(api), child)
    assert (await api.me(child)).status_code == 200
    for token in (subject, child, grandchild):
        assert await is_active(api, gateway, token)
    if ending == "revoked":
        assert (await api.revoke(app, subject)).status_code == 200
    elif ending == "signed_out":
        assert (await api.revoke(app, signed_in["refresh_token"])).status_code == 200
    elif ending == "disabled":
        await api.disable(person)
    elif ending == "deleted":
        await api.within(lambda tx: api.services.users.delete(tx, person.id))
    elif ending == "password":
        await api.change_password(person, "another good one, a long one")
    elif ending == "app_disabled":
        await api.within(lambda tx: api.services.clients.set_enabled(tx, app.id, False))
    elif ending == "app_epoch":
        await api.bump_client_epoch(app)
    else:
        api.clock.advance(3700)  # type: ignore[attr-defined]
    assert (await api.me(child)).status_code == 401
    for token in (subject, child, grandchild):
        assert not await is_active(api, gateway, token)
        refusal(await exchange(api, gateway, token), "invalid_grant", token)


@pytest.mark.case("TEX-07")
@pytest.mark.case("INT-06")
async def test_a_link_that_breaks_in_the_middle_ends_what_comes_after_it(api: Service) -> None:
    """Each actor may revoke the token it got; those before it are left alone."""
    one, two = await an_exchanger(api), await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    first = await exchanged(api, one, subject)
    second = await exchanged(api, two, first)
    third = await exchanged(api, one, second)
    assert (await api.revoke(two, second)).status_code == 200
    assert [await is_active(api, one, token) for token in (subject, first, second, third)] == [True, True, False, False]
    assert (await api.revoke(two, first)).status_code == 400  # not its own


@pytest.mark.case("TEX-07")
@pytest.mark.parametrize("place", [0, 1], ids=["newest", "earlier"])
@pytest.mark.parametrize("how", ["disabled", "enabled_again", "row"])
async def test_a_client_that_is_disabled_ends_all_tokens_it_has_acted_for(api: Service, place: int, how: str) -> None:
    """Wherever in the chain it stands; enabling it does not revive them."""
    first, last = await an_exchanger(api), await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    token = await exchanged(api, last, await exchanged(api, first, subject))
    reader = await an_exchanger(api)
    assert await is_active(api, reader, token)
    actor = (last, first)[place]
    if how == "row":  # whoever wrote it, and whatever else they forgot
        await api.execute(update(clients).where(clients.c.id == actor.id).values(enabled=False))
        api.clock.advance(1)  # type: ignore[attr-defined]
    else:
        await api.within(lambda tx: api.services.clients.set_enabled(tx, actor.id, False))
    if how == "enabled_again":
        await api.within(lambda tx: api.services.clients.set_enabled(tx, actor.id, True))
    assert not await is_active(api, reader, token)
    refusal(await exchange(api, reader, token), "invalid_grant", token)
    assert await is_active(api, reader, subject)


@pytest.mark.case("TEX-07")
async def test_the_token_of_a_client_ends_with_that_client(api: Service) -> None:
    """Also what others have exchanged it for."""
    service, gateway = await api.a_client(audiences=(SIBLING,)), await an_exchanger(api)
    own = (await api.token(service, grant_type="client_credentials")).json()["access_token"]
    token = await exchanged(api, gateway, own)
    child = await exchanged(api, gateway, token)
    assert await is_active(api, gateway, child)
    await api.bump_client_epoch(service)
    for each in (own, token, child):
        assert not await is_active(api, gateway, each)
        refusal(await exchange(api, gateway, each), "invalid_grant", each)


# -- tokens that are not ours -----------------------------------------------------------------------------------------


@pytest.mark.case("TEX-02")
@pytest.mark.case("TEX-03")
async def test_a_token_that_we_did_not_issue_is_not_exchanged(api: Service) -> None:
    """Another issuer's, one under a key that has left the set, one without signature, one with a letter changed."""
    gateway = await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    header, claims = parts_of(subject)
    ours, stranger = api.services.signing_keys._loaded[header["kid"]].private, private_key("a stranger's")
    forged = [
        compact(header, {**claims, "iss": "https://other.example"}, ours),
        compact(header, claims, stranger),
        compact({**header, "kid": "retired"}, claims, stranger),
        compact({**header, "alg": "none"}, claims, ours),
        compact({**header, "typ": "JWT"}, claims, ours),
        subject[:-8] + "AAAAAAAA",
        "nonsense",
    ]
    for token in forged:
        refusal(await exchange(api, gateway, token), "invalid_grant", token)
    again = compact(header, claims, ours)
    assert (await exchange(api, gateway, again)).status_code == 200


@pytest.mark.case("TEX-02")
@pytest.mark.parametrize("ended", ["compromised_at", "removed_at"])
async def test_a_token_whose_key_was_compromised_or_has_retired_is_not_exchanged(api: Service, ended: str) -> None:
    """Its signature is right, and nothing vouches for the key any more."""
    gateway = await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    assert (await exchange(api, gateway, subject)).status_code == 200
    kid, now = parts_of(subject)[0]["kid"], api.clock.now()
    await api.execute(update(signing_keys).where(signing_keys.c.kid == kid).values({ended: now}))
    await api.within(api.services.signing_keys.poll)
    refusal(await exchange(api, gateway, subject), "invalid_grant", subject)


@pytest.mark.case("TEX-03")
@pytest.mark.parametrize(
    "changes",
    [
        {"act": OMIT, "sid": OMIT},
        {"act": "cl_x"},
        {"act": {}},
        {"act": {"sub": 1}},
        {"act": {"sub": "cl_nobody"}},
        {"act": {"sub": "\0"}},
        {"actor_epochs": OMIT},
        {"actor_epochs": 0},
        {"actor_epochs": []},
        {"actor_epochs": [0, 0]},
        {"actor_epochs": ["0"]},
        {"actor_epochs": [True]},
        {"actor_epochs": [0.5]},
        {"actor_epochs": [-1]},
        {"parents": "x"},
        {"parents": [1]},
        {"parents": ["x"] * 5},
        {"parents": ["\0"]},
        {"key_id": 1},
        {"key_id": "\0"},
        {"key_id": "AAAAAAAAAAA", "sid": OMIT},
        {"epoch": "0"},
        {"sid": OMIT},
        {"sid": OMIT, "epoch": 0},
        {"sid": str(uuid.UUID(int=0))},
        {"jti": "a\0"},
    ],
    ids=str,
)
async def test_a_lineage_that_we_never_write_makes_a_token_worthless(api: Service, changes: dict[str, Any]) -> None:
    """Under our own signature even: 200 and inactive, never a fault."""
    gateway = await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    good = unverified_claims(await exchanged(api, gateway, subject))
    sign = api.services.signing_keys.sign
    assert await is_active(api, gateway, sign(good, typ="at+jwt"))
    token = sign(changed(good, changes), typ="at+jwt")
    assert not await is_active(api, gateway, token)
    refusal(await exchange(api, gateway, token), "invalid_grant", token)


@pytest.mark.case("TEX-06")
async def test_a_chain_that_is_longer_than_any_of_ours_is_worthless(api: Service) -> None:
    """However long it is: it is not followed to its end."""
    gateway = await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    good = unverified_claims(await exchanged(api, gateway, subject))
    for actors in (4, 5, 100):
        act: dict[str, Any] = {"sub": gateway.id}
        for _ in range(actors - 1):
            act = {"sub": gateway.id, "act": act}
        said = {**good, "act": act, "actor_epochs": [0] * actors}
        token = api.services.signing_keys.sign(said, typ="at+jwt")
        assert await is_active(api, gateway, token) == (actors == 4)


# -- where from -------------------------------------------------------------------------------------------------------


@pytest.mark.case("KEY-12")
@pytest.mark.parametrize(
    ("networks", "peer", "allowed"),
    [
        (["203.0.113.7"], "203.0.113.7", True),
        (["203.0.113.0/24"], "203.0.113.255", True),
        (["203.0.113.7"], "203.0.113.8", False),
        (["203.0.113.7"], "::ffff:203.0.113.7", True),
        (["198.51.100.0/24", "203.0.113.7"], "203.0.113.7", True),
        (["2001:db8:1:2::/64"], "2001:db8:1:2:3:4:5:6", True),
        (["2001:db8:1::/48"], "2001:db8:1:ffff::1", True),
        (["2001:db8:1:2::/64"], "2001:db8:1:3::1", False),
        (["2001:db8::/32"], "203.0.113.7", False),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["203.0.113.0/24"], "a socket", False),
    ],
)
async def test_a_key_works_only_from_where_it_is_allowed(
    api: Service, database_url: str, redis_url: str, networks: list[str], peer: str, allowed: bool
) -> None:
    """At our own API (403) and at the token endpoint, whatever headers claim."""
    person = await api.a_user()
    key = await a_key(api, person, "account:read", networks=networks)
    gateway = await an_exchanger(api)
    async with running(test_settings(database_url, redis_url=redis_url), api.clock, peer=peer) as there:
        for spoofed in ({}, {"x-forwarded-for": "203.0.113.7"}, {"forwarded": "for=203.0.113.7"}):
            assert (await me(there, key, **spoofed)).status_code == (200 if allowed else 403)
        answer = await exchange(there, gateway, key)
        if allowed:
            assert answer.status_code == 200, answer.text
        else:
            refusal(answer, "invalid_grant", key.text)


@pytest.mark.case("KEY-12")
async def test_behind_a_proxy_the_callers_own_address_counts(api: Service, database_url: str, redis_url: str) -> None:
    """As the trusted proxy wrote it; what the caller wrote before it counts for nothing."""
    key = await a_key(api, await api.a_user(), "account:read", networks=["203.0.113.7"])
    settings = test_settings(database_url, redis_url=redis_url, trusted_proxies=("10.0.0.0/8",))
    async with running(settings, api.clock, peer="10.0.0.1") as there:
        assert (await me(there, key, **{"x-forwarded-for": "203.0.113.7"})).status_code == 200
        assert (await me(there, key, **{"x-forwarded-for": "203.0.113.7, 198.51.100.1"})).status_code == 403
        assert (await me(there, key, **{"x-forwarded-for": "198.51.100.1, 203.0.113.7"})).status_code == 200
        assert (await me(there, key)).status_code == 403


# -- races ------------------------------------------------------------------------------------------------------------


async def test_no_two_requests_make_the_last_key_there_is_room_for(api: Service) -> None:
    """The second waits for the first, and is then refused."""
    person = await api.a_user()
    headers = await bearer(api, person)
    for _ in range(19):
        await a_key(api, person)
    async with held(api) as first:
        await api.services.api_keys.create(
            first.tx, owner=person.id, name="x", scope=ORDERS, expires_at=None, networks=()
        )
        second = await blocked(api, made(api, headers))
        await first.commit()
        assert (await second).status_code == 409
    assert len(await api.execute(select(api_keys))) == 20


async def test_two_rotations_at_once_leave_two_secrets(api: Service) -> None:
    """The later one's, and the earlier one's for its overlap: the secret of before them is over."""
    person = await api.a_user()
    key = await a_key(api, person, "account:read")
    headers = await bearer(api, person)
    async with held(api) as first:
        one = await api.services.api_keys.rotate(first.tx, key.id, person.id, timedelta(hours=1))
        assert one is not None
        second = await blocked(api, api.http.post(f"{OWN}/{key.id}/rotate", headers=headers))
        await first.commit()
        other = (await second).json()["key"]
    assert (await me(api, key)).status_code == 401
    assert (await me(api, one.text.reveal())).status_code == 200
    assert (await me(api, other)).status_code == 200


async def test_a_revocation_wins_over_a_rotation_that_waits_for_it(api: Service) -> None:
    """A key that has ended does not come back with a new secret."""
    person = await api.a_user()
    key = await a_key(api, person, "account:read")
    headers = await bearer(api, person)
    async with held(api) as first:
        assert await api.services.api_keys.revoke(first.tx, key.id, person.id)
        rotation = await blocked(api, api.http.post(f"{OWN}/{key.id}/rotate", headers=headers))
        await first.commit()
        assert (await rotation).status_code == 404
    assert (await me(api, key)).status_code == 401


@pytest.mark.case("KEY-13")
async def test_noting_that_a_key_is_used_waits_for_nobody(api: Service) -> None:
    """Who uses a key at the same instant as somebody whose transaction lasts is not held up by them."""
    person = await api.a_user()
    key, gateway = await a_key(api, person, "account:read", "orders:read"), await an_exchanger(api)
    async with held(api) as first:
        await first.tx.execute(select(api_keys).where(api_keys.c.id == key.id).with_for_update())
        assert (await exchange(api, gateway, key)).status_code == 200
        assert (await me(api, key)).status_code == 200
        await first.commit()
    [row] = await api.execute(select(api_keys))
    assert row.last_used_at is None
    assert (await exchange(api, gateway, key)).status_code == 200
    [row] = await api.execute(select(api_keys))
    assert row.last_used_at == api.clock.now()


# -- limits and faults ------------------------------------------------------------------------------------------------


async def test_each_key_has_a_limit_of_its_own(api: Service, database_url: str, redis_url: str) -> None:
    """Over it: 429 and when to come back; another key of the same person is not held up."""
    person = await api.a_user()
    key, other = await a_key(api, person), await a_key(api, person)
    gateway = await an_exchanger(api)
    async with running(test_settings(database_url, redis_url=redis_url, api_key_rate=6), api.clock) as slow:
        answers = [await exchange(slow, gateway, key) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        refusal(answers[3], "temporarily_unavailable", key.text, status=429)
        assert answers[3].headers["retry-after"] == "10"
        assert (await exchange(slow, gateway, other)).status_code == 200
        api.clock.advance(10)  # type: ignore[attr-defined]
        assert (await exchange(slow, gateway, key)).status_code == 200


async def test_a_database_that_cannot_answer_makes_no_key_a_bad_one(api: Service) -> None:
    """503, at once and for both kinds of subject: a client would throw good credentials away otherwise."""
    key, gateway = await a_key(api, await api.a_user()), await an_exchanger(api)
    subject = (await api.sign_in(await api.a_client(), await api.a_user()))["access_token"]
    for each in (key, subject):
        assert (await exchange(api, gateway, each)).status_code == 200
    with patch.object(Transaction, "fetch_hot", side_effect=DatabaseUnavailable("away")):
        for each in (key, subject):
            refusal(await exchange(api, gateway, each), "temporarily_unavailable", status=503)


@pytest.mark.case("TOK-09")
async def test_what_is_exchanged_never_comes_from_the_url(api: Service) -> None:
    """URLs end up in logs."""
    key, gateway = await a_key(api, await api.a_user()), await an_exchanger(api)
    for name in ("subject_token", "actor_token", "resource", "audience"):
        answer = await post(api, "grant_type=x", client=gateway, path=f"/token?{name}={key.text}")
        refusal(answer, "invalid_request", key.text)


@pytest.mark.case("KEY-12")
async def test_whoever_found_a_key_does_not_use_it_up_from_where_it_is_not_good(
    database_url: str, redis_url: str
) -> None:
    """Refused for the place it comes from, it spends nothing of the owner's budget."""
    settings = test_settings(database_url, redis_url=redis_url, api_key_rate=4, trusted_proxies=("127.0.0.1",))
    async with running(settings) as service:
        key = await a_key(service, await service.a_user(), "account:read", networks=["198.51.100.7/32"])
        for where, status, times in (("203.0.113.9", 403, 5), ("198.51.100.7", 200, 2), ("198.51.100.7", 429, 1)):
            for _ in range(times):
                headers = {**key.header, "x-forwarded-for": where}
                assert (await service.http.get("/v1/users/me", headers=headers)).status_code == status
