"""Reading what the service answered, without its own code."""

from typing import Any

import httpx2

from tests.support.tokens import parts_of


def unverified_claims(access_token: str) -> dict[str, Any]:
    """Return what an access token says; whether it is signed is looked at by the tests about signatures."""
    return parts_of(access_token)[1]


def key_id(access_token: str) -> str:
    """Return the `kid` of an access token."""
    found: str = parts_of(access_token)[0]["kid"]
    return found


def refused(answer: httpx2.Response, error: str, status: int = 400) -> str:
    """Assert an OAuth refusal that nobody may cache, and return its description (RFC 6749 §5.2)."""
    assert (answer.status_code, answer.json().get("error")) == (status, error), answer.text
    assert set(answer.json()) == {"error", "error_description"}
    assert answer.headers["cache-control"] == "no-store"
    description: str = answer.json()["error_description"]
    return description
