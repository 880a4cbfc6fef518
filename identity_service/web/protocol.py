"""
What connections may make the server hold: bounds on the HTTP parser, before there is a request to refuse.

The parser collects a URL, a header or a trailer until it is complete, however long that takes and however large it
grows. Both are bounded here; what is complete is judged by the edge. So is the number of connections, each of which
takes a file descriptor that the database might need.
"""

import asyncio
import re
import socket
from collections.abc import Iterable
from http import HTTPStatus
from typing import ClassVar, Self, final
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from identity_service.infra.telemetry.metrics import CONNECTIONS_SHED
from identity_service.web.asgi import NO_STORE
from identity_service.web.edge import PROTECTION

_VERSIONS = ("1.0", "1.1")


def _parting_words(status: HTTPStatus, *further: tuple[bytes, bytes]) -> bytes:
    """Return an answer without a body that ends the connection."""
    headers = [*NO_STORE, *PROTECTION, *further, (b"content-length", b"0"), (b"connection", b"close")]
    lines = [f"HTTP/1.1 {status} {status.phrase}".encode("ascii"), *(b": ".join(header) for header in headers)]
    return b"\r\n".join([*lines, b"", b""])


_MALFORMED = _parting_words(HTTPStatus.BAD_REQUEST)
_TOO_LARGE = _parting_words(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
_TOO_SLOW = _parting_words(HTTPStatus.REQUEST_TIMEOUT)
_TOO_MANY = _parting_words(HTTPStatus.SERVICE_UNAVAILABLE, (b"retry-after", b"1"))


_WISH = re.compile(rb"(?i)\r\nupgrade:")


@final
class BoundedProtocol(HttpToolsProtocol):
    """
    Ends a connection whose request head is too large or too slow, or whose request as a whole is too large, or whose
    client does not take its answers.

    Where there are more connections than the server's `limit_concurrency`, the one that has waited longest for its
    client, for a request, for the end of its first head or to be read, gives way to the newcomer. Who opens connections
    by the thousand and says or reads nothing thus shuts nobody else out; only if each one has a request in progress,
    the newcomer hears 503.
    """

    largest_head: ClassVar[int] = 64 * 1024
    """Bytes before the headers are complete."""
    most_waiting: ClassVar[int] = 64
    """Requests of one connection that wait for the answer to the one before; each takes some 4 KB here, and 30 bytes to
    send."""
    largest_message: ClassVar[int] = 1024 * 1024
    """Bytes of one request with everything; no endpoint reads a sixteenth of it."""
    head_deadline: ClassVar[float] = 10.0
    """Seconds from the opening of the connection, or the first byte of a further request, to complete headers."""
    unread_deadline: ClassVar[float] = 30.0
    """Seconds for which a client may take nothing of what waits for it; the kernel counts them, also while we close."""

    _idle_of: ClassVar[WeakKeyDictionary[ServerState, dict[Self, None]]] = WeakKeyDictionary()
    """The connections of each server that wait for their clients, the longest waiting first."""

    _received = 0
    _in_head = True
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its parent has it
        """Make room, and start the clock for the first head."""
        super().connection_made(transport)
        _limit_silence(transport, self.unread_deadline)
        self._idle = self._idle_of.setdefault(self.server_state, {})
        most = self.config.limit_concurrency
        self.limit_concurrency = None  # the server's own way would answer 503 to whole requests
        if most is not None and len(self.connections) > most:
            longest = next(iter(self._idle), None)
            CONNECTIONS_SHED.labels("new" if longest is None else "idle").inc()
            if longest is None:
                self._end(_TOO_MANY)
                return
            del self._idle[longest]
            # Without a word, which its client could take for the answer to a request; nor is what it does not read
            # waited for.
            _hang_up(longest.transport)
        self._idle[self] = None
        self._deadline = self.loop.call_later(self.head_deadline, self._end, _TOO_SLOW)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """
        Count and parse; a head that is complete in its first piece, as nearly all are, never starts the clock.

        The wish for another protocol is ignored (RFC 9110 §7.8): Java's own client has it whenever there is no TLS, and
        the parser would take the body behind it for that protocol. It is taken out where clients put it, in the first
        piece; how it is met anywhere else, `on_headers_complete` says.
        """
        if self._in_head and not self._received and b"pgrade:" in data:
            data = _without_wish(data)
        self._received += len(data)
        super().data_received(data)
        if self._received > (self.largest_head if self._in_head else self.largest_message):
            self._end(_TOO_LARGE)
        elif self._in_head and self._received and self._deadline is None:
            self._deadline = self.loop.call_later(self.head_deadline, self._end, _TOO_SLOW)

    def on_headers_complete(self) -> None:
        """
        Stop the clock; the edge's own deadline holds for the body.

        Raises ValueError, which the parser takes for a malformed request, where it is more lenient than a proxy in
        front of us: it reads versions that have no headers, and drops what follows a `#` (RFC 9112 §3.2 has none).
        Also for a body behind a wish for another protocol that came in pieces: the parser takes the body for that
        protocol, drops as much of it as is there, and finds requests in the rest. So no request may follow such a wish,
        either. And for more requests than may wait: they come in one piece, before reading can be paused.
        """
        if b"#" in self.url or self.parser.get_http_version() not in _VERSIONS:
            raise ValueError("no request line of HTTP/1")
        other_protocol = self.parser.should_upgrade()
        if other_protocol and _announces_body(self.headers):
            raise ValueError("a body in another protocol")
        if len(self.pipeline) >= self.most_waiting:
            raise ValueError("too many requests at once")
        self._in_head = False
        self._stop_clock()
        if not self.flow.write_paused:
            self._idle.pop(self, None)
        super().on_headers_complete()
        if other_protocol:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; `msg` is the server's word for it, and nobody's business."""
        if not self.pipeline:  # or it would be taken for the answer to a request that waits
            self.transport.write(_MALFORMED)
        self.transport.close()

    def on_message_complete(self) -> None:
        """Begin to count the next request."""
        self._in_head, self._received = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin to wait for the client, unless its next request is there already."""
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # until those have been answered that are here
        waits = self.timeout_keep_alive_task is not None or self.transport.is_closing()
        if waits and self in self.connections:  # who has gone meanwhile would stay for ever
            self._idle[self] = None

    def pause_writing(self) -> None:
        """Begin to wait for the client: answers lie here, and it does not read."""
        super().pause_writing()
        self._idle[self] = None

    def resume_writing(self) -> None:
        """Go on with the request in progress, if there is one."""
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle.pop(self, None)

    def _end(self, answer: bytes) -> None:
        self._stop_clock()
        if not self.transport.is_closing():
            if self._in_head:  # with a request in progress its own answer may be half written
                self.transport.write(answer)
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _without_wish(data: bytes) -> bytes:
    """Return the beginning of a request with another name for the header field `Upgrade`, of the same length."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _WISH.sub(b"\r\nignored:", head) + end + rest


def _announces_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b" \t0")) for name, value in headers
    )


def _hang_up(transport: asyncio.Transport) -> None:
    """Close a connection; at once if its client does not read, for `close` would wait until it has."""
    if transport.get_write_buffer_size():
        transport.abort()
    else:
        transport.close()


def _limit_silence(transport: asyncio.Transport, seconds: float) -> None:
    """Let the kernel end a connection on which nothing is taken for so long, where it can (Linux)."""
    line = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
