"""
What a migration would do, told without doing it: its statements, the tables they lock, and how many rows those have.

The revisions themselves are asked. On PostgreSQL they run on a connection that passes on what they read and writes
down the rest; on SQLite they run on an empty copy of the schema in memory.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from identity_service.infra.migrate import connected, current_revision, script_config

LOCKS: Final = ("ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE")
"""PostgreSQL's locks on a table that statements of a migration take, the weakest first."""
ROWS: Final = ("untouched", "read", "written")
"""What happens to the rows of a table: the first costs no time, the others more of it the more rows there are."""

_WRITE, _BUILD, _SHARE, _REFER, _ALONE = LOCKS
_COUNTED = 8 * 1024 * 1024  # bytes of a table up to which its rows are counted


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that a statement takes on a table that is there already, and what it does to the rows."""

    table: str
    mode: str
    rows: str


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement; `alone` when it is no part of a transaction, `locks` None when this module does not know it."""

    sql: str
    alone: bool
    locks: tuple[Lock, ...] | None


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows a table has: counted, or estimated by the last ANALYZE (None: nobody has looked yet)."""

    number: int | None
    counted: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One revision that would run; not `complete` when the rest depends on what an earlier one has done by then."""

    revision: str
    sentence: str
    statements: tuple[Statement, ...]
    makes: tuple[str, ...]
    complete: bool

    def locks(self) -> tuple[Lock, ...]:
        """Return the strongest lock on each table, as they add up until a transaction ends."""
        strongest: dict[str, Lock] = {}
        for lock in (lock for statement in self.statements for lock in statement.locks or ()):
            known = strongest.get(lock.table, lock)
            strongest[lock.table] = Lock(
                lock.table,
                max(known.mode, lock.mode, key=LOCKS.index),
                max(known.rows, lock.rows, key=ROWS.index),
            )
        return tuple(strongest.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What `migrate` would do now; `rows` tells of each table that would be locked."""

    current: str | None
    steps: tuple[Step, ...]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    on_sqlite: bool = False


def plan(url: str) -> Plan:
    """Return what the next `migrate` would do; changes nothing. Raises OperationalError where nobody answers."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _plan_on_sqlite(url)
    with connected(url, read_only=True) as connection:
        current = current_revision(connection)
        recorder = _Recorder(connection)
        steps = tuple(recorder.run(script) for script in _pending(current))
        tables = dict.fromkeys(lock.table for step in steps for lock in step.locks())
        return Plan(current, steps, {table: _rows(connection, table) for table in tables})


def _pending(current: str | None) -> Sequence[Any]:
    """Return the scripts that a database lacks, the next one first; none for one that is newer than this code."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(script_config())
    return [script for script in reversed(list(scripts.walk_revisions())) if script.revision > (current or "")]


@contextlib.contextmanager
def _operations(connection: Connection) -> Iterator[None]:
    """Let a revision's `op` speak to the connection."""
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    context = MigrationContext.configure(connection, opts={"render_as_batch": True, "transactional_ddl": True})
    with context.begin_transaction(), Operations.context(context):
        yield


class _Recorder:
    """Runs revisions on a connection that the server keeps from writing, and notes what they would have it do."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._made: list[str] = []
        self._indexes = {row.indexname: row.tablename for row in connection.execute(_INDEXES)}
        connection.rollback()
        self._statements: list[Statement] = []
        engine = connection.engine
        event.listen(engine, "do_execute", lambda cursor, sql, _parameters, _context: self._note(cursor, sql))
        event.listen(engine, "do_executemany", lambda cursor, sql, _parameters, _context: self._note(cursor, sql))
        event.listen(engine, "do_execute_no_params", lambda cursor, sql, _context: self._note(cursor, sql))

    def run(self, script: Any) -> Step:
        """Return what one revision would do."""
        self._statements, known = [], len(self._made)
        try:
            with _operations(self._connection):
                script.module.upgrade()
        except DBAPIError:
            complete = False
        else:
            complete = True
        self._connection.rollback()
        return Step(script.revision, script.doc, tuple(self._statements), tuple(self._made[known:]), complete)

    def _note(self, cursor: Any, sql: str) -> bool:
        """Write a statement down, which counts as having executed it; let one that reads pass."""
        sql = " ".join(sql.split())
        if sql.upper().startswith(("SELECT ", "SHOW ")):
            return False
        if made := _CREATE_TABLE.match(sql):
            self._made.append(made[1])
        elif built := _CREATE_INDEX.match(sql):
            self._indexes[built[2]] = built[3]
        locks = locks_of(sql, self._indexes)
        if locks is not None:
            locks = tuple(lock for lock in locks if lock.table not in self._made)
        self._statements.append(Statement(sql, cursor.connection.autocommit, locks))
        return True


_INDEXES = text("SELECT indexname, tablename FROM pg_indexes WHERE schemaname = current_schema()")
_ON_SQLITE = text(
    "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
)
_NAME = r'"?(\w+)"?'
_CREATE_TABLE = re.compile(rf"CREATE TABLE (?:IF NOT EXISTS )?{_NAME}", re.I)
_CREATE_INDEX = re.compile(
    rf"CREATE (?:UNIQUE )?INDEX (CONCURRENTLY )?(?:IF NOT EXISTS )?{_NAME} ON (?:ONLY )?{_NAME}", re.I
)
_DROP_INDEX = re.compile(rf"DROP INDEX (CONCURRENTLY )?(?:IF EXISTS )?{_NAME}", re.I)
_REFERENCES = re.compile(rf"\bREFERENCES {_NAME}", re.I)
# What is not a constant has to be worked out for each row.
_COMPUTED = r".*(?:\bDEFAULT\b[^,]*\(|\bGENERATED\b|\bSERIAL\b|\bBIGSERIAL\b)"
_ALTER = rf"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?{_NAME} "
_ON_ONE_TABLE: Final = tuple(
    (re.compile(pattern, re.I), mode, rows)
    for pattern, mode, rows in (
        (rf"(?:INSERT INTO|UPDATE|DELETE FROM) (?:ONLY )?{_NAME}", _WRITE, "written"),
        (rf"{_ALTER}SET \(", _BUILD, "untouched"),
        (rf"{_ALTER}VALIDATE CONSTRAINT ", _BUILD, "read"),
        (rf"{_ALTER}ADD CONSTRAINT \S+ FOREIGN KEY.*NOT VALID", _REFER, "untouched"),
        (rf"{_ALTER}ADD CONSTRAINT \S+ FOREIGN KEY", _REFER, "read"),
        (rf"{_ALTER}ADD CONSTRAINT \S+ CHECK.*NOT VALID", _ALONE, "untouched"),
        (rf"{_ALTER}ADD CONSTRAINT ", _ALONE, "read"),
        (rf"{_ALTER}ADD COLUMN {_COMPUTED}", _ALONE, "written"),
        (rf"{_ALTER}ADD COLUMN ", _ALONE, "untouched"),
        (rf"{_ALTER}DROP (?:COLUMN|CONSTRAINT) ", _ALONE, "untouched"),
        (rf"{_ALTER}RENAME ", _ALONE, "untouched"),
        (rf"{_ALTER}ALTER COLUMN \S+ (?:DROP NOT NULL|DROP DEFAULT|SET DEFAULT )", _ALONE, "untouched"),
        (rf"{_ALTER}ALTER COLUMN \S+ SET NOT NULL", _ALONE, "read"),
        (_ALTER, _ALONE, "written"),
        (rf"DROP TABLE (?:IF EXISTS )?{_NAME}", _ALONE, "untouched"),
    )
)


def locks_of(sql: str, indexes: Mapping[str, str]) -> tuple[Lock, ...] | None:
    """
    Return what a statement locks, its own new table aside; None for one that is not known here.

    `indexes` names the table of each index, which dropping one locks (PostgreSQL, "Explicit Locking").
    """
    referred = tuple(Lock(table, _REFER, "untouched") for table in dict.fromkeys(_REFERENCES.findall(sql)))
    if _CREATE_TABLE.match(sql):
        return referred
    if built := _CREATE_INDEX.match(sql):
        return (Lock(built[3], _BUILD if built[1] else _SHARE, "read"),)
    if dropped := _DROP_INDEX.match(sql):
        table = indexes.get(dropped[2])
        return (Lock(table, _BUILD if dropped[1] else _ALONE, "untouched"),) if table else ()
    for pattern, mode, rows in _ON_ONE_TABLE:
        if found := pattern.match(sql):
            return (Lock(found[1], mode, rows), *referred)
    return None


def _rows(connection: Connection, table: str) -> Rows:
    """Count a small table; of a large one return what the last ANALYZE found."""
    known = connection.execute(
        text("SELECT reltuples::bigint, pg_relation_size(oid) FROM pg_class WHERE oid = to_regclass(:name)"),
        {"name": f'"{table}"'},
    ).first()
    if known is None:
        return Rows(None, counted=False)
    estimate, size = known
    if size <= _COUNTED:
        return Rows(_count(connection, table), counted=True)
    return Rows(estimate if estimate >= 0 else None, counted=False)


def _count(connection: Connection, table: str) -> int:
    number: int = connection.execute(text(f'SELECT count(*) FROM "{table}"')).scalar_one()  # noqa: S608  # our own name
    return number


def _plan_on_sqlite(url: str) -> Plan:
    """Run the revisions on an empty copy of the schema; what they lock is always the whole file."""
    path = make_url(url).database
    current, definitions, rows = None, [], {}
    if path and Path(path).exists():
        with connected(url, read_only=True) as connection:
            current = current_revision(connection)
            found = connection.execute(_ON_SQLITE).all()
            definitions = [sql for _kind, _name, sql in found]
            rows = {name: Rows(_count(connection, name), counted=True) for kind, name, _sql in found if kind == "table"}
    steps = []
    with connected("sqlite://") as copy:
        for definition in definitions:
            copy.exec_driver_sql(definition)
        noted: list[str] = []
        event.listen(copy.engine, "before_cursor_execute", lambda _c, _cursor, sql, *_rest: noted.append(sql))
        for script in _pending(current):
            noted.clear()
            with _operations(copy):
                script.module.upgrade()
            copy.commit()
            changes = [" ".join(sql.split()) for sql in noted]
            changes = [sql for sql in changes if not sql.upper().startswith(("SELECT ", "PRAGMA ", "BEGIN"))]
            # Where SQLite cannot alter a table, a new one is made under a name of alembic's and takes its place.
            made = (match[1] for sql in changes if (match := _CREATE_TABLE.match(sql)))
            makes = tuple(name for name in made if not name.startswith("_alembic_tmp_"))
            statements = tuple(Statement(sql, alone=False, locks=()) for sql in changes)
            steps.append(Step(script.revision, script.doc, statements, makes, complete=True))
    return Plan(current, tuple(steps), rows, on_sqlite=True)
