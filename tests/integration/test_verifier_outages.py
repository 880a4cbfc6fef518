"""What a verifier makes of keys that come and go, and of an issuer that is late, endless, malicious, mute or down."""

import asyncio
import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from identity_service.verifier import KeysUnavailable, TokenVerifier
from tests.support.clock import UnixClock
from tests.support.issuer import (
    AUDIENCE,
    JWKS,
    METADATA,
    Issuer,
    key_set,
    public_jwk,
    resolve_internal,
    wait_for_fetches,
)
from tests.support.verifying import reason, unavailable
from tests.support.waiting import until

_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds
_TIMEOUT = 0.5  # seconds that a verifier waits for an issuer that does not answer in time
_AT_MOST = 20.0  # seconds in which it must have given up, on a machine that is busy with other things


# -- keys that come and go --------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-18")
@pytest.mark.rfc("9111", "5.2.1.4")
async def test_a_new_key_is_fetched_past_the_caches_and_others_with_their_leave(
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock
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
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock, blocks: bool
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
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock
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
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock, headers: dict[str, str], seconds: float
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
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock, body: bytes
) -> None:
    assert verifier.verify_sync(issuer.mint())
    issuer.answer(JWKS, body=body)
    clock.ahead = 1000
    assert verifier.verify_sync(issuer.mint(now=clock()))
    assert issuer.counts == (1, 2)
    assert unavailable(verifier, issuer.mint("k2", now=clock())), "and nobody knows about the others"


def test_keys_are_kept_for_a_day_after_the_last_answer(
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock
) -> None:
    assert verifier.verify_sync(issuer.mint())
    issuer.go_down()
    clock.ahead = 86400 - 60
    assert verifier.verify_sync(issuer.mint(now=clock()))
    clock.ahead = 86400 + 60
    assert unavailable(verifier, issuer.mint(now=clock()))
    issuer.come_back()
    clock.ahead = 86400 + 120
    assert verifier.verify_sync(issuer.mint(now=clock()))


def test_how_long_they_are_kept_may_be_told(issuer: Issuer, clock: UnixClock) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE, max_stale=3600, clock=clock)
    assert verifier.verify_sync(issuer.mint())
    issuer.go_down()
    clock.ahead = 3540
    assert verifier.verify_sync(issuer.mint(now=clock()))
    clock.ahead = 3660
    assert unavailable(verifier, issuer.mint(now=clock()))


def test_a_sibling_starts_with_a_file_while_the_issuer_is_down(
    issuer: Issuer, clock: UnixClock, tmp_path: Path
) -> None:
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


async def test_a_cold_sibling_cannot_tell_while_the_issuer_is_down(issuer: Issuer, clock: UnixClock) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE, clock=clock)
    issuer.go_down()
    for _ in range(3):
        with pytest.raises(KeysUnavailable):
            await verifier.verify(issuer.mint())
        assert unavailable(verifier, issuer.mint("k2"))
    issuer.come_back()
    clock.ahead = 30
    assert await verifier.verify(issuer.mint())


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
    await until(lambda: issuer.count(path) >= 2, "each asks")  # it may read more slowly than they give up
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


async def test_known_keys_need_no_issuer(issuer: Issuer, verifier: TokenVerifier, clock: UnixClock) -> None:
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
    issuer.let_go()


def test_a_thread_that_waited_for_a_mute_issuer_goes_on_with_stale_keys(issuer: Issuer, clock: UnixClock) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE, clock=clock)
    assert verifier.verify_sync(issuer.mint())
    verifier._timeout = _TIMEOUT
    issuer.answer(JWKS, how="when told")
    clock.ahead = 4000
    assert verifier.verify_sync(issuer.mint(now=clock()))


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `id.internal` be a name that takes long to resolve, and then has no address."""
    over = threading.Event()

    def address() -> str:
        over.wait(_PATIENCE)
        raise socket.gaierror("nobody knows")

    resolve_internal(monkeypatch, address)
    yield
    over.set()
    wait_for_fetches()


async def test_a_coroutine_waits_for_a_slow_name_no_longer_than_it_was_told(slow_names: None) -> None:
    """Once, and not anew for each fetch that it might wait for."""
    with Issuer() as issuer:
        token = issuer.mint(iss="http://id.internal")
    took: list[float] = []
    while len(took) < 3 and min(took, default=4.0) >= 4.0:  # once or twice it may be the machine that stands still
        verifier = TokenVerifier("http://id.internal", AUDIENCE, timeout=2, allow_http=True)
        began = time.monotonic()
        with pytest.raises(KeysUnavailable):
            await verifier.verify(token)
        took.append(time.monotonic() - began)
    assert min(took) < 4.0, took


def test_keys_that_are_held_do_while_a_name_is_slow_to_resolve(slow_names: None, tmp_path: Path) -> None:
    """The first request waits for `timeout`; then the keys that are there do."""
    path = tmp_path / "keys.json"
    path.write_bytes(key_set("k1"))
    verifier = TokenVerifier("http://id.internal", AUDIENCE, timeout=_TIMEOUT, allow_http=True, jwks_file=path)
    with Issuer() as issuer:
        assert verifier.verify_sync(issuer.mint(iss="http://id.internal"))


def test_a_fetch_ends_in_time_although_a_name_is_slow_to_resolve(slow_names: None) -> None:
    """Else none that could succeed would begin before the resolver has given up."""
    verifier = TokenVerifier("http://id.internal", AUDIENCE, timeout=_TIMEOUT, allow_http=True)
    with Issuer() as issuer:
        token = issuer.mint(iss="http://id.internal")
    began = time.monotonic()
    assert unavailable(verifier, token)
    wait_for_fetches()
    assert time.monotonic() - began < _AT_MOST
