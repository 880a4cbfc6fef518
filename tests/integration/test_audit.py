"""The audit trail is written with the act or the act does not happen; strangers cannot flood it, nor write into it."""

import hashlib
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.database import Database, DatabaseUnavailable, Transaction
from identity_service.infra.tables import audit_events
from identity_service.main.jobs import flush_audit
from tests.support.people import signed_in, with_key
from tests.support.service import PASSWORD, Registered, Service, running, test_settings

ORIGIN = Origin("198.51.100.1", "0123456789abcdef")


@pytest.fixture
async def proxied(database_url: str, redis_url: str) -> AsyncIterator[Service]:
    """The service behind a proxy, so that a test can come from any network."""
    async with running(test_settings(database_url, redis_url=redis_url, trusted_proxies="127.0.0.1")) as service:
        yield service


async def forbid(service: Service, condition: str) -> None:
    """Make the database refuse audit rows for which the condition does not hold."""
    await service.execute(text(f"ALTER TABLE audit_events ADD CONSTRAINT planted CHECK ({condition}) NOT VALID"))


async def allow(service: Service) -> None:
    await service.execute(text("ALTER TABLE audit_events DROP CONSTRAINT planted"))


async def fail_client(service: Service, client_id: str, times: int, network: str = "198.51.100.1") -> None:
    """Present a wrong client secret."""
    for _ in range(times):
        answer = await service.http.post(
            "/token",
            data={"grant_type": "client_credentials"},
            auth=(client_id, "wrong"),
            headers={"x-forwarded-for": network},
        )
        assert answer.status_code == 401


# -- in the transaction of the act ------------------------------------------------------------------------------------


@pytest.mark.case("SEC-08")
async def test_a_sign_in_that_cannot_be_recorded_does_not_happen(service: Service) -> None:
    """No family, no token; what needs no row goes on."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    await forbid(service, "event <> 'grant.password'")
    answer = await service.token(client, grant_type="password", username=user.username, password=PASSWORD)
    assert answer.status_code >= 500
    assert "token" not in answer.json()
    assert await service.live_families(user) == 1
    assert (await service.me(tokens["access_token"])).status_code == 200
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200
    assert (await service.http.get("/.well-known/jwks.json")).status_code == 200


@pytest.mark.case("SEC-08")
async def test_a_revocation_that_cannot_be_recorded_does_not_happen(service: Service) -> None:
    """The client hears so, and may try again."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    await forbid(service, "event <> 'token.revoked'")
    form = {"token": tokens["refresh_token"]}
    assert (await service.http.post("/revoke", data=form, auth=client.auth)).status_code >= 500
    assert await service.live_families(user) == 1
    await allow(service)
    assert (await service.http.post("/revoke", data=form, auth=client.auth)).status_code == 200
    assert await service.live_families(user) == 0


@pytest.mark.case("SEC-08")
async def test_an_access_token_whose_revocation_cannot_be_recorded_lives_on(service: Service) -> None:
    """No audit, no change; the client hears so, and may try again."""
    client = await service.a_client()
    token = (await service.sign_in(client, await service.a_user()))["access_token"]
    await forbid(service, "event <> 'token.revoked'")
    assert (await service.revoke(client, token)).status_code >= 500
    assert (await service.me(token)).status_code == 200
    await allow(service)
    assert (await service.revoke(client, token)).status_code == 200
    assert (await service.me(token)).status_code == 401


@pytest.mark.case("SEC-08")
async def test_a_reuse_that_cannot_be_recorded_gives_nothing_away(service: Service) -> None:
    """The end of the family is rolled back with its row; the old token still buys nothing."""
    client, user = await service.a_client(), await service.a_user()
    old = (await service.sign_in(client, user))["refresh_token"]
    assert (await service.refresh(client, old)).status_code == 200
    await forbid(service, "event <> 'refresh.reuse_detected'")
    answer = await service.refresh(client, old)
    assert answer.status_code >= 500
    assert "token" not in answer.json()
    assert await service.live_families(user) == 1
    await allow(service)
    assert (await service.refresh(client, old)).status_code == 400
    assert await service.live_families(user) == 0


# -- what a row says --------------------------------------------------------------------------------------------------


@pytest.mark.case("SEC-04")
async def test_each_event_says_when_who_where_and_which_request(proxied: Service) -> None:
    """Success, failure, reuse, revocation and a client that could not prove itself."""
    service, headers = proxied, {"x-forwarded-for": "203.0.113.9"}
    client, user = await service.a_client(), await service.a_user()
    form = {"grant_type": "password", "username": user.username}
    good = await service.token(client, headers=headers, **form, password=PASSWORD)
    bad = await service.token(client, headers=headers, **form, password="wrong horse battery")
    refresh = {"grant_type": "refresh_token", "refresh_token": good.json()["refresh_token"]}
    await service.token(client, headers=headers, **refresh)
    reuse = await service.token(client, headers=headers, **refresh)
    other = (await service.sign_in(client, user))["refresh_token"]
    revoked = await service.http.post("/revoke", data={"token": other}, auth=client.auth, headers=headers)
    unproven = await service.http.post(
        "/token", data={"grant_type": "client_credentials"}, auth=(client.id, "wrong"), headers=headers
    )
    family = str((await service.family_rows())[0].id)
    subject = str(user.id)
    for event, answer, actor, target in [
        ("grant.password", good, subject, family),
        ("sign_in.failed", bad, None, subject),
        ("refresh.reuse_detected", reuse, subject, family),
        ("token.revoked", revoked, ..., ...),
        ("client.authentication_failed", unproven, None, client.id),
    ]:
        row = (await service.events(event))[0]
        assert row.at == service.clock.now()
        assert (row.network, row.client_id, row.occurrences) == ("203.0.113.9", client.id, 1)
        assert row.request_id == answer.headers["x-request-id"]
        if actor is not ...:
            assert (row.actor, row.target) == (actor, target)
    [failed] = await service.events("sign_in.failed")
    assert failed.detail == {"reason": "wrong_password"}


async def test_a_plain_refresh_leaves_no_row(service: Service) -> None:
    """It happens all the time and tells nobody anything."""
    client, user = await service.a_client(), await service.a_user()
    token = (await service.sign_in(client, user))["refresh_token"]
    count = select(func.count()).select_from(audit_events)
    before = (await service.execute(count))[0][0]
    for _ in range(3):
        token = (await service.refresh(client, token)).json()["refresh_token"]
    assert (await service.execute(count))[0][0] == before


@pytest.mark.case("SEC-01")
async def test_a_name_that_nobody_has_is_kept_as_a_keyed_hash(service: Service) -> None:
    """It may be a password in the wrong field. The same name has the same hash, so that guessing can be counted."""
    client = await service.a_client()
    name = "Kanarienvogel-77"
    for typed in (name, name, "nightingale"):
        await service.token(client, grant_type="password", username=typed, password=PASSWORD)
    await service.http.post("/token", data={"grant_type": "client_credentials"}, auth=(name, "wrong"))
    rows = await service.execute(select(audit_events))
    assert name.lower() not in repr(rows).lower()
    first, second, third = [row.target for row in rows if row.event == "sign_in.failed"]
    assert first == second != third
    assert first.startswith("name:")
    plain = {hashlib.sha256(text.encode()).hexdigest()[:32] for text in (name, name.lower())}
    assert first.removeprefix("name:") not in plain


# -- not too many -----------------------------------------------------------------------------------------------------


async def test_failures_beyond_ten_a_minute_become_one_row_with_a_count(proxied: Service) -> None:
    """Per client; the next minute has rows of its own again."""
    client = await proxied.a_client()
    event = "client.authentication_failed"
    await fail_client(proxied, client.id, 25)
    assert len(await proxied.events(event)) == 10
    await flush_audit(proxied.services)
    [*single, counted] = await proxied.events(event)
    assert [row.occurrences for row in single] == [1] * 10
    assert (counted.occurrences, counted.target, counted.network) == (15, client.id, "198.51.100.1")
    assert counted.detail == {"held_back": True}
    await flush_audit(proxied.services)
    assert len(await proxied.events(event)) == 11
    proxied.clock.advance(60)
    await fail_client(proxied, client.id, 1)
    assert len(await proxied.events(event)) == 12


async def test_no_noise_hides_which_key_or_which_session_was_abused(service: Service) -> None:
    """Ten failures of another kind, or ten invented names, leave room for what nobody can invent."""
    client, user = await service.a_client(), await service.a_user("mika")
    key, mika = await with_key(service, user), await signed_in(service, user)
    await service.within(lambda tx: service.services.api_keys.revoke_all(tx, user.id))
    for number in range(15):
        await service.token(client, grant_type="password", username=f"noise{number}", password="wrong password")
    await service.token(client, grant_type="password", username="mika", password="wrong password")
    assert (await key("GET")).status_code == 401
    body = {"current_password": "wrong password", "new_password": "a different battery"}
    assert (await mika("POST", "/password", body)).status_code == 403
    for number in range(11):
        made_up = (f"cl_{number}", "wrong")
        await service.http.post("/token", data={"grant_type": "client_credentials"}, auth=made_up)
    await service.http.post("/token", data={"grant_type": "client_credentials"}, auth=(client.id, "wrong"))
    assert client.id in [row.target for row in await service.events("client.authentication_failed")]
    [refused] = await service.events("api_key.refused")
    assert refused.detail == {"reason": "revoked"}
    [guessed] = await service.events("reauthentication.failed")
    assert guessed.target == str(user.id)
    assert str(user.id) in [row.target for row in await service.events("sign_in.failed")]


async def test_one_network_has_ten_rows_a_minute_whatever_it_aims_at(proxied: Service) -> None:
    """And another network is still heard."""
    client = await proxied.a_client()
    for number in range(15):
        await proxied.token(client, grant_type="password", username=f"name{number}", password="wrong horse")
    assert len(await proxied.events("sign_in.failed")) == 10
    headers = {"x-forwarded-for": "203.0.113.9"}
    await proxied.token(client, headers=headers, grant_type="password", username="name99", password="wrong horse")
    assert len(await proxied.events("sign_in.failed")) == 11
    await flush_audit(proxied.services)
    [*_, rest] = await proxied.events("sign_in.failed")
    assert (rest.target, rest.network, rest.occurrences) == ("many", "127.0.0.1", 5)


async def test_one_target_has_ten_rows_a_minute_from_wherever(proxied: Service) -> None:
    """A guess from each of many networks fills nothing either."""
    client, user = await proxied.a_client(), await proxied.a_user()
    for number in range(15):
        headers = {"x-forwarded-for": f"203.0.113.{number}"}
        await proxied.token(
            client, headers=headers, grant_type="password", username=user.username, password="wrong horse"
        )
    assert len(await proxied.events("sign_in.failed")) == 10
    await flush_audit(proxied.services)
    rows = await proxied.events("sign_in.failed")
    assert sum(row.occurrences for row in rows) == 15
    assert {row.target for row in rows} == {str(user.id)}


_AT_COMMIT = """
CREATE FUNCTION planted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER planted AFTER INSERT ON audit_events DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION planted();
CREATE SEQUENCE planted_count
"""


async def plant_at_commit(service: Service, body: str) -> None:
    for statement in _AT_COMMIT.format(body=body).split(";\nCREATE"):
        statement = statement.strip()
        await service.execute(text(statement if statement.startswith("CREATE") else f"CREATE {statement}"))


async def totals(service: Service) -> int:
    return sum(row.occurrences for row in await service.events("client.authentication_failed"))


async def test_a_flush_that_fails_loses_no_count(proxied: Service) -> None:
    """Neither when a row is refused; what was counted meanwhile is there too."""
    client = await proxied.a_client()
    await fail_client(proxied, client.id, 14)
    await forbid(proxied, "occurrences = 1")
    for _ in range(2):
        with pytest.raises(DBAPIError):
            await flush_audit(proxied.services)
    await fail_client(proxied, client.id, 3)
    await allow(proxied)
    await flush_audit(proxied.services)
    assert await totals(proxied) == 17


async def test_a_flush_that_fails_as_it_commits_loses_no_count(proxied: Service) -> None:
    """The rows were written, and then were not."""
    client = await proxied.a_client()
    await fail_client(proxied, client.id, 14)
    await plant_at_commit(proxied, "RAISE EXCEPTION 'planted' USING ERRCODE = '53100';")
    with pytest.raises(DatabaseUnavailable):
        await flush_audit(proxied.services)
    await proxied.execute(text("DROP TRIGGER planted ON audit_events"))
    await flush_audit(proxied.services)
    assert await totals(proxied) == 14


async def test_a_flush_that_has_to_be_repeated_counts_once(proxied: Service) -> None:
    """A transaction that lost a conflict is run again, with everything in it."""
    client = await proxied.a_client()
    await fail_client(proxied, client.id, 14)
    body = "IF nextval('planted_count') = 1 THEN RAISE EXCEPTION 'planted' USING ERRCODE = '40001'; END IF;"
    await plant_at_commit(proxied, body)
    await flush_audit(proxied.services)
    assert await totals(proxied) == 14


async def test_what_fails_while_a_flush_is_open_is_kept_for_the_next(proxied: Service) -> None:
    """Counting goes on beside the writing."""
    client = await proxied.a_client()
    await fail_client(proxied, client.id, 14)
    audit = proxied.services.audit
    async with proxied.services.db.transaction() as tx:
        written = await audit.flush(tx)
        await fail_client(proxied, client.id, 2)
    audit.flushed(written)
    assert await totals(proxied) == 14
    await flush_audit(proxied.services)
    assert await totals(proxied) == 16


async def test_what_was_held_back_is_written_when_the_service_stops(database_url: str) -> None:
    """A restart loses no count."""
    settings = test_settings(database_url)
    async with running(settings) as service:
        client = await service.a_client()
        for _ in range(13):
            await service.http.post("/token", data={"grant_type": "password"}, auth=(client.id, "wrong"))
    db = Database(database_url)
    async with db.transaction() as tx:
        total = (await tx.execute(select(func.sum(audit_events.c.occurrences)))).scalar_one()
    await db.close()
    assert total == 13


async def test_inventing_names_does_not_fill_the_memory(embedded: Service) -> None:
    """Beyond ten thousand kinds the rest share one count, and none is lost."""
    audit = AuditTrail(embedded.clock)

    async def storm(tx: Transaction) -> None:
        for number in range(25_000):
            origin = Origin(f"198.51.{number // 250}.{number % 250}", "r") if number % 2 else ORIGIN
            await audit.record_failure(
                tx,
                "sign_in.failed",
                origin=origin,
                target=f"name:{number % 5 if number % 2 else number}",
                client_id=None,
                detail={},
            )

    await embedded.within(storm)
    assert len(audit._seen) <= 10_001
    assert len(audit._held) <= 10_001
    rows = await embedded.events("sign_in.failed")
    assert len(rows) < 100
    assert len(rows) + sum(audit._held.values()) == 25_000


async def test_a_registered_client_is_recorded_by_its_id_and_a_stranger_by_hash(service: Service) -> None:
    """`client_id` holds only ids that exist: what a stranger sends is no id of ours."""
    client: Registered = await service.a_client()
    for name in (client.id, "cl_" + "0" * 22, "x' OR 1=1 --"):
        await service.http.post("/token", data={"grant_type": "password"}, auth=(name, "wrong"))
    rows = await service.events("client.authentication_failed")
    assert [row.client_id for row in rows] == [client.id, None, None]
    assert rows[0].target == client.id
    assert all(row.target.startswith("name:") for row in rows[1:])


# -- what can be stored -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["service", "embedded"])
def anywhere(request: pytest.FixtureRequest) -> Service:
    """The service on each kind of database."""
    found: Service = request.getfixturevalue(request.param)
    return found


async def recorded(service: Service, **given: Any) -> Any:
    """Record one event and return its row."""
    event = given.pop("event", "demo.created")
    given = {"origin": None, **given}
    await service.within(lambda tx: service.services.audit.record(tx, event, **given))
    return (await service.events(event))[-1]


@pytest.mark.case("SEC-04")
async def test_an_event_that_nobody_has_described_is_refused(embedded: Service) -> None:
    """The list of events is complete because nothing else can be written; a count of it could never be, either."""
    audit = embedded.services.audit
    with pytest.raises(ValueError, match=r"user\.vanished is no event"):
        await recorded(embedded, event="user.vanished")
    for _ in range(12):
        with pytest.raises(ValueError, match=r"user\.vanished is no event"):
            await embedded.within(
                lambda tx: audit.record_failure(
                    tx, "user.vanished", origin=ORIGIN, target="x", client_id=None, detail={}
                )
            )
    await flush_audit(embedded.services)
    assert await embedded.execute(select(audit_events)) == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\0b", "a\ufffdb"),
        ("\ud83d", "\ufffd"),
        ("a\udc00\0\udfff", "a\ufffd\ufffd\ufffd"),
        ("\U0001f511 \ufffe \n \x1b[31m \u202e", "\U0001f511 \ufffe \n \x1b[31m \u202e"),
        ("", ""),
    ],
    ids=["NUL", "half a pair", "several", "odd but storable", "empty"],
)
async def test_no_text_makes_an_act_fail(anywhere: Service, text: str, kept: str) -> None:
    """What the database cannot hold is replaced, wherever it stands."""
    row = await recorded(
        anywhere,
        origin=Origin(text, text),
        actor=text,
        target=text,
        client_id=text,
        detail={text: text, "list": [text, {text: [text]}]},
    )
    assert [row.network, row.request_id, row.actor, row.target, row.client_id] == [kept] * 5
    assert row.detail == {kept: kept, "list": [kept, {kept: [kept]}]}


async def test_no_length_makes_an_act_fail(anywhere: Service) -> None:
    """The beginning of a text is kept; signs are counted, not bytes."""
    long = "ü" * 5000
    row = await recorded(
        anywhere, origin=Origin(long, long), actor=long, target=long, client_id=long, detail={"x": long}
    )
    lengths = [len(value) for value in (row.actor, row.target, row.client_id, row.network, row.request_id)]
    assert lengths == [128, 128, 64, 64, 64]
    assert row.detail == {"x": "ü" * 1000}
    row = await recorded(anywhere, detail={"scopes": [f"scope{number}:read" for number in range(3000)]})
    assert len(row.detail["scopes"]) == 3000
    row = await recorded(anywhere, detail={"scopes": ["ü" * 50] * 4000})
    assert row.detail == {"too_large": 4000 * (50 * 6 + 4) + len('{"scopes": []}') - 2}


class Word(StrEnum):
    """A fixed word, as refusals have them."""

    ONE = "one"


async def test_a_detail_is_plain_json(anywhere: Service) -> None:
    """Texts, whole numbers, booleans, null, and lists and objects of them, and they come back as they were."""
    detail = {"a": [1, -(2**63), True, False, None, "x", (Word.ONE, ["y"])], "b": {"c": {}, "": []}}
    row = await recorded(anywhere, detail=detail)
    assert row.detail == {"a": [1, -(2**63), True, False, None, "x", ["one", ["y"]]], "b": {"c": {}, "": []}}
    assert (await recorded(anywhere)).detail == {}


@pytest.mark.parametrize(
    "value",
    [1.5, float("nan"), b"x", uuid.UUID(int=0), datetime(2026, 1, 1, tzinfo=UTC), {"x"}, {1: "x"}, object()],
    ids=["fraction", "nan", "bytes", "uuid", "datetime", "set", "number as name", "object"],
)
async def test_a_detail_that_is_not_plain_json_is_a_fault_of_ours(embedded: Service, value: Any) -> None:
    """The first test that comes along notices; some of it would not come back as it was, and break its seal."""
    for detail in ({"x": value}, {"x": [value]}, {"x": {"y": [{"z": value}]}}):
        with pytest.raises(TypeError, match="an audit detail cannot hold a"):
            await recorded(embedded, detail=detail)
    assert await embedded.execute(select(audit_events)) == []


async def test_a_detail_cannot_be_nested_without_end(embedded: Service) -> None:
    """Eight lists or objects within each other, and no more."""
    deep: Any = "x"
    for _ in range(7):
        deep = [deep]
    assert (await recorded(embedded, detail={"x": deep})).detail == {"x": deep}
    with pytest.raises(TypeError, match="nested too deeply"):
        await recorded(embedded, detail={"x": [[deep]]})
