"""The revisions, and what a database looks like between them."""

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from identity_service.infra.migrate import connected, script_config


def revisions() -> list[str]:
    """Return every revision, the first one first."""
    scripts = ScriptDirectory.from_config(script_config()).walk_revisions()
    return [script.revision for script in reversed(list(scripts))]


def shape(url: str) -> dict[str, list[str]]:
    """Return the columns of each table."""
    with connected(url) as connection:
        found = inspect(connection)
        names = set(found.get_table_names()) - {"alembic_version"}
        return {name: [column["name"] for column in found.get_columns(name)] for name in sorted(names)}


def downgrade(url: str, revision: str) -> None:
    """Take a database back to a revision."""
    with connected(url) as connection:
        command.downgrade(script_config(connection=connection), revision)
