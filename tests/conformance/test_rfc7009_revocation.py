"""RFC 7009: a client gives a token back; with a refresh token the whole session ends, an access token ends alone."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
import redis.asyncio
from sqlalchemy import select

from identity_service.infra.tables import revoked_tokens
from identity_service.oauth.tokens import ANY_AUDIENCE
from identity_service.verifier.core import LATEST, LEEWAY
from tests.support.races import blocked, held
from tests.support.reading import refused, unverified_claims
from tests.support.service import Registered, Service, running, test_settings

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


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "nonsense"])
async def test_a_revoked_access_token_is_dead_and_its_session_lives(service: Service, hint: str) -> None:
    """Only that token: the session's other tokens go on."""
    client, tokens = await signed_in(service)
    later = (await service.refresh(client, tokens["refresh_token"])).json()
    await ended(service, client, tokens["access_token"], token_type_hint=hint)
    assert (await service.me(tokens["access_token"])).status_code == 401
    assert (await service.me(later["access_token"])).status_code == 200
    assert (await service.refresh(client, later["refresh_token"])).status_code == 200


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("OPS-10")
async def test_a_revoked_access_token_stays_dead(database_url: str, redis_url: str) -> None:
    """After a restart, on another replica, and when Redis has forgotten everything."""
    async with (
        running(test_settings(database_url, redis_url=redis_url)) as one,
        running(test_settings(database_url, redis_url=redis_url)) as other,
    ):
        client, tokens = await signed_in(one)
        assert (await other.me(tokens["access_token"])).status_code == 200
        await ended(one, client, tokens["access_token"])
        assert (await other.me(tokens["access_token"])).status_code == 401
    async with redis.asyncio.Redis.from_url(redis_url) as connection:
        await connection.flushdb()
    async with running(test_settings(database_url, redis_url=redis_url)) as restarted:
        assert (await restarted.me(tokens["access_token"])).status_code == 401


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("INT-08")
async def test_another_clients_access_token_is_refused_and_lives_on(service: Service) -> None:
    """Also for a public client that names nobody but itself."""
    _, tokens = await signed_in(service)
    for stranger in (await service.a_client(), await service.a_client(public=True)):
        refused(await revoke(service, stranger, tokens["access_token"]), "invalid_grant")
    assert (await service.me(tokens["access_token"])).status_code == 200
    assert await service.events("token.revoked") == []


@pytest.mark.rfc("7009", "2.2")
async def test_an_access_token_revoked_twice_is_audited_once(service: Service) -> None:
    """By name, never by its text."""
    client, tokens = await signed_in(service)
    for _ in range(2):
        await ended(service, client, tokens["access_token"])
    (event,) = await service.events("token.revoked")
    claims = unverified_claims(tokens["access_token"])
    assert (event.actor, event.client_id, event.target) == (client.id, client.id, claims["jti"])
    assert event.detail == {"subject": claims["sub"]}


@pytest.mark.rfc("7009", "2.1")
async def test_two_who_revoke_one_access_token_at_once_both_succeed(service: Service) -> None:
    """The second waits for the first, finds it done, and writes nothing."""
    client, tokens = await signed_in(service)
    claims = service.services.issued.read(tokens["access_token"], audiences=ANY_AUDIENCE)
    async with held(service) as first:
        assert await service.services.issued.revoke(first.tx, claims)
        second = await blocked(service, revoke(service, client, tokens["access_token"]))
        await first.commit()
        assert (await second).status_code == 200
    assert await service.events("token.revoked") == []
    assert (await service.me(tokens["access_token"])).status_code == 401


@pytest.mark.rfc("7009", "2.2")
async def test_an_access_token_that_is_no_more_is_revoked_without_complaint(service: Service) -> None:
    """Expired, tampered with, ended with its session: the client wanted it gone, and gone it is. Nothing is kept."""
    client, tokens = await signed_in(service)
    await ended(service, client, tokens["access_token"][:-4] + "AAAA")
    await ended(service, client, tokens["refresh_token"])
    await ended(service, client, tokens["access_token"])
    other = await service.sign_in(client, await service.a_user())
    service.clock.advance(3600)
    await ended(service, client, other["access_token"])
    assert await service.execute(select(revoked_tokens)) == []


async def test_revoked_tokens_are_forgotten_when_they_have_expired(service: Service) -> None:
    """A day later, for the clock of whoever cleans up may be wrong; nobody takes them then, however late they are."""
    client, tokens = await signed_in(service)
    await ended(service, client, tokens["access_token"])
    expires_at = unverified_claims(tokens["access_token"])["exp"]

    async def forgotten() -> int:
        return await service.within(lambda tx: service.services.issued.clean_up(tx, batch=10))

    service.clock.set(datetime.fromtimestamp(expires_at + LEEWAY, UTC) + timedelta(days=1, milliseconds=-1))
    assert await forgotten() == 0
    assert (await service.me(tokens["access_token"])).status_code == 401
    service.clock.advance(0.001)
    assert await forgotten() == 1
    assert (await service.me(tokens["access_token"])).status_code == 401


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


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.parametrize("changes", [{"exp": LATEST}, {"jti": "j" * 128}], ids=["no end", "longest name"])
async def test_the_oddest_tokens_we_could_sign_can_be_revoked(service: Service, changes: dict[str, Any]) -> None:
    """Whatever is accepted can be given back."""
    client, tokens = await signed_in(service)
    claims = {**unverified_claims(tokens["access_token"]), **changes}
    odd = service.services.signing_keys.sign(claims, typ="at+jwt")
    assert (await service.me(odd)).status_code == 200
    await ended(service, client, odd)
    assert (await service.me(odd)).status_code == 401
