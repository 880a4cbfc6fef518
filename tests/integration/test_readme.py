"""The README's lines for a sibling service do what they say, against a running server."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest

from tests.support.server_process import ServerProcess
from tests.support.service import Registered, running, test_settings

_README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.search(r"```python\n(import jwt\n.*?)```", _README.read_text("utf-8"), re.DOTALL)
_FASTAPI = re.search(r"```python\n(from typing import Annotated\n.*?)```", _README.read_text("utf-8"), re.DOTALL)
SIBLING = "https://orders.example"


@pytest.fixture
async def client(database_url: str) -> Registered:
    """A service that may call the sibling."""
    async with running(test_settings(database_url)) as service:
        return await service.a_client(grant_types=("client_credentials",), audiences=(SIBLING, "https://other.example"))


async def test_the_readmes_verifier_accepts_our_tokens_and_nothing_less(database_url: str, client: Registered) -> None:
    """The right audience and scope pass; another audience, another scope and an altered token do not."""
    assert _BLOCK is not None
    with ServerProcess(database_url) as server:
        names: dict[str, Any] = {}
        exec(_BLOCK[1].replace("https://id.example", server.url), names)  # noqa: S102  # the README is ours
        verify: Callable[[str, str], dict[str, Any]] = names["verify"]

        def token(**form: str) -> str:
            body = {"grant_type": "client_credentials", **form}
            answer = httpx2.post(f"{server.url}/token", data=body, auth=client.auth)
            text: str = answer.json()["access_token"]
            return text

        good = token()
        assert verify(good, "orders:read")["sub"] == client.id
        with pytest.raises(PermissionError):
            verify(good, "orders:delete")
        with pytest.raises(jwt.InvalidAudienceError):
            verify(token(resource="https://other.example"), "orders:read")
        with pytest.raises(jwt.InvalidSignatureError):
            verify(good[:-8] + ("AAAAAAAA" if good[-8:] != "AAAAAAAA" else "BBBBBBBB"), "orders:read")


async def test_the_readmes_fastapi_lines_guard_a_route(database_url: str, client: Registered) -> None:
    """With a token for this service, without one, and with one for another."""
    assert _FASTAPI is not None
    with ServerProcess(database_url) as server:
        names: dict[str, Any] = {}
        exec(_FASTAPI[1].replace("https://id.example", server.url), names)  # noqa: S102  # the README is ours
        transport = httpx2.ASGITransport(app=names["app"])
        async with httpx2.AsyncClient(transport=transport, base_url="http://orders") as orders:

            async def ask(**form: str) -> httpx2.Response:
                body = {"grant_type": "client_credentials", **form}
                token = httpx2.post(f"{server.url}/token", data=body, auth=client.auth).json()["access_token"]
                return await orders.get("/orders", headers={"authorization": f"Bearer {token}"})

            assert (await orders.get("/orders")).status_code == 401
            assert (await ask()).json() == [f"an order of {client.id}"]
            assert (await ask(resource="https://other.example")).status_code == 401
            assert (await ask(scope="orders:write")).status_code == 403
