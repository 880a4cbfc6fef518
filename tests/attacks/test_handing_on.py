"""Ways to more than one was given, each of them closed: by clients, their secrets, roles, and keys of others."""

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import httpx2
import pytest

from identity_service.accounts.access import PERMISSIONS, Access
from identity_service.infra.database import Transaction
from tests.support.keys import an_exchanger, exchanged
from tests.support.operators import Operator, an_operator
from tests.support.service import ISSUER, PASSWORD, Service, running, test_settings

STRONG = sorted(PERMISSIONS)


async def with_role(service: Service, name: str, scopes: list[str]) -> Operator:
    """Return a signed-in person whose role holds these scopes and nothing else."""
    access = service.services.access
    await service.within(lambda tx: access.create_role(tx, name, parent=None, description="", names=scopes))
    return await an_operator(service, name)


async def a_client(boss: Operator, **metadata: Any) -> dict[str, Any]:
    answer = await boss("POST", "/clients", {"name": "X", "grant_types": ["client_credentials"], **metadata})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


@pytest.mark.case("KEY-03")
async def test_who_may_change_clients_cannot_borrow_what_a_stronger_client_may_do(boss: Operator) -> None:
    """Neither by a secret of it, nor by changing, disabling or forgetting it."""
    client_id = (await a_client(boss, scope=STRONG))["client"]["client_id"]
    [secret] = (await boss("GET", f"/clients/{client_id}/secrets")).json()
    clerk = await with_role(boss.service, "clerk", ["clients:read", "clients:write"])
    tries: list[tuple[str, str, Any]] = [
        ("POST", "/secrets", {}),
        ("DELETE", f"/secrets/{secret['id']}", None),
        ("PATCH", "", {"first_party": True, "grant_types": ["password"]}),
        ("PATCH", "", {"scope": []}),
        ("POST", "/disable", None),
        ("POST", "/enable", None),
        ("DELETE", "", None),
    ]
    before = (await boss("GET", f"/clients/{client_id}")).json()
    for method, path, body in tries:
        answer = await clerk(method, f"/clients/{client_id}{path}", body)
        assert answer.status_code == 403, f"{method} {path}: {answer.text}"
    assert (await boss("GET", f"/clients/{client_id}")).json() == before
    weak = (await a_client(boss, scope=[]))["client"]["client_id"]
    assert (await clerk("POST", f"/clients/{weak}/secrets", {})).status_code == 201


async def test_a_credential_that_was_handed_on_makes_no_clients_and_no_secrets(boss: Operator) -> None:
    """What leaks from a file must not leave behind what outlives its end."""
    client_id = (await a_client(boss, scope=[]))["client"]["client_id"]
    body = {"name": "k", "scope": ["clients:write"]}
    made = await boss.service.http.post("/v1/users/me/api-keys", json=body, headers=boss.headers)
    headers = {"x-api-key": made.json()["key"]}
    for path, sent in ((f"/clients/{client_id}/secrets", {}), ("/clients", {"name": "Y"})):
        answer = await boss.service.http.post(f"/v1/admin{path}", json=sent, headers=headers)
        assert answer.status_code == 403, path


async def test_a_secret_that_ended_stays_ended(boss: Operator) -> None:
    """Whatever becomes of those after it."""
    made = await a_client(boss, scope=[])
    client_id, first = made["client"]["client_id"], made["client_secret"]

    async def works(secret: str) -> bool:
        form = {"grant_type": "client_credentials"}
        return (await boss.service.http.post("/token", data=form, auth=(client_id, secret))).status_code == 200

    await boss("POST", f"/clients/{client_id}/secrets", {"overlap": 0})
    assert not await works(first)
    [newest, *_] = (await boss("GET", f"/clients/{client_id}/secrets")).json()
    await boss("DELETE", f"/clients/{client_id}/secrets/{newest['id']}")
    await boss("POST", f"/clients/{client_id}/secrets", {"overlap": 86400})
    assert not await works(first)


async def test_an_exchanged_token_makes_no_keys_of_the_service_it_speaks_for(boss: Operator) -> None:
    """Or a key that leaks could replace itself, by way of anybody who exchanges it."""
    service = boss.service
    strong = await a_client(boss, scope=["clients:write"], audiences=[ISSUER])
    client_id = strong["client"]["client_id"]
    key = (await boss("POST", f"/clients/{client_id}/api-keys", {"name": "k", "scope": ["clients:write"]})).json()[
        "key"
    ]
    exchanger = await service.a_client(
        grant_types=["urn:ietf:params:oauth:grant-type:token-exchange"],
        scope=["clients:write"],
        exchange_audiences=[ISSUER],
    )
    exchanged = await service.token(
        exchanger,
        grant_type="urn:ietf:params:oauth:grant-type:token-exchange",
        subject_token=key,
        subject_token_type="urn:identity-service:params:oauth:token-type:api-key",
    )
    assert exchanged.status_code == 200, exchanged.text
    second_hand = Operator(service, exchanged.json()["access_token"])
    for path in (f"/clients/{client_id}/api-keys", f"/clients/{client_id}/secrets"):
        answer = await second_hand("POST", path, {"name": "l", "scope": ["clients:write"]} if "keys" in path else {})
        assert answer.status_code == 403, path


async def test_a_narrow_token_makes_no_wide_key(service: Service) -> None:
    """A key holds at most what the token it is made with carries, whatever the person holds."""
    client, user = await service.a_client(audiences=[]), await service.a_user()
    token = (await service.sign_in(client, user, scope="account:write"))["access_token"]

    async def make(scope: list[str]) -> httpx2.Response:
        body = {"name": "k", "scope": scope}
        return await service.http.post("/v1/users/me/api-keys", json=body, headers={"authorization": f"Bearer {token}"})

    assert (await make(["orders:read"])).status_code == 403
    assert (await make(["account:read"])).status_code == 403
    assert (await make(["account:write"])).status_code == 201


async def test_taking_scopes_from_a_role_takes_none_from_who_holds_more(boss: Operator) -> None:
    """A role that a stronger one builds on is as strong as that one."""
    await boss("POST", "/roles", {"name": "base", "scopes": ["orders:read"]})
    await boss("POST", "/roles", {"name": "chief", "parent": "base", "scopes": ["keys:write"]})
    clerk = await with_role(boss.service, "clerk", ["roles:read", "roles:write", "orders:read"])
    assert (await clerk("PATCH", "/roles/base", {"scopes": []})).status_code == 403
    assert (await clerk("PATCH", "/roles/base", {"description": "x"})).status_code == 200
    assert (await boss("PATCH", "/roles/base", {"scopes": []})).status_code == 200


async def test_whoever_is_given_back_an_account_is_alone_in_it(service: Service) -> None:
    """An API key made before a reset, by whoever could sign in then, is dead after it."""
    client, user = await service.a_client(audiences=[]), await service.a_user()
    token = (await service.sign_in(client, user))["access_token"]
    made = await service.http.post(
        "/v1/users/me/api-keys",
        json={"name": "k", "scope": ["account:read"]},
        headers={"authorization": f"Bearer {token}"},
    )
    headers = {"x-api-key": made.json()["key"]}
    assert (await service.http.get("/v1/users/me", headers=headers)).status_code == 200
    boss = await an_operator(service)
    assert (await boss("POST", f"/users/{user.id}/force-password-reset")).status_code == 200
    assert (await service.http.get("/v1/users/me", headers=headers)).status_code == 401


async def test_a_dead_key_in_a_network_does_not_hold_up_the_good_ones_there(service: Service) -> None:
    """A forgotten script that goes on calling is slowed down; its neighbours are not."""
    client, user = await service.a_client(audiences=[]), await service.a_user()
    token = (await service.sign_in(client, user))["access_token"]
    keys = []
    for name in ("good", "dead"):
        made = await service.http.post(
            "/v1/users/me/api-keys",
            json={"name": name, "scope": ["account:read"]},
            headers={"authorization": f"Bearer {token}"},
        )
        keys.append(made.json())
    bearer = {"authorization": f"Bearer {token}"}
    await service.http.delete(f"/v1/users/me/api-keys/{keys[1]['id']}", headers=bearer)
    statuses = [
        (await service.http.get("/v1/users/me", headers={"x-api-key": keys[1]["key"]})).status_code for _ in range(35)
    ]
    assert statuses == [401] * 30 + [429] * 5
    assert (await service.http.get("/v1/users/me", headers={"x-api-key": keys[0]["key"]})).status_code == 200


async def test_a_key_without_the_scope_spends_from_its_limit_too(service: Service) -> None:
    """A refusal costs the database what an answer costs."""
    client, user = await service.a_client(audiences=[]), await service.a_user()
    token = (await service.sign_in(client, user))["access_token"]
    made = await service.http.post(
        "/v1/users/me/api-keys",
        json={"name": "k", "scope": ["account:read"]},
        headers={"authorization": f"Bearer {token}"},
    )
    headers = {"x-api-key": made.json()["key"]}
    statuses = {(await service.http.get("/v1/admin/users", headers=headers)).status_code for _ in range(305)}
    assert statuses == {403, 429}


async def test_asking_for_one_kind_of_mail_does_not_keep_somebody_from_another(service: Service) -> None:
    """Three requests for a proof of the address, which need no answer, and the reset link still comes."""
    user = await service.a_user()
    for _ in range(4):
        await service.http.post("/v1/email-verification", json={"email": user.email})
    await service.http.post("/v1/password-reset", json={"email": user.email})
    assert len(await service.events("password_reset.requested")) == 1


async def test_somebody_who_cannot_sign_in_does_not_count_as_the_last_who_can_do_everything(boss: Operator) -> None:
    """A super-admin who never chose a password would leave everybody outside."""
    service = boss.service
    ghost = await boss("POST", "/users", {"username": "ghost", "email": "g@example.org", "role": "super_admin"})
    assert ghost.status_code == 201
    leave = await service.http.request("DELETE", "/v1/users/me", json={"password": PASSWORD}, headers=boss.headers)
    assert leave.status_code == 409
    assert (await boss("DELETE", f"/users/{ghost.json()['id']}")).status_code == 204


# -- what was handed on gives nothing ---------------------------------------------------------------------------------


GIVING: list[tuple[str, str, Any]] = [
    ("POST", "/users", {"username": "ghost", "email": "ghost@evil.example", "role": "clerk"}),
    ("PATCH", "/users/{other}", {"email": "other@evil.example"}),
    ("PUT", "/users/{other}/role", {"role": "clerk"}),
    ("POST", "/users/{other}/enable", None),
    ("PATCH", "/clients/{client}", {"scope": ["users:write"], "redirect_uris": ["https://evil.example/cb"]}),
    ("PATCH", "/roles/user", {"scopes": ["users:write"]}),
    ("POST", "/roles", {"name": "mine", "scopes": ["users:write"]}),
    ("POST", "/scopes", {"name": "mine"}),
]
TAKING: list[tuple[str, str, Any]] = [
    ("POST", "/users/{other}/disable", None),
    ("DELETE", "/users/{other}/sessions", None),
    ("POST", "/clients/{client}/disable", None),
]


@pytest.mark.case("KEY-02")
@pytest.mark.parametrize("kind", ["an API key", "an exchanged token"])
async def test_a_credential_that_was_handed_on_takes_away_and_gives_nothing(service: Service, kind: str) -> None:
    """Neither an operator who outlives it, nor a way into somebody's account, nor a right; ending things it may."""
    scope = ["users:read", "users:write", "clients:read", "clients:write", "roles:read", "roles:write", "account:write"]
    boss = await an_operator(service)
    await boss("POST", "/roles", {"name": "clerk", "parent": "user", "scopes": scope})
    owner = await an_operator(service, "clerk")
    client_id = (await a_client(boss, scope=[]))["client"]["client_id"]
    other = await service.a_user("other")
    if kind == "an API key":
        body = {"name": "k", "scope": scope}
        made = await service.http.post("/v1/users/me/api-keys", json=body, headers=owner.headers)
        handed_on = Operator(service, "")
        handed_on.headers = {"x-api-key": made.json()["key"]}
    else:
        exchanger = await an_exchanger(service, scope=scope, exchange_audiences=[ISSUER], introspect=[ISSUER])
        token = owner.headers["authorization"].removeprefix("Bearer ")
        handed_on = Operator(service, await exchanged(service, exchanger, token))
    places = {"other": other.id, "client": client_id}
    for method, path, body in GIVING:
        answer = await handed_on(method, path.format(**places), body)
        assert answer.status_code == 403, f"{path}: {answer.text}"
        assert "session" in answer.json()["title"], path
    for method, path, body in TAKING:
        assert (await handed_on(method, path.format(**places), body)).status_code == 204, path
    assert (await boss("GET", f"/users/{other.id}")).json()["email"] == other.email


async def test_who_may_not_change_a_service_may_not_end_its_keys(boss: Operator) -> None:
    """Ending the key that everything runs on is no less than disabling the service."""
    client_id = (await a_client(boss, scope=STRONG))["client"]["client_id"]
    made = (await boss("POST", f"/clients/{client_id}/api-keys", {"name": "k", "scope": ["users:read"]})).json()
    clerk = await with_role(boss.service, "clerk", ["clients:read", "clients:write", "users:write"])
    for path in (f"/clients/{client_id}/api-keys/{made['id']}", f"/api-keys/{made['id']}"):
        assert (await clerk("DELETE", path)).status_code == 403, path
    assert (await boss("DELETE", f"/api-keys/{made['id']}")).status_code == 204


async def test_a_role_is_given_no_scope_that_appears_while_it_is_written(boss: Operator) -> None:
    """What is checked is what was written, not what was asked for a moment before."""
    service = boss.service
    clerk = await with_role(service, "clerk", ["roles:read", "roles:write"])
    existing = Access.existing

    async def late(self: Access, tx: Transaction, names: Iterable[str]) -> frozenset[str]:
        await self.define(tx, ["brand:new"])
        return await existing(self, tx, names)

    with patch.object(Access, "existing", late):
        assert (await clerk("POST", "/roles", {"name": "a", "scopes": ["brand:new"]})).status_code == 403
    assert (await boss("GET", "/roles/a")).status_code == 404


async def test_the_general_limit_holds_for_who_lacks_the_scope_as_well(database_url: str) -> None:
    """Each such request asks the database whether the token is alive."""
    async with running(test_settings(database_url, client_rate=1)) as service:
        someone = await an_operator(service, "user")
        answers = [(await someone("GET", "/users")).status_code for _ in range(8)]
        assert answers == [403] * 5 + [429] * 3


async def test_the_trail_says_what_a_client_was_given(boss: Operator) -> None:
    """And from where it may call."""
    client_id = (await a_client(boss, scope=["users:read"]))["client"]["client_id"]
    await boss("PATCH", f"/clients/{client_id}", {"scope": [], "cors_origins": ["https://app.example"], "name": "Y"})
    [made], [changed] = [await boss.service.events(f"client.{what}") for what in ("created", "updated")]
    assert made.detail == {"scope": ["users:read"], "grant_types": ["client_credentials"]}
    assert changed.detail == {
        "members": ["cors_origins", "name", "scope"],
        "scope": [],
        "cors_origins": ["https://app.example"],
    }
