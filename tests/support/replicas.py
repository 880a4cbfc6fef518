"""Servers as processes of their own, asked with the hands that prepare a service in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import httpx2

from tests.support.server_process import ServerProcess
from tests.support.service import ISSUER, Service

PROMISE: Final = 5.0
"""Seconds in which every replica knows what one was told: a poll of the keys (2 s), and a busy machine."""
_PATIENCE: Final = 60.0  # seconds for what takes few


@dataclass
class Replica(Service):
    """A server of its own process; what is prepared goes to the database by way of this one."""

    server: ServerProcess = field(kw_only=True)

    async def kids(self) -> set[str]:
        """Return the ids of the keys that it publishes."""
        return {key["kid"] for key in (await self.http.get("/.well-known/jwks.json")).json()["keys"]}


@asynccontextmanager
async def servers(
    number: int, database_url: str, redis_url: str | None = None, **settings: str
) -> AsyncIterator[list[ServerProcess]]:
    """Start servers under one issuer, all at the same time."""

    def start() -> ServerProcess:
        return ServerProcess(database_url, redis_url, issuer=ISSUER, **settings)

    starting = [asyncio.create_task(asyncio.to_thread(start)) for _ in range(number)]
    await asyncio.wait(starting)
    try:
        yield [task.result() for task in starting]
    finally:
        for task in starting:
            if task.exception() is None:
                await asyncio.to_thread(task.result().close)


@asynccontextmanager
async def replicas(
    hand: Service, database_url: str, redis_url: str | None = None, *, number: int = 2, **settings: str
) -> AsyncIterator[list[Replica]]:
    """Start servers under one issuer; `hand` prepares what they meet."""
    async with servers(number, database_url, redis_url, **settings) as started, AsyncExitStack() as stack:
        found = []
        for server in started:
            http = await stack.enter_async_context(httpx2.AsyncClient(base_url=server.url, timeout=30))
            found.append(Replica(hand.app, hand.services, hand.clock, http, server=server))
        yield found
