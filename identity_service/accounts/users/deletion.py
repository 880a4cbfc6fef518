"""
Deleting people in two steps: first they can no longer be reached, later the row goes.

The first step frees the names, so that a person can come back as somebody new: with another id, and nothing of what
the old one held. Until the second step an operator can undo the first.
"""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import delete, null, select, update
from sqlalchemy.exc import IntegrityError

from identity_service.accounts.access import SEEDED_ROLES
from identity_service.accounts.users.names import DOMAIN_OF_THE_DELETED, NAME_OF_THE_DELETED, NameTaken, check_email
from identity_service.accounts.users.user import COLUMNS, WAS_SOMEBODY, User, as_user
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import forget_recipients
from identity_service.infra.runtime import new_id
from identity_service.infra.runtime.hashing import NFKC_FORM
from identity_service.infra.tables import users

LOWEST_ROLE = SEEDED_ROLES[0]
"""What everybody begins as."""


async def delete_user(tx: Transaction, user_id: uuid.UUID, now: datetime) -> bool:
    """
    Disable a user, end their sessions, forget their password and free their names.

    Returns False if there is none, or only a deleted one.
    """
    held = (
        await tx.execute(
            select(users.c.username, users.c.email, users.c.enabled)
            .where(users.c.id == user_id, users.c.deleted_at.is_(None))
            .with_for_update(key_share=True)
        )
    ).first()
    if held is None:
        return False
    username = NAME_OF_THE_DELETED + user_id.hex
    address = f"{username}@{DOMAIN_OF_THE_DELETED}"
    await tx.execute(
        update(users)
        .where(users.c.id == user_id)
        .values(
            username=username,
            email=address,
            email_canonical=address,
            deleted_as={"username": held.username, "email": held.email, "enabled": held.enabled},
            deleted_at=now,
            enabled=False,
            epoch=users.c.epoch + 1,
            password_hash=None,
            updated_at=now,
        )
    )
    return True


async def restore_user(tx: Transaction, user_id: uuid.UUID, now: datetime) -> User | None:
    """
    Give a deleted user their names back; return None if there is no such deleted user.

    Who was disabled before is so again. They have no password and no session: they must choose a new one. Raises
    NameTaken, after which this transaction can only be rolled back.
    """
    row = (
        await tx.execute(
            select(users.c.deleted_as).where(users.c.id == user_id, WAS_SOMEBODY).with_for_update(key_share=True)
        )
    ).first()
    if row is None:
        return None
    before: dict[str, Any] = row.deleted_as
    try:
        restored = await tx.execute(
            update(users)
            .where(users.c.id == user_id)
            .values(
                username=before["username"],
                email=before["email"],
                email_canonical=check_email(before["email"]),
                deleted_as=null(),
                deleted_at=None,
                enabled=before["enabled"],
                updated_at=now,
            )
            .returning(*COLUMNS)
        )
    except IntegrityError:
        raise NameTaken from None
    return as_user(restored.one())


async def hold_name(tx: Transaction, username: str, now: datetime) -> None:
    """
    Let a username be taken, by nobody: a row that is deleted already, and purged like one.

    Where registering must not tell which addresses are known, a name has to be gone afterwards in either case.
    """
    user_id = new_id()
    address = f"{NAME_OF_THE_DELETED}{user_id.hex}@{DOMAIN_OF_THE_DELETED}"
    row = tx.insert(users).values(
        id=user_id,
        username=username,
        email=address,
        email_canonical=address,
        password_form=NFKC_FORM,
        role=LOWEST_ROLE,
        enabled=False,
        epoch=0,
        created_at=now,
        updated_at=now,
        deleted_at=now,
    )
    await tx.execute(row.on_conflict_do_nothing())


async def purge_users(tx: Transaction, *, before: datetime, batch: int) -> list[uuid.UUID]:
    """Remove at most `batch` users that were deleted before an instant, and all that is theirs; return their ids."""
    c = users.c
    doomed = select(c.id).where(c.deleted_at < before).order_by(c.deleted_at).limit(batch)
    # Asked again on the row itself: who was restored while this statement waited for the row stays.
    statement = delete(users).where(c.id.in_(doomed.scalar_subquery()), c.deleted_at < before)
    gone = (await tx.execute(statement.returning(c.id, c.deleted_as))).all()
    await _forget_mails(tx, [row.deleted_as["email"] for row in gone if row.deleted_as is not None], before)
    return [row.id for row in gone]


async def erase_user(tx: Transaction, user_id: uuid.UUID) -> bool:
    """Remove a user and all that is theirs at once, deleted before or not; return False if there is none."""
    c = users.c
    statement = delete(users).where(c.id == user_id).returning(c.email, c.deleted_as, c.deleted_at)
    row = (await tx.execute(statement)).first()
    if row is None:
        return False
    await _forget_mails(tx, [row.deleted_as["email"] if row.deleted_as is not None else row.email], row.deleted_at)
    return True


async def _forget_mails(tx: Transaction, addresses: list[str], until: datetime | None) -> None:
    """Forget what waits to be mailed to people who are gone; that they are is still told to them."""
    await forget_recipients(tx, addresses, kept="account_deleted", ordered_until=until)
