"""How a server leaves, and how it holds out while too many people knock: seen at the sockets of a real process."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx2
import psycopg
import pytest

from tests.support.addresses import plain
from tests.support.fault_proxy import FaultProxy
from tests.support.server_process import ServerProcess
from tests.support.servers import free_port
from tests.support.waiting import wait_until

LONG = 20.0  # seconds that nothing here takes, however busy the machine is


@contextmanager
def served(url: str, **env: str) -> Iterator[tuple[ServerProcess, httpx2.Client]]:
    """A server, and a client for its management listener."""
    port = free_port()
    with (
        ServerProcess(url, management_port=str(port), **env) as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=LONG) as management,
    ):
        yield server, management


def connect(server: ServerProcess) -> socket.socket:
    """Return a connection to the public listener."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=LONG)


def half_a_request(server: ServerProcess) -> tuple[socket.socket, bytes]:
    """Return a connection with a request that the server has begun to serve, and what completes it."""
    line = connect(server)
    body = b"grant_type=client_credentials"
    head = f"POST /token HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n".encode("ascii")
    # The server asks for the body when it has read the head: until then it is a connection like any idle one.
    line.sendall(head + b"Content-Type: application/x-www-form-urlencoded\r\nExpect: 100-continue\r\n\r\n")
    told = line.recv(65536)
    assert told.startswith(b"HTTP/1.1 100 "), told
    line.sendall(body[:5])
    return line, body[5:]


def answer_on(line: socket.socket) -> bytes:
    """Return everything that still comes on a connection."""
    pieces = []
    with suppress(ConnectionResetError):
        while piece := line.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def refused(server: ServerProcess) -> bool:
    """Tell whether the public listener accepts nobody any more."""
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return True
    return False


def events(server: ServerProcess) -> list[str]:
    """Return the names of what the server has logged."""
    return [json.loads(line)["event"] for line in server.log_text().splitlines()]


@pytest.mark.case("OPS-20")
def test_a_server_that_leaves_says_so_first_and_finishes_what_was_begun(database_url: str) -> None:
    """Red, then deaf, then gone: with 0, and without an answer owed to anybody."""
    with served(database_url, shutdown_delay="5") as (server, management), ExitStack() as stack:
        http = stack.enter_context(httpx2.Client(base_url=server.url, timeout=LONG))
        assert http.get("/.well-known/jwks.json").headers.get("connection") is None
        assert management.get("/readyz").json()["status"] == "ready"
        line, rest = half_a_request(server)
        stack.enter_context(line)

        server.send(signal.SIGTERM)
        wait_until(lambda: management.get("/readyz").status_code == 503)
        assert management.get("/readyz").json() == {"status": "not ready", "server": "draining"}
        assert management.get("/healthz").status_code == 200
        for client in (http, stack.enter_context(httpx2.Client(base_url=server.url, timeout=LONG))):
            served_still = client.get("/.well-known/jwks.json")
            assert (served_still.status_code, served_still.headers["connection"]) == (200, "close")

        wait_until(lambda: refused(server))
        assert management.get("/readyz").status_code == 503
        time.sleep(0.5)  # longer than a server without any grace would stay
        line.sendall(rest)
        answer = answer_on(line)
        assert answer.startswith(b"HTTP/1.1 401 "), answer
        assert server.wait(LONG) == 0
        assert "service.draining" in events(server)


@pytest.mark.case("OPS-20")
def test_who_never_finishes_is_not_waited_for(database_url: str) -> None:
    """The grace is for honest requests; afterwards the server goes, with 503 and a plain end of its log."""
    with served(database_url, shutdown_grace="1") as (server, _), half_a_request(server)[0] as line:
        server.send(signal.SIGTERM)
        assert server.wait(LONG) == 0
        answer = answer_on(line)
        assert answer.startswith(b"HTTP/1.1 503 "), "400 would be the deadline of any body, which is longer"
        assert b"\r\nretry-after: 1\r\n" in answer
        assert b'"error": "temporarily_unavailable"' in answer
        assert "Traceback" not in server.log_text()


@pytest.mark.case("OPS-20")
def test_leases_are_given_back_by_who_leaves(database_url: str) -> None:
    """Whoever comes next need not wait until they run out."""
    with (
        served(database_url) as (server, _),
        psycopg.connect(plain(database_url), autocommit=True) as connection,
    ):

        def held(statement: str) -> int:
            row = connection.execute(statement).fetchone()
            return int(row[0]) if row else 0

        # The job cannot go on: every row it would look at is locked until the server has been told to leave.
        with connection.transaction():
            connection.execute("SELECT 1 FROM audit_chain FOR UPDATE")
            connection.execute("LOCK TABLE audit_events IN EXCLUSIVE MODE")
            wait_until(lambda: held("SELECT count(*) FROM leases WHERE holder IS NOT NULL"))
            server.send(signal.SIGTERM)
        assert server.wait(LONG) == 0
        assert held("SELECT count(*) FROM leases WHERE holder IS NOT NULL AND until > now()") == 0


@pytest.mark.case("OPS-20")
@pytest.mark.case("OPS-21")
def test_a_silent_database_does_not_keep_a_server_from_leaving(database_url: str) -> None:
    """Leases cannot be given back then; they run out."""
    with FaultProxy.before(database_url) as proxy, served(proxy.through(database_url)) as (server, management):
        proxy.blackhole()
        wait_until(lambda: management.get("/readyz").status_code == 503)
        assert management.get("/healthz").status_code == 200
        server.send(signal.SIGTERM)
        assert server.wait(2 * LONG) == 0


@pytest.mark.case("OPS-01")
def test_the_probe_is_answered_while_the_database_says_nothing(database_url: str) -> None:
    """In time for a platform that asks every few seconds, and red."""
    with FaultProxy.before(database_url) as proxy, served(proxy.through(database_url)) as (_, management):
        proxy.blackhole()
        time.sleep(1.1)  # an answer serves for a second

        def asked() -> float:
            begun = time.monotonic()
            assert management.get("/readyz").json()["database"] == "unreachable"
            return time.monotonic() - begun

        assert min(asked() for _ in range(3)) < 6, "once or twice it may be the machine that stands still"
        proxy.heal()
        wait_until(lambda: management.get("/readyz").status_code == 200)


# -- more connections than there is room for --------------------------------------------------------------------------


def shed(management: httpx2.Client, which: str) -> float:
    """Return how many connections were ended for want of room."""
    name = f'identity_connections_shed_total{{which="{which}"}} '
    lines = [line for line in management.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].removeprefix(name)) if lines else 0.0


@pytest.mark.case("INP-09")
def test_a_crowd_that_says_nothing_shuts_nobody_out(database_url: str) -> None:
    """Who has waited longest without a request gives way to the newcomer; probes have room of their own."""
    with served(database_url, max_connections="20") as (server, management), ExitStack() as stack:
        crowd = [stack.enter_context(connect(server)) for _ in range(100)]
        for _ in range(5):
            assert httpx2.get(f"{server.url}/.well-known/jwks.json", timeout=LONG).status_code == 200
        assert management.get("/healthz").status_code == 200
        wait_until(lambda: shed(management, "idle") >= 80)
        assert shed(management, "new") == 0
        assert answer_on(crowd[0]) == b"", "nobody is told anything that could be taken for the answer to a request"


@pytest.mark.case("INP-09")
def test_where_everybody_is_being_served_the_newcomer_is_asked_to_come_again(database_url: str) -> None:
    """503 before it has said anything; who is being served is served."""
    with served(database_url, max_connections="10") as (server, management), ExitStack() as stack:
        begun = [half_a_request(server) for _ in range(10)]
        for line, _ in begun:
            stack.enter_context(line)
        wait_until(lambda: answer_to_a_newcomer(server).startswith(b"HTTP/1.1 503 "))
        assert b"\r\nretry-after: 1\r\n" in answer_to_a_newcomer(server)
        assert management.get("/readyz").status_code == 200
        assert shed(management, "new") >= 1
        for line, rest in begun:
            line.sendall(rest)
            assert line.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert httpx2.get(f"{server.url}/.well-known/jwks.json", timeout=LONG).status_code == 200


def answer_to_a_newcomer(server: ServerProcess) -> bytes:
    """Return what somebody hears who connects and asks."""
    with connect(server) as line:
        with suppress(ConnectionError):
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return answer_on(line)
