"""`TokenVerifier`: what a sibling service holds to check the tokens that callers bring."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier.core import (
    LEEWAY,
    InsufficientScope,
    KeysUnavailable,
    Unproven,
    VerifiedClaims,
    prove,
    take_apart,
)
from identity_service.verifier.jwks import BadKeySet, JwksSource, Keys, read_key_set
from identity_service.verifier.keys import Flight, KeyCache

_MOST_FLIGHTS = 3  # an overdue one, one past the caches, and one that began in between
_LONGEST_LEEWAY = 300


class TokenVerifier:
    """
    Checks access tokens of one issuer for one audience, offline (RFC 9068 §4).

    One of these serves a whole process: coroutines, threads, any number of event loops. It fetches the issuer's keys
    when it first needs them and keeps them fresh while it is used. There is nothing to close.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        *,
        jwks_uri: str | None = None,
        jwks_file: str | Path | None = None,
        leeway: float = LEEWAY,
        max_stale: float = 86400.0,
        timeout: float = 5.0,
        allow_http: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Prepare to check; nothing is fetched yet.

        `issuer`: exactly what tokens say. `audience`: this service's own name, the `resource` that callers ask for.
        `jwks_uri`: where the keys are, if not where the issuer's metadata says. `jwks_file`: a key set to go on with
        while the issuer has not answered. `leeway`: seconds by which clocks may differ. `max_stale`: for how many
        seconds keys are trusted that the issuer, being away, has not confirmed. `timeout`: seconds for a fetch.
        `allow_http`: fetch without TLS from elsewhere than this machine, where the network itself can be trusted.
        `clock`: seconds since 1970.

        Raises ValueError for what cannot be meant, OSError for a file that cannot be read.
        """
        if not audience or audience.rstrip("/") == issuer.rstrip("/"):
            raise ValueError(
                "the audience is this service's own name, and never the issuer: a token for the issuer's own API"
                " (profile, sessions, administration) must be worth nothing anywhere else, or every service that sees"
                " one could act there as its bearer"
            )
        if not (0 <= leeway <= _LONGEST_LEEWAY and max_stale >= 0 and timeout > 0):  # which no NaN passes
            raise ValueError(f"leeway: 0 to {_LONGEST_LEEWAY} seconds; max_stale: not negative; timeout: positive")
        self.issuer = issuer
        self.audience = audience
        self._audiences = frozenset((audience,))
        self._leeway = leeway
        self._timeout = timeout
        self._clock = clock
        source = JwksSource(issuer, jwks_uri, allow_http=allow_http, timeout=timeout)
        self._keys = KeyCache(source, clock, max_stale=max_stale, initial=_keys_of(jwks_file) if jwks_file else None)

    async def verify(self, token: str, *scopes: str) -> VerifiedClaims:
        """
        Return what a token says, if it is good and allows all of `scopes`.

        Raises TokenRefused (answer 401), InsufficientScope (answer 403), KeysUnavailable (answer 503).
        """
        parts = take_apart(token)
        key = self._keys.find(parts[0]) or await self._key(parts[0])
        return self._prove(parts, key, scopes)

    def verify_sync(self, token: str, *scopes: str) -> VerifiedClaims:
        """Do what `verify` does, for code without an event loop; a thread that has to wait for keys blocks."""
        parts = take_apart(token)
        key = self._keys.find(parts[0]) or self._key_sync(parts[0])
        return self._prove(parts, key, scopes)

    def _prove(self, parts: Unproven, key: rsa.RSAPublicKey, scopes: tuple[str, ...]) -> VerifiedClaims:
        claims = prove(
            parts, key, issuer=self.issuer, audiences=self._audiences, now=self._clock(), leeway=self._leeway
        )
        if scopes and not claims.scope.issuperset(scopes):
            raise InsufficientScope(" ".join(scopes))
        return claims

    async def _key(self, kid: str) -> rsa.RSAPublicKey:
        for flights in range(_MOST_FLIGHTS):
            found = self._keys.look(kid, waited=flights > 0)
            if not isinstance(found, Flight):
                return found
            try:
                await asyncio.wait_for(asyncio.wrap_future(found.landed), self._timeout)
            except TimeoutError:
                break
        return self._last_look(kid)

    def _key_sync(self, kid: str) -> rsa.RSAPublicKey:
        for flights in range(_MOST_FLIGHTS):
            found = self._keys.look(kid, waited=flights > 0)
            if not isinstance(found, Flight):
                return found
            try:
                found.landed.result(self._timeout)
            except TimeoutError:
                break
        return self._last_look(kid)

    def _last_look(self, kid: str) -> rsa.RSAPublicKey:
        found = self._keys.look(kid, waited=True)
        if isinstance(found, Flight):
            raise KeysUnavailable("the issuer takes too long to answer")
        return found


def _keys_of(path: str | Path) -> Keys:
    try:
        return read_key_set(Path(path).read_bytes())
    except BadKeySet as error:
        raise ValueError(f"{path}: {error}") from None
