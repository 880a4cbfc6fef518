"""One accelerated time for several processes: a page of memory that one of them writes and all of them see."""

import asyncio
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import final

_SIZE = mmap.PAGESIZE
_TICK = 0.004  # real seconds
_LONGEST_TICK = 0.02  # real seconds: a driver that was kept from running does not make time jump
_PATIENCE = 60.0  # real seconds that time may stand still before the run is given up


class ProofFailed(Exception):
    """The run cannot go on; the message says what did not happen."""


@final
class Page:
    """Numbers of eight bytes in a file that several processes map; each is read and written in one piece."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.numbers = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("d")

    @classmethod
    def create(cls, path: Path) -> "Page":
        """Make the file, all zero."""
        path.write_bytes(bytes(_SIZE))
        return cls(path)


@final
class SharedClock:
    """Implement `identity_service.infra.runtime.Clock` with the page's time."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._page.numbers[0], UTC)


@final
class Slot:
    """What one replica says about itself: the port it serves at, and how many polls it has begun and ended."""

    def __init__(self, page: Page, number: int) -> None:
        self._page = page
        self._at = 1 + 3 * number

    def clear(self) -> None:
        """Forget what a process that is gone has said."""
        for place in range(self._at, self._at + 3):
            self._page.numbers[place] = 0

    @property
    def port(self) -> int:
        """The port, or 0 while nobody serves."""
        return int(self._page.numbers[self._at])

    @port.setter
    def port(self, port: int) -> None:
        self._page.numbers[self._at] = port

    @property
    def begun(self) -> int:
        """Polls of the key schedule that were begun since the process started; one at a time."""
        return int(self._page.numbers[self._at + 1])

    @begun.setter
    def begun(self, count: int) -> None:
        self._page.numbers[self._at + 1] = count

    @property
    def ended(self) -> int:
        """The number of the last poll that was ended."""
        return int(self._page.numbers[self._at + 2])

    @ended.setter
    def ended(self, count: int) -> None:
        self._page.numbers[self._at + 2] = count


@final
class Time:
    """
    The driver's hand on the page: time runs `speed` times as fast as it really does, as long as everybody keeps up.

    What is accelerated is the schedule, not the slowness of this machine: while `keeps_up` says no, because a process
    was kept from running for as long as no replica would be, time waits for it. Instants are seconds since 1970.
    """

    def __init__(self, page: Page, start: datetime, speed: float) -> None:
        self._page = page
        self.speed = speed
        self.keeps_up: Callable[[], bool] = lambda: True
        self.waited = 0.0
        """Real seconds that time waited for somebody."""
        self._still = 0
        self.now = start.timestamp()

    @property
    def now(self) -> float:
        """The instant it is for everybody."""
        return self._page.numbers[0]

    @now.setter
    def now(self, instant: float) -> None:
        self._page.numbers[0] = instant

    async def run(self) -> None:
        """Let time run until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            before, last = last, time.monotonic()
            passed = last - before
            if self._still:
                continue
            if self.keeps_up():
                self.waited += max(0.0, passed - _LONGEST_TICK)
                self.now += min(passed, _LONGEST_TICK) * self.speed
            else:
                self.waited += passed

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Stop time for the duration of the block."""
        self._still += 1
        try:
            yield
        finally:
            self._still -= 1

    async def reach(self, instant: float) -> None:
        """Wait until it is `instant`; raises ProofFailed when time does not get on."""
        before, moved = self.now, time.monotonic()
        while self.now < instant:
            await asyncio.sleep(_TICK)
            if self.now != before:
                before, moved = self.now, time.monotonic()
            elif time.monotonic() - moved > _PATIENCE:
                raise ProofFailed(f"a replica has not polled, or not answered, for {_PATIENCE:.0f} s")


async def until(condition: Callable[[], bool], what: str, patience: float = 30.0) -> None:
    """Wait until `condition` holds, at most `patience` real seconds; raises ProofFailed with `what` did not happen."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise ProofFailed(f"within {patience:g} s it did not happen that {what}")
        await asyncio.sleep(_TICK)
