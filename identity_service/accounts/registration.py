"""
Registering: one new person under names that nobody has, and a mail that proves their address.

In private mode nobody learns by registering which names there are: the answer is the same, and the mail tells. It goes
to the new address, or to the owner of the known one.
"""

from dataclasses import dataclass
from typing import Literal, final

from sqlalchemy import select

from identity_service.accounts.recovery import Recovery
from identity_service.accounts.users import LOWEST_ROLE, NameTaken, User, Users, canonical_name, canonical_username
from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction, TransactionConflict
from identity_service.infra.outbox import Outbox
from identity_service.infra.tables import users

RegistrationMode = Literal["open", "private", "closed"]


@dataclass(frozen=True, slots=True)
class NewPerson:
    """Who registers, checked as far as it does not depend on others; the password is hashed already."""

    username: str
    email: str
    name: str | None
    password_hash: str


@dataclass(frozen=True, slots=True)
class Taken:
    """Which of the two names belongs to somebody already."""

    which: Literal["username", "email"]


@final
class Registration:
    """Makes new people."""

    def __init__(
        self,
        users: Users,
        audit: AuditTrail,
        data_keys: DataKeys,
        *,
        mode: RegistrationMode,
        outbox: Outbox | None,
        recovery: Recovery | None,
    ) -> None:
        """`outbox` and `recovery` are None where no mail can be sent; private registration needs them."""
        if mode == "private" and (outbox is None or recovery is None):
            raise ValueError("private registration needs mail")
        self._users = users
        self._audit = audit
        self._data_keys = data_keys
        self.mode = mode
        self._outbox = outbox
        self._recovery = recovery

    async def register(
        self, tx: Transaction, person: NewPerson, *, may_welcome: bool, may_refuse: bool, origin: Origin
    ) -> User | Taken:
        """
        Store a person, or say which of their names is taken; order the mail that tells.

        Two limits say which mail may be ordered: `may_welcome` the one to somebody new, and `may_refuse` the one that
        tells what is taken.

        Raises MailQueueFull before anything is looked up, InvalidUser, and TransactionConflict when a name was taken
        and given up again meanwhile.
        """
        if self._outbox is not None:
            await self._outbox.check_room(tx)
        try:
            user = await self._users.create(
                tx,
                username=person.username,
                email=person.email,
                role=LOWEST_ROLE,
                password_hash=person.password_hash,
                verified=False,
                name=person.name,
            )
        except NameTaken:
            return await self._refuse(tx, person, may_mail=may_refuse, origin=origin)
        await self._audit.record(tx, "user.registered", origin=origin, actor=str(user.id), target=str(user.id))
        if self._recovery is not None and may_welcome:
            await self._recovery.send(tx, "verify_email", user, origin=origin)
        return user

    async def _refuse(self, tx: Transaction, person: NewPerson, *, may_mail: bool, origin: Origin) -> Taken:
        owner = await self._users.by_name(tx, person.email)
        if owner is None and not await _held(tx, person.username):
            raise TransactionConflict("the name was given up meanwhile")
        taken = Taken("email" if owner is not None else "username")
        if self.mode == "private" and owner is not None:
            # Or who tries the name again, with an address of their own, would learn that this one was known.
            await self._users.hold_name(tx, person.username)
        await self._audit.record_failure(
            tx,
            "registration.declined",
            origin=origin,
            target=str(owner.id) if owner else f"name:{self._data_keys.hash_name(canonical_name(person.username))}",
            client_id=None,
            detail={"taken": taken.which},
            genuine=owner is not None,
        )
        if self.mode == "private" and self._outbox is not None and may_mail:
            if owner is None:
                await self._outbox.enqueue(tx, template="username_taken", recipient=person.email, context={})
            elif owner.enabled:
                await self._outbox.enqueue(tx, template="account_exists", recipient=owner.email, context={})
        return taken


async def _held(tx: Transaction, username: str) -> bool:
    """Return whether a username is taken, by somebody or by nobody (`hold_name`)."""
    row = await tx.execute(select(users.c.id).where(users.c.username == canonical_username(username)))
    return row.first() is not None
