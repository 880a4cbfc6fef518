"""Remember access tokens that were given back before their time."""

import sqlalchemy as sa
from alembic import op

from identity_service.infra.tables import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; the version before this one does not look at it."""
    op.create_table(
        "revoked_tokens",
        sa.Column("jti", sa.Text(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("jti", name=op.f("pk_revoked_tokens")),
    )
    op.create_index(op.f("ix_revoked_tokens_expires_at"), "revoked_tokens", ["expires_at"], unique=False)


def downgrade() -> None:
    """Drop the table: what was revoked and has not expired yet, an hour at most, is good again."""
    op.drop_index(op.f("ix_revoked_tokens_expires_at"), "revoked_tokens")
    op.drop_table("revoked_tokens")
