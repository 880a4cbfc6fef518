"""The replicas' processes, and the one address that all of them are reached at."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import final

from tests.rotation.clock import ProofFailed, Slot, until
from tests.rotation.replica import Launch

_ROOT = Path(__file__).parents[2]
_START_DEADLINE = 60.0  # real seconds
_CHUNK = 64 * 1024


@final
class Replica:
    """One replica, which can be killed and started again; its port is another one each time."""

    def __init__(self, launch: Launch, slot: Slot, log: Path) -> None:
        self.name = launch.name
        self.slot = slot
        self.life = 0
        """How many times it was started."""
        self.serving = False
        """Whether requests may be sent to it: from its first answer until it is killed."""
        self._launch = launch
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._polled = (0, 0.0)

    @property
    def url(self) -> str:
        """Where it serves, without a slash at the end."""
        return f"http://127.0.0.1:{self.slot.port}"

    @property
    def died(self) -> bool:
        """Whether its process ended though nobody killed it."""
        return self.serving and self._process is not None and self._process.poll() is not None

    def since_poll(self) -> float:
        """Return for how many real seconds it has been seen to end no poll."""
        if self.slot.ended != self._polled[0]:
            self._polled = (self.slot.ended, time.monotonic())
        return time.monotonic() - self._polled[1]

    async def start(self) -> None:
        """Start the process and wait until it serves; raises ProofFailed with its log."""
        self.slot.clear()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        environment |= {"PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # takes a millisecond, and dies with this process
                [sys.executable, "-m", "tests.rotation.replica"],
                cwd=_ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the driver
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(self._launch)).encode() + b"\n")
        self._process.stdin.flush()
        process = self._process
        await until(
            lambda: self.slot.port > 0 or process.poll() is not None, f"{self.name} started", patience=_START_DEADLINE
        )
        if process.poll() is not None:
            raise ProofFailed(f"{self.name} did not start:\n{self.log_text()}")
        self.life += 1
        self._polled = (0, time.monotonic())
        self.serving = True

    def kill(self) -> None:
        """End the process as a crash would."""
        self.serving = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process = None

    def log_text(self) -> str:
        """Return everything it has written so far, in all its lives."""
        return self._log.read_text("utf-8", errors="replace") if self._log.exists() else ""


@final
class Relay:
    """
    The address that the issuer names: a load balancer that hands each connection to the next replica that serves.

    It needs a port before there is a replica, because a replica needs to know its issuer.
    """

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self._turns = itertools.count()
        self.replicas: Sequence[Replica] = ()

    @property
    def url(self) -> str:
        """The issuer."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @classmethod
    @asynccontextmanager
    async def listening(cls) -> AsyncIterator["Relay"]:
        """Listen on a free port of 127.0.0.1 until the block ends."""
        connections: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await relay._serve(reader, writer)
            finally:
                connections.discard(task)

        relay = cls(await asyncio.start_server(serve, "127.0.0.1", 0))
        try:
            yield relay
        finally:
            relay._server.close()
            for task in tuple(connections):
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            async with _closing(writer):
                serving = [replica for replica in self.replicas if replica.serving]
                if not serving:
                    return
                chosen = serving[next(self._turns) % len(serving)]
                answers, requests = await asyncio.open_connection("127.0.0.1", chosen.slot.port)
                async with _closing(requests):
                    ways = [
                        asyncio.create_task(_pipe(reader, requests)),
                        asyncio.create_task(_pipe(answers, writer)),
                    ]
                    try:
                        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for way in ways:
                            way.cancel()
                        await asyncio.gather(*ways, return_exceptions=True)


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        sink.write(data)
        await sink.drain()
