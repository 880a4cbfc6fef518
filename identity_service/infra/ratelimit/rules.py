"""What a limit is, and its arithmetic in whole microseconds; the package's page explains it."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol, TypeAlias

from identity_service.infra.runtime import Clock

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RULE_NAME = re.compile(r"[a-z0-9_.]+")  # no colon: it ends the name inside a Redis key
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
    kept_without_redis: bool = True  # at half the burst, counted in this process; else there is no limit meanwhile

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
class Left:
    """What is left of a plain rule's bucket: spends that would pass at once, and whole seconds until it is full."""

    rule: Rule
    spends: int
    full_in: int


@dataclass(frozen=True, slots=True)
class Allowed:
    """
    Every bucket passed, and one spend has been taken from each.

    `left` tells of plain rules only, for those who are told their budget; which is why it is no part of the verdict.
    """

    left: tuple[Left, ...] = field(default=(), compare=False)


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


class Bucket(NamedTuple):
    """What is kept about one bucket; `at` is in microseconds since 1970."""

    spends: int
    at: int


class Numbers(NamedTuple):
    """A rule in whole microseconds, in the order in which the scripts read it."""

    burst: int
    interval: int
    growth: float
    max_interval: int
    closed_after: int  # 0: never
    memory: int

    def read(self, kept: Bucket, now: int) -> Bucket:
        """Return what the bucket holds now: nothing if it is old, and cut if it comes from a clock that ran ahead."""
        if self.growth == 1.0:
            return Bucket(0, min(max(kept.at, now), now + self.burst * self.interval))
        return Bucket(kept.spends, min(kept.at, now)) if now - kept.at < self.memory else Bucket(0, now)

    def wait(self, held: Bucket, now: int) -> int:
        """Return the microseconds until the next spend passes."""
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

    def spent(self, held: Bucket, now: int) -> Bucket:
        """Return the bucket after a spend."""
        return Bucket(0, held.at + self.interval) if self.growth == 1.0 else Bucket(held.spends + 1, now)

    def refunded(self, held: Bucket, now: int) -> Bucket | None:
        """Return the bucket after a spend was given back, or None when nothing is left of it."""
        if self.growth == 1.0:
            return Bucket(0, held.at - self.interval) if held.at - self.interval > now else None
        return Bucket(held.spends - 1, held.at) if held.spends > 1 else None


def micros(seconds: float) -> int:
    """Return seconds as whole microseconds."""
    return round(seconds * 1_000_000)


@functools.lru_cache(maxsize=256)
def numbers_of(rule: Rule) -> Numbers:
    """Return a rule in the form that is calculated with."""
    times = (micros(rule.interval), rule.growth, micros(rule.max_interval))
    return Numbers(rule.burst, *times, rule.closed_after or 0, micros(rule.memory))


def now_of(clock: Clock) -> int:
    """Return the clock's time in microseconds since 1970."""
    return (clock.now() - _EPOCH) // timedelta(microseconds=1)


def left_of(rule: Rule, at: int, now: int) -> Left:
    """Return what is left of a plain rule's bucket whose arrival time is `at`."""
    numbers = numbers_of(rule)
    return Left(rule, (now + numbers.burst * numbers.interval - at) // numbers.interval, -(-(at - now) // 1_000_000))


def limited(rule: str, wait: int) -> Limited:
    """Return the refusal for a wait in microseconds."""
    return Limited(rule, -(-wait // 1_000_000))


def once(spends: Spends) -> list[Spend]:
    """Return each bucket once."""
    return list({(spend.rule.name, spend.key): spend for spend in spends}.values())


def lifetime_of(mark: Sequence[str], mark_for: float) -> int:
    """Return how long marks stand, in microseconds; raises ValueError for marks that would not stand at all."""
    if mark and mark_for <= 0:
        raise ValueError("a mark needs a lifetime")
    return micros(mark_for)
