"""The migrations make the schema that the code speaks of, on both databases, once, and whoever runs them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, inspect, make_url, select

from identity_service.infra.migrate import migrate
from identity_service.infra.tables import SCHEMA_REVISION, locks, metadata, role_scopes, roles, scopes
from tests.support.migrations import downgrade, migrating_at_once
from tests.support.servers import PostgresServer

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("url", ["postgresql", "sqlite"], indirect=True)


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of the kind that the test asks for."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'folder' / 'identity.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"migrations_{tmp_path.parent.parent.name}_{tmp_path.name}".replace("-", "_").lower()[-60:]
    server.drop_database(name)
    yield server.create_database(name)
    server.drop_database(name)


def engine_of(url: str) -> Engine:
    parsed = make_url(url)
    return create_engine(parsed.set(drivername=parsed.drivername.replace("+aiosqlite", "")))


# In the collation "C", which the reflection of a schema does not tell; their own test looks at them.
_BY_PREFIX = {
    *("ix_users_username_c", "ix_users_email_canonical_c"),
    *("ix_users_role_username_c", "ix_users_role_email_canonical_c"),
}


def differences(connection: Connection) -> list[Any]:
    """Return what a new migration would have to change."""
    options = {
        "compare_type": True,
        "compare_server_default": True,
        "include_object": lambda _object, name, *_rest: name not in _BY_PREFIX,
    }
    context = MigrationContext.configure(connection, opts=options)
    return list(compare_metadata(context, metadata))


def snapshot(connection: Connection) -> dict[str, list[Any]]:
    """Return every row, the version's own included."""
    rows: dict[str, list[Any]] = {
        table.name: sorted(map(repr, connection.execute(select(table)).all())) for table in metadata.sorted_tables
    }
    rows["alembic_version"] = list(connection.exec_driver_sql("SELECT version_num FROM alembic_version").all())
    return rows


@BOTH
def test_an_empty_database_gets_the_schema_that_the_code_declares(url: str) -> None:
    """Tables, columns, types, indexes and constraints: nothing is left to migrate."""
    migrate(url)
    engine = engine_of(url)
    with engine.connect() as connection:
        assert differences(connection) == []
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").all() == [(SCHEMA_REVISION,)]
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_names_can_be_searched_by_prefix_in_order(url: str) -> None:
    """The two indexes in the collation "C" are there, and valid."""
    migrate(url)
    engine = engine_of(url)
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            " JOIN pg_collation l ON l.oid = ANY (i.indcollation) WHERE i.indisvalid AND l.collname = 'C'"
        ).scalars()
        assert set(found) >= _BY_PREFIX
    engine.dispose()


@BOTH
def test_unique_names_are_unique_in_the_database(url: str) -> None:
    """Two accounts with one name are prevented by an index, not by whoever looks first."""
    migrate(url)
    engine = engine_of(url)
    found = inspect(engine)
    unique = {tuple(constraint["column_names"]) for constraint in found.get_unique_constraints("users")}
    assert {("username",), ("email_canonical",)} <= unique
    engine.dispose()


@BOTH
def test_migrating_again_changes_nothing(url: str) -> None:
    """The command can stand in every deployment, whatever is already there."""
    migrate(url)
    engine = engine_of(url)
    with engine.connect() as connection:
        before = snapshot(connection)
    migrate(url)
    with engine.connect() as connection:
        assert snapshot(connection) == before
    engine.dispose()


@BOTH
def test_the_way_down_leaves_nothing_and_the_way_up_again_everything(url: str) -> None:
    """Every revision can be taken back."""
    migrate(url)
    downgrade(url, "base")
    engine = engine_of(url)
    assert set(inspect(engine).get_table_names()) <= {"alembic_version", "sqlite_sequence"}
    engine.dispose()
    migrate(url)
    engine = engine_of(url)
    with engine.connect() as connection:
        assert differences(connection) == []
        assert snapshot(connection)["locks"]
    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_five_replicas_that_migrate_at_once_make_one_schema(url: str) -> None:
    """They queue up; one does the work, and all of them end well."""
    program = (
        "import sys; from alembic import command; from identity_service.infra.migrate import migrate;"
        "print(flush=True); sys.stdin.readline(); migrate(sys.argv[1])"
    )
    assert migrating_at_once(program, url, number=5) == [(0, "")] * 5
    engine = engine_of(url)
    with engine.connect() as connection:
        assert differences(connection) == []
        rows = snapshot(connection)
    assert rows["alembic_version"] == [(SCHEMA_REVISION,)]
    assert len(rows["locks"]) == 2
    engine.dispose()


@BOTH
def test_a_new_installation_has_its_locks_and_four_roles_each_within_the_next(url: str) -> None:
    """user ⊂ moderator ⊂ admin ⊂ super_admin; the last holds every scope."""
    migrate(url)
    engine = engine_of(url)
    with engine.connect() as connection:
        assert set(connection.execute(select(locks.c.name)).scalars()) == {"administrators", "schedule"}
        names = connection.execute(select(roles.c.name).order_by(roles.c.rank)).scalars().all()
        held = {
            name: set(connection.execute(select(role_scopes.c.scope).where(role_scopes.c.role == name)).scalars())
            for name in names
        }
        every = set(connection.execute(select(scopes.c.name)).scalars())
    engine.dispose()
    assert names == ["user", "moderator", "admin", "super_admin"]
    assert held["user"] == {"account:read", "account:write"}
    assert held["user"] < held["moderator"] < held["admin"] < held["super_admin"] == every
    assert not {"keys:write", "clients:write", "roles:write"} & held["admin"]
