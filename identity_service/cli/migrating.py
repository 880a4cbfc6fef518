"""The command that brings the database to this version's schema, or tells what that would take."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Annotated

import typer
from sqlalchemy.exc import OperationalError

from identity_service.cli.common import DataDir, Refused, database_settings_for
from identity_service.infra.database import Database, DatabaseUnavailable
from identity_service.infra.migrate import PATIENCE, MigrationBlocked
from identity_service.infra.migrate import migrate as migrate_database
from identity_service.infra.migration_plan import Plan, Rows, Step, plan
from identity_service.infra.tables import SCHEMA_REVISION
from identity_service.main import schema_fault
from identity_service.settings import DatabaseSettings

_WIDEST = 110  # characters of a statement that are shown


def migrate(
    data_dir: DataDir = None,
    tell: Annotated[bool, typer.Option("--plan", help="Print what would be done, and do nothing.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether the schema is new enough; end with 1 if it is not.")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for which to go on asking for tables that others hold.")
    ] = PATIENCE,
) -> None:
    """
    Bring the database to this version's schema; running it again changes nothing.

    Of the settings it needs only the database's. Servers may go on running meanwhile.
    """
    if tell and check:
        raise Refused("say --plan or --check, not both")
    settings = database_settings_for(data_dir)
    if check:
        typer.echo(asyncio.run(_check(settings)))
    elif tell:
        with _reached():
            found = plan(settings.database)
        typer.echo("\n".join(_told(found)))
    else:
        bring_up_to_date(settings.database, patience=patience, say=lambda line: typer.echo(line, err=True))
        typer.echo("The schema is up to date.")


def bring_up_to_date(url: str, *, patience: float = PATIENCE, say: Callable[[str], None] = lambda _line: None) -> None:
    """Migrate a database; raises Refused or DatabaseUnavailable, after which the last whole revision stands."""
    with _reached():
        try:
            migrate_database(url, patience=patience, say=say)
        except MigrationBlocked as blocked:
            raise Refused(str(blocked)) from blocked


@contextmanager
def _reached() -> Iterator[None]:
    """Say of a database that does not answer what the other commands say."""
    try:
        yield
    except OperationalError as error:
        raise DatabaseUnavailable(getattr(error.orig, "sqlstate", None) or type(error.orig).__name__) from error


async def _check(settings: DatabaseSettings) -> str:
    """Return in a sentence that the schema is new enough; raises Refused with one for a schema that is not."""
    if (path := settings.sqlite_file) is not None and not path.exists():
        raise Refused(f"there is no database at {path}: run `identity-service migrate`")
    db = Database(settings.database, pool_size=1, pooled=settings.pooled)
    try:
        if fault := await schema_fault(db):
            raise Refused(fault)
        revision = await db.revision() or ""
    finally:
        await db.close()
    if revision < SCHEMA_REVISION:
        return f"The schema is at {revision}: new enough for this version, which can bring it to {SCHEMA_REVISION}."
    return f"The schema is at {revision}: new enough for this version."


# -- the plan ---------------------------------------------------------------------------------------------------------

_MEANWHILE = {
    "ROW EXCLUSIVE": "others read and write it meanwhile",
    "SHARE UPDATE EXCLUSIVE": "others read and write it meanwhile",
    "SHARE": "others read it meanwhile, and wait to write it",
    "SHARE ROW EXCLUSIVE": "others read it meanwhile, and wait to write it",
    "ACCESS EXCLUSIVE": "others wait to read and to write it",
}
_WORK = {"untouched": "its rows are not touched", "read": "every row is read", "written": "rows are written"}


def _told(found: Plan) -> Iterator[str]:
    """Yield the lines of a plan."""
    if not found.steps:
        yield f"The schema is at {found.current}. There is nothing to do."
        return
    where = f"The schema is at {found.current}." if found.current else "There is no schema yet."
    yield f"{where} `identity-service migrate` would run:"
    for step in found.steps:
        yield ""
        yield from _told_of(step, found)
    if any(not rows.counted for rows in found.rows.values()):
        yield "\nRows are estimated as of the last ANALYZE (pg_class.reltuples) where a table is too large to count."


def _told_of(step: Step, found: Plan) -> Iterator[str]:
    yield f"{step.revision}: {step.sentence}"
    if found.on_sqlite:
        yield "  SQLite locks the file as a whole until this is done."
    elif any(statement.alone for statement in step.statements):
        yield "  Statement by statement, outside of a transaction. What was interrupted is done anew by the next run."
    else:
        yield "  One transaction: all of it or nothing. Its locks are held until it ends, and asked for only briefly."
    yield ""
    for statement, alike in groupby(step.statements):
        sql = statement.sql if len(statement.sql) <= _WIDEST else statement.sql[: _WIDEST - 2] + " …"
        again = f"  ({times} times)" if (times := len(list(alike))) > 1 else ""
        unknown = "" if statement.locks is not None else "  (what this locks is not known here)"
        yield f"  {sql}{again}{unknown}"
    if not step.complete:
        yield "  … and more, which depends on what the revisions before this one have done by then."
    yield ""
    if step.makes:
        yield f"  New tables: {', '.join(step.makes)}"
    for lock in step.locks():
        rows = _count_of(found.rows[lock.table])
        yield f"  {lock.table}, {rows}: {lock.mode}: {_MEANWHILE[lock.mode]}; {_WORK[lock.rows]}"
    if found.on_sqlite and found.rows:
        yield "  Tables there are: " + ", ".join(f"{name}, {_count_of(rows)}" for name, rows in found.rows.items())


def _count_of(rows: Rows) -> str:
    if rows.number is None:
        return "nobody has counted its rows yet"
    return f"{rows.number:,} {'row' if rows.number == 1 else 'rows'} ({'counted' if rows.counted else 'estimated'})"
