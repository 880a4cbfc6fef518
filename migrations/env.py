"""How alembic reaches the database; `identity-service migrate` hands it the URL."""

import time

from alembic import context
from sqlalchemy import Connection, create_engine, text

from identity_service.infra.tables import metadata

_ONE_AT_A_TIME = 0x1DE27170  # the advisory lock that makes simultaneous migrations queue up


_ASK_AGAIN = 0.2  # seconds


def _wait_for_our_turn(connection: Connection) -> None:
    """Take the lock. Who waits for it inside a statement would hold up the building of an index by who has it."""
    while not connection.execute(text(f"SELECT pg_try_advisory_lock({_ONE_AT_A_TIME})")).scalar_one():
        connection.rollback()
        time.sleep(_ASK_AGAIN)


def run() -> None:
    """Run the wanted revisions, one process at a time, each revision in a transaction of its own."""
    engine = create_engine(context.config.attributes["url"], hide_parameters=True)
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            _wait_for_our_turn(connection)
            connection.execute(text("SET lock_timeout = '5s'"))
            connection.commit()
        context.configure(
            connection=connection, target_metadata=metadata, transaction_per_migration=True, render_as_batch=True
        )
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()
