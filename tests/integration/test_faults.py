"""A fault of ours is answered in the service's own words, and tells nobody anything."""

import pytest

from identity_service.infra.database import Database
from tests.support.service import Service


async def test_a_fault_on_the_json_api_is_a_problem_without_details(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500, `application/problem+json`, no-store, the edge's headers, and nothing of the exception."""
    client, user = await service.a_client(), await service.a_user()
    token = (await service.sign_in(client, user))["access_token"]

    def broken(_db: Database) -> None:
        raise RuntimeError("a canary in the exception")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "transaction", broken)
        answer = await service.me(token)
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    assert "canary" not in answer.text
    assert (await service.me(token)).status_code == 200
