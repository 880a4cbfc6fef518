"""An event loop in a thread of its own, for what coroutines, threads and other processes alike talk to."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar, final

Answer = TypeVar("Answer")

_PATIENCE: Final = 30.0  # seconds for what takes milliseconds


async def all_are_connected() -> None:
    """Let the loop turn a few times: who was accepted a moment ago becomes a connection in its next turns."""
    for _ in range(5):
        await asyncio.sleep(0)


@final
class LoopThread:
    """A running loop; end it with `close`, after whatever runs in it has ended."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run something in the thread, which alone touches the state that belongs to it, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE)

    def close(self) -> None:
        """Stop the loop and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()
