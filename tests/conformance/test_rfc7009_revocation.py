"""RFC 7009: a client gives a refresh token back, and the whole session ends."""

from typing import Any

import httpx2
import pytest

from tests.support.reading import refused
from tests.support.service import Registered, Service

DAY = 86400


async def revoke(service: Service, client: Registered | None, token: str | None, **form: str) -> httpx2.Response:
    """`POST /revoke`."""
    body = dict(form) | ({"token": token} if token is not None else {})
    auth = client.auth if client else None
    if client is not None and auth is None:
        body["client_id"] = client.id
    return await service.http.post("/revoke", data=body, auth=auth)


async def ended(service: Service, client: Registered, token: str, **form: str) -> None:
    """Revoke, and insist on the empty answer that every success has."""
    answer = await revoke(service, client, token, **form)
    assert (answer.status_code, answer.content) == (200, b""), answer.text
    assert answer.headers["cache-control"] == "no-store"


async def signed_in(service: Service, **client: Any) -> tuple[Registered, dict[str, Any]]:
    """Return a client and the tokens of a sign-in of a new user."""
    registered = await service.a_client(**client)
    return registered, await service.sign_in(registered, await service.a_user())


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("INT-06")
@pytest.mark.parametrize("public", [True, False])
async def test_a_revoked_token_ends_its_session(service: Service, public: bool) -> None:
    """Refresh token and access tokens are refused from the next request on; other sessions are untouched."""
    client, user = await service.a_client(public=public), await service.a_user()
    tokens, other = [await service.sign_in(client, user) for _ in range(2)]
    await ended(service, client, tokens["refresh_token"])
    refused(await service.refresh(client, tokens["refresh_token"]), "invalid_grant")
    assert (await service.me(tokens["access_token"])).status_code == 401
    assert (await service.me(other["access_token"])).status_code == 200
    assert (await service.refresh(client, other["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.1")
async def test_the_embedded_default_revokes_as_well(embedded: Service) -> None:
    """On SQLite as on PostgreSQL."""
    client, tokens = await signed_in(embedded)
    await ended(embedded, client, tokens["refresh_token"])
    refused(await embedded.refresh(client, tokens["refresh_token"]), "invalid_grant")


@pytest.mark.rfc("7009", "2.1")
async def test_any_generation_ends_the_session(service: Service) -> None:
    """A client that gives back an old token means its session, and this is no reuse."""
    client, tokens = await signed_in(service)
    second = (await service.refresh(client, tokens["refresh_token"])).json()
    third = (await service.refresh(client, second["refresh_token"])).json()
    await ended(service, client, tokens["refresh_token"])
    refused(await service.refresh(client, third["refresh_token"]), "invalid_grant")
    for access_token in (tokens["access_token"], second["access_token"], third["access_token"]):
        assert (await service.me(access_token)).status_code == 401
    assert await service.events("refresh.reuse_detected") == []


@pytest.mark.rfc("7009", "2.2")
async def test_revoking_twice_is_audited_once(service: Service) -> None:
    """The second request finds nothing to end and hears the same."""
    client, tokens = await signed_in(service)
    for _ in range(3):
        await ended(service, client, tokens["refresh_token"])
    (row,) = await service.events("token.revoked")
    (family,) = await service.family_rows()
    assert (row.actor, row.target, row.client_id) == (client.id, str(family.id), client.id)
    assert row.detail == {"user": str(family.user_id)}
    assert family.revoked_reason == "revoked"


async def test_a_replay_after_a_revocation_is_no_reuse(service: Service) -> None:
    """A dead family is not revoked again, and nothing more is audited."""
    client, tokens = await signed_in(service)
    second = (await service.refresh(client, tokens["refresh_token"])).json()["refresh_token"]
    await ended(service, client, second)
    (before,) = await service.family_rows()
    for token in (tokens["refresh_token"], second):
        description = refused(await service.refresh(client, token), "invalid_grant")
        assert description == "The refresh token is not valid."
    assert await service.family_rows() == [before]
    assert await service.events("refresh.reuse_detected") == []


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("INT-08")
@pytest.mark.parametrize("public", [True, False])
async def test_another_clients_token_stays_active(service: Service, public: bool) -> None:
    """Refused, without an audit row and without an effect, even when the caller really holds it."""
    client, tokens = await signed_in(service)
    other = await service.a_client(public=public)
    refused(await revoke(service, other, tokens["refresh_token"]), "invalid_grant")
    assert await service.events("token.revoked") == []
    assert (await service.me(tokens["access_token"])).status_code == 200
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.2")
@pytest.mark.case("INT-09")
@pytest.mark.parametrize("token", ["rt_" + "0" * 94, "rt_x", "unknown", "idk_1_2", "é", " "])
async def test_an_unknown_token_is_as_good_as_revoked(service: Service, token: str) -> None:
    """There is nothing the client could do about it."""
    client, tokens = await signed_in(service)
    await ended(service, client, token)
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.2")
async def test_an_expired_token_is_revoked_without_complaint(service: Service) -> None:
    """And is refused afterwards as before."""
    client, tokens = await signed_in(service)
    service.clock.advance(31 * DAY)
    await ended(service, client, tokens["refresh_token"])
    refused(await service.refresh(client, tokens["refresh_token"]), "invalid_grant")


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("INT-10")
@pytest.mark.parametrize("hint", ["refresh_token", "access_token", "pkce_verifier", "", "é", "x" * 2000])
async def test_a_wrong_hint_hides_nothing(service: Service, hint: str) -> None:
    """The hint is for speed, and a token is found without it."""
    client, tokens = await signed_in(service)
    await ended(service, client, tokens["refresh_token"], token_type_hint=hint)
    refused(await service.refresh(client, tokens["refresh_token"]), "invalid_grant")


@pytest.mark.rfc("7009", "2.2.1")
async def test_an_access_token_cannot_be_revoked_yet(service: Service) -> None:
    """Saying 200 to it would promise what does not happen."""
    client, tokens = await signed_in(service)
    refused(await revoke(service, client, tokens["access_token"]), "unsupported_token_type")
    assert (await service.me(tokens["access_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.1")
async def test_a_missing_token_is_an_invalid_request(service: Service) -> None:
    """An empty one counts as missing, and one in the query is never looked at."""
    client, tokens = await signed_in(service)
    refused(await revoke(service, client, None), "invalid_request")
    refused(await revoke(service, client, ""), "invalid_request")
    query = await service.http.post("/revoke", params={"token": tokens["refresh_token"]}, auth=client.auth, data={})
    refused(query, "invalid_request")
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.1")
async def test_a_token_given_twice_is_an_invalid_request(service: Service) -> None:
    """Nobody can know which one was meant."""
    client, tokens = await signed_in(service)
    answer = await service.http.post("/revoke", data={"token": [tokens["refresh_token"]] * 2}, auth=client.auth)
    refused(answer, "invalid_request")
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("CLI-03")
async def test_who_does_not_authenticate_revokes_nothing(service: Service) -> None:
    """A wrong secret, only the id of a confidential client, no client at all."""
    client, tokens = await signed_in(service)
    for who in (Registered(client.id, "cs_wrong"), Registered(client.id, None), None):
        refused(await revoke(service, who, tokens["refresh_token"]), "invalid_client", 401)
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.1")
async def test_revocation_is_a_post(service: Service) -> None:
    """A link in a page must not be able to sign anybody out."""
    client, tokens = await signed_in(service)
    answer = await service.http.get("/revoke", params={"token": tokens["refresh_token"]}, auth=client.auth)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200
