"""A fault of ours is answered in the service's own words, and tells nobody anything."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvicorn
from sqlalchemy import Integer, func, select, text

from identity_service.infra.database import Database, DatabaseUnavailable
from identity_service.web.asgi import AsgiApp
from identity_service.web.edge import PROTECTION
from identity_service.web.protocol import BoundedProtocol
from tests.support.service import Service
from tests.support.waiting import until


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


@asynccontextmanager
async def _listening(app: AsgiApp, **options: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server for an application, and its port."""
    config = uvicorn.Config(app, port=0, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.shutdown()


async def _answer_to(begin: bytes) -> bytes:
    """Return what a server whose patience is a tenth of a second answers to the beginning of a request."""

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        raise AssertionError("there is no whole request")

    async with _listening(app) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        await writer.wait_closed()
        return answer


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


def _large_answer(*headers: tuple[bytes, bytes]) -> AsgiApp:
    """An application whose every answer is more than fits in between."""
    body = b"x" * 16 * 1024 * 1024

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        head = [(b"content-length", str(len(body)).encode("ascii")), *headers]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(2):
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
        await send({"type": "http.response.body"})

    return app


@asynccontextmanager
async def _reading_nothing(port: int, requests: int = 1) -> AsyncIterator[None]:
    """A client that has asked, and does not read."""
    loop = asyncio.get_running_loop()
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.setblocking(False)
        await loop.sock_connect(line, ("127.0.0.1", port))
        await loop.sock_sendall(line, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * requests)
        yield


@pytest.mark.case("INP-09")
@pytest.mark.parametrize("headers", [(), ((b"connection", b"close"),)], ids=["kept", "being closed"])
async def test_an_answer_that_nobody_reads_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    """Also one whose connection is closed already: closing waits until everything was taken."""
    monkeypatch.setattr(BoundedProtocol, "unread_deadline", 0.5)
    async with _listening(_large_answer(*headers)) as (server, port), _reading_nothing(port):
        state = server.server_state
        await until(lambda: state.connections)
        await until(lambda: not state.connections and not state.tasks)


@pytest.mark.case("INP-09")
async def test_who_reads_no_answer_gives_way_to_the_newcomer() -> None:
    """It asks for much and takes nothing: that is no request in progress which anybody would have to wait for."""
    async with _listening(_large_answer(), limit_concurrency=2) as (server, port), AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(_reading_nothing(port, requests=2))
        state = server.server_state
        await until(lambda: len(state.connections) == 2 and all(each.flow.write_paused for each in state.connections))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        assert len(state.connections) == 2
        writer.transport.abort()


@pytest.mark.case("INP-09")
async def test_few_requests_wait_in_one_connection() -> None:
    """Thousands fit into what is read at once, and each takes a hundred times its size here; they are not answered."""
    begun = 0

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        nonlocal begun
        begun += 1
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with _listening(app) as (_, port):
        for count in (BoundedProtocol.most_waiting + 1, BoundedProtocol.most_waiting + 2):
            begun = 0
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * (count - 1) + last)
            answered = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            if count == BoundedProtocol.most_waiting + 1:
                assert answered.count(b"HTTP/1.1 204 ") == begun == count
            else:
                assert answered == b"", "nor is anything said that could be taken for the answer to one of them"
                assert begun <= 1


async def test_requests_that_come_while_others_wait_are_read_when_those_were_answered() -> None:
    """However many there are: nobody who sends a few at a time is cut off."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await asyncio.sleep(0.001)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with _listening(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        few = 50
        for number in range(10):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * few)
            await until(lambda number=number: server.server_state.total_requests > number * few)  # type: ignore[misc]
        await until(lambda: server.server_state.total_requests == 10 * few)
        answered = b""
        async with asyncio.timeout(60):
            while answered.count(b"HTTP/1.1 204 ") < 10 * few:  # who closes reads no more, also of what has arrived
                piece = await reader.read(65536)
                assert piece, f"{answered.count(b'HTTP/1.1 204 ')} were answered"
                answered += piece
        writer.close()


async def test_whom_the_server_hangs_up_on_leaves_nothing_behind() -> None:
    """Nobody waits for a client that is gone, nor is it shed in the place of one that is there."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 16 * 1024 * 1024, "more_body": True})
        await send({"type": "http.response.body"})

    async with _listening(app) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2)  # of two requests, the server tells one that it is lost
        state = server.server_state
        await until(lambda: state.connections and next(iter(state.connections)).flow.write_paused)
        next(iter(state.connections)).transport.abort()
        await until(lambda: not state.connections and not state.tasks)
        writer.close()
        assert not BoundedProtocol._idle_of[state]
