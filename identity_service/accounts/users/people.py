"""People: their names, their password, their role, and the epoch that ends all their sessions at once."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from types import EllipsisType
from typing import Any, final

from sqlalchemy import ColumnElement, Row, func, literal, or_, select, update
from sqlalchemy.exc import IntegrityError

from identity_service.accounts.access import ADMINISTRATORS_LOCK, SUPER_ADMIN
from identity_service.accounts.password_policy import PasswordPolicy
from identity_service.accounts.users.counts import Counts, count_users
from identity_service.accounts.users.deletion import (
    delete_user,
    erase_user,
    hold_name,
    purge_users,
    restore_user,
)
from identity_service.accounts.users.names import (
    InvalidUser,
    NameTaken,
    canonical_email,
    canonical_username,
    check_display_name,
    check_email,
    check_username,
)
from identity_service.accounts.users.search import Found, Place, State, search_users
from identity_service.accounts.users.user import COLUMNS, WAS_SOMEBODY, SignInFacts, User, as_user
from identity_service.infra.database import Transaction
from identity_service.infra.parts import in_parts
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.runtime.hashing import NFKC_FORM, PasswordHasher, Verification
from identity_service.infra.tables import UtcDateTime, roles, users


@final
class Users:
    """
    Reads and changes users.

    What changes one leaves deleted users alone and says that there is no such user; only `restore`, `purge` and
    `erase` touch them.
    """

    def __init__(self, clock: Clock, hasher: PasswordHasher, policy: PasswordPolicy) -> None:
        self._clock = clock
        self._hasher = hasher
        self._policy = policy

    # -- finding --------------------------------------------------------------------------------------------------

    async def facts(self, tx: Transaction, name: str) -> SignInFacts | None:
        """Return what a sign-in with this username or address needs, or None; a name that nobody has is nobody's."""
        condition: ColumnElement[bool]
        if (email := canonical_email(name)) is not None:
            condition = users.c.email_canonical == email
        elif (username := canonical_username(name)) is not None:
            condition = users.c.username == username
        else:
            return None
        row = (await tx.execute(select(users).where(condition, users.c.deleted_at.is_(None)))).first()
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

    async def get(self, tx: Transaction, user_id: uuid.UUID, *, deleted: bool = False) -> User | None:
        """Return the user of that id; with `deleted`, also one that was deleted."""
        row = (await tx.execute(select(*COLUMNS).where(*_one(user_id, deleted)))).first()
        return as_user(row) if row is not None else None

    async def locked(self, tx: Transaction, user_id: uuid.UUID, *, deleted: bool = False) -> User | None:
        """
        Return the user of that id and keep everybody else from changing them until this transaction ends.

        The lock is the weaker one, with which rows that refer to the user can still be made.
        """
        statement = select(*COLUMNS).where(*_one(user_id, deleted)).with_for_update(key_share=True)
        row = (await tx.execute(statement)).first()
        return as_user(row) if row is not None else None

    async def by_name(self, tx: Transaction, name: str) -> User | None:
        """Return the user with this username or address, by the same rules as a sign-in."""
        facts = await self.facts(tx, name)
        return await self.get(tx, facts.user_id) if facts else None

    async def search(
        self,
        tx: Transaction,
        *,
        q: str | None = None,
        role: str | None = None,
        state: State | None = None,
        after: Place | None = None,
        limit: int,
    ) -> Found:
        """Return the users that an operator looks for, a page of them; see `search_users`."""
        return await search_users(tx, q=q, role=role, state=state, after=after, limit=limit)

    async def counts(self, tx: Transaction) -> Counts:
        """Return how many users there are, by role and by state."""
        return await count_users(tx)

    async def enabled_super_admins(self, tx: Transaction, *, without: uuid.UUID | None = None) -> int:
        """
        Return how many people can sign in and do everything, `without` one of them.

        Who has not chosen a password yet may never do so, and does not count. Who is about to make it one fewer holds
        the lock `administrators`, or two could each see the other.
        """
        c = users.c
        able = [c.role == SUPER_ADMIN, c.enabled, c.deleted_at.is_(None), c.password_hash.is_not(None)]
        if without is not None:
            able.append(c.id != without)
        count: int = (await tx.execute(select(func.count()).where(*able))).scalar_one()
        return count

    async def is_last_super_admin(self, tx: Transaction, user: User) -> bool:
        """
        Return whether nobody could do everything any more if `user` could not; see `enabled_super_admins`.

        True only behind the administrators' lock; raises RuntimeError without it.
        """
        tx.demand_lock(ADMINISTRATORS_LOCK)
        counts = user.role == SUPER_ADMIN and user.enabled and user.deleted_at is None
        return counts and not await self.enabled_super_admins(tx, without=user.id)

    # -- making and naming ----------------------------------------------------------------------------------------

    @staticmethod
    def check_names(username: str, email: str) -> tuple[str, str]:
        """Return the canonical username and address; raises InvalidUser."""
        return check_username(username), check_email(email)

    async def create(
        self,
        tx: Transaction,
        *,
        username: str,
        email: str,
        role: str,
        password_hash: str | None,
        verified: bool,
        name: str | None = None,
    ) -> User:
        """
        Store a new user. Raises InvalidUser, NameTaken; the transaction can go on after either.

        Two at once with one name: the second waits for what becomes of the first, and hears NameTaken if it stays.
        """
        canonical, address = self.check_names(username, email)
        called = check_display_name(name)
        await self._check_role(tx, role)
        now = self._clock.now()
        statement = (
            tx.insert(users)
            .values(
                id=new_id(),
                username=canonical,
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
                name=called,
            )
            .on_conflict_do_nothing()
            .returning(*COLUMNS)
        )
        row = (await tx.execute(statement)).first()
        if row is None:
            raise NameTaken
        return as_user(row)

    async def rename(
        self,
        tx: Transaction,
        user_id: uuid.UUID,
        *,
        username: str | None = None,
        name: str | EllipsisType | None = ...,
    ) -> User:
        """
        Change the username, or what the person is called (None: nothing); what is not given stays.

        Raises InvalidUser, LookupError for no such user, and NameTaken, after which this transaction can only be rolled
        back.
        """
        values: dict[str, Any] = {}
        if username is not None:
            values["username"] = check_username(username)
        if not isinstance(name, EllipsisType):
            values["name"] = check_display_name(name)
        return await self._named(tx, user_id, values)

    async def set_email(self, tx: Transaction, user_id: uuid.UUID, email: str, *, verified: bool) -> User:
        """
        Give a user another address, proven or not.

        Raises InvalidUser, LookupError for no such user, and NameTaken, after which this transaction can only be rolled
        back.
        """
        values = {
            "email": email,
            "email_canonical": check_email(email),
            "email_verified_at": self._clock.now() if verified else None,
        }
        return await self._named(tx, user_id, values)

    async def verify_email(self, tx: Transaction, user_id: uuid.UUID, email: str) -> bool:
        """
        Note that a user's address is proven, if it is still exactly `email`; return whether it is.

        Who proved an address and changed it meanwhile has proven the old one. Proving it again changes nothing.
        """
        proven = func.coalesce(users.c.email_verified_at, literal(self._clock.now(), UtcDateTime))
        changed = await self._change(tx, user_id, users.c.email == email, email_verified_at=proven)
        return changed is not None

    # -- passwords and sessions -----------------------------------------------------------------------------------

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

    async def set_password(self, tx: Transaction, user_id: uuid.UUID, password_hash: str) -> int | None:
        """Store a new password and end every session; return the new epoch, or None if there is no such user."""
        return await self._set_password(tx, user_id, password_hash)

    async def clear_password(self, tx: Transaction, user_id: uuid.UUID) -> int | None:
        """
        Forget the password and end every session; return the new epoch, or None if there is no such user.

        Nobody signs in to the account until a new password was chosen.
        """
        return await self._set_password(tx, user_id, None)

    async def end_sessions(self, tx: Transaction, user_id: uuid.UUID) -> int:
        """End every session and return the new epoch; raises LookupError for no such user."""
        changed = await self._change(tx, user_id, epoch=users.c.epoch + 1)
        if changed is None:
            raise LookupError("there is no such user")
        return as_user(changed).epoch

    async def end_all_sessions(self, tx: Transaction, epoch: int) -> int:
        """
        End every session of everybody by an epoch far ahead of all; return how many users there are.

        For a restored database, in which one step ahead may be where an epoch has been already, in the time that was
        lost. Raises ValueError if somebody's epoch is as far.
        """
        c = users.c
        if (await tx.execute(select(c.id).where(c.epoch >= epoch).limit(1))).first() is not None:
            raise ValueError("somebody's epoch has come as far already")
        moved = 0
        async for part in in_parts(tx, c.id):
            moved += (await tx.execute(update(users).where(part).values(epoch=epoch))).rowcount
        return moved

    async def set_enabled(self, tx: Transaction, user_id: uuid.UUID, enabled: bool) -> bool:
        """
        Enable or disable; return False if there is no such user.

        Disabling moves the epoch on, which ends every session; enabling does not bring them back.
        """
        if enabled:
            return await self._change(tx, user_id, enabled=True) is not None
        return await self._change(tx, user_id, enabled=False, epoch=users.c.epoch + 1) is not None

    async def set_role(self, tx: Transaction, user_id: uuid.UUID, role: str) -> bool:
        """
        Give a user another role; return False if there is no such user. Raises InvalidUser for no such role.

        Their sessions stay: what a token may do is looked up in the role each time it is asked for.
        """
        await self._check_role(tx, role)
        return await self._change(tx, user_id, role=role) is not None

    # -- leaving --------------------------------------------------------------------------------------------------

    async def delete(self, tx: Transaction, user_id: uuid.UUID) -> bool:
        """
        Disable a user, end their sessions, forget their password and free their names, so that `restore` can undo it.

        Returns False if there is none, or only a deleted one.
        """
        return await delete_user(tx, user_id, self._clock.now())

    async def restore(self, tx: Transaction, user_id: uuid.UUID) -> User:
        """
        Give a deleted user their names back, enabled or disabled as they were; they must choose a new password.

        Raises LookupError for no such deleted user, and NameTaken if somebody took one of the names meanwhile, after
        which this transaction can only be rolled back.
        """
        restored = await restore_user(tx, user_id, self._clock.now())
        if restored is None:
            raise LookupError("there is no such deleted user")
        return restored

    async def purge(self, tx: Transaction, *, before: datetime, batch: int) -> list[uuid.UUID]:
        """Remove at most `batch` users deleted before an instant, and all that is theirs; return their ids."""
        return await purge_users(tx, before=before, batch=batch)

    async def hold_name(self, tx: Transaction, username: str) -> None:
        """Let a username be taken by nobody, as if somebody had registered it; raises InvalidUser."""
        await hold_name(tx, check_username(username), self._clock.now())

    async def erase(self, tx: Transaction, user_id: uuid.UUID) -> bool:
        """Remove a user and all that is theirs at once, deleted before or not; return False if there is none."""
        return await erase_user(tx, user_id)

    # -- within ---------------------------------------------------------------------------------------------------

    async def _set_password(self, tx: Transaction, user_id: uuid.UUID, password_hash: str | None) -> int | None:
        changed = await self._change(
            tx,
            user_id,
            password_hash=password_hash,
            password_form=NFKC_FORM,
            password_changed_at=self._clock.now(),
            epoch=users.c.epoch + 1,
        )
        return as_user(changed).epoch if changed is not None else None

    async def _named(self, tx: Transaction, user_id: uuid.UUID, values: dict[str, Any]) -> User:
        try:
            changed = await self._change(tx, user_id, **values)
        except IntegrityError:
            raise NameTaken from None
        if changed is None:
            raise LookupError("there is no such user")
        return as_user(changed)

    async def _change(
        self, tx: Transaction, user_id: uuid.UUID, *conditions: ColumnElement[bool], **values: Any
    ) -> Row[Any] | None:
        statement = update(users).where(*_one(user_id, False), *conditions)
        statement = statement.values(updated_at=self._clock.now(), **values)
        return (await tx.execute(statement.returning(*COLUMNS))).first()

    @staticmethod
    async def _check_role(tx: Transaction, role: str) -> None:
        """Raise InvalidUser if there is no such role; one that is there stays until this transaction ends."""
        known = select(roles.c.name).where(roles.c.name == role).with_for_update(read=True, key_share=True)
        if (await tx.execute(known)).first() is None:
            raise InvalidUser("role", "there is no such role")


def _one(user_id: uuid.UUID, deleted: bool) -> list[ColumnElement[bool]]:
    """Return the condition for one user's row."""
    there = users.c.deleted_at.is_(None)
    return [users.c.id == user_id, or_(there, WAS_SOMEBODY) if deleted else there]
