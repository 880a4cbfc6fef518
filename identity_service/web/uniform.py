"""Answers that leave at fixed instants, so that their time does not tell what was found."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


async def until_uniform(started: float, delay: float) -> None:
    """Wait for the next multiple of `delay` (seconds; 0: not at all) since `started`, by the event loop's clock."""
    if delay > 0:
        elapsed = asyncio.get_running_loop().time() - started
        await asyncio.sleep(math.ceil(elapsed / delay) * delay - elapsed)


@asynccontextmanager
async def uniformly(delay: float) -> AsyncIterator[None]:
    """
    Let the block end, with an answer or a refusal, only at a multiple of `delay` seconds since it began.

    What the block has committed is committed before the wait: it holds no connection, and who hangs up changes nothing.
    """
    started = asyncio.get_running_loop().time()
    try:
        yield
    except Exception:
        await until_uniform(started, delay)
        raise
    await until_uniform(started, delay)
