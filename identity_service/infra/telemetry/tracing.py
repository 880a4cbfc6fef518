"""
Which trace a request belongs to, and the spans that somebody may have asked for.

A caller's `traceparent` (W3C Trace Context) is taken for what it names and nothing more: log lines and spans carry its
trace id, and nothing is decided by it, least of all whether a request is traced. What cannot be read is ignored, as if
it had not been sent. Here is no SDK: without a tracer all of this is one look at a variable.
"""

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

Attributes = Mapping[str, str | int]

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""The methods that are told apart; whatever else somebody sends is one."""
_OTHER_METHOD: Final = "_OTHER"  # OpenTelemetry's word


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The trace and the span that a caller says it is in."""

    trace_id: str
    span_id: str


class Span(Protocol):
    """A piece of work that is being traced."""

    @property
    def trace_id(self) -> str:
        """The id of the trace it belongs to, 32 hexadecimal digits."""
        ...

    def child(self, name: str, attributes: Attributes) -> "Span":
        """Begin a piece of it."""
        ...

    def end(self, *, name: str | None = None, attributes: Attributes | None = None, failed: str | None = None) -> None:
        """End it; `failed` is the kind of failure in a word of ours, never a message."""
        ...


class Tracer(Protocol):
    """Draws which requests are traced."""

    def draw(self, request_id: str, parent: TraceParent | None) -> Span | None:
        """Return the span of a request, or None for one that is not traced."""
        ...

    def close(self) -> None:
        """Hand over what is left; blocks for a few seconds at most."""
        ...


@final
class _NoSpan:
    """What stands for a span where nothing is traced."""

    trace_id = ""

    def child(self, name: str, attributes: Attributes) -> Span:
        return self

    def end(self, *, name: str | None = None, attributes: Attributes | None = None, failed: str | None = None) -> None:
        pass


_NO_SPAN: Final = _NoSpan()
_span: ContextVar[Span | None] = ContextVar("span", default=None)
_trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)


def traceparent_of(headers: Iterable[tuple[bytes, bytes]]) -> TraceParent | None:
    """Return what a request's `traceparent` says; None without one, for two of them, and for one that is malformed."""
    found = [value for name, value in headers if name == b"traceparent"]
    if len(found) != 1 or (read := _TRACEPARENT.fullmatch(found[0])) is None:
        return None
    version, trace_id, span_id, more = read.groups()
    # Versions to come may say more than the first one does, and ff will never be one (Trace Context §3.2.2.1).
    if version == b"ff" or (version == b"00" and more) or not (trace_id.strip(b"0") and span_id.strip(b"0")):
        return None
    return TraceParent(trace_id.decode("ascii"), span_id.decode("ascii"))


def begin_request(headers: Iterable[tuple[bytes, bytes]], request_id: str, tracer: Tracer | None) -> Span | None:
    """Remember for this request, and whatever it waits for, which trace it belongs to; return its span, if any."""
    parent = traceparent_of(headers)
    span = tracer.draw(request_id, parent) if tracer is not None else None
    _span.set(span)
    _trace_id.set(span.trace_id if span is not None else parent.trace_id if parent is not None else None)
    return span


def end_request(span: Span, *, method: str, route: str, status: int, state: Mapping[str, Any]) -> None:
    """
    End a request's span, saying what its log line says.

    That is the route's own name, never the address as sent, which may hold anything; and no header and no parameter.
    """
    method = method if method in METHODS else _OTHER_METHOD
    attributes: dict[str, str | int] = {"http.request.method": method, "http.route": route}
    if status:
        attributes["http.response.status_code"] = status
    for name in ("request_id", "client_id", "reason"):
        if name in state:
            attributes[f"identity.{name}"] = str(state[name])
    failed = "no answer" if not status else str(status) if status >= 500 else None
    span.end(name=f"{method} {route}", attributes=attributes, failed=failed)


def current_trace_id() -> str | None:
    """Return the id of the trace that this request belongs to, if anybody has named one."""
    return _trace_id.get()


def child_span(name: str, **attributes: str | int) -> Span:
    """Begin a piece of the request's span, which its beginner ends whatever happens; costs little where none is."""
    parent = _span.get()
    return parent.child(name, attributes) if parent is not None else _NO_SPAN
