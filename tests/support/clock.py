"""Clocks that stand still until a test moves them."""

from datetime import UTC, datetime, timedelta
from typing import final


@final
class FrozenClock:
    """Implement `identity_service.infra.runtime.Clock` with an instant that only the test changes."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self.set(start)

    def now(self) -> datetime:
        return self._now

    def set(self, instant: datetime) -> None:
        """Jump to `instant`, which must be aware; it is kept in UTC, as the service's clock tells it."""
        if instant.tzinfo is None:
            raise ValueError("a clock needs an aware datetime")
        self._now = instant.astimezone(UTC)

    def advance(self, by: timedelta | float) -> datetime:
        """Move on by a `timedelta` or a number of seconds (negative: back) and return the new instant."""
        self._now += by if isinstance(by, timedelta) else timedelta(seconds=by)
        return self._now


@final
class UnixClock:
    """Tell the time as `time.time` does, in seconds: `ahead` of when it `began`, and only the test changes that."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.ahead = 0.0

    def __call__(self) -> float:
        return self.began + self.ahead
