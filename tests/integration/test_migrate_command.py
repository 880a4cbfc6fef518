"""`identity-service migrate`: doing it, telling what it would do, and looking whether it was done."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from identity_service.infra import migrate as migrating
from identity_service.infra.migrate import migrate
from identity_service.infra.migration_plan import Lock, locks_of, plan
from identity_service.infra.tables import OLDEST_SCHEMA_REVISION, SCHEMA_REVISION
from identity_service.main import services
from identity_service.web import health
from tests.support.addresses import plain
from tests.support.commands import PASSWORD, Cli
from tests.support.migrations import revisions, shape
from tests.support.servers import PostgresServer
from tests.support.service import Service

ROOT = Path(__file__).parents[2]
OLD = "0002"


@pytest.fixture
def empty_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database."""
    name = f"migrate_command_{os.getpid()}"
    postgres_server.drop_database(name)
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest.fixture
def old_url(empty_url: str) -> str:
    """The URL of a database at an old revision, in which one table is large."""
    migrate(empty_url, revision=OLD)
    execute(
        empty_url,
        "ALTER TABLE audit_events SET (autovacuum_enabled = false)",  # or it might count anew
        "INSERT INTO audit_events (at, event, occurrences, detail)"
        " SELECT now(), repeat('x', 60), 1, '{}' FROM generate_series(1, 100000)",
        "ANALYZE",
        "INSERT INTO audit_events (at, event, occurrences, detail) VALUES (now(), 'x', 1, '{}')",
    )
    return empty_url


def execute(url: str, *statements: str) -> list[Any]:
    """Run statements as somebody else; return the rows of the last."""
    address = plain(url)
    with psycopg.connect(address, autocommit=True) as connection:
        cursors = [connection.execute(statement) for statement in statements]
        return cursors[-1].fetchall() if cursors[-1].description else []


def everything(url: str) -> Any:
    """Return what a statement that writes, or makes something, would leave behind."""
    relations = "SELECT oid, relname, relfilenode FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    counts = [execute(url, f'SELECT count(*) FROM "{table}"') for table in shape(url)]  # noqa: S608  # our own names
    return execute(url, relations), counts, execute(url, "SELECT version_num FROM alembic_version")


# -- --plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_tells_what_would_be_done_and_does_nothing(bare: Cli, old_url: str) -> None:
    """Each pending revision with its sentence, statements and locks, and how many rows; the database is as before."""
    before = everything(old_url)
    told = bare.run("migrate", "--plan", IDENTITY_DATABASE_URL=old_url)
    assert (told.code, told.err) == (0, "")
    assert everything(old_url) == before
    lines = told.out.splitlines()
    assert lines[0] == "The schema is at 0002. `identity-service migrate` would run:"
    assert [line[:5] for line in lines if re.match(r"\d{4}:", line)] == [f"{each}:" for each in revisions()[2:]]
    for line in (
        "0003: Make room for what people and operators do by themselves: API keys, mails, deletion, job leases, the"
        " audit chain.",
        "  ALTER TABLE users ADD COLUMN name VARCHAR(200)",
        "  UPDATE roles SET parent=%(parent)s::VARCHAR WHERE roles.name = %(name_1)s::VARCHAR  (3 times)",
        "  New tables: api_keys, email_tokens, outbox, leases, spent_bootstrap_secrets, audit_chain",
        "  roles, 4 rows (counted): ACCESS EXCLUSIVE: others wait to read and to write it; rows are written",
        "  audit_events, 100,000 rows (estimated): ACCESS EXCLUSIVE: others wait to read and to write it;"
        " its rows are not touched",
        "0004: Index what operators search by, and what the jobs clean up by.",
        "  CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_users_role_id ON users (role, id)",
        "  audit_events, 100,000 rows (estimated): SHARE UPDATE EXCLUSIVE: others read and write it meanwhile;"
        " every row is read",
        "Rows are estimated as of the last ANALYZE (pg_class.reltuples) where a table is too large to count.",
    ):
        assert line in lines, told.out
    assert sum(line.startswith("  One transaction:") for line in lines) >= 1
    assert sum(line.startswith("  Statement by statement, outside of a transaction.") for line in lines) == 1


def test_what_the_plan_tells_is_what_is_done(empty_url: str) -> None:
    """From nothing, each revision makes the tables that were announced, and no other."""
    announced = [(step.revision, set(step.makes)) for step in plan(empty_url).steps]
    assert [revision for revision, _ in announced] == revisions()
    known: set[str] = set()
    for revision, tables in announced:
        migrate(empty_url, revision=revision)
        assert set(shape(empty_url)) - known == tables
        known |= tables
    assert plan(empty_url).steps == ()


def test_a_table_that_nobody_has_analysed_is_not_called_empty(bare: Cli, empty_url: str) -> None:
    """Too large to count in passing, and PostgreSQL has not looked at it yet."""
    migrate(empty_url, revision=OLD)
    execute(
        empty_url,
        "ALTER TABLE audit_events SET (autovacuum_enabled = false)",
        "INSERT INTO audit_events (at, event, occurrences, detail)"
        " SELECT now(), repeat('x', 60), 1, '{}' FROM generate_series(1, 100000)",
    )
    told = bare.run("migrate", "--plan", IDENTITY_DATABASE_URL=empty_url).out
    assert "audit_events, nobody has counted its rows yet: ACCESS EXCLUSIVE" in told


def test_the_plan_for_a_file_leaves_the_file_alone(bare: Cli, tmp_path: Path) -> None:
    """And makes none where there is none."""
    folder = tmp_path / "data"
    told = bare.run("migrate", "--plan", "--data-dir", str(folder)).out
    assert told.startswith("There is no schema yet. `identity-service migrate` would run:\n")
    assert "0001: Create every table." in told
    assert not folder.exists()
    file = folder / "identity.db"
    migrate(f"sqlite+aiosqlite:///{file}", revision=OLD)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    told = bare.run("migrate", "--plan", "--data-dir", str(folder)).out
    assert "The schema is at 0002." in told
    assert "  ALTER TABLE users ADD COLUMN name VARCHAR(200)" in told.splitlines()
    assert "  SQLite locks the file as a whole until this is done." in told.splitlines()
    assert "roles, 4 rows (counted)" in told
    assert "0001:" not in told
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert [path.name for path in folder.iterdir()] == ["identity.db"]


def test_there_is_nothing_to_plan_for_a_schema_that_is_up_to_date(bare: Cli, any_url: str) -> None:
    """Nor for one that is newer than this code."""
    environment = {"IDENTITY_DATABASE_URL": any_url, "IDENTITY_ALLOW_SQLITE": "true"}
    told = bare.run("migrate", "--plan", **environment)
    assert told.out == f"The schema is at {SCHEMA_REVISION}. There is nothing to do.\n"


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of revisions to which a test adds later ones."""
    folder = tmp_path / "migrations"
    shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(migrating, "_scripts", lambda: folder)
    return folder / "versions"


def revision(folder: Path, name: str, before: str, *lines: str) -> None:
    """Write a revision."""
    body = "\n".join(f"    {line}" for line in lines)
    (folder / f"{name}_later.py").write_text(
        f'"""Do something later."""\nfrom alembic import op\nimport sqlalchemy as sa\n'
        f'revision = "{name}"\ndown_revision = "{before}"\ndef upgrade() -> None:\n{body}\n'
    )


def test_a_revision_that_looks_at_what_an_earlier_one_made_is_told_as_far_as_it_goes(
    database_url: str, later: Path
) -> None:
    """The plan does not fail because of it, and says that there is more."""
    revision(later, "0098", SCHEMA_REVISION, "op.create_table('later', sa.Column('id', sa.Integer()))")
    looking = "op.get_bind().execute(sa.text('SELECT id FROM later'))"
    revision(later, "0099", "0098", "op.drop_column('users', 'name')", looking, "op.drop_table('later')")
    first, second = plan(database_url).steps
    assert (first.complete, first.makes) == (True, ("later",))
    assert (second.complete, [statement.sql for statement in second.statements]) == (
        False,
        ["ALTER TABLE users DROP COLUMN name"],
    )


def test_a_statement_that_the_plan_does_not_know_is_told_as_such(database_url: str, later: Path) -> None:
    """It is shown, and nothing is claimed of its locks."""
    revision(later, "0099", SCHEMA_REVISION, "op.execute('VACUUM users')")
    [step] = plan(database_url).steps
    assert [(statement.sql, statement.locks) for statement in step.statements] == [("VACUUM users", None)]


def test_the_locks_of_one_revision_are_waited_for_in_one_wait(database_url: str, later: Path) -> None:
    """The first are held while the next is asked for: five waits in a row would be more than a request can bear."""
    now = "SELECT current_setting('lock_timeout')"
    lines = (f"CREATE TABLE waits AS {now}", "SELECT pg_sleep(1)", f"INSERT INTO waits {now}")
    revision(later, "0099", SCHEMA_REVISION, *(f'op.execute("{line}")' for line in lines))
    migrate(database_url)
    (first,), (last,) = execute(database_url, "SELECT * FROM waits ORDER BY ctid")
    assert 100 <= int(first.removesuffix("ms")) <= 500
    assert last == "100ms"


@pytest.mark.parametrize(
    ("sql", "lock"),
    [
        ("CREATE INDEX ix ON users (name)", ("users", "SHARE", "read")),
        ('CREATE UNIQUE INDEX CONCURRENTLY "ix" ON "users" (name)', ("users", "SHARE UPDATE EXCLUSIVE", "read")),
        ("DROP INDEX ix_a", ("a", "ACCESS EXCLUSIVE", "untouched")),
        ("DROP INDEX CONCURRENTLY IF EXISTS ix_a", ("a", "SHARE UPDATE EXCLUSIVE", "untouched")),
        ("ALTER TABLE users ALTER COLUMN name TYPE text", ("users", "ACCESS EXCLUSIVE", "written")),
        ("ALTER TABLE users ALTER COLUMN name SET NOT NULL", ("users", "ACCESS EXCLUSIVE", "read")),
        ("ALTER TABLE users ALTER COLUMN name SET DEFAULT 'x'", ("users", "ACCESS EXCLUSIVE", "untouched")),
        ("ALTER TABLE users ADD COLUMN x UUID DEFAULT gen_random_uuid()", ("users", "ACCESS EXCLUSIVE", "written")),
        ("ALTER TABLE users ADD COLUMN x INT DEFAULT 0", ("users", "ACCESS EXCLUSIVE", "untouched")),
        ("ALTER TABLE users ADD CONSTRAINT c CHECK (epoch > 0)", ("users", "ACCESS EXCLUSIVE", "read")),
        ("ALTER TABLE users ADD CONSTRAINT c CHECK (epoch > 0) NOT VALID", ("users", "ACCESS EXCLUSIVE", "untouched")),
        ("ALTER TABLE users VALIDATE CONSTRAINT c", ("users", "SHARE UPDATE EXCLUSIVE", "read")),
        ("ALTER TABLE users RENAME name TO title", ("users", "ACCESS EXCLUSIVE", "untouched")),
        ("ALTER TABLE users SET LOGGED", ("users", "ACCESS EXCLUSIVE", "written")),
        ("UPDATE users SET name = ''", ("users", "ROW EXCLUSIVE", "written")),
        ("DROP TABLE users", ("users", "ACCESS EXCLUSIVE", "untouched")),
    ],
)
def test_the_lock_of_a_statement_is_known(sql: str, lock: tuple[str, str, str]) -> None:
    """As PostgreSQL's manual has it; what is dear is never called cheap."""
    assert locks_of(sql, {"ix_a": "a"}) == (Lock(*lock),)


# -- --check ----------------------------------------------------------------------------------------------------------


@pytest.mark.case("OPS-17")
def test_the_check_needs_the_database_and_nothing_else(bare: Cli, empty_url: str) -> None:
    """No issuer, no master key: an init container is given the database's address, and its answer is the exit code."""
    oldest = f"needs {OLDEST_SCHEMA_REVISION}: run `identity-service migrate`\n"
    told = bare.run("migrate", "--check", IDENTITY_DATABASE_URL=empty_url)
    assert (told.code, told.out) == (1, "")
    assert told.err == f"identity-service: the database's schema (none yet) is older than this version, which {oldest}"
    assert execute(empty_url, "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]
    for each in revisions():
        migrate(empty_url, revision=each)
        told = bare.run("migrate", "--check", IDENTITY_DATABASE_URL=empty_url)
        if each < OLDEST_SCHEMA_REVISION:
            assert (told.code, told.out) == (1, "")
            assert f"schema ({each}) is older than this version, which {oldest}" in told.err
        else:
            assert (told.code, told.err) == (0, "")
            assert told.out.startswith(f"The schema is at {each}: new enough for this version")
            assert (f"can bring it to {SCHEMA_REVISION}" in told.out) == (each < SCHEMA_REVISION)
    execute(empty_url, "UPDATE alembic_version SET version_num = '9999'")
    told = bare.run("migrate", "--check", IDENTITY_DATABASE_URL=empty_url)
    assert (told.code, told.out) == (0, "The schema is at 9999: new enough for this version.\n")


def test_a_database_that_does_not_answer_fails_the_check(bare: Cli) -> None:
    """An init container begins again until it does; the password is not printed."""
    nobody = f"postgresql+psycopg://identity:{PASSWORD}@127.0.0.1:1/identity"
    for option in ("--check", "--plan"):
        told = bare.run("migrate", option, IDENTITY_DATABASE_URL=nobody)
        assert (told.code, told.out) == (1, "")
        assert "the database cannot be reached" in told.err


def test_the_check_of_a_file_makes_none(bare: Cli, tmp_path: Path) -> None:
    """A typing error makes no second world."""
    told = bare.run("migrate", "--check", "--data-dir", str(tmp_path / "mistyped")).refused()
    assert "there is no database at" in told
    assert not (tmp_path / "mistyped").exists()


def test_one_cannot_ask_for_a_plan_and_a_check_at_once(bare: Cli, empty_url: str) -> None:
    """Two questions have two exit codes."""
    told = bare.run("migrate", "--plan", "--check", IDENTITY_DATABASE_URL=empty_url).refused()
    assert told == "identity-service: say --plan or --check, not both\n"


def test_the_server_and_the_check_ask_for_the_same_schema(old_url: str, on_postgres: Cli) -> None:
    """What passes the check starts; what does not is refused with the same sentence."""
    served = on_postgres.run("serve", IDENTITY_DATABASE_URL=old_url)
    checked = on_postgres.run("migrate", "--check", IDENTITY_DATABASE_URL=old_url).refused()
    assert served.code == 2
    assert served.err.partition("\n")[2] == checked.removeprefix("identity-service: ")


async def test_start_and_readiness_take_the_oldest_schema_that_the_code_works_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be older than the one it brings a database to."""
    for module in (health, services):
        monkeypatch.setattr(module, "OLDEST_SCHEMA_REVISION", "0003")
    for found, good in (("0003", True), ("0002", False), ("0004", True)):
        await service.execute(text("UPDATE alembic_version SET version_num = :found").bindparams(found=found))
        assert (await services.schema_fault(service.services.db) is None) == good
        answer = await health.Readiness(
            service.services.db, service.services.signing_keys, service.app.drain
        )._check_database()
        assert (answer == "ok") == good


# -- doing it ---------------------------------------------------------------------------------------------------------


def test_a_migration_needs_the_database_and_nothing_else(bare: Cli, old_url: str) -> None:
    """It says each revision that it ran, on standard error."""
    done = bare.run("migrate", IDENTITY_DATABASE_URL=old_url)
    assert (done.code, done.out) == (0, "The schema is up to date.\n")
    assert [line[:5] for line in done.err.splitlines()] == [f"{each}:" for each in revisions() if each > OLD]


@pytest.mark.case("OPS-18")
def test_a_migration_that_is_held_up_says_so_in_a_sentence(bare: Cli, old_url: str) -> None:
    """With exit code 1, and what to do; then it can be run again."""
    address = plain(old_url)
    with psycopg.connect(address, application_name="a report") as somebody:
        somebody.execute("SELECT count(*) FROM users")
        held = bare.run("migrate", "--patience", "1", IDENTITY_DATABASE_URL=old_url)
        assert (held.code, held.out) == (1, "")
        assert "schema is whole, at 0002. The oldest transaction is that of a report (process" in held.err
    assert bare.run("migrate", IDENTITY_DATABASE_URL=old_url).code == 0
