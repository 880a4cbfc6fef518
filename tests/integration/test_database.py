"""The way to the database holds when whoever is on it leaves in the middle."""

import asyncio
import contextlib
import gc

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import make_url

from identity_service.infra.database import Database
from identity_service.settings import UnsafeSettings
from tests.support.service import running, test_settings

MOMENTS = [milliseconds / 1000 for milliseconds in range(0, 60, 3)]


async def leave(db: Database, after: float) -> None:
    """Begin a transaction, the first of its engine, and be cancelled `after` so many seconds."""

    async def look() -> None:
        async with db.transaction() as tx:
            await tx.execute(select(1))
            await tx.execute(text("SELECT pg_sleep(0.02)"))

    task = asyncio.create_task(look())
    await asyncio.sleep(after)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def all_are_closed(url: str) -> bool:
    """Tell whether nobody but who asks is connected; a server takes a moment to notice that somebody left."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with await psycopg.AsyncConnection.connect(plain, autocommit=True) as connection:
        for _ in range(200):
            row = await (await connection.execute(others)).fetchone()
            if row == (0,):
                return True
            await asyncio.sleep(0.02)
    return False


async def test_a_cancelled_transaction_leaves_no_connection_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    monkeypatch.setattr(psycopg.AsyncConnection, "__del__", lambda it: None if it.closed else left.append(repr(it)))
    for moment in MOMENTS:
        db = Database(database_url, pool_size=2)
        await leave(db, moment)
        await db.close()
    gc.collect()
    assert left == []
    assert await all_are_closed(database_url)


async def test_a_start_that_is_refused_leaves_no_connection_open(database_url: str) -> None:
    with pytest.raises(UnsafeSettings):
        async with running(test_settings(database_url, default_client_id="cl_0000000000000000000000")):
            pass
    assert await all_are_closed(database_url)


async def test_who_is_cancelled_while_waiting_for_a_connection_keeps_none(database_url: str) -> None:
    db = Database(database_url, pool_size=1, pool_timeout=5)
    async with db.transaction() as busy:
        await busy.execute(select(1))
        await leave(db, 0.05)
    async with asyncio.timeout(3), db.transaction() as tx:
        assert (await tx.execute(select(1))).scalar_one() == 1
    await db.close()
