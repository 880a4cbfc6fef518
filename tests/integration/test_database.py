"""The way to the database holds when whoever is on it leaves in the middle."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Any

import aiosqlite
import psycopg
import pytest
from sqlalchemy import Integer, select, text

from identity_service.infra.database import (
    Database,
    DatabaseUnavailable,
    PoolExhausted,
    Transaction,
    TransactionConflict,
)
from identity_service.settings import UnsafeSettings
from tests.support.addresses import plain
from tests.support.fault_proxy import FaultProxy
from tests.support.patience import patient_database
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
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with await psycopg.AsyncConnection.connect(plain(url), autocommit=True) as connection:
        for _ in range(1500):
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


async def test_who_is_cancelled_while_a_connection_is_given_back_gives_it_back(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that leaves cancels its jobs at any moment, and nobody shall read of a fault then."""
    db, begun, rollback = Database(sqlite_url), asyncio.Event(), aiosqlite.Connection.rollback

    async def slow(connection: aiosqlite.Connection) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        await rollback(connection)

    async def look() -> None:
        async with db.transaction() as tx:
            await tx.execute(select(1))

    await look()  # the first connection is rolled back when it is opened, too
    monkeypatch.setattr(aiosqlite.Connection, "rollback", slow)
    task = asyncio.create_task(look())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert caplog.messages == []
    await db.close()


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
    async with asyncio.timeout(30), db.transaction() as tx:
        assert (await tx.execute(select(1))).scalar_one() == 1
    await db.close()


# -- a server that falls silent ---------------------------------------------------------------------------------------

HOT = text("SELECT 1 AS one").columns(one=Integer())
PATIENCE = 0.5


async def look(tx: Transaction) -> None:
    """Use both ways to the database."""
    await tx.execute(select(1))
    await tx.fetch_hot(HOT, {})


def be_impatient(db: Database, patience: float = PATIENCE, pool_timeout: float = 0.3) -> None:
    """Let a database wait for so many seconds from now on: not while it connects, which takes as long as it takes."""
    pool: Any = db.engine.pool
    db._patience, pool._timeout = patience, pool_timeout


async def fall_silent_before(moment: str, db: Database, proxy: FaultProxy) -> None:
    """Run a transaction whose server says nothing any more from this moment on."""
    async with db.transaction() as tx:
        await look(tx)
        proxy.blackhole()
        if moment == "a statement":
            await tx.execute(select(1))
        elif moment == "a hot statement":
            await tx.fetch_hot(HOT, {})


@pytest.fixture
async def muted(database_url: str) -> AsyncIterator[tuple[Database, FaultProxy]]:
    """A database of little patience behind a proxy that can swallow everything, with three connections in its pool."""
    with FaultProxy.before(database_url) as proxy:
        db = patient_database(proxy.through(database_url), pool_size=3)
        await asyncio.gather(*(db.run(look) for _ in range(3)))
        be_impatient(db)
        yield db, proxy
        proxy.heal()
        await db.close()


@pytest.mark.case("OPS-01")
@pytest.mark.case("OPS-08")
@pytest.mark.parametrize("moment", ["a statement", "a hot statement", "the commit"])
async def test_a_server_that_falls_silent_is_not_waited_for(muted: tuple[Database, FaultProxy], moment: str) -> None:
    """The network accepts and swallows, so no error comes by itself; afterwards the pool is as good as before."""
    db, proxy = muted
    with pytest.raises(DatabaseUnavailable) as refusal:
        async with asyncio.timeout(20):
            await fall_silent_before(moment, db, proxy)
    assert not isinstance(refusal.value, TransactionConflict), "trying again would take as long once more"
    proxy.heal()
    be_impatient(db, 30, 30)  # what is asked now is answered, however busy the machine is
    for _ in range(2):
        await asyncio.gather(*(db.run(look) for _ in range(3)), return_exceptions=True)
    assert await asyncio.gather(*(db.run(look) for _ in range(3))) == [None] * 3


async def test_everybody_who_meets_a_silent_server_hears_it_soon(muted: tuple[Database, FaultProxy]) -> None:
    """Also those who wait for the connections that the others hold."""
    db, proxy = muted
    proxy.blackhole()
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(db.run(look) for _ in range(9)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable, PoolExhausted}


@pytest.mark.parametrize("way", ["execute", "fetch_hot"])
async def test_who_thinks_between_two_statements_is_not_taken_for_silent(database_url: str, way: str) -> None:
    """What counts is how long an answer is owed, not how long a transaction takes."""
    db = patient_database(database_url)
    await db.run(look)
    be_impatient(db, 2 * PATIENCE)
    async with db.transaction() as tx:
        for pause in (0.0, 5 * PATIENCE):
            await asyncio.sleep(pause)
            await (tx.execute(select(1)) if way == "execute" else tx.fetch_hot(HOT, {}))
    await db.close()


async def test_a_server_that_says_hello_and_nothing_more_is_not_waited_for() -> None:
    """It accepts the connection as PostgreSQL does, and the first question of the toolkit stays unanswered."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            size = int.from_bytes(await reader.readexactly(4), "big")
            await reader.readexactly(size - 4)
            writer.write(b"R" + (8).to_bytes(4, "big") + bytes(4) + b"Z" + (5).to_bytes(4, "big") + b"I")
            while await reader.read(1024):
                pass
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        db = Database(f"postgresql+psycopg://nobody@127.0.0.1:{port}/none?sslmode=disable", patience=PATIENCE)
        with pytest.raises(DatabaseUnavailable):
            async with asyncio.timeout(20):
                await db.run(look)
        await db.close()


@pytest.mark.case("OPS-04")
@pytest.mark.parametrize("way", ["execute", "fetch_hot"])
async def test_a_connection_to_a_server_that_takes_no_changes_is_not_used_again(database_url: str, way: str) -> None:
    """After a fail-over the address leads to another server; who holds on to the old one is refused for ever."""
    db = Database(database_url, pool_size=1)
    change = text("UPDATE locks SET name = name").columns()

    async def backend() -> int:
        async with db.transaction() as tx:
            number: int = (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            return number

    before = await backend()
    assert await backend() == before

    async def demoted() -> None:
        async with db.transaction() as tx:
            await tx.execute(text("SET TRANSACTION READ ONLY"))
            await (tx.execute(change) if way == "execute" else tx.fetch_hot(change, {}))

    with pytest.raises(DatabaseUnavailable, match="25006"):
        await demoted()
    assert await backend() != before
    await db.close()
