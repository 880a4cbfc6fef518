"""Traces: what a span holds and what it never holds, whose traces they are, and a collector that is away."""

import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from structlog.testing import capture_logs

from identity_service.infra.telemetry.otlp import OtlpTracer, _Telling
from identity_service.main import create_app
from identity_service.settings import UnsafeSettings, load_settings
from tests.attacks.test_secrets_in_logs import Canaries, drive, prepared
from tests.support.metrics import counted
from tests.support.server_process import ServerProcess
from tests.support.servers import free_port
from tests.support.service import ISSUER, PASSWORD, Service, running, test_settings

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
ATTRIBUTES = set(re.findall(r"`((?:http|error|db|identity)\.[a-z_.]+)`", PAGE))
RESOURCE = {
    *("service.name", "service.version", "service.instance.id"),
    *("telemetry.sdk.language", "telemetry.sdk.name", "telemetry.sdk.version"),
}


class Traced:
    """A service whose every request is traced, and the spans."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = OtlpTracer(SimpleSpanProcessor(self.exporter), ratio=ratio)

    def spans(self) -> list[ReadableSpan]:
        """Return the spans that ended since the last time."""
        ended = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return ended


@pytest.fixture
def traced() -> Traced:
    return Traced()


@pytest.fixture
async def service(database_url: str, redis_url: str, traced: Traced) -> AsyncIterator[Service]:
    async with running(test_settings(database_url, redis_url=redis_url), tracer=traced.tracer) as service:
        traced.spans()
        yield service


def everything_in(spans: list[ReadableSpan]) -> str:
    return "\n".join(span.to_json() for span in spans)


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


# -- what is in them --------------------------------------------------------------------------------------------------


async def test_a_sign_in_is_a_request_with_its_transactions_and_its_hash(service: Service, traced: Traced) -> None:
    """Each with its time; the request says what its log line says."""
    client, user = await service.a_client(), await service.a_user()
    answer = await service.token(client, grant_type="password", username=user.username, password=PASSWORD)
    *pieces, request = traced.spans()
    assert request.name == "POST /token"
    assert request.kind is SpanKind.SERVER
    assert request.parent is None
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/token",
        "http.response.status_code": 200,
        "identity.request_id": answer.headers["x-request-id"],
        "identity.client_id": client.id,
    }
    names = [piece.name for piece in pieces]
    assert set(names) == {"database.transaction", "password.hash"}
    assert names.count("password.hash") == 1
    for piece in pieces:
        assert piece.parent is not None
        assert request.context is not None
        assert piece.parent.span_id == request.context.span_id
        assert id_of(piece) == id_of(request)
        assert request.start_time <= piece.start_time <= piece.end_time <= request.end_time  # type: ignore[operator]
    systems = {piece.attributes["db.system.name"] for piece in pieces if piece.name == "database.transaction"}  # type: ignore[index]
    assert systems == {"postgresql"}


async def test_what_the_service_does_by_itself_is_no_trace(service: Service, traced: Traced) -> None:
    """Its jobs' transactions belong to no request."""
    await service.run_job("cleanup")
    await service.within(service.services.signing_keys.poll)
    assert traced.spans() == []


@pytest.mark.case("SEC-01")
async def test_a_fault_is_told_by_its_status_and_in_nobody_elses_words(
    service: Service, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception's text may hold anything, and the library's default is to attach it with its traceback."""

    async def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(type(service.services.clients), "find", fail)
    answer = await service.http.post("/token", data={"grant_type": "password", "client_id": "cl_x"})
    assert answer.status_code == 500
    request = traced.spans()[-1]
    assert request.status.status_code is StatusCode.ERROR
    assert request.status.description is None
    assert request.events == ()
    assert request.attributes is not None
    assert request.attributes["error.type"] == "500"
    assert request.attributes["identity.reason"] == "fault"
    assert "planted" not in request.to_json()


@pytest.mark.case("SEC-01")
async def test_spans_hold_nothing_but_what_is_listed(service: Service, traced: Traced) -> None:
    """No address with its query, no header, no statement, no name; whatever is asked, in whatever way."""
    client, user = await service.a_client(), await service.a_user("kanarie", email="kanarie@example.org")
    tokens = await service.sign_in(client, user)
    canaries = [PASSWORD, "kanarie", client.secret or "", *(tokens[name] for name in ("access_token", "refresh_token"))]
    canaries += ["Kanarienvogel", "198.51.100.7", "python-httpx2", str(user.id)]
    bearer = {"authorization": f"Bearer {tokens['access_token']}", "x-forwarded-for": "198.51.100.7"}
    await service.refresh(client, tokens["refresh_token"])
    await service.refresh(client, tokens["refresh_token"])
    await service.introspect(client, tokens["access_token"])
    await service.revoke(client, tokens["access_token"])
    await service.token(client, grant_type="password", username="kanarie", password="Kanarienvogel")
    await service.token(client, grant_type="Kanarienvogel", scope="Kanarienvogel")
    for path in ("/v1/users/me", f"/v1/admin/users/{user.id}", "/Kanarienvogel", "/v1/auth/verify-email"):
        await service.http.get(
            path, params={"token": "Kanarienvogel", "state": tokens["refresh_token"]}, headers=bearer
        )
    await service.http.request("KANARIENVOGEL", "/token")
    spans = traced.spans()
    assert len(spans) > 20
    text = everything_in(spans)
    assert [canary for canary in canaries if canary.lower() in text.lower()] == []
    assert len(ATTRIBUTES) == 8
    for span in spans:
        assert span.attributes is not None
        assert set(span.attributes) <= ATTRIBUTES
        assert (span.events, span.links, span.status.description) == ((), (), None)
        assert set(span.resource.attributes) <= RESOURCE
    routes = {span.attributes["http.route"] for span in spans if "http.route" in (span.attributes or ())}
    assert routes == {
        *("/token", "/introspect", "/revoke", "/v1/users/me", "/v1/admin/users/{user_id}", "unmatched"),
    }
    assert "_OTHER /token" in {span.name for span in spans}


# -- whose trace it is ------------------------------------------------------------------------------------------------


async def test_a_callers_trace_goes_on_and_its_flag_decides_nothing(service: Service, traced: Traced) -> None:
    """With the flag of a trace that is not recorded, and with the other one."""
    for flags in ("00", "01"):
        await service.http.get("/healthz", headers={"traceparent": f"00-{TRACE}-{SPAN}-{flags}"})
        [request] = traced.spans()
        assert id_of(request) == TRACE
        assert request.parent is not None
        assert format_span_id(request.parent.span_id) == SPAN


@pytest.mark.case("SEC-03")
@pytest.mark.parametrize(
    "text",
    [
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        "x",
        f"00-{TRACE}-{SPAN}-01-x",
    ],
)
async def test_a_malformed_traceparent_begins_a_trace_of_our_own(service: Service, traced: Traced, text: str) -> None:
    """As if none had been sent; a tracestate is nobody's here."""
    await service.http.get("/healthz", headers={"traceparent": text, "tracestate": "vendor=Kanarienvogel"})
    [request] = traced.spans()
    assert request.parent is None
    assert id_of(request) not in (TRACE, "0" * 32)
    assert "Kanarienvogel" not in request.to_json()


async def test_nobody_can_have_a_request_traced_that_was_not_drawn(database_url: str) -> None:
    """Or a stranger would choose what tracing costs."""
    none = Traced(ratio=0)
    async with running(test_settings(database_url), tracer=none.tracer) as service:
        for _ in range(20):
            await service.http.get("/healthz", headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert none.spans() == []


async def test_the_share_that_is_asked_for_is_traced(database_url: str) -> None:
    """Drawn by the request's own id, so of 400 at a half some 200: fewer than 120 are one in 10^15."""
    half = Traced(ratio=0.5)
    async with running(test_settings(database_url), tracer=half.tracer) as service:
        for _ in range(400):
            await service.http.get("/healthz")
    assert 120 < len(half.spans()) < 280


async def test_the_log_and_the_spans_name_the_same_trace(database_url: str, traced: Traced) -> None:
    """Also where the trace is our own; and without a tracer a line names the caller's."""
    lines: list[dict[str, Any]] = []

    def note(_logger: object, _method: str, event: dict[str, Any]) -> str:
        lines.append(dict(event))
        raise structlog.DropEvent

    processors = structlog.get_config()["processors"]
    for tracer in (traced.tracer, None):
        async with running(test_settings(database_url, access_log=True), tracer=tracer) as service:
            structlog.configure(processors=[*processors[:-1], note])
            try:
                lines.clear()
                await service.http.get("/nothing")
                await service.http.get("/nothing", headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
                await service.http.get("/nothing")
            finally:
                structlog.configure(processors=processors)
        named = [line.get("trace_id") for line in lines if line["event"] == "request"]
        ours = [id_of(span) for span in traced.spans() if span.name.startswith("GET")]
        assert named == (ours if tracer else [None, TRACE, None])
        assert named[1] == TRACE


# -- a whole server ---------------------------------------------------------------------------------------------------


@contextmanager
def a_collector() -> Iterator[tuple[str, list[bytes]]]:
    """Run what takes OTLP over HTTP; give its address and the bodies that it was sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.case("SEC-01")
def test_no_secret_reaches_the_collector(database_url: str, redis_url: str) -> None:
    """The bytes that a server sends when every way in and out was used; its last spans leave when it stops."""
    client_id, secret, user_id = prepared(database_url)
    with a_collector() as (endpoint, bodies):
        traces = {"traces_endpoint": endpoint, "traces_ratio": "1"}
        with ServerProcess(database_url, redis_url, issuer=ISSUER, log_level="DEBUG", **traces) as server:
            with httpx2.Client(base_url=server.url, timeout=30) as http:
                canaries: Canaries = drive(http, client_id, secret)
            assert server.stop() == 0
            canaries.absent_from(server.log_text(), "the log")
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {"POST /token", "database.transaction", "password.hash", "GET unmatched"} <= {span.name for span in spans}
    sent = "\n".join(body.decode("latin-1") for body in bodies)
    canaries.absent_from(sent, "the spans")
    for personal in (user_id, "kanarie", "127.0.0.1", "httpx"):
        assert personal not in sent.lower()
    assert client_id in sent


@pytest.mark.parametrize("silent", [False, True], ids=["away", "silent"])
def test_a_collector_that_fails_holds_up_neither_the_service_nor_its_end(database_url: str, silent: bool) -> None:
    """It is said once, in words of ours, when the server still has spans and gives up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if silent else free_port()
        nowhere = {"traces_endpoint": f"http://127.0.0.1:{port}/v1/traces", "traces_ratio": "1"}
        with ServerProcess(database_url, **nowhere) as server:
            with httpx2.Client(base_url=server.url, timeout=30) as http:
                for _ in range(50):
                    assert http.get("/.well-known/jwks.json").status_code == 200
            assert server.stop() == 0
            log = server.log_text()
    assert log.count("traces.changed") == 1
    assert "HTTPConnection" not in log
    assert "Traceback" not in log


def test_spans_that_were_not_taken_are_counted() -> None:
    """And when they are taken again the log says so, too."""
    inner, fails = InMemorySpanExporter(), [False, True, True, False]

    class Moody(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if fails.pop(0):
                raise RuntimeError("planted")
            return inner.export(spans)

    tracer = OtlpTracer(SimpleSpanProcessor(_Telling(Moody())), ratio=1)
    with capture_logs() as said, counted(2, "identity_traces_lost_total"):
        for _ in range(4):
            span = tracer.draw("00" * 8, None)
            assert span is not None
            span.end(name="GET /healthz")
    assert [(line["event"], line.get("lost")) for line in said if line["event"] == "traces.changed"] == [
        ("traces.changed", True),
        ("traces.changed", False),
    ]
    assert "planted" not in repr(said)
    assert len(inner.get_finished_spans()) == 2


def test_nothing_is_traced_unless_it_is_asked_for(database_url: str) -> None:
    """Nor is the library for it loaded."""
    script = (
        "import sys; from tests.support.service import test_settings; from identity_service.main import create_app;"
        f" app = create_app(test_settings({database_url!r})); app.state.services.hasher.close();"
        " sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_without_the_extra_the_start_is_refused_in_a_sentence(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than run untraced where somebody relies on it."""
    for name in [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "identity_service.infra.telemetry.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(UnsafeSettings, match=r"pip install identity-service\[otel\]"):
        create_app(test_settings(database_url, traces_endpoint="http://127.0.0.1:4318/v1/traces"))


@pytest.mark.parametrize(
    "endpoint",
    [
        *("collector:4318", "grpc://collector:4317", "http://", "http://user:word@collector/v1/traces"),
        *("http://collector/v1/traces?key=word", "http://collector:0/v1/traces", "http://collector:99999/v1/traces"),
    ],
)
def test_an_endpoint_that_cannot_be_meant_is_refused(endpoint: str) -> None:
    """Least of all one with a secret in it: addresses get into messages."""
    with pytest.raises(UnsafeSettings, match=r"IDENTITY_TRACES_ENDPOINT: .*http://collector:4318/v1/traces") as caught:
        load_settings(environment="development", traces_endpoint=endpoint)
    assert "word" not in str(caught.value)
