"""RFC 6749 §6: refreshing an access token; and the leniency for a client that lost an answer."""

from typing import Any

import pytest
from sqlalchemy import delete, select, update

from identity_service.infra.tables import audit_events, clients, refresh_families, signing_keys, users
from identity_service.main import step_keys
from identity_service.oauth.signing_keys import NoUsableKey
from tests.support.reading import key_id, refused, unverified_claims
from tests.support.service import ISSUER, SIBLING, Registered, Service

DAY = 86400
KEY, NEXT_KEY = "k" * 16, "n" * 255
DEAD = "The refresh token is not valid."
REUSED = "refresh token reuse detected; session revoked"


@pytest.fixture(params=["service", "embedded"])
def either(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL with Redis, then on SQLite with limits in memory."""
    found: Service = request.getfixturevalue(request.param)
    return found


async def signed_in(service: Service, **client: Any) -> tuple[Registered, dict[str, Any]]:
    """Return a client and the tokens of a sign-in of a new user."""
    registered = await service.a_client(**client)
    return registered, await service.sign_in(registered, await service.a_user())


async def good(service: Service, client: Registered, token: str, **how: Any) -> dict[str, Any]:
    """Refresh, insist on success, and return the answer's body."""
    answer = await service.refresh(client, token, **how)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def audited(service: Service) -> list[str]:
    """Return every event that was audited, oldest first."""
    rows = await service.execute(select(audit_events.c.event).order_by(audit_events.c.id))
    return [row.event for row in rows]


# -- the exchange -----------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "6")
@pytest.mark.case("REF-01")
async def test_a_refresh_answers_with_a_new_pair(either: Service) -> None:
    """One row per family moves on: new tokens, the same session, the same person, the same sign-in."""
    client, first = await signed_in(either)
    before = unverified_claims(first["access_token"])
    either.clock.advance(100)
    answer = await either.refresh(client, first["refresh_token"])
    second = answer.json()

    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert set(second) == {"access_token", "token_type", "expires_in", "refresh_token", "scope"}
    assert second["token_type"] == "Bearer"
    assert second["scope"] == first["scope"]
    assert second["refresh_token"] != first["refresh_token"]
    after = unverified_claims(second["access_token"])
    assert after["jti"] != before["jti"]
    assert after["iat"] == before["iat"] + 100
    same = ("iss", "sub", "aud", "client_id", "sid", "auth_time", "amr", "roles", "scope")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    (row,) = await either.family_rows()
    assert (str(row.id), row.generation, row.revoked_at) == (before["sid"], 1, None)
    assert (await either.me(second["access_token"])).status_code == 200


@pytest.mark.rfc("6749", "6")
async def test_a_refresh_leaves_the_previous_access_token_alone(service: Service) -> None:
    """It expires by itself; requests in flight must not fail."""
    client, first = await signed_in(service)
    await good(service, client, first["refresh_token"])
    assert (await service.me(first["access_token"])).status_code == 200


async def test_a_chain_of_refreshes_stays_one_row_and_writes_no_audit_row(either: Service) -> None:
    """However often a family is refreshed."""
    client, tokens = await signed_in(either)
    token, seen = tokens["refresh_token"], {tokens["refresh_token"]}
    for _ in range(12):
        token = (await good(either, client, token))["refresh_token"]
        seen.add(token)
    assert len(seen) == 13
    (row,) = await either.family_rows()
    assert row.generation == 12
    assert await audited(either) == ["grant.password"]


@pytest.mark.rfc("6749", "6")
@pytest.mark.parametrize("public", [True, False])
async def test_public_and_confidential_clients_both_refresh(service: Service, public: bool) -> None:
    """A public client has nothing but its id to show; rotation is what protects it (RFC 9700 §4.14.2)."""
    client, tokens = await signed_in(service, public=public)
    assert (await good(service, client, tokens["refresh_token"]))["refresh_token"]


async def test_a_client_without_the_grant_gets_no_refresh_token(service: Service) -> None:
    """The session exists all the same: its id is the access token's `sid`."""
    client, tokens = await signed_in(service, grant_types=("password",))
    assert "refresh_token" not in tokens
    (row,) = await service.family_rows()
    assert unverified_claims(tokens["access_token"])["sid"] == str(row.id)
    refused(await service.refresh(client, "rt_whatever"), "unauthorized_client")


@pytest.mark.rfc("6749", "6")
async def test_a_missing_refresh_token_is_an_invalid_request(service: Service) -> None:
    """An empty one counts as missing."""
    client = await service.a_client()
    refused(await service.token(client, grant_type="refresh_token"), "invalid_request")
    refused(await service.refresh(client, ""), "invalid_request")


@pytest.mark.rfc("6749", "6")
async def test_failed_client_authentication_consumes_nothing(service: Service) -> None:
    """A wrong secret, no secret and no client leave the token, and do not reveal a replay."""
    client, tokens = await signed_in(service)
    first = tokens["refresh_token"]
    second = (await good(service, client, first))["refresh_token"]
    for who in (Registered(client.id, "cs_wrong"), Registered(client.id, None), None):
        for token in (first, second):
            refused(await service.refresh(who, token), "invalid_client", 401)
    await good(service, client, second)


async def test_an_answer_that_cannot_be_signed_consumes_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The access token is signed before the commit."""
    client, tokens = await signed_in(service)

    def no_key(*_: object, **__: object) -> str:
        raise NoUsableKey

    with monkeypatch.context() as patched:
        patched.setattr(type(service.services.signing_keys), "sign", no_key)
        answer = await service.refresh(client, tokens["refresh_token"])
        refused(answer, "temporarily_unavailable", 503)
        assert "retry-after" in answer.headers
    await good(service, client, tokens["refresh_token"])


@pytest.mark.case("REF-29")
async def test_an_imitation_is_an_invalid_grant(service: Service) -> None:
    """Altered, cut, longer, another case, another kind of token, another prefix: all the same answer."""
    client, tokens = await signed_in(service)
    token, access = tokens["refresh_token"], tokens["access_token"]
    last = "0" if token[-1] != "0" else "1"
    imitations = [token[:-1] + last, token[:-1], token + "A", token + " ", token + "\n", token.swapcase(), "rt_", "x"]
    imitations += ["cs_" + token[3:], token[3:], access, client.secret, client.id, "é"]
    for imitation in imitations:
        assert refused(await service.refresh(client, imitation), "invalid_grant") == DEAD
    assert await audited(service) == ["grant.password"]
    await good(service, client, token)


@pytest.mark.case("REF-30")
async def test_a_refresh_token_is_no_bearer_token(service: Service) -> None:
    """Our own API takes access tokens only."""
    _, tokens = await signed_in(service)
    answer = await service.me(tokens["refresh_token"])
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


# -- scope and target -------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "6")
@pytest.mark.case("REF-16")
async def test_a_narrower_scope_narrows_this_access_token_only(service: Service) -> None:
    """The next refresh without a scope has the original one."""
    client, tokens = await signed_in(service)
    narrow = await good(service, client, tokens["refresh_token"], scope="orders:read")
    assert narrow["scope"] == unverified_claims(narrow["access_token"])["scope"] == "orders:read"
    wide = await good(service, client, narrow["refresh_token"])
    assert wide["scope"] == unverified_claims(wide["access_token"])["scope"] == tokens["scope"]


@pytest.mark.rfc("6749", "6")
@pytest.mark.case("REF-15")
@pytest.mark.parametrize(
    "scope",
    ["orders:write", "account:read orders:write", "admin", "openid", "offline_access", "ORDERS:READ", "a\\b", "  "],
)
async def test_a_scope_that_was_not_granted_consumes_nothing(either: Service, scope: str) -> None:
    """The family was granted less than its client may ask for."""
    client = await either.a_client()
    tokens = await either.sign_in(client, await either.a_user(), scope="account:read orders:read")
    refused(await either.refresh(client, tokens["refresh_token"], scope=scope), "invalid_scope")
    (row,) = await either.family_rows()
    assert row.generation == 0
    await good(either, client, tokens["refresh_token"])


@pytest.mark.rfc("8707", "2")
@pytest.mark.parametrize(
    "resource",
    [["https://unknown.example"], [ISSUER], [SIBLING, ISSUER], [SIBLING + "/"], ["not a uri"], [SIBLING, "x"]],
)
async def test_a_target_that_was_not_granted_consumes_nothing(either: Service, resource: list[str]) -> None:
    """The family was granted the sibling only, and what its client may ask for is more."""
    client = await either.a_client()
    tokens = await either.sign_in(client, await either.a_user(), resource=SIBLING)
    refused(await either.refresh(client, tokens["refresh_token"], resource=resource), "invalid_target")
    (row,) = await either.family_rows()
    assert row.generation == 0
    second = await good(either, client, tokens["refresh_token"])
    assert unverified_claims(second["access_token"])["aud"] == SIBLING


@pytest.mark.rfc("8707", "2.2")
async def test_a_refresh_chooses_among_the_granted_targets(service: Service) -> None:
    """Each access token is for one of them; the issuer is never combined with another."""
    client, tokens = await signed_in(service)
    sibling = await good(service, client, tokens["refresh_token"], resource=SIBLING)
    assert unverified_claims(sibling["access_token"])["aud"] == SIBLING
    assert (await service.me(sibling["access_token"])).status_code == 401
    refused(await service.refresh(client, sibling["refresh_token"], resource=[ISSUER, SIBLING]), "invalid_target")
    plain = await good(service, client, sibling["refresh_token"])
    assert unverified_claims(plain["access_token"])["aud"] == ISSUER


async def test_a_family_keeps_the_targets_it_was_granted(service: Service) -> None:
    """What a client may ask for later is for later sign-ins."""
    client, tokens = await signed_in(service, audiences=(ISSUER,))
    clients = service.services.clients
    stored = await service.within(lambda tx: clients.find(tx, client.id))
    assert stored is not None
    await service.within(lambda tx: clients.update(tx, stored, {"audiences": (SIBLING,)}))
    refused(await service.refresh(client, tokens["refresh_token"], resource=SIBLING), "invalid_target")
    second = await good(service, client, tokens["refresh_token"])
    assert unverified_claims(second["access_token"])["aud"] == ISSUER


async def test_what_a_role_loses_is_gone_at_the_next_refresh(service: Service) -> None:
    """And comes back when the role gets it back: the family keeps what was asked for at the sign-in."""
    client, tokens = await signed_in(service)
    access = service.services.access
    assert "orders:read" in tokens["scope"].split()
    await service.within(lambda tx: access.withdraw(tx, "user", ("orders:read",)))
    second = await good(service, client, tokens["refresh_token"])
    assert "orders:read" not in second["scope"].split()
    assert unverified_claims(second["access_token"])["scope"] == second["scope"]
    await service.within(lambda tx: access.grant(tx, "user", ("orders:read",)))
    assert (await good(service, client, second["refresh_token"]))["scope"] == tokens["scope"]


async def test_another_role_counts_from_the_next_refresh_on(service: Service) -> None:
    """The token names the role of now and holds no more than that role does; nobody gains by a promotion either."""
    client, user = await service.a_client(), await service.a_user()
    access = service.services.access
    await service.within(lambda tx: access.grant(tx, "moderator", ("orders:write",)))
    tokens = await service.sign_in(client, user)
    await service.patch_user(user, role="moderator")
    second = await good(service, client, tokens["refresh_token"])
    assert unverified_claims(second["access_token"])["roles"] == ["moderator"]
    held = await service.within(lambda tx: access.scopes_of(tx, "moderator"))
    assert set(second["scope"].split()) == set(tokens["scope"].split()) & held
    assert "orders:write" not in second["scope"].split()


async def test_what_a_client_loses_is_gone_at_the_next_refresh(service: Service) -> None:
    """Within the second that its row may be cached."""
    client, tokens = await signed_in(service)
    await service.execute(update(clients).where(clients.c.id == client.id).values(scope="orders:read"))
    service.clock.advance(1)
    assert (await good(service, client, tokens["refresh_token"]))["scope"] == "orders:read"


# -- Idempotency-Key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [b"k" * 15],
        [b"k" * 256],
        [b""],
        [b"kkkkkkkk kkkkkkkk"],
        [b"kkkkkkkk\tkkkkkkkk"],
        [b"k" * 15 + b"\xe9"],
        [b"k" * 15 + b"\x7f"],
        ["ключ-ключ-ключ-ключ".encode()],
        [b"k" * 16, b"k" * 16],
        [b"k" * 16, b"n" * 16],
        [b"k" * 16, b""],
    ],
)
async def test_a_key_that_cannot_be_used_consumes_nothing(service: Service, values: list[bytes]) -> None:
    """One header, 16 to 255 visible ASCII characters."""
    client, tokens = await signed_in(service)
    answer = await service.http.post(
        "/token",
        data={"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]},
        auth=client.auth,
        headers=[(b"idempotency-key", value) for value in values],
    )
    assert "Idempotency-Key" in refused(answer, "invalid_request")
    (row,) = await service.family_rows()
    assert (row.generation, row.revoked_at) == (0, None)
    await good(service, client, tokens["refresh_token"])


@pytest.mark.parametrize("key", ["!" * 16, "~" * 255, "0123456789abcdef", '"0123456789abcde"'])
async def test_a_key_of_the_right_form_is_taken(service: Service, key: str) -> None:
    """From the shortest to the longest, with any visible letter."""
    client, tokens = await signed_in(service)
    second = await good(service, client, tokens["refresh_token"], key=key)
    again = await good(service, client, tokens["refresh_token"], key=key)
    assert again["refresh_token"] == second["refresh_token"]


async def test_other_grants_ignore_the_key(service: Service) -> None:
    """Even one of an impossible form."""
    client, user = await service.a_client(), await service.a_user()
    for key in ("short", KEY):
        headers = {"idempotency-key": key}
        answer = await service.token(client, headers=headers, grant_type="client_credentials")
        assert answer.status_code == 200
        password = {"username": user.username, "password": "correct horse battery staple"}
        answer = await service.token(client, headers=headers, grant_type="password", **password)
        assert answer.status_code == 200


async def test_the_same_key_and_token_yield_the_same_successor(either: Service) -> None:
    """With a fresh access token each time, hours later still, and without a trace in the database."""
    client, tokens = await signed_in(either)
    second = await good(either, client, tokens["refresh_token"], key=KEY)
    (before,) = await either.family_rows()
    jtis = {unverified_claims(second["access_token"])["jti"]}
    for _ in range(3):
        either.clock.advance(DAY)
        again = await good(either, client, tokens["refresh_token"], key=KEY)
        assert again["refresh_token"] == second["refresh_token"]
        jtis.add(unverified_claims(again["access_token"])["jti"])
    assert len(jtis) == 4
    (after,) = await either.family_rows()
    assert after == before
    assert await audited(either) == ["grant.password"]
    await good(either, client, second["refresh_token"])


async def test_a_retry_is_narrowed_afresh(service: Service) -> None:
    """Scope and resource are not part of what is compared; what is too wide is refused and changes nothing."""
    client, tokens = await signed_in(service)
    first = tokens["refresh_token"]
    second = await good(service, client, first, key=KEY, scope="orders:read")
    retry = await good(service, client, first, key=KEY, resource=SIBLING)
    assert retry["refresh_token"] == second["refresh_token"]
    assert retry["scope"] == tokens["scope"]
    assert unverified_claims(retry["access_token"])["aud"] == SIBLING
    refused(await service.refresh(client, first, key=KEY, scope="orders:write admin"), "invalid_scope")
    refused(await service.refresh(client, first, key=KEY, resource="https://x.example"), "invalid_target")
    assert (await good(service, client, first, key=KEY))["refresh_token"] == second["refresh_token"]


async def test_the_previous_key_with_the_current_token_changes_nothing(either: Service) -> None:
    """A key is for one rotation: the mistake is told, and both the token and the permitted retry stay good."""
    client, tokens = await signed_in(either)
    first = tokens["refresh_token"]
    second = (await good(either, client, first, key=KEY))["refresh_token"]
    (before,) = await either.family_rows()
    for _ in range(2):
        refused(await either.refresh(client, second, key=KEY), "invalid_request")
    assert await either.family_rows() == [before]
    assert (await good(either, client, first, key=KEY))["refresh_token"] == second
    assert (await good(either, client, second, key=NEXT_KEY))["refresh_token"] != second


async def test_a_new_key_for_each_rotation_always_works(service: Service) -> None:
    """And each of them admits a retry of its own rotation."""
    client, tokens = await signed_in(service)
    token = tokens["refresh_token"]
    for number in range(5):
        key = f"rotation-number-{number}"
        successor = (await good(service, client, token, key=key))["refresh_token"]
        assert (await good(service, client, token, key=key))["refresh_token"] == successor
        token = successor


async def test_a_rotation_without_a_key_forgets_the_key_before(service: Service) -> None:
    """The key of the rotation before last is worth nothing."""
    client, tokens = await signed_in(service)
    second = (await good(service, client, tokens["refresh_token"], key=KEY))["refresh_token"]
    third = (await good(service, client, second))["refresh_token"]
    assert refused(await service.refresh(client, second, key=KEY), "invalid_grant") == REUSED
    refused(await service.refresh(client, third), "invalid_grant")


async def test_the_row_keeps_no_readable_key(service: Service) -> None:
    """Nor anything that the key alone leads to: two families with one key have different digests."""
    client = await service.a_client()
    for _ in range(2):
        tokens = await service.sign_in(client, await service.a_user())
        await good(service, client, tokens["refresh_token"], key=KEY)
    digests = {row.retry_digest for row in await service.family_rows()}
    assert len(digests) == 2
    assert all(KEY.encode() not in digest and len(digest) == 32 for digest in digests)


# -- the retry window -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("elapsed", "admitted"), [(0, True), (9.9, True), (-5, True), (10, False), (11, False)])
async def test_the_retry_window_admits_the_predecessor(either: Service, elapsed: float, admitted: bool) -> None:
    """For as long as the client was given; a clock that went back counts as no time."""
    client, tokens = await signed_in(either, refresh_retry_window=10)
    either.clock.advance(60)
    second = (await good(either, client, tokens["refresh_token"]))["refresh_token"]
    either.clock.advance(elapsed)
    answer = await either.refresh(client, tokens["refresh_token"])
    if admitted:
        assert answer.status_code == 200
        assert answer.json()["refresh_token"] == second
        await good(either, client, second)
    else:
        assert refused(answer, "invalid_grant") == REUSED
        refused(await either.refresh(client, second), "invalid_grant")


async def test_the_retry_window_belongs_to_one_client(service: Service) -> None:
    """Strict is the default; a neighbour's window changes nothing for the others."""
    lenient, strict = await service.a_client(refresh_retry_window=60), await service.a_client()
    user = await service.a_user()
    firsts = {}
    for client in (lenient, strict):
        firsts[client.id] = (await service.sign_in(client, user))["refresh_token"]
        await good(service, client, firsts[client.id])
    await good(service, lenient, firsts[lenient.id])
    assert refused(await service.refresh(strict, firsts[strict.id]), "invalid_grant") == REUSED


async def test_the_window_is_for_the_predecessor_only(service: Service) -> None:
    """Two generations back is reuse, the same second or not."""
    client, tokens = await signed_in(service, refresh_retry_window=60)
    second = (await good(service, client, tokens["refresh_token"]))["refresh_token"]
    third = (await good(service, client, second))["refresh_token"]
    assert refused(await service.refresh(client, tokens["refresh_token"]), "invalid_grant") == REUSED
    refused(await service.refresh(client, third), "invalid_grant")


# -- lifetimes --------------------------------------------------------------------------------------------------------


@pytest.mark.case("REF-19")
async def test_an_idle_family_expires_and_is_not_called_reused(either: Service) -> None:
    """At the very instant, without an audit row and without being revoked."""
    client, tokens = await signed_in(either)
    either.clock.advance(14 * DAY)
    assert refused(await either.refresh(client, tokens["refresh_token"]), "invalid_grant") == DEAD
    (row,) = await either.family_rows()
    assert (row.generation, row.revoked_at) == (0, None)
    assert await audited(either) == ["grant.password"]


async def test_each_refresh_gives_the_full_idle_time_again(either: Service) -> None:
    """A second before its end is soon enough, and counts from then on."""
    client, tokens = await signed_in(either)
    token = tokens["refresh_token"]
    for _ in range(2):
        either.clock.advance(14 * DAY - 1)
        token = (await good(either, client, token))["refresh_token"]


@pytest.mark.case("REF-18")
async def test_the_absolute_end_never_moves(either: Service) -> None:
    """Refreshed every minute, no successor outlives the family's first day, and at that instant it is over."""
    client, tokens = await signed_in(either, refresh_idle_ttl=120, refresh_absolute_ttl=600)
    end = either.clock.now().timestamp() + 600
    token = tokens["refresh_token"]
    for _ in range(9):
        either.clock.advance(60)
        token = (await good(either, client, token))["refresh_token"]
        (row,) = await either.family_rows()
        assert row.absolute_expires_at.timestamp() == end
        assert row.idle_expires_at.timestamp() == min(end, either.clock.now().timestamp() + 120)
    either.clock.advance(59.999)
    token = (await good(either, client, token))["refresh_token"]
    either.clock.advance(0.001)
    assert refused(await either.refresh(client, token), "invalid_grant") == DEAD


async def test_a_retry_does_not_outlive_the_family(service: Service) -> None:
    """By key or in the window: past the end it is expired, and that is not reuse."""
    client, tokens = await signed_in(service, refresh_idle_ttl=60, refresh_absolute_ttl=60, refresh_retry_window=60)
    service.clock.advance(59)
    await good(service, client, tokens["refresh_token"], key=KEY)
    service.clock.advance(1)
    for key in (None, KEY):
        assert refused(await service.refresh(client, tokens["refresh_token"], key=key), "invalid_grant") == DEAD
    assert await audited(service) == ["grant.password"]


@pytest.mark.case("REF-20")
async def test_an_expired_token_that_was_used_is_reuse_all_the_same(service: Service) -> None:
    """Unused it has merely expired; used, it is told and audited once, even when nobody lives on it any more."""
    client = await service.a_client()
    unused = (await service.sign_in(client, await service.a_user()))["refresh_token"]
    used = (await service.sign_in(client, await service.a_user()))["refresh_token"]
    await good(service, client, used)
    service.clock.advance(15 * DAY)
    assert refused(await service.refresh(client, unused), "invalid_grant") == DEAD
    assert await service.events("refresh.reuse_detected") == []
    assert refused(await service.refresh(client, used), "invalid_grant") == REUSED
    assert refused(await service.refresh(client, used), "invalid_grant") == DEAD
    assert len(await service.events("refresh.reuse_detected")) == 1


@pytest.mark.case("REF-34")
async def test_every_dead_token_gets_the_same_answer(service: Service) -> None:
    """Unknown, expired and revoked are told apart in the log only; reuse alone is told to the client."""
    client = await service.a_client()
    tokens = [(await service.sign_in(client, await service.a_user()))["refresh_token"] for _ in range(4)]
    gone, revoked, moved_on, expired = tokens
    (first, *_) = await service.family_rows()
    await service.execute(delete(refresh_families).where(refresh_families.c.id == first.id))
    assert (await service.http.post("/revoke", data={"token": revoked}, auth=client.auth)).status_code == 200
    await service.execute(update(users).where(users.c.username == "user3").values(epoch=users.c.epoch + 1))
    garbage = await service.refresh(client, "rt_garbage")
    answers = [garbage] + [await service.refresh(client, token) for token in (gone, revoked, moved_on)]
    service.clock.advance(14 * DAY)
    answers.append(await service.refresh(client, expired))
    assert {answer.content for answer in answers} == {garbage.content}
    names = {frozenset(answer.headers) for answer in answers}
    assert len(names) == 1
    assert refused(garbage, "invalid_grant") == DEAD


# -- signing keys -----------------------------------------------------------------------------------------------------


@pytest.mark.case("REF-27")
async def test_a_family_outlives_the_signing_key_it_was_born_under(service: Service) -> None:
    """Nothing in a refresh token depends on a signing key: rotated, retired and purged, the family goes on."""
    client, tokens = await signed_in(service)
    services = service.services
    old = key_id(tokens["access_token"])
    service.clock.advance(2 * DAY)
    await step_keys(services)
    await service.within(services.signing_keys.rotate)
    service.clock.advance(2 * DAY)
    await step_keys(services)
    second = await good(service, client, tokens["refresh_token"])
    assert key_id(second["access_token"]) != old
    service.clock.advance(DAY)
    await service.execute(delete(signing_keys).where(signing_keys.c.kid == old))
    await step_keys(services)
    third = await good(service, client, second["refresh_token"])
    assert key_id(third["access_token"]) == key_id(second["access_token"])
    assert unverified_claims(third["access_token"])["sid"] == unverified_claims(tokens["access_token"])["sid"]


async def test_a_refresh_token_is_opaque(service: Service) -> None:
    """It says nothing readable about the person, the client or the scope."""
    client, tokens = await signed_in(service)
    claims = unverified_claims(tokens["access_token"])
    token = tokens["refresh_token"]
    assert token.isascii()
    assert token.removeprefix("rt_").isalnum()
    for word in (client.id[3:], claims["sub"], claims["sid"], claims["sid"].replace("-", ""), "user1", "orders"):
        assert word not in token
