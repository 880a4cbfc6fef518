"""Limits counted in Redis, for all replicas together; and what becomes of them while Redis is away."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar, cast, final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from identity_service.infra.ratelimit.memory import MemoryLimiter
from identity_service.infra.ratelimit.rules import (
    Allowed,
    Limited,
    Limiter,
    Rule,
    Spend,
    Spends,
    left_of,
    lifetime_of,
    limited,
    now_of,
    numbers_of,
    once,
)
from identity_service.infra.runtime import Clock

_Answer = TypeVar("_Answer")

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

local longest, refused_by, taken, answer = 0, 0, {}, {0, 0}
for i = 1, buckets do
  local rule, count, at = read(i)
  if rule then
    local wait = wait_of(rule, count, at)
    if wait > longest then longest, refused_by = wait, i end
    local value = rule.growth == 1 and written(0, at + rule.interval) or written(count + 1, now)
    taken[i] = {value, string.format('%.0f', math.ceil(rule.memory / 1000))}
    answer[i + 2] = rule.growth == 1 and at + rule.interval or 0
  else
    answer[i + 2] = 0
  end
end
if longest == 0 then
  for i, one in pairs(taken) do redis.call('SET', KEYS[i], one[1], 'PX', one[2]) end
end
answer[1], answer[2] = refused_by, longest
return answer
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
        refused_by, wait, *arrivals = cast(list[int], await self._run(self._spend(keys=keys, args=args)))
        if wait:
            return limited(spends[refused_by - 1].rule.name, wait)
        now = cast(int, args[0])
        return Allowed(tuple(left_of(spend.rule, at, now) for spend, at in zip(spends, arrivals, strict=True) if at))

    async def settle(
        self, *, refund: Spends = (), reset: Spends = (), mark: Sequence[str] = (), mark_for: float = 0
    ) -> None:
        lifetime = lifetime_of(mark, mark_for)
        if not (refund or reset or mark):
            return
        keys, args = self._read(once(refund))
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
        args: list[int | float] = [now_of(self._clock), len(spends)]
        for spend in spends:
            if spend.exempt_by is not None:
                keys.append(self._mark(spend.exempt_by))
            args += [0 if spend.exempt_by is None else len(keys), *numbers_of(spend.rule)]
        return keys, args

    async def _run(self, answer: Awaitable[object]) -> object:
        try:
            async with asyncio.timeout(self._deadline):
                return await answer
        except RuntimeError as error:  # uvloop's word for a connection that was reset; redis-py hands it on
            raise RedisConnectionError("the connection is gone") from error


def redis_client(url: str, *, timeout: float = 0.1) -> Redis:
    """
    Return a client that gives up soon: `timeout` seconds each for a free connection, for connecting and for an answer.

    A connection that turns out to be dead is replaced once, at once; a timeout is never retried. (redis-py's defaults
    depend on how a client is made: from a URL without retries, from a host with ten, 15 s on a silent server.)
    Maintenance notifications are off: they cost a round trip per connection, may raise the timeout to 10 s, and while
    they are on, the pool does not look whether the connection it hands out still holds somebody else's answer.
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
    Asks Redis while it answers; without it, keeps the rules that say so and lets everything else pass.

    Those are then counted in this process, with half their burst, because other replicas count for themselves. After a
    failure Redis is left alone for a second, and then asked by one call only, so that an outage does not cost every
    request a timeout.

    Their spends are always counted in memory as well, and for a minute after a failure both must allow them:
    neither the moment in which Redis goes away nor the one in which it comes back hands out a fresh burst.

    Settling always reaches the memory too: a spend may have been counted there and Redis come back since, and the
    marks set today are the ones that an outage tomorrow will want.
    """

    PAUSE = 1.0  # seconds
    CAUTION = 60.0  # seconds

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
        self._strict_until = 0.0

    async def spend(self, spends: Spends) -> Allowed | Limited:
        answer = await self._ask(lambda: self._primary.spend(spends))
        if isinstance(answer, Limited):
            return answer
        strict = [replace(spend, rule=_stricter(spend.rule)) for spend in spends if spend.rule.kept_without_redis]
        counted = await self._memory.spend(strict)
        if answer is None:
            return counted
        if isinstance(counted, Limited) and self._monotonic() < self._strict_until:
            await self._ask(lambda: self._primary.settle(refund=spends))  # a refused try counts for nothing
            return counted
        return answer

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
            self._strict_until = self._monotonic() + self.CAUTION
            self._change(degraded=True)
            return None
        if probing:  # an answer to a question asked before the failure says nothing about the time after it
            self._change(degraded=False)
        return answer

    def _change(self, *, degraded: bool) -> None:
        if degraded != self._degraded:
            self._degraded = degraded
            self._on_change(degraded)
