"""Writing the trail, and reading it: searching, exporting, counting."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import Any, TypedDict, Unpack, final

from sqlalchemy import Select, func, insert, or_, select

from identity_service.infra.audit.events import check_known
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import audit_events

_ROWS_A_MINUTE = 10
_DISTINCT_SUBJECTS = 10_000
_OVERFLOW = "many"

_LONGEST_TEXT = 1_000  # characters of one text in a detail
_LARGEST_DETAIL = 64 * 1024  # bytes of a detail as JSON
_DEEPEST_DETAIL = 8  # lists and objects within each other
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # PostgreSQL has no NUL, and UTF-8 no half of a surrogate pair


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from: the network that limits are kept by, the id its log lines carry, and the program."""

    network: str
    request_id: str
    user_agent: str = ""


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One row of the trail; `seq` is its place in the chain, None until it is sealed."""

    id: int
    at: datetime
    event: str
    actor: str | None
    target: str | None
    client_id: str | None
    network: str | None
    request_id: str | None
    occurrences: int
    detail: Mapping[str, Any]
    seq: int | None


class Filters(TypedDict, total=False):
    """What rows a reader wants; None, like what is left out, wants all. `since` is included, `until` is not."""

    actor: str | None
    target: str | None
    event: str | None
    client_id: str | None
    since: datetime | None
    until: datetime | None


_c = audit_events.c
_SHOWN = tuple(_c[field.name] for field in fields(AuditEvent))


@final
class AuditTrail:
    """Writes audit rows, and reads them."""

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
    ) -> int:
        """
        Add one row and return its id.

        `actor` is who did it (a user or client id, `cli`), `target` what it was done to, and `detail` holds no secret
        and nothing a stranger typed: texts, whole numbers, booleans, null, and lists and objects of them. What cannot
        be stored as it is, is stored as far as it can be: an act shall not fail for the length of a text.

        Raises ValueError for an event that is not in `EVENTS`, TypeError for a detail that is not of these kinds.
        """
        check_known(event)
        written = await tx.execute(
            insert(audit_events)
            .values(
                at=self._clock.now(),
                event=event,
                actor=_fitting("actor", actor),
                target=_fitting("target", target),
                client_id=_fitting("client_id", client_id),
                network=_fitting("network", origin.network if origin else None),
                request_id=_fitting("request_id", origin.request_id if origin else None),
                occurrences=occurrences,
                detail=_bounded_detail(detail or {}),
            )
            .returning(_c.id)
        )
        row_id: int = written.scalar_one()
        return row_id

    async def record_failure(
        self,
        tx: Transaction,
        event: str,
        *,
        origin: Origin,
        target: str,
        client_id: str | None,
        detail: Mapping[str, Any],
        genuine: bool = False,
    ) -> None:
        """
        Add a row for something a stranger failed at, or count it if this minute has had enough of them.

        At most ten rows a minute per event for a target and for a network, in each process; a `genuine` target, one
        that nobody can invent, is judged by itself alone, so that no noise hides it. What was counted and not written
        is written by `flush`. Raises as `record` does.
        """
        check_known(event)  # also of what is only counted: `flush` could never write it
        minute = self._clock.now().replace(second=0, microsecond=0)
        if minute != self._minute:
            self._minute = minute
            self._seen.clear()
        of_target, of_network = f"{event} target {target}", f"{event} network {origin.network}"
        judged = [self._bounded(key) for key in ([of_target] if genuine else [of_target, of_network])]
        if any(self._seen.get(key, 0) >= _ROWS_A_MINUTE for key in judged):
            # Who invents a target for each try gets one row for all of them: the network is what they share.
            known = genuine or self._seen.get(judged[0], 0) >= _ROWS_A_MINUTE
            self.count(event, target=target if known else _OVERFLOW, network=origin.network)
            return
        for key in judged:
            self._seen[key] = self._seen.get(key, 0) + 1
        await self.record(tx, event, origin=origin, target=target, client_id=client_id, detail=detail)

    def count(self, event: str, *, target: str, network: str) -> None:
        """
        Count what happens too often for rows of its own; `flush` writes one row for all of it.

        Asks no database: who is refused for coming too often shall not cost it anything. Raises as `record` does.
        """
        check_known(event)
        held = (event, target, network)
        if held not in self._held and len(self._held) >= _DISTINCT_SUBJECTS:
            held = (event, _OVERFLOW, _OVERFLOW)
        self._held[held] = self._held.get(held, 0) + 1

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

    async def search(
        self, tx: Transaction, *, before: tuple[datetime, int] | None = None, limit: int, **wanted: Unpack[Filters]
    ) -> list[AuditEvent]:
        """Return at most `limit` rows, the newest first; `before` is (`at`, `id`) of the last one already seen."""
        statement = _matching(wanted)
        if before is not None:
            at, number = before
            statement = statement.where(_c.at <= at, or_(_c.at < at, _c.id < number))
        return await _read(tx, statement.order_by(_c.at.desc(), _c.id.desc()).limit(limit))

    async def export(
        self, tx: Transaction, *, after: tuple[datetime, int] | None = None, limit: int, **wanted: Unpack[Filters]
    ) -> list[AuditEvent]:
        """
        Return at most `limit` rows, the oldest first; `after` is (`at`, `id`) of the last one already seen.

        Page after page has every row once. What is written meanwhile comes last: who wants an end names `until`.
        """
        statement = _matching(wanted)
        if after is not None:
            at, number = after
            statement = statement.where(_c.at >= at, or_(_c.at > at, _c.id > number))
        return await _read(tx, statement.order_by(_c.at, _c.id).limit(limit))

    async def event_counts(
        self, tx: Transaction, event: str, since: datetime, until: datetime
    ) -> list[tuple[date, int]]:
        """
        Return how often an event happened on each UTC day from `since` to before `until`, days without it left out.

        Rows that stand for several occurrences count as many. Raises ValueError for an event that is not in `EVENTS`.
        """
        check_known(event)
        # The session's time zone shall not decide what a day is. SQLite keeps UTC as text.
        day = func.date(_c.at) if tx.on_sqlite else func.date(func.timezone("UTC", _c.at))
        statement = (
            select(day.label("day"), func.sum(_c.occurrences).label("total"))
            .where(_c.event == event, _c.at >= since, _c.at < until)
            .group_by(day)
            .order_by(day)
        )
        rows = (await tx.execute(statement)).all()
        return [(date.fromisoformat(row.day) if tx.on_sqlite else row.day, int(row.total)) for row in rows]

    async def newest_at(self, tx: Transaction) -> datetime | None:
        """Return when the newest row was written, None for an empty trail."""
        newest: datetime | None = (await tx.execute(select(func.max(_c.at)))).scalar_one()
        return newest

    async def missing(self, tx: Transaction, rows: Mapping[int, datetime]) -> set[int]:
        """Return which of these rows, known by id and instant, the trail does not have."""
        found = await tx.execute(select(_c.id, _c.at).where(_c.id.in_(list(rows))))
        return rows.keys() - {row.id for row in found if row.at == rows[row.id]}

    def _bounded(self, key: str) -> str:
        return key if key in self._seen or len(self._seen) < _DISTINCT_SUBJECTS else _OVERFLOW


# -- what can be stored -----------------------------------------------------------------------------------------------


def _storable(text: str) -> str:
    return _UNSTORABLE.sub("\ufffd", text)


def _fitting(column: str, value: str | None) -> str | None:
    """Return a text that its column can hold; the same for the same text, so that a search finds what was stored."""
    return None if value is None else _storable(value)[: _c[column].type.length]  # type: ignore[attr-defined]


def _bounded_detail(detail: Mapping[str, Any]) -> Any:
    plain = _plain(detail)
    size = len(json.dumps(plain))
    return plain if size <= _LARGEST_DETAIL else {"too_large": size}


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a detail in the few kinds of JSON that both databases give back as they were given; raises TypeError."""
    if depth > _DEEPEST_DETAIL:
        raise TypeError("an audit detail is nested too deeply")
    match value:
        case None | bool() | int():
            return value
        case str():
            return _storable(value[:_LONGEST_TEXT])
        case list() | tuple():
            return [_plain(item, depth + 1) for item in value]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {_storable(key): _plain(item, depth + 1) for key, item in value.items()}
    # A fraction is not among them: PostgreSQL spells some of them anew, and their seals would no longer match.
    raise TypeError(f"an audit detail cannot hold a {type(value).__name__}")


# -- reading ----------------------------------------------------------------------------------------------------------


def _matching(wanted: Filters) -> Select[Any]:
    values: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    statement = select(*_SHOWN)
    if "since" in values:
        statement = statement.where(_c.at >= values.pop("since"))
    if "until" in values:
        statement = statement.where(_c.at < values.pop("until"))
    for name, value in values.items():
        if name not in Filters.__annotations__:
            raise TypeError(f"audit rows cannot be filtered by {name}")
        statement = statement.where(_c[name] == _fitting(name, value))
    return statement


async def _read(tx: Transaction, statement: Select[Any]) -> list[AuditEvent]:
    return [AuditEvent(**row._mapping) for row in (await tx.execute(statement)).all()]
