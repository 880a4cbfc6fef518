"""Holding a transaction open by hand, and seeing who waits for it: a race that happens every time."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import psycopg
from sqlalchemy import text

from identity_service.accounts.clients import Client
from identity_service.infra.database import Transaction
from tests.support.service import Registered, Service

Answer = TypeVar("Answer")

_WAITING = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
_PATIENCE = 20.0  # seconds for what takes milliseconds; the tests' service gives up a lock after thirty


class HeldTransaction:
    """A transaction in the test's hand: what it has done is done, and neither committed nor visible yet."""

    def __init__(self, service: Service) -> None:
        self.tx: Transaction = service.services.db.transaction()
        self._open = True

    async def commit(self) -> None:
        """Let everybody see it."""
        self._open = False
        await self.tx.__aexit__(None, None, None)

    async def roll_back(self) -> None:
        """Undo it."""
        if self._open:
            self._open = False
            await self.tx.__aexit__(RuntimeError, RuntimeError(), None)


@asynccontextmanager
async def held(service: Service) -> AsyncIterator[HeldTransaction]:
    """Open a transaction to be committed or rolled back by hand; at the end it is rolled back if neither was done."""
    transaction = HeldTransaction(service)
    try:
        yield transaction
    finally:
        await transaction.roll_back()


async def waiting(service: Service) -> int:
    """Return how many sessions of this test's database wait for a lock."""
    count: int = (await service.execute(_WAITING))[0][0]
    return count


async def blocked(service: Service, work: Coroutine[Any, Any, Answer], *, behind: int = 0) -> "asyncio.Task[Answer]":
    """
    Start `work` and return once it waits for a lock in the database, `behind` others that wait already.

    Fails if it comes through, because then nothing stands between it and the transaction that is held.
    """
    task = asyncio.ensure_future(work)
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while await waiting(service) <= behind:
        await asyncio.sleep(0.002)
        assert not task.done(), f"it did not wait: {task.result()!r}"
        assert asyncio.get_running_loop().time() < deadline, "it neither waits for a lock nor ends"
    return task


async def loaded(service: Service, client: Registered) -> Client:
    """Return a client as the service knows it."""
    found = await service.within(lambda tx: service.services.clients.find(tx, client.id))
    assert found is not None
    return found


@contextmanager
def database_errors() -> Iterator[list[str]]:
    """Collect the SQLSTATE of everything PostgreSQL refuses meanwhile: deadlocks, lock timeouts, anything."""
    seen: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def noting(cursor: Any, *given: Any, **named: Any) -> Any:
        try:
            return await execute(cursor, *given, **named)
        except psycopg.Error as error:
            seen.append(error.sqlstate or type(error).__name__)
            raise

    with patch.object(psycopg.AsyncCursor, "execute", noting):
        yield seen
