"""RFC 8693: exchanging an API key or an access token for an access token with an actor."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from identity_service.infra.tables import api_keys, clients
from tests.support.keys import (
    ACCESS_TOKEN,
    API_KEY,
    EXCHANGE,
    a_key,
    an_exchanger,
    claims_of,
    exchange,
    exchanged,
    is_active,
)
from tests.support.reading import unverified_claims
from tests.support.refusals import refusal, written
from tests.support.service import ISSUER, SIBLING, Registered, Service

BILLS = "https://bills.example/api"
TYPES = "urn:ietf:params:oauth:token-type:"


@pytest.fixture
def api(embedded: Service) -> Service:
    """The service."""
    return embedded


@pytest.fixture
async def gateway(api: Service) -> Registered:
    """A service that may exchange what it is shown, for the example sibling."""
    return await an_exchanger(api)


async def signed_in(api: Service, **form: str) -> dict[str, Any]:
    """Sign somebody in at an application of our own and return the answer; the token is for our own API."""
    return await api.sign_in(await api.a_client(), await api.a_user(), **form)


# -- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.2.1")
async def test_the_answer_names_the_type_of_the_token_and_brings_no_refresh_token(
    api: Service, gateway: Registered
) -> None:
    """Whatever the client may do otherwise; nobody may cache it."""
    able = await an_exchanger(api, first_party=True, grant_types=(EXCHANGE, "refresh_token", "password"))
    for client, subject in (
        (gateway, (await signed_in(api))["access_token"]),
        (able, await a_key(api, await api.a_user())),
    ):
        answer = await exchange(api, client, subject)
        assert answer.status_code == 200, answer.text
        assert answer.headers["cache-control"] == "no-store"
        body = answer.json()
        assert set(body) == {"access_token", "issued_token_type", "token_type", "expires_in", "scope"}
        assert (body["issued_token_type"], body["token_type"]) == (ACCESS_TOKEN, "Bearer")
        assert body["scope"] == unverified_claims(body["access_token"])["scope"]
    plain = (await api.token(gateway, grant_type="client_credentials")).json()
    assert "issued_token_type" not in plain


@pytest.mark.rfc("8693", "4.1")
async def test_the_client_becomes_the_actor_and_the_subject_stays(api: Service, gateway: Registered) -> None:
    """What the token says of the person and their sign-in is carried over."""
    subject = (await signed_in(api))["access_token"]
    before = unverified_claims(subject)
    after = await claims_of(api, gateway, subject)
    for name in ("iss", "sub", "roles", "sid", "auth_time", "amr"):
        assert after[name] == before[name], name
    assert (after["client_id"], after["act"], after["aud"]) == (gateway.id, {"sub": gateway.id}, SIBLING)
    assert after["jti"] != before["jti"]
    assert after["parents"] == [before["jti"]]


@pytest.mark.rfc("8693", "4.1")
async def test_the_token_of_a_client_speaks_for_that_client(api: Service, gateway: Registered) -> None:
    """It says nothing of a person, and still names who acts."""
    service = await api.a_client(scope=("orders:read",), audiences=(SIBLING,))
    token = (await api.token(service, grant_type="client_credentials")).json()["access_token"]
    after = await claims_of(api, gateway, token)
    assert (after["sub"], after["client_id"], after["act"]) == (service.id, gateway.id, {"sub": gateway.id})
    assert after["scope"] == "orders:read"
    assert {"roles", "sid", "auth_time", "amr", "key_id"}.isdisjoint(after)


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.case("KEY-10")
async def test_a_key_is_exchanged_for_a_short_token_of_its_owner(api: Service, gateway: Registered) -> None:
    """It names the key and that a key was used; there is no session behind it."""
    person = await api.a_user()
    key = await a_key(api, person, "orders:read", "account:read")
    after = await claims_of(api, gateway, key)
    assert (after["sub"], after["key_id"], after["amr"]) == (str(person.id), key.id, ["api_key"])
    assert (after["roles"], after["act"], after["aud"]) == (["user"], {"sub": gateway.id}, SIBLING)
    assert set(after["scope"].split()) == {"orders:read", "account:read"}
    assert {"sid", "auth_time", "parents"}.isdisjoint(after)
    assert after["epoch"] == 0
    assert after["exp"] - after["iat"] <= 600


@pytest.mark.rfc("8693", "2.1")
async def test_a_services_key_is_exchanged_for_a_token_of_the_service(api: Service, gateway: Registered) -> None:
    """The owner of the key is the subject, whoever brings it."""
    owner = await api.a_client(scope=("orders:read", "orders:write"), name="Reports")
    after = await claims_of(api, gateway, await a_key(api, owner, "orders:write"))
    assert (after["sub"], after["client_id"], after["amr"]) == (owner.id, gateway.id, ["api_key"])
    assert after["scope"] == "orders:write"
    assert {"sid", "auth_time", "roles"}.isdisjoint(after)


@pytest.mark.rfc("8693", "2.2.1")
@pytest.mark.case("TEX-07")
@pytest.mark.case("KEY-10")
async def test_the_new_token_ends_no_later_than_what_it_was_exchanged_for(api: Service, gateway: Registered) -> None:
    """Nor later than the client's lifetime allows; `expires_in` says the same."""
    subject = (await signed_in(api))["access_token"]
    api.clock.advance(500)  # type: ignore[attr-defined]
    answer = await exchange(api, gateway, subject)
    after = unverified_claims(answer.json()["access_token"])
    assert after["exp"] == unverified_claims(subject)["exp"]
    assert answer.json()["expires_in"] == after["exp"] - after["iat"] <= 100

    now = api.clock.now()
    key = await a_key(api, await api.a_user(), expires_at=now + timedelta(seconds=90))
    after = await claims_of(api, gateway, key)
    assert after["exp"] == int((now + timedelta(seconds=90)).timestamp())

    hasty = await an_exchanger(api, access_token_ttl=60)
    after = await claims_of(api, hasty, await a_key(api, await api.a_user()))
    assert 57 <= after["exp"] - after["iat"] <= 60


async def test_what_is_good_for_a_last_moment_only_is_not_exchanged(api: Service, gateway: Registered) -> None:
    """Clocks may differ, so a token that has just expired still passes elsewhere; a new one would be born dead."""
    subject = (await signed_in(api))["access_token"]
    life = unverified_claims(subject)["exp"] - unverified_claims(subject)["iat"]
    api.clock.advance(life)  # type: ignore[attr-defined]
    refusal(await exchange(api, gateway, subject), "invalid_grant", subject)


async def test_the_role_is_the_one_the_person_has_now(api: Service, gateway: Registered) -> None:
    """The old token still names the old one; what is issued now is bounded and described by the new one."""
    await api.a_user()  # the role `user` holds orders:read from now on
    person = await api.a_user(role="admin")
    await api.within(lambda tx: api.services.access.grant(tx, "admin", ["orders:write"]))
    subject = (await api.sign_in(await api.a_client(), person))["access_token"]
    assert "orders:write" in unverified_claims(subject)["scope"]
    await api.patch_user(person, role="user")
    after = await claims_of(api, gateway, subject)
    assert (after["roles"], set(after["scope"].split())) == (["user"], {"account:read", "account:write", "orders:read"})


# -- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"subject_token": ""}, "invalid_request"),
        ({"subject_token_type": ""}, "invalid_request"),
        ({"subject_token_type": f"{TYPES}jwt"}, "invalid_request"),
        ({"subject_token_type": f"{TYPES}refresh_token"}, "invalid_request"),
        ({"subject_token_type": f"{TYPES}id_token"}, "invalid_request"),
        ({"subject_token_type": f"{TYPES}saml2"}, "invalid_request"),
        ({"subject_token_type": ACCESS_TOKEN.upper()}, "invalid_request"),
        ({"requested_token_type": f"{TYPES}jwt"}, "invalid_request"),
        ({"requested_token_type": f"{TYPES}refresh_token"}, "invalid_request"),
        ({"requested_token_type": f"{TYPES}id_token"}, "invalid_request"),
        ({"requested_token_type": API_KEY}, "invalid_request"),
        ({"scope": 'orders:read "'}, "invalid_scope"),
        ({"scope": "openid"}, "invalid_scope"),
        ({"scope": "offline_access"}, "invalid_scope"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
async def test_a_request_that_asks_for_what_is_not_offered_is_refused(
    api: Service, gateway: Registered, changes: dict[str, str], code: str
) -> None:
    """Only access tokens are issued, and only two kinds of subject are known."""
    subject = (await signed_in(api))["access_token"]
    before = await written(api)
    refusal(await exchange(api, gateway, subject, **changes), code, subject)
    assert await written(api) == before


@pytest.mark.rfc("8693", "2.1")
async def test_the_type_that_is_wanted_may_be_named(api: Service, gateway: Registered) -> None:
    """An access token is the default, and the only one."""
    subject = (await signed_in(api))["access_token"]
    assert (await exchange(api, gateway, subject, requested_token_type=ACCESS_TOKEN)).status_code == 200
    assert (await exchange(api, gateway, subject, requested_token_type="")).status_code == 200


@pytest.mark.rfc("8693", "2.1")
async def test_the_subject_is_read_as_the_type_it_is_said_to_be(api: Service, gateway: Registered) -> None:
    """A key is no access token, and an access token no key."""
    key, token = await a_key(api, await api.a_user()), (await signed_in(api))["access_token"]
    refusal(await exchange(api, gateway, key, subject_token_type=ACCESS_TOKEN), "invalid_grant", key.text)
    refusal(await exchange(api, gateway, token, subject_token_type=API_KEY), "invalid_grant", token)
    refresh = (await signed_in(api))["refresh_token"]
    refusal(await exchange(api, gateway, refresh), "invalid_grant", refresh)


@pytest.mark.rfc("8693", "2.1")
async def test_only_a_confidential_client_that_is_registered_for_it_may_exchange(api: Service) -> None:
    """A public client has not proven who would become the actor."""
    subject = (await signed_in(api))["access_token"]
    other = await api.a_client(introspect=(ISSUER,))
    refusal(await exchange(api, other, subject), "unauthorized_client", subject)
    gateway = await an_exchanger(api)
    await api.execute(update(clients).where(clients.c.id == gateway.id).values(token_endpoint_auth_method="none"))
    public = Registered(gateway.id, None)
    form = {"subject_token": subject, "subject_token_type": ACCESS_TOKEN}
    refusal(await api.token(public, grant_type=EXCHANGE, **form), "unauthorized_client", subject)


# -- target (§2.1, RFC 8707) ------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.case("TOK-08")
async def test_resource_and_audience_both_name_targets(api: Service) -> None:
    """Each may be repeated, and both may be used; unasked, the first that is registered is meant."""
    client = await an_exchanger(api, exchange_audiences=(SIBLING, BILLS))
    key = await a_key(api, await api.a_user())
    assert (await claims_of(api, client, key))["aud"] == SIBLING
    assert (await claims_of(api, client, key, resources=[BILLS]))["aud"] == BILLS
    assert (await claims_of(api, client, key, audiences=[BILLS]))["aud"] == BILLS
    assert (await claims_of(api, client, key, resources=[BILLS], audiences=[BILLS]))["aud"] == BILLS
    assert (await claims_of(api, client, key, resources=[BILLS], audiences=[SIBLING]))["aud"] == [BILLS, SIBLING]
    assert (await claims_of(api, client, key, audiences=[SIBLING, BILLS]))["aud"] == [SIBLING, BILLS]


@pytest.mark.rfc("8693", "2.2.2")
@pytest.mark.case("TEX-05")
@pytest.mark.parametrize("name", ["resources", "audiences"])
@pytest.mark.parametrize(
    "target", [ISSUER, BILLS, f"{SIBLING}/", SIBLING.upper(), "orders", "*", f"{SIBLING}#x", f"{SIBLING} {BILLS}"]
)
async def test_a_target_that_the_client_may_not_exchange_for_is_refused(
    api: Service, gateway: Registered, name: str, target: str
) -> None:
    """Neither its own audiences nor the subject's count, and one wrong target spoils a right one; nothing is noted."""
    subject, key = (await signed_in(api))["access_token"], await a_key(api, await api.a_user())
    for targets in ([target], [SIBLING, target]):
        refusal(await exchange(api, gateway, subject, **{name: targets}), "invalid_target", subject)
        refusal(await exchange(api, gateway, key, **{name: targets}), "invalid_target", key.text)
    [row] = await api.execute(select(api_keys.c.last_used_at))
    assert row.last_used_at is None


@pytest.mark.rfc("8693", "2.2.2")
@pytest.mark.case("TEX-05")
async def test_a_client_without_registered_targets_exchanges_nothing(api: Service) -> None:
    """Not even for the audiences it may ask tokens for itself."""
    client = await an_exchanger(api, exchange_audiences=())
    key = await a_key(api, await api.a_user())
    refusal(await exchange(api, client, key), "invalid_target", key.text)
    refusal(await exchange(api, client, key, resources=[SIBLING]), "invalid_target", key.text)


@pytest.mark.rfc("8693", "2.2.2")
@pytest.mark.case("TEX-05")
async def test_the_issuer_is_a_target_only_where_it_is_registered_and_never_beside_another(api: Service) -> None:
    """A token for a sibling must be useless at our own API, and the reverse."""
    client = await an_exchanger(api, exchange_audiences=(SIBLING, ISSUER))
    key = await a_key(api, await api.a_user())
    assert (await claims_of(api, client, key, resources=[ISSUER]))["aud"] == ISSUER
    refusal(await exchange(api, client, key, resources=[ISSUER, SIBLING]), "invalid_target", key.text)
    refusal(await exchange(api, client, key, resources=[ISSUER], audiences=[SIBLING]), "invalid_target", key.text)


async def test_other_grants_ignore_audience(api: Service) -> None:
    """It is a parameter of this grant only; `resource` is everybody's."""
    client = await api.a_client(audiences=(SIBLING,))
    token = (await api.token(client, grant_type="client_credentials", audience=BILLS)).json()["access_token"]
    assert unverified_claims(token)["aud"] == SIBLING


# -- scope ------------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.case("TEX-05")
async def test_scope_is_what_subject_client_and_owner_have_in_common(api: Service) -> None:
    """Asked for more than the first two, it is refused; what the owner may no more is left out."""
    gateway = await an_exchanger(api, scope=("orders:read", "orders:write", "account:read"))
    person = await api.a_user()  # whose role holds no orders:write
    key = await a_key(api, person, "orders:read", "orders:write", "account:write")
    assert (await claims_of(api, gateway, key))["scope"] == "orders:read"
    assert (await claims_of(api, gateway, key, scope="orders:read"))["scope"] == "orders:read"
    assert (await claims_of(api, gateway, key, scope="orders:write orders:read"))["scope"] == "orders:read"
    refusal(await exchange(api, gateway, key, scope="account:read"), "invalid_scope", key.text)  # not the key's
    refusal(await exchange(api, gateway, key, scope="account:write"), "invalid_scope", key.text)  # not the client's
    refusal(await exchange(api, gateway, key, scope="orders:read users:read"), "invalid_scope", key.text)
    refusal(await exchange(api, gateway, key, scope="orders:read account:write"), "invalid_scope", key.text)

    subject = (await signed_in(api, scope="orders:read account:read"))["access_token"]
    assert set((await claims_of(api, gateway, subject))["scope"].split()) == {"orders:read", "account:read"}
    refusal(await exchange(api, gateway, subject, scope="orders:write"), "invalid_scope", subject)
    refusal(await exchange(api, gateway, subject, scope="account:write"), "invalid_scope", subject)


@pytest.mark.rfc("8693", "2.2.2")
@pytest.mark.case("TEX-05")
async def test_a_token_without_any_scope_is_not_issued(api: Service, gateway: Registered) -> None:
    """It would be good for nothing, and look as if it were good."""
    key = await a_key(api, await api.a_user(), "orders:write")  # which the person's role does not hold
    refusal(await exchange(api, gateway, key), "invalid_scope", key.text)
    refusal(await exchange(api, gateway, key, scope="orders:write"), "invalid_scope", key.text)
    stranger = await an_exchanger(api, scope=("reports:read",))
    subject = (await signed_in(api))["access_token"]
    refusal(await exchange(api, stranger, subject), "invalid_scope", subject)


@pytest.mark.case("KEY-03")
@pytest.mark.case("TEX-05")
async def test_what_an_owner_loses_its_keys_lose(api: Service, gateway: Registered) -> None:
    """A person by their role, a service by its registration, within the second that rows may be old."""
    await api.a_user()  # the role `user` holds orders:read from now on
    person = await api.a_user(role="admin")
    await api.within(lambda tx: api.services.access.grant(tx, "admin", ["orders:write"]))
    key = await a_key(api, person, "orders:read", "orders:write")
    assert set((await claims_of(api, gateway, key))["scope"].split()) == {"orders:read", "orders:write"}
    await api.patch_user(person, role="user")
    assert (await claims_of(api, gateway, key))["scope"] == "orders:read"

    owner = await api.a_client(scope=("orders:read", "orders:write"))
    key = await a_key(api, owner, "orders:read", "orders:write")
    token = (await api.token(owner, grant_type="client_credentials", resource=SIBLING)).json()["access_token"]
    await api.execute(update(clients).where(clients.c.id == owner.id).values(scope="orders:read"))
    api.clock.advance(1)  # type: ignore[attr-defined]
    for subject in (key, token):
        assert (await claims_of(api, gateway, subject))["scope"] == "orders:read"


# -- actor tokens (§2.1) ----------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.case("TEX-10")
async def test_an_actor_token_changes_nothing_and_must_be_the_clients_own(api: Service, gateway: Registered) -> None:
    """The client has proven who it is; the actor is that client, with or without saying so."""
    subject = (await signed_in(api))["access_token"]
    own = (await api.token(gateway, grant_type="client_credentials")).json()["access_token"]
    after = await claims_of(api, gateway, subject, actor_token=own, actor_token_type=ACCESS_TOKEN)
    assert after["act"] == {"sub": gateway.id}


@pytest.mark.rfc("8693", "2.1")
@pytest.mark.case("TEX-10")
async def test_an_actor_token_and_its_type_need_each_other(api: Service, gateway: Registered) -> None:
    """§2.1: the type is required with the token and must not stand there without it."""
    subject = (await signed_in(api))["access_token"]
    own = (await api.token(gateway, grant_type="client_credentials")).json()["access_token"]
    for form in (
        {"actor_token": own},
        {"actor_token_type": ACCESS_TOKEN},
        {"actor_token": own, "actor_token_type": f"{TYPES}jwt"},
        {"actor_token": own, "actor_token_type": API_KEY},
    ):
        refusal(await exchange(api, gateway, subject, **form), "invalid_request", own)


@pytest.mark.rfc("8693", "2.2.2")
@pytest.mark.case("TEX-09")
@pytest.mark.case("TEX-10")
async def test_nobody_else_can_be_named_as_the_actor(api: Service) -> None:
    """Not a person, not another client, not by a token that is forged, dead, or was itself exchanged."""
    gateway = await an_exchanger(api, first_party=True, grant_types=(EXCHANGE, "client_credentials", "password"))
    of_own_person = (await api.sign_in(gateway, await api.a_user()))["access_token"]
    subject = (await signed_in(api))["access_token"]
    other = await an_exchanger(api)
    own = (await api.token(gateway, grant_type="client_credentials")).json()["access_token"]
    of_others = (await api.token(other, grant_type="client_credentials")).json()["access_token"]
    revoked = (await api.token(gateway, grant_type="client_credentials")).json()["access_token"]
    assert (await api.revoke(gateway, revoked)).status_code == 200
    by_exchange = await exchanged(api, gateway, own)
    of_key = await exchanged(api, gateway, await a_key(api, gateway))
    of_person = (await signed_in(api))["access_token"]
    actors = (of_person, of_own_person, of_others, own[:-8] + "AAAAAAAA", "nonsense", revoked, by_exchange, of_key)
    for actor in actors:
        answer = await exchange(api, gateway, subject, actor_token=actor, actor_token_type=ACCESS_TOKEN)
        refusal(answer, "invalid_request", actor)


@pytest.mark.rfc("8693", "4.4")
@pytest.mark.case("TEX-09")
async def test_there_is_no_way_to_become_somebody_without_a_token_of_theirs(api: Service, gateway: Registered) -> None:
    """Parameters that other servers know for it are ignored; who is named in them plays no part."""
    admin = await api.a_user("boss", role="super_admin")
    subject = (await signed_in(api))["access_token"]
    before = unverified_claims(subject)
    form = {"requested_subject": str(admin.id), "sub": str(admin.id), "act": f'{{"sub":"{admin.id}"}}', "may_act": "x"}
    after = await claims_of(api, gateway, subject, **form)
    assert (after["sub"], after["roles"], after["act"]) == (before["sub"], before["roles"], {"sub": gateway.id})
    assert "may_act" not in after
    own = (await api.token(gateway, grant_type="client_credentials")).json()["access_token"]
    assert (await claims_of(api, gateway, own, requested_subject=str(admin.id)))["sub"] == gateway.id


# -- whose tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.2.2")
@pytest.mark.case("TEX-02")
async def test_a_client_exchanges_only_tokens_it_may_consume(api: Service) -> None:
    """Its own, and those for an audience that it may introspect; a token it merely saw is none of these."""
    subject = (await signed_in(api, resource=SIBLING))["access_token"]
    for introspect in ((), (ISSUER,), (BILLS,)):
        refusal(await exchange(api, await an_exchanger(api, introspect=introspect), subject), "invalid_grant", subject)
    assert (await exchange(api, await an_exchanger(api, introspect=(SIBLING,)), subject)).status_code == 200
    alone = await an_exchanger(api, introspect=())
    own = (await api.token(alone, grant_type="client_credentials")).json()["access_token"]
    assert (await exchange(api, alone, own)).status_code == 200


# -- chains (§4.1) ----------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "4.1")
@pytest.mark.case("TEX-06")
async def test_the_chain_of_actors_is_kept_and_ends_after_four(api: Service) -> None:
    """The newest is outermost; the fifth exchange is refused."""
    hops = [await an_exchanger(api, name=f"Hop {number}") for number in range(5)]
    token = (await signed_in(api))["access_token"]
    names: list[str] = [unverified_claims(token)["jti"]]
    act: dict[str, Any] | None = None
    for hop in hops[:4]:
        token = await exchanged(api, hop, token)
        claims = unverified_claims(token)
        act = {"sub": hop.id} if act is None else {"sub": hop.id, "act": act}
        assert (claims["act"], claims["client_id"], claims["parents"]) == (act, hop.id, names)
        assert await is_active(api, hop, token)
        names = [claims["jti"], *names]
    refusal(await exchange(api, hops[4], token), "invalid_request", token)


@pytest.mark.rfc("8693", "4.1")
@pytest.mark.case("TEX-06")
async def test_scope_that_was_lost_on_the_way_never_comes_back(api: Service) -> None:
    """A wide token narrowed by B stays narrow when it returns to A."""
    wide = await an_exchanger(api, name="A")
    narrow = await an_exchanger(api, name="B", scope=("orders:read",))
    subject = (await signed_in(api))["access_token"]
    assert "account:write" in (await claims_of(api, wide, subject))["scope"]
    through_b = await exchanged(api, narrow, await exchanged(api, wide, subject))
    assert unverified_claims(through_b)["scope"] == "orders:read"
    back = await exchange(api, wide, through_b)
    assert back.json()["scope"] == "orders:read"
    refusal(await exchange(api, wide, through_b, scope="orders:read account:write"), "invalid_scope", through_b)
    asked = await exchanged(api, wide, subject, scope="account:read")
    refusal(await exchange(api, wide, asked, scope="account:write"), "invalid_scope", asked)


@pytest.mark.case("TEX-06")
async def test_life_and_key_are_handed_down_the_chain(api: Service, gateway: Registered) -> None:
    """The second token ends no later than the first, and still names the key and its owner."""
    person = await api.a_user()
    key = await a_key(api, person)
    first = await exchanged(api, gateway, key)
    api.clock.advance(60)  # type: ignore[attr-defined]
    other = await an_exchanger(api, introspect=(SIBLING,), access_token_ttl=3600)
    second = await claims_of(api, other, first)
    assert second["exp"] == unverified_claims(first)["exp"]
    assert (second["sub"], second["key_id"], second["amr"]) == (str(person.id), key.id, ["api_key"])
    assert second["roles"] == ["user"]
    assert second["act"] == {"sub": other.id, "act": {"sub": gateway.id}}


# -- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8693", "2.1")
async def test_the_metadata_lists_the_grant(api: Service) -> None:
    """It is always on."""
    listed = (await api.http.get("/.well-known/oauth-authorization-server")).json()["grant_types_supported"]
    assert EXCHANGE in listed
