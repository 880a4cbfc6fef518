"""
Links in mails: one secret, for one purpose, once.

The text of a token is a MAC of its id under a data key, and the row holds its digest. So a dump of the database holds
no usable token, what waits to be mailed holds no secret, and a mail that is sent again carries the same link.
"""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, final

from sqlalchemy import ColumnElement, delete, insert, select

from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction
from identity_service.infra.parts import in_parts
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.runtime.ids import decode_token, encode_token
from identity_service.infra.tables import email_tokens, users

EmailPurpose = Literal["verify_email", "reset_password", "change_email"]
OrderedPurpose = Literal["verify_email", "reset_password"]
"""What a link may be for that somebody orders by a name alone; another address is asked for by who is signed in."""

_PREFIXES: Mapping[EmailPurpose, str] = {"verify_email": "ev_", "reset_password": "pr_", "change_email": "ec_"}
_MAC_BYTES = 32


@dataclass(frozen=True, slots=True)
class EmailToken:
    """What a genuine token says: whoever presents it reads the mail of `email`, and acts for `user_id`."""

    user_id: uuid.UUID
    email: str


@final
class EmailTokens:
    """
    Issues and checks the tokens that links in mails carry.

    A token dies when it is used, when a newer one of its purpose is issued, when it expires, and with the user's
    epoch: a changed password, a disabled and a deleted account leave no way back through an old mail.

    Lock order: user, then token. Whoever changes the user in the same transaction may do so before and after.
    """

    def __init__(self, clock: Clock, keys: DataKeys, *, lifetimes: Mapping[EmailPurpose, int]) -> None:
        """`lifetimes` are in seconds, one for each purpose."""
        self._clock = clock
        self._keys = keys
        self._lifetimes = {purpose: timedelta(seconds=lifetimes[purpose]) for purpose in _PREFIXES}

    async def issue(
        self, tx: Transaction, *, purpose: EmailPurpose, user_id: uuid.UUID, epoch: int, email: str
    ) -> uuid.UUID:
        """
        Make a token that proves `email`, end the user's older one of this purpose, and return its id.

        `epoch` is the user's. The user's row is locked first, so of two at once the second ends the first's.
        """
        await tx.execute(select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
        await tx.execute(
            delete(email_tokens).where(email_tokens.c.user_id == user_id, email_tokens.c.purpose == purpose)
        )
        token_id, now, kid = new_id(), self._clock.now(), self._keys["mail"].kid
        await tx.execute(
            insert(email_tokens).values(
                id=token_id,
                purpose=purpose,
                user_id=user_id,
                email=email,
                user_epoch=epoch,
                digest=_digest(self._text(purpose, token_id, kid)),
                mac_kid=kid,
                created_at=now,
                expires_at=now + self._lifetimes[purpose],
            )
        )
        return token_id

    async def text_of(self, tx: Transaction, token_id: uuid.UUID) -> Secret | None:
        """Return the text of a token, the same whenever it is asked for; None for one that would not work any more."""
        row = (
            await tx.execute(
                select(email_tokens.c.purpose, email_tokens.c.mac_kid).where(
                    email_tokens.c.id == token_id, *self._alive(lock=False)
                )
            )
        ).first()
        return self._text(row.purpose, token_id, row.mac_kid) if row is not None else None

    async def look(self, tx: Transaction, text: Secret, purpose: EmailPurpose) -> EmailToken | None:
        """Return what a token says without using it: scanners open the links in mails before people do."""
        if not _well_formed(text, purpose):
            return None
        row = (
            await tx.execute(
                select(email_tokens.c.user_id, email_tokens.c.email).where(
                    email_tokens.c.digest == _digest(text),
                    email_tokens.c.purpose == purpose,
                    *self._alive(lock=False),
                )
            )
        ).first()
        return EmailToken(row.user_id, row.email) if row is not None else None

    async def consume(self, tx: Transaction, text: Secret, purpose: EmailPurpose) -> EmailToken | None:
        """
        Use a token, and return what it said; None for one that is used, outdated, expired or was never issued.

        The user's row stays locked until the transaction ends: a password that is being changed at the same time
        either ends the token before it is used, or comes after what it was used for.
        """
        if not _well_formed(text, purpose):
            return None
        row = (
            await tx.execute(
                delete(email_tokens)
                .where(
                    email_tokens.c.digest == _digest(text),
                    email_tokens.c.purpose == purpose,
                    *self._alive(lock=True),
                )
                .returning(email_tokens.c.user_id, email_tokens.c.email)
            )
        ).first()
        return EmailToken(row.user_id, row.email) if row is not None else None

    async def revoke_all(self, tx: Transaction, user_id: uuid.UUID) -> None:
        """End every token of a user, and the mails that wait to carry them."""
        await tx.execute(delete(email_tokens).where(email_tokens.c.user_id == user_id))

    async def revoke_every(self, tx: Transaction) -> int:
        """End every token there is, and the mails that wait to carry them; return how many tokens."""
        ended = 0
        async for part in in_parts(tx, email_tokens.c.id):
            ended += (await tx.execute(delete(email_tokens).where(part))).rowcount
        return ended

    async def clean_up(self, tx: Transaction, batch: int) -> int:
        """Forget at most `batch` expired tokens; return how many."""
        doomed = (
            select(email_tokens.c.id)
            .where(email_tokens.c.expires_at <= self._clock.now())
            .order_by(email_tokens.c.expires_at)
            .limit(batch)
        )
        deleted = await tx.execute(delete(email_tokens).where(email_tokens.c.id.in_(doomed.scalar_subquery())))
        return deleted.rowcount

    def _alive(self, *, lock: bool) -> tuple[ColumnElement[bool], ...]:
        """Return the conditions of a token that works; `lock` keeps the user as they are (on PostgreSQL)."""
        epoch = select(users.c.epoch).where(
            users.c.id == email_tokens.c.user_id, users.c.enabled, users.c.deleted_at.is_(None)
        )
        if lock:
            epoch = epoch.with_for_update(key_share=True)
        return (
            email_tokens.c.expires_at > self._clock.now(),
            email_tokens.c.user_epoch == epoch.scalar_subquery(),
        )

    def _text(self, purpose: EmailPurpose, token_id: uuid.UUID, kid: str) -> Secret:
        mac = self._keys["mail"].mac(f"{purpose}|".encode() + token_id.bytes, kid=kid)
        return Secret(encode_token(_PREFIXES[purpose], mac))


def _well_formed(text: Secret, purpose: EmailPurpose) -> bool:
    """Tell a token of this purpose from a typing error or a token of another kind; costs no query."""
    return decode_token(_PREFIXES[purpose], _MAC_BYTES, text.reveal()) is not None


def _digest(text: Secret) -> bytes:
    return hashlib.sha256(text.reveal().encode("ascii")).digest()
