"""What a client cannot be registered with, and how the refusal says so."""

import re
from dataclasses import fields
from typing import Any

import pytest

from identity_service.accounts.clients import InvalidClientMetadata, NewClient

PUBLIC = {"token_endpoint_auth_method": "none"}
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"token_endpoint_auth_method": "private_key_jwt"}, "token_endpoint_auth_method"),
    ({"grant_types": ["implicit"]}, "grant_types"),
    ({"grant_types": ["password"]}, "grant_types"),
    ({**PUBLIC, "grant_types": ["client_credentials"]}, "grant_types"),
    ({**PUBLIC, "introspect": ["https://orders.example"]}, "introspect"),
    ({**PUBLIC, "require_pkce": False}, "require_pkce"),
    ({"scope": ["two words"]}, "scope"),
    ({"scope": [f"s{number}" for number in range(101)]}, "scope"),
    ({"redirect_uris": ["http://evil.example/cb"]}, "redirect_uris"),
    ({"audiences": ["orders"]}, "audiences"),
    ({"introspect": ["orders"]}, "introspect"),
    ({"exchange_audiences": ["orders"]}, "exchange_audiences"),
    ({**PUBLIC, "grant_types": [EXCHANGE]}, "exchange_audiences"),
    ({"cors_origins": ["*"]}, "cors_origins"),
    ({"refresh_retry_window": 61}, "refresh_retry_window"),
    ({"access_token_ttl": 59}, "access_token_ttl"),
    ({"access_token_ttl": 3601}, "access_token_ttl"),
    ({"refresh_idle_ttl": 59}, "refresh_idle_ttl"),
    ({"refresh_absolute_ttl": 366 * 86400 + 1}, "refresh_absolute_ttl"),
]


@pytest.mark.parametrize(("given", "member"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_refusal_names_the_member_first(given: dict[str, Any], member: str) -> None:
    """The JSON API makes a pointer of it; the rest says why."""
    with pytest.raises(InvalidClientMetadata) as refused:
        NewClient(**{"name": "Reports", **given}).check()
    named, colon, why = str(refused.value).partition(": ")
    assert (named, colon) == (member, ": ")
    assert named in {field.name for field in fields(NewClient)}
    assert re.search(r"[a-z]", why)


@pytest.mark.parametrize(
    "given",
    [{"access_token_ttl": 60}, {"access_token_ttl": 3600}, {"refresh_idle_ttl": 60}, {"refresh_retry_window": 60}],
    ids=str,
)
def test_what_stands_at_the_end_of_a_range_is_within_it(given: dict[str, Any]) -> None:
    """In seconds, as the documentation says."""
    NewClient(name="Reports", **given).check()
