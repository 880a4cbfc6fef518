"""
The key schedule: first as functions of the stored records, then as histories of a replica on a database in memory.

The histories check what a verifier sees: at every instant somebody signs, with a key that every cache can have, and no
token outlives its key.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select

from identity_service.infra.database import Database
from identity_service.infra.runtime.envelope import MasterKeys, new_master_key
from identity_service.infra.tables import locks, metadata, signing_keys
from identity_service.oauth.signing_keys import (
    KeyPolicy,
    KeyRecord,
    KeyState,
    NewKey,
    NoUsableKey,
    Plan,
    SigningKeys,
    plan,
    signer,
    state,
)
from identity_service.oauth.signing_keys.material import public_jwk
from tests.support.clock import FrozenClock

START = datetime(2026, 1, 1, tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = (timedelta(seconds=seconds) for seconds in (1, 60, 3600, 86400))
POLICY = KeyPolicy()


def key(kid: str, activates: timedelta, *, published: timedelta | None = None, **instants: timedelta) -> KeyRecord:
    """Return a record whose instants are given from `START`."""
    return KeyRecord(
        kid,
        {},
        published_at=START + (activates if published is None else published),
        activates_at=START + activates,
        **{f"{name}_at": START + instant for name, instant in instants.items()},
    )


# -- the functions ----------------------------------------------------------------------------------------------------


def test_nobody_signs_without_keys() -> None:
    assert signer([], START) is None


def test_the_key_activated_last_signs() -> None:
    old, new = key("old", -DAY), key("new", timedelta(0))
    assert signer([old, new], START) is new
    assert signer([new, old], START) is new
    assert signer([old, new], START - SECOND) is old


def test_a_tie_is_broken_the_same_way_everywhere() -> None:
    first, second = key("a", -DAY), key("b", -DAY)
    assert signer([first, second], START) is signer([second, first], START)


def test_a_compromised_key_signs_nothing_however_new() -> None:
    old, new = key("old", -DAY), key("new", -HOUR, compromised=timedelta(0))
    assert signer([old, new], START) is old
    assert state(new, [old, new], START) is KeyState.COMPROMISED
    assert not new.published(START)


def test_a_key_whose_successor_was_slept_over_goes_on_signing() -> None:
    """The stored plan for it does not end it; only an active successor does."""
    old = key("old", -400 * DAY)
    assert signer([old], START) is old
    assert state(old, [old], START) is KeyState.ACTIVE


def test_the_states_of_a_life() -> None:
    old = key("old", -30 * DAY, published=-31 * DAY, retires=SECOND, removed=HOUR)
    new = key("new", timedelta(0), published=-DAY)
    lives = {
        -40 * DAY: ("next", "next"),
        -DAY: ("active", "next"),
        timedelta(0): ("retiring", "active"),
        HOUR - SECOND: ("retiring", "active"),
        HOUR: ("retired", "active"),
    }
    for after, (of_old, of_new) in list(lives.items())[1:]:
        seen = [state(record, [old, new], START + after).value for record in (old, new)]
        assert seen == [of_old, of_new], after


def test_where_no_key_is_due_the_one_that_is_due_first_signs() -> None:
    """
    A replica's clock can be behind the one by which a key was activated, by as much as measuring it can be wrong.

    Without this it would refuse every request, or make a key that no verifier has seen.
    """
    first, second = key("first", SECOND), key("second", DAY)
    assert signer([first, second], START) is first
    assert state(first, [first, second], START) is KeyState.ACTIVE
    assert state(second, [first, second], START) is KeyState.NEXT
    assert not plan([first, second], START, POLICY)


def test_an_empty_table_is_owed_a_key_that_signs_and_one_that_waits() -> None:
    assert plan([], START, POLICY) == Plan(create=(START, START + 30 * DAY))


def test_a_next_key_is_owed_as_soon_as_there_is_none() -> None:
    active = key("active", -DAY)
    assert plan([active], START, POLICY) == Plan(create=(START + 29 * DAY,))
    assert not plan([active, key("next", 29 * DAY)], START, POLICY)


def test_a_next_key_made_late_waits_its_full_time() -> None:
    """However overdue the rotation is, verifiers need the time to see the key."""
    assert plan([key("active", -300 * DAY)], START, POLICY) == Plan(create=(START + DAY,))


def test_a_key_is_retired_when_its_successor_is_active_and_not_before() -> None:
    old, new = key("old", -30 * DAY), key("new", timedelta(0))
    later = key("later", 30 * DAY)
    assert plan([old, new, later], START - SECOND, POLICY).retire == ()
    assert plan([old, new, later], START, POLICY) == Plan(retire=("old",))
    retired = dataclasses.replace(old, retires_at=START, removed_at=START + HOUR)
    assert not plan([retired, new, later], START, POLICY)


def test_a_compromised_next_key_is_replaced() -> None:
    active, spoilt = key("active", timedelta(0)), key("spoilt", 29 * DAY, compromised=timedelta(0))
    assert plan([active, spoilt], START, POLICY) == Plan(create=(START + 30 * DAY,))


def test_the_lead_is_never_less_than_two_cache_lives_and_the_skew() -> None:
    assert KeyPolicy(lead=SECOND).safe_lead == 32 * MINUTE
    assert KeyPolicy(lead=MINUTE, cache=2 * HOUR).safe_lead == 4 * HOUR + 2 * MINUTE
    assert KeyPolicy(lead=33 * MINUTE).safe_lead == 33 * MINUTE


def test_the_afterlife_covers_the_longest_token_the_leeway_a_cache_and_the_skew() -> None:
    assert KeyPolicy().afterlife == timedelta(seconds=3600 + 30 + 900 + 120)


instants = st.integers(min_value=-90 * 24, max_value=90 * 24).map(lambda hours: hours * HOUR)


@st.composite
def any_record(draw: st.DrawFn, kid: str) -> KeyRecord:
    retires = draw(st.none() | instants)
    removed = None if retires is None else retires + draw(st.integers(0, 48)) * HOUR
    compromised = draw(st.none() | instants) if draw(st.integers(0, 3)) == 0 else None
    given = {"retires": retires, "removed": removed, "compromised": compromised}
    return key(kid, draw(instants), **{name: instant for name, instant in given.items() if instant is not None})


@st.composite
def any_records(draw: st.DrawFn) -> list[KeyRecord]:
    return [draw(any_record(f"k{number}")) for number in range(draw(st.integers(0, 6)))]


@given(any_records(), instants)
def test_whatever_is_stored_exactly_one_published_key_signs(records: list[KeyRecord], at: timedelta) -> None:
    """And if none is published, none signs."""
    now = START + at
    states = [state(record, records, now) for record in records]
    published = [record for record in records if record.published(now)]
    assert states.count(KeyState.ACTIVE) == min(1, len(published))
    chosen = signer(records, now)
    assert (chosen is None) == (not published)
    assert chosen is None or (chosen.published(now) and state(chosen, records, now) is KeyState.ACTIVE)
    hidden = {KeyState.RETIRED, KeyState.COMPROMISED}
    assert all((found in hidden) != record.published(now) for found, record in zip(states, records, strict=True))


@given(any_records(), instants, st.integers(0, 100).map(lambda hours: hours * HOUR))
def test_whatever_is_stored_the_plan_completes_it_in_one_step(
    records: list[KeyRecord], at: timedelta, lead: timedelta
) -> None:
    """Doing what is owed leaves one key that signs, one that waits, every other one with an end, and nothing owed."""
    now, policy = START + at, KeyPolicy(lead=lead)
    owed = plan(records, now, policy)
    after = [
        dataclasses.replace(record, retires_at=now, removed_at=now + policy.afterlife)
        if record.kid in owed.retire
        else record
        for record in records
    ]
    after += [
        KeyRecord(f"new{number}", {}, published_at=now, activates_at=instant)
        for number, instant in enumerate(owed.create)
    ]
    states = [state(record, after, now) for record in after]
    assert states.count(KeyState.ACTIVE) == 1
    assert states.count(KeyState.NEXT) >= 1
    assert not plan(after, now, policy)
    if any(record.published(now) for record in records):
        assert all(instant >= now + policy.safe_lead for instant in owed.create)
    for record, found in zip(after, states, strict=True):
        assert found is not KeyState.RETIRING or record.removed_at is not None


# -- histories --------------------------------------------------------------------------------------------------------


@cache
def key_pool() -> Sequence[NewKey]:
    """Return key material to take from: what it is made of plays no part here, so it may be small and used again."""

    def make(_number: int) -> NewKey:
        private = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505  # quick, and protects nothing
        der = private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        jwk = public_jwk(private.public_key())
        return NewKey(jwk["kid"], jwk, der)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, range(48)))


@dataclasses.dataclass(frozen=True)
class Token:
    """A token somebody holds: by which key it was signed and until when it must be accepted."""

    kid: str
    good_until: datetime


class History:
    """One replica's keys on a database in memory, and what the world outside remembers of them."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.clock = FrozenClock(START)
        self.policy = POLICY
        self.master = MasterKeys.parse(new_master_key())
        self.spare = iter(key_pool())
        self.keys = SigningKeys(self.master, self.clock, self.policy)
        self.hurried: set[str] = set()
        """Keys that an empty table or a compromise let sign without the usual wait."""
        self.compromised: set[str] = set()
        self.leads: list[timedelta] = [self.policy.safe_lead]
        self.tokens: list[Token] = []
        self.signed_with: dict[str, datetime] = {}

    # -- what can happen ------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[NewKey]:
        return [next(self.spare) for _ in range(count)]

    async def step(self) -> None:
        owed = await self.db.run(self.keys.poll)
        empty = not self.keys.records
        if owed:
            spare = self.take(len(owed.create))
            await self.db.run(lambda tx: self.keys.advance(tx, spare))
            await self.db.run(self.keys.poll)
            if empty:
                self.hurried.add(spare[0].kid)

    async def rotate(self) -> None:
        before = {record.kid for record in self.keys.records if record.published(self.clock.now())}
        chosen = await self.db.run(self.keys.rotate)
        assert await self.db.run(self.keys.rotate) == chosen
        if chosen.kid not in self.hurried:
            assert chosen.activates_at - chosen.published_at >= min(self.leads)
        await self.db.run(self.keys.poll)
        assert {record.kid for record in self.keys.records} == before

    async def compromise(self, choose: Callable[[list[KeyRecord]], list[str]]) -> None:
        published = [record for record in self.keys.records if record.published(self.clock.now())]
        kids, spare = choose(published), self.take(2)
        waiting = [record.kid for record in published if state(record, published, self.clock.now()) is KeyState.NEXT]
        hit = await self.db.run(lambda tx: self.keys.compromise(tx, kids, spare))
        assert set(hit) == set(kids)
        self.compromised |= set(hit)
        await self.db.run(self.keys.poll)
        chosen = signer(self.keys.records, self.clock.now())
        assert chosen is not None
        if set(waiting) - set(kids):
            assert chosen.kid not in {key.kid for key in spare}, "siblings hold the waiting key; no other may sign"
        if chosen.activates_at == self.clock.now():
            self.hurried.add(chosen.kid)

    async def wait(self, time: timedelta) -> None:
        """Let time pass, looking at the instants on the way when something could happen."""
        until = self.clock.now() + time
        due = {instant for record in self.keys.records for instant in (record.activates_at, record.removed_at)}
        due |= {token.good_until for token in self.tokens} | {until}
        for instant in sorted(instant for instant in due if instant and self.clock.now() < instant <= until):
            self.clock.set(instant - SECOND)
            self.look()
            self.clock.set(instant)
            self.look()

    async def restart(self, lead: timedelta, period: timedelta) -> None:
        """Start again with other settings; what is stored stands."""
        stored = await self.db.run(self.keys.describe)
        self.policy = KeyPolicy(lead=lead, period=period)
        self.leads.append(self.policy.safe_lead)
        self.keys = SigningKeys(self.master, self.clock, self.policy)
        await self.db.run(self.keys.poll)
        assert await self.db.run(self.keys.describe) == stored

    # -- what must be so ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Sign a token, and check every promise that can be checked now."""
        now, records = self.clock.now(), self.keys.records
        states = [state(record, records, now) for record in records]
        assert states.count(KeyState.ACTIVE) == 1
        chosen = signer(records, now)
        assert chosen is not None
        in_jwks = {record.kid for record in records if self.keys.public_key(record.kid)}
        assert self.keys.ready
        assert chosen.kid in in_jwks
        assert not in_jwks & self.compromised
        if chosen.kid not in self.hurried:
            assert now - chosen.published_at >= min(self.leads) >= 2 * self.policy.cache
        self.signed_with[chosen.kid] = now
        life = self.policy.token + self.policy.leeway + self.policy.skew
        self.tokens = [token for token in self.tokens if token.good_until >= now]
        for token in self.tokens:
            assert token.kid in in_jwks | self.compromised, "a token outlived its key"
        self.tokens.append(Token(chosen.kid, now + life))

    def settled(self) -> None:
        """Check what is so whenever somebody has just looked after the schedule."""
        states = [state(record, self.keys.records, self.clock.now()) for record in self.keys.records]
        assert states.count(KeyState.NEXT) == 1
        assert not plan(self.keys.records, self.clock.now(), self.policy)


durations = st.one_of(
    st.integers(1, 120).map(lambda seconds: seconds * SECOND),
    st.integers(1, 120).map(lambda minutes: minutes * MINUTE),
    st.integers(1, 90).map(lambda days: days * DAY),
)
events = st.one_of(
    st.tuples(st.just("wait"), durations),
    st.tuples(st.just("wait and step"), durations),
    st.tuples(st.just("rotate")),
    st.tuples(st.just("compromise"), st.sampled_from(["active", "next", "retiring", "all"])),
    st.tuples(st.just("restart"), st.integers(1, 96), st.integers(97, 1000)),
)


async def live_through(history: list[tuple[object, ...]]) -> None:
    db = Database("sqlite+aiosqlite:///:memory:")
    try:
        async with db.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.execute(insert(locks).values(name="schedule"))
        world = History(db)
        await world.step()
        world.look()
        world.settled()
        for name, *details in history:
            match name, details:
                case "wait", [timedelta() as time]:
                    await world.wait(time)
                case "wait and step", [timedelta() as time]:
                    await world.wait(time)
                    await world.step()
                    world.settled()
                case "rotate", []:
                    with contextlib.suppress(NoUsableKey):
                        await world.rotate()
                case "compromise", [which]:

                    def choose(published: list[KeyRecord], which: object = which) -> list[str]:
                        now = world.clock.now()
                        return [
                            record.kid
                            for record in published
                            if which == "all" or state(record, published, now).value == which
                        ]

                    await world.compromise(choose)
                case "restart", [int() as lead, int() as period]:
                    await world.restart(lead * HOUR, period * HOUR)
            world.look()
        await world.step()
        world.settled()
        world.look()
        async with db.engine.connect() as connection:
            kids = (await connection.execute(select(signing_keys.c.kid))).scalars().all()
        assert len(set(kids)) == len(kids)
    finally:
        await db.close()


@pytest.mark.case("JWT-18")
@pytest.mark.case("OPS-14")
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events, max_size=12))
@example([("wait", 90 * DAY), ("wait and step", DAY), ("wait and step", 2 * HOUR)])
@example([("rotate",), ("wait and step", DAY), ("wait and step", 2 * HOUR), ("rotate",), ("wait and step", DAY)])
@example([("compromise", "next"), ("compromise", "active"), ("compromise", "all"), ("wait and step", 2 * HOUR)])
@example([("wait", 31 * DAY), ("compromise", "active"), ("wait and step", SECOND)])
@example([("restart", 1, 97), ("rotate",), ("wait", DAY), ("restart", 96, 1000), ("wait and step", 2 * HOUR)])
def test_in_any_history_every_token_can_be_checked(history: list[tuple[object, ...]]) -> None:
    """
    One key signs at every instant; but for emergencies it was published long before; no token outlives its key.

    Whatever happens: nobody looks after the schedule for months, operators rotate and report compromised keys in any
    order, and settings change at every restart.
    """
    asyncio.run(live_through(history))


async def test_a_compromised_next_key_does_not_prolong_the_active_ones_life() -> None:
    """The replacement is due when the key it replaces was."""
    db = Database("sqlite+aiosqlite:///:memory:")
    async with db.engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(insert(locks).values(name="schedule"))
    world = History(db)
    await world.step()
    world.clock.advance(20 * DAY)
    await world.compromise(
        lambda published: [
            record.kid for record in published if state(record, published, world.clock.now()) is KeyState.NEXT
        ]
    )
    (waiting,) = [record for record in world.keys.records if record.activates_at > world.clock.now()]
    assert waiting.activates_at == START + 30 * DAY
    await db.close()
