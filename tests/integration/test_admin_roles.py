"""Roles and scopes as data: who may hold what, and who may say so."""

import pytest

from identity_service.accounts.access import Access
from identity_service.accounts.clients import NewClient
from tests.support.clock import FrozenClock
from tests.support.operators import Operator, an_operator
from tests.support.races import blocked, held
from tests.support.service import Service


async def test_each_seeded_role_holds_what_the_one_below_it_holds(service: Service) -> None:
    """Also what was granted to it later; the highest holds what nobody was granted."""
    access = Access(FrozenClock())
    await service.within(lambda tx: access.define(tx, ["orders:read", "orders:write"]))
    await service.within(lambda tx: access.grant(tx, "user", ["orders:read"]))
    held = {
        role: await service.within(lambda tx, role=role: access.scopes_of(tx, role))
        for role in ("user", "moderator", "admin", "super_admin")
    }
    assert held["user"] < held["moderator"] < held["admin"] < held["super_admin"]
    assert all("orders:read" in scopes for scopes in held.values())
    assert [role for role, scopes in held.items() if "orders:write" in scopes] == ["super_admin"]
    assert "users:read" in held["moderator"]
    assert "users:write" not in held["moderator"]


async def test_a_role_is_made_changed_given_and_deleted(boss: Operator) -> None:
    """Its holder gains and loses with it."""
    made = await boss("POST", "/roles", {"name": "auditor", "parent": "user", "scopes": ["audit:read"]})
    assert made.status_code == 201
    assert set(made.json()["held"]) >= {"account:read", "account:write", "audit:read"}
    auditor = await an_operator(boss.service, "auditor")
    assert (await auditor("GET", "/signing-keys")).status_code == 403
    changed = await boss("PATCH", "/roles/auditor", {"scopes": ["audit:read", "keys:read"]})
    assert changed.json()["scopes"] == ["audit:read", "keys:read"]
    again = await boss.service.sign_in(
        await boss.service.a_client(scope=["keys:read"]), await boss.service.a_user(role="auditor")
    )
    other = Operator(boss.service, again["access_token"])
    assert (await other("GET", "/signing-keys")).status_code == 200
    await boss("PATCH", "/roles/auditor", {"scopes": []})
    assert (await other("GET", "/signing-keys")).status_code == 403  # at once, with the token from before
    given, taken = [await boss.service.events(event) for event in ("role.granted", "role.withdrawn")]
    assert ("auditor", ["keys:read"]) in [(row.target, row.detail["scopes"]) for row in given]
    assert {row.target for row in taken} == {"auditor"}
    assert {"audit:read", "keys:read"} in [set(row.detail["scopes"]) - {"orders:read"} for row in taken]
    assert await boss.service.events("role.updated") == []
    await boss("PATCH", "/roles/auditor", {"description": "Reads"})
    assert [row.target for row in await boss.service.events("role.updated")] == ["auditor"]


@pytest.mark.case("ADM-24")
async def test_what_is_in_use_cannot_be_deleted(boss: Operator) -> None:
    """A role that somebody has or that another builds on; a scope that a role holds or a client may ask for."""
    await boss("POST", "/roles", {"name": "base"})
    await boss("POST", "/roles", {"name": "leaf", "parent": "base"})
    await boss("POST", "/scopes", {"name": "bills:read"})
    await boss("PATCH", "/roles/leaf", {"scopes": ["bills:read"]})
    user = await boss.service.a_user(role="leaf")
    for path in ("/roles/base", "/roles/leaf", "/roles/user", "/scopes?name=bills:read", "/scopes?name=users:read"):
        assert (await boss("DELETE", path)).status_code == 409, path
    await boss.service.patch_user(user, role="user")
    for path in ("/roles/leaf", "/roles/base"):
        assert (await boss("DELETE", path)).status_code == 204, path
    await boss("POST", "/clients", {"name": "Bills", "scope": ["bills:read"]})
    assert (await boss("DELETE", "/scopes?name=bills:read")).status_code == 409


@pytest.mark.case("ADM-24")
@pytest.mark.parametrize("first", ["the client", "the deletion"])
async def test_no_client_is_left_with_a_scope_that_goes_at_the_same_moment(boss: Operator, first: str) -> None:
    """Whichever comes first, the other one waits for it and is refused."""
    service, rules = boss.service, boss.service.services.access
    await boss("POST", "/scopes", {"name": "bills:read"})

    async with held(service) as transaction:
        if first == "the client":
            assert await rules.existing(transaction.tx, ["bills:read", "no:such"]) == {"bills:read"}
            await service.services.clients.register(transaction.tx, NewClient("Bills", scope=["bills:read"]))
            deleted = await blocked(service, boss("DELETE", "/scopes?name=bills:read"))
            await transaction.commit()
            assert (await deleted).status_code == 409
        else:
            await rules.delete_scope(transaction.tx, "bills:read")
            made = await blocked(service, boss("POST", "/clients", {"name": "Bills", "scope": ["bills:read"]}))
            await transaction.commit()
            assert (await made).status_code == 422


@pytest.mark.case("KEY-03")
async def test_nobody_grants_more_than_they_hold_and_nobody_changes_their_own_role(service: Service) -> None:
    """Neither directly, nor by a parent, nor through a role that is theirs."""
    await service.within(lambda tx: service.services.access.grant(tx, "admin", ["roles:write"]))
    admin = await an_operator(service, "admin")
    assert (await admin("POST", "/roles", {"name": "a", "scopes": ["keys:write"]})).status_code == 403
    assert (await admin("POST", "/roles", {"name": "b", "parent": "super_admin"})).status_code == 403
    assert (await admin("PATCH", "/roles/super_admin", {"description": "x"})).status_code == 403
    assert (await admin("PATCH", "/roles/admin", {"scopes": ["users:read"]})).status_code == 403
    assert (await admin("POST", "/roles", {"name": "c", "scopes": ["users:read"]})).status_code == 201
    assert (await admin("PATCH", "/roles/c", {"scopes": ["keys:write"]})).status_code == 403


async def test_the_highest_role_holds_every_scope_and_cannot_hold_less(service: Service) -> None:
    """Two super-admins: one cannot take the other's rights away through the role."""
    await service.within(
        lambda tx: service.services.access.create_role(tx, "root", parent="super_admin", description="", names=[])
    )
    other = await an_operator(service, "root")
    answer = await other("PATCH", "/roles/super_admin", {"scopes": []})
    assert answer.status_code in (403, 422)


@pytest.mark.parametrize("name", ["", "A", "1a", "a b", "a" * 65, "ä", "a\n", "super_admin"])
async def test_a_role_needs_a_plain_new_name(boss: Operator, name: str) -> None:
    """422 for what is no name, 409 for one that is taken."""
    answer = await boss("POST", "/roles", {"name": name})
    assert answer.status_code == (409 if name == "super_admin" else 422)


async def test_a_role_cannot_hold_a_scope_that_is_not_defined(boss: Operator) -> None:
    """A slip in a name would grant nothing, and look as if it did."""
    answer = await boss("POST", "/roles", {"name": "clerk", "scopes": ["orders:raed"]})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/scopes")


async def test_scopes_are_defined_described_and_deleted(boss: Operator) -> None:
    """One word of RFC 6749 §3.3 each; a URI will do."""
    name = "https://orders.example/read"
    assert (await boss("POST", "/scopes", {"name": name, "description": "Read orders"})).status_code == 201
    assert (await boss("POST", "/scopes", {"name": name})).status_code == 409
    assert (await boss("POST", "/scopes", {"name": "two words"})).status_code == 422
    assert (
        await boss("PATCH", "/scopes", params={"name": name}, json={"description": "See orders"})
    ).status_code == 200
    listed = {scope["name"]: scope["description"] for scope in (await boss("GET", "/scopes")).json()}
    assert listed[name] == "See orders"
    assert (await boss("DELETE", "/scopes", params={"name": name})).status_code == 204
    assert (await boss("DELETE", "/scopes", params={"name": name})).status_code == 404


@pytest.mark.case("ADM-18")
async def test_a_role_that_moved_on_is_not_overwritten(boss: Operator) -> None:
    """If-Match with the version that was read."""
    await boss("POST", "/roles", {"name": "clerk"})
    tag = (await boss("GET", "/roles/clerk")).headers["etag"]
    assert (await boss("PATCH", "/roles/clerk", {"description": "one"}, if_match=tag)).status_code == 200
    assert (await boss("PATCH", "/roles/clerk", {"description": "two"}, if_match=tag)).status_code == 412
