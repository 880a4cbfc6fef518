"""The engine and its pool: PostgreSQL, or SQLite for one machine and one process."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, final

import structlog
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from identity_service.infra.database import pooler
from identity_service.infra.database.failures import DatabaseUnavailable, TransactionConflict
from identity_service.infra.database.transaction import PATIENCE, Transaction
from identity_service.infra.telemetry.metrics import DATABASE_POOL_SIZE

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")

_NO_TABLE = "42P01"
_CONNECT_TIMEOUT = 3  # seconds
_BUSY_TIMEOUT = 5  # seconds for which SQLite waits for another writer


@final
class Database:
    """The engine and its pool. `transaction()` is the only way in."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        pool_timeout: float = 2.0,
        patience: float = PATIENCE,
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
            self.engine = create_async_engine(self.url, hide_parameters=True, connect_args={"timeout": _BUSY_TIMEOUT})
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
                    "connect_timeout": _CONNECT_TIMEOUT,
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

    async def pooler_fault(self) -> str | None:
        """Return what must be changed about the role before it can be used through a pooler; None if nothing."""
        if not self._pooled:
            return None
        async with self.transaction() as tx:
            rows = (await tx.execute(pooler.DEFAULTS)).all()
        return pooler.defaults_fault(
            {row.name: row.setting for row in rows}, role=rows[0].role, database=rows[0].database
        )

    async def revision(self) -> str | None:
        """
        Return the schema's revision, or None for a database that was never migrated.

        Raises DatabaseUnavailable, also where the role may not look: nobody shall migrate for want of a right.
        """
        try:
            async with self.transaction() as tx:
                found: str | None = (
                    await tx.execute(text("SELECT max(version_num) FROM alembic_version"))
                ).scalar_one()
                return found
        except DBAPIError as error:
            if self.on_sqlite or getattr(error.orig, "sqlstate", None) == _NO_TABLE:
                return None
            raise DatabaseUnavailable(type(error.orig).__name__) from error

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
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _on_begin(connection: Any) -> None:
        # A transaction that reads first and writes later would fail with SQLITE_BUSY in the middle.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
