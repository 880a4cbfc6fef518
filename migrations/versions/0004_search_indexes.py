"""
Index what operators search by, and what the jobs clean up by.

The tables may be large by now, so on PostgreSQL each index is built without holding up who writes. Such a build cannot
be part of a transaction: one that was interrupted leaves an index that is not valid, which the next run replaces.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_INDEXES = {
    "ix_users_role_id": "INDEX {} ON users (role, id)",
    "ix_users_disabled": "INDEX {} ON users (id) WHERE NOT enabled",
    "ix_users_unverified": "INDEX {} ON users (id) WHERE email_verified_at IS NULL",
    "ix_users_deleted_at": "INDEX {} ON users (deleted_at) WHERE deleted_at IS NOT NULL",
    "ix_api_keys_revoked_at": "INDEX {} ON api_keys (revoked_at) WHERE revoked_at IS NOT NULL",
    "ix_audit_events_seq": "UNIQUE INDEX {} ON audit_events (seq)",
    "ix_audit_events_unsealed": "INDEX {} ON audit_events (id) WHERE seq IS NULL",
    "ix_audit_events_event_at": "INDEX {} ON audit_events (event, at)",
    "ix_audit_events_actor_at": "INDEX {} ON audit_events (actor, at)",
    "ix_audit_events_client_id_at": "INDEX {} ON audit_events (client_id, at)",
}
_ON_POSTGRESQL = {
    "ix_users_username_c": 'INDEX {} ON users (username COLLATE "C")',
    "ix_users_email_canonical_c": 'INDEX {} ON users (email_canonical COLLATE "C")',
    "ix_users_role_username_c": 'INDEX {} ON users (role, username COLLATE "C")',
    "ix_users_role_email_canonical_c": 'INDEX {} ON users (role, email_canonical COLLATE "C")',
}
_SUPERSEDED = "ix_users_role"  # by the indexes that begin with the role
_INVALID = sa.text("SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE NOT i.indisvalid")


def upgrade() -> None:
    """Build the indexes that are not there yet."""
    if op.get_bind().dialect.name != "postgresql":
        for name, definition in _INDEXES.items():
            op.execute("CREATE " + definition.format(f"IF NOT EXISTS {name}"))
        op.execute(f"DROP INDEX IF EXISTS {_SUPERSEDED}")
        return
    with op.get_context().autocommit_block():
        broken = set(op.get_bind().execute(_INVALID).scalars())
        for name, definition in {**_INDEXES, **_ON_POSTGRESQL}.items():
            if name in broken:
                op.execute(f"DROP INDEX CONCURRENTLY {name}")
            op.execute("CREATE " + definition.format(f"CONCURRENTLY IF NOT EXISTS {name}"))
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {_SUPERSEDED}")


def downgrade() -> None:
    """Drop the indexes, and build the one that they superseded."""
    op.execute(f"CREATE INDEX IF NOT EXISTS {_SUPERSEDED} ON users (role)")
    for name in {**_INDEXES, **_ON_POSTGRESQL}:
        op.execute(f"DROP INDEX IF EXISTS {name}")
