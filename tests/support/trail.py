"""The audit trail by itself: a database, the keys, and nobody in the background who writes or seals."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import select, text
from sqlalchemy.sql import Executable

from identity_service.infra.audit import Anchor, AuditChain, AuditTrail, Origin, Verification
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Database, Transaction
from identity_service.infra.runtime.envelope import MasterKeys
from identity_service.infra.tables import audit_events
from tests.support.clock import FrozenClock
from tests.support.patience import patient_database
from tests.support.service import MASTER_KEY

Answer = TypeVar("Answer")


@dataclass
class Trail:
    """A database with a trail, and the hands that write, seal, tamper and look."""

    db: Database
    clock: FrozenClock
    keys: DataKeys
    audit: AuditTrail
    chain: AuditChain
    written: int = 0

    async def within(self, work: Callable[[Transaction], Awaitable[Answer]]) -> Answer:
        """Do something in one committed transaction."""
        return await self.db.run(work)

    async def execute(self, statement: Executable | str) -> Any:
        """Run one statement, committed, as who owns the database; return its rows, or the count of rows changed."""
        wanted = text(statement) if isinstance(statement, str) else statement

        async def work(tx: Transaction) -> Any:
            result = await tx.execute(wanted)
            return result.all() if result.returns_rows else result.rowcount

        return await self.within(work)

    async def write(self, count: int, *, every: float = 1) -> None:
        """Write rows that differ in everything, one `every` so many seconds."""

        async def work(tx: Transaction) -> None:
            for number in range(self.written + 1, self.written + count + 1):
                await self.audit.record(
                    tx,
                    "client.updated",
                    origin=Origin(f"198.51.100.{number % 250}", f"{number:016x}"),
                    actor=f"actor {number}",
                    target=f"target {number}",
                    client_id=f"client {number}",
                    detail={"number": number},
                )
                self.clock.advance(timedelta(seconds=every))

        await self.within(work)
        self.written += count

    async def seal(self, batch: int = 1000) -> int:
        """Seal what there is, in batches; return how many rows that were."""
        total = 0
        while count := (await self.within(lambda tx: self.chain.seal(tx, batch))).count:
            total += count
        return total

    async def newest(self) -> Anchor:
        """Return the newest seal."""
        return await self.within(self.chain.newest)

    async def verify(self, *anchors: Anchor, page: int = 1000) -> Verification:
        """Walk along the whole chain."""
        walk = self.chain.verification(*anchors)
        walk._page = page
        while await self.within(walk.advance):
            pass
        return walk

    async def fault(self, *anchors: Anchor, page: int = 1000) -> tuple[int, str] | None:
        """Return the first place where the chain does not hold and what is wrong there, or None."""
        fault = (await self.verify(*anchors, page=page)).fault
        return None if fault is None else (fault.seq, str(fault.wrong))

    async def rows(self) -> list[Any]:
        """Return every row, in the order in which they were written."""
        found: list[Any] = await self.execute(select(audit_events).order_by(audit_events.c.id))
        return found


@asynccontextmanager
async def opened_trail(url: str, **options: str) -> AsyncIterator[Trail]:
    """Yield the trail of a database that holds the keys of the tests' master key."""
    clock = FrozenClock()
    db = patient_database(url, options=options)
    keys = DataKeys(MasterKeys.parse(MASTER_KEY), clock)
    try:
        await db.run(keys.load)
        if not db.on_sqlite:  # whose template has seen rows, which are gone
            async with db.transaction() as tx:
                await tx.execute(text("ALTER SEQUENCE audit_events_id_seq RESTART"))
        yield Trail(db, clock, keys, AuditTrail(clock), AuditChain(clock, keys))
    finally:
        await db.close()
