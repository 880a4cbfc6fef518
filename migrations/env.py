"""How alembic runs the revisions; `identity-service migrate` hands it a connection that is alone in doing so."""

from alembic import context

from identity_service.infra.tables import metadata


def run() -> None:
    """Run the wanted revisions, each in a transaction of its own."""
    given = context.config.attributes
    context.configure(
        connection=given["connection"],
        target_metadata=metadata,
        transactional_ddl=True,  # on SQLite too, where alembic would not expect it
        transaction_per_migration=True,
        render_as_batch=True,
        on_version_apply=given.get("on_version_apply"),
    )
    with context.begin_transaction():
        context.run_migrations()


run()
