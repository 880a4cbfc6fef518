"""
Bring a database to this version's schema. A command of its own in production; never a side effect of starting.

Servers work on while it runs. A revision that must lock a table asks for it only so long that nobody who queues up
behind it fails, lets everybody pass when it has not got it, and asks again.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, NullPool, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from identity_service.infra.database.pooler import refuse_poolers, startup_options

if TYPE_CHECKING:
    from alembic.config import Config

PATIENCE: Final = 60.0
"""Seconds for which a migration goes on asking for what others hold, unless somebody says otherwise."""

# Seconds that a revision waits for locks, try by try. Whoever comes after it queues up behind it, and a request gives a
# lock up after 2 s, so each is shorter. Most are shorter still than PostgreSQL's `deadlock_timeout` of 1 s: where a
# request and a migration wait for each other, it is the migration that gives way. But only who has waited for that long
# makes autovacuum let go of a table, which it may be at for hours.
_WAITS = (0.5, 0.5, 1.5)
_LEAST_WAIT = 0.1  # for each further lock of a transaction that has used its time up
_PAUSE = 1.5  # seconds in which those who queued up can pass before it asks again
_ASK_FOR_TURN = 0.2  # seconds
_ONE_AT_A_TIME = 0x1DE27170  # the advisory lock that makes simultaneous migrations queue up

_NO_LOCK, _DEADLOCK = "55P03", "40P01"
_SERVER_OPTIONS = {
    "statement_timeout": "0",  # a role's own limit is meant for requests; an index takes as long as it takes
    "idle_in_transaction_session_timeout": "0",
    "enable_seqscan": "on",
    "timezone": "UTC",
    # Should this machine vanish in the middle, the next run must not wait for hours until the server notices.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "4",
}
_OLDEST_TRANSACTION = text(
    "SELECT pid, coalesce(nullif(application_name, ''), backend_type), extract(epoch FROM now() - xact_start)::int"
    " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
    " ORDER BY xact_start LIMIT 1"
)


class MigrationBlocked(Exception):
    """Others held for too long what a revision must lock. The last whole revision stands; it can be run again."""


def _silent(_line: str) -> None:
    """Say nothing."""


def migrate(
    url: str, *, revision: str = "head", patience: float = PATIENCE, say: Callable[[str], None] = _silent
) -> None:
    """
    Run the revisions that `url`'s database lacks, up to `revision`; running it again changes nothing.

    Several processes at once queue up on PostgreSQL. Each revision is one transaction, or statements that can be
    repeated: a killed run leaves the last whole revision, and can be started again. A schema that is newer than this
    code is left as it is. `patience` is in seconds; `say` hears of each revision and of what is waited for.
    Raises MigrationBlocked, and OperationalError for a database that does not answer.
    """
    from alembic import command  # a server that only serves never needs it, nor the memory it takes

    deadline = time.monotonic() + patience
    for wait in itertools.cycle(_WAITS):
        try:
            with connected(url, wait=wait, patience=patience) as connection:
                _wait_for_our_turn(connection, say)
                config = script_config(connection=connection, on_version_apply=_telling(say))
                if not _is_newer(current_revision(connection), config):
                    command.upgrade(config, revision)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) not in (_NO_LOCK, _DEADLOCK):
                raise
            if time.monotonic() + _PAUSE > deadline:
                raise MigrationBlocked(_why_blocked(url)) from error
        say("others hold what has to be locked; asking again")
        time.sleep(_PAUSE)


@contextlib.contextmanager
def connected(
    url: str, *, wait: float = _WAITS[0], patience: float = PATIENCE, read_only: bool = False
) -> Iterator[Connection]:
    """
    Yield a connection for work on the schema, and close it for good.

    The statements of a transaction wait for locks for `wait` seconds, all of them together: the first locks are held
    while the next is waited for. What holds nobody up while it is built (`CONCURRENTLY`) may wait for `patience`
    seconds in one go; asked again, it would have to begin anew. With `read_only` the database itself refuses every
    change, and no file is made.
    """
    parsed = make_url(url)
    options: dict[str, Any] = {}
    if parsed.get_backend_name() == "sqlite":
        path = parsed.database or ""
        if read_only:
            parsed = parsed.set(database=f"file:{path}", query={"mode": "ro", "uri": "true"})
        elif path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        parsed = parsed.set(drivername="sqlite")
    else:
        settings = _SERVER_OPTIONS | {"lock_timeout": _milliseconds(wait)}
        settings |= {"default_transaction_read_only": "on"} if read_only else {}
        options = {"connect_timeout": 5, "options": startup_options(settings)}
        if "application_name" not in parsed.query:
            options["application_name"] = "identity-service migrate"
    engine = create_engine(parsed, hide_parameters=True, poolclass=NullPool, connect_args=options)
    if engine.dialect.name == "postgresql":
        refuse_poolers(engine)
        _portion_waits(engine, wait, patience)
    else:
        _begin_by_ourselves(engine, "BEGIN" if read_only else "BEGIN IMMEDIATE")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def script_config(**attributes: Any) -> "Config":
    """Return alembic's configuration; `attributes` are for `env.py`."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_scripts()))
    config.attributes.update(attributes)
    return config


def current_revision(connection: Connection) -> str | None:
    """Return the revision that a database is at, or None for one that was never migrated."""
    from alembic.migration import MigrationContext

    found = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()  # looking has begun a transaction
    return found


def _scripts() -> Path:
    """Return where the revisions are: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def _is_newer(revision: str | None, config: "Config") -> bool:
    """Return whether a database is ahead of this code, as after going back to the version before."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(config).get_current_head()
    return revision is not None and head is not None and revision > head


def _wait_for_our_turn(connection: Connection, say: Callable[[str], None]) -> None:
    """Take the lock. Who waits for it inside a statement would hold up the building of an index by who has it."""
    if connection.dialect.name != "postgresql":
        return
    told = False
    while not connection.execute(text(f"SELECT pg_try_advisory_lock({_ONE_AT_A_TIME})")).scalar_one():
        connection.rollback()
        if not told:
            say("another migration is at work; waiting for it to end")
            told = True
        time.sleep(_ASK_FOR_TURN)
    connection.commit()


def _begin_by_ourselves(engine: Engine, begin: str) -> None:
    """Begin SQLite's transactions: its driver begins none for a statement that makes or drops a table."""

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _portion_waits(engine: Engine, wait: float, patience: float) -> None:
    """Let a transaction's statements share one wait, and each statement that holds nobody up have a longer one."""

    def begin(connection: Connection) -> None:
        connection.info["begun"] = time.monotonic()

    def before(connection: Connection, cursor: Any, statement: str, *_rest: Any) -> None:
        if " CONCURRENTLY " in statement:
            cursor.connection.execute(f"SET lock_timeout = {_milliseconds(max(patience, wait))}")
        elif not cursor.connection.autocommit:
            left = wait - (time.monotonic() - connection.info["begun"])
            cursor.connection.execute(f"SET LOCAL lock_timeout = {_milliseconds(max(left, _LEAST_WAIT))}")

    def after(_connection: Connection, cursor: Any, statement: str, *_rest: Any) -> None:
        if " CONCURRENTLY " in statement:
            cursor.connection.execute("RESET lock_timeout")

    event.listen(engine, "begin", begin)
    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "after_cursor_execute", after)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def _telling(say: Callable[[str], None]) -> Callable[..., None]:
    def applied(*, step: Any, **_rest: Any) -> None:
        say(f"{step.up_revision_id}: {step.up_revision.doc}")

    return applied


def _why_blocked(url: str) -> str:
    """Return where the schema stands and who may be in the way, as far as this role is shown."""
    with connected(url, read_only=True) as connection:
        revision = current_revision(connection)
        oldest = connection.execute(_OLDEST_TRANSACTION).first()
    why = "others hold what the next revision has to lock, and did not let go of it; nothing of it was done, and the"
    why += f" schema is whole, at {revision or 'none'}."
    if oldest is not None:
        pid, name, seconds = oldest
        why += f" The oldest transaction is that of {name or 'somebody'} (process {pid}), open for {seconds} s."
    return f"{why} Run the command again when it has ended."
