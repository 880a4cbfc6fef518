"""The log: one JSON line per event, in words of our own, with the ids of its request and its trace."""

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog
from pydantic_core import PydanticSerializationError, to_json

from identity_service.infra.telemetry.tracing import current_trace_id

_SECRET_NAMES = {
    *("password", "secret", "client_secret", "token", "refresh_token", "access_token", "code", "code_verifier"),
    *("authorization", "cookie", "api_key", "master_key", "idempotency_key"),
}


def _redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank what is named like a secret: the second net, under values that already cannot print themselves."""
    for name in _SECRET_NAMES & event.keys():
        event[name] = "[redacted]"
    return event


def _name_trace(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the trace that the request belongs to, if its caller or we ourselves have named one."""
    if (trace_id := current_trace_id()) is not None:
        event["trace_id"] = trace_id
    return event


_ENCODER = json.JSONEncoder(default=repr, separators=(",", ":"))


def _to_json(event: Mapping[str, Any], **_options: object) -> str:
    """Return one line of ASCII; the quick way for the usual line, the thorough one for what it cannot spell."""
    try:
        line = to_json(event, fallback=repr)
    except PydanticSerializationError:
        return _ENCODER.encode(event)
    return line.decode("ascii") if line.isascii() else _ENCODER.encode(event)


def configure_logging(*, level: str = "INFO", as_json: bool = True, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's logging to `stream` (standard output), one line per event."""
    stream = stream or sys.stdout
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _name_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json)]
        if as_json
        # A traceback with the values of local variables, the library's default, would show passwords.
        else [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # What a collector answered, or an address that did not, in its own words; `otlp` says in ours that spans were lost.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
