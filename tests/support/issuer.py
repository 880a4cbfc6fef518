"""
An issuer as verifiers meet it on a bad day: late, endless, moved, mute, malicious, or down.

A small threaded HTTP server on 127.0.0.1 with RSA keys of its own. It counts what it is asked, and a test says how it
answers.
"""

import base64
import functools
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self, final
from urllib.parse import parse_qs, unquote_plus

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.infra.runtime.ids import encode_token
from tests.support.servers import kept_port
from tests.support.tokens import b64, changed, compact

METADATA = "/.well-known/oauth-authorization-server"
JWKS = "/jwks"
AUDIENCE = "https://orders.example"
CLIENT_ID, CLIENT_SECRET = "cl_orders", "cs_: half+ä %3A"  # all that a careless reader of Basic stumbles over
_BETWEEN_BYTES = 0.02  # seconds; every read of the other side succeeds long before it gives up
_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds
_LONGEST_HANG = 60.0  # seconds; a test that forgets to close its issuer still ends


@functools.cache
def _made_once(_name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


_making = threading.Lock()


def private_key(name: str) -> rsa.RSAPrivateKey:
    """Return the key of that name, the same one in the whole run, because making one takes long."""
    with _making:  # a cache alone lets a test and an issuer that ask at once have a key each
        return _made_once(name)


def public_jwk(name: str, **members: Any) -> dict[str, Any]:
    """Return the public half of a key as a JWK (RFC 7517 §4) with some members changed or left out (`OMIT`)."""
    numbers = private_key(name).public_key().public_numbers()
    n, e = (b64(number.to_bytes((number.bit_length() + 7) // 8, "big")) for number in (numbers.n, numbers.e))
    return changed({"kty": "RSA", "kid": name, "use": "sig", "alg": "RS256", "n": n, "e": e}, members)


def key_set(*jwks: str | Mapping[str, Any]) -> bytes:
    """Return a JWK Set (RFC 7517 §5) of keys that are given as JWKs or by their names."""
    return json.dumps({"keys": [public_jwk(jwk) if isinstance(jwk, str) else jwk for jwk in jwks]}).encode()


def an_api_key(number: int = 1) -> str:
    """Return an API key as the service spells them, the same one for the same number."""
    noise = hashlib.sha512(str(number).encode()).digest()
    return encode_token(f"idk_{encode_token('', noise[:8])[:11]}_", noise[32:])


def exchanged(api_key: str, **claims: Any) -> dict[str, Any]:
    """Return the claims by which a token that came out of an exchange by `CLIENT_ID` differs from others."""
    of_exchange = {"client_id": CLIENT_ID, "act": {"sub": CLIENT_ID}, "key_id": api_key[4:15], "amr": ["api_key"]}
    return {**of_exchange, **claims}


def token_answer(access_token: object, **members: Any) -> bytes:
    """Return the answer to a token exchange (RFC 8693 §2.2.1) with some members changed or left out (`OMIT`)."""
    answer = {
        "access_token": access_token,
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "token_type": "Bearer",
        "expires_in": 600,
        "scope": "orders:read",
    }
    return json.dumps(changed(answer, members)).encode()


def wait_for_fetches() -> None:
    """Return once no verifier of this process asks anything, as must happen within a bounded time."""
    for thread in threading.enumerate():
        if thread.name in ("jwks", "api-key"):
            thread.join(_PATIENCE)
            assert not thread.is_alive(), "a thread is left behind"


def resolve_internal(monkeypatch: pytest.MonkeyPatch, address: Callable[[], str]) -> None:
    """Let the name `id.internal` have the address that `address` returns, or fail to resolve as it fails."""
    look_up = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        return look_up(address() if host in ("id.internal", b"id.internal") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """
    How a path is answered. `body` None stands for what an honest issuer says there.

    `how`: "once", "drip the head" or "drip the body" byte by byte without an end, "endless" for a body that never ends
    but comes fast, "cut off" for one that ends before it should, "when told" for once, after `Issuer.let_go`.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    how: Literal["once", "drip the head", "drip the body", "endless", "cut off", "when told"] = "once"


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """One request that came in."""

    path: str
    headers: Message
    body: bytes = b""


@final
class Issuer:
    """
    A running issuer; leave it with `close` or a `with` block.

    `path` is the issuer's own path, without a slash at its end. Keys are named by their `kid`.
    """

    def __init__(self, path: str = "") -> None:
        self.kids = ["k1"]
        self.cached: bytes | None = None  # the key set that a cache on the way gives to whoever does not ask past it
        self.api_keys: dict[str, dict[str, Any]] = {}  # those that are good, and what their tokens say besides
        self.asked: list[Asked] = []
        self._path = path
        self._answers: dict[str, Answer] = {}
        self._may_answer = threading.Event()
        self._may_answer.set()
        self._told = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._place = kept_port()
        self.port: int = self._place.getsockname()[1]
        self._listen()

    # -- who it is ------------------------------------------------------------------------------------------------

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The issuer identifier."""
        return self.origin + self._path

    @property
    def token_path(self) -> str:
        """Where tokens are asked for."""
        return f"{self._path}/token"

    @property
    def metadata(self) -> dict[str, Any]:
        """What an honest issuer's metadata says (RFC 8414 §2)."""
        return {"issuer": self.url, "jwks_uri": self.origin + JWKS, "token_endpoint": f"{self.url}/token"}

    def mint(
        self, kid: str = "k1", *, header: Mapping[str, Any] | None = None, now: float | None = None, **claims: Any
    ) -> str:
        """Return an access token (RFC 9068 §2) for `AUDIENCE`, issued `now`, signed by the key of that name."""
        issued_at = int(time.time() if now is None else now)
        payload = {
            "iss": self.url,
            "sub": "user-1",
            "aud": AUDIENCE,
            "client_id": "client-1",
            "iat": issued_at,
            "exp": issued_at + 600,
            "jti": "token-1",
            "scope": "orders:read",
        }
        said = changed({"alg": "RS256", "typ": "at+jwt", "kid": kid}, header or {})
        return compact(said, changed(payload, claims), private_key(kid))

    # -- how it behaves -------------------------------------------------------------------------------------------

    def answer(self, path: str, **how: Any) -> None:
        """Answer that path as an `Answer` of these values says, from now on; without values, honestly."""
        self._answers[path] = Answer(**how)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Hold every answer back until the block is left."""
        self._may_answer.clear()
        try:
            yield
        finally:
            self._may_answer.set()

    def let_go(self) -> None:
        """Answer those who were to be answered when told."""
        self._told.set()

    def go_down(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def come_back(self) -> None:
        """Listen again at the same address."""
        self._listen()

    def close(self) -> None:
        """End everything."""
        for event in (self._closed, self._may_answer, self._told):
            event.set()
        self.go_down()
        self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what it saw ----------------------------------------------------------------------------------------------

    def count(self, path: str) -> int:
        """Return how many requests there were for a path."""
        return sum(asked.path == path for asked in list(self.asked))

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests there were for the metadata and for the key set."""
        return self.count(METADATA + self._path), self.count(JWKS)

    def wait_until_asked(self, path: str, times: int = 1) -> None:
        """Return once there were as many requests for a path."""
        deadline = time.monotonic() + _PATIENCE
        while self.count(path) < times:
            assert time.monotonic() < deadline, f"{path} was asked for {self.count(path)} times, not {times}"
            time.sleep(0.005)

    # -- at work --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._server = _Server(self, self.port)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="issuer", daemon=True).start()

    def _handle(self, request: "_Request") -> None:
        asked = Asked(request.path, request.headers, request.rfile.read(int(request.headers["content-length"] or 0)))
        with self._lock:
            self.asked.append(asked)
        answer = self._answers.get(request.path, Answer())
        if request.path == JWKS and self.cached and request.headers["cache-control"] != "no-cache":
            answer = Answer(body=self.cached)
        self._may_answer.wait(_LONGEST_HANG)
        self._closed.wait(answer.delay)
        if answer.how == "when told":
            self._told.wait(_LONGEST_HANG)
        with suppress(ConnectionError):  # the other side has had enough, which is what most of this is for
            self._send(request, self._completed(answer, asked))

    def _completed(self, answer: Answer, asked: Asked) -> Answer:
        path = asked.path
        if answer.body is not None:
            return answer
        if path == self.token_path and answer.status == 200:
            return self._exchange(answer, asked)
        if path == JWKS:
            return replace(answer, body=key_set(*self.kids))
        if path == METADATA + self._path:
            return replace(answer, body=json.dumps(self.metadata).encode())
        return replace(answer, body=b"", status=404 if answer == Answer() else answer.status)

    def _exchange(self, answer: Answer, asked: Asked) -> Answer:
        """Answer a token exchange as the service does (RFC 8693 §2)."""
        name, _, secret = base64.b64decode(asked.headers["authorization"][6:]).decode("ascii").partition(":")
        if (unquote_plus(name), unquote_plus(secret)) != (CLIENT_ID, CLIENT_SECRET):
            return replace(answer, status=401, body=b'{"error": "invalid_client"}')
        (api_key,) = parse_qs(asked.body.decode("ascii"), strict_parsing=True)["subject_token"]
        if api_key not in self.api_keys:
            return replace(answer, status=400, body=b'{"error": "invalid_grant"}')
        return replace(answer, body=token_answer(self.mint(**exchanged(api_key, **self.api_keys[api_key]))))

    def _send(self, request: "_Request", answer: Answer) -> None:
        body = answer.body or b""
        if answer.how == "drip the head":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self._drip(request)
            return
        request.send_response(answer.status)
        for name, value in answer.headers.items():
            request.send_header(name, value)
        if answer.how in ("once", "cut off", "when told"):
            request.send_header("Content-Length", str(len(body) + (answer.how == "cut off")))
        request.end_headers()
        request.wfile.write(body)
        if answer.how == "drip the body":
            self._drip(request)
        while answer.how == "endless" and not self._closed.wait(0.002):
            request.wfile.write(b" " * 65536)

    def _drip(self, request: "_Request") -> None:
        while not self._closed.wait(_BETWEEN_BYTES):
            request.wfile.write(b" ")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, issuer: Issuer, port: int) -> None:
        self.issuer = issuer
        super().__init__(("127.0.0.1", port), _Request, bind_and_activate=False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.server_bind()
        self.server_activate()


class _Request(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.issuer._handle(self)

    do_POST = do_GET  # noqa: N815  # the base class finds it by this name

    def log_message(self, *_: object) -> None:
        """Say nothing."""
