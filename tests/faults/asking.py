"""Asking the replicas as clients do: over connections that are kept, with patience, and remembering every answer."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, final

import httpx2

from tests.faults.ledger import Ledger, Told
from tests.faults.stage import StageFailed

_PATIENCE: Final = 30.0  # seconds for one answer; the service promises one much sooner
_STUBBORNNESS: Final = 60.0  # seconds for which somebody asks again
Where = Callable[[], Sequence[str]]
"""Returns the origins that requests may be sent to now."""


def _pauses() -> Iterator[float]:
    """Yield the seconds between attempts: growing, as a good client's do."""
    pause = 0.02
    while True:
        yield pause
        pause = min(0.5, 2 * pause)


@final
class Line:
    """The way to the service: somebody's own network address, and a random replica for each request."""

    def __init__(self, http: httpx2.AsyncClient, where: Where, ledger: Ledger, address: str, chance: random.Random):
        self._http = http
        self._where = where
        self._ledger = ledger
        self._address = address
        self._chance = chance

    def of(self, address: str) -> "Line":
        """Return the same way from another network address."""
        return Line(self._http, self._where, self._ledger, address, self._chance)

    async def ask(
        self,
        what: str,
        method: str,
        path: str,
        *,
        at: str | None = None,
        leave_after: float | None = None,
        headers: dict[str, str] | None = None,
        **request: Any,
    ) -> Told:
        """
        Ask once; `at` is an origin, and `leave_after` after how many seconds the caller hangs up.

        `what` is the kind of request, for the ledger.
        """
        origin = at if at is not None else await self._origin()
        named = {"x-forwarded-for": self._address, **(headers or {})}
        looks = (self._ledger.outages.look(), self._ledger.crashes.look())
        hung_up, began = False, time.monotonic()
        try:
            async with asyncio.timeout(leave_after):
                answer = await self._http.request(method, origin + path, headers=named, **request)
                told = Told(answer.status_code, _body(answer), dict(answer.headers))
        except TimeoutError:
            hung_up, told = True, Told(0, "hung up")
        except httpx2.TransportError as error:
            told = Told(0, type(error).__name__)
        self._ledger.hear(what, told, looks=looks, hung_up=hung_up, took=time.monotonic() - began)
        return told

    async def insist(self, what: str, method: str, path: str, **request: Any) -> tuple[Told, bool]:
        """
        Ask until the answer is sure; return it, and whether an earlier attempt may have been acted on.

        Only the first attempt is hung up on. Raises StageFailed when no answer becomes sure in a minute.
        """
        unsure = False
        deadline = time.monotonic() + _STUBBORNNESS
        for pause in _pauses():
            told = await self.ask(what, method, path, **request)
            if told.sure:
                return told, unsure
            unsure = True
            request.pop("leave_after", None)
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(pause)
        raise StageFailed(f"{what}: nobody would say for a minute what became of it ({told.status})")

    async def _origin(self) -> str:
        """Return where to ask; waits while there is nobody."""
        deadline = time.monotonic() + _STUBBORNNESS
        while not (origins := self._where()):
            if time.monotonic() > deadline:
                raise StageFailed("for a minute there is nobody to ask")
            await asyncio.sleep(0.02)
        return self._chance.choice(origins)


def _body(answer: httpx2.Response) -> Any:
    if answer.content and "json" in answer.headers.get("content-type", ""):
        return answer.json()
    return answer.text


@asynccontextmanager
async def connected(*, kept: int = 100) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield an HTTP client that keeps so many connections at most."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=kept)
    async with httpx2.AsyncClient(timeout=_PATIENCE, trust_env=False, limits=limits) as http:
        yield http
