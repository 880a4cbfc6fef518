"""The one table from exception to response: OAuth JSON for the protocol's endpoints, problem+json for the JSON API."""

import json
from typing import Any

import structlog

from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.outbox import MailQueueFull
from identity_service.infra.runtime.hashing import HashingBusy
from identity_service.infra.telemetry.metrics import LIMITS_HIT
from identity_service.oauth.errors import InvalidClient, OAuthError, TooManyRequests, Unavailable
from identity_service.oauth.signing_keys import NoUsableKey
from identity_service.web.asgi import JSON, NO_STORE, HeaderList, Reply, Scope

log = structlog.get_logger(__name__)

_PROBLEM = (b"content-type", b"application/problem+json")
_RETRY_AFTER = 2  # seconds
_MAIL_RETRY_AFTER = 60  # seconds; mails leave more slowly than anything else here


def as_oauth(error: Exception) -> OAuthError | None:
    """Return the protocol's word for an exception, or None for a fault of ours."""
    if isinstance(error, OAuthError):
        return error
    if isinstance(error, DatabaseUnavailable):
        return Unavailable(reason="database_unavailable", retry_after=_RETRY_AFTER)
    if isinstance(error, NoUsableKey):
        return Unavailable(reason="no_signing_key", retry_after=_RETRY_AFTER)
    if isinstance(error, HashingBusy):
        return Unavailable(reason="hashing_busy", retry_after=_RETRY_AFTER)
    if isinstance(error, MailQueueFull):
        return Unavailable(reason="mail_queue_full", retry_after=_MAIL_RETRY_AFTER)
    return None


def note_refusal(scope: Scope, error: Exception) -> None:
    """Say in the request's state, for its log line and for who counts refusals, why it is refused."""
    known = as_oauth(error)
    scope["state"]["reason"] = known.reason if known else "fault"
    if isinstance(known, TooManyRequests):
        scope["state"]["limit"] = known.limit


def _retry_headers(error: OAuthError) -> HeaderList:
    if not isinstance(error, Unavailable):
        return []
    seconds = str(error.retry_after).encode("ascii")
    headers = [(b"retry-after", seconds)]
    if isinstance(error, TooManyRequests):
        headers += [(b"ratelimit-remaining", b"0"), (b"ratelimit-reset", seconds)]
    return headers


def oauth_reply(error: Exception, *, basic_was_used: bool = False) -> Reply:
    """Return the answer of a protocol endpoint (RFC 6749 §5.2); logs what is a fault of ours."""
    known = as_oauth(error)
    if known is None:
        log.error("request.failed", exc_info=error)
        body = {"error": "server_error", "error_description": "The service failed. It has been recorded."}
        return Reply(500, json.dumps(body).encode("ascii"), (JSON, *NO_STORE))
    if isinstance(known, TooManyRequests):
        LIMITS_HIT.labels(known.limit).inc()
    headers: HeaderList = [JSON, *NO_STORE, *_retry_headers(known)]
    if basic_was_used and isinstance(known, InvalidClient):
        headers.append((b"www-authenticate", b'Basic realm="token", charset="UTF-8"'))
    body = {"error": known.code, "error_description": known.description}
    return Reply(known.status, json.dumps(body).encode("ascii"), tuple(headers))


def problem(status: int, title: str, *, headers: HeaderList | None = None, **members: Any) -> Reply:
    """Return an RFC 9457 problem; `members` never hold anything that was sent."""
    body = {"type": "about:blank", "title": title, "status": status, **members}
    return Reply(status, json.dumps(body).encode("ascii"), (_PROBLEM, *NO_STORE, *(headers or ())))


def problem_of(error: Exception) -> Reply:
    """Return the answer of the JSON API for an exception; logs what is a fault of ours."""
    known = as_oauth(error)
    if known is None:
        log.error("request.failed", exc_info=error)
        return problem(500, "The service failed. It has been recorded.")
    if isinstance(known, TooManyRequests):
        LIMITS_HIT.labels(known.limit).inc()
    return problem(known.status, known.description, headers=_retry_headers(known))
