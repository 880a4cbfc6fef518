"""A fault of ours is answered in the service's own words, and tells nobody anything."""

import asyncio
from typing import Any

import pytest
import uvicorn
from sqlalchemy import Integer, func, select, text

from identity_service.infra.database import Database, DatabaseUnavailable
from identity_service.web.edge import PROTECTION
from identity_service.web.protocol import BoundedProtocol
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


@pytest.mark.case("OPS-03")
@pytest.mark.parametrize("toolkit_too", [False, True], ids=["driver alone", "driver and toolkit"])
async def test_a_backend_that_dies_before_commit_is_unavailability_and_no_fault(
    service: Service, toolkit_too: bool
) -> None:
    """Whichever way the transaction went to the database, its lost COMMIT is told apart from a fault of ours."""
    own_pid = text("SELECT pg_backend_pid() AS pid").columns(pid=Integer())

    async def work() -> None:
        async with service.services.db.transaction() as tx:
            row = await tx.fetch_hot(own_pid, {})
            assert row is not None
            if toolkit_too:
                await tx.execute(select(1))
            await service.execute(select(func.pg_terminate_backend(row[0])))

    with pytest.raises(DatabaseUnavailable):
        await work()
    assert await service.execute(select(1)) == [(1,)]


async def _answer_to(begin: bytes) -> bytes:
    """Return what a server whose patience is a tenth of a second answers to the beginning of a request."""

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        raise AssertionError("there is no whole request")

    config = uvicorn.Config(app, port=0, http=BoundedProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
        return answer
    finally:
        await server.shutdown()


@pytest.mark.case("INP-09")
@pytest.mark.case("INP-23")
@pytest.mark.parametrize(
    "begin", [b"", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow: "], ids=["nothing", "half a head"]
)
async def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    """408, with the headers that every answer has, and the connection is closed."""
    monkeypatch.setattr(BoundedProtocol, "head_deadline", 0.1)
    answer = await _answer_to(begin)
    assert answer.startswith(b"HTTP/1.1 408 ")
    for name, value in PROTECTION:
        assert b"\r\n" + name + b": " + value + b"\r\n" in answer
