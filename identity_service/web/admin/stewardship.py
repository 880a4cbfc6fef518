"""Which people an operator may change, and what is noted of it: the rules that no route may forget."""

import uuid
from collections.abc import Mapping
from typing import Any, final

from identity_service.accounts import access
from identity_service.accounts.access import Access
from identity_service.accounts.users import User, Users
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.web.callers import Caller, note
from identity_service.web.problems import Conflict, Forbidden, NotFound


def identified(text: str) -> uuid.UUID:
    """Return the id that a path names, in its one spelling; raises NotFound for what can be nobody's."""
    try:
        user_id = uuid.UUID(text)
    except ValueError:
        raise NotFound from None
    if str(user_id) != text:
        raise NotFound
    return user_id


@final
class Stewardship:
    """
    Finds the people that an operator names, and refuses those that are not theirs to change.

    Nobody changes somebody who holds more than they could hand on: resetting the password of such a person, or moving
    their address, would be the way to everything they hold.
    """

    def __init__(self, users: Users, rules: Access, audit: AuditTrail) -> None:
        self._users = users
        self._rules = rules
        self._audit = audit

    async def known(self, tx: Transaction, user_id: str) -> User:
        """Return somebody to be looked at, deleted ones as well; raises NotFound."""
        user = await self._users.get(tx, identified(user_id), deleted=True)
        if user is None:
            raise NotFound
        return user

    async def charge(self, tx: Transaction, caller: Caller, user_id: str, *, deleted: bool = False) -> User:
        """
        Return somebody whom the caller may change, as they stay until this transaction ends.

        Only with `deleted` also one that was deleted. Raises NotFound, Forbidden.
        """
        user = await self._users.locked(tx, identified(user_id), deleted=deleted)
        if user is None:
            raise NotFound
        await self.check_role(tx, caller, user.role)
        return user

    async def check_role(self, tx: Transaction, caller: Caller, role: str) -> None:
        """Raise Forbidden for a role that holds more than the caller could hand on."""
        held = await self._rules.scopes_of(tx, role, fresh=True)
        if access.missing(held, scopes=caller.scopes, rights=caller.rights):
            raise Forbidden("This role holds more than you could hand on.")

    @staticmethod
    def check_other(caller: Caller, user: User, title: str) -> None:
        """Raise Forbidden if the caller is the one to be changed."""
        if caller.user is not None and caller.user.id == user.id:
            raise Forbidden(title)

    async def check_not_last(self, tx: Transaction, user: User) -> None:
        """Raise Conflict if nobody could do everything without `user`; the caller holds the administrators' lock."""
        if await self._users.is_last_super_admin(tx, user):
            raise Conflict("This is the last super_admin. Make another one first.")

    async def record(
        self, tx: Transaction, caller: Caller, event: str, user: User, detail: Mapping[str, Any] | None = None
    ) -> None:
        """Note what the caller did to somebody."""
        await note(self._audit, tx, caller, event, str(user.id), detail)
