"""What a refresh costs the database: one statement, and nothing at all for a token that was never handed out."""

import pytest

from tests.support.reading import refused
from tests.support.service import Service


async def test_a_refresh_is_one_statement(service: Service, statements: list[str]) -> None:
    """Client and role are known for a second, and nothing is read first and written later."""
    client = await service.a_client()
    tokens = await service.sign_in(client, await service.a_user())
    statements.clear()
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200
    assert len(statements) == 1
    assert "UPDATE refresh_families" in statements[0]


async def test_a_permitted_retry_writes_nothing(service: Service, statements: list[str]) -> None:
    """It costs the statement that finds nothing to rotate, and one look at the row."""
    client = await service.a_client(refresh_retry_window=10)
    tokens = await service.sign_in(client, await service.a_user())
    await service.refresh(client, tokens["refresh_token"])
    statements.clear()
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200
    assert [statement.split()[0] for statement in statements] == ["UPDATE", "SELECT"]


@pytest.mark.case("REF-29")
async def test_a_token_that_was_never_handed_out_costs_no_query(service: Service, statements: list[str]) -> None:
    """Wrong checksum, wrong length, wrong prefix, wrong MAC: the answer is known without asking."""
    client = await service.a_client()
    token = (await service.sign_in(client, await service.a_user()))["refresh_token"]
    await service.refresh(client, "rt_warm_up_the_cache_of_clients")
    statements.clear()
    for position in range(0, len(token), 7):
        letter = "0" if token[position] != "0" else "1"
        answer = await service.refresh(client, token[:position] + letter + token[position + 1 :])
        refused(answer, "invalid_grant")
    for imitation in (token[:-1], token + "0", token.swapcase(), "at_" + token[3:]):
        refused(await service.refresh(client, imitation), "invalid_grant")
    assert statements == []
    assert (await service.refresh(client, token)).status_code == 200


@pytest.mark.case("INT-12")
async def test_revoking_a_token_that_was_never_handed_out_costs_no_query(
    service: Service, statements: list[str]
) -> None:
    """Anybody may send random strings, and the database does not notice."""
    client = await service.a_client()
    token = (await service.sign_in(client, await service.a_user()))["refresh_token"]

    async def revoke(text: str) -> int:
        return (await service.http.post("/revoke", data={"token": text}, auth=client.auth)).status_code

    assert await revoke("rt_warm_up_the_cache_of_clients") == 200
    statements.clear()
    for imitation in (token[:-1], token[:-1] + ("0" if token[-1] != "0" else "1"), token + "0", "rt_"):
        assert await revoke(imitation) == 200
    assert statements == []
    assert await revoke(token) == 200
    assert statements != []
