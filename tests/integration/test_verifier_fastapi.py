"""The verifier in front of a sibling's routes: who gets in, what the others are told, and what the document says."""

from collections.abc import Sequence
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from identity_service.verifier import InsufficientScope, KeysUnavailable, TokenRefused, TokenVerifier, VerifiedClaims
from identity_service.verifier.fastapi import Protect
from tests.support.asking import connect
from tests.support.issuer import AUDIENCE, METADATA, Issuer
from tests.support.tokens import OMIT

Header = tuple[str, str]
NOBODY = 'Bearer scope="orders:read"'
BAD = 'Bearer error="invalid_token", scope="orders:read"'
TOO_LITTLE = 'Bearer error="insufficient_scope", scope="orders:read"'


@pytest.fixture
def app(issuer: Issuer) -> FastAPI:
    """A sibling with one route of each kind."""
    app = FastAPI()
    protect = Protect(issuer.url, AUDIENCE)
    orders = APIRouter(prefix="/orders", dependencies=[protect.require("orders:read")])

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {}

    @app.get("/anybody")
    def anybody(caller: Annotated[VerifiedClaims, protect.require()]) -> dict[str, Any]:
        return {"subject": caller.subject}

    @orders.get("")
    def listed() -> dict[str, Any]:
        return {"orders": []}

    @orders.post("")
    async def placed(caller: Annotated[VerifiedClaims, protect.require("orders:write")], item: str) -> dict[str, Any]:
        return {"subject": caller.subject, "scope": sorted(caller.scope), "item": item}

    @orders.delete("/{number}", dependencies=[protect.require("orders:write", "orders:delete")])
    async def cancelled(number: int) -> dict[str, Any]:
        return {"number": number}

    @app.get("/twice", dependencies=[protect.require("a", "b"), protect.require("b", "c")])
    def twice() -> dict[str, Any]:
        return {}

    @app.websocket("/feed")
    async def feed(connection: WebSocket, _: Annotated[VerifiedClaims, protect.require("orders:read")]) -> None:
        await connection.accept()

    app.include_router(orders)
    return app


async def ask(app: Any, path: str, *headers: Header, method: str = "GET", token: str | None = None) -> httpx2.Response:
    """Send one request, with these headers and perhaps a bearer token."""
    bearer = [("Authorization", f"Bearer {token}")] if token is not None else []
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://orders.example") as http:
        return await http.request(method, path, headers=[*headers, *bearer])


def refused(answer: httpx2.Response, status: int, challenge: str) -> bool:
    """Check a refusal to the letter; there is one challenge, and nothing of the token or the reason in it."""
    assert (answer.status_code, answer.headers.get_list("www-authenticate")) == (status, [challenge])
    assert "retry-after" not in answer.headers
    return True


# -- who gets in ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6750", "2.1")
async def test_a_good_token_gets_in_and_the_route_knows_whose_it_is(app: FastAPI, issuer: Issuer) -> None:
    token = issuer.mint(scope="orders:write orders:read")
    assert (await ask(app, "/orders", token=token)).json() == {"orders": []}
    assert (await ask(app, "/anybody", token=token)).json() == {"subject": "user-1"}
    answer = await ask(app, "/orders?item=tea", token=token, method="POST")
    assert answer.status_code == 200
    assert answer.json() == {"subject": "user-1", "scope": ["orders:read", "orders:write"], "item": "tea"}
    assert (await ask(app, "/health")).status_code == 200
    assert issuer.counts == (1, 1)


@pytest.mark.rfc("6750", "2.1")
@pytest.mark.rfc("9110", "11.1")
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_the_scheme_may_be_spelt_in_any_case(app: FastAPI, issuer: Issuer, scheme: str) -> None:
    answer = await ask(app, "/orders", ("Authorization", f"{scheme} {issuer.mint()}"))
    assert answer.status_code == 200


@pytest.mark.rfc("6750", "3")
@pytest.mark.rfc("6750", "3.1")
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Basic dXNlcjpwYXNz")],
        [("Authorization", "Basic {token}")],
        [("Authorization", "Digest {token}")],
        [("Authorization", "Token {token}")],
        [("Authorization", "{token}")],
        [("Authorization", "Bearer{token}")],
        [("Authorization", "Bearer\t{token}")],
        [("Authorization", "Bearers {token}")],
        [("Authorization", " Token Bearer {token}")],
        [("Authorization", "Bearer {token}"), ("Authorization", "Bearer {token}")],
        [("Authorization", "Basic dXNlcjpwYXNz"), ("Authorization", "Bearer {token}")],
        [("Cookie", "access_token={token}")],
        [("X-Authorization", "Bearer {token}")],
    ],
    ids=lambda headers: ", ".join(": ".join(header) for header in headers) or "none",
)
async def test_who_brings_no_bearer_token_is_told_no_error(
    app: FastAPI, issuer: Issuer, headers: Sequence[Header]
) -> None:
    token = issuer.mint()
    answer = await ask(app, "/orders", *((name, value.format(token=token)) for name, value in headers))
    assert refused(answer, 401, NOBODY)
    assert answer.json() == {"detail": "not authenticated"}
    assert issuer.counts == (0, 0)


async def test_a_token_in_the_address_is_not_looked_at(app: FastAPI, issuer: Issuer) -> None:
    assert refused(await ask(app, f"/orders?access_token={issuer.mint()}"), 401, NOBODY)


BAD_TOKENS: dict[str, Any] = {
    "empty": lambda issuer: "",
    "blank": lambda issuer: "   ",
    "rubbish": lambda issuer: "rubbish",
    "two of them": lambda issuer: f"{issuer.mint()} {issuer.mint()}",
    "two with a comma": lambda issuer: f"{issuer.mint()},{issuer.mint()}",
    "unsigned": lambda issuer: issuer.mint(header={"alg": "none"}),
    "expired": lambda issuer: issuer.mint(now=1_700_000_000),
    "for somebody else": lambda issuer: issuer.mint(aud="https://billing.example"),
    "for the issuer": lambda issuer: issuer.mint(aud=issuer.url),
    "of another issuer": lambda issuer: issuer.mint(iss="https://evil.example"),
    "of an unknown key": lambda issuer: issuer.mint("k2"),
    "of the wrong key": lambda issuer: issuer.mint("k2", header={"kid": "k1"}),
    "an ID token": lambda issuer: issuer.mint(header={"typ": "JWT"}),
}


@pytest.mark.rfc("6750", "3.1")
@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize("bad", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_who_brings_a_bad_token_is_told_that_and_no_more(app: FastAPI, issuer: Issuer, bad: Any) -> None:
    answer = await ask(app, "/orders", token=bad(issuer))
    assert refused(answer, 401, BAD)
    assert answer.json() == {"detail": "invalid token"}


@pytest.mark.rfc("6750", "3.1")
@pytest.mark.parametrize("scope", ["orders:write", "orders", "orders:read2", "ORDERS:READ", "", OMIT], ids=repr)
async def test_who_may_not_is_told_what_it_would_take(app: FastAPI, issuer: Issuer, scope: Any) -> None:
    answer = await ask(app, "/orders", token=issuer.mint(scope=scope))
    assert refused(answer, 403, TOO_LITTLE)
    assert answer.json() == {"detail": "insufficient scope"}


@pytest.mark.rfc("6750", "3")
async def test_without_a_scope_to_ask_for_the_challenge_names_none(app: FastAPI, issuer: Issuer) -> None:
    assert refused(await ask(app, "/anybody"), 401, "Bearer")
    assert refused(await ask(app, "/anybody", token="rubbish"), 401, 'Bearer error="invalid_token"')
    assert (await ask(app, "/anybody", token=issuer.mint(scope=OMIT))).status_code == 200


async def test_what_the_router_asks_for_and_what_the_route_asks_for_add_up(app: FastAPI, issuer: Issuer) -> None:
    async def cancel(scope: str) -> httpx2.Response:
        return await ask(app, "/orders/7", method="DELETE", token=issuer.mint(scope=scope))

    both = 'Bearer error="insufficient_scope", scope="orders:write orders:delete"'
    assert (await cancel("orders:delete orders:write orders:read")).json() == {"number": 7}
    assert refused(await cancel("orders:write orders:delete"), 403, TOO_LITTLE)
    for scope in ("orders:read", "orders:read orders:write", "orders:read orders:delete"):
        assert refused(await cancel(scope), 403, both)
    assert (await ask(app, "/twice", token=issuer.mint(scope="a b c"))).status_code == 200
    for scope in ("a b", "b c", "a c"):
        assert (await ask(app, "/twice", token=issuer.mint(scope=scope))).status_code == 403


async def test_whose_token_cannot_be_checked_is_asked_to_come_again(app: FastAPI, issuer: Issuer) -> None:
    """A 401 would make good clients throw a good token away."""
    issuer.answer(METADATA, status=503)
    for path in ("/orders", "/anybody"):
        answer = await ask(app, path, token=issuer.mint())
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert "www-authenticate" not in answer.headers
        assert answer.json() == {"detail": "tokens cannot be checked now"}
    assert refused(await ask(app, "/orders"), 401, NOBODY)
    assert refused(await ask(app, "/orders", token="rubbish"), 401, BAD)
    assert (await ask(app, "/health")).status_code == 200


async def test_it_guards_a_web_socket_too(app: FastAPI, issuer: Issuer) -> None:
    """Before it is accepted."""

    accepted = await connect(app, (b"authorization", f"Bearer {issuer.mint()}".encode()))
    assert accepted["type"] == "websocket.accept"
    answered = await connect(app)
    assert (answered["type"], answered["status"]) == ("websocket.http.response.start", 401)
    assert dict(answered["headers"])[b"www-authenticate"].decode() == NOBODY


def test_it_takes_what_the_verifier_takes(issuer: Issuer) -> None:
    with pytest.raises(ValueError, match="never the issuer"):
        Protect(issuer.url, issuer.url)
    with pytest.raises(ValueError, match="leeway"):
        Protect(issuer.url, AUDIENCE, leeway=-1)
    with pytest.raises(TypeError):
        Protect(issuer.url, AUDIENCE, verify=False)
    assert isinstance(Protect(issuer.url, AUDIENCE, timeout=1, max_stale=60).verifier, TokenVerifier)


async def test_a_test_may_put_its_own_caller_in_the_place_of_a_token(issuer: Issuer) -> None:
    """By the means that the framework has for it."""
    protect, app = Protect(issuer.url, AUDIENCE), FastAPI()

    @app.get("/")
    def root(caller: Annotated[VerifiedClaims, protect.require("orders:read")]) -> str:
        return caller.subject

    app.dependency_overrides[protect.verified] = lambda: VerifiedClaims({"sub": "ada"})
    assert (await ask(app, "/")).json() == "ada"
    app.dependency_overrides.clear()
    assert (await ask(app, "/")).status_code == 401


async def test_why_a_token_was_refused_is_told_to_the_log_alone(
    app: FastAPI, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    """In one stable word, and nothing of the token."""
    caplog.set_level("INFO", logger="identity_service.verifier")
    token = issuer.mint(aud="https://billing.example", scope="orders:read")
    answer = await ask(app, "/orders", token=token)
    assert answer.status_code == 401
    assert "aud" not in answer.text + answer.headers["www-authenticate"]
    assert "a token was refused: aud_wrong" in caplog.messages
    assert not any(part in caplog.text for part in token.split("."))


@pytest.mark.parametrize("scope", ["", "a b", 'a"b', "a\r\nb", "a\\b", "ü"])
def test_what_is_no_scope_cannot_be_required(issuer: Issuer, scope: str) -> None:
    """It would be refused for ever, or stand in a header as it is."""
    with pytest.raises(ValueError, match="must be one scope"):
        Protect(issuer.url, AUDIENCE).require("orders:read", scope)


# -- what the document says -------------------------------------------------------------------------------------------


async def test_the_document_says_how_to_get_a_token_and_which_scopes_there_are(app: FastAPI, issuer: Issuer) -> None:
    document = (await ask(app, "/openapi.json")).json()
    scopes = dict.fromkeys(("orders:read", "orders:write", "orders:delete", "a", "b", "c"), "")
    flow = {"tokenUrl": f"{issuer.url}/token", "scopes": scopes}
    assert document["components"]["securitySchemes"] == {
        "identity_service": {
            "type": "oauth2",
            "description": f"An access token of {issuer.url}, asked for with `resource={AUDIENCE}`.",
            "flows": {"password": flow, "clientCredentials": flow},
        },
        "identity_service_token": {"type": "http", "scheme": "bearer", "bearerFormat": "at+jwt"},
    }
    security = {
        (method, path): operation.get("security")
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    asked = {
        ("get", "/health"): None,
        ("get", "/anybody"): [],
        ("get", "/orders"): ["orders:read"],
        ("post", "/orders"): ["orders:read", "orders:write"],
        ("delete", "/orders/{number}"): ["orders:delete", "orders:read", "orders:write"],
        ("get", "/twice"): ["a", "b", "c"],
    }
    assert {operation: _sorted(wanted) for operation, wanted in security.items()} == {
        # Two entries are two ways: a tool that can ask for a token, and one that is handed a token.
        operation: None if wanted is None else [{"identity_service": wanted}, {"identity_service_token": wanted}]
        for operation, wanted in asked.items()
    }
    assert issuer.counts == (0, 0)


def _sorted(security: list[dict[str, list[str]]] | None) -> list[dict[str, list[str]]] | None:
    return security and [{name: sorted(scopes) for name, scopes in entry.items()} for entry in security]


async def test_the_guard_adds_no_parameters_of_its_own(app: FastAPI) -> None:
    paths = (await ask(app, "/openapi.json")).json()["paths"]
    parameters = {
        (method, path): [(parameter["in"], parameter["name"]) for parameter in operation.get("parameters", ())]
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    assert {operation: listed for operation, listed in parameters.items() if listed} == {
        ("post", "/orders"): [("query", "item")],
        ("delete", "/orders/{number}"): [("path", "number")],
    }
    assert not any("requestBody" in operation for operations in paths.values() for operation in operations.values())


async def test_two_issuers_in_one_service_stay_apart(issuer: Issuer) -> None:
    with Issuer() as partner:
        ours, theirs = Protect(issuer.url, AUDIENCE), Protect(partner.url, AUDIENCE, name="partner")
        app = FastAPI()

        @app.get("/ours", dependencies=[ours.require("a")])
        def of_ours() -> None: ...

        @app.get("/theirs", dependencies=[theirs.require("b")])
        def of_theirs() -> None: ...

        schemes = (await ask(app, "/openapi.json")).json()["components"]["securitySchemes"]
        assert schemes.keys() == {"identity_service", "identity_service_token", "partner", "partner_token"}
        told = {name: scheme["flows"]["password"] for name, scheme in schemes.items() if "flows" in scheme}
        assert told == {
            "identity_service": {"tokenUrl": f"{issuer.url}/token", "scopes": {"a": ""}},
            "partner": {"tokenUrl": f"{partner.url}/token", "scopes": {"b": ""}},
        }
        assert (await ask(app, "/ours", token=issuer.mint(scope="a"))).status_code == 200
        assert (await ask(app, "/theirs", token=partner.mint(scope="b"))).status_code == 200
        assert (await ask(app, "/ours", token=partner.mint(scope="a"))).status_code == 401
        assert (await ask(app, "/theirs", token=issuer.mint(scope="b"))).status_code == 401


# -- without the framework --------------------------------------------------------------------------------------------


async def test_a_plain_route_does_it_with_the_verifier_alone(issuer: Issuer) -> None:
    verifier = TokenVerifier(issuer.url, AUDIENCE)

    async def orders(request: Request) -> Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            claims = await verifier.verify(token, "orders:read")
        except InsufficientScope as refusal:
            return JSONResponse({"needs": refusal.scope}, 403)
        except TokenRefused as refusal:
            return JSONResponse({"reason": refusal.reason}, 401)
        except KeysUnavailable:
            return JSONResponse({}, 503)
        return JSONResponse({"subject": claims.subject})

    app = Starlette(routes=[Route("/orders", orders)])
    answer = await ask(app, "/orders", token=issuer.mint())
    assert (answer.status_code, answer.json()) == (200, {"subject": "user-1"})
    answer = await ask(app, "/orders", token=issuer.mint(scope="orders:write"))
    assert (answer.status_code, answer.json()) == (403, {"needs": "orders:read"})
    answer = await ask(app, "/orders", token="rubbish")
    assert (answer.status_code, answer.json()) == (401, {"reason": "malformed"})
    issuer.go_down()
    assert (await ask(app, "/orders", token=issuer.mint("k2"))).status_code == 503
