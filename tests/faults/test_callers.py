"""Callers who are slow, too many, or gone before they are answered cost the others nothing."""

import asyncio
import contextlib
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlencode

import pytest

from tests.faults.asking import connected
from tests.faults.crowd import at_work
from tests.faults.invariants import breaches, left_open
from tests.faults.stage import Replica, Stage

PATIENCE = 40.0  # seconds for what takes ten
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
FORM = "Content-Type: application/x-www-form-urlencoded\r\n"
BEGINNINGS = {
    "half a head": "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "half a form": f"POST /token HTTP/1.1\r\nHost: 127.0.0.1\r\n{FORM}Content-Length: 50\r\n\r\ngrant",
    "half a JSON document": (
        "POST /v1/users HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    ),
}


@contextlib.asynccontextmanager
async def connection_to(replica: Replica) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield both ends of a connection, closed in the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", replica.server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def dawdle(replica: Replica, beginning: str) -> int:
    """Begin a request, wait, and return the status of what is answered."""
    async with connection_to(replica) as (reader, writer), asyncio.timeout(PATIENCE):
        writer.write(beginning.encode())
        line = await reader.readline()
        return int(line.split()[1]) if line else 0


@pytest.mark.case("INP-09")
async def test_slow_callers_are_not_waited_for_and_hold_up_nobody(stage: Stage) -> None:
    """A hundred of them at two replicas, each told after ten seconds that it took too long."""
    async with at_work(stage) as crowd:
        slow = [
            asyncio.create_task(dawdle(replica, beginning))
            for replica in stage.replicas
            for beginning in BEGINNINGS.values()
            for _ in range(17)
        ]
        await crowd.busy(60)
        answered = await asyncio.gather(*slow)
        assert set(answered) == {408, 400}
        await crowd.busy(10)
        await crowd.stop()
        assert await breaches(stage, crowd) == []


async def be_silent(replica: Replica) -> None:
    """Connect, say nothing, and wait to be sent away."""
    with contextlib.suppress(OSError):
        async with connection_to(replica) as (reader, _):
            await reader.read()


@pytest.mark.case("INP-09")
async def test_a_flood_of_connections_shuts_nobody_out(stage: Stage) -> None:
    """Five times as many as there is room for; who is sent away for a newcomer comes again."""
    _, narrow = stage.both
    async with at_work(stage) as crowd:
        await crowd.busy(20)
        with crowd.ledger.storm(crash=True):
            flood = []
            for _ in range(10):
                flood += [asyncio.create_task(be_silent(narrow)) for _ in range(60)]
                await asyncio.sleep(0.1)
            await crowd.busy(60)
            for one in flood:
                one.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            await asyncio.sleep(0.2)
        await crowd.busy(20)
        await crowd.stop()
        assert await breaches(stage, crowd) == []


def hang_up(port: int, request: bytes, after: float) -> None:
    """Send a request and cut the connection before there can be an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        line.sendall(request)
        time.sleep(after)


@contextlib.contextmanager
def locked(stage: Stage) -> Iterator[None]:
    """Hold the rows of all sessions, so that every refresh waits."""
    with stage.connect() as connection, connection.transaction():
        connection.execute("SELECT 1 FROM refresh_families FOR UPDATE")
        yield


@pytest.mark.case("OPS-07")
async def test_five_hundred_who_hang_up_while_rows_are_locked_leave_nothing_behind(stage: Stage) -> None:
    """No transaction stays open, no connection is lost to the pool, and the token is used up at most once."""
    async with at_work(
        stage, people=1, machines=0, newcomers_every=None, looks_every=None, habits={"refresh": 1.0}
    ) as crowd:
        await crowd.busy(5)
        await crowd.stop()
        (session, *_) = crowd.ledger.accounts[0].live
        key = secrets.token_hex(16)
        form = {"grant_type": "refresh_token", "refresh_token": session.tokens[-1], **crowd.clients.app.form}
        body = urlencode(form)
        head = f"POST /token HTTP/1.1\r\nHost: 127.0.0.1\r\n{FORM}Idempotency-Key: {key}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        ports = [replica.server.port for replica in stage.replicas]
        with locked(stage):
            for number in range(0, 500, 25):
                await asyncio.gather(
                    *(
                        asyncio.to_thread(hang_up, ports[one % 2], request, 0.002 * (one % 10))
                        for one in range(number, number + 25)
                    )
                )
        assert await left_open(stage) == []
        async with connected() as http:
            for replica in stage.replicas:
                answer = await http.post(f"{replica.url}/token", data=form, headers={"idempotency-key": key})
                assert answer.status_code == 200, answer.text
        session.tokens.append(answer.json()["refresh_token"])
        assert await breaches(stage, crowd) == []
