"""A restored copy is noticed, however it came about; what copies the files goes on serving."""

import asyncio
import os
import shutil
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from identity_service.infra.database import Database
from identity_service.infra.installation import Installation, mark_installation, read_installation
from identity_service.infra.migrate import migrate
from identity_service.main.services import restore_fault
from identity_service.settings import UnsafeSettings
from tests.support.addresses import plain
from tests.support.backups import Backups
from tests.support.commands import PROGRAM, ROOT, in_production
from tests.support.migrations import downgrade
from tests.support.servers import CRASHABLE, LocalPostgres, own_postgres
from tests.support.service import Service, running, test_settings

NUMBERS = (
    "SELECT oid::bigint, 'installation'::regclass::oid::bigint FROM pg_database WHERE datname = current_database()"
)


@pytest.fixture(scope="module")
def migrated(server_with_programs: LocalPostgres) -> str:
    """The URL of a database at home, which no test changes."""
    url = server_with_programs.create_database("at_home")
    migrate(url)
    return url


async def look(url: str) -> Installation | None:
    db = Database(url)
    try:
        return await db.run(read_installation)
    finally:
        await db.close()


async def at_home(url: str) -> bool:
    found = await look(url)
    assert found is not None
    return found.at_home


async def fault(url: str) -> str | None:
    db = Database(url)
    try:
        return await restore_fault(db)
    finally:
        await db.close()


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(plain(url), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def read(url: str, statement: str) -> tuple[Any, ...]:
    with psycopg.connect(plain(url)) as connection:
        row = connection.execute(statement).fetchone()
    assert row is not None
    return row


async def settle(url: str, restored_at: datetime | None = None) -> None:
    db = Database(url)
    try:
        await db.run(lambda tx: mark_installation(tx, restored_at=restored_at))
    finally:
        await db.close()


# -- what is noticed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--single-transaction",), ("--no-owner", "--no-privileges", "--jobs=2")])
async def test_a_dump_in_another_database_is_a_copy(backups: Backups, migrated: str, options: tuple[str, ...]) -> None:
    """In whatever way it was restored; and the one that was dumped stays where it is."""
    copy = backups.restore_elsewhere(backups.dump(migrated), *options)
    assert (await at_home(migrated), await at_home(copy)) == (True, False)
    await settle(copy)
    assert await at_home(copy)


@pytest.mark.parametrize("options", [(), ("--single-transaction",)])
async def test_a_dump_that_replaces_the_tables_is_a_copy(backups: Backups, options: tuple[str, ...]) -> None:
    """The database has the same name and the same number as before."""
    url = backups.a_database()
    migrate(url)
    dump = backups.dump(url)
    backups.restore(dump, url, "--clean", "--if-exists", *options)
    assert not await at_home(url)
    await settle(url)
    assert await at_home(url)
    backups.restore(dump, url, "--clean", "--if-exists", *options)
    assert not await at_home(url)


@pytest.mark.parametrize("emptied", [False, True], ids=["into what migrate made", "into emptied tables"])
async def test_the_data_of_a_dump_in_a_new_schema_is_a_copy(backups: Backups, migrated: str, emptied: bool) -> None:
    """`migrate` has marked the schema, and the data brings a mark of its own; neither speaks for the other."""
    dump = backups.dump(migrated)
    url = backups.a_database()
    migrate(url)
    if emptied:
        execute(url, "TRUNCATE installation")
    backups.load(dump, url)
    assert not await at_home(url)


async def test_a_dump_without_the_mark_is_a_copy(backups: Backups, migrated: str) -> None:
    """No mark is not a good mark."""
    assert not await at_home(backups.restore_elsewhere(backups.dump(migrated, "--exclude-table-data=installation")))


async def test_a_copy_by_way_of_a_template_is_a_copy(backups: Backups, migrated: str) -> None:
    """PostgreSQL copies the files of one database; with the old one dropped, the new one can take its name."""
    name = make_url(migrated).database
    execute(backups.server.url, f'CREATE DATABASE by_template TEMPLATE "{name}"')
    assert not await at_home(migrated.replace(f"/{name}", "/by_template"))


async def test_the_same_restore_on_two_new_servers_is_noticed_on_both(tmp_path: Path, migrated: str) -> None:
    """
    Two servers that were set up alike give the same numbers to the same tables.

    What is restored on the first, put right there, dumped, and restored on the second, still is a copy.
    """
    # What works in the background takes numbers as well, sooner on the one or on the other.
    alike = {**CRASHABLE, "autovacuum": "off"}
    with own_postgres(alike) as first, own_postgres(alike) as second:
        one, other = Backups(first, tmp_path), Backups(second, tmp_path)
        url = one.restore_elsewhere(one.dump(migrated))
        await settle(url, datetime.now(UTC))
        execute(other.server.url, f"CREATE DATABASE {make_url(url).database}")
        again = make_url(second.url).set(database=make_url(url).database).render_as_string(hide_password=False)
        other.restore(other.dump(url), again)
        assert read(url, NUMBERS) == read(again, NUMBERS)
        assert (await at_home(url), await at_home(again)) == (True, False)


# -- what goes on -----------------------------------------------------------------------------------------------------


async def test_copied_files_go_on(backups: Backups, migrated: str) -> None:
    """As a standby that takes over does, or a base backup that is brought up to date."""
    backups.go_on_with_copied_files()
    assert await at_home(migrated)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_and_a_crash_change_nothing(backups: Backups, migrated: str, mode: str) -> None:
    """The marks are on disk like any other row."""
    backups.server.stop(mode)
    backups.server.start()
    assert await at_home(migrated)


@pytest.mark.parametrize(
    "statement",
    [
        "VACUUM FULL",
        "VACUUM FREEZE",
        "ANALYZE",
        "CLUSTER installation USING pk_installation",
        "REINDEX TABLE installation",
    ],
)
async def test_upkeep_changes_nothing(backups: Backups, statement: str) -> None:
    """Rewriting a table moves its rows and does not write them anew."""
    url = backups.a_database()
    migrate(url)
    execute(url, *["SELECT pg_current_xact_id()"] * 3, statement, "VACUUM FREEZE")
    assert await at_home(url)


async def test_migrating_a_copy_again_does_not_hide_that_it_is_one(backups: Backups, migrated: str) -> None:
    """Every rollout migrates first."""
    copy = backups.restore_elsewhere(backups.dump(migrated))
    migrate(copy)
    assert not await at_home(copy)


async def test_a_database_of_the_version_before_is_served(backups: Backups) -> None:
    """It has no mark, so nobody can tell anything; neither server nor probe stumbles over the missing table."""
    url = backups.a_database()
    migrate(url, revision="0004")
    assert await look(url) is None
    assert await fault(url) is None
    migrate(url)
    assert await at_home(url)


async def test_a_copied_file_of_sqlite_goes_unnoticed(sqlite_url: str, tmp_path: Path) -> None:
    """As the documents say."""
    shutil.copy(tmp_path / "identity.db", tmp_path / "copy.db")
    assert await at_home(sqlite_url.replace("identity.db", "copy.db"))
    downgrade(sqlite_url, "0004")
    assert await look(sqlite_url) is None


# -- what is done about it --------------------------------------------------------------------------------------------


def test_a_server_refuses_to_start_on_a_copy(backups: Backups, migrated: str, tmp_path: Path) -> None:
    """With a sentence that names the command."""
    copy = backups.restore_elsewhere(backups.dump(migrated))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
    environment = clean | {"PYTHONPATH": str(ROOT)} | in_production(copy, tmp_path)
    # Not as the other commands are run: if this one does not refuse, it never ends.
    refused = subprocess.run(
        [*PROGRAM, "serve"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    assert "run `identity-service after-restore`" in refused.stderr


async def test_a_server_that_refuses_has_written_nothing(backups: Backups, migrated: str) -> None:
    """Neither keys nor what jobs do: until the command has run, the copy is as it was restored."""
    copy = backups.restore_elsewhere(backups.dump(migrated))
    with pytest.raises(UnsafeSettings, match="after-restore --nothing-lost"):
        async with running(test_settings(copy)):
            pass
    assert read(copy, "SELECT count(*) FROM data_keys") == (0,)


async def test_a_running_server_is_no_longer_ready_when_its_database_is_replaced(backups: Backups) -> None:
    """By an older state of itself, under its feet; with the mark renewed it is ready again."""
    url = backups.a_database()
    migrate(url)
    async with running(test_settings(url)) as service:
        dump = backups.dump(url)
        assert (await service.http.get("/readyz")).status_code == 200
        backups.restore(dump, url, "--clean", "--if-exists", "--single-transaction")
        answer = await until(service, 503)
        assert answer == {"status": "not ready", "database": "restored or copied", "signing_key": "ok"}
        await settle(url)
        assert (await until(service, 200))["database"] == "ok"


async def until(service: Service, status: int) -> dict[str, str]:
    """Ask whether the server is ready until it says so; what it last heard from the database serves for a second."""
    deadline = time.monotonic() + 30
    while (answer := await service.http.get("/readyz")).status_code != status:
        assert time.monotonic() < deadline, answer.text
        await asyncio.sleep(0.1)
    found: dict[str, str] = answer.json()
    return found
