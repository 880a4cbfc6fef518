"""The orders service beside a real token service: `identity-service dev` in a process of its own, as `make run` is."""

import json
import os
import runpy
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest

APP = Path(__file__).with_name("app.py")
COMMAND = Path(sys.executable).with_name("identity-service")
START_DEADLINE = 60.0  # seconds
PORT_TAKEN = 3  # how the service ends when it cannot listen
BOTH = "orders:read orders:write"
ORDERS = "https://orders.example"
TEA = {"item": "tea"}


class Issuer:
    """A token service on a free port of this machine, with its data in `folder`, and the people who sign in there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        self._process, told = self._start()
        self.url: str = told["issuer"]
        self._client_id: str = told["client_id"]
        self._passwords: dict[str, str] = {told["username"]: told["password"]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the service; nobody listens at its address any more."""
        self._process.terminate()
        self._process.wait(30)

    def create_user(self, name: str) -> None:
        """Create a user who may do what the demo user may."""
        self._passwords[name] = secrets.token_urlsafe(12)
        email = f"{name}@example.org"
        subprocess.run(
            [COMMAND, "users", "create", name, "--email", email, "--password-stdin", "--data-dir", self._folder],
            env=self._environment,
            input=self._passwords[name],
            capture_output=True,
            text=True,
            check=True,
        )

    async def sign_in(self, name: str = "demo", **form: str) -> dict[str, Any]:
        """Return the answer to a sign-in; `form` says what for."""
        return await self._ask(grant_type="password", username=name, password=self._passwords[name], **form)

    async def token(self, name: str = "demo", *, scope: str = BOTH) -> str:
        """Return an access token for the orders service."""
        return (await self.sign_in(name, resource=ORDERS, scope=scope))["access_token"]

    async def refresh(self, refresh_token: str) -> dict[str, Any]:
        """Return the answer to a refresh."""
        return await self._ask(grant_type="refresh_token", refresh_token=refresh_token)

    async def _ask(self, **form: str) -> dict[str, Any]:
        async with httpx2.AsyncClient() as http:
            answer = await http.post(f"{self.url}/token", data={"client_id": self._client_id, **form})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _start(self) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
        """Start the service and wait for the line that says who may sign in where; anew if its port is taken."""
        printed, log = self._folder / "printed", self._folder / "log"
        deadline = time.monotonic() + START_DEADLINE
        for _ in range(3):
            with printed.open("wb") as stdout, log.open("wb") as stderr:
                process = subprocess.Popen(
                    [COMMAND, "dev", "--json", "--port", str(free_port()), "--data-dir", self._folder],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                )
            while process.poll() is None and time.monotonic() < deadline:
                if (line := printed.read_text("utf-8")).endswith("\n"):
                    return process, json.loads(line)
                time.sleep(0.05)
            process.kill()
            if process.wait() != PORT_TAKEN:
                break
        raise RuntimeError(f"the token service did not start:\n{log.read_text('utf-8')}")


def free_port() -> int:
    """Return a port below those that the kernel gives to outgoing connections, so that it stays free for a moment."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def orders_beside(issuer: Issuer) -> httpx2.AsyncClient:
    """Return a client of a new orders service that trusts `issuer`; it has no orders and no keys yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORDERS_ISSUER", issuer.url)
        patch.setenv("ORDERS_AUDIENCE", ORDERS)
        app = runpy.run_path(str(APP))["app"]
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://orders")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer")) as running:
        yield running


async def test_without_a_token_nobody_is_let_in(issuer: Issuer) -> None:
    """The challenge says what it would take, and tells of no error (RFC 6750 §3)."""
    async with orders_beside(issuer) as orders:
        answers = [await orders.get("/orders"), await orders.post("/orders", json=TEA)]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert [answer.headers["www-authenticate"] for answer in answers] == [
        'Bearer scope="orders:read"',
        'Bearer scope="orders:write"',
    ]


async def test_a_token_for_the_issuers_own_api_is_refused(issuer: Issuer) -> None:
    """Who does not name the resource gets a token for the issuer, whatever its scope says."""
    token = (await issuer.sign_in(scope=BOTH))["access_token"]
    async with orders_beside(issuer) as orders:
        answer = await orders.get("/orders", headers=bearer(token))
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_callers_see_their_own_orders_and_no_others(issuer: Issuer) -> None:
    issuer.create_user("bea")
    ada, bea = bearer(await issuer.token()), bearer(await issuer.token("bea"))
    async with orders_beside(issuer) as orders:
        taken = await orders.post("/orders", json=TEA, headers=ada)
        assert (taken.status_code, taken.json()) == (201, TEA)
        await orders.post("/orders", json={"item": "bread"}, headers=bea)
        found = [await orders.get("/orders", headers=caller) for caller in (ada, bea)]
    assert [(answer.status_code, answer.json()) for answer in found] == [(200, [TEA]), (200, [{"item": "bread"}])]


async def test_a_token_for_reading_does_not_write(issuer: Issuer) -> None:
    reader = bearer(await issuer.token(scope="orders:read"))
    async with orders_beside(issuer) as orders:
        answer = await orders.post("/orders", json=TEA, headers=reader)
        assert answer.status_code == 403
        assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="orders:write"'
        assert (await orders.get("/orders", headers=reader)).json() == []


async def test_a_refreshed_token_is_as_good_as_the_first(issuer: Issuer) -> None:
    """It is for the same resource, scope and person, so the orders are still there."""
    signed_in = await issuer.sign_in(resource=ORDERS, scope=BOTH)
    async with orders_beside(issuer) as orders:
        await orders.post("/orders", json=TEA, headers=bearer(signed_in["access_token"]))
        refreshed = await issuer.refresh(signed_in["refresh_token"])
        assert refreshed["access_token"] != signed_in["access_token"]
        answer = await orders.get("/orders", headers=bearer(refreshed["access_token"]))
    assert (answer.status_code, answer.json()) == (200, [TEA])


async def test_tokens_are_accepted_while_the_issuer_is_away(tmp_path: Path) -> None:
    """Also one that was never seen before; a service that has no keys yet can only say that it cannot tell."""
    with Issuer(tmp_path) as issuer:
        seen, unseen = [bearer(await issuer.token()) for _ in range(2)]
        async with orders_beside(issuer) as orders, orders_beside(issuer) as newcomer:
            assert (await orders.get("/orders", headers=seen)).status_code == 200
            issuer.stop()
            answers = [await orders.get("/orders", headers=token) for token in (seen, unseen)]
            cannot_tell = await newcomer.get("/orders", headers=seen)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert cannot_tell.status_code == 503
    assert "retry-after" in cannot_tell.headers
