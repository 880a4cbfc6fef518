"""Waiting for what comes about soon, and must."""

import asyncio
import inspect
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
