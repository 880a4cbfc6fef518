"""The operators' API about clients and their secrets."""

from typing import Any

import pytest

from tests.support.operators import Operator, an_operator
from tests.support.service import Service

METADATA = {
    "name": "Reports",
    "grant_types": ["client_credentials"],
    "scope": ["orders:read"],
    "audiences": ["https://orders.example"],
}


async def a_client(boss: Operator, **changes: Any) -> dict[str, Any]:
    """Register a client and return the answer."""
    answer = await boss("POST", "/clients", {**METADATA, **changes})
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_registered_client_can_sign_in_with_the_secret_that_is_shown_once(boss: Operator) -> None:
    """Neither reading nor listing shows it again."""
    made = await a_client(boss)
    auth = (made["client"]["client_id"], made["client_secret"])
    token = await boss.service.http.post("/token", data={"grant_type": "client_credentials"}, auth=auth)
    assert token.status_code == 200
    for path in ("/clients", f"/clients/{auth[0]}", f"/clients/{auth[0]}/secrets"):
        assert auth[1] not in (await boss("GET", path)).text


async def test_a_change_acts_within_a_second_and_is_audited_by_its_fields(boss: Operator) -> None:
    """What was not named stays; the trail tells who and which fields, not which values."""
    made = await a_client(boss)
    client_id = made["client"]["client_id"]
    answer = await boss("PATCH", f"/clients/{client_id}", {"scope": [], "access_token_ttl": 120})
    assert answer.status_code == 200
    assert answer.json() == {**made["client"], "scope": [], "access_token_ttl": 120}
    auth = (client_id, made["client_secret"])
    token = await boss.service.http.post("/token", data={"grant_type": "client_credentials"}, auth=auth)
    assert token.json()["scope"] == ""
    assert token.json()["expires_in"] <= 120
    [row] = await boss.service.events("client.updated")
    assert (row.target, row.detail) == (client_id, {"members": ["access_token_ttl", "scope"], "scope": []})


async def test_a_lifetime_can_be_set_back_to_the_default(boss: Operator) -> None:
    """Null says so; a member that has no default cannot be null, or a change would be claimed that is none."""
    client_id = (await a_client(boss, access_token_ttl=120))["client"]["client_id"]
    answer = await boss("PATCH", f"/clients/{client_id}", {"access_token_ttl": None})
    assert (answer.json()["access_token_ttl"], answer.json()["name"]) == (None, "Reports")
    answer = await boss("PATCH", f"/clients/{client_id}", {"access_token_ttl": 60, "name": None, "scope": None})
    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/name", "/scope"]
    assert (await boss("GET", f"/clients/{client_id}")).json()["access_token_ttl"] is None


@pytest.mark.case("ADM-07")
@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"audiences": ["orders"]}, "/audiences"),
        ({"introspect": ["https://x.example#part"]}, "/introspect"),
        ({"exchange_audiences": ["x"]}, "/exchange_audiences"),
        ({"redirect_uris": ["http://evil.example/cb"]}, "/redirect_uris"),
        ({"cors_origins": ["*"]}, "/cors_origins"),
        ({"cors_origins": ["https://app.example/"]}, "/cors_origins"),
        ({"grant_types": ["implicit"]}, "/grant_types"),
        ({"grant_types": ["password"]}, "/grant_types"),
        ({"refresh_idle_ttl": 5}, "/refresh_idle_ttl"),
        ({"refresh_absolute_ttl": 5}, "/refresh_absolute_ttl"),
        ({"access_token_ttl": 5}, "/access_token_ttl"),
        ({"refresh_retry_window": 3600}, "/refresh_retry_window"),
        ({"scope": ["never:defined"]}, "/scope"),
        ({"name": "a\nb"}, "/name"),
        ({"name": ""}, "/name"),
        ({"enabled": False}, ""),
        ({"client_id": "cl_mine"}, ""),
        ({"scope": "orders:read"}, "/scope"),
        ({"first_party": "yes"}, "/first_party"),
    ],
    ids=str,
)
async def test_what_cannot_be_registered_cannot_be_changed_to_either(
    boss: Operator, changes: dict[str, Any], pointer: str
) -> None:
    """The same checks on both ways in, and the answer says where without repeating what."""
    client_id = (await a_client(boss))["client"]["client_id"]
    before = (await boss("GET", f"/clients/{client_id}")).json()
    for answer in (
        await boss("POST", "/clients", {**METADATA, **changes}),
        await boss("PATCH", f"/clients/{client_id}", changes),
    ):
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["errors"][0]["pointer"].startswith(pointer)
        assert "evil" not in answer.text
        assert "never:defined" not in answer.text
    assert (await boss("GET", f"/clients/{client_id}")).json() == before


async def test_whether_a_client_can_keep_a_secret_cannot_change(boss: Operator) -> None:
    """Or a public client would pass for one that authenticates."""
    client_id = (await a_client(boss))["client"]["client_id"]
    answer = await boss("PATCH", f"/clients/{client_id}", {"token_endpoint_auth_method": "none"})
    assert answer.status_code == 422


@pytest.mark.case("ADM-18")
async def test_a_change_of_what_moved_on_is_refused(boss: Operator) -> None:
    """Two operators who read the same version: the second is told to look again."""
    client_id = (await a_client(boss))["client"]["client_id"]
    tag = (await boss("GET", f"/clients/{client_id}")).headers["etag"]
    first = await boss("PATCH", f"/clients/{client_id}", {"name": "One"}, if_match=tag)
    assert first.status_code == 200
    assert (await boss("PATCH", f"/clients/{client_id}", {"name": "Two"}, if_match=tag)).status_code == 412
    again = await boss("PATCH", f"/clients/{client_id}", {"name": "Two"}, if_match=first.headers["etag"])
    assert again.json()["name"] == "Two"


@pytest.mark.case("KEY-03")
async def test_nobody_gives_a_client_more_than_they_hold(service: Service) -> None:
    """A client that may change users is a way to change users."""
    await service.within(lambda tx: service.services.access.grant(tx, "admin", ["clients:write"]))
    admin = await an_operator(service, "admin")
    assert (await admin("POST", "/clients", {**METADATA, "scope": ["keys:write"]})).status_code == 403
    narrow = await an_operator(service, "super_admin", scope="clients:write clients:read")
    assert (await narrow("POST", "/clients", {**METADATA, "scope": ["users:write"]})).status_code == 403
    made = (await a_client(narrow))["client"]["client_id"]  # a sibling's scope needs the right, not the very credential
    assert (await narrow("PATCH", f"/clients/{made}", {"scope": ["users:write"]})).status_code == 403


async def test_a_disabled_client_is_dead_and_an_enabled_one_is_not_revived(boss: Operator) -> None:
    """Its token stays dead; its secret works again."""
    made = await a_client(boss, audiences=[], scope=["account:read"])
    client_id, auth = made["client"]["client_id"], (made["client"]["client_id"], made["client_secret"])
    form = {"grant_type": "client_credentials"}
    token = (await boss.service.http.post("/token", data=form, auth=auth)).json()["access_token"]
    assert (await boss("POST", f"/clients/{client_id}/disable")).status_code == 204
    assert (await boss.service.http.post("/token", data=form, auth=auth)).status_code == 401
    assert (await boss("POST", f"/clients/{client_id}/enable")).status_code == 204
    assert (await boss.service.http.post("/token", data=form, auth=auth)).status_code == 200
    assert (await boss.service.me(token)).status_code == 401
    assert len(await boss.service.events("client.disabled")) == 1


@pytest.mark.case("CLI-09")
async def test_two_secrets_overlap_and_one_can_be_ended_at_once(boss: Operator) -> None:
    """The rotation that an operator does without an outage."""
    made = await a_client(boss)
    client_id, old = made["client"]["client_id"], made["client_secret"]
    made = (await boss("POST", f"/clients/{client_id}/secrets", {"overlap": 3600})).json()
    new = made["client_secret"]

    async def works(secret: str) -> bool:
        form = {"grant_type": "client_credentials"}
        return (await boss.service.http.post("/token", data=form, auth=(client_id, secret))).status_code == 200

    assert await works(old)
    assert await works(new)
    listed = (await boss("GET", f"/clients/{client_id}/secrets")).json()
    assert listed[0]["id"] == made["id"]
    assert [one["expires_at"] is None for one in listed] == [True, False]
    assert (await boss("DELETE", f"/clients/{client_id}/secrets/{listed[1]['id']}")).status_code == 204
    assert not await works(old)
    assert await works(new)


async def test_without_a_body_the_old_secret_works_for_a_day(boss: Operator) -> None:
    """An emergency has no time for looking up members."""
    client_id = (await a_client(boss))["client"]["client_id"]
    assert (await boss("POST", f"/clients/{client_id}/secrets")).status_code == 201
    ends = [one["expires_at"] for one in (await boss("GET", f"/clients/{client_id}/secrets")).json()]
    assert ends == [None, "2026-01-02T00:00:00Z"]


async def test_a_public_client_has_no_secret_to_rotate(boss: Operator) -> None:
    """409, and nothing is made."""
    public = {"token_endpoint_auth_method": "none", "grant_types": ["refresh_token"]}
    made = await a_client(boss, **public)
    assert made["client_secret"] is None
    answer = await boss("POST", f"/clients/{made['client']['client_id']}/secrets", {})
    assert answer.status_code == 409


async def test_a_client_goes_only_after_it_was_disabled(boss: Operator) -> None:
    """A slip of the hand cannot end a running client for good."""
    client_id = (await a_client(boss))["client"]["client_id"]
    assert (await boss("DELETE", f"/clients/{client_id}")).status_code == 409
    await boss("POST", f"/clients/{client_id}/disable")
    assert (await boss("DELETE", f"/clients/{client_id}")).status_code == 204
    assert (await boss("GET", f"/clients/{client_id}")).status_code == 404
    assert (await boss("DELETE", f"/clients/{client_id}")).status_code == 404


@pytest.mark.case("ADM-14")
async def test_the_list_comes_in_pages_and_a_cursor_is_for_this_list_only(boss: Operator) -> None:
    """Every client once; a tampered cursor, or a limit that is none, is refused."""
    wanted = {(await a_client(boss))["client"]["client_id"] for _ in range(5)}
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = (await boss("GET", f"/clients?limit=2{'&cursor=' + cursor if cursor else ''}")).json()
        seen += [client["client_id"] for client in page["items"]]
        cursor = page["next_cursor"]
    assert len(seen) == len(set(seen))
    assert wanted <= set(seen)
    first = (await boss("GET", "/clients?limit=1")).json()["next_cursor"]
    for bad in ("limit=0", "limit=-1", "limit=101", "limit=a", f"limit={2**63}", "cursor=AAAA", f"cursor=A{first[1:]}"):
        if bad != f"cursor={first}":
            assert (await boss("GET", f"/clients?{bad}")).status_code == 422, bad


async def test_a_parameter_that_is_misspelt_is_refused_and_not_ignored(boss: Operator) -> None:
    """A filter that nobody heeds lists everything; an option that nobody heeds may end what it was to spare."""
    answer = await boss("GET", "/users?qq=ada")
    assert answer.status_code == 422
    assert "limit, q, role, state" in answer.json()["errors"][0]["detail"]
    spare = await boss.service.http.delete("/v1/users/me/sessions?exceptcurrent=true", headers=boss.headers)
    assert spare.status_code == 422
    assert (await boss("GET", "/clients")).status_code == 200


async def test_what_does_not_exist_is_not_found_whatever_its_name(boss: Operator) -> None:
    """Malformed and unknown ids look alike."""
    for client_id in ("nothing", "cl_0000000000000000000000", "%00", "cl_%F0%9F%98%80", "{}"):
        answer = await boss("GET", f"/clients/{client_id}")
        assert answer.status_code in (400, 404), client_id
