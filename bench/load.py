"""
Generate load: as few instructions per request as Python allows, so that the service is what is measured.

Runs in a process of its own (`python -m bench.load`). It reads one plan as a line of JSON, opens the plan's
connections, then answers each further line (the seconds to run) with one line of JSON, a `Run`. Connections, and the
refresh chains they carry, live on from run to run.
"""

import asyncio
import dataclasses
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import uvloop

PATIENCE_SECONDS = 30.0
NANOSECONDS = 1_000_000_000
CONSTANT_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok"


@dataclass(frozen=True, slots=True)
class Call:
    """
    What one connection sends again and again.

    `head` is the request line and the headers, without Content-Length and without the empty line; the body is `body`
    followed by `carried`, the part that the answer to each request replaces when the plan says so. `turns` are the
    heads of requests without a body that take turns with it.
    """

    head: str
    body: str = ""
    carried: str = ""
    turns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """
    One operation's load: a connection for each call, and what makes an answer right.

    An answer is right when its status is `status` (0: any) and its body contains `marker`. `carry` names the JSON
    string member of the answer that becomes the `carried` part of the next request; empty: every request is the same.
    """

    port: int
    calls: tuple[Call, ...]
    marker: str
    status: int = 200
    carry: str = ""
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run saw: right answers, the seconds they took, their latencies in microseconds, and wrong answers."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    wrong: int
    complaint: str = ""


def percentile(ascending: list[int], share: float) -> float:
    """Pick the value below which `share` (0 to 1) of the ascending values lie; 0 when there is none."""
    return float(ascending[min(len(ascending) - 1, int(len(ascending) * share))]) if ascending else 0.0


class Connection(asyncio.Protocol):
    """One keep-alive connection that sends its next request the moment the answer to the last one has come."""

    def __init__(self, plan: Plan, call: Call) -> None:
        self._status = str(plan.status).encode() if plan.status else b""
        self._marker = plan.marker.encode()
        self._carry = f'"{plan.carry}":'.encode() if plan.carry else b""
        self._head, self._body = call.head.encode(), call.body.encode()
        self._request = self._compose(call.carried.encode())
        bare = [head.encode() + b"\r\n\r\n" for head in call.turns]
        self._turns = itertools.cycle([*bare, self._request]) if bare else None
        self._transport: asyncio.Transport | None = None
        self._partial = b""
        self._busy = False
        self._sent = self._deadline = 0
        self._finished: Callable[[], None] = lambda: None
        self.latencies: list[int] = []
        self.complaints: list[str] = []

    def run(self, until: int, finished: Callable[[], None]) -> None:
        """Send requests until the clock (`perf_counter_ns`) reads `until`; call `finished` after the last answer."""
        self.latencies, self.complaints = [], []
        self._deadline, self._finished = until, finished
        if self._transport is None or self._transport.is_closing():
            self._give_up("the connection is closed")
            return
        self._busy = True
        self._sent = time.perf_counter_ns()
        self._transport.write(self._request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own does not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a request that will never be answered as wrong."""
        self._transport = None
        if self._busy:
            self._give_up(f"the connection was lost: {exc}")

    def data_received(self, data: bytes) -> None:
        """Take the answer, judge it, send the next request."""
        if self._partial:
            data = self._partial + data
        end = data.find(b"\r\n\r\n")
        length = self._length(data, end) if end >= 0 else 0
        if end < 0 or len(data) < end + 4 + length:
            self._partial = data
            return
        self._partial = b""
        now = time.perf_counter_ns()
        if length < 0 or not data.startswith(self._status, 9) or data.find(self._marker, end) < 0:
            self._give_up(data[:600].decode("latin-1"))
            return
        if self._carry:
            at = data.find(self._carry, end)
            opening = data.find(b'"', at + len(self._carry)) + 1
            if at < 0:
                self._give_up(data[:600].decode("latin-1"))
                return
            self._request = self._compose(data[opening : data.find(b'"', opening)])
        elif self._turns is not None:
            self._request = next(self._turns)
        self.latencies.append(now - self._sent)
        if now < self._deadline:
            assert self._transport is not None
            self._sent = now
            self._transport.write(self._request)
        else:
            self._busy = False
            self._finished()

    def _compose(self, carried: bytes) -> bytes:
        body = self._body + carried
        length = b"\r\nContent-Length: %d" % len(body) if body else b""
        return self._head + length + b"\r\n\r\n" + body

    def _length(self, data: bytes, end: int) -> int:
        """Read Content-Length; -1 when there is none (nothing that is measured here answers in chunks)."""
        at = data.find(b"\r\ncontent-length:", 0, end)
        if at < 0:
            at = data[:end].lower().find(b"\r\ncontent-length:")
        return int(data[at + 17 : data.find(b"\r", at + 17)]) if at >= 0 else -1

    def _give_up(self, complaint: str) -> None:
        """Note a wrong answer and stop: what follows on a broken chain would say nothing."""
        self._busy = False
        self.complaints.append(complaint)
        if self._transport is not None:
            self._transport.close()
        self._finished()

    def overdue(self) -> None:
        """Give up on an answer that has not come in time."""
        if self._busy:
            self._give_up(f"no answer {PATIENCE_SECONDS:.0f} s after the end of the run")


class Generator:
    """All connections of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._connections: list[Connection] = []

    async def connect(self) -> None:
        """Open every connection, one for each call of the plan."""
        loop = asyncio.get_running_loop()
        for call in self._plan.calls:
            _, connection = await loop.create_connection(
                functools.partial(Connection, self._plan, call), self._plan.host, self._plan.port
            )
            self._connections.append(connection)

    async def run(self, seconds: float) -> Run:
        """Load the service for `seconds`, wait for the last answers and sum up; an answer that is overdue is wrong."""
        everybody_done = asyncio.Event()
        running = len(self._connections)

        def finished() -> None:
            nonlocal running
            running -= 1
            if not running:
                everybody_done.set()

        gc.collect()
        gc.disable()
        began = time.perf_counter_ns()
        for connection in self._connections:
            connection.run(began + int(seconds * NANOSECONDS), finished)
        try:
            await asyncio.wait_for(everybody_done.wait(), seconds + PATIENCE_SECONDS)
        except TimeoutError:
            for connection in self._connections:
                connection.overdue()
        took = (time.perf_counter_ns() - began) / NANOSECONDS
        gc.enable()
        latencies = sorted(latency for connection in self._connections for latency in connection.latencies)
        complaints = [complaint for connection in self._connections for complaint in connection.complaints]
        return Run(
            requests=len(latencies),
            seconds=took,
            p50_us=percentile(latencies, 0.50) / 1000,
            p99_us=percentile(latencies, 0.99) / 1000,
            wrong=len(complaints),
            complaint=complaints[0] if complaints else "",
        )


class ConstantServer(asyncio.Protocol):
    """Answer everything with the same bytes: the cheapest server there is, to find the generator's own ceiling."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own does not inherit from it

    def data_received(self, data: bytes) -> None:
        """Answer without reading."""
        self._transport.write(CONSTANT_ANSWER)


async def _serve_constant() -> None:
    """Serve until standard input ends; the first line of output is the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(ConstantServer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def _generate() -> None:
    """Follow the protocol told at the top of this module."""
    loop = asyncio.get_running_loop()
    wanted = json.loads(sys.stdin.readline())
    plan = Plan(**{**wanted, "calls": tuple(Call(**call) for call in wanted["calls"])})
    generator = Generator(plan)
    await generator.connect()
    print(json.dumps({"connections": len(plan.calls)}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(dataclasses.asdict(await generator.run(float(line)))), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve_constant() if sys.argv[1:] == ["constant"] else _generate())
