"""Work that a cancellation must not leave half done."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """
    Do work, and if the caller is cancelled meanwhile, be cancelled when it is done and not before.

    What stops a server cancels its tasks and closes the database next; a shield alone would let the work run into
    that. Raises what the work raises, unless there was a cancellation; a second one reaches the work.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
