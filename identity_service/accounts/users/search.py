"""Finding people among a million: by the beginning of a name, by role, by state, a page at a time."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Boolean, ColumnElement, and_, collate, func, literal_column, not_, or_, select, text

from identity_service.accounts.users.user import COLUMNS, WAS_SOMEBODY, User, as_user
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import parse_uuid
from identity_service.infra.tables import users

Place = Sequence[str]
"""Where a page ended, as JSON values: in which of the lists that make up the answer, and behind whom."""

_BEHIND_EVERY_LETTER = "\x7f"
"""Greater than every character of a username or an address: they are printable ASCII."""
DISABLED: ColumnElement[bool] = literal_column("NOT users.enabled", Boolean())
"""In the words of the index, by which SQLite recognises it."""


class State(StrEnum):
    """What users are looked for by; all but the last mean users that were not deleted."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    UNVERIFIED = "unverified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Found:
    """A page of users; `place` is where the next one begins, None after the last."""

    users: list[User]
    place: Place | None


@dataclass(frozen=True, slots=True)
class _Part:
    """
    One of the lists that make up an answer: whom it holds, and by what it is sorted.

    Two users can have the same key only where `shared` says so; then their ids decide.
    """

    name: str
    key: ColumnElement[str]
    conditions: tuple[ColumnElement[bool], ...]
    shared: bool = False

    def place(self, user: User) -> Place:
        """Return the place behind a user of this list."""
        return (self.name, user.email.lower() if self.name == "email" else user.username, str(user.id))

    def behind(self, place: Place) -> ColumnElement[bool]:
        """Return the condition for those of this list that come behind a place in it."""
        _, key, user_id = place
        if not self.shared:
            return self.key > key
        return or_(self.key > key, and_(self.key == key, users.c.id > uuid.UUID(user_id)))


async def search_users(
    tx: Transaction, *, q: str | None, role: str | None, state: State | None, after: Place | None, limit: int
) -> Found:
    """
    Return a page of users; without a `state`, those that were not deleted.

    Without `q` the newest come first. With it: who has that id, whose username begins so, in the order of usernames,
    and whose address begins so, in the order of addresses; each once. Deleted users are found by the names they had.
    """
    if not tx.on_sqlite:
        # Whether to walk the names or the few of a role depends on the very values: a plan for any values, which the
        # server makes of a statement that it sees often, would walk a million names for the three who are looked for.
        await tx.execute(text("SET LOCAL plan_cache_mode = force_custom_plan"))
    wanted = _wanted(role, state)
    if q is None:
        return await _newest(tx, wanted, after, limit)
    if not q.isascii() or not q.isprintable():
        return Found([], None)  # nobody is called so
    parts = _parts(q.lower(), deleted=state is State.DELETED, on_sqlite=tx.on_sqlite)
    if after is not None:
        while parts[0].name != after[0]:
            del parts[0]
    found: list[tuple[_Part, User]] = []
    for part in parts:
        statement = select(*COLUMNS).where(*wanted, *part.conditions)
        if after is not None and part.name == after[0]:
            statement = statement.where(part.behind(after))
        order: list[ColumnElement[Any]] = [part.key, users.c.id] if part.shared else [part.key]
        rows = await tx.execute(statement.order_by(*order).limit(limit + 1 - len(found)))
        found += [(part, as_user(row)) for row in rows]
        if len(found) > limit:
            part, last = found[limit - 1]
            return Found([user for _, user in found[:limit]], part.place(last))
    return Found([user for _, user in found], None)


async def _newest(tx: Transaction, wanted: list[ColumnElement[bool]], after: Place | None, limit: int) -> Found:
    statement = select(*COLUMNS).where(*wanted)
    if after is not None:
        statement = statement.where(users.c.id < uuid.UUID(after[0]))
    rows = (await tx.execute(statement.order_by(users.c.id.desc()).limit(limit + 1))).all()
    found = [as_user(row) for row in rows[:limit]]
    return Found(found, (str(found[-1].id),) if len(rows) > limit else None)


def _wanted(role: str | None, state: State | None) -> list[ColumnElement[bool]]:
    """Return what a row must fulfil, whatever it is called."""
    c = users.c
    wanted: list[ColumnElement[bool]] = [c.deleted_at.is_(None)]
    if state is State.DELETED:
        wanted = [c.deleted_at.is_not(None), WAS_SOMEBODY]
    if role is not None:
        wanted.append(c.role == role)
    if state is State.ENABLED:
        wanted.append(c.enabled.is_(True))
    elif state is State.DISABLED:
        wanted.append(DISABLED)
    elif state is State.UNVERIFIED:
        wanted.append(c.email_verified_at.is_(None))
    return wanted


def _parts(typed: str, *, deleted: bool, on_sqlite: bool) -> list[_Part]:
    """
    Return the lists that `typed` selects, in their order.

    A prefix is a range, so nothing in it can be a wildcard, and an index in the order of the bytes finds it and sorts
    it. SQLite compares by bytes of itself; PostgreSQL has such indexes beside those in the database's own collation.
    """
    username: ColumnElement[str] = users.c.username
    address: ColumnElement[str] = users.c.email_canonical
    if deleted:
        username = users.c.deleted_as["username"].as_string()
        address = func.lower(users.c.deleted_as["email"].as_string())
    if not on_sqlite:
        username, address = collate(username, "C"), collate(address, "C")
    end = typed + _BEHIND_EVERY_LETTER
    by_username = and_(username >= typed, username < end)
    by_address = and_(address >= typed, address < end)
    parts = [
        _Part("username", username, (by_username,), shared=deleted),
        _Part("email", address, (by_address, not_(by_username)), shared=deleted),
    ]
    if (user_id := parse_uuid(typed)) is None:
        return parts
    others = [_Part(part.name, part.key, (*part.conditions, users.c.id != user_id), part.shared) for part in parts]
    return [_Part("id", username, (users.c.id == user_id,)), *others]
