"""
Limits how often something may happen: in Redis for all replicas together, or in memory for one process.

A bucket is one rule and one key (an account, a network). A call names several buckets: every one is checked, and only
if all of them pass is one spend taken from each. In Redis that is one script, in memory one stretch of code without an
`await`, so parallel calls can never pass together where only one of them may. A bucket named twice is spent once.

All arithmetic is done in whole microseconds, below 2**53, where Lua's numbers and Python's agree. T is the interval,
B the burst. A bucket is a pair (count, at):

*   **Plain rules** (growth 1) are GCRA. `at` is the theoretical arrival time: when the bucket will be untouched again.
    With `tat = max(at, now)`, a spend passes if `tat + T - now <= B*T`, and then `at = tat + T`. Otherwise it would
    pass in `tat + T - B*T - now`. A refund moves `at` back by T. `count` stays 0.

*   **Growing rules** keep how many spends were let through, and when the last one was. The n-th spend (n = count + 1)
    passes at once while `n <= B`, and after that when `min(T * growth**(n - B), max_interval)` has gone by since the
    last: with T = 1 and growth = 2, the first wait is 2 s, then 4, 8, … The power is a loop of multiplications,
    because those are rounded alike on every machine. A refused try counts for nothing and prolongs nothing. A refund
    takes one from the count and leaves the instant of the last spend. When `count` has reached `closed_after`, nothing
    passes any more. After `memory` without a spend the count is 0 again.

**Clocks.** The time is the caller's. Redis' own expiry only clears up what the arithmetic has already forgotten. An
instant that lies further ahead than this clock could have put it (at most `now + B*T` plain, `now` growing) comes from
a clock that has been set back since: it is cut to that, and the cut is stored even when the spend is refused. Without
storing it the wait would start afresh at every try.

**Marks** name something trusted for a while, such as a network from which an account has signed in before. A bucket
whose spend is `exempt_by` a standing mark is neither checked, spent nor refunded.

All keys of one script have to live on one node; on a Redis Cluster give the prefix a hash tag ("{identity}:limit:").
"""

import asyncio
import contextlib
import functools
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, cast, final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from identity_service.infra.runtime import Clock

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RULE_NAME = re.compile(r"[a-z0-9_.]+")  # no colon: it ends the name inside a Redis key
_Answer = TypeVar("_Answer")
_SLOWEST_GROWTH = 1.1  # keeps the loop that computes a delay short: 145 rounds for a millionfold wait


@dataclass(frozen=True, slots=True)
class Rule:
    """
    One limit: `burst` at once, then one per `interval` seconds, a wait that may grow with every spend.

    Raises ValueError for numbers that contradict each other: a bucket forgotten before its wait is over limits nothing.
    """

    name: str  # appears in metrics and answers: "sign_in.account_network"
    burst: int  # so many spends at once
    interval: float  # seconds until one spend is given back
    growth: float = 1.0  # the n-th spend waits min(interval * growth**(n - burst), max_interval) since the one before
    max_interval: float = 900.0  # seconds; where the growth of the wait ends
    closed_after: int | None = None  # after so many spends without a reset nothing passes but who is exempt
    _: KW_ONLY
    memory: float  # seconds after the last spend when the bucket is forgotten
    credential: bool  # without Redis: True means half the burst, counted in this process; False means no limit

    def __post_init__(self) -> None:
        if not _RULE_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r}: a rule's name consists of a-z, 0-9, _ and .")
        if self.burst < 1 or self.interval < 1e-6:
            raise ValueError(f"{self.name}: burst begins at 1, interval at a microsecond")
        if self.growth == 1.0:
            if self.closed_after is not None:
                raise ValueError(f"{self.name}: closed_after needs growth, for plain rules do not count")
            longest = self.burst * self.interval
        else:
            if self.growth < _SLOWEST_GROWTH or self.max_interval < self.interval:
                raise ValueError(f"{self.name}: growth is 1 or at least {_SLOWEST_GROWTH}, max_interval >= interval")
            if self.closed_after is not None and self.closed_after < 1:
                raise ValueError(f"{self.name}: closed_after begins at 1")
            longest = self.max_interval
        if self.memory < longest:
            raise ValueError(f"{self.name}: memory must last at least {longest:g} s, or waits would be forgotten")


@dataclass(frozen=True, slots=True)
class Spend:
    """One spend wanted from one bucket."""

    rule: Rule
    key: str  # what is limited, already hashed where it is personal
    exempt_by: str | None = None  # a mark


Spends: TypeAlias = Sequence[Spend]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Every bucket passed, and one spend has been taken from each."""


@dataclass(frozen=True, slots=True)
class Limited:
    """At least one bucket refused, and nothing was spent. Names the rule with the longest wait."""

    rule: str
    retry_after: int  # whole seconds, rounded up, at least 1


class Limiter(Protocol):
    """Counts spends. Raises redis.RedisError or OSError only where Redis is asked without a fallback."""

    async def spend(self, spends: Spends) -> Allowed | Limited:
        """Check every bucket, and only if all of them pass, spend one from each."""
        ...

    async def settle(
        self, *, refund: Spends = (), reset: Spends = (), mark: Sequence[str] = (), mark_for: float = 0
    ) -> None:
        """After a success: give one spend back, forget buckets, and set marks that stand for `mark_for` seconds."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class _Bucket(NamedTuple):
    spends: int
    at: int


class _Numbers(NamedTuple):
    """A rule in whole microseconds, in the order in which the scripts read it."""

    burst: int
    interval: int
    growth: float
    max_interval: int
    closed_after: int  # 0: never
    memory: int

    def read(self, kept: _Bucket, now: int) -> _Bucket:
        """Return what the bucket holds now: nothing if it is old, and cut if it comes from a clock that ran ahead."""
        if self.growth == 1.0:
            return _Bucket(0, min(max(kept.at, now), now + self.burst * self.interval))
        return _Bucket(kept.spends, min(kept.at, now)) if now - kept.at < self.memory else _Bucket(0, now)

    def wait(self, held: _Bucket, now: int) -> int:
        if self.growth == 1.0:
            return max(0, held.at + self.interval - self.burst * self.interval - now)
        if self.closed_after and held.spends >= self.closed_after:
            return self.max_interval
        if held.spends < self.burst:
            return 0
        delay = float(self.interval)
        for _ in range(self.burst, held.spends + 1):
            delay = min(delay * self.growth, self.max_interval)
            if delay == self.max_interval:
                break
        return max(0, held.at + math.floor(delay) - now)

    def spent(self, held: _Bucket, now: int) -> _Bucket:
        return _Bucket(0, held.at + self.interval) if self.growth == 1.0 else _Bucket(held.spends + 1, now)

    def refunded(self, held: _Bucket, now: int) -> _Bucket | None:
        if self.growth == 1.0:
            return _Bucket(0, held.at - self.interval) if held.at - self.interval > now else None
        return _Bucket(held.spends - 1, held.at) if held.spends > 1 else None


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)


@functools.lru_cache(maxsize=256)
def _numbers(rule: Rule) -> _Numbers:
    times = (_micros(rule.interval), rule.growth, _micros(rule.max_interval))
    return _Numbers(rule.burst, *times, rule.closed_after or 0, _micros(rule.memory))


def _now(clock: Clock) -> int:
    return (clock.now() - _EPOCH) // timedelta(microseconds=1)


def _limited(rule: str, wait: int) -> Limited:
    return Limited(rule, -(-wait // 1_000_000))


def _once(spends: Spends) -> list[Spend]:
    return list({(spend.rule.name, spend.key): spend for spend in spends}.values())


def _lifetime(mark: Sequence[str], mark_for: float) -> int:
    if mark and mark_for <= 0:
        raise ValueError("a mark needs a lifetime")
    return _micros(mark_for)


class _Slot(NamedTuple):
    bucket: _Bucket
    touched: int  # when it was last spent


class _Book:
    """The buckets of one rule, in the order of their last spend, hence of their expiry: the expired ones lead."""

    __slots__ = ("memory", "slots")

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.slots: OrderedDict[str, _Slot] = OrderedDict()

    def clear(self, now: int) -> int:
        """Drop at most two expired buckets; return how many."""
        for dropped in range(2):
            if not self.slots:
                return dropped
            key, slot = next(iter(self.slots.items()))
            if slot.touched > now:  # the clock was set back; without this, the rest would wait for it to catch up
                self.slots[key] = slot._replace(touched=now)
            if now - slot.touched < self.memory:
                return dropped
            del self.slots[key]
        return 2


@final
class MemoryLimiter:
    """
    Counts in this process.

    At most `capacity` buckets are kept. When that many are live, keys not seen before share one overflow bucket per
    rule: a flood of invented names slows down new names, and cannot push out what is known about the others. A reset
    only gives the overflow bucket one spend back, or a single success would open it to everybody. Marks are bounded
    the same way; when that many stand, new ones are not set.
    """

    def __init__(self, clock: Clock, *, capacity: int = 100_000) -> None:
        self._clock = clock
        self._capacity = capacity
        self._books: dict[str, _Book] = {}
        self._live = 0
        self._overflow: OrderedDict[str, _Slot] = OrderedDict()
        self._marks: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        """Return how many buckets are kept, the overflow buckets not counted."""
        return self._live

    async def spend(self, spends: Spends) -> Allowed | Limited:
        now = _now(self._clock)
        self._clear(spends, now)
        longest, refused_by = 0, ""
        taken: list[tuple[OrderedDict[str, _Slot], str, _Bucket]] = []
        coming = 0
        for spend in spends:
            if self._exempt(spend, now):
                continue
            numbers = _numbers(spend.rule)
            slots, key = self._place(spend, coming)
            held = self._read(numbers, slots, key, now)
            if (wait := numbers.wait(held, now)) > longest:
                longest, refused_by = wait, spend.rule.name
            coming += key not in slots and slots is not self._overflow
            taken.append((slots, key, numbers.spent(held, now)))
        if longest:
            return _limited(refused_by, longest)
        for slots, key, bucket in taken:
            self._live += key not in slots and slots is not self._overflow
            slots[key] = _Slot(bucket, now)
            slots.move_to_end(key)
        return Allowed()

    async def settle(
        self, *, refund: Spends = (), reset: Spends = (), mark: Sequence[str] = (), mark_for: float = 0
    ) -> None:
        lifetime = _lifetime(mark, mark_for)
        now = _now(self._clock)
        for spend in _once(refund):
            if not self._exempt(spend, now):
                self._refund(spend, *self._place(spend), now)
        for spend in _once(reset):
            slots, key = self._place(spend)
            if slots is self._overflow:
                self._refund(spend, slots, key, now)
            elif slots.pop(key, None):
                self._live -= 1
        for name in mark:
            while self._marks and next(iter(self._marks.values())) <= now:
                self._marks.popitem(last=False)
            if name in self._marks or len(self._marks) < self._capacity:
                self._marks[name] = now + lifetime
                self._marks.move_to_end(name)

    async def close(self) -> None:
        """Do nothing; there is nothing to let go of."""

    def _exempt(self, spend: Spend, now: int) -> bool:
        return spend.exempt_by is not None and self._marks.get(spend.exempt_by, now) > now

    def _clear(self, spends: Spends, now: int) -> None:
        books = [self._book(spend.rule) for spend in spends]
        if self._live + len(spends) > self._capacity:
            books = list(self._books.values())
        self._live -= sum(book.clear(now) for book in books)

    def _book(self, rule: Rule) -> _Book:
        if (book := self._books.get(rule.name)) is None:
            book = self._books[rule.name] = _Book(_numbers(rule).memory)
        return book

    def _place(self, spend: Spend, coming: int = 0) -> tuple[OrderedDict[str, _Slot], str]:
        """Return where this bucket is kept: among its rule's, or in overflow when it is new and there is no room."""
        slots = self._book(spend.rule).slots
        if spend.key in slots or self._live + coming < self._capacity:
            return slots, spend.key
        return self._overflow, spend.rule.name

    def _read(self, numbers: _Numbers, slots: OrderedDict[str, _Slot], key: str, now: int) -> _Bucket:
        if (slot := slots.get(key)) is None:
            return _Bucket(0, now)
        held = numbers.read(slot.bucket, now)
        if held.at < slot.bucket.at:
            slots[key] = slot._replace(bucket=held)
        return held

    def _refund(self, spend: Spend, slots: OrderedDict[str, _Slot], key: str, now: int) -> None:
        numbers = _numbers(spend.rule)
        if slot := slots.get(key):
            if bucket := numbers.refunded(self._read(numbers, slots, key, now), now):
                slots[key] = slot._replace(bucket=bucket)
            else:
                del slots[key]
                self._live -= slots is not self._overflow


# Both scripts get the buckets as their first KEYS; ARGV is the time, the number of buckets, and for each bucket the
# position of its mark among KEYS (0: none) and the rule's numbers. Lua prints large numbers as 1.8e+15: hence "%.0f".
_LUA_SHARED = """
local now, buckets = tonumber(ARGV[1]), tonumber(ARGV[2])
local values = redis.call('MGET', unpack(KEYS))

local function written(count, at) return string.format('%.0f %.0f', count, at) end

local function read(i)  -- returns the rule, nil when exempt, and what the bucket holds now
  local n = {}
  for offset = 0, 6 do n[offset] = tonumber(ARGV[7 * i - 4 + offset]) end
  if n[0] > 0 and (tonumber(values[n[0]] or '') or 0) > now then return nil end
  local rule = {burst = n[1], interval = n[2], growth = n[3], max = n[4], closed_after = n[5], memory = n[6]}
  local count, kept = string.match(values[i] or '', '^(%d+) (%d+)$')
  count, kept = tonumber(count or 0), tonumber(kept or now)
  local at = math.min(kept, now)
  if rule.growth == 1 then
    count, at = 0, math.min(math.max(kept, now), now + rule.burst * rule.interval)
  elseif now - kept >= rule.memory then
    count, at = 0, now
  end
  if at < kept then redis.call('SET', KEYS[i], written(count, at), 'KEEPTTL') end
  return rule, count, at
end
"""

_LUA_SPEND = """
local function wait_of(rule, count, at)
  if rule.growth == 1 then return math.max(0, at + rule.interval - rule.burst * rule.interval - now) end
  if rule.closed_after > 0 and count >= rule.closed_after then return rule.max end
  if count < rule.burst then return 0 end
  local delay = rule.interval
  for _ = rule.burst, count do delay = math.min(delay * rule.growth, rule.max) if delay == rule.max then break end end
  return math.max(0, at + math.floor(delay) - now)
end

local longest, refused_by, taken = 0, 0, {}
for i = 1, buckets do
  local rule, count, at = read(i)
  if rule then
    local wait = wait_of(rule, count, at)
    if wait > longest then longest, refused_by = wait, i end
    local value = rule.growth == 1 and written(0, at + rule.interval) or written(count + 1, now)
    taken[i] = {value, string.format('%.0f', math.ceil(rule.memory / 1000))}
  end
end
if longest == 0 then
  for i, one in pairs(taken) do redis.call('SET', KEYS[i], one[1], 'PX', one[2]) end
end
return {refused_by, longest}
"""

# After the buckets to refund and their marks come the buckets to reset, then the marks to set. The last four ARGV are
# the numbers of both, until when the marks stand, and the same in milliseconds from now.
_LUA_SETTLE = """
for i = 1, buckets do
  local rule, count, at = read(i)
  if rule and values[i] then
    if rule.growth == 1 then at = at - rule.interval else count = count - 1 end
    if rule.growth == 1 and at > now or count > 0 then
      redis.call('SET', KEYS[i], written(count, at), 'KEEPTTL')
    else
      redis.call('DEL', KEYS[i])
    end
  end
end
local resets, marks = tonumber(ARGV[#ARGV - 3]), tonumber(ARGV[#ARGV - 2])
for i = #KEYS - marks - resets + 1, #KEYS - marks do redis.call('DEL', KEYS[i]) end
for i = #KEYS - marks + 1, #KEYS do redis.call('SET', KEYS[i], ARGV[#ARGV - 1], 'PX', ARGV[#ARGV]) end
return 1
"""


@final
class RedisLimiter:
    """
    Counts in Redis, for all replicas together.

    Raises redis.RedisError or TimeoutError when Redis does not answer within `deadline` seconds, whatever the client's
    own timeouts add up to. Whether the spend happened is then unknown. The deadline, like anybody who cancels the call,
    costs a connection: redis-py closes it on any exception between question and answer, so that nobody reads an answer
    that is not theirs.
    """

    def __init__(self, client: Redis, clock: Clock, *, prefix: str = "identity:limit:", deadline: float = 0.25) -> None:
        self._client = client
        self._clock = clock
        self._prefix = prefix
        self._deadline = deadline
        self._spend = client.register_script(_LUA_SHARED + _LUA_SPEND)
        self._settle = client.register_script(_LUA_SHARED + _LUA_SETTLE)

    async def spend(self, spends: Spends) -> Allowed | Limited:
        if not spends:
            return Allowed()
        keys, args = self._read(spends)
        refused_by, wait = cast(tuple[int, int], await self._run(self._spend(keys=keys, args=args)))
        return _limited(spends[refused_by - 1].rule.name, wait) if wait else Allowed()

    async def settle(
        self, *, refund: Spends = (), reset: Spends = (), mark: Sequence[str] = (), mark_for: float = 0
    ) -> None:
        lifetime = _lifetime(mark, mark_for)
        if not (refund or reset or mark):
            return
        keys, args = self._read(_once(refund))
        keys += [self._bucket(spend) for spend in reset] + [self._mark(name) for name in mark]
        args += [len(reset), len(mark), int(args[0]) + lifetime, -(-lifetime // 1000)]
        await self._run(self._settle(keys=keys, args=args))

    async def close(self) -> None:
        """Close the client's connections, without minding those that are broken."""
        with contextlib.suppress(RedisError, OSError):
            await self._client.aclose()

    def _bucket(self, spend: Spend) -> str:
        return f"{self._prefix}bucket:{spend.rule.name}:{spend.key}"

    def _mark(self, name: str) -> str:
        return f"{self._prefix}mark:{name}"

    def _read(self, spends: Spends) -> tuple[list[str], list[int | float]]:
        keys = [self._bucket(spend) for spend in spends]
        args: list[int | float] = [_now(self._clock), len(spends)]
        for spend in spends:
            if spend.exempt_by is not None:
                keys.append(self._mark(spend.exempt_by))
            args += [0 if spend.exempt_by is None else len(keys), *_numbers(spend.rule)]
        return keys, args

    async def _run(self, answer: Awaitable[object]) -> object:
        async with asyncio.timeout(self._deadline):
            return await answer


def redis_client(url: str, *, timeout: float = 0.1) -> Redis:
    """
    Return a client that gives up soon: `timeout` seconds each for a free connection, for connecting and for an answer.

    A connection that turns out to be dead is replaced once, at once; a timeout is never retried. redis-py's own ten
    retries with growing pauses turn one lost server into many seconds. Maintenance notifications are off: they cost a
    round trip per connection, may raise the timeout to 10 s, and while they are on, the pool does not look whether
    the connection it hands out still holds somebody else's answer.
    """
    return Redis.from_pool(
        BlockingConnectionPool.from_url(
            url,
            max_connections=32,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            health_check_interval=0,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
    )


@functools.lru_cache(maxsize=256)
def _stricter(rule: Rule) -> Rule:
    return replace(rule, burst=max(1, rule.burst // 2))


@final
class FallbackLimiter:
    """
    Asks Redis while it answers; without it, keeps guessing slow and lets everything else pass.

    Rules about credentials are then counted in this process, with half their burst, because other replicas count for
    themselves. Other rules do not limit. After a failure Redis is left alone for a second, and then asked by one call
    only, so that an outage does not cost every request a timeout.

    Settling always reaches the memory too: a spend may have been counted there and Redis come back since, and the
    marks set today are the ones that an outage tomorrow will want.
    """

    PAUSE = 1.0  # seconds

    def __init__(
        self,
        primary: Limiter,
        clock: Clock,
        on_change: Callable[[bool], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._primary = primary
        self._memory = MemoryLimiter(clock)
        self._on_change = on_change
        self._monotonic = monotonic
        self._degraded = False
        self._ask_again_at = 0.0

    async def spend(self, spends: Spends) -> Allowed | Limited:
        answer = await self._ask(lambda: self._primary.spend(spends))
        if answer is not None:
            return answer
        strict = [replace(spend, rule=_stricter(spend.rule)) for spend in spends if spend.rule.credential]
        return await self._memory.spend(strict)

    async def settle(
        self, *, refund: Spends = (), reset: Spends = (), mark: Sequence[str] = (), mark_for: float = 0
    ) -> None:
        await self._memory.settle(refund=refund, reset=reset, mark=mark, mark_for=mark_for)
        await self._ask(lambda: self._primary.settle(refund=refund, reset=reset, mark=mark, mark_for=mark_for))

    async def close(self) -> None:
        await self._primary.close()

    async def _ask(self, question: Callable[[], Awaitable[_Answer]]) -> _Answer | None:
        """Return what Redis answers, or None when it does not, or is not to be asked now."""
        probing = self._degraded
        if probing:
            if self._monotonic() < self._ask_again_at:
                return None
            self._ask_again_at = self._monotonic() + self.PAUSE  # the others wait for what this call finds out
        try:
            answer = await question()
        except (RedisError, OSError):  # TimeoutError is an OSError
            self._ask_again_at = self._monotonic() + self.PAUSE
            self._change(degraded=True)
            return None
        if probing:  # an answer to a question asked before the failure says nothing about the time after it
            self._change(degraded=False)
        return answer

    def _change(self, *, degraded: bool) -> None:
        if degraded != self._degraded:
            self._degraded = degraded
            self._on_change(degraded)
