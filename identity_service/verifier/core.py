"""
The strict reading of an access token (RFC 9068 §4, RFC 8725): one algorithm, one type, one key, nothing optional.

Nothing in a token decides how it is checked: the algorithm is fixed, keys are found by `kid` among those that are
already held, and headers that point to other keys are refused unread.

Siblings do this for every request, so it is written to cost little beside the RSA operation itself.
"""

import binascii
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeGuard

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

LEEWAY = 30
"""Seconds by which clocks may differ."""
LONGEST_KID = 128
"""Characters."""
LATEST = 253402300799
"""Seconds since 1970: the last second of the year 9999; numbers beyond it are no times."""
_LONGEST_TOKEN = 16 * 1024
_LONGEST_NAME = 128
_FORBIDDEN_HEADERS = frozenset(("crit", "b64", "jwk", "jku", "x5u", "x5c", "zip", "enc"))
_PADDING, _SHA256 = padding.PKCS1v15(), hashes.SHA256()


class TokenRefused(Exception):
    """The token is not good; `reason` is a stable word for logs and metrics, and never holds any of the token."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InsufficientScope(TokenRefused):
    """The token is good and does not allow this; `scope` is what it would take (RFC 6750 §3.1)."""

    def __init__(self, scope: str) -> None:
        super().__init__("insufficient_scope")
        self.scope = scope


class KeysUnavailable(Exception):
    """Whether the token is good cannot be told now, for want of keys. Answer 503: the token may well be good."""


@dataclass(frozen=True, slots=True, repr=False)
class VerifiedClaims:
    """What a good token says (RFC 9068 §2.2). `claims` holds all of it; what has a name here was checked to be so."""

    claims: Mapping[str, Any]

    @property
    def issuer(self) -> str:
        """Who signed it."""
        told: str = self.claims["iss"]
        return told

    @property
    def subject(self) -> str:
        """Whom it speaks for: a user's id, or the client's own for a client that acts for itself."""
        told: str = self.claims["sub"]
        return told

    @property
    def audience(self) -> tuple[str, ...]:
        """Whom it is meant for."""
        listed = self.claims["aud"]
        return (listed,) if isinstance(listed, str) else tuple(listed)

    @property
    def client_id(self) -> str:
        """The client it was issued to."""
        told: str = self.claims["client_id"]
        return told

    @property
    def scope(self) -> frozenset[str]:
        """What it allows."""
        return frozenset(filter(None, self.claims.get("scope", "").split(" ")))  # no other blank separates

    @property
    def roles(self) -> frozenset[str]:
        """The user's roles when it was issued; empty for a client that acts for itself."""
        return frozenset(self.claims.get("roles", ()))

    @property
    def issued_at(self) -> float:
        """In seconds since 1970."""
        told: float = self.claims["iat"]
        return told

    @property
    def expires_at(self) -> float:
        """In seconds since 1970."""
        told: float = self.claims["exp"]
        return told

    @property
    def token_id(self) -> str:
        """The token's own name, `jti`."""
        told: str = self.claims["jti"]
        return told

    @property
    def session_id(self) -> str | None:
        """The sign-in it belongs to; None for a client that acts for itself, and where an API key was exchanged."""
        return self.claims.get("sid")

    def __repr__(self) -> str:
        """Name the parties, for a log; what the token says about them stays out of it."""
        return f"VerifiedClaims(subject={self.subject!r}, client_id={self.client_id!r}, audience={self.audience!r})"


Unproven = tuple[str, bytes, bytes, bytes]
"""A token taken apart: the id of the key it names, what was signed, the payload's and the signature's segment."""


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise TokenRefused("duplicate_member")
    return members


def _no_constants(_name: str) -> None:
    raise TokenRefused("not_json")


_decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]  # left out of its stub

_PLUS, _SLASH = b"+/"
# What the missing padding must be, and which last letters have no spare bits set, by a segment's length modulo 4.
_MISSING = (b"", b"!", b"==", b"=")
_LAST_LETTERS = (
    frozenset(range(256)) - {ord("=")},
    frozenset[int](),
    frozenset(b"AQgw"),
    frozenset(b"AEIMQUYcgkosw048"),
)


def _bytes_of(segment: bytes) -> bytes:
    """Return what a segment spells; exactly one spelling of each is accepted (RFC 7515 §2: no padding)."""
    if not segment:
        return b""
    rest = len(segment) & 3
    try:
        if segment[-1] in _LAST_LETTERS[rest] and _PLUS not in segment and _SLASH not in segment:
            standard = segment.replace(b"-", b"+").replace(b"_", b"/")
            return binascii.a2b_base64(standard + _MISSING[rest], strict_mode=True)
    except binascii.Error:
        pass
    raise TokenRefused("not_base64url")


def read_object(raw: bytes) -> dict[str, Any]:
    """
    Return the JSON object that `raw` holds, without a byte before or behind it and with no member twice.

    Raises TokenRefused.
    """
    try:
        text = raw.decode()
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError):
        raise TokenRefused("not_json") from None
    if end != len(text):
        raise TokenRefused("not_json")
    if type(value) is not dict:
        raise TokenRefused("not_an_object")
    return value


@lru_cache(maxsize=64)
def _kid_of(segment: bytes) -> str:
    """Return the key that a good header names. All tokens of one key have the same header, so few are ever read."""
    header = read_object(_bytes_of(segment))
    if header.get("alg") != "RS256":
        raise TokenRefused("alg_not_allowed")
    if not _FORBIDDEN_HEADERS.isdisjoint(header):
        raise TokenRefused("header_not_allowed")
    typ = header.get("typ")
    if not isinstance(typ, str) or typ.lower() not in ("at+jwt", "application/at+jwt"):
        raise TokenRefused("typ_not_allowed")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= LONGEST_KID:
        raise TokenRefused("kid_malformed")
    return kid


def take_apart(token: str) -> Unproven:
    """Return the parts of a token whose header is good; nothing is known about it yet. Raises TokenRefused."""
    if len(token) > _LONGEST_TOKEN or not token.isascii() or token.count(".") != 2:
        raise TokenRefused("malformed")
    signed, _, signature = token.encode("ascii").rpartition(b".")
    header, _, payload = signed.partition(b".")
    return _kid_of(header), signed, payload, signature


def prove(
    token: Unproven, key: rsa.RSAPublicKey, *, issuer: str, audiences: Container[str], now: float, leeway: float
) -> VerifiedClaims:
    """
    Return the claims of a token that `key` signed and that is meant for one of `audiences`, or raise TokenRefused.

    `now` is in seconds since 1970, `leeway` in seconds.
    """
    _, signed, payload, signature = token
    try:
        key.verify(_bytes_of(signature), signed, _PADDING, _SHA256)
    except InvalidSignature:
        raise TokenRefused("signature_wrong") from None
    claims = read_object(_bytes_of(payload))
    get = claims.get
    if get("iss") != issuer:
        raise TokenRefused("iss_wrong")
    audience = get("aud")
    if type(audience) is str:
        if audience not in audiences:
            raise TokenRefused("aud_wrong")
    else:
        _check_list(audience, audiences, issuer)
    expires_at, issued_at = _time(get("exp"), "exp"), _time(get("iat"), "iat")
    if now >= expires_at + leeway:
        raise TokenRefused("expired")
    if issued_at > now + leeway or ("nbf" in claims and _time(get("nbf"), "nbf") > now + leeway):
        raise TokenRefused("not_yet_valid")
    if type(get("scope", "")) is not str or type(get("sid", "")) is not str:
        raise TokenRefused("claim_malformed")
    if "roles" in claims and not _are_words(claims["roles"]):
        raise TokenRefused("claim_malformed")
    for name in ("jti", "sub", "client_id"):
        value = get(name)
        if type(value) is not str or not 0 < len(value) <= _LONGEST_NAME or not value.isascii():
            raise TokenRefused(f"{name}_missing_or_malformed")
    if "cnf" in claims:
        raise TokenRefused("cnf_not_supported")  # bound to a key that its bearer has not shown (RFC 7800)
    return VerifiedClaims(MappingProxyType(claims))


def _check_list(listed: object, audiences: Container[str], issuer: str) -> None:
    """Check an audience that is a list (RFC 7519 §4.1.3)."""
    if not _are_words(listed):
        raise TokenRefused("aud_missing_or_malformed")
    if not any(entry in audiences for entry in listed):
        raise TokenRefused("aud_wrong")
    if issuer in listed and len(listed) > 1:
        raise TokenRefused("aud_mixed")  # the issuer keeps its own API's tokens apart from everybody else's


def _are_words(value: object) -> TypeGuard[list[str]]:
    """Return whether a claim is a list of strings."""
    if type(value) is not list:
        return False
    for entry in value:  # noqa: SIM110  # a generator would cost more than all the entries there ever are
        if type(entry) is not str:
            return False
    return True


def _time(value: object, name: str) -> float:
    if (type(value) is int or type(value) is float) and 0 <= value <= LATEST:
        return value
    raise TokenRefused(f"{name}_missing_or_malformed")


def verify(
    token: str,
    *,
    key_of: Callable[[str], rsa.RSAPublicKey | None],
    issuer: str,
    audiences: Container[str],
    now: float,
    leeway: float = LEEWAY,
) -> VerifiedClaims:
    """
    Return the claims of an access token meant for one of `audiences`, or raise TokenRefused.

    `key_of` finds a published key by its id; `now` is in seconds since 1970, `leeway` in seconds. Raises TypeError for
    a text in place of a collection of audiences, which would hold every part of itself.
    """
    if isinstance(audiences, str):
        raise TypeError("audiences is a collection of names")
    parts = take_apart(token)
    key = key_of(parts[0])
    if key is None:
        raise TokenRefused("kid_unknown")
    return prove(parts, key, issuer=issuer, audiences=audiences, now=now, leeway=leeway)
