"""
Two servers as processes of their own: what one is told the other knows in time, and each job is done by one of them.

Each test runs twice: with PostgreSQL itself, and through one PgBouncer in transaction mode that both share and that has
fewer sessions than they have connections.
"""

import asyncio
import json
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx2
import psycopg
import pytest
from sqlalchemy import func, select, update

from identity_service.accounts.users import User
from identity_service.infra.data_keys import PURPOSES
from identity_service.infra.migrate import migrate
from identity_service.infra.runtime import SystemClock
from identity_service.infra.tables import audit_events, leases
from tests.support.addresses import plain
from tests.support.operators import EVERY_SCOPE, Operator
from tests.support.pgbouncer import PgBouncer, give_defaults
from tests.support.replicas import PROMISE, Replica, replicas, servers
from tests.support.servers import PostgresServer
from tests.support.service import ISSUER, SIBLING, Registered, Service, running, test_settings
from tests.support.tokens import parts_of
from tests.support.waiting import until


@dataclass(frozen=True)
class Way:
    """How servers reach a database: its own address, the one that they are given, and what they are told beside it."""

    direct: str
    url: str
    settings: dict[str, str] = field(default_factory=dict)


@pytest.fixture(params=["PostgreSQL itself", "PgBouncer"])
def lead(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Way]]:
    """A function that returns the way to a database."""
    poolers: list[PgBouncer] = []

    def to(url: str) -> Way:
        if request.param != "PgBouncer":
            return Way(url, url)
        give_defaults(url)
        poolers.append(PgBouncer(url, default_pool_size="4"))
        return Way(url, poolers[-1].through(url), {"database_pooler": "transaction"})

    yield to
    for pooler in poolers:
        pooler.close()


@pytest.fixture
def way(database_url: str, lead: Callable[[str], Way]) -> Way:
    """The way to a database that holds what every test's does."""
    return lead(database_url)


@dataclass
class Pair:
    """Two servers, and somebody who prepares what they meet."""

    hand: Service
    here: Replica
    there: Replica


@asynccontextmanager
async def paired(way: Way, redis_url: str | None = None) -> AsyncIterator[Pair]:
    async with (
        running(test_settings(way.direct), SystemClock()) as hand,
        replicas(hand, way.url, redis_url, **way.settings) as (here, there),
    ):
        yield Pair(hand, here, there)


@pytest.fixture
async def pair(way: Way, redis_url: str) -> AsyncIterator[Pair]:
    """Two servers on one PostgreSQL and one Redis."""
    async with paired(way, redis_url) as found:
        yield found


async def operating(replica: Replica) -> Operator:
    """Return an operator who asks this server."""
    client = await replica.a_client(public=True, scope=EVERY_SCOPE, audiences=(ISSUER,))
    boss = await replica.a_user(f"boss-{secrets.token_hex(4)}", role="super_admin")
    return Operator(replica, (await replica.sign_in(client, boss, scope=" ".join(EVERY_SCOPE)))["access_token"])


async def is_active(replica: Replica, reader: Registered, token: str) -> bool:
    """Tell whether a server calls a token active."""
    answer = await replica.introspect(reader, token)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["active"])


# -- what both know ---------------------------------------------------------------------------------------------------


@pytest.mark.case("OPS-14")
async def test_a_compromised_key_is_out_of_use_at_the_other_replica_within_seconds(pair: Pair) -> None:
    """It is not published, signs nothing and proves nothing any more; the key that takes over was known before."""
    client, user = await pair.hand.a_client(), await pair.hand.a_user()
    reader = await pair.hand.a_client(grant_types=(), introspect=(ISSUER, SIBLING))
    operator = await operating(pair.here)
    token = (await pair.there.sign_in(client, user))["access_token"]
    kid = parts_of(token)[0]["kid"]
    before = await pair.there.kids()
    assert kid in before
    assert await is_active(pair.there, reader, token)

    answer = await operator("POST", f"/signing-keys/{kid}/compromise")
    assert answer.status_code == 200, answer.text

    async def not_published() -> bool:
        return kid not in await pair.there.kids() | await pair.here.kids()

    assert await until(not_published, "the key is still published") < PROMISE
    for replica in (pair.here, pair.there):
        assert not await is_active(replica, reader, token)
        signed_with = parts_of((await replica.sign_in(client, user))["access_token"])[0]["kid"]
        assert signed_with in before - {kid}
        assert signed_with in await pair.there.kids() & await pair.here.kids()


@dataclass
class Scene:
    """Somebody who is signed in at the server that is not told, which has just dealt with them."""

    pair: Pair
    operator: Operator
    client: Registered
    reader: Registered
    user: User
    another: User
    """Signs in again and again: who has too many sessions loses the oldest."""
    tokens: dict[str, Any] = field(default_factory=dict)

    async def sign_in(self, user: User) -> dict[str, Any]:
        """Sign in at the server that is not told."""
        return await self.pair.there.sign_in(self.client, user, resource=ISSUER, scope="account:read orders:read")

    async def act(self, what: str) -> None:
        """Do what ends something, at the server that is told."""
        if what in ("the client is disabled", "the user is disabled"):
            path = f"/clients/{self.client.id}" if "client" in what else f"/users/{self.user.id}"
            answer = await self.operator("POST", f"{path}/disable")
        elif what == "the secret is withdrawn":
            path = f"/clients/{self.client.id}/secrets"
            [old] = (await self.operator("GET", path)).json()
            assert (await self.operator("POST", path, {"overlap": 3600})).status_code == 201
            answer = await self.operator("DELETE", f"{path}/{old['id']}")
        elif what == "the role loses a scope":
            answer = await self.operator("PATCH", "/roles/user", {"scopes": ["account:read"]})
        else:
            token = self.tokens["access_token" if "access" in what else "refresh_token"]
            answer = await self.pair.here.revoke(self.client, token)
        assert answer.status_code in (200, 204), answer.text

    async def is_known(self, what: str) -> bool:
        """Tell whether the server that was not told acts on it."""
        there = self.pair.there
        if what in ("the client is disabled", "the secret is withdrawn"):
            answer = await there.token(self.client, grant_type="client_credentials")
            return answer.status_code == 401 and answer.json()["error"] == "invalid_client"
        if what == "the role loses a scope":
            return "orders:read" not in (await self.sign_in(self.another))["scope"].split()
        refused = (await there.me(self.tokens["access_token"])).status_code == 401
        return refused and not await is_active(there, self.reader, self.tokens["access_token"])


ENDINGS = {
    "the client is disabled": 401,
    "the secret is withdrawn": 401,
    "the user is disabled": 400,
    "the access token is revoked": 200,
    "the refresh token is revoked": 400,
    "the role loses a scope": 200,
}
"""What ends, and what a refresh hears afterwards."""


@pytest.mark.case("INT-06")
async def test_what_ends_at_one_replica_has_ended_at_the_other_within_a_second(pair: Pair) -> None:
    """
    Clients, secrets and what roles hold may be remembered for a second; users, sessions and tokens are not at all.

    The other one has dealt with all of it the moment before. A busy machine has a few seconds more.
    """
    hand, there = pair.hand, pair.there
    operator = await operating(pair.here)
    reader = await hand.a_client(grant_types=(), introspect=(ISSUER, SIBLING))
    for what, status in ENDINGS.items():
        client, user, another = await hand.a_client(), await hand.a_user(), await hand.a_user()
        scene = Scene(pair, operator, client, reader, user, another)
        scene.tokens = await scene.sign_in(user)
        assert not await scene.is_known(what)
        assert (await there.token(client, grant_type="client_credentials")).status_code == 200

        await scene.act(what)

        async def known(scene: Scene = scene, what: str = what) -> bool:
            return await scene.is_known(what)

        assert await until(known, f"{what}, and the other one does not know") < PROMISE
        refreshed = await there.refresh(client, scene.tokens["refresh_token"])
        assert refreshed.status_code == status, (what, refreshed.text)


# -- what one does for both -------------------------------------------------------------------------------------------


def runs_of(replica: Replica, event: str) -> list[dict[str, Any]]:
    """Return what a server has logged under this name."""
    written = replica.server.log_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last one may not be whole yet
    return [line for line in lines if line["event"] == event]


@pytest.mark.case("OPS-13")
async def test_each_piece_of_a_job_is_done_once_whoever_does_it(pair: Pair) -> None:
    """Both seal the trail whenever it is their turn; every row is sealed once, in one chain without a gap."""
    client, user = await pair.hand.a_client(), await pair.hand.a_user()
    for _ in range(2):
        for replica in (pair.here, pair.there):
            await replica.sign_in(client, user)

        async def all_sealed() -> bool:
            waiting = select(func.count()).select_from(audit_events).where(audit_events.c.seq.is_(None))
            return bool((await pair.hand.execute(waiting))[0][0] == 0)

        await until(all_sealed, "nobody seals what was written")
    rows = await pair.hand.execute(select(audit_events.c.seq).order_by(audit_events.c.seq))
    assert [row.seq for row in rows] == list(range(rows[0].seq, rows[0].seq + len(rows)))

    async def all_told() -> bool:
        runs = [run for replica in (pair.here, pair.there) for run in runs_of(replica, "audit.sealed")]
        return sum(run["rows"] for run in runs) >= len(rows)

    await until(all_told, "somebody has not said what it sealed")
    runs = [run for replica in (pair.here, pair.there) for run in runs_of(replica, "audit.sealed")]
    assert sum(run["rows"] for run in runs) == len(rows)
    assert len({run["seq"] for run in runs}) == len(runs)


@pytest.mark.case("OPS-22")
async def test_what_a_killed_replica_was_doing_another_does_when_its_lease_has_run_out(
    way: Way, redis_url: str
) -> None:
    """Not before. Its transaction has left nothing, and no session of it lives on."""
    held = select(leases.c.holder, leases.c.until).where(leases.c.name == "audit_seal")
    async with (
        running(test_settings(way.direct), SystemClock()) as hand,
        await psycopg.AsyncConnection.connect(plain(way.direct), autocommit=True) as watcher,
    ):
        await watcher.execute(
            "CREATE TEMPORARY VIEW others AS SELECT wait_event_type, state, now() - state_change AS lasting"
            " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        client, user = await hand.a_client(), await hand.a_user()

        async def sessions(which: str) -> int:
            # Within a transaction, who has connected since the first look would not be seen.
            await watcher.execute("SELECT pg_stat_clear_snapshot()")
            row = await (await watcher.execute(f"SELECT count(*) FROM others WHERE {which}")).fetchone()  # noqa: S608
            return int(row[0]) if row else 0

        async def holder() -> str | None:
            [(name, ends)] = await hand.execute(held)
            return name if name is not None and ends > hand.clock.now() + timedelta(seconds=10) else None

        async with replicas(hand, way.url, redis_url, number=1, **way.settings) as (victim,):
            async with watcher.transaction():
                await watcher.execute("SELECT 1 FROM audit_chain FOR UPDATE")
                await victim.sign_in(client, user)

                async def in_the_middle() -> bool:
                    """Stop the server where it waits for the row, before it gives up and gives its lease back."""
                    if not await sessions("wait_event_type = 'Lock'"):
                        return False
                    victim.server.send(signal.SIGSTOP)
                    if await holder():
                        return True
                    victim.server.send(signal.SIGCONT)
                    return False

                await until(in_the_middle, "nobody seals what was written")
                dead = await holder()
                victim.server.kill()
            async with replicas(hand, way.url, redis_url, number=1, **way.settings) as (heir,):
                await asyncio.sleep(6)  # more than lies between two turns at the job
                assert await holder() == dead, "the lease stands"
                assert runs_of(heir, "audit.sealed") == []

                async def nobody_lives_on() -> bool:
                    return await sessions("state LIKE 'idle in%' AND lasting > interval '1 s'") == 0

                # A machine that stands still makes one of the living look like that, but not for long.
                await until(nobody_lives_on, "a session of the dead one lives on", patience=3)

                await hand.execute(update(leases).where(leases.c.name == "audit_seal").values(until=hand.clock.now()))

                async def sealed() -> bool:
                    return bool(runs_of(heir, "audit.sealed"))

                await until(sealed, "the other one does not take over")


# -- a cold start -----------------------------------------------------------------------------------------------------


@pytest.fixture
def keyless(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a migrated database in which nobody has made a key yet."""
    name = f"replicas_{secrets.token_hex(4)}"
    url = postgres_server.create_database(name)
    migrate(url)
    yield url
    postgres_server.drop_database(name)


@pytest.mark.case("JWT-19")
async def test_processes_that_start_together_on_an_empty_database_agree_on_their_keys(
    keyless: str, lead: Callable[[str], Way]
) -> None:
    """Both publish the one key that signs and the one that waits; there is one data key of each purpose."""
    way = lead(keyless)
    async with servers(2, way.url, **way.settings) as started:
        published = [httpx2.get(f"{server.url}/.well-known/jwks.json", timeout=30).json() for server in started]
        assert published[0] == published[1]
        kids = {key["kid"] for key in published[0]["keys"]}
        assert len(kids) == 2
        with psycopg.connect(plain(way.direct)) as connection:
            assert {row[0] for row in connection.execute("SELECT kid FROM signing_keys")} == kids
            purposes = [row[0] for row in connection.execute("SELECT purpose FROM data_keys")]
        assert sorted(purposes) == sorted(PURPOSES)
