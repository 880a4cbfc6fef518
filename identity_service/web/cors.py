"""
Which scripts of other origins may read an answer (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol).

Without a header of ours a browser lets none. Anybody may read the public documents; an answer about tokens may be read
by the origins of the very client that asked, the JSON API by those of any enabled client. Nothing here lets anybody
*do* anything: none of these endpoints looks at a cookie, so a page brings no rights but those it already holds.
"""

import asyncio
from collections.abc import Collection
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import final

import structlog

from identity_service.accounts.clients import Clients
from identity_service.infra.database import Database, DatabaseUnavailable
from identity_service.infra.runtime import Clock
from identity_service.web.asgi import HeaderList, Headers, Scope, Send

log = structlog.get_logger(__name__)

PUBLIC_DOCUMENTS = "/.well-known/"
_FRESH = timedelta(seconds=5)
_READABLE = (
    b"access-control-expose-headers",
    b"retry-after, etag, ratelimit-limit, ratelimit-remaining, ratelimit-reset, x-request-id, deprecation",
)
_DIFFERS = (b"vary", b"Origin")
_REMEMBERED = (b"access-control-max-age", b"600")  # seconds
_SENDABLE = b"authorization, content-type, idempotency-key, if-match, x-api-key"
_SENDABLE_FOR_DOCUMENTS = b"cache-control, if-none-match"


@final
class CorsOrigins:
    """
    The origins that enabled clients have named, at most five seconds old; one request at a time asks for them.

    While the database is away it is what was known last: who gets a header loses nothing by it, and we neither.
    """

    def __init__(self, db: Database, clients: Clients, clock: Clock) -> None:
        self._db = db
        self._clients = clients
        self._clock = clock
        self._known: frozenset[str] = frozenset()
        self._asked_at: datetime | None = None
        self._asking = asyncio.Lock()

    async def known(self) -> frozenset[str]:
        """Return the origins."""
        if not self._fresh():
            async with self._asking:
                if not self._fresh():
                    await self._ask()
        return self._known

    def _fresh(self) -> bool:
        return self._asked_at is not None and timedelta(0) <= self._clock.now() - self._asked_at < _FRESH

    async def _ask(self) -> None:
        now = self._clock.now()
        try:
            self._known = await self._db.run(self._clients.cors_origins)
        except DatabaseUnavailable as error:
            log.warning("cors.origins_not_renewed", reason=str(error))
        self._asked_at = now  # after a failure too: who waits behind it shall not wait for a failure of their own


class _Readers(Enum):
    """Whose scripts may read an answer."""

    ANYBODY = auto()
    CLIENT = auto()
    ANY_CLIENT = auto()
    NOBODY = auto()


def _readers(path: str) -> _Readers:
    if path in ("/token", "/revoke"):
        return _Readers.CLIENT
    if path.startswith("/v1/"):
        return _Readers.ANY_CLIENT
    return _Readers.ANYBODY if path.startswith(PUBLIC_DOCUMENTS) else _Readers.NOBODY


_MAY_SEND = {
    _Readers.ANYBODY: (b"GET, HEAD", _SENDABLE_FOR_DOCUMENTS),
    _Readers.CLIENT: (b"POST", _SENDABLE),
    _Readers.ANY_CLIENT: (b"GET, POST, PUT, PATCH, DELETE", _SENDABLE),
}
"""Methods and headers."""


def _origin(headers: Headers) -> str | None:
    """Return the one origin a request names. `null` is what sandboxed pages and files of all sorts call themselves."""
    values = headers.all("origin")
    return values[0] if len(values) == 1 and values[0] != "null" else None


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and bool(headers.all("access-control-request-method"))


@final
class Cors:
    """Says to browsers what scripts may read and send."""

    def __init__(self, origins: CorsOrigins) -> None:
        self._origins = origins

    async def headers(self, scope: Scope) -> HeaderList:
        """
        Return the headers of an answer that is about to leave.

        `scope["state"]["cors_origins"]` holds the origins of the client that the request turned out to come from;
        before there is a client, nobody may read anything. Origins are compared byte for byte.
        """
        headers = Headers(scope["headers"])
        readers = _readers(scope["path"])
        if readers is _Readers.NOBODY:
            return []
        if readers is _Readers.ANYBODY:
            return [(b"access-control-allow-origin", b"*"), _READABLE]
        origin = _origin(headers)
        if origin is None or origin not in await self._readable_by(readers, scope, headers):
            return [_DIFFERS]
        return [_DIFFERS, (b"access-control-allow-origin", origin.encode("latin-1")), _READABLE]

    async def answer_preflight(self, scope: Scope, send: Send) -> bool:
        """
        Answer a browser's question whether a script may send a request; return False where it may not, unanswered.

        It names no client, so every origin that any enabled client has is allowed to ask.
        """
        headers = Headers(scope["headers"])
        readers = _readers(scope["path"])
        if readers is _Readers.NOBODY or not _is_preflight(scope, headers):
            return False
        if readers is not _Readers.ANYBODY and _origin(headers) not in await self._origins.known():
            return False
        methods, names = _MAY_SEND[readers]
        allowed = [
            (b"access-control-allow-methods", methods),
            (b"access-control-allow-headers", names),
            _REMEMBERED,
        ]
        # 204 has no length (RFC 9110 §8.6).
        await send({"type": "http.response.start", "status": 204, "headers": allowed})
        await send({"type": "http.response.body", "body": b""})
        return True

    async def _readable_by(self, readers: _Readers, scope: Scope, headers: Headers) -> Collection[str]:
        if readers is _Readers.CLIENT and not _is_preflight(scope, headers):
            own: Collection[str] = scope["state"].get("cors_origins", ())
            return own
        return await self._origins.known()
