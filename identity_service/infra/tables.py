"""
Every table and constraint, and the one module that writes it.

All instants are UTC and aware. `OWNERS` names the writer of each table; a test reads the code and holds it to that.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

SCHEMA_REVISION = "0002"
"""The oldest migration this code can work on. Revisions are numbered, so a newer one compares greater."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC instant: `timestamptz` on PostgreSQL; on SQLite a text of fixed width, which sorts as time does."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive datetimes; hand SQLite the UTC wall clock."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime has no place in the database")
        return value.astimezone(UTC).replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Give back an aware UTC datetime."""
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


JsonValue = JSON().with_variant(JSONB(), "postgresql")
RowNumber = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself for INTEGER only

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

locks = Table(
    "locks",
    metadata,
    Column("name", String(32), primary_key=True),
)

data_keys = Table(
    "data_keys",
    metadata,
    Column("purpose", String(32), primary_key=True),
    Column("kid", String(32), primary_key=True),
    Column("kek_id", String(64), nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("kid", String(64), primary_key=True),
    Column("alg", String(16), nullable=False),
    Column("public_jwk", JsonValue, nullable=False),
    Column("kek_id", String(64), nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("published_at", UtcDateTime, nullable=False),
    Column("activates_at", UtcDateTime, nullable=False),
    Column("retires_at", UtcDateTime),
    Column("removed_at", UtcDateTime),
    Column("compromised_at", UtcDateTime),
)

scopes = Table(
    "scopes",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("description", Text, nullable=False),
)

roles = Table(
    "roles",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("rank", Integer, nullable=False, unique=True),
)

role_scopes = Table(
    "role_scopes",
    metadata,
    Column("role", ForeignKey("roles.name", ondelete="CASCADE"), primary_key=True),
    Column("scope", ForeignKey("scopes.name", ondelete="CASCADE"), primary_key=True),
)

users = Table(
    "users",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("username", String(64), nullable=False, unique=True),
    Column("email", String(254), nullable=False),
    Column("email_canonical", String(254), nullable=False, unique=True),
    Column("email_verified_at", UtcDateTime),
    Column("password_hash", Text),
    Column("password_form", Integer, nullable=False),
    Column("password_changed_at", UtcDateTime),
    Column("role", ForeignKey("roles.name"), nullable=False, index=True),
    Column("enabled", Boolean, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

clients = Table(
    "clients",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("first_party", Boolean, nullable=False),
    Column("token_endpoint_auth_method", String(32), nullable=False),
    Column("grant_types", JsonValue, nullable=False),
    Column("redirect_uris", JsonValue, nullable=False),
    Column("scope", Text, nullable=False),
    Column("audiences", JsonValue, nullable=False),
    Column("introspect", JsonValue, nullable=False),
    Column("cors_origins", JsonValue, nullable=False),
    Column("require_pkce", Boolean, nullable=False),
    Column("access_token_ttl", Integer),
    Column("refresh_idle_ttl", Integer),
    Column("refresh_absolute_ttl", Integer),
    Column("refresh_retry_window", Integer, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("epoch_at", UtcDateTime, nullable=False),  # when the epoch moved on; the version before this one reads it
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

client_secrets = Table(
    "client_secrets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("client_id", ForeignKey("clients.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("digest", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
)

refresh_families = Table(
    "refresh_families",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    Column("client_id", ForeignKey("clients.id", ondelete="CASCADE"), nullable=False),
    Column("user_epoch", BigInteger, nullable=False),
    Column("client_epoch", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("parent_nonce", LargeBinary),
    Column("mac_kid", String(32), nullable=False),
    Column("retry_digest", LargeBinary),
    Column("scope", Text, nullable=False),
    Column("audiences", JsonValue, nullable=False),
    Column("auth_time", UtcDateTime, nullable=False),
    Column("amr", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("rotated_at", UtcDateTime, nullable=False),
    # Not indexed: every rotation moves it, and an indexed column would cost the update its cheap in-page form.
    Column("idle_expires_at", UtcDateTime, nullable=False),
    Column("absolute_expires_at", UtcDateTime, nullable=False, index=True),
    Column("revoked_at", UtcDateTime),
    Column("revoked_reason", String(32)),
    Index(None, "user_id", "client_id"),
    Index(None, "client_id"),
)

revoked_tokens = Table(
    "revoked_tokens",
    metadata,
    Column("jti", Text, primary_key=True),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
)

audit_events = Table(
    "audit_events",
    metadata,
    Column("id", RowNumber, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False, index=True),
    Column("event", String(64), nullable=False),
    Column("actor", String(128)),
    Column("target", String(128), index=True),
    Column("client_id", String(64)),
    Column("network", String(64)),
    Column("request_id", String(64)),
    Column("occurrences", Integer, nullable=False),
    Column("detail", JsonValue, nullable=False),
)

OWNERS = {
    "locks": "migrations",
    "data_keys": "identity_service.infra.data_keys",
    "signing_keys": "identity_service.oauth.signing_keys",
    "scopes": "identity_service.accounts.access",
    "roles": "identity_service.accounts.access",
    "role_scopes": "identity_service.accounts.access",
    "users": "identity_service.accounts.users",
    "clients": "identity_service.accounts.clients",
    "client_secrets": "identity_service.accounts.clients",
    "refresh_families": "identity_service.accounts.refresh_families",
    "revoked_tokens": "identity_service.oauth.tokens",
    "audit_events": "identity_service.infra.audit",
}
"""Table → the module that writes it; everybody else asks that module. A package counts with all that is in it."""
