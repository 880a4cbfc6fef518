"""RFC 6749 §4.3: the resource owner password credentials grant, as fenced here."""

import pytest

from tests.support.service import Service


@pytest.mark.rfc("6749", "4.3.3")
async def test_a_user_signs_in_and_reads_their_own_account(service: Service) -> None:
    """The token of a sign-in opens our own API."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    answer = await service.me(tokens["access_token"])
    assert answer.status_code == 200
    assert answer.json()["username"] == user.username


@pytest.mark.rfc("6749", "4.3.3")
async def test_the_embedded_default_signs_in_as_well(embedded: Service) -> None:
    """SQLite and limits in memory answer as PostgreSQL and Redis do."""
    client, user = await embedded.a_client(), await embedded.a_user()
    tokens = await embedded.sign_in(client, user)
    assert (await embedded.me(tokens["access_token"])).status_code == 200
