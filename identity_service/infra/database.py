"""
The database: one engine, one way to a transaction, and infrastructure trouble told apart from every other answer.

PostgreSQL is what the service runs on; SQLite is the embedded default for one machine and one process.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, final

import psycopg
import structlog
from psycopg.pq import TransactionStatus
from sqlalchemy import CursorResult, Dialect, Executable, Table, TextualSelect, event, func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from identity_service.infra import pooler
from identity_service.infra.runtime import to_its_end
from identity_service.infra.tables import locks
from identity_service.infra.telemetry import Span, child_span
from identity_service.infra.telemetry.metrics import (
    DATABASE_ERRORS,
    DATABASE_IN_USE,
    DATABASE_POOL_SIZE,
    DATABASE_WAIT,
)

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")
Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]

# SQLSTATE classes and codes that speak of the server's state, never of our statement (PostgreSQL, appendix A).
_UNAVAILABLE_CLASSES = ("08", "53", "57", "58")
_UNAVAILABLE_CODES = ("25006", "55P03", "25P03")
_CONFLICT_CODES = ("40001", "40P01")
# Seconds for one answer of PostgreSQL, and for a connection to it. It bounds its own statements more tightly, so this
# ends only what hears nothing at all: a network that swallows everything, behind a balancer that keeps on accepting.
_PATIENCE = 7.0


class DatabaseUnavailable(Exception):
    """The database cannot answer now; nothing was committed by this transaction, or nobody knows. Never "not found"."""

    kind = "unavailable"
    """What the metrics call it."""


class PoolExhausted(DatabaseUnavailable):
    """Every connection is busy, and stayed so for as long as a request waits; the database itself may be well."""

    kind = "pool_exhausted"


class TransactionConflict(DatabaseUnavailable):
    """The transaction lost to another one or its connection died before COMMIT: it left no trace, and may run again."""

    kind = "conflict"


def _translate(error: Exception, *, committing: bool) -> Exception:
    """Return the error that callers shall see: ours for trouble with the server, the driver's own for a fault in us."""
    if isinstance(error, PoolTimeout):
        return PoolExhausted("no connection was free")
    if isinstance(error, OSError):
        return DatabaseUnavailable(type(error).__name__)
    if isinstance(error, psycopg.Error):
        cause: BaseException | None = error
        lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    elif isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
        cause, lost = error.orig, error.connection_invalidated
    else:
        return error
    if (sqlite_code := getattr(cause, "sqlite_errorcode", None)) is not None:
        # Busy, full, read-only, I/O trouble are the machine's; 1 (SQLITE_ERROR) is a statement that makes no sense.
        return error if sqlite_code == 1 else DatabaseUnavailable(getattr(cause, "sqlite_errorname", "sqlite"))
    if pooler.has_nothing_to_lend(cause):
        return PoolExhausted("the pooler had no session to lend")
    code = getattr(cause, "sqlstate", None) or ""
    if code in _CONFLICT_CODES:
        return TransactionConflict(code)
    lost = lost or code.startswith(("08", "57P"))  # 08: what a pooler says when it has lost the server
    if lost and not committing:
        return TransactionConflict(code or "connection lost")
    if (
        lost
        or code.startswith(_UNAVAILABLE_CLASSES)
        or code in _UNAVAILABLE_CODES
        or (not code and isinstance(error, OperationalError | InterfaceError))
    ):
        return DatabaseUnavailable(code or type(cause).__name__)
    return error


@cache
def _driver_text(statement: TextualSelect) -> bytes:
    """Return a statement in the driver's own notation; statements are constants of this code, never built."""
    dialect: Dialect = postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]  # the toolkit left it bare
    return str(statement.compile(dialect=dialect)).encode("ascii")


@final
class Transaction:
    """
    One transaction, which takes a connection only when the first statement runs.

    A request that needs no database (a client answered from memory) therefore costs it nothing.
    """

    __slots__ = (
        *("_asked_at", "_connection", "_driver", "_engine", "_locks", "_loop", "_patience", "_silent", "_span"),
        "_watch",
    )

    def __init__(self, engine: AsyncEngine, patience: float = _PATIENCE) -> None:
        """`patience` is how many seconds PostgreSQL may take to answer one statement, a commit or a connection."""
        self._engine = engine
        self._patience = patience
        self._silent = False
        self._asked_at: float | None = None  # by the loop's clock; None while no answer is owed
        self._watch: asyncio.TimerHandle | None = None
        self._locks: frozenset[str] = frozenset()
        self._connection: AsyncConnection | None = None
        self._driver: psycopg.AsyncConnection[Any] | None = None
        self._span: Span | None = None

    @property
    def on_sqlite(self) -> bool:
        """Whether this is the embedded database, which locks as a whole and knows no row locks."""
        return self._engine.dialect.name == "sqlite"

    async def execute(self, statement: Executable, parameters: Parameters | None = None) -> CursorResult[Any]:
        """
        Run one statement and return its buffered result.

        Raises DatabaseUnavailable for trouble with the server, IntegrityError for a broken constraint.
        """
        try:
            connection = self._connection or await self._connect()
            self._asked_at = self._loop.time()
            result = await connection.execute(statement, parameters)
        except (DBAPIError, PoolTimeout, OSError) as error:
            raise self._translated(error, committing=False) from error
        self._asked_at = None
        return result

    async def fetch_hot(self, statement: TextualSelect, parameters: Mapping[str, Any]) -> Sequence[Any] | None:
        """
        Run one textual statement and return its first row's values, or None; the short way for the one hot statement.

        On PostgreSQL it goes straight to the driver beneath the pool, in this same transaction: the toolkit's
        execution machinery costs several times the statement's round trip. Elsewhere it is `execute`.
        """
        if self.on_sqlite:
            return (await self.execute(statement, parameters)).first()
        try:
            if self._driver is None:
                await self._connect()
            assert self._driver is not None  # noqa: S101  # a connection to PostgreSQL has one
            self._asked_at = self._loop.time()
            cursor = await self._driver.execute(_driver_text(statement), parameters)
            row: Sequence[Any] | None = await cursor.fetchone()
        except (psycopg.Error, DBAPIError, PoolTimeout, OSError) as error:
            raise await self._broken(error, committing=False) from error
        self._asked_at = None
        return row

    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """Return this database's own INSERT, which can leave alone a row that somebody else made meanwhile."""
        return sqlite.insert(table) if self.on_sqlite else postgresql.insert(table)

    async def lock(self, name: str) -> None:
        """
        Wait for the named lock, held until this transaction ends; its row was made by the migration.

        Raises LookupError where there is no such row: a lock that locks nothing must not look like one.
        """
        held = await self.execute(select(locks.c.name).where(locks.c.name == name).with_for_update())
        if held.first() is None:
            raise LookupError(f"the database has no lock named {name}")
        self._locks |= {name}

    def demand_lock(self, name: str) -> None:
        """Raise RuntimeError unless this transaction holds the named lock: what is true only behind it is asked."""
        if name not in self._locks:
            raise RuntimeError(f"the lock {name} is not held")

    async def database_time(self) -> datetime:
        """Return PostgreSQL's clock; SQLite has none but this machine's, so nobody asks it."""
        moment: datetime = (await self.execute(select(func.clock_timestamp()))).scalar_one()
        return moment

    async def _connect(self) -> AsyncConnection:
        connection, began = self._engine.connect(), time.perf_counter()
        self._loop = asyncio.get_running_loop()
        span = child_span("database.transaction", **{"db.system.name": self._engine.dialect.name})
        try:
            if self.on_sqlite:  # its patience is its own, and nobody can fall silent
                await connection.start()
            else:
                async with asyncio.timeout(self._patience):
                    await connection.start()
        except BaseException as error:
            span.end(failed=type(error).__name__)
            raise
        DATABASE_WAIT.observe(time.perf_counter() - began)
        DATABASE_IN_USE.inc()
        if not self.on_sqlite:
            # The connection is open already, so looking beneath it needs no detour through the event loop.
            proxied = connection.sync_connection
            self._driver = proxied.connection.driver_connection if proxied is not None else None
            self._watch = self._loop.call_later(self._patience, self._look)
        self._connection, self._span = connection, span
        return connection

    def _look(self) -> None:
        """
        End the connection when its server has owed an answer for too long; else look again when it could have.

        Whoever waits for the answer then hears that the connection is lost. A cancellation would not do: the driver
        answers one by asking the same silent server to cancel the statement.
        """
        driver, now = self._driver, self._loop.time()
        if driver is None or driver.closed:
            return
        waited = now - self._asked_at if self._asked_at is not None else 0.0
        if waited < self._patience:
            self._watch = self._loop.call_later(self._patience - waited, self._look)
            return
        self._silent = True
        log.warning("database.silent", seconds=round(waited, 1))
        with socket.socket(fileno=os.dup(driver.fileno())) as line, contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    def _translated(self, error: Exception, *, committing: bool) -> Exception:
        """Translate a failure. What was lost to silence is not tried again: that would take as long once more."""
        translated = _translate(error, committing=committing)
        if self._silent and isinstance(translated, TransactionConflict):
            translated = DatabaseUnavailable("no answer")
        if isinstance(translated, DatabaseUnavailable):
            DATABASE_ERRORS.labels(translated.kind).inc()
        return translated

    async def _broken(self, error: Exception, *, committing: bool) -> Exception:
        """
        Translate a failure; when the driver lost the connection, let the toolkit find out.

        Its pool then doubts every connection that is as old: what ended this one, a restart, ended them as well, and
        otherwise each of them would fail a request of its own.
        """
        lost = self._driver is not None and self._driver.closed and not self._silent  # the silent one still is
        if self._connection is not None and lost:
            with contextlib.suppress(SQLAlchemyError):
                await self._connection.rollback()
                await self._connection.execute(select(1))
        return self._translated(error, committing=committing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is None:
            return
        connection = self._connection
        self._asked_at = self._loop.time()
        failed = error.kind if isinstance(error, DatabaseUnavailable) else None
        try:
            if error is None:
                if connection.in_transaction():
                    await connection.commit()
                elif self._driver is not None:
                    await self._driver.commit()
        except (psycopg.Error, DBAPIError, OSError) as failure:
            failed = "commit"
            raise await self._broken(failure, committing=True) from failure
        finally:
            closing = self._close(connection, failed)
            await (closing if error is None else to_its_end(closing))  # an error may be a cancellation

    async def _close(self, connection: AsyncConnection, failed: str | None) -> None:
        """Roll back what was not committed, and give the connection back; watched, as long as that takes."""
        try:
            if self._driver is not None:  # the pool would say of a lost connection, with a traceback, that it is lost
                if self._driver.info.transaction_status != TransactionStatus.IDLE:
                    with contextlib.suppress(psycopg.Error):
                        await self._driver.rollback()
                if self._driver.closed:
                    await connection.invalidate()
            await connection.close()
        finally:
            DATABASE_IN_USE.dec()
            if self._span is not None:
                self._span.end(failed=failed)
            self._connection = self._driver = self._span = None
            if self._watch is not None:
                self._watch.cancel()


@final
class Database:
    """The engine and its pool. `transaction()` is the only way in."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        pool_timeout: float = 2.0,
        patience: float = _PATIENCE,
        options: Mapping[str, str] | None = None,
        pooled: bool = False,
    ) -> None:
        """
        Prepare the engine; nothing connects yet.

        `pool_timeout` is in seconds: how long a request waits for a connection before it hears 503. `patience` as well:
        how long PostgreSQL may owe an answer before the connection is given up, and the request hears 503. `pooled`
        says that a pooler in transaction mode answers at the address: then the role's defaults stand for `options`.
        """
        self.url = make_url(url)
        self._patience = patience
        self._pooled = pooled and not self.on_sqlite
        if self.on_sqlite:
            if self.url.database:
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            self.engine = create_async_engine(self.url, hide_parameters=True, connect_args={"timeout": 5})
            _prepare_sqlite(self.engine)
        else:
            DATABASE_POOL_SIZE.set(pool_size)
            self.engine = create_async_engine(
                self.url,
                hide_parameters=True,
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=pool_timeout,
                pool_recycle=1800,
                connect_args={
                    "connect_timeout": 3,
                    # A server that vanishes without a word is noticed within seconds, also by who waits for its answer.
                    "tcp_user_timeout": 5000,
                    "keepalives_idle": 5,
                    "keepalives_interval": 2,
                    "keepalives_count": 3,
                    "application_name": "identity-service",
                    **(_THROUGH_A_POOLER if self._pooled else _directly(options or {})),
                },
            )

    @property
    def on_sqlite(self) -> bool:
        """Whether this is the embedded database."""
        return self.url.get_backend_name() == "sqlite"

    def transaction(self) -> Transaction:
        """Return a transaction to enter: it commits at the end of the block and rolls back on an exception."""
        return Transaction(self.engine, self._patience)

    async def run(self, work: Callable[[Transaction], Awaitable[Answer]], *, attempts: int = 3) -> Answer:
        """
        Return what `work` makes of a transaction, after it was committed; run it again when it left no trace.

        A transaction that lost a deadlock, or whose connection died before COMMIT, is repeated at most `attempts`
        times in all. After that, and whenever nobody can know whether it was committed: DatabaseUnavailable.
        """
        while True:
            attempts -= 1
            try:
                async with self.transaction() as tx:
                    answer = await work(tx)
            except TransactionConflict as conflict:
                if attempts <= 0:
                    raise
                log.info("transaction.repeated", reason=str(conflict))
                await asyncio.sleep(0.01)
            else:
                return answer

    async def fault(self) -> str | None:
        """Return what must be changed about the role before it can be used through a pooler; None if nothing."""
        if not self._pooled:
            return None
        async with self.transaction() as tx:
            rows = (await tx.execute(pooler.DEFAULTS)).all()
        return pooler.defaults_fault(
            {row.name: row.setting for row in rows}, role=rows[0].role, database=rows[0].database
        )

    async def revision(self) -> str | None:
        """Return the schema's revision, or None for a database that was never migrated."""
        try:
            async with self.transaction() as tx:
                found: str | None = (
                    await tx.execute(text("SELECT max(version_num) FROM alembic_version"))
                ).scalar_one()
                return found
        except DBAPIError:
            return None

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.engine.dispose()


# A statement that was prepared in one session is unknown in the next, or is another one.
_THROUGH_A_POOLER: Mapping[str, Any] = {"prepare_threshold": None}


def _directly(options: Mapping[str, str]) -> Mapping[str, Any]:
    """Return how to connect to PostgreSQL itself, and to nothing else."""
    settings = {**pooler.SESSION_SETTINGS, **options}
    return {"options": pooler.startup_options(settings), "async_creator_fn": pooler.open_directly}


def _prepare_sqlite(engine: AsyncEngine) -> None:
    """Set the write-ahead log, foreign keys, a clock, and transactions that take the write lock as they begin."""

    @event.listens_for(engine.sync_engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver shall not open transactions behind our back
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA busy_timeout = 5000")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _on_begin(connection: Any) -> None:
        # A transaction that reads first and writes later would fail with SQLITE_BUSY in the middle.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
