"""
The strict reading of an access token (RFC 9068 §4, RFC 8725): one algorithm, one type, one key, nothing optional.

Nothing in a token decides how it is checked: the algorithm is fixed, keys are found by `kid` among those that are
already held, and headers that point to other keys are refused unread.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

LEEWAY = 30
"""Seconds by which clocks may differ."""
_LONGEST_TOKEN = 16 * 1024
_LONGEST_KID = 128
_LATEST = 253402300799  # the last second of the year 9999; numbers beyond it are no times
_FORBIDDEN_HEADERS = frozenset(("crit", "b64", "jwk", "jku", "x5u", "x5c", "zip", "enc"))


class TokenRefused(Exception):
    """The token is not good; `reason` is a stable word for logs and metrics, and never holds any of the token."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VerifiedClaims:
    """What a good token says. Times are in seconds since 1970."""

    issuer: str
    subject: str
    audience: tuple[str, ...]
    client_id: str
    scope: frozenset[str]
    issued_at: float
    expires_at: float
    token_id: str
    session_id: str | None
    claims: Mapping[str, Any] = field(repr=False)


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise TokenRefused("duplicate_member")
    return members


def _no_constants(_name: str) -> None:
    raise TokenRefused("not_json")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def _segment(text: str) -> bytes:
    """Return a segment's bytes; exactly one spelling of each is accepted (RFC 7515 §2: no padding)."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise TokenRefused("not_base64url") from None
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii") != text:
        raise TokenRefused("not_base64url")
    return raw


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise TokenRefused("not_json") from None
    if not isinstance(value, dict):
        raise TokenRefused("not_an_object")
    return value


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LATEST:
        raise TokenRefused(f"{name}_missing_or_malformed")
    return value


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not value:
        raise TokenRefused(f"{name}_missing_or_malformed")
    return value


def verify(
    token: str,
    *,
    key_of: Callable[[str], rsa.RSAPublicKey | None],
    issuer: str,
    audience: str,
    now: float,
    leeway: float = LEEWAY,
) -> VerifiedClaims:
    """
    Return the claims of an access token meant for `audience`, or raise TokenRefused.

    `key_of` finds a published key by its id; `now` is in seconds since 1970.
    """
    if len(token) > _LONGEST_TOKEN or not token.isascii():
        raise TokenRefused("malformed")
    parts = token.split(".")
    if len(parts) != 3:
        raise TokenRefused("malformed")
    header = _object(_segment(parts[0]))
    if header.get("alg") != "RS256":
        raise TokenRefused("alg_not_allowed")
    if not _FORBIDDEN_HEADERS.isdisjoint(header):
        raise TokenRefused("header_not_allowed")
    typ = header.get("typ")
    if not isinstance(typ, str) or typ.lower() not in ("at+jwt", "application/at+jwt"):
        raise TokenRefused("typ_not_allowed")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= _LONGEST_KID:
        raise TokenRefused("kid_malformed")
    key = key_of(kid)
    if key is None:
        raise TokenRefused("kid_unknown")
    signed = token[: token.rindex(".")].encode("ascii")
    try:
        key.verify(_segment(parts[2]), signed, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        raise TokenRefused("signature_wrong") from None
    return _check_claims(_object(_segment(parts[1])), issuer=issuer, audience=audience, now=now, leeway=leeway)


def _check_claims(claims: dict[str, Any], *, issuer: str, audience: str, now: float, leeway: float) -> VerifiedClaims:
    if claims.get("iss") != issuer:
        raise TokenRefused("iss_wrong")
    listed = claims.get("aud")
    audiences = (listed,) if isinstance(listed, str) else listed
    if not isinstance(audiences, list | tuple) or not all(isinstance(entry, str) for entry in audiences):
        raise TokenRefused("aud_missing_or_malformed")
    if audience not in audiences:
        raise TokenRefused("aud_wrong")
    if issuer in audiences and len(audiences) > 1:
        raise TokenRefused("aud_mixed")  # the issuer keeps its own API's tokens apart from everybody else's
    expires_at, issued_at = _time(claims, "exp"), _time(claims, "iat")
    if now >= expires_at + leeway:
        raise TokenRefused("expired")
    if issued_at > now + leeway or ("nbf" in claims and _time(claims, "nbf") > now + leeway):
        raise TokenRefused("not_yet_valid")
    scope = claims.get("scope", "")
    session = claims.get("sid")
    if not isinstance(scope, str) or not isinstance(session, str | None):
        raise TokenRefused("claim_malformed")
    return VerifiedClaims(
        issuer=issuer,
        subject=_text(claims, "sub"),
        audience=tuple(audiences),
        client_id=_text(claims, "client_id"),
        scope=frozenset(scope.split()),
        issued_at=issued_at,
        expires_at=expires_at,
        token_id=_text(claims, "jti"),
        session_id=session,
        claims=claims,
    )
