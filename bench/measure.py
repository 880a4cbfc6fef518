"""Put load on the service and read what it cost."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from bench import machine
from bench.load import Call, Plan, Run
from bench.operations import Operation
from bench.service import BenchError, Service

WARM_UP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One run, and the CPU microseconds per request that the worker and the database spent on it.

    `disturbance` is how many cores' worth of CPU went elsewhere meanwhile: to processes that are none of ours.
    """

    run: Run
    service_us: float
    database_us: float
    disturbance: float

    @property
    def per_second(self) -> float:
        """Requests answered rightly per second."""
        return self.run.requests / self.run.seconds

    @property
    def busy(self) -> float:
        """The share (0 to 1) of the service's core that the worker used."""
        return self.service_us * self.per_second / 1e6


@dataclass(frozen=True, slots=True)
class Result:
    """All runs of one operation, and the worker's memory in bytes (PSS) at the end of the last one."""

    name: str
    connections: int
    samples: tuple[Sample, ...]
    pss_bytes: int

    @property
    def per_second(self) -> float:
        """Requests per second, the median of the runs."""
        return median(sample.per_second for sample in self.samples)

    @property
    def disturbance(self) -> float:
        """How many cores' worth of CPU went to others, the median of the runs."""
        return median(sample.disturbance for sample in self.samples)

    @property
    def wrong(self) -> int:
        """How many answers were wrong; each ends its connection, so a few mean many."""
        return sum(sample.run.wrong for sample in self.samples)

    @property
    def complaint(self) -> str:
        """The first wrong answer, or nothing."""
        return next((sample.run.complaint for sample in self.samples if sample.run.wrong), "")


class Load:
    """The load generator's process, with the connections of one plan open."""

    def __init__(self, plan: Plan, *cores: int) -> None:
        with machine.on_core(*cores):
            self._process = _start("bench.load")
        self._say(json.dumps(dataclasses.asdict(plan)))

    def __enter__(self) -> Self:
        """Return the generator."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections and end the process."""
        _stop(self._process)

    def run(self, seconds: float) -> Run:
        """Load the service for so many seconds."""
        return Run(**self._say(str(seconds)))

    def _say(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("The load generator ended; its own words are above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(operation: Operation, service: Service, *, runs: int, seconds: float) -> Result:
    """Prepare the operation, warm up for up to 2 s, then make `runs` runs of `seconds` each; stop at a wrong answer."""
    plan = operation.plan(service)
    samples: list[Sample] = []
    with Load(plan, service.cores.load) as load, _others(operation, service):
        warm_up = load.run(min(seconds, WARM_UP_SECONDS))
        if warm_up.wrong:
            service.check_running()
            return Result(operation.name, operation.connections, (Sample(warm_up, 0, 0, 0),), 0)
        while len(samples) < runs and not (samples and samples[-1].run.wrong):
            before = _Spent.by(service)
            run = load.run(seconds)
            spent = _Spent.by(service).since(before)
            per_request = 1e6 / max(run.requests, 1)
            samples.append(
                Sample(
                    run,
                    service_us=spent.service * per_request,
                    database_us=spent.database * per_request,
                    disturbance=max(0.0, spent.anybody - spent.ours) / run.seconds,
                )
            )
        service.check_running()
        memory = machine.pss_bytes(service.pid)
    return Result(operation.name, operation.connections, tuple(samples), memory)


@contextlib.contextmanager
def _others(operation: Operation, service: Service) -> Iterator[None]:
    """Keep up, from a process of its own, the load of those who ask for something else meanwhile."""
    if operation.beside is None:
        yield
        return
    with Load(operation.beside.plan(service), service.cores.load) as load:
        over = threading.Event()

        def keep_up() -> None:
            while not over.is_set():
                load.run(1.0)

        thread = threading.Thread(target=keep_up)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def generator_ceiling(cores: machine.Cores, seconds: float = 1.0) -> float:
    """Measure the requests per second that the generator makes of a server that does nothing: its own limit."""
    with machine.on_core(cores.service):
        server = _start("bench.load", "constant")
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        call = Call("GET / HTTP/1.1\r\nHost: 127.0.0.1")
        with Load(Plan(port=port, calls=(call,) * 16, marker="ok"), cores.load) as load:
            load.run(seconds / 4)
            run = load.run(seconds)
    finally:
        _stop(server)
    if run.wrong:
        raise BenchError(f"The load generator does not get on with a trivial server: {run.complaint}")
    return run.requests / run.seconds


def start_times(service: Service, starts: int) -> list[float]:
    """Start the worker anew, `starts` times on the same database; return each time's seconds to the first token."""
    service.start()  # makes the first signing keys, which is no part of a start on an existing database
    times = []
    for _ in range(starts):
        service.stop()
        times.append(service.start())
        time.sleep(0.1)
    return times


@dataclass(frozen=True, slots=True)
class _Spent:
    """CPU seconds: the worker's, the database's, those of all that we started, and everybody's on our cores."""

    service: float
    database: float
    ours: float
    anybody: float

    @classmethod
    def by(cls, service: Service) -> Self:
        return cls(
            machine.cpu_seconds(service.pid),
            machine.cpu_seconds(service.database_pid),
            machine.cpu_seconds(os.getpid()),
            machine.busy_seconds(service.cores),
        )

    def since(self, before: Self) -> Self:
        return type(self)(
            self.service - before.service,
            self.database - before.database,
            self.ours - before.ours,
            self.anybody - before.anybody,
        )


def _start(*module: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _stop(process: "subprocess.Popen[str]") -> None:
    process.communicate()  # closing standard input is what ends it
