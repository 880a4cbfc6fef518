"""
Logs, metrics and traces: one JSON line per event, a few dozen metrics, spans where somebody asked for them, and never a
secret in any of them.
"""

from identity_service.infra.telemetry.logs import configure_logging
from identity_service.infra.telemetry.metrics import EXPOSITION_TYPE, exposition
from identity_service.infra.telemetry.tracing import Span, Tracer, child_span

__all__ = ["EXPOSITION_TYPE", "Span", "Tracer", "child_span", "configure_logging", "exposition"]
