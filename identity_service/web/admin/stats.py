"""What goes on, in numbers, for whoever runs the service."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, final

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.accounts.users import Users
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import Outbox
from identity_service.infra.runtime import Clock
from identity_service.web.callers import Caller, Callers, Entry
from identity_service.web.documented import problems
from identity_service.web.strict import api_routes

EventCounts = Callable[[Transaction, str, datetime, datetime], Awaitable[Sequence[tuple[date, int]]]]
"""How often an event happened on each UTC day from an instant on and before another; quiet days may be left out."""

_DAYS = 30
_KEPT = timedelta(minutes=1)
_SIGN_IN, _FAILED, _REUSE = "grant.password", "sign_in.failed", "refresh.reuse_detected"


class UserFigures(BaseModel):
    """How many users there are; those that were deleted are in no number but their own."""

    by_role: dict[str, int]
    by_state: dict[str, int]


class DayFigures(BaseModel):
    """What happened on one day, in UTC."""

    day: date
    sign_ins: int
    failed_sign_ins: int
    refresh_tokens_reused: int


class Stats(BaseModel):
    """The figures, and the instant they are of."""

    at: datetime
    users: UserFigures
    live_sessions: int
    mails_waiting: int
    days: list[DayFigures]


@final
class Figures:
    """
    Counts, and remembers what it counted for a minute.

    Counting reads whole indexes, so one request at a time does it, and those who come meanwhile get its answer.
    """

    def __init__(
        self, clock: Clock, users: Users, families: RefreshFamilies, outbox: Outbox, event_counts: EventCounts
    ) -> None:
        self._clock = clock
        self._users = users
        self._families = families
        self._outbox = outbox
        self._event_counts = event_counts
        self._held: Stats | None = None
        self._counting = asyncio.Lock()

    async def current(self, entry: Entry) -> Stats:
        """Return figures that are at most a minute old; who waits for them to be counted holds no connection."""
        async with self._counting:
            if self._held is None or not timedelta(0) <= self._clock.now() - self._held.at < _KEPT:
                self._held = await entry.run(self._count)
            return self._held

    async def _count(self, tx: Transaction, _: Caller) -> Stats:
        now = self._clock.now()
        users = await self._users.counts(tx)
        waiting, _oldest = await self._outbox.waiting(tx)
        return Stats(
            at=now,
            users=UserFigures(
                by_role=users.by_role, by_state={state.value: number for state, number in users.by_state.items()}
            ),
            live_sessions=await self._families.count(tx),
            mails_waiting=waiting,
            days=await self._days(tx, now),
        )

    async def _days(self, tx: Transaction, now: datetime) -> list[DayFigures]:
        """Return the last days, the oldest first; today is not over yet."""
        first = now.date() - timedelta(days=_DAYS - 1)
        since = datetime.combine(first, time(), UTC)
        until = since + timedelta(days=_DAYS)
        counted = {
            event: dict(await self._event_counts(tx, event, since, until)) for event in (_SIGN_IN, _FAILED, _REUSE)
        }
        return [
            DayFigures(
                day=day,
                sign_ins=counted[_SIGN_IN].get(day, 0),
                failed_sign_ins=counted[_FAILED].get(day, 0),
                refresh_tokens_reused=counted[_REUSE].get(day, 0),
            )
            for day in (first + timedelta(days=number) for number in range(_DAYS))
        ]


def stats_router(callers: Callers, figures: Figures) -> APIRouter:
    """Return the route `/v1/admin/stats`."""
    router = api_routes("/v1/admin/stats", tag="stats")
    Reading = Annotated[Entry, Depends(callers.needs("stats:read"))]  # noqa: N806  # a type

    async def nothing(_tx: Transaction, _caller: Caller) -> None:
        """Let the door check the caller, whoever's figures they get."""

    @router.get("", responses=problems())
    async def read_stats(entry: Reading) -> Stats:
        """Return what goes on: users, sessions, sign-ins of the last 30 days; at most a minute old."""
        await entry.run(nothing)
        return await figures.current(entry)

    return router
