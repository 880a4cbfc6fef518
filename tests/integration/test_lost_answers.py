"""The network between the service and its database fails at the worst moment, in this process and in one of its own."""

from typing import Any

import httpx2
import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.server_process import ServerProcess
from tests.support.service import running, test_settings
from tests.support.waiting import wait_until

KEY = "a-key-of-one-rotation"


@pytest.mark.case("OPS-03")
@pytest.mark.case("REF-05")
@pytest.mark.parametrize(
    ("place", "generations"),
    [
        ({"deliver": False}, {0}),
        ({}, {0, 1}),
        ({"stream": "to_client", "deliver": False}, {1}),
    ],
    ids=["COMMIT is lost", "COMMIT is sent", "its answer is lost"],
)
async def test_who_does_not_know_whether_it_was_committed_asks_again_and_gets_the_one_successor(
    database_url: str, redis_url: str, place: dict[str, Any], generations: set[int]
) -> None:
    """503 with Retry-After, never a refusal; whatever became of the first request, the second rotates once in all."""
    async with FaultProxy.before(database_url) as proxy:
        settings = test_settings(proxy.through(database_url), redis_url=redis_url, key_poll=5)
        async with running(settings) as service:
            client, user = await service.a_client(), await service.a_user()
            token = (await service.sign_in(client, user))["refresh_token"]
            proxy.cut_after(b"COMMIT", **place)
            lost = await service.refresh(client, token, key=KEY)
            assert proxy.cuts == 1
            assert (lost.status_code, lost.json()["error"]) == (503, "temporarily_unavailable")
            assert int(lost.headers["retry-after"]) >= 1
            (family,) = await service.family_rows()
            assert family.generation in generations
            again = await service.refresh(client, token, key=KEY)
            assert again.status_code == 200
            (family,) = await service.family_rows()
            assert (family.generation, family.revoked_at) == (1, None)
            assert (await service.refresh(client, again.json()["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-01")
def test_a_server_process_notices_that_the_network_is_away_and_that_it_is_back(
    database_url: str, redis_url: str
) -> None:
    """Without a restart; the documents are served all the while."""
    with (
        FaultProxy.before(database_url) as proxy,
        ServerProcess(proxy.through(database_url), redis_url) as server,
        httpx2.Client(base_url=server.url, timeout=60) as http,
    ):

        def wait_for_readiness(status: int) -> None:
            wait_until(lambda: http.get("/readyz").status_code == status, f"/readyz does not become {status}")

        document = http.get("/.well-known/jwks.json").content
        assert proxy.connections > 0
        proxy.refuse()
        proxy.cut()
        wait_for_readiness(503)
        assert http.get("/.well-known/jwks.json").content == document
        assert http.get("/healthz").status_code == 200
        proxy.heal()
        wait_for_readiness(200)
