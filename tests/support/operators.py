"""Operators: people with a role who ask the operators' API."""

from typing import Any

import httpx2

from identity_service.accounts.access import PERMISSIONS, SELF_SERVICE
from tests.support.service import ISSUER, Service

EVERY_SCOPE = (*sorted(SELF_SERVICE | PERMISSIONS), "orders:read")


class Operator:
    """A signed-in operator who asks for JSON."""

    def __init__(self, service: Service, token: str) -> None:
        self.service = service
        self.headers = {"authorization": f"Bearer {token}"}

    async def __call__(
        self, method: str, path: str, json: Any = None, *, params: Any = None, **headers: str
    ) -> httpx2.Response:
        """Ask for something under `/v1/admin`; `headers` by their names with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.service.http.request(
            method, f"/v1/admin{path}", json=json, params=params, headers={**self.headers, **named}
        )


async def an_operator(service: Service, role: str = "super_admin", scope: str = " ".join(EVERY_SCOPE)) -> Operator:
    """Return a signed-in person of that role, whose token carries what they asked for within it."""
    client = await service.a_client(scope=EVERY_SCOPE, audiences=[ISSUER])
    user = await service.a_user(role=role)
    return Operator(service, (await service.sign_in(client, user, scope=scope))["access_token"])
