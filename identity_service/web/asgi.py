"""The few words of ASGI that the endpoints speak which stand before the framework."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, final

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]


@final
class Headers:
    """The headers of a request; names in lower case."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        self._pairs = pairs

    def all(self, name: str) -> list[str]:
        """Return every value of a header, in order."""
        wanted = name.encode("ascii")
        return [value.decode("latin-1") for key, value in self._pairs if key == wanted]

    def one(self, name: str) -> str | None:
        """Return the value of a header, the last if it stands there more than once."""
        values = self.all(name)
        return values[-1] if values else None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def send(self, send: Send, *, head: bool = False) -> None:
        """Send it; for HEAD without its body. 304 has no length: it would be that of the 200 (RFC 9110 §8.6)."""
        headers: HeaderList = [*self.headers]
        if self.status != 304:
            headers.insert(0, (b"content-length", str(len(self.body)).encode("ascii")))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


JSON = (b"content-type", b"application/json")
NO_STORE = ((b"cache-control", b"no-store"), (b"pragma", b"no-cache"))
