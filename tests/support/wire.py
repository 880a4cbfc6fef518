"""Requests as no well-behaved client library would send them, without a socket."""

from collections.abc import Iterable, Mapping
from urllib.parse import urlencode

import httpx2

from tests.support.asking import HOST, WireAnswer, hand
from tests.support.service import Registered, Service

FORM = (b"content-type", b"application/x-www-form-urlencoded")


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
    scope = {
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "headers": [*([HOST] if host else []), *headers],
        "client": (peer, 50000),
    }
    return await hand(service.app, scope, [body] if isinstance(body, bytes) else body)
