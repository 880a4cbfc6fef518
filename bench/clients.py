"""
Be the clients of a service that is being restarted: as many requests a second as were asked for, and not one given up.

Runs in a process of its own (`python -m bench.clients`). It reads one plan as a line of JSON and begins. Each further
line names what is going on from then on; an empty line ends it, and the answer is one line of JSON: a `Phase` for each.

A client whose connection ends before it has heard a word of an answer asks again on a new one, once, as HTTP lets it
do with a request that can be repeated (RFC 9110, section 9.2.2). All of these can: reading the keys, asking for a token
that nobody has used, and a refresh with an Idempotency-Key.
"""

import asyncio
import dataclasses
import json
import random
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import uvloop

from bench.load import Call, percentile

PATIENCE_SECONDS: Final = 15.0


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What the clients do: each takes turns with the `calls` that it shares and the refresh chain that is its own.

    `per_second` are the requests of all of them together.
    """

    port: int
    calls: tuple[Call, ...]
    chains: tuple[Call, ...]
    per_second: float


@dataclass(slots=True)
class Phase:
    """What the clients saw while something went on; latencies are in microseconds, and include asking again."""

    name: str
    seconds: float = 0.0
    requests: int = 0
    repeated: int = 0
    failed: int = 0
    complaint: str = ""
    p50_us: float = 0.0
    p99_us: float = 0.0
    longest_us: float = 0.0


@dataclass(slots=True)
class _Notes:
    phase: Phase
    began: float = field(default_factory=time.perf_counter)
    latencies: list[int] = field(default_factory=list)

    def sum_up(self) -> Phase:
        ascending = sorted(self.latencies)
        return dataclasses.replace(
            self.phase,
            seconds=time.perf_counter() - self.began,
            requests=len(ascending),
            p50_us=percentile(ascending, 0.50) / 1000,
            p99_us=percentile(ascending, 0.99) / 1000,
            longest_us=(ascending[-1] if ascending else 0) / 1000,
        )


class _CutOff(Exception):
    """The connection ended before a word of the answer was heard."""


class _Client:
    """One client with one connection, which it keeps for as long as it is let."""

    def __init__(self, plan: Plan, chain: Call, notes: Callable[[], _Notes]) -> None:
        self._plan = plan
        self._notes = notes
        self._chain = chain
        self._refresh_token = chain.carried
        self._key = secrets.token_hex(16)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, over: asyncio.Event) -> None:
        """Ask again and again, at moments of its own, until it is over."""
        pause = len(self._plan.chains) / self._plan.per_second
        turn = random.randrange(len(self._plan.calls) + 1)  # noqa: S311  # who comes when is no secret
        due = time.perf_counter() + pause * random.random()  # noqa: S311
        while not over.is_set():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due = max(due + pause, time.perf_counter())
            turn = (turn + 1) % (len(self._plan.calls) + 1)
            await (self._read(self._plan.calls[turn]) if turn < len(self._plan.calls) else self._refresh())
        self._close()

    async def _read(self, call: Call) -> None:
        await self._ask(call.head, call.body)

    async def _refresh(self) -> None:
        head = f"{self._chain.head}\r\nIdempotency-Key: {self._key}"
        answer = await self._ask(head, self._chain.body + self._refresh_token)
        if answer is not None:  # or it is the same rotation that is asked for the next time
            self._refresh_token, self._key = json.loads(answer)["refresh_token"], secrets.token_hex(16)

    async def _ask(self, head: str, body: str) -> bytes | None:
        """Return the answer to a request, asking a second time where the first came to nothing; note how it went."""
        notes, began = self._notes(), time.perf_counter_ns()
        content = body.encode()
        request = head.encode() + (b"\r\nContent-Length: %d" % len(content) if content else b"") + b"\r\n\r\n" + content
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                if self._streams is not None and self._streams[0].at_eof():
                    self._close()  # it was closed while nothing was asked, as anybody may do at any time
                kept = self._streams is not None
                try:
                    status, answer = await self._exchange(request)
                except _CutOff:
                    if not kept:
                        raise
                    notes.phase.repeated += 1
                    status, answer = await self._exchange(request)
        except (_CutOff, OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            self._close()
            status, answer = 0, f"{type(error).__name__}: {error}".encode()
        notes.latencies.append(time.perf_counter_ns() - began)
        if status == 200:
            return answer
        notes.phase.failed += 1
        notes.phase.complaint = notes.phase.complaint or f"{status} {answer[:300].decode(errors='replace')}"
        return None

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._plan.port)
        reader, writer = self._streams
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self._close()
            if getattr(error, "partial", b""):
                raise
            raise _CutOff(type(error).__name__) from error
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection", "").lower() == "close":
            self._close()
        return int(status.split(" ")[1]), answer

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _main() -> None:
    """Follow the protocol told at the top of this module."""
    loop = asyncio.get_running_loop()
    wanted = json.loads(sys.stdin.readline())
    plan = Plan(**{**wanted, **{name: tuple(Call(**call) for call in wanted[name]) for name in ("calls", "chains")}})
    notes = _Notes(Phase("beginning"))
    over = asyncio.Event()
    clients = [_Client(plan, chain, lambda: notes) for chain in plan.chains]
    running = asyncio.gather(*(client.run(over) for client in clients))
    phases = []
    while name := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        phases.append(notes.sum_up())
        notes = _Notes(Phase(name))
    over.set()
    await running
    phases.append(notes.sum_up())
    print(json.dumps([dataclasses.asdict(phase) for phase in phases]), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
