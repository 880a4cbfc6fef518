"""Secrets go in at the door and come out nowhere: not in logs, rows, metrics, answers; and nobody writes our log."""

import asyncio
import base64
import contextlib
import copy
import json
import logging
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg
import pytest
import redis

from identity_service.accounts.clients import NewClient
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import metadata
from identity_service.main import Services, build_services
from tests.support.addresses import plain
from tests.support.server_process import ServerProcess
from tests.support.servers import free_port
from tests.support.service import ISSUER, MASTER_KEY, test_settings
from tests.support.waiting import wait_until

PASSWORD = "Kanarienvogel-Passwort-77"
WRONG = "Kanarienvogel-Vertippt-88"
IN_THE_NAME = "Kanarienvogel-im-Namensfeld-99"
KEY = "Kanarienvogel-Idempotenz-00"
QUERY = "Kanarienvogel-in-der-Adresse-11"
EMAIL = "kanarie@example.org"
_PATIENCE = 30.0  # seconds for what takes milliseconds


@contextlib.contextmanager
def served(database_url: str, redis_url: str, **env: str) -> Iterator[ServerProcess]:
    with ServerProcess(database_url, redis_url, **{"issuer": ISSUER, "log_level": "DEBUG", **env}) as server:
        yield server


def asked(url: str, method: str = "GET") -> httpx2.Response:
    return httpx2.request(method, url, timeout=_PATIENCE)


def prepared(database_url: str) -> tuple[str, str, str]:
    """Make a user and a client; return the client's id, its secret and the user's id."""

    async def prepare() -> tuple[str, str, str]:
        services: Services = build_services(test_settings(database_url))
        new = NewClient(
            name="Canary",
            first_party=True,
            grant_types=("password", "refresh_token", "client_credentials"),
            scope=("account:read",),
            audiences=(ISSUER,),
            introspect=(ISSUER,),
        )
        hashed = await services.users.prepare_password(Secret(PASSWORD), names=())
        async with services.db.transaction() as tx:
            client, secret = await services.clients.register(tx, new)
            user = await services.users.create(
                tx, username="kanarie", email=EMAIL, role="user", password_hash=hashed, verified=True
            )
        await services.close()
        assert secret is not None
        return client.id, secret.reveal(), str(user.id)

    return asyncio.run(prepare())


class Canaries:
    """Every secret that was handed in or out."""

    def __init__(self, *secrets: str) -> None:
        self.all = set(secrets)

    def spellings(self) -> set[str]:
        """Return each of them as it may also be written: in base64, percent-encoded, as hexadecimal digits."""
        found = set()
        for secret in self.all:
            raw = secret.encode()
            found |= {secret, quote(secret, safe=""), raw.hex(), base64.b64encode(raw).decode().rstrip("=")}
        return {spelling.lower() for spelling in found}

    def absent_from(self, text: str, where: str) -> None:
        text = text.lower()
        assert [spelling for spelling in self.spellings() if spelling in text] == [], where


def everything_in(database_url: str) -> str:
    """Return every row of every table as text."""
    with psycopg.connect(plain(database_url)) as connection:
        rows = [
            row[0]
            for table in metadata.sorted_tables
            for row in connection.execute(f"SELECT t::text FROM {table.name} t").fetchall()  # noqa: S608
        ]
    assert len(rows) > 20
    return "\n".join(rows)


def everything_in_redis(redis_url: str) -> str:
    with redis.Redis.from_url(redis_url) as client:
        return "\n".join(f"{key!r} {client.get(key)!r}" for key in client.scan_iter())


def drive(http: httpx2.Client, client_id: str, secret: str) -> Canaries:
    """Use every way in and out, rightly and wrongly; no answer but the one that grants it shows a secret."""
    auth = (client_id, secret)
    basic = base64.b64encode(f"{client_id}:{secret}".encode()).decode()
    canaries = Canaries(PASSWORD, WRONG, IN_THE_NAME, KEY, QUERY, MASTER_KEY, secret, basic)
    sign_in = {"grant_type": "password", "username": "kanarie", "password": PASSWORD}

    def granted(answer: httpx2.Response) -> dict[str, str]:
        assert answer.status_code == 200, answer.text
        tokens: dict[str, str] = answer.json()
        canaries.all |= {token for name, token in tokens.items() if name in ("access_token", "refresh_token")}
        return tokens

    def refused(answer: httpx2.Response) -> None:
        assert 400 <= answer.status_code < 500, answer.text
        canaries.absent_from(answer.text + repr(answer.headers), "the answer")

    tokens = granted(http.post("/token", data=sign_in, auth=auth))
    granted(http.post("/token", data={"grant_type": "client_credentials"}, auth=auth))
    assert http.get("/v1/users/me", headers={"authorization": f"Bearer {tokens['access_token']}"}).status_code == 200
    for change in ({"password": WRONG}, {"username": IN_THE_NAME}, {"username": EMAIL, "password": WRONG}):
        refused(http.post("/token", data=sign_in | change, auth=auth))
    refused(http.post("/token", data=sign_in | {"password": PASSWORD + "\0"}, auth=auth))
    refused(http.post("/token", data=sign_in | {"scope": QUERY}, auth=auth))
    refused(http.post("/token", data=sign_in | {"grant_type": QUERY}, auth=auth))
    refused(http.post("/token", data=sign_in | {"client_secret": WRONG}, auth=auth))
    refused(http.post("/token", data=sign_in, auth=(client_id, WRONG)))
    refused(http.post("/token", data=sign_in, auth=(IN_THE_NAME, secret)))
    refused(http.post("/token", data=sign_in, headers={"authorization": f"Basic {basic}{basic}"}))
    refused(http.post(f"/token?password={QUERY}&client_secret={secret}", data=sign_in, auth=auth))
    refused(http.post("/token", content=f"password={PASSWORD}&password={PASSWORD}", auth=auth))
    refused(http.post("/token", json=sign_in, auth=auth))
    refused(http.get("/v1/users/me", params={"access_token": tokens["access_token"]}))
    refused(http.get("/v1/users/me", headers={"authorization": f"Bearer {tokens['refresh_token']}"}))
    refused(http.get(f"/nothing/{QUERY}?token={tokens['refresh_token']}"))

    refresh = {"grant_type": "refresh_token"}
    first = tokens["refresh_token"]
    second = granted(
        http.post("/token", data={**refresh, "refresh_token": first}, auth=auth, headers={"idempotency-key": KEY})
    )
    granted(http.post("/token", data={**refresh, "refresh_token": first}, auth=auth, headers={"idempotency-key": KEY}))
    refused(http.post("/token", data={**refresh, "refresh_token": first}, auth=auth))
    refused(http.post("/token", data={**refresh, "refresh_token": second["refresh_token"]}, auth=auth))
    refused(
        http.post("/token", data={**refresh, "refresh_token": first[:-1]}, auth=auth, headers={"idempotency-key": "x"})
    )
    other = granted(http.post("/token", data=sign_in, auth=auth))
    assert http.post("/introspect", data={"token": other["access_token"]}, auth=auth).json()["active"] is True
    assert http.post("/revoke", data={"token": other["access_token"]}, auth=auth).status_code == 200
    for token in (other["access_token"], other["refresh_token"], other["access_token"] + "A", KEY):
        assert http.post("/introspect", data={"token": token}, auth=auth).json() == {"active": False}
        assert http.post("/revoke", data={"token": token}, auth=auth).status_code == 200
    return canaries


def log_lines(server: ServerProcess) -> list[dict[str, Any]]:
    """Return the log's events; each is one line of JSON, whatever was sent."""
    text = server.log_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.case("SEC-01")
@pytest.mark.parametrize("log_json", ["true", "false"])
def test_no_secret_is_seen_again(database_url: str, redis_url: str, log_json: str) -> None:
    """Not in the log at its most talkative, a fault's traceback included; not in a row, a counter or Redis."""
    client_id, secret, user_id = prepared(database_url)
    port = free_port()
    with served(database_url, redis_url, log_json=log_json, management_port=str(port)) as server:
        with httpx2.Client(base_url=server.url, timeout=_PATIENCE) as http:
            canaries = drive(http, client_id, secret)
            everything = everything_in(database_url)
            with psycopg.connect(plain(database_url), autocommit=True) as connection:
                connection.execute("ALTER TABLE audit_events ADD CONSTRAINT planted CHECK (false) NOT VALID")
            form = {"grant_type": "password", "username": "kanarie", "password": PASSWORD}
            fault = http.post("/token", data=form, auth=(client_id, secret))
            assert fault.status_code == 500
            canaries.absent_from(fault.text, "the answer to a fault")
        metrics = asked(f"http://127.0.0.1:{port}/metrics").text
        server.stop()
        log = server.log_text()
    assert "request.failed" in log
    assert "Traceback" in log
    canaries.absent_from(log, "the log")
    canaries.absent_from(everything, "the database")
    canaries.absent_from(metrics, "the metrics")
    canaries.absent_from(everything_in_redis(redis_url), "Redis")
    for personal in (user_id, "kanarie", EMAIL):
        assert personal not in metrics
        assert personal not in everything_in_redis(redis_url)
    assert "kanarie" not in log


TRACEBACK = """
import sys
import structlog
from identity_service.infra.telemetry import configure_logging

def fail(password):
    copied = {"typed": password}
    raise RuntimeError("planted")

configure_logging(as_json=sys.argv[1] == "json")
log = structlog.get_logger()
try:
    fail(sys.argv[2])  # not spelled here: a traceback may show the lines of a program
except RuntimeError as error:
    log.error("failed", exc_info=error, token=sys.argv[2], authorization="Basic " + sys.argv[2])
"""


@pytest.mark.case("SEC-01")
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_shows_no_variables_and_a_field_named_like_a_secret_no_value(form: str) -> None:
    """In neither form of the log; libraries like to print the values of local variables."""
    words = [sys.executable, "-c", TRACEBACK, form, "Kanarienvogel"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "planted" in done.stdout
    assert "[redacted]" in done.stdout
    assert "Kanarienvogel" not in done.stdout + done.stderr


@pytest.mark.case("SEC-01")
def test_a_secret_cannot_print_itself() -> None:
    """However it gets into a sentence, a log line, a copy or a dump."""
    secret = Secret(PASSWORD)
    shown = [
        *(repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", "%s" % secret, "%r" % [secret]),  # noqa: UP031
        *(
            repr({"password": secret}),
            repr((secret,)),
            logging.makeLogRecord({"msg": "%s", "args": (secret,)}).getMessage(),
        ),
    ]
    assert all(PASSWORD not in text for text in shown)
    leaks: list[Callable[[], object]] = [
        lambda: pickle.dumps(secret),
        lambda: copy.deepcopy(secret),
        lambda: json.dumps(secret),
    ]
    for leak in leaks:
        with pytest.raises(TypeError) as caught:
            leak()
        assert PASSWORD not in str(caught.value)
    assert not hasattr(secret, "__dict__")


# -- the log is ours --------------------------------------------------------------------------------------------------

FORGED = '","event":"forged","x":"'
INJECTIONS = [
    *("a\nb", "a\r\nb", "\x1b[2J\x1b[31mred", "a\x00b", FORGED, "\u2028\u2029\x85", "%0a%0d", "{}\n{}", "\x7f\x08\x08"),
    *("x" * 5000, "${jndi:ldap://x}", "\ud7ff\ufffd", "<script>"),
]


def exchange(port: int, request: bytes) -> bytes:
    """Send bytes as they are, and return what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as connection:
        connection.sendall(request)
        connection.settimeout(5)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    return answer


@pytest.mark.case("SEC-03")
def test_whatever_is_sent_each_event_is_one_line_of_our_own_words(database_url: str, redis_url: str) -> None:
    """Newlines, escapes and JSON in names, ids, headers and paths: one line each, and none forged."""
    client_id, secret, _ = prepared(database_url)
    with served(database_url, redis_url, trusted_proxies="127.0.0.1") as server:
        with httpx2.Client(base_url=server.url, timeout=_PATIENCE) as http:
            for text in INJECTIONS:
                form = {"grant_type": "password", "username": text, "password": text, "scope": text}
                http.post("/token", data=form, auth=(client_id, secret))
                http.post("/token", data={"grant_type": text}, auth=(client_id, secret))
                http.post("/token", data={"grant_type": "refresh_token", "client_id": text, "client_secret": text})
                for path in ("/revoke", "/introspect"):
                    http.post(path, data={"token": text, "token_type_hint": text}, auth=(client_id, secret))
                http.get("/" + quote(text[:1000], safe=""))
                http.post("/token?x=" + quote(text[:1000], safe=""), data=form)
        for text in INJECTIONS[:9]:
            raw = text.replace("\r", "").replace("\n", "").replace("\x00", "").encode()
            for header in (
                b"User-Agent",
                b"X-Forwarded-For",
                b"X-Request-Id",
                b"Authorization",
                b"Idempotency-Key",
                b"Referer",
            ):
                request = b"POST /token HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + header + b": " + raw
                exchange(server.port, request + b"\r\nContent-Length: 0\r\n\r\n")
            exchange(
                server.port,
                b"GET /" + raw.replace(b" ", b"") + b" HTTP/1.1\r\nHost: " + raw + b"\r\nConnection: close\r\n\r\n",
            )
            exchange(server.port, raw + b"\r\n\r\n")
        server.stop()
        lines = log_lines(server)
        text = server.log_text()
    assert "forged" not in text
    assert "jndi" not in text
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", text) is None
    assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) >= len(INJECTIONS) * 7
    endpoints = {"/token", "/revoke", "/introspect"}
    assert {line["route"] for line in requests} <= {*endpoints, "unmatched", "unknown host", "refused"}
    assert all(re.fullmatch("[0-9a-f]{16}", line["request_id"]) for line in requests)
    assert len({line["request_id"] for line in requests}) == len(requests)
    with psycopg.connect(plain(database_url)) as connection:
        rows = connection.execute("SELECT coalesce(network, '') || coalesce(target, '') FROM audit_events").fetchall()
    assert rows
    assert all(re.fullmatch(r"[0-9A-Za-z.:/_ -]*", row[0]) for row in rows)


# -- metrics ----------------------------------------------------------------------------------------------------------


def series(port: int) -> set[str]:
    """Return the names and labels of what is counted, but for jobs: those run when they are due, not when asked."""
    text = asked(f"http://127.0.0.1:{port}/metrics").text
    names = {line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("identity_")}
    return {name for name in names if not name.startswith("identity_job_")}


@pytest.mark.case("SEC-11")
def test_nobody_outside_can_make_the_metrics_grow(database_url: str, redis_url: str) -> None:
    """Invented clients, paths, grant types and scopes add no series; registered clients have one for each outcome."""
    client_id, secret, _ = prepared(database_url)
    port = free_port()
    with (
        served(database_url, redis_url, management_port=str(port)) as server,
        httpx2.Client(base_url=server.url, timeout=_PATIENCE) as http,
    ):

        def storm(salt: str) -> None:
            for number in range(20):
                word = f"{salt}{number}"
                http.post("/token", data={"grant_type": word}, auth=(client_id, secret))
                http.post("/token", data={"grant_type": "client_credentials", "scope": word}, auth=(client_id, secret))
                http.post("/token", data={"grant_type": "client_credentials"}, auth=(word, secret))
                http.post("/token", data={"grant_type": "client_credentials", "client_id": f"cl_{word:0>22}"})
                http.post(
                    "/token", data={"grant_type": "refresh_token", "refresh_token": word}, auth=(client_id, secret)
                )
                http.get(f"/{word}/{word}?{word}={word}")

        def guess() -> int:
            return http.post("/token", data={"grant_type": "client_credentials"}, auth=("nobody", secret)).status_code

        storm("a")
        wait_until(lambda: guess() == 429, "nobody is slowed down")  # a slow machine gives back as much as it takes
        before = series(port)
        assert any(f'client="{client_id}"' in name and 'outcome="invalid_scope"' in name for name in before)
        assert any('grant="other"' in name for name in before)
        storm("b")
        assert series(port) == before


@pytest.mark.case("SEC-11")
@pytest.mark.case("ADM-25")
def test_metrics_are_on_their_own_port_only(database_url: str, redis_url: str) -> None:
    """And without that port, nowhere."""
    port = free_port()
    with served(database_url, redis_url, management_port=str(port)) as server:
        assert asked(f"{server.url}/metrics").status_code == 404
        assert "identity_limiter_degraded 0.0" in asked(f"http://127.0.0.1:{port}/metrics").text
        assert asked(f"http://127.0.0.1:{port}/token", "POST").status_code != 200


# -- what production does not show ------------------------------------------------------------------------------------


@pytest.mark.case("ADM-25")
def test_production_shows_nothing_that_is_for_developers(database_url: str, redis_url: str, tmp_path: Path) -> None:
    """No documentation, schema, metrics or files; health says as little as it can."""
    production = {
        "environment": "production",
        "issuer": "https://id.example.test",
        "argon2_memory_kib": "19456",
        "argon2_time_cost": "2",
        "refusal_delay": "0.1",
        "log_level": "INFO",
    }
    with (
        served(database_url, redis_url, **production) as server,
        httpx2.Client(base_url=server.url, headers={"host": "id.example.test"}, timeout=_PATIENCE) as http,
    ):
        bodies = set()
        for path in (
            *("/docs", "/docs/", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/metrics", "/debug", "/admin"),
            *("/.git/config", "/.env", "/server-status", "/", "/health", "/favicon.ico", "/static/../settings.py"),
        ):
            answer = http.get(path)
            assert answer.status_code == 404, path
            bodies.add(answer.text)
        assert len(bodies) == 1
        assert http.get("/healthz").json() == {"status": "ok"}
        assert "server" not in http.get("/healthz").headers
        assert http.get("/.well-known/jwks.json").status_code == 200
        assert http.get("/.well-known/jwks.json", headers={"host": "evil.example"}).status_code == 404


def test_nothing_waits_for_a_slow_reader_of_metrics(database_url: str, redis_url: str) -> None:
    """A connection to the management listener that says nothing stops neither it nor the service."""
    port = free_port()
    with (
        served(database_url, redis_url, management_port=str(port)) as server,
        socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE),
    ):
        begun = time.monotonic()
        assert series(port)
        assert asked(f"{server.url}/healthz").status_code == 200
        assert time.monotonic() - begun < _PATIENCE  # who waits for such a reader waits for ever
        assert server.stop() == 0
