"""Handing an ASGI application one request byte for byte, as no client library would send it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

HOST = (b"host", b"127.0.0.1:8000")


@dataclass(frozen=True)
class WireAnswer:
    """What was answered; header names in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return a header's value, or None; a header that stands there twice is a fault."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} stands there {len(values)} times"
        return values[0] if values else None

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


async def ask(
    app: Any,
    target: bytes,
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    body: bytes = b"",
    peer: str = "127.0.0.1",
    host: Iterable[tuple[bytes, bytes]] = (HOST,),
) -> WireAnswer:
    """Send a request with this target, read as the HTTP server reads it; return the answer."""
    raw_path, _, query = target.partition(b"?")
    scope = {
        "method": method,
        "path": unquote(raw_path.decode("ascii")),
        "raw_path": raw_path,
        "query_string": query,
        "headers": [*host, *headers],
        "client": (peer, 50000),
    }
    return await hand(app, scope, [body])


async def hand(app: Any, of_this_request: Mapping[str, Any], pieces: Iterable[bytes]) -> WireAnswer:
    """Hand over one request, its body in as many messages as there are pieces; return what is answered."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "server": ("127.0.0.1", 8000),
        **of_this_request,
    }
    parts = list(pieces)
    messages = [
        *(
            {"type": "http.request", "body": part, "more_body": number < len(parts)}
            for number, part in enumerate(parts, 1)
        ),
        {"type": "http.disconnect"},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    return WireAnswer(
        start["status"],
        tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]),
        b"".join(message.get("body", b"") for message in rest),
    )


async def connect(app: Any, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Open a web socket at `/feed`; return the first thing that is said to it."""
    scope = {"type": "websocket", "path": "/feed", "query_string": b"", "headers": headers}
    told: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    await app(scope, receive, send)
    return told[0]
