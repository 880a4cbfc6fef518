"""A bounded cache for rows that may be a second old."""

from collections.abc import Awaitable, Callable, Hashable
from datetime import datetime, timedelta
from typing import Generic, TypeVar, final

from identity_service.infra.runtime.clock import Clock

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

CACHE_AGE = timedelta(seconds=1)
"""How old a cached row may be. What the product promises "at once" (a disabled client) takes no longer than this."""


@final
class RowCache(Generic[Key, Value]):
    """Remembers what a loader answered, for at most `CACHE_AGE`; full, it lets go of the oldest key."""

    def __init__(self, clock: Clock, *, capacity: int = 10_000) -> None:
        self._clock = clock
        self._capacity = capacity
        self._rows: dict[Key, tuple[datetime, Value]] = {}

    async def get(self, key: Key, load: Callable[[], Awaitable[Value]]) -> Value:
        """Return the value for `key`, loaded now or within the last second."""
        now = self._clock.now()
        held = self._rows.get(key)
        if held is not None and timedelta(0) <= now - held[0] < CACHE_AGE:
            return held[1]
        value = await load()
        if len(self._rows) >= self._capacity:
            self._rows.pop(next(iter(self._rows)))
        self._rows[key] = (now, value)
        return value

    def forget(self, key: Key) -> None:
        """Drop what is held for `key`, because this process has just changed it."""
        self._rows.pop(key, None)

    def forget_all(self) -> None:
        """Drop everything, because this process has changed what several rows were made of."""
        self._rows.clear()
