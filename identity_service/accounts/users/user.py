"""A user as the rest of the service sees one, and the columns that make one."""

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, func, null

from identity_service.infra.tables import users


@dataclass(frozen=True, slots=True)
class SignInFacts:
    """What was stored about a user when their password was looked at; the epoch belongs to the hash."""

    user_id: uuid.UUID
    password_hash: str | None
    password_form: int
    enabled: bool
    email_verified: bool
    role: str
    epoch: int


@dataclass(frozen=True, slots=True)
class User:
    """
    A person as stored, without the password.

    `epoch` moves on whenever all sessions end. A deleted user bears the names they had; the row has given them up.
    """

    id: uuid.UUID
    username: str
    email: str
    email_verified_at: datetime | None
    role: str
    enabled: bool
    created_at: datetime
    updated_at: datetime
    name: str | None
    has_password: bool
    epoch: int
    deleted_at: datetime | None


COLUMNS = (
    users.c.id,
    users.c.username,
    users.c.email,
    users.c.email_verified_at,
    users.c.role,
    users.c.enabled,
    users.c.created_at,
    users.c.updated_at,
    users.c.name,
    # Not IS NOT NULL: in a RETURNING clause SQLite 3.40 can take it for true whatever the row holds.
    (func.coalesce(users.c.password_hash, "") != "").label("has_password"),
    users.c.epoch,
    users.c.deleted_at,
    users.c.deleted_as,
)
"""What a statement selects or returns for `as_user`."""

WAS_SOMEBODY: ColumnElement[bool] = users.c.deleted_as.is_not(null())
"""What tells a deleted user from a deleted row that only ever held a name: the names they had."""


def as_user(row: Row[Any]) -> User:
    """Return the user that a row of `COLUMNS` describes."""
    values = dict(row._mapping)
    before = values.pop("deleted_as") or {}
    return User(**values | {name: before[name] for name in ("username", "email") if name in before})
