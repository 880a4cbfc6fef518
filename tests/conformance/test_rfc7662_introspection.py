"""RFC 7662: a resource server asks what a token is worth at this moment."""

import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch

import httpx2
import pytest
from sqlalchemy import update

from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit.catalogue import TOKEN_GUESSING
from identity_service.infra.tables import clients, users
from identity_service.oauth.signing_keys.material import generate
from tests.support.reading import key_id, refused, unverified_claims
from tests.support.service import ISSUER, SIBLING, Registered, Service, running, test_settings

OTHER = "https://billing.example"


async def a_resource_server(service: Service, *audiences: str) -> Registered:
    """Register a client that may ask about tokens for `audiences`."""
    return await service.a_client(grant_types=(), scope=(), audiences=(), introspect=audiences or (SIBLING,))


async def a_token(service: Service, **form: Any) -> tuple[Registered, dict[str, Any]]:
    """Sign a new user in at a new client, by default for the sibling."""
    client = await service.a_client()
    return client, await service.sign_in(client, await service.a_user(), **{"resource": SIBLING, **form})


async def active(service: Service, server: Registered, token: str) -> dict[str, Any]:
    """Return what is said about a good token."""
    answer = await service.introspect(server, token)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    assert body["active"] is True
    return body


async def inactive(service: Service, server: Registered, token: str) -> None:
    """Insist on the one answer that everything gets which is not good."""
    answer = await service.introspect(server, token)
    assert (answer.status_code, answer.content) == (200, b'{"active":false}'), answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"


# -- good tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("7662", "2.2")
async def test_a_users_token_is_told_in_full(service: Service) -> None:
    """Every member the token has, and nothing that it does not say."""
    _, tokens = await a_token(service)
    told = await active(service, await a_resource_server(service), tokens["access_token"])
    claims = unverified_claims(tokens["access_token"])
    assert told == {"active": True, "token_type": "Bearer", **claims}
    assert {"sub", "scope", "client_id", "exp", "iat", "aud", "iss", "jti", "roles", "sid"} <= told.keys()


@pytest.mark.rfc("7662", "2.2")
async def test_a_clients_token_names_the_client_as_its_subject(embedded: Service) -> None:
    """`sub` is always there, on SQLite as on PostgreSQL."""
    client = await embedded.a_client(audiences=(SIBLING,))
    token = (await embedded.token(client, grant_type="client_credentials")).json()["access_token"]
    told = await active(embedded, await a_resource_server(embedded), token)
    assert (told["sub"], told["client_id"]) == (client.id, client.id)
    assert "sid" not in told


@pytest.mark.rfc("7662", "2.1")
@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "nonsense", "é"])
@pytest.mark.case("INT-10")
async def test_a_hint_hides_nothing(service: Service, hint: str) -> None:
    """It is for speed, and a token is found without it."""
    _, tokens = await a_token(service)
    server = await a_resource_server(service)
    answer = await service.introspect(server, tokens["access_token"], token_type_hint=hint)
    assert answer.json()["active"] is True


@pytest.mark.rfc("7662", "2.2")
async def test_one_of_several_audiences_is_enough(service: Service) -> None:
    """A token for two services is good at either."""
    client = await service.a_client(audiences=(SIBLING, OTHER))
    tokens = await service.sign_in(client, await service.a_user(), resource=[SIBLING, OTHER])
    for audience in (SIBLING, OTHER):
        told = await active(service, await a_resource_server(service, audience), tokens["access_token"])
        assert told["aud"] == [SIBLING, OTHER]


@pytest.mark.rfc("7662", "2.2")
async def test_no_claim_can_overrule_the_answer(service: Service) -> None:
    """A token that brings members named like ours is still told truly."""
    _, tokens = await a_token(service)
    claims = unverified_claims(tokens["access_token"])
    odd = {**claims, "active": False, "token_type": "mac", "name": "Zoë 😀"}
    token = service.services.signing_keys.sign(odd, typ="at+jwt")
    told = await active(service, await a_resource_server(service), token)
    assert (told["active"], told["token_type"], told["name"]) == (True, "Bearer", odd["name"])


# -- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("7662", "2.1")
@pytest.mark.case("INT-01")
async def test_who_may_not_ask_learns_nothing(service: Service) -> None:
    """No client, a wrong secret, a public client, and a client without the right: refused before the token is read."""
    client, tokens = await a_token(service)
    public = await service.a_client(public=True)
    server = await a_resource_server(service)
    for token in (tokens["access_token"], "nonsense"):
        anonymous = await service.http.post("/introspect", data={"token": token})
        refused(anonymous, "invalid_client", 401)
        refused(await service.introspect(Registered(server.id, "cs_wrong"), token), "invalid_client", 401)
        refused(await service.introspect(Registered(server.id, None), token), "invalid_client", 401)
        bearer = {"authorization": f"Bearer {tokens['access_token']}"}
        refused(await service.http.post("/introspect", data={"token": token}, headers=bearer), "invalid_client", 401)
        for powerless in (public, client):
            refused(await service.introspect(powerless, token), "unauthorized_client", 403)


@pytest.mark.rfc("7662", "2.1")
async def test_a_public_client_cannot_be_given_the_right(service: Service) -> None:
    """Whoever knows its id would have it as well."""
    with pytest.raises(ValueError, match="introspection needs a client that can authenticate"):
        await service.a_client(public=True, introspect=(SIBLING,))


@pytest.mark.rfc("7662", "4")
@pytest.mark.case("INT-02")
async def test_a_token_for_somebody_else_is_inactive(service: Service) -> None:
    """A resource server learns nothing about tokens that are not meant for it, nor our own API about a sibling's."""
    _, tokens = await a_token(service)
    _, ours = await a_token(service, resource=ISSUER)
    for audience in (OTHER, ISSUER, SIBLING + "/", SIBLING.upper()):
        await inactive(service, await a_resource_server(service, audience), tokens["access_token"])
    await inactive(service, await a_resource_server(service), ours["access_token"])
    await active(service, await a_resource_server(service, ISSUER), ours["access_token"])


@pytest.mark.rfc("7662", "2.1")
async def test_the_question_is_a_form_with_one_token(service: Service) -> None:
    """Posted, named once, not empty, not in the query."""
    _, tokens = await a_token(service)
    server = await a_resource_server(service)
    post = service.http.post
    for answer in (
        await post("/introspect", data=server.form),
        await post("/introspect", data={**server.form, "token": ""}),
        await post("/introspect", data={**server.form, "token": [tokens["access_token"]] * 2}),
        await post("/introspect", params={"token": tokens["access_token"]}, data=server.form),
        await post("/introspect", json={"token": tokens["access_token"]}, auth=server.auth),
    ):
        refused(answer, "invalid_request")
    assert (await service.http.get("/introspect", auth=server.auth)).status_code == 405


# -- what is not good -------------------------------------------------------------------------------------------------

Spoil = Callable[[Service, Registered, dict[str, Any]], Awaitable[str]]


async def _as_it_is(_service: Service, _client: Registered, tokens: dict[str, Any]) -> str:
    text: str = tokens["access_token"]
    return text


async def _the_refresh_token(_service: Service, _client: Registered, tokens: dict[str, Any]) -> str:
    text: str = tokens["refresh_token"]
    return text


async def _altered(service: Service, _client: Registered, tokens: dict[str, Any]) -> str:
    return await _as_it_is(service, _client, tokens) + "A"


async def _expired(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    service.clock.advance(tokens["expires_in"] + 31)
    return await _as_it_is(service, client, tokens)


async def _revoked(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    assert (await service.revoke(client, tokens["access_token"])).status_code == 200
    return await _as_it_is(service, client, tokens)


async def _session_revoked(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    assert (await service.revoke(client, tokens["refresh_token"])).status_code == 200
    return await _as_it_is(service, client, tokens)


async def _refresh_reused(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    await service.refresh(client, tokens["refresh_token"])
    await service.refresh(client, tokens["refresh_token"])
    return await _as_it_is(service, client, tokens)


async def _user_disabled(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    user_id = uuid.UUID(unverified_claims(tokens["access_token"])["sub"])
    await service.within(lambda tx: service.services.users.set_enabled(tx, user_id, False))
    await service.within(lambda tx: service.services.users.set_enabled(tx, user_id, True))
    return await _as_it_is(service, client, tokens)


async def _password_changed(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    user_id = uuid.UUID(unverified_claims(tokens["access_token"])["sub"])
    await service.within(lambda tx: service.services.users.set_password(tx, user_id, "$argon2id$none"))
    return await _as_it_is(service, client, tokens)


async def _user_row_disabled(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    user_id = uuid.UUID(unverified_claims(tokens["access_token"])["sub"])
    await service.execute(update(users).where(users.c.id == user_id).values(enabled=False))
    return await _as_it_is(service, client, tokens)


async def _client_row_disabled(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    await service.execute(update(clients).where(clients.c.id == client.id).values(enabled=False))
    service.clock.advance(1)
    return await _as_it_is(service, client, tokens)


async def _client_disabled(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    await service.within(lambda tx: service.services.clients.set_enabled(tx, client.id, False))
    return await _as_it_is(service, client, tokens)


async def _client_disabled_for_a_while(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    await service.bump_client_epoch(client)
    return await _as_it_is(service, client, tokens)


async def _key_compromised(service: Service, client: Registered, tokens: dict[str, Any]) -> str:
    keys = service.services.signing_keys
    spare = [generate(2048)]  # the waiting key takes over, and this one waits in its place
    await service.within(lambda tx: keys.compromise(tx, [key_id(tokens["access_token"])], spare))
    await service.within(keys.poll)
    return await _as_it_is(service, client, tokens)


def _with(**changes: Any) -> Spoil:
    async def spoil(service: Service, _client: Registered, tokens: dict[str, Any]) -> str:
        claims = {**unverified_claims(tokens["access_token"]), **changes}
        return service.services.signing_keys.sign(claims, typ=changes.pop("typ", "at+jwt"))

    return spoil


INACTIVE: dict[str, Spoil] = {
    "a refresh token": _the_refresh_token,
    "altered": _altered,
    "expired": _expired,
    "not yet valid": _with(nbf=2_000_000_000),
    "another type": _with(typ="JWT"),
    "revoked": _revoked,
    "its session revoked": _session_revoked,
    "its refresh token reused": _refresh_reused,
    "its user disabled": _user_disabled,
    "its user's password changed": _password_changed,
    "its user disabled, the epoch standing": _user_row_disabled,
    "its client disabled, the epoch standing": _client_row_disabled,
    "its client disabled": _client_disabled,
    "its client disabled for a while": _client_disabled_for_a_while,
    "its key compromised": _key_compromised,
    "of a session that never was": _with(sid=str(uuid.UUID(int=7))),
    "of another user's session": _with(sub=str(uuid.UUID(int=7))),
    "of a session that is no id": _with(sid="\0"),
    "of a user that is no id": _with(sub="x' OR 1=1 --"),
    "of no client of ours": _with(client_id="cl_\0"),
    "with an id that cannot be": _with(jti="a\0b"),
}


@pytest.mark.rfc("7662", "2.2")
@pytest.mark.case("INT-03")
@pytest.mark.parametrize("spoil", INACTIVE.values(), ids=INACTIVE.keys())
async def test_what_is_not_good_is_inactive_and_no_more_is_said(service: Service, spoil: Spoil) -> None:
    """The same bytes for every reason; the same token was good before."""
    client, tokens = await a_token(service)
    server = await a_resource_server(service)
    await active(service, server, tokens["access_token"])
    await inactive(service, server, await spoil(service, client, tokens))


@pytest.mark.rfc("7662", "2.2")
async def test_a_clients_own_token_ends_with_its_client(service: Service) -> None:
    """It has no session to end; disabling and enabling the client ends it for good, were it of the same second."""
    client = await service.a_client(audiences=(SIBLING,))
    server = await a_resource_server(service)
    token = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    await active(service, server, token)
    await service.bump_client_epoch(client)
    await inactive(service, server, token)
    fresh = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    await active(service, server, fresh)
    await _client_row_disabled(service, client, {"access_token": fresh})
    await inactive(service, server, fresh)


@pytest.mark.rfc("7662", "2.2")
@pytest.mark.case("INT-06")
async def test_a_token_of_a_row_that_was_remembered_too_long_ends_with_its_client(database_url: str) -> None:
    """Another replica may issue one for a second after the disabling; enabling the client does not bring it to life."""
    settings = test_settings(database_url)
    async with running(settings) as one, running(settings) as other:
        client, server = await one.a_client(audiences=(SIBLING,)), await a_resource_server(one)
        assert (await other.token(client, grant_type="client_credentials")).status_code == 200
        await one.within(lambda tx: one.services.clients.set_enabled(tx, client.id, False))
        late = await other.token(client, grant_type="client_credentials")
        assert late.status_code == 200, "it remembers the client"
        await one.within(lambda tx: one.services.clients.set_enabled(tx, client.id, True))
        for replica in (one, other):
            replica.clock.advance(2)
            await inactive(replica, server, late.json()["access_token"])


@pytest.mark.rfc("7662", "2.2")
async def test_a_token_that_is_newer_than_the_remembered_row_is_good(database_url: str) -> None:
    """A client that was disabled and enabled again is not refused by a replica that remembers how it was before."""
    settings = test_settings(database_url)
    async with running(settings) as one, running(settings) as other:
        client, server = await one.a_client(audiences=(SIBLING,)), await a_resource_server(one)
        old = (await other.token(client, grant_type="client_credentials")).json()["access_token"]
        await active(other, server, old)
        await one.bump_client_epoch(client)
        new = (await one.token(client, grant_type="client_credentials")).json()["access_token"]
        await active(other, server, new)
        other.clock.advance(1)
        await active(other, server, new)
        await inactive(other, server, old)


@pytest.mark.rfc("7009", "2.1")
async def test_a_clients_own_token_can_be_revoked(service: Service) -> None:
    client, server = await service.a_client(audiences=(SIBLING,)), await a_resource_server(service)
    token = (await service.token(client, grant_type="client_credentials")).json()["access_token"]
    assert (await service.revoke(client, token)).status_code == 200
    await inactive(service, server, token)


@pytest.mark.rfc("7662", "2.2")
async def test_a_token_ends_with_its_sessions_last_day(service: Service) -> None:
    """Before anybody has cleaned up as well as after."""
    client = await service.a_client(access_token_ttl=3600, refresh_absolute_ttl=1800, refresh_idle_ttl=1800)
    token = (await service.sign_in(client, await service.a_user(), resource=SIBLING))["access_token"]
    server = await a_resource_server(service)
    service.clock.advance(1799)
    await active(service, server, token)
    service.clock.advance(1)
    await inactive(service, server, token)


@pytest.mark.rfc("7662", "2.2")
async def test_the_leeway_is_the_same_at_every_door(service: Service) -> None:
    """Introspection, our own API and siblings let go of a token at one instant, 30 seconds after its end."""
    _, tokens = await a_token(service, resource=ISSUER)
    server = await a_resource_server(service, ISSUER)
    service.clock.set(datetime.fromtimestamp(unverified_claims(tokens["access_token"])["exp"] + 29, UTC))
    await active(service, server, tokens["access_token"])
    assert (await service.me(tokens["access_token"])).status_code == 200
    service.clock.advance(1)
    await inactive(service, server, tokens["access_token"])
    assert (await service.me(tokens["access_token"])).status_code == 401


# -- replicas, limits, outages ----------------------------------------------------------------------------------------


@pytest.mark.rfc("7009", "2.1")
@pytest.mark.case("INT-06")
@pytest.mark.parametrize("end", [_revoked, _session_revoked, _user_disabled, _client_disabled])
async def test_what_ends_at_one_replica_has_ended_at_every_other(database_url: str, redis_url: str, end: Spoil) -> None:
    """Within a second, which is how old the other replica's view of a client may be."""
    settings = test_settings(database_url, redis_url=redis_url)
    async with running(settings) as one, running(settings) as other:
        client, tokens = await a_token(one)
        server = await a_resource_server(one)
        await active(other, server, tokens["access_token"])
        token = await end(one, client, tokens)
        other.clock.advance(timedelta(seconds=1))
        await inactive(other, server, token)


@pytest.mark.rfc("7662", "4")
@pytest.mark.case("INT-12")
@pytest.mark.parametrize("path", ["/introspect", "/revoke"])
async def test_guessing_is_answered_429_and_costs_no_query(service: Service, path: str) -> None:
    """Real tokens are still answered: somebody who shows rubbish to a resource server does not stop its work."""
    client, tokens = await a_token(service)
    server = await a_resource_server(service)
    caller, good = (server, tokens["access_token"]) if path == "/introspect" else (client, tokens["refresh_token"])

    async def ask(token: str) -> httpx2.Response:
        return await service.http.post(path, data={**caller.form, "token": token})

    await ask("rt_warm-up")  # the client is remembered from here on
    forged = good[:-1] + ("A" if good[-1] != "A" else "B")
    texts = ["nonsense", "a.b.c", "rt_" + "x" * 60, forged]
    with patch.object(Transaction, "_connect", side_effect=AssertionError("a guess was looked up")):
        for number in range(TOKEN_GUESSING.burst - 1):
            assert (await ask(texts[number % 4])).status_code == 200
        limited = await ask(texts[0])
    refused(limited, "temporarily_unavailable", 429)
    assert int(limited.headers["retry-after"]) >= 1
    assert (await ask(good)).status_code == 200
    other = await a_resource_server(service)
    assert (await service.introspect(other, "nonsense")).status_code == 200
    service.clock.advance(2)
    assert (await ask("nonsense")).status_code == 200


@pytest.mark.rfc("7662", "4")
@pytest.mark.parametrize("spoil", [_expired, _key_compromised, _the_refresh_token, _with(nbf=2_000_000_000)])
async def test_tokens_that_were_once_good_are_no_guesses(service: Service, spoil: Spoil) -> None:
    """A fleet of callers with expired tokens, or with those of a withdrawn key, does not use up anybody's budget."""
    client, tokens = await a_token(service)
    server = await a_resource_server(service)
    token = await spoil(service, client, tokens)
    for _ in range(TOKEN_GUESSING.burst + 5):
        await inactive(service, server, token)


@pytest.mark.case("INT-12")
async def test_the_budget_of_guesses_is_a_networks_own(database_url: str, redis_url: str) -> None:
    """An IPv6 network is one neighbour; another one is not held up."""
    settings = test_settings(database_url, redis_url=redis_url)
    async with (
        running(settings, peer="2001:db8:0:1::1") as guesser,
        running(settings, peer="2001:db8:0:1::2") as neighbour,
        running(settings, peer="2001:db8:0:2::1") as stranger,
    ):
        server = await a_resource_server(guesser)
        statuses = [(await guesser.introspect(server, "junk")).status_code for _ in range(TOKEN_GUESSING.burst + 1)]
        assert (statuses[0], statuses[-1]) == (200, 429)
        assert (await neighbour.introspect(server, "junk")).status_code == 429
        assert (await stranger.introspect(server, "junk")).status_code == 200


@pytest.mark.case("INT-12")
async def test_guesses_are_counted_without_redis_too(database_url: str) -> None:
    """In each process, and more strictly."""
    async with running(test_settings(database_url, redis_url="redis://127.0.0.1:1/0")) as service:
        server = await a_resource_server(service)
        statuses = [(await service.introspect(server, "junk")).status_code for _ in range(TOKEN_GUESSING.burst)]
        assert (statuses[0], statuses[-1]) == (200, 429)
