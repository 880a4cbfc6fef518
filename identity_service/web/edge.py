"""
The outermost layer of every request: its id, its size, its host, its log line, and the headers every answer carries.

Pure ASGI: a middleware of the framework's own kind costs more than everything else `POST /token` does besides signing.
The protocol's endpoints are answered right here, by exact path; everything else goes on to the framework.
"""

import os
import re
import time
from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol, final

import structlog

from identity_service.web.asgi import JSON, NO_STORE, AsgiApp, Headers, Receive, Reply, Scope, Send
from identity_service.web.errors import problem, problem_of

log = structlog.get_logger("identity_service.access")

_LARGEST_HEADERS = 32 * 1024
_MOST_HEADERS = 100
_LONGEST_URL = 8 * 1024
_PROBES = frozenset(("/healthz", "/readyz"))
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d{1,5})?")
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_LOCKED_DOWN = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")


class Endpoint(Protocol):
    """An endpoint that stands before the framework."""

    methods: Sequence[str]
    quiet: bool
    """Whether a good answer is not worth a line in the log: probes, and documents that caches fetch."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        ...


@final
class Edge:
    """Wraps the application."""

    def __init__(
        self,
        app: AsgiApp,
        *,
        endpoints: dict[str, Endpoint],
        allowed_hosts: Sequence[str],
        https: bool,
        access_log: bool,
        docs: bool = False,
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._access_log = access_log
        # The pages of the interactive documentation, a development tool, load scripts from elsewhere.
        always = [*_ALWAYS] if docs else [*_ALWAYS, _LOCKED_DOWN]
        self._headers = [*always, _HSTS] if https else always

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = time.perf_counter_ns()
        request_id = os.urandom(8).hex()
        state: dict[str, Any] = {**scope.get("state", {}), "request_id": request_id}
        scope["state"] = state
        status = 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    *self._headers,
                    (b"x-request-id", request_id.encode("ascii")),
                ]
            await send(message)

        # The server runs each request in a task of its own, so the binding ends with it.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        route = await self._route(scope, receive, sending)
        if self._access_log and (status >= 400 or not self._is_quiet(route)):
            log.info(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                ms=round((time.perf_counter_ns() - started) / 1e6, 2),
                **{name: state[name] for name in ("client_id", "reason") if name in state},
            )

    def _is_quiet(self, route: str) -> bool:
        endpoint = self._endpoints.get(route)
        return endpoint is not None and endpoint.quiet

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Answer, and return the route's name for the log; never the path as sent, which may hold anything."""
        headers = scope["headers"]
        path: str = scope["path"]
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > _LONGEST_URL:
            await problem(414, "The URL is too long.").send(send)
            return "refused"
        if len(headers) > _MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > _LARGEST_HEADERS:
            await problem(431, "The headers are too large.").send(send)
            return "refused"
        if path not in _PROBES:
            hosts = Headers(headers).all("host")
            if len(hosts) != 1:  # RFC 9112 §3.2
                await problem(400, "The request must name one host.").send(send)
                return "refused"
            if not self._host_allowed(hosts[0]):
                await problem(404, "There is nothing here.").send(send)
                return "unknown host"
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            await self._app(scope, receive, send)
            route = scope.get("route")
            return str(getattr(route, "path", "unmatched"))
        if scope["method"] not in endpoint.methods:
            allow = ", ".join(endpoint.methods).encode("ascii")
            body = b'{"error":"invalid_request","error_description":"This method is not allowed here."}'
            await Reply(405, body, (JSON, *NO_STORE, (b"allow", allow))).send(send, head=scope["method"] == "HEAD")
            return path
        await endpoint(scope, receive, send)
        return path

    def _host_allowed(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        match = _HOST.fullmatch(host)
        return match is not None and match[1].lower() in self._hosts


@final
class Guard:
    """
    Stands inside the framework and answers for faults of ours, before the framework can say anything about them.

    What has begun to answer when it fails is cut off by the server; there is no other honest end to it.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        begun = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await problem_of(error).send(send)
