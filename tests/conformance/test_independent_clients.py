"""
Whole flows against a running server, driven by client libraries that are not ours.

Authlib speaks through httpx2, requests-oauthlib through requests and oauthlib. Neither is told anything about the
service but the addresses of its endpoints, and a flow of a user ends where it should: at the user's own account.
"""

import asyncio
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from oauthlib.oauth2 import (
    BackendApplicationClient,
    InvalidClientError,
    InvalidGrantError,
    InvalidScopeError,
    LegacyApplicationClient,
    OAuth2Error,
)
from requests_oauthlib import OAuth2Session

from identity_service.infra.migrate import migrate
from tests.support.clock import FrozenClock
from tests.support.server_process import ServerProcess
from tests.support.servers import PostgresServer
from tests.support.service import PASSWORD, SIBLING, Registered, running, test_settings

SCOPE = "account:read"


@dataclass(frozen=True)
class Site:
    """A running server and who is known to it: clients of either kind, a resource server, a user."""

    url: str
    confidential: Registered
    public: Registered
    resource_server: Registered
    username: str

    @property
    def me(self) -> str:
        """The address of the user's own account."""
        return f"{self.url}/v1/users/me"

    @property
    def token_endpoint(self) -> str:
        """The address of the token endpoint."""
        return f"{self.url}/token"

    @property
    def user(self) -> dict[str, str]:
        """What the user types."""
        return {"username": self.username, "password": PASSWORD}


@pytest.fixture(scope="module")
def site(postgres_server: PostgresServer) -> Iterator[Site]:
    """One server on PostgreSQL for all tests here: each signs in anew, and none touches what another has."""
    name = f"identity_{secrets.token_hex(4)}"
    database_url = postgres_server.create_database(name)

    async def register(url: str) -> Site:
        settings = test_settings(database_url, issuer=url)
        async with running(settings, FrozenClock(datetime.now(UTC))) as service:
            return Site(
                url,
                confidential=await service.a_client(audiences=(url, SIBLING)),
                public=await service.a_client(audiences=(url,), public=True),
                resource_server=await service.a_client(grant_types=(), audiences=(), scope=(), introspect=(SIBLING,)),
                username=(await service.a_user()).username,
            )

    try:
        migrate(database_url)
        with ServerProcess(database_url) as server:
            yield asyncio.run(register(server.url))
    finally:
        postgres_server.drop_database(name)


def outdated(token: dict[str, Any]) -> dict[str, Any]:
    """Return a token as it comes back from where it was stored overnight: to the client it has expired."""
    return {**token, "expires_at": int(time.time()) - 1}


# -- Authlib ----------------------------------------------------------------------------------------------------------


def authlib(site: Site, client: Registered, method: str | None = None, **given: Any) -> AsyncOAuth2Client:
    """Return Authlib's client, which knows its token endpoint and how to authenticate there."""
    return AsyncOAuth2Client(
        client.id,
        client.secret,
        token_endpoint_auth_method=method,
        token_endpoint=site.token_endpoint,
        timeout=30,
        **given,
    )


async def reads_the_account(client: AsyncOAuth2Client, site: Site) -> None:
    """Check that the client's token opens the user's account."""
    answer = await client.get(site.me)
    assert (answer.status_code, answer.json().get("username")) == (200, site.username), answer.text


@pytest.mark.rfc("6749", "4.3")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
async def test_authlib_signs_a_user_in(site: Site, method: str) -> None:
    """The client authenticates in each way that there is."""
    async with authlib(site, site.public if method == "none" else site.confidential, method, scope=SCOPE) as client:
        token = await client.fetch_token(grant_type="password", **site.user)
        assert (token["token_type"], token["scope"]) == ("Bearer", SCOPE)
        assert not token.is_expired()
        await reads_the_account(client, site)


@pytest.mark.rfc("6749", "4.4")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_authlib_fetches_a_clients_own_token_and_the_next_when_it_expires(site: Site, method: str) -> None:
    """There is no refresh token; the library asks for another one by itself."""
    told: list[dict[str, Any]] = []

    async def update_token(token: dict[str, Any], **_: str) -> None:
        told.append(token)

    async with authlib(
        site, site.confidential, method, grant_type="client_credentials", scope="orders:read", update_token=update_token
    ) as client:
        first = await client.fetch_token()
        assert "refresh_token" not in first
        client.token = outdated(first)
        await client.ensure_active_token(client.token)
        assert told == [client.token]
        assert client.token["access_token"] != first["access_token"]
        assert (client.token["scope"], client.token.is_expired()) == ("orders:read", False)


@pytest.mark.rfc("6749", "6")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
async def test_authlib_refreshes_when_told_to_and_by_itself(site: Site, method: str) -> None:
    """Each time it takes over the successor, so that the third token is good where the second was used up."""
    told: list[str] = []

    async def update_token(token: dict[str, Any], *, refresh_token: str) -> None:
        told.append(refresh_token)

    registered = site.public if method == "none" else site.confidential
    async with authlib(site, registered, method, update_token=update_token) as client:
        first = await client.fetch_token(grant_type="password", **site.user)
        second = await client.refresh_token()
        await reads_the_account(client, site)
        client.token = outdated(second)
        await reads_the_account(client, site)
        assert told == [first["refresh_token"], second["refresh_token"]]
        assert client.token["refresh_token"] not in told
        await client.refresh_token()
        await reads_the_account(client, site)


@pytest.mark.rfc("7009", "2")
@pytest.mark.parametrize("public", [False, True])
async def test_authlib_revokes_an_access_token_and_then_the_session(site: Site, public: bool) -> None:
    """The first leaves the session alone; after the second nothing of it is left."""
    async with authlib(site, site.public if public else site.confidential) as client:
        token = await client.fetch_token(grant_type="password", **site.user)
        answer = await client.revoke_token(f"{site.url}/revoke", token["access_token"], "access_token")
        assert answer.status_code == 200
        assert (await client.get(site.me)).status_code == 401
        await client.refresh_token()
        await reads_the_account(client, site)
        answer = await client.revoke_token(f"{site.url}/revoke")  # unasked, it gives back the refresh token
        assert answer.status_code == 200
        assert (await client.get(site.me)).status_code == 401
        with pytest.raises(OAuthError, match=r"^invalid_grant"):
            await client.refresh_token()


@pytest.mark.rfc("7662", "2")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_authlib_introspects_a_token_before_and_after_its_session_ends(site: Site, method: str) -> None:
    """As a resource server does that wants to know at once; a token for somebody else is none of its business."""
    async with authlib(site, site.confidential) as client, authlib(site, site.resource_server, method) as sibling:

        async def ask(token: str) -> Any:
            answer = await sibling.introspect_token(f"{site.url}/introspect", token, "access_token")
            assert answer.status_code == 200
            return answer.json()

        own = await client.fetch_token(grant_type="password", **site.user)
        await reads_the_account(client, site)
        assert await ask(own["access_token"]) == {"active": False}
        token = await client.fetch_token(grant_type="password", resource=SIBLING, **site.user)
        told = await ask(token["access_token"])
        assert (told["active"], told["client_id"], told["aud"]) == (True, site.confidential.id, SIBLING)
        assert told["scope"] == token["scope"]
        await client.revoke_token(f"{site.url}/revoke")
        assert await ask(token["access_token"]) == {"active": False}


@pytest.mark.rfc("6749", "5.2")
async def test_a_refusal_reaches_authlibs_user_as_an_oauth_error(site: Site) -> None:
    """With the code of the RFC and words for a person."""
    stranger = Registered(site.confidential.id, "cs_wrong")
    for registered, form, error in (
        (site.confidential, {"password": "wrong"}, "invalid_grant"),
        (site.confidential, {"scope": "orders:delete"}, "invalid_scope"),
        (stranger, {}, "invalid_client"),
    ):
        async with authlib(site, registered) as client:
            with pytest.raises(OAuthError) as refusal:
                await client.fetch_token(grant_type="password", **{**site.user, **form})
            assert refusal.value.error == error
            assert refusal.value.description
            assert client.token is None


# -- requests-oauthlib ------------------------------------------------------------------------------------------------


@pytest.fixture
def insecure_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let oauthlib speak http; it refuses to, even to this machine."""
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")


def authentication(client: Registered, method: str) -> dict[str, Any]:
    """Return the arguments by which requests-oauthlib authenticates a client when it fetches a token."""
    if method == "client_secret_basic":
        return {"auth": client.auth}
    return {"include_client_id": True, "client_secret": client.secret}


def opens_the_account(session: OAuth2Session, site: Site, **given: Any) -> None:
    """Check that the session's token opens the user's account."""
    answer = session.get(site.me, **given)
    assert (answer.status_code, answer.json().get("username")) == (200, site.username), answer.text


@pytest.mark.rfc("6749", "4.3")
@pytest.mark.usefixtures("insecure_transport")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
def test_requests_oauthlib_signs_a_user_in(site: Site, method: str) -> None:
    """It would object to an answer with another scope than it asked for."""
    registered = site.public if method == "none" else site.confidential
    with OAuth2Session(client=LegacyApplicationClient(registered.id, scope=SCOPE)) as session:
        token = session.fetch_token(site.token_endpoint, **site.user, **authentication(registered, method))
        assert (token["token_type"], token["scope"]) == ("Bearer", [SCOPE])
        opens_the_account(session, site)


@pytest.mark.rfc("6749", "4.4")
@pytest.mark.usefixtures("insecure_transport")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_requests_oauthlib_fetches_a_clients_own_token(site: Site, method: str) -> None:
    """Without a refresh token, and of no use where people's accounts are."""
    with OAuth2Session(client=BackendApplicationClient(site.confidential.id, scope="orders:read")) as session:
        token = session.fetch_token(site.token_endpoint, **authentication(site.confidential, method))
        assert (token["token_type"], token["scope"]) == ("Bearer", ["orders:read"])
        assert "refresh_token" not in token
        assert session.get(site.me).status_code in (401, 403)


@pytest.mark.rfc("6749", "6")
@pytest.mark.usefixtures("insecure_transport")
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
def test_requests_oauthlib_refreshes_when_told_to_and_by_itself(site: Site, method: str) -> None:
    """
    Each time it takes over the successor.

    By itself it authenticates by Basic if the request for the resource names the client, and else in the body.
    """
    registered = site.public if method == "none" else site.confidential
    by_basic = {"client_id": registered.id, "client_secret": registered.secret}
    told: list[dict[str, Any]] = []
    with OAuth2Session(
        client=LegacyApplicationClient(registered.id),
        auto_refresh_url=site.token_endpoint,
        auto_refresh_kwargs={} if method == "client_secret_basic" else registered.form,
        token_updater=told.append,
    ) as session:
        first = session.fetch_token(site.token_endpoint, **site.user, **authentication(registered, method))
        auth = registered.auth if method == "client_secret_basic" else None
        second = session.refresh_token(site.token_endpoint, auth=auth)
        opens_the_account(session, site)
        session.token = outdated(second)
        opens_the_account(session, site, **(by_basic if auth else {}))
        assert told == [session.token]
        assert len({token["refresh_token"] for token in (first, second, session.token)}) == 3
        opens_the_account(session, site)


@pytest.mark.rfc("7009", "2")
@pytest.mark.usefixtures("insecure_transport")
def test_a_revocation_that_oauthlib_words_ends_the_session(site: Site) -> None:
    """requests-oauthlib has no call for it, but sends what oauthlib prepares."""
    auth = site.confidential.auth
    client = LegacyApplicationClient(site.confidential.id)
    with OAuth2Session(client=client) as session:
        token = session.fetch_token(site.token_endpoint, **site.user, auth=auth)
        opens_the_account(session, site)
        url, headers, body = client.prepare_token_revocation_request(
            f"{site.url}/revoke", token["refresh_token"], "refresh_token"
        )
        assert session.post(url, data=body, headers=headers, auth=auth, withhold_token=True).status_code == 200
        assert session.get(site.me).status_code == 401
        with pytest.raises(InvalidGrantError):
            session.refresh_token(site.token_endpoint, auth=auth)


@pytest.mark.rfc("6749", "5.2")
@pytest.mark.usefixtures("insecure_transport")
def test_a_refusal_reaches_oauthlibs_user_as_the_error_of_its_name(site: Site) -> None:
    """With words for a person."""
    cases: tuple[tuple[dict[str, Any], str, type[OAuth2Error]], ...] = (
        ({"password": "wrong"}, SCOPE, InvalidGrantError),
        ({}, "orders:delete", InvalidScopeError),
        ({"auth": (site.confidential.id, "cs_wrong")}, SCOPE, InvalidClientError),
    )
    for changes, scope, error in cases:
        given = {**site.user, "auth": site.confidential.auth, **changes}
        with OAuth2Session(client=LegacyApplicationClient(site.confidential.id, scope=scope)) as session:
            with pytest.raises(error) as refusal:
                session.fetch_token(site.token_endpoint, **given)
            assert refusal.value.description
            assert not session.authorized
