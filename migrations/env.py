"""How alembic reaches the database; `identity-service migrate` hands it the URL."""

from alembic import context
from sqlalchemy import create_engine, text

from identity_service.infra.tables import metadata

_ONE_AT_A_TIME = 0x1DE27170  # the advisory lock that makes simultaneous migrations queue up


def run() -> None:
    """Run the wanted revisions, one process at a time, each revision in a transaction of its own."""
    engine = create_engine(context.config.attributes["url"], hide_parameters=True)
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_lock({_ONE_AT_A_TIME})"))
            connection.execute(text("SET lock_timeout = '5s'"))
            connection.commit()
        context.configure(
            connection=connection, target_metadata=metadata, transaction_per_migration=True, render_as_batch=True
        )
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()
