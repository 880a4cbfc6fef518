"""Users in bulk: those that another system let go of come in, and all of them go out in the same form."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import final

from sqlalchemy import or_, select

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock, new_id
from identity_service.infra.tables import users

LARGEST_BATCH = 1000
"""Users in one statement: PostgreSQL takes 65,535 values in one, SQLite 32,766."""


@dataclass(frozen=True, slots=True)
class ImportedUser:
    """A checked user of an import or an export; who comes without an `id` or `created_at` gets them when stored."""

    id: uuid.UUID | None
    username: str
    email: str
    email_canonical: str
    email_verified: bool
    name: str | None
    role: str
    enabled: bool
    created_at: datetime | None
    password_hash: str | None
    password_form: int


class Outcome(StrEnum):
    """What becomes of a user: stored, there already, or why not. The words are for a report."""

    IMPORTED = "imported"
    ALREADY_THERE = "already there"
    USERNAME_TAKEN = "username: belongs to another user"
    EMAIL_TAKEN = "email: belongs to another user"
    ID_TAKEN = "id: belongs to another user, or to a deleted one"
    CHANGED_MEANWHILE = "somebody took one of the names and gave it up meanwhile: import the file again"


@final
class UserImports:
    """Stores users many at a time, and reads them page by page."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def store(self, tx: Transaction, batch: Sequence[ImportedUser]) -> list[Outcome]:
        """
        Store at most `LARGEST_BATCH` users with one statement and return what became of each.

        Those whose username, address or id is taken are left out, so that the same users can be stored again after a
        run that broke off. No two of the batch may share one, and their roles must exist.
        """
        now = self._clock.now()
        ids = [user.id or new_id() for user in batch]
        rows = [
            {
                "id": user_id,
                "username": user.username,
                "email": user.email,
                "email_canonical": user.email_canonical,
                "email_verified_at": now if user.email_verified else None,
                "password_hash": user.password_hash,
                "password_form": user.password_form,
                "role": user.role,
                "enabled": user.enabled,
                "epoch": 0,
                "created_at": user.created_at or now,
                "updated_at": now,
                "name": user.name,
            }
            for user_id, user in zip(ids, batch, strict=True)
        ]
        if not rows:
            return []
        statement = tx.insert(users).on_conflict_do_nothing().returning(users.c.id)
        stored = set((await tx.execute(statement, rows)).scalars())
        left = {user_id: user for user_id, user in zip(ids, batch, strict=True) if user_id not in stored}
        reasons = dict(zip(left, await self.compare(tx, list(left.values())), strict=True))
        return [
            Outcome.CHANGED_MEANWHILE if reason is Outcome.IMPORTED else reason or Outcome.IMPORTED
            for reason in map(reasons.get, ids)
        ]

    async def compare(self, tx: Transaction, batch: Sequence[ImportedUser]) -> list[Outcome]:
        """
        Return what would become of each user if they were stored now.

        Somebody is there already if one user has their username, their address and, if they come with one, their id.
        """
        if not batch:
            return []
        c = users.c
        rows = await tx.execute(
            select(c.id, c.username, c.email_canonical).where(
                or_(
                    c.username.in_([user.username for user in batch]),
                    c.email_canonical.in_([user.email_canonical for user in batch]),
                    c.id.in_([user.id for user in batch if user.id]),
                )
            )
        )
        held = [(row.id, row.username, row.email_canonical) for row in rows]
        by_id, by_name, by_email = ({row[column]: row for row in held} for column in range(3))

        def look(user: ImportedUser) -> Outcome:
            named, addressed = by_name.get(user.username), by_email.get(user.email_canonical)
            if named and named == addressed and user.id in (None, named[0]):
                return Outcome.ALREADY_THERE
            if named:
                return Outcome.USERNAME_TAKEN
            if addressed:
                return Outcome.EMAIL_TAKEN
            return Outcome.ID_TAKEN if user.id in by_id else Outcome.IMPORTED

        return [look(user) for user in batch]

    async def page(self, tx: Transaction, *, after: uuid.UUID | None, limit: int) -> list[ImportedUser]:
        """Return at most `limit` users that were not deleted, by their ids, from the one after `after` on."""
        c = users.c
        statement = select(users).where(c.deleted_at.is_(None)).order_by(c.id).limit(limit)
        if after is not None:
            statement = statement.where(c.id > after)
        return [
            ImportedUser(
                id=row.id,
                username=row.username,
                email=row.email,
                email_canonical=row.email_canonical,
                email_verified=row.email_verified_at is not None,
                name=row.name,
                role=row.role,
                enabled=row.enabled,
                created_at=row.created_at,
                password_hash=row.password_hash,
                password_form=row.password_form,
            )
            for row in await tx.execute(statement)
        ]
