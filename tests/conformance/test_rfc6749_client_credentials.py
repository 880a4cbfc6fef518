"""RFC 6749 §4.4: the client credentials grant, a service that acts for itself."""

import uuid

import pytest

from tests.support.reading import unverified_claims
from tests.support.refusals import refusal, written
from tests.support.service import ISSUER, SIBLING, Service

GRANT = "client_credentials"


@pytest.mark.rfc("6749", "4.4.3")
@pytest.mark.rfc("9068", "2.2")
@pytest.mark.case("TOK-18")
async def test_the_token_speaks_for_the_client_and_for_nobody_else(service: Service) -> None:
    """No refresh token, no ID token, no claim about a person; its subject can be no user's. Nothing is stored."""
    client = await service.a_client()
    before = await written(service)
    answer = await service.token(client, grant_type=GRANT)
    assert set(answer.json()) == {"access_token", "token_type", "expires_in", "scope"}
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    claims = unverified_claims(answer.json()["access_token"])
    assert set(claims) == {"iss", "sub", "aud", "client_id", "iat", "exp", "jti", "scope", "epoch"}
    assert claims["sub"] == claims["client_id"] == client.id
    assert claims["iss"] == claims["aud"] == ISSUER
    with pytest.raises(ValueError, match="badly formed"):
        uuid.UUID(claims["sub"])
    assert await written(service) == before


@pytest.mark.rfc("9700", "4.15")
@pytest.mark.case("TOK-18")
async def test_a_clients_own_token_is_no_person_at_our_api(service: Service) -> None:
    """It is genuine, for our audience and with the scope; yet there is no account behind it."""
    client = await service.a_client()
    token = (await service.token(client, grant_type=GRANT, scope="account:read")).json()["access_token"]
    answer = await service.me(token)
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


@pytest.mark.rfc("6749", "3.3")
@pytest.mark.case("TOK-18")
async def test_scopes_of_openid_connect_are_refused_even_to_a_client_that_has_them(service: Service) -> None:
    """There is no person to sign in and nothing to refresh."""
    client = await service.a_client(scope=("openid", "offline_access", "orders:read"))
    for scope in ("openid", "offline_access", "orders:read openid", "offline_access orders:read"):
        refusal(await service.token(client, grant_type=GRANT, scope=scope), "invalid_scope", scope)
    unasked = await service.token(client, grant_type=GRANT)
    assert unasked.json()["scope"] == "orders:read"


@pytest.mark.rfc("6749", "3.3")
async def test_unasked_a_client_gets_its_whole_scope_and_asked_no_more_than_that(embedded: Service) -> None:
    """In the order it was asked for, each word once; no user's role has a say."""
    client = await embedded.a_client(scope=("orders:write", "orders:read", "reports:make"))
    unasked = await embedded.token(client, grant_type=GRANT)
    assert unasked.json()["scope"] == "orders:write orders:read reports:make"
    asked = await embedded.token(client, grant_type=GRANT, scope="reports:make orders:read reports:make")
    assert asked.json()["scope"] == "reports:make orders:read"
    empty = await embedded.token(client, grant_type=GRANT, scope="")
    assert empty.json()["scope"] == unasked.json()["scope"]
    refusal(await embedded.token(client, grant_type=GRANT, scope="orders:read account:read"), "invalid_scope")


async def test_a_client_without_scope_gets_a_token_without_scope(embedded: Service) -> None:
    """It may still be known by its id; everything it asks for is too much."""
    client = await embedded.a_client(scope=())
    answer = await embedded.token(client, grant_type=GRANT)
    assert answer.json()["scope"] == unverified_claims(answer.json()["access_token"])["scope"] == ""
    refusal(await embedded.token(client, grant_type=GRANT, scope="orders:read"), "invalid_scope")


@pytest.mark.rfc("6749", "4.4")
async def test_the_grant_needs_a_registration_and_a_proof(service: Service) -> None:
    """Neither a client without the grant nor a public one gets a token of its own."""
    unregistered = await service.a_client(grant_types=("password", "refresh_token"))
    refusal(await service.token(unregistered, grant_type=GRANT), "unauthorized_client")
    public = await service.a_client(public=True)
    refusal(await service.token(public, grant_type=GRANT), "unauthorized_client")


@pytest.mark.case("REF-23")
async def test_a_disabled_client_gets_nothing_more(service: Service) -> None:
    """Its credentials are as good as unknown."""
    client = await service.a_client()
    assert (await service.token(client, grant_type=GRANT)).status_code == 200
    await service.within(lambda tx: service.services.clients.set_enabled(tx, client.id, False))
    refusal(await service.token(client, grant_type=GRANT), "invalid_client", status=401)


async def test_each_token_is_another_one_and_lives_about_as_long_as_it_should(embedded: Service) -> None:
    """Ten minutes less at most a twentieth, so that no fleet comes back in step; or what the client was given."""
    client, brief = await embedded.a_client(), await embedded.a_client(access_token_ttl=60)
    lives, seen = set(), set()
    for _ in range(40):
        answer = (await embedded.token(client, grant_type=GRANT)).json()
        lives.add(answer["expires_in"])
        seen.add(unverified_claims(answer["access_token"])["jti"])
    assert len(seen) == 40
    assert min(len(jti) for jti in seen) >= 22, "128 bits"
    assert 570 <= min(lives) <= max(lives) <= 600
    assert len(lives) > 1
    assert 57 <= (await embedded.token(brief, grant_type=GRANT)).json()["expires_in"] <= 60


async def test_the_idempotency_key_of_another_grant_is_ignored(embedded: Service) -> None:
    """It is for refreshes; here it may even be malformed."""
    client = await embedded.a_client()
    answer = await embedded.token(client, headers={"idempotency-key": "short"}, grant_type=GRANT, resource=SIBLING)
    assert answer.status_code == 200
