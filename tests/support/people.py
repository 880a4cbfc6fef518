"""People as they use the service: signing in, opening links from mails, and asking for what is theirs."""

from collections.abc import Sequence
from typing import Any

import httpx2
from sqlalchemy import select

from identity_service.accounts.users import User
from identity_service.infra.tables import outbox
from tests.support.service import ISSUER, PASSWORD, Registered, Service

OWN = ("account:read", "account:write")


class Person:
    """Somebody who is signed in, or who has a key."""

    def __init__(self, service: Service, user: User, headers: dict[str, str]) -> None:
        self.service = service
        self.user = user
        self.headers = headers
        self.refresh_token = ""

    async def __call__(self, method: str, path: str = "", json: Any = None, **headers: str) -> httpx2.Response:
        """Ask for something under `/v1/users/me`; `headers` by their names with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.service.http.request(
            method, f"/v1/users/me{path}", json=json, headers={**self.headers, **named}
        )


async def an_app(service: Service) -> Registered:
    """Register a public client through which people reach the person's API."""
    return await service.a_client(public=True, scope=OWN, audiences=[ISSUER], name="The app")


async def signed_in(
    service: Service,
    user: User,
    client: Registered | None = None,
    *,
    password: str = PASSWORD,
    scope: Sequence[str] = OWN,
    **headers: str,
) -> Person:
    """Sign a user in and return them with their token."""
    client = client or await an_app(service)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await service.token(
        client, grant_type="password", username=user.username, password=password, scope=" ".join(scope), headers=named
    )
    assert answer.status_code == 200, answer.text
    person = Person(service, user, {"authorization": f"Bearer {answer.json()['access_token']}"})
    person.refresh_token = answer.json()["refresh_token"]
    return person


async def with_key(service: Service, user: User, scope: Sequence[str] = OWN) -> Person:
    """Give a user an API key and return them with it."""
    new = await service.within(
        lambda tx: service.services.api_keys.create(
            tx, owner=user.id, name="Script", scope=scope, networks=(), expires_at=None
        )
    )
    return Person(service, user, {"x-api-key": new.text.reveal()})


async def mails(service: Service) -> list[tuple[str, str]]:
    """Return the mails that wait, each as its template and its recipient, in the order of the alphabet."""
    return sorted([(row.template, row.recipient) for row in await service.execute(select(outbox))])


async def link(service: Service, recipient: str, template: str) -> str:
    """Return the token of the newest link that waits to be mailed to somebody."""
    rows = await service.execute(
        select(outbox.c.token_id)
        .where(outbox.c.recipient == recipient, outbox.c.template == template)
        .order_by(outbox.c.id.desc())
    )
    text = await service.within(lambda tx: service.services.email_tokens.text_of(tx, rows[0].token_id))
    assert text is not None, "the link is dead"
    return text.reveal()
