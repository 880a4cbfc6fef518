"""What the limits do while Redis is lost, slow or silent, and when it comes back."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import anyio
import pytest
from redis.exceptions import RedisError

from identity_service.infra.ratelimit import Allowed, Limited, Limiter, Rule, Spend
from identity_service.infra.ratelimit.shared import FallbackLimiter, RedisLimiter, redis_client
from tests.support.clock import FrozenClock
from tests.support.servers import LocalRedis, own_redis

GUESS = Rule("guess", burst=4, interval=10, memory=600)
SINGLE = Rule("single", burst=1, interval=10, memory=600)
BROWSE = Rule("browse", burst=1, interval=60, memory=600, kept_without_redis=False)

LONG = 20.0  # seconds that nothing here takes, however busy the machine is

guess, single, browse = (Spend(rule, "alice") for rule in (GUESS, SINGLE, BROWSE))


class Stopwatch:
    """A monotonic clock that only the test moves."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Counting:
    """Pass calls on to a limiter, and count them."""

    def __init__(self, inner: Limiter) -> None:
        self.inner = inner
        self.asked = 0

    async def spend(self, spends: Sequence[Spend]) -> Allowed | Limited:
        self.asked += 1
        return await self.inner.spend(spends)

    async def settle(self, **wanted: Any) -> None:
        self.asked += 1
        await self.inner.settle(**wanted)

    async def close(self) -> None:
        await self.inner.close()


class Harness:
    """A fallback limiter before a Redis, with everything that a test wants to see or move."""

    def __init__(self, url: str) -> None:
        self.clock = FrozenClock()
        self.monotonic = Stopwatch()
        self.changes: list[bool] = []
        self.redis = Counting(RedisLimiter(redis_client(url, timeout=LONG), self.clock, deadline=LONG))
        self.limiter = FallbackLimiter(self.redis, self.clock, self.changes.append, monotonic=self.monotonic)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalRedis]:
    with own_redis() as server:
        yield server


@pytest.fixture
async def harness(server: LocalRedis) -> AsyncIterator[Harness]:
    with contextlib.suppress(RuntimeError):  # it runs already
        server.start()
    server.flushall()
    harness = Harness(server.url)
    yield harness
    await harness.limiter.close()


@pytest.fixture(params=["accepts and never answers", "does not even accept"])
def blackhole(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server that takes everything and gives nothing, or of one whose queue of connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        if request.param == "does not even accept":
            for _ in range(8):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


async def spend_times(limiter: Limiter, n: int, *spends: Spend) -> list[Allowed | Limited]:
    return [await limiter.spend(spends) for _ in range(n)]


async def test_a_silent_redis_does_not_make_anybody_hang(blackhole: str) -> None:
    limiter = RedisLimiter(redis_client(blackhole), FrozenClock())
    began = time.monotonic()
    with pytest.raises((RedisError, OSError)):
        await limiter.spend([guess])
    await limiter.close()
    assert time.monotonic() - began < LONG


async def test_the_client_by_itself_gives_up_on_a_silent_redis(blackhole: str) -> None:
    client = redis_client(blackhole)
    began = time.monotonic()
    with pytest.raises((RedisError, OSError)):
        await client.ping()
    await client.aclose()
    assert time.monotonic() - began < LONG


async def test_the_deadline_holds_whatever_the_url_says(blackhole: str) -> None:
    """The options in a URL win over the client's, so they must not be the only bound."""
    limiter = RedisLimiter(redis_client(f"{blackhole}?socket_timeout=30&socket_connect_timeout=30"), FrozenClock())
    began = time.monotonic()
    with pytest.raises((RedisError, OSError)):
        await limiter.spend([guess])
    assert time.monotonic() - began < LONG
    await limiter.close()


async def test_a_silent_redis_costs_many_calls_no_more_than_one(blackhole: str) -> None:
    """Also more calls than the pool has connections; and afterwards, for a second, no call pays."""
    changes: list[bool] = []
    clock, monotonic = FrozenClock(), Stopwatch()
    asking = Counting(RedisLimiter(redis_client(blackhole), clock))
    limiter = FallbackLimiter(asking, clock, changes.append, monotonic=monotonic)
    began = time.monotonic()
    answers = await asyncio.gather(*(limiter.spend([guess]) for _ in range(200)))
    assert time.monotonic() - began < LONG  # one deadline for each would be fifty seconds
    assert answers.count(Allowed()) == 2
    assert asking.asked == 200
    monotonic.time += 0.99
    await spend_times(limiter, 20, guess)
    assert asking.asked == 200
    assert changes == [True]
    await limiter.close()


async def test_limits_that_are_kept_without_redis_keep_half_their_burst(harness: Harness, server: LocalRedis) -> None:
    server.stop()
    assert await spend_times(harness.limiter, 3, guess) == [Allowed()] * 2 + [Limited("guess", 10)]
    assert await spend_times(harness.limiter, 2, single) == [Allowed(), Limited("single", 10)]
    assert await harness.limiter.spend([Spend(GUESS, "bob")]) == Allowed()


async def test_without_redis_other_limits_let_pass(harness: Harness, server: LocalRedis) -> None:
    assert await spend_times(harness.limiter, 2, browse) == [Allowed(), Limited("browse", 60)]
    server.stop()
    assert await spend_times(harness.limiter, 5, browse) == [Allowed()] * 5
    assert await spend_times(harness.limiter, 3, browse, guess) == [Allowed()] * 2 + [Limited("guess", 10)]


async def test_a_lost_redis_is_left_alone_for_a_second_then_asked_by_one(harness: Harness, server: LocalRedis) -> None:
    server.stop()
    await spend_times(harness.limiter, 5, browse)
    assert harness.redis.asked == 1
    harness.monotonic.time += 0.99
    await harness.limiter.spend([browse])
    assert harness.redis.asked == 1
    harness.monotonic.time += 0.02
    await asyncio.gather(*(harness.limiter.spend([browse]) for _ in range(20)))
    assert harness.redis.asked == 2


async def test_each_change_is_told_once(harness: Harness, server: LocalRedis) -> None:
    await harness.limiter.spend([guess])
    assert harness.changes == []
    server.stop()
    await asyncio.gather(*(harness.limiter.spend([browse]) for _ in range(20)))
    harness.monotonic.time += 1
    await harness.limiter.spend([browse])
    assert harness.changes == [True]
    server.start()
    harness.monotonic.time += FallbackLimiter.CAUTION
    await spend_times(harness.limiter, 3, guess)
    assert harness.changes == [True, False]
    assert await spend_times(harness.limiter, 2, guess) == [Allowed(), Limited("guess", 10)]


async def test_neither_losing_redis_nor_its_return_hands_out_a_fresh_burst(
    harness: Harness, server: LocalRedis
) -> None:
    """Five may guess at once; who has done so with Redis, or partly without it, has no guess left for a while."""
    assert await spend_times(harness.limiter, 2, guess) == [Allowed()] * 2
    server.stop()
    assert await spend_times(harness.limiter, 1, guess) == [Limited("guess", 10)]
    server.start()
    harness.monotonic.time += 1
    assert await spend_times(harness.limiter, 1, guess) == [Limited("guess", 10)]
    assert harness.changes == [True, False]


async def test_settling_reaches_what_was_counted_without_redis(harness: Harness, server: LocalRedis) -> None:
    """Also when Redis is back by then, and the next outage finds no trace of spends long settled."""
    server.stop()
    assert await spend_times(harness.limiter, 3, guess) == [Allowed()] * 2 + [Limited("guess", 10)]
    await harness.limiter.settle(reset=[guess])
    assert await spend_times(harness.limiter, 3, guess) == [Allowed()] * 2 + [Limited("guess", 10)]
    server.start()
    harness.monotonic.time += 1
    await harness.limiter.settle(reset=[guess])
    assert harness.changes == [True, False]
    server.stop()
    assert await spend_times(harness.limiter, 3, guess) == [Allowed()] * 2 + [Limited("guess", 10)]


async def test_marks_set_before_an_outage_stand_during_it(harness: Harness, server: LocalRedis) -> None:
    await harness.limiter.settle(mark=["known-network"], mark_for=60)
    server.stop()
    exempt = Spend(SINGLE, "alice", exempt_by="known-network")
    assert await spend_times(harness.limiter, 2, single) == [Allowed(), Limited("single", 10)]
    assert await spend_times(harness.limiter, 3, exempt) == [Allowed()] * 3


async def test_an_answer_that_was_on_its_way_does_not_end_an_outage() -> None:
    """Only a question asked after the failure can find out that Redis is back."""

    class SlowThenLost(Counting):
        async def spend(self, spends: Sequence[Spend]) -> Allowed | Limited:
            self.asked += 1
            if self.asked == 1:
                await asyncio.sleep(0.05)
                return Allowed()
            raise ConnectionError

    changes: list[bool] = []
    clock = FrozenClock()
    limiter = FallbackLimiter(
        SlowThenLost(RedisLimiter(redis_client("redis://localhost:1/0"), clock)), clock, changes.append
    )
    await asyncio.gather(limiter.spend([browse]), limiter.spend([browse]))
    assert changes == [True]


async def test_scripts_are_loaded_again_when_redis_has_forgotten_them(harness: Harness, server: LocalRedis) -> None:
    await harness.limiter.spend([guess])
    server.stop()
    server.start()
    harness.monotonic.time += 1
    assert await spend_times(harness.redis, 5, guess) == [Allowed()] * 4 + [Limited("guess", 10)]
    await harness.redis.settle(refund=[guess])
    assert await harness.redis.spend([guess]) == Allowed()


async def test_what_redis_keeps_expires_by_itself(harness: Harness, server: LocalRedis) -> None:
    """Buckets live as long as the rule remembers, marks as long as they stand; refunds prolong nothing."""
    await harness.limiter.spend([guess])
    await harness.limiter.spend([guess])
    async with redis_client(server.url, timeout=LONG) as client:
        assert 500_000 < await client.pttl("identity:limit:bucket:guess:alice") <= 600_000
        await client.pexpire("identity:limit:bucket:guess:alice", 300_000)
        await harness.limiter.settle(refund=[guess], mark=["known-network"], mark_for=60)
        lifetimes = {key: await client.pttl(key) for key in await client.keys("*")}
    assert lifetimes.keys() == {b"identity:limit:bucket:guess:alice", b"identity:limit:mark:known-network"}
    assert 200_000 < lifetimes[b"identity:limit:bucket:guess:alice"] <= 300_000
    assert 50_000 < lifetimes[b"identity:limit:mark:known-network"] <= 60_000


async def test_cancelled_calls_leave_the_pool_whole(harness: Harness, server: LocalRedis) -> None:
    """Whoever takes a connection next gets the answer to their own question, and no connection is lost."""
    client = redis_client(server.url, timeout=LONG)
    pool = client.connection_pool
    pool.max_connections = 4

    async def ask(number: int, patience: float) -> None:
        with anyio.move_on_after(patience):
            assert await client.echo(str(number)) == str(number).encode()

    for start in range(0, 600, 40):
        async with anyio.create_task_group() as tasks:
            for number in range(40):
                tasks.start_soon(ask, start + number, 0.0002 * number)
    async with anyio.create_task_group() as tasks:
        for number in range(40):
            tasks.start_soon(ask, number, LONG)
    assert sum(count for count, _ in pool.get_connection_count()) <= 4
    assert pool.get_connection_count()[1][0] == 0
    await client.aclose()
