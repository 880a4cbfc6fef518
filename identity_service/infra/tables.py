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
    CheckConstraint,
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
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

SCHEMA_REVISION = "0006"
"""The newest migration, whose schema the tables below are. Revisions are numbered, so a newer one compares greater."""
OLDEST_SCHEMA_REVISION = "0004"
"""The oldest migration whose schema this code works on: with an older one it neither starts nor says it is ready."""
LONGEST_USER_AGENT = 256
"""Characters of what a program says about itself; what follows is not looked at."""


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
    Column("rank", Integer, nullable=False, unique=True),  # the order in which roles are listed
    Column("parent", ForeignKey("roles.name")),  # whose scopes the role holds besides its own
    Column("description", Text),
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
    Column("role", ForeignKey("roles.name"), nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("name", String(200)),
    Column("deleted_at", UtcDateTime),
    Column("deleted_as", JsonValue),  # the names of a deleted user, whom others may have taken meanwhile
)
Index("ix_users_role_id", users.c.role, users.c.id)
# PostgreSQL has four more, on username and on email_canonical, each alone and within a role, which only the migration
# can spell: a search by prefix that is sorted and paged needs an index in the collation "C".
for _name, _condition in {
    "ix_users_disabled": "NOT enabled",
    "ix_users_unverified": "email_verified_at IS NULL",
}.items():
    Index(_name, users.c.id, postgresql_where=text(_condition), sqlite_where=text(_condition))
Index(
    "ix_users_deleted_at",
    users.c.deleted_at,
    postgresql_where=text("deleted_at IS NOT NULL"),
    sqlite_where=text("deleted_at IS NOT NULL"),
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
    Column("exchange_audiences", JsonValue, nullable=False, server_default=text("'[]'")),
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
    Column("user_agent", String(LONGEST_USER_AGENT)),  # of the sign-in, as sent
    Column("network", String(64)),  # of the sign-in
    Index(None, "user_id", "client_id"),
    Index(None, "client_id"),
)

revoked_tokens = Table(
    "revoked_tokens",
    metadata,
    Column("jti", Text, primary_key=True),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(11), primary_key=True),
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), index=True),
    Column("client_id", ForeignKey("clients.id", ondelete="CASCADE"), index=True),
    Column("name", String(100), nullable=False),
    Column("scope", Text, nullable=False),
    Column("networks", JsonValue, nullable=False),  # where it may be used from; empty: anywhere
    Column("digest", LargeBinary, nullable=False),
    Column("mac_kid", String(32), nullable=False),
    Column("last4", String(4), nullable=False),
    Column("previous_digest", LargeBinary),
    Column("previous_mac_kid", String(32)),
    Column("previous_expires_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("rotated_at", UtcDateTime),
    Column("expires_at", UtcDateTime, index=True),
    Column("expiry_warned_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    CheckConstraint("(user_id IS NULL) <> (client_id IS NULL)", name="one_owner"),
)
Index(
    "ix_api_keys_revoked_at",
    api_keys.c.revoked_at,
    postgresql_where=text("revoked_at IS NOT NULL"),
    sqlite_where=text("revoked_at IS NOT NULL"),
)

email_tokens = Table(
    "email_tokens",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("purpose", String(16), nullable=False),
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    Column("email", String(254), nullable=False),  # the address that the token was sent to, and proves
    Column("user_epoch", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("mac_kid", String(32), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
    UniqueConstraint("user_id", "purpose"),  # a newer one replaces the older
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("template", String(32), nullable=False),
    Column("recipient", String(254), nullable=False),
    Column("context", JsonValue, nullable=False),
    Column("token_id", ForeignKey("email_tokens.id", ondelete="CASCADE"), index=True),  # a dead link is not sent
    Column("created_at", UtcDateTime, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_attempt_at", UtcDateTime, nullable=False, index=True),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("holder", String(64)),
    Column("until", UtcDateTime),
    Column("done_at", UtcDateTime),  # when the job last ended well
)

installation = Table(
    "installation",
    metadata,
    Column("id", Uuid, primary_key=True),  # not one for all: a dump that is loaded into this table adds its row
    Column("mark", String(64), nullable=False),  # where the row was written, which no dump can bring along
    Column("restored_at", UtcDateTime),  # when this database was last put right after a restore
)

spent_bootstrap_secrets = Table(
    "spent_bootstrap_secrets",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("spent_at", UtcDateTime, nullable=False),
)

audit_chain = Table(
    "audit_chain",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),  # of the newest sealed row
    Column("mac", LargeBinary, nullable=False),
    Column("base_seq", BigInteger, nullable=False),  # of the newest row that retention removed
    Column("base_mac", LargeBinary, nullable=False),
    Column("base_kid", String(32)),
    Column("base_proof", LargeBinary),  # that it was us who removed up to there
    Column("sealed_at", UtcDateTime),
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
    Column("seq", BigInteger),  # its place in the chain; empty until it is sealed
    Column("mac", LargeBinary),
    Column("mac_kid", String(32)),
)
Index("ix_audit_events_seq", audit_events.c.seq, unique=True)
Index(
    "ix_audit_events_unsealed",
    audit_events.c.id,
    postgresql_where=text("seq IS NULL"),
    sqlite_where=text("seq IS NULL"),
)
Index("ix_audit_events_event_at", audit_events.c.event, audit_events.c.at)
Index("ix_audit_events_actor_at", audit_events.c.actor, audit_events.c.at)
Index("ix_audit_events_client_id_at", audit_events.c.client_id, audit_events.c.at)

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
    "api_keys": "identity_service.accounts.api_keys",
    "email_tokens": "identity_service.accounts.email_flows",
    "outbox": "identity_service.infra.outbox",
    "leases": "identity_service.infra.leases",
    "installation": "identity_service.infra.installation",
    "spent_bootstrap_secrets": "identity_service.accounts.bootstrap",
    "audit_chain": "identity_service.infra.audit",
    "audit_events": "identity_service.infra.audit",
}
"""Table → the module that writes it; everybody else asks that module. A package counts with all that is in it."""
