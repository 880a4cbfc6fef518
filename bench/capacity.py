"""
Measure what an operator plans with: the memory of one process and what adds to it, and sign-ins on one core.

The worker has its core for itself, as in the other measurements; PostgreSQL and the load generator share the other one.
"""

import contextlib
import resource
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import machine
from bench.load import Plan
from bench.measure import Load
from bench.service import BenchError, Service
from tests.support.servers import DURABLE, own_postgres

CONNECTIONS = 1000
_FEW, _MANY = 1, 4  # threads of the pool for hashing
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
DEFAULT_KIB, LARGE_KIB = 19456, 65536


@dataclass(frozen=True, slots=True)
class SignIns:
    """
    Sign-ins at one memory of Argon2, in KiB: CPU milliseconds of the worker for each, and what a hashing thread takes.

    `per_second` is what was reached on the core, which others may have been using, too.
    """

    memory_kib: int
    cpu_ms: float
    per_second: float
    bytes_per_thread: float

    @property
    def per_core(self) -> float:
        """How many a core can do in a second that does nothing else."""
        return 1000 / self.cpu_ms


@dataclass(frozen=True, slots=True)
class Capacity:
    """The memory of one process in bytes (PSS): idle, and with so many connections that say nothing; and sign-ins."""

    idle_bytes: int
    connected_bytes: int
    connections: int
    sign_ins: tuple[SignIns, ...]

    @property
    def bytes_per_connection(self) -> float:
        """What one connection takes that has asked once and says nothing more."""
        return (self.connected_bytes - self.idle_bytes) / self.connections


def measure_capacity(cores: machine.Cores, *, runs: int, seconds: float) -> Capacity:
    """Measure on a database of its own; takes about a minute and a half. Raises BenchError."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="identity-bench-")))
        server = stack.enter_context(own_postgres(DURABLE))
        service = stack.enter_context(Service(server, cores, folder / "worker.log"))
        with _started(service, {"IDENTITY_MAX_CONNECTIONS": str(2 * CONNECTIONS)}):
            idle = machine.pss_bytes(service.pid)
            with contextlib.ExitStack() as crowd:
                _connect(service.port, CONNECTIONS, crowd)
                connected = machine.pss_bytes(service.pid)
        sign_ins = tuple(_sign_ins(service, kib, runs=runs, seconds=seconds) for kib in (DEFAULT_KIB, LARGE_KIB))
    return Capacity(idle, connected, CONNECTIONS, sign_ins)


def _connect(port: int, number: int, crowd: contextlib.ExitStack) -> None:
    """Open connections, ask once on each, and say nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number + 200, hard), hard))
    for _ in range(number):
        line = crowd.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        line.sendall(_REQUEST)
        if b" 200 " not in line.recv(65536):
            raise BenchError("A connection was not served.")


def _sign_ins(service: Service, memory_kib: int, *, runs: int, seconds: float) -> SignIns:
    """Sign people in whose passwords are stored with this memory, as fast as one core hashes."""
    peaks, found = {}, []
    for threads in (_FEW, _MANY):
        changes = {
            "IDENTITY_ARGON2_MEMORY_KIB": str(memory_kib),
            "IDENTITY_HASH_THREADS": str(threads),
            "IDENTITY_HASH_WAIT": "30",  # nobody shall be sent away here
        }
        with _started(service, changes):
            people = [service.user(f"bench-{memory_kib}-{number}") for number in range(_MANY)]
            calls = tuple(service.sign_in_call(person) for person in people)
            plan = Plan(service.port, calls, '"access_token"')
            with Load(plan, service.cores.load) as load:
                load.run(min(seconds, 2.0))
                for _ in range(runs if threads == _FEW else 1):
                    before = machine.cpu_seconds(service.pid)
                    run = load.run(seconds)
                    if run.wrong:
                        raise BenchError(f"A sign-in went wrong: {run.complaint}")
                    if threads == _FEW:
                        found.append((run, machine.cpu_seconds(service.pid) - before))
            peaks[threads] = machine.peak_bytes(service.pid)
    return SignIns(
        memory_kib,
        cpu_ms=median(used * 1000 / run.requests for run, used in found),
        per_second=median(run.requests / run.seconds for run, _ in found),
        bytes_per_thread=(peaks[_MANY] - peaks[_FEW]) / (_MANY - _FEW),
    )


@contextlib.contextmanager
def _started(service: Service, changes: Mapping[str, str]) -> Iterator[None]:
    """Run the worker with other settings."""
    before = dict(service.environment)
    service.environment.update(changes)
    service.start()
    try:
        yield
    finally:
        service.stop()
        service.environment.clear()
        service.environment.update(before)
