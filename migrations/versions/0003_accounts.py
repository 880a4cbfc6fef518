"""
Make room for what people and operators do by themselves: API keys, mails, deletion, job leases, the audit chain.

The version before this one neither reads nor writes any of it: every new column is empty or has a default.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from identity_service.infra.tables import JsonValue, UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_PARENTS = {"moderator": "user", "admin": "moderator", "super_admin": "admin"}
_LEASES = ("audit_retention", "audit_seal", "cleanup", "key_expiry", "outbox", "purge")


def _new_columns() -> dict[str, list[sa.Column[Any]]]:
    """Return the columns that existing tables gain."""
    return {
        "users": [
            sa.Column("name", sa.String(length=200), nullable=True),
            sa.Column("deleted_at", UtcDateTime(), nullable=True),
            sa.Column("deleted_as", JsonValue, nullable=True),
        ],
        "clients": [sa.Column("exchange_audiences", JsonValue, nullable=False, server_default=sa.text("'[]'"))],
        "refresh_families": [
            sa.Column("user_agent", sa.String(length=256), nullable=True),
            sa.Column("network", sa.String(length=64), nullable=True),
        ],
        "audit_events": [
            sa.Column("seq", sa.BigInteger(), nullable=True),
            sa.Column("mac", sa.LargeBinary(), nullable=True),
            sa.Column("mac_kid", sa.String(length=32), nullable=True),
        ],
        "roles": [sa.Column("description", sa.Text(), nullable=True)],
    }


def upgrade() -> None:
    """Add columns and tables; none of it rewrites a table or waits for its rows."""
    for table, columns in _new_columns().items():
        for column in columns:
            op.add_column(table, column)
    with op.batch_alter_table("roles") as roles:
        roles.add_column(sa.Column("parent", sa.String(length=64), nullable=True))
        roles.create_foreign_key(op.f("fk_roles_parent"), "roles", ["parent"], ["name"])
    known = sa.table("roles", sa.column("name", sa.String()), sa.column("parent", sa.String()))
    for name, parent in _PARENTS.items():
        op.execute(sa.update(known).where(known.c.name == name).values(parent=parent))

    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=11), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("client_id", sa.String(length=64), nullable=True),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("networks", JsonValue, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("mac_kid", sa.String(length=32), nullable=False),
        sa.Column("last4", sa.String(length=4), nullable=False),
        sa.Column("previous_digest", sa.LargeBinary(), nullable=True),
        sa.Column("previous_mac_kid", sa.String(length=32), nullable=True),
        sa.Column("previous_expires_at", UtcDateTime(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("rotated_at", UtcDateTime(), nullable=True),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("expiry_warned_at", UtcDateTime(), nullable=True),
        sa.Column("last_used_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("(user_id IS NULL) <> (client_id IS NULL)", name=op.f("ck_api_keys_one_owner")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_api_keys_user_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["client_id"], ["clients.id"], name=op.f("fk_api_keys_client_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    for name in ("user_id", "client_id", "expires_at"):
        op.create_index(op.f(f"ix_api_keys_{name}"), "api_keys", [name], unique=False)

    op.create_table(
        "email_tokens",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("purpose", sa.String(length=16), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("user_epoch", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("mac_kid", sa.String(length=32), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_email_tokens_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_email_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_email_tokens_digest")),
        sa.UniqueConstraint("user_id", "purpose", name=op.f("uq_email_tokens_user_id_purpose")),
    )
    op.create_index(op.f("ix_email_tokens_expires_at"), "email_tokens", ["expires_at"], unique=False)

    op.create_table(
        "outbox",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("template", sa.String(length=32), nullable=False),
        sa.Column("recipient", sa.String(length=254), nullable=False),
        sa.Column("context", JsonValue, nullable=False),
        sa.Column("token_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["token_id"], ["email_tokens.id"], name=op.f("fk_outbox_token_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(op.f("ix_outbox_token_id"), "outbox", ["token_id"], unique=False)
    op.create_index(op.f("ix_outbox_next_attempt_at"), "outbox", ["next_attempt_at"], unique=False)

    op.bulk_insert(sa.table("locks", sa.column("name")), [{"name": "administrators"}])
    leases = op.create_table(
        "leases",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=True),
        sa.Column("until", UtcDateTime(), nullable=True),
        sa.Column("done_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.bulk_insert(leases, [{"name": name} for name in _LEASES])

    op.create_table(
        "spent_bootstrap_secrets",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("spent_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_spent_bootstrap_secrets")),
    )

    chain = op.create_table(
        "audit_chain",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("mac", sa.LargeBinary(), nullable=False),
        sa.Column("base_seq", sa.BigInteger(), nullable=False),
        sa.Column("base_mac", sa.LargeBinary(), nullable=False),
        sa.Column("base_kid", sa.String(length=32), nullable=True),
        sa.Column("base_proof", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_chain")),
    )
    op.bulk_insert(chain, [{"id": 1, "seq": 0, "mac": bytes(32), "base_seq": 0, "base_mac": bytes(32)}])


def downgrade() -> None:
    """Drop what was added: API keys, unsent mails, deleted users' old names and the audit chain's seals are gone."""
    for table in ("audit_chain", "spent_bootstrap_secrets", "leases", "outbox", "email_tokens", "api_keys"):
        op.drop_table(table)
    op.execute("DELETE FROM locks WHERE name = 'administrators'")
    with op.batch_alter_table("roles") as roles:
        roles.drop_constraint(op.f("fk_roles_parent"), type_="foreignkey")
        roles.drop_column("parent")
    for table, columns in _new_columns().items():
        with op.batch_alter_table(table) as changed:
            for column in columns:
                changed.drop_column(column.name)
