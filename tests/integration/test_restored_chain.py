"""After a restore the audit chain says what is lost, goes on elsewhere, and excuses nothing else."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from identity_service.infra.audit import Anchor, ChainBroken, Sealed
from identity_service.infra.audit.chain import Standing
from identity_service.infra.audit.verification import Gap
from identity_service.infra.database import Transaction
from tests.support.trail import Trail

FAR = 1_767_225_600_000_000
ALTER = "UPDATE audit_events SET {} WHERE seq = {}"
REMOVE = "DELETE FROM audit_events WHERE seq {}"
CUT = "UPDATE audit_chain SET seq = :seq, mac = (SELECT mac FROM audit_events WHERE seq = :seq)"


async def ten(trail: Trail) -> list[Anchor]:
    """Write and seal ten rows, and return an anchor for each."""
    await trail.write(10)
    await trail.seal()
    return [Anchor(row.seq, row.mac) for row in await trail.rows()]


async def go_back(trail: Trail, seq: int) -> None:
    """Leave of the sealed rows what a backup has that was made after this one."""
    if seq:
        await trail.execute(text(CUT).bindparams(seq=seq))
    else:
        await trail.execute(text("UPDATE audit_chain SET seq = 0, mac = :zero").bindparams(zero=bytes(32)))
    await trail.execute(REMOVE.format(f"> {seq}"))


async def resume(trail: Trail, place: int = FAR, known_to: int | None = None, **detail: Any) -> Sealed:
    async def work(tx: Transaction) -> Sealed:
        return await trail.chain.resume(tx, place, actor="cli", detail=detail, known_to=known_to)

    return await trail.within(work)


async def gaps(trail: Trail, *anchors: Anchor, page: int = 1000) -> list[tuple[int, int | None, int]]:
    """Return the gaps of a chain that holds: first, last, where it goes on."""
    walk = await trail.verify(*anchors, page=page)
    assert walk.fault is None, walk.fault
    assert (walk.unsealed, walk.outdated) == (0, [])
    return [(gap.first, gap.last, gap.resumed) for gap in walk.gaps]


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.case("SEC-06")
async def test_before_the_loss_is_said_an_anchor_names_the_rows_that_are_missing(trail: Trail) -> None:
    """From the first to the last that is known; without an anchor nothing is seen."""
    anchors = await ten(trail)
    await go_back(trail, 6)
    assert await trail.fault() is None
    fault = (await trail.verify(anchors[7], anchors[9], anchors[2])).fault
    assert fault is not None
    assert (fault.seq, str(fault.wrong)) == (7, "tail cut")
    assert "the rows 7 to 10 are missing" in fault.sentence
    assert "after-restore" in fault.sentence


@pytest.mark.parametrize("page", [1, 2, 3, 1000])
async def test_the_chain_goes_on_and_says_what_is_lost(trail: Trail, page: int) -> None:
    """As far as the command was told, or whoever verifies knows; the rest of the chain is checked as ever."""
    anchors = await ten(trail)
    await go_back(trail, 6)
    sealed = await resume(trail, users=3)
    await trail.write(4)
    await trail.seal()
    assert await gaps(trail, page=page) == [(7, None, FAR)]
    assert await gaps(trail, anchors[7], page=page) == [(7, 8, FAR)]
    assert await gaps(trail, anchors[9], anchors[7], anchors[3], page=page) == [(7, 10, FAR)]
    assert await gaps(trail, Anchor(FAR, sealed.mac), await trail.newest(), page=page) == [(7, None, FAR)]
    places = [row.seq for row in await trail.rows()]
    assert places == [1, 2, 3, 4, 5, 6, FAR, FAR + 1, FAR + 2, FAR + 3, FAR + 4]
    [row] = [row for row in await trail.rows() if row.seq == FAR]
    assert (row.event, row.actor, row.detail) == (
        *("database.restored", "cli"),
        {"users": 3, "after": 6, "known_to": None},
    )
    walk = await trail.verify()
    assert (walk.checked, walk.seq) == (11, FAR + 4)


async def test_what_the_command_was_told_is_told_ever_after(trail: Trail) -> None:
    """Also where a newer anchor turns up; and what was known of rows that are there is no loss."""
    anchors = await ten(trail)
    await go_back(trail, 6)
    await resume(trail, known_to=9)
    assert await gaps(trail) == [(7, 9, FAR)]
    assert await gaps(trail, anchors[9]) == [(7, 10, FAR)]
    assert await gaps(trail, anchors[7]) == [(7, 9, FAR)]
    await go_back(trail, 6)
    await resume(trail, known_to=6)
    assert await gaps(trail) == [(7, None, FAR)]


def test_a_gap_is_told_in_a_sentence() -> None:
    """With its last row or without."""
    told = [str(Gap(7, last, FAR, datetime(2026, 1, 1, tzinfo=UTC))) for last in (10, None)]
    assert told[0] == f"a restore has lost the rows 7 to 10; the chain goes on at {FAR}"
    assert told[1] == f"a restore has lost the rows from 7 on, as far as there were any; the chain goes on at {FAR}"


async def test_rows_that_the_backup_had_not_sealed_are_sealed_behind(trail: Trail) -> None:
    """Their old places may have been others' in the time that is lost."""
    await ten(trail)
    await trail.write(2)
    await go_back(trail, 10)
    await resume(trail)
    await trail.seal()
    assert [row.seq for row in await trail.rows()] == [*range(1, 11), FAR + 1, FAR + 2, FAR]
    assert await gaps(trail) == [(11, None, FAR)]


async def test_a_trail_can_be_restored_again_and_again(trail: Trail) -> None:
    """From a backup of before and after; each time no place is used again, so each anchor means one row."""
    anchors = await ten(trail)
    await go_back(trail, 8)
    await resume(trail, FAR)
    await trail.write(3)
    await trail.seal()
    first_try = await trail.newest()
    await go_back(trail, 8)
    await resume(trail, FAR + 10**9, known_to=first_try.seq)
    await trail.write(1)
    await trail.seal()
    assert await gaps(trail, anchors[9], first_try) == [(9, FAR + 3, FAR + 10**9)]
    await go_back(trail, FAR + 10**9)
    await resume(trail, FAR + 2 * 10**9)
    assert await gaps(trail, anchors[9]) == [(9, FAR + 3, FAR + 10**9), (FAR + 10**9 + 1, None, FAR + 2 * 10**9)]


async def test_an_empty_trail_can_be_restored(trail: Trail) -> None:
    """The backup was made before anything was sealed."""
    anchors = await ten(trail)
    await go_back(trail, 0)
    await resume(trail)
    assert await gaps(trail) == [(1, None, FAR)]
    assert await gaps(trail, anchors[9]) == [(1, 10, FAR)]


# -- what is not excused ----------------------------------------------------------------------------------------------


@pytest.mark.case("SEC-06")
async def test_a_place_that_was_reached_is_not_used_again(trail: Trail) -> None:
    """A clock that is wrong must not make two rows of one place; nothing is written then."""
    await ten(trail)
    for place, known_to in [(10, None), (11, None), (5, None), (500, 600), (601, 600)]:
        with pytest.raises(ValueError, match="the chain has reached"):
            await resume(trail, place, known_to=known_to)
    assert len(await trail.rows()) == 10
    assert await gaps(trail) == []


@pytest.mark.case("SEC-06")
async def test_a_row_that_somebody_planted_excuses_no_gap(trail: Trail) -> None:
    """Sealed like all others it stands behind the last one, wherever it says that it does."""
    await ten(trail)
    plant = (
        "INSERT INTO audit_events (at, event, occurrences, detail) SELECT at, 'database.restored', 1,"
        ' \'{{"after": {after}, "known_to": null}}\' FROM audit_events WHERE seq = 1'
    )
    for after in (4, 10):
        await trail.execute(plant.format(after=after))
    await trail.seal()
    assert await gaps(trail) == []
    await trail.execute(REMOVE.format("BETWEEN 5 AND 10"))
    assert await trail.fault() == (5, "missing")
    await trail.execute(REMOVE.format("<= 10"))
    assert await trail.fault() == (1, "missing")


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize("page", [1, 2, 1000])
async def test_an_excused_gap_grows_neither_forwards_nor_backwards(trail: Trail, page: int) -> None:
    """What goes before the gap, or behind it, is missed."""
    await ten(trail)
    await go_back(trail, 6)
    await resume(trail)
    await trail.write(4)
    await trail.seal()
    await trail.execute(ALTER.format("seq = -seq", FAR + 1))
    assert await trail.fault(page=page) is not None
    await trail.execute(ALTER.format("seq = -seq", -FAR - 1))
    assert await trail.fault(page=page) is None
    await trail.execute(REMOVE.format("= 6"))
    assert await trail.fault(page=page) == (6, "missing")


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize(
    "change",
    [
        'detail = \'{"after": 6, "known_to": 8}\'',
        'detail = \'{"after": 5, "known_to": null}\'',
        "event = 'database.moved'",
        "occurrences = 2",
        f"seq = {FAR - 1}",
        "mac = (SELECT mac FROM audit_events WHERE seq = 6)",
    ],
)
async def test_the_row_that_excuses_a_gap_is_sealed_itself(trail: Trail, change: str) -> None:
    """Altered, it excuses nothing: the rows before it are missing."""
    await ten(trail)
    await go_back(trail, 6)
    await resume(trail)
    await trail.execute(ALTER.format(change, FAR))
    assert await trail.fault() == (7, "missing")


@pytest.mark.case("SEC-06")
async def test_a_gap_that_was_excused_does_not_excuse_what_was_lost_before(trail: Trail) -> None:
    """A chain that was cut further, up to an older row, is not what the restore left."""
    await ten(trail)
    await go_back(trail, 6)
    await resume(trail)
    await trail.execute(REMOVE.format("IN (5, 6)"))
    assert await trail.fault() == (5, "missing")


async def test_a_chain_with_rows_behind_its_end_does_not_go_on(trail: Trail) -> None:
    """That is for somebody to look at first."""
    await ten(trail)
    await trail.execute(text(CUT).bindparams(seq=8))
    with pytest.raises(ChainBroken, match="a row at 10"):
        await resume(trail)


# -- retention --------------------------------------------------------------------------------------------------------


async def test_retention_walks_over_the_gap(trail: Trail) -> None:
    """It stops neither before it nor in it; an anchor from in there is of no more use then."""
    anchors = await ten(trail)
    await go_back(trail, 6)
    await resume(trail)
    await trail.write(2)
    await trail.seal()
    now = trail.clock.now()
    assert await trail.within(lambda tx: trail.chain.retain(tx, now - timedelta(seconds=5), batch=6)) == 6
    await trail.seal()
    assert await gaps(trail) == [(7, None, FAR)]
    assert await gaps(trail, anchors[9]) == [(7, 10, FAR)]
    assert await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now())) > 0
    await trail.seal()
    walk = await trail.verify(anchors[9])
    assert (walk.fault, walk.gaps, walk.outdated) == (None, [], [anchors[9]])


async def test_retention_does_not_cross_what_is_missing(trail: Trail) -> None:
    """A gap that nobody has excused stays to be seen."""
    await ten(trail)
    await go_back(trail, 6)
    await resume(trail)
    await trail.execute(ALTER.format("occurrences = 2", FAR))
    cut = trail.clock.now() + timedelta(seconds=1)
    assert await trail.within(lambda tx: trail.chain.retain(tx, cut)) == 6
    with pytest.raises(ChainBroken, match="broken at 7"):
        await trail.within(lambda tx: trail.chain.retain(tx, cut))


# -- comparing one anchor ---------------------------------------------------------------------------------------------


async def test_an_anchor_is_compared_with_the_one_row_of_its_place(trail: Trail) -> None:
    """Held, removed by retention, beyond the end, or another's."""
    anchors = await ten(trail)

    async def compared(anchor: Anchor) -> Standing:
        return await trail.within(lambda tx: trail.chain.compare(tx, anchor))

    assert await compared(Anchor(0, bytes(32))) is Standing.HELD
    assert {await compared(anchor) for anchor in anchors} == {Standing.HELD}
    assert await compared(Anchor(4, anchors[4].mac)) is Standing.OTHER
    assert await compared(Anchor(11, anchors[4].mac)) is Standing.BEYOND
    await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now() - timedelta(seconds=6)))
    assert [await compared(anchor) for anchor in anchors[2:5]] == [Standing.PRUNED, Standing.HELD, Standing.HELD]
    assert await compared(Anchor(4, bytes(32))) is Standing.OTHER


# -- what of another trail is not here --------------------------------------------------------------------------------


async def test_a_row_is_known_by_its_id_and_its_instant(trail: Trail) -> None:
    """After a restore other rows get the ids of those that are lost."""
    await ten(trail)
    rows = {row.id: row.at for row in await trail.rows()}
    later = {number: moment + timedelta(microseconds=1) for number, moment in rows.items()}

    async def missing(wanted: dict[int, datetime]) -> set[int]:
        return await trail.within(lambda tx: trail.audit.missing(tx, wanted))

    assert await missing(rows) == set()
    assert await missing(later) == set(rows)
    assert await missing({**rows, 3: later[3], 99: rows[1]}) == {3, 99}
    assert await missing({}) == set()
