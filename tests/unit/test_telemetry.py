"""What is counted, what a trace is known by, and what the log says of it; without a server."""

import ast
import json
import re
from datetime import UTC, datetime, timedelta
from io import StringIO
from math import isnan
from pathlib import Path

import pytest
import structlog

from identity_service.infra.telemetry import configure_logging, metrics
from identity_service.infra.telemetry.metrics import MOST_CLIENTS, count_request, count_token
from identity_service.infra.telemetry.tracing import TraceParent, begin_request, child_span, traceparent_of
from identity_service.oauth.signing_keys import KeyPolicy, KeyRecord, plan, signer
from identity_service.oauth.signing_keys.figures import show_schedule
from tests.support.metrics import counted, families, label_sets, value

ROOT = Path(__file__).parents[2]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


# -- counting ---------------------------------------------------------------------------------------------------------


def test_metrics_are_defined_in_one_module() -> None:
    """Whoever looks for a metric finds it beside all others, and the tests that compare them miss none."""
    importers = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "identity_service").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prometheus_client")
    ]
    assert importers == ["identity_service/infra/telemetry/metrics.py"]


def test_a_metric_is_named_for_what_it_counts_and_its_unit() -> None:
    """Counters end in `_total`, times say seconds, and no label can name a person."""
    found = families()
    assert len(found) > 25
    for name, family in found.items():
        assert re.fullmatch(r"identity_[a-z_]+", name)
        assert name.endswith("_total") == (family.kind == "counter"), name
        assert ("_seconds" in name) == bool(re.search(r"\bTime\b|Unix time|\bwhen\b|How often", family.text, re.I)), (
            name
        )
        assert set(family.labels) <= {
            *("method", "route", "status", "outcome", "limit", "grant", "client", "verdict", "state", "reason"),
            *("kind", "job_name", "which"),
        }, name


def test_requests_are_counted_by_route_and_status_and_timed_by_outcome() -> None:
    """Refusals leave late on purpose, so their times stand apart."""
    route = "/of-this-test"
    for status in (200, 304, 400, 429, 500, 503):
        with counted(2, "identity_http_requests_total", method="POST", route=route, status=str(status)):
            count_request("POST", route, status, 0.004)
            count_request("POST", route, status, 3.0)
    for outcome, times in (("answered", 4), ("refused", 4), ("failed", 4)):
        shown = {"route": route, "outcome": outcome}
        assert value("identity_http_request_seconds_count", **shown) == times
        assert value("identity_http_request_seconds_bucket", **shown, le="0.005") == times / 2
        assert value("identity_http_request_seconds_bucket", **shown, le="2.5") == times / 2
        assert value("identity_http_request_seconds_sum", **shown) == pytest.approx(3.004 * times / 2)


def test_who_left_without_an_answer_is_counted_and_not_timed() -> None:
    """How long they waited says nothing about us."""
    before = label_sets("identity_http_request_seconds_count")
    with counted(1, "identity_http_requests_total", method="POST", route="/of-nobody", status="none"):
        count_request("POST", "/of-nobody", 0, 9.0)
    assert label_sets("identity_http_request_seconds_count") == before


@pytest.mark.case("SEC-11")
def test_invented_methods_are_one_method() -> None:
    """Neither the series nor what they are looked up by can be made to grow."""
    count_request("BREW", "/of-this-test", 405, 0.001)
    kept, series = len(metrics._requests), label_sets("identity_http_requests_total")
    with counted(50, "identity_http_requests_total", method="other", route="/of-this-test", status="405"):
        for number in range(50):
            count_request(f"BREW{number}", "/of-this-test", 405, 0.001)
    assert len(metrics._requests) == kept
    assert label_sets("identity_http_requests_total") == series


@pytest.mark.case("SEC-11")
def test_beyond_a_number_of_clients_the_rest_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may register clients could otherwise fill the memory of whoever scrapes."""
    monkeypatch.setattr(metrics, "_clients", set())
    monkeypatch.setattr(metrics, "_tokens", {})
    first, late = [f"cl_first{number}" for number in range(MOST_CLIENTS)], [f"cl_late{number}" for number in range(50)]
    with counted(2 * len(late), "identity_tokens_total", grant="password", client="other", outcome="issued"):
        for client in (*first, *late, *late, *first):
            count_token("password", client, "issued")
    for client in (first[0], first[-1]):
        assert value("identity_tokens_total", grant="password", client=client, outcome="issued") == 2
    labels = label_sets("identity_tokens_total")
    assert not any("cl_late" in name for series in labels for _, name in series)
    assert len(metrics._tokens) == MOST_CLIENTS


# -- signing keys -----------------------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 31, tzinfo=UTC)
POLICY = KeyPolicy()


def key(kid: str, *, published: float, activates: float, **more: datetime) -> KeyRecord:
    """Return a key by its instants in hours from now."""
    first, second = (NOW + timedelta(hours=hours) for hours in (published, activates))
    return KeyRecord(kid, {}, published_at=first, activates_at=second, **more)


def shown_for(*records: KeyRecord) -> None:
    ready = signer(records, NOW) is not None
    show_schedule(records, plan(records, NOW, POLICY), NOW, ready=ready)


def test_the_schedule_is_shown_as_ages_and_the_time_to_the_next_activation() -> None:
    """A key that signs, one that waits and one that is on its way out."""
    retired = {"retires_at": NOW - timedelta(hours=1), "removed_at": NOW + timedelta(hours=1)}
    shown_for(
        key("next", published=-10, activates=14),
        key("active", published=-48, activates=-24),
        key("retiring", published=-900, activates=-800, **retired),
    )
    for state, hours in (("next", 10), ("active", 48), ("retiring", 900)):
        assert value("identity_signing_keys", state=state) == 1
        assert value("identity_signing_key_age_seconds", state=state) == hours * 3600
    assert value("identity_signing_key_next_activation_seconds") == 14 * 3600
    assert value("identity_signing_key_steps_due") == 0
    assert value("identity_signing_keys_read_timestamp_seconds") == NOW.timestamp()
    assert value("identity_signing_ready") == 1


def test_a_schedule_without_keys_shows_that_nothing_signs_and_what_is_owed() -> None:
    """Two keys to make: one that signs and one that waits."""
    shown_for()
    for state in ("next", "active", "retiring"):
        assert value("identity_signing_keys", state=state) == 0
        assert isnan(value("identity_signing_key_age_seconds", state=state))
    assert isnan(value("identity_signing_key_next_activation_seconds"))
    assert value("identity_signing_key_steps_due") == 2
    assert value("identity_signing_ready") == 0


def test_a_key_without_a_successor_and_one_that_nobody_retired_are_steps_due() -> None:
    """What a late rotation looks like."""
    shown_for(key("old", published=-900, activates=-800), key("active", published=-48, activates=-24))
    assert value("identity_signing_keys", state="next") == 0
    assert value("identity_signing_key_steps_due") == 2


# -- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"00-{TRACE}-{SPAN}-00",
        f"cc-{TRACE}-{SPAN}-01",  # a version to come
        f"01-{TRACE}-{SPAN}-09-what-it-adds",
    ],
)
def test_a_traceparent_is_read(text: str) -> None:
    """Trace Context §3.2; of later versions what the first one has."""
    assert traceparent_of([(b"host", b"x"), (b"traceparent", text.encode())]) == TraceParent(TRACE, SPAN)


MALFORMED = [
    *("", "-", "00", GOOD[:-1], GOOD + "0", GOOD + "-", GOOD + "-more", " " + GOOD, GOOD + " ", GOOD + "\n"),
    *(GOOD.upper(), f"ff-{TRACE}-{SPAN}-01", f"0-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01"),
    *(f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}-xy", f"00_{TRACE}_{SPAN}_01", f"00-{TRACE[1:]}g-{SPAN}-01"),
    *(f"01-{TRACE}-{SPAN}-01x", f"00-{TRACE}\n-{SPAN}-01", '","event":"forged"', GOOD + "," + GOOD, "\ud7ff" * 55),
]


@pytest.mark.case("SEC-03")
@pytest.mark.parametrize("text", MALFORMED)
def test_a_traceparent_that_is_malformed_is_as_none(text: str) -> None:
    """So nothing that a stranger spells gets into a line or a span."""
    assert traceparent_of([(b"traceparent", text.encode())]) is None


def test_two_traceparents_are_as_none() -> None:
    """Which one would it be?"""
    assert traceparent_of([(b"traceparent", GOOD.encode())] * 2) is None
    assert traceparent_of([]) is None


def log_of(*headers: tuple[bytes, bytes]) -> dict[str, str]:
    """Return the line that is logged within a request with these headers."""
    stream = StringIO()
    kept = structlog.get_config()
    try:
        configure_logging(stream=stream)
        begin_request(headers, "00" * 8, None)
        structlog.get_logger().info("something")
    finally:
        structlog.configure(**kept)
    line: dict[str, str] = json.loads(stream.getvalue())
    return line


def test_a_line_names_the_trace_of_its_request_and_of_no_other() -> None:
    """Also where one task serves both, one after the other."""
    assert log_of((b"traceparent", GOOD.encode()))["trace_id"] == TRACE
    assert "trace_id" not in log_of()
    assert "trace_id" not in log_of((b"traceparent", GOOD.upper().encode()))


def test_where_nothing_is_traced_a_piece_of_a_request_is_nothing() -> None:
    """It can be ended like any other."""
    begin_request([], "00" * 8, None)
    span = child_span("password.hash")
    assert span.child("within", {}) is span
    span.end(failed="x")
    assert child_span("database.transaction") is span
