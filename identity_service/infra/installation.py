"""
Whether this database is the one that was served before, or a copy of it that brings back what was ended.

A row says where it was written: in which database, in which table, by which transaction. PostgreSQL knows all three of
the row itself, and none of them can be dumped. A dump that is restored has the row's words and was written elsewhere,
by another transaction, be it into a new database or into the old one. What copies the files, a standby that takes over,
a base backup, an upgrade in place, keeps all three; so does rewriting the table (VACUUM FULL).

A restore to a point in time copies files, too, and SQLite knows nothing of the kind: there nobody notices.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import String, delete, insert, literal_column, select, text
from sqlalchemy.sql import Select

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import new_id
from identity_service.infra.tables import installation

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHERE = (
    "(SELECT oid FROM pg_database WHERE datname = current_database())::text"
    " || '.' || {table}::text || '.' || {by}::text"
)
_OF_THE_ROW = _WHERE.format(table="installation.tableoid", by="installation.xmin")
_OF_A_NEW_ROW = _WHERE.format(table="'installation'::regclass::oid", by="pg_current_xact_id()::xid")
_OTHER_SESSIONS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND application_name = current_setting('application_name')"
)
_IS_THERE = text("SELECT to_regclass('installation')")
_IS_THERE_ON_SQLITE = text("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'installation'")


@dataclass(frozen=True, slots=True)
class Installation:
    """
    What a database says of itself.

    `at_home`: it is the one that was marked, as far as it can tell. `restores` are the instants at which it, or what
    was loaded into it, was last put right after a restore.
    """

    at_home: bool
    restores: tuple[datetime, ...]


async def read_installation(tx: Transaction) -> Installation | None:
    """Return what the database says of itself; None where the schema is too old for it to say anything."""
    if (await tx.execute(_IS_THERE_ON_SQLITE if tx.on_sqlite else _IS_THERE)).scalar() is None:
        return None
    rows = (await tx.execute(_marks(tx.on_sqlite))).all()
    # No row, or a second one, is a dump's doing as well: data alone was loaded into a new schema.
    at_home = tx.on_sqlite or (len(rows) == 1 and rows[0].mark == rows[0].here)
    return Installation(at_home, tuple(sorted(row.restored_at for row in rows if row.restored_at is not None)))


async def mark_installation(tx: Transaction, *, restored_at: datetime | None) -> None:
    """
    Let this database be the one that is served; `restored_at` is when it was last put right after a restore.

    Not within a savepoint, whose rows do not name the transaction.
    """
    here = literal_column("''" if tx.on_sqlite else _OF_A_NEW_ROW, String())
    await tx.execute(delete(installation))
    await tx.execute(insert(installation).values(id=new_id(), mark=here, restored_at=restored_at))


async def other_sessions(tx: Transaction) -> int:
    """Return how many other connections of this program the database has: servers, commands, or a pooler of theirs."""
    if tx.on_sqlite:
        return 0
    count: int = (await tx.execute(_OTHER_SESSIONS)).scalar_one()
    return count


def restore_number(at: datetime) -> int:
    """
    Return the number from which everything goes on that was counted: microseconds since 1970.

    In the time that was lost, counters went on from where the backup has them, and what they counted then may come
    back from outside: an epoch in a token, the seal of a row. Each step takes a transaction, so none can have counted
    as far as the time itself; nor can an earlier restore, for that was earlier.
    """
    return (at - _EPOCH) // timedelta(microseconds=1)


def _marks(on_sqlite: bool) -> Select[tuple[str, datetime | None, str]]:
    here = literal_column("mark" if on_sqlite else _OF_THE_ROW, String())
    return select(installation.c.mark, installation.c.restored_at, here.label("here"))
