"""The proxy for fault tests does what it is told, at once, and nothing else; an echo stands for the server."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.servers import free_port

_PATIENCE = 30.0  # seconds for what takes milliseconds


class Echo:
    """A server that says `echo:` before each line it repeats, and remembers what it heard and how each caller left."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard = b""
        self.ends: list[str] = []
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(65536):
                    self.heard += piece
                    connection.sendall(b"echo:" + piece)
            except OSError:
                self.ends.append("reset")
            else:
                self.ends.append("closed")


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo.port) as proxy:
        yield proxy


@pytest.fixture
def caller(proxy: FaultProxy) -> Iterator[socket.socket]:
    """A connection through the proxy that has been used once."""
    with connected(proxy) as connection:
        assert ask(connection, b"hello") == b"echo:hello"
        yield connection


def connected(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=_PATIENCE)


def ask(connection: socket.socket, text: bytes) -> bytes:
    """Send something and return the answer, as much as its length lets expect."""
    connection.sendall(text)
    return receive(connection, len(text) + 5)


def receive(connection: socket.socket, size: int) -> bytes:
    answer = b""
    while len(answer) < size and (piece := connection.recv(size - len(answer))):
        answer += piece
    return answer


def is_silent(connection: socket.socket, seconds: float = 0.2) -> bool:
    """Return whether nothing comes, not even an end."""
    connection.settimeout(seconds)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(_PATIENCE)
    return False


def soon(fact: Callable[[], bool]) -> bool:
    """Wait until something has become true in another thread."""
    deadline = time.monotonic() + _PATIENCE
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def test_it_hands_on_what_is_said_and_counts_it(echo: Echo, proxy: FaultProxy) -> None:
    """Both ways, also more than its buffers hold, and an end of one half leaves the other open."""
    large = b"x" * 3_000_000
    with connected(proxy) as first, connected(proxy) as second:
        assert ask(first, b"one") == b"echo:one"
        assert ask(second, b"two") == b"echo:two"
        assert proxy.live == 2
        sending = threading.Thread(target=lambda: (second.sendall(large), second.shutdown(socket.SHUT_WR)))
        sending.start()
        answer = b""
        while piece := second.recv(65536):
            answer += piece
        sending.join()
    assert answer.replace(b"echo:", b"") == large
    assert soon(lambda: proxy.live == 0)
    assert proxy.connections == 2
    assert proxy.bytes_to_server == 6 + len(large) == len(echo.heard)
    assert proxy.bytes_to_client == 16 + len(answer)
    assert soon(lambda: echo.ends == ["closed", "closed"])


def test_refused_is_who_connects_and_not_who_is_connected(proxy: FaultProxy, caller: socket.socket) -> None:
    """And the port stays its own: it listens there again after `heal`."""
    proxy.refuse()
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    assert ask(caller, b"still") == b"echo:still"
    port = proxy.port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    proxy.heal()
    assert proxy.port == port
    with connected(proxy) as again:
        assert ask(again, b"again") == b"echo:again"


def test_a_cut_resets_everybody_at_once(echo: Echo, proxy: FaultProxy, caller: socket.socket) -> None:
    """Both sides hear a reset, no ordinary end; and who connects afterwards is served."""
    with connected(proxy) as other:
        assert ask(other, b"other") == b"echo:other"
        proxy.cut()
        for connection in (caller, other):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    assert soon(lambda: echo.ends == ["reset", "reset"])
    assert proxy.live == 0
    with connected(proxy) as after:
        assert ask(after, b"after") == b"echo:after"


def test_a_black_hole_accepts_keeps_and_says_nothing(echo: Echo, proxy: FaultProxy, caller: socket.socket) -> None:
    """To those who were there before and to those who come; what they sent arrives when the network is back."""
    proxy.blackhole()
    caller.sendall(b"old")
    with connected(proxy) as new:
        new.sendall(b"new")
        assert is_silent(caller)
        assert is_silent(new)
        assert echo.heard == b"hello"
        assert soon(lambda: proxy.live == 2)
        proxy.heal()
        assert receive(caller, 8) == b"echo:old"
        assert receive(new, 8) == b"echo:new"


def test_a_black_hole_hides_that_the_other_side_has_left(proxy: FaultProxy, echo: Echo, caller: socket.socket) -> None:
    """A server that ends behind a dead network ends for nobody."""
    proxy.blackhole()
    echo._open[0].shutdown(socket.SHUT_RDWR)
    assert is_silent(caller)
    proxy.heal()
    assert caller.recv(1) == b""


def test_a_cut_goes_through_a_black_hole(proxy: FaultProxy, caller: socket.socket) -> None:
    """Who never reached the server and who did are reset alike."""
    proxy.blackhole()
    with connected(proxy) as new:
        assert soon(lambda: proxy.live == 2)
        proxy.cut()
        for connection in (caller, new):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)


def test_a_black_hole_listens_where_connections_were_refused(proxy: FaultProxy) -> None:
    proxy.refuse()
    proxy.blackhole()
    with connected(proxy) as new:
        assert is_silent(new)


def test_each_piece_is_delayed_in_each_direction(proxy: FaultProxy, caller: socket.socket) -> None:
    """So an answer takes twice as long; and no longer than ever once it is taken back."""
    proxy.delay(0.1)
    began = time.monotonic()
    assert ask(caller, b"slow") == b"echo:slow"
    assert time.monotonic() - began >= 0.2
    proxy.delay(60)
    proxy.heal()
    began = time.monotonic()
    assert ask(caller, b"fast") == b"echo:fast"
    assert time.monotonic() - began < 60


def test_cut_after_a_word_to_the_server_nobody_hears_its_answer(
    echo: Echo, proxy: FaultProxy, caller: socket.socket
) -> None:
    """The word arrives, in however many pieces it is said, and an ordinary end after it; then all is as before."""
    proxy.cut_after(b"COMMIT")
    assert ask(caller, b"BEGIN; COM") == b"echo:BEGIN; COM"
    assert proxy.cuts == 0
    caller.sendall(b"MIT;")
    with pytest.raises(ConnectionResetError):
        caller.recv(1)
    assert proxy.cuts == 1
    assert soon(lambda: echo.heard == b"helloBEGIN; COMMIT;")
    assert soon(lambda: len(echo.ends) == 1)
    with connected(proxy) as after:
        assert ask(after, b"COMMIT") == b"echo:COMMIT", "it is cut once"


def test_cut_before_a_word_to_the_server_the_word_is_lost(echo: Echo, proxy: FaultProxy, caller: socket.socket) -> None:
    proxy.cut_after(b"COMMIT", deliver=False)
    assert ask(caller, b"BEGIN") == b"echo:BEGIN"
    caller.sendall(b"COMMIT")
    with pytest.raises(ConnectionResetError):
        caller.recv(1)
    assert soon(lambda: echo.ends == ["reset"])
    assert echo.heard == b"helloBEGIN"


def test_cut_before_an_answer_the_server_has_acted_and_the_client_does_not_know(
    echo: Echo, proxy: FaultProxy, caller: socket.socket
) -> None:
    proxy.cut_after(b"echo:COMMIT", stream="to_client", deliver=False)
    assert ask(caller, b"one") == b"echo:one"
    caller.sendall(b"COMMIT")
    with pytest.raises(ConnectionResetError):
        caller.recv(1)
    assert echo.heard == b"helloone" + b"COMMIT", "known, without waiting for it"
    assert proxy.cuts == 1


def test_cut_after_an_answer_the_client_hears_it_and_then_the_end(proxy: FaultProxy, caller: socket.socket) -> None:
    proxy.cut_after(b"echo:last", stream="to_client")
    assert ask(caller, b"last") == b"echo:last"
    assert caller.recv(1) == b""


def test_a_stream_can_be_cut_to_the_byte(echo: Echo, proxy: FaultProxy, caller: socket.socket) -> None:
    """Counted from when it was said, in each connection for itself, however many pieces it takes."""
    proxy.cut_after(12, stream="to_client")
    with connected(proxy) as other:
        assert ask(other, b"of another") == b"echo:of another"[:12]
        assert other.recv(1) == b""
    proxy.cut_after(12, stream="to_client")
    assert ask(caller, b"abc") == b"echo:abc"
    caller.sendall(b"defghi")
    assert receive(caller, 100) == b"echo"
    assert proxy.cuts == 2


def test_a_function_may_say_where_to_cut(proxy: FaultProxy, caller: socket.socket) -> None:
    """It is shown all that one connection has said since."""
    shown: list[bytes] = []

    def third(seen: bytes) -> bool:
        shown.append(seen)
        return seen.count(b"x") == 3

    proxy.cut_after(third, deliver=False)
    assert ask(caller, b"x") == b"echo:x"
    with connected(proxy) as other:
        assert ask(other, b"xx") == b"echo:xx"
        assert ask(caller, b"x") == b"echo:x"
        caller.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            caller.recv(1)
        assert ask(other, b"xxx") == b"echo:xxx"
    assert shown == [b"x", b"xx", b"xx", b"xxx"]


def test_a_cut_that_has_not_come_about_is_forgotten(proxy: FaultProxy, caller: socket.socket) -> None:
    proxy.cut_after(b"never")
    proxy.heal()
    assert ask(caller, b"never") == b"echo:never"
    assert proxy.cuts == 0


def test_who_connects_while_the_server_is_away_is_reset() -> None:
    with FaultProxy("127.0.0.1", free_port()) as proxy:
        # On a busy machine the reset may come before the connection has been handed to us.
        with pytest.raises(ConnectionResetError), connected(proxy) as connection:
            connection.recv(1)
        assert soon(lambda: proxy.live == 0)


async def test_a_coroutine_may_use_it(echo: Echo) -> None:
    """Its own loop goes on meanwhile; leaving the block ends every connection and gives the port back."""
    async with FaultProxy("127.0.0.1", echo.port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"async")
        assert await asyncio.wait_for(reader.readexactly(10), _PATIENCE) == b"echo:async"
        proxy.blackhole()
        writer.write(b"more")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), _PATIENCE)
    writer.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", proxy.port))


def test_another_process_may_use_it(proxy: FaultProxy) -> None:
    """A server under test in a process of its own meets the same faults."""
    program = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10)
connection.sendall(b"COMMIT")
try:
    print(connection.recv(100))
except ConnectionResetError:
    print("reset")
"""
    words = [sys.executable, "-c", program, str(proxy.port)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "b'echo:COMMIT'\n"
    proxy.cut_after(b"COMMIT")
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "reset\n"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql+psycopg://user:pass@{}:{}/name?connect_timeout=3",
            "user:pass@127.0.0.1:{}/name?connect_timeout=3",
        ),
        ("redis://{}:{}/3", "127.0.0.1:{}/3"),
    ],
    ids=["postgresql", "redis"],
)
def test_a_url_leads_to_its_server_through_the_proxy(echo: Echo, url: str, expected: str) -> None:
    """The name, the password, the database and the options stay what they were."""
    original = url.format("localhost", echo.port)
    with FaultProxy.before(original) as proxy:
        assert proxy.through(original) == f"{url.partition('//')[0]}//{expected.format(proxy.port)}"
        with connected(proxy) as connection:
            assert ask(connection, b"hello") == b"echo:hello"
