"""
Logs and metrics: one JSON line per event, a handful of counters, and never a secret in either.

Metrics carry no user, address or token, and every label has few values, so that nobody outside can make them grow.
"""

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest
from pydantic_core import PydanticSerializationError, to_json

TOKENS = Counter(
    "identity_tokens_total", "Token requests, by grant, client and outcome.", ["grant", "client", "outcome"]
)
REFRESH_VERDICTS = Counter(
    "identity_refresh_verdicts_total", "Refresh tokens that were refused, by verdict.", ["verdict"]
)
LIMITS_HIT = Counter("identity_limits_hit_total", "Requests refused by a limit.", ["limit"])
LIMITER_DEGRADED = Gauge("identity_limiter_degraded", "1 while limits are kept in this process because Redis is away.")
SIGNING_KEYS_BROKEN = Gauge("identity_signing_keys_unusable", "Published signing keys that could not be unwrapped.")

CONNECTIONS_SHED = Counter(
    "identity_connections_shed_total",
    "Connections ended because there were too many: idle ones, or new ones.",
    ["which"],
)

_SECRET_NAMES = {
    *("password", "secret", "client_secret", "token", "refresh_token", "access_token", "code", "code_verifier"),
    *("authorization", "cookie", "api_key", "master_key", "idempotency_key"),
}


def _redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank what is named like a secret: the second net, under values that already cannot print themselves."""
    for name in _SECRET_NAMES & event.keys():
        event[name] = "[redacted]"
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


EXPOSITION_TYPE = CONTENT_TYPE_LATEST
"""The content type of what `exposition` returns."""


def exposition() -> bytes:
    """Return everything that is counted in this process, in the text format of Prometheus."""
    return generate_latest()
