"""The verifier as a sibling service has it: over HTTP, with an issuer that is well, and with strangers at the door."""

import asyncio
import gc
import json
import secrets
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from identity_service import verifier as verifier_package
from identity_service.infra.runtime import SystemClock
from identity_service.oauth.signing_keys.schedule import Plan
from identity_service.verifier import InsufficientScope, TokenRefused, TokenVerifier, VerifiedClaims
from tests.support.clock import UnixClock
from tests.support.issuer import (
    AUDIENCE,
    JWKS,
    METADATA,
    Issuer,
    key_set,
    private_key,
    public_jwk,
    resolve_internal,
    wait_for_fetches,
)
from tests.support.server_process import ServerProcess
from tests.support.service import PASSWORD, running, test_settings
from tests.support.tokens import OMIT, b64, compact, parts_of
from tests.support.verifying import reason, unavailable

_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds


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
def test_what_a_verifier_was_told_is_what_it_checks(issuer: Issuer, clock: UnixClock) -> None:
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
    resolve_internal(monkeypatch, lambda: "127.0.0.1")


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


def test_keys_that_have_moved_are_found_again(issuer: Issuer, verifier: TokenVerifier, clock: UnixClock) -> None:
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


def test_nobody_stands_between_a_sibling_and_an_issuer_on_its_own_machine(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Issuer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.origin)
        assert TokenVerifier(issuer.url, AUDIENCE).verify_sync(issuer.mint())
        assert proxy.asked == []


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

    def remembered() -> int:
        """Bytes that were asked for by the verifier, or by what it called: other tests' threads allocate as well."""
        gc.collect()
        ours = tracemalloc.Filter(True, f"{Path(verifier_package.__file__).parent}/*", all_frames=True)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces)

    await strangers(2000)
    tracemalloc.start(6)
    try:
        await strangers(2000)
        before = remembered()
        await strangers(6000)
        after = remembered()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000, "17 bytes for each of them would be more"
    assert await verifier.verify(good)
    assert issuer.counts == (1, 2)


@pytest.mark.case("JWT-05")
@pytest.mark.parametrize("blocks", [False, True], ids=["coroutine", "thread"])
async def test_a_stranger_who_comes_again_and_again_is_looked_for_ever_more_rarely(
    issuer: Issuer, verifier: TokenVerifier, clock: UnixClock, blocks: bool
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


# -- the service itself -----------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-08")
@pytest.mark.case("JWT-10")
@pytest.mark.rfc("9068", "4")
async def test_the_services_own_tokens_are_read_and_refused_when_they_are_no_longer_good(
    database_url: str, redis_url: str, clock: UnixClock
) -> None:
    """A user's, a client's, one for another service, an expired one, and one whose key is known to others."""
    async with running(test_settings(database_url, redis_url=redis_url), SystemClock()) as service:
        client = await service.a_client(audiences=(AUDIENCE, "https://billing.example"), scope=("orders:read",))
        user = await service.a_user()
        with ServerProcess(database_url, redis_url, key_poll="0.1") as server:
            clock.began = time.time()  # the server may have taken longer to start than clocks may differ
            verifier = TokenVerifier(server.url, AUDIENCE, timeout=_PATIENCE, clock=clock)

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
            later = TokenVerifier(server.url, AUDIENCE, timeout=_PATIENCE, clock=lambda: clock() + 3600)
            assert reason(later, of_the_user) == "expired"

            withdrawn = str(parts_of(of_the_user)[0]["kid"])
            keys = service.services.signing_keys
            spare = await keys.prepare(Plan(create=(service.clock.now(),) * 2))
            assert await service.within(lambda tx: keys.compromise(tx, [withdrawn], spare)) == [withdrawn]
            assert await verifier.verify(of_the_user), "nobody has asked yet"
            deadline = time.monotonic() + _PATIENCE
            while parts_of(successor := await token(**machines))[0]["kid"] == withdrawn:
                assert time.monotonic() < deadline, "the server goes on signing with it"
                await asyncio.sleep(0.05)
            clock.began = time.time()
            assert await verifier.verify(successor), "siblings have known the next key for long"
            clock.ahead = 280  # its keys are due for a refresh; the token has not expired
            await verifier.verify(of_the_user)
            wait_for_fetches()
            assert reason(verifier, of_the_user) == "kid_unknown"
            assert await verifier.verify(successor)
    wait_for_fetches()
