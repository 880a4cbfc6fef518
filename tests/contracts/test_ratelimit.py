"""What every limiter promises, asked of the one in memory and of the one in Redis; then what only memory promises."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_service.infra.ratelimit import Allowed, Limited, Limiter, MemoryLimiter, Rule, Spend
from identity_service.infra.ratelimit.shared import RedisLimiter, redis_client
from tests.support.clock import FrozenClock

PLAIN = Rule("plain", burst=3, interval=10, memory=600)
SLOW = Rule("slow", burst=1, interval=60, memory=600)
GROWING = Rule("growing", burst=2, interval=5, growth=2, max_interval=60, memory=3600)
CLOSING = Rule("closing", 1, 5, 2, 20, 4, memory=3600)

plain, slow, growing, closing = (Spend(rule, "alice") for rule in (PLAIN, SLOW, GROWING, CLOSING))


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture(params=["memory", "redis"])
async def limiter(request: pytest.FixtureRequest, clock: FrozenClock) -> AsyncIterator[Limiter]:
    limiter: Limiter = MemoryLimiter(clock)
    if request.param == "redis":
        limiter = patient_redis_limiter(request.getfixturevalue("redis_url"), clock)
    yield limiter
    await limiter.close()


def patient_redis_limiter(url: str, clock: FrozenClock) -> RedisLimiter:
    """A Redis limiter with keys of its own, for which a busy test machine is not an outage."""
    prefix = f"test:{secrets.token_hex(8)}:"
    return RedisLimiter(redis_client(url, timeout=10), clock, prefix=prefix, deadline=10)


async def spend_times(limiter: Limiter, n: int, *spends: Spend) -> list[Allowed | Limited]:
    return [await limiter.spend(spends) for _ in range(n)]


async def wait_out(limiter: Limiter, clock: FrozenClock, *spends: Spend) -> int:
    """Assert that the spend is refused until just before `retry_after` and passes exactly then; return that time."""
    refused = await limiter.spend(spends)
    assert isinstance(refused, Limited)
    clock.advance(refused.retry_after - 0.001)
    assert await limiter.spend(spends) == Limited(refused.rule, 1)
    clock.advance(0.001)
    assert await limiter.spend(spends) == Allowed()
    return refused.retry_after


async def test_a_burst_passes_then_one_per_interval(limiter: Limiter, clock: FrozenClock) -> None:
    assert await spend_times(limiter, 4, plain) == [Allowed()] * 3 + [Limited("plain", 10)]
    for _ in range(3):
        clock.advance(10)
        assert await spend_times(limiter, 2, plain) == [Allowed(), Limited("plain", 10)]


async def test_a_plain_rule_tells_what_is_left_of_its_budget(limiter: Limiter, clock: FrozenClock) -> None:
    """Spends that would pass at once, and the seconds until the bucket is full; a growing rule tells nothing."""
    for expected in ((2, 10), (1, 20), (0, 30)):
        answer = await limiter.spend([plain, growing] if expected == (2, 10) else [plain])
        assert isinstance(answer, Allowed)
        assert [(left.rule.name, left.spends, left.full_in) for left in answer.left] == [("plain", *expected)]
    clock.advance(15)
    answer = await limiter.spend([plain])
    assert isinstance(answer, Allowed)
    assert [(left.spends, left.full_in) for left in answer.left] == [(0, 25)]


async def test_an_idle_bucket_holds_no_more_than_its_burst(limiter: Limiter, clock: FrozenClock) -> None:
    await spend_times(limiter, 3, plain)
    clock.advance(500)
    assert await spend_times(limiter, 4, plain) == [Allowed()] * 3 + [Limited("plain", 10)]


@pytest.mark.parametrize("spend", [plain, slow, growing], ids=lambda spend: spend.rule.name)
async def test_retry_after_tells_the_truth(limiter: Limiter, clock: FrozenClock, spend: Spend) -> None:
    await spend_times(limiter, spend.rule.burst, spend)
    for _ in range(3):
        await wait_out(limiter, clock, spend)


async def test_retry_after_is_rounded_up_and_never_below_a_second(limiter: Limiter, clock: FrozenClock) -> None:
    await spend_times(limiter, 3, plain)
    clock.advance(0.5)
    assert await limiter.spend([plain]) == Limited("plain", 10)
    clock.advance(9.4)
    assert await limiter.spend([plain]) == Limited("plain", 1)


async def test_the_longest_wait_is_the_one_named(limiter: Limiter, clock: FrozenClock) -> None:
    """Whoever obeys retry_after passes every bucket, not just the first."""
    await spend_times(limiter, 3, plain)
    await limiter.spend([slow])
    for order in ([plain, slow], [slow, plain]):
        assert await limiter.spend(order) == Limited("slow", 60)
    clock.advance(60)
    assert await limiter.spend([plain, slow]) == Allowed()


@pytest.mark.parametrize("in_order", [[plain, slow, growing], [growing, slow, plain]], ids=["first", "last"])
async def test_a_refusal_by_one_bucket_spends_from_none(limiter: Limiter, in_order: Sequence[Spend]) -> None:
    await limiter.spend([slow])
    for _ in range(5):
        assert await limiter.spend(in_order) == Limited("slow", 60)
    assert await spend_times(limiter, 4, plain) == [Allowed()] * 3 + [Limited("plain", 10)]
    assert await spend_times(limiter, 3, growing) == [Allowed()] * 2 + [Limited("growing", 10)]


async def test_a_bucket_named_twice_is_spent_once(limiter: Limiter) -> None:
    assert await spend_times(limiter, 4, plain, plain) == [Allowed()] * 3 + [Limited("plain", 10)]


async def test_spending_nothing_is_allowed(limiter: Limiter) -> None:
    assert await limiter.spend([]) == Allowed()
    await limiter.settle()


@pytest.mark.case("PWG-08")
@pytest.mark.parametrize(
    "rule",
    [dataclasses.replace(PLAIN, burst=10), dataclasses.replace(GROWING, burst=10)],
    ids=lambda rule: rule.name,
)
async def test_of_200_parallel_spends_exactly_the_burst_passes(limiter: Limiter, rule: Rule) -> None:
    spends = [Spend(rule, "alice"), Spend(dataclasses.replace(PLAIN, name="wide", burst=200, interval=1), "network")]
    answers = await asyncio.gather(*(limiter.spend(spends) for _ in range(200)))
    assert sum(answer == Allowed() for answer in answers) == 10


async def test_a_growing_wait_doubles_up_to_its_cap(limiter: Limiter, clock: FrozenClock) -> None:
    await spend_times(limiter, 2, growing)
    assert [await wait_out(limiter, clock, growing) for _ in range(6)] == [10, 20, 40, 60, 60, 60]


async def test_a_growing_wait_stays_at_its_cap_after_thousands_of_spends(limiter: Limiter, clock: FrozenClock) -> None:
    for _ in range(1500):
        await limiter.spend([growing])
        clock.advance(60)
    await limiter.spend([growing])
    assert await limiter.spend([growing]) == Limited("growing", 60)


async def test_a_refused_try_does_not_prolong_the_wait(limiter: Limiter, clock: FrozenClock) -> None:
    await spend_times(limiter, 2, growing)
    for _ in range(10):
        assert isinstance(await limiter.spend([growing]), Limited)
        clock.advance(1)
    assert await limiter.spend([growing]) == Allowed()


async def test_the_wait_runs_from_the_last_spend(limiter: Limiter, clock: FrozenClock) -> None:
    """Time that went by since then counts; a spend that comes late enough does not wait at all."""
    await spend_times(limiter, 2, growing)
    clock.advance(6)
    assert await limiter.spend([growing]) == Limited("growing", 4)
    clock.advance(100)
    assert await limiter.spend([growing]) == Allowed()


@pytest.mark.case("ACC-08")
async def test_a_reset_forgets_a_bucket(limiter: Limiter) -> None:
    for spend in (plain, growing, closing):
        before = await spend_times(limiter, 6, spend)
        await limiter.settle(reset=[spend])
        assert await spend_times(limiter, 6, spend) == before


async def test_a_refund_gives_one_spend_back(limiter: Limiter) -> None:
    for spend, wait in ((plain, 10), (growing, 10)):
        await spend_times(limiter, spend.rule.burst, spend)
        await limiter.settle(refund=[spend])
        assert await spend_times(limiter, 2, spend) == [Allowed(), Limited(spend.rule.name, wait)]


async def test_a_refund_shrinks_a_grown_wait(limiter: Limiter, clock: FrozenClock) -> None:
    await spend_times(limiter, 2, growing)
    assert [await wait_out(limiter, clock, growing) for _ in range(2)] == [10, 20]
    await limiter.settle(refund=[growing])
    assert await limiter.spend([growing]) == Limited("growing", 20)


async def test_refunds_never_give_more_than_the_burst(limiter: Limiter) -> None:
    for spend in (plain, growing):
        await limiter.spend([spend])
        for _ in range(10):
            await limiter.settle(refund=[spend])
        answers = await spend_times(limiter, spend.rule.burst + 1, spend)
        assert answers == [Allowed()] * spend.rule.burst + [Limited(spend.rule.name, 10)]


async def test_a_mark_exempts_from_its_bucket_only_while_it_stands(limiter: Limiter, clock: FrozenClock) -> None:
    exempt = dataclasses.replace(slow, exempt_by="known-network")
    await limiter.spend([slow])
    assert await limiter.spend([exempt]) == Limited("slow", 60)
    await limiter.settle(mark=["known-network"], mark_for=30)
    assert await spend_times(limiter, 4, exempt, plain) == [Allowed()] * 3 + [Limited("plain", 10)]
    assert await limiter.spend([dataclasses.replace(slow, exempt_by="other-network")]) == Limited("slow", 60)
    clock.advance(30)
    assert await limiter.spend([exempt]) == Limited("slow", 30)


async def test_an_exempt_spend_is_neither_taken_nor_given_back(limiter: Limiter) -> None:
    await limiter.settle(mark=["known-network"], mark_for=30)
    exempt = dataclasses.replace(plain, exempt_by="known-network")
    await spend_times(limiter, 5, exempt)
    assert await spend_times(limiter, 4, plain) == [Allowed()] * 3 + [Limited("plain", 10)]
    await limiter.settle(refund=[exempt])
    assert await limiter.spend([plain]) == Limited("plain", 10)


async def test_a_refund_is_judged_by_the_marks_that_stood_before(limiter: Limiter) -> None:
    """The success that sets the mark still gets back what it spent without one."""
    first_time = dataclasses.replace(slow, exempt_by="new-network")
    await limiter.spend([first_time])
    await limiter.settle(refund=[first_time], mark=["new-network"], mark_for=30)
    assert await limiter.spend([slow]) == Allowed()


async def test_a_mark_without_a_lifetime_is_refused(limiter: Limiter) -> None:
    with pytest.raises(ValueError, match="lifetime"):
        await limiter.settle(mark=["known-network"])


async def test_a_closed_bucket_passes_only_the_exempt(limiter: Limiter, clock: FrozenClock) -> None:
    await limiter.settle(mark=["known-network"], mark_for=3000)
    for _ in range(4):
        assert await limiter.spend([closing]) == Allowed()
        clock.advance(20)
    for _ in range(5):
        assert await limiter.spend([closing]) == Limited("closing", 20)
        clock.advance(20)
    assert await limiter.spend([dataclasses.replace(closing, exempt_by="known-network")]) == Allowed()
    await limiter.settle(reset=[closing])
    assert await limiter.spend([closing]) == Allowed()


async def test_a_growing_bucket_is_forgotten_when_its_memory_has_gone_by(limiter: Limiter, clock: FrozenClock) -> None:
    for spend in (growing, closing):
        for _ in range(4):
            await limiter.spend([spend])
            clock.advance(60)
        clock.advance(spend.rule.memory - 60 - 0.001)
        assert isinstance((await spend_times(limiter, 2, spend))[1], Limited)
        clock.advance(spend.rule.memory)
        expected = [Allowed()] * spend.rule.burst + [Limited(spend.rule.name, 10)]
        assert await spend_times(limiter, spend.rule.burst + 1, spend) == expected


async def test_keys_and_rules_do_not_interfere(limiter: Limiter) -> None:
    await spend_times(limiter, 4, plain)
    assert await limiter.spend([Spend(PLAIN, "bob")]) == Allowed()
    assert await limiter.spend([Spend(dataclasses.replace(PLAIN, name="plain.two"), "alice")]) == Allowed()
    await limiter.settle(reset=[Spend(PLAIN, "bob")], mark=["alice"], mark_for=30)
    assert await limiter.spend([plain]) == Limited("plain", 10)


async def test_a_clock_set_back_prolongs_no_wait(limiter: Limiter, clock: FrozenClock) -> None:
    """The wait is at most what it would have been, and it runs out, although the clock has not caught up."""
    for spend, wait in ((plain, 10), (slow, 60), (growing, 10), (closing, 10)):
        await spend_times(limiter, spend.rule.burst, spend)
        clock.advance(-86_400)
        assert await wait_out(limiter, clock, spend) == wait


async def test_a_clock_set_back_does_not_open_a_closed_bucket(limiter: Limiter, clock: FrozenClock) -> None:
    for _ in range(4):
        await limiter.spend([closing])
        clock.advance(20)
    clock.advance(-86_400)
    assert await limiter.spend([closing]) == Limited("closing", 20)


KEYS = st.sampled_from(["alice", "bob"])
SPENDS = st.builds(Spend, st.sampled_from([PLAIN, SLOW, GROWING, CLOSING]), KEYS, st.sampled_from([None, "m1", "m2"]))
SOME = st.lists(SPENDS, max_size=3)
MOVES = st.floats(-120, 400).map(lambda seconds: round(seconds, 6))
STEPS = st.one_of(
    st.tuples(st.just("spend"), st.lists(SPENDS, min_size=1, max_size=4)),
    st.tuples(st.just("spend"), st.lists(SPENDS, min_size=1, max_size=1)),
    st.tuples(st.just("advance"), MOVES),
    st.tuples(st.just("settle"), SOME, SOME, st.lists(st.sampled_from(["m1", "m2"]), max_size=2)),
)


async def answers_to(limiter: Limiter, clock: FrozenClock, program: list[Any]) -> list[Allowed | Limited]:
    answers = []
    for step in program:
        match step:
            case "spend", spends:
                answers.append(await limiter.spend(spends))
            case "advance", seconds:
                clock.advance(seconds)
            case "settle", refund, reset, mark:
                await limiter.settle(refund=refund, reset=reset, mark=mark, mark_for=100)
    return answers


@pytest.fixture(scope="module")
def module_redis_url(redis_server: Any) -> str:
    """A database that no worker empties for its tests; every example has a prefix of its own in it."""
    return str(redis_server.database(15))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(program=st.lists(STEPS, min_size=5, max_size=60))
async def test_memory_and_redis_answer_alike(module_redis_url: str, program: list[Any]) -> None:
    in_memory, in_redis = FrozenClock(), FrozenClock()
    expected = await answers_to(MemoryLimiter(in_memory), in_memory, program)
    redis_limiter = patient_redis_limiter(module_redis_url, in_redis)
    try:
        assert await answers_to(redis_limiter, in_redis, program) == expected
    finally:
        await redis_limiter.close()


# What only the limiter in memory promises.


async def test_when_memory_is_full_new_keys_share_one_bucket_per_rule(clock: FrozenClock) -> None:
    limiter = MemoryLimiter(clock, capacity=2)
    await limiter.spend([Spend(PLAIN, "a"), Spend(PLAIN, "b")])
    assert [await limiter.spend([Spend(PLAIN, key)]) for key in "cdef"] == [Allowed()] * 3 + [Limited("plain", 10)]
    assert await limiter.spend([Spend(SLOW, "c")]) == Allowed()
    assert await limiter.spend([Spend(SLOW, "d")]) == Limited("slow", 60)
    assert len(limiter) == 2


async def test_a_full_memory_never_evicts_a_live_bucket(clock: FrozenClock) -> None:
    limiter = MemoryLimiter(clock, capacity=2)
    victims = [Spend(GROWING, "victim"), Spend(SLOW, "victim")]
    await limiter.spend(victims)
    await limiter.spend([victims[0]])
    for number in range(500):
        await limiter.spend([Spend(PLAIN, f"flood-{number}")])
    assert [await limiter.spend([victim]) for victim in victims] == [Limited("growing", 10), Limited("slow", 60)]


async def test_one_call_cannot_take_the_last_place_twice(clock: FrozenClock) -> None:
    """Only one of two new keys finds room; the other must not start the shared bucket afresh."""
    limiter = MemoryLimiter(clock, capacity=1)
    await limiter.spend([Spend(PLAIN, "a")])
    await limiter.spend([Spend(SLOW, "b")])
    await limiter.settle(reset=[Spend(PLAIN, "a")])
    assert await limiter.spend([Spend(PLAIN, "c"), Spend(SLOW, "d")]) == Limited("slow", 60)


async def test_a_success_does_not_reset_the_bucket_shared_by_strangers(clock: FrozenClock) -> None:
    limiter = MemoryLimiter(clock, capacity=1)
    await limiter.spend([Spend(PLAIN, "a")])
    await spend_times(limiter, 3, Spend(PLAIN, "b"))
    await limiter.settle(reset=[Spend(PLAIN, "c")])
    assert await spend_times(limiter, 2, Spend(PLAIN, "d")) == [Allowed(), Limited("plain", 10)]
    assert len(limiter) == 1


async def test_expired_buckets_make_room(clock: FrozenClock) -> None:
    limiter = MemoryLimiter(clock, capacity=2)
    await limiter.spend([Spend(PLAIN, "a"), Spend(SLOW, "b")])
    clock.advance(600)
    assert await spend_times(limiter, 2, Spend(GROWING, "c"), Spend(CLOSING, "d")) == [
        Allowed(),
        Limited("closing", 10),
    ]
    assert await limiter.spend([Spend(CLOSING, "e")]) == Allowed()
    assert await limiter.spend([Spend(CLOSING, "f")]) == Limited("closing", 10)


async def test_a_bucket_in_use_neither_expires_nor_keeps_idle_ones(clock: FrozenClock) -> None:
    """What was spent from first is not what expires first: each spend starts its bucket's memory anew."""
    limiter = MemoryLimiter(clock)
    await spend_times(limiter, 2, Spend(GROWING, "old"))
    for number in range(10):
        await limiter.spend([Spend(GROWING, f"idle-{number}")])
    for _ in range(4):
        clock.advance(1800)
        await limiter.spend([Spend(GROWING, "old")])
    clock.advance(1)
    assert await limiter.spend([Spend(GROWING, "old")]) == Limited("growing", 59)
    for _ in range(5):
        await limiter.spend([Spend(GROWING, "old")])
    assert len(limiter) == 1


async def test_buckets_that_come_and_go_do_not_pile_up(clock: FrozenClock) -> None:
    """Expired buckets are cleared away as new ones come, long before memory is full."""
    limiter = MemoryLimiter(clock)
    for number in range(5000):
        await limiter.spend([Spend(PLAIN, str(number))])
        clock.advance(10)
    assert len(limiter) <= PLAIN.memory / 10 + 1


async def test_a_bucket_cleared_away_while_it_is_spent_counts_once(clock: FrozenClock) -> None:
    """A call that touches an expired bucket and a new one must not let memory outgrow its capacity."""
    limiter = MemoryLimiter(clock, capacity=3)
    for number in range(20):
        keys = "expired", f"other-{number}", f"new-{number}"
        await limiter.spend([Spend(PLAIN, keys[0])])
        await limiter.spend([Spend(SLOW, keys[1])])
        clock.advance(600)
        await limiter.spend([Spend(PLAIN, keys[0]), Spend(PLAIN, keys[2]), Spend(GROWING, keys[2])])
        assert len(limiter) <= 3


async def test_buckets_of_a_clock_that_was_ahead_do_not_stay_for_ever(clock: FrozenClock) -> None:
    limiter = MemoryLimiter(clock, capacity=10)
    clock.advance(365 * 86_400)
    for number in range(10):
        await limiter.spend([Spend(PLAIN, f"ahead-{number}")])
    clock.advance(-365 * 86_400)
    await limiter.spend([Spend(PLAIN, "new")])
    for number in range(20):
        clock.advance(PLAIN.memory)
        await limiter.spend([Spend(PLAIN, f"new-{number}")])
    assert len(limiter) < 10


async def test_marks_are_bounded_and_standing_ones_stay(clock: FrozenClock) -> None:
    limiter = MemoryLimiter(clock, capacity=3)
    await limiter.settle(mark=["m0", "m1", "m2", "m3"], mark_for=60)
    await limiter.spend([slow])
    exempt = [dataclasses.replace(slow, exempt_by=f"m{number}") for number in range(4)]
    assert [await limiter.spend([spend]) for spend in exempt] == [Allowed()] * 3 + [Limited("slow", 60)]
    clock.advance(59)
    await limiter.settle(mark=["m0"], mark_for=60)
    clock.advance(1)
    await limiter.settle(mark=["m3"], mark_for=60)
    await limiter.spend([slow])
    answers = [await limiter.spend([spend]) for spend in exempt]
    assert answers == [Allowed(), Limited("slow", 60), Limited("slow", 60), Allowed()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "has:colon"},
        {"burst": 0},
        {"interval": 0},
        {"growth": 0.5},
        {"growth": 1.01},
        {"growth": 2, "max_interval": 1},
        {"growth": 2, "max_interval": 700},
        {"growth": 2, "max_interval": 20, "closed_after": 0},
        {"closed_after": 5},
        {"memory": 29},
    ],
    ids=str,
)
def test_a_rule_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"memory|name|burst|growth|closed_after"):
        dataclasses.replace(PLAIN, **wrong)
