"""Reading what the service answered, without its own code."""

import base64
import json
from typing import Any

import httpx2


def unverified_claims(access_token: str) -> dict[str, Any]:
    """Return what an access token says; whether it is signed is looked at by the tests about signatures."""
    body = access_token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims


def key_id(access_token: str) -> str:
    """Return the `kid` of an access token."""
    header = access_token.split(".")[0]
    found: str = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["kid"]
    return found


def refused(answer: httpx2.Response, error: str, status: int = 400) -> str:
    """Assert an OAuth refusal that nobody may cache, and return its description (RFC 6749 §5.2)."""
    assert (answer.status_code, answer.json().get("error")) == (status, error), answer.text
    assert set(answer.json()) == {"error", "error_description"}
    assert answer.headers["cache-control"] == "no-store"
    description: str = answer.json()["error_description"]
    return description
