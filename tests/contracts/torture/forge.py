"""What every group of cases is made with: a genuine header, genuine claims, and hands that sign whatever they get."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.contracts.torture.keys import Key, Keys, load
from tests.support.tokens import OMIT, b64, changed, compact

SUBJECT = "01890000-0000-7000-8000-00000000000a"
SESSION = "01890000-0000-7000-8000-00000000000b"
CLIENT = "cl_Torture000000000000001"
SCOPE = "account:read orders:read"
OTHER_AUDIENCE = "https://billing.example"
LONGEST = 16 * 1024
"""Characters of the longest token that is read at all."""
Level = Literal["must", "strict"]
MUST: Final = "must"
STRICT: Final = "strict"


@dataclass(frozen=True, slots=True)
class Draft:
    """A case before it has the name of its group; without a reason it is one to accept."""

    slug: str
    what: str
    token: str
    reason: str | None
    level: Level


Group = Callable[["Forge"], Iterator[Draft]]


def good(slug: str, what: str, token: str, *, level: Level = MUST) -> Draft:
    """Return a token that must be accepted."""
    return Draft(slug, what, token, None, level)


def bad(slug: str, what: str, token: str, reason: str) -> Draft:
    """Return a token that a specification forbids to accept."""
    return Draft(slug, what, token, reason, MUST)


def strict(slug: str, what: str, token: str, reason: str) -> Draft:
    """Return a token that specifications leave to the verifier, and that a strict one refuses."""
    return Draft(slug, what, token, reason, STRICT)


def dumped(value: object) -> str:
    """Return compact JSON, which is how the service writes it."""
    return json.dumps(value, separators=(",", ":"))


def put(members: Mapping[str, Any], name: str, text: str) -> str:
    """Return `members` as JSON in which one has a value that is written as given, JSON or not."""
    rest = dumped(changed(members, {name: OMIT}))
    return f'{rest[:-1]},"{name}":{text}}}'


class Forge:
    """
    The hands of somebody who has every key.

    Every token differs from a good one in what its case is about and in nothing else: its signature, above all, is
    right, unless the case is about that.
    """

    def __init__(self, issuer: str, audience: str, now: int) -> None:
        """`now` is in seconds since 1970."""
        self.issuer = issuer
        self.audience = audience
        self.now = now
        self.keys: Keys = load()
        self.header: dict[str, Any] = {"alg": "RS256", "typ": "at+jwt", "kid": self.keys.good.kid}
        self.claims: dict[str, Any] = {
            "iss": issuer,
            "sub": SUBJECT,
            "aud": audience,
            "client_id": CLIENT,
            "iat": now - 10,
            "exp": now + 590,
            "jti": "torture",
            "scope": SCOPE,
            "roles": ["user"],
            "sid": SESSION,
            "auth_time": now - 10,
            "amr": ["pwd"],
        }

    @property
    def own_api(self) -> bool:
        """Whether the tokens are for the issuer's own API, whose tokens are good nowhere else."""
        return self.audience == self.issuer

    def token(
        self,
        header: Mapping[str, Any] | None = None,
        claims: Mapping[str, Any] | None = None,
        *,
        key: Key | None = None,
    ) -> str:
        """Return the good token with some headers and claims changed, signed with RS256."""
        return self.raw(dumped(changed(self.header, header or {})), dumped(changed(self.claims, claims or {})), key=key)

    def raw(
        self, header: str | bytes | None = None, payload: str | bytes | None = None, *, key: Key | None = None
    ) -> str:
        """Return a token whose header or payload is exactly this, signed with RS256."""
        return compact(
            dumped(self.header) if header is None else header,
            dumped(self.claims) if payload is None else payload,
            (key or self.keys.good).private,
        )

    def unsigned(self, header: Mapping[str, Any] | None = None, claims: Mapping[str, Any] | None = None) -> str:
        """Return what is signed of such a token: header and payload, without the signature."""
        parts = (changed(self.header, header or {}), changed(self.claims, claims or {}))
        return ".".join(b64(dumped(part).encode()) for part in parts)

    def signed_as_is(self, signed: str, *, key: Key | None = None) -> str:
        """Return a text with an RS256 signature of just that text, whether it is base64url or not."""
        return f"{signed}.{b64(self.signature(signed.encode(), key=key))}"

    def signature(self, message: bytes, *, key: Key | None = None, digest: hashes.HashAlgorithm | None = None) -> bytes:
        """Return an RSASSA-PKCS1-v1_5 signature of any bytes."""
        private: rsa.RSAPrivateKey = (key or self.keys.good).private
        return private.sign(message, padding.PKCS1v15(), digest or hashes.SHA256())


def sealed(signed: str, signature: bytes) -> str:
    """Return the text with a signature behind it."""
    return f"{signed}.{b64(signature)}"
