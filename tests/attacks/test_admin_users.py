"""Operators who want more than they have, or what nobody may have; and two who do it to each other."""

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from sqlalchemy import select, update

from identity_service.accounts.access import ADMINISTRATORS_LOCK, PERMISSIONS, SUPER_ADMIN
from identity_service.accounts.users import User
from identity_service.infra.database import Transaction
from identity_service.infra.tables import role_scopes, users
from tests.support.operators import EVERY_SCOPE, Operator
from tests.support.people import with_key
from tests.support.races import blocked, held
from tests.support.service import ISSUER, Service


async def boss_of(service: Service, name: str = "boss", role: str = SUPER_ADMIN, **given: Any) -> tuple[User, Operator]:
    """Return a user with a role, and the operator that they are with a token of every scope, or of `scope`."""
    client = await service.a_client(scope=EVERY_SCOPE, audiences=[ISSUER])
    user = await service.a_user(name, role=role)
    scope = given.get("scope", " ".join(EVERY_SCOPE))
    return user, Operator(service, (await service.sign_in(client, user, scope=scope))["access_token"])


async def rows(service: Service) -> list[Any]:
    """Return every user's row."""
    return list(await service.execute(select(users).order_by(users.c.id)))


async def a_role(service: Service, name: str, *scopes: str) -> None:
    """Make a role that holds these scopes and inherits none."""

    async def work(tx: Transaction) -> None:
        await service.services.access.define(tx, scopes)
        await service.services.access.create_role(tx, name, parent=None, description="", names=scopes)

    await service.within(work)


CHANGES: dict[str, tuple[str, str, Mapping[str, str] | None]] = {
    "rename": ("PATCH", "", {"username": "other"}),
    "address": ("PATCH", "", {"email": "other@example.org"}),
    "disable": ("POST", "/disable", None),
    "enable": ("POST", "/enable", None),
    "demote": ("PUT", "/role", {"role": "user"}),
    "sign out": ("DELETE", "/sessions", None),
    "sign out once": ("DELETE", "/sessions/{session}", None),
    "reset": ("POST", "/force-password-reset", None),
    "delete": ("DELETE", "", None),
    "purge": ("DELETE", "?purge=true", None),
    "restore": ("POST", "/restore", None),
}
EACH_CHANGE = pytest.mark.parametrize("change", CHANGES)


async def try_to(operator: Operator, change: str, user: User, session: str = "") -> int:
    """Try to change somebody and return the answer's status."""
    method, path, body = CHANGES[change]
    return (await operator(method, f"/users/{user.id}{path.format(session=session)}", body)).status_code


async def victim_of(service: Service, change: str, role: str) -> tuple[User, str]:
    """Return somebody of a role, in the state in which the change would do something, and a session of theirs."""
    client = await service.a_client(scope=EVERY_SCOPE, audiences=[ISSUER])
    user = await service.a_user("victim", role=role)
    await service.sign_in(client, user)
    [session] = await service.within(lambda tx: service.services.families.sessions(tx, user.id))
    if change == "enable":
        await service.disable(user)
    if change == "restore":
        await service.within(lambda tx: service.services.users.delete(tx, user.id))
    return user, str(session.id)


# -- more than one has ------------------------------------------------------------------------------------------------


@pytest.mark.case("ADM-08")
@EACH_CHANGE
async def test_nobody_changes_somebody_who_holds_more(service: Service, change: str) -> None:
    """Or resetting a super-admin's password, or moving their address, would be the way to everything they hold."""
    await boss_of(service)
    _, admin = await boss_of(service, "admin", "admin")
    user, session = await victim_of(service, change, SUPER_ADMIN)
    before = await rows(service)
    assert await try_to(admin, change, user, session) == 403
    assert await rows(service) == before
    assert {row.id: row.revoked_at for row in await service.family_rows()} == dict.fromkeys(
        [row.id for row in await service.family_rows()]
    )


@EACH_CHANGE
async def test_a_narrow_token_changes_only_who_holds_no_more_than_it_carries(service: Service, change: str) -> None:
    """Its owner could; the credential that was shown could not hand on what the other holds."""
    _, narrow = await boss_of(service, scope="users:read users:write")
    user, session = await victim_of(service, change, "admin")
    before = await rows(service)
    assert await try_to(narrow, change, user, session) == 403
    assert await rows(service) == before


@EACH_CHANGE
async def test_who_holds_as_much_may(service: Service, change: str) -> None:
    """The same change by one admin to another: what the tests above refuse is refused for its reason alone."""
    await boss_of(service)
    _, admin = await boss_of(service, "admin", "admin")
    user, session = await victim_of(service, change, "admin")
    assert await try_to(admin, change, user, session) in (200, 204)


@EACH_CHANGE
async def test_who_may_only_read_changes_nothing(service: Service, change: str) -> None:
    """A token without `users:write`, of whoever."""
    _, reader = await boss_of(service, scope="users:read")
    user, session = await victim_of(service, change, "user")
    before = await rows(service)
    assert await try_to(reader, change, user, session) == 403
    assert await rows(service) == before


@pytest.mark.parametrize("role", [SUPER_ADMIN, "keymaster", "sibling"])
async def test_nobody_grants_more_than_they_hold(service: Service, role: str) -> None:
    """Neither to somebody new nor to somebody who is there; an unknown role is no way around."""
    await a_role(service, "keymaster", "keys:write")
    await a_role(service, "sibling", "stock:write")
    await boss_of(service)
    _, admin = await boss_of(service, "admin", "admin")
    user = await service.a_user("friend")
    assert (await admin("PUT", f"/users/{user.id}/role", {"role": role})).status_code == 403
    new = {"username": "new", "email": "new@example.org", "role": role}
    assert (await admin("POST", "/users", new)).status_code == 403
    assert {row.username: row.role for row in await rows(service)} == {
        "boss": SUPER_ADMIN,
        "admin": "admin",
        "friend": "user",
    }


async def test_a_siblings_scope_is_granted_by_whoever_holds_it(service: Service) -> None:
    """No operator's tool asks for the scopes of every sibling, so the token need not carry them."""
    await a_role(service, "clerk", "stock:write")
    await service.within(lambda tx: service.services.access.grant(tx, "admin", ("stock:write",)))
    _, admin = await boss_of(service, "admin", "admin", scope="users:read users:write")
    user = await service.a_user("friend")
    assert (await admin("PUT", f"/users/{user.id}/role", {"role": "clerk"})).status_code == 200


SELF = {
    "disable": 403,
    "demote": 403,
    "delete": 403,
    "purge": 403,
    "address": 403,
    "reset": 403,
    "rename": 200,
    "sign out": 204,
}


@pytest.mark.case("ADM-06")
@pytest.mark.parametrize(("change", "expected"), SELF.items(), ids=list(SELF))
async def test_what_operators_cannot_do_to_themselves(service: Service, change: str, expected: int) -> None:
    """A role, an end, or a new address, which takes the password elsewhere; also with a key of theirs."""
    await boss_of(service, "colleague")
    user, boss = await boss_of(service)
    key = await with_key(service, user, scope=tuple(PERMISSIONS))
    by_key = Operator(service, "")
    by_key.headers = key.headers
    before = await rows(service)
    assert await try_to(boss, change, user) == expected
    if expected == 403:
        assert await try_to(by_key, change, user) == 403
        assert await rows(service) == before


async def test_a_service_with_the_scopes_manages_people_who_hold_no_more(service: Service) -> None:
    """Its token carries what it may; a super-admin holds more than any list of scopes."""
    client = await service.a_client(
        scope=("users:read", "users:write", "orders:read", "account:read", "account:write"),
        audiences=[ISSUER],
        grant_types=("client_credentials",),
    )
    token = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    robot = Operator(service, token)
    user, boss = await service.a_user("friend"), await service.a_user("boss", role=SUPER_ADMIN)
    assert (await robot("POST", f"/users/{user.id}/disable")).status_code == 204
    assert (await robot("POST", f"/users/{boss.id}/disable")).status_code == 403
    [row] = await service.events("user.disabled")
    assert (row.actor, row.client_id) == (client.id, client.id)


@pytest.mark.case("ADM-06")
async def test_no_password_reset_is_forced_on_the_last_super_admin(service: Service) -> None:
    """A service may hold every scope; without a password nobody could sign in to undo what it does."""
    client = await service.a_client(grant_types=["client_credentials"], scope=EVERY_SCOPE, audiences=[ISSUER])
    own = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    tool, last = Operator(service, own), await service.a_user("last", role=SUPER_ADMIN)
    answer = await tool("POST", f"/users/{last.id}/force-password-reset")
    assert (answer.status_code, answer.json()["title"].split(".")[0]) == (409, "This is the last super_admin")
    await service.a_user("second", role=SUPER_ADMIN)
    assert (await tool("POST", f"/users/{last.id}/force-password-reset")).status_code == 200


# -- the last who can do everything -----------------------------------------------------------------------------------

ENDS = ["demote", "disable", "delete", "purge"]


@pytest.mark.case("ADM-06")
@pytest.mark.parametrize("change", ENDS)
async def test_the_last_super_admin_stays(service: Service, change: str) -> None:
    """Not even by a service that holds every scope; a second one who is disabled or deleted does not count."""
    user = await service.a_user("boss", role=SUPER_ADMIN)
    for name, end in (("disabled", "set_enabled"), ("deleted", "delete")):
        other = await service.a_user(name, role=SUPER_ADMIN)
        arguments = (False,) if end == "set_enabled" else ()
        await service.within(
            lambda tx, other=other, end=end, arguments=arguments: getattr(service.services.users, end)(
                tx, other.id, *arguments
            )
        )
    everything = tuple(await service.within(lambda tx: service.services.access.scopes_of(tx, SUPER_ADMIN, fresh=True)))
    client = await service.a_client(scope=everything, audiences=[ISSUER], grant_types=("client_credentials",))
    token = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    before = await rows(service)
    assert await try_to(Operator(service, token), change, user) == 409
    assert await rows(service) == before
    await service.a_user("second", role=SUPER_ADMIN)
    assert await try_to(Operator(service, token), change, user) in (200, 204)


@pytest.mark.case("ADM-06")
@pytest.mark.case("ADM-10")
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
async def test_of_two_who_end_each_other_one_does(service: Service, first: str, second: str) -> None:
    """The second waits for the first, is looked at again, and is no operator any more; one super-admin remains."""
    one, one_asks = await boss_of(service, "one")
    two, two_asks = await boss_of(service, "two")
    async with held(service) as gate:
        await gate.tx.lock(ADMINISTRATORS_LOCK)
        ahead = await blocked(service, try_to(one_asks, first, two))
        behind = await blocked(service, try_to(two_asks, second, one), behind=1)
        await gate.commit()
        assert await ahead in (200, 204)
        # A demoted operator's token may no longer; a disabled or deleted one's is no longer good.
        assert await behind == (403 if first == "demote" else 401)
    assert await service.within(service.services.users.enabled_super_admins) == 1
    left = await service.within(lambda tx: service.services.users.get(tx, one.id))
    assert left is not None
    assert (left.role, left.enabled) == (SUPER_ADMIN, True)


@pytest.mark.case("ADM-06")
@pytest.mark.parametrize("change", ENDS)
async def test_the_last_is_counted_after_the_other_has_gone(service: Service, change: str) -> None:
    """Somebody else's change is under way: whoever counts waits for it, and counts what it left."""
    user = await service.a_user("boss", role=SUPER_ADMIN)
    other, _ = await boss_of(service, "other")
    everything = tuple(await service.within(lambda tx: service.services.access.scopes_of(tx, SUPER_ADMIN, fresh=True)))
    client = await service.a_client(scope=everything, audiences=[ISSUER], grant_types=("client_credentials",))
    token = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    async with held(service) as leaving:
        await leaving.tx.lock(ADMINISTRATORS_LOCK)
        await service.services.users.delete(leaving.tx, other.id)
        late = await blocked(service, try_to(Operator(service, token), change, user))
        await leaving.commit()
        assert await late == 409


@pytest.mark.case("ADM-06")
async def test_ten_super_admins_who_demote_each_other_at_once_leave_one(service: Service) -> None:
    """Whatever the order."""
    bosses = [await boss_of(service, f"boss{number}") for number in range(6)]
    await asyncio.gather(
        *(try_to(asks, "demote", other) for user, asks in bosses for other, _ in bosses if other.id != user.id)
    )
    assert await service.within(service.services.users.enabled_super_admins) == 1


@pytest.mark.case("ADM-10")
async def test_a_demoted_operator_is_none_in_the_very_next_request(service: Service) -> None:
    """Their token was issued when they were one, and says so; also a role that loses the scope."""
    _, boss = await boss_of(service)
    user, admin = await boss_of(service, "admin", "admin")
    friend = await service.a_user("friend")
    assert (await admin("POST", f"/users/{friend.id}/disable")).status_code == 204
    assert await try_to(boss, "demote", user) == 200
    assert (await admin("POST", f"/users/{friend.id}/enable")).status_code == 403
    assert (await admin("GET", "/users")).status_code == 403
    assert (await boss("PUT", f"/users/{user.id}/role", {"role": "admin"})).status_code == 200
    assert (await admin("GET", "/users")).status_code == 200
    await service.execute(role_scopes.delete().where(role_scopes.c.scope == "users:read"))
    assert (await admin("GET", "/users")).status_code == 403


# -- what is sent -----------------------------------------------------------------------------------------------------

TOO_MUCH: dict[str, Any] = {
    "is_admin": True,
    "scopes": ["*"],
    "scope": "*",
    "id": "x",
    "password_hash": "x",
    "tenant_id": 1,
    "epoch": 9,
    "locked_until": None,
    "enabled": True,
    "created_at": "2020-01-01T00:00:00Z",
    "deleted_at": None,
    "email_verified_at": "2020-01-01T00:00:00Z",
    "__proto__": {},
    "": 1,
    "Username": "x",
    "username ": "x",
    "role.name": "x",
}


@pytest.mark.case("ADM-03")
@pytest.mark.parametrize("member", [*TOO_MUCH, "role", "email_verified"])
async def test_no_member_is_taken_that_is_not_offered(service: Service, member: str) -> None:
    """422 and nothing is changed; a change of a user takes neither a role nor a proof."""
    _, boss = await boss_of(service)
    user = await service.a_user("friend")
    before = await rows(service)
    value = TOO_MUCH.get(member, True)
    answers = [await boss("PATCH", f"/users/{user.id}", {"name": "X", member: value})]
    if member in TOO_MUCH:
        new = {"username": "new", "email": "new@example.org", member: value}
        answers.append(await boss("POST", "/users", new))
        answers.append(await boss("PUT", f"/users/{user.id}/role", {"role": "moderator", member: value}))
    assert [answer.status_code for answer in answers] == [422] * len(answers)
    assert await rows(service) == before


@pytest.mark.case("ADM-04")
@pytest.mark.parametrize(
    "body",
    [
        '{"username": "new", "email": "n@example.org", "role": "user", "role": "admin"}',
        '{"username": "new", "email": "n@example.org", "email_verified": "yes"}',
        '{"username": "new", "email": "n@example.org", "email_verified": 1}',
        '{"username": "new", "email": "n@example.org", "email_verified": "true"}',
        '{"username": "new", "email": "n@example.org", "email_verified": null}',
        '{"username": ["new"], "email": "n@example.org"}',
        '{"username": 7, "email": "n@example.org"}',
        '{"username": "new", "email": {"$ne": ""}}',
        '{"username": "new"}',
        '{"username": "new", "email": "n@example.org", "name": "\\ud800"}',
        '{"username": "new", "email": "n@example.org", "name": "a\\u0000b"}',
        "[]",
        "null",
    ],
)
async def test_a_body_means_one_thing_or_nothing(service: Service, body: str) -> None:
    """No member twice, no text for a truth value, no conversion; 422, and nobody is made."""
    _, boss = await boss_of(service)
    headers = {**boss.headers, "content-type": "application/json"}
    answer = await service.http.post("/v1/admin/users", content=body, headers=headers)
    assert answer.status_code == 422
    assert len(await rows(service)) == 1


@pytest.mark.case("ADM-14")
@pytest.mark.parametrize(
    "params",
    [
        *({"limit": value} for value in ("0", "-1", "101", "1000000000", "a", "1.5", str(2**63), "", "1e1", "٣")),
        *({"cursor": value} for value in ("x", "AAAA", "=", "é", "A" * 1001, "%00")),
        *({"state": value} for value in ("", "Enabled", "all", "enabled'--")),
        *({"role": value} for value in ("", "a b", "x" * 65, "user'--", "%")),
        *({"q": value} for value in ("", "x" * 255)),
    ],
    ids=lambda params: ascii(params)[:40],
)
async def test_a_list_is_asked_for_as_it_is_offered(service: Service, params: dict[str, str]) -> None:
    """422 for whatever is none of the values there are; never a fault, and no echo."""
    _, boss = await boss_of(service)
    answer = await boss("GET", "/users", params=params)
    assert answer.status_code == 422
    assert set(answer.json()) == {"type", "title", "status", "errors"}


@pytest.mark.case("ADM-14")
async def test_a_cursor_is_good_for_its_list_and_its_filters_only(service: Service) -> None:
    """Not one that was changed, not another list's, not with another filter, not another user's sessions."""
    _, boss = await boss_of(service)
    for number in range(3):
        await service.a_user(f"friend{number}")
    cursor = (await boss("GET", "/users", params={"q": "friend", "limit": 1})).json()["next_cursor"]
    good = {"q": "friend", "limit": 1, "cursor": cursor}
    assert (await boss("GET", "/users", params=good)).status_code == 200
    raw = base64.urlsafe_b64decode(cursor + "==")
    assert json.loads(raw[16:])[:2] == ["username", "friend0"]
    forged = [
        base64.urlsafe_b64encode(raw[:16] + b'["username","a","x"]').decode().rstrip("="),
        base64.urlsafe_b64encode(bytes(16) + raw[16:]).decode().rstrip("="),
        cursor[:-2],
        cursor + "AA",
        ("B" if cursor[0] == "A" else "A") + cursor[1:],
    ]
    for bad in forged:
        assert (await boss("GET", "/users", params={**good, "cursor": bad})).status_code == 422
    for filters in ({"q": "frien"}, {"q": None}, {"role": "user"}, {"state": "enabled"}):
        params = {name: value for name, value in {**good, **filters}.items() if value is not None}
        assert (await boss("GET", "/users", params=params)).status_code == 422
    assert (await boss("GET", "/clients", params={"cursor": cursor})).status_code == 422
    [user, *_] = (await boss("GET", "/users", params={"q": "friend"})).json()["items"]
    assert (await boss("GET", f"/users/{user['id']}/sessions", params={"cursor": cursor})).status_code == 422


@pytest.mark.case("ADM-08")
async def test_a_session_is_its_owners(service: Service) -> None:
    """Neither ended nor listed through somebody else's path, and a cursor of theirs is of no use there."""
    _, boss = await boss_of(service)
    client = await service.a_client()
    owner, other = await service.a_user("owner"), await service.a_user("other")
    tokens = [await service.sign_in(client, owner) for _ in range(2)]
    page = (await boss("GET", f"/users/{owner.id}/sessions", params={"limit": 1})).json()
    path = f"/users/{other.id}/sessions"
    assert (await boss("DELETE", f"{path}/{page['items'][0]['id']}")).status_code == 404
    assert (await boss("GET", path)).json()["items"] == []
    assert (await boss("GET", path, params={"cursor": page["next_cursor"]})).status_code == 422
    for one in tokens:
        assert (await service.refresh(client, one["refresh_token"])).status_code == 200


@pytest.mark.case("ADM-15")
async def test_there_is_no_other_way_to_ask(service: Service) -> None:
    """What is not offered is refused, whatever its value; and no hash is in any answer."""
    _, boss = await boss_of(service)
    await service.a_user("friend")
    for params in ({"sort": "password_hash"}, {"fields": "password_hash"}, {"filter": "epoch>0"}, {"offset": "1"}):
        answer = await boss("GET", "/users", params=params)
        assert answer.status_code == 422
        assert "hash" not in answer.text
    plain = await boss("GET", "/users")
    assert "argon2" not in plain.text
    assert "hash" not in plain.text


INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE users; --",
    '" OR ""="',
    "1; SELECT pg_sleep(10)",
    "%27%20OR%201=1--",
    "\\'; --",
    "$$; --",
    "{{7*7}}",
    "${7*7}",
    "x') UNION SELECT password_hash FROM users --",
    "a%",
    "_riend",
    "(a+)+$",
]


@pytest.mark.case("ADM-15")
@pytest.mark.case("ADM-17")
@pytest.mark.parametrize("text", INJECTIONS)
async def test_no_text_has_a_meaning_to_the_database(service: Service, text: str) -> None:
    """In each place that takes one: refused, or found to be nobody's, or stored as it is."""
    _, boss = await boss_of(service)
    user = await service.a_user("friend")
    before = [row.password_hash for row in await rows(service)]
    found = await boss("GET", "/users", params={"q": text})
    assert (found.status_code, found.json()["items"]) == (200, [])
    for params in ({"role": text}, {"state": text}, {"cursor": text}, {"limit": text}):
        assert (await boss("GET", "/users", params=params)).status_code == 422
    for body in ({"username": text}, {"email": text}):
        assert (await boss("PATCH", f"/users/{user.id}", body)).status_code == 422
    named = await boss("PATCH", f"/users/{user.id}", {"name": text}, if_match="*")
    assert named.json()["name"] == text
    assert (await boss("PATCH", f"/users/{user.id}", {"name": "x"}, if_match=text)).status_code == 412
    assert (await boss("PUT", f"/users/{user.id}/role", {"role": text})).status_code == 422
    assert [row.password_hash for row in await rows(service)] == before


@pytest.mark.case("ADM-18")
async def test_of_two_changes_of_one_version_at_once_one_is_made(service: Service) -> None:
    """The second waits for the row, compares what it saw with what is there now, and is refused."""
    _, boss = await boss_of(service)
    user = await service.a_user("friend")
    tag = (await boss("GET", f"/users/{user.id}")).headers["etag"]
    async with held(service) as first:
        assert await service.services.users.locked(first.tx, user.id) is not None
        await service.services.users.rename(first.tx, user.id, name="First")
        second = await blocked(service, boss("PATCH", f"/users/{user.id}", {"name": "Second"}, if_match=tag))
        await first.commit()
        assert (await second).status_code == 412
    assert (await boss("GET", f"/users/{user.id}")).json()["name"] == "First"


async def test_somebody_who_rises_meanwhile_is_not_changed(service: Service) -> None:
    """The role is read under the lock of the row, so it is the one that counts when the change is made."""
    _, admin = await boss_of(service, "admin", "admin")
    user = await service.a_user("friend")
    async with held(service) as rising:
        await service.services.users.set_role(rising.tx, user.id, SUPER_ADMIN)
        late = await blocked(service, try_to(admin, "reset", user))
        await rising.commit()
        assert await late == 403
    [row] = [row for row in await rows(service) if row.id == user.id]
    assert row.password_hash is not None


async def test_an_operators_token_dies_with_their_session(service: Service) -> None:
    """As anybody's: the door looks at the session each time."""
    user, boss = await boss_of(service)
    assert (await boss("GET", "/users")).status_code == 200
    await service.execute(update(users).where(users.c.id == user.id).values(epoch=users.c.epoch + 1))
    assert (await boss("GET", "/users")).status_code == 401
