"""The operators' API about the audit trail: searching it."""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import AwareDatetime, BaseModel, StringConstraints

from identity_service.infra.audit import EVENTS, AuditEvent, AuditTrail, Filters
from identity_service.web.callers import Callers, Entry
from identity_service.web.documented import problems
from identity_service.web.paging import Cursors, CursorText, Limit, Page
from identity_service.web.problems import Fault, Invalid
from identity_service.web.strict import api_routes

_LISTING = "audit"

_Word = Annotated[str | None, StringConstraints(min_length=1, max_length=128), Query()]
_Instant = Annotated[AwareDatetime | None, Query(description="ISO 8601 with an offset, as 2026-01-31T00:00:00Z.")]


class AuditEventShown(BaseModel):
    """One row of the trail; `seq` is its place in the sealed chain, null for some seconds."""

    id: int
    at: datetime
    event: str
    actor: str | None
    target: str | None
    client_id: str | None
    network: str | None
    request_id: str | None
    occurrences: int
    detail: dict[str, Any]
    seq: int | None

    @classmethod
    def of(cls, row: AuditEvent) -> "AuditEventShown":
        """Return what is shown of a row."""
        return cls(
            **{name: getattr(row, name) for name in cls.model_fields if name != "detail"}, detail=dict(row.detail)
        )


def audit_router(callers: Callers, audit: AuditTrail, cursors: Cursors) -> APIRouter:
    """Return the route `/v1/admin/audit`."""
    router = api_routes("/v1/admin/audit", tag="audit")
    Reading = Annotated[Entry, Depends(callers.needs("audit:read"))]  # noqa: N806  # a type

    @router.get("", responses=problems())
    async def search(
        entry: Reading,
        actor: _Word = None,
        target: _Word = None,
        event: _Word = None,
        client_id: _Word = None,
        since: _Instant = None,
        until: _Instant = None,
        limit: Limit = 50,
        cursor: CursorText = None,
    ) -> Page[AuditEventShown]:
        """Search the audit trail, newest first: by who, to whom, what, through which client, and when."""
        if event is not None and event not in EVENTS:
            raise Invalid(Fault("/event", "is no event of the audit trail"))
        wanted: Filters = {
            "actor": actor,
            "target": target,
            "event": event,
            "client_id": client_id,
            "since": _utc(since, "/since"),
            "until": _utc(until, "/until"),
        }
        place = cursors.read(_LISTING, wanted, cursor)
        before = (datetime.fromisoformat(place[0]), place[1]) if place else None
        found = await entry.run(lambda tx, _: audit.search(tx, before=before, limit=limit + 1, **wanted))
        page = found[:limit]
        following = None
        if len(found) > limit:
            following = cursors.write(_LISTING, wanted, [page[-1].at.isoformat(), page[-1].id])
        return Page(items=[AuditEventShown.of(row) for row in page], next_cursor=following)

    return router


def _utc(moment: datetime | None, pointer: str) -> datetime | None:
    """Return an instant in UTC; raises Invalid for one that has no place in it, at the ends of the calendar."""
    try:
        return moment.astimezone(UTC) if moment is not None else None
    except OverflowError:
        raise Invalid(Fault(pointer, "is beyond the calendar")) from None
