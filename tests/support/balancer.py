"""
A load balancer in a test's hand: what stands before the replicas in production, small enough to reason about.

It works on connections, as the network of a cluster does: each new one goes to the next replica that was ready when it
was last asked, and stays there however many requests it carries. Readiness is asked a few times a second on the
management listener, and what was found may be heard of late, as in a cluster, where every node learns it in its own
time. A connection that a replica does not take is nobody's to mend: its client is cut off, and it is counted.
"""

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, final

from tests.support.loop_thread import LoopThread, all_are_connected

_HOST: Final = "127.0.0.1"
_PIECE: Final = 64 * 1024
_PROBE_PATIENCE: Final = 1.0  # seconds for an answer about readiness; no answer is one, too
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@final
@dataclass(eq=False)
class Backend:
    """A replica as the balancer knows it."""

    name: str
    port: int
    management_port: int
    ready: bool = False
    """Whether it gets new connections."""
    served: int = 0
    """How many connections it took."""
    refused: int = 0
    """How many it did not take."""
    probing: "asyncio.Task[None] | None" = field(default=None, repr=False)


@final
class Balancer:
    """
    Hands connections on from a port of its own on 127.0.0.1 to those replicas that are ready.

    It lives in a thread with an event loop of its own, so that coroutines, threads and other processes may all talk
    through it. Enter it with `with`; every method has taken effect when it returns.
    """

    def __init__(
        self, *, every: float = 0.2, late: float = 0.0, patience: float = _PROBE_PATIENCE, heeds_readiness: bool = True
    ) -> None:
        """
        `every` is how many seconds lie between two questions about readiness, `late` after how many more an answer
        counts, `patience` how long one is waited for. A balancer that does not heed readiness sends connections to
        everybody it knows.
        """
        self._every = every
        self._late = late
        self._patience = patience
        self._heeds_readiness = heeds_readiness
        self._backends: dict[str, Backend] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._turn = 0
        self.port = 0
        """Where it listens, once it was entered."""
        self.turned_away = 0
        """How many connections found no replica that was ready."""

    @property
    def url(self) -> str:
        """Where clients go, without a slash at the end."""
        return f"http://{_HOST}:{self.port}"

    def put(self, name: str, port: int, management_port: int) -> Backend:
        """Know a replica by this name from now on, in the place of one that had it; it must be seen to be ready."""

        async def know() -> Backend:
            await self._forget(name)
            backend = self._backends[name] = Backend(name, port, management_port)
            backend.probing = asyncio.create_task(self._watch(backend))
            return backend

        return self._own.do(know())

    def drop(self, name: str) -> None:
        """Forget a replica; connections that it has stay."""
        self._own.do(self._forget(name))

    def backend(self, name: str) -> Backend:
        """Return a replica by its name."""
        return self._backends[name]

    # -- its life -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._own = LoopThread("balancer")
        self._server = self._own.do(asyncio.start_server(self._accept, _HOST, 0, backlog=1024))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.do(self._close())
        self._own.close()

    async def _close(self) -> None:
        self._server.close()
        for name in tuple(self._backends):
            await self._forget(name)
        await all_are_connected()
        for writer in tuple(self._open):
            writer.transport.abort()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close their sockets in the loop's next turn

    async def _forget(self, name: str) -> None:
        backend = self._backends.pop(name, None)
        if backend is not None and backend.probing is not None:
            backend.probing.cancel()
            await asyncio.gather(backend.probing, return_exceptions=True)

    # -- readiness ------------------------------------------------------------------------------------------------

    async def _watch(self, backend: Backend) -> None:
        """Ask one replica for its readiness until cancelled."""
        while True:
            ready = await self._is_ready(backend) if self._heeds_readiness else True
            asyncio.get_running_loop().call_later(self._late, self._hear, backend, ready)
            await asyncio.sleep(self._every)

    @staticmethod
    def _hear(backend: Backend, ready: bool) -> None:
        backend.ready = ready

    async def _is_ready(self, backend: Backend) -> bool:
        try:
            async with asyncio.timeout(self._patience):
                reader, writer = await asyncio.open_connection(_HOST, backend.management_port)
                try:
                    writer.write(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                    return (await reader.readline()).split(b" ", 2)[1:2] == [b"200"]
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    # -- handing on -----------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, requests: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        backend = self._next()
        if backend is None:
            self.turned_away += 1
            await self._end(client, reset=True)
            return
        try:
            answers, server = await asyncio.open_connection(_HOST, backend.port)
        except OSError:
            backend.refused += 1
            await self._end(client, reset=True)
            return
        self._open.add(server)
        backend.served += 1
        ways = [
            asyncio.create_task(_carry(requests, server)),
            asyncio.create_task(_carry(answers, client)),
        ]
        cut_off = False
        try:
            await asyncio.gather(*ways)
        except OSError:  # one side was; so is the other
            cut_off = True
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (client, server):
                await self._end(writer, reset=cut_off)

    async def _end(self, writer: asyncio.StreamWriter, *, reset: bool) -> None:
        """End a connection, in good order or with RST; return when it is closed."""
        with contextlib.suppress(OSError):  # it is closed already
            if reset:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                writer.transport.abort()
            writer.close()
            await writer.wait_closed()
        self._open.discard(writer)

    def _next(self) -> Backend | None:
        """Return whose turn it is among those that are ready."""
        ready = [backend for backend in self._backends.values() if backend.ready]
        if not ready:
            return None
        self._turn += 1
        return ready[self._turn % len(ready)]


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Hand on what comes, and its end."""
    while piece := await source.read(_PIECE):
        sink.write(piece)
        await sink.drain()
    if not sink.is_closing() and sink.can_write_eof():
        sink.write_eof()
