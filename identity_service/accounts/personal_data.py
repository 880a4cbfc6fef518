"""
Everything that is held about one person, in one piece (GDPR Art. 15 and 20), and no secret of anybody's.

Columns are named one by one: a new one is told when somebody has thought about whether it may be.
"""

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, final

from sqlalchemy import ColumnElement, select

from identity_service.accounts.access import Access
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import api_keys, email_tokens, outbox, refresh_families, users

Part = TypeVar("Part")

MOST_ROWS = 1000
"""Of one kind. Of more the newest are told, and that there are more."""


@dataclass(frozen=True, slots=True)
class HeldProfile:
    """The person's own row, without the password's hash."""

    id: uuid.UUID
    username: str
    name: str | None
    email: str
    email_verified_at: datetime | None
    role: str
    enabled: bool
    has_password: bool
    password_changed_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class HeldSession:
    """A sign-in, ended or not."""

    id: uuid.UUID
    client_id: str
    scope: str
    auth_time: datetime
    amr: str
    user_agent: str | None
    network: str | None
    created_at: datetime
    rotated_at: datetime
    idle_expires_at: datetime
    absolute_expires_at: datetime
    revoked_at: datetime | None
    revoked_reason: str | None


@dataclass(frozen=True, slots=True)
class HeldKey:
    """An API key, ended or not."""

    id: str
    name: str
    scope: str
    networks: list[str]
    last4: str
    created_at: datetime
    rotated_at: datetime | None
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class HeldLink:
    """A link that was mailed and not used."""

    purpose: str
    email: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class HeldMail:
    """A mail to the person that waits to be sent."""

    template: str
    recipient: str
    context: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class HeldEvent:
    """A row of the audit trail; where somebody else acted, their network is not told."""

    at: datetime
    event: str
    actor: str | None
    target: str | None
    client_id: str | None
    network: str | None
    occurrences: int
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class HeldData:
    """All of it. `shortened` names the parts of which there is more than is told here."""

    exported_at: datetime
    profile: HeldProfile
    scopes: list[str]
    sessions: list[HeldSession]
    api_keys: list[HeldKey]
    links: list[HeldLink]
    mails: list[HeldMail]
    events: list[HeldEvent]
    shortened: list[str]


@final
class PersonalData:
    """Collects what is held about a person."""

    def __init__(self, clock: Clock, access: Access, audit: AuditTrail) -> None:
        self._clock = clock
        self._access = access
        self._audit = audit

    async def collect(self, tx: Transaction, user_id: uuid.UUID) -> HeldData:
        """Return everything held about a user; raises LookupError for no such user."""
        columns = [users.c[name] for name in HeldProfile.__slots__ if name != "has_password"]
        has_password = users.c.password_hash.is_not(None).label("has_password")
        found = (
            await tx.execute(select(*columns, has_password).where(users.c.id == user_id, users.c.deleted_at.is_(None)))
        ).first()
        if found is None:
            raise LookupError("there is no such user")
        profile = HeldProfile(**found._mapping)
        f, k, e, o = refresh_families.c, api_keys.c, email_tokens.c, outbox.c
        parts: dict[str, list[Any]] = {
            "sessions": await _newest(tx, HeldSession, f, f.user_id == user_id, f.id.desc()),
            "api_keys": await _newest(tx, HeldKey, k, k.user_id == user_id, k.created_at.desc()),
            "links": await _newest(tx, HeldLink, e, e.user_id == user_id, e.created_at.desc()),
            "mails": await _newest(tx, HeldMail, o, o.recipient == profile.email, o.created_at.desc()),
            "events": await _events(tx, self._audit, str(user_id)),
        }
        return HeldData(
            exported_at=self._clock.now(),
            profile=profile,
            scopes=sorted(await self._access.scopes_of(tx, profile.role, fresh=True)),
            **{name: rows[:MOST_ROWS] for name, rows in parts.items()},
            shortened=[name for name, rows in parts.items() if len(rows) > MOST_ROWS],
        )


async def _newest(
    tx: Transaction, kind: type[Part], columns: Any, condition: ColumnElement[bool], order: ColumnElement[Any]
) -> list[Part]:
    """Return the newest rows of a kind, one more than is told."""
    statement = select(*(columns[name] for name in kind.__slots__))  # type: ignore[attr-defined]  # a dataclass's own
    statement = statement.where(condition).order_by(order).limit(MOST_ROWS + 1)
    return [kind(**row._mapping) for row in await tx.execute(statement)]


async def _events(tx: Transaction, audit: AuditTrail, subject: str) -> list[HeldEvent]:
    """Return what a person did and what was done to them, the newest first."""
    acted = await audit.search(tx, actor=subject, limit=MOST_ROWS + 1)
    suffered = await audit.search(tx, target=subject, limit=MOST_ROWS + 1)
    rows = {row.id: row for row in (*acted, *suffered)}
    newest = sorted(rows.values(), key=lambda row: (row.at, row.id), reverse=True)
    names = [name for name in HeldEvent.__slots__ if name != "network"]
    return [
        HeldEvent(
            **{name: getattr(row, name) for name in names},
            network=row.network if row.actor in (None, subject) else None,
        )
        for row in newest[: MOST_ROWS + 1]
    ]
