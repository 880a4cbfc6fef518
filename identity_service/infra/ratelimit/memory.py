"""Limits counted in this process."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, final

from identity_service.infra.ratelimit.rules import (
    Allowed,
    Bucket,
    Left,
    Limited,
    Numbers,
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


class _Slot(NamedTuple):
    bucket: Bucket
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
        now = now_of(self._clock)
        self._clear(spends, now)
        longest, refused_by = 0, ""
        taken: list[tuple[OrderedDict[str, _Slot], str, Bucket]] = []
        left: list[Left] = []
        coming = 0
        for spend in spends:
            if self._exempt(spend, now):
                continue
            numbers = numbers_of(spend.rule)
            slots, key = self._place(spend, coming)
            if slots is self._overflow:  # shared by strangers, so it slows down and never closes
                numbers = numbers._replace(closed_after=0)
            held = self._read(numbers, slots, key, now)
            if (wait := numbers.wait(held, now)) > longest:
                longest, refused_by = wait, spend.rule.name
            coming += key not in slots and slots is not self._overflow
            taken.append((slots, key, numbers.spent(held, now)))
            if numbers.growth == 1.0:
                left.append(left_of(spend.rule, taken[-1][2].at, now))
        if longest:
            return limited(refused_by, longest)
        for slots, key, bucket in taken:
            self._live += key not in slots and slots is not self._overflow
            slots[key] = _Slot(bucket, now)
            slots.move_to_end(key)
        return Allowed(tuple(left))

    async def settle(
        self, *, refund: Spends = (), reset: Spends = (), mark: Sequence[str] = (), mark_for: float = 0
    ) -> None:
        lifetime = lifetime_of(mark, mark_for)
        now = now_of(self._clock)
        for spend in once(refund):
            if not self._exempt(spend, now):
                self._refund(spend, *self._place(spend), now)
        for spend in once(reset):
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
            book = self._books[rule.name] = _Book(numbers_of(rule).memory)
        return book

    def _place(self, spend: Spend, coming: int = 0) -> tuple[OrderedDict[str, _Slot], str]:
        """Return where this bucket is kept: among its rule's, or in overflow when it is new and there is no room."""
        slots = self._book(spend.rule).slots
        if spend.key in slots or self._live + coming < self._capacity:
            return slots, spend.key
        return self._overflow, spend.rule.name

    def _read(self, numbers: Numbers, slots: OrderedDict[str, _Slot], key: str, now: int) -> Bucket:
        if (slot := slots.get(key)) is None:
            return Bucket(0, now)
        held = numbers.read(slot.bucket, now)
        if held.at < slot.bucket.at:
            slots[key] = slot._replace(bucket=held)
        return held

    def _refund(self, spend: Spend, slots: OrderedDict[str, _Slot], key: str, now: int) -> None:
        numbers = numbers_of(spend.rule)
        if slot := slots.get(key):
            if bucket := numbers.refunded(self._read(numbers, slots, key, now), now):
                slots[key] = slot._replace(bucket=bucket)
            else:
                del slots[key]
                self._live -= slots is not self._overflow
