"""Migrations on a database that is in use: nobody waits for long, and what is interrupted can be done again."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, event, inspect

from identity_service.infra.migrate import MigrationBlocked, connected, migrate
from identity_service.infra.migration_plan import LOCKS, plan
from identity_service.infra.tables import SCHEMA_REVISION
from tests.support.addresses import plain
from tests.support.migrations import migrating_at_once, revisions, shape
from tests.support.servers import FAST, PostgresServer, own_postgres

ROOT = Path(__file__).parents[2]
ROWS = 200_000
REQUEST_OPTIONS = "-c lock_timeout=2000 -c statement_timeout=5000"
"""What a request has on its connection: it gives up a lock after two seconds, and answers 503."""
SLACK = 0.5
"""Seconds by which a request's patience with a lock is greater than a migration's."""
LONGEST_STALL = 4.0
"""Seconds. What waits for a lock fails after half of that by itself; the rest is for a machine that has other work."""

_FILL = """
INSERT INTO users (id, username, email, email_canonical, password_form, role, enabled, epoch, created_at, updated_at)
    SELECT gen_random_uuid(), 'user' || n, 'user' || n || '@example.org', 'user' || n || '@example.org', 1, 'user',
           true, 0, now(), now() FROM generate_series(1, ROWS) n;
INSERT INTO clients VALUES ('app', 'App', true, 'none', '[]', '[]', '', '[]', '[]', '[]', true, NULL, NULL, NULL, 0,
                            true, 0, now(), now(), now());
INSERT INTO refresh_families
    SELECT gen_random_uuid(), id, 'app', 0, 0, 0, 'x', NULL, 'k', NULL, '', '[]', now(), 'pwd', now(), now(),
           now() + interval '1 day', now() + interval '1 day', NULL, NULL FROM users;
INSERT INTO audit_events (at, event, actor, target, client_id, network, request_id, occurrences, detail)
    SELECT now(), 'token.issued', id, id, 'app', NULL, NULL, 1, '{}' FROM users;
ANALYZE;
""".replace("ROWS", str(ROWS))


@pytest.fixture(scope="module")
def large(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a database at the first revision, with many rows in the tables that grow, to be copied."""
    name = f"large_{os.getpid()}"
    url = postgres_server.create_database(name)
    migrate(url, revision="0001")
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute(_FILL)
    yield name
    postgres_server.drop_database(name)


@pytest.fixture
def url(postgres_server: PostgresServer, large: str) -> Iterator[str]:
    """The URL of a copy of it."""
    yield postgres_server.create_database(f"{large}_copy", large)
    postgres_server.drop_database(f"{large}_copy")


@pytest.fixture
def small_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database."""
    name = f"small_{os.getpid()}"
    postgres_server.drop_database(name)
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


def ask(url: str, statement: str) -> list[Any]:
    """Return the rows of a statement, run by somebody else."""
    with psycopg.connect(plain(url), autocommit=True) as connection:
        return connection.execute(statement).fetchall()


@contextmanager
def holding(url: str, statement: str, *, name: str = "somebody") -> Iterator[psycopg.Connection]:
    """Run a statement in a transaction that stays open, until the block ends or the transaction is ended by hand."""
    with psycopg.connect(plain(url), application_name=name) as connection:
        connection.execute(statement)
        yield connection
        connection.rollback()


@dataclass
class Work:
    """Something done in a thread, in the hope that it ends well."""

    thread: threading.Thread
    failures: list[BaseException]

    def end(self) -> None:
        self.thread.join(120)
        assert not self.thread.is_alive()
        assert self.failures == []


def start(work: Callable[[], None]) -> Work:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return Work(thread, failures)


def until_it_waits(url: str, *, within: float = 60) -> int:
    """Return the process id of the migration's session once it waits for a lock."""
    deadline = time.monotonic() + within
    query = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'identity-service migrate'"
        " AND datname = current_database() AND wait_event_type = 'Lock'"
    )
    with psycopg.connect(plain(url), autocommit=True) as connection:
        while (found := connection.execute(query).fetchone()) is None:
            assert time.monotonic() < deadline, "the migration did not wait"
            time.sleep(0.01)
    pid: int = found[0]
    return pid


# -- nobody waits for long --------------------------------------------------------------------------------------------


class Metronome:
    """Notices when the whole machine stands still, which is nobody's fault here."""

    def __init__(self) -> None:
        self._stops: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join(60)

    def _beat(self) -> None:
        before = time.monotonic()
        while not self._over.wait(0.01):
            now = time.monotonic()
            if now - before > 0.1:
                self._stops.append((before, now))
            before = now

    def stood_still(self, begun: float, ended: float) -> float:
        """Return for how many seconds of this time it did."""
        return sum(max(0.0, min(ended, until) - max(begun, since)) for since, until in tuple(self._stops))


@pytest.fixture
def metronome() -> Iterator[Metronome]:
    beating = Metronome()
    yield beating
    beating.stop()


@dataclass
class Traffic:
    """Somebody who does the same thing again and again, as requests do it, and looks at the clock."""

    url: str
    statements: Sequence[str]
    metronome: Metronome
    longest: float = 0
    """Seconds that a statement took while the machine was at work."""
    times: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        with psycopg.connect(plain(self.url), autocommit=True, options=REQUEST_OPTIONS) as connection:
            while not self.done.is_set():
                for statement in self.statements:
                    begun = time.monotonic()
                    try:
                        connection.execute(statement)
                    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
                        # The limits of both who wait for each other run on while the machine stands still.
                        if self.metronome.stood_still(begun, time.monotonic()) < SLACK:
                            raise
                    ended = time.monotonic()
                    self.longest = max(self.longest, ended - begun - self.metronome.stood_still(begun, ended))
                self.times += 1


READS = (
    "SELECT u.id, u.epoch, f.generation FROM users u JOIN refresh_families f ON f.user_id = u.id"
    " WHERE f.id = (SELECT id FROM refresh_families ORDER BY id OFFSET floor(random() * 50) LIMIT 1)",
    "SELECT name, rank FROM roles",
    "SELECT id, scope, enabled FROM clients",
)
WRITES = (
    "UPDATE refresh_families SET generation = generation + 1, rotated_at = now()"
    " WHERE id = (SELECT id FROM refresh_families ORDER BY id OFFSET floor(random() * 50) LIMIT 1)",
    "UPDATE users SET updated_at = now()"
    " WHERE id = (SELECT id FROM users ORDER BY id OFFSET floor(random() * 50) LIMIT 1)",
    "INSERT INTO audit_events (at, event, occurrences, detail) VALUES (now(), 'refresh', 1, '{}')",
)


@pytest.mark.case("OPS-17")
def test_no_request_waits_for_long_while_large_tables_are_migrated(url: str, metronome: Metronome) -> None:
    """
    Somebody reads and somebody writes all the while, with the limits of a request, through every revision.

    No table is written anew, either: a lock that lasts as long as a table is large would pass here by luck.
    """
    files = "SELECT relname, relfilenode FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    before = set(ask(url, files))
    reader, writer = Traffic(url, READS, metronome), Traffic(url, WRITES, metronome)
    traffic = [start(reader), start(writer)]
    migrate(url)
    for each in (reader, writer):
        each.done.set()
    for work in traffic:
        work.end()
    assert min(reader.times, writer.times) > 20
    assert max(reader.longest, writer.longest) < LONGEST_STALL
    assert before <= set(ask(url, files)) | {row for row in before if row[0] == "alembic_version"}
    assert ask(url, "SELECT count(*) FROM users") == [(ROWS,)]


@pytest.mark.case("OPS-17")
@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("users", "UPDATE users SET updated_at = now() WHERE id = (SELECT {}(id::text)::uuid FROM users)"),
        ("audit_events", "UPDATE audit_events SET occurrences = 2 WHERE id = (SELECT {}(id) FROM audit_events)"),
    ],
)
def test_an_index_is_built_while_others_write(url: str, table: str, change: str) -> None:
    """It waits for who was there before it, in one go, and holds up nobody who comes after."""
    migrate(url, revision="0003")
    said: list[str] = []
    with holding(url, change.format("min")) as somebody:
        migration = start(lambda: migrate(url, say=said.append))
        pid = until_it_waits(url)
        held = "SELECT mode FROM pg_locks WHERE pid = {} AND relation = '{}'::regclass AND granted"
        assert ask(url, held.format(pid, table)) == [("ShareUpdateExclusiveLock",)]
        with psycopg.connect(plain(url), options="-c lock_timeout=300") as other:
            other.execute(change.format("max"))
            other.execute(f"SELECT count(*) FROM {table} WHERE id IS NULL")  # noqa: S608  # our own name
        time.sleep(1)  # longer than it would wait for a lock that holds others up
        assert until_it_waits(url) == pid
        somebody.commit()
        migration.end()
    assert [line[:5] for line in said] == [f"{each}:" for each in revisions() if each > "0003"]
    assert ask(url, "SELECT version_num FROM alembic_version") == [(SCHEMA_REVISION,)]
    assert ask(url, "SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid") == []


_SMALL = {"roles", "scopes", "role_scopes", "locks", "leases", "audit_chain", "alembic_version"}


@pytest.mark.parametrize("revision", [revision for revision in revisions() if revision > "0001"])
def test_what_makes_others_wait_takes_no_longer_for_a_larger_table(small_url: str, revision: str) -> None:
    """A revision that reads or writes rows leaves the table to others meanwhile; so says its plan."""
    migrate(small_url, revision=f"{int(revision) - 1:04}")
    step = plan(small_url).steps[0]
    assert step.revision == revision
    assert step.complete
    for lock in step.locks():
        lets_others_write = LOCKS.index(lock.mode) < LOCKS.index("SHARE")
        assert lets_others_write or lock.rows == "untouched" or lock.table in _SMALL, lock


@pytest.mark.parametrize("revision", revisions())
def test_the_plan_names_the_locks_that_postgresql_takes(small_url: str, revision: str) -> None:
    """Asked of the server, statement by statement, while the revision runs."""
    if revision != revisions()[0]:
        migrate(small_url, revision=f"{int(revision) - 1:04}")
    step = plan(small_url).steps[0]
    tables = set(shape(small_url))
    taken: dict[str, str] = {}
    query = "SELECT relation::regclass::text, mode FROM pg_locks WHERE locktype = 'relation' AND granted AND pid = "

    def look(_connection: Any, cursor: Any, *_rest: Any) -> None:
        if not cursor.connection.autocommit:
            for table, camel in watcher.execute(query + str(cursor.connection.info.backend_pid)).fetchall():
                mode = re.sub("(?<=[a-z])(?=[A-Z])", " ", camel.removesuffix("Lock")).upper()
                if table in tables and mode in LOCKS:
                    taken[table] = max(taken.get(table, mode), mode, key=LOCKS.index)

    with psycopg.connect(plain(small_url), autocommit=True) as watcher:
        event.listen(Engine, "after_cursor_execute", look)
        try:
            migrate(small_url, revision=revision)
        finally:
            event.remove(Engine, "after_cursor_execute", look)
    assert [statement.sql for statement in step.statements if statement.locks is None] == []
    told = {lock.table: lock.mode for lock in step.locks()}
    if any(statement.alone for statement in step.statements):
        assert taken == {}  # each is over when it can be looked at; what it takes meanwhile is seen above
        assert set(told.values()) == {"SHARE UPDATE EXCLUSIVE"}
    else:
        assert told == taken


# -- a lock that cannot be had ----------------------------------------------------------------------------------------


@pytest.mark.case("OPS-18")
def test_a_migration_that_gets_no_lock_gives_up_and_can_be_run_again(url: str, metronome: Metronome) -> None:
    """It says who may be in the way, leaves the last whole revision, and lets requests pass all the while."""
    migrate(url, revision="0002")
    before = shape(url)
    said: list[str] = []
    reader = Traffic(url, READS, metronome)
    with holding(url, "SELECT count(*) FROM audit_events", name="the nightly dump") as dump:
        traffic = start(reader)
        begun = time.monotonic()
        with pytest.raises(MigrationBlocked) as blocked:
            migrate(url, patience=5, say=said.append)
        assert 3 < time.monotonic() - begun < 60
        reader.done.set()
        traffic.end()
        assert re.search(
            r"schema is whole, at 0002\. The oldest transaction is that of the nightly dump"
            rf" \(process {dump.info.backend_pid}\), open for \d+ s\. Run the command again",
            str(blocked.value),
        )
        assert set(said) == {"others hold what has to be locked; asking again"}
        assert len(said) >= 2
        assert shape(url) == before
    assert reader.times > 20
    assert reader.longest < LONGEST_STALL
    migrate(url)
    assert ask(url, "SELECT version_num FROM alembic_version") == [(SCHEMA_REVISION,)]


@pytest.mark.case("OPS-18")
def test_a_migration_goes_on_when_the_lock_is_let_go(url: str) -> None:
    """Whoever was quicker ends in time, and nobody has to run anything again."""
    migrate(url, revision="0002")
    asked = threading.Event()
    with holding(url, "SELECT count(*) FROM users") as somebody:
        migration = start(lambda: migrate(url, say=lambda _line: asked.set()))
        assert asked.wait(60)
        somebody.commit()
        migration.end()
    assert ask(url, "SELECT version_num FROM alembic_version") == [(SCHEMA_REVISION,)]


@pytest.mark.case("OPS-18")
def test_a_migration_gets_past_the_servers_own_cleaning_up() -> None:
    """Autovacuum can be at a large table for hours; it gives way, but only to who has waited for a second."""
    with own_postgres({**FAST, "autovacuum_naptime": "1s", "log_autovacuum_min_duration": "0"}) as server:
        url = server.create_database("cleaned")
        migrate(url, revision="0002")
        with psycopg.connect(plain(url), autocommit=True) as connection:
            connection.execute(
                "ALTER TABLE audit_events SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1,"
                " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
            )
            connection.execute(
                "INSERT INTO audit_events (at, event, occurrences, detail)"
                " SELECT now(), repeat('x', 60), 1, '{}' FROM generate_series(1, 100000)"
            )
            connection.execute("DELETE FROM audit_events WHERE id % 2 = 0")
            deadline = time.monotonic() + 180
            while connection.execute("SELECT 1 FROM pg_stat_progress_vacuum").fetchone() is None:
                assert time.monotonic() < deadline, "nothing was cleaned up"
                time.sleep(0.05)
        migrate(url)
        assert ask(url, "SELECT version_num FROM alembic_version") == [(SCHEMA_REVISION,)]


# -- a run that is killed ---------------------------------------------------------------------------------------------

# Dies as by SIGKILL before the first statement that begins like this, unless another process has done so already.
_DYING = """
import os, sys, signal
from sqlalchemy import Engine, event
from identity_service.infra.migrate import migrate
url, place, mark = sys.argv[1:]
def before(_connection, _cursor, statement, *_rest):
    if " ".join(statement.split()).startswith(place):
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(Engine, "before_cursor_execute", before)
print(flush=True)
sys.stdin.readline()
migrate(url)
"""


def dying(url: str, place: str, mark: Path, *, number: int = 1) -> list[int]:
    """Start so many migrations at once, the first of which is killed when it gets to a place; return how they ended."""
    return sorted(code for code, _ in migrating_at_once(_DYING, url, place, str(mark), number=number))


@pytest.fixture(params=["postgresql", "sqlite"])
def any_small_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'identity.db'}"
    found: str = request.getfixturevalue("small_url")
    return found


@pytest.mark.case("OPS-18")
def test_a_killed_migration_leaves_nothing_of_the_revision_it_was_at(any_small_url: str, tmp_path: Path) -> None:
    """Columns had been added and tables made; none of it is there, and the next run does it all."""
    migrate(any_small_url, revision="0002")
    before = shape(any_small_url)
    assert dying(any_small_url, "CREATE TABLE leases", tmp_path / "mark") == [-9]
    assert shape(any_small_url) == before
    migrate(any_small_url)
    with connected(any_small_url) as connection:
        assert "leases" in inspect(connection).get_table_names()
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == SCHEMA_REVISION


@pytest.mark.case("OPS-18")
def test_of_five_migrations_at_once_one_may_be_killed(small_url: str, tmp_path: Path) -> None:
    """In the middle of its work; the next in the queue does it from the last whole revision on."""
    assert dying(small_url, "CREATE TABLE leases", tmp_path / "mark", number=5) == [-9, 0, 0, 0, 0]
    assert ask(small_url, "SELECT version_num FROM alembic_version") == [(SCHEMA_REVISION,)]
    undisturbed = f"sqlite+aiosqlite:///{tmp_path / 'identity.db'}"
    migrate(undisturbed)
    with connected(undisturbed) as connection:
        whole = connection.exec_driver_sql("SELECT count(*) FROM leases").scalar_one()
    assert ask(small_url, "SELECT count(*) FROM leases") == [(whole,)]


@pytest.mark.case("OPS-18")
def test_an_index_that_was_interrupted_is_built_anew(url: str) -> None:
    """PostgreSQL keeps what there is of it, which serves nobody and would pass for the whole."""
    migrate(url, revision="0003")
    invalid = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
    with holding(url, "UPDATE users SET updated_at = now() WHERE id = (SELECT min(id::text)::uuid FROM users)"):
        migration = start(lambda: migrate(url))
        ask(url, f"SELECT pg_terminate_backend({until_it_waits(url)})")
        migration.thread.join(120)
        assert len(migration.failures) == 1
    assert ask(url, invalid) == [("ix_users_role_id",)]
    assert ask(url, "SELECT version_num FROM alembic_version") == [("0003",)]
    migrate(url)
    assert ask(url, invalid) == []
    assert ask(url, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_users_role_id'::regclass") == [(True,)]
    assert ask(url, "SELECT version_num FROM alembic_version") == [(SCHEMA_REVISION,)]


@pytest.mark.case("OPS-17")
def test_a_schema_that_is_newer_than_this_code_is_left_alone(any_small_url: str) -> None:
    """As after going back to the version before, whose migration runs again."""
    migrate(any_small_url)
    with connected(any_small_url) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    before = shape(any_small_url)
    migrate(any_small_url)
    assert shape(any_small_url) == before
    with connected(any_small_url) as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == "9999"
