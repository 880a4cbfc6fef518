"""API keys at a sibling: exchanged over a real socket, by issuers good and bad, and in front of a sibling's routes."""

import asyncio
import gzip
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import FastAPI, WebSocket
from sqlalchemy import update

from identity_service.accounts.api_keys import NewKey
from identity_service.infra.runtime import SystemClock
from identity_service.infra.tables import api_keys
from identity_service.oauth.grants.token_exchange import TokenExchange
from identity_service.verifier import (
    ApiKeyExchanger,
    ExchangeUnavailable,
    InsufficientScope,
    TokenRefused,
    TokenVerifier,
    VerifiedClaims,
)
from identity_service.verifier.fastapi import ApiKeys, Protect
from tests.support.asking import connect
from tests.support.clock import UnixClock
from tests.support.issuer import (
    AUDIENCE,
    CLIENT_ID,
    CLIENT_SECRET,
    METADATA,
    Issuer,
    an_api_key,
    exchanged,
    resolve_internal,
    token_answer,
    wait_for_fetches,
)
from tests.support.server_process import ServerProcess
from tests.support.service import Registered, Service, running, test_settings
from tests.support.tokens import OMIT

_ROOT = Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds
_TIMEOUT = 0.5  # seconds that an exchange may take where the issuer does not answer in time
_AT_MOST = 20.0  # seconds in which it must have been given up, on a machine that is busy with other things
KEY, OTHER, BAD = an_api_key(1), an_api_key(2), an_api_key(3)

Header = tuple[str, str]


@pytest.fixture
def issuer(issuer: Issuer) -> Issuer:
    """An issuer that knows two API keys."""
    issuer.api_keys = {KEY: {"sub": "ada"}, OTHER: {"sub": "bob", "scope": "orders:write"}}
    return issuer


def exchanger_at(issuer: Issuer, **options: Any) -> ApiKeyExchanger:
    """Return an exchanger that has asked nothing yet."""
    given = {"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, "timeout": _PATIENCE}
    return ApiKeyExchanger(TokenVerifier(issuer.url, AUDIENCE, timeout=_PATIENCE), **{**given, **options})


async def unavailable(exchanger: ApiKeyExchanger, key: str = KEY) -> str:
    """Return why nobody can tell."""
    with pytest.raises(ExchangeUnavailable) as told:
        await exchanger.verify(key)
    return told.value.reason


# -- over a socket ----------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2")
@pytest.mark.parametrize("path", ["", "/tenant"])
async def test_a_key_is_exchanged_and_its_owner_known(path: str) -> None:
    with Issuer(path) as issuer:
        issuer.api_keys = {KEY: {"sub": "ada"}}
        exchanger = exchanger_at(issuer)
        claims = [await exchanger.verify(KEY, "orders:read"), await asyncio.to_thread(exchanger.verify_sync, KEY)]
        assert [(told.subject, told.client_id, told.claims["key_id"]) for told in claims] == [
            ("ada", CLIENT_ID, KEY[4:15])
        ] * 2
        with pytest.raises(TokenRefused, match="api_key_refused"):
            await exchanger.verify(BAD)
        assert issuer.count(f"{path}/token") == 2
    wait_for_fetches()


async def test_who_presents_the_wrong_secret_blames_no_key(issuer: Issuer) -> None:
    assert await unavailable(exchanger_at(issuer, client_secret="wrong")) == "invalid_client"
    assert await unavailable(exchanger_at(issuer, client_id="cl_nobody")) == "invalid_client"


async def test_two_hundred_callers_cause_one_request(issuer: Issuer) -> None:
    exchanger = exchanger_at(issuer)
    with issuer.silence():
        callers = [asyncio.create_task(exchanger.verify(KEY)) for _ in range(200)]
        await asyncio.to_thread(issuer.wait_until_asked, issuer.token_path)
        assert not any(caller.done() for caller in callers)
    assert {claims.subject for claims in await asyncio.gather(*callers)} == {"ada"}
    assert issuer.count(issuer.token_path) == 1


async def test_many_keys_at_once_all_get_their_own_answer(issuer: Issuer) -> None:
    keys = {an_api_key(number): f"user-{number}" for number in range(100, 150)}
    issuer.api_keys = {key: {"sub": owner} for key, owner in keys.items()}
    exchanger = exchanger_at(issuer)
    told = await asyncio.gather(*(exchanger.verify(key) for key in keys for _ in range(3)))
    assert [claims.subject for claims in told] == [owner for owner in keys.values() for _ in range(3)]
    assert issuer.count(issuer.token_path) == 50


async def test_an_exchanger_outlives_the_loops_it_is_used_in(issuer: Issuer) -> None:
    """Also one that ended while somebody in it was waiting."""
    exchanger = exchanger_at(issuer)

    async def waits_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(exchanger.verify(KEY), 0.1)

    with issuer.silence():
        await asyncio.to_thread(asyncio.run, waits_in_vain())
    for key in (KEY, OTHER):
        claims = await asyncio.to_thread(asyncio.run, exchanger.verify(key))
        assert claims.claims["key_id"] == key[4:15]
    assert issuer.count(issuer.token_path) == 2


async def test_an_issuer_that_is_down_is_asked_again_as_soon_as_it_is_back(issuer: Issuer) -> None:
    exchanger = exchanger_at(issuer)
    assert await exchanger.verify(OTHER)
    issuer.go_down()
    assert await unavailable(exchanger) == "no_answer"
    assert await exchanger.verify(OTHER), "who is remembered needs no issuer"
    issuer.come_back()
    assert await exchanger.verify(KEY)


TROUBLES: dict[str, dict[str, Any]] = {
    "accepts and says nothing": {"how": "when told"},
    "drips its head": {"how": "drip the head"},
    "drips its body": {"how": "drip the body", "body": b"{"},
    "answers too late": {"delay": 60},
    "hangs up": {"how": "cut off", "body": b"{}"},
}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_an_issuer_in_trouble_is_given_up_in_time(issuer: Issuer, trouble: str) -> None:
    """For coroutines and for threads, and no thread is left behind."""
    exchangers = [exchanger_at(issuer, timeout=_TIMEOUT) for _ in range(2)]
    issuer.answer(issuer.token_path, **TROUBLES[trouble])
    began = time.monotonic()
    results = await asyncio.gather(
        exchangers[0].verify(KEY), asyncio.to_thread(exchangers[1].verify_sync, KEY), return_exceptions=True
    )
    wait_for_fetches()
    assert time.monotonic() - began < _AT_MOST
    assert [type(result) for result in results] == [ExchangeUnavailable, ExchangeUnavailable]


async def test_a_name_that_is_slow_to_resolve_is_given_up_in_time(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def address() -> str:
        over.wait(_PATIENCE)
        raise socket.gaierror("nobody knows")

    resolve_internal(monkeypatch, address)
    endpoint = f"http://id.internal:{issuer.port}/token"
    began = time.monotonic()
    try:
        told = await unavailable(exchanger_at(issuer, token_endpoint=endpoint, allow_http=True, timeout=_TIMEOUT))
        assert told == "no_answer"
        assert time.monotonic() - began < _AT_MOST
    finally:
        over.set()


@pytest.mark.parametrize("answer", [{"how": "endless"}, {}], ids=["without an end", "as a whole"])
async def test_an_answer_that_is_too_long_is_not_read_to_its_end(
    issuer: Issuer, answer: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = token_answer(issuer.mint(**exchanged(KEY)))
    issuer.answer(issuer.token_path, body=good + b" " * 65536, **answer)
    began = time.monotonic()
    assert await unavailable(exchanger_at(issuer, timeout=_PATIENCE)) == "no_answer"
    assert time.monotonic() - began < _AT_MOST
    assert "more than 65536 bytes" in caplog.text


async def test_what_is_compressed_although_that_was_not_asked_for_is_not_unpacked(issuer: Issuer) -> None:
    good = token_answer(issuer.mint(**exchanged(KEY)))
    issuer.answer(issuer.token_path, headers={"Content-Encoding": "gzip"}, body=gzip.compress(good))
    assert await unavailable(exchanger_at(issuer)) == "answer_not_trusted"


@pytest.mark.parametrize("status", [302, 307, 308])
async def test_a_redirect_takes_neither_key_nor_secret_elsewhere(issuer: Issuer, status: int) -> None:
    with Issuer() as elsewhere:
        elsewhere.api_keys = {KEY: {}}
        issuer.answer(issuer.token_path, status=status, headers={"Location": f"{elsewhere.url}/token"}, body=b"")
        assert await unavailable(exchanger_at(issuer)) == f"status_{status}"
        assert elsewhere.asked == []


async def test_metadata_does_not_say_where_the_secret_goes(issuer: Issuer) -> None:
    """A token endpoint elsewhere is for the operator to name."""
    with Issuer() as elsewhere:
        said = {**issuer.metadata, "token_endpoint": f"{elsewhere.url}/token"}
        issuer.answer(METADATA, body=json.dumps(said).encode())
        assert await exchanger_at(issuer).verify(KEY)
        assert elsewhere.asked == []


async def test_without_tls_no_proxy_of_the_environment_is_told(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Issuer() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert await exchanger_at(issuer).verify(KEY)
        assert proxy.asked == []


async def test_tokens_of_another_issuer_open_nothing(issuer: Issuer) -> None:
    """Whoever answers in its place, and whatever they sign."""
    with Issuer() as evil:
        for name in (evil.url, issuer.url):
            token = evil.mint("evil", header={"kid": "k1"}, iss=name, **exchanged(KEY))
            issuer.answer(issuer.token_path, body=token_answer(token))
            assert await unavailable(exchanger_at(issuer)) == "answer_not_trusted"


# -- processes --------------------------------------------------------------------------------------------------------

FORKING = """
import os, signal, sys, threading
from identity_service.verifier import ApiKeyExchanger, TokenVerifier

issuer, audience, client_id, client_secret, key = sys.argv[1:]
signal.alarm(120)  # whatever is stuck ends, and the test fails
verifier = TokenVerifier(issuer, audience)
exchanger = ApiKeyExchanger(verifier, client_id=client_id, client_secret=client_secret, timeout=60)


def child_can_verify():
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os._exit(0 if exchanger.verify_sync(key).subject == "ada" else 1)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def say(word):
    print(word, flush=True)
    return sys.stdin.readline()


# An exchange is under way: the child has nobody who would end it.
waiting = threading.Thread(target=exchanger.verify_sync, args=(key,))
waiting.start()
say("waiting")
assert child_can_verify()
say("forked")
waiting.join()

# Another thread holds the lock.
with exchanger._lock:
    assert child_can_verify()
print("done", flush=True)
"""

ENDING = """
import sys, threading
from identity_service.verifier import ApiKeyExchanger, TokenVerifier

issuer, audience, client_id, client_secret, key = sys.argv[1:]
verifier = TokenVerifier(issuer, audience)
exchanger = ApiKeyExchanger(verifier, client_id=client_id, client_secret=client_secret, timeout=600)
threading.Thread(target=exchanger.verify_sync, args=(key,), daemon=True).start()
sys.stdin.readline()
assert any(thread.name == "api-key" for thread in threading.enumerate())
"""

IMPORTS = """
import sys
from identity_service.verifier import ApiKeyExchanger, ExchangeUnavailable
print(*{name.partition(".")[0] for name in sys.modules}.intersection(
    ("httpx2", "joserfc", "fastapi", "starlette", "pydantic", "sqlalchemy", "structlog", "redis")))
print(*(name for name in sys.modules if name.startswith("identity_service.")))
"""


def script(text: str, *arguments: str) -> "subprocess.Popen[str]":
    """Run a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text, *arguments],  # later Pythons warn of forking
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_forks_during_an_exchange_has_children_that_verify(issuer: Issuer) -> None:
    """As servers do that start their workers by forking: the child has neither the parent's thread nor its lock."""
    issuer.answer(issuer.token_path, how="when told")
    with script(FORKING, issuer.url, AUDIENCE, CLIENT_ID, CLIENT_SECRET, KEY) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "waiting\n"
            issuer.wait_until_asked(issuer.token_path)
            issuer.answer(issuer.token_path)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "forked\n"
            issuer.let_go()
            _, complaints = process.communicate("\n", timeout=2 * _PATIENCE)
        finally:
            process.kill()
    assert complaints == ""
    assert process.returncode == 0


def test_a_process_ends_although_an_exchange_is_under_way(issuer: Issuer) -> None:
    issuer.answer(issuer.token_path, how="when told")
    with script(ENDING, issuer.url, AUDIENCE, CLIENT_ID, CLIENT_SECRET, KEY) as process:
        try:
            issuer.wait_until_asked(issuer.token_path)
            _, complaints = process.communicate("\n", timeout=2 * _PATIENCE)
        finally:
            process.kill()
    assert complaints == ""
    assert process.returncode == 0


def test_exchanging_needs_nothing_of_the_server(issuer: Issuer) -> None:
    with script(IMPORTS) as process:
        told, complaints = process.communicate(timeout=2 * _PATIENCE)
    brought, ours = told.splitlines()
    assert complaints == ""
    assert set(brought.split()) == {"httpx2", "joserfc"}
    assert {name for name in ours.split() if not name.startswith("identity_service.verifier")} == set()


# -- in front of a sibling's routes -----------------------------------------------------------------------------------

NOBODY = 'Bearer scope="orders:read"'
INVALID = 'Bearer error="invalid_token", scope="orders:read"'
TOO_LITTLE = 'Bearer error="insufficient_scope", scope="orders:read"'
TWO = 'Bearer error="invalid_request", scope="orders:read"'


def guarded(protect: Protect) -> FastAPI:
    """Return a sibling with a route and a web socket."""
    app = FastAPI()

    @app.get("/orders")
    async def orders(caller: Annotated[VerifiedClaims, protect.require("orders:read")]) -> dict[str, Any]:
        return {"subject": caller.subject, "key": caller.claims.get("key_id")}

    @app.websocket("/feed")
    async def feed(connection: WebSocket, _: Annotated[VerifiedClaims, protect.require("orders:read")]) -> None:
        await connection.accept()

    return app


@pytest.fixture
def app(issuer: Issuer) -> FastAPI:
    """A sibling that takes both."""
    return guarded(Protect(issuer.url, AUDIENCE, timeout=_PATIENCE, api_keys=ApiKeys(CLIENT_ID, CLIENT_SECRET)))


async def ask(app: FastAPI, *headers: Header, path: str = "/orders") -> httpx2.Response:
    """Send one request with these headers."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://orders.example") as http:
        return await http.get(path, headers=list(headers))


def refused(answer: httpx2.Response, status: int, challenge: str, detail: str) -> bool:
    """Check a refusal to the letter."""
    told = (answer.status_code, answer.headers.get_list("www-authenticate"), answer.json())
    assert told == (status, [challenge], {"detail": detail})
    return True


def of_key(key: str) -> Header:
    """Return the header that a key is brought in."""
    return ("X-API-Key", key)


async def test_a_route_takes_a_token_or_an_api_key(app: FastAPI, issuer: Issuer) -> None:
    answer = await ask(app, ("Authorization", f"Bearer {issuer.mint()}"))
    assert (answer.status_code, answer.json()) == (200, {"subject": "user-1", "key": None})
    for name in ("X-API-Key", "x-api-key"):
        answer = await ask(app, (name, KEY))
        assert (answer.status_code, answer.json()) == (200, {"subject": "ada", "key": KEY[4:15]})
    assert issuer.count(issuer.token_path) == 1


@pytest.mark.case("KEY-08")
@pytest.mark.rfc("6750", "3.1")
@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Bearer {token}"), of_key("{key}")],
        [of_key("{key}"), ("Authorization", "Bearer {token}")],
        [("Authorization", "Bearer rubbish"), of_key("{key}")],
        [("Authorization", "Bearer {token}"), of_key("rubbish")],
        [("Authorization", "Bearer {token}"), of_key("")],
        [("Authorization", ""), of_key("{key}")],
        [("Authorization", "Basic dXNlcjpwYXNz"), of_key("{key}")],
        [of_key("{key}"), of_key("{key}")],
        [of_key("{key}"), of_key("{other}")],
        [of_key("{key}"), ("x-api-key", "")],
    ],
    ids=lambda headers: ", ".join(": ".join(header) for header in headers),
)
async def test_who_brings_more_than_one_credential_is_refused(
    app: FastAPI, issuer: Issuer, headers: list[Header]
) -> None:
    """Whoever reads the request next could take the other one for what was checked."""
    token = issuer.mint()
    sent = [(name, value.format(token=token, key=KEY, other=OTHER)) for name, value in headers]
    assert refused(await ask(app, *sent), 400, TWO, "more than one credential")
    assert issuer.asked == []


@pytest.mark.rfc("6750", "3.1")
@pytest.mark.parametrize("key", ["", "rubbish", KEY[:-1], KEY.swapcase(), BAD, f"{KEY},{KEY}", f"Bearer {KEY}"])
async def test_who_brings_a_bad_key_is_told_that_and_no_more(
    app: FastAPI, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="identity_service.verifier")
    assert refused(await ask(app, of_key(key)), 401, INVALID, "invalid API key")
    reason = "api_key_refused" if key == BAD else "api_key_malformed"
    assert caplog.messages[-1] == f"an API key was refused: {reason}"
    assert KEY[16:60] not in caplog.text
    assert BAD[16:60] not in caplog.text


async def test_who_may_not_is_told_what_it_would_take(app: FastAPI) -> None:
    assert refused(await ask(app, of_key(OTHER)), 403, TOO_LITTLE, "insufficient scope")


async def test_who_brings_nothing_is_told_no_error(app: FastAPI, issuer: Issuer) -> None:
    assert refused(await ask(app), 401, NOBODY, "not authenticated")
    assert refused(await ask(app, ("Authorization", f"ApiKey {KEY}")), 401, NOBODY, "not authenticated")
    assert refused(await ask(app, path=f"/orders?api_key={KEY}"), 401, NOBODY, "not authenticated")
    assert refused(await ask(app, ("Cookie", f"X-API-Key={KEY}")), 401, NOBODY, "not authenticated")
    assert refused(await ask(app, ("Authorization", f"Bearer {KEY}")), 401, INVALID, "invalid token")
    assert issuer.asked == []


@pytest.mark.rfc("9110", "10.2.3")
@pytest.mark.parametrize(
    ("how", "seconds"),
    [
        ({"status": 429, "headers": {"Retry-After": "7"}}, "7"),
        ({"status": 503, "headers": {"Retry-After": "2"}}, "2"),
        ({"status": 401, "body": b'{"error": "invalid_client"}'}, "5"),
        ({"status": 500}, "5"),
    ],
    ids=lambda value: str(value.get("status")) if isinstance(value, dict) else value,
)
async def test_whose_key_cannot_be_checked_is_asked_to_come_again(
    app: FastAPI, issuer: Issuer, how: dict[str, Any], seconds: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A 401 would make good clients throw a good key away."""
    caplog.set_level(logging.INFO, logger="identity_service.verifier")
    issuer.answer(issuer.token_path, **how)
    answer = await ask(app, of_key(KEY))
    assert (answer.status_code, answer.json()) == (503, {"detail": "API keys cannot be checked now"})
    assert answer.headers["retry-after"] == seconds
    assert "www-authenticate" not in answer.headers
    reason = "invalid_client" if how["status"] == 401 else f"status_{how['status']}"
    assert caplog.messages[-1] == f"an API key could not be checked: {reason}"
    assert (await ask(app, ("Authorization", f"Bearer {issuer.mint()}"))).status_code == 200


async def test_a_web_socket_takes_both_too(app: FastAPI, issuer: Issuer) -> None:
    bearer, key = (b"authorization", f"Bearer {issuer.mint()}".encode()), (b"x-api-key", KEY.encode())
    assert (await connect(app, bearer))["type"] == (await connect(app, key))["type"] == "websocket.accept"
    assert [(await connect(app, *headers))["status"] for headers in ([], [(b"x-api-key", b"")], [bearer, key])] == [
        401,
        401,
        400,
    ]


async def test_without_api_keys_the_header_means_nothing(issuer: Issuer) -> None:
    """A sibling that was written before there were any goes on as it did."""
    app = guarded(Protect(issuer.url, AUDIENCE))
    assert refused(await ask(app, of_key(KEY)), 401, NOBODY, "not authenticated")
    answer = await ask(app, ("Authorization", f"Bearer {issuer.mint()}"), of_key(KEY))
    assert answer.json() == {"subject": "user-1", "key": None}
    document = (await ask(app, path="/openapi.json")).json()
    assert document["components"]["securitySchemes"].keys() == {"identity_service", "identity_service_token"}
    assert len(document["paths"]["/orders"]["get"]["security"]) == 2
    assert issuer.count(issuer.token_path) == 0


async def test_the_document_offers_the_key_as_a_third_way(app: FastAPI) -> None:
    document = (await ask(app, path="/openapi.json")).json()
    schemes = document["components"]["securitySchemes"]
    assert schemes["identity_service_api_key"] == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    assert schemes.keys() == {"identity_service", "identity_service_token", "identity_service_api_key"}
    operation = document["paths"]["/orders"]["get"]
    assert operation["security"] == [{name: ["orders:read"]} for name in schemes]
    assert "parameters" not in operation


async def test_a_test_may_put_its_own_caller_in_the_place_of_a_key(issuer: Issuer) -> None:
    protect = Protect(issuer.url, AUDIENCE, api_keys=ApiKeys(CLIENT_ID, CLIENT_SECRET))
    app = guarded(protect)
    app.dependency_overrides[protect.verified] = lambda: VerifiedClaims({"sub": "ada"})
    assert (await ask(app)).json() == {"subject": "ada", "key": None}


async def test_the_exchanger_hears_what_the_verifier_is_told(issuer: Issuer) -> None:
    """And what is said for it alone counts more."""
    keys = ApiKeys(CLIENT_ID, CLIENT_SECRET, max_age=60)
    clock = UnixClock(time.time())
    app = guarded(Protect(issuer.url, AUDIENCE, clock=clock, api_keys=keys))
    for ahead, asked in ((0, 1), (59, 1), (60, 2)):
        clock.ahead = ahead
        assert (await ask(app, of_key(KEY))).status_code == 200
        assert issuer.count(issuer.token_path) == asked
    assert Protect("http://id.internal", AUDIENCE, allow_http=True, api_keys=keys).exchanger
    with pytest.raises(ValueError, match="not a plain https URL"):
        Protect("http://id.internal", AUDIENCE, allow_http=True, api_keys=ApiKeys("cl", "cs", allow_http=False))
    with pytest.raises(TypeError):
        Protect(issuer.url, AUDIENCE, api_keys=ApiKeys(CLIENT_ID, CLIENT_SECRET, verify=False))


def test_the_secret_does_not_print_itself(issuer: Issuer) -> None:
    keys = ApiKeys(CLIENT_ID, CLIENT_SECRET)
    protect = Protect(issuer.url, AUDIENCE, api_keys=keys)
    assert not any(CLIENT_SECRET in repr(said) + str(said) for said in (keys, protect, protect.exchanger))


@pytest.mark.parametrize("scope", ["orders:write", "", OMIT], ids=repr)
async def test_a_right_that_is_gone_is_noticed_at_the_next_exchange(issuer: Issuer, scope: Any) -> None:
    clock = UnixClock(time.time())
    app = guarded(Protect(issuer.url, AUDIENCE, clock=clock, api_keys=ApiKeys(CLIENT_ID, CLIENT_SECRET, max_age=60)))
    assert (await ask(app, of_key(KEY))).status_code == 200
    issuer.api_keys[KEY]["scope"] = scope
    clock.ahead = 59
    assert (await ask(app, of_key(KEY))).status_code == 200
    clock.ahead = 61
    assert (await ask(app, of_key(KEY))).status_code == 403


# -- beside the service itself ----------------------------------------------------------------------------------------


@dataclass
class Beside:
    """The service with a database of its own, a client that may exchange, and a sibling's exchanger."""

    service: Service
    server: ServerProcess
    client: Registered

    def exchanger(self, client: Registered | None = None, **options: Any) -> ApiKeyExchanger:
        """Return a sibling's exchanger that remembers nothing good."""
        who = client or self.client
        given = {"client_id": who.id, "client_secret": who.secret, "max_age": 0.0, "refused_for": 0.0}
        verifier = TokenVerifier(self.server.url, AUDIENCE, timeout=_PATIENCE)
        return ApiKeyExchanger(verifier, **{**given, "timeout": _PATIENCE, **options})

    async def a_key(self, owner: Any, *scope: str, **given: Any) -> NewKey:
        """Make an API key."""
        values = {"owner": owner, "name": "nightly", "scope": scope, "expires_at": None, "networks": (), **given}
        return await self.service.within(lambda tx: self.service.services.api_keys.create(tx, **values))


@pytest.fixture
async def beside(database_url: str) -> AsyncIterator[Beside]:
    async with running(test_settings(database_url), SystemClock()) as service:
        client = await service.a_client(
            first_party=False,
            grant_types=(TokenExchange.grant_type,),
            scope=("orders:read", "orders:write"),
            audiences=(),
            exchange_audiences=(AUDIENCE,),
        )
        with ServerProcess(database_url) as server:
            yield Beside(service, server, client)
    wait_for_fetches()


@pytest.mark.case("KEY-10")
@pytest.mark.rfc("8693", "4.1")
async def test_the_service_exchanges_a_persons_key_for_what_both_may(beside: Beside) -> None:
    user = await beside.service.a_user()  # whose role holds orders:read
    key = await beside.a_key(user.id, "orders:read", "orders:write", "account:read")
    claims = await beside.exchanger().verify(key.text.reveal(), "orders:read")
    assert (claims.subject, claims.client_id, claims.scope) == (str(user.id), beside.client.id, {"orders:read"})
    assert (claims.session_id, claims.roles) == (None, {"user"})
    told = {name: claims.claims[name] for name in ("key_id", "act", "amr")}
    assert told == {"key_id": key.key.id, "act": {"sub": beside.client.id}, "amr": ["api_key"]}
    assert 0 < claims.expires_at - time.time() <= 600
    with pytest.raises(InsufficientScope):
        await beside.exchanger().verify(key.text.reveal(), "orders:write")


@pytest.mark.case("KEY-10")
async def test_the_service_exchanges_a_services_key(beside: Beside) -> None:
    owner = await beside.service.a_client()
    key = await beside.a_key(owner.id, "orders:write")
    claims = await beside.exchanger().verify(key.text.reveal(), "orders:write")
    assert (claims.subject, claims.client_id, claims.roles) == (owner.id, beside.client.id, frozenset())
    assert claims.claims["key_id"] == key.key.id


@pytest.mark.case("KEY-05")
async def test_what_ends_a_key_ends_it_at_the_next_exchange(beside: Beside) -> None:
    service, exchanger = beside.service, beside.exchanger()
    ada, bob = await service.a_user("ada"), await service.a_user("bob")
    end = datetime.now(UTC) + timedelta(seconds=300)
    revoked, disabled = await beside.a_key(ada.id, "orders:read"), await beside.a_key(bob.id, "orders:read")
    expired = await beside.a_key(ada.id, "orders:read", expires_at=end)
    texts = [key.text.reveal() for key in (revoked, disabled, expired)]
    told = [await exchanger.verify(text) for text in texts]
    assert [claims.subject for claims in told] == [str(ada.id), str(bob.id), str(ada.id)]
    assert told[2].expires_at <= end.timestamp()
    await service.within(lambda tx: service.services.api_keys.revoke(tx, revoked.key.id, ada.id))
    await service.disable(bob)
    past = update(api_keys).where(api_keys.c.id == expired.key.id).values(expires_at=datetime.now(UTC))
    await service.execute(past)
    elsewhere = await beside.a_key(ada.id, "orders:read", networks=("203.0.113.0/24",))
    for text in (*texts, elsewhere.text.reveal(), an_api_key()):
        with pytest.raises(TokenRefused, match="api_key_refused"):
            await exchanger.verify(text)


async def test_a_key_that_allows_nothing_here_is_good_elsewhere(beside: Beside) -> None:
    user = await beside.service.a_user()
    text = (await beside.a_key(user.id, "account:read")).text.reveal()
    with pytest.raises(InsufficientScope):
        await beside.exchanger().verify(text, "orders:read")
    with pytest.raises(TokenRefused, match="api_key_allows_nothing"):
        await beside.exchanger().verify(text)


async def test_a_sibling_that_may_not_exchange_blames_no_key(beside: Beside) -> None:
    user = await beside.service.a_user()
    text = (await beside.a_key(user.id, "orders:read")).text.reveal()
    assert await unavailable(beside.exchanger(client_secret="wrong"), text) == "invalid_client"
    a_client = beside.service.a_client
    without = await a_client(grant_types=("client_credentials",))
    assert await unavailable(beside.exchanger(without), text) == "unauthorized_client"
    elsewhere = await a_client(grant_types=(TokenExchange.grant_type,), exchange_audiences=("https://other.example",))
    assert await unavailable(beside.exchanger(elsewhere), text) == "invalid_target"
    assert await beside.exchanger().verify(text)


async def test_a_guarded_sibling_beside_the_service_takes_both(beside: Beside) -> None:
    user = await beside.service.a_user()
    text = (await beside.a_key(user.id, "orders:read")).text.reveal()
    assert beside.client.secret is not None
    keys = ApiKeys(beside.client.id, beside.client.secret)
    app = guarded(Protect(beside.server.url, AUDIENCE, timeout=_PATIENCE, api_keys=keys))
    assert (await ask(app, of_key(text))).json()["subject"] == str(user.id)
    assert refused(await ask(app, of_key(an_api_key())), 401, INVALID, "invalid API key")
    assert refused(await ask(app, of_key(text), ("Authorization", "Bearer x")), 400, TWO, "more than one credential")
    assert text not in beside.server.log_text()


async def test_the_lines_of_the_page_take_api_keys(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for FastAPI, and those without it."""
    assert beside.client.secret is not None
    monkeypatch.setenv("ORDERS_CLIENT_ID", beside.client.id)
    monkeypatch.setenv("ORDERS_CLIENT_SECRET", beside.client.secret)
    page = (_ROOT / "docs" / "verify.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for text in [text for text in blocks if "ORDERS_CLIENT_SECRET" in text]:
        exec(text.replace("https://id.example", beside.server.url), names)  # noqa: S102  # the text is ours
    user = await beside.service.a_user()
    key = (await beside.a_key(user.id, "orders:read")).text.reveal()
    assert (await ask(guarded(names["protect"]), of_key(key))).json()["subject"] == str(user.id)
    assert (await names["exchanger"].verify(key, "orders:read")).subject == str(user.id)
