"""Signing keys, data keys and the master key on PostgreSQL: several replicas, races, accidents and emergencies."""

import asyncio
import base64
import itertools
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from sqlalchemy import func, insert, select, update

from identity_service.infra.data_keys import PURPOSES
from identity_service.infra.database import Transaction
from identity_service.infra.migrate import migrate
from identity_service.infra.runtime.envelope import MasterKeyError, MasterKeys, new_master_key
from identity_service.infra.tables import data_keys, signing_keys
from identity_service.infra.telemetry.metrics import SIGNING_KEYS_BROKEN
from identity_service.main import Services, build_services, load_keys, step_keys
from identity_service.oauth.signing_keys import KeyRecord, KeyState, NoUsableKey, Plan
from tests.support.addresses import plain
from tests.support.clock import FrozenClock
from tests.support.patience import patience
from tests.support.servers import PostgresServer
from tests.support.service import MASTER_KEY, running, test_settings
from tests.support.tokens import compact, parts_of
from tests.support.waiting import until

SECOND, MINUTE, HOUR, DAY = (timedelta(seconds=seconds) for seconds in (1, 60, 3600, 86400))
CACHE = timedelta(seconds=900)  # what a cache may hold of the JWKS

_numbers = itertools.count(1)


# -- a database without keys, and replicas on it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyless_template(postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated database in which nobody has made a key yet, to be copied."""
    name = f"keyless_{secrets.token_hex(4)}"
    migrate(postgres_server.create_database(name))
    yield name
    postgres_server.drop_database(name)


@pytest.fixture
def keyless_url(postgres_server: PostgresServer, keyless_template: str) -> Iterator[str]:
    """The URL of a migrated database of our own without keys."""
    name = f"{keyless_template}_{next(_numbers)}"
    yield postgres_server.create_database(name, keyless_template)
    postgres_server.drop_database(name)


@asynccontextmanager
async def replica(
    url: str, clock: FrozenClock | None = None, *, load: bool = True, **changes: Any
) -> AsyncIterator[Services]:
    """
    Build a replica's objects, without its background jobs: the test takes every step by itself.

    It waits longer than in production for a lock that the test holds until everybody is there: a busy machine may take
    its time with that.
    """
    settings = test_settings(url, **changes)
    with patience(settings):
        services = build_services(settings, clock=clock or FrozenClock())
    try:
        if load:
            await load_keys(services)
        yield services
    finally:
        await services.close()


Start = Callable[..., Awaitable[Services]]


@asynccontextmanager
async def starting(url: str) -> AsyncIterator[Start]:
    """Yield a function that starts one more replica on the same database."""
    async with AsyncExitStack() as stack:

        async def start(clock: FrozenClock | None = None, **changes: Any) -> Services:
            return await stack.enter_async_context(replica(url, clock, **changes))

        yield start


@pytest.fixture
async def replicas(database_url: str) -> AsyncIterator[Start]:
    """A function that starts one more replica on a database with an active and a next key."""
    async with starting(database_url) as start:
        yield start


@pytest.fixture
async def first_replicas(keyless_url: str) -> AsyncIterator[Start]:
    """A function that starts one more replica on a database that had no keys before the first."""
    async with starting(keyless_url) as start:
        yield start


async def states(services: Services) -> dict[str, KeyState]:
    """Return the state of every key there ever was."""
    described = await services.db.run(services.signing_keys.describe)
    return {record.kid: state for record, state in described}


async def records(services: Services, *wanted: KeyState) -> list[KeyRecord]:
    described = await services.db.run(services.signing_keys.describe)
    return [record for record, state in described if not wanted or state in wanted]


async def one(services: Services, state: KeyState) -> KeyRecord:
    (record,) = await records(services, state)
    return record


def sign(services: Services) -> str:
    return services.signing_keys.sign({"sub": "x"}, typ="at+jwt")


def signing_kid(services: Services) -> str:
    kid: str = parts_of(sign(services))[0]["kid"]
    return kid


def jwks_kids(services: Services) -> list[str]:
    return [key["kid"] for key in json.loads(services.signing_keys.jwks().body)["keys"]]


async def count(services: Services, table: Any) -> int:
    async with services.db.transaction() as tx:
        found: int = (await tx.execute(select(func.count()).select_from(table))).scalar_one()
        return found


async def write(services: Services, statement: Any) -> None:
    async with services.db.transaction() as tx:
        await tx.execute(statement)


@asynccontextmanager
async def schedule_held(services: Services) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Hold the schedule lock by hand; yield a function that waits until so many sessions are waiting for it."""
    address = plain(services.settings.database)
    async with (
        await psycopg.AsyncConnection.connect(address, autocommit=True) as watcher,
        await psycopg.AsyncConnection.connect(address) as holder,
    ):
        cursor = await holder.execute("SELECT name FROM locks WHERE name = 'schedule' FOR UPDATE")
        assert await cursor.fetchone()

        async def queued(wanted: int) -> None:
            async def so() -> bool:
                cursor = await watcher.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock'"
                )
                row = await cursor.fetchone()
                return row is not None and row[0] == wanted

            await until(so, f"{wanted} sessions should be waiting for the schedule lock")

        yield queued
        await holder.rollback()


def check_schedule(found: dict[str, KeyState]) -> None:
    """Exactly one key signs and exactly one waits."""
    counted = Counter(found.values())
    assert (counted[KeyState.ACTIVE], counted[KeyState.NEXT]) == (1, 1), found


@pytest.fixture
def alarms() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged as an error while the test runs."""
    before = structlog.get_config()
    capture = structlog.testing.LogCapture()
    structlog.configure(processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield capture.entries
    structlog.configure(**before)


# -- a cold start -----------------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-19")
@pytest.mark.case("OPS-13")
@pytest.mark.parametrize("number", [2, 3, 5])
async def test_replicas_that_start_together_on_an_empty_database_agree_on_their_keys(
    keyless_url: str, number: int
) -> None:
    """
    One active and one next key, one data key of each purpose, whoever was first.

    The lock is held until every replica has seen that nothing is there.
    """
    async with AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(replica(keyless_url, load=False, database_pool_size=2))
            for _ in range(number)
        ]
        async with schedule_held(found[0]) as queued:
            loading = [asyncio.create_task(load_keys(services)) for services in found]
            await queued(number)
        await asyncio.gather(*loading)
        check_schedule(await states(found[0]))
        assert await count(found[0], signing_keys) == 2
        assert await count(found[0], data_keys) == len(PURPOSES)
        for services in found:
            await step_keys(services)
        assert len({services.signing_keys.jwks().body for services in found}) == 1
        assert len({services.data_keys["refresh"].mac(b"x") for services in found}) == 1
        active = (await one(found[0], KeyState.ACTIVE)).kid
        assert {signing_kid(services) for services in found} == {active}
        assert active in jwks_kids(found[0])


@pytest.mark.case("JWT-19")
async def test_two_replicas_that_both_made_a_first_key_store_one_of_them(first_replicas: Start) -> None:
    """Both hold finished keys and wait for the lock; the second finds that nothing is owed any more."""
    first, second = [await first_replicas(load=False) for _ in range(2)]
    plans = [await services.db.run(services.signing_keys.poll) for services in (first, second)]
    assert [len(owed.create) for owed in plans] == [2, 2]
    spares = [await services.signing_keys.prepare(owed) for services, owed in zip((first, second), plans, strict=True)]
    async with schedule_held(first) as queued:
        advancing = [
            asyncio.create_task(services.db.run(lambda tx, s=services, k=spare: s.signing_keys.advance(tx, k)))
            for services, spare in zip((first, second), spares, strict=True)
        ]
        await queued(2)
    taken = await asyncio.gather(*advancing)
    assert sorted(len(plan.create) for plan in taken) == [0, 2]
    check_schedule(await states(first))
    assert await count(first, signing_keys) == 2


@pytest.mark.case("JWT-19")
@pytest.mark.case("OPS-13")
async def test_two_replicas_at_the_instant_of_rotation_take_the_step_once(replicas: Start) -> None:
    """The old key is retired once, and one new key waits."""
    clock = FrozenClock()
    first, second = [await replicas(clock) for _ in range(2)]
    old, new = await one(first, KeyState.ACTIVE), await one(first, KeyState.NEXT)
    clock.set(new.activates_at)
    plans = [await services.db.run(services.signing_keys.poll) for services in (first, second)]
    assert [(len(owed.create), owed.retire) for owed in plans] == [(1, (old.kid,))] * 2
    spares = [await services.signing_keys.prepare(owed) for services, owed in zip((first, second), plans, strict=True)]
    async with schedule_held(first) as queued:
        advancing = [
            asyncio.create_task(services.db.run(lambda tx, s=services, k=spare: s.signing_keys.advance(tx, k)))
            for services, spare in zip((first, second), spares, strict=True)
        ]
        await queued(2)
    assert sorted(bool(plan) for plan in await asyncio.gather(*advancing)) == [False, True]
    found = await states(first)
    check_schedule(found)
    assert len(found) == 3
    assert found[old.kid] is KeyState.RETIRING
    assert found[new.kid] is KeyState.ACTIVE


@pytest.mark.case("OPS-15")
async def test_a_replica_whose_clock_is_behind_joins_the_first_one(first_replicas: Start) -> None:
    """Clocks are measured, so they differ; the key another replica has just activated is no reason to make one."""
    ahead, behind = FrozenClock(), FrozenClock()
    behind.advance(-0.5)
    first, second = await first_replicas(ahead), await first_replicas(behind)
    assert await count(first, signing_keys) == 2
    assert signing_kid(second) == signing_kid(first) == (await one(first, KeyState.ACTIVE)).kid
    assert (await states(second)) == (await states(first))


async def test_a_step_cut_off_half_way_leaves_nothing_and_is_taken_later(first_replicas: Start) -> None:
    services = await first_replicas(load=False)
    spare = await services.signing_keys.prepare(Plan(create=(services.clock.now(),) * 2))

    class Killed(Exception):
        pass

    async def half_way(tx: Transaction) -> None:
        await services.signing_keys.advance(tx, spare)
        raise Killed

    with pytest.raises(Killed):
        await services.db.run(half_way)
    assert await count(services, signing_keys) == 0
    await step_keys(services)
    check_schedule(await states(services))


# -- planned rotation -------------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-18")
@pytest.mark.case("OPS-14")
async def test_for_months_no_token_meets_a_cache_that_cannot_check_it(replicas: Start) -> None:
    """
    Two replicas that poll in turns, and siblings whose copy of the JWKS is as old as our headers allow.

    Every signing key is in every replica's JWKS and in the copies, from its first token on until its last has expired.
    """
    clock = FrozenClock()
    pair = [await replicas(clock) for _ in range(2)]
    tokens: list[tuple[Any, str]] = []
    kids: list[str] = []
    for turn in range(64 * 2):
        await step_keys(pair[turn % 2])
        copies = [set(jwks_kids(services)) for services in pair]
        clock.advance(CACHE)
        for services in pair:
            kid = signing_kid(services)
            if turn:  # the very first key could not be published before
                assert all(kid in copy for copy in copies)
            assert all(kid in jwks_kids(other) for other in pair)
            assert kid in kids[-1:] or kid not in kids, "a key that was replaced signs again"
            kids += [kid] if kid not in kids else []
            tokens.append((clock.now() + timedelta(seconds=3600 + 30), kid))
        clock.advance(HOUR - CACHE)
        tokens = [(good_until, kid) for good_until, kid in tokens if good_until >= clock.now()]
        for services in pair:
            assert {kid for _, kid in tokens} <= set(jwks_kids(services))
        clock.advance(11 * HOUR)
        tokens.clear()
    assert len(kids) == 3
    found = Counter((await states(pair[0])).values())
    assert found == {KeyState.ACTIVE: 1, KeyState.NEXT: 1, KeyState.RETIRED: 2}


async def test_a_rotation_happens_at_its_instant_although_nobody_polls(replicas: Start) -> None:
    """And the old key stays as long as nobody has recorded its end."""
    clock = FrozenClock()
    services = await replicas(clock)
    old, new = await one(services, KeyState.ACTIVE), await one(services, KeyState.NEXT)
    clock.set(new.activates_at - SECOND)
    assert signing_kid(services) == old.kid
    clock.set(new.activates_at)
    assert signing_kid(services) == new.kid
    clock.advance(60 * DAY)
    assert signing_kid(services) == new.kid
    assert set(jwks_kids(services)) == {old.kid, new.kid}
    await step_keys(services)
    (retiring,) = await records(services, KeyState.RETIRING)
    assert (retiring.kid, retiring.retires_at) == (old.kid, clock.now())
    assert retiring.removed_at == clock.now() + timedelta(seconds=3600 + 30 + 900 + 120)
    clock.set(retiring.removed_at - SECOND)
    assert old.kid in jwks_kids(services)
    clock.set(retiring.removed_at)
    assert old.kid not in jwks_kids(services)


async def test_rotate_names_the_earliest_safe_instant_and_asking_again_changes_nothing(replicas: Start) -> None:
    clock = FrozenClock()
    services = await replicas(clock)
    waiting = await one(services, KeyState.NEXT)
    clock.advance(HOUR)
    chosen = await services.db.run(services.signing_keys.rotate)
    assert chosen.kid == waiting.kid
    assert chosen.activates_at == waiting.published_at + DAY
    before = await records(services)
    clock.advance(HOUR)
    assert await services.db.run(services.signing_keys.rotate) == chosen
    await step_keys(services)
    assert await records(services) == before
    clock.set(chosen.activates_at - SECOND)
    assert signing_kid(services) != chosen.kid
    clock.set(chosen.activates_at)
    assert signing_kid(services) == chosen.kid


async def test_rotate_takes_effect_at_once_for_a_key_that_was_published_long_ago(replicas: Start) -> None:
    clock = FrozenClock()
    services = await replicas(clock)
    clock.advance(25 * HOUR)
    chosen = await services.db.run(services.signing_keys.rotate)
    assert chosen.activates_at == clock.now()
    with pytest.raises(NoUsableKey):
        await services.db.run(services.signing_keys.rotate)
    await step_keys(services)
    assert signing_kid(services) == chosen.kid
    check_schedule(await states(services))
    again = await services.db.run(services.signing_keys.rotate)
    assert again.activates_at == clock.now() + DAY


async def test_two_operators_who_rotate_at_once_do_it_once(replicas: Start) -> None:
    clock = FrozenClock()
    first, second = [await replicas(clock) for _ in range(2)]
    async with schedule_held(first) as queued:
        rotating = [asyncio.create_task(services.db.run(services.signing_keys.rotate)) for services in (first, second)]
        await queued(2)
    chosen, again = await asyncio.gather(*rotating)
    assert chosen == again
    assert await count(first, signing_keys) == 2


async def test_changed_settings_leave_stored_instants_alone(replicas: Start) -> None:
    clock = FrozenClock()
    before = await records(await replicas(clock))
    changed = await replicas(clock, signing_key_lead=2 * 86400, signing_key_period=60 * 86400)
    await step_keys(changed)
    assert await records(changed) == before


@pytest.mark.case("JWT-21")
async def test_a_restart_changes_no_key(replicas: Start) -> None:
    first = await replicas()
    second = await replicas()
    assert second.signing_keys.jwks() == first.signing_keys.jwks()
    assert signing_kid(second) == signing_kid(first)


# -- emergencies ------------------------------------------------------------------------------------------------------


async def three_keys(services: Services, clock: FrozenClock) -> dict[KeyState, KeyRecord]:
    """Let a rotation happen, so that one key retires, one signs and one waits."""
    clock.advance(25 * HOUR)
    await services.db.run(services.signing_keys.rotate)
    await step_keys(services)
    return {state: await one(services, state) for state in (KeyState.RETIRING, KeyState.ACTIVE, KeyState.NEXT)}


async def compromise(services: Services, *kids: str) -> list[str]:
    spare = await services.signing_keys.prepare(Plan(create=(services.clock.now(),) * 2))
    return await services.db.run(lambda tx: services.signing_keys.compromise(tx, kids, spare))


@pytest.mark.parametrize("which", [KeyState.RETIRING, KeyState.ACTIVE, KeyState.NEXT])
async def test_a_compromised_key_leaves_every_replica_at_its_next_poll(replicas: Start, which: KeyState) -> None:
    """The waiting key, which siblings hold already, takes over at once if the active one was hit."""
    clock = FrozenClock()
    first, second = [await replicas(clock) for _ in range(2)]
    keys = await three_keys(first, clock)
    await step_keys(second)
    token = compact(
        {"alg": "RS256", "typ": "at+jwt", "kid": keys[which].kid},
        {},
        first.signing_keys._loaded[keys[which].kid].private,
    )
    assert parts_of(token)[0]["kid"] in jwks_kids(second)
    assert await compromise(first, keys[which].kid) == [keys[which].kid]
    for services in (first, second):
        await step_keys(services)
        assert keys[which].kid not in jwks_kids(services)
        assert services.signing_keys.public_key(keys[which].kid) is None
        assert signing_kid(services) == keys[KeyState.NEXT if which is KeyState.ACTIVE else KeyState.ACTIVE].kid
        check_schedule(await states(services))
    assert (await states(first))[keys[which].kid] is KeyState.COMPROMISED
    assert first.signing_keys.jwks() == second.signing_keys.jwks()
    assert await compromise(first, keys[which].kid) == []


async def test_when_every_key_is_compromised_a_new_one_signs_at_once(replicas: Start) -> None:
    clock = FrozenClock()
    first, second = [await replicas(clock) for _ in range(2)]
    old = {record.kid for record in (await three_keys(first, clock)).values()}
    await step_keys(second)
    assert set(await compromise(first, *old)) == old
    for services in (first, second):
        await step_keys(services)
        assert len(jwks_kids(services)) == 2
        assert not old & set(jwks_kids(services))
        assert signing_kid(services) in jwks_kids(services)
        check_schedule(await states(services))
    assert signing_kid(first) == signing_kid(second)


async def test_a_replica_whose_clock_is_behind_signs_right_after_a_compromise(replicas: Start) -> None:
    """The successor's activation lies in its future by a moment; there is nobody else, so it signs."""
    ahead, behind = FrozenClock(), FrozenClock()
    behind.advance(-0.2)
    first, second = await replicas(ahead), await replicas(behind)
    await compromise(first, signing_kid(first))
    for services in (first, second):
        await step_keys(services)
    assert second.signing_keys.ready
    assert signing_kid(second) == signing_kid(first)
    assert await count(first, signing_keys) == 3


async def test_rotate_does_not_put_back_a_key_that_an_emergency_has_just_activated(replicas: Start) -> None:
    """It decides on the schedule as it is when its turn has come."""
    clock = FrozenClock()
    first, second = [await replicas(clock) for _ in range(2)]
    old, new = await one(first, KeyState.ACTIVE), await one(first, KeyState.NEXT)
    async with schedule_held(first) as queued:
        emergency = asyncio.create_task(compromise(first, old.kid))
        await queued(1)
        rotating = asyncio.create_task(second.db.run(second.signing_keys.rotate))
        await queued(2)
    await emergency
    assert (await rotating).kid not in (old.kid, new.kid)
    active = await one(first, KeyState.ACTIVE)
    assert (active.kid, active.activates_at) == (new.kid, clock.now())


async def test_a_compromise_that_meets_a_rotation_leaves_one_active_and_one_next_key(replicas: Start) -> None:
    """Both wait for the lock at the same instant; whichever comes second sees what the first one did."""
    clock = FrozenClock()
    first, second = [await replicas(clock) for _ in range(2)]
    old, new = await one(first, KeyState.ACTIVE), await one(first, KeyState.NEXT)
    clock.set(new.activates_at)
    owed = await first.db.run(first.signing_keys.poll)
    spare = await first.signing_keys.prepare(owed)
    async with schedule_held(first) as queued:
        racing = [
            asyncio.create_task(first.db.run(lambda tx: first.signing_keys.advance(tx, spare))),
            asyncio.create_task(compromise(second, new.kid)),
        ]
        await queued(2)
    await asyncio.gather(*racing)
    for services in (first, second):
        await step_keys(services)
    check_schedule(await states(first))
    assert new.kid not in jwks_kids(first)
    assert signing_kid(first) in jwks_kids(first)
    assert signing_kid(first) == signing_kid(second) != new.kid
    assert old.kid in await states(first)


@pytest.mark.case("JWT-08")
async def test_our_endpoints_refuse_tokens_of_a_compromised_key_after_the_next_poll(database_url: str) -> None:
    async with running(test_settings(database_url, key_poll=5)) as service:
        client, user = await service.a_client(), await service.a_user()
        tokens = await service.sign_in(client, user)
        assert (await service.me(tokens["access_token"])).status_code == 200
        kid = parts_of(tokens["access_token"])[0]["kid"]
        async with replica(database_url) as operator:
            await compromise(operator, kid)
        await step_keys(service.services)
        refused = await service.me(tokens["access_token"])
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        renewed = (await service.refresh(client, tokens["refresh_token"])).json()
        assert parts_of(renewed["access_token"])[0]["kid"] != kid
        assert (await service.me(renewed["access_token"])).status_code == 200
        published = (await service.http.get("/.well-known/jwks.json")).json()["keys"]
        assert kid not in [key["kid"] for key in published]


@pytest.mark.case("JWT-08")
@pytest.mark.case("REF-27")
async def test_our_endpoints_refuse_a_signature_of_a_retired_key(database_url: str) -> None:
    """Whatever the token says about its own end. The session itself lives on under the new key."""
    clock = FrozenClock()
    async with running(test_settings(database_url, key_poll=5), clock) as service:
        client, user = await service.a_client(), await service.a_user()
        tokens = await service.sign_in(client, user)
        header, claims = parts_of(tokens["access_token"])
        private = service.services.signing_keys._loaded[header["kid"]].private
        waiting = await one(service.services, KeyState.NEXT)
        await service.services.db.run(service.services.signing_keys.rotate)
        clock.set(waiting.published_at + DAY)
        await step_keys(service.services)
        forged = compact(header, {**claims, "exp": int((clock.now() + DAY).timestamp())}, private)
        assert (await service.me(forged)).status_code == 200
        (retiring,) = await records(service.services, KeyState.RETIRING)
        assert retiring.removed_at is not None
        clock.set(retiring.removed_at - SECOND)
        assert (await service.me(forged)).status_code == 200
        clock.set(retiring.removed_at)
        assert (await service.me(forged)).status_code == 401
        await step_keys(service.services)
        assert header["kid"] not in service.services.signing_keys._loaded
        assert (await service.me(forged)).status_code == 401
        renewed = (await service.refresh(client, tokens["refresh_token"])).json()
        assert parts_of(renewed["access_token"])[0]["kid"] == waiting.kid
        assert (await service.me(renewed["access_token"])).status_code == 200


# -- damaged rows -----------------------------------------------------------------------------------------------------


def _flip(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


DAMAGE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a flipped bit": lambda row: {"wrapped": _flip(row.wrapped)},
    "cut off": lambda row: {"wrapped": row.wrapped[:20]},
    "emptied": lambda row: {"wrapped": b""},
    "another wrapping key": lambda row: {"kek_id": "0123456789ab"},
    "another public key": lambda row: {"public_jwk": {**row.public_jwk, "n": row.public_jwk["n"][::-1]}},
    "another kid in the public key": lambda row: {"public_jwk": {**row.public_jwk, "kid": "x"}},
    "more in the public key": lambda row: {"public_jwk": {**row.public_jwk, "d": "AQAB"}},
    "a public key of another kind": lambda row: {"public_jwk": ["x"]},
    "no public key": lambda row: {"public_jwk": {}},
}


@pytest.mark.case("JWT-26")
@pytest.mark.parametrize(
    ("which", "damage"),
    [
        *((KeyState.ACTIVE, damage) for damage in DAMAGE),
        (KeyState.RETIRING, "emptied"),
        (KeyState.NEXT, "a flipped bit"),
    ],
)
async def test_a_damaged_row_is_left_out_reported_and_the_others_serve(
    replicas: Start, alarms: list[MutableMapping[str, Any]], which: KeyState, damage: str
) -> None:
    """A new replica starts with what is left and never publishes what it could not check."""
    clock = FrozenClock()
    first = await replicas(clock)
    keys = await three_keys(first, clock)
    spoilt = keys.pop(which)
    async with first.db.transaction() as tx:
        row = (await tx.execute(select(signing_keys).where(signing_keys.c.kid == spoilt.kid))).one()
    await write(first, update(signing_keys).where(signing_keys.c.kid == spoilt.kid).values(DAMAGE[damage](row)))

    second = await replicas(clock)
    assert second.signing_keys.ready
    assert set(jwks_kids(second)) == {record.kid for record in keys.values()}
    assert signing_kid(second) in jwks_kids(second)
    assert second.signing_keys.public_key(spoilt.kid) is None
    assert [(entry["event"], entry["kid"]) for entry in alarms] == [("signing_key.unusable", spoilt.kid)]
    assert SIGNING_KEYS_BROKEN._value.get() == 1
    for _ in range(2):
        await step_keys(second)
    assert len(alarms) == 1, "reported once, not at every poll"
    assert await count(second, signing_keys) == 3, "no replacement is made for a key that others may be using"

    await step_keys(first)
    assert signing_kid(first) == (keys.get(KeyState.ACTIVE) or spoilt).kid, "who had it loaded goes on"

    await write(first, update(signing_keys).where(signing_keys.c.kid == spoilt.kid).values(row._mapping))
    await step_keys(second)
    assert set(jwks_kids(second)) == {spoilt.kid, *(record.kid for record in keys.values())}
    assert SIGNING_KEYS_BROKEN._value.get() == 0


async def test_what_was_written_into_a_row_later_is_not_published_either(replicas: Start) -> None:
    """A replica publishes what it checked when it loaded the key, not what the row says today."""
    clock = FrozenClock()
    services = await replicas(clock)
    active = await one(services, KeyState.ACTIVE)
    planted = {**active.public_jwk, "n": active.public_jwk["n"][::-1]}
    await write(services, update(signing_keys).where(signing_keys.c.kid == active.kid).values(public_jwk=planted))
    await compromise(services, (await one(services, KeyState.NEXT)).kid)  # so that the document is built anew
    await step_keys(services)
    published = {key["kid"]: key for key in json.loads(services.signing_keys.jwks().body)["keys"]}
    assert published[active.kid] == dict(active.public_jwk)


async def _swap(services: Services, table: Any, column: Any) -> None:
    async with services.db.transaction() as tx:
        one, two = (await tx.execute(select(table).order_by(column).limit(2))).all()
        for place, other in ((one, two), (two, one)):
            await tx.execute(
                update(table)
                .where(column == getattr(place, column.name))
                .values(wrapped=other.wrapped, kek_id=other.kek_id)
            )


@pytest.mark.case("JWT-24")
async def test_swapped_private_keys_are_refused(replicas: Start) -> None:
    """Each is a good key under the right master key; it is the row that is wrong."""
    first = await replicas()
    await _swap(first, signing_keys, signing_keys.c.kid)
    with pytest.raises(MasterKeyError, match="altered or swapped"):
        await replicas()
    assert await count(first, signing_keys) == 2


@pytest.mark.case("JWT-24")
async def test_a_whole_row_under_another_name_is_refused(replicas: Start) -> None:
    """An old key must not come back as a new one."""
    first = await replicas()
    active, waiting = await one(first, KeyState.ACTIVE), await one(first, KeyState.NEXT)
    async with first.db.transaction() as tx:
        row = (await tx.execute(select(signing_keys).where(signing_keys.c.kid == active.kid))).one()
    values = {**row._mapping, "kid": waiting.kid, "activates_at": waiting.activates_at}
    await write(first, update(signing_keys).where(signing_keys.c.kid == waiting.kid).values(values))
    second = await replicas()
    assert jwks_kids(second) == [active.kid]


@pytest.mark.case("JWT-24")
async def test_swapped_data_keys_are_refused(replicas: Start) -> None:
    first = await replicas()
    await _swap(first, data_keys, data_keys.c.purpose)
    with pytest.raises(MasterKeyError, match="altered or swapped"):
        await replicas()
    assert await count(first, data_keys) == len(PURPOSES)


@pytest.mark.case("JWT-24")
async def test_the_database_holds_no_private_key_in_the_clear(replicas: Start) -> None:
    services = await replicas()
    async with services.db.transaction() as tx:
        rows = (await tx.execute(select(signing_keys))).all()
        held = (await tx.execute(select(data_keys))).all()
    for row in rows:
        numbers = services.signing_keys._loaded[row.kid].private.private_numbers()
        everything = repr(dict(row._mapping)).encode() + row.wrapped
        for number in (numbers.p, numbers.q, numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp):
            raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
            for start in range(0, len(raw) - 8, 8):
                assert raw[start : start + 8] not in everything
            for spelling in (base64.b64encode(raw)[:12], raw.hex()[:16].encode(), str(number)[:16].encode()):
                assert spelling not in everything
        with pytest.raises(ValueError, match="Could not deserialize"):
            serialization.load_der_private_key(row.wrapped, password=None)
    for row in held:
        for secret in services.data_keys[row.purpose]._keys.values():
            assert secret not in row.wrapped


# -- the master key ---------------------------------------------------------------------------------------------------


def key_id(text: str) -> str:
    return MasterKeys.parse(text).first_id


@pytest.mark.case("JWT-25")
async def test_a_start_with_another_master_key_is_refused_and_makes_nothing(replicas: Start) -> None:
    """The message names the key that is wanted; an empty sheet would end every session and strand every token."""
    first = await replicas()
    before = (await records(first), await count(first, data_keys))
    with pytest.raises(MasterKeyError) as refused:
        await replicas(master_key=new_master_key())
    assert f"master key {key_id(MASTER_KEY)} is wanted" in str(refused.value)
    assert MASTER_KEY not in str(refused.value)
    assert (await records(first), await count(first, data_keys)) == before


@pytest.mark.case("JWT-25")
async def test_another_master_key_makes_nothing_even_where_something_is_missing(replicas: Start) -> None:
    """A data key made by a process that can unwrap nothing else would be of use to nobody."""
    first = await replicas()
    await write(first, data_keys.delete().where(data_keys.c.purpose == "names"))
    with pytest.raises(MasterKeyError):
        await replicas(master_key=new_master_key())
    assert await count(first, data_keys) == len(PURPOSES) - 1


@pytest.mark.case("JWT-25")
async def test_the_whole_server_refuses_to_start_with_another_master_key(database_url: str) -> None:
    with pytest.raises(MasterKeyError, match=f"master key {key_id(MASTER_KEY)} is wanted"):
        async with running(test_settings(database_url, master_key=new_master_key())):
            pytest.fail("it started")


@pytest.mark.case("JWT-25")
@pytest.mark.parametrize("content", [None, "", "changeme", "\xff"])
def test_a_master_key_file_that_was_named_is_never_made(tmp_path: Path, content: str | None) -> None:
    """In development neither: whoever names a file has a key in mind."""
    path = tmp_path / "master.key"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    settings = test_settings("sqlite+aiosqlite:///:memory:", master_key="", master_key_file=path)
    with pytest.raises(MasterKeyError):
        build_services(settings, clock=FrozenClock())
    assert path.exists() == (content is not None)
    assert content is None or path.read_bytes() == content.encode("latin-1")


@pytest.mark.case("JWT-25")
async def test_a_running_replica_without_the_newest_master_key_keeps_working(
    replicas: Start, alarms: list[MutableMapping[str, Any]]
) -> None:
    """The mistake of a roll-out in the wrong order: it reports the row, keeps its keys, and makes none of its own."""
    clock = FrozenClock()
    left_behind = await replicas(clock)
    kept = signing_kid(left_behind)
    wrong_order = await replicas(clock, master_key=f"{new_master_key()}\n{MASTER_KEY}")
    waiting = await one(left_behind, KeyState.NEXT)
    await compromise(wrong_order, waiting.kid)
    unreadable = await one(wrong_order, KeyState.NEXT)

    for _ in range(3):
        await step_keys(left_behind)
    assert [entry["kid"] for entry in alarms] == [unreadable.kid]
    assert "is wanted" in alarms[0]["reason"]
    assert jwks_kids(left_behind) == [kept] == [signing_kid(left_behind)]
    assert left_behind.signing_keys.ready
    check_schedule(await states(left_behind))
    assert await count(left_behind, signing_keys) == 3

    await step_keys(wrong_order)
    clock.set(unreadable.activates_at)
    await step_keys(left_behind)
    assert signing_kid(left_behind) == kept, "what it cannot load it cannot sign with; its own key is still published"
    assert signing_kid(wrong_order) == unreadable.kid
    await step_keys(wrong_order)
    assert kept in jwks_kids(wrong_order)


@pytest.mark.case("JWT-25")
async def test_changing_the_master_key_ends_no_session_at_any_step(keyless_url: str) -> None:
    """Add the new one second, make it first, wrap anew, remove the old: tokens from before work all the way."""
    old, new = new_master_key(), new_master_key()
    clock = FrozenClock()
    settings = test_settings(keyless_url, key_poll=5, master_key=old)
    async with running(settings, clock) as service:
        client, user = await service.a_client(), await service.a_user()
        tokens = await service.sign_in(client, user)
        idle = await service.sign_in(client, user)
        for waiting in [await one(service.services, KeyState.NEXT)]:  # a compromised and a used-up key to wrap as well
            await compromise(service.services, waiting.kid)
        jwks = (await _after_poll(service)).json()
    access, current = tokens["access_token"], tokens["refresh_token"]

    async def still_good(keys: str) -> None:
        nonlocal current
        async with running(test_settings(keyless_url, key_poll=5, master_key=keys), clock) as service:
            assert (await service.me(access)).status_code == 200
            assert (await service.http.get("/.well-known/jwks.json")).json() == jwks
            answer = await service.refresh(client, current)
            assert answer.status_code == 200, answer.text
            assert (await service.me(answer.json()["access_token"])).status_code == 200
            current = answer.json()["refresh_token"]

    async def rewrap(keys: str) -> tuple[int, int]:
        async with replica(keyless_url, clock, master_key=keys) as services, services.db.transaction() as tx:
            return await services.data_keys.rewrap(tx), await services.signing_keys.rewrap(tx)

    await still_good(f"{old}\n{new}")
    assert await rewrap(f"{old}\n{new}") == (0, 0)
    await still_good(f"{new}\n{old}")
    with pytest.raises(MasterKeyError, match=f"master key {key_id(old)} is wanted"):
        await still_good(new)
    assert await rewrap(f"{new}\n{old}") == (len(PURPOSES), 3)
    assert await rewrap(f"{new}\n{old}") == (0, 0)
    await still_good(f"{new}\n{old}")
    await still_good(f"{old}\n{new}")
    await still_good(new)
    with pytest.raises(MasterKeyError, match=f"master key {key_id(new)} is wanted"):
        await still_good(old)

    async with running(test_settings(keyless_url, key_poll=5, master_key=new), clock) as service:
        assert (await service.refresh(client, idle["refresh_token"])).status_code == 200
        replay = await service.refresh(client, tokens["refresh_token"])
        assert replay.json()["error_description"] == "refresh token reuse detected; session revoked"
        for table in (data_keys, signing_keys):
            rows = await service.execute(select(table.c.kek_id))
            assert {row.kek_id for row in rows} == {key_id(new)}


async def _after_poll(service: Any) -> Any:
    await step_keys(service.services)
    return await service.http.get("/.well-known/jwks.json")


async def test_wrapping_anew_does_not_touch_a_replica_that_holds_both_keys(replicas: Start) -> None:
    new = new_master_key()
    both = await replicas(master_key=f"{MASTER_KEY}\n{new}")
    jwks, mac = both.signing_keys.jwks(), both.data_keys["refresh"].mac(b"x")
    operator = await replicas(master_key=f"{new}\n{MASTER_KEY}")
    await operator.db.run(operator.signing_keys.rewrap)
    await operator.db.run(operator.data_keys.rewrap)
    await step_keys(both)
    assert both.signing_keys.jwks() == jwks
    await both.db.run(both.data_keys.load)
    assert both.data_keys["refresh"].mac(b"x") == mac


async def test_a_row_that_cannot_be_unwrapped_stops_the_rewrapping_of_all(replicas: Start) -> None:
    """All or nothing: half a change of the master key would be noticed when the old one is gone."""
    first = await replicas()
    await write(
        first,
        insert(data_keys).values(
            purpose="refresh", kid="zz", kek_id="0123456789ab", wrapped=os.urandom(60), created_at=first.clock.now()
        ),
    )
    new = new_master_key()
    both = await replicas(load=False, master_key=f"{new}\n{MASTER_KEY}")
    with pytest.raises(MasterKeyError, match="master key 0123456789ab is wanted"):
        await both.db.run(both.data_keys.rewrap)
    async with first.db.transaction() as tx:
        found: Sequence[str] = (await tx.execute(select(data_keys.c.kek_id))).scalars().all()
    assert Counter(found) == {key_id(MASTER_KEY): len(PURPOSES), "0123456789ab": 1}


async def test_a_newer_data_key_signs_and_the_older_ones_are_still_known(replicas: Start) -> None:
    first = await replicas()
    old_kid = first.data_keys["refresh"].kid
    old_mac = first.data_keys["refresh"].mac(b"x")
    wrapped = MasterKeys.parse(MASTER_KEY).wrap(os.urandom(32), context="refresh|newer")
    later = first.clock.now() + DAY
    await write(
        first,
        insert(data_keys).values(
            purpose="refresh", kid="newer", kek_id=wrapped.kek_id, wrapped=wrapped.blob, created_at=later
        ),
    )
    second = await replicas()
    assert second.data_keys["refresh"].kid == "newer"
    assert second.data_keys["refresh"].mac(b"x") != old_mac
    assert second.data_keys["refresh"].mac(b"x", kid=old_kid) == old_mac
    assert set(second.data_keys["refresh"].kids) == {old_kid, "newer"}
    with pytest.raises(KeyError):
        second.data_keys["refresh"].mac(b"x", kid="unheard-of")


@pytest.mark.case("JWT-26")
async def test_a_key_steps_in_for_one_that_cannot_be_loaded_only_while_its_tokens_can_be_checked(
    replicas: Start,
) -> None:
    """Soon a retiring key would leave the JWKS before its tokens expire; then the next one signs."""
    clock = FrozenClock()
    first = await replicas(clock)
    keys = await three_keys(first, clock)
    damaged = update(signing_keys).where(signing_keys.c.kid == keys[KeyState.ACTIVE].kid).values(wrapped=b"damaged")
    await first.db.run(lambda tx: tx.execute(damaged))
    newcomer = await replicas(clock)
    assert signing_kid(newcomer) == keys[KeyState.RETIRING].kid
    clock.advance(20 * 60)
    await step_keys(newcomer)
    assert signing_kid(newcomer) == keys[KeyState.NEXT].kid
    assert keys[KeyState.NEXT].kid in jwks_kids(first)
