"""Gates in the database: whoever comes to one waits there, so that a fault meets them in the middle of their work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from tests.faults.stage import Stage

_NUMBER: Final = 4711

_WAITING: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event = 'advisory' AND application_name = 'identity-service'
"""
# A deferred trigger runs in COMMIT itself, when all that the transaction wrote is written. The service waits for a lock
# for two seconds; a busy machine may need longer to bring everybody here.
_GATE: Final = """
    CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = '20s' AS $$
    BEGIN PERFORM pg_advisory_xact_lock_shared({number}); RETURN NEW; END $$;
    CREATE {kind} gate {moment} ON {table} {when} FOR EACH ROW EXECUTE FUNCTION gate();
"""
_MOMENTS: Final = {
    "before it has changed the row": ("TRIGGER", "BEFORE INSERT OR UPDATE", ""),
    "in its COMMIT": ("CONSTRAINT TRIGGER", "AFTER INSERT OR UPDATE", "DEFERRABLE INITIALLY DEFERRED"),
}
MOMENTS: Final = tuple(_MOMENTS)
"""Where a gate can stand."""


@contextmanager
def gate(stage: Stage, table: str, where: str) -> Iterator[psycopg.Connection]:
    """
    Let every transaction that writes to a table wait at one of `MOMENTS`; yield a session to look around with.

    PostgreSQL ends whoever waits for more than five seconds.
    """
    kind, moment, when = _MOMENTS[where]
    with stage.connect() as connection, stage.connect() as holder:
        connection.execute(_GATE.format(number=_NUMBER, kind=kind, moment=moment, when=when, table=table))
        try:
            holder.execute("SELECT pg_advisory_lock(%s)", [_NUMBER])
            yield connection
        finally:
            holder.execute("SELECT pg_advisory_unlock_all()")
            connection.execute(f"DROP TRIGGER gate ON {table}; DROP FUNCTION gate()")


def waiting(connection: psycopg.Connection) -> int:
    """Return how many of the replicas' transactions wait at a gate."""
    row = connection.execute(_WAITING).fetchone()
    return row[0] if row else 0
