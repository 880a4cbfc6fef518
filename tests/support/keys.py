"""API keys and token exchange as tests use them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx2

from identity_service.accounts.users import User
from tests.support.reading import unverified_claims
from tests.support.service import ISSUER, SIBLING, Registered, Service
from tests.support.wire import post

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
API_KEY = "urn:identity-service:params:oauth:token-type:api-key"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
OWN = "/v1/users/me/api-keys"
SCOPE = ("account:read", "account:write", "orders:read", "orders:write")


@dataclass(frozen=True)
class Key:
    """A key in the hands of whoever it was shown to."""

    id: str
    text: str

    @property
    def header(self) -> dict[str, str]:
        """For our own API."""
        return {"x-api-key": self.text}


async def a_key(
    service: Service,
    owner: User | Registered,
    *scope: str,
    name: str = "A script",
    expires_at: datetime | None = None,
    networks: Sequence[str] = (),
) -> Key:
    """Make a key, of `orders:read` unless told otherwise, for a person or a client."""
    made = await service.within(
        lambda tx: service.services.api_keys.create(
            tx, owner=owner.id, name=name, scope=scope or ("orders:read",), expires_at=expires_at, networks=networks
        )
    )
    return Key(made.key.id, made.text.reveal())


async def an_exchanger(service: Service, **given: Any) -> Registered:
    """Register a service that may exchange what it is shown, for the example sibling unless told otherwise."""
    values: dict[str, Any] = {
        "name": "Gateway",
        "first_party": False,
        "grant_types": (EXCHANGE, "client_credentials"),
        "scope": SCOPE,
        "audiences": (SIBLING,),
        "exchange_audiences": (SIBLING,),
        "introspect": (ISSUER, SIBLING),
    }
    return await service.a_client(**{**values, **given})


async def exchange(
    service: Service,
    client: Registered,
    subject: Key | str,
    *,
    resources: Sequence[str] = (),
    audiences: Sequence[str] = (),
    **form: str,
) -> httpx2.Response:
    """Exchange a key or an access token; other parameters by their names."""
    text, kind = (subject.text, API_KEY) if isinstance(subject, Key) else (subject, ACCESS_TOKEN)
    values = {"grant_type": EXCHANGE, "subject_token": text, "subject_token_type": kind, **form}
    targets = [*(("resource", each) for each in resources), *(("audience", each) for each in audiences)]
    return await post(service, [*values.items(), *targets], client=client)


async def exchanged(service: Service, client: Registered, subject: Key | str, **form: Any) -> str:
    """Exchange a key or an access token and return the new token."""
    answer = await exchange(service, client, subject, **form)
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


async def claims_of(service: Service, client: Registered, subject: Key | str, **form: Any) -> dict[str, Any]:
    """Exchange a key or an access token and return what the new token says."""
    return unverified_claims(await exchanged(service, client, subject, **form))


async def is_active(service: Service, client: Registered, token: str) -> bool:
    """Return whether a token is good, as `/introspect` sees it."""
    answer = await service.introspect(client, token)
    assert answer.status_code == 200, answer.text
    active: bool = answer.json()["active"]
    return active


def tampered(text: str) -> Iterable[str]:
    """Yield a text with each of its letters changed, one at a time."""
    for place, letter in enumerate(text):
        yield text[:place] + ("A" if letter != "A" else "B") + text[place + 1 :]
