"""
Remember where this database stands, so that a restored copy of it is noticed.

The version before this one does not look at it. A database that was restored before this migration cannot be told from
one that was not: the mark is made here and now.
"""

import uuid

import sqlalchemy as sa
from alembic import op

from identity_service.infra.tables import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_HERE = (
    "(SELECT oid FROM pg_database WHERE datname = current_database())::text"
    " || '.' || 'installation'::regclass::oid::text || '.' || pg_current_xact_id()::xid::text"
)


def upgrade() -> None:
    """Create the table, and mark this database as the one that is served."""
    table = op.create_table(
        "installation",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("mark", sa.String(length=64), nullable=False),
        sa.Column("restored_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_installation")),
    )
    here: sa.ColumnElement[str] = sa.literal_column(_HERE if op.get_bind().dialect.name == "postgresql" else "''")
    op.execute(sa.insert(table).values(id=uuid.uuid4(), mark=here))


def downgrade() -> None:
    """Drop the table: restored copies are no longer noticed."""
    op.drop_table("installation")
