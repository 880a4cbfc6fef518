"""Create every table."""

import sqlalchemy as sa
from alembic import op

from identity_service.infra.tables import JsonValue, RowNumber, UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCOPES = {
    "account:read": "Read one's own account",
    "account:write": "Change one's own account",
    "users:read": "Search and read users",
    "users:write": "Create, change, disable and delete users",
    "clients:read": "Read registered clients",
    "clients:write": "Register and change clients",
    "roles:read": "Read roles and scopes",
    "roles:write": "Change roles and scopes",
    "keys:read": "Read the state of the signing keys",
    "keys:write": "Rotate and compromise signing keys",
    "audit:read": "Search the audit trail",
    "stats:read": "Read figures about the service",
}
_USER = ["account:read", "account:write"]
_MODERATOR = [*_USER, "users:read"]
_ADMIN = [*_MODERATOR, "users:write", "clients:read", "roles:read", "audit:read", "stats:read"]
ROLES = {"user": _USER, "moderator": _MODERATOR, "admin": _ADMIN, "super_admin": list(SCOPES)}


def upgrade() -> None:
    """Create the tables, the lock rows, and the roles and scopes that every installation begins with."""
    op.create_table(
        "audit_events",
        sa.Column("id", RowNumber, autoincrement=True, nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("event", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=True),
        sa.Column("target", sa.String(length=128), nullable=True),
        sa.Column("client_id", sa.String(length=64), nullable=True),
        sa.Column("network", sa.String(length=64), nullable=True),
        sa.Column("request_id", sa.String(length=64), nullable=True),
        sa.Column("occurrences", sa.Integer(), nullable=False),
        sa.Column("detail", JsonValue, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    op.create_index(op.f("ix_audit_events_at"), "audit_events", ["at"], unique=False)
    op.create_index(op.f("ix_audit_events_target"), "audit_events", ["target"], unique=False)

    op.create_table(
        "clients",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("first_party", sa.Boolean(), nullable=False),
        sa.Column("token_endpoint_auth_method", sa.String(length=32), nullable=False),
        sa.Column("grant_types", JsonValue, nullable=False),
        sa.Column("redirect_uris", JsonValue, nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("audiences", JsonValue, nullable=False),
        sa.Column("introspect", JsonValue, nullable=False),
        sa.Column("cors_origins", JsonValue, nullable=False),
        sa.Column("require_pkce", sa.Boolean(), nullable=False),
        sa.Column("access_token_ttl", sa.Integer(), nullable=True),
        sa.Column("refresh_idle_ttl", sa.Integer(), nullable=True),
        sa.Column("refresh_absolute_ttl", sa.Integer(), nullable=True),
        sa.Column("refresh_retry_window", sa.Integer(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("epoch_at", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_clients")),
    )
    op.create_table(
        "data_keys",
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("kid", sa.String(length=32), nullable=False),
        sa.Column("kek_id", sa.String(length=64), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("purpose", "kid", name=op.f("pk_data_keys")),
    )
    op.create_table(
        "locks",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_locks")),
    )
    op.create_table(
        "roles",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_roles")),
        sa.UniqueConstraint("rank", name=op.f("uq_roles_rank")),
    )
    op.create_table(
        "scopes",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_scopes")),
    )
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.String(length=64), nullable=False),
        sa.Column("alg", sa.String(length=16), nullable=False),
        sa.Column("public_jwk", JsonValue, nullable=False),
        sa.Column("kek_id", sa.String(length=64), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("published_at", UtcDateTime(), nullable=False),
        sa.Column("activates_at", UtcDateTime(), nullable=False),
        sa.Column("retires_at", UtcDateTime(), nullable=True),
        sa.Column("removed_at", UtcDateTime(), nullable=True),
        sa.Column("compromised_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_signing_keys")),
    )
    op.create_table(
        "client_secrets",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("client_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["client_id"], ["clients.id"], name=op.f("fk_client_secrets_client_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_client_secrets")),
    )
    op.create_index(op.f("ix_client_secrets_client_id"), "client_secrets", ["client_id"], unique=False)

    op.create_table(
        "role_scopes",
        sa.Column("role", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["role"], ["roles.name"], name=op.f("fk_role_scopes_role"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["scope"], ["scopes.name"], name=op.f("fk_role_scopes_scope"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("role", "scope", name=op.f("pk_role_scopes")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("username", sa.String(length=64), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("email_canonical", sa.String(length=254), nullable=False),
        sa.Column("email_verified_at", UtcDateTime(), nullable=True),
        sa.Column("password_hash", sa.Text(), nullable=True),
        sa.Column("password_form", sa.Integer(), nullable=False),
        sa.Column("password_changed_at", UtcDateTime(), nullable=True),
        sa.Column("role", sa.String(length=64), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["role"], ["roles.name"], name=op.f("fk_users_role")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email_canonical", name=op.f("uq_users_email_canonical")),
        sa.UniqueConstraint("username", name=op.f("uq_users_username")),
    )
    op.create_index(op.f("ix_users_role"), "users", ["role"], unique=False)

    op.create_table(
        "refresh_families",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("client_id", sa.String(length=64), nullable=False),
        sa.Column("user_epoch", sa.BigInteger(), nullable=False),
        sa.Column("client_epoch", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.LargeBinary(), nullable=False),
        sa.Column("parent_nonce", sa.LargeBinary(), nullable=True),
        sa.Column("mac_kid", sa.String(length=32), nullable=False),
        sa.Column("retry_digest", sa.LargeBinary(), nullable=True),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("audiences", JsonValue, nullable=False),
        sa.Column("auth_time", UtcDateTime(), nullable=False),
        sa.Column("amr", sa.String(length=64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("rotated_at", UtcDateTime(), nullable=False),
        sa.Column("idle_expires_at", UtcDateTime(), nullable=False),
        sa.Column("absolute_expires_at", UtcDateTime(), nullable=False),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_reason", sa.String(length=32), nullable=True),
        sa.ForeignKeyConstraint(
            ["client_id"], ["clients.id"], name=op.f("fk_refresh_families_client_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_refresh_families_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_refresh_families")),
    )
    op.create_index(
        op.f("ix_refresh_families_absolute_expires_at"), "refresh_families", ["absolute_expires_at"], unique=False
    )
    op.create_index(op.f("ix_refresh_families_client_id"), "refresh_families", ["client_id"], unique=False)
    op.create_index(
        op.f("ix_refresh_families_user_id_client_id"), "refresh_families", ["user_id", "client_id"], unique=False
    )

    if op.get_bind().dialect.name == "postgresql":
        # A rotation rewrites its row in the page it stands in, as long as the page has room for a second version.
        op.execute(
            "ALTER TABLE refresh_families SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02,"
            " autovacuum_analyze_scale_factor = 0.02)"
        )
    op.bulk_insert(sa.table("locks", sa.column("name")), [{"name": "schedule"}])
    op.bulk_insert(
        sa.table("scopes", sa.column("name"), sa.column("description")),
        [{"name": name, "description": description} for name, description in SCOPES.items()],
    )
    op.bulk_insert(
        sa.table("roles", sa.column("name"), sa.column("rank")),
        [{"name": name, "rank": rank} for rank, name in enumerate(ROLES, start=1)],
    )
    op.bulk_insert(
        sa.table("role_scopes", sa.column("role"), sa.column("scope")),
        [{"role": role, "scope": scope} for role, held in ROLES.items() for scope in held],
    )


def downgrade() -> None:
    """Drop every table, and with them everything the service knew."""
    op.drop_index(op.f("ix_refresh_families_user_id_client_id"), "refresh_families")
    op.drop_index(op.f("ix_refresh_families_client_id"), "refresh_families")
    op.drop_index(op.f("ix_refresh_families_absolute_expires_at"), "refresh_families")

    op.drop_table("refresh_families")
    op.drop_index(op.f("ix_users_role"), "users")

    op.drop_table("users")
    op.drop_table("role_scopes")
    op.drop_index(op.f("ix_client_secrets_client_id"), "client_secrets")

    op.drop_table("client_secrets")
    op.drop_table("signing_keys")
    op.drop_table("scopes")
    op.drop_table("roles")
    op.drop_table("locks")
    op.drop_table("data_keys")
    op.drop_table("clients")
    op.drop_index(op.f("ix_audit_events_target"), "audit_events")
    op.drop_index(op.f("ix_audit_events_at"), "audit_events")

    op.drop_table("audit_events")
