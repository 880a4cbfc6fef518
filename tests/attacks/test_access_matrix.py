"""
Every route with every kind of credential, from one table.

A route that is not in the table fails the first test, so nobody can add one without saying who may call it.
"""

import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from identity_service.accounts.access import PERMISSIONS, SELF_SERVICE
from identity_service.web.documented import routes_of, rule_of
from tests.support.service import BOOTSTRAP_SECRET, ISSUER, SIBLING, Registered, Service, running, test_settings

ANYBODY = None
"""No credential is needed."""

ROUTES: dict[tuple[str, str], str | None] = {
    ("POST", "/v1/users"): ANYBODY,
    ("POST", "/v1/email-verification"): ANYBODY,
    ("POST", "/v1/email-verification/confirm"): ANYBODY,
    ("POST", "/v1/password-reset"): ANYBODY,
    ("POST", "/v1/password-reset/confirm"): ANYBODY,
    ("POST", "/v1/bootstrap"): ANYBODY,
    ("GET", "/v1/users/me"): "account:read",
    ("PATCH", "/v1/users/me"): "account:write",
    ("DELETE", "/v1/users/me"): "account:write",
    ("POST", "/v1/users/me/email"): "account:write",
    ("POST", "/v1/users/me/password"): "account:write",
    ("GET", "/v1/users/me/export"): "account:read",
    ("GET", "/v1/users/me/sessions"): "account:read",
    ("DELETE", "/v1/users/me/sessions"): "account:write",
    ("DELETE", "/v1/users/me/sessions/{session_id}"): "account:write",
    ("GET", "/v1/users/me/api-keys"): "account:read",
    ("POST", "/v1/users/me/api-keys"): "account:write",
    ("POST", "/v1/users/me/api-keys/{key_id}/rotate"): "account:write",
    ("DELETE", "/v1/users/me/api-keys/{key_id}"): "account:write",
    ("GET", "/v1/admin/users"): "users:read",
    ("POST", "/v1/admin/users"): "users:write",
    ("GET", "/v1/admin/users/{user_id}"): "users:read",
    ("PATCH", "/v1/admin/users/{user_id}"): "users:write",
    ("DELETE", "/v1/admin/users/{user_id}"): "users:write",
    ("POST", "/v1/admin/users/{user_id}/disable"): "users:write",
    ("POST", "/v1/admin/users/{user_id}/enable"): "users:write",
    ("POST", "/v1/admin/users/{user_id}/restore"): "users:write",
    ("POST", "/v1/admin/users/{user_id}/force-password-reset"): "users:write",
    ("PUT", "/v1/admin/users/{user_id}/role"): "users:write",
    ("GET", "/v1/admin/users/{user_id}/sessions"): "users:read",
    ("DELETE", "/v1/admin/users/{user_id}/sessions"): "users:write",
    ("DELETE", "/v1/admin/users/{user_id}/sessions/{session_id}"): "users:write",
    ("GET", "/v1/admin/users/{user_id}/api-keys"): "users:read",
    ("DELETE", "/v1/admin/clients/{client_id}/api-keys/{key_id}"): "clients:write",
    ("POST", "/v1/admin/api-keys/{key_id}/rotate"): "clients:write",
    ("DELETE", "/v1/admin/api-keys/{key_id}"): "users:write",
    ("GET", "/v1/admin/clients"): "clients:read",
    ("POST", "/v1/admin/clients"): "clients:write",
    ("GET", "/v1/admin/clients/{client_id}"): "clients:read",
    ("PATCH", "/v1/admin/clients/{client_id}"): "clients:write",
    ("DELETE", "/v1/admin/clients/{client_id}"): "clients:write",
    ("POST", "/v1/admin/clients/{client_id}/disable"): "clients:write",
    ("POST", "/v1/admin/clients/{client_id}/enable"): "clients:write",
    ("GET", "/v1/admin/clients/{client_id}/secrets"): "clients:read",
    ("POST", "/v1/admin/clients/{client_id}/secrets"): "clients:write",
    ("DELETE", "/v1/admin/clients/{client_id}/secrets/{secret_id}"): "clients:write",
    ("GET", "/v1/admin/clients/{client_id}/api-keys"): "clients:read",
    ("POST", "/v1/admin/clients/{client_id}/api-keys"): "clients:write",
    ("GET", "/v1/admin/roles"): "roles:read",
    ("POST", "/v1/admin/roles"): "roles:write",
    ("GET", "/v1/admin/roles/{name}"): "roles:read",
    ("PATCH", "/v1/admin/roles/{name}"): "roles:write",
    ("DELETE", "/v1/admin/roles/{name}"): "roles:write",
    ("GET", "/v1/admin/scopes"): "roles:read",
    ("POST", "/v1/admin/scopes"): "roles:write",
    ("PATCH", "/v1/admin/scopes"): "roles:write",
    ("DELETE", "/v1/admin/scopes"): "roles:write",
    ("GET", "/v1/admin/signing-keys"): "keys:read",
    ("POST", "/v1/admin/signing-keys/rotate"): "keys:write",
    ("POST", "/v1/admin/signing-keys/{kid}/compromise"): "keys:write",
    ("GET", "/v1/admin/audit"): "audit:read",
    ("GET", "/v1/admin/stats"): "stats:read",
}
# Pages for browsers, which the links of mails open; they are no part of the JSON API.
PAGES = {("GET", path) for path in ("/verify-email", "/reset-password", "/change-email")} | {
    ("POST", path) for path in ("/verify-email", "/reset-password", "/change-email")
}
# Where a credential that was handed on will not do: an API key lies in a file, an exchanged token with a service. They
# may look and take away; they give nothing that outlives them.
FIRST_HAND = {
    *(("POST", "/v1/admin/users"), ("PATCH", "/v1/admin/users/{user_id}"), ("PUT", "/v1/admin/users/{user_id}/role")),
    *(("POST", "/v1/admin/users/{user_id}/enable"), ("POST", "/v1/admin/users/{user_id}/restore")),
    *(("PATCH", "/v1/admin/clients/{client_id}"), ("POST", "/v1/admin/clients/{client_id}/enable")),
    *(("POST", "/v1/admin/roles"), ("PATCH", "/v1/admin/roles/{name}"), ("DELETE", "/v1/admin/roles/{name}")),
    ("POST", "/v1/admin/signing-keys/{kid}/compromise"),
    *((method, "/v1/admin/scopes") for method in ("POST", "PATCH", "DELETE")),
    *(("DELETE", "/v1/users/me"), ("POST", "/v1/users/me/email"), ("POST", "/v1/users/me/password")),
    *(("GET", "/v1/users/me/export"), ("POST", "/v1/users/me/api-keys")),
    *(("POST", "/v1/users/me/api-keys/{key_id}/rotate"), ("DELETE", "/v1/users/me/api-keys/{key_id}")),
    *(("POST", "/v1/admin/clients/{client_id}/api-keys"), ("POST", "/v1/admin/api-keys/{key_id}/rotate")),
    *(("POST", "/v1/admin/clients"), ("POST", "/v1/admin/clients/{client_id}/secrets")),
    *(("DELETE", "/v1/admin/clients/{client_id}/api-keys/{key_id}"), ("DELETE", "/v1/admin/api-keys/{key_id}")),
}
EVERY_SCOPE = " ".join(sorted(SELF_SERVICE | PERMISSIONS))
DEMANDING = sorted((method, path) for (method, path), scope in ROUTES.items() if scope is not None)
OPEN = sorted((method, path) for (method, path), scope in ROUTES.items() if scope is None)


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Service]:
    """The service with everything switched on, and a budget that this many requests do not exhaust."""
    settings = test_settings(database_url, registration="open", bootstrap_secret=BOOTSTRAP_SECRET, client_rate=100_000)
    async with running(settings) as service:
        yield service


def routes(service: Service) -> dict[tuple[str, str], Any]:
    return {
        (method, re.sub(r":path}", "}", route.path)): route
        for route in routes_of(service.app.routes)
        for method in route.methods or ()
    }


async def test_the_table_names_every_route_and_what_it_demands(api: Service) -> None:
    """A new route without an entry fails here, and one whose demand changes as well."""
    known = {where: rule_of(route) for where, route in routes(api).items()}
    assert {where for where in known if where in PAGES} == PAGES
    assert {where: rule.scope for where, rule in known.items() if where not in PAGES} == ROUTES
    assert {where for where, rule in known.items() if rule.first_hand} == FIRST_HAND


async def test_the_document_offers_an_api_key_where_one_will_do(api: Service) -> None:
    """And nowhere else, so that nobody builds on what is refused."""
    paths = (await api.http.get("/openapi.json")).json()["paths"]
    offered = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method, described in methods.items()
        if {"api_key": []} in described["security"]
    }
    assert offered == set(DEMANDING) - FIRST_HAND


@dataclass(frozen=True)
class Credential:
    """A kind of credential, and what is answered to it."""

    name: str
    headers: dict[str, str]
    status: int


async def operator(api: Service) -> tuple[Registered, Any]:
    """Return a client that may ask for everything, and a person who holds everything."""
    client = await api.a_client(
        grant_types=["password", "refresh_token", "client_credentials"],
        scope=EVERY_SCOPE.split(),
        audiences=[ISSUER, SIBLING],
    )
    return client, await api.a_user(role="super_admin")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def ask(api: Service, method: str, path: str, headers: dict[str, str]) -> httpx2.Response:
    """Call a route about something that does not exist, with a body that says nothing."""
    concrete = re.sub(r"{(user_id|session_id|secret_id)}", str(uuid.uuid4()), path)
    concrete = re.sub(r"{\w+}", "nothing", concrete)
    content = {"content": b"{}"} if method in ("POST", "PATCH", "PUT") else {}
    json = {"content-type": "application/json"} if content else {}
    return await api.http.request(method, concrete, headers={**json, **headers}, **content)


async def api_key(api: Service, token: str, scope: list[str]) -> str:
    made = await api.http.post("/v1/users/me/api-keys", json={"name": "a key", "scope": scope}, headers=bearer(token))
    assert made.status_code == 201, made.text
    key: str = made.json()["key"]
    return key


@pytest.mark.case("ADM-01")
async def test_every_route_refuses_every_credential_that_is_not_good_for_it(api: Service) -> None:
    """401 for what is no credential of ours, 403 for one that may not do this; nothing else, on any route."""
    client, boss = await operator(api)
    whole = await api.sign_in(client, boss)
    sibling = await api.sign_in(client, boss, resource=SIBLING)
    own = (await api.token(client, grant_type="client_credentials", scope="users:read")).json()["access_token"]
    expired = (await api.sign_in(client, boss))["access_token"]
    keys = {scope: await api_key(api, whole["access_token"], [scope]) for scope in ("account:read", "stats:read")}
    api.clock.advance(3700)  # type: ignore[attr-defined]
    narrow = {
        scope: (await api.sign_in(client, boss, scope=scope))["access_token"]
        for scope in ("account:read", "stats:read")
    }
    client_token = (await api.token(client, grant_type="client_credentials", scope="users:read")).json()["access_token"]
    other = (await api.sign_in(client, boss, resource=SIBLING))["access_token"]
    for method, path in DEMANDING:
        demanded = ROUTES[method, path]
        wrong = "stats:read" if demanded != "stats:read" else "account:read"
        credentials = [
            Credential("none", {}, 401),
            Credential("no token at all", bearer("nonsense"), 401),
            Credential("refresh token", bearer(whole["refresh_token"]), 401),
            Credential("expired", bearer(expired), 401),
            Credential("expired, of a client", bearer(own), 401),
            Credential("expired, for a sibling", bearer(sibling["access_token"]), 401),
            Credential("for another audience", bearer(other), 401),
            Credential("forged", bearer(narrow["account:read"][:-8] + "AAAAAAAA"), 401),
            Credential("client credentials as such", {"authorization": "Basic YTpi"}, 401),
            Credential("no API key", {"x-api-key": "idk_nonsense"}, 401),  # slowed down when there are many
            Credential("wrong scope", bearer(narrow[wrong]), 403),
            Credential("API key without the scope", {"x-api-key": keys[wrong]}, 403),
            Credential("both", {**bearer(narrow[wrong]), "x-api-key": keys[wrong]}, 400),
        ]
        api.clock.advance(2)  # type: ignore[attr-defined]  # which gives that budget back
        if demanded != "users:read":
            credentials.append(Credential("client's token without the scope", bearer(client_token), 403))
        for credential in credentials:
            answer = await ask(api, method, path, credential.headers)
            assert answer.status_code == credential.status, f"{method} {path} with {credential.name}: {answer.text}"
            assert "no-store" in answer.headers["cache-control"], f"{method} {path} with {credential.name}"
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"].startswith("Bearer"), f"{method} {path}"


@pytest.mark.case("ADM-01")
async def test_every_route_lets_the_right_credential_through(api: Service) -> None:
    """Or the test above would pass on a service that refuses everything."""
    client, boss = await operator(api)
    for method, path in DEMANDING:
        demanded = ROUTES[method, path]
        token = (await api.sign_in(client, boss, scope=demanded))["access_token"]
        answer = await ask(api, method, path, bearer(token))
        assert answer.status_code not in (401, 403, 500, 503), f"{method} {path}: {answer.status_code} {answer.text}"
        assert "no-store" in answer.headers["cache-control"], f"{method} {path}"


@pytest.mark.case("ADM-01")
async def test_an_api_key_opens_what_its_scope_opens_and_nothing_that_takes_an_account_over(api: Service) -> None:
    """Whoever finds a key in a file cannot make themselves more of them, nor lock its owner out."""
    client, boss = await operator(api)
    token = (await api.sign_in(client, boss))["access_token"]
    by_scope = {scope: await api_key(api, token, [scope]) for scope in sorted({s for s in ROUTES.values() if s})}
    for method, path in DEMANDING:
        answer = await ask(api, method, path, {"x-api-key": by_scope[str(ROUTES[method, path])]})
        if (method, path) in FIRST_HAND:
            assert answer.status_code == 403, f"{method} {path}: {answer.status_code}"
        else:
            assert answer.status_code not in (401, 403, 500, 503), f"{method} {path}: {answer.status_code}"


async def test_routes_for_everybody_demand_nothing(api: Service) -> None:
    """An empty body is refused for what it lacks, not for who sent it."""
    for method, path in OPEN:
        answer = await ask(api, method, path, {})
        assert answer.status_code in (400, 422), f"{method} {path}: {answer.status_code} {answer.text}"
        unknown = await ask(api, method, f"{path}?colour=red", {})
        assert [fault["pointer"] for fault in unknown.json()["errors"]] == [""], f"{method} {path}: {unknown.text}"
        assert "not known" in unknown.json()["errors"][0]["detail"], f"{method} {path}: {unknown.text}"
