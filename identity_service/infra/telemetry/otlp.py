"""
Spans as OpenTelemetry knows them, handed to a collector by OTLP over HTTP. Needs the extra `otel`.

Nothing is instrumented by the library: a span holds what this service puts into it (a route's name, a status, ids of
our own) and neither an address, a header, a statement nor an exception's words.
"""

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final, final

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import Tracer as OtelTracer

from identity_service.infra.telemetry.metrics import TRACES_LOST
from identity_service.infra.telemetry.tracing import Attributes, Span, TraceParent

log = structlog.get_logger(__name__)

_EXPORT_TIMEOUT: Final = 3.0  # seconds for one batch, all tries together
_LAST_WORD: Final = 3.0  # seconds after the end of the server in which batches may still be begun
_DRAWS: Final = 2**64


@final
class _Telling(SpanExporter):
    """Hands spans on, and says in words of ours when they were not taken."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._until = float("inf")
        self._losing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export a batch; a failure is counted, and told when it begins and when it ends."""
        result = SpanExportResult.FAILURE
        if time.monotonic() < self._until:
            try:
                result = self._exporter.export(spans)
            except Exception as error:
                log.warning("traces.failed", kind=type(error).__name__)
        lost = result is not SpanExportResult.SUCCESS
        if lost:
            TRACES_LOST.inc(len(spans))
        if lost != self._losing:
            self._losing = lost
            log.warning("traces.changed", lost=lost)
        return result

    def end_soon(self) -> None:
        """Let no further batch begin after the last word."""
        self._until = time.monotonic() + _LAST_WORD

    def shutdown(self) -> None:
        """Close the exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Have the exporter hand over what it may have kept."""
        return self._exporter.force_flush(timeout_millis)


@final
class _Traced:
    """A span that is recorded."""

    __slots__ = ("_span", "_tracer", "trace_id")

    def __init__(self, tracer: OtelTracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self.trace_id = format_trace_id(span.get_span_context().trace_id)

    def child(self, name: str, attributes: Attributes) -> Span:
        context = set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, context, SpanKind.INTERNAL, attributes)
        return _Traced(self._tracer, span)

    def end(self, *, name: str | None = None, attributes: Attributes | None = None, failed: str | None = None) -> None:
        if name is not None:
            self._span.update_name(name)
        if attributes:
            self._span.set_attributes(attributes)
        if failed is not None:
            self._span.set_attribute("error.type", failed)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


@final
class OtlpTracer:
    """
    Traces a share of the requests.

    Which ones is drawn by their own ids: a caller can neither have its requests traced, at our cost, nor kept out. The
    requests that are not drawn cost nothing further.
    """

    def __init__(self, processor: SpanProcessor, *, ratio: float, closing: _Telling | None = None) -> None:
        """`processor` gets the spans; `ratio` (0 to 1) is the share of the requests that are traced."""
        resource = Resource.create({"service.name": "identity-service", "service.version": version("identity-service")})
        self._closing = closing
        self._drawn = int(ratio * _DRAWS)
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("identity_service")

    @classmethod
    def exporting_to(cls, endpoint: str, *, ratio: float) -> "OtlpTracer":
        """Return a tracer that hands its spans to a collector, in batches and on a thread of its own."""
        telling = _Telling(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT))
        return cls(BatchSpanProcessor(telling), ratio=ratio, closing=telling)

    def draw(self, request_id: str, parent: TraceParent | None) -> Span | None:
        """Return the span of a request, or None for one that was not drawn; the caller's flags are not asked."""
        if int(request_id, 16) >= self._drawn:
            return None
        context = Context()
        if parent is not None:
            caller = SpanContext(
                int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=TraceFlags.get_default()
            )
            context = set_span_in_context(NonRecordingSpan(caller), context)
        return _Traced(self._tracer, self._tracer.start_span("request", context, SpanKind.SERVER))

    def close(self) -> None:
        """Hand over what is left; blocks for a few seconds at most."""
        if self._closing is not None:
            self._closing.end_soon()
        self._provider.shutdown()
