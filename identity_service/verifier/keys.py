"""
The keys that a verifier holds: when they are fetched, who waits for it, and how long they may be trusted.

Fetching happens in a thread of its own, one at a time, so that coroutines of any event loop and plain threads wait
for the same answer. Everything else here is arithmetic on instants.
"""

import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier.core import KeysUnavailable, TokenRefused
from identity_service.verifier.fetching import when_forked
from identity_service.verifier.jwks import Fetched, JwksSource, Keys

log = logging.getLogger("identity_service.verifier")

_REFETCH_EVERY = 30.0  # seconds between two fetches that unknown key ids may cause
_LONGEST_UNKNOWN = 300.0
_MOST_UNKNOWN = 1000
_LONGEST_BACKOFF = 30.0


@dataclass(frozen=True, slots=True)
class _Held:
    """Keys and four instants: when they were asked for, and until when they are fresh, usable unasked, and alive."""

    keys: Keys
    since: float
    refresh_at: float
    overdue_at: float
    dead_at: float


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A fetch on its way; `landed` is done when it has ended, well or not."""

    past_caches: bool
    landed: "Future[None]" = field(default_factory=Future)


def _within(now: float, since: float, seconds: float) -> bool:
    """Return whether `now` lies in the span that began at `since`; a clock that was set back lies in none."""
    return since <= now < since + seconds


class KeyCache:
    """The keys of one issuer."""

    def __init__(
        self, source: JwksSource, clock: Callable[[], float], *, max_stale: float, initial: Keys | None = None
    ) -> None:
        """
        Hold `initial`, which is used until the issuer has answered, and in its stead when it cannot.

        `clock` tells seconds since 1970; `max_stale` is how many seconds keys outlive the last answer that had them.
        """
        now = clock()
        self._source = source
        self._clock = clock
        self._max_stale = max_stale
        self._held = _Held(initial or {}, now, now, now, now + max_stale if initial else now)
        self._flight: Flight | None = None
        self._failures = 0
        self._failed_at = self._refetched_at = float("-inf")
        self._unknown: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()
        when_forked(self._forget_parent)

    def find(self, kid: str) -> rsa.RSAPublicKey | None:
        """Return a fresh key, without a lock and without a word to anybody; None where `look` has to say more."""
        held = self._held
        return held.keys.get(kid) if held.since <= self._clock() < held.refresh_at else None

    def look(self, kid: str, *, waited: bool) -> rsa.RSAPublicKey | Flight:
        """
        Return the key of that id, or the fetch to wait for before looking again.

        `waited` says that the caller has waited for a fetch already: once is what overdue keys are worth. Raises
        TokenRefused for an id that the issuer does not publish, KeysUnavailable where nobody can tell.
        """
        with self._lock:
            now = self._clock()  # not before: what is held now could be newer than that
            held = self._held
            if now >= held.dead_at:
                return self._flight or self._start_unless_failed(now)
            if not held.since <= now < held.overdue_at and not self._failures and not waited:
                return self._flight or self._start(now)
            if not held.since <= now < held.refresh_at and not self._flight and self._may_try(now):
                self._start(now)
            if (key := held.keys.get(kid)) is not None:
                return key
            return self._look_for_unknown(kid, now, waited)

    def _look_for_unknown(self, kid: str, now: float, waited: bool) -> Flight:
        """Return the fetch that may bring an id nobody has heard of, within the bounds of what strangers may cause."""
        if self._flight and self._flight.past_caches:
            return self._flight
        if not _within(now, self._refetched_at, _REFETCH_EVERY) and not _within(now, *self._unknown.get(kid, (now, 0))):
            return self._flight or self._start(now, past_caches=True)
        if self._failures:
            raise KeysUnavailable("the issuer did not answer, so nobody knows whether the key is new")
        if waited:
            _, before = self._unknown.pop(kid, (now, _REFETCH_EVERY / 2))
            if len(self._unknown) >= _MOST_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[kid] = (now, min(2 * before, _LONGEST_UNKNOWN))
        raise TokenRefused("kid_unknown")

    def _may_try(self, now: float) -> bool:
        """Return whether the issuer may be asked again after it failed: after 1, 2, 4 … 30 seconds."""
        pause = min(2.0 ** min(self._failures - 1, 5), _LONGEST_BACKOFF)
        return not self._failures or not _within(now, self._failed_at, pause)

    def _start_unless_failed(self, now: float) -> Flight:
        if not self._may_try(now):
            raise KeysUnavailable("the issuer did not answer, and there are no keys to go on with")
        return self._start(now)

    def _start(self, now: float, *, past_caches: bool = False) -> Flight:
        """Send for the keys; the lock is held."""
        flight = self._flight = Flight(past_caches)
        flight.landed.set_running_or_notify_cancel()  # who stops waiting must not end it for the others
        if past_caches:
            self._refetched_at = now
        try:
            threading.Thread(target=self._fly, args=(flight, now), name="jwks", daemon=True).start()
        except RuntimeError as error:  # no more threads are to be had
            log.warning("the keys of %s cannot be fetched: %s", self._source.issuer, error)
            self._land(None, now)
            flight.landed.set_result(None)
        return flight

    def _fly(self, flight: Flight, now: float) -> None:
        fetched, fault = None, None
        try:
            fetched = self._source.fetch(past_caches=flight.past_caches)
        except Exception as error:
            fault = error
        before = self._held.keys.keys()
        with self._lock:
            self._land(fetched, now)
        # Without the lock: whoever does not wait for this fetch shall not wait for a log either.
        if fetched is None:
            log.warning("the keys of %s could not be fetched: %s: %s", self._source.issuer, type(fault).__name__, fault)
        elif fetched.keys.keys() != before:
            log.info("the keys of %s are now: %s", self._source.issuer, ", ".join(sorted(fetched.keys)))
        flight.landed.set_result(None)

    def _land(self, fetched: Fetched | None, asked_at: float) -> None:
        """Take over what a fetch brought, or note that it brought nothing; the lock is held."""
        if fetched is not None:
            self._held = self._hold(fetched, asked_at)
            self._failures = 0
        else:
            self._failures += 1
            self._failed_at = self._clock()
        self._flight = None

    def _hold(self, fetched: Fetched, since: float) -> _Held:
        # Spread, so that a fleet that started together does not ask together.
        refresh = fetched.fresh * random.uniform(0.75, 0.9)  # noqa: S311  # spreads load, protects nothing
        return _Held(
            fetched.keys,
            since,
            refresh_at=since + refresh,
            overdue_at=since + max(fetched.usable, refresh),
            dead_at=since + max(self._max_stale, fetched.usable),
        )

    def _forget_parent(self) -> None:
        """Forget, in a child process, the parent's fetch, and a lock that nobody here will ever release."""
        self._lock = threading.Lock()
        self._flight = None
