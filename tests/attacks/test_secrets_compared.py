"""Secrets are compared by their digests, in a time that tells nothing; and nobody can have the service fetch."""

import asyncio
import hmac

import pytest

from tests.support.keys import a_key
from tests.support.operators import Operator
from tests.support.service import BOOTSTRAP_SECRET, running, test_settings


@pytest.mark.case("SEC-13")
async def test_every_secret_is_compared_as_a_digest(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one length whatever was sent, byte for byte to the end."""
    compared: list[tuple[object, object]] = []
    compare = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    async with running(test_settings(sqlite_url, bootstrap_secret=BOOTSTRAP_SECRET)) as service:
        client, user = await service.a_client(), await service.a_user()
        key = await a_key(service, user, "account:read")
        tokens = await service.sign_in(client, user)
        monkeypatch.setattr(hmac, "compare_digest", noting)

        async def bootstrap() -> int:
            body = {"secret": BOOTSTRAP_SECRET, "username": "root", "email": "root@example.org", "password": "x"}
            return (await service.http.post("/v1/bootstrap", json=body)).status_code

        async def client_secret() -> int:
            return (await service.token(client, grant_type="client_credentials")).status_code

        async def api_key() -> int:
            return (await service.http.get("/v1/users/me", headers=key.header)).status_code

        async def refresh_token() -> int:
            return (await service.refresh(client, tokens["refresh_token"])).status_code

        for ask, status in ((bootstrap, 422), (client_secret, 200), (api_key, 200), (refresh_token, 200)):
            compared.clear()
            assert await ask() == status, ask.__name__
            assert compared, ask.__name__
            for pair in compared:
                assert [type(one) for one in pair] == [bytes, bytes]
                assert len({len(one) for one in pair if isinstance(one, bytes)}) == 1


@pytest.mark.case("ADM-20")
async def test_nobody_can_have_the_service_fetch_anything(boss: Operator) -> None:
    """A client is registered with many addresses, and none of them is ever called, here or at any other time."""
    called: list[object] = []

    async def listen(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.append(writer)
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        metadata = {
            "name": "Fetcher",
            "grant_types": ["client_credentials"],
            "audiences": [f"{address}/api"],
            "introspect": [f"{address}/api"],
            "redirect_uris": [f"{address}/callback"],
            "cors_origins": [address],
        }
        made = await boss("POST", "/clients", metadata)
        assert made.status_code == 201, made.text
        auth = (made.json()["client"]["client_id"], made.json()["client_secret"])
        http = boss.service.http
        form = {"grant_type": "client_credentials", "resource": f"{address}/api"}
        token = await http.post("/token", data=form, auth=auth, headers={"origin": address})
        assert token.status_code == 200, token.text
        asked = await http.post("/introspect", data={"token": token.json()["access_token"]}, auth=auth)
        assert asked.json()["active"] is True
        # And a token whose header says where its key is.
        assert (await http.get("/v1/users/me", headers={"authorization": f"Bearer {address}"})).status_code == 401
        _, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        writer.close()
        while not called:  # noqa: ASYNC110  # our own call, which shows that the listener hears
            await asyncio.sleep(0.001)
        assert len(called) == 1
