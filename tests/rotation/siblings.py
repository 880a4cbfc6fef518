"""
Ten services that check our tokens, most of them with copies of the JWKS as old as its headers allow.

The stubborn ones share nothing with the verifier that the product brings but the reading of a single token. They do
not fetch the JWKS anew for a key they do not know, as a good verifier does: only the schedule can save them.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import httpx2
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier import KeysUnavailable, TokenRefused, TokenVerifier
from identity_service.verifier.core import verify
from tests.rotation.clock import Time
from tests.support.tokens import unb64

_JWKS = "/.well-known/jwks.json"
_PAUSE = 0.02  # real seconds before an unanswered fetch is repeated
_DIRECTIVE = re.compile(r"(max-age|stale-while-revalidate)=(\d+)")


@dataclass(frozen=True)
class Answer:
    """The JWKS as somebody got it: `at` is when the service gave it, by the shared time."""

    body: bytes
    cache_control: str
    at: float

    @property
    def fresh_for(self) -> float:
        """Seconds a cache need not ask again (RFC 9111 §5.2.2.1)."""
        return self._directives["max-age"]

    @property
    def usable_for(self) -> float:
        """Seconds a cache may serve it at all, while it asks again (RFC 5861 §3)."""
        return self._directives["max-age"] + self._directives["stale-while-revalidate"]

    @property
    def _directives(self) -> dict[str, float]:
        return {name: float(seconds) for name, seconds in _DIRECTIVE.findall(self.cache_control)}


Fetch = Callable[[], Awaitable[Answer]]
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


@final
class Origin:
    """The JWKS at the service itself, on a new connection each time, so that any replica may answer."""

    def __init__(self, issuer: str, time: Time) -> None:
        self._url = issuer + _JWKS
        self._time = time
        self._http = httpx2.AsyncClient(
            timeout=10, trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0, max_connections=20)
        )

    async def fetch(self) -> Answer:
        """Fetch it, again and again while no replica answers."""
        while True:
            try:
                answer = await self._http.get(self._url)
            except httpx2.TransportError:  # the replica that should have answered was killed
                await asyncio.sleep(_PAUSE)
                continue
            answer.raise_for_status()
            return Answer(answer.content, answer.headers["cache-control"], self._time.now)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


@final
class HttpCache:
    """A cache between a sibling and us: it gives away its copy as long as it may, and renews it only then."""

    def __init__(self, fetch: Fetch, time: Time, spawn: Spawn) -> None:
        self._fetch = fetch
        self._time = time
        self._spawn = spawn
        self._kept: Answer | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def fetch(self) -> Answer:
        """Answer from the copy if there is one that may still be served, whatever its age, and then renew it."""
        kept = self._kept
        if kept is None or self._time.now - kept.at >= kept.usable_for:
            await self._renew()
            assert self._kept is not None
            return self._kept
        if self._time.now - kept.at >= kept.fresh_for and (self._renewing is None or self._renewing.done()):
            self._renewing = self._spawn(self._renew())
        return kept

    async def _renew(self) -> None:
        self._kept = await self._fetch()


class Sibling(Protocol):
    """Something that checks tokens meant for `SIBLING`."""

    name: str

    async def verdict(self, token: str) -> str | None:
        """Return None for a good token, or the reason why it is refused."""
        ...

    def copy_age(self) -> float | None:
        """Return how old its copy of our keys is, in seconds of the shared time; None if it does not tell."""
        ...


@final
class StubbornSibling:
    """
    Keeps what it fetched exactly as long as the headers allow, and fetches anew when it is asked after that.

    It counts from the moment the answer reached it, whoever gave it: behind a cache, its keys may be twice as old.
    `first_for` cuts the life of the first copy short, in seconds, so that siblings do not fetch together; `early` is
    how many seconds before the end it fetches, so that it meets a cache at the very end of the cache's own time.
    """

    def __init__(self, name: str, fetch: Fetch, time: Time, *, issuer: str, audience: str, first_for: float) -> None:
        self.name = name
        self.early = 0.0
        self._fetch = fetch
        self._time = time
        self._issuer = issuer
        self._audience = audience
        self._first_for: float | None = first_for
        self._use_until = float("-inf")
        self._fetched_at = float("-inf")
        self._keys: Mapping[str, rsa.RSAPublicKey] = {}

    async def verdict(self, token: str) -> str | None:
        if self._time.now >= self._use_until:
            await self._renew()
        try:
            verify(token, key_of=self._keys.get, issuer=self._issuer, audiences=(self._audience,), now=self._time.now)
        except TokenRefused as refused:
            return refused.reason
        return None

    def copy_age(self) -> float:
        return self._time.now - self._fetched_at

    async def _renew(self) -> None:
        answer = await self._fetch()
        usable_for, self._first_for = (self._first_for or answer.usable_for - self.early), None
        self._use_until = self._time.now + usable_for
        self._fetched_at = answer.at
        self._keys = {jwk["kid"]: _public_key(jwk) for jwk in json.loads(answer.body)["keys"]}


def _public_key(jwk: Mapping[str, str]) -> rsa.RSAPublicKey:
    n, e = (int.from_bytes(unb64(jwk[name]), "big") for name in ("n", "e"))
    return rsa.RSAPublicNumbers(e, n).public_key()


@final
class ProperSibling:
    """Uses the verifier that the product brings."""

    def __init__(self, name: str, time: Time, *, issuer: str, audience: str) -> None:
        self.name = name
        self._verifier = TokenVerifier(issuer, audience, clock=lambda: time.now)

    async def verdict(self, token: str) -> str | None:
        try:
            await self._verifier.verify(token)
        except TokenRefused as refused:
            return refused.reason
        except KeysUnavailable:
            return "keys_unavailable"
        return None

    def copy_age(self) -> None:
        return None


def ten_siblings(issuer: str, audience: str, time: Time, origin: Origin, spawn: Spawn) -> list[Sibling]:
    """Return seven stubborn siblings that ask us at different times, one behind a cache, and two proper ones."""

    def stubborn(name: str, fetch: Fetch, first_for: float) -> StubbornSibling:
        return StubbornSibling(name, fetch, time, issuer=issuer, audience=audience, first_for=first_for)

    cached = stubborn("behind a cache", HttpCache(origin.fetch, time, spawn).fetch, first_for=870)
    cached.early = 30
    return [
        *(stubborn(f"stubborn {number}", origin.fetch, first_for=125.0 * number) for number in range(1, 8)),
        cached,
        *(ProperSibling(f"TokenVerifier {number}", time, issuer=issuer, audience=audience) for number in (1, 2)),
    ]
