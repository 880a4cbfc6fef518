"""The database roles of deploy/postgresql: the service works under its own, and whoever steals it gets rows at most."""

import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.rows import TupleRow
from sqlalchemy import text as sql_text
from sqlalchemy.engine import make_url

from identity_service.infra.audit import AuditChain, AuditTrail
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Database
from identity_service.infra.migrate import migrate
from identity_service.infra.runtime.envelope import MasterKeys
from identity_service.infra.tables import SCHEMA_REVISION, metadata
from identity_service.main.jobs import leased_jobs
from tests.support import servers
from tests.support.addresses import plain
from tests.support.clock import FrozenClock
from tests.support.commands import Cli, Forge, in_production
from tests.support.servers import LocalPostgres
from tests.support.service import MASTER_KEY, PASSWORD, Service, running, test_settings
from tests.support.trail import Trail

pytestmark = pytest.mark.xdist_group("database roles")

_FOLDER = Path(__file__).parents[2] / "deploy" / "postgresql"
_ROWS = frozenset(("SELECT", "INSERT", "UPDATE", "DELETE"))
_FEWER = {
    "locks": {"SELECT", "UPDATE"},
    "leases": {"SELECT", "UPDATE"},
    "audit_chain": {"SELECT", "UPDATE"},
    "spent_bootstrap_secrets": {"SELECT", "INSERT"},
    "audit_events": {"SELECT", "DELETE"},  # and some columns of INSERT and UPDATE
}
"""What the service may do to tables of which it may not do everything to every row."""


def run_script(url: str, name: str) -> None:
    """Run one of the files as whoever the URL names, as psql would."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((_FOLDER / name).read_bytes())


@dataclass(frozen=True)
class Roles:
    """One database, and its address as each role."""

    administrator: str
    migrator: str
    service: str

    @property
    def engine_url(self) -> str:
        """The service's address in SQLAlchemy's form."""
        return self.service.replace("postgresql:", "postgresql+psycopg:", 1)

    def as_service(self, statement: str) -> list[TupleRow]:
        """Run one statement as who got hold of the service's password."""
        return self._run(self.service, statement)

    def as_migrator(self, statement: str) -> list[TupleRow]:
        """Run one statement as the owner of the tables."""
        return self._run(self.migrator, statement)

    @staticmethod
    def _run(url: str, statement: str) -> list[TupleRow]:
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def server() -> Iterator[LocalPostgres]:
    """A server of our own: roles belong to a server, not to a database, and nobody else shall meet ours."""
    with servers.own_postgres() as running_server:
        yield running_server


@pytest.fixture(scope="module")
def prepare(server: LocalPostgres) -> Callable[[], Roles]:
    """Return what makes a database as deploy/README.md says; its administrator is no superuser."""
    with psycopg.connect(plain(server.url), autocommit=True) as connection:
        connection.execute("CREATE ROLE administrator LOGIN CREATEROLE PASSWORD 'administrator'")
        connection.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger'")

    def made() -> Roles:
        name = f"identity_{secrets.token_hex(4)}"
        with psycopg.connect(plain(server.url), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER administrator").format(sql.Identifier(name)))
        address = make_url(server.url).set(drivername="postgresql", database=name)

        def url(role: str) -> str:
            return address.set(username=role, password=role).render_as_string(hide_password=False)

        roles = Roles(url("administrator"), url("identity_migrator"), url("identity_service"))
        run_script(roles.administrator, "roles.sql")
        with psycopg.connect(roles.administrator, autocommit=True) as connection:
            for role in ("identity_migrator", "identity_service"):
                statement = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(role))
                connection.execute(statement)
        migrate(roles.migrator.replace("postgresql:", "postgresql+psycopg:", 1))
        run_script(roles.migrator, "grants.sql")
        return roles

    return made


@pytest.fixture(scope="module")
def roles(prepare: Callable[[], Roles]) -> Roles:
    """A migrated database with its roles, for tests that leave nothing behind."""
    return prepare()


@pytest.fixture
async def limited(prepare: Callable[[], Roles]) -> AsyncIterator[Service]:
    """The service, connected as its own role."""
    async with running(test_settings(prepare().engine_url)) as service:
        yield service


@pytest.fixture
async def trail(prepare: Callable[[], Roles]) -> AsyncIterator[Trail]:
    """An audit trail that begins 500 days ago, written as the service."""
    clock = FrozenClock(datetime.now(UTC) - timedelta(days=500))
    db, keys = Database(prepare().engine_url), DataKeys(MasterKeys.parse(MASTER_KEY), clock)
    try:
        await db.run(keys.load)
        yield Trail(db, clock, keys, AuditTrail(clock), AuditChain(clock, keys))
    finally:
        await db.close()


def test_who_forgot_the_grants_is_not_sent_to_migrate(prepare: Callable[[], Roles], tmp_path: Path) -> None:
    """As after a restore without privileges: the schema is there, and the role may not look at it."""
    roles = prepare()
    roles.as_migrator("REVOKE SELECT ON alembic_version FROM identity_service")
    with contextlib.closing(Forge(tmp_path)) as forge:
        said = Cli(forge, in_production(roles.engine_url, tmp_path)).run("migrate", "--check").refused()
    assert "permission denied for table alembic_version" in said
    assert "run `identity-service migrate`" not in said


# -- the service needs no more ----------------------------------------------------------------------------------------


@pytest.mark.case("DEP-08")
async def test_a_user_signs_in_refreshes_and_signs_out_under_the_service_s_role(limited: Service) -> None:
    """Keys are made, a family is started and moved on, a token is asked about and revoked, rows are recorded."""
    client, user = await limited.a_client(introspect=("https://orders.example",)), await limited.a_user()
    tokens = await limited.sign_in(client, user, resource="https://orders.example")
    asked = await limited.introspect(client, tokens["access_token"])
    assert asked.json()["active"] is True
    refreshed = await limited.refresh(client, tokens["refresh_token"])
    assert refreshed.status_code == 200
    assert (await limited.revoke(client, refreshed.json()["refresh_token"])).status_code == 200
    assert (await limited.refresh(client, refreshed.json()["refresh_token"])).json()["error"] == "invalid_grant"
    wrong = await limited.token(client, grant_type="password", username=user.username, password=PASSWORD[:-1])
    assert wrong.json()["error"] == "invalid_grant"
    assert await limited.events("sign_in.failed") != []


@pytest.mark.case("DEP-08")
async def test_every_job_runs_under_the_service_s_role(limited: Service) -> None:
    """What one replica does for all."""
    await limited.a_user()
    for job in leased_jobs(limited.services):
        await job.step()
    [(unsealed,)] = await limited.execute(sql_text("SELECT count(*) FROM audit_events WHERE seq IS NULL"))
    assert unsealed == 0


@pytest.mark.case("DEP-08")
async def test_old_rows_are_removed_in_good_order_under_the_service_s_role(trail: Trail) -> None:
    """Sealed, kept for their time, removed by the service, and the chain still holds."""
    await trail.write(6)
    await trail.seal()
    trail.clock.set(datetime.now(UTC))
    await trail.write(3)
    await trail.seal()
    removed = await trail.within(lambda tx: trail.chain.retain(tx, datetime.now(UTC) - timedelta(days=400)))
    assert removed == 6
    await trail.seal()
    assert (await trail.verify()).fault is None


def test_both_scripts_can_be_run_again(roles: Roles) -> None:
    """Also while the service runs: nothing that it may do goes away in between."""
    before = privileges(roles)
    run_script(roles.administrator, "roles.sql")
    run_script(roles.migrator, "grants.sql")
    assert privileges(roles) == before


def test_a_table_that_a_later_migration_adds_is_readable_and_writable(roles: Roles) -> None:
    """The version that needs it starts without anybody's having granted anything."""
    roles.as_migrator("CREATE TABLE from_the_future (id bigint GENERATED BY DEFAULT AS IDENTITY, name text)")
    try:
        roles.as_service("INSERT INTO from_the_future (name) VALUES ('a')")
        roles.as_service("UPDATE from_the_future SET name = 'b'")
        assert roles.as_service("DELETE FROM from_the_future RETURNING id, name") == [(1, "b")]
    finally:
        roles.as_migrator("DROP TABLE from_the_future")


# -- and can no more --------------------------------------------------------------------------------------------------


def privileges(roles: Roles) -> dict[str, set[str]]:
    """Return what the service may do to whole tables."""
    held: dict[str, set[str]] = {}
    for table, privilege in roles.as_service(
        "SELECT table_name, privilege_type FROM information_schema.table_privileges WHERE grantee = current_user"
    ):
        held.setdefault(table, set()).add(privilege)
    return held


@pytest.mark.case("DEP-08")
def test_each_table_may_be_used_as_far_as_the_service_uses_it(roles: Roles) -> None:
    """A new table is in this list, or has every row open to the service."""
    wanted = {table: set(_FEWER.get(table, _ROWS)) for table in metadata.tables}
    assert privileges(roles) == {**wanted, "alembic_version": {"SELECT"}}


@pytest.mark.case("DEP-08")
@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE loot (a text)",
        "CREATE TEMPORARY TABLE loot (a text)",
        "CREATE SCHEMA loot",
        "CREATE FUNCTION loot() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE EXTENSION pg_stat_statements",
        "CREATE DATABASE loot",
        "CREATE ROLE loot",
        "ALTER TABLE users ADD COLUMN loot text",
        "ALTER TABLE users OWNER TO CURRENT_USER",
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        "DROP TRIGGER audit_events_stay ON audit_events",
        "DROP FUNCTION audit_events_stay() CASCADE",
        "DROP TABLE users",
        "DROP INDEX ix_audit_events_seq",
        "CREATE INDEX loot ON users (username)",
        "CREATE VIEW loot AS SELECT * FROM users",
        "TRUNCATE users",
        "SET ROLE identity_migrator",
        "SET SESSION AUTHORIZATION identity_migrator",
        "SET session_replication_role = replica",
        "COPY users TO PROGRAM 'cat'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT rolpassword FROM pg_authid",
    ],
)
def test_the_service_s_role_changes_no_structure_and_gains_no_right(roles: Roles, statement: str) -> None:
    """Whoever steals its password has rows, and no way up."""
    with pytest.raises(errors.InsufficientPrivilege):
        roles.as_service(statement)


@pytest.mark.case("DEP-08")
def test_the_service_s_role_hands_nothing_on(roles: Roles) -> None:
    """PostgreSQL only warns of a grant that grants nothing, so the outcome is looked at."""
    roles.as_service("GRANT SELECT ON users TO stranger")
    assert roles.as_migrator("SELECT has_table_privilege('stranger', 'users', 'SELECT')") == [(False,)]


@pytest.mark.case("DEP-08")
async def test_no_row_of_the_audit_trail_is_altered_or_removed_before_its_time(trail: Trail) -> None:
    """Neither a sealed one, nor one that waits for its seal; a stranger's row cannot claim a seal."""
    await trail.write(4)
    await trail.seal()
    trail.clock.set(datetime.now(UTC) - timedelta(days=300))
    await trail.write(2)
    await trail.seal()
    await trail.write(2)
    trail.clock.set(datetime.now(UTC) - timedelta(days=500))  # old as it looks, nobody has sealed it
    await trail.write(1)
    address = plain(trail.db.url)
    thief = Roles("", "", address)
    before = thief.as_service("SELECT * FROM audit_events ORDER BY id")
    for statement in (
        "UPDATE audit_events SET event = 'sign_in'",
        "UPDATE audit_events SET actor = 'somebody else' WHERE seq IS NULL",
        "UPDATE audit_events SET at = at - interval '1 year'",
        "UPDATE audit_events SET seq = seq + 100",
        "UPDATE audit_events SET mac = NULL WHERE seq = 2",
        "DELETE FROM audit_events",
        "DELETE FROM audit_events WHERE seq IS NULL",
        "DELETE FROM audit_events WHERE seq IS NULL AND at < now() - interval '400 days'",
        "DELETE FROM audit_events WHERE seq = 6",
        "INSERT INTO audit_events (at, event, occurrences, detail, seq) VALUES (now(), 'sign_in', 1, '{}', 1)",
        "INSERT INTO audit_events (id, at, event, occurrences, detail) VALUES (1, now(), 'sign_in', 1, '{}')",
        "TRUNCATE audit_events",
        "DELETE FROM audit_chain",
        "INSERT INTO audit_chain SELECT * FROM audit_chain",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            thief.as_service(statement)
    assert thief.as_service("SELECT * FROM audit_events ORDER BY id") == before


@pytest.mark.case("DEP-08")
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE alembic_version SET version_num = '9999'",
        "DELETE FROM spent_bootstrap_secrets",
        "UPDATE spent_bootstrap_secrets SET digest = 'x'",
        "DELETE FROM locks",
        "INSERT INTO leases (name) VALUES ('mine')",
    ],
)
def test_what_only_the_migration_or_nobody_writes_is_refused(roles: Roles, statement: str) -> None:
    """A spent secret cannot be made good again, nor the schema be called newer than it is."""
    with pytest.raises(errors.InsufficientPrivilege):
        roles.as_service(statement)


def test_nobody_else_comes_into_the_database(roles: Roles) -> None:
    """Neither to look nor to leave anything."""
    strangers = make_url(roles.service).set(username="stranger", password="stranger")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(strangers.render_as_string(hide_password=False))


@pytest.mark.case("DEP-08")
def test_whoever_connects_as_the_service_is_bounded_in_time_and_number(roles: Roles) -> None:
    """With the role's own settings, whatever the program forgets to ask for."""
    for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
        [(value,)] = roles.as_service(f"SHOW {name}")
        assert value != "0", name
    [(limit,)] = roles.as_service("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user")
    assert limit > 0


def test_the_migrator_owns_everything_and_has_migrated_to_this_version(roles: Roles) -> None:
    """No table is left to who administers the server."""
    owners = roles.as_migrator("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == [("identity_migrator",)]
    [(revision,)] = roles.as_service("SELECT max(version_num) FROM alembic_version")
    assert revision >= SCHEMA_REVISION


def test_retention_is_asked_for_later_than_the_database_allows_it() -> None:
    """Otherwise the job that removes old rows would fail with the settings as they come."""
    [days] = re.findall(r"interval '(\d+) days'", (_FOLDER / "grants.sql").read_text("utf-8"))
    assert int(days) * 86400 < test_settings("sqlite+aiosqlite:///x").audit_retention
