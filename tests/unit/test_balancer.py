"""The balancer sends connections where they are taken, and nobody's trouble is hidden by it."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.balancer import Balancer
from tests.support.servers import free_port
from tests.support.waiting import wait_until

_PATIENCE = 30.0  # seconds for what takes milliseconds


class Stub(ThreadingHTTPServer):
    """A replica that says its name, and whether it is ready; one listener for both."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.ready = True
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join(_PATIENCE)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self) -> None:
        probed = self.path == "/readyz"
        body = self.server.name.encode()
        self.send_response(503 if probed and not self.server.ready else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def stubs() -> Iterator[tuple[Stub, Stub]]:
    pair = Stub("one"), Stub("two")
    yield pair
    for stub in pair:
        stub.close()


@pytest.fixture
def balancer(stubs: tuple[Stub, Stub]) -> Iterator[Balancer]:
    """Both replicas behind it, and known to be ready."""
    with Balancer(every=0.01, patience=_PATIENCE) as balancer:
        for stub in stubs:
            balancer.put(stub.name, stub.server_port, stub.server_port)
        wait_until(lambda: all(balancer.backend(stub.name).ready for stub in stubs))
        yield balancer


def asked(balancer: Balancer) -> str:
    """Return who answers on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=_PATIENCE)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_connections_take_turns_and_stay_where_they_are(balancer: Balancer) -> None:
    assert {asked(balancer) for _ in range(4)} == {"one", "two"}
    connection = http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=_PATIENCE)
    answers = set()
    for _ in range(4):
        connection.request("GET", "/")
        answers.add(connection.getresponse().read())
    connection.close()
    assert len(answers) == 1


def test_who_is_not_ready_gets_nothing_new_and_keeps_what_it_has(balancer: Balancer, stubs: tuple[Stub, Stub]) -> None:
    connections = [http.client.HTTPConnection("127.0.0.1", balancer.port, timeout=_PATIENCE) for _ in range(2)]
    before = []
    for connection in connections:
        connection.request("GET", "/")
        before.append(connection.getresponse().read())
    stubs[0].ready = False
    wait_until(lambda: not balancer.backend("one").ready)
    assert {asked(balancer) for _ in range(6)} == {"two"}
    for connection, expected in zip(connections, before, strict=True):
        connection.request("GET", "/")
        assert connection.getresponse().read() == expected
        connection.close()
    assert sorted(before) == [b"one", b"two"]
    stubs[0].ready = True
    wait_until(lambda: balancer.backend("one").ready)
    assert {asked(balancer) for _ in range(4)} == {"one", "two"}


def test_news_may_come_late(stubs: tuple[Stub, Stub]) -> None:
    """As to the nodes of a cluster: meanwhile connections go where nobody wants them any more."""
    with Balancer(every=0.01, late=0.3, patience=_PATIENCE) as balancer:
        balancer.put("one", stubs[0].server_port, stubs[0].server_port)
        wait_until(lambda: balancer.backend("one").ready)
        began = time.monotonic()
        stubs[0].ready = False
        wait_until(lambda: not balancer.backend("one").ready)
        assert time.monotonic() - began >= 0.25


def test_a_connection_that_nobody_takes_is_cut_off_and_counted(balancer: Balancer, stubs: tuple[Stub, Stub]) -> None:
    """Trying the next replica instead would hide what a restart costs."""
    closed = free_port()
    balancer.drop("two")
    gone = balancer.put("one", closed, stubs[0].server_port)
    wait_until(lambda: gone.ready)
    with pytest.raises(ConnectionError):
        asked(balancer)
    assert (gone.served, gone.refused) == (0, 1)
    stubs[0].ready = False
    wait_until(lambda: not gone.ready)
    with pytest.raises(ConnectionError):
        asked(balancer)
    assert balancer.turned_away == 1


def test_who_heeds_no_readiness_sends_connections_to_everybody(stubs: tuple[Stub, Stub]) -> None:
    with Balancer(every=0.01, heeds_readiness=False) as balancer:
        stubs[0].ready = False
        backend = balancer.put("one", stubs[0].server_port, stubs[0].server_port)
        wait_until(lambda: backend.ready)
        assert asked(balancer) == "one"


def test_the_end_of_a_connection_is_handed_on(balancer: Balancer) -> None:
    """At both sides: neither a client nor a replica waits for somebody who has left."""
    with socket.create_connection(("127.0.0.1", balancer.port), timeout=_PATIENCE) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := line.recv(65536):
            answer += piece
    assert answer.endswith((b"one", b"two"))
    wait_until(lambda: not balancer._connections)
