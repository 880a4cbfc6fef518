"""
The database: one engine, one way to a transaction, and infrastructure trouble told apart from every other answer.

PostgreSQL is what the service runs on; SQLite is the embedded default for one machine and one process.
"""

from identity_service.infra.database.engine import Database
from identity_service.infra.database.failures import DatabaseUnavailable, PoolExhausted, TransactionConflict
from identity_service.infra.database.transaction import Transaction

__all__ = ["Database", "DatabaseUnavailable", "PoolExhausted", "Transaction", "TransactionConflict"]
