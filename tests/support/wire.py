"""Requests as no well-behaved client library would send them, without a socket."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import httpx2

from tests.support.service import Registered, Service

FORM = (b"content-type", b"application/x-www-form-urlencoded")
HOST = (b"host", b"127.0.0.1:8000")


async def post(
    service: Service,
    body: str | bytes | Iterable[tuple[str, str]],
    *,
    client: Registered | None = None,
    path: str = "/token",
    headers: Mapping[str, str] | None = None,
) -> httpx2.Response:
    """Post a form as it is given: text, or pairs in their order, repeated ones too; `client` authenticates by Basic."""
    content = body if isinstance(body, str | bytes) else urlencode(list(body))
    form = {"content-type": "application/x-www-form-urlencoded"}
    auth = client.auth if client else None
    return await service.http.post(path, content=content, headers={**form, **(headers or {})}, auth=auth)


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


async def send(
    service: Service,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "POST",
    headers: Iterable[tuple[bytes, bytes]] = (FORM,),
    query: bytes = b"",
    peer: str = "127.0.0.1",
    host: bool = True,
) -> WireAnswer:
    """
    Hand the application one request, byte by byte as given, and return what it answers.

    Several pieces of `body` come as several messages; a server puts header names in lower case before this point.
    """
    pieces = [body] if isinstance(body, bytes) else list(body)
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, 1)
    ]
    messages.append({"type": "http.disconnect"})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "headers": [*([HOST] if host else []), *headers],
        "client": (peer, 50000),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def sending(message: dict[str, Any]) -> None:
        sent.append(message)

    await service.app(scope, receive, sending)
    start, *rest = sent
    return WireAnswer(
        start["status"],
        tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]),
        b"".join(message.get("body", b"") for message in rest),
    )
