"""What a refresh costs the database: one statement, and nothing at all for a token that was never handed out."""

import pytest
from sqlalchemy import func, insert, select, true

from identity_service.infra.tables import refresh_families
from tests.support.plans import note_plans
from tests.support.reading import refused
from tests.support.service import ISSUER, Service


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


@pytest.mark.case("OPS-35")
async def test_what_requests_ask_is_found_by_an_index_however_many_there_are(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signing in, refreshing, presenting a token twice, asking about it and giving it back, among 20,000 families."""
    client = await service.a_client(refresh_retry_window=0)
    sibling = await service.a_client(grant_types=(), introspect=(ISSUER,))
    await service.sign_in(client, await service.a_user())
    # Made by PostgreSQL: sent from here they would take, on a busy machine, longer than any statement may.
    copied = [
        func.gen_random_uuid() if column is refresh_families.c.id else column for column in refresh_families.columns
    ]
    more = select(*copied).select_from(refresh_families.join(func.generate_series(1, 20_000).alias(), true()))
    await service.execute(insert(refresh_families).from_select(list(refresh_families.columns), more))
    async with service.services.db.engine.connect() as connection:
        await connection.exec_driver_sql("ANALYZE refresh_families")
    plans = note_plans(monkeypatch, lambda query: "refresh_families" in query)

    tokens = await service.sign_in(client, await service.a_user())
    rotated = await service.refresh(client, tokens["refresh_token"])
    assert rotated.status_code == 200
    assert (await service.introspect(sibling, rotated.json()["access_token"])).json()["active"]
    assert (await service.revoke(client, rotated.json()["refresh_token"])).status_code == 200
    again = await service.sign_in(client, await service.a_user())
    assert (await service.refresh(client, again["refresh_token"])).status_code == 200
    refused(await service.refresh(client, again["refresh_token"]), "invalid_grant")  # and its family is revoked
    changes = [plan for plan in plans if plan.startswith(("Update on", "LockRows"))]
    assert len(changes) == 7
    assert [plan for plan in changes if "Index Scan using pk_refresh_families" not in plan] == []
    assert [plan for plan in plans if "Seq Scan" in plan] == []
