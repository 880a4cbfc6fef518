"""
Make room for the job that walks along the whole audit trail, once a day.

The version before this one leaves the row alone. This version without the row says once a minute that it lacks it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_JOB = "audit_verify"
_LEASES = sa.table("leases", sa.column("name", sa.String))


def upgrade() -> None:
    """Make the job's lease."""
    op.execute(sa.insert(_LEASES).values(name=_JOB))


def downgrade() -> None:
    """Remove the job's lease: nobody walks along the trail by themselves any more."""
    op.execute(sa.delete(_LEASES).where(_LEASES.c.name == _JOB))
