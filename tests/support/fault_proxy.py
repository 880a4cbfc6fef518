"""
A TCP proxy in a test's hand: what PostgreSQL, Redis or a mail server behind a bad network look like.

A server that is stopped shows one kind of outage only. The proxy refuses, resets, falls silent or delays at any moment,
or cuts a connection at a chosen place of the conversation: after COMMIT was sent and before its answer came.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self, final

from sqlalchemy.engine import make_url

from tests.support.loop_thread import LoopThread, all_are_connected

Stream = Literal["to_server", "to_client"]
"""Which half of a conversation: what the client says, or what the server says."""
Place = bytes | int | Callable[[bytes], bool]
"""Where to cut: at the piece that completes these bytes, after so many bytes, or when the function says so."""

_HOST: Final = "127.0.0.1"
_PIECE: Final = 64 * 1024
_DEFAULT_PORTS: Final = {"postgresql": 5432, "redis": 6379}
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@final
@dataclass(eq=False)
class _Connection:
    """A client that was accepted and, once the server has been reached, its counterpart."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    task: "asyncio.Task[None] | None" = None

    def reset(self, *, spare: asyncio.StreamWriter | None = None) -> None:
        """End it with RST at both sides; `spare` gets what was written to it first, and an ordinary end."""
        for writer in (self.client, self.server):
            if writer is None:
                continue
            if writer is spare:
                writer.close()
                continue
            with contextlib.suppress(OSError):  # it is closed already
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


@final
@dataclass
class _Cut:
    """One connection is to be cut at a place of one stream; what went by is counted from the moment this was said."""

    place: Place
    stream: Stream
    deliver: bool
    seen: dict[_Connection, bytearray] = field(default_factory=dict)

    def judge(self, connection: _Connection, stream: Stream, piece: bytes) -> int | None:
        """Return how much of the piece is still delivered, or None when this is not the place."""
        if stream != self.stream:
            return None
        seen = self.seen.setdefault(connection, bytearray())
        seen += piece
        if isinstance(self.place, int):
            if len(seen) < self.place:
                return None
            return len(piece) - (len(seen) - self.place) if self.deliver else 0
        here = self.place in seen if isinstance(self.place, bytes) else self.place(bytes(seen))
        if not here:
            return None
        return len(piece) if self.deliver else 0


@final
class FaultProxy:
    """
    Hands connections on from a port of its own on 127.0.0.1 to a server, and does to them what it is told.

    It lives in a thread with an event loop of its own, so that coroutines, threads and other processes may all talk
    through it. Enter it with `with` or `async with`; every switch has taken effect when its method returns.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._connections: set[_Connection] = set()
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._delay = 0.0
        self._cut: _Cut | None = None
        self.port = 0
        """Where it listens, once it was entered."""
        self.connections = 0
        """How many connections were accepted since the beginning."""
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        """How much was handed on."""
        self.cuts = 0
        """How often `cut_after` found its place."""

    @classmethod
    def before(cls, url: str) -> Self:
        """Return a proxy for the server that a database's or Redis' URL names."""
        address = make_url(url)
        return cls(address.host or _HOST, address.port or _DEFAULT_PORTS[address.get_backend_name()])

    def through(self, url: str) -> str:
        """Return a URL with the proxy's address in the place of the server's."""
        return make_url(url).set(host=_HOST, port=self.port).render_as_string(hide_password=False)

    @property
    def live(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    # -- switches -------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Refuse new connections, as a machine without the server does; those that are open stay."""
        self._own.do(self._stop_listening())

    def cut(self) -> None:
        """Reset every open connection now; new ones are accepted as before."""
        self._own.do(self._reset_all())

    def blackhole(self) -> None:
        """Accept connections and hand nothing on, in either direction; what is sent meanwhile arrives after `heal`."""

        async def swallow() -> None:
            self._flowing.clear()
            await self._listen()

        self._own.do(swallow())

    def delay(self, seconds: float) -> None:
        """Hold back each piece for so long, in both directions; 0 ends it."""

        async def slow_down() -> None:
            self._delay = seconds

        self._own.do(slow_down())

    def cut_after(self, place: Place, *, stream: Stream = "to_server", deliver: bool = True) -> None:
        """
        Cut the first connection that comes to `place`, once: the other side hears no more from it.

        Delivered to the server, the piece is the last thing it hears, and nobody hears its answer. Whether it has
        acted on it by then, nobody knows; to be sure, cut where its answer goes by, undelivered:
        `cut_after(b"COMMIT", stream="to_client", deliver=False)`, PostgreSQL's word for a transaction that is done.
        """

        async def arm() -> None:
            self._cut = _Cut(place, stream, deliver)

        self._own.do(arm())

    def heal(self) -> None:
        """Be a good proxy again, and forget a cut that has not come about."""

        async def undo() -> None:
            self._cut, self._delay = None, 0.0
            self._flowing.set()
            await self._listen()

        self._own.do(undo())

    # -- its life -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._own = LoopThread("fault-proxy")
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._listener = _bound(0)
        self.port = self._listener.getsockname()[1]
        self._own.do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.do(self._close())
        self._own.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    async def _listen(self) -> None:
        if self._server is None:
            listener, self._listener = self._listener, None
            self._server = await asyncio.start_server(self._accept, sock=listener)

    async def _stop_listening(self) -> None:
        """Close the listener; its port stays ours, so that nobody else answers there, and is refused to everybody."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._listener = _bound(self.port)

    async def _close(self) -> None:
        await self._stop_listening()
        if self._listener is not None:
            self._listener.close()
        await all_are_connected()
        await self._reset_all()

    async def _reset_all(self) -> None:
        tasks = [connection.task for connection in self._connections if connection.task is not None]
        for connection in tuple(self._connections):
            connection.reset()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close their sockets in the loop's next turn

    # -- handing on -----------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(writer)
        self._connections.add(connection)
        connection.task = asyncio.create_task(self._serve(connection, reader))

    async def _serve(self, connection: _Connection, requests: asyncio.StreamReader) -> None:
        ways: list[asyncio.Task[None]] = []
        try:
            await self._flowing.wait()
            answers, connection.server = await asyncio.open_connection(*self._target)
            ways = [
                asyncio.create_task(self._carry(connection, "to_server", requests, connection.server)),
                asyncio.create_task(self._carry(connection, "to_client", answers, connection.client)),
            ]
            await asyncio.gather(*ways)
        except OSError:  # one side is gone, or was never there; the other shall notice
            connection.reset()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (connection.client, connection.server):
                if writer is not None:
                    writer.close()
            self._connections.discard(connection)

    async def _carry(
        self, connection: _Connection, stream: Stream, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while piece := await source.read(_PIECE):
            if self._delay:
                await asyncio.sleep(self._delay)
            await self._flowing.wait()
            delivered = self._cut.judge(connection, stream, piece) if self._cut is not None else None
            wanted = piece if delivered is None else piece[:delivered]
            if wanted:
                sink.write(wanted)
                self._count(stream, len(wanted))
            if delivered is not None:
                self._cut = None
                self.cuts += 1
                connection.reset(spare=sink if wanted else None)
                return
            await sink.drain()
        await self._flowing.wait()
        if not sink.is_closing() and sink.can_write_eof():
            sink.write_eof()

    def _count(self, stream: Stream, size: int) -> None:
        if stream == "to_server":
            self.bytes_to_server += size
        else:
            self.bytes_to_client += size


def _bound(port: int) -> socket.socket:
    """Return a socket that has the port and does not listen: whoever connects to it is refused."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((_HOST, port))
    return bound
