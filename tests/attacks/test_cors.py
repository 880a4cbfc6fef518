"""Whose scripts may read our answers: everybody's the public documents, nobody else's anything about tokens."""

import asyncio
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from identity_service.accounts.clients import Clients
from identity_service.infra.database import Database, DatabaseUnavailable, Transaction
from identity_service.infra.tables import clients
from tests.support.service import ISSUER, PASSWORD, Registered, Service

APP = "https://app.example"
OTHER = "https://other.example"
ALLOW = "access-control-allow-origin"
READABLE = "retry-after, etag, ratelimit-limit, ratelimit-remaining, ratelimit-reset, x-request-id, deprecation"


@pytest.fixture(params=["service", "embedded"])
def either(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL, then on SQLite."""
    found: Service = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def app(embedded: Service) -> Registered:
    """The client of a page."""
    return await embedded.a_client(public=True, cors_origins=(APP,))


def readable(answer: httpx2.Response, origin: str | None) -> bool:
    """Return whether an answer is for that origin's scripts, which it says in full, or for nobody's."""
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers.get(ALLOW) in (origin, None)
    assert (answer.headers.get("access-control-expose-headers") == READABLE) == (ALLOW in answer.headers)
    assert "origin" in answer.headers.get("vary", "").lower().replace(" ", "").split(",")
    return ALLOW in answer.headers


def unaffected(answer: httpx2.Response) -> bool:
    """Return whether an answer is the same for everybody, and for nobody's scripts."""
    assert not any(name.startswith("access-control-") for name in answer.headers)
    return "vary" not in answer.headers


async def preflight(service: Service, path: str, origin: str, method: str = "POST") -> httpx2.Response:
    asked = {"access-control-request-method": method, "access-control-request-headers": "authorization"}
    return await service.http.options(path, headers={"origin": origin, **asked})


# -- what is public ---------------------------------------------------------------------------------------------------


@pytest.mark.case("TOK-14")
@pytest.mark.parametrize("headers", [{}, {"origin": "https://anybody.example"}, {"origin": "null"}])
async def test_everybodys_scripts_may_read_the_public_documents(embedded: Service, headers: dict[str, str]) -> None:
    """Also a 304, a 404 and a HEAD; without credentials, and the same for all, so that caches may keep it."""
    for path in ("jwks.json", "openid-configuration", "oauth-authorization-server", "nothing"):
        answer = await embedded.http.get(f"/.well-known/{path}", headers=headers)
        again = {**headers, "if-none-match": answer.headers.get("etag", "*")}
        unchanged = await embedded.http.get(f"/.well-known/{path}", headers=again)
        head = await embedded.http.head(f"/.well-known/{path}", headers=headers)
        assert unchanged.status_code == (304 if answer.status_code == 200 else 404)
        for each in (answer, unchanged, head):
            assert each.headers[ALLOW] == "*"
            assert each.headers["access-control-expose-headers"] == READABLE
            assert "access-control-allow-credentials" not in each.headers
            assert "vary" not in each.headers
            assert each.headers["cross-origin-resource-policy"] == "cross-origin"


@pytest.mark.case("TOK-14")
async def test_what_is_for_machines_and_for_developers_is_for_no_page(embedded: Service) -> None:
    """Not even for an origin that is registered, not even if its client asks."""
    client = await embedded.a_client(cors_origins=(APP,), introspect=(ISSUER,))
    tokens = await embedded.sign_in(client, await embedded.a_user())
    headers = {"origin": APP}
    form = {"token": tokens["access_token"]}
    answer = await embedded.http.post("/introspect", data=form, auth=client.auth, headers=headers)
    assert answer.json()["active"] is True
    assert unaffected(answer)
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/nothing", "/introspect", "/v1", "/tokens"):
        assert unaffected(await embedded.http.get(path, headers=headers))
        asked = await preflight(embedded, path, APP)
        assert asked.status_code in (404, 405)
        assert unaffected(asked)


# -- what is a client's -----------------------------------------------------------------------------------------------


@pytest.mark.rfc("9700", "2.6")
@pytest.mark.case("TOK-14")
async def test_an_answer_about_tokens_is_for_the_origins_of_the_client_that_asked(
    embedded: Service, app: Registered
) -> None:
    """A good answer, a refusal, a revocation; to the page of another client none of them, nor to one of no client."""
    other = await embedded.a_client(public=True, cors_origins=(OTHER, "https://staging.other.example:8443"))
    user = await embedded.a_user()
    for client, mine, foreign in ((app, APP, OTHER), (other, "https://staging.other.example:8443", APP)):
        for origin in (mine, foreign, "https://evil.example", None):
            headers = {"origin": origin} if origin else {}
            form = {"grant_type": "password", "username": user.username, "password": PASSWORD}
            good = await embedded.token(client, headers=headers, **form)
            bad = await embedded.token(client, headers=headers, **{**form, "password": "wrong"})
            unknown = await embedded.token(client, headers=headers, grant_type="x")
            body = {**client.form, "token": good.json()["refresh_token"]}
            revoked = await embedded.http.post("/revoke", data=body, headers=headers)
            assert [one.status_code for one in (good, bad, unknown, revoked)] == [200, 400, 400, 200]
            for answer in (good, bad, unknown, revoked):
                assert readable(answer, origin) == (origin == mine)


@pytest.mark.case("TOK-14")
async def test_before_the_client_is_known_an_answer_is_nobodys(embedded: Service, app: Registered) -> None:
    """Whoever it says it is: a registered origin learns nothing about a request that never became its client's."""
    headers = {"origin": APP}
    confidential = await embedded.a_client(cors_origins=(APP,))
    answers = [
        await embedded.http.post("/token", json={}, headers=headers),
        await embedded.http.post("/token", data={"grant_type": "password"}, headers=headers),
        await embedded.http.post("/token", data={"client_id": "cl_" + "0" * 22, "grant_type": "x"}, headers=headers),
        await embedded.token(Registered(confidential.id, "wrong"), headers=headers, grant_type="client_credentials"),
        await embedded.http.post("/token?scope=x", data={**app.form, "grant_type": "x"}, headers=headers),
        await embedded.http.post("/token", data={"password": "x" * 70_000}, headers=headers),
        await embedded.http.get("/token", headers=headers),
        await embedded.http.post("/token", headers={**headers, "host": "evil.example"}),
        await embedded.http.post("/revoke", data={"token": "x"}, headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [400, 401, 401, 401, 400, 413, 405, 404, 401]
    assert [readable(answer, APP) for answer in answers] == [False] * len(answers)


@pytest.mark.case("TOK-14")
@pytest.mark.parametrize(
    "origin",
    [
        *("https://app.example/", "https://app.example:443", "https://APP.example", "HTTPS://app.example"),
        *("http://app.example", "https://app.example.evil.example", "https://evilapp.example", "https://app.exampl"),
        *("https://app.example, https://evil.example", "https://app.example https://evil.example", "app.example"),
        *("null", "*", "", "https://", "https://*.example", "file://", "https://app.example\t"),
    ],
)
async def test_an_origin_is_compared_byte_for_byte(embedded: Service, app: Registered, origin: str) -> None:
    """Nothing that looks like it, begins with it or means it will do."""
    user = await embedded.a_user()
    form = {"grant_type": "password", "username": user.username, "password": PASSWORD}
    # An HTTP server would strip the blank at a header's end; here it stays.
    headers = {"origin": origin}
    assert not readable(await embedded.token(app, headers=headers, **form), APP)
    assert not readable(await embedded.http.get("/v1/users/me", headers=headers), APP)
    assert not readable(await preflight(embedded, "/token", origin), APP)


@pytest.mark.case("TOK-14")
async def test_two_origins_are_none(embedded: Service, app: Registered) -> None:
    """Which of them a cache or a browser would take, nobody knows."""
    headers = [("origin", APP), ("origin", APP)]
    answer = await embedded.http.post("/token", data={**app.form, "grant_type": "x"}, headers=headers)
    assert answer.json()["error"] == "unsupported_grant_type"
    assert not readable(answer, APP)
    assert not readable(await embedded.http.get("/v1/users/me", headers=headers), APP)


@pytest.mark.case("TOK-14")
async def test_null_is_no_origin_even_where_a_row_says_so(embedded: Service, app: Registered) -> None:
    """It is what every sandboxed page and every file calls itself."""
    await embedded.execute(update(clients).where(clients.c.id == app.id).values(cors_origins=["null"]))
    embedded.clock.advance(10)  # type: ignore[attr-defined]  # the tests' own clock
    headers = {"origin": "null"}
    assert not readable(await embedded.token(app, headers=headers, grant_type="x"), APP)
    assert not readable(await embedded.http.get("/v1/users/me", headers=headers), APP)
    assert (await preflight(embedded, "/token", "null")).status_code == 405


# -- the JSON API -----------------------------------------------------------------------------------------------------


@pytest.mark.case("TOK-14")
async def test_the_api_is_for_the_pages_of_every_enabled_client(embedded: Service, app: Registered) -> None:
    """Also when it refuses: a page must be able to see that its token has ended."""
    user = await embedded.a_user()
    token = (await embedded.sign_in(app, user))["access_token"]
    for origin, allowed in ((APP, True), (OTHER, False)):
        headers = {"origin": origin, "authorization": f"Bearer {token}"}
        answers = [
            await embedded.http.get("/v1/users/me", headers=headers),
            await embedded.http.get("/v1/users/me", headers={"origin": origin}),
            await embedded.http.put("/v1/users/me", headers=headers),
            await embedded.http.get("/v1/nothing", headers=headers),
            await embedded.http.get("/v1/users//me", headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [200, 401, 405, 404, 404]
        assert [readable(answer, origin) for answer in answers] == [allowed] * 5
    assert not readable(await embedded.http.get("/v1/users/me"), None)


async def test_who_may_read_follows_the_clients_within_five_seconds(either: Service) -> None:
    """A new client, one that is disabled, one that is enabled again; two clients may have the same origin."""

    async def allowed() -> list[bool]:
        asked = [await either.http.get("/v1/users/me", headers={"origin": origin}) for origin in (APP, OTHER)]
        return [readable(answer, origin) for answer, origin in zip(asked, (APP, OTHER), strict=True)]

    await either.a_client(cors_origins=())
    assert await allowed() == [False, False]
    first = await either.a_client(cors_origins=(APP, OTHER))
    second = await either.a_client(cors_origins=(OTHER,))
    either.clock.advance(4.9)  # type: ignore[attr-defined]  # the tests' own clock
    assert await allowed() == [False, False]
    either.clock.advance(0.1)  # type: ignore[attr-defined]
    assert await allowed() == [True, True]
    await either.within(lambda tx: either.services.clients.set_enabled(tx, first.id, False))
    either.clock.advance(5)  # type: ignore[attr-defined]
    assert await allowed() == [False, True]
    await either.within(lambda tx: either.services.clients.set_enabled(tx, second.id, False))
    await either.within(lambda tx: either.services.clients.set_enabled(tx, first.id, True))
    either.clock.advance(-3600)  # type: ignore[attr-defined]  # a clock that was set back does not keep it for an hour
    assert await allowed() == [True, True]


# -- asking first -----------------------------------------------------------------------------------------------------


@pytest.mark.case("TOK-14")
@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/token", "POST"),
        ("/revoke", "POST"),
        ("/v1/users/me", "GET, POST, PUT, PATCH, DELETE"),
        ("/v1/nothing", "GET, POST, PUT, PATCH, DELETE"),
    ],
)
async def test_a_registered_page_may_ask_first(embedded: Service, app: Registered, path: str, methods: str) -> None:
    """It is told what it may send, for ten minutes; nothing behind the edge is asked."""
    answer = await preflight(embedded, path, APP)
    assert answer.status_code == 204
    assert answer.content == b""
    assert "content-length" not in answer.headers
    assert readable(answer, APP)
    assert answer.headers["access-control-allow-methods"] == methods
    sendable = "authorization, content-type, idempotency-key, if-match, x-api-key"
    assert answer.headers["access-control-allow-headers"] == sendable
    assert answer.headers["access-control-max-age"] == "600"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.case("TOK-14")
async def test_a_page_of_no_client_is_told_nothing(embedded: Service, app: Registered) -> None:
    """Neither is a plain OPTIONS, which no browser sends by itself: 405 as ever."""
    for path in ("/token", "/revoke", "/v1/users/me"):
        refused = await preflight(embedded, path, "https://evil.example")
        plain = await embedded.http.options(path, headers={"origin": "https://evil.example"})
        for answer in (refused, plain):
            assert answer.status_code == 405
            assert not readable(answer, None)
            assert "access-control-allow-methods" not in answer.headers
    assert not readable(await embedded.http.options("/token", headers={"origin": APP}), None)
    asked = await embedded.http.options("/token", headers={"access-control-request-method": "POST"})
    assert asked.status_code == 405
    assert not readable(asked, None)


@pytest.mark.case("TOK-14")
async def test_anybody_may_ask_first_about_the_public_documents(embedded: Service) -> None:
    """A script that revalidates what it has sends a header that must be asked for; reading is all it may do."""
    answer = await preflight(embedded, "/.well-known/jwks.json", "https://anybody.example", "GET")
    assert answer.status_code == 204
    assert answer.headers[ALLOW] == "*"
    assert answer.headers["access-control-allow-methods"] == "GET, HEAD"
    assert answer.headers["access-control-allow-headers"] == "cache-control, if-none-match"
    assert "access-control-allow-credentials" not in answer.headers


# -- where the origins come from --------------------------------------------------------------------------------------


async def test_many_requests_at_once_ask_the_database_once(
    embedded: Service, app: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for five seconds nobody asks again, whatever they send."""
    asked = 0
    really = Clients.cors_origins

    async def slowly(self: Clients, tx: Transaction) -> frozenset[str]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)
        return await really(self, tx)

    monkeypatch.setattr(Clients, "cors_origins", slowly)
    answers = await asyncio.gather(*(preflight(embedded, "/token", APP) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {204}
    assert (await preflight(embedded, "/v1/x", OTHER)).status_code == 404
    assert asked == 1
    embedded.clock.advance(5)  # type: ignore[attr-defined]  # the tests' own clock
    assert (await preflight(embedded, "/token", APP)).status_code == 204
    assert asked == 2


async def test_who_leaves_while_it_is_asked_takes_nobody_along(
    embedded: Service, app: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one in the queue asks for itself."""
    begun = asyncio.Event()
    really = Clients.cors_origins

    async def for_ever(_self: Clients, _tx: Transaction) -> frozenset[str]:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody answers")

    with monkeypatch.context() as patched:
        patched.setattr(Clients, "cors_origins", for_ever)
        first = asyncio.create_task(preflight(embedded, "/token", APP))
        await begun.wait()
        others = [asyncio.create_task(preflight(embedded, "/token", APP)) for _ in range(5)]
        await asyncio.sleep(0)
        patched.setattr(Clients, "cors_origins", really)
        first.cancel()
        assert [(await other).status_code for other in others] == [204] * 5
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_while_the_database_is_away_the_last_answer_stands(
    embedded: Service, app: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are told of the outage; nobody who was not known before it is let in, and one request at a time waits."""
    assert (await preflight(embedded, "/token", APP)).status_code == 204
    attempts = 0

    async def away(_db: Database, _work: Any, **_: Any) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.01)
        raise DatabaseUnavailable("planted")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "run", away)
        for _ in range(3):
            embedded.clock.advance(60)  # type: ignore[attr-defined]  # the tests' own clock
            answers = await asyncio.gather(*(preflight(embedded, "/token", APP) for _ in range(20)))
            assert {answer.status_code for answer in answers} == {204}
        assert attempts == 3
        assert not readable(await preflight(embedded, "/token", OTHER), None)
    embedded.clock.advance(60)  # type: ignore[attr-defined]
    other = await embedded.a_client(public=True, cors_origins=(OTHER,))
    assert (await preflight(embedded, "/token", OTHER)).status_code == 204
    assert readable(await embedded.token(other, headers={"origin": OTHER}, grant_type="x"), OTHER)


async def test_in_an_outage_from_the_start_nobody_is_let_in(
    embedded: Service, app: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No header is made up; the request itself is answered as always."""

    async def away(_db: Database, _work: Any, **_: Any) -> None:
        raise DatabaseUnavailable("planted")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "run", away)
        answer = await embedded.http.get("/v1/users/me", headers={"origin": APP})
        assert answer.status_code == 401
        assert not readable(answer, APP)
        assert (await embedded.http.get("/.well-known/jwks.json", headers={"origin": APP})).headers[ALLOW] == "*"
    embedded.clock.advance(5)  # type: ignore[attr-defined]  # the tests' own clock
    assert readable(await embedded.http.get("/v1/users/me", headers={"origin": APP}), APP)
