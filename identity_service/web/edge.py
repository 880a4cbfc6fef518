"""
The outermost layer of every request: its id, size, host and spelling, its log line, and the headers of every answer.

Pure ASGI: a middleware of the framework's own kind costs more than everything else `POST /token` does besides signing.
The protocol's endpoints are answered right here, by exact path; everything else goes on to the framework.
"""

import asyncio
import ipaddress
import os
import re
import time
from collections.abc import Callable, MutableMapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, final
from urllib.parse import unquote_to_bytes

import structlog

from identity_service.infra.telemetry.metrics import count_request
from identity_service.infra.telemetry.tracing import Tracer, begin_request, end_request
from identity_service.oauth.errors import Unavailable
from identity_service.web.asgi import JSON, NO_STORE, AsgiApp, Headers, Receive, Reply, Scope, Send
from identity_service.web.cors import PUBLIC_DOCUMENTS, Cors
from identity_service.web.deps import IPNetwork, network_of
from identity_service.web.errors import oauth_reply, problem, problem_of
from identity_service.web.forms import LARGEST_BODY
from identity_service.web.health import Drain

log = structlog.get_logger("identity_service.access")

_LARGEST_HEADERS = 32 * 1024
_MOST_HEADERS = 100
_LONGEST_URL = 8 * 1024
_PROBES = frozenset(("/healthz", "/readyz"))
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d{1,5})?")
_API = "/v1/"
_SEGMENT = rb"/(?!\.{1,2}(?:/|$))(?:[A-Za-z0-9._~:@!$&'()*+,=-]|%[0-9A-Fa-f]{2})+"
_PATH = re.compile(rb"/|(?:" + _SEGMENT + rb")+")
# Letters that need no encoding (RFC 3986 §2.3), slashes of both kinds, and what somebody may decode a second time.
_DISGUISE = re.compile(
    rb"%(?:2[DEF]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5[CF]|7E|25[0-9A-F]{2})",
    re.IGNORECASE,
)

_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_POLICY = b"content-security-policy"
_LOCKED_DOWN = (_POLICY, b"default-src 'none'; frame-ancestors 'none'")
_HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")
_PARTING = ((b"connection", b"close"),)
_RESOURCE_POLICY = b"cross-origin-resource-policy"
PROTECTION = (*_ALWAYS, _LOCKED_DOWN, (_RESOURCE_POLICY, b"same-origin"))
"""What an answer carries that is given before there is a request."""


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
        cors: Cors | None = None,
        trusted_proxies: Sequence[IPNetwork] = (),
        drain: Drain | None = None,
        on_limited: Callable[[str, str], None] = lambda _limit, _network: None,
        tracer: Tracer | None = None,
    ) -> None:
        """
        `on_limited` hears of each request that a limit refused: the limit's name, and the network it came from.

        Once `drain` has begun, each answer ends its connection, so that clients go elsewhere with the next request
        instead of meeting the end of an idle connection.
        """
        self._drain = drain or Drain()
        self._app = app
        self._tracer = tracer
        self._on_limited = on_limited
        self._endpoints = endpoints
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._https = https
        self._access_log = access_log
        self._cors = cors
        self._trusted_proxies = tuple(trusted_proxies)
        # The pages of the interactive documentation, a development tool, load scripts from elsewhere.
        always = [*_ALWAYS] if docs else [*_ALWAYS, _LOCKED_DOWN]
        always = [*always, _HSTS] if https else always
        self._headers = [*always, (_RESOURCE_POLICY, b"same-origin")]
        self._public_headers = [*always, (_RESOURCE_POLICY, b"cross-origin")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Pass one request through.

        Layers below put what they have to say about the request into `scope["state"]`: `client_id` and `reason` for
        the log, `headers` for the answer, whichever it will be, `cors_origins` for those who may read it, and
        `limit` for the one that refused it.
        """
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = time.perf_counter_ns()
        request_id = os.urandom(8).hex()
        state: dict[str, Any] = {**scope.get("state", {}), "request_id": request_id}
        scope["state"] = state
        status = 0
        route = scope["path"] if scope["path"] in self._endpoints else "unmatched"

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message["headers"]
                ours = self._public_headers if scope["path"].startswith(PUBLIC_DOCUMENTS) else self._headers
                if any(name == _POLICY for name, _ in given):  # a page's own, which says what that page needs
                    ours = [header for header in ours if header[0] != _POLICY]
                message["headers"] = [
                    *given,
                    *ours,
                    (b"x-request-id", request_id.encode("ascii")),
                    *(_PARTING if self._drain.begun else ()),
                    *state.get("headers", ()),
                    *(await self._cors.headers(scope) if self._cors is not None else ()),
                ]
            await send(message)

        # The server runs each request in a task of its own, so the binding ends with it.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        span = begin_request(scope["headers"], request_id, self._tracer)
        try:
            route = await self._route(scope, receive, sending)
        except asyncio.CancelledError:
            # The server is leaving, and has waited for this request as long as it may.
            if status or not self._drain.begun:
                raise
            gone = Unavailable(reason="server_leaving", retry_after=1)
            state["reason"] = gone.reason
            await (oauth_reply(gone) if route in self._endpoints else problem_of(gone)).send(sending)
        except Exception as error:
            if status:
                status = 500  # what was cut off in the middle has failed, whatever it began with
                raise
            await problem_of(error).send(sending)
        finally:
            seconds = (time.perf_counter_ns() - started) / 1e9
            count_request(scope["method"], route, status, seconds)
            if span is not None:
                end_request(span, method=scope["method"], route=route, status=status, state=state)
        if "limit" in state:
            self._on_limited(state["limit"], network_of(scope, Headers(scope["headers"]), self._trusted_proxies))
        if self._access_log and (status >= 400 or not self._is_quiet(route)):
            log.info(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                ms=round(seconds * 1e3, 2),
                **{name: state[name] for name in ("client_id", "reason") if name in state},
            )

    def _is_quiet(self, route: str) -> bool:
        endpoint = self._endpoints.get(route)
        return endpoint is not None and endpoint.quiet

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Answer, and return the route's name for the log; never the path as sent, which may hold anything."""
        if (refusal := self._refusal(scope)) is not None:
            name, reply = refusal
            await reply.send(send)
            return name
        if self._cors is not None and await self._cors.answer_preflight(scope, send):
            return "preflight"
        path: str = scope["path"]
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            if _announces_too_much(scope):  # the framework would say so in plain text
                await problem(413, "The body is too large.").send(send)
                return "refused"
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

    def _refusal(self, scope: Scope) -> tuple[str, Reply] | None:
        """Return what is said to a request that no endpoint may see, and its name for the log."""
        pairs, path = scope["headers"], scope["path"]
        raw_path: bytes = scope.get("raw_path") or path.encode("utf-8", "surrogateescape")
        query: bytes = scope["query_string"]
        if len(raw_path) + len(query) > _LONGEST_URL:
            return "refused", problem(414, "The URL is too long.")
        if len(pairs) > _MOST_HEADERS or sum(len(name) + len(value) for name, value in pairs) > _LARGEST_HEADERS:
            return "refused", problem(431, "The headers are too large.")
        if path not in _PROBES:
            headers = Headers(pairs)
            hosts = headers.all("host")
            if len(hosts) != 1:  # RFC 9112 §3.2
                return "refused", problem(400, "The request must name one host.")
            if not self._host_allowed(hosts[0]):
                return "unknown host", problem(404, "There is nothing here.")
            if self._https and self._came_by_http(scope, headers):
                return "refused", problem(400, "This service is reached by https only.")
        # A rule that a proxy has about a path must not be walked around by spelling the path in another way.
        if not _PATH.fullmatch(raw_path) or (b"%" in raw_path and _DISGUISE.search(raw_path)):
            return "unmatched", problem(404, "Not Found")
        if path.startswith(_API) and not (_is_text(raw_path) and _is_text(query)):
            return "refused", problem(400, "The URL must be UTF-8 without NUL.")
        return None

    def _host_allowed(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        match = _HOST.fullmatch(host)
        return match is not None and match[1].lower() in self._hosts

    def _came_by_http(self, scope: Scope, headers: Headers) -> bool:
        """Return whether a proxy of ours says that its client spoke http; the first word is about the outermost one."""
        peer = (scope.get("client") or ("", 0))[0]
        said = headers.all("x-forwarded-proto")
        if not said or not _is_among(peer, self._trusted_proxies):
            return False
        return said[0].partition(",")[0].strip().lower() == "http"


@lru_cache(maxsize=1000)
def _is_among(peer: str, networks: tuple[IPNetwork, ...]) -> bool:
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in networks)


def _announces_too_much(scope: Scope) -> bool:
    lengths = Headers(scope["headers"]).all("content-length")
    return any(length.isdecimal() and int(length[:20]) > LARGEST_BODY for length in lengths)


def _is_text(encoded: bytes) -> bool:
    """Return whether percent-encoded bytes are UTF-8 without NUL, which the database cannot hold."""
    if b"%" not in encoded and encoded.isascii() and b"\0" not in encoded:
        return True
    try:
        return "\0" not in unquote_to_bytes(encoded).decode("utf-8")
    except UnicodeDecodeError:
        return False


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
