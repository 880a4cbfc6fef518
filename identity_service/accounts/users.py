"""People: their names, their password, their role, and the epoch that ends all their sessions at once."""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import Row, Select, insert, select, update
from sqlalchemy.exc import IntegrityError

from identity_service.accounts.password_policy import PasswordPolicy
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.runtime.hashing import NFKC_FORM, PasswordHasher, Verification
from identity_service.infra.tables import roles, users

_USERNAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_EMAIL = re.compile(
    r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9-]{2,63}"
)
LONGEST_NAME = 254


class InvalidUser(ValueError):
    """A user was to be stored with a name, address or role that cannot be; the message says which and why."""


class NameTaken(Exception):
    """The username or the address belongs to somebody already."""


def canonical_username(typed: str) -> str | None:
    """
    Return the one spelling of a username, or None for what can be none.

    Only ASCII letters, digits and `._-`, case-folded: letters that merely look alike cannot make a second account.
    """
    folded = typed.lower() if typed.isascii() else ""
    return folded if _USERNAME.fullmatch(folded) else None


def canonical_email(typed: str) -> str | None:
    """
    Return the spelling an address is looked up by, or None for what can be none.

    ASCII only: the lower-case form of other letters can be somebody else's address (dotless i). Mail always goes to the
    address as stored.
    """
    if not typed.isascii() or len(typed) > LONGEST_NAME or not _EMAIL.fullmatch(typed):
        return None
    return typed.lower()


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
    """A person as stored, without the password."""

    id: uuid.UUID
    username: str
    email: str
    email_verified_at: datetime | None
    role: str
    enabled: bool
    created_at: datetime


@final
class Users:
    """Reads and changes users."""

    def __init__(self, clock: Clock, hasher: PasswordHasher, policy: PasswordPolicy) -> None:
        self._clock = clock
        self._hasher = hasher
        self._policy = policy

    async def facts(self, tx: Transaction, name: str) -> SignInFacts | None:
        """Return what a sign-in with this username or address needs, or None."""
        if (email := canonical_email(name)) is not None:
            condition = users.c.email_canonical == email
        elif (username := canonical_username(name)) is not None:
            condition = users.c.username == username
        else:
            return None
        row = (await tx.execute(select(users).where(condition))).first()
        if row is None:
            return None
        return SignInFacts(
            user_id=row.id,
            password_hash=row.password_hash,
            password_form=row.password_form,
            enabled=row.enabled,
            email_verified=row.email_verified_at is not None,
            role=row.role,
            epoch=row.epoch,
        )

    async def check_password(self, facts: SignInFacts | None, password: Secret) -> Verification:
        """Check a password outside any transaction; takes the same time for nobody. Raises HashingBusy."""
        stored, form = (facts.password_hash, facts.password_form) if facts else (None, NFKC_FORM)
        return await self._hasher.verify(password, stored, form=form)

    async def renew_hash(self, tx: Transaction, facts: SignInFacts, renewed: str) -> None:
        """Replace a hash by a stronger one of the same password, unless it was changed meanwhile."""
        await tx.execute(
            update(users)
            .where(users.c.id == facts.user_id, users.c.password_hash == facts.password_hash)
            .values(password_hash=renewed, password_form=NFKC_FORM)
        )

    async def prepare_password(self, password: Secret, *, names: Sequence[str]) -> str:
        """Return the hash of a new password; raises PasswordRefused, HashingBusy."""
        return await self._hasher.hash(self._policy.accept(password, names=names))

    async def create(
        self, tx: Transaction, *, username: str, email: str, role: str, password_hash: str | None, verified: bool
    ) -> User:
        """Store a new user. Raises InvalidUser, NameTaken; two at once with one name: the second hears NameTaken."""
        name, address = self.check_names(username, email)
        if (await tx.execute(select(roles.c.name).where(roles.c.name == role))).first() is None:
            raise InvalidUser(f"role: there is no role {role!r}")
        now = self._clock.now()
        user_id = new_id()
        try:
            await tx.execute(
                insert(users).values(
                    id=user_id,
                    username=name,
                    email=email,
                    email_canonical=address,
                    email_verified_at=now if verified else None,
                    password_hash=password_hash,
                    password_form=NFKC_FORM,
                    password_changed_at=now,
                    role=role,
                    enabled=True,
                    epoch=0,
                    created_at=now,
                    updated_at=now,
                )
            )
        except IntegrityError:
            raise NameTaken from None
        return User(user_id, name, email, now if verified else None, role, True, now)

    @staticmethod
    def check_names(username: str, email: str) -> tuple[str, str]:
        """Return the canonical username and address; raises InvalidUser."""
        name, address = canonical_username(username), canonical_email(email)
        if name is None:
            raise InvalidUser("username: 1 to 64 of a-z, 0-9, dot, underscore, hyphen; begins with a letter or digit")
        if address is None:
            raise InvalidUser("email: not an address this service can write to")
        return name, address

    async def set_password(self, tx: Transaction, user_id: uuid.UUID, password_hash: str) -> bool:
        """Store a new password and end every session; return False if there is no such user."""
        now = self._clock.now()
        return await self._change(
            tx,
            user_id,
            password_hash=password_hash,
            password_form=NFKC_FORM,
            password_changed_at=now,
            epoch=users.c.epoch + 1,
        )

    async def set_enabled(self, tx: Transaction, user_id: uuid.UUID, enabled: bool) -> bool:
        """
        Enable or disable; return False if there is no such user.

        Disabling moves the epoch on, which ends every session; enabling does not bring them back.
        """
        if enabled:
            return await self._change(tx, user_id, enabled=True)
        return await self._change(tx, user_id, enabled=False, epoch=users.c.epoch + 1)

    async def get(self, tx: Transaction, user_id: uuid.UUID) -> User | None:
        """Return the user of that id."""
        return self._user((await tx.execute(self._columns().where(users.c.id == user_id))).first())

    async def by_name(self, tx: Transaction, name: str) -> User | None:
        """Return the user with this username or address, by the same rules as a sign-in."""
        facts = await self.facts(tx, name)
        return await self.get(tx, facts.user_id) if facts else None

    async def all(self, tx: Transaction, *, limit: int) -> list[User]:
        """Return the newest users, newest first."""
        rows = (await tx.execute(self._columns().order_by(users.c.id.desc()).limit(limit))).all()
        return [user for user in map(self._user, rows) if user]

    async def _change(self, tx: Transaction, user_id: uuid.UUID, **values: Any) -> bool:
        statement = update(users).where(users.c.id == user_id).values(updated_at=self._clock.now(), **values)
        return (await tx.execute(statement.returning(users.c.id))).first() is not None

    @staticmethod
    def _columns() -> Select[Any]:
        return select(
            users.c.id,
            users.c.username,
            users.c.email,
            users.c.email_verified_at,
            users.c.role,
            users.c.enabled,
            users.c.created_at,
        )

    @staticmethod
    def _user(row: Row[Any] | None) -> User | None:
        return User(**row._mapping) if row is not None else None
