"""
The service behind a real PgBouncer in transaction mode, configured as the file that is shipped says.

A pooler that was spoken of serves; one that nobody spoke of, and a role whose defaults do not fit, are refused with the
words that mend it. Nothing may go wrong later, and at random.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg.errors import LockNotAvailable
from sqlalchemy import Integer, text
from sqlalchemy.engine import make_url
from structlog.testing import capture_logs

from identity_service.infra.database import Database, DatabaseUnavailable, PoolExhausted, Transaction
from identity_service.infra.migrate import migrate
from identity_service.infra.runtime import SystemClock
from identity_service.infra.tables import SCHEMA_REVISION
from identity_service.settings import UnsafeSettings
from tests.support.addresses import plain
from tests.support.commands import Cli, Forge, in_production
from tests.support.fault_proxy import FaultProxy
from tests.support.operators import an_operator
from tests.support.people import signed_in, with_key
from tests.support.pgbouncer import PgBouncer, give_defaults
from tests.support.races import database_errors
from tests.support.server_process import ServerProcess
from tests.support.servers import LocalPostgres, PostgresServer, own_postgres
from tests.support.service import ISSUER, PASSWORD, SIBLING, Service, prepare_keys, running, test_settings
from tests.support.waiting import until, wait_until

SESSIONS = 2
"""How many sessions the pooler lends; the service has more connections than that."""
_ROOT = Path(__file__).parents[2]
HOT = text("SELECT pg_backend_pid() AS pid").columns(pid=Integer())
SETTINGS_NAME = "IDENTITY_DATABASE_POOLER=transaction"
# Poolers that lose what a session is told, each in its way, and one that keeps sessions and loses it all the same.
NOT_SPOKEN_OF: dict[str, dict[str, str]] = {
    "options are refused": {},
    "options are lost": {"ignore_startup_parameters": "options"},
    "sessions are kept": {"pool_mode": "session", "ignore_startup_parameters": "options"},
}


@pytest.fixture
def pooler(database_url: str) -> Iterator[PgBouncer]:
    """A pooler before a database whose role has the defaults."""
    give_defaults(database_url)
    with PgBouncer(database_url, default_pool_size=str(SESSIONS)) as started:
        yield started


@pytest.fixture
def pooled_url(pooler: PgBouncer, database_url: str) -> str:
    """The database's URL through the pooler."""
    return pooler.through(database_url)


@pytest.fixture
async def db(pooled_url: str) -> AsyncIterator[Database]:
    """A database with eight connections to the pooler."""
    found = Database(pooled_url, pool_size=8, pooled=True)
    yield found
    await found.close()


@pytest.fixture
async def pooled(pooled_url: str, redis_url: str) -> AsyncIterator[Service]:
    """The service behind the pooler, with eight connections to it."""
    settings = test_settings(pooled_url, redis_url=redis_url, database_pooler="transaction", key_poll=5)
    async with running(settings) as service:
        yield service


async def pid(tx: Transaction) -> int:
    """Return which session a transaction runs in, asked in both ways there are."""
    row = await tx.fetch_hot(HOT, {})
    assert row is not None
    found: int = (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    assert found == row[0]
    return found


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", NOT_SPOKEN_OF)
def test_a_pooler_that_nobody_spoke_of_is_refused_in_words(
    database_url: str, forge: Forge, tmp_path: Path, how: str
) -> None:
    """By a server and by every command; even if the role has the defaults, for what is prepared would be lost."""
    give_defaults(database_url)
    with PgBouncer(database_url, **NOT_SPOKEN_OF[how]) as pooler:
        url = pooler.through(database_url)
        with pytest.raises(RuntimeError, match="did not start") as refusal:
            ServerProcess(url)
        assert SETTINGS_NAME in str(refusal.value)
        assert "Traceback" not in str(refusal.value)
        assert SETTINGS_NAME in Cli(forge, in_production(url, tmp_path)).run("users", "list").refused()


async def test_an_address_that_comes_to_lead_to_a_pooler_is_noticed_at_the_next_connection(
    database_url: str, pooler: PgBouncer
) -> None:
    """As when a name is given to another machine while the service runs."""
    with FaultProxy.before(database_url) as proxy:
        db = Database(proxy.through(database_url))
        assert await db.run(pid)
        proxy._target = ("127.0.0.1", pooler.port)
        proxy.cut()
        with pytest.raises(DatabaseUnavailable) as refusal:
            await db.run(pid)
        assert SETTINGS_NAME in str(refusal.value.__cause__)
        await db.close()


@pytest.mark.parametrize(
    "changes",
    [{"statement_timeout": "0"}, {"lock_timeout": "1h"}, {"enable_seqscan": "on"}, {"timezone": "Asia/Kathmandu"}],
    ids=lambda changes: next(iter(changes)),
)
async def test_a_role_whose_defaults_do_not_fit_is_told_the_lines_that_mend_it(
    database_url: str, changes: dict[str, str]
) -> None:
    """Run as they stand, and with the pooler connected anew, they do."""
    give_defaults(database_url, **changes)
    with PgBouncer(database_url) as pooler:
        settings = test_settings(pooler.through(database_url), database_pooler="transaction")
        with pytest.raises(UnsafeSettings) as refusal:
            async with running(settings):
                pass
        lines = [line for line in str(refusal.value).splitlines() if "ALTER ROLE" in line]
        assert len(lines) == 1
        with psycopg.connect(plain(database_url), autocommit=True) as connection:
            connection.execute(lines[0].encode())
        assert "RECONNECT" in str(refusal.value)
        pooler.console("RECONNECT")
        async with running(settings) as service:
            assert (await service.http.get("/readyz")).status_code == 200


def test_commands_are_told_the_lines_as_well(database_url: str, forge: Forge, tmp_path: Path) -> None:
    with PgBouncer(database_url) as pooler:
        env = in_production(pooler.through(database_url), tmp_path) | {"IDENTITY_DATABASE_POOLER": "transaction"}
        cli = Cli(forge, env)
        assert cli.run("users", "list").refused().count("ALTER ROLE") >= 5
        give_defaults(database_url)
        pooler.console("RECONNECT")
        assert cli.json("users", "list") == []
        assert "new enough" in cli.run("migrate", "--check").out


@pytest.mark.parametrize("how", NOT_SPOKEN_OF)
@pytest.mark.parametrize("spoken_of", ["none", "transaction"])
def test_a_migration_through_a_pooler_is_refused_in_words(
    postgres_server: PostgresServer, forge: Forge, tmp_path: Path, how: str, spoken_of: str
) -> None:
    """Its lock belongs to a session; in one that is lent on it would keep out nobody, or everybody for ever."""
    name = f"unmigrated_{tmp_path.parent.name}_{tmp_path.name}".replace("-", "_").lower()[-60:]
    url = postgres_server.create_database(name)
    try:
        with PgBouncer(url, **NOT_SPOKEN_OF[how]) as pooler:
            env = in_production(pooler.through(url), tmp_path) | {"IDENTITY_DATABASE_POOLER": spoken_of}
            cli = Cli(forge, env)
            for words in (("migrate",), ("migrate", "--plan")):
                assert "for this command, name PostgreSQL itself" in cli.run(*words).refused()
        with psycopg.connect(plain(url)) as connection:
            assert connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,)
            held = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database WHERE locktype = 'advisory'"
            assert connection.execute(f"{held} AND d.datname = current_database()").fetchone() == (0,)
    finally:
        postgres_server.drop_database(name)


def test_a_migration_beside_the_pooler_heeds_no_default_of_the_role(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """A timeout that is right for requests would end the building of an index."""
    name = f"beside_{tmp_path.parent.name}_{tmp_path.name}".replace("-", "_").lower()[-60:]
    url = postgres_server.create_database(name)
    try:
        give_defaults(url, statement_timeout="1")
        migrate(url)
        with psycopg.connect(plain(url), options="-c statement_timeout=0") as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (SCHEMA_REVISION,)
    finally:
        postgres_server.drop_database(name)


async def test_a_pooler_that_lends_a_session_for_one_statement_is_refused(database_url: str) -> None:
    """Its own words say why; no transaction would be one."""
    give_defaults(database_url)
    with PgBouncer(database_url, pool_mode="statement") as pooler, pytest.raises(RuntimeError) as refusal:
        ServerProcess(pooler.through(database_url), database_pooler="transaction")
    assert "not allowed in statement pooling mode" in str(refusal.value)


# -- what is shipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["postgres", "identity_service"])
async def test_the_shipped_defaults_are_what_the_service_asks_for(who: str) -> None:
    """Given by the administrator or by the role itself; before, the service would not start."""
    with own_postgres() as server:
        url = server.create_database("two-words")
        with psycopg.connect(plain(url), autocommit=True) as connection:
            connection.execute("CREATE ROLE identity_service LOGIN")
        as_service = make_url(url).set(username="identity_service").render_as_string(hide_password=False)
        with PgBouncer(as_service) as pooler:
            db = Database(pooler.through(as_service), pooled=True)
            assert (await db.pooler_fault() or "").count('ALTER ROLE "identity_service" IN DATABASE "two-words"') >= 5
            script = (_ROOT / "deploy" / "postgresql" / "pooler.sql").read_bytes()
            with psycopg.connect(plain(url if who == "postgres" else as_service), autocommit=True) as connection:
                connection.execute(script)
            pooler.console("RECONNECT")
            assert await db.pooler_fault() is None
            await db.close()


# -- what works -------------------------------------------------------------------------------------------------------


async def test_transactions_of_one_connection_run_in_sessions_of_others(db: Database) -> None:
    """And what they say is prepared in none of them."""
    assert await db.pooler_fault() is None
    seen: set[int] = set()
    prepared = text("SELECT count(*) FROM pg_prepared_statements")

    async def look(tx: Transaction) -> int:
        seen.add(await pid(tx))
        await asyncio.sleep(0.001)
        found: int = (await tx.execute(prepared)).scalar_one()
        return found

    for _ in range(20):
        assert await asyncio.gather(*(db.run(look) for _ in range(8))) == [0] * 8
    assert len(seen) == SESSIONS


async def everything(service: Service) -> None:
    """Let people, clients and an operator do what they do, each step as it is promised."""
    client, user = await service.a_client(), await service.a_user()
    reader = await service.a_client(grant_types=(), introspect=(ISSUER, SIBLING))

    async def active(token: str) -> bool:
        return bool((await service.introspect(reader, token)).json()["active"])

    tokens = await service.sign_in(client, user)
    assert await active(tokens["access_token"])
    second = (await service.refresh(client, tokens["refresh_token"])).json()
    third = (await service.refresh(client, second["refresh_token"], key="a-retry-that-is-known")).json()
    again = await service.refresh(client, second["refresh_token"], key="a-retry-that-is-known")
    assert again.json()["refresh_token"] == third["refresh_token"]
    replay = await service.refresh(client, tokens["refresh_token"])
    assert replay.json()["error_description"] == "refresh token reuse detected; session revoked"
    assert (await service.refresh(client, third["refresh_token"])).json()["error"] == "invalid_grant"
    assert not await active(third["access_token"])
    assert (await service.token(client, grant_type="client_credentials")).status_code == 200

    for kind in ("access_token", "refresh_token"):
        tokens = await service.sign_in(client, user)
        assert (await service.revoke(client, tokens[kind])).status_code == 200
        assert not await active(tokens["access_token"])

    person = await signed_in(service, user)
    made = (await person("POST", "/api-keys", {"name": "Script", "scope": ["account:read"]})).json()
    by_key = {"x-api-key": made["key"]}
    assert (await service.http.get("/v1/users/me", headers=by_key)).status_code == 200
    assert (await person("DELETE", f"/api-keys/{made['id']}")).status_code == 204
    assert (await service.http.get("/v1/users/me", headers=by_key)).status_code == 401
    assert (await (await with_key(service, user))("GET")).status_code == 200

    boss = await an_operator(service)
    for path in ("/users?q=user", "/users?role=user&state=enabled", "/audit", "/signing-keys", "/stats", "/clients"):
        answer = await boss("GET", path)
        assert answer.status_code == 200, (path, answer.text)
    assert (await boss("POST", f"/users/{user.id}/disable")).status_code == 204
    assert (await person("GET")).status_code == 401
    for job in ("cleanup", "purge", "audit_seal", "audit_retention"):
        await service.run_job(job)


async def test_everything_people_do_works_in_two_sessions(pooled: Service) -> None:
    await everything(pooled)


async def test_many_at_once_share_two_sessions(pooled: Service) -> None:
    """Forty families over eight connections; each refresh rotates once, whoever waits for whom."""
    client, user = await pooled.a_client(), await pooled.a_user()
    tokens = [(await pooled.sign_in(client, user))["refresh_token"] for _ in range(40)]
    for generation in range(1, 4):
        answers = await asyncio.gather(*(pooled.refresh(client, token) for token in tokens))
        assert {answer.status_code for answer in answers} == {200}
        tokens = [answer.json()["refresh_token"] for answer in answers]
        assert {row.generation for row in await pooled.family_rows()} == {generation}


async def test_the_limits_of_the_role_end_what_takes_too_long(pooled: Service, database_url: str) -> None:
    """503 after two seconds of waiting for a lock, as without a pooler; the token is as good as before."""
    client, user = await pooled.a_client(), await pooled.a_user()
    token = (await pooled.sign_in(client, user))["refresh_token"]
    with psycopg.connect(plain(database_url)) as blocker:
        blocker.execute("SELECT 1 FROM refresh_families FOR UPDATE")
        began = time.monotonic()
        with database_errors() as seen:
            assert (await pooled.refresh(client, token)).status_code == 503
        assert seen == [LockNotAvailable.sqlstate], "neither the statement's limit nor the pool's, and asked once"
        assert time.monotonic() - began > 1.5
    assert (await pooled.refresh(client, token)).status_code == 200


# -- what fails in the middle -----------------------------------------------------------------------------------------


def unavailable(answer: httpx2.Response) -> bool:
    """Tell whether somebody is asked to come back, and nothing else."""
    return answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


@pytest.mark.case("OPS-01")
@pytest.mark.parametrize("end", [PgBouncer.stop, PgBouncer.kill], ids=["stopped", "killed"])
async def test_a_pooler_that_goes_and_comes_back_ends_no_session(
    pooled: Service, pooler: PgBouncer, end: Callable[[PgBouncer], None]
) -> None:
    """503 while it is away, and the keys all the while; afterwards the very token that met the outage is good."""
    client, user = await pooled.a_client(), await pooled.a_user()
    token = (await pooled.sign_in(client, user))["refresh_token"]
    await asyncio.gather(*(pooled.within(pid) for _ in range(8)))
    end(pooler)
    for _ in range(3):
        assert unavailable(await pooled.refresh(client, token))
        assert unavailable(await pooled.token(client, grant_type="password", username=user.username, password=PASSWORD))
    assert (await pooled.http.get("/.well-known/jwks.json")).status_code == 200
    pooler.start()
    for _ in range(9):
        answer = await pooled.refresh(client, token)
        assert answer.status_code == 200, answer.text
        token = answer.json()["refresh_token"]


@pytest.mark.case("OPS-01")
@pytest.mark.parametrize("end", [PgBouncer.stop, PgBouncer.kill], ids=["stopped", "killed"])
async def test_a_restart_of_the_pooler_between_two_requests_is_noticed_by_nobody(
    pooled: Service, pooler: PgBouncer, end: Callable[[PgBouncer], None]
) -> None:
    """Every connection is dead and does not know it; the first one that is tried speaks for all."""
    client, user = await pooled.a_client(), await pooled.a_user()
    tokens = await pooled.sign_in(client, user)
    await asyncio.gather(*(pooled.within(pid) for _ in range(8)))
    end(pooler)
    pooler.start()
    refreshed = await pooled.refresh(client, tokens["refresh_token"])
    assert refreshed.status_code == 200, refreshed.text
    answers = await asyncio.gather(*(pooled.me(refreshed.json()["access_token"]) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}


@contextlib.asynccontextmanager
async def stuck(database_url: str, asking: Callable[[], Awaitable[Any]]) -> AsyncIterator[tuple[Any, Any, int]]:
    """Start asking where every family is locked; yield a connection, the asking, and the session that waits."""
    async with (
        await psycopg.AsyncConnection.connect(plain(database_url), autocommit=True) as watcher,
        await psycopg.AsyncConnection.connect(plain(database_url)) as blocker,
    ):
        await blocker.execute("SELECT 1 FROM refresh_families FOR UPDATE")
        task = asyncio.ensure_future(asking())
        yield watcher, task, await waiting(watcher)
        await blocker.rollback()


async def waiting(watcher: Any, *, other_than: int = 0) -> int:
    """Return the process id of the session that waits for a lock."""
    found: list[int] = []

    async def look() -> bool:
        rows = await watcher.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND pid <> %s",
            [other_than],
        )
        found.extend(row[0] for row in await rows.fetchall())
        return bool(found)

    await until(look, "the request should be waiting for the lock")
    return found[0]


@pytest.mark.case("OPS-03")
async def test_a_session_that_ends_in_mid_transaction_loses_nothing(pooled: Service, database_url: str) -> None:
    """Nothing was committed, so the service tries again by itself, in another session; it rotates once."""
    client, user = await pooled.a_client(), await pooled.a_user()
    token = (await pooled.sign_in(client, user))["refresh_token"]
    async with stuck(database_url, lambda: pooled.refresh(client, token)) as (watcher, asking, first):
        await watcher.execute("SELECT pg_terminate_backend(%s, 1000)", [first])
        await waiting(watcher, other_than=first)
    answer = await asking
    assert answer.status_code == 200, answer.text
    (family,) = await pooled.family_rows()
    assert (family.generation, family.revoked_at) == (1, None)
    assert (await pooled.refresh(client, answer.json()["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-03")
async def test_a_network_that_breaks_behind_the_pooler_in_mid_transaction_loses_nothing(database_url: str) -> None:
    """The pooler says that its server is gone, and nothing was committed: the service tries again, and rotates once."""
    give_defaults(database_url)
    with (
        FaultProxy.before(database_url) as network,
        PgBouncer(network.through(database_url), default_pool_size=str(SESSIONS)) as pooler,
    ):
        settings = test_settings(pooler.through(database_url), database_pooler="transaction", key_poll=5)
        async with running(settings) as service:
            client, user = await service.a_client(), await service.a_user()
            token = (await service.sign_in(client, user))["refresh_token"]
            async with stuck(database_url, lambda: service.refresh(client, token)) as (watcher, asking, first):
                network.cut()
                await waiting(watcher, other_than=first)
            answer = await asking
            assert answer.status_code == 200, answer.text
            (family,) = await service.family_rows()
            assert (family.generation, family.revoked_at) == (1, None)
            assert (await service.refresh(client, answer.json()["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-03")
async def test_a_pooler_that_dies_in_mid_transaction_leaves_nothing_half_done(
    pooled: Service, pooler: PgBouncer, database_url: str
) -> None:
    """Whoever waited hears 503 or is served by the next one; its session's work is undone either way."""
    client, user = await pooled.a_client(), await pooled.a_user()
    token = (await pooled.sign_in(client, user))["refresh_token"]
    async with stuck(database_url, lambda: pooled.refresh(client, token)) as (_, asking, _):
        pooler.kill()
        assert unavailable(await asking)
    with psycopg.connect(plain(database_url)) as connection:
        rows = connection.execute("SELECT generation, revoked_at FROM refresh_families").fetchall()
    assert rows == [(0, None)]
    pooler.start()
    assert (await pooled.refresh(client, token)).status_code == 200


@pytest.mark.case("OPS-08")
async def test_when_every_session_is_lent_requests_are_turned_away_as_busy(database_url: str) -> None:
    """Once, when the pooler says so: to try again would take as long once more. Busy is not away, say the probes."""
    give_defaults(database_url)
    with PgBouncer(database_url, default_pool_size=str(SESSIONS), query_wait_timeout="1") as pooler:
        url = pooler.through(database_url)
        settings = test_settings(url, database_pooler="transaction", key_poll=5)
        async with running(settings, SystemClock()) as service:
            client, user = await service.a_client(), await service.a_user()
            token = (await service.sign_in(client, user))["refresh_token"]
            assert (await service.http.get("/readyz")).status_code == 200
            with contextlib.ExitStack() as stack:
                for _ in range(SESSIONS):
                    taken = stack.enter_context(psycopg.connect(plain(url)))
                    taken.execute("SELECT 1")
                with capture_logs() as logs:
                    assert unavailable(await service.refresh(client, token))
                assert "transaction.repeated" not in {line["event"] for line in logs}, "it has waited once more"
                with pytest.raises(PoolExhausted):
                    await service.within(pid)
                assert (await service.http.get("/readyz")).status_code == 200
            assert (await service.refresh(client, token)).status_code == 200


MOMENTS = [milliseconds / 1000 for milliseconds in range(0, 60, 3)]


async def test_who_leaves_in_the_middle_leaves_no_session_in_a_transaction(db: Database, database_url: str) -> None:
    """Cancelled at any moment; the session that was lent is clean when the next one gets it."""

    async def slowly(tx: Transaction) -> None:
        await tx.execute(text("CREATE TEMPORARY TABLE mine (id int) ON COMMIT DROP"))
        await tx.execute(text("SELECT pg_sleep(0.02)"))

    for moment in MOMENTS:
        task = asyncio.create_task(db.run(slowly))
        await asyncio.sleep(moment)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.gather(*(db.run(pid) for _ in range(4)))
    async with await psycopg.AsyncConnection.connect(plain(database_url), autocommit=True) as watcher:

        async def none_is_left() -> bool:
            rows = await watcher.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
            )
            return await rows.fetchone() == (0,)

        # A session that the pooler has ended takes a moment to go; PostgreSQL would end one that stays after ten.
        await until(none_is_left, "a session is left in a transaction", patience=5)


# -- PostgreSQL behind it ---------------------------------------------------------------------------------------------


@pytest.fixture
def postgres() -> Iterator[LocalPostgres]:
    """A PostgreSQL that the test may stop."""
    with own_postgres() as server:
        yield server


@pytest.mark.case("OPS-01")
async def test_a_postgresql_that_goes_behind_the_pooler_is_an_outage_and_no_refusal(postgres: LocalPostgres) -> None:
    """503 as long as it is away, soon after it is back all is well, without a restart of anything."""
    url = postgres.create_database("behind")
    await asyncio.to_thread(migrate, url)
    await prepare_keys(test_settings(url))
    give_defaults(url)
    with PgBouncer(url) as pooler:
        settings = test_settings(pooler.through(url), database_pooler="transaction", key_poll=5)
        async with running(settings) as service:
            client, user = await service.a_client(), await service.a_user()
            token = (await service.sign_in(client, user))["refresh_token"]
            for mode in ("fast", "immediate"):
                postgres.stop(mode)
                for _ in range(3):
                    assert unavailable(await service.refresh(client, token))
                postgres.start()
                deadline = time.monotonic() + 60
                while unavailable(answer := await service.refresh(client, token)):
                    assert time.monotonic() < deadline, "it should be back"
                    await asyncio.sleep(0.1)
                assert answer.status_code == 200, answer.text
                token = answer.json()["refresh_token"]


# -- a real server ----------------------------------------------------------------------------------------------------


def test_a_server_of_its_own_process_outlives_a_restart_of_the_pooler(
    database_url: str, pooler: PgBouncer, pooled_url: str, redis_url: str
) -> None:
    """Ready, unready, and ready again; its jobs go on."""
    with (
        ServerProcess(pooled_url, redis_url, database_pooler="transaction") as server,
        httpx2.Client(base_url=server.url, timeout=30) as http,
    ):

        def ready() -> bool:
            return http.get("/readyz").status_code == 200

        pooler.stop()
        wait_until(lambda: not ready(), "the probe should have noticed")
        assert http.get("/healthz").status_code == 200
        pooler.start()
        wait_until(ready, "it should be ready again")
        sealed = server.log_text().count("audit.sealed")
        with psycopg.connect(plain(database_url), autocommit=True) as connection:
            connection.execute(
                "INSERT INTO audit_events (at, event, occurrences, detail) VALUES (now(), 'made.up', 1, '{}')"
            )
        wait_until(lambda: server.log_text().count("audit.sealed") > sealed, "its jobs should go on")
        assert server.stop() == 0
