"""
What several of these tests are handed: commands, a database of each kind, the audit trail.

For those of the verifier an issuer, a clock, a verifier.
"""

import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from identity_service.verifier import TokenVerifier
from tests.conftest import prepare_template
from tests.support.backups import Backups
from tests.support.clock import UnixClock
from tests.support.commands import CHEAP, Cli, Forge, in_production
from tests.support.issuer import AUDIENCE, Issuer, wait_for_fetches
from tests.support.restoring import Place
from tests.support.servers import LocalPostgres, own_postgres
from tests.support.service import MASTER_KEY, Service, running, test_settings
from tests.support.trail import Trail, opened_trail


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """An issuer that has the key k1."""
    with Issuer() as issuer:
        yield issuer
    wait_for_fetches()


@pytest.fixture
def clock() -> UnixClock:
    """A clock that stands still at the time of the test."""
    return UnixClock(time.time())


@pytest.fixture
def verifier(issuer: Issuer, clock: UnixClock) -> TokenVerifier:
    """A verifier that has fetched nothing yet, and is in no hurry."""
    return TokenVerifier(issuer.url, AUDIENCE, timeout=30, clock=clock)


@pytest.fixture(params=["database_url", "sqlite_url"], ids=["postgresql", "sqlite"])
def any_url(request: pytest.FixtureRequest) -> str:
    """The URL of each kind of database."""
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def anywhere(any_url: str) -> AsyncIterator[Service]:
    """The service on each kind of database, with limits in memory."""
    async with running(test_settings(any_url)) as service:
        yield service


@pytest.fixture
async def trail(any_url: str) -> AsyncIterator[Trail]:
    """A trail on each kind of database."""
    async with opened_trail(any_url) as opened:
        yield opened


@pytest.fixture
async def on_postgresql(database_url: str) -> AsyncIterator[Trail]:
    """A trail on PostgreSQL."""
    async with opened_trail(database_url) as opened:
        yield opened


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """Runs the commands of one file's tests."""
    made = Forge(tmp_path_factory.mktemp("forge"))
    yield made
    made.close()


@pytest.fixture
def folder(sqlite_template: Path, tmp_path: Path) -> Path:
    """A data directory with a migrated database."""
    made = tmp_path / "data"
    made.mkdir()
    shutil.copy(sqlite_template, made / "identity.db")
    return made


@pytest.fixture
def cli(folder: Path, tmp_path: Path, forge: Forge) -> Cli:
    """Commands with `--data-dir`; mails are written to a folder, as in development."""
    env = {**CHEAP, "IDENTITY_MASTER_KEY": MASTER_KEY, "HOME": str(tmp_path)}
    return Cli(forge, env, ("--data-dir", str(folder)))


@pytest.fixture(scope="module")
def server_with_programs() -> Iterator[LocalPostgres]:
    """A PostgreSQL of our own, with pg_dump and pg_restore of its own version, and a database to copy."""
    with own_postgres() as server:
        prepare_template(server.create_database(Backups.TEMPLATE))
        yield server


@pytest.fixture
def backups(server_with_programs: LocalPostgres, tmp_path: Path) -> Backups:
    """What makes and restores backups."""
    return Backups(server_with_programs, tmp_path)


@pytest.fixture
def lively_url(backups: Backups) -> str:
    """The URL of a database with keys, which can be dumped."""
    return backups.a_database(Backups.TEMPLATE)


@pytest.fixture
def at(forge: Forge, tmp_path: Path) -> Callable[[str], Place]:
    """What makes of a URL a database with the commands that work on it."""
    return lambda url: Place(url, Cli(forge, in_production(url, tmp_path)))


@pytest.fixture
def bare(tmp_path: Path, forge: Forge) -> Cli:
    """Commands with nothing but the system's environment."""
    return Cli(forge, {"HOME": str(tmp_path)})


@pytest.fixture
def on_postgres(database_url: str, tmp_path: Path, forge: Forge) -> Cli:
    """Commands configured as in production, by their environment."""
    return Cli(forge, in_production(database_url, tmp_path))
