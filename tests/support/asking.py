"""Handing an ASGI application one request whose target is spelled as no client library would spell it."""

from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from tests.support.wire import HOST, WireAnswer


async def ask(
    app: Any,
    target: bytes,
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    body: bytes = b"",
    peer: str = "127.0.0.1",
    host: Iterable[tuple[bytes, bytes]] = (HOST,),
) -> WireAnswer:
    """Send a request with this target, byte for byte, read as the HTTP server reads it; return the answer."""
    raw_path, _, query = target.partition(b"?")
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path.decode("ascii")),
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": [*host, *headers],
        "client": (peer, 50000),
        "server": ("127.0.0.1", 8000),
    }
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
