"""Answers that leave at fixed instants."""

import asyncio

import pytest

from identity_service.web.uniform import uniformly

DELAY = 0.1


async def taking(seconds: float, delay: float = DELAY, error: Exception | None = None) -> float:
    """Do something for some seconds within a uniform block; return how long it all took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        async with uniformly(delay):
            await asyncio.sleep(seconds)
            if error is not None:
                raise error
    except LookupError:
        assert error is not None
    return loop.time() - started


@pytest.mark.parametrize("error", [None, LookupError()], ids=["answer", "refusal"])
async def test_a_block_ends_at_a_multiple_of_the_delay(error: Exception | None) -> None:
    """An answer and a refusal alike, and never before."""
    assert await taking(0, error=error) >= DELAY
    assert await taking(1.2 * DELAY, error=error) >= 2 * DELAY


async def test_without_a_delay_nothing_waits() -> None:
    """As the tests have it that are about something else; a machine that stands still does so once, not each time."""
    assert min([await taking(0, delay=0) for _ in range(20)]) < DELAY


async def test_who_hangs_up_is_not_waited_for() -> None:
    """A cancelled request ends at once."""
    task = asyncio.create_task(taking(60, delay=600))
    await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(30):
        await asyncio.wait([task])
    assert task.cancelled()
