"""
Scopes and roles: who may ask for what.

A scope is a word (RFC 6749 §3.3); a role is a set of scopes. What a user may be granted is what they asked for, within
what their client may ask for, within what their role holds now.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.runtime.cache import RowCache
from identity_service.infra.tables import clients, role_scopes, roles, scopes, users

SUPER_ADMIN = "super_admin"
"""The one role that holds every scope there is, also those that were defined after it."""
PERMISSIONS = frozenset(
    (
        *("users:read", "users:write", "clients:read", "clients:write", "roles:read", "roles:write"),
        *("keys:read", "keys:write", "audit:read", "stats:read"),
    )
)
"""The scopes that open the operators' API. Who grants one of these must show it in the very credential they use."""
SEEDED_ROLES = ("user", "moderator", "admin", SUPER_ADMIN)
"""The roles that every installation has; each holds what the one before it holds."""
SELF_SERVICE = frozenset(("account:read", "account:write"))
ADMINISTRATORS_LOCK = "administrators"
"""Held by whoever makes or removes people who can do everything, or changes what roles there are: one at a time."""
_ROLE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_LONGEST_DESCRIPTION = 500
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}")
_MOST_SCOPES = 100


class InvalidScopeName(ValueError):
    """A scope was to be stored that no request could ask for; the message says what a scope is."""


class InvalidRole(ValueError):
    """A role was to be stored that cannot be; the message says why."""


class InUse(Exception):
    """A role or scope cannot go, or be named so, because of something that exists; the message says what."""


@dataclass(frozen=True, slots=True)
class Role:
    """A role: the scopes given to it, and those it holds in all, its parents' among them."""

    name: str
    parent: str | None
    description: str
    scopes: tuple[str, ...]
    held: frozenset[str]


@dataclass(frozen=True, slots=True)
class DefinedScope:
    """A scope and what it is for."""

    name: str
    description: str


ScopeList = tuple[str, ...]
"""Scopes in the order they were asked for, each once."""


def parse_scope(text: str) -> ScopeList | None:
    """Return the scopes of a space-separated list, or None if it breaks RFC 6749 §3.3 or names more than 100."""
    if len(text) > _MOST_SCOPES * 129:
        return None
    words = text.split(" ")
    if len(words) > _MOST_SCOPES or not all(_SCOPE_TOKEN.fullmatch(word) for word in words):
        return None
    return tuple(dict.fromkeys(words))


def within(wanted: Iterable[str], allowed: Iterable[str]) -> ScopeList:
    """Return those of `wanted` that are among `allowed`, by exact comparison, in their order."""
    held = frozenset(allowed)
    return tuple(scope for scope in wanted if scope in held)


def missing(wanted: Iterable[str], *, scopes: Iterable[str], rights: Iterable[str]) -> frozenset[str]:
    """
    Return those of `wanted` that a caller may not hand on.

    `scopes` is what the credential in use carries, `rights` all that its owner holds. A permission of ours must be
    among the first, or a narrow credential could make itself a wide one; a sibling's scope among the second, since no
    operator's tool asks for the scopes of every sibling.
    """
    shown, held = frozenset(scopes), frozenset(rights)
    return frozenset(scope for scope in wanted if scope not in (shown if scope in PERMISSIONS else held))


def line_of(role: str, parents: Mapping[str, str | None]) -> list[str]:
    """Return a role and those it builds on, the nearest first."""
    line: list[str] = []
    above: str | None = role
    while above is not None and above not in line:
        line.append(above)
        above = parents.get(above)
    return line


def _held_by(role: str) -> Select[Any]:
    """Return the query for a role's scopes: the highest role has all, each other its own and its ancestors'."""
    if role == SUPER_ADMIN:
        return select(scopes.c.name)
    line = select(roles.c.name, roles.c.parent).where(roles.c.name == role).cte("line", recursive=True)
    line = line.union(select(roles.c.name, roles.c.parent).where(roles.c.name == line.c.parent))
    return select(role_scopes.c.scope).where(role_scopes.c.role.in_(select(line.c.name))).distinct()


@final
class Access:
    """Reads and writes roles and scopes."""

    def __init__(self, clock: Clock) -> None:
        self._roles: RowCache[str, frozenset[str]] = RowCache(clock, capacity=1000)

    async def scopes_of(self, tx: Transaction, role: str, *, fresh: bool = False) -> frozenset[str]:
        """
        Return the scopes a role holds, its own and those of the roles below it.

        At most a second old, unless `fresh`: what an operator may do is looked up each time.
        """

        async def load() -> frozenset[str]:
            return frozenset((await tx.execute(_held_by(role))).scalars())

        return await load() if fresh else await self._roles.get(role, load)

    async def role_names(self, tx: Transaction) -> list[str]:
        """Return the roles, lowest first."""
        return list((await tx.execute(select(roles.c.name).order_by(roles.c.rank))).scalars())

    async def roles(self, tx: Transaction) -> list[Role]:
        """Return every role with its scopes, lowest first."""
        rows = (await tx.execute(select(roles).order_by(roles.c.rank))).all()
        given: dict[str, list[str]] = {row.name: [] for row in rows}
        held = select(role_scopes.c.role, role_scopes.c.scope).order_by(role_scopes.c.scope)
        for pair in (await tx.execute(held)).all():
            given[pair.role].append(pair.scope)
        everything = frozenset((await tx.execute(select(scopes.c.name))).scalars())
        parents = {row.name: row.parent for row in rows}
        return [
            Role(
                row.name,
                row.parent,
                row.description or "",
                tuple(given[row.name]),
                everything
                if row.name == SUPER_ADMIN
                else frozenset(scope for name in line_of(row.name, parents) for scope in given[name]),
            )
            for row in rows
        ]

    async def role(self, tx: Transaction, name: str, *, lock: bool = False) -> Role | None:
        """Return a role, with `lock` holding its row until the transaction ends; None if there is none."""
        statement = select(roles).where(roles.c.name == name)
        row = (await tx.execute(statement.with_for_update() if lock else statement)).first()
        return await self._role(tx, row) if row is not None else None

    async def create_role(
        self, tx: Transaction, name: str, *, parent: str | None, description: str, names: Iterable[str]
    ) -> Role:
        """Store a new role. Raises InvalidRole, InUse for a name that is taken."""
        if not _ROLE_NAME.fullmatch(name):
            raise InvalidRole("name: a lower-case letter, then at most 63 of a-z, 0-9, underscore, hyphen")
        if len(description) > _LONGEST_DESCRIPTION:
            raise InvalidRole("description: at most 500 characters")
        await tx.lock(ADMINISTRATORS_LOCK)  # ranks are given one at a time
        if parent is not None and await self.role(tx, parent, lock=True) is None:
            raise InvalidRole("parent: there is no such role")
        if await self.role(tx, name) is not None:
            raise InUse("There is a role of this name.")
        rank = (await tx.execute(select(func.max(roles.c.rank)))).scalar_one() or 0
        await tx.execute(insert(roles).values(name=name, rank=rank + 1, parent=parent, description=description))
        await self._set_scopes(tx, name, names)
        return await self._stored(tx, name)

    async def update_role(
        self, tx: Transaction, name: str, *, description: str | None = None, names: Iterable[str] | None = None
    ) -> Role:
        """Change a role; its users gain and lose with it. Raises LookupError, InvalidRole."""
        if await self.role(tx, name, lock=True) is None:
            raise LookupError(name)
        if description is not None:
            if len(description) > _LONGEST_DESCRIPTION:
                raise InvalidRole("description: at most 500 characters")
            await tx.execute(update(roles).where(roles.c.name == name).values(description=description))
        if names is not None:
            if name == SUPER_ADMIN:
                raise InvalidRole("scopes: this role holds every scope")
            await self._set_scopes(tx, name, names)
        self._roles.forget_all()
        return await self._stored(tx, name)

    async def delete_role(self, tx: Transaction, name: str) -> None:
        """
        Remove a role that nobody has and no other role builds on.

        Raises LookupError, InUse. Somebody who gets the role at the same moment is seen: the foreign key decides.
        """
        if await self.role(tx, name, lock=True) is None:
            raise LookupError(name)
        if name in SEEDED_ROLES:
            raise InUse("This role is part of every installation.")
        if (await tx.execute(select(users.c.id).where(users.c.role == name).limit(1))).first() is not None:
            raise InUse("Somebody has this role.")
        if (await tx.execute(select(roles.c.name).where(roles.c.parent == name).limit(1))).first() is not None:
            raise InUse("Another role builds on this one.")
        try:
            await tx.execute(delete(roles).where(roles.c.name == name))
        except IntegrityError:
            raise InUse("Somebody has this role.") from None
        self._roles.forget_all()

    async def defined(self, tx: Transaction) -> list[DefinedScope]:
        """Return every scope, by name."""
        rows = (await tx.execute(select(scopes).order_by(scopes.c.name))).all()
        return [DefinedScope(row.name, row.description) for row in rows]

    async def define(self, tx: Transaction, names: Iterable[str], *, description: str = "") -> list[str]:
        """
        Make sure these scopes exist; return those that are new. A new scope belongs to no role but the highest.

        Raises InvalidScopeName.
        """
        names = list(names)
        if not all(parse_scope(name) == (name,) for name in names):
            raise InvalidScopeName("a scope is one word of RFC 6749 section 3.3, of at most 128 characters")
        if len(description) > _LONGEST_DESCRIPTION:
            raise InvalidScopeName("description: at most 500 characters")
        known = set((await tx.execute(select(scopes.c.name).where(scopes.c.name.in_(names)))).scalars())
        new = [name for name in dict.fromkeys(names) if name not in known]
        for name in new:
            row = tx.insert(scopes).values(name=name, description=description)
            await tx.execute(row.on_conflict_do_nothing())
        self._roles.forget_all()
        return new

    async def existing(self, tx: Transaction, names: Iterable[str]) -> frozenset[str]:
        """Return which of these scopes are defined; none of them can be deleted until this transaction ends."""
        found = select(scopes.c.name).where(scopes.c.name.in_(list(names)))
        return frozenset((await tx.execute(found.with_for_update(read=True, key_share=True))).scalars())

    async def describe(self, tx: Transaction, name: str, description: str) -> bool:
        """Say what a scope is for; return False if there is none."""
        if len(description) > _LONGEST_DESCRIPTION:
            raise InvalidScopeName("description: at most 500 characters")
        changed = await tx.execute(
            update(scopes).where(scopes.c.name == name).values(description=description).returning(scopes.c.name)
        )
        return changed.first() is not None

    async def delete_scope(self, tx: Transaction, name: str) -> None:
        """Remove a scope that no role and no client names. Raises LookupError, InUse."""
        found = await tx.execute(select(scopes.c.name).where(scopes.c.name == name).with_for_update())
        if found.first() is None:
            raise LookupError(name)
        if name in PERMISSIONS | SELF_SERVICE:
            raise InUse("This scope is part of every installation.")
        if (await tx.execute(select(role_scopes.c.role).where(role_scopes.c.scope == name).limit(1))).first():
            raise InUse("A role holds this scope.")
        named = (await tx.execute(select(clients.c.scope))).scalars()
        if any(name in scope.split() for scope in named):
            raise InUse("A client may ask for this scope.")
        await tx.execute(delete(scopes).where(scopes.c.name == name))
        self._roles.forget_all()

    async def grant(self, tx: Transaction, role: str, names: Iterable[str]) -> None:
        """Add scopes to a role."""
        for name in dict.fromkeys(names):
            await tx.execute(tx.insert(role_scopes).values(role=role, scope=name).on_conflict_do_nothing())
        self._roles.forget_all()

    async def withdraw(self, tx: Transaction, role: str, names: Iterable[str]) -> None:
        """Take scopes from a role; users of the role lose them at their next refresh."""
        await tx.execute(delete(role_scopes).where(role_scopes.c.role == role, role_scopes.c.scope.in_(list(names))))
        self._roles.forget_all()

    async def _set_scopes(self, tx: Transaction, role: str, names: Iterable[str]) -> None:
        wanted = set(names)
        if wanted - await self.existing(tx, wanted):
            raise InvalidRole("scopes: there is no such scope")
        await tx.execute(delete(role_scopes).where(role_scopes.c.role == role, role_scopes.c.scope.not_in(wanted)))
        await self.grant(tx, role, sorted(wanted))

    async def _stored(self, tx: Transaction, name: str) -> Role:
        role = await self.role(tx, name)
        assert role is not None  # noqa: S101  # it was written a moment ago, in this transaction
        return role

    async def _role(self, tx: Transaction, row: Any) -> Role:
        own = select(role_scopes.c.scope).where(role_scopes.c.role == row.name).order_by(role_scopes.c.scope)
        given = tuple((await tx.execute(own)).scalars())
        held = await self.scopes_of(tx, row.name, fresh=True)
        return Role(row.name, row.parent, row.description or "", given, held)
