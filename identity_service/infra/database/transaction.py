"""One transaction: its statements, its named locks, and an end for a server that owes an answer too long."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from types import TracebackType
from typing import Any, Final, Self, final

import psycopg
import structlog
from psycopg.pq import TransactionStatus
from sqlalchemy import CursorResult, Dialect, Executable, Table, TextualSelect, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from identity_service.infra.database.failures import (
    DatabaseReadOnly,
    DatabaseUnavailable,
    TransactionConflict,
    translate,
)
from identity_service.infra.runtime import to_its_end
from identity_service.infra.tables import locks
from identity_service.infra.telemetry import Span, child_span
from identity_service.infra.telemetry.metrics import DATABASE_ERRORS, DATABASE_IN_USE, DATABASE_WAIT

log = structlog.get_logger(__name__)

Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]

PATIENCE: Final = 7.0
"""
Seconds for one answer of PostgreSQL, and for a connection to it.

It bounds its own statements more tightly, so this ends only what hears nothing at all: a network that swallows
everything, behind a balancer that keeps on accepting.
"""


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
        *("_asked_at", "_connection", "_demoted", "_driver", "_engine", "_locks", "_loop", "_patience", "_silent"),
        *("_span", "_watch"),
    )

    def __init__(self, engine: AsyncEngine, patience: float = PATIENCE) -> None:
        """`patience` is how many seconds PostgreSQL may take to answer one statement, a commit or a connection."""
        self._engine = engine
        self._patience = patience
        self._silent = False
        self._demoted = False
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
        translated = translate(error, committing=committing)
        if self._silent and isinstance(translated, TransactionConflict):
            translated = DatabaseUnavailable("no answer")
        self._demoted = self._demoted or isinstance(translated, DatabaseReadOnly)
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
            # An error may be a cancellation; and SQLite's thread is waited for, where a cancellation can come yet.
            await (to_its_end(closing) if error is not None or self.on_sqlite else closing)

    async def _close(self, connection: AsyncConnection, failed: str | None) -> None:
        """Roll back what was not committed, and give the connection back; watched, as long as that takes."""
        try:
            if self._driver is not None:  # the pool would say of a lost connection, with a traceback, that it is lost
                if self._driver.info.transaction_status != TransactionStatus.IDLE:
                    with contextlib.suppress(psycopg.Error):
                        await self._driver.rollback()
                # Who takes no changes any more would take none of the next request, either: that one asks the address
                # anew, where another server may be the primary by now.
                if self._driver.closed or self._demoted:
                    await connection.invalidate()
            await connection.close()
        finally:
            DATABASE_IN_USE.dec()
            if self._span is not None:
                self._span.end(failed=failed)
            self._connection = self._driver = self._span = None
            if self._watch is not None:
                self._watch.cancel()
