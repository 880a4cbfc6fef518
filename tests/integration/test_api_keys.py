"""API keys as their owners and operators use them: made, listed, rotated, ended, used."""

import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, insert, select, update

from identity_service.accounts.api_keys import InvalidKey, KeyRefused
from identity_service.accounts.clients import InvalidClientMetadata, NewClient
from identity_service.accounts.users import User
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import api_keys, audit_events, outbox
from tests.support.keys import EXCHANGE, OWN, Key, a_key, an_exchanger, exchange
from tests.support.operators import EVERY_SCOPE, Operator, an_operator
from tests.support.plans import note_plans
from tests.support.service import ISSUER, MASTER_KEY, Service, running, test_settings

ORDERS = ["orders:read"]
DAY = timedelta(days=1)


@pytest.fixture(params=["service", "embedded"])
def api(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL and Redis, and on SQLite."""
    found: Service = request.getfixturevalue(request.param)
    return found


class Person:
    """Somebody who is signed in for our own API."""

    def __init__(self, api: Service, user: User, token: str) -> None:
        self.api, self.user = api, user
        self.headers = {"authorization": f"Bearer {token}"}

    async def __call__(self, method: str, path: str = "", json: Any = None, **params: Any) -> httpx2.Response:
        return await self.api.http.request(method, OWN + path, json=json, params=params or None, headers=self.headers)

    async def make(self, **changes: Any) -> dict[str, Any]:
        """Make a key and return the answer."""
        answer = await self("POST", json={"name": "A script", "scope": ORDERS, **changes})
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body


async def a_person(api: Service, **given: Any) -> Person:
    client = await api.a_client(scope=EVERY_SCOPE, audiences=(ISSUER,))
    user = await api.a_user(**given)
    return Person(api, user, (await api.sign_in(client, user))["access_token"])


async def works(api: Service, text: str) -> bool:
    """Return whether our own API takes a key."""
    answer = await api.http.get(OWN, headers={"x-api-key": text})
    assert answer.status_code in (200, 401), answer.text
    return answer.status_code == 200


# -- one's own keys ---------------------------------------------------------------------------------------------------


@pytest.mark.case("KEY-01")
async def test_a_key_is_made_shown_once_listed_and_used(api: Service) -> None:
    """The list says all but the secret; making it is audited and told by mail."""
    ann = await a_person(api)
    end = api.clock.now() + DAY
    made = await ann.make(
        name="  Nightly report ",
        scope=["orders:read", "account:read"],
        expires_at=end.isoformat(),
        networks=["127.0.0.1"],
    )
    text = made.pop("key")
    assert text.startswith(f"idk_{made['id']}_")
    stamp = api.clock.now().isoformat().replace("+00:00", "Z")
    assert made == {
        "id": made["id"],
        "name": "Nightly report",
        "scope": ["account:read", "orders:read"],
        "networks": ["127.0.0.1/32"],
        "last4": text[-10:-6],
        "created_at": stamp,
        "rotated_at": None,
        "previous_expires_at": None,
        "expires_at": end.isoformat().replace("+00:00", "Z"),
        "last_used_at": None,
    }
    assert (await ann("GET")).json() == {"items": [made], "next_cursor": None}
    assert await works(api, text)
    assert (await ann("GET")).json()["items"] == [{**made, "last_used_at": stamp}]
    [row] = await api.events("api_key.created")
    assert (row.actor, row.target) == (str(ann.user.id), made["id"])
    assert row.detail == {
        "owner": str(ann.user.id),
        "scope": ["account:read", "orders:read"],
        "expires_at": end.isoformat(),
        "networks": ["127.0.0.1/32"],
    }
    [mail] = await api.execute(select(outbox))
    assert (mail.template, mail.recipient, mail.context) == ("api_key_created", ann.user.email, mail.context)
    assert mail.context["name"] == "Nightly report"
    assert text[16:-6] not in repr(mail)


async def test_a_key_is_ended_at_once_and_only_once(api: Service) -> None:
    """It leaves the list, and its end is audited; a second end is about nothing."""
    ann = await a_person(api)
    made = await ann.make(scope=["account:read"])
    assert await works(api, made["key"])
    assert (await ann("DELETE", f"/{made['id']}")).status_code == 204
    assert not await works(api, made["key"])
    assert (await ann("GET")).json()["items"] == []
    assert (await ann("DELETE", f"/{made['id']}")).status_code == 404
    assert (await ann("POST", f"/{made['id']}/rotate")).status_code == 404
    [row] = await api.events("api_key.revoked")
    assert (row.actor, row.target, row.detail) == (str(ann.user.id), made["id"], {"owner": str(ann.user.id)})


@pytest.mark.case("KEY-13")
@pytest.mark.parametrize("overlap", [None, 0, 60, 7 * 86400], ids=str)
async def test_a_rotated_secret_works_for_the_overlap_and_no_longer(api: Service, overlap: int | None) -> None:
    """A day unless told otherwise; the id, the scope and the end stay."""
    ann = await a_person(api)
    made = await ann.make(scope=["account:read"])
    answer = await ann("POST", f"/{made['id']}/rotate", {"overlap": overlap} if overlap is not None else None)
    assert answer.status_code == 200, answer.text
    rotated = answer.json()
    span = timedelta(seconds=86400 if overlap is None else overlap)
    assert rotated["key"] != made["key"]
    for name in ("id", "name", "scope", "networks", "expires_at", "created_at"):
        assert rotated[name] == made[name]
    assert datetime.fromisoformat(rotated["previous_expires_at"]) == api.clock.now() + span
    assert await works(api, rotated["key"])
    if overlap != 0:
        assert await works(api, made["key"])
        api.clock.advance(span - timedelta(seconds=1))  # type: ignore[attr-defined]
        assert await works(api, made["key"])
        api.clock.advance(1)  # type: ignore[attr-defined]
    assert not await works(api, made["key"])
    assert await works(api, rotated["key"])
    [row] = await api.events("api_key.rotated")
    assert row.detail == {"owner": str(ann.user.id), "overlap": int(span.total_seconds())}


@pytest.mark.case("KEY-13")
async def test_a_second_rotation_leaves_the_first_secret_behind(api: Service) -> None:
    """Two live secrets are the most a key ever has."""
    ann = await a_person(api)
    first = await ann.make(scope=["account:read"])
    second = (await ann("POST", f"/{first['id']}/rotate")).json()
    third = (await ann("POST", f"/{first['id']}/rotate")).json()
    assert [await works(api, each["key"]) for each in (first, second, third)] == [False, True, True]


async def test_an_old_secret_is_told_from_a_guess(api: Service) -> None:
    """Whoever still uses it after the overlap shall be found in the trail, and a guesser not."""
    key = await a_key(api, (await a_person(api)).user)
    keys = api.services.api_keys
    owner = (await api.execute(select(api_keys.c.user_id)))[0][0]
    await api.within(lambda tx: keys.rotate(tx, key.id, owner, timedelta(0)))
    presented = keys.read(Secret(key.text))
    assert presented is not None
    assert await api.within(lambda tx: keys.check(tx, presented, network="127.0.0.1")) == KeyRefused("expired")
    gateway = await an_exchanger(api)
    assert (await exchange(api, gateway, key)).status_code == 400
    [row] = await api.events("api_key.refused")
    assert (row.target, row.detail) == (key.id, {"reason": "expired"})
    guess = await a_key(api, (await a_person(api)).user)
    await api.execute(update(api_keys).where(api_keys.c.id == guess.id).values(digest=bytes(32)))
    assert (await exchange(api, gateway, guess)).status_code == 400
    assert len(await api.events("api_key.refused")) == 1


async def test_an_expired_key_stays_listed_and_is_not_rotated(api: Service) -> None:
    """Its owner shall see why it stopped; a new secret does not move its end."""
    ann = await a_person(api)
    made = await ann.make(expires_at=(api.clock.now() + timedelta(minutes=1)).isoformat())
    api.clock.advance(60)  # type: ignore[attr-defined]
    assert [key["id"] for key in (await ann("GET")).json()["items"]] == [made["id"]]
    assert (await ann("POST", f"/{made['id']}/rotate")).status_code == 409
    assert (await ann("DELETE", f"/{made['id']}")).status_code == 204


async def test_one_has_twenty_live_keys_at_most(api: Service) -> None:
    """Those that were revoked or have expired make room; another's count for nothing."""
    ann, ben = await a_person(api), await a_person(api)
    soon = api.clock.now() + timedelta(minutes=1)
    made = [await a_key(api, ann.user, expires_at=soon if number == 0 else None) for number in range(20)]
    body = {"name": "One more", "scope": ORDERS}
    assert (await ann("POST", json=body)).status_code == 409
    await ben.make()
    assert (await ann("DELETE", f"/{made[5].id}")).status_code == 204
    await ann.make()
    assert (await ann("POST", json=body)).status_code == 409
    api.clock.advance(60)  # type: ignore[attr-defined]
    await ann.make()
    assert (await ann("POST", json=body)).status_code == 409


async def test_the_list_comes_in_pages_newest_first(api: Service) -> None:
    """Each key once, whatever the size of the page; a cursor is of use to its owner only."""
    ann, ben = await a_person(api), await a_person(api)
    made = []
    for number in range(5):
        if number != 3:
            api.clock.advance(1)  # type: ignore[attr-defined]
        made.append((await ann.make())["id"])
    await ben.make()
    whole = [key["id"] for key in (await ann("GET")).json()["items"]]
    assert sorted(whole) == sorted(made)
    assert (whole[0], whole[-1], set(whole[1:3])) == (made[4], made[0], set(made[2:4]))
    for limit in (1, 2, 4, 5):
        seen, cursor = [], None
        while True:
            page = (await ann("GET", limit=limit, **({"cursor": cursor} if cursor else {}))).json()
            assert 0 < len(page["items"]) <= limit
            seen += [key["id"] for key in page["items"]]
            if (cursor := page["next_cursor"]) is None:
                break
            assert (await ben("GET", cursor=cursor)).status_code == 422
        assert seen == whole


@pytest.mark.case("KEY-15")
@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": "  "}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"name": "a\0b"}, ""),
        ({"name": "\x1b[31m"}, "/name"),
        ({"name": "\u202eabc"}, "/name"),
        ({"name": "x" * 101}, "/name"),
        ({"name": "x" * 10_240}, "/name"),
        ({"name": 1}, "/name"),
        ({"name": None}, "/name"),
        ({"scope": []}, "/scope"),
        ({"scope": "orders:read"}, "/scope"),
        ({"scope": [""]}, "/scope/0"),
        ({"scope": ["x" * 129]}, "/scope/0"),
        ({"scope": ["orders:read"] * 101}, "/scope"),
        ({"networks": "127.0.0.1"}, "/networks"),
        ({"networks": ["127.0.0.1"] * 21}, "/networks"),
        ({"networks": [""]}, "/networks"),
        ({"networks": ["localhost"]}, "/networks"),
        ({"networks": ["127.0.0.1/33"]}, "/networks"),
        ({"networks": ["127.0.0.1/8"]}, "/networks"),
        ({"networks": ["127.0.0.01"]}, "/networks"),
        ({"networks": ["2001:db8::1"]}, "/networks"),
        ({"networks": ["2001:db8::/65"]}, "/networks"),
        ({"networks": ["::ffff:127.0.0.1"]}, "/networks"),
        ({"networks": ["fe80::%1/64"]}, "/networks"),
        ({"networks": ["x" * 51]}, "/networks/0"),
        ({"networks": [2130706433]}, "/networks/0"),
        ({"last_used_at": None}, ""),
        ({"owner": "somebody"}, ""),
        ({"key": "mine"}, ""),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_a_key_that_cannot_be_is_not_made(embedded: Service, changes: dict[str, Any], pointer: str) -> None:
    """422 that says where, and never what; nothing is stored."""
    ann = await a_person(embedded)
    answer = await ann("POST", json={"name": "A script", "scope": ORDERS, **changes})
    assert answer.status_code == 422, answer.text
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
    assert await embedded.execute(select(api_keys)) == []


@pytest.mark.case("INP-20")
@pytest.mark.parametrize(
    "instant",
    [
        *("2025-12-31T23:59:59Z", "2026-01-01T00:00:00Z", "2026-06-01T00:00:00", "2026-06-01", "0000-01-01T00:00:00Z"),
        *("9999-12-31T23:59:60Z", "9999-12-31T23:59:59-12:00", "2026-06-01T00:00:00+99:99", "2026-13-01T00:00:00Z"),
        *("2026-06-01 00:00:00Z", "1780272000", "", "٢٠٢٦-06-01T00:00:00Z", "2026-06-01T24:00:00Z"),
        *(1780272000, 1e300, True, [], {}),
    ],
    ids=ascii,
)
async def test_an_end_is_an_instant_of_rfc_3339_in_the_future(embedded: Service, instant: Any) -> None:
    """Aware, or it would mean something else elsewhere; a number is none."""
    ann = await a_person(embedded)
    answer = await ann("POST", json={"name": "A script", "scope": ORDERS, "expires_at": instant})
    assert answer.status_code == 422, answer.text
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/expires_at"]


@pytest.mark.parametrize(
    ("instant", "meant"),
    [
        ("2026-06-01T12:00:00Z", datetime(2026, 6, 1, 12, tzinfo=UTC)),
        ("2026-06-01T12:00:00.25+02:00", datetime(2026, 6, 1, 10, 0, 0, 250_000, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
async def test_an_end_is_kept_in_utc(api: Service, instant: str, meant: datetime) -> None:
    """Whatever zone it was told in; the latest there is can be exchanged too."""
    ann = await a_person(api)
    made = await ann.make(expires_at=instant)
    assert datetime.fromisoformat(made["expires_at"]) == meant
    assert (await exchange(api, await an_exchanger(api), Key(made["id"], made["key"]))).status_code == 200


@pytest.mark.case("KEY-15")
@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "=cmd()|' /C calc'!A0", "{{7*7}}", "Ключ 🔑", "a/../b"])
async def test_any_other_name_comes_back_as_it_was_sent(api: Service, name: str) -> None:
    """As JSON, which is all we answer: no page and no sheet is made of it here."""
    ann = await a_person(api)
    assert (await ann.make(name=name))["name"] == name
    answer = await ann("GET")
    assert answer.json()["items"][0]["name"] == name
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("overlap", [-1, 7 * 86400 + 1, "60", 1.5, None, True], ids=str)
async def test_an_overlap_lasts_a_week_at_most(embedded: Service, overlap: Any) -> None:
    """A whole number of seconds."""
    ann = await a_person(embedded)
    made = await ann.make(scope=["account:read"])
    assert (await ann("POST", f"/{made['id']}/rotate", {"overlap": overlap})).status_code == 422
    assert await works(embedded, made["key"])


# -- how long keys live -----------------------------------------------------------------------------------------------


@pytest.mark.case("KEY-16")
async def test_where_keys_may_live_for_so_long_only_none_lives_longer(sqlite_url: str) -> None:
    """Unasked a key gets all of it; asked for more, it is not made."""
    async with running(test_settings(sqlite_url, api_key_max_ttl=3600)) as api:
        ann = await a_person(api)
        now = api.clock.now()
        for asked, given in ((None, 3600), (3600, 3600), (60, 60)):
            end = (now + timedelta(seconds=asked)).isoformat() if asked is not None else None
            made = await ann.make(expires_at=end)
            assert datetime.fromisoformat(made["expires_at"]) == now + timedelta(seconds=given)
        late = {"name": "x", "scope": ORDERS, "expires_at": (now + timedelta(seconds=3601)).isoformat()}
        answer = await ann("POST", json=late)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/expires_at")


@pytest.mark.case("KEY-16")
async def test_people_are_warned_of_the_end_of_a_key_once(api: Service) -> None:
    """Those whose key ends soon, in the order in which they end; never of a dead one, nor for a service."""
    ann, now, keys = await a_person(api), api.clock.now(), api.services.api_keys
    gone, disabled, service = await api.a_user(), await api.a_user(), await api.a_client()
    later = await a_key(api, ann.user, expires_at=now + 7 * DAY)
    sooner = await a_key(api, ann.user, expires_at=now + DAY)
    await a_key(api, ann.user, expires_at=now + 8 * DAY)
    await a_key(api, ann.user)
    revoked = await a_key(api, ann.user, expires_at=now + DAY)
    await api.within(lambda tx: keys.revoke(tx, revoked.id, ann.user.id))
    over = await a_key(api, ann.user, expires_at=now + DAY)
    await api.execute(update(api_keys).where(api_keys.c.id == over.id).values(expires_at=now))
    for owner in (gone, disabled, service):
        await a_key(api, owner, expires_at=now + DAY)
    await api.disable(disabled)
    await api.within(lambda tx: api.services.users.delete(tx, gone.id))

    async def warned(batch: int) -> list[str]:
        return [key.id for key in await api.within(lambda tx: keys.expiring(tx, within=7 * DAY, batch=batch))]

    assert await warned(1) == [sooner.id]
    assert await warned(100) == [later.id]
    assert await warned(100) == []


async def test_keys_that_ended_long_ago_are_forgotten(api: Service) -> None:
    """Ninety days after their end, in batches; live ones and those of last month stay."""
    person, keys = await api.a_user(), api.services.api_keys
    live, expired, revoked = [
        await a_key(api, person, expires_at=end) for end in (None, api.clock.now() + DAY, api.clock.now() + 900 * DAY)
    ]
    api.clock.advance(DAY)  # type: ignore[attr-defined]
    await api.within(lambda tx: keys.revoke(tx, revoked.id, person.id))

    async def forgotten(batch: int = 100) -> int:
        return await api.within(lambda tx: keys.clean_up(tx, batch=batch))

    api.clock.advance(90 * DAY - timedelta(seconds=1))  # type: ignore[attr-defined]
    assert await forgotten() == 0
    api.clock.advance(1)  # type: ignore[attr-defined]
    assert [await forgotten(1), await forgotten(1), await forgotten(1)] == [1, 1, 0]
    assert [row.id for row in await api.execute(select(api_keys.c.id))] == [live.id]
    assert expired.id != live.id


async def test_forgetting_keys_does_not_look_at_the_living(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """One index finds those that were revoked, one those that expired; both are short however many keys there are."""
    person = await service.a_user()
    await a_key(service, person)
    row = dict((await service.execute(select(api_keys)))[0]._mapping)
    await service.execute(insert(api_keys).values([{**row, "id": f"live{number:07}"} for number in range(2000)]))
    async with service.services.db.engine.connect() as connection:
        await connection.exec_driver_sql("ANALYZE api_keys")
    plans = note_plans(monkeypatch, lambda query: query.startswith("DELETE FROM api_keys"))
    assert await service.within(lambda tx: service.services.api_keys.clean_up(tx, batch=500)) == 0
    [plan] = plans
    assert "on ix_api_keys_revoked_at" in plan, plan
    assert "on ix_api_keys_expires_at" in plan, plan
    assert "Seq Scan" not in plan


async def test_whoever_makes_and_ends_keys_for_ever_fills_no_table(api: Service) -> None:
    """The oldest dead ones go first; a live one never does."""
    person = await api.a_user()
    kept = await a_key(api, person)
    now = api.clock.now()
    row = dict((await api.execute(select(api_keys)))[0]._mapping)
    dead = [
        {**row, "id": f"dead{number:07}", "revoked_at": now, "created_at": now + timedelta(seconds=number)}
        for number in range(100)
    ]
    await api.execute(insert(api_keys).values(dead))
    made = await a_key(api, person)
    left = {row.id for row in await api.execute(select(api_keys.c.id))}
    assert left == {kept.id, made.id, *(f"dead{number:07}" for number in range(20, 100))}


# -- what a key costs -------------------------------------------------------------------------------------------------


@pytest.mark.case("KEY-13")
async def test_an_exchange_of_a_key_is_one_select_and_its_use_is_noted_once_a_minute(
    service: Service, statements: list[str]
) -> None:
    """Client and role are known for a second; no audit row, which the metrics stand for."""
    api = service
    key, gateway = await a_key(api, await api.a_user()), await an_exchanger(api)
    assert (await exchange(api, gateway, key)).status_code == 200
    rows = (await api.execute(select(func.count()).select_from(audit_events)))[0][0]
    first = api.clock.now()
    statements.clear()
    assert (await exchange(api, gateway, key)).status_code == 200
    assert [statement.split()[0] for statement in statements] == ["SELECT"]
    assert "FROM api_keys" in statements[0]
    api.clock.advance(59)  # type: ignore[attr-defined]
    await exchange(api, gateway, key)
    [row] = await api.execute(select(api_keys))
    assert row.last_used_at == first
    api.clock.advance(1)  # type: ignore[attr-defined]
    statements.clear()
    await exchange(api, gateway, key)
    assert len([statement for statement in statements if statement.startswith("UPDATE")]) == 1
    [row] = await api.execute(select(api_keys))
    assert row.last_used_at == api.clock.now()
    assert (await api.execute(select(func.count()).select_from(audit_events)))[0][0] == rows


async def test_a_plain_token_costs_what_it_cost_before(service: Service, statements: list[str]) -> None:
    """One look at its session, one at the list of the revoked; what exchanged ones need is asked for those only."""
    app = await service.a_client(introspect=(ISSUER,))
    token = (await service.sign_in(app, await service.a_user()))["access_token"]
    assert (await service.introspect(app, token)).json()["active"]
    statements.clear()
    assert (await service.introspect(app, token)).json()["active"]
    assert [statement.split()[0] for statement in statements] == ["SELECT", "SELECT"]


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def boss(api: Service) -> Operator:
    """An operator who holds everything."""
    return await an_operator(api)


async def test_an_operator_makes_rotates_and_ends_a_services_keys(api: Service, boss: Operator) -> None:
    """Each step is audited; the secret is shown when it is made, and never again."""
    client = await api.a_client(name="Reports")
    made = await boss("POST", f"/clients/{client.id}/api-keys", {"name": "Cron", "scope": ORDERS})
    assert made.status_code == 201, made.text
    assert made.headers["cache-control"] == "no-store"
    gateway = await an_exchanger(api)
    key = Key(made.json()["id"], made.json()["key"])
    assert (await exchange(api, gateway, key)).status_code == 200
    listed = await boss("GET", f"/clients/{client.id}/api-keys")
    assert [item["name"] for item in listed.json()["items"]] == ["Cron"]
    assert key.text[16:-6] not in listed.text
    rotated = await boss("POST", f"/api-keys/{key.id}/rotate", {"overlap": 0})
    assert (await exchange(api, gateway, key)).status_code == 400
    new = Key(key.id, rotated.json()["key"])
    assert (await exchange(api, gateway, new)).status_code == 200
    assert (await boss("DELETE", f"/clients/{client.id}/api-keys/{key.id}")).status_code == 204
    assert (await exchange(api, gateway, new)).status_code == 400
    assert (await boss("DELETE", f"/api-keys/{key.id}")).status_code == 404
    for event in ("created", "rotated", "revoked"):
        [row] = await api.events(f"api_key.{event}")
        assert (row.target, row.detail["owner"]) == (key.id, client.id)
    assert await api.execute(select(outbox)) == []


async def test_an_operator_sees_and_ends_a_persons_keys_and_makes_none(api: Service, boss: Operator) -> None:
    """A key speaks for the person, so only the person makes one."""
    person = await api.a_user()
    key = await a_key(api, person, "account:read")
    listed = (await boss("GET", f"/users/{person.id}/api-keys")).json()
    assert [item["id"] for item in listed["items"]] == [key.id]
    assert (await boss("POST", f"/users/{person.id}/api-keys", {"name": "x", "scope": ORDERS})).status_code == 405
    assert (await boss("POST", f"/api-keys/{key.id}/rotate")).status_code == 404
    assert (await boss("DELETE", f"/api-keys/{key.id}")).status_code == 204
    assert not await works(api, key.text)
    [row] = await api.events("api_key.revoked")
    assert (row.target, row.detail) == (key.id, {"owner": str(person.id)})


async def test_what_is_not_there_has_no_keys(api: Service, boss: Operator) -> None:
    """404 for clients, people and keys that are not; a public client has none, for it could not keep them."""
    body = {"name": "x", "scope": ORDERS}
    for client_id in ("cl_nothing", "cl_" + "A" * 22):
        assert (await boss("GET", f"/clients/{client_id}/api-keys")).status_code == 404
        assert (await boss("POST", f"/clients/{client_id}/api-keys", body)).status_code == 404
        assert (await boss("DELETE", f"/clients/{client_id}/api-keys/AAAAAAAAAAA")).status_code == 404
    assert (await boss("GET", "/users/01890000-0000-7000-8000-000000000000/api-keys")).status_code == 404
    for key_id in ("AAAAAAAAAAA", "x"):
        assert (await boss("DELETE", f"/api-keys/{key_id}")).status_code == 404
        assert (await boss("POST", f"/api-keys/{key_id}/rotate")).status_code == 404
    public = await api.a_client(public=True)
    assert (await boss("POST", f"/clients/{public.id}/api-keys", body)).status_code == 409


async def test_a_key_is_alive_as_long_as_it_and_its_owner_are(api: Service) -> None:
    """What tokens that it was exchanged for depend on; another's id does not make it theirs."""
    keys, person, client = api.services.api_keys, await api.a_user(), await api.a_client()

    async def alive(key: Key, owner: Any) -> bool:
        return await api.within(lambda tx: keys.alive(tx, key.id, owner, 0))

    end = api.clock.now() + timedelta(seconds=1)
    for owner in (person.id, uuid.UUID(int=0), client.id, "cl_nobody"):
        assert not await alive(Key("AAAAAAAAAAA", ""), owner)
    for key, owner, other in (
        (await a_key(api, person, expires_at=end), person.id, client.id),
        (await a_key(api, client, expires_at=end), client.id, person.id),
    ):
        assert await alive(key, owner)
        assert not await alive(key, other)
    theirs, services = await a_key(api, person), await a_key(api, client)
    revoked = await a_key(api, person)
    await api.within(lambda tx: keys.revoke(tx, revoked.id, person.id))
    assert not await alive(revoked, person.id)
    api.clock.advance(1)  # type: ignore[attr-defined]
    assert not await alive(key, client.id)
    assert await alive(theirs, person.id)
    assert await alive(services, client.id)
    await api.disable(person)
    await api.within(lambda tx: api.services.clients.set_enabled(tx, client.id, False))
    assert not await alive(theirs, person.id)
    assert not await alive(services, client.id)
    await api.enable(person)
    assert not await alive(theirs, person.id)  # what it was exchanged for before stays dead
    assert await api.within(lambda tx: keys.alive(tx, theirs.id, person.id, 1))
    assert not await api.within(lambda tx: keys.alive(tx, theirs.id, person.id, None))
    await api.within(lambda tx: api.services.users.delete(tx, person.id))
    assert not await api.within(lambda tx: keys.alive(tx, theirs.id, person.id, 99))


async def test_the_module_itself_refuses_what_no_row_can_hold(api: Service) -> None:
    """For callers that are not the JSON API."""
    keys, person = api.services.api_keys, await api.a_user()
    for key_id in ("\0", "\0" * 11, "", "é" * 11):
        assert await api.within(lambda tx, key_id=key_id: keys.get(tx, key_id, None)) is None
        assert not await api.within(lambda tx, key_id=key_id: keys.revoke(tx, key_id, person.id))
        assert await api.within(lambda tx, key_id=key_id: keys.rotate(tx, key_id, person.id, DAY)) is None
    with pytest.raises(InvalidKey):
        await a_key(api, person, "openid")
    with pytest.raises(LookupError):
        await api.within(
            lambda tx: keys.create(tx, owner="cl_nobody", name="x", scope=ORDERS, expires_at=None, networks=())
        )
    assert await api.execute(select(api_keys)) == []


# -- clients that exchange --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"grant_types": [EXCHANGE]}, {"exchange_audiences": ["https://orders.example"]}])
def test_a_public_client_is_not_registered_for_exchanges(given: dict[str, Any]) -> None:
    """It could not prove who becomes the actor (RFC 8693 §2.1)."""
    with pytest.raises(InvalidClientMetadata):
        NewClient(name="x", token_endpoint_auth_method="none", **given).check()
    NewClient(name="x", **given).check()


def test_a_client_is_registered_for_exchanges_on_the_command_line(tmp_path: Path) -> None:
    """By the short name of the grant, and any number of targets."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
    environment = {**known, "IDENTITY_ENVIRONMENT": "development", "IDENTITY_MASTER_KEY": MASTER_KEY}
    program = [sys.executable, "-c", "from identity_service.cli import main; main()"]
    where = ["--data-dir", str(tmp_path)]

    def run(*words: str) -> str:
        ended = subprocess.run([*program, *words, *where], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    run("migrate")
    options = ("--exchange-audience", "https://a.example,https://b.example", "--exchange-audience", "https://c.example")
    told = json.loads(run("clients", "create", "Gateway", "--grant", "token_exchange", *options, "--json"))
    assert told["grant_types"] == [EXCHANGE]
    assert told["exchange_audiences"] == ["https://a.example", "https://b.example", "https://c.example"]
