"""The issuer's keys: reading a key set (RFC 7517 §5), and fetching it over HTTP."""

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc.jwk import RSAKey

from identity_service.verifier.core import LONGEST_KID, TokenRefused, read_object
from identity_service.verifier.fetching import bounded_body, check_url, run_alone

Keys = Mapping[str, rsa.RSAPublicKey]
"""Public keys by their `kid`."""

LONGEST_CACHED = 900.0
"""Seconds a key set may be used before it is asked for anew, whatever its headers say; the issuer reckons with it."""
_SHORTEST_CACHED = 30.0
_DEFAULT_MAX_AGE = 300.0
_REDISCOVER_AFTER = 86400.0  # seconds; an issuer may move its keys
_LARGEST_DOCUMENT = 256 * 1024
_MOST_KEYS = 100
_FEWEST_BITS, _MOST_BITS = 2048, 8192
_SMALLEST_EXPONENT = 65537
_PRIVATE_MEMBERS = frozenset(("d", "p", "q", "dp", "dq", "qi", "oth", "k"))
_DIRECTIVE = re.compile(r"(max-age|stale-while-revalidate)\s*=\s*\"?(\d{1,9})", re.IGNORECASE)
_NOT_TO_BE_KEPT = re.compile(r"\bno-(?:store|cache)\b", re.IGNORECASE)


class BadKeySet(Exception):
    """The issuer's answer holds no key set that could be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A key set, and for how many seconds it is fresh and may be used unasked (RFC 9111 §4.2, RFC 5861 §3)."""

    keys: Keys
    fresh: float
    usable: float


def read_key_set(document: bytes) -> Keys:
    """
    Return the keys of a set that can verify our tokens; others are passed over (RFC 7517 §5).

    Raises BadKeySet for a set that is malformed, has one `kid` twice, gives away private keys, or is of no use.
    """
    try:
        listed = read_object(document.strip()).get("keys")
    except TokenRefused as refused:
        raise BadKeySet(f"the key set is malformed: {refused.reason}") from None
    if not isinstance(listed, list) or len(listed) > _MOST_KEYS:
        raise BadKeySet("the key set has no list of keys, or too long a one")
    keys: dict[str, rsa.RSAPublicKey] = {}
    for jwk in listed:
        if not isinstance(jwk, dict) or not _PRIVATE_MEMBERS.isdisjoint(jwk):
            raise BadKeySet("the key set holds something that is no public key")
        if not _is_ours(jwk) or (key := _public_key(jwk)) is None:
            continue
        if jwk["kid"] in keys:
            raise BadKeySet("the key set has two keys of one kid")
        keys[jwk["kid"]] = key
    if not keys:
        raise BadKeySet("the key set holds no RS256 key")
    return keys


def _is_ours(jwk: Mapping[str, Any]) -> bool:
    """Return whether a key is for RS256 signatures and for nothing else (RFC 7517 §4, RFC 8725 §3.1)."""
    kid, operations = jwk.get("kid"), jwk.get("key_ops", ["verify"])
    return (
        jwk.get("kty") == "RSA"
        and jwk.get("alg", "RS256") == "RS256"
        and jwk.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
        and isinstance(kid, str)
        and 0 < len(kid) <= LONGEST_KID
    )


def _public_key(jwk: Mapping[str, Any]) -> rsa.RSAPublicKey | None:
    """Return the key, or None for one that is malformed or out of bounds."""
    modulus, exponent = jwk.get("n"), jwk.get("e")
    if not isinstance(modulus, str) or not isinstance(exponent, str):
        return None
    if not _FEWEST_BITS <= len(modulus) * 6 <= _MOST_BITS + 6 or len(exponent) > 6:
        return None
    try:
        key = RSAKey.import_key({"kty": "RSA", "n": modulus, "e": exponent}).public_key
    except Exception:  # the library has no common error for what it cannot read
        return None
    return key if key.key_size >= _FEWEST_BITS and key.public_numbers().e >= _SMALLEST_EXPONENT else None


def lifetimes(headers: Mapping[str, str]) -> tuple[float, float]:
    """
    Return for how many seconds a key set is fresh, and for how many it may be used unasked, by its headers.

    What a cache on the way has held it already (`Age`) is taken off. Bounded from below, so that no header makes us
    ask for every token, and from above by what the issuer's schedule allows for.
    """
    control = headers.get("cache-control", "")
    # Of two of a kind the first counts (RFC 9111 §4.2.1).
    told = {name.lower(): float(seconds) for name, seconds in reversed(_DIRECTIVE.findall(control))}
    max_age = told.get("max-age", _DEFAULT_MAX_AGE)
    if _NOT_TO_BE_KEPT.search(control):
        max_age, told = 0.0, {}
    age = headers.get("age", "")
    held = float(age) if age.isascii() and age.isdigit() and len(age) < 10 else 0.0
    usable = max_age + told.get("stale-while-revalidate", 0.0)
    fresh, usable = (min(seconds, LONGEST_CACHED) - held for seconds in (max_age, usable))
    return max(fresh, _SHORTEST_CACHED), max(usable, _SHORTEST_CACHED)


class JwksSource:
    """Where an issuer's key set comes from. Redirects are not followed, and a token never says where to look."""

    def __init__(self, issuer: str, jwks_uri: str | None, *, allow_http: bool, timeout: float) -> None:
        """`timeout` is in seconds, for everything that a fetch takes. Raises ValueError for a URL of no use."""
        parts = urlsplit(check_url(issuer, allow_http=allow_http))
        self._metadata_url = (
            f"{parts.scheme}://{parts.netloc}/.well-known/oauth-authorization-server{parts.path.rstrip('/')}"
        )
        self.issuer = issuer
        self._allow_http = allow_http
        self._timeout = timeout
        self._fixed_uri = check_url(jwks_uri, allow_http=allow_http) if jwks_uri is not None else None
        self._found_uri: str | None = None
        self._found_at = 0.0

    def fetch(self, *, past_caches: bool) -> Fetched:
        """
        Ask for the key set, past every cache on the way if need be; blocks, for `timeout` seconds at most.

        Raises BadKeySet, AnswerTooLong, httpx2.HTTPError, OSError, TimeoutError.
        """
        return run_alone(self._fetch, past_caches)

    async def _fetch(self, past_caches: bool) -> Fetched:
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if past_caches:
            headers["cache-control"] = "no-cache"
        if time.monotonic() - self._found_at > _REDISCOVER_AFTER:
            self._found_uri = None
        async with asyncio.timeout(self._timeout):
            uri = self._fixed_uri or self._found_uri or await self._discover(headers)
            self._found_uri = None  # unless it serves its purpose, it is looked for anew the next time
            told, document = await _get(uri, headers)
        fetched = Fetched(read_key_set(document), *lifetimes(told))
        self._found_uri = uri
        return fetched

    async def _discover(self, headers: Mapping[str, str]) -> str:
        """Return the issuer's `jwks_uri` (RFC 8414 §3); the metadata must be the issuer's own (§3.3)."""
        _, document = await _get(self._metadata_url, headers)
        self._found_at = time.monotonic()
        try:
            metadata = read_object(document.strip())
            if metadata.get("issuer") != self.issuer:
                raise BadKeySet("the metadata is of another issuer")
            # An issuer elsewhere has no business on this machine.
            here = self.issuer.startswith("http:")
            return check_url(metadata["jwks_uri"], allow_http=self._allow_http, loopback=here)
        except (TokenRefused, KeyError, TypeError, ValueError, AttributeError):
            raise BadKeySet("the metadata is malformed, or names no jwks_uri that can be trusted") from None


async def _get(url: str, headers: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
    """
    Return an answer's headers and its body, which is small and not compressed; raises BadKeySet, AnswerTooLong.

    The connection is a new one each time: minutes apart, there is nothing to gain from keeping it, and a new address
    is noticed. A proxy that the environment names is used where TLS keeps it from changing the answer.
    """
    async with (
        httpx2.AsyncClient(headers=headers, timeout=None, trust_env=url.startswith("https:")) as http,
        http.stream("GET", url) as answer,
    ):
        if answer.status_code != 200:
            raise BadKeySet(f"{url} answered {answer.status_code}")
        return answer.headers, await bounded_body(answer, _LARGEST_DOCUMENT)
