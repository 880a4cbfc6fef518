"""The operators' API about people, and its figures."""

import asyncio
import uuid
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any
from unittest.mock import patch

import httpx2
import pytest
from sqlalchemy import select, update

from identity_service.accounts.users import User
from identity_service.infra.audit import Origin
from identity_service.infra.database import Transaction
from identity_service.infra.tables import audit_events, roles, users
from tests.support.operators import EVERY_SCOPE, Operator, an_operator
from tests.support.people import an_app, link, mails, signed_in, with_key
from tests.support.service import PASSWORD, Service, running, test_settings
from tests.support.waiting import until

MIKA = {"username": "mika", "email": "Mika@example.org"}


async def made(boss: Operator, **body: Any) -> dict[str, Any]:
    """Make Mika, or somebody with some other data; return what is shown of them."""
    answer = await boss("POST", "/users", MIKA | body)
    assert answer.status_code == 201, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def shown(boss: Operator, user: User) -> dict[str, Any]:
    answer = await boss("GET", f"/users/{user.id}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def told(service: Service, event: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return of each audit row of one kind whom it is about, and its details."""
    return [(row.target, row.detail) for row in await service.events(event)]


def faults(answer: httpx2.Response) -> list[str]:
    """Return where a refused body is wrong."""
    assert answer.status_code == 422, answer.text
    return [fault["pointer"] for fault in answer.json()["errors"]]


# -- making and showing -----------------------------------------------------------------------------------------------


@pytest.mark.case("ADM-13")
async def test_a_new_user_chooses_the_password_that_no_operator_ever_knows(boss: Operator) -> None:
    """They get a mail with a link, which proves their address as well; until then nobody can sign in."""
    service = boss.service
    user = await made(boss, name="Mika", role="moderator")
    assert user == {
        "id": user["id"],
        "username": "mika",
        "name": "Mika",
        "email": "Mika@example.org",
        "email_verified": False,
        "role": "moderator",
        "enabled": True,
        "has_password": False,
        "created_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-01T00:00:00Z",
        "deleted_at": None,
    }
    assert await mails(service) == [("reset_password", "Mika@example.org")]
    assert await told(service, "user.created") == [(user["id"], {"role": "moderator"})]
    client = await service.a_client()
    sign_in = {"grant_type": "password", "username": "mika", "password": PASSWORD}
    assert (await service.token(client, **sign_in)).status_code == 400

    token = await link(service, "Mika@example.org", "reset_password")
    chosen = await service.http.post("/v1/password-reset/confirm", json={"token": token, "new_password": PASSWORD})
    assert chosen.status_code == 204, chosen.text
    assert (await service.token(client, **sign_in)).status_code == 200
    after = (await boss("GET", f"/users/{user['id']}")).json()
    assert (after["has_password"], after["email_verified"]) == (True, True)


@pytest.mark.case("ADM-13")
@pytest.mark.parametrize("member", ["password", "password_hash"])
async def test_no_operator_sets_a_password(boss: Operator, member: str) -> None:
    """Neither for a new user nor for one that is there; the refusal does not repeat it."""
    user = await boss.service.a_user()
    for answer in (
        await boss("POST", "/users", MIKA | {member: "Kanarienvogel-77"}),
        await boss("PATCH", f"/users/{user.id}", {member: "Kanarienvogel-77"}),
    ):
        assert answer.status_code == 422
        assert "Kanarienvogel" not in answer.text
    assert len(await boss.service.execute(select(users))) == 2


async def test_where_no_mail_can_be_sent_users_are_made_and_reset_without(sqlite_url: str) -> None:
    """Somebody sets their password by command, then; the answer of a forced reset says that there was no mail."""
    settings = test_settings(
        sqlite_url,
        environment="production",
        issuer="https://id.example.test",
        allow_sqlite=True,
        argon2_memory_kib=19456,
        argon2_time_cost=2,
        refusal_delay=0.1,
    )
    async with running(settings) as service:
        client = await service.a_client(scope=EVERY_SCOPE, audiences=["https://id.example.test"])
        tokens = await service.sign_in(client, await service.a_user(role="super_admin"), scope=" ".join(EVERY_SCOPE))
        boss = Operator(service, tokens["access_token"])
        user = await made(boss)
        forced = await boss("POST", f"/users/{user['id']}/force-password-reset")
        assert (forced.status_code, forced.json()) == (200, {"mail_sent": False})
        changed = await boss("PATCH", f"/users/{user['id']}", {"email": "m@example.org"})
        assert changed.json()["email_verified"] is False
        assert (await boss("DELETE", f"/users/{user['id']}")).status_code == 204
        assert (await boss("POST", f"/users/{user['id']}/restore")).status_code == 200
        assert await mails(service) == []


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"username": "a b"}, "/username"),
        ({"username": "~deleted"}, "/username"),
        ({"username": "x" * 65}, "/username"),
        ({"email": "nobody"}, "/email"),
        ({"email": "x@deleted.invalid"}, "/email"),
        ({"name": "a\nb"}, "/name"),
        ({"name": ""}, "/name"),
        ({"role": "emperor"}, "/role"),
        ({"role": ""}, "/role"),
        ({"role": "x" * 65}, "/role"),
    ],
    ids=str,
)
async def test_a_user_that_cannot_be_is_refused_by_the_member_at_fault(
    boss: Operator, changes: dict[str, str], pointer: str
) -> None:
    """And nobody is made."""
    answer = await boss("POST", "/users", MIKA | changes)
    assert faults(answer) == [pointer]
    assert len(await boss.service.execute(select(users))) == 1


@pytest.mark.parametrize("taken", [{"username": "MIKA"}, {"email": "mika@EXAMPLE.org"}], ids=["username", "email"])
async def test_a_name_that_is_taken_is_a_conflict(boss: Operator, taken: dict[str, str]) -> None:
    """For a new user as for a change, and nothing is written or mailed."""
    await made(boss)
    other = await boss.service.a_user("other")
    before = await mails(boss.service)
    new = {"username": "new", "email": "new@example.org"} | taken
    assert (await boss("POST", "/users", new)).status_code == 409
    assert (await boss("PATCH", f"/users/{other.id}", {"name": "X", **taken})).status_code == 409
    assert (await shown(boss, other))["name"] is None
    assert await mails(boss.service) == before
    assert await told(boss.service, "user.changed") == []


NOBODY = [
    *(str(uuid.UUID(int=7)), "abc", "0" * 36, "1" * 300, "{}", "..", "nil"),
    *("6BA7B810-9DAD-11D1-80B4-00C04FD430C8", "{6ba7b810-9dad-11d1-80b4-00c04fd430c8}", "%F0%9F%99%82"),
]
EACH = [
    *(("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/disable"), ("POST", "/enable"), ("PUT", "/role")),
    *(("GET", "/sessions"), ("DELETE", "/sessions"), ("DELETE", f"/sessions/{uuid.UUID(int=8)}")),
    *(("POST", "/force-password-reset"), ("POST", "/restore")),
]


@pytest.mark.case("INP-18")
@pytest.mark.parametrize(("method", "path"), EACH, ids=[f"{method} {path[:11]}" for method, path in EACH])
async def test_there_is_nothing_at_ids_of_nobody(boss: Operator, method: str, path: str) -> None:
    """404 for an id that is unknown, misspelled or none at all; never a fault."""
    body = {"PUT": {"role": "user"}, "PATCH": {"name": "X"}}.get(method)
    for user_id in NOBODY:
        assert (await boss(method, f"/users/{user_id}{path}", body)).status_code == 404, user_id[:50]


async def test_an_id_has_one_spelling(boss: Operator) -> None:
    """Or the paths of one user would have several names in logs and rules."""
    user = await boss.service.a_user()
    assert (await boss("GET", f"/users/{user.id}")).status_code == 200
    for spelling in (str(user.id).upper(), user.id.hex, f"{{{user.id}}}", user.id.urn, f"{user.id}%20"):
        assert (await boss("GET", f"/users/{spelling}")).status_code == 404


# -- listing ----------------------------------------------------------------------------------------------------------


async def listed(boss: Operator, **params: Any) -> list[str]:
    """Return the usernames of all pages of a list."""
    found: list[str] = []
    while True:
        answer = await boss("GET", "/users", params=params)
        assert answer.status_code == 200, answer.text
        assert answer.headers["cache-control"] == "no-store"
        found += [user["username"] for user in answer.json()["items"]]
        if (cursor := answer.json()["next_cursor"]) is None:
            return found
        params["cursor"] = cursor


async def test_users_are_listed_by_name_role_and_state(boss: Operator) -> None:
    """In pages, each with the cursor of the next."""
    service = boss.service
    anna = await service.a_user("anna", role="moderator")
    await service.a_user("anna.b", verified=False)
    await service.a_user("bob", email="anna.bob@example.org")
    await service.disable(await service.a_user("carl"))
    gone = await service.a_user("anne")
    assert (await boss("DELETE", f"/users/{gone.id}")).status_code == 204
    for limit in (1, 2, 50):
        assert await listed(boss, limit=limit) == ["carl", "bob", "anna.b", "anna", "user1"]
        assert await listed(boss, q="ANNA", limit=limit) == ["anna", "anna.b", "bob"]
        assert await listed(boss, q="anna", role="moderator", limit=limit) == ["anna"]
        assert await listed(boss, state="disabled", limit=limit) == ["carl"]
        assert await listed(boss, state="unverified", limit=limit) == ["anna.b"]
        assert await listed(boss, state="enabled", role="user", limit=limit) == ["bob", "anna.b"]
        assert await listed(boss, state="deleted", limit=limit) == ["anne"]
        assert await listed(boss, q=str(anna.id), limit=limit) == ["anna"]
        assert await listed(boss, role="emperor", limit=limit) == []


# -- changing ---------------------------------------------------------------------------------------------------------


async def test_a_change_is_shown_and_audited_by_its_members(boss: Operator) -> None:
    """The trail names who and which, never the values; what is given and does not differ is no change."""
    user = await boss.service.a_user("mika")
    answer = await boss("PATCH", f"/users/{user.id}", {"username": "M.Ika", "name": " Mika ", "email": user.email})
    assert answer.status_code == 200
    assert (answer.json()["username"], answer.json()["name"], answer.json()["email_verified"]) == (
        "m.ika",
        "Mika",
        True,
    )
    assert answer.json() == await shown(boss, user)
    assert (await boss("PATCH", f"/users/{user.id}", {"username": "m.ika", "name": "Mika"})).status_code == 200
    assert (await boss("PATCH", f"/users/{user.id}", {})).status_code == 200
    assert (await boss("PATCH", f"/users/{user.id}", {"name": None})).json()["name"] is None
    rows = await boss.service.events("user.changed")
    assert [(row.target, row.detail) for row in rows] == [
        (str(user.id), {"members": ["name", "username"]}),
        (str(user.id), {"members": ["name"]}),
    ]
    me = (await boss.service.http.get("/v1/users/me", headers=boss.headers)).json()["id"]
    assert {(row.actor, row.network) for row in rows} == {(me, "127.0.0.1")}


@pytest.mark.case("ADM-07")
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"username": "a b"}, "/username"),
        ({"username": ""}, "/username"),
        ({"username": None}, "/username"),
        ({"email": "nobody"}, "/email"),
        ({"email": ""}, "/email"),
        ({"email": None}, "/email"),
        ({"name": "\u202egnp"}, "/name"),
        ({"name": "  "}, "/name"),
    ],
    ids=str,
)
async def test_a_change_obeys_the_rules_of_a_new_user(boss: Operator, body: dict[str, Any], pointer: str) -> None:
    """A user's data is valid after each change, whatever else was in it."""
    user = await boss.service.a_user("mika")
    before = await shown(boss, user)
    assert faults(await boss("PATCH", f"/users/{user.id}", {"username": "ok", "name": "Fine"} | body)) == [pointer]
    assert await shown(boss, user) == before


async def test_a_new_address_is_unproven_and_the_old_one_is_told(boss: Operator) -> None:
    """Links that wait for the old address die; the new one gets a link that proves it."""
    service = boss.service
    user = await service.a_user("mika", email="old@example.org")
    assert (await service.http.post("/v1/password-reset", json={"email": "mika"})).status_code == 202
    outdated = await link(service, "old@example.org", "reset_password")
    answer = await boss("PATCH", f"/users/{user.id}", {"email": "New@example.org"})
    assert (answer.json()["email"], answer.json()["email_verified"]) == ("New@example.org", False)
    assert await mails(service) == [("email_changed", "old@example.org"), ("verify_email", "New@example.org")]
    body = {"token": outdated, "new_password": "a different battery"}
    assert (await service.http.post("/v1/password-reset/confirm", json=body)).status_code == 400
    assert (await shown(boss, user))["updated_at"] == "2026-01-01T00:00:00Z"
    proof = await link(service, "New@example.org", "verify_email")
    proven = await service.http.post("/v1/email-verification/confirm", json={"token": proof})
    assert proven.status_code == 204
    assert (await shown(boss, user))["email_verified"] is True
    assert await told(service, "user.changed") == [(str(user.id), {"members": ["email"]})]


@pytest.mark.case("ADM-18")
async def test_who_looked_at_an_older_version_changes_nothing(boss: Operator) -> None:
    """Of two changes of one version the second is refused and may look again."""
    user = await boss.service.a_user("mika")
    tag = (await boss("GET", f"/users/{user.id}")).headers["etag"]
    boss.service.clock.advance(1)  # type: ignore[attr-defined]
    first = await boss("PATCH", f"/users/{user.id}", {"name": "First"}, if_match=tag)
    assert first.status_code == 200
    second = await boss("PATCH", f"/users/{user.id}", {"name": "Second"}, if_match=tag)
    assert second.status_code == 412
    assert (await shown(boss, user))["name"] == "First"
    again = await boss("PATCH", f"/users/{user.id}", {"name": "Second"}, if_match=first.headers["etag"])
    assert again.json()["name"] == "Second"


async def test_a_disabled_user_is_out_until_enabled_and_signs_in_anew(boss: Operator) -> None:
    """Doing it twice is doing it once."""
    service = boss.service
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    for _ in range(2):
        assert (await boss("POST", f"/users/{user.id}/disable")).status_code == 204
    assert (await service.me(tokens["access_token"])).status_code == 401
    for _ in range(2):
        assert (await boss("POST", f"/users/{user.id}/enable")).status_code == 204
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 400
    await service.sign_in(client, user)
    assert await told(service, "user.disabled") == await told(service, "user.enabled") == [(str(user.id), {})]


@pytest.mark.case("ADM-10")
async def test_a_role_acts_in_the_next_request(boss: Operator) -> None:
    """Of a token that was issued before: what its owner no longer holds, it no longer opens."""
    service = boss.service
    other = await an_operator(service, role="admin")
    [user] = (await boss("GET", "/users", params={"role": "admin"})).json()["items"]
    assert (await other("GET", "/users")).status_code == 200
    answer = await boss("PUT", f"/users/{user['id']}/role", {"role": "user"})
    assert (answer.status_code, answer.json()["role"]) == (200, "user")
    assert (await other("GET", "/users")).status_code == 403
    assert (await boss("PUT", f"/users/{user['id']}/role", {"role": "user"})).status_code == 200
    assert (await boss("PUT", f"/users/{user['id']}/role", {"role": "admin"})).status_code == 200
    assert (await other("GET", "/users")).status_code == 200
    assert await told(service, "user.role_changed") == [
        (user["id"], {"from": "admin", "to": "user"}),
        (user["id"], {"from": "user", "to": "admin"}),
    ]
    assert faults(await boss("PUT", f"/users/{user['id']}/role", {"role": "emperor"})) == ["/role"]


# -- sessions and passwords -------------------------------------------------------------------------------------------


async def test_operators_see_and_end_somebodys_sessions(boss: Operator) -> None:
    """In pages; one ends alone, or all at once."""
    service = boss.service
    user, app = await service.a_user(), await an_app(service)
    people = []
    for _ in range(3):
        service.clock.advance(60)  # type: ignore[attr-defined]
        people.append(await signed_in(service, user, app))
    path, found = f"/users/{user.id}/sessions", []
    params: dict[str, Any] = {"limit": 2}
    while True:
        page = (await boss("GET", path, params=params)).json()
        found += page["items"]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert [one["client_name"] for one in found] == ["The app"] * 3
    assert [one["created_at"] for one in found] == [f"2026-01-01T00:0{minute}:00Z" for minute in (3, 2, 1)]
    assert not any(one["current"] for one in found)

    assert (await boss("DELETE", f"{path}/{found[0]['id']}")).status_code == 204
    assert (await boss("DELETE", f"{path}/{found[0]['id']}")).status_code == 404
    assert [(await person("GET")).status_code for person in people] == [200, 200, 401]
    assert (await boss("DELETE", path)).status_code == 204
    assert [(await person("GET")).status_code for person in people] == [401, 401, 401]
    assert (await boss("GET", path)).json() == {"items": [], "next_cursor": None}
    assert await told(service, "session.ended") == [(str(user.id), {"session": found[0]["id"]})]
    assert await told(service, "sessions.ended") == [(str(user.id), {})]


async def test_a_forced_reset_ends_the_password_and_the_sessions(boss: Operator) -> None:
    """The mail's link gives a new one; a disabled user gets no mail."""
    service = boss.service
    client, user = await service.a_client(), await service.a_user("mika")
    tokens = await service.sign_in(client, user)
    answer = await boss("POST", f"/users/{user.id}/force-password-reset")
    assert (answer.status_code, answer.json()) == (200, {"mail_sent": True})
    assert (await service.me(tokens["access_token"])).status_code == 401
    assert (await shown(boss, user))["has_password"] is False
    old = await service.token(client, grant_type="password", username="mika", password=PASSWORD)
    assert old.status_code == 400
    token = await link(service, user.email, "reset_password")
    new = "a different battery"
    assert (
        await service.http.post("/v1/password-reset/confirm", json={"token": token, "new_password": new})
    ).status_code == 204
    await service.sign_in(client, user, new)
    await service.disable(user)
    answer = await boss("POST", f"/users/{user.id}/force-password-reset")
    assert answer.json() == {"mail_sent": False}
    assert await told(service, "user.password_reset_forced") == [(str(user.id), {})] * 2


# -- leaving and coming back ------------------------------------------------------------------------------------------


async def test_a_deleted_user_can_be_shown_and_restored_and_nothing_else(boss: Operator) -> None:
    """Sessions, API keys and the password stay dead; a mail asks for a new one."""
    service = boss.service
    user = await service.a_user("mika")
    person, script = await signed_in(service, user), await with_key(service, user)
    assert (await boss("DELETE", f"/users/{user.id}")).status_code == 204
    assert (await boss("DELETE", f"/users/{user.id}")).status_code == 404
    deleted = await shown(boss, user)
    assert (deleted["username"], deleted["enabled"], deleted["deleted_at"]) == ("mika", False, "2026-01-01T00:00:00Z")
    for method, path in EACH:
        if method != "GET" and path != "/restore":
            body = {"PUT": {"role": "user"}, "PATCH": {"name": "X"}}.get(method)
            assert (await boss(method, f"/users/{user.id}{path}", body)).status_code == 404
    answer = await boss("POST", f"/users/{user.id}/restore")
    assert answer.status_code == 200
    assert answer.json() == await shown(boss, user)
    assert (answer.json()["enabled"], answer.json()["has_password"]) == (True, False)
    assert await mails(service) == [("reset_password", user.email)]
    assert [(await caller("GET")).status_code for caller in (person, script)] == [401, 401]
    assert (await boss("POST", f"/users/{user.id}/restore")).status_code == 404
    assert await told(service, "user.deleted") == await told(service, "user.restored") == [(str(user.id), {})]


async def test_who_was_disabled_before_they_were_deleted_is_so_when_restored(boss: Operator) -> None:
    """Undoing the deletion undoes nothing else; no mail asks them for a password either."""
    user = await boss.service.a_user("mika")
    assert (await boss("POST", f"/users/{user.id}/disable")).status_code == 204
    assert (await boss("DELETE", f"/users/{user.id}")).status_code == 204
    restored = (await boss("POST", f"/users/{user.id}/restore")).json()
    assert (restored["username"], restored["enabled"], restored["deleted_at"]) == ("mika", False, None)
    assert await mails(boss.service) == []
    assert (await boss("POST", f"/users/{user.id}/enable")).status_code == 204
    assert (await shown(boss, user))["enabled"] is True


async def test_nobody_is_restored_to_a_name_that_is_somebody_elses(boss: Operator) -> None:
    """409, and the new owner keeps it."""
    user = await boss.service.a_user("mika")
    assert (await boss("DELETE", f"/users/{user.id}")).status_code == 204
    new = await boss.service.a_user("mika", email="other@example.org")
    assert (await boss("POST", f"/users/{user.id}/restore")).status_code == 409
    assert (await shown(boss, user))["deleted_at"] is not None
    assert (await boss("PATCH", f"/users/{new.id}", {"username": "mika.2"})).status_code == 200
    assert (await boss("POST", f"/users/{user.id}/restore")).status_code == 200


@pytest.mark.parametrize("before", [True, False], ids=["deleted before", "there"])
async def test_a_purge_leaves_nothing(boss: Operator, before: bool) -> None:
    """Whether they were deleted before or not; the trail still tells that there was somebody."""
    service = boss.service
    user = await service.a_user("mika")
    await signed_in(service, user)
    await with_key(service, user)
    if before:
        assert (await boss("DELETE", f"/users/{user.id}")).status_code == 204
    for expected in (204, 404):
        assert (await boss("DELETE", f"/users/{user.id}", params={"purge": "true"})).status_code == expected
    assert (await boss("GET", f"/users/{user.id}")).status_code == 404
    assert (await boss("POST", f"/users/{user.id}/restore")).status_code == 404
    assert await told(service, "user.purged") == [(str(user.id), {})]
    assert [row.user_id for row in await service.family_rows() if row.user_id == user.id] == []


async def test_links_in_mails_die_with_the_account(boss: Operator) -> None:
    """Those that wait to be sent are not sent."""
    service = boss.service
    user = await made(boss)
    assert (await boss("DELETE", f"/users/{user['id']}")).status_code == 204
    assert await mails(service) == []


# -- figures ----------------------------------------------------------------------------------------------------------


async def stats(boss: Operator) -> dict[str, Any]:
    answer = await boss("GET", "/stats")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_the_figures_tell_what_goes_on(boss: Operator) -> None:
    """Users by role and state, live sessions, mails that wait, and what happened on each of thirty days in UTC."""
    service = boss.service
    client, user = await service.a_client(), await service.a_user("mika")
    tokens = await service.sign_in(client, user)
    await service.disable(await service.a_user(verified=False))
    await made(boss, username="new", email="new@example.org", role="moderator")
    for password in ("wrong", "wrong as well"):
        await service.token(client, grant_type="password", username="mika", password=password)
    await service.refresh(client, tokens["refresh_token"])
    await service.refresh(client, tokens["refresh_token"])  # reuse: the session ends

    async def long_ago(tx: Transaction) -> None:
        for days, count in ((29, 7), (30, 100), (1, 3)):
            await service.services.audit.record(
                tx, "sign_in.failed", origin=Origin("192.0.2.1", "r"), target="x", occurrences=count, detail={"n": days}
            )

    await service.within(long_ago)
    for row in await service.execute(select(audit_events).where(audit_events.c.occurrences > 1)):
        at = service.clock.now() - timedelta(days=row.detail["n"])
        await service.execute(update(audit_events).where(audit_events.c.id == row.id).values(at=at))

    figures = await stats(boss)
    assert figures["at"] == "2026-01-01T00:00:00Z"
    by_role = {role: number for role, number in figures["users"]["by_role"].items() if number}
    assert by_role == {"super_admin": 1, "user": 2, "moderator": 1}
    assert figures["users"]["by_state"] == {"enabled": 3, "disabled": 1, "unverified": 2, "deleted": 0}
    assert (figures["live_sessions"], figures["mails_waiting"]) == (1, 1)
    days = {day.pop("day"): day for day in figures["days"]}
    assert list(days) == [str(date(2025, 12, 3) + timedelta(days=number)) for number in range(30)]
    quiet = {"sign_ins": 0, "failed_sign_ins": 0, "refresh_tokens_reused": 0}
    assert days.pop("2026-01-01") == {"sign_ins": 2, "failed_sign_ins": 2, "refresh_tokens_reused": 1}
    assert days.pop("2025-12-31") == quiet | {"failed_sign_ins": 3}
    assert days.pop("2025-12-03") == quiet | {"failed_sign_ins": 7}
    assert all(day == quiet for day in days.values())


async def test_figures_are_kept_for_a_minute(boss: Operator) -> None:
    """Also while the clock is set back: what is of the future is not believed."""
    service = boss.service
    assert (await stats(boss))["users"]["by_state"]["enabled"] == 1
    await service.a_user()
    service.clock.advance(59)  # type: ignore[attr-defined]
    assert (await stats(boss))["users"]["by_state"]["enabled"] == 1
    service.clock.advance(1)  # type: ignore[attr-defined]
    assert (await stats(boss))["users"]["by_state"]["enabled"] == 2
    await service.a_user()
    service.clock.advance(-1)  # type: ignore[attr-defined]
    assert (await stats(boss))["users"]["by_state"]["enabled"] == 3


async def test_ten_who_ask_at_once_are_counted_for_once(boss: Operator) -> None:
    """The first counts, the others wait without a connection and get its answer."""
    people = boss.service.services.users
    counting, go_on = asyncio.Event(), asyncio.Event()
    count, calls = people.counts, 0

    async def slowly(tx: Transaction) -> Any:
        nonlocal calls
        calls += 1
        counting.set()
        await go_on.wait()
        return await count(tx)

    with patch.object(type(people), "counts", lambda _self, tx: slowly(tx)):
        asking = [asyncio.create_task(boss("GET", "/stats")) for _ in range(10)]
        await counting.wait()
        pool: Any = boss.service.services.db.engine.pool
        await until(lambda: pool.checkedout() == 1, "those who wait hold connections")
        go_on.set()
        answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200] * 10
    assert calls == 1


async def test_who_cannot_have_figures_does_not_spoil_them_for_others(boss: Operator) -> None:
    """When counting fails, the next who asked counts; who may not see them does not, fresh or kept."""
    service = boss.service
    people = service.services.users
    count, calls = people.counts, 0

    async def failing_once(tx: Transaction) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("the first one fails")
        return await count(tx)

    with patch.object(type(people), "counts", lambda _self, tx: failing_once(tx)):
        answers = await asyncio.gather(*(boss("GET", "/stats") for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 500]
    admin = await an_operator(service, role="admin")
    assert (await admin("GET", "/stats")).status_code == 200
    await service.execute(update(users).where(users.c.role == "admin").values(role="user"))
    assert (await admin("GET", "/stats")).status_code == 403


async def test_a_role_of_ones_own_counts_like_any_other(boss: Operator) -> None:
    """The names are those of the installation."""
    await boss.service.execute(roles.insert().values(name="auditor", rank=50))
    await boss.service.a_user(role="auditor")
    assert (await stats(boss))["users"]["by_role"]["auditor"] == 1
