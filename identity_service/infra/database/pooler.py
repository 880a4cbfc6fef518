"""
What the service demands of its sessions in PostgreSQL, and how it has that behind a connection pooler.

A pooler in transaction mode lends PostgreSQL's sessions out, each for one transaction. What a connection is told when
it begins is refused there or lost, and what was prepared in one session is missing in the next. Behind a pooler that
was spoken of, the role's own defaults stand for what is said at the beginning, and nothing is prepared. One that nobody
spoke of is noticed, because it must make up the process id that a connection is greeted with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import structlog
from sqlalchemy import Dialect, Engine, TextClause, event, text

log = structlog.get_logger(__name__)

SESSION_SETTINGS: Final[Mapping[str, str]] = {
    "statement_timeout": "5000",
    "lock_timeout": "2000",
    "idle_in_transaction_session_timeout": "10000",
    "timezone": "UTC",
    # What requests do all the time finds rows by key. A plan made while the tables were nearly empty would scan them,
    # and a prepared statement keeps its plan; with scans priced out, the first plan is the right one for good.
    "enable_seqscan": "off",
    "jit": "off",  # a scan that cannot be avoided looks so dear then that it would be compiled first
}
"""What every session of a server is to be like. Timeouts are in milliseconds."""

DEFAULTS: Final[TextClause] = text(
    "SELECT lower(name) AS name, setting, session_user AS role, current_database() AS database"
    " FROM pg_settings WHERE lower(name) = ANY(:names)"
).bindparams(names=list(SESSION_SETTINGS))
"""Asks what a session is like that was told nothing when it began, and whose it is."""

_TIMEOUTS: Final = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
_PID: Final = "SELECT pg_backend_pid()"
# PgBouncer's words; it has no codes for them.
_REFUSED: Final = "unsupported startup parameter"
_ALL_LENT: Final = "query_wait_timeout"
_NOT_SPOKEN_OF: Final = (
    "IDENTITY_DATABASE_URL leads to a connection pooler, which loses what a session is told and what was prepared in"
    " it: set IDENTITY_DATABASE_POOLER=transaction, or name PostgreSQL itself"
)
_NOT_FOR_MIGRATIONS: Final = (
    "IDENTITY_DATABASE_URL leads to a connection pooler, where a migration could not keep the lock that makes it the"
    " only one: for this command, name PostgreSQL itself"
)


class PoolerInTheWay(psycopg.OperationalError):
    """Somebody else than PostgreSQL answers at its address; the message says what to do."""


def startup_options(settings: Mapping[str, str]) -> str:
    """Return settings as a connection is told them when it begins."""
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


def defaults_fault(found: Mapping[str, str], *, role: str, database: str) -> str | None:
    """
    Return which defaults of the role the service cannot do with, as the lines that mend it; None if it can.

    A timeout may be shorter than ours, so that a version with other ones finds a time when both can run.
    """
    wrong = [name for name, wanted in SESSION_SETTINGS.items() if not _will_do(name, found.get(name, ""), wanted)]
    if not wrong:
        return None
    whose = f"{_quoted(role)} IN DATABASE {_quoted(database)}"
    return "\n".join(
        (
            "behind a pooler the role's own defaults stand for what a session is told. On PostgreSQL itself, run",
            *(f"  ALTER ROLE {whose} SET {name} = '{SESSION_SETTINGS[name]}';" for name in wrong),
            "and then let the pooler connect anew (PgBouncer: RECONNECT on its console)",
        )
    )


def has_nothing_to_lend(error: BaseException | None) -> bool:
    """Return whether a pooler says that every session was lent, and stayed so for as long as it lets anybody wait."""
    return isinstance(error, psycopg.Error) and str(error).startswith(_ALL_LENT)


def _will_do(name: str, found: str, wanted: str) -> bool:
    if name in _TIMEOUTS:
        return found.isdecimal() and 0 < int(found) <= int(wanted)
    return found == wanted


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


async def open_directly(**given: Any) -> psycopg.AsyncConnection[Any]:
    """Connect to PostgreSQL; raises PoolerInTheWay, and says so in the log, when a pooler answers in its place."""
    try:
        with _told_in(_NOT_SPOKEN_OF):
            connection = await psycopg.AsyncConnection.connect(**given)
        try:
            await connection.set_autocommit(True)  # asking shall begin no transaction
            row = await (await connection.execute(_PID)).fetchone()
            await connection.set_autocommit(False)
            _check_greeting(row, connection.info.backend_pid, _NOT_SPOKEN_OF)
        except BaseException:
            await connection.close()
            raise
    except PoolerInTheWay as error:
        log.error("database.pooler", hint=str(error))  # whoever asks for something hears 503, and no words
        raise
    return connection


def refuse_poolers(engine: Engine) -> None:
    """Let an engine for migrations connect to PostgreSQL only; otherwise connecting raises PoolerInTheWay."""

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Dialect, _record: object, words: Any, named: Any) -> Any:
        with _told_in(_NOT_FOR_MIGRATIONS):
            connection: Any = dialect.connect(*words, **named)
        try:
            connection.autocommit = True  # asking shall begin no transaction
            row = connection.execute(_PID).fetchone()
            connection.autocommit = False
            _check_greeting(row, connection.info.backend_pid, _NOT_FOR_MIGRATIONS)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def _told_in(words: str) -> Iterator[None]:
    """Say in our words that options were refused; whatever else goes wrong is said as it was."""
    try:
        yield
    except psycopg.OperationalError as error:
        if _REFUSED not in str(error):
            raise
        raise PoolerInTheWay(words) from error


def _check_greeting(row: Any, greeted: int, words: str) -> None:
    if row != (greeted,):
        raise PoolerInTheWay(words)
