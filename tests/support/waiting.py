"""Waiting for what comes about soon, and must."""

import asyncio
import inspect
import time
from collections.abc import Callable

_PATIENCE = 30.0  # seconds for what takes milliseconds
_POLL = 0.01  # seconds


async def until(
    so: Callable[[], object], what: str = "it does not come to pass", *, patience: float = _PATIENCE
) -> float:
    """Return how many seconds it took until something, or what it makes one wait for, was so; asserts that it comes."""
    clock = asyncio.get_running_loop()
    began = clock.time()
    while True:
        answer = so()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return clock.time() - began
        assert clock.time() - began < patience, what
        await asyncio.sleep(_POLL)


def wait_until(so: Callable[[], object], what: str = "it does not come to pass") -> None:
    """Wait until something is so, in a test that has no event loop; asserts that it comes."""
    deadline = time.monotonic() + _PATIENCE
    while not so():
        assert time.monotonic() < deadline, what
        time.sleep(_POLL)
