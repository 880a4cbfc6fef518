"""
Two replicas behind nginx, on PostgreSQL and Redis: what the second one adds, and what nginx and PgBouncer cost.

Nothing is pinned to a core here: replicas, nginx, databases and the load generator share all there are, as the kernel
thinks best. On two cores two replicas therefore add less than they would on machines of their own. The contenders take
turns, round by round, and are compared within a round.
"""

import contextlib
import http.client
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from bench import machine
from bench.load import Plan, Run
from bench.measure import WARM_UP_SECONDS, Load
from bench.nginx import Nginx
from bench.operations import OPERATIONS, Operation
from bench.service import COMMAND, START_PATIENCE_SECONDS, BenchError, Service
from tests.support.pgbouncer import PgBouncer, give_defaults
from tests.support.servers import DURABLE, free_port, own_postgres, own_redis

DIRECT = "one replica"
ONE = "one behind nginx"
TWO = "two behind nginx"
POOLED = "one through PgBouncer"
CONTENDERS = (DIRECT, ONE, TWO, POOLED)
MEASURED = ("client_credentials", "refresh_token", "jwks")
DRAIN_SECONDS = 3
_STOP_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """One run, and CPU microseconds per request: of the replicas, of nginx and PgBouncer, and of PostgreSQL."""

    run: Run
    service_us: float
    proxy_us: float
    database_us: float

    @property
    def per_second(self) -> float:
        """Requests answered rightly per second."""
        return self.run.requests / self.run.seconds


@dataclass(frozen=True, slots=True)
class FleetResult:
    """One operation: the runs of each contender, of the same number of rounds."""

    name: str
    connections: int
    rounds: Mapping[str, Sequence[Sample]]

    def ratio(self, contender: str, other: str) -> float:
        """Tell how many times as fast one is as another: the median of the rounds' own ratios."""
        pairs = zip(self.rounds[contender], self.rounds[other], strict=True)
        return median(one.per_second / max(two.per_second, 1e-9) for one, two in pairs)

    @property
    def wrong(self) -> int:
        """How many answers were wrong; each ends its connection."""
        return sum(sample.run.wrong for samples in self.rounds.values() for sample in samples)

    @property
    def complaint(self) -> str:
        """The first wrong answer, or nothing."""
        samples = (sample for samples in self.rounds.values() for sample in samples)
        return next((sample.run.complaint for sample in samples if sample.run.wrong), "")


class Replica:
    """A server of the fleet, on a public and a management port of its own. Leave it with `close`."""

    def __init__(self, environment: Mapping[str, str], log: Path, *, port: int = 0) -> None:
        """Start it on this port, or on a free one; it is not ready yet."""
        self.port = port or free_port()
        self._management_port = free_port()
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*COMMAND, "serve", "--host", "127.0.0.1", "--port", str(self.port)],
                env={**environment, "IDENTITY_MANAGEMENT_PORT": str(self._management_port)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return when it says that it is ready; raises BenchError with the end of its log."""
        deadline = time.monotonic() + START_PATIENCE_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"A replica did not become ready:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        """Tell it to leave in good order, and return at once."""
        self._process.send_signal(signal.SIGTERM)

    def wait_until_gone(self) -> None:
        """Return when it has left; raises BenchError when it does not, or not in good order."""
        try:
            status = self._process.wait(_STOP_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise BenchError("A replica does not leave.") from None
        if status:
            raise BenchError(f"A replica ended with {status}:\n{self._log.read_text(errors='replace')[-2000:]}")

    def close(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.wait()

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._management_port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.client.OK
        return False


class Fleet:
    """
    Two replicas and nginx, and one replica that reaches PostgreSQL through PgBouncer.

    `ports` are where each contender is asked; the first replica is on the service's port.
    """

    def __init__(self, service: Service, folder: Path, redis_url: str, stack: contextlib.ExitStack) -> None:
        self.service = service
        database_url = service.environment["IDENTITY_DATABASE_URL"]
        give_defaults(database_url)
        self.pooler = stack.enter_context(PgBouncer(database_url))
        self._stack = stack
        self._log = folder / "replicas.log"
        self._environment = {
            **service.environment,
            "IDENTITY_REDIS_URL": redis_url,
            "IDENTITY_TRUSTED_PROXIES": "127.0.0.1",
            "IDENTITY_SHUTDOWN_DELAY": str(DRAIN_SECONDS),
        }
        through = {
            "IDENTITY_DATABASE_URL": self.pooler.through(database_url),
            "IDENTITY_DATABASE_POOLER": "transaction",
        }
        self.replicas = [self.start(port=service.port), self.start()]
        self.pooled = self.start(changes=through)
        for replica in (*self.replicas, self.pooled):
            replica.wait_until_ready()
        self.ports = {DIRECT: service.port, ONE: free_port(), TWO: free_port(), POOLED: self.pooled.port}
        self.nginx = stack.enter_context(Nginx(folder, self.fronts()))

    def start(self, *, port: int = 0, changes: Mapping[str, str] | None = None) -> Replica:
        """Start one more replica, with these changes to its environment."""
        replica = Replica({**self._environment, **(changes or {})}, self._log, port=port)
        self._stack.callback(replica.close)
        return replica

    def fronts(self, *, without: int | None = None) -> dict[int, list[int]]:
        """Return where nginx listens, and to whom each port leads; `without` is the number of who is left out."""
        both = [replica.port for number, replica in enumerate(self.replicas) if number != without]
        return {self.ports[ONE]: both[:1], self.ports[TWO]: both}


@contextlib.contextmanager
def a_fleet(cores: machine.Cores) -> Iterator[Fleet]:
    """Start databases, replicas and nginx on all cores; stop everything afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(machine.on_core(*cores.everywhere))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="identity-bench-")))
        redis = stack.enter_context(own_redis())
        server = stack.enter_context(own_postgres(DURABLE))
        service = stack.enter_context(Service(server, cores, folder / "worker.log"))
        machine.pin_tree(service.database_pid, *cores.everywhere)
        yield Fleet(service, folder, redis.url, stack)


def measure_fleet(fleet: Fleet, *, runs: int, seconds: float) -> list[FleetResult]:
    """Measure each operation: `runs` rounds, in which every contender has `seconds`."""
    wanted = {operation.name: operation for operation in OPERATIONS}
    return [_measure(wanted[name], fleet, runs=runs, seconds=seconds) for name in MEASURED]


def _measure(operation: Operation, fleet: Fleet, *, runs: int, seconds: float) -> FleetResult:
    rounds: dict[str, list[Sample]] = {contender: [] for contender in CONTENDERS}
    with contextlib.ExitStack() as stack:
        loads = {}
        for contender in CONTENDERS:
            calls = tuple(operation.prepare(fleet.service, operation.connections))
            plan = Plan(fleet.ports[contender], calls, operation.marker, operation.status, operation.carry)
            loads[contender] = stack.enter_context(Load(plan, *fleet.service.cores.everywhere))
            if wrong := loads[contender].run(min(seconds, WARM_UP_SECONDS)).wrong:
                raise BenchError(f"{contender}, {operation.name}: {wrong} wrong answers while warming up")
        for _ in range(runs):
            for contender, load in loads.items():
                before = _Spent.by(fleet)
                run = load.run(seconds)
                rounds[contender].append(_Spent.by(fleet).sample(run, before))
    return FleetResult(operation.name, operation.connections, rounds)


@dataclass(frozen=True, slots=True)
class _Spent:
    """CPU seconds that were used so far."""

    service: float
    proxies: float
    database: float

    @classmethod
    def by(cls, fleet: Fleet) -> Self:
        return cls(
            sum(machine.cpu_seconds(replica.pid) for replica in (*fleet.replicas, fleet.pooled)),
            machine.cpu_seconds(fleet.nginx.pid) + machine.cpu_seconds(fleet.pooler.pid),
            machine.cpu_seconds(fleet.service.database_pid),
        )

    def sample(self, run: Run, before: Self) -> Sample:
        per_request = 1e6 / max(run.requests, 1)
        return Sample(
            run,
            service_us=(self.service - before.service) * per_request,
            proxy_us=(self.proxies - before.proxies) * per_request,
            database_us=(self.database - before.database) * per_request,
        )
