"""The audit trail is searched, exported and counted by index, page by page, on both databases alike."""

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from identity_service.infra.audit import AuditEvent, Filters, Origin
from identity_service.infra.database import Transaction
from identity_service.infra.tables import audit_events
from tests.support.plans import note_plans
from tests.support.trail import Trail, opened_trail

START = datetime(2026, 1, 1, tzinfo=UTC)


async def put(trail: Trail, *rows: dict[str, Any]) -> None:
    """Write rows directly: an instant each, and what else the test is about."""
    usual = {"event": "demo.created", "occurrences": 1, "detail": {}, "actor": None, "target": None, "client_id": None}

    async def work(tx: Transaction) -> None:
        await tx.execute(insert(audit_events), [{**usual, **row} for row in rows])

    await trail.within(work)


async def search(trail: Trail, limit: int = 100, before: Any = None, **wanted: Any) -> list[AuditEvent]:
    return await trail.within(lambda tx: trail.audit.search(tx, limit=limit, before=before, **wanted))


async def export(trail: Trail, limit: int = 100, after: Any = None, **wanted: Any) -> list[AuditEvent]:
    return await trail.within(lambda tx: trail.audit.export(tx, limit=limit, after=after, **wanted))


# -- searching --------------------------------------------------------------------------------------------------------


async def test_a_row_comes_back_as_it_was_written(trail: Trail) -> None:
    """With its place in the chain, once it has one."""
    origin = Origin("198.51.100.1", "0123456789abcdef", "Mozilla/5.0")
    await trail.within(
        lambda tx: trail.audit.record(
            tx,
            "client.created",
            origin=origin,
            actor="cli",
            target="cl_1",
            client_id="cl_2",
            detail={"scopes": ["a", "b"], "old": None},
            occurrences=3,
        )
    )
    [found] = await search(trail)
    wanted = AuditEvent(
        id=1,
        at=START,
        event="client.created",
        actor="cli",
        target="cl_1",
        client_id="cl_2",
        network="198.51.100.1",
        request_id="0123456789abcdef",
        occurrences=3,
        detail={"scopes": ["a", "b"], "old": None},
        seq=None,
    )
    assert found == wanted
    assert found.at.tzinfo is not None
    await trail.seal()
    [found] = await search(trail)
    assert found.seq == 1
    assert await export(trail) == [found]


async def test_each_filter_keeps_what_it_names(trail: Trail) -> None:
    """By itself and with others; what is None is no filter."""
    people = ["ann", "bob", None]
    rows = [
        {"at": START + timedelta(minutes=n), "event": event, "actor": actor, "target": target, "client_id": client}
        for n, (event, actor, target, client) in enumerate(
            (event, actor, target, client)
            for event in ("user.enabled", "user.disabled")
            for actor in people
            for target in people
            for client in people
        )
    ]
    await put(trail, *rows)
    everything = await search(trail)
    assert len(everything) == 54
    assert [row.at for row in everything] == sorted((row["at"] for row in rows), reverse=True)
    wanted: list[dict[str, Any]] = [
        {"actor": "ann"},
        {"target": "ann"},
        {"client_id": "ann"},
        {"event": "user.disabled"},
        {"actor": "ann", "target": "bob", "client_id": "bob", "event": "user.enabled"},
        {"actor": "an"},
        {"actor": "ANN"},
        {"event": "no.such"},
        {"since": rows[10]["at"]},
        {"until": rows[10]["at"]},
        {"since": rows[10]["at"], "until": rows[11]["at"]},
        {"since": rows[10]["at"], "until": rows[10]["at"]},
        {"since": rows[10]["at"].astimezone(), "actor": "bob"},
        {"actor": None, "event": None, "since": None, "until": None, "target": None, "client_id": None},
    ]
    for filters in wanted:
        named = {name: value for name, value in filters.items() if value is not None}
        lower, upper = named.pop("since", START), named.pop("until", START + timedelta(days=1))
        right = [
            row
            for row in everything
            if lower <= row.at < upper and all(getattr(row, name) == value for name, value in named.items())
        ]
        assert await search(trail, **filters) == right
        assert await export(trail, **filters) == right[::-1]


async def test_a_filter_that_there_is_not_is_refused(trail: Trail) -> None:
    """Left out silently, it would let everything through."""
    for read in (search, export):
        with pytest.raises(TypeError, match="filtered by network"):
            await read(trail, network="198.51.100.1")
    assert set(Filters.__annotations__) == {"actor", "target", "event", "client_id", "since", "until"}


@pytest.mark.case("ADM-14")
@pytest.mark.parametrize("size", [1, 2, 7, 100])
async def test_pages_hold_every_row_once(trail: Trail, size: int) -> None:
    """Also where many rows have one instant, and where ids and instants do not run alike."""
    shuffled = random.Random(7)  # noqa: S311  # the same every time
    await put(trail, *({"at": START + timedelta(seconds=shuffled.randrange(4))} for _ in range(40)))
    order = [(row.at, row.id) for row in await trail.rows()]
    pages, before = [], None
    while page := await search(trail, size, before):
        pages += [(row.at, row.id) for row in page]
        before = pages[-1]
    assert pages == sorted(order, reverse=True)
    pages, after = [], None
    while page := await export(trail, size, after):
        pages += [(row.at, row.id) for row in page]
        after = pages[-1]
    assert pages == sorted(order)


@pytest.mark.case("ADM-14")
async def test_rows_that_come_meanwhile_shift_no_page(trail: Trail) -> None:
    """A search goes back in time from where it was; an export meets what is new at its end."""
    await trail.write(6)
    newest = await search(trail, 3)
    oldest = await export(trail, 3)
    await trail.write(2)
    assert [row.id for row in await search(trail, 10, (newest[-1].at, newest[-1].id))] == [3, 2, 1]
    assert [row.id for row in await export(trail, 10, (oldest[-1].at, oldest[-1].id))] == [4, 5, 6, 7, 8]


HOSTILE = [
    *("' OR 1=1 --", "'; DROP TABLE audit_events; --", '" OR ""="', "\\'", "$$", "%", "_", "a%", "*", "NULL", "null"),
    *(":name", "%(name)s", "{0}", "ann\0", "\0", "\ud800", "ann\udfff", "\u202e", "x" * 100_000, "", " ann", "ann "),
]


@pytest.mark.case("ADM-17")
@pytest.mark.parametrize("name", ["actor", "target", "event", "client_id"])
async def test_a_filter_is_never_more_than_a_text(trail: Trail, name: str) -> None:
    """It matches itself and nothing else, and never ends in an error."""
    await put(trail, {"at": START, "actor": "ann", "target": "ann", "client_id": "ann", "event": "ann"})
    for value in HOSTILE:
        assert await search(trail, **{name: value}) == []
        assert await export(trail, **{name: value}) == []
    assert len(await search(trail, **{name: "ann"})) == 1


async def test_what_was_cut_to_be_stored_is_found_by_the_whole_of_it(trail: Trail) -> None:
    """Who searches for what somebody sent need not know what the column holds."""
    sent = "a\0" + "b" * 500
    await trail.within(lambda tx: trail.audit.record(tx, "demo.created", origin=None, actor=sent, target=sent))
    for name in ("actor", "target"):
        assert len(await search(trail, **{name: sent})) == 1


# -- by index ---------------------------------------------------------------------------------------------------------

PLANS = {
    "everything": ({}, "ix_audit_events_at"),
    "event": ({"event": "user.created"}, "ix_audit_events_event_at"),
    "actor": ({"actor": "actor 7"}, "ix_audit_events_actor_at"),
    "target": ({"target": "target 7"}, "ix_audit_events_target"),
    "instant": ({"since": START, "until": START + timedelta(seconds=9)}, "ix_audit_events_at"),
    "event and instant": (
        {"event": "user.created", "since": START, "until": START + timedelta(seconds=35_000)},
        "ix_audit_events_event_at",
    ),
}


@pytest.fixture
async def many(on_postgresql: Trail) -> Trail:
    """Forty thousand rows of which each filter wants a few."""
    await on_postgresql.execute(
        "INSERT INTO audit_events (at, event, actor, target, occurrences, detail)"
        " SELECT timestamptz '2026-01-01Z' + n * interval '1 second',"
        " CASE WHEN n % 5000 = 0 THEN 'user.created' ELSE 'grant.password' END,"
        " 'actor ' || n % 5000, 'target ' || n % 5000, 1, '{}' FROM generate_series(1, 40000) AS n"
    )
    await on_postgresql.execute("ANALYZE audit_events")
    return on_postgresql


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How PostgreSQL runs the statements that read audit rows, noted in the driver."""
    return note_plans(monkeypatch, lambda query: "FROM audit_events" in query)


@pytest.mark.parametrize("wanted", PLANS)
async def test_every_search_that_operators_make_uses_an_index(many: Trail, plans: list[str], wanted: str) -> None:
    """The first page and a later one; the trail grows without end, and is never read as it lies."""
    filters, index = PLANS[wanted]
    place = (START + timedelta(seconds=30_000), 17)
    for page in (None, place):
        await search(many, 50, page, **filters)
        await export(many, 50, page, **filters)
    assert len(plans) == 4
    for plan in plans:
        assert f"using {index}" in plan or f"Scan on {index}" in plan, plan
        assert "Seq Scan" not in plan


async def test_counting_reads_one_event_of_the_days_asked_for(many: Trail, plans: list[str]) -> None:
    """However many others there are."""
    counts = await many.within(
        lambda tx: many.audit.event_counts(tx, "user.created", START, START + timedelta(seconds=20_001))
    )
    assert counts == [(START.date(), 4)]
    [plan] = plans
    assert "ix_audit_events_event_at" in plan
    assert plan.count("Index Cond: (((event)::text = 'user.created'::text) AND (at >= ") == 1


# -- counting ---------------------------------------------------------------------------------------------------------


async def test_occurrences_are_counted_by_utc_day(trail: Trail) -> None:
    """To the microsecond at both ends; one row may stand for many, and a day without any is left out."""
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    blink = timedelta(microseconds=1)
    sign_ins = [(-blink, 1), (timedelta(0), 2), (timedelta(hours=12), 40), (timedelta(1) - blink, 8), (timedelta(2), 5)]
    await put(
        trail,
        *({"at": midnight + since, "event": "grant.password", "occurrences": count} for since, count in sign_ins),
        {"at": midnight, "event": "sign_in.failed", "occurrences": 1000},
    )

    async def counted(since: datetime, until: datetime, event: str = "grant.password") -> list[tuple[date, int]]:
        return await trail.within(lambda tx: trail.audit.event_counts(tx, event, since, until))

    always = (midnight - timedelta(9), midnight + timedelta(9))
    before, day, later = date(2026, 2, 28), date(2026, 3, 1), date(2026, 3, 3)
    assert await counted(*always) == [(before, 1), (day, 50), (later, 5)]
    assert await counted(midnight, midnight + timedelta(1)) == [(day, 50)]
    assert await counted(midnight + blink, midnight + timedelta(2)) == [(day, 48)]
    assert await counted(midnight, midnight) == []
    assert await counted(*always, "sign_in.failed") == [(day, 1000)]
    assert await counted(*always, "user.created") == []
    with pytest.raises(ValueError, match=r"no\.such"):
        await counted(*always, "no.such")


async def test_a_day_is_utc_whatever_the_sessions_time_zone(database_url: str) -> None:
    """A pooler may hand out sessions with settings of its own."""
    async with opened_trail(database_url, timezone="Pacific/Auckland") as trail:
        await put(trail, {"at": START + timedelta(hours=23), "event": "grant.password"})
        counts = await trail.within(
            lambda tx: trail.audit.event_counts(tx, "grant.password", START, START + timedelta(2))
        )
        assert counts == [(START.date(), 1)]


async def test_more_occurrences_than_a_column_holds_are_summed(trail: Trail) -> None:
    """A sum is not bound by the size of what is summed."""
    await put(trail, *({"at": START, "event": "sign_in.failed", "occurrences": 2_000_000_000} for _ in range(3)))
    counts = await trail.within(lambda tx: trail.audit.event_counts(tx, "sign_in.failed", START, START + timedelta(1)))
    assert counts == [(START.date(), 6_000_000_000)]
