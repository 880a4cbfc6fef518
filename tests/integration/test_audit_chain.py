"""The audit trail shows what was done to it: by whom it was written is sealed, and so is in which order."""

import asyncio
import hmac
import json
import secrets
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Text, cast, insert, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError

from identity_service.infra.audit import Anchor, AuditChain, ChainBroken, Origin, Wrong
from identity_service.infra.audit.seals import canonical
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction
from identity_service.infra.runtime.envelope import MasterKeys
from identity_service.infra.tables import audit_events, data_keys
from tests.support.races import blocked
from tests.support.service import MASTER_KEY
from tests.support.trail import Trail, opened_trail

ALTER = "UPDATE audit_events SET {} WHERE seq = {}"
REMOVE = "DELETE FROM audit_events WHERE seq = {}"
MOVE_END = "UPDATE audit_chain SET {}"
HEAD = "SELECT seq, mac, base_seq, base_mac, base_kid, base_proof, sealed_at FROM audit_chain"


async def ten(trail: Trail) -> None:
    """Write and seal ten rows, in three batches."""
    await trail.write(10)
    assert await trail.seal(batch=4) == 10


# -- sealing ----------------------------------------------------------------------------------------------------------


async def test_sealed_rows_stand_in_a_row(trail: Trail) -> None:
    """Batch after batch, without a gap; the chain's end is the last one, and a batch of nothing changes nothing."""
    await trail.write(5)
    assert [row.seq for row in await trail.rows()] == [None] * 5
    first = await trail.within(lambda tx: trail.chain.seal(tx, 3))
    trail.clock.advance(5)
    second = await trail.within(lambda tx: trail.chain.seal(tx, 3))
    sealed_at = trail.clock.now()
    trail.clock.advance(5)
    nothing = await trail.within(trail.chain.seal)
    rows = await trail.rows()
    assert [row.seq for row in rows] == [1, 2, 3, 4, 5]
    assert len({bytes(row.mac) for row in rows}) == 5
    assert {row.mac_kid for row in rows} == {trail.keys["audit"].kid}
    assert [(sealed.count, sealed.seq) for sealed in (first, second, nothing)] == [(3, 3), (2, 5), (0, 5)]
    assert (first.mac, second.mac, nothing.mac) == (rows[2].mac, rows[4].mac, rows[4].mac)
    walk = await trail.verify()
    assert (walk.fault, walk.checked, walk.seq, walk.mac, walk.unsealed) == (None, 5, 5, rows[4].mac, 0)
    [head] = await trail.execute(select(text("sealed_at")).select_from(text("audit_chain")))
    assert str(head.sealed_at)[:19] == str(sealed_at)[:19]


async def test_a_seal_is_the_mac_that_the_documents_describe(trail: Trail) -> None:
    """Spelled out by hand: the seal before it, and everything the row says, under the audit key."""
    await trail.write(2)
    await trail.seal()
    kid, previous = trail.keys["audit"].kid, bytes(32)
    for number, row in enumerate(await trail.rows(), 1):
        said = {
            "actor": f"actor {number}",
            "at": f"2026-01-01T00:00:0{number - 1}.000000+00:00",
            "client_id": f"client {number}",
            "detail": {"number": number},
            "event": "client.updated",
            "id": number,
            "kid": kid,
            "network": f"198.51.100.{number}",
            "occurrences": 1,
            "request_id": f"{number:016x}",
            "seq": number,
            "target": f"target {number}",
        }
        assert list(said) == sorted(said)
        content = json.dumps(said, separators=(",", ":")).encode()
        previous = trail.keys["audit"].mac(b"row|" + previous + b"|" + content)
        assert row.mac == previous


async def test_a_row_reads_the_same_on_both_databases(database_url: str, sqlite_url: str) -> None:
    """Whatever a detail may hold, or else a trail that moves to the other database would look forged."""
    detail = {
        "b": [1, True, None, {"z": "ü \U0001f511 \\ \" ' / \x7f \u2028", "a": -(2**70)}],
        "": "",
        "a": {},
        "é": [],
        "nul": "a\0b",
        "half": "\ud83d",
        "long": "x" * 2000,
        "aa": False,
        "B": 10**15,
    }
    seen = []
    for url in (database_url, sqlite_url):
        async with opened_trail(url) as trail:
            trail.clock.advance(timedelta(microseconds=120))
            origin = Origin("2001:db8::1", "0123456789abcdef")
            for actor in ("Zoë\n", None):
                await trail.within(
                    lambda tx, trail=trail, actor=actor, origin=origin: trail.audit.record(
                        tx, "demo.created", origin=origin if actor else None, actor=actor, detail=detail
                    )
                )
            seen.append([canonical(row, seq=row.id, kid="k") for row in await trail.rows()])
    assert seen[0] == seen[1]
    assert b'"at":"2026-01-01T00:00:00.000120+00:00"' in seen[0][0]
    assert seen[0][0].isascii()


@pytest.mark.case("SEC-07")
async def test_a_row_that_is_committed_late_is_sealed_late(on_postgresql: Trail) -> None:
    """Its id is smaller than that of a row which stands before it; the chain has no gap, and no writer waited."""
    trail = on_postgresql
    late = trail.db.transaction()
    await trail.audit.record(late, "demo.created", origin=None, target="late")
    await trail.within(lambda tx: trail.audit.record(tx, "demo.created", origin=None, target="early"))
    assert await trail.seal() == 1
    await late.__aexit__(None, None, None)
    assert await trail.seal() == 1
    assert [(row.target, row.seq) for row in await trail.rows()] == [("late", 2), ("early", 1)]
    assert await trail.fault() is None


@pytest.mark.case("SEC-07")
async def test_two_sealers_at_once_never_give_a_place_twice(on_postgresql: Trail) -> None:
    """The second one waits for the first, and goes on where that one ended; if the first one fails, where it began."""
    trail = on_postgresql
    await trail.write(6)
    for commits in (True, False):
        before = (await trail.newest()).seq
        first = trail.db.transaction()
        assert (await trail.chain.seal(first, 2)).seq == before + 2
        second = await blocked(trail, trail.within(lambda tx: trail.chain.seal(tx, 2)))
        await first.__aexit__(*((None,) * 3 if commits else (RuntimeError, RuntimeError(), None)))
        assert (await second).seq == before + (4 if commits else 2)
    assert [row.seq for row in await trail.rows()] == [1, 2, 3, 4, 5, 6]
    assert await trail.fault() is None


@pytest.mark.case("SEC-07")
async def test_writers_and_two_sealers_at_full_speed_leave_one_chain(database_url: str) -> None:
    """Four writers on two pools, a third of what they write rolled back or held open; then every row has its place."""
    async with opened_trail(database_url) as one, opened_trail(database_url) as other:
        writing = True

        async def write(trail: Trail, name: str) -> int:
            kept = 0
            for number in range(250):
                try:
                    async with trail.db.transaction() as tx:
                        for part in range(3):
                            await trail.audit.record(
                                tx, "client.updated", origin=None, actor=name, target=f"{number}.{part}"
                            )
                            if number % 20 == 0:
                                await asyncio.sleep(0.005)
                        if number % 3 == 2:
                            raise LookupError
                        kept += 3
                except LookupError:
                    pass
            return kept

        async def seal(trail: Trail) -> None:
            while writing:
                await trail.within(lambda tx: trail.chain.seal(tx, 100))
                await asyncio.sleep(0.002)

        sealers = [asyncio.create_task(seal(trail)) for trail in (one, other)]
        kept = sum(await asyncio.gather(*(write(trail, f"w{n}") for n, trail in enumerate((one, other, one, other)))))
        sealed_meanwhile = (await one.newest()).seq
        writing = False
        await asyncio.gather(*sealers)
        await one.seal()
        walk = await one.verify()
        assert (walk.fault, walk.checked, walk.unsealed) == (None, kept, 0)
        places = [row.seq for row in await one.execute(select(audit_events.c.seq).order_by(audit_events.c.seq))]
        assert places == list(range(1, kept + 1))
        assert kept == 4 * 3 * 167
        assert sealed_meanwhile > 0


async def test_a_batch_that_fails_halfway_leaves_no_seal(trail: Trail) -> None:
    """The rows wait, and are sealed by the next run."""
    await trail.write(3)
    async with trail.db.transaction() as tx:
        assert (await trail.chain.seal(tx)).count == 3
        await tx.__aexit__(RuntimeError, RuntimeError(), None)
    assert (await trail.newest()).seq == 0
    assert (await trail.verify()).unsealed == 3
    assert await trail.seal() == 3
    assert await trail.fault() is None


async def test_a_new_key_seals_from_then_on(trail: Trail) -> None:
    """What the old one sealed still holds."""
    await trail.write(2)
    await trail.seal()
    kid, plain = "abcd0123", secrets.token_bytes(32)
    master = MasterKeys.parse(MASTER_KEY)
    wrapped = master.wrap(plain, context=f"audit|{kid}")
    await trail.execute(
        insert(data_keys).values(
            purpose="audit",
            kid=kid,
            kek_id=wrapped.kek_id,
            wrapped=wrapped.blob,
            created_at=trail.clock.now() + timedelta(1),
        )
    )
    await trail.within(trail.keys.load)
    await trail.write(2)
    await trail.seal()
    rows = await trail.rows()
    assert [row.mac_kid == kid for row in rows] == [False, False, True, True]
    expected = hmac.digest(plain, b"row|" + rows[2].mac + b"|" + canonical(rows[3], seq=4, kid=kid), "sha256")
    assert rows[3].mac == expected
    assert await trail.fault() is None


async def test_nothing_is_sealed_without_the_key(trail: Trail) -> None:
    """Neither does verifying say that a chain is bad, or good, which it cannot know."""
    await trail.write(1)
    await trail.seal()
    await trail.write(1)
    keyless = AuditChain(trail.clock, DataKeys(MasterKeys.parse(MASTER_KEY), trail.clock))
    with pytest.raises(LookupError, match="data key of the audit trail is not loaded"):
        await trail.within(keyless.seal)
    with pytest.raises(LookupError, match="data key of the audit trail is not loaded"):
        await trail.within(keyless.verification().advance)
    assert [row.seq for row in await trail.rows()] == [1, None]


async def test_a_seal_whose_key_is_gone_is_told_by_the_key(trail: Trail) -> None:
    """Somebody has removed the row of data_keys; the sentence says what to put back."""
    await ten(trail)
    gone = trail.keys["audit"].kid
    await trail.execute("DELETE FROM data_keys WHERE purpose = 'audit'")
    await trail.within(trail.keys.load)
    assert trail.keys["audit"].kid != gone
    fault = (await trail.verify()).fault
    assert fault is not None
    assert (fault.seq, fault.wrong) == (1, Wrong.KEY_MISSING)
    assert gone in fault.sentence
    assert "data_keys" in fault.sentence


# -- what somebody with every right on the database can do -------------------------------------------------------------

ALTERATIONS = {
    "at": "at = (SELECT at FROM audit_events WHERE seq = 6)",
    "at by a microsecond": "at = {microsecond}",
    "event": "event = 'client.created'",
    "actor": "actor = 'somebody'",
    "actor away": "actor = NULL",
    "target": "target = 'target 5 '",
    "client_id": "client_id = ''",
    "network": "network = '198.51.100.6'",
    "request_id": "request_id = NULL",
    "occurrences": "occurrences = 2",
    "detail": "detail = '{\"number\": 6}'",
    "detail added": 'detail = \'{"number": 5, "more": null}\'',
    "id": "id = 5000",
    "seal": "mac = (SELECT mac FROM audit_events WHERE seq = 6)",
    "part of the seal": "mac = substr(mac, 1, 31)",
}


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize("column", ALTERATIONS)
async def test_a_row_that_was_altered_is_named(trail: Trail, column: str) -> None:
    """Whatever of it."""
    await ten(trail)
    later = "substr(at, 1, 25) || '1'" if trail.db.on_sqlite else "at + interval '1 microsecond'"
    change = ALTERATIONS[column].replace("{microsecond}", later)
    assert await trail.execute(ALTER.format(change, 5)) == 1
    assert await trail.fault() == (5, "altered")


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize("victim", range(1, 11))
async def test_a_row_is_named_wherever_it_stands(trail: Trail, victim: int) -> None:
    """First, last, at the edge of a page, at the edge of a batch; altered or gone."""
    await ten(trail)
    await trail.execute(ALTER.format("occurrences = 7", victim))
    for page in (1, 2, 3, 4, 10, 1000):
        assert await trail.fault(page=page) == (victim, "altered")
    await trail.execute(REMOVE.format(victim))
    for page in (1, 2, 3, 4, 10, 1000):
        assert await trail.fault(page=page) == (victim, "missing" if victim < 10 else "tail cut")


@pytest.mark.case("SEC-06")
async def test_the_first_of_several_bad_rows_is_named(trail: Trail) -> None:
    """Whatever was done to the later ones."""
    await ten(trail)
    await trail.execute("UPDATE audit_events SET occurrences = 7 WHERE seq IN (3, 4, 8)")
    await trail.execute("DELETE FROM audit_events WHERE seq IN (6, 10)")
    walk = await trail.verify()
    assert walk.fault is not None
    assert (walk.fault.seq, walk.checked, walk.seq) == (3, 2, 2)


@pytest.mark.case("SEC-06")
async def test_rows_that_stand_in_another_order_are_told_as_moved(trail: Trail) -> None:
    """Two that have changed places, and one that was put behind others."""
    await ten(trail)
    swap = [(-1, 4), (4, 7), (7, -1)]
    for now, before in swap:
        await trail.execute(ALTER.format(f"seq = {now}", before))
    assert await trail.fault() == (4, "moved")
    for now, before in swap:
        await trail.execute(ALTER.format(f"seq = {now}", before))
    assert await trail.fault() is None
    for now, before in [(-1, 2), (2, 3), (3, 4), (4, 5), (5, -1)]:
        await trail.execute(ALTER.format(f"seq = {now}", before))
    assert await trail.fault() == (2, "moved")


@pytest.mark.case("SEC-06")
async def test_rows_whose_contents_have_changed_places_are_named(trail: Trail) -> None:
    """Each keeps its id, its place and its seal."""
    await ten(trail)
    rows = await trail.rows()
    for here, there in [(3, 7), (7, 3)]:
        said = rows[there]._mapping
        values = {name: said[name] for name in said if name not in ("id", "seq", "mac", "mac_kid")}
        await trail.execute(audit_events.update().where(audit_events.c.seq == here + 1).values(values))
    assert await trail.fault() == (4, "altered")


FORGED = """
INSERT INTO audit_events (at, event, actor, occurrences, detail, seq, mac, mac_kid)
SELECT at, event, 'somebody else', occurrences, detail, {place}, {mac}, {kid} FROM audit_events WHERE seq = 3
"""


@pytest.mark.case("SEC-06")
async def test_a_row_that_was_put_in_between_is_told_as_forged(trail: Trail) -> None:
    """The rows behind it were given the next places."""
    await ten(trail)
    await trail.execute("UPDATE audit_events SET seq = -seq - 1 WHERE seq >= 6")
    await trail.execute("UPDATE audit_events SET seq = -seq WHERE seq < 0")
    await trail.execute("UPDATE audit_chain SET seq = 11")
    await trail.execute(FORGED.format(place=6, mac="mac", kid="mac_kid"))
    assert await trail.fault() == (6, "forged")


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize(
    ("mac", "kid", "wrong"),
    [
        ("mac", "mac_kid", "forged"),
        ("NULL", "NULL", "forged"),
        ("mac", "NULL", "forged"),
        ("mac", "'k'", "key missing"),
    ],
    ids=["another's seal", "no seal", "no key", "an unknown key"],
)
async def test_a_row_that_was_put_behind_the_end_is_told_as_forged(
    trail: Trail, mac: str, kid: str, wrong: str
) -> None:
    """Also with the end of the chain moved on to it; and nothing is sealed upon it."""
    await ten(trail)
    await trail.execute(FORGED.format(place=11, mac=mac, kid=kid))
    assert await trail.fault() == (11, wrong)
    await trail.write(1)
    with pytest.raises(ChainBroken, match="a row at 11"):
        await trail.within(trail.chain.seal)
    await trail.execute("UPDATE audit_chain SET seq = 11")
    seq, _ = await trail.fault() or (0, "")
    assert seq == 11


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize("page", [5, 1000])
async def test_a_second_row_with_a_place_is_told_as_forged(trail: Trail, page: int) -> None:
    """Who drops the index that forbids it gains nothing, at the edge of a page either."""
    await ten(trail)
    await trail.execute("DROP INDEX ix_audit_events_seq")
    await trail.execute(FORGED.format(place=5, mac="mac", kid="mac_kid"))
    assert await trail.fault(page=page) == (5, "forged")


@pytest.mark.case("SEC-06")
async def test_a_row_that_was_taken_out_of_the_chain_is_missed(trail: Trail) -> None:
    """Sealed once more, it stands at the end, and its old place is empty."""
    await ten(trail)
    await trail.execute("UPDATE audit_events SET seq = NULL, mac = NULL, mac_kid = NULL WHERE seq = 5")
    assert await trail.fault() == (5, "missing")
    assert await trail.seal() == 1
    assert await trail.fault() == (5, "missing")


@pytest.mark.case("SEC-06")
async def test_a_value_that_cannot_even_be_read_is_named(trail: Trail) -> None:
    """The database can hold what this program cannot."""
    await ten(trail)
    value = "detail = '{'" if trail.db.on_sqlite else "at = 'infinity'"
    await trail.execute(ALTER.format(value, 7))
    assert await trail.fault() == (7, "altered")
    await trail.execute("UPDATE audit_events SET occurrences = 7 WHERE seq = 3")
    assert await trail.fault() == (3, "altered")
    await trail.execute("DELETE FROM audit_events WHERE seq < 7")
    assert await trail.fault() == (1, "missing")


# Nested as deeply as Python can just read and no longer write, or not even read; and a number longer than it takes.
BEYOND_US = [
    *(f"{'[' * depth}{']' * depth}" for depth in range(900, 1000, 5)),
    "[" * 12_000 + "]" * 12_000,
    "9" * 5_000,
]


@pytest.mark.case("SEC-06")
async def test_a_value_that_is_too_much_for_us_is_named_by_the_walk_and_by_retention(on_postgresql: Trail) -> None:
    """It must not end the walk as a fault of ours would, behind which whatever else was changed stays unseen."""
    trail = on_postgresql
    await ten(trail)
    for detail in BEYOND_US:
        await trail.execute(audit_events.update().where(audit_events.c.seq == 1).values(detail=literal_json(detail)))
        assert await trail.fault() == (1, "altered")
        with pytest.raises(ChainBroken):
            await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now() + timedelta(days=1)))


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize("detail", [BEYOND_US[-2], BEYOND_US[-1]], ids=["deep", "long"])
async def test_who_stops_the_sealing_by_a_row_that_cannot_be_read_is_noticed(on_postgresql: Trail, detail: str) -> None:
    """Else the rows behind it could be changed, and nothing but a job that is late would tell."""
    trail = on_postgresql
    await ten(trail)
    await trail.write(1)
    await trail.execute(audit_events.update().where(audit_events.c.seq.is_(None)).values(detail=literal_json(detail)))
    with pytest.raises(ChainBroken) as refused:
        await trail.seal()
    assert (refused.value.fault.seq, refused.value.fault.wrong) == (11, Wrong.FORGED)


def literal_json(value: str) -> Any:
    """Return a value as PostgreSQL reads it, without asking Python."""
    return cast(literal(value, Text()), JSONB())


@pytest.mark.case("SEC-06")
async def test_a_tail_that_was_cut_is_found_by_what_was_kept_elsewhere(trail: Trail) -> None:
    """The chain that is left is whole: only an anchor knows that there was more."""
    await ten(trail)
    kept, eighth = await trail.newest(), (await trail.rows())[7].mac
    await trail.execute("DELETE FROM audit_events WHERE seq > 8")
    assert await trail.fault() == (9, "tail cut")
    await trail.execute("UPDATE audit_chain SET seq = 8, mac = (SELECT mac FROM audit_events WHERE seq = 8)")
    assert await trail.fault() is None
    assert await trail.fault(Anchor(8, eighth)) is None
    assert await trail.fault(Anchor(8, eighth), kept) == (9, "tail cut")
    await trail.write(3)
    await trail.seal()
    assert await trail.fault() is None
    assert await trail.fault(Anchor(8, eighth)) is None
    assert await trail.fault(kept) == (10, "rewritten")
    assert await trail.fault(kept, Anchor(11, bytes(32)), page=2) == (10, "rewritten")


@pytest.mark.case("SEC-06")
async def test_a_trail_that_was_emptied_is_found_by_what_was_kept_elsewhere(trail: Trail) -> None:
    """Without an anchor an empty trail is a good one; what people keep is `audit anchor`, or the log."""
    await ten(trail)
    kept = await trail.newest()
    await trail.execute("DELETE FROM audit_events")
    assert await trail.fault() == (1, "tail cut")
    await trail.execute(text("UPDATE audit_chain SET seq = 0, mac = :zero").bindparams(zero=bytes(32)))
    assert await trail.fault() is None
    assert await trail.fault(kept) == (1, "tail cut")
    assert await trail.fault(Anchor(0, bytes(32))) is None


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("mac = base_mac", (10, "head moved")),
        ("seq = 8", (9, "head moved")),
        ("seq = 8, mac = (SELECT mac FROM audit_events WHERE seq = 8)", (9, "head moved")),
        ("seq = 12", (11, "tail cut")),
        ("id = 2", (0, "head moved")),
    ],
    ids=["another seal", "earlier", "earlier with its seal", "later", "gone"],
)
async def test_an_end_that_was_moved_is_noticed(trail: Trail, change: str, fault: tuple[int, str]) -> None:
    """The rows are all there, and the table with the chain's end says otherwise."""
    await ten(trail)
    await trail.execute(MOVE_END.format(change))
    assert await trail.fault() == fault


@pytest.mark.case("SEC-06")
async def test_a_beginning_that_was_cut_is_noticed(trail: Trail) -> None:
    """The rows are missed, and moving the chain's beginning takes more than rights on the database."""
    await ten(trail)
    await trail.execute("DELETE FROM audit_events WHERE seq <= 3")
    assert await trail.fault() == (1, "missing")
    await trail.execute("UPDATE audit_chain SET base_seq = 3")
    assert await trail.fault() == (3, "base moved")
    await trail.execute(
        text("UPDATE audit_chain SET base_kid = :kid, base_proof = mac").bindparams(kid=trail.keys["audit"].kid)
    )
    assert await trail.fault() == (3, "base moved")
    await trail.execute("UPDATE audit_chain SET base_kid = 'k'")
    assert await trail.fault() == (3, "key missing")


# -- retention --------------------------------------------------------------------------------------------------------


async def test_retention_removes_the_oldest_sealed_rows_and_the_chain_goes_on(trail: Trail) -> None:
    """In batches, never a young row, never one that is not sealed; the trail says that it was done."""
    await ten(trail)
    start = trail.clock.now() - timedelta(seconds=10)
    cut = start + timedelta(seconds=6)  # rows 1 to 6 are older
    [sixth] = [row.mac for row in await trail.rows() if row.seq == 6]
    done = [await trail.within(lambda tx: trail.chain.retain(tx, cut, 4)) for _ in range(3)]
    assert done == [4, 2, 0]
    rows = await trail.rows()
    assert [row.seq for row in rows] == [7, 8, 9, 10, None, None]
    assert [(row.event, row.actor, row.detail) for row in rows[4:]] == [
        ("audit.pruned", "schedule", {"rows": 4, "up_to": 4}),
        ("audit.pruned", "schedule", {"rows": 2, "up_to": 6}),
    ]
    walk = await trail.verify(Anchor(2, bytes(32)), Anchor(6, sixth))
    assert (walk.fault, walk.checked, walk.seq, walk.unsealed) == (None, 4, 10, 2)
    assert walk.outdated == [Anchor(2, bytes(32))]
    assert await trail.fault(Anchor(6, bytes(32))) == (6, "rewritten")
    await trail.seal()
    assert await trail.fault() is None


async def test_retention_may_leave_nothing_and_the_chain_goes_on(trail: Trail) -> None:
    """The next row is sealed upon the last one that is gone."""
    await ten(trail)
    assert await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now())) == 10
    assert [(row.seq, row.actor) for row in await trail.rows()] == [(None, "schedule")]
    assert await trail.fault() is None
    await trail.write(2)
    await trail.seal()
    assert [row.seq for row in await trail.rows()] == [11, 12, 13]
    assert await trail.fault() is None
    await trail.execute("DELETE FROM audit_events WHERE seq = 11")
    assert await trail.fault() == (11, "missing")


async def test_an_old_row_behind_a_young_one_stays(trail: Trail) -> None:
    """Only the beginning of the chain can go: what is sealed late leaves late."""
    cut = trail.clock.now() + timedelta(seconds=30)
    trail.clock.advance(60)
    await trail.write(1)
    trail.clock.advance(-120)
    await trail.write(1)
    await trail.seal()
    assert await trail.within(lambda tx: trail.chain.retain(tx, cut)) == 0
    assert len(await trail.rows()) == 2
    trail.clock.advance(300)
    assert await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now())) == 2


async def test_rows_that_wait_to_be_sealed_are_never_removed(trail: Trail) -> None:
    """However old."""
    await trail.write(3)
    assert await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now() + timedelta(days=1))) == 0
    assert len(await trail.rows()) == 3


@pytest.mark.case("SEC-06")
async def test_a_row_that_was_made_to_look_old_is_not_removed(trail: Trail) -> None:
    """Or the service would wipe out the traces for whoever made them."""
    await ten(trail)
    cut = trail.clock.now() - timedelta(days=1)
    await trail.execute(audit_events.update().where(audit_events.c.seq <= 4).values(at=cut - timedelta(days=1)))
    with pytest.raises(ChainBroken) as refused:
        await trail.within(lambda tx: trail.chain.retain(tx, cut))
    assert (refused.value.fault.seq, refused.value.fault.wrong) == (1, Wrong.ALTERED)
    assert len(await trail.rows()) == 10


@pytest.mark.case("SEC-06")
@pytest.mark.parametrize(
    ("tampering", "wrong"),
    [
        ("UPDATE audit_events SET actor = NULL WHERE seq = 4", "altered"),
        ("UPDATE audit_events SET mac_kid = 'k' WHERE seq = 4", "key missing"),
        ("UPDATE audit_events SET mac_kid = NULL WHERE seq = 4", "altered"),
        ("DELETE FROM audit_events WHERE seq = 4", "missing"),
    ],
    ids=["altered", "unknown key", "no key", "gone"],
)
async def test_retention_stops_before_a_row_that_does_not_hold(trail: Trail, tampering: str, wrong: str) -> None:
    """What was done stays to be seen."""
    await ten(trail)
    await trail.execute(tampering)
    cut = trail.clock.now() + timedelta(days=1)
    assert await trail.within(lambda tx: trail.chain.retain(tx, cut)) == 3
    with pytest.raises(ChainBroken) as refused:
        await trail.within(lambda tx: trail.chain.retain(tx, cut))
    assert (refused.value.fault.seq, str(refused.value.fault.wrong)) == (4, wrong)
    assert (await trail.fault() or (0, ""))[0] == 4


@pytest.mark.case("SEC-06")
async def test_retention_never_proves_a_beginning_that_somebody_else_moved(trail: Trail) -> None:
    """Nor an older one of its own that was put back."""
    await ten(trail)
    start = trail.clock.now() - timedelta(seconds=10)
    await trail.within(lambda tx: trail.chain.retain(tx, start + timedelta(seconds=2)))
    [old] = await trail.execute(HEAD)
    await trail.within(lambda tx: trail.chain.retain(tx, start + timedelta(seconds=4)))
    [new] = await trail.execute(HEAD)
    move = "UPDATE audit_chain SET base_seq = :seq, base_mac = :mac, base_kid = :kid, base_proof = :proof"

    async def stand(seq: int, mac: Any, kid: Any, proof: Any) -> tuple[int, str]:
        await trail.execute(text(move).bindparams(seq=seq, mac=mac, kid=kid, proof=proof))
        with pytest.raises(ChainBroken) as refused:
            await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now()))
        fault = refused.value.fault
        assert await trail.fault() == (fault.seq, str(fault.wrong))
        return fault.seq, str(fault.wrong)

    kid = new.base_kid
    assert await stand(5, new.base_mac, kid, new.base_proof) == (5, "base moved")
    assert await stand(4, old.base_mac, kid, new.base_proof) == (4, "base moved")
    assert await stand(4, new.base_mac, kid, None) == (4, "base moved")
    assert await stand(4, new.base_mac, None, new.base_proof) == (4, "base moved")
    assert await stand(0, new.base_mac, None, None) == (0, "base moved")
    assert await stand(4, new.base_mac, "k", new.base_proof) == (4, "key missing")
    assert await stand(2, old.base_mac, kid, old.base_proof) == (3, "missing")
    assert await stand(0, bytes(32), None, None) == (1, "missing")
    assert len([row for row in await trail.rows() if row.seq]) == 6
    await trail.execute(text(move).bindparams(seq=4, mac=new.base_mac, kid=kid, proof=new.base_proof))
    assert await trail.fault() is None


@pytest.mark.case("SEC-06")
async def test_retention_stops_at_what_is_said_to_be_the_end(trail: Trail) -> None:
    """Rows behind it are evidence that somebody has moved the end."""
    await ten(trail)
    await trail.execute("UPDATE audit_chain SET seq = 4, mac = (SELECT mac FROM audit_events WHERE seq = 4)")
    cut = trail.clock.now() + timedelta(days=1)
    assert [await trail.within(lambda tx: trail.chain.retain(tx, cut)) for _ in range(2)] == [4, 0]
    assert await trail.fault() == (5, "head moved")


@pytest.mark.case("SEC-06")
async def test_a_row_before_the_beginning_is_told_as_forged(trail: Trail) -> None:
    """Retention has removed what stood there."""
    await ten(trail)
    await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now() - timedelta(seconds=6)))
    for place in (3, 4, 0, -1):
        await trail.execute(FORGED.replace("seq = 3", "seq = 8").format(place=place, mac="mac", kid="mac_kid"))
        assert await trail.fault() == (place, "forged")
        await trail.execute(REMOVE.format(place))
    assert await trail.fault() is None


async def test_a_removal_that_cannot_be_recorded_does_not_happen(on_postgresql: Trail) -> None:
    """No audit, no change."""
    trail = on_postgresql
    await ten(trail)
    await trail.execute("ALTER TABLE audit_events ADD CONSTRAINT planted CHECK (event <> 'audit.pruned') NOT VALID")
    with pytest.raises(DBAPIError):
        await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now()))
    assert (await trail.verify()).checked == 10


# -- while the service goes on ----------------------------------------------------------------------------------------


async def test_rows_that_are_written_and_sealed_during_the_walk_do_no_harm(trail: Trail) -> None:
    """It ends at the chain's end as that is then."""
    await ten(trail)
    walk = trail.chain.verification()
    walk._page = 3
    for _ in range(4):
        assert await trail.within(walk.advance)
        await trail.write(2)
        await trail.seal()
    while await trail.within(walk.advance):
        pass
    assert (walk.fault, walk.checked, walk.seq, walk.unsealed) == (None, 18, 18, 0)


async def test_retention_may_overtake_the_walk(trail: Trail) -> None:
    """What it removes meanwhile is not missed, and the walk goes on behind it, or ends with it."""
    await ten(trail)
    start = trail.clock.now() - timedelta(seconds=10)
    walk = trail.chain.verification()
    walk._page = 2
    assert await trail.within(walk.advance)
    await trail.within(lambda tx: trail.chain.retain(tx, start + timedelta(seconds=1)))
    assert await trail.within(walk.advance)
    assert (walk.seq, walk.checked) == (4, 4)
    await trail.within(lambda tx: trail.chain.retain(tx, start + timedelta(seconds=6)))
    assert await trail.within(walk.advance)
    assert (walk.seq, walk.checked) == (8, 6)
    await trail.within(lambda tx: trail.chain.retain(tx, start + timedelta(seconds=10)))
    assert not await trail.within(walk.advance)
    assert (walk.fault, walk.seq, walk.checked) == (None, 10, 6)


@pytest.mark.parametrize(("keep", "checked"), [(4, 4), (0, 0)], ids=["some", "all"])
async def test_retention_may_come_between_two_looks_of_one_step(on_postgresql: Trail, keep: int, checked: int) -> None:
    """The chain's end was read before it, the rows after it."""
    trail = on_postgresql
    await ten(trail)
    walk = trail.chain.verification()
    read = walk._rows

    async def late(tx: Transaction) -> Any:
        if walk.seq == 0:
            await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now() - timedelta(seconds=keep)))
        return await read(tx)

    walk._rows = late  # type: ignore[method-assign]
    while await trail.within(walk.advance):
        pass
    assert (walk.fault, walk.seq, walk.checked) == (None, 10, checked)


async def test_a_long_chain_is_walked_in_pages(on_postgresql: Trail) -> None:
    """Two and a half of them; a bad row at each edge is found."""
    trail = on_postgresql
    await trail.execute(
        "INSERT INTO audit_events (at, event, occurrences, detail)"
        " SELECT now(), 'demo.created', n, '{}' FROM generate_series(1, 2500) AS n"
    )
    assert await trail.seal() == 2500
    walk = trail.chain.verification()
    seen = [walk.checked]
    while await trail.within(walk.advance):
        seen.append(walk.checked)
    assert (walk.fault, seen) == (None, [0, 1000, 2000, 2500])
    for bad in (2500, 2001, 2000, 1001, 1000, 1):
        await trail.execute(ALTER.format("actor = 'x'", bad))
        assert await trail.fault() == (bad, "altered")


async def test_two_databases_do_not_accept_each_others_rows(database_url: str, sqlite_url: str) -> None:
    """Each has an audit key of its own, though the master key is the same."""
    async with opened_trail(database_url) as one, opened_trail(sqlite_url) as other:
        for trail in (one, other):
            await trail.write(1)
            await trail.seal()
        [theirs], [ours] = await one.rows(), await other.rows()
        assert canonical(theirs, seq=1, kid="k") == canonical(ours, seq=1, kid="k")
        assert theirs.mac != ours.mac
