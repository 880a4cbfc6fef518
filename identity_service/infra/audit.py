"""
The audit trail: what was done, by whom, from where; written in the transaction of the act.

An act whose row cannot be written does not happen. Failures of strangers are the exception in number: anybody can
cause them, so only the first few of a minute get a row of their own, and the rest of the minute one row with a count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import Row, insert, select

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import audit_events

_ROWS_A_MINUTE = 10
_DISTINCT_SUBJECTS = 10_000
_OVERFLOW = "many"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from: the network that limits are kept by, and the id its log lines carry."""

    network: str
    request_id: str


@final
class AuditTrail:
    """Writes audit rows."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._minute: datetime | None = None
        self._seen: dict[str, int] = {}
        self._held: dict[tuple[str, str, str], int] = {}

    async def record(
        self,
        tx: Transaction,
        event: str,
        *,
        origin: Origin | None,
        actor: str | None = None,
        target: str | None = None,
        client_id: str | None = None,
        detail: Mapping[str, Any] | None = None,
        occurrences: int = 1,
    ) -> None:
        """
        Add one row.

        `actor` is who did it (a user or client id, `cli`), `target` what it was done to, and `detail` holds no secret
        and nothing a stranger typed.
        """
        await tx.execute(
            insert(audit_events).values(
                at=self._clock.now(),
                event=event,
                actor=actor,
                target=target,
                client_id=client_id,
                network=origin.network if origin else None,
                request_id=origin.request_id if origin else None,
                occurrences=occurrences,
                detail=dict(detail or {}),
            )
        )

    async def record_failure(
        self,
        tx: Transaction,
        event: str,
        *,
        origin: Origin,
        target: str,
        client_id: str | None,
        detail: Mapping[str, Any],
    ) -> None:
        """
        Add a row for something a stranger failed at, or count it if this minute has had enough of them.

        At most ten rows a minute per target and per network, in each process. What was counted and not written is
        written by `flush`.
        """
        minute = self._clock.now().replace(second=0, microsecond=0)
        if minute != self._minute:
            self._minute = minute
            self._seen.clear()
        keys = (self._bounded(f"target {target}"), self._bounded(f"network {origin.network}"))
        of_target, of_network = (self._seen.get(key, 0) for key in keys)
        if max(of_target, of_network) >= _ROWS_A_MINUTE:
            # Who invents a target for each try gets one row for all of them: the network is what they share.
            held = (event, target if of_target >= _ROWS_A_MINUTE else _OVERFLOW, origin.network)
            if held not in self._held and len(self._held) >= _DISTINCT_SUBJECTS:
                held = (event, _OVERFLOW, _OVERFLOW)
            self._held[held] = self._held.get(held, 0) + 1
            return
        for key in keys:
            self._seen[key] = self._seen.get(key, 0) + 1
        await self.record(tx, event, origin=origin, target=target, client_id=client_id, detail=detail)

    async def flush(self, tx: Transaction) -> Mapping[tuple[str, str, str], int]:
        """
        Write one row with a count for each kind of failure that was held back; return what was written.

        They stay held until `flushed` hears that the rows were committed.
        """
        held = dict(self._held)
        for (event, target, network), count in held.items():
            origin = Origin(network=network, request_id="")
            await self.record(tx, event, origin=origin, target=target, occurrences=count, detail={"held_back": True})
        return held

    def flushed(self, written: Mapping[tuple[str, str, str], int]) -> None:
        """Let go of failures whose rows were committed; what was counted meanwhile stays."""
        for key, count in written.items():
            self._held[key] -= count
            if not self._held[key]:
                del self._held[key]

    async def recent(self, tx: Transaction, *, limit: int, event: str | None = None) -> Sequence[Row[Any]]:
        """Return the newest rows, newest first."""
        statement = select(audit_events).order_by(audit_events.c.id.desc()).limit(limit)
        if event is not None:
            statement = statement.where(audit_events.c.event == event)
        return (await tx.execute(statement)).all()

    def _bounded(self, key: str) -> str:
        return key if key in self._seen or len(self._seen) < _DISTINCT_SUBJECTS else _OVERFLOW
