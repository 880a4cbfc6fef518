"""The time: injected, so that tests can stop it and replicas can agree on it."""

import time
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, final

_BOOT_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


class Clock(Protocol):
    """Tells the time. Injected, so that tests can stop it and replicas can agree on it."""

    def now(self) -> datetime:
        """Return the current instant, aware, in UTC."""
        ...


def _steady() -> float:
    """Return seconds that only ever move on; where the system counts them, those in which the machine slept as well."""
    return time.clock_gettime(_BOOT_CLOCK) if _BOOT_CLOCK is not None else time.monotonic()


@final
class SystemClock:
    """
    The machine's clock until it is corrected, and from then on the database's, counted on.

    Replicas compare instants that other replicas stored (when a key activates, when a family expires). Each measures
    how far its own clock is from the database's at every key poll and adds that, so that all of them live in one time.
    Between two polls it counts seconds instead of looking at the machine's clock, which somebody may set: one that
    jumps by an hour would, for as long as nobody has polled, sign tokens that have expired and refuse good ones.
    """

    def __init__(self) -> None:
        self._began: datetime | None = None  # the corrected time at which the count of seconds began
        self._offset = timedelta(0)

    def now(self) -> datetime:
        if self._began is None:
            return datetime.now(UTC)
        return self._began + timedelta(seconds=_steady())

    def correct(self, *, reference: datetime, asked_at: datetime, answered_at: datetime) -> timedelta:
        """
        Adopt `reference`, the database's time, read between two instants of this clock; return all corrections so far.

        The answer is taken to belong to the middle of the round trip; a round trip longer than a second says too
        little about the time to be believed and changes nothing.
        """
        if answered_at - asked_at <= timedelta(seconds=1):
            error = reference - (asked_at + (answered_at - asked_at) / 2)
            began = self._began or datetime.now(UTC) - timedelta(seconds=_steady())
            self._began = began + error
            self._offset += error
        return self._offset


@final
class SteadyClock:
    """A clock that only counts: for what is measured within one process, and must not care when the time is set."""

    def __init__(self) -> None:
        self._began = datetime.now(UTC) - timedelta(seconds=time.monotonic())

    def now(self) -> datetime:
        """Return an instant that only ever moves on, near the current one."""
        return self._began + timedelta(seconds=time.monotonic())
