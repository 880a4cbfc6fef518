"""The operators' API about signing keys does what the commands do."""

import pytest

from identity_service.oauth.signing_keys import SigningKeys
from tests.support.operators import Operator


async def states(boss: Operator) -> dict[str, str]:
    return {key["kid"]: key["state"] for key in (await boss("GET", "/signing-keys")).json()}


async def test_a_rotation_is_scheduled_and_says_when(boss: Operator) -> None:
    """The waiting key, never before every cache can have seen it; asking twice changes nothing."""
    before = await states(boss)
    first = await boss("POST", "/signing-keys/rotate")
    assert first.status_code == 200
    assert before[first.json()["kid"]] == "next"
    assert (await boss("POST", "/signing-keys/rotate")).json() == first.json()
    assert await states(boss) == before
    [row, *_] = await boss.service.events("key.rotation_scheduled")
    assert row.target == first.json()["kid"]


async def test_a_compromised_key_leaves_the_key_set_and_another_takes_over(boss: Operator) -> None:
    """The token signed by it is worth nothing from that moment; the operator signs in again."""
    service = boss.service
    [active] = [kid for kid, state in (await states(boss)).items() if state == "active"]
    answer = await boss("POST", f"/signing-keys/{active}/compromise")
    assert answer.status_code == 200
    assert {key["kid"]: key["state"] for key in answer.json()}[active] == "compromised"
    await service.within(service.services.signing_keys.poll)
    published = {key["kid"] for key in (await service.http.get("/.well-known/jwks.json")).json()["keys"]}
    assert active not in published
    assert (await boss("GET", "/signing-keys")).status_code == 401
    [row] = await service.events("key.compromised")
    assert row.target == active
    assert row.actor is not None


async def test_a_key_is_compromised_once_and_an_unknown_one_never(
    boss: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """409 and 404; nothing changes, and no new key is made, which takes a processor for a second."""
    [waiting] = [kid for kid, state in (await states(boss)).items() if state == "next"]
    assert (await boss("POST", f"/signing-keys/{waiting}/compromise")).status_code == 200
    monkeypatch.delattr(SigningKeys, "generate")
    assert (await boss("POST", f"/signing-keys/{waiting}/compromise")).status_code == 409
    assert (await boss("POST", "/signing-keys/nothing/compromise")).status_code == 404
