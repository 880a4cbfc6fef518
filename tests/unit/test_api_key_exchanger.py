"""
How API keys are exchanged, with clocks that the test moves and a token endpoint that does what the test says.

The exchanges run in threads, as always; where a test looks at what one has changed, it has waited for its end.
"""

import asyncio
import base64
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_service.accounts.api_keys import spelling
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.ids import encode_token
from identity_service.verifier import (
    ApiKeyExchanger,
    ExchangeUnavailable,
    InsufficientScope,
    TokenRefused,
    TokenVerifier,
    VerifiedClaims,
    api_keys,
)
from identity_service.verifier.api_keys import _Memory, is_well_formed
from identity_service.verifier.jwks import BadKeySet, Fetched, JwksSource
from tests.support.clock import UnixClock
from tests.support.issuer import (
    AUDIENCE,
    CLIENT_ID,
    CLIENT_SECRET,
    an_api_key,
    exchanged,
    private_key,
    token_answer,
    wait_for_fetches,
)
from tests.support.tokens import OMIT, changed, compact

ISSUER = "https://id.example"
START = 1_800_000_000.0
LIFE = 600  # seconds that a token lives
KEY, OTHER = an_api_key(1), an_api_key(2)
_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds

Handler = Callable[[httpx2.Request], httpx2.Response]


class Stage:
    """An exchanger, the clocks it looks at, and the token endpoint it asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = UnixClock(START)
        self.elapsed = 5000.0
        self.asked: list[httpx2.Request] = []
        self.minted: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.handler: Handler = self.honest
        self.keys_fault: Exception | None = None
        monkeypatch.setattr(api_keys, "monotonic", lambda: self.elapsed)
        monkeypatch.setattr(JwksSource, "fetch", self._fetch)
        self.verifier = TokenVerifier(ISSUER, AUDIENCE, clock=self.clock, timeout=2 * _PATIENCE)
        self.exchanger = self.make()

    def make(self, **options: Any) -> ApiKeyExchanger:
        """Return an exchanger on this stage."""
        given = {"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, "http": self._http, "clock": self.clock}
        return ApiKeyExchanger(self.verifier, **{**given, "timeout": 2 * _PATIENCE, **options})

    def _fetch(self, *, past_caches: bool) -> Fetched:
        if self.keys_fault:
            raise self.keys_fault
        return Fetched({"k1": private_key("k1").public_key()}, 300.0, 900.0)

    def _http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.MockTransport(self._handle), follow_redirects=True)

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        assert self.may_answer.wait(_PATIENCE)
        return self.handler(request)

    # -- the scene ------------------------------------------------------------------------------------------------

    def pass_by(self, seconds: float) -> None:
        """Let so many seconds pass, on both clocks."""
        wait_for_fetches()
        self.clock.ahead += seconds
        self.elapsed += seconds

    def mint(self, api_key: str = KEY, *, kid: str = "k1", header: dict[str, Any] | None = None, **claims: Any) -> str:
        """Return the token that the issuer gives for a key now, with some of its claims changed or left out."""
        said = {
            "iss": ISSUER,
            "sub": "user-1",
            "aud": AUDIENCE,
            "iat": int(self.clock()),
            "exp": int(self.clock()) + LIFE,
            "jti": f"token-{len(self.asked)}",
            "scope": "orders:read",
            **exchanged(api_key),
        }
        head = changed({"alg": "RS256", "typ": "at+jwt", "kid": "k1"}, header or {})
        self.minted.append(compact(head, changed(said, claims), private_key(kid)))
        return self.minted[-1]

    def honest(self, request: httpx2.Request) -> httpx2.Response:
        """Answer as the service does for a good key."""
        return reply(200, token_answer(self.mint(form_of(request)["subject_token"])))

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Answer so from now on."""
        self.handler = lambda _: reply(status, content, headers)

    def give(self, **claims: Any) -> None:
        """Answer from now on with tokens whose claims are changed so."""
        self.handler = lambda request: reply(200, token_answer(self.mint(form_of(request)["subject_token"], **claims)))

    def wait_until_asked(self, times: int = 1) -> None:
        """Return once there were as many requests."""
        deadline = time.monotonic() + _PATIENCE
        while len(self.asked) < times:
            assert time.monotonic() < deadline, f"{len(self.asked)} requests, not {times}"
            time.sleep(0.002)

    # -- what comes of it -----------------------------------------------------------------------------------------

    def refused(self, api_key: str = KEY, *scopes: str) -> str:
        """Return why a key is refused."""
        with pytest.raises(TokenRefused) as refused:
            self.exchanger.verify_sync(api_key, *scopes)
        return refused.value.reason

    def unavailable(self, api_key: str = KEY) -> ExchangeUnavailable:
        """Return the error that says that nobody can tell."""
        with pytest.raises(ExchangeUnavailable) as unavailable:
            self.exchanger.verify_sync(api_key)
        return unavailable.value


def reply(status: int, content: bytes, headers: dict[str, str] | None = None) -> httpx2.Response:
    """Return an answer as it comes from a socket: yet to be read."""
    return httpx2.Response(status, stream=httpx2.ByteStream(content), headers=headers)


def form_of(request: httpx2.Request) -> dict[str, str]:
    """Return what was posted; every field is there once."""
    fields = parse_qs(request.content.decode("ascii"), strict_parsing=True, keep_blank_values=True)
    assert all(len(values) == 1 for values in fields.values())
    return {name: values[0] for name, values in fields.items()}


def error(word: str) -> bytes:
    """Return an error's body (RFC 6749 §5.2)."""
    return json.dumps({"error": word, "error_description": "Something."}).encode()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(monkeypatch)
    yield stage
    stage.may_answer.set()
    wait_for_fetches()


# -- how a key is spelled ---------------------------------------------------------------------------------------------


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=32, max_size=32), st.data())
def test_the_service_and_the_verifier_agree_on_what_is_a_key(
    identity: bytes, secret: bytes, data: st.DataObject
) -> None:
    """The verifier may not import the service's reader, so it has a few lines of its own."""
    key = encode_token(f"idk_{encode_token('', identity)[:11]}_", secret)
    assert is_well_formed(key)
    place = data.draw(st.integers(min_value=0, max_value=len(key)))
    put = data.draw(st.text(st.characters(max_codepoint=0x2FF), max_size=2))
    spoilt = key[:place] + put + key[place + data.draw(st.integers(min_value=0, max_value=2)) :]
    assert is_well_formed(spoilt) == (spelling.read(Secret(spoilt)) is not None)


def test_a_key_that_the_service_makes_is_well_formed() -> None:
    for _ in range(100):
        assert is_well_formed(spelling.new_text(spelling.new_id()).reveal())


@pytest.mark.parametrize("word", range(4))
def test_letters_that_stand_for_more_than_64_bits_are_no_key(word: int) -> None:
    """Whatever the checksum says; the largest number there is has one spelling."""
    largest = encode_token("", b"\xff" * 8)[:11]
    words = [largest] * 4
    for last, good in ((largest[-1], True), (chr(ord(largest[-1]) + 1), False)):
        words[word] = largest[:-1] + last
        body = f"idk_{KEY[4:15]}_{''.join(words)}"
        key = body + checksum_of(body)
        assert is_well_formed(key) == (spelling.read(Secret(key)) is not None) == good


def checksum_of(body: str) -> str:
    """Return the checksum of any text, by way of the service's own spelling of it as a prefix without a payload."""
    return encode_token(body, b"")[len(body) :]


@pytest.mark.case("KEY-02")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
        lambda key: key[:30] + ("0" if key[30] != "0" else "1") + key[31:],
        lambda key: key[:-1],
        lambda key: key + "0",
        lambda key: key + "\n",
        lambda key: f" {key}",
        lambda key: key.swapcase(),
        lambda key: "idk-" + key[4:],
        lambda key: "rt_" + key[4:],
        lambda key: "ïdk_" + key[4:],
        lambda key: key[:16] + "é" * 50,
        lambda key: key[:16] + "\ud800" * 50,
        lambda key: key.replace("_", "-"),
        lambda key: key[:15] + key[16:],
        lambda key: "",
        lambda key: "idk_",
        lambda key: "eyJhbGciOiJSUzI1NiJ9.e30.c2ln",
    ],
)
def test_a_key_with_a_typo_is_refused_without_a_request(stage: Stage, spoil: Callable[[str], str]) -> None:
    assert stage.refused(spoil(KEY)) == "api_key_malformed"
    assert stage.asked == []
    assert stage.exchanger.verify_sync(KEY)


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.rfc("6749", "2.3.1")
@pytest.mark.case("KEY-10")
async def test_the_key_is_exchanged_for_this_audience_by_this_client(stage: Stage) -> None:
    claims = await stage.exchanger.verify(KEY)
    assert isinstance(claims, VerifiedClaims)
    assert (claims.subject, claims.audience, claims.scope) == ("user-1", (AUDIENCE,), {"orders:read"})
    (request,) = stage.asked
    assert (request.method, str(request.url)) == ("POST", "https://id.example/token")
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"
    assert request.headers["accept"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert form_of(request) == {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token": KEY,
        "subject_token_type": "urn:identity-service:params:oauth:token-type:api-key",
        "resource": AUDIENCE,
    }
    scheme, _, credentials = request.headers["authorization"].partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(credentials) == b"cl_orders:cs_%3A+half%2B%C3%A4+%253A"


@pytest.mark.parametrize(
    ("issuer", "options", "asked"),
    [
        (ISSUER, {}, "https://id.example/token"),
        ("https://id.example/tenant", {}, "https://id.example/tenant/token"),
        ("https://id.example/tenant/", {}, "https://id.example/tenant/token"),
        (ISSUER, {"token_endpoint": "https://tokens.example/t"}, "https://tokens.example/t"),
        ("http://127.0.0.1:8000", {}, "http://127.0.0.1:8000/token"),
        ("http://localhost:8000", {}, "http://localhost:8000/token"),
        (ISSUER, {"token_endpoint": "http://id.internal/t", "allow_http": True}, "http://id.internal/t"),
    ],
)
def test_it_asks_the_issuer_or_where_it_was_told_to(
    stage: Stage, issuer: str, options: dict[str, Any], asked: str
) -> None:
    stage.verifier = TokenVerifier(issuer, AUDIENCE, clock=stage.clock)
    stage.give(iss=issuer)
    assert stage.make(**options).verify_sync(KEY)
    assert [str(request.url) for request in stage.asked] == [asked]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"token_endpoint": "http://id.internal/token"}, "not a plain https URL"),
        ({"token_endpoint": "http://127.0.0.1.evil.example/token"}, "not a plain https URL"),
        ({"token_endpoint": "ftp://id.example/token", "allow_http": True}, "not a plain https URL"),
        ({"token_endpoint": "https://user:pass@id.example/token"}, "not a plain https URL"),
        ({"token_endpoint": "https://id.example/token?x=y"}, "not a plain https URL"),
        ({"client_id": ""}, "client of its own"),
        ({"client_secret": ""}, "client of its own"),
        ({"max_cached": 0}, "max_cached"),
        ({"early": -1}, "early"),
        ({"early": float("nan")}, "early"),
        ({"refused_for": -1}, "refused_for"),
        ({"refused_for": float("nan")}, "refused_for"),
        ({"max_age": -1}, "max_age"),
        ({"max_age": float("nan")}, "max_age"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
    ids=repr,
)
def test_what_cannot_be_meant_is_refused_at_once(stage: Stage, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        stage.make(**options)


def test_a_verifier_that_reads_keys_over_http_elsewhere_does_not_let_secrets_go_there(stage: Stage) -> None:
    """That is said once more, for secrets."""
    stage.verifier = TokenVerifier("http://id.internal", AUDIENCE, allow_http=True)
    with pytest.raises(ValueError, match="not a plain https URL"):
        stage.make()
    assert stage.make(allow_http=True)


# -- scopes -----------------------------------------------------------------------------------------------------------


async def test_one_exchange_serves_routes_that_ask_for_different_scopes(stage: Stage) -> None:
    stage.give(scope="orders:read orders:write")
    for scopes in ([], ["orders:read"], ["orders:write", "orders:read"]):
        assert (await stage.exchanger.verify(KEY, *scopes)).subject == "user-1"
    with pytest.raises(InsufficientScope) as refused:
        await stage.exchanger.verify(KEY, "orders:read", "orders:delete")
    assert refused.value.scope == "orders:read orders:delete"
    assert stage.refused(KEY, "orders") == "insufficient_scope"
    assert len(stage.asked) == 1


@pytest.mark.parametrize("scope", ["", OMIT], ids=repr)
def test_a_key_that_allows_nothing_here_is_good_for_nothing_that_needs_a_scope(stage: Stage, scope: Any) -> None:
    stage.give(scope=scope)
    assert stage.exchanger.verify_sync(KEY).scope == frozenset()
    assert stage.refused(KEY, "orders:read") == "insufficient_scope"


@pytest.mark.rfc("6749", "5.2")
def test_a_key_that_the_issuer_finds_nothing_to_give_for_is_good_and_too_little(stage: Stage) -> None:
    """It is no complaint about what was asked for, which is nothing. Where no scope is needed, the key is refused."""
    stage.answer(400, error("invalid_scope"))
    with pytest.raises(InsufficientScope) as refused:
        stage.exchanger.verify_sync(KEY, "orders:read", "orders:write")
    assert refused.value.scope == "orders:read orders:write"
    assert stage.refused(KEY) == "api_key_allows_nothing"
    assert len(stage.asked) == 1
    stage.handler = stage.honest
    stage.pass_by(5)
    assert stage.exchanger.verify_sync(KEY)


# -- many at once -----------------------------------------------------------------------------------------------------


async def test_two_hundred_callers_with_one_key_cause_one_exchange(stage: Stage) -> None:
    stage.may_answer.clear()
    callers = [asyncio.create_task(stage.exchanger.verify(KEY)) for _ in range(200)]
    await asyncio.to_thread(stage.wait_until_asked)
    await asyncio.sleep(0.05)  # lets whoever would ask for himself do so
    assert not any(caller.done() for caller in callers)
    stage.may_answer.set()
    assert {claims.token_id for claims in await asyncio.gather(*callers)} == {"token-1"}
    assert len(stage.asked) == 1


async def test_threads_coroutines_and_other_loops_share_one_exchange(stage: Stage) -> None:
    stage.may_answer.clear()
    with ThreadPoolExecutor(40) as threads:
        blocked = [threads.submit(stage.exchanger.verify_sync, KEY) for _ in range(20)]
        loops = [threads.submit(lambda: asyncio.run(stage.exchanger.verify(KEY))) for _ in range(20)]
        mixed = [asyncio.create_task(stage.exchanger.verify(KEY)) for _ in range(20)]
        await asyncio.to_thread(stage.wait_until_asked)
        await asyncio.sleep(0.1)  # lets whoever would ask for himself do so
        stage.may_answer.set()
        assert len(await asyncio.gather(*mixed)) == 20
        assert len([await asyncio.wrap_future(caller) for caller in blocked + loops]) == 40
    assert len(stage.asked) == 1


async def test_keys_do_not_wait_for_each_other(stage: Stage) -> None:
    slow = threading.Event()

    def handler(request: httpx2.Request) -> httpx2.Response:
        assert form_of(request)["subject_token"] == OTHER or slow.wait(_PATIENCE)
        return stage.honest(request)

    stage.handler = handler
    first = asyncio.create_task(stage.exchanger.verify(KEY))
    await asyncio.to_thread(stage.wait_until_asked)
    assert (await stage.exchanger.verify(OTHER)).claims["key_id"] == OTHER[4:15]
    assert not first.done()
    slow.set()
    assert (await first).claims["key_id"] == KEY[4:15]


async def test_who_stops_waiting_does_not_end_the_exchange_for_others(stage: Stage) -> None:
    """Not the first one either, who caused it."""
    stage.may_answer.clear()
    first, second, third = (asyncio.create_task(stage.exchanger.verify(KEY)) for _ in range(3))
    await asyncio.to_thread(stage.wait_until_asked)
    first.cancel()
    third.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not second.done()
    stage.may_answer.set()
    assert (await second).subject == "user-1"
    assert third.cancelled()
    assert await stage.exchanger.verify(KEY)
    assert len(stage.asked) == 1


async def test_an_exchange_that_all_have_given_up_is_of_use_to_the_next(stage: Stage) -> None:
    stage.may_answer.clear()
    only = asyncio.create_task(stage.exchanger.verify(KEY))
    await asyncio.to_thread(stage.wait_until_asked)
    only.cancel()
    with pytest.raises(asyncio.CancelledError):
        await only
    stage.may_answer.set()
    await asyncio.to_thread(wait_for_fetches)
    assert await stage.exchanger.verify(KEY)
    assert len(stage.asked) == 1


@pytest.mark.parametrize(
    ("status", "word", "expected"),
    [(400, "invalid_grant", TokenRefused), (503, "temporarily_unavailable", ExchangeUnavailable)],
)
async def test_an_exchange_that_fails_fails_for_all_who_wait(
    stage: Stage, status: int, word: str, expected: type[Exception]
) -> None:
    """Each with an error of their own, which grows no traceback of others."""
    stage.answer(status, error(word))
    stage.may_answer.clear()
    callers = [asyncio.create_task(stage.exchanger.verify(KEY)) for _ in range(50)]
    await asyncio.to_thread(stage.wait_until_asked)
    stage.may_answer.set()
    failures = await asyncio.gather(*callers, return_exceptions=True)
    assert {type(failure) for failure in failures} == {expected}
    assert len({str(failure) for failure in failures}) == 1
    assert len({id(failure) for failure in failures}) == 50
    assert len(stage.asked) == 1


async def test_too_many_keys_at_once_are_told_to_come_again(stage: Stage) -> None:
    """Each exchange takes a thread and a connection; who is remembered needs neither."""
    assert await stage.exchanger.verify(KEY)
    stage.may_answer.clear()
    callers = [asyncio.create_task(stage.exchanger.verify(an_api_key(number))) for number in range(100, 164)]
    await asyncio.to_thread(stage.wait_until_asked, 65)
    told = await asyncio.to_thread(stage.unavailable, OTHER)
    assert (told.reason, told.retry_after) == ("too_many_exchanges", 1.0)
    assert await stage.exchanger.verify(KEY)
    stage.may_answer.set()
    assert len(await asyncio.gather(*callers)) == 64
    assert await stage.exchanger.verify(OTHER)
    assert len(stage.asked) == 66


def test_where_no_thread_is_to_be_had_nobody_can_tell(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert stage.unavailable().reason == "no_thread_to_be_had"
    assert stage.exchanger.verify_sync(KEY)


# -- what is remembered, and for how long -----------------------------------------------------------------------------


async def test_an_answer_is_used_until_shortly_before_its_token_expires(stage: Stage) -> None:
    assert (await stage.exchanger.verify(KEY)).token_id == "token-1"
    stage.pass_by(LIFE - 30.001)
    assert (await stage.exchanger.verify(KEY)).token_id == "token-1"
    stage.pass_by(0.001)
    assert (await stage.exchanger.verify(KEY)).token_id == "token-2"
    stage.pass_by(LIFE - 30.001)
    assert stage.exchanger.verify_sync(KEY).token_id == "token-2"
    assert len(stage.asked) == 2


@pytest.mark.parametrize(("early", "used_for"), [(0.0, LIFE), (1.0, LIFE - 1), (300.0, LIFE - 300)])
def test_how_early_a_key_is_exchanged_anew_can_be_set(stage: Stage, early: float, used_for: float) -> None:
    stage.exchanger = stage.make(early=early)
    assert stage.exchanger.verify_sync(KEY)
    stage.pass_by(used_for - 0.001)
    assert stage.exchanger.verify_sync(KEY).token_id == "token-1"
    stage.pass_by(0.001)
    assert stage.exchanger.verify_sync(KEY).token_id == "token-2"


@pytest.mark.case("KEY-05")
def test_a_service_that_cannot_wait_for_a_revocation_sets_a_maximum(stage: Stage) -> None:
    stage.exchanger = stage.make(max_age=60.0)
    assert stage.exchanger.verify_sync(KEY)
    stage.answer(400, error("invalid_grant"))  # it is revoked now
    stage.pass_by(59.999)
    assert stage.exchanger.verify_sync(KEY)
    stage.pass_by(0.001)
    assert stage.refused() == "api_key_refused"


def test_a_maximum_does_not_make_an_answer_last_longer(stage: Stage) -> None:
    stage.exchanger = stage.make(max_age=86400.0)
    assert stage.exchanger.verify_sync(KEY)
    stage.pass_by(LIFE - 30)
    assert stage.exchanger.verify_sync(KEY).token_id == "token-2"


def test_with_a_maximum_of_nothing_each_use_is_asked_about(stage: Stage) -> None:
    stage.exchanger = stage.make(max_age=0.0)
    assert [stage.exchanger.verify_sync(KEY).token_id for _ in range(3)] == ["token-1", "token-2", "token-3"]


def test_the_maximum_counts_from_the_question_on(stage: Stage) -> None:
    """The issuer may have looked at any time since."""
    stage.exchanger = stage.make(max_age=60.0)

    def handler(request: httpx2.Request) -> httpx2.Response:
        stage.clock.ahead += 40
        stage.elapsed += 40
        return stage.honest(request)

    stage.handler = handler
    assert stage.exchanger.verify_sync(KEY)
    stage.pass_by(20)
    assert stage.exchanger.verify_sync(KEY).token_id == "token-2"


def test_a_clock_that_jumps_ahead_ends_what_has_expired_by_it(stage: Stage) -> None:
    assert stage.exchanger.verify_sync(KEY)
    stage.clock.ahead += LIFE - 30
    assert stage.exchanger.verify_sync(KEY).token_id == "token-2"


def test_a_clock_that_is_set_back_prolongs_nothing(stage: Stage) -> None:
    """Neither to before the exchange nor to a moment after it."""
    for back in (10_000.0, LIFE - 40.0):
        asked = len(stage.asked)
        stage.exchanger = stage.make()
        assert stage.exchanger.verify_sync(KEY)
        stage.pass_by(LIFE - 31)
        stage.clock.ahead -= back
        assert stage.exchanger.verify_sync(KEY)
        assert len(stage.asked) == asked + 1
        stage.pass_by(1)
        assert stage.exchanger.verify_sync(KEY)
        assert len(stage.asked) == asked + 2


def test_an_answer_about_to_expire_serves_those_who_waited_for_it_and_nobody_else(stage: Stage) -> None:
    stage.give(exp=int(START) + 30)
    assert [stage.exchanger.verify_sync(KEY).token_id for _ in range(2)] == ["token-1", "token-2"]


def test_a_refused_key_is_remembered_for_a_moment(stage: Stage) -> None:
    """So that who hammers costs the issuer nothing."""
    stage.answer(400, error("invalid_grant"))
    assert [stage.refused() for _ in range(20)] == ["api_key_refused"] * 20
    stage.pass_by(4.999)
    assert stage.refused() == "api_key_refused"
    assert len(stage.asked) == 1
    stage.pass_by(0.001)
    assert stage.refused() == "api_key_refused"
    assert len(stage.asked) == 2
    stage.handler = stage.honest
    stage.pass_by(5)
    assert stage.exchanger.verify_sync(KEY)


def test_for_how_long_a_refused_key_is_remembered_can_be_set(stage: Stage) -> None:
    stage.answer(400, error("invalid_grant"))
    stage.exchanger = stage.make(refused_for=0)
    assert [stage.refused() for _ in range(2)] == ["api_key_refused"] * 2
    assert len(stage.asked) == 2
    stage.exchanger = stage.make(refused_for=60)
    assert stage.refused() == "api_key_refused"
    stage.pass_by(59)
    assert stage.refused() == "api_key_refused"
    assert len(stage.asked) == 3


def test_the_key_that_was_used_least_recently_is_forgotten_first(stage: Stage) -> None:
    stage.exchanger = stage.make(max_cached=3)
    keys = [an_api_key(number) for number in range(5)]
    for key in keys[:3]:
        stage.exchanger.verify_sync(key)
    stage.exchanger.verify_sync(keys[0])
    assert len(stage.asked) == 3
    stage.exchanger.verify_sync(keys[3])  # in the place of keys[1]
    for key in (keys[0], keys[2], keys[3]):
        stage.exchanger.verify_sync(key)
    assert len(stage.asked) == 4
    stage.exchanger.verify_sync(keys[1])
    assert len(stage.asked) == 5


def test_what_is_remembered_is_bounded_and_who_guesses_pushes_out_no_good_key(stage: Stage) -> None:
    stage.exchanger = stage.make(max_cached=10, refused_for=3600)
    assert stage.exchanger.verify_sync(KEY)
    stage.answer(400, error("invalid_grant"))
    for number in range(100, 150):
        assert stage.refused(an_api_key(number)) == "api_key_refused"
    assert len(stage.asked) == 51
    assert stage.exchanger.verify_sync(KEY)
    assert stage.refused(an_api_key(149)) == stage.refused(an_api_key(140)) == "api_key_refused"
    assert len(stage.asked) == 51
    assert stage.refused(an_api_key(139)) == "api_key_refused"
    assert len(stage.asked) == 52


# -- answers that say nothing about the key ---------------------------------------------------------------------------


@pytest.mark.rfc("6749", "5.2")
@pytest.mark.rfc("9110", "10.2.3")
@pytest.mark.parametrize(
    ("status", "content", "headers", "reason", "retry_after"),
    [
        (401, error("invalid_client"), {}, "invalid_client", 5),
        (401, error("invalid_client"), {"retry-after": "9"}, "invalid_client", 5),
        (400, error("invalid_client"), {}, "invalid_client", 5),
        (400, error("invalid_request"), {}, "invalid_request", 5),
        (400, error("invalid_target"), {}, "invalid_target", 5),
        (400, error("unauthorized_client"), {}, "unauthorized_client", 5),
        (400, error("unsupported_grant_type"), {}, "unsupported_grant_type", 5),
        (400, error("something new"), {}, "status_400", 5),
        (400, b'{"error": ["invalid_grant"]}', {}, "status_400", 5),
        (400, b'{"error": "invalid_grant", "error": "invalid_grant"}', {}, "status_400", 5),
        (400, b"<html>", {}, "status_400", 5),
        (400, b"", {}, "status_400", 5),
        (401, error("invalid_grant"), {}, "invalid_grant", 5),
        (403, b"", {}, "status_403", 5),
        (404, b"", {}, "status_404", 5),
        (429, b"", {"retry-after": "7"}, "status_429", 7),
        (429, b"", {"retry-after": "0"}, "status_429", 5),
        (429, b"", {"retry-after": "86400"}, "status_429", 60),
        (429, b"", {"retry-after": "9" * 5000}, "status_429", 60),
        (429, b"", {"retry-after": "Fri, 31 Dec 2027 23:59:59 GMT"}, "status_429", 5),
        (429, b"", {"retry-after": "-1"}, "status_429", 5),
        (500, b"", {"retry-after": "7"}, "status_500", 5),
        (503, error("temporarily_unavailable"), {"retry-after": "2"}, "temporarily_unavailable", 2),
        (503, error("invalid_grant"), {}, "invalid_grant", 5),
        (503, b"", {}, "status_503", 5),
        (204, b"", {}, "status_204", 5),
    ],
)
def test_whoever_says_nothing_about_the_key_does_not_make_it_a_bad_one(
    stage: Stage, status: int, content: bytes, headers: dict[str, str], reason: str, retry_after: float
) -> None:
    """The caller would throw a good one away; above all where our own credentials are what is wrong."""
    stage.answer(status, content, headers)
    told = stage.unavailable()
    assert (told.reason, told.retry_after) == (reason, retry_after)
    stage.handler = stage.honest
    assert stage.exchanger.verify_sync(OTHER)
    stage.pass_by(60)
    assert stage.exchanger.verify_sync(KEY)


@pytest.mark.parametrize(
    "fault",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("late"),
        httpx2.RemoteProtocolError("rubbish"),
        OSError("no route"),
        ValueError("a fault of ours"),
    ],
    ids=repr,
)
async def test_a_failure_of_the_network_is_no_refusal_and_not_remembered(
    stage: Stage, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody waits for ever, whatever it was."""

    def handler(_: httpx2.Request) -> httpx2.Response:
        raise fault

    stage.handler = handler
    for _ in range(2):
        with pytest.raises(ExchangeUnavailable, match="no_answer"):
            await asyncio.wait_for(stage.exchanger.verify(KEY), _PATIENCE)
    assert len(stage.asked) == 2
    assert caplog.messages[0] == f"https://id.example/token exchanged no API key: {type(fault).__name__}: {fault}"
    stage.handler = stage.honest
    assert stage.exchanger.verify_sync(KEY)


@pytest.mark.rfc("9110", "10.2.3")
@pytest.mark.parametrize("status", [429, 503])
def test_while_the_issuer_asks_for_patience_that_key_is_not_sent_again(stage: Stage, status: int) -> None:
    stage.answer(status, headers={"retry-after": "7"})
    assert [stage.unavailable().retry_after for _ in range(20)] == [7] * 20
    assert len(stage.asked) == 1
    stage.handler = stage.honest
    assert stage.exchanger.verify_sync(OTHER), "others may be luckier"
    stage.pass_by(6.999)
    assert stage.unavailable().reason == f"status_{status}"
    stage.pass_by(0.001)
    assert stage.exchanger.verify_sync(KEY)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(stage: Stage, status: int) -> None:
    """Not with a client either that would."""
    stage.answer(status, headers={"location": "https://evil.example/token"})
    assert stage.unavailable().reason == f"status_{status}"
    assert len(stage.asked) == 1


def test_credentials_of_a_client_that_was_handed_in_take_no_precedence(stage: Stage) -> None:
    transport = httpx2.MockTransport(stage._handle)
    stage.exchanger = stage.make(http=lambda: httpx2.AsyncClient(transport=transport, auth=("proxy", "other")))
    assert stage.exchanger.verify_sync(KEY)
    assert base64.b64decode(stage.asked[0].headers["authorization"][6:]).startswith(b"cl_orders:")


# -- answers that are not to be trusted -------------------------------------------------------------------------------

UNTRUSTED: dict[str, tuple[dict[str, Any], str]] = {
    "for somebody else": ({"aud": "https://billing.example"}, "aud_wrong"),
    "for the issuer": ({"aud": ISSUER}, "aud_wrong"),
    "for us and the issuer": ({"aud": [AUDIENCE, ISSUER]}, "aud_mixed"),
    "of another issuer": ({"iss": "https://evil.example"}, "iss_wrong"),
    "expired": ({"exp": int(START) - 31}, "expired"),
    "without an end": ({"exp": OMIT}, "exp_missing_or_malformed"),
    "of the future": ({"iat": int(START) + 31}, "not_yet_valid"),
    "of the wrong key": ({"kid": "k2"}, "signature_wrong"),
    "of an unknown key": ({"kid": "k2", "header": {"kid": "k2"}}, "kid_unknown"),
    "unsigned": ({"header": {"alg": "none"}}, "alg_not_allowed"),
    "an ID token": ({"header": {"typ": "JWT"}}, "typ_not_allowed"),
    "with a key of its own": ({"header": {"jku": "https://evil.example"}}, "header_not_allowed"),
    "issued to another client": ({"client_id": "cl_other"}, "of_another_exchange"),
    "with another actor": ({"act": {"sub": "cl_other"}}, "of_another_exchange"),
    "with no actor": ({"act": OMIT}, "of_another_exchange"),
    "with a malformed actor": ({"act": CLIENT_ID}, "of_another_exchange"),
    "about another key": ({"key_id": OTHER[4:15]}, "of_another_exchange"),
    "about no key": ({"key_id": OMIT}, "of_another_exchange"),
    "without an owner": ({"sub": OMIT}, "sub_missing_or_malformed"),
}


@pytest.mark.rfc("9068", "4")
@pytest.mark.case("TEX-03")
@pytest.mark.parametrize(("claims", "reason"), UNTRUSTED.values(), ids=UNTRUSTED.keys())
def test_a_token_is_not_believed_because_it_came_from_the_issuer(
    stage: Stage, claims: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever has taken over the endpoint, or mixes up its answers, gets nobody in and no key called bad."""
    stage.give(**claims)
    assert stage.unavailable().reason == "answer_not_trusted"
    assert caplog.messages[-1].endswith(f"its answer is not to be trusted: {reason}")
    stage.handler = stage.honest
    assert stage.exchanger.verify_sync(KEY)


@pytest.mark.rfc("8693", "2.2.1")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token_answer(token, token_type="N_A"),
        lambda token: token_answer(token, token_type="DPoP"),
        lambda token: token_answer(token, token_type=OMIT),
        lambda token: token_answer(token, issued_token_type="urn:ietf:params:oauth:token-type:refresh_token"),
        lambda token: token_answer(token, issued_token_type=OMIT),
        lambda token: token_answer(OMIT),
        lambda token: token_answer(None),
        lambda token: token_answer([token]),
        lambda token: token_answer(token)[:-1],
        lambda token: token_answer(token) + b"x",
        lambda token: b"[" + token_answer(token) + b"]",
        lambda token: token_answer(token)[:-1] + b', "access_token": "other"}',
        lambda token: token_answer(token)[:-1] + b', "expires_in": NaN}',
        lambda token: token.encode(),
        lambda token: b"\xff",
        lambda token: b"",
    ],
)
def test_an_answer_that_is_not_what_it_should_be_is_not_used(stage: Stage, spoil: Callable[[str], bytes]) -> None:
    stage.answer(200, spoil(stage.mint()))
    assert stage.unavailable().reason == "answer_not_trusted"


@pytest.mark.rfc("6749", "7.1")
def test_the_type_of_the_token_may_be_spelt_in_any_case_and_more_members_may_follow(stage: Stage) -> None:
    stage.answer(200, token_answer(stage.mint(), token_type="bEARER", more={"a": 1}) + b"\n")
    assert stage.exchanger.verify_sync(KEY)


def test_an_answer_is_small(stage: Stage) -> None:
    stage.answer(200, token_answer(stage.mint(), padding="x" * 70_000))
    assert stage.unavailable().reason == "no_answer"
    stage.answer(200, token_answer(stage.mint(), padding="x" * 60_000))
    assert stage.exchanger.verify_sync(KEY)


def test_without_the_issuers_signing_keys_nobody_can_tell(stage: Stage) -> None:
    stage.keys_fault = BadKeySet("503")
    assert stage.unavailable().reason == "keys_unavailable"
    stage.keys_fault = None
    stage.pass_by(60)
    assert stage.exchanger.verify_sync(KEY)


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.case("SEC-01")
async def test_neither_key_nor_secret_is_told_to_anybody_but_the_issuer(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Not to a log of any library at any level, and to no error, of whatever went wrong."""
    caplog.set_level(logging.DEBUG)
    answers: list[tuple[int, bytes]] = [
        (200, token_answer(stage.mint(aud="https://billing.example"))),
        (400, error("invalid_grant")),
        (400, error(KEY)),
        (401, error("invalid_client")),
        (500, KEY.encode()),
        (200, CLIENT_SECRET.encode()),
        (200, b"x" * 70_000),
    ]
    told = [repr(stage.exchanger), str(stage.exchanger)]
    for status, content in answers:
        stage.answer(status, content)
        stage.exchanger = stage.make()
        with pytest.raises((TokenRefused, ExchangeUnavailable)) as failed:
            await stage.exchanger.verify(KEY)
        told += traceback.format_exception(failed.value)
        told += [repr(failed.value), str(vars(failed.value))]
        assert failed.value.__context__ is None
    stage.handler = stage.honest
    claims = await stage.exchanger.verify(KEY)
    told += [repr(claims), *caplog.messages, caplog.text, *(str(vars(record)) for record in caplog.records)]
    basic = stage.asked[0].headers["authorization"][6:]
    secrets = [KEY, KEY[16:60], CLIENT_SECRET, basic, *(token.rpartition(".")[2] for token in stage.minted)]
    assert len(secrets) == 6
    assert [secret for secret in secrets for text in told if secret in text] == []
    assert len(caplog.records) > len(answers)


async def test_a_key_stays_in_memory_for_no_longer_than_it_is_sent(stage: Stage) -> None:
    """Whether it was good, refused, or nobody could tell."""
    keys = [an_api_key(number) for number in range(3)]
    before = [sys.getrefcount(key) for key in keys]
    assert await stage.exchanger.verify(keys[0])
    stage.answer(400, error("invalid_grant"))
    with pytest.raises(TokenRefused):
        await stage.exchanger.verify(keys[1])
    stage.answer(503, headers={"retry-after": "50"})
    with pytest.raises(ExchangeUnavailable):
        await stage.exchanger.verify(keys[2])
    stage.asked.clear()
    await asyncio.to_thread(wait_for_fetches)
    assert [sys.getrefcount(key) for key in keys] == before
    exchanger = vars(stage.exchanger)
    held = repr([exchanger, *(vars(part) for part in exchanger.values() if isinstance(part, _Memory))])
    assert [key for key in keys if key in held or key[16:60] in held] == []
