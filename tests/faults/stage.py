"""Two replicas on a PostgreSQL and a Redis of our own, each of them reached through a network in the test's hand."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from types import TracebackType
from typing import Final, Self, final

import httpx2
import psycopg

from identity_service.infra.migrate import migrate
from identity_service.main import build_services, load_keys
from tests.support.addresses import plain
from tests.support.fault_proxy import FaultProxy
from tests.support.loop_thread import LoopThread
from tests.support.server_process import COMMAND, ServerProcess
from tests.support.servers import CRASHABLE, LocalPostgres, LocalRedis, free_port, own_postgres, own_redis
from tests.support.service import ISSUER, Service, test_settings
from tests.support.smtp import SmtpServer

SETTINGS: Final[Mapping[str, str]] = {
    "issuer": ISSUER,
    "registration": "open",
    "trusted_proxies": "127.0.0.1",  # so that everybody can come from a network of their own
    "client_rate": "1000000",
    "api_key_rate": "1000000",
    "database_pool_size": "5",
    "key_poll": "0.5",
    "shutdown_delay": "2",
    "max_connections": "120",
    "hash_wait": "20",  # a busy machine is none of the faults that are meant here
    "smtp_host": "127.0.0.1",
    "smtp_security": "none",
    "mail_from": "identity@example.org",
}
_PATIENCE: Final = 30.0  # seconds for a replica to be well again


class StageFailed(Exception):
    """The stage is not what it should be, so nothing can be shown on it."""


@final
class PostOffice:
    """A mail server in a thread of its own, which keeps every mail, behind a network in the test's hand."""

    def __init__(self) -> None:
        self.server = SmtpServer()

    @property
    def port(self) -> int:
        """Where mails are taken."""
        return self.network.port

    def __enter__(self) -> Self:
        self._own = LoopThread("post-office")
        self._own.do(self.server.start())
        self.network = FaultProxy("127.0.0.1", self.server.port)
        self.network.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.network.__exit__(None, None, None)
        self._own.do(self.server.close())
        self._own.close()


@final
class Replica:
    """
    One replica, which can end in every way and be started again; its ports are others each time.

    `postgres` and `redis` are the networks between it and its servers, and nobody else's.
    """

    def __init__(self, name: str, database_url: str, redis_url: str, settings: Mapping[str, str]) -> None:
        self.name = name
        self._settings = settings
        self.postgres = FaultProxy.before(database_url)
        self.redis = FaultProxy.before(redis_url)
        self.life = 0
        """How many times it was started."""
        self.serving = False
        """Whether requests may be sent to it: from its start until it is told to end."""
        self._urls = (database_url, redis_url)
        self._management_port = 0
        self._server: ServerProcess | None = None
        self._past = ""

    @property
    def server(self) -> ServerProcess:
        """The running process."""
        if self._server is None:
            raise StageFailed(f"{self.name} does not run")
        return self._server

    @property
    def running(self) -> bool:
        """Whether it was started and nobody has ended it."""
        return self._server is not None

    @property
    def url(self) -> str:
        """Where it serves."""
        return self.server.url

    @property
    def management_port(self) -> int:
        """Where its probes and metrics are served."""
        return self._management_port

    async def ready(self, http: httpx2.AsyncClient) -> bool:
        """Return whether it says that it is ready."""
        try:
            answer = await http.get(f"http://127.0.0.1:{self._management_port}/readyz")
        except httpx2.TransportError:  # it has just ended
            return False
        return answer.status_code == 200

    async def published(self) -> set[str]:
        """Return the keys in its JWKS."""
        async with httpx2.AsyncClient(trust_env=False, timeout=_PATIENCE) as http:
            answer = await http.get(f"{self.url}/.well-known/jwks.json")
        return {key["kid"] for key in answer.json()["keys"]}

    def start(self, program: str = COMMAND, **changes: str) -> None:
        """Start it with the stage's settings and these changes; return when it is ready."""
        if self._server is not None:
            raise StageFailed(f"{self.name} runs already")
        self._management_port = free_port()
        settings = {**self._settings, "management_port": str(self._management_port), **changes}
        database, redis = self.postgres.through(self._urls[0]), self.redis.through(self._urls[1])
        self._server = ServerProcess(database, redis, program=program, **settings)
        self.life += 1
        self.serving = True

    def kill(self) -> None:
        """End it as a crash would."""
        self.serving = False
        self.server.kill()
        self._bury()

    def leave(self) -> int | None:
        """End it in good order and return its exit code; kill it if that takes too long."""
        self.serving = False
        code = self.server.stop()
        self._bury()
        return code

    def ended(self) -> int:
        """Return the exit code of one that was told to leave, once it has; raises subprocess.TimeoutExpired."""
        code = self.server.wait()
        self._bury()
        return code

    def log_text(self) -> str:
        """Return everything it has written, in all its lives."""
        return self._past + (self._server.log_text() if self._server is not None else "")

    def _bury(self) -> None:
        server, self._server = self.server, None
        self.serving = False
        self._past += server.log_text()
        server.close()

    def __enter__(self) -> Self:
        self.postgres.__enter__()
        self.redis.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self.kill()
        self.redis.__exit__(kind, error, trace)
        self.postgres.__exit__(kind, error, trace)


@final
class Stage:
    """
    Everything a fault needs to happen. Enter it with `with`.

    `options` are PostgreSQL's, besides those of all; `start` starts a replica in another way than `Replica.start`.
    """

    def __init__(
        self,
        *,
        options: Mapping[str, str] | None = None,
        replicas: int = 2,
        start: Callable[[Replica], object] = Replica.start,
    ) -> None:
        self._options = {**CRASHABLE, **(options or {})}
        self._number = replicas
        self._start = start
        self._stack = ExitStack()
        self.replicas: tuple[Replica, ...] = ()
        self.spoiled = False
        """Whether something was done to it after which nobody else should use it."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.postgres: LocalPostgres = stack.enter_context(own_postgres(self._options))
            self.redis: LocalRedis = stack.enter_context(own_redis())
            self.database_url = self.postgres.create_database("faults")
            migrate(self.database_url)
            asyncio.run(self._make_keys())
            self.post = stack.enter_context(PostOffice())
            settings = {**SETTINGS, "smtp_port": str(self.post.port)}
            self.replicas = tuple(
                stack.enter_context(Replica(name, self.database_url, self.redis.url, settings))
                for name in "ABCDE"[: self._number]
            )
            self._stack = stack.pop_all()
        try:
            self.together(self._start)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def both(self) -> tuple[Replica, Replica]:
        """The two replicas of nearly every stage."""
        here, there = self.replicas
        return here, there

    @property
    def serving(self) -> list[Replica]:
        """The replicas that requests may be sent to."""
        return [replica for replica in self.replicas if replica.serving]

    def together(self, act: Callable[[Replica], object]) -> None:
        """Do something to all replicas at once."""
        with ThreadPoolExecutor(len(self.replicas)) as threads:
            list(threads.map(act, self.replicas))

    def connect(self) -> psycopg.Connection:
        """Return a session beside the service's, past every proxy, which commits each statement."""
        return psycopg.connect(plain(self.database_url), autocommit=True, application_name="stage")

    def log_text(self) -> str:
        """Return everything that the replicas have written."""
        return "".join(replica.log_text() for replica in self.replicas)

    @asynccontextmanager
    async def hands(self) -> AsyncIterator[Service]:
        """Yield what prepares and looks: the service's own objects in this process, without its jobs."""
        services = build_services(test_settings(self.database_url))
        async with httpx2.AsyncClient(trust_env=False) as http:
            try:
                await load_keys(services)
                yield Service(None, services, services.clock, http)
            finally:
                await services.close()

    async def well(self) -> None:
        """Wait until every replica that serves says that it is ready; raises StageFailed."""
        deadline = time.monotonic() + _PATIENCE
        async with httpx2.AsyncClient(trust_env=False, timeout=_PATIENCE) as http:
            while not all([await replica.ready(http) for replica in self.serving]):
                if time.monotonic() > deadline:
                    raise StageFailed("the replicas do not get well again")
                await asyncio.sleep(0.05)

    async def _make_keys(self) -> None:
        async with self.hands():
            pass
