"""What every refusal of the protocol's endpoints has in common, looked at in one place."""

import json
import re
from typing import Any

import httpx2
from sqlalchemy import func, select

from identity_service.infra.tables import audit_events, refresh_families
from tests.support.service import Service

# RFC 6749 §5.2, RFC 8707 §2, RFC 7009 §2.2.1; the last is the word for trouble behind the service.
CODES = frozenset(
    (
        *("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type"),
        *("invalid_scope", "invalid_target", "unsupported_token_type", "temporarily_unavailable"),
    )
)
_DESCRIPTION = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]+")
_INTERNALS = re.compile(
    r"Traceback|File \"|sqlalchemy|psycopg|sqlite|redis|SELECT |INSERT |UPDATE |pydantic|Exception|Error\b|\.py"
)
_SHORTEST_ECHO = 4


def refusal(answer: httpx2.Response, code: str, *sent: str, status: int = 400) -> str:
    """
    Assert that an answer is the refusal `code` and nothing else, and return its description.

    Nothing of what was `sent` may stand in it, nor anything about the inside of the service; nobody may cache it.
    """
    assert (answer.status_code, answer.headers.get("content-type")) == (status, "application/json"), answer.text
    body: dict[str, Any] = json.loads(answer.content.decode("ascii"))
    assert body["error"] == code, answer.text
    assert code in CODES
    assert set(body) <= {"error", "error_description", "error_uri"}
    assert _DESCRIPTION.fullmatch(body["error_description"]), body["error_description"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert "set-cookie" not in answer.headers
    assert "location" not in answer.headers
    everything = answer.text + "".join(value for name, value in answer.headers.items() if name != "x-request-id")
    assert not _INTERNALS.search(everything), everything
    for value in sent:
        assert len(value) < _SHORTEST_ECHO or value not in everything, "the refusal repeats what was sent"
    challenged = "www-authenticate" in answer.headers
    assert challenged == ("authorization" in answer.request.headers and status == 401)
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    description: str = body["error_description"]
    return description


async def written(service: Service) -> tuple[Any, ...]:
    """Return all that a request to the token endpoint can have written: families as they stand, and audit rows."""
    count = await service.execute(select(func.count()).select_from(audit_events))
    return (*await service.execute(select(refresh_families).order_by(refresh_families.c.id)), count[0][0])
