"""
Leases: one replica at a time does a job, and when it dies another one takes over.

A lease is a row with a holder and an end. It is taken by one conditional statement, so two replicas cannot both get it;
it is held for longer than the job may take, and given back as soon as the job is done. Losing one loses nothing: what a
job has done is committed step by step, and whoever comes next goes on from there.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import final

from sqlalchemy import or_, select, update

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import leases


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A job, and when it last ended well."""

    name: str
    done_at: datetime | None


class NoSuchLease(LookupError):
    """A job has no row: the migration that makes it is due, or was forgotten."""


@final
class Leases:
    """Takes and gives back leases for one process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.holder = secrets.token_hex(8)
        """This process's name; a restarted one has another, and waits until what it held has run out."""

    async def take(self, tx: Transaction, name: str, *, every: timedelta, hold: timedelta) -> bool:
        """
        Take the lease of a job for `hold`, if nobody has it and the job was not done within `every`.

        Raises NoSuchLease for a job that has no row: it would never run, and nobody would notice.
        """
        now = self._clock.now()
        c = leases.c
        taken = await tx.execute(
            update(leases)
            .where(c.name == name)
            .where(or_(c.until.is_(None), c.until <= now, c.holder == self.holder))
            # Slightly early is in time: each replica asks at moments of its own.
            .where(or_(c.done_at.is_(None), c.done_at <= now - every * 0.9, c.done_at > now + every))
            .values(holder=self.holder, until=now + hold)
            .returning(c.name)
        )
        if taken.first() is not None:
            return True
        if (await tx.execute(select(c.name).where(c.name == name))).first() is None:
            raise NoSuchLease(f"there is no lease named {name}")
        return False

    async def give_back(self, tx: Transaction, name: str, *, done: bool) -> None:
        """Let others have the lease; with `done`, not before the job is due again."""
        values = {"holder": None, "until": None} | ({"done_at": self._clock.now()} if done else {})
        await tx.execute(update(leases).where(leases.c.name == name, leases.c.holder == self.holder).values(values))

    async def all(self, tx: Transaction) -> Sequence[LeaseState]:
        """Return every job's state."""
        rows = await tx.execute(select(leases.c.name, leases.c.done_at).order_by(leases.c.name))
        return [LeaseState(row.name, row.done_at) for row in rows]
