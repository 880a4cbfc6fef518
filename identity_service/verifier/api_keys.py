"""
API keys at a sibling service: exchanged for an access token (RFC 8693), which is then checked like any other.

The key goes to the issuer and nowhere else. What comes back is believed only after the offline check that every bearer
token has to pass, and is kept for a part of the token's life, under a digest of the key.
"""

import asyncio
import base64
import hashlib
import logging
import re
import ssl
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from typing import Any
from urllib.parse import quote_plus

import httpx2

from identity_service.verifier.core import (
    InsufficientScope,
    KeysUnavailable,
    TokenRefused,
    VerifiedClaims,
    read_object,
)
from identity_service.verifier.fetching import bounded_body, check_url, run_alone, when_forked
from identity_service.verifier.token_verifier import TokenVerifier

log = logging.getLogger("identity_service.verifier")

_RETRY_AFTER = 5.0  # seconds; where the issuer does not say
_LONGEST_PAUSE = 60.0  # seconds; what the issuer may say
_LARGEST_ANSWER = 64 * 1024
_MOST_FLIGHTS = 64  # each has a thread and a connection
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_API_KEY = "urn:identity-service:params:oauth:token-type:api-key"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105  # RFC 8693 §3
_ERRORS = frozenset(
    (
        *("invalid_client", "invalid_grant", "invalid_request", "invalid_scope", "invalid_target"),
        *("temporarily_unavailable", "unauthorized_client", "unsupported_grant_type"),
    )
)
"""The words of RFC 6749 §5.2 and RFC 8707 §2, and our own for 503: others are not repeated, not even to the log."""

_FORMAT = re.compile(r"idk_[0-9A-Za-z]{11}_[0-9A-Za-z]{50}")  # id, 256 bits of secret, and a checksum over all that
_ID, _CHECKSUM = slice(4, 15), slice(60, 66)
_WORDS = tuple(slice(start, start + 11) for start in range(16, 60, 11))  # of the secret, 64 bits each
_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LAST_WORD = "LygHa16AHYF"  # all 64 bits set; the letters sort as their values do


class ExchangeUnavailable(Exception):
    """
    Whether the API key is good cannot be told now. Answer 503: the key may well be good.

    `reason` is a stable word for logs and metrics; `retry_after` is in seconds.
    """

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class _Refused:
    """The issuer, or the look of it, says that the key is not good."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Unavailable:
    """Nobody has said anything about the key; `retry_after` None: nor when to ask again. `detail` is for the log."""

    reason: str
    retry_after: float | None = None
    detail: str = ""


_ALLOWS_NOTHING = _Refused("api_key_allows_nothing")
_Outcome = VerifiedClaims | _Refused | _Unavailable
_Instant = tuple[float, float]
"""Seconds since 1970, by which tokens expire, and seconds on a clock that nobody can set."""


def is_well_formed(api_key: str) -> bool:
    """Return whether the issuer can have spelled an API key so: a typo is refused without a request."""
    if not _FORMAT.fullmatch(api_key):
        return False
    value, checksum = zlib.crc32(api_key[: _CHECKSUM.start].encode("ascii")), ""
    for _ in api_key[_CHECKSUM]:
        value, letter = divmod(value, len(_LETTERS))
        checksum = _LETTERS[letter] + checksum
    return checksum == api_key[_CHECKSUM] and all(api_key[word] <= _LAST_WORD for word in _WORDS)


class _Memory:
    """Outcomes by the digest of their key, each until its end; beyond `most` the least recently used one goes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[bytes, tuple[_Outcome, _Instant]] = OrderedDict()

    def find(self, digest: bytes, now: _Instant) -> _Outcome | None:
        """Return what is known of a key."""
        if (held := self._held.get(digest)) is None:
            return None
        outcome, ends = held
        if any(here >= end for here, end in zip(now, ends, strict=True)):
            del self._held[digest]
            return None
        self._held.move_to_end(digest)
        return outcome

    def keep(self, digest: bytes, outcome: _Outcome, since: _Instant, seconds: float) -> None:
        """Hold on to an outcome for so many seconds on both clocks, whichever is sooner over."""
        if seconds > 0:
            self._held[digest] = (outcome, (since[0] + seconds, since[1] + seconds))
            self._held.move_to_end(digest)
        if len(self._held) > self._most:
            self._held.popitem(last=False)


class ApiKeyExchanger:
    """
    Checks API keys of one issuer for the audience of a `TokenVerifier`, by exchanging them for access tokens.

    One of these serves a whole process: coroutines, threads, any number of event loops. However many callers bring one
    key at once, it is exchanged once. There is nothing to close.

    A key that is revoked, or loses a right, is noticed when it is next exchanged: after `max_age`, and at the latest
    when the token has expired.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        *,
        client_id: str,
        client_secret: str,
        token_endpoint: str | None = None,
        http: Callable[[], httpx2.AsyncClient] | None = None,
        max_age: float | None = None,
        max_cached: int = 10_000,
        early: float = 30.0,
        refused_for: float = 5.0,
        timeout: float = 5.0,
        allow_http: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Prepare to exchange; nothing is asked yet.

        `client_id`, `client_secret`: this service's own, of a client that may use token exchange for the verifier's
        audience. `token_endpoint`: where to, if not to `/token` at the issuer; an answer never says where the secret
        goes. `http`: makes the HTTP client for one exchange, for a proxy or certificates of your own. `max_age`: for
        how many seconds at most an answer is used. `max_cached`: how many keys are remembered, good ones and refused
        ones each. `early`: how many seconds before its token expires a key is exchanged anew. `refused_for`: for how
        many seconds a refused key is refused unasked. `timeout`: seconds for an exchange. `allow_http`: exchange
        without TLS elsewhere than on this machine, where the network itself can be trusted. `clock`: seconds since
        1970, the verifier's.

        Raises ValueError for what cannot be meant.
        """
        if not client_id or not client_secret:
            raise ValueError("an exchange needs a client of its own, with a secret")
        spans = (early, refused_for, max_age or 0.0)
        if not (max_cached >= 1 and timeout > 0 and all(span >= 0 for span in spans)):  # which no NaN passes
            raise ValueError("max_cached: at least 1; early, refused_for, max_age: not negative; timeout: positive")
        endpoint = token_endpoint or f"{verifier.issuer.rstrip('/')}/token"
        self._endpoint = check_url(endpoint, allow_http=allow_http)
        self._verifier = verifier
        self._client_id = client_id
        # Both are form-urlencoded first (RFC 6749 §2.3.1), so that neither can hold the colon between them.
        credentials = f"{quote_plus(client_id)}:{quote_plus(client_secret)}".encode("ascii")
        self._headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "authorization": f"Basic {base64.b64encode(credentials).decode('ascii')}",
        }
        self._http = http or self._client
        self._max_age = max_age
        self._early = early
        self._refused_for = refused_for
        self._timeout = timeout
        self._clock = clock
        self._good, self._others = _Memory(max_cached), _Memory(max_cached)  # who guesses pushes out no good key
        self._flights: dict[bytes, Future[_Outcome]] = {}
        self._lock = threading.Lock()
        when_forked(self._forget_parent)

    async def verify(self, api_key: str, *scopes: str) -> VerifiedClaims:
        """
        Return what the issuer says of an API key's owner, if the key is good here and allows all of `scopes`.

        Raises TokenRefused (answer 401), InsufficientScope (answer 403), ExchangeUnavailable (answer 503).
        """
        found = self._look(api_key)
        return _told(await asyncio.wrap_future(found) if isinstance(found, Future) else found, scopes)

    def verify_sync(self, api_key: str, *scopes: str) -> VerifiedClaims:
        """Do what `verify` does, for code without an event loop; a thread that has to wait for an exchange blocks."""
        found = self._look(api_key)
        return _told(found.result() if isinstance(found, Future) else found, scopes)

    def _forget_parent(self) -> None:
        """Forget, in a child process, the parent's exchanges, and a lock that nobody here will ever release."""
        self._lock = threading.Lock()
        self._flights = {}

    # -- who asks, and who waits ----------------------------------------------------------------------------------

    def _look(self, api_key: str) -> "_Outcome | Future[_Outcome]":
        """Return what is known of a key, or the exchange that will tell."""
        if not is_well_formed(api_key):
            return _Refused("api_key_malformed")
        digest = hashlib.sha256(api_key.encode("ascii")).digest()
        with self._lock:
            now = self._now()
            known = self._good.find(digest, now) or self._others.find(digest, now)
            return known or self._flights.get(digest) or self._start(digest, api_key)

    def _start(self, digest: bytes, api_key: str) -> "_Outcome | Future[_Outcome]":
        """Send the key for an exchange; the lock is held."""
        if len(self._flights) >= _MOST_FLIGHTS:
            return _Unavailable("too_many_exchanges", retry_after=1.0)
        flight: Future[_Outcome] = Future()
        flight.set_running_or_notify_cancel()  # who stops waiting must not end it for the others
        try:
            threading.Thread(target=self._fly, args=(flight, digest, api_key), name="api-key", daemon=True).start()
        except RuntimeError:
            return _Unavailable("no_thread_to_be_had")
        self._flights[digest] = flight
        return flight

    def _fly(self, flight: "Future[_Outcome]", digest: bytes, api_key: str) -> None:
        since = self._now()
        try:
            outcome = self._exchange(api_key)
        except Exception as fault:  # whatever it was, those who wait shall hear of it
            outcome = _Unavailable("no_answer", detail=f"{type(fault).__name__}: {fault}")
        with self._lock:
            if isinstance(outcome, VerifiedClaims):
                self._good.keep(digest, outcome, since, self._usable(outcome, since[0]))
            elif isinstance(outcome, _Refused):
                self._others.keep(digest, outcome, since, self._refused_for)
            else:
                self._others.keep(digest, outcome, since, outcome.retry_after or 0.0)
            self._flights.pop(digest, None)
        # Without the lock: whoever does not wait for this exchange shall not wait for a log either.
        if isinstance(outcome, _Unavailable):
            log.warning("%s exchanged no API key: %s", self._endpoint, outcome.detail or outcome.reason)
        flight.set_result(outcome)

    def _usable(self, claims: VerifiedClaims, now: float) -> float:
        """Return for how many seconds a good answer may be used."""
        left = claims.expires_at - self._early - now
        return left if self._max_age is None else min(left, self._max_age)

    def _now(self) -> _Instant:
        return self._clock(), monotonic()

    # -- one exchange ---------------------------------------------------------------------------------------------

    def _exchange(self, api_key: str) -> _Outcome:
        """Ask the issuer; blocks, for `timeout` seconds, and for as long as the verifier takes to get its keys."""
        status, headers, body = run_alone(self._send, api_key)
        if status == 200:
            return self._proven(body, api_key[_ID])
        error = _error_in(body)
        if status == 400 and error == "invalid_grant":
            return _Refused("api_key_refused")
        if status == 400 and error == "invalid_scope":  # none was asked for, so there is none to be had
            return _ALLOWS_NOTHING
        return _Unavailable(error or f"status_{status}", _retry_after(headers) if status in (429, 503) else None)

    def _proven(self, body: bytes, key_id: str) -> _Outcome:
        """Return the claims in an answer if they are the issuer's, for us, and about this key (RFC 8693 §2.2.1)."""
        try:
            answer = read_object(body.strip())
            token, told = answer.get("access_token"), str(answer.get("token_type")).lower()
            if not isinstance(token, str) or told != "bearer" or answer.get("issued_token_type") != _ACCESS_TOKEN:
                raise TokenRefused("not_an_access_token")
            proven = self._verifier.verify_sync(token)
            if not _is_about(proven.claims, key_id, self._client_id):
                raise TokenRefused("of_another_exchange")
        except KeysUnavailable:
            return _Unavailable("keys_unavailable")
        except TokenRefused as refused:
            # It says nothing about the key, so the caller is not told that it was bad.
            return _Unavailable("answer_not_trusted", detail=f"its answer is not to be trusted: {refused.reason}")
        return proven

    async def _send(self, api_key: str) -> tuple[int, Mapping[str, str], bytes]:
        """Return the answer's status, headers and body, which is small and not compressed."""
        form = {
            "grant_type": _EXCHANGE,
            "subject_token": api_key,
            "subject_token_type": _API_KEY,
            "resource": self._verifier.audience,  # and no scope: all that the key allows here, for every caller
        }
        async with (
            asyncio.timeout(self._timeout),
            self._http() as http,
            http.stream(
                "POST", self._endpoint, data=form, headers=self._headers, auth=None, follow_redirects=False
            ) as answer,
        ):
            return answer.status_code, answer.headers, await bounded_body(answer, _LARGEST_ANSWER)

    def _client(self) -> httpx2.AsyncClient:
        """
        Return a client for one exchange.

        A proxy that the environment names is used where TLS keeps the key from it.
        """
        return httpx2.AsyncClient(timeout=None, verify=self._tls, trust_env=self._endpoint.startswith("https:"))

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """The certificates to trust, which take longer to read than all the rest of an exchange."""
        return httpx2.create_ssl_context()


def _told(outcome: _Outcome, scopes: tuple[str, ...]) -> VerifiedClaims:
    """Return or raise what an exchange came to: to each caller an error of their own."""
    if isinstance(outcome, _Unavailable):
        raise ExchangeUnavailable(outcome.reason, outcome.retry_after or _RETRY_AFTER)
    if isinstance(outcome, _Refused) and not (outcome is _ALLOWS_NOTHING and scopes):
        raise TokenRefused(outcome.reason)
    if isinstance(outcome, _Refused) or not outcome.scope.issuperset(scopes):
        raise InsufficientScope(" ".join(scopes))
    return outcome


def _is_about(claims: Mapping[str, Any], key_id: str, client_id: str) -> bool:
    """Return whether a token came out of an exchange of that key by that client, and not of somebody else's."""
    actor = claims.get("act")
    by_us = isinstance(actor, dict) and actor.get("sub") == client_id == claims["client_id"]
    return by_us and claims.get("key_id") == key_id


def _error_in(body: bytes) -> str:
    """Return the error that an answer names (RFC 6749 §5.2), or nothing for a word that is not known."""
    try:
        error = read_object(body.strip()).get("error")
    except TokenRefused:
        return ""
    return error if isinstance(error, str) and error in _ERRORS else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks us to wait (RFC 9110 §10.2.3), bounded; None for what is no number."""
    told = headers.get("retry-after", "")
    return min(float(told), _LONGEST_PAUSE) if told.isascii() and told.isdigit() else None
