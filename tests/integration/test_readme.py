"""The Python lines that the README and docs/verify.md give to a sibling service do what they say, beside a server."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
import jwt
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from tests.support.server_process import ServerProcess
from tests.support.service import Registered, running, test_settings

_ROOT = Path(__file__).parents[2]
_README, _VERIFY = "README.md", "docs/verify.md"
_FASTAPI = "from identity_service.verifier.fastapi import Protect"
_ANOTHER_ROUTE = "from fastapi import Response"
_DJANGO = "from django.http import HttpResponse"
_PYJWT = "import jwt"
_OVERRIDE = "app.dependency_overrides[protect.verified]"
SIBLING = "https://orders.example"


def block(document: str, line: str) -> str:
    """Return the one Python block of a document that has a line which begins like that."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (_ROOT / document).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    found = [text for text in blocks if re.search(rf"^{re.escape(line)}", text, re.MULTILINE)]
    assert len(found) == 1, f"{document} has {len(found)} blocks with {line!r}"
    return str(found[0])


def run(document: str, *lines: str, issuer: str) -> dict[str, Any]:
    """Run these blocks, one after the other, with our issuer in place of the example's; return what they define."""
    names: dict[str, Any] = {}
    for line in lines:
        exec(block(document, line).replace("https://id.example", issuer), names)  # noqa: S102  # the text is ours
    return names


def get_token(server: ServerProcess, client: Registered, **form: str) -> str:
    """Return an access token of the client's own, for the sibling unless `form` says otherwise."""
    body = {"grant_type": "client_credentials", **form}
    answer = httpx2.post(f"{server.url}/token", data=body, auth=client.auth, timeout=30)
    text: str = answer.raise_for_status().json()["access_token"]
    return text


@pytest.fixture
async def client(database_url: str) -> Registered:
    """A service that may call the sibling."""
    async with running(test_settings(database_url)) as service:
        return await service.a_client(grant_types=("client_credentials",), audiences=(SIBLING, "https://other.example"))


@pytest.mark.parametrize("document", [_README, _VERIFY])
async def test_the_lines_for_pyjwt_accept_our_tokens_and_nothing_less(
    database_url: str, client: Registered, document: str
) -> None:
    """The right audience and scope pass; another audience, another scope and an altered token do not."""
    with ServerProcess(database_url) as server:
        verify: Callable[[str, str], dict[str, Any]] = run(document, _PYJWT, issuer=server.url)["verify"]
        good = get_token(server, client)
        assert verify(good, "orders:read")["sub"] == client.id
        with pytest.raises(PermissionError):
            verify(good, "orders:delete")
        with pytest.raises(jwt.InvalidAudienceError):
            verify(get_token(server, client, resource="https://other.example"), "orders:read")
        with pytest.raises(jwt.InvalidSignatureError):
            verify(good[:-8] + ("AAAAAAAA" if good[-8:] != "AAAAAAAA" else "BBBBBBBB"), "orders:read")


@pytest.mark.parametrize(
    ("document", "lines", "paths"),
    [
        (_README, [_FASTAPI], {"/orders": True}),
        (_VERIFY, [_FASTAPI, _ANOTHER_ROUTE], {"/orders": False, "/orders/mine": True, "/check/orders:read": True}),
    ],
    ids=[_README, _VERIFY],
)
async def test_the_lines_for_fastapi_guard_their_routes(
    database_url: str, client: Registered, document: str, lines: list[str], paths: dict[str, bool]
) -> None:
    """
    With a token for this service, without one, with one for another, and with one for something else.

    `paths` has every route, and whether it tells who is calling.
    """
    with ServerProcess(database_url) as server:
        app: FastAPI = run(document, *lines, issuer=server.url)["app"]
        assert {route.path for route in app.routes if isinstance(route, APIRoute)} == paths.keys()
        for path, tells in paths.items():
            assert (await ask(app, path)).status_code == 401
            good = await ask(app, path, get_token(server, client))
            assert good.is_success
            assert (client.id in f"{good.text} {good.headers.get('x-subject')}") == tells
            elsewhere = await ask(app, path, get_token(server, client, resource="https://other.example"))
            assert elsewhere.status_code == 401
            assert (await ask(app, path, get_token(server, client, scope="orders:write"))).status_code == 403


async def ask(app: FastAPI, path: str, token: str | None = None) -> httpx2.Response:
    """Send a request to a sibling, perhaps with a token."""
    headers = {"authorization": f"Bearer {token}"} if token is not None else {}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://orders") as orders:
        return await orders.get(path, headers=headers)


async def test_a_test_may_name_the_caller_as_the_page_says() -> None:
    """Neither an issuer nor a token is there."""
    app: FastAPI = run(_VERIFY, _FASTAPI, _OVERRIDE, issuer="http://127.0.0.1:9")["app"]
    answer = await ask(app, "/orders/mine")
    assert (answer.status_code, answer.json()["sub"]) == (200, "ada")


@dataclass(frozen=True)
class HttpResponse:
    """As much of Django's as the lines for it use."""

    content: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


async def test_the_lines_for_django_answer_as_the_page_says(
    database_url: str, client: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while no keys can be had."""
    for name in ("django", "django.http"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["django.http"], "HttpResponse", HttpResponse, raising=False)

    def ask(view: Callable[[Any], HttpResponse], token: str | None) -> tuple[int, Mapping[str, str]]:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        answer = view(SimpleNamespace(headers=headers))
        assert (client.id in answer.content) == (answer.status == 200)
        return answer.status, answer.headers

    with ServerProcess(database_url) as server:
        view = run(_VERIFY, _DJANGO, issuer=server.url)["orders"]
        good = get_token(server, client)
        assert ask(view, good) == (200, {})
        assert ask(view, None) == (401, {"WWW-Authenticate": "Bearer"})
        elsewhere = get_token(server, client, resource="https://other.example")
        assert ask(view, elsewhere) == (401, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        too_little = get_token(server, client, scope="orders:write")
        assert ask(view, too_little) == (403, {"WWW-Authenticate": 'Bearer error="insufficient_scope"'})
        cold = run(_VERIFY, _DJANGO, issuer=server.url)["orders"]
    status, headers = ask(cold, good)
    assert (status, headers.keys()) == (503, {"Retry-After"})
