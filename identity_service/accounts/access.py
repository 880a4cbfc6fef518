"""
Scopes and roles: who may ask for what.

A scope is a word (RFC 6749 §3.3); a role is a set of scopes. What a user may be granted is what they asked for, within
what their client may ask for, within what their role holds now.
"""

import re
from collections.abc import Iterable
from typing import Any, final

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.runtime.cache import RowCache
from identity_service.infra.tables import role_scopes, roles, scopes

_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}")
_MOST_SCOPES = 100


class InvalidScopeName(ValueError):
    """A scope was to be stored that no request could ask for; the message says what a scope is."""


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


def _dialect(tx: Transaction) -> Any:
    """Return where this database's INSERT is, which can leave alone a row that somebody else made meanwhile."""
    return sqlite if tx.on_sqlite else postgresql


@final
class Access:
    """Reads and writes roles and scopes."""

    def __init__(self, clock: Clock) -> None:
        self._roles: RowCache[str, frozenset[str]] = RowCache(clock, capacity=1000)

    async def scopes_of(self, tx: Transaction, role: str) -> frozenset[str]:
        """Return the scopes a role holds; at most a second old."""

        async def load() -> frozenset[str]:
            rows = await tx.execute(select(role_scopes.c.scope).where(role_scopes.c.role == role))
            return frozenset(rows.scalars())

        return await self._roles.get(role, load)

    async def role_names(self, tx: Transaction) -> list[str]:
        """Return the roles, lowest first."""
        return list((await tx.execute(select(roles.c.name).order_by(roles.c.rank))).scalars())

    async def define(self, tx: Transaction, names: Iterable[str]) -> list[str]:
        """
        Make sure these scopes exist; return those that are new. A new scope belongs to no role yet.

        Raises InvalidScopeName.
        """
        names = list(names)
        if not all(parse_scope(name) == (name,) for name in names):
            raise InvalidScopeName("a scope is one word of RFC 6749 section 3.3, of at most 128 characters")
        known = set((await tx.execute(select(scopes.c.name))).scalars())
        new = [name for name in dict.fromkeys(names) if name not in known]
        for name in new:
            await tx.execute(_dialect(tx).insert(scopes).values(name=name, description="").on_conflict_do_nothing())
        return new

    async def grant(self, tx: Transaction, role: str, names: Iterable[str]) -> None:
        """Add scopes to a role."""
        held = set((await tx.execute(select(role_scopes.c.scope).where(role_scopes.c.role == role))).scalars())
        for name in dict.fromkeys(names):
            if name not in held:
                await tx.execute(
                    _dialect(tx).insert(role_scopes).values(role=role, scope=name).on_conflict_do_nothing()
                )
        self._roles.forget(role)

    async def withdraw(self, tx: Transaction, role: str, names: Iterable[str]) -> None:
        """Take scopes from a role; users of the role lose them at their next refresh."""
        await tx.execute(delete(role_scopes).where(role_scopes.c.role == role, role_scopes.c.scope.in_(list(names))))
        self._roles.forget(role)
