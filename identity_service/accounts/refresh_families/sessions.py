"""Sessions as people see them: each live family is one, with where and when it began."""

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import final

from sqlalchemy import ColumnElement, and_, func, select, update

from identity_service.infra.audit import Origin
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import LONGEST_USER_AGENT, clients, refresh_families, users

_LONGEST_NETWORK = 64


@dataclass(frozen=True, slots=True)
class Session:
    """A live session; `current` is the one that asks."""

    id: uuid.UUID
    client_id: str
    client_name: str
    user_agent: str | None
    network: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool

    @property
    def place(self) -> list[str]:
        """Where it stands in a list of sessions: JSON values that compare as the list is sorted, backwards."""
        return [self.last_used_at.isoformat(timespec="microseconds"), str(self.id)]


def origin_values(origin: Origin | None) -> dict[str, str | None]:
    """Return what a family keeps of where its sign-in came from, so that its owner can recognise it."""
    if origin is None:
        return {"user_agent": None, "network": None}
    agent = origin.user_agent.replace("\0", "")[:LONGEST_USER_AGENT]
    return {"user_agent": agent or None, "network": origin.network[:_LONGEST_NETWORK]}


_OWNED = refresh_families.join(
    users,
    and_(users.c.id == refresh_families.c.user_id, users.c.enabled, users.c.epoch == refresh_families.c.user_epoch),
).join(
    clients,
    and_(
        clients.c.id == refresh_families.c.client_id,
        clients.c.enabled,
        clients.c.epoch == refresh_families.c.client_epoch,
    ),
)
"""Families with their owners, as far as these still stand behind them."""


@final
class Sessions:
    """Lists families, ends one, and lets one outlive a change of the password."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def of(self, tx: Transaction, user_id: uuid.UUID, current: uuid.UUID | None) -> list[Session]:
        """Return a user's live sessions, the most recently used first."""
        f = refresh_families.c
        statement = (
            select(
                f.id,
                f.client_id,
                clients.c.name.label("client_name"),
                f.user_agent,
                f.network,
                f.created_at,
                f.rotated_at.label("last_used_at"),
                f.idle_expires_at.label("expires_at"),
            )
            .select_from(_OWNED)
            .where(f.user_id == user_id, *self._own_life())
            .order_by(f.rotated_at.desc(), f.id.desc())
        )
        rows = (await tx.execute(statement)).all()
        return [Session(**row._mapping, current=row.id == current) for row in rows]

    async def end(self, tx: Transaction, user_id: uuid.UUID, session_id: uuid.UUID) -> bool:
        """End one session of a user; return False if they have no such live one. No other is touched."""
        f = refresh_families.c
        user_epoch = select(users.c.epoch).where(users.c.id == f.user_id, users.c.enabled)
        client_epoch = select(clients.c.epoch).where(clients.c.id == f.client_id, clients.c.enabled)
        ended = await tx.execute(
            update(refresh_families)
            .where(f.id == session_id, f.user_id == user_id, *self._own_life())
            .where(f.user_epoch == user_epoch.scalar_subquery(), f.client_epoch == client_epoch.scalar_subquery())
            .values(revoked_at=self._clock.now(), revoked_reason="ended")
        )
        return ended.rowcount == 1

    async def keep(self, tx: Transaction, family_id: uuid.UUID, user_id: uuid.UUID, *, epoch: int) -> bool:
        """
        Let one live family outlive the step that has just moved its user's epoch on to `epoch`; return whether it did.

        For the session in which somebody changes their password. Only a family of the epoch just before is kept: one
        that an earlier step had ended must not come back. The caller holds the user's row since that step.
        """
        f = refresh_families.c
        kept = await tx.execute(
            update(refresh_families)
            .where(f.id == family_id, f.user_id == user_id, f.user_epoch == epoch - 1, *self._own_life())
            .values(user_epoch=epoch)
        )
        return kept.rowcount == 1

    async def count(self, tx: Transaction) -> int:
        """Return how many live sessions there are."""
        count: int = (await tx.execute(select(func.count()).select_from(_OWNED).where(*self._own_life()))).scalar_one()
        return count

    def _own_life(self) -> tuple[ColumnElement[bool], ...]:
        """Return what makes a family live, its owners aside."""
        f, now = refresh_families.c, self._clock.now()
        return f.revoked_at.is_(None), f.idle_expires_at > now, f.absolute_expires_at > now
