"""
The servers and addresses that the tests are handed.

One process, the one that was called, brings PostgreSQL and Redis and prepares a template database; parallel workers
are told the addresses. A test gets a database and a Redis number of its own, so that no test sees another's rows.
"""

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import structlog
from hypothesis import HealthCheck, settings

from identity_service.infra.migrate import migrate
from tests.support import canary
from tests.support.matrix import OPTION, ConformancePlugin
from tests.support.operators import Operator, an_operator
from tests.support.servers import PostgresServer, RedisServer, ServerUnavailableError, find_postgres, find_redis
from tests.support.service import Service, prepare_keys, running, test_settings


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the servers of this run are, in a form that travels to a worker."""

    postgres: str
    redis: str
    template: str


ADDRESSES = pytest.StashKey[Addresses]()
ORIGINS = pytest.StashKey[str]()
RUNNING = pytest.StashKey[contextlib.ExitStack]()

_numbers = itertools.count(1)

# The same examples every time, and no limit to how long one takes: Hypothesis' own 200 ms are less than a busy machine
# stands still, and an example that was found by chance would fail one run and not the next.
settings.register_profile(
    "here", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="write docs/conformance.md when all rfc-marked tests pass")
    parser.addoption(canary.OPTION, action="store_true", help="do not look for secrets in what the service logs")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ConformancePlugin(config))
    if config.getoption(canary.OPTION):
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    else:
        config.pluginmanager.register(canary.CanaryPlugin())


def prepare_template(url: str) -> None:
    """Give the empty database at `url` the schema and the keys that every test's database starts with."""
    migrate(url)
    asyncio.run(prepare_keys(test_settings(url)))


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        if "addresses" in config.workerinput:
            config.stash[ADDRESSES] = Addresses(**config.workerinput["addresses"])
        return
    if not _needs_servers(config):
        return
    running = config.stash[RUNNING] = contextlib.ExitStack()
    try:
        postgres_server = running.enter_context(find_postgres())
        redis_server = running.enter_context(find_redis())
    except ServerUnavailableError as error:
        raise pytest.UsageError(str(error)) from error
    template = f"identity_{secrets.token_hex(4)}"
    url = postgres_server.create_database(template)
    running.callback(postgres_server.drop_database, template)
    prepare_template(url)
    config.stash[ADDRESSES] = Addresses(postgres=postgres_server.url, redis=redis_server.url, template=template)
    config.stash[ORIGINS] = f"PostgreSQL: {postgres_server.origin}; Redis: {redis_server.origin}"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker the addresses; the hook is pytest-xdist's, which may be switched off."""
    if addresses := node.config.stash.get(ADDRESSES, None):
        node.workerinput["addresses"] = dataclasses.asdict(addresses)


def pytest_collection_finish() -> None:
    """
    Set aside, for the garbage collector, what lives as long as the run, and let it look at the rest more rarely.

    Each test builds an application and throws it away; with Python's own thresholds a third of the run's time went
    into looking at what had been imported and collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 5, 5)


def pytest_report_header(config: pytest.Config) -> str | None:
    return config.stash.get(ORIGINS, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    if running := config.stash.get(RUNNING, None):
        running.close()


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": False})


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> PostgresServer:
    """The run's PostgreSQL. All tests share it, so it cannot be stopped; `own_postgres` starts one that can."""
    return PostgresServer(_addresses(pytestconfig).postgres, origin="this run's server")


@pytest.fixture(scope="session")
def redis_server(pytestconfig: pytest.Config) -> RedisServer:
    """The run's Redis. All tests share it, so it cannot be stopped; `own_redis` starts one that can."""
    return RedisServer(_addresses(pytestconfig).redis, origin="this run's server")


@pytest.fixture
def database_url(postgres_server: PostgresServer, pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a database that holds what the template holds and that nobody else uses."""
    template = _addresses(pytestconfig).template
    name = f"{template}_{_worker()}_{next(_numbers)}"
    yield postgres_server.create_database(name, template)
    postgres_server.drop_database(name)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty logical database that no other worker uses."""
    url = redis_server.database(int(_worker().removeprefix("gw") or 0))
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file with keys, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    prepare_template(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a SQLite file that holds what the template holds."""
    shutil.copy(sqlite_template, tmp_path / "identity.db")
    return f"sqlite+aiosqlite:///{tmp_path / 'identity.db'}"


@pytest.fixture
async def service(database_url: str, redis_url: str) -> AsyncIterator[Service]:
    """The service on PostgreSQL and Redis, with a clock that stands still."""
    async with running(test_settings(database_url, redis_url=redis_url)) as running_service:
        yield running_service


@pytest.fixture
async def embedded(sqlite_url: str) -> AsyncIterator[Service]:
    """The service on SQLite with limits in memory: the embedded default."""
    async with running(test_settings(sqlite_url)) as running_service:
        yield running_service


@pytest.fixture
async def boss(service: Service) -> Operator:
    """A signed-in operator who holds everything."""
    return await an_operator(service)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that goes to PostgreSQL, noted in the driver: nothing gets past it."""
    sent: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def noting(cursor: Any, query: Any, *given: Any, **named: Any) -> Any:
        spelled = query.decode() if isinstance(query, bytes) else str(query)
        sent.append(" ".join(spelled.split()))
        return await execute(cursor, query, *given, **named)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", noting)
    return sent


def _worker() -> str:
    return os.environ.get("PYTEST_XDIST_WORKER", "gw0")


def _needs_servers(config: pytest.Config) -> bool:
    """Tell whether a server may be asked for; listing the tests or running only the unit tests does not."""
    unit = Path(__file__).parent / "unit"
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    return not config.option.collectonly and not all(path.is_relative_to(unit) for path in paths)


def _addresses(config: pytest.Config) -> Addresses:
    addresses = config.stash.get(ADDRESSES, None)
    if addresses is None:
        pytest.fail("tests/unit runs without servers; a test that needs one belongs elsewhere")
    return addresses
