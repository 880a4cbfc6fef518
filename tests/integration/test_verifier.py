"""The verifier as a sibling service has it: over HTTP, in any number of coroutines, threads and loops at once."""

import asyncio
import gc
import gzip
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from identity_service.infra.runtime import SystemClock
from identity_service.oauth.signing_keys.schedule import Plan
from identity_service.verifier import InsufficientScope, KeysUnavailable, TokenRefused, TokenVerifier, VerifiedClaims
from tests.support.issuer import AUDIENCE, JWKS, METADATA, Issuer, key_set, private_key, public_jwk
from tests.support.server_process import ServerProcess
from tests.support.service import PASSWORD, running, test_settings
from tests.support.tokens import OMIT, b64, compact, parts_of

ROOT = Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds
_TIMEOUT = 0.3  # seconds that a verifier waits for an issuer that does not answer in time
_AT_MOST = 4.0  # seconds in which it must have given up, on a machine that is busy with other things


class Clock:
    """Stands still, `ahead` seconds after the test began."""

    def __init__(self) -> None:
        self.began = time.time()
        self.ahead = 0.0

    def __call__(self) -> float:
        return self.began + self.ahead


def wait_for_fetches() -> None:
    """Return once no fetch is under way, as must happen within a bounded time."""
    for thread in threading.enumerate():
        if thread.name == "jwks":
            thread.join(_PATIENCE)
            assert not thread.is_alive(), "a thread is left behind"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """An issuer that has the key k1."""
    with Issuer() as issuer:
        yield issuer
    wait_for_fetches()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(issuer: Issuer, clock: Clock) -> TokenVerifier:
    """A verifier that has fetched nothing yet."""
    return TokenVerifier(issuer.url, AUDIENCE, clock=clock)


def reason(verifier: TokenVerifier, token: str) -> str:
    """Return why a token is refused."""
    with pytest.raises(TokenRefused) as refused:
        verifier.verify_sync(token)
    return refused.value.reason


def unavailable(verifier: TokenVerifier, token: str) -> bool:
    """Return whether nobody can tell."""
    with pytest.raises(KeysUnavailable):
        verifier.verify_sync(token)
    return True


# -- good tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("9068", "4")
async def test_a_good_token_is_read_with_and_without_a_loop(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint(scope="orders:read orders:write", sid="session-1", roles=["user"])
    for claims in (await verifier.verify(token), verifier.verify_sync(token)):
        assert isinstance(claims, VerifiedClaims)
        assert (claims.issuer, claims.subject, claims.client_id) == (issuer.url, "user-1", "client-1")
        assert (claims.audience, claims.session_id, claims.roles) == ((AUDIENCE,), "session-1", {"user"})
        assert claims.scope == {"orders:read", "orders:write"}
    assert issuer.counts == (1, 1)


@pytest.mark.rfc("6750", "3.1")
async def test_every_scope_that_is_asked_for_is_needed(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint(scope="orders:read orders:list")
    assert await verifier.verify(token, "orders:read", "orders:list")
    assert verifier.verify_sync(token, "orders:list")
    for scopes in (
        ("orders:write",),
        ("orders:read", "orders:write"),
        ("orders",),
        ("orders:read orders:list",),
        ("",),
    ):
        with pytest.raises(InsufficientScope) as refused:
            await verifier.verify(token, *scopes)
        assert (refused.value.reason, refused.value.scope) == ("insufficient_scope", " ".join(scopes))
        with pytest.raises(InsufficientScope):
            verifier.verify_sync(token, *scopes)
    with pytest.raises(InsufficientScope):
        verifier.verify_sync(issuer.mint(scope=OMIT), "orders:read")


@pytest.mark.rfc("9068", "4")
def test_what_a_verifier_was_told_is_what_it_checks(issuer: Issuer, clock: Clock) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE, leeway=5, clock=clock)
    assert reason(verifier, issuer.mint(aud="https://billing.example")) == "aud_wrong"
    assert reason(verifier, issuer.mint(iss="https://evil.example")) == "iss_wrong"
    assert reason(verifier, issuer.mint(iss=issuer.url + "/")) == "iss_wrong"
    forged = compact({"alg": "RS256", "typ": "at+jwt", "kid": "k1"}, parts_of(issuer.mint())[1], private_key("k2"))
    assert reason(verifier, forged) == "signature_wrong"
    token = issuer.mint(now=clock())
    clock.ahead = 603
    assert verifier.verify_sync(token)
    clock.ahead = 606
    assert reason(verifier, token) == "expired"
    clock.ahead = -20
    assert reason(verifier, token) == "not_yet_valid"
    assert TokenVerifier(issuer.url, AUDIENCE, clock=clock).verify_sync(token), "by default it is 30 seconds"


# -- finding the keys -------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8414", "3.3")
@pytest.mark.parametrize(
    "change",
    [
        lambda issuer: {"issuer": "https://evil.example"},
        lambda issuer: {"issuer": issuer + "/"},
        lambda issuer: {"issuer": issuer.replace("http", "HTTP")},
        lambda issuer: {"issuer": issuer.replace("127.0.0.1", "localhost")},
        lambda issuer: {"issuer": issuer[:-1]},
        lambda issuer: {"issuer": [issuer]},
        lambda issuer: {"issuer": None},
        lambda issuer: {},
    ],
    ids=["other", "slash", "case", "name", "beginning", "list", "null", "none"],
)
def test_metadata_of_another_issuer_leads_to_no_keys(
    issuer: Issuer, verifier: TokenVerifier, change: Callable[[str], dict[str, Any]]
) -> None:
    """Compared letter by letter: it may be an attacker's document that was put in the way."""
    issuer.answer(METADATA, body=json.dumps({"jwks_uri": issuer.origin + JWKS, **change(issuer.url)}).encode())
    assert unavailable(verifier, issuer.mint())
    assert issuer.counts == (1, 0)


@pytest.mark.case("JWT-04")
@pytest.mark.rfc("8414", "2")
@pytest.mark.parametrize(
    "uri",
    [
        *("http://id.internal:{port}/jwks", "http://user@127.0.0.1:{port}/jwks", "http://127.0.0.1:{port}/jwks?a=b"),
        *("//127.0.0.1:{port}/jwks", "/jwks", "jwks", "", "file:///etc/passwd", "https://", None, 7, ["https://x"], {}),
    ],
    ids=str,
)
def test_metadata_that_names_no_address_to_trust_leads_to_no_keys(
    issuer: Issuer,
    verifier: TokenVerifier,
    uri: object,
    every_name_is_here: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = uri.format(port=issuer.port) if isinstance(uri, str) else uri
    issuer.answer(METADATA, body=json.dumps({**issuer.metadata, "jwks_uri": uri}).encode())
    assert unavailable(verifier, issuer.mint())
    assert issuer.counts == (1, 0)
    assert "BadKeySet: the metadata is malformed, or names no jwks_uri that can be trusted" in caplog.text


@pytest.fixture
def every_name_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `id.internal` be a name of this machine."""
    look_up = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **more: Any) -> Any:
        return look_up("127.0.0.1" if host in ("id.internal", b"id.internal") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_http_is_taken_from_elsewhere_if_that_is_asked_for(issuer: Issuer, every_name_is_here: None) -> None:
    elsewhere = f"http://id.internal:{issuer.port}"
    metadata = {"issuer": elsewhere, "jwks_uri": elsewhere + JWKS}
    issuer.answer(METADATA, body=json.dumps(metadata).encode())
    assert TokenVerifier(elsewhere, AUDIENCE, allow_http=True).verify_sync(issuer.mint(iss=elsewhere))
    assert issuer.counts == (1, 1)


@pytest.mark.rfc("8414", "3.2")
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'"x"', b'{"issuer": "x", "issuer": "y"}', b"\xef\xbb\xbf{}", b"\xff"],
    ids=["empty", "html", "list", "object", "text", "twice", "mark", "not UTF-8"],
)
def test_metadata_that_cannot_be_read_leads_to_no_keys(issuer: Issuer, verifier: TokenVerifier, body: bytes) -> None:
    issuer.answer(METADATA, body=body)
    assert unavailable(verifier, issuer.mint())
    assert issuer.counts == (1, 0)


@pytest.mark.rfc("8414", "3.1")
@pytest.mark.parametrize("path", ["/tenant", "/tenant/a"])
def test_an_issuer_may_have_a_path(path: str) -> None:
    with Issuer(path) as issuer:
        assert TokenVerifier(issuer.url, AUDIENCE).verify_sync(issuer.mint())
        assert [asked.path for asked in issuer.asked] == [METADATA + path, JWKS]


def test_where_the_keys_are_may_be_told(issuer: Issuer) -> None:
    issuer.answer(METADATA, status=404)
    verifier = TokenVerifier(issuer.url, AUDIENCE, jwks_uri=issuer.origin + JWKS)
    assert verifier.verify_sync(issuer.mint())
    assert reason(verifier, issuer.mint("k2")) == "kid_unknown"
    assert issuer.counts == (0, 2)


@pytest.mark.case("JWT-04")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", [METADATA, JWKS])
def test_a_redirect_is_not_followed(issuer: Issuer, path: str, status: int) -> None:
    """Where it leads is up to whoever sends it; that its own body would do makes it no better."""
    good = json.dumps(issuer.metadata).encode() if path == METADATA else key_set("k1")
    issuer.answer("/elsewhere", body=good)
    issuer.answer(path, status=status, headers={"Location": issuer.origin + "/elsewhere"}, body=good)
    assert unavailable(TokenVerifier(issuer.url, AUDIENCE), issuer.mint())
    assert issuer.count(path) == 1
    assert issuer.count("/elsewhere") == 0


@pytest.mark.rfc("8414", "3.2")
@pytest.mark.parametrize("status", [201, 203, 206, 400, 404, 429, 500, 503])
def test_an_answer_is_read_if_it_is_200_only(issuer: Issuer, status: int) -> None:
    for path, good in ((METADATA, json.dumps(issuer.metadata).encode()), (JWKS, key_set("k1"))):
        issuer.answer(path, status=status, body=good)
        assert unavailable(TokenVerifier(issuer.url, AUDIENCE), issuer.mint())
        issuer.answer(path)
    assert issuer.counts == (2, 1)


def test_keys_that_have_moved_are_found_again(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """As long as they stay where they are, nobody asks for the metadata again."""
    assert verifier.verify_sync(issuer.mint())
    assert reason(verifier, issuer.mint("k2")) == "kid_unknown"
    assert issuer.counts == (1, 2)
    issuer.answer(JWKS, status=404)
    issuer.answer("/moved", body=key_set("k2"))
    issuer.answer(METADATA, body=json.dumps({**issuer.metadata, "jwks_uri": issuer.origin + "/moved"}).encode())
    clock.ahead = 1000
    assert verifier.verify_sync(issuer.mint(now=clock())), "the keys that are held do, while there are no others"
    clock.ahead = 2000
    assert verifier.verify_sync(issuer.mint(now=clock()))
    wait_for_fetches()
    assert verifier.verify_sync(issuer.mint("k2", now=clock()))
    assert issuer.counts == (2, 3)
    assert issuer.count("/moved") == 1


# -- many at once -----------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_before_a_token_comes(issuer: Issuer, verifier: TokenVerifier) -> None:
    for rubbish in ("", "x", "a.b.c", issuer.mint(header={"alg": "none"}), issuer.mint(header={"typ": "JWT"})):
        with pytest.raises(TokenRefused):
            verifier.verify_sync(rubbish)
    assert issuer.counts == (0, 0), "and not for a token that is refused whatever the keys are"


async def test_a_thousand_callers_on_a_cold_cache_cause_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    with issuer.silence():
        callers = [asyncio.create_task(verifier.verify(token)) for _ in range(1000)]
        await asyncio.to_thread(issuer.wait_until_asked, METADATA)
        assert not any(caller.done() for caller in callers)
    assert len({id(claims) for claims in await asyncio.gather(*callers)}) == 1000
    assert issuer.counts == (1, 1)


async def test_threads_and_coroutines_share_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    at_the_door = threading.Barrier(51)

    def in_a_thread() -> VerifiedClaims:
        at_the_door.wait(_PATIENCE)
        return verifier.verify_sync(token)

    with ThreadPoolExecutor(50) as threads:
        with issuer.silence():
            sync = [threads.submit(in_a_thread) for _ in range(50)]
            mixed = [asyncio.create_task(verifier.verify(token)) for _ in range(50)]
            await asyncio.to_thread(at_the_door.wait, _PATIENCE)
            await asyncio.to_thread(issuer.wait_until_asked, METADATA)
            await asyncio.sleep(0.1)  # lets whoever would ask for himself do so
        assert len(await asyncio.gather(*mixed)) == 50
        assert len([caller.result(_PATIENCE) for caller in sync]) == 50
    assert issuer.counts == (1, 1)


async def test_a_new_key_is_looked_for_once_by_all_who_wait_for_it(issuer: Issuer, verifier: TokenVerifier) -> None:
    assert await verifier.verify(issuer.mint())
    issuer.kids.append("k2")
    new, unknown = issuer.mint("k2"), issuer.mint("k3")
    results = await asyncio.gather(*(verifier.verify(token) for token in (new, unknown) * 100), return_exceptions=True)
    assert [type(result) for result in results] == [VerifiedClaims, TokenRefused] * 100
    assert issuer.counts == (1, 2)


def test_fifty_threads_on_a_cold_cache_cause_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    at_the_door = threading.Barrier(50)

    def in_a_thread(_: int) -> VerifiedClaims:
        at_the_door.wait(_PATIENCE)
        return verifier.verify_sync(token)

    issuer.answer(METADATA, delay=0.2)
    with ThreadPoolExecutor(50) as threads:
        assert len(list(threads.map(in_a_thread, range(50)))) == 50
    assert issuer.counts == (1, 1)


def test_two_loops_in_two_threads_share_one_verifier(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()

    async def callers() -> int:
        return len(await asyncio.gather(*(verifier.verify(token) for _ in range(20))))

    with ThreadPoolExecutor(2) as threads:
        with issuer.silence():
            loops = [threads.submit(asyncio.run, callers()) for _ in range(2)]
            issuer.wait_until_asked(METADATA)
            time.sleep(0.1)  # lets the other loop ask for itself, if it would
        assert [loop.result(_PATIENCE) for loop in loops] == [20, 20]
    assert issuer.counts == (1, 1)


def test_one_verifier_outlives_its_loops(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """Also one that ended while somebody in it was waiting."""

    async def waits_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(verifier.verify(issuer.mint()), 0.1)

    with issuer.silence():
        asyncio.run(waits_in_vain())
    for ahead in (0, 1000, 2000):
        clock.ahead = ahead
        assert asyncio.run(verifier.verify(issuer.mint(now=clock())))


async def test_who_stops_waiting_does_not_end_the_fetch_for_others(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    with issuer.silence():
        first, second, third = (asyncio.create_task(verifier.verify(token)) for _ in range(3))
        await asyncio.to_thread(issuer.wait_until_asked, METADATA)
        first.cancel()
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
    assert (await second).subject == "user-1"
    assert third.cancelled()
    assert await verifier.verify(token)
    assert issuer.counts == (1, 1)


# -- keys that come and go --------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-18")
@pytest.mark.rfc("9111", "5.2.1.4")
async def test_a_new_key_is_fetched_past_the_caches_and_others_with_their_leave(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    assert await verifier.verify(issuer.mint())
    issuer.kids.append("k2")
    assert await verifier.verify(issuer.mint("k2"))
    assert await verifier.verify(issuer.mint("k1"))
    clock.ahead = 1000
    assert await verifier.verify(issuer.mint("k2", now=clock()))
    assert [(asked.path, asked.headers["cache-control"]) for asked in issuer.asked] == [
        (METADATA, None),
        (JWKS, None),
        (JWKS, "no-cache"),
        (JWKS, None),
    ]
    assert {asked.headers["accept-encoding"] for asked in issuer.asked} == {"identity"}
    assert {asked.headers["authorization"] for asked in issuer.asked} == {None}


@pytest.mark.case("JWT-18")
@pytest.mark.parametrize("blocks", [False, True], ids=["coroutine", "thread"])
async def test_a_cache_on_the_way_that_is_behind_does_not_hide_a_new_key(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock, blocks: bool
) -> None:
    """Not from a verifier that has just started either, nor from one that has slept for long."""
    issuer.cached = key_set("k1")
    issuer.kids = ["k1", "k2"]
    token = issuer.mint("k2", now=clock())
    assert verifier.verify_sync(token) if blocks else await verifier.verify(token)
    assert issuer.counts == (1, 2)
    issuer.cached = key_set("k1", "k2")
    issuer.kids = ["k1", "k2", "k3"]
    clock.ahead = 5000
    token = issuer.mint("k3", now=clock())
    assert verifier.verify_sync(token) if blocks else await verifier.verify(token)
    assert issuer.counts == (1, 4)


@pytest.mark.case("JWT-08")
def test_a_key_that_was_withdrawn_is_refused_once_the_set_has_been_fetched_again(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock
) -> None:
    assert verifier.verify_sync(issuer.mint("k1"))
    issuer.kids = ["k2"]
    assert verifier.verify_sync(issuer.mint("k1"))
    clock.ahead = 290
    assert verifier.verify_sync(issuer.mint("k1", now=clock())), "the set is being fetched"
    wait_for_fetches()
    assert reason(verifier, issuer.mint("k1", now=clock())) == "kid_unknown"
    assert verifier.verify_sync(issuer.mint("k2", now=clock()))


@pytest.mark.rfc("9111", "4.2")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Cache-Control": "max-age=60"}, 60),
        ({"Cache-Control": "max-age=600", "Age": "540"}, 60),
        ({"Cache-Control": "no-store"}, 30),
        ({"Cache-Control": "max-age=100000"}, 900),
        ({}, 300),
    ],
    ids=["max-age", "age", "no-store", "too long", "nothing"],
)
def test_the_key_sets_headers_say_when_it_is_asked_for_again(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock, headers: dict[str, str], seconds: float
) -> None:
    issuer.answer(METADATA, headers={"Cache-Control": "max-age=1"})
    issuer.answer(JWKS, headers=headers)
    assert verifier.verify_sync(issuer.mint())
    clock.ahead = 0.74 * seconds
    assert verifier.verify_sync(issuer.mint(now=clock()))
    wait_for_fetches()
    assert issuer.counts == (1, 1)
    clock.ahead = seconds
    assert verifier.verify_sync(issuer.mint(now=clock()))
    wait_for_fetches()
    assert issuer.counts == (1, 2)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", key_set(), key_set("k2", "k2"), key_set(public_jwk("k2", d="AQAB")), b"\xef\xbb\xbf" + key_set()],
    ids=["empty", "html", "no keys", "one kid twice", "a private key", "a mark"],
)
def test_a_set_of_no_use_leaves_the_good_keys_where_they_are(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock, body: bytes
) -> None:
    assert verifier.verify_sync(issuer.mint())
    issuer.answer(JWKS, body=body)
    clock.ahead = 1000
    assert verifier.verify_sync(issuer.mint(now=clock()))
    assert issuer.counts == (1, 2)
    assert unavailable(verifier, issuer.mint("k2", now=clock())), "and nobody knows about the others"


def test_keys_are_kept_for_a_day_after_the_last_answer(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    assert verifier.verify_sync(issuer.mint())
    issuer.go_down()
    clock.ahead = 86400 - 60
    assert verifier.verify_sync(issuer.mint(now=clock()))
    clock.ahead = 86400 + 60
    assert unavailable(verifier, issuer.mint(now=clock()))
    issuer.come_back()
    clock.ahead = 86400 + 120
    assert verifier.verify_sync(issuer.mint(now=clock()))


def test_how_long_they_are_kept_may_be_told(issuer: Issuer, clock: Clock) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE, max_stale=3600, clock=clock)
    assert verifier.verify_sync(issuer.mint())
    issuer.go_down()
    clock.ahead = 3540
    assert verifier.verify_sync(issuer.mint(now=clock()))
    clock.ahead = 3660
    assert unavailable(verifier, issuer.mint(now=clock()))


def test_a_sibling_starts_with_a_file_while_the_issuer_is_down(issuer: Issuer, clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(key_set("k1"))
    issuer.go_down()
    verifier = TokenVerifier(issuer.url, AUDIENCE, jwks_file=path, clock=clock)
    assert verifier.verify_sync(issuer.mint("k1"))
    assert unavailable(verifier, issuer.mint("k2"))
    issuer.kids = ["k2"]
    issuer.come_back()
    clock.ahead = 60
    assert verifier.verify_sync(issuer.mint("k2"))
    assert reason(verifier, issuer.mint("k1")) == "kid_unknown", "the issuer's word is the last"


async def test_a_cold_sibling_cannot_tell_while_the_issuer_is_down(issuer: Issuer, clock: Clock) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE, clock=clock)
    issuer.go_down()
    for _ in range(3):
        with pytest.raises(KeysUnavailable):
            await verifier.verify(issuer.mint())
        assert unavailable(verifier, issuer.mint("k2"))
    issuer.come_back()
    clock.ahead = 30
    assert await verifier.verify(issuer.mint())


# -- strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-05")
async def test_ten_thousand_unknown_keys_cost_one_fetch_and_no_memory(issuer: Issuer, verifier: TokenVerifier) -> None:
    good = issuer.mint()
    _, payload, signature = good.split(".")
    assert await verifier.verify(good)

    async def strangers(number: int) -> None:
        for _ in range(number):
            header = json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": secrets.token_hex(32)}).encode()
            with pytest.raises(TokenRefused, match="kid_unknown"):
                await verifier.verify(f"{b64(header)}.{payload}.{signature}")

    await strangers(2000)
    gc.collect()
    tracemalloc.start()
    try:
        await strangers(4000)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await strangers(4000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000, "25 bytes for each of them would be more"
    assert await verifier.verify(good)
    assert issuer.counts == (1, 2)


@pytest.mark.case("JWT-05")
@pytest.mark.parametrize("blocks", [False, True], ids=["coroutine", "thread"])
async def test_a_stranger_who_comes_again_and_again_is_looked_for_ever_more_rarely(
    issuer: Issuer, verifier: TokenVerifier, clock: Clock, blocks: bool
) -> None:
    token = issuer.mint("k2")
    assert await verifier.verify(issuer.mint())
    for seconds, fetches in ((0, 2), (29, 2), (31, 3), (62, 3), (90, 3), (92, 4), (200, 4)):
        clock.ahead = seconds
        with pytest.raises(TokenRefused, match="kid_unknown"):
            verifier.verify_sync(token) if blocks else await verifier.verify(token)
        assert issuer.counts == (1, fetches)


@pytest.mark.case("JWT-04")
@pytest.mark.case("JWT-05")
async def test_nothing_in_a_token_makes_the_verifier_ask_anybody(issuer: Issuer, verifier: TokenVerifier) -> None:
    with Issuer() as canary:
        assert await verifier.verify(issuer.mint())
        uri = canary.origin + JWKS
        headers: list[dict[str, Any]] = [
            *({name: uri} for name in ("jku", "x5u", "url", "iss", "kid", "jwks_uri")),
            {"jku": uri, "kid": "k2"},
            {"jwk": public_jwk("k1", kid="k2"), "kid": "k2"},
            {"jwk": public_jwk("k1")},
            {"x5c": ["MIIB"]},
            {"kid": "../../etc/passwd"},
        ]
        for header in headers:
            for claims in ({}, {"iss": canary.url}, {"jku": uri, "jwks_uri": uri}):
                token = issuer.mint(header=header, **claims)
                if header.keys() <= {"url", "iss", "jwks_uri"} and "iss" not in claims:
                    assert await verifier.verify(token), "what nobody knows is passed over"
                else:
                    with pytest.raises(TokenRefused):
                        await verifier.verify(token)
        assert canary.asked == []
    assert issuer.counts == (1, 2), "the one fetch that unknown keys may cause"


# -- an issuer on a bad day -------------------------------------------------------------------------------------------

TROUBLES: dict[str, dict[str, Any]] = {
    "accepts and says nothing": {"how": "when told"},
    "drips its head": {"how": "drip the head"},
    "drips its body": {"how": "drip the body", "body": b"{"},
    "answers too late": {"delay": 30},
    "hangs up": {"how": "cut off"},
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("path", [METADATA, JWKS])
async def test_an_issuer_in_trouble_is_given_up_in_time(issuer: Issuer, path: str, trouble: str) -> None:
    """For coroutines and for threads, and no thread is left behind."""
    issuer.answer(path, **TROUBLES[trouble])
    jwks_uri = issuer.origin + JWKS if path == JWKS else None
    verifiers = [TokenVerifier(issuer.url, AUDIENCE, jwks_uri=jwks_uri, timeout=_TIMEOUT) for _ in range(2)]
    began = time.monotonic()
    results = await asyncio.gather(
        verifiers[0].verify(issuer.mint()),
        asyncio.to_thread(verifiers[1].verify_sync, issuer.mint()),
        return_exceptions=True,
    )
    wait_for_fetches()
    assert time.monotonic() - began < _AT_MOST
    assert [type(result) for result in results] == [KeysUnavailable, KeysUnavailable]
    assert issuer.count(path) == 2


@pytest.mark.parametrize("answer", [{"how": "endless"}, {}], ids=["without an end", "as a whole"])
@pytest.mark.parametrize("path", [METADATA, JWKS])
def test_a_document_that_is_too_long_is_not_read_to_its_end(
    issuer: Issuer, verifier: TokenVerifier, path: str, answer: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = json.dumps(issuer.metadata).encode() if path == METADATA else key_set("k1")
    issuer.answer(path, body=good + b" " * 262_144, **answer)
    began = time.monotonic()
    assert unavailable(verifier, issuer.mint())
    assert time.monotonic() - began < _AT_MOST
    assert f"{issuer.origin}{path} answered more than 262144 bytes" in caplog.text


@pytest.mark.parametrize("path", [METADATA, JWKS])
def test_what_is_compressed_although_that_was_not_asked_for_is_not_unpacked(
    issuer: Issuer, verifier: TokenVerifier, path: str
) -> None:
    good = json.dumps(issuer.metadata).encode() if path == METADATA else key_set("k1")
    issuer.answer(path, headers={"Content-Encoding": "gzip"}, body=gzip.compress(good))
    assert unavailable(verifier, issuer.mint())


def test_a_bomb_stays_as_small_as_it_came(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    bomb = gzip.compress(key_set("k1") + b" " * 20_000_000)
    issuer.answer(JWKS, headers={"Content-Encoding": "gzip"}, body=bomb)
    tracemalloc.start()
    try:
        assert unavailable(verifier, token)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert issuer.count(JWKS) == 1
    assert peak < 5_000_000


async def test_known_keys_need_no_issuer(issuer: Issuer, verifier: TokenVerifier, clock: Clock) -> None:
    """While a stranger, or a refresh, waits for an issuer that says nothing, everybody else is served."""
    assert await verifier.verify(issuer.mint())
    issuer.answer(JWKS, how="when told")
    stranger = asyncio.create_task(verifier.verify(issuer.mint("k2")))
    await asyncio.to_thread(issuer.wait_until_asked, JWKS, 2)
    clock.ahead = 290
    began = time.monotonic()
    for _ in range(100):
        assert await verifier.verify(issuer.mint(now=clock()))
    assert time.monotonic() - began < _AT_MOST
    assert not stranger.done()
    stranger.cancel()
    issuer.close()


# -- processes --------------------------------------------------------------------------------------------------------

ENDING = """
import sys, threading, time
from identity_service.verifier import TokenVerifier

issuer, audience, token = sys.argv[1:]
ahead = 0
verifier = TokenVerifier(issuer, audience, timeout=600, clock=lambda: time.time() + ahead)
verifier.verify_sync(token)
print("verified", flush=True)
sys.stdin.readline()
ahead = 280
verifier.verify_sync(token)
assert any(thread.name == "jwks" for thread in threading.enumerate())
"""

FORKING = """
import logging, os, signal, sys, threading, time
from identity_service.verifier import KeysUnavailable, TokenVerifier

logging.disable()  # one of the fetches is meant to fail

issuer, audience, token = sys.argv[1:]
signal.alarm(30)  # whatever is stuck ends, and the test fails


def child_can_verify(verifier):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            os._exit(0 if verifier.verify_sync(token).subject == "user-1" else 1)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def until(condition):
    while not condition():
        time.sleep(0.001)


def say(word):
    print(word, flush=True)
    return sys.stdin.readline()


# A fetch is under way: the child has nobody who would end it.
verifier = TokenVerifier(issuer, audience, timeout=60)
waiting = threading.Thread(target=verifier.verify_sync, args=(token,))
waiting.start()
until(lambda: any(thread.name == "jwks" for thread in threading.enumerate()))
say("waiting")
assert child_can_verify(verifier)
say("forked")
waiting.join()
assert child_can_verify(verifier)

# Another thread is in the middle of taking over what a fetch has brought.
inside, leave = threading.Event(), threading.Event()


def clock():
    if threading.current_thread().name == "jwks" and os.getpid() == parent:
        inside.set()
        leave.wait()
    return time.time()


parent = os.getpid()
say("down")
verifier = TokenVerifier(issuer, audience, timeout=60, clock=clock)


def fails():
    try:
        verifier.verify_sync(token)
    except KeysUnavailable:
        return


failing = threading.Thread(target=fails)
failing.start()
inside.wait()
say("inside")
assert child_can_verify(verifier)
leave.set()
failing.join()
print("done", flush=True)
"""


@contextmanager
def script(text: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a script in a process of its own, which is over when the block is left."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text, *arguments],  # later Pythons warn of forking
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_process_that_forks_while_keys_are_fetched_has_children_that_verify(issuer: Issuer) -> None:
    """As servers do that start their workers by forking: the child has neither the parent's thread nor its lock."""
    issuer.answer(METADATA, how="when told")
    with script(FORKING, issuer.url, AUDIENCE, issuer.mint()) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def hear(word: str) -> None:
            assert process.stdout.readline() == word + "\n", process.communicate()[1]

        def go_on() -> None:
            process.stdin.write("\n")
            process.stdin.flush()

        hear("waiting")
        issuer.wait_until_asked(METADATA)
        issuer.answer(METADATA)
        go_on()
        hear("forked")
        issuer.let_go()
        go_on()
        hear("down")
        issuer.go_down()
        go_on()
        hear("inside")
        issuer.come_back()
        go_on()
        hear("done")
        _, complaints = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 0
    assert complaints == ""


def test_a_process_ends_although_a_fetch_is_under_way(issuer: Issuer) -> None:
    with script(ENDING, issuer.url, AUDIENCE, issuer.mint()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "verified\n"
        issuer.answer(JWKS, how="when told")
        _, complaints = process.communicate("\n", timeout=_PATIENCE)
    assert process.returncode == 0
    assert complaints == ""


IMPORTS = """
import sys
{statement}
print(*set(sys.modules).intersection({names!r}))
"""
HEAVY = ("httpx2", "joserfc", "fastapi", "starlette", "pydantic", "sqlalchemy", "structlog")


@pytest.mark.parametrize(
    ("statement", "brought"),
    [
        ("import identity_service.verifier.core", set()),
        ("from identity_service.verifier import InsufficientScope, KeysUnavailable, TokenRefused", set()),
        ("from identity_service.verifier import TokenVerifier", {"httpx2", "joserfc"}),
    ],
    ids=["core", "what the server needs", "TokenVerifier"],
)
def test_an_import_brings_what_it_needs_and_no_more(statement: str, brought: set[str]) -> None:
    """The server reads tokens without an HTTP client; a sibling checks them without a web framework or a database."""
    with script(IMPORTS.format(statement=statement, names=HEAVY)) as process:
        told, complaints = process.communicate(timeout=30)
    assert complaints == ""
    assert set(told.split()) == brought


def test_the_package_names_what_it_has() -> None:
    import identity_service.verifier as package

    assert package.TokenVerifier is TokenVerifier
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError):
        package.JwksSource  # noqa: B018


# -- the service itself -----------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-08")
@pytest.mark.case("JWT-10")
@pytest.mark.rfc("9068", "4")
async def test_the_services_own_tokens_are_read_and_refused_when_they_are_no_longer_good(
    database_url: str, redis_url: str, clock: Clock
) -> None:
    """A user's, a client's, one for another service, an expired one, and one whose key is known to others."""
    async with running(test_settings(database_url, redis_url=redis_url), SystemClock()) as service:
        client = await service.a_client(audiences=(AUDIENCE, "https://billing.example"), scope=("orders:read",))
        user = await service.a_user()
        with ServerProcess(database_url, redis_url, key_poll="0.1") as server:
            verifier = TokenVerifier(server.url, AUDIENCE, clock=clock)

            async def token(**form: str) -> str:
                async with httpx2.AsyncClient(base_url=server.url, timeout=_PATIENCE) as http:
                    answer = await http.post("/token", data=form, auth=client.auth)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["access_token"])

            users = {"grant_type": "password", "username": user.username, "password": PASSWORD, "resource": AUDIENCE}
            machines = {"grant_type": "client_credentials", "resource": AUDIENCE}
            of_the_user, of_the_client = await token(**users), await token(**machines)

            claims = await verifier.verify(of_the_user, "orders:read")
            assert (claims.issuer, claims.audience, claims.client_id) == (server.url, (AUDIENCE,), client.id)
            assert (claims.subject, claims.roles, claims.scope) == (str(user.id), {"user"}, {"orders:read"})
            assert claims.session_id
            assert claims.token_id
            assert claims.expires_at - claims.issued_at > 300
            claims = await verifier.verify(of_the_client, "orders:read")
            assert (claims.subject, claims.client_id, claims.session_id) == (client.id, client.id, None)
            assert claims.roles == frozenset()
            assert verifier.verify_sync(of_the_user) == await verifier.verify(of_the_user)
            with pytest.raises(InsufficientScope):
                await verifier.verify(of_the_user, "orders:write")

            elsewhere = await token(**{**machines, "resource": "https://billing.example"})
            assert reason(verifier, elsewhere) == "aud_wrong"
            later = TokenVerifier(server.url, AUDIENCE, clock=lambda: clock() + 3600)
            assert reason(later, of_the_user) == "expired"

            withdrawn = str(parts_of(of_the_user)[0]["kid"])
            keys = service.services.signing_keys
            spare = await keys.prepare(Plan(create=(service.clock.now(),) * 2))
            assert await service.within(lambda tx: keys.compromise(tx, [withdrawn], spare)) == [withdrawn]
            assert await verifier.verify(of_the_user), "nobody has asked yet"
            deadline = time.monotonic() + _PATIENCE
            while parts_of(successor := await token(**machines))[0]["kid"] == withdrawn:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert await verifier.verify(successor), "siblings have known the next key for long"
            clock.ahead = 280  # its keys are due for a refresh; the token has not expired
            await verifier.verify(of_the_user)
            wait_for_fetches()
            assert reason(verifier, of_the_user) == "kid_unknown"
            assert await verifier.verify(successor)
    wait_for_fetches()


def test_a_thread_that_waited_for_a_mute_issuer_goes_on_with_stale_keys() -> None:
    with Issuer() as issuer:
        clock = Clock()
        verifier = TokenVerifier(issuer.url, AUDIENCE, timeout=0.3, clock=clock)
        assert verifier.verify_sync(issuer.mint())
        issuer.answer(JWKS, how="when told")
        clock.ahead = 4000
        assert verifier.verify_sync(issuer.mint(now=clock()))


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    over, look_up = threading.Event(), socket.getaddrinfo

    def resolve(host, *rest, **more):
        if host in ("id.internal", b"id.internal"):
            over.wait(3)
            raise socket.gaierror("nobody knows")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield
    over.set()
    for thread in threading.enumerate():
        if thread.name == "jwks":
            thread.join()


async def test_a_coroutine_waits_for_a_slow_name_no_longer_than_it_was_told(slow_names: None) -> None:
    """It waits three times as long (15 s by default); a thread waits once."""
    verifier = TokenVerifier("http://id.internal", AUDIENCE, timeout=0.5, allow_http=True)
    with Issuer() as issuer:
        token = issuer.mint(iss="http://id.internal")
    began = time.monotonic()
    with pytest.raises(KeysUnavailable):
        await verifier.verify(token)
    assert time.monotonic() - began < 1.4


def test_keys_that_are_held_do_while_a_name_is_slow_to_resolve(slow_names: None, tmp_path: Path) -> None:
    """Every request waits for `timeout` and is then told KeysUnavailable, for as long as the resolver takes."""
    (tmp_path / "keys.json").write_bytes(key_set("k1"))
    verifier = TokenVerifier(
        "http://id.internal", AUDIENCE, timeout=0.3, allow_http=True, jwks_file=tmp_path / "keys.json"
    )
    with Issuer() as issuer:
        assert verifier.verify_sync(issuer.mint(iss="http://id.internal"))


def test_nobody_stands_between_a_sibling_and_an_issuer_on_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Issuer() as issuer, Issuer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.origin)
        assert TokenVerifier(issuer.url, AUDIENCE).verify_sync(issuer.mint())
        assert proxy.asked == []
