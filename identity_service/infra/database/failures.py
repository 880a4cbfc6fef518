"""Trouble with the database, told apart from every other answer: the server's state, never a fault in our statement."""

import psycopg
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from identity_service.infra.database import pooler

# SQLSTATE classes and codes that speak of the server's state, never of our statement (PostgreSQL, appendix A).
_UNAVAILABLE_CLASSES = ("08", "53", "57", "58")
_UNAVAILABLE_CODES = ("55P03", "25P03")
_READ_ONLY_CODE = "25006"
_CONFLICT_CODES = ("40001", "40P01")


class DatabaseUnavailable(Exception):
    """The database cannot answer now; nothing was committed by this transaction, or nobody knows. Never "not found"."""

    kind = "unavailable"
    """What the metrics call it."""


class DatabaseReadOnly(DatabaseUnavailable):
    """Whoever answers takes no changes: a standby, or a primary that another one has taken over from."""


class PoolExhausted(DatabaseUnavailable):
    """Every connection is busy, and stayed so for as long as a request waits; the database itself may be well."""

    kind = "pool_exhausted"


class TransactionConflict(DatabaseUnavailable):
    """The transaction lost to another one or its connection died before COMMIT: it left no trace, and may run again."""

    kind = "conflict"


def translate(error: Exception, *, committing: bool) -> Exception:
    """Return the error that callers shall see: ours for trouble with the server, the driver's own for a fault in us."""
    if isinstance(error, PoolTimeout):
        return PoolExhausted("no connection was free")
    if isinstance(error, OSError):
        return DatabaseUnavailable(type(error).__name__)
    if isinstance(error, psycopg.Error):
        cause: BaseException | None = error
        lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    elif isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
        cause, lost = error.orig, error.connection_invalidated
    else:
        return error
    if (sqlite_code := getattr(cause, "sqlite_errorcode", None)) is not None:
        # Busy, full, read-only, I/O trouble are the machine's; 1 (SQLITE_ERROR) is a statement that makes no sense.
        return error if sqlite_code == 1 else DatabaseUnavailable(getattr(cause, "sqlite_errorname", "sqlite"))
    if pooler.has_nothing_to_lend(cause):
        return PoolExhausted("the pooler had no session to lend")
    code = getattr(cause, "sqlstate", None) or ""
    if code in _CONFLICT_CODES:
        return TransactionConflict(code)
    if code == _READ_ONLY_CODE:
        return DatabaseReadOnly(code)
    lost = lost or code.startswith(("08", "57P"))  # 08: what a pooler says when it has lost the server
    if lost and not committing:
        return TransactionConflict(code or "connection lost")
    if (
        lost
        or code.startswith(_UNAVAILABLE_CLASSES)
        or code in _UNAVAILABLE_CODES
        or (not code and isinstance(error, OperationalError | InterfaceError))
    ):
        return DatabaseUnavailable(code or type(cause).__name__)
    return error
