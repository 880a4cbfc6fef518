"""The time: injected, so that tests can stop it and replicas can agree on it."""

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol, final


class Clock(Protocol):
    """Tells the time. Injected, so that tests can stop it and replicas can agree on it."""

    def now(self) -> datetime:
        """Return the current instant, aware, in UTC."""
        ...


@final
class SystemClock:
    """
    The machine's clock, corrected to the database's.

    Replicas compare instants that other replicas stored (when a key activates, when a family expires). Each measures
    how far its own clock is from the database's at every key poll and adds that, so that all of them live in one time.
    """

    def __init__(self) -> None:
        self._offset = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._offset

    def correct(self, *, reference: datetime, asked_at: datetime, answered_at: datetime) -> timedelta:
        """
        Adopt `reference`, the database's time, read between two instants of this clock; return the new correction.

        The answer is taken to belong to the middle of the round trip; a round trip longer than a second says too
        little about the time to be believed and changes nothing.
        """
        if answered_at - asked_at <= timedelta(seconds=1):
            midpoint = asked_at + (answered_at - asked_at) / 2
            self._offset += reference - midpoint
        return self._offset


@final
class SteadyClock:
    """A clock that only counts: for what is measured within one process, and must not care when the time is set."""

    def __init__(self) -> None:
        self._began = datetime.now(UTC) - timedelta(seconds=time.monotonic())

    def now(self) -> datetime:
        """Return an instant that only ever moves on, near the current one."""
        return self._began + timedelta(seconds=time.monotonic())
