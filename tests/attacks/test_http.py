"""What only a real socket can say to a real server: malformed framing, floods of headers, tricks with paths."""

import asyncio
import base64
import contextlib
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess
from tests.support.service import PASSWORD, Registered, running, test_settings

CANARY = "canary-4711-of-the-caller"
HOST = b"Host: 127.0.0.1\r\n"
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
CLOSE = b"Connection: close\r\n"
HIDDEN = b"GET /healthz HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Target:
    """A running server with a client and a user."""

    server: ServerProcess
    client: Registered
    username: str

    def raw(self, *pieces: bytes) -> bytes:
        """
        Send bytes over a fresh connection and return all that is answered until the server closes it.

        Several pieces come one after the other, each as what the server reads at once.
        """
        answered = b""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=_TIMEOUT) as connection:
            try:
                for number, piece in enumerate(pieces):
                    time.sleep(0.1 if number else 0)
                    connection.sendall(piece)
                while piece := connection.recv(65536):
                    answered += piece
            except (ConnectionResetError, BrokenPipeError):
                pass  # it had heard enough
        return answered

    def post(self, path: bytes = b"/token", *extra: bytes, body: bytes = b"", host: bytes = HOST) -> bytes:
        """Post a body with exactly these header lines besides, and return the answer."""
        length = b"Content-Length: %d\r\n" % len(body)
        head = b"POST " + path + b" HTTP/1.1\r\n" + host + FORM + CLOSE + b"".join(extra) + length
        return self.raw(head + b"\r\n" + body)

    @property
    def credentials(self) -> bytes:
        """A good body."""
        return f"grant_type=client_credentials&client_id={self.client.id}&client_secret={self.client.secret}".encode()


@pytest.fixture(scope="module")
def target(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server for all tests here; none of them may have brought it down, or to a fault, in the end."""
    path = tmp_path_factory.mktemp("http") / "identity.db"
    shutil.copy(sqlite_template, path)
    url = f"sqlite+aiosqlite:///{path}"

    async def prepare() -> tuple[Registered, str]:
        async with running(test_settings(url)) as service:
            return await service.a_client(audiences=()), (await service.a_user()).username

    client, username = asyncio.run(prepare())
    with ServerProcess(url) as server:
        yield Target(server, client, username)
        assert server.returncode is None
        log = server.log_text()
    assert "Traceback" not in log
    assert '"level": "error"' not in log


def status_of(answer: bytes) -> int:
    """Return the status of the first answer."""
    return int(answer.split(b" ", 2)[1])


def answers_in(answered: bytes) -> int:
    """Return how many answers came back."""
    return len(re.findall(rb"HTTP/1\.1 \d{3} ", answered))


def chunked(*lines: bytes, body: bytes) -> bytes:
    """Return a request in chunks with these header lines besides."""
    return b"POST /token HTTP/1.1\r\n" + HOST + FORM + b"".join(lines) + b"\r\n" + body


# -- where a request ends ---------------------------------------------------------------------------------------------

TE = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS = {
    "length and chunks": chunked(b"Content-Length: 5\r\n", TE, body=b"0\r\n\r\n" + HIDDEN),
    "chunks and length": chunked(TE, b"Content-Length: 5\r\n", body=b"0\r\n\r\n" + HIDDEN),
    "two encodings": chunked(TE, b"Transfer-Encoding: identity\r\n", body=b"0\r\n\r\n" + HIDDEN),
    "an unknown encoding": chunked(b"Transfer-Encoding: xchunked\r\n", body=b"0\r\n\r\n" + HIDDEN),
    "an encoding with a control character": chunked(b"Transfer-Encoding: \x0bchunked\r\n", body=b"0\r\n\r\n" + HIDDEN),
    "a length with a space before its colon": chunked(b"Content-Length : 0\r\n", body=HIDDEN),
    "an encoding with a space before its colon": chunked(
        b"Transfer-Encoding : chunked\r\n", body=b"0\r\n\r\n" + HIDDEN
    ),
    "two lengths": chunked(b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", body=b"hello" + HIDDEN),
    "a list of lengths": chunked(b"Content-Length: 0, 5\r\n", body=b"hello" + HIDDEN),
    "a negative length": chunked(b"Content-Length: -1\r\n", body=HIDDEN),
    "a signed length": chunked(b"Content-Length: +0\r\n", body=HIDDEN),
    "a hexadecimal length": chunked(b"Content-Length: 0x0\r\n", body=HIDDEN),
    "an endless length": chunked(b"Content-Length: 99999999999999999999999\r\n", body=HIDDEN),
    "a folded header": chunked(b"X-A: a\r\n b\r\n", b"Content-Length: 0\r\n", body=HIDDEN),
    "a folded encoding": chunked(b"Transfer-Encoding:\r\n chunked\r\n", body=b"0\r\n\r\n" + HIDDEN),
    "a chunk size that is none": chunked(TE, body=b"zz\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "a negative chunk size": chunked(TE, body=b"-1\r\n\r\n0\r\n\r\n" + HIDDEN),
    "a chunk without its end": chunked(TE, body=b"3\r\nabcXX0\r\n\r\n" + HIDDEN),
    "a chunk size beyond all": chunked(TE, body=b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n" + HIDDEN),
    "lines without carriage return": b"POST /token HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 0\n\n" + HIDDEN,
    "a header with NUL": chunked(b"X-A: a\0b\r\n", b"Content-Length: 0\r\n", body=HIDDEN),
    "a bare carriage return": chunked(b"X-A: a\rContent-Length: 5\r\n", body=HIDDEN),
    "an empty header name": chunked(b": a\r\n", b"Content-Length: 0\r\n", body=HIDDEN),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
    "the first version": b"GET /healthz\r\n" + HOST + b"\r\n" + HIDDEN,
    "a part after the target": b"GET /healthz#/v1 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a target without its slash": b"GET healthz HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a target that is no text": b"GET /health\xff HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "another version": b"POST /token HTTP/9.9\r\n" + HOST + b"Content-Length: 0\r\n\r\n" + HIDDEN,
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a method that is none": b"post /token HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n" + HIDDEN,
    "a path with a control character": b"GET /token\0 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a tunnel": b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
}


@pytest.mark.rfc("9112", "6.3")
@pytest.mark.case("INP-10")
@pytest.mark.case("INP-07")
@pytest.mark.parametrize("what", AMBIGUOUS)
def test_a_request_whose_end_is_unclear_ends_the_connection(target: Target, what: str) -> None:
    """What a proxy in front of us may read otherwise is refused, and no second request found behind it."""
    answered = target.raw(AMBIGUOUS[what])
    assert status_of(answered) == 400
    assert answers_in(answered) == 1
    assert b'"status":"ok"' not in answered
    assert target.post(body=target.credentials).startswith(b"HTTP/1.1 200 ")


@pytest.mark.rfc("9112", "9.3.2")
@pytest.mark.case("INP-10")
def test_the_body_of_a_refused_request_is_never_a_request(target: Target) -> None:
    """It was announced as a body, and stays one; what follows it is answered in order."""
    body = HIDDEN * 3
    for path, content_type, length, status in (
        (b"/nothing", FORM, len(body), 404),
        (b"/token", b"Content-Type: text/plain\r\n", len(body), 400),
        (b"/token?password=x", FORM, len(body), 400),
    ):
        first = b"POST " + path + b" HTTP/1.1\r\n" + HOST + content_type + b"Content-Length: %d\r\n\r\n" % length + body
        answered = target.raw(first + HIDDEN)
        assert status_of(answered) == status
        assert answers_in(answered) == 2
        assert answered.endswith(b'{"status":"ok"}')


WISHES = {
    "HTTP/2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "a socket": b"Upgrade: websocket\r\nConnection: keep-alive, upgrade\r\n",
}


@pytest.mark.rfc("9110", "7.8")
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_the_wish_for_another_protocol_is_ignored(target: Target, wish: str, framing: str) -> None:
    """Java's own client has it with every request that goes without TLS; body and connection are as without it."""
    head, body = _behind(WISHES[wish], framing, target.credentials)
    for pieces in ([head + body + HIDDEN], [head, body + HIDDEN]):
        answered = target.raw(*pieces)
        assert status_of(answered) == 200
        assert b"access_token" in answered
        assert answers_in(answered) == 2


@pytest.mark.rfc("9110", "7.8")
@pytest.mark.case("INP-10")
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_behind_a_wish_that_comes_in_pieces_is_never_a_request(target: Target, wish: str, framing: str) -> None:
    """The parser takes it for another protocol; it is refused, and neither dropped in silence nor read as requests."""
    head, body = _behind(WISHES[wish], framing, HIDDEN)
    cut = head.index(b"Upgrade: ") + 4
    for pieces in ([head[:cut], head[cut:] + body], [head[:cut], head[cut:], body], [head.upper() + body]):
        answered = target.raw(*pieces)
        assert status_of(answered) == 400
        assert answers_in(answered) == 1
        assert b"grant_type" not in answered, "it was judged without its body"


@pytest.mark.rfc("9110", "7.8")
@pytest.mark.parametrize("wish", WISHES)
def test_a_wish_that_comes_in_pieces_is_not_granted_and_the_last_one(target: Target, wish: str) -> None:
    """The parser has dropped what came with it, so nothing that follows can be trusted to be a request."""
    head = b"GET /healthz HTTP/1.1\r\n" + HOST + WISHES[wish] + b"Content-Length: 0\r\n\r\n"
    cut = head.index(b"Upgrade: ") + 4
    for pieces in ([head[:cut], head[cut:]], [head[:cut], head[cut:] + HIDDEN], [head[:cut], head[cut:], HIDDEN]):
        answered = target.raw(*pieces)
        assert answered.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answered
        assert answers_in(answered) == 1


def _behind(wish: bytes, framing: str, body: bytes) -> tuple[bytes, bytes]:
    """Return the head of a request for a token with `wish`, and its body."""
    if framing == "length":
        announced, sent = b"Content-Length: %d\r\n" % len(body), body
    else:
        announced, sent = TE, b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    return b"POST /token HTTP/1.1\r\n" + HOST + FORM + wish + announced + b"\r\n", sent


@pytest.mark.rfc("9110", "10.1.1")
@pytest.mark.case("INP-14")
def test_a_body_that_is_too_large_is_refused_before_it_is_sent(target: Target) -> None:
    """Nobody is told to continue; a small one is."""
    large = target.raw(chunked(b"Expect: 100-continue\r\n", b"Content-Length: 99999999\r\n", CLOSE, body=b""))
    assert (status_of(large), answers_in(large)) == (413, 1)
    good = target.post(b"/token", b"Expect: 100-continue\r\n", body=target.credentials)
    assert good.startswith((b"HTTP/1.1 100 ", b"HTTP/1.1 200 "))
    assert b'"access_token"' in good
    endless = target.raw(
        chunked(TE, CLOSE, body=b"10000\r\n" + b"a" * 65536 + b"\r\n" + b"10000\r\n" + b"a" * 65536 + b"\r\n")
    )
    assert (status_of(endless), answers_in(endless)) == (413, 1)


@pytest.mark.case("OPS-07")
def test_a_caller_that_hangs_up_in_the_middle_leaves_no_trace(target: Target) -> None:
    """Before, in and after the body; the server goes on."""
    whole = b"POST /token HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: %d\r\n\r\n" % len(target.credentials)
    for part in (b"", b"POST /tok", whole[:-2], whole, whole + target.credentials[:20], whole + target.credentials):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", target.server.port), timeout=_TIMEOUT) as connection:
                connection.sendall(part)
    assert target.post(body=target.credentials).startswith(b"HTTP/1.1 200 ")


# -- how large a request may be ---------------------------------------------------------------------------------------


@pytest.mark.rfc("6585", "5")
@pytest.mark.case("INP-09")
@pytest.mark.case("CLI-06")
def test_headers_and_urls_have_a_size(target: Target, subtests: pytest.Subtests) -> None:
    """Refused with the word for it, before anything is looked at."""
    many = b"".join(b"X-%d: a\r\n" % number for number in range(1000))
    secret = base64.b64encode(f"{target.client.id}:{'x' * 49_000}".encode())
    for what, answered, expected in (
        ("a header of 100 KB", target.post(b"/token", b"X-A: " + b"a" * 100_000 + b"\r\n"), 431),
        ("a header of 1 MB", target.post(b"/token", b"X-A: " + b"a" * 1_000_000 + b"\r\n"), 431),
        ("a name of 100 KB", target.post(b"/token", b"X" * 100_000 + b": a\r\n"), 431),
        ("a thousand headers", target.post(b"/token", many), 431),
        ("a cookie of 64 KB", target.post(b"/token", b"Cookie: " + b"a" * 65_536 + b"\r\n"), 431),
        ("credentials of 64 KB", target.post(b"/token", b"Authorization: Basic " + secret + b"\r\n"), 431),
        ("a query of 20 KB", target.post(b"/token?" + b"a" * 20_000), 414),
        ("a path of 20 KB", target.post(b"/" + b"a" * 20_000), 414),
        ("a URL of 1 MB", target.post(b"/token?" + b"a" * 1_000_000), 431),
    ):
        with subtests.test(what):
            assert status_of(answered) == expected
            assert answers_in(answered) == 1
            assert b"aaaa" not in answered
    assert target.post(body=target.credentials).startswith(b"HTTP/1.1 200 ")


# -- where a request goes ---------------------------------------------------------------------------------------------


@pytest.mark.case("INP-13")
@pytest.mark.parametrize(
    "path",
    [
        *(b"//token", b"/%2ftoken", b"/%2Ftoken", b"/token%2f", b"/token/", b"/token/.", b"/./token", b"/x/../token"),
        *(
            b"/x/..;/token",
            b"/token;a=b",
            b"/token%00",
            b"/token%0a",
            b"/token%20",
            b"/%2574oken",
            b"/TOKEN",
            b"/token\\",
        ),
        *(
            b"/%74oken",
            b"/tok%65n",
            b"/%2e%2e/token",
            b"/x/%2E%2E/token",
            b"/x%5c..%5ctoken",
            b"/token%3b",
            b"/;/token",
        ),
        *(b"/%ef%bc%8ftoken", b"/t%c3%b6ken", b"/tok%ff", b"/.well-known/../token", b"/%2e/token", b"/token%3f", b"*"),
    ],
)
def test_no_other_spelling_of_a_path_reaches_an_endpoint(target: Target, path: bytes) -> None:
    """A rule of a proxy about `/token` cannot be walked around; nor is anything redirected."""
    answered = target.post(path, body=target.credentials)
    assert status_of(answered) in (400, 404)
    assert b"location:" not in answered.lower()
    assert b"access_token" not in answered


@pytest.mark.rfc("9112", "3.2")
@pytest.mark.case("TOK-02")
@pytest.mark.case("INP-10")
def test_the_host_decides_nothing_but_whether_to_answer(target: Target) -> None:
    """One known host; an absolute target is read as its path; no answer ever names the host that was asked for."""
    good = target.credentials
    assert status_of(target.post(body=good)) == 200
    assert status_of(target.post(body=good, host=b"")) == 400
    assert status_of(target.post(body=good, host=HOST + HOST)) == 400
    assert status_of(target.post(body=good, host=HOST + b"Host: evil.example\r\n")) == 400
    for host in (b"evil.example", b"127.0.0.1@evil.example", b"evil.example/127.0.0.1", b"127.0.0.1.evil.example", b""):
        answered = target.post(b"/token/", body=good, host=b"Host: " + host + b"\r\n")
        assert status_of(answered) in (400, 404)
        assert b"evil" not in answered
    document = target.raw(
        b"GET http://evil.example/.well-known/oauth-authorization-server HTTP/1.1\r\n"
        + HOST
        + b"X-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\n"
        + CLOSE
        + b"\r\n"
    )
    assert status_of(document) == 200
    assert b"evil" not in document


@pytest.mark.case("TOK-01")
def test_no_method_but_post_and_no_upgrade(target: Target) -> None:
    """405 names the method; a wish for another protocol is ignored."""
    for method in (b"GET", b"HEAD", b"PUT", b"TRACE", b"OPTIONS", b"DELETE", b"PATCH"):
        answered = target.raw(method + b" /token HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
        assert status_of(answered) == 405
        assert b"\r\nallow: POST\r\n" in answered
        assert answered.endswith(b"\r\n\r\n") == (method == b"HEAD")
    upgraded = target.post(b"/token", b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n")
    assert status_of(upgraded) == 400
    socketed = target.raw(
        b"GET /token HTTP/1.1\r\n" + HOST + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert status_of(socketed) in (400, 404, 405)


@pytest.mark.case("INP-13")
@pytest.mark.case("INP-18")
@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        *(b"/v1/users/%00", b"/v1/users/%FF", b"/v1/users/me?q=%00", b"/v1/users/me?q=%ED%A0%80", b"/v1/users/me/"),
        *(
            b"/v1/users//me",
            b"/v1/x/..;/users/me",
            b"/v1/users/%2e%2e/users/me",
            b"/%76%31/users/me",
            b"/v1%2Fusers/me",
        ),
        *(b"/V1/users/me", b"/v1/users/me;a=b", b"/v1/users/%257d", b"/v1/users/" + b"a" * 10_000, b"/v1/users/{}"),
        *(b"/v1/users/0192F0C0-0000-7000-8000-000000000000", b"/v1/users/abc", b"/v1/users/-1", b"/v1/users/%7B%7D"),
    ],
)
def test_no_spelling_of_a_resource_is_a_fault_or_a_way_around(target: Target, method: bytes, path: bytes) -> None:
    """What is asked for without a credential is refused, not found or not readable, and never looked for elsewhere."""
    answered = target.raw(method + b" " + path + b" HTTP/1.1\r\n" + HOST + CLOSE + b"Content-Length: 0\r\n\r\n")
    assert status_of(answered) in (400, 401, 404, 405, 414)
    assert b"location:" not in answered.lower()
    assert b"application/problem+json" in answered


# -- what comes back, and what is written down ------------------------------------------------------------------------


@pytest.mark.case("INP-11")
@pytest.mark.case("INP-23")
def test_nothing_that_is_sent_becomes_a_header(target: Target) -> None:
    """Line breaks in every place that a value can stand; and no answer says which server it is from."""
    evil = b"%0d%0aSet-Cookie:%20evil=1%0d%0a%0d%0a<html>"
    raw = b"\r\n".join((b"a", b"X-Evil: 1"))
    answers = [
        target.post(b"/token?state=" + evil, body=b"grant_type=" + evil),
        target.post(b"/token", body=b"grant_type=client_credentials&client_id=" + evil + b"&client_secret=" + evil),
        target.post(b"/token", body=target.credentials + b"&scope=" + evil),
        target.post(b"/token", body=target.credentials + b"&resource=" + evil),
        target.post(b"/" + evil, body=b""),
        target.post(
            b"/token", b"Authorization: Basic " + base64.b64encode(raw + b":x") + b"\r\n", body=b"grant_type=x"
        ),
        target.post(
            b"/token", b"X-Request-Id: " + evil + b"\r\nTraceparent: " + evil + b"\r\n", body=target.credentials
        ),
    ]
    for answered in answers:
        head = answered.partition(b"\r\n\r\n")[0].lower()
        assert answers_in(answered) == 1
        assert b"set-cookie" not in head
        assert b"evil" not in answered.lower()
        assert b"\r\nserver:" not in head
        assert b"uvicorn" not in answered


@pytest.mark.case("TOK-09")
@pytest.mark.case("SEC-01")
@pytest.mark.case("SEC-03")
def test_the_log_holds_nothing_that_was_sent(target: Target) -> None:
    """Secrets in the URL, the body and the headers, good ones and bad ones; one JSON line per event, whatever comes."""
    canary = CANARY.encode()
    forge = b'%0a{"event":"forged"}%1b[31m'
    basic = base64.b64encode(f"{target.client.id}:{target.client.secret}".encode())
    form = f"client_id={target.client.id}&client_secret={target.client.secret}&grant_type=password".encode()
    good = form + f"&username={target.username}&password={PASSWORD.replace(' ', '+')}".encode()
    tokens = json.loads(target.post(body=good).partition(b"\r\n\r\n")[2])
    refreshed = form.replace(b"password", b"refresh_token") + b"&refresh_token=" + tokens["refresh_token"].encode()
    assert b'"access_token"' in target.post(body=refreshed)
    bearer = b"Authorization: Bearer " + tokens["access_token"].encode() + b"\r\n"
    assert status_of(target.raw(b"GET /v1/users/me HTTP/1.1\r\n" + HOST + CLOSE + bearer + b"\r\n")) == 200
    target.post(b"/token?client_secret=" + canary + b"&password=" + canary, body=good)
    target.post(b"/" + canary + forge, b"User-Agent: " + canary + b"\r\nReferer: " + canary + b"\r\n")
    target.post(b"/token", b"Cookie: sid=" + canary + b"\r\nX-Forwarded-For: " + canary + b"\r\n", body=good)
    target.post(b"/token", b"Authorization: Basic " + base64.b64encode(canary + b":" + canary) + b"\r\n", body=good)
    target.post(b"/token", b"Authorization: Basic " + basic + b"\r\n", body=b"grant_type=" + canary + forge)
    target.post(body=form + b"&username=" + canary + forge + b"&password=" + canary)
    target.post(b"/token", b"Idempotency-Key: " + canary + b"\r\n", body=refreshed)
    target.post(b"/revoke", b"Authorization: Basic " + basic + b"\r\n", body=b"token=" + canary)
    log = target.server.log_text()
    secrets = [target.client.secret or "", PASSWORD, tokens["refresh_token"], tokens["access_token"], basic.decode()]
    for secret in (CANARY, "forged", "\x1b", "evil", *secrets):
        assert secret not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    requests = [line for line in lines if line["event"] == "request"]
    assert {line["route"] for line in requests} >= {"/token", "/revoke", "/v1/users/me", "unmatched"}
    assert all(re.fullmatch(r"[0-9a-f]{16}", line["request_id"]) for line in requests)


PROTECTION = (
    *(b"x-content-type-options: nosniff", b"x-frame-options: DENY", b"referrer-policy: no-referrer"),
    *(b"cross-origin-opener-policy: same-origin", b"cross-origin-resource-policy: same-origin"),
    *(b"content-security-policy: default-src 'none'; frame-ancestors 'none'", b"cache-control: no-store"),
)


@pytest.mark.case("INP-23")
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n folded: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X-A: " + b"a" * 66_000, 431),
        (b"GET /?" + b"a" * 66_000, 431),
    ],
    ids=["no request", "a folded header", "an endless header", "an endless url"],
)
def test_what_never_became_a_request_is_answered_under_the_same_protection(
    target: Target, request_: bytes, status: int
) -> None:
    """By the parser itself, without a body and without a name; the connection ends with it."""
    head, _, body = target.raw(request_).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status)
    assert set(PROTECTION) <= set(lines)
    assert b"connection: close" in lines
    assert body == b""
    assert b"uvicorn" not in head.lower()
    assert not any(line.lower().startswith(b"server:") for line in lines)


def _endless(address: tuple[str, int], begin: bytes, piece: bytes, most: int) -> tuple[bytes, int]:
    """Send `begin` and then `piece` again and again; return what was answered and how much could be sent."""
    sent, answer = 0, b""
    with socket.create_connection(address, timeout=10) as connection:
        try:
            connection.sendall(begin)
            while sent < most:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
        with contextlib.suppress(OSError):
            answer = connection.recv(4096)
    return answer, sent


@pytest.mark.case("INP-09")
@pytest.mark.parametrize(
    "begin",
    [
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: ",
        b"GET /",
        b"POST /token HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
    ],
    ids=["header", "url", "trailer"],
)
def test_what_never_ends_is_cut_off_before_it_fills_the_memory(target: Target, begin: bytes) -> None:
    """A connection that sends one endless header, URL or trailer is closed after about a megabyte at most."""
    answer, sent = _endless(("127.0.0.1", target.server.port), begin, b"a" * 65536, 64 * 1024 * 1024)
    assert sent < 16 * 1024 * 1024  # what the sockets' buffers took, too
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 4"))
