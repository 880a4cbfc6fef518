"""RFC 9068: what an access token says, and that others can check it with nothing but the key set."""

import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt as pyjwt
import pytest
from authlib.oauth2.rfc9068.claims import JWTAccessTokenClaims
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet
from sqlalchemy import update

from identity_service.infra.tables import signing_keys
from identity_service.verifier.core import verify
from tests.support.service import ISSUER, SIBLING, Registered, Service
from tests.support.tokens import parts_of, unb64

BILLING = "https://billing.example"


async def user_token(service: Service, **form: Any) -> dict[str, Any]:
    return await service.sign_in(await service.a_client(), await service.a_user(), **form)


async def client_token(service: Service, client: Registered | None = None, **form: Any) -> dict[str, Any]:
    client = client or await service.a_client()
    answer = await service.token(client, grant_type="client_credentials", **form)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.rfc("9068", "2.1")
async def test_the_header_names_the_algorithm_the_type_and_the_key(service: Service) -> None:
    """And nothing that could lead a careless verifier elsewhere."""
    for body in (await user_token(service), await client_token(service)):
        header, _ = parts_of(body["access_token"])
        assert set(header) == {"alg", "typ", "kid"}
        assert (header["alg"], header["typ"]) == ("RS256", "at+jwt")


@pytest.mark.rfc("9068", "2.2")
async def test_a_persons_token_says_who_where_and_how(service: Service) -> None:
    client, user = await service.a_client(), await service.a_user()
    body = await service.sign_in(client, user)
    _, claims = parts_of(body["access_token"])
    now = int(service.clock.now().timestamp())
    (family,) = await service.family_rows()
    assert claims == {
        "iss": ISSUER,
        "sub": str(user.id),
        "aud": ISSUER,
        "client_id": client.id,
        "iat": now,
        "exp": now + body["expires_in"],
        "jti": claims["jti"],
        "scope": body["scope"],
        "roles": ["user"],
        "sid": str(family.id),
        "auth_time": now,
        "amr": ["pwd"],
    }
    assert all(type(claims[name]) is int for name in ("iat", "exp", "auth_time"))


@pytest.mark.rfc("9068", "2.2")
async def test_a_clients_own_token_speaks_for_nobody_else(service: Service) -> None:
    """The subject is the client (RFC 9068 §2.2), and there is no session, no role and no sign-in to tell of."""
    client = await service.a_client()
    body = await client_token(service, client, scope="orders:read")
    _, claims = parts_of(body["access_token"])
    assert set(claims) == {"iss", "sub", "aud", "client_id", "iat", "exp", "jti", "scope", "epoch"}
    assert claims["sub"] == claims["client_id"] == client.id
    assert claims["scope"] == "orders:read"
    with pytest.raises(ValueError, match="badly formed"):
        uuid.UUID(claims["sub"])


@pytest.mark.rfc("9068", "6")
async def test_a_token_tells_nothing_about_a_person_that_its_reader_need_not_know(service: Service) -> None:
    user = await service.a_user("margaret", email="margaret@example.org")
    body = await service.sign_in(await service.a_client(), user)
    payload = unb64(body["access_token"].split(".")[1]).lower()
    assert b"margaret" not in payload
    assert b"example.org" not in payload


@pytest.mark.rfc("9068", "3")
@pytest.mark.rfc("8707", "2.2")
@pytest.mark.case("JWT-28")
async def test_the_audience_is_a_text_for_one_and_a_list_for_several(service: Service) -> None:
    client = await service.a_client(audiences=(ISSUER, SIBLING, BILLING))
    for asked, expected in (
        ({}, ISSUER),
        ({"resource": SIBLING}, SIBLING),
        ({"resource": [SIBLING, BILLING]}, [SIBLING, BILLING]),
        ({"resource": [SIBLING, SIBLING]}, SIBLING),
    ):
        body = await client_token(service, client, **asked)
        assert parts_of(body["access_token"])[1]["aud"] == expected


@pytest.mark.rfc("9068", "2.2")
async def test_every_token_has_an_id_of_its_own(service: Service) -> None:
    """At least 128 random bits, so that none can be guessed and no two ever meet."""
    client = await service.a_client()
    ids = [parts_of((await client_token(service, client))["access_token"])[1]["jti"] for _ in range(20)]
    assert len(set(ids)) == 20
    assert {len(unb64(each)) for each in ids} == {16}


@pytest.mark.rfc("6749", "5.1")
@pytest.mark.parametrize("lifetime", [None, 60, 3600])
async def test_lifetimes_are_shortened_at_random_by_up_to_a_twentieth(service: Service, lifetime: int | None) -> None:
    """What started together does not come back together; `expires_in` tells the truth."""
    client = await service.a_client(access_token_ttl=lifetime)
    full = lifetime or 600
    seen = set()
    for _ in range(60):
        body = await client_token(service, client)
        _, claims = parts_of(body["access_token"])
        assert claims["exp"] - claims["iat"] == body["expires_in"]
        seen.add(body["expires_in"])
    assert min(seen) >= full * 0.95
    assert max(seen) <= full
    assert len(seen) >= (2 if full == 60 else 10)


@pytest.mark.rfc("9068", "2.2.1")
async def test_a_refresh_keeps_the_time_of_the_sign_in(service: Service) -> None:
    """The person was last seen then; the token is of now."""
    client, user = await service.a_client(), await service.a_user()
    first = await service.sign_in(client, user)
    _, before = parts_of(first["access_token"])
    service.clock.advance(300)
    second = (await service.refresh(client, first["refresh_token"])).json()
    _, after = parts_of(second["access_token"])
    assert after["iat"] == before["iat"] + 300
    assert after["jti"] != before["jti"]
    for name in ("auth_time", "sid", "sub", "amr", "roles", "aud", "client_id", "scope"):
        assert after[name] == before[name]


# -- checked by others ------------------------------------------------------------------------------------------------


def by_pyjwt(token: str, jwks: bytes, audience: str) -> dict[str, Any]:
    """As PyJWT's `PyJWKClient` does with the document it fetched."""
    header = pyjwt.get_unverified_header(token)
    assert header["typ"] == "at+jwt"
    key = pyjwt.PyJWKSet.from_json(jwks.decode())[header["kid"]]
    claims: dict[str, Any] = pyjwt.decode(
        token,
        key,
        algorithms=["RS256"],
        audience=audience,
        issuer=ISSUER,
        options={"require": ["iss", "sub", "aud", "exp", "iat", "jti", "client_id"]},
    )
    return claims


def by_joserfc(token: str, jwks: bytes, audience: str) -> dict[str, Any]:
    keys = KeySet.import_key_set(json.loads(jwks))
    decoded = joserfc_jwt.decode(token, keys, algorithms=["RS256"])
    assert decoded.header["typ"] == "at+jwt"
    joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": audience},
        exp={"essential": True},
        iat={"essential": True},
        sub={"essential": True},
        jti={"essential": True},
        client_id={"essential": True},
    ).validate(decoded.claims)
    return dict(decoded.claims)


def by_authlib(token: str, jwks: bytes, audience: str) -> dict[str, Any]:
    """Authlib's own reading of RFC 9068, over a signature that joserfc has checked."""
    keys = KeySet.import_key_set(json.loads(jwks))
    decoded = joserfc_jwt.decode(token, keys, algorithms=["RS256"])
    claims = JWTAccessTokenClaims(
        decoded.claims,
        decoded.header,
        options={name: {"essential": True} for name in ("iss", "exp", "aud", "sub", "client_id", "iat", "jti")}
        | {"iss": {"essential": True, "value": ISSUER}, "aud": {"essential": True, "value": audience}},
    )
    claims.validate()
    return dict(claims)


def by_ourselves(token: str, jwks: bytes, audience: str) -> dict[str, Any]:
    """As a sibling does with our own verifier's core."""
    keys = pyjwt.PyJWKSet.from_json(jwks.decode())
    found = {key.key_id: key.key for key in keys.keys}
    read = verify(token, key_of=found.get, issuer=ISSUER, audiences=(audience,), now=datetime.now(UTC).timestamp())
    return dict(read.claims)


Check = Callable[[str, bytes, str], dict[str, Any]]


@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize("check", [by_pyjwt, by_joserfc, by_authlib, by_ourselves])
async def test_others_can_check_our_tokens_with_the_key_set_alone(service: Service, check: Check) -> None:
    """Of a person and of a client; and what is wrong with one, they notice as well."""
    service.clock.set(datetime.now(UTC))  # theirs cannot be stopped
    jwks = (await service.http.get("/.well-known/jwks.json")).content
    client = await service.a_client()
    bodies = [await user_token(service, resource=SIBLING), await client_token(service, client, resource=SIBLING)]
    for token in (body["access_token"] for body in bodies):
        assert check(token, jwks, SIBLING) == parts_of(token)[1]
        with pytest.raises(Exception, match=r"(?i)aud"):
            check(token, jwks, BILLING)
        header, payload, signature = token.split(".")
        other = bodies[1 if token == bodies[0]["access_token"] else 0]["access_token"].split(".")[1]
        with pytest.raises(Exception, match=r"(?i)signature"):
            check(f"{header}.{other}.{signature}", jwks, SIBLING)
        assert payload != other


@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize("check", [by_pyjwt, by_joserfc, by_authlib, by_ourselves])
async def test_others_can_check_tokens_across_a_rotation(service: Service, check: Check) -> None:
    """Those signed just before and just after, with the key set as it was before either."""
    now = datetime.now(UTC)
    keys = service.services.signing_keys
    waiting = max(keys.records, key=lambda record: record.activates_at)
    await service.execute(
        update(signing_keys).where(signing_keys.c.kid == waiting.kid).values(activates_at=now - timedelta(seconds=10))
    )
    await service.within(keys.poll)
    client = await service.a_client(audiences=(SIBLING,))
    service.clock.set(now - timedelta(seconds=11))
    jwks = (await service.http.get("/.well-known/jwks.json")).content
    before = (await client_token(service, client))["access_token"]
    service.clock.set(now)
    after = (await client_token(service, client))["access_token"]
    assert parts_of(before)[0]["kid"] != parts_of(after)[0]["kid"] == waiting.kid
    for token in (before, after):
        assert check(token, jwks, SIBLING) == parts_of(token)[1]
