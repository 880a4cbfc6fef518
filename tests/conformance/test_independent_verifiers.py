"""
Tokens of a running server, checked as a sibling would check them: over HTTP, with libraries that are not ours.

PyJWT brings its own reading of JWS and JWT. Authlib's validator of RFC 9068 stands on joserfc, which is asked alone as
well, since it lets the caller say more strictly what is wanted. None of them is told a key: all fetch the published
ones. A refusal counts only if it is made for the right reason.
"""

import asyncio
import hmac
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import jwt
import pytest
from authlib.oauth2.rfc6749 import ResourceProtector
from authlib.oauth2.rfc6750 import InvalidTokenError
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from authlib.oidc.discovery import OpenIDProviderMetadata
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc import jwt as joserfc
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, RSAKey

from tests.support.clock import FrozenClock
from tests.support.server_process import ServerProcess
from tests.support.service import PASSWORD, SIBLING, Registered, running, test_settings
from tests.support.tokens import b64, compact, parts_of

ELSEWHERE = "https://billing.example"
DOCUMENTS = ("oauth-authorization-server", "openid-configuration")
REQUIRED = ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"]  # RFC 9068 §2.2


@dataclass(frozen=True)
class Issuer:
    """A running server, with a client and a user that it knows."""

    url: str
    database_url: str
    client: Registered
    user_id: str
    username: str

    def get(self, path: str) -> Any:
        """Return a document that the server publishes."""
        return httpx2.get(f"{self.url}{path}", timeout=30).raise_for_status().json()

    def token(self, kind: str = "user", **form: str) -> str:
        """Fetch an access token for the sibling: of the `user`, or of the `client` itself."""
        grant = {"grant_type": "client_credentials"}
        if kind == "user":
            grant = {"grant_type": "password", "username": self.username, "password": PASSWORD}
        asked = {**grant, "scope": "orders:read", **form}
        answer = httpx2.post(f"{self.url}/token", data=asked, auth=self.client.auth, timeout=30)
        text: str = answer.raise_for_status().json()["access_token"]
        return text

    def token_of_a_twin(self, *, ago: float = 0, issuer: str | None = None) -> str:
        """
        Return a token that another server signed with the same key: `ago` seconds ago, or under another issuer's name.

        It runs on the same database, with a clock and a name that are not the first one's.
        """

        async def ask() -> str:
            clock = FrozenClock(datetime.now(UTC) - timedelta(seconds=ago))
            async with running(test_settings(self.database_url, issuer=issuer or self.url), clock) as twin:
                answer = await twin.token(self.client, grant_type="client_credentials")
                text: str = answer.raise_for_status().json()["access_token"]
                return text

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def issuer(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    """One server for all tests here: none of them changes anything in it."""
    database = shutil.copy(sqlite_template, tmp_path_factory.mktemp("issuer") / "identity.db")
    database_url = f"sqlite+aiosqlite:///{database}"

    async def register() -> tuple[Registered, str, str]:
        async with running(test_settings(database_url)) as service:
            user = await service.a_user()
            return await service.a_client(audiences=(SIBLING, ELSEWHERE)), str(user.id), user.username

    registered = asyncio.run(register())
    with ServerProcess(database_url) as server:
        yield Issuer(server.url, database_url, *registered)


# -- three siblings ---------------------------------------------------------------------------------------------------


def with_pyjwt(issuer: Issuer, token: str) -> Mapping[str, Any]:
    """Check as a sibling does that uses PyJWT, whose client fetches the keys by itself."""
    jwks = jwt.PyJWKClient(issuer.get("/.well-known/openid-configuration")["jwks_uri"])
    key = jwks.get_signing_key_from_jwt(token)
    told = jwt.decode_complete(
        token, key, algorithms=["RS256"], issuer=issuer.url, audience=SIBLING, options={"require": REQUIRED}
    )
    assert told["header"]["typ"] == "at+jwt", "the library leaves the type to its caller"
    claims: dict[str, Any] = told["payload"]
    return claims


def with_joserfc(issuer: Issuer, token: str) -> Mapping[str, Any]:
    """Check as a sibling does that uses joserfc."""
    keys = KeySet.import_key_set(issuer.get("/.well-known/jwks.json"))
    told = joserfc.decode(token, keys, algorithms=["RS256"])
    wanted: dict[str, Any] = {name: {"essential": True} for name in REQUIRED}
    wanted["iss"]["value"], wanted["aud"]["value"] = issuer.url, SIBLING
    joserfc.JWTClaimsRegistry(**wanted).validate(told.claims)
    assert told.header["typ"] == "at+jwt", "the library leaves the type to its caller"
    return told.claims


def with_authlib(issuer: Issuer, token: str) -> Mapping[str, Any]:
    """Check as a sibling does that puts Authlib before its resources; it knows the type, the claims and the scope."""

    class Validator(JWTBearerTokenValidator):  # type: ignore[misc]  # no type information
        def get_jwks(self) -> KeySet:
            return KeySet.import_key_set(issuer.get("/.well-known/jwks.json"))

    protector = ResourceProtector()
    protector.register_token_validator(Validator(issuer.url, SIBLING))
    request = SimpleNamespace(headers={"Authorization": f"Bearer {token}"})
    claims: Mapping[str, Any] = protector.validate_request(["orders:read"], request)
    return claims


Check = Callable[[Issuer, str], Mapping[str, Any]]
CHECKS = [
    pytest.param(with_pyjwt, id="PyJWT"),
    pytest.param(with_joserfc, id="joserfc"),
    pytest.param(with_authlib, id="Authlib"),
]


@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize("kind", ["user", "client"])
@pytest.mark.parametrize("check", CHECKS)
def test_an_independent_library_accepts_our_tokens(issuer: Issuer, check: Check, kind: str) -> None:
    """Under strict settings: RS256 alone, our name, the sibling's name, all claims that RFC 9068 requires, the type."""
    claims = check(issuer, issuer.token(kind))
    assert claims["sub"] == (issuer.user_id if kind == "user" else issuer.client.id)
    assert claims["client_id"] == issuer.client.id
    assert claims["scope"] == "orders:read"
    assert "sid" in claims if kind == "user" else "sid" not in claims


# -- what they must refuse --------------------------------------------------------------------------------------------


def meant_for_another(issuer: Issuer) -> str:
    return issuer.token(resource=ELSEWHERE)


def of_an_hour_ago(issuer: Issuer) -> str:
    return issuer.token_of_a_twin(ago=3600)


def of_another_issuer(issuer: Issuer) -> str:
    return issuer.token_of_a_twin(issuer="https://id.example")


def with_more_scope(issuer: Issuer) -> str:
    token = issuer.token()
    header, _, signature = token.split(".")
    claims = {**parts_of(token)[1], "scope": "orders:read orders:write"}
    return f"{header}.{b64(json.dumps(claims).encode())}.{signature}"


def under_our_key_id(issuer: Issuer) -> str:
    return compact(*parts_of(issuer.token()), rsa.generate_private_key(public_exponent=65537, key_size=2048))


def under_a_key_id_of_their_own(issuer: Issuer) -> str:
    header, claims = parts_of(issuer.token())
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return compact({**header, "kid": RSAKey.import_key(key).thumbprint()}, claims, key)


def with_our_public_key_as_a_secret(issuer: Issuer) -> str:
    header, claims = parts_of(issuer.token())
    key = KeySet.import_key_set(issuer.get("/.well-known/jwks.json")).get_by_kid(header["kid"])
    assert isinstance(key, RSAKey)
    signed = f"{b64(json.dumps({**header, 'alg': 'HS256'}).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{signed}.{b64(hmac.digest(key.as_bytes(encoding='PEM'), signed.encode(), 'sha256'))}"


def reason_of(error: Exception) -> str:
    """Return the name of an error, and of the claim it is about; Authlib keeps it behind what it tells a client."""
    why = error.__cause__ if isinstance(error, InvalidTokenError) else error
    return f"{type(why).__name__} {getattr(why, 'claim', '')}".strip()


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        pytest.param(
            meant_for_another,
            {"InvalidAudienceError", "InvalidClaimError aud"},
            id="another-audience",
            marks=pytest.mark.rfc("7519", "4.1.3"),
        ),
        pytest.param(
            of_an_hour_ago,
            {"ExpiredSignatureError", "ExpiredTokenError exp"},
            id="expired",
            marks=pytest.mark.rfc("7519", "4.1.4"),
        ),
        pytest.param(
            of_another_issuer,
            {"InvalidIssuerError", "InvalidClaimError iss"},
            id="another-issuer",
            marks=pytest.mark.rfc("7519", "4.1.1"),
        ),
        pytest.param(
            with_more_scope,
            {"InvalidSignatureError", "BadSignatureError"},
            id="altered",
            marks=pytest.mark.rfc("7515", "5.2"),
        ),
        pytest.param(
            under_our_key_id,
            {"InvalidSignatureError", "BadSignatureError"},
            id="another-key-our-id",
            marks=pytest.mark.rfc("8725", "3.8"),
        ),
        pytest.param(
            under_a_key_id_of_their_own,
            {"PyJWKClientError", "InvalidKeyIdError"},
            id="another-key-another-id",
            marks=pytest.mark.rfc("8725", "3.8"),
        ),
        pytest.param(
            with_our_public_key_as_a_secret,
            # Authlib wants no algorithm in particular, and finds no key for this one: ours say what they are for.
            {"InvalidAlgorithmError", "UnsupportedAlgorithmError", "InvalidKeyIdError"},
            id="HS256",
            marks=pytest.mark.rfc("8725", "3.1"),
        ),
    ],
)
@pytest.mark.parametrize("check", CHECKS)
def test_an_independent_library_refuses_what_is_not_ours_or_not_for_it(
    issuer: Issuer, check: Check, make: Callable[[Issuer], str], reasons: set[str]
) -> None:
    """One thing is wrong with each token, and it is the thing that the library finds."""
    with pytest.raises((jwt.PyJWTError, JoseError, InvalidTokenError)) as refusal:
        check(issuer, make(issuer))
    assert reason_of(refusal.value) in reasons


# -- the documents ----------------------------------------------------------------------------------------------------


@pytest.mark.rfc("7517", "5")
def test_independent_libraries_find_the_same_signing_keys(issuer: Issuer) -> None:
    """The one that signs and the one that will: RSA, for signatures, for RS256, public, each under its thumbprint."""
    by_pyjwt = jwt.PyJWKClient(f"{issuer.url}/.well-known/jwks.json").get_signing_keys()
    by_joserfc = KeySet.import_key_set(issuer.get("/.well-known/jwks.json")).keys
    assert [key.key_id for key in by_pyjwt] == [key.kid for key in by_joserfc]
    assert {(key.key_type, key.public_key_use, key.algorithm_name) for key in by_pyjwt} == {("RSA", "sig", "RS256")}
    assert {(key.key_type, key.get("use"), key.alg) for key in by_joserfc} == {("RSA", "sig", "RS256")}
    assert not any(key.is_private for key in by_joserfc)
    assert [key.thumbprint() for key in by_joserfc] == [key.kid for key in by_joserfc]
    assert parts_of(issuer.token())[0]["kid"] in {key.kid for key in by_joserfc}


@pytest.mark.rfc("8414", "2")
@pytest.mark.parametrize("path", DOCUMENTS)
@pytest.mark.parametrize("library", [AuthorizationServerMetadata, OpenIDProviderMetadata])
def test_an_independent_library_finds_nothing_wrong_with_the_metadata(
    issuer: Issuer, library: type[AuthorizationServerMetadata], path: str
) -> None:
    """
    All members but one are valid, as those of an authorization server and as those of an OpenID provider.

    `response_types_supported` is required and is empty, since there is no authorization endpoint; the RFC demands a
    list and Authlib demands that it holds something. The day it does, `validate()` alone will say as much.
    """
    document = library(issuer.get(f"/.well-known/{path}"))
    wrong = set()
    for name in document.REGISTRY_KEYS:
        try:
            getattr(document, f"validate_{name}")()
        except ValueError:
            wrong.add(name)
    assert wrong == {"response_types_supported"}
    assert document["response_types_supported"] == []
    assert document["issuer"] == issuer.url
