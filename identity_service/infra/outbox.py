"""
Mails that wait to be sent, written in the transaction of what they tell about.

So an act that is undone sends nothing, and no act waits for a mail server. A row holds no secret: the link is derived
from the token's id when the mail is sent. A mail leaves at least once; twice only if the process ends, or cannot reach
the database, between handing it over and noting that, and then under the same Message-ID.
"""

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, final

from sqlalchemy import bindparam, delete, func, insert, literal, select, update

from identity_service.infra.database import Transaction
from identity_service.infra.mail import check
from identity_service.infra.runtime import Clock, new_id
from identity_service.infra.tables import outbox

FIRST_RETRY = timedelta(minutes=1)
"""How long a mail that was claimed belongs to its sender: sending one must take less."""
_RETRIES = (FIRST_RETRY, *(timedelta(minutes=minutes) for minutes in (2, 5, 10, 30, 60)))  # the last one from then on
_KEPT = timedelta(hours=24)
_RESERVED = 10  # one place in so many is not for strangers


class MailQueueFull(Exception):
    """Too many mails wait already; nothing was written. Mail cannot be sent, or somebody orders too much of it."""


@dataclass(frozen=True, slots=True)
class OutboxMail:
    """A mail that is due; `attempts` counts the one that it was claimed for."""

    id: uuid.UUID
    template: str
    recipient: str
    context: Mapping[str, Any]
    token_id: uuid.UUID | None
    created_at: datetime
    attempts: int


async def forget_recipients(
    tx: Transaction, recipients: Collection[str], *, kept: str, ordered_until: datetime | None = None
) -> None:
    """
    Forget the mails that wait for addresses, but those of the template `kept`.

    `ordered_until` spares what was ordered after an instant: the address may have been somebody else's by then.
    """
    doomed = delete(outbox).where(outbox.c.recipient.in_(recipients), outbox.c.template != kept)
    if ordered_until is not None:
        doomed = doomed.where(outbox.c.created_at <= ordered_until)
    await tx.execute(doomed)


@final
class Outbox:
    """Keeps mails until they are sent."""

    def __init__(self, clock: Clock, *, limit: int) -> None:
        """`limit` is how many mails may wait; acts at the very same time may exceed it by their own number."""
        self._clock = clock
        self._limit = limit

    async def enqueue(
        self,
        tx: Transaction,
        *,
        template: str,
        recipient: str,
        context: Mapping[str, Any],
        token_id: uuid.UUID | None = None,
    ) -> None:
        """
        Order a mail to `recipient`, the address as it is stored and never as it was typed.

        `token_id` is whose link the mail carries; the mail ends with that token. Raises MailQueueFull, and ValueError
        for a template that does not exist or is not told what it needs.
        """
        check(template, context, linked=token_id is not None)
        await self._demand_room(tx, self._limit)
        now = self._clock.now()
        await tx.execute(
            insert(outbox).values(
                id=new_id(),
                template=template,
                recipient=recipient,
                context=dict(context),
                token_id=token_id,
                created_at=now,
                attempts=0,
                next_attempt_at=now,
            )
        )

    async def check_room(self, tx: Transaction) -> None:
        """
        Raise MailQueueFull unless a stranger may order a mail.

        Ask before looking anybody up, so that the answer tells nothing about them. The last tenth of the places is
        kept for people who are signed in: strangers must not be able to stop a password change from being told.
        """
        await self._demand_room(tx, self._limit - self._limit // _RESERVED)

    async def claim(self, tx: Transaction, batch: int) -> list[OutboxMail]:
        """
        Take at most `batch` mails that are due, the longest due first; nobody else gets them until their next attempt.

        The next attempt is set now, so that a mail whose sender dies is tried again: after 1, 2, 5, 10 and 30 minutes,
        then every hour.
        """
        now = self._clock.now()
        due = (
            select(outbox)
            .where(outbox.c.next_attempt_at <= now)
            .order_by(outbox.c.next_attempt_at, outbox.c.id)
            .limit(batch)
            .with_for_update(skip_locked=True)
        )
        rows = (await tx.execute(due)).all()
        if not rows:
            return []
        await tx.execute(
            update(outbox)
            .where(outbox.c.id == bindparam("claimed"))
            .values(attempts=bindparam("attempt"), next_attempt_at=bindparam("again_at")),
            [
                {
                    "claimed": row.id,
                    "attempt": row.attempts + 1,
                    "again_at": now + _RETRIES[min(row.attempts, len(_RETRIES) - 1)],
                }
                for row in rows
            ],
        )
        return [
            OutboxMail(
                id=row.id,
                template=row.template,
                recipient=row.recipient,
                context=row.context,
                token_id=row.token_id,
                created_at=row.created_at,
                attempts=row.attempts + 1,
            )
            for row in rows
        ]

    def overdue(self, mail: OutboxMail) -> bool:
        """Tell whether a mail that could not be sent now has waited for 24 hours, and shall not be tried again."""
        return self._clock.now() - mail.created_at >= _KEPT

    async def sent(self, tx: Transaction, mail_id: uuid.UUID) -> None:
        """Forget a mail that is in other hands."""
        await self._remove(tx, mail_id)

    async def given_up(self, tx: Transaction, mail_id: uuid.UUID) -> bool:
        """Forget a mail that will not be sent; return False if it was forgotten already."""
        return await self._remove(tx, mail_id)

    async def waiting(self, tx: Transaction) -> tuple[int, datetime | None]:
        """Return how many mails wait and when the oldest of them was ordered."""
        found = select(func.count().label("number"), func.min(outbox.c.created_at).label("oldest")).select_from(outbox)
        row = (await tx.execute(found)).one()
        return row.number, row.oldest

    async def _demand_room(self, tx: Transaction, places: int) -> None:
        taken = select(literal(1)).select_from(outbox).limit(places).subquery()  # counting stops where it is decided
        if (await tx.execute(select(func.count()).select_from(taken))).scalar_one() >= places:
            raise MailQueueFull

    @staticmethod
    async def _remove(tx: Transaction, mail_id: uuid.UUID) -> bool:
        removed = await tx.execute(delete(outbox).where(outbox.c.id == mail_id))
        return removed.rowcount == 1
