"""
Proving an address, changing it, and getting back into an account whose password is lost: what mailed links are for.

A request never tells whether there is such an account; only its stored address is ever written to. A link proves that
its holder reads that address, and nothing more is asked of them.
"""

from collections.abc import Mapping
from typing import Literal, final

from identity_service.accounts import notices
from identity_service.accounts.api_keys import ApiKeys
from identity_service.accounts.email_flows import EmailPurpose, EmailTokens, OrderedPurpose
from identity_service.accounts.users import User, Users, canonical_email, canonical_name
from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import Outbox
from identity_service.infra.runtime import Secret

MailPurpose = EmailPurpose | Literal["registration", "registration_declined"]
"""
What mails are limited by: what their link is for, and apart from that the first one of somebody who registers, and
those that tell what was taken. Nothing that strangers do with an address must use up what its owner asks for.
"""

_REQUESTED: Mapping[OrderedPurpose, str] = {
    "verify_email": "email_verification.requested",
    "reset_password": "password_reset.requested",
}


def mail_key(data_keys: DataKeys, purpose: MailPurpose, address: str) -> str:
    """
    Return the key that mails to an address are limited by, however it is spelled.

    Each purpose has its own, or who asks for one kind of mail could keep somebody from getting another.
    """
    return f"a:{purpose}:{data_keys.hash_name(canonical_name(address))}"


@final
class Recovery:
    """Orders the mails with links, and does what the links are for."""

    def __init__(self, users: Users, api_keys: ApiKeys, tokens: EmailTokens, outbox: Outbox, audit: AuditTrail) -> None:
        self._users = users
        self._api_keys = api_keys
        self._tokens = tokens
        self._outbox = outbox
        self._audit = audit

    # -- asking for a mail ----------------------------------------------------------------------------------------

    async def asked_for(self, tx: Transaction, purpose: OrderedPurpose, typed: str) -> User | None:
        """
        Return whom a request for a mail is about, or None where no mail is due.

        Raises MailQueueFull before anybody is looked up: for everybody alike.
        """
        await self._outbox.check_room(tx)
        if purpose == "verify_email" and canonical_email(typed) is None:
            return None
        user = await self._users.by_name(tx, typed)
        return user if user is not None and self._due(purpose, user) else None

    async def send(self, tx: Transaction, purpose: OrderedPurpose, user: User, *, origin: Origin) -> None:
        """
        Order the mail with a fresh link to a user's stored address, if it is still due; the older link dies.

        Raises MailQueueFull.
        """
        current = await self._users.locked(tx, user.id)
        if current is None or current.email != user.email or not self._due(purpose, current):
            return
        token_id = await self._tokens.issue(
            tx, purpose=purpose, user_id=current.id, epoch=current.epoch, email=current.email
        )
        await self._outbox.enqueue(tx, template=purpose, recipient=current.email, context={}, token_id=token_id)
        await self._audit.record(tx, _REQUESTED[purpose], origin=origin, target=str(current.id))

    @staticmethod
    def _due(purpose: OrderedPurpose, user: User) -> bool:
        return user.enabled and (purpose != "verify_email" or user.email_verified_at is None)

    async def request_change(
        self, tx: Transaction, user: User, email: str, *, origin: Origin, client_id: str | None
    ) -> None:
        """
        Order what proves a user's new address; the old one, if it is proven, is told at once. Raises MailQueueFull.

        Where the new address is somebody else's they are told instead, and the user cannot tell: a token is made in
        any case, so that an older link dies in any case.
        """
        owner = await self._users.by_name(tx, email)
        token_id = await self._tokens.issue(tx, purpose="change_email", user_id=user.id, epoch=user.epoch, email=email)
        if owner is None or owner.id == user.id:
            await self._outbox.enqueue(tx, template="change_email", recipient=email, context={}, token_id=token_id)
        elif owner.enabled:
            await self._outbox.enqueue(tx, template="account_exists", recipient=owner.email, context={})
        await notices.tell(self._outbox, tx, "email_change_requested", user)
        await self._audit.record(
            tx,
            "email_change.requested",
            origin=origin,
            actor=str(user.id),
            target=str(user.id),
            client_id=client_id,
        )

    # -- using a link ---------------------------------------------------------------------------------------------

    async def owner_of(self, tx: Transaction, text: Secret, purpose: EmailPurpose) -> User | None:
        """Return whom a link is for, without using it; None for one that is no longer good."""
        token = await self._tokens.look(tx, text, purpose)
        return await self._users.get(tx, token.user_id) if token is not None else None

    async def verify(self, tx: Transaction, text: Secret, *, origin: Origin) -> bool:
        """Use a link that proves the stored address; return False for one that is no longer good."""
        token = await self._tokens.consume(tx, text, "verify_email")
        if token is None or not await self._users.verify_email(tx, token.user_id, token.email):
            return False
        await self._done(tx, "email.verified", str(token.user_id), origin)
        return True

    async def change(self, tx: Transaction, text: Secret, *, origin: Origin) -> bool:
        """
        Use a link that proves a new address, which is stored now; return False for one that is no longer good.

        The old address is told, if it was proven, and every link that was mailed to it dies. Raises NameTaken when the
        address is somebody else's meanwhile, after which this transaction can only be rolled back.
        """
        token = await self._tokens.consume(tx, text, "change_email")
        user = await self._users.locked(tx, token.user_id) if token is not None else None
        if token is None or user is None:
            return False
        await self._users.set_email(tx, user.id, token.email, verified=True)
        await self._tokens.revoke_all(tx, user.id)
        await notices.tell(self._outbox, tx, "email_changed", user)
        await self._done(tx, "email.changed", str(user.id), origin)
        return True

    async def reset(self, tx: Transaction, text: Secret, password_hash: str, *, origin: Origin) -> User | None:
        """
        Use a link that gives a user a new password; return the user, None for a link that is no longer good.

        Whatever the user had open ends: sessions, links and API keys, for nobody knows who made them. The address that
        the link was sent to is proven by it, and told. Nobody is signed in.
        """
        token = await self._tokens.consume(tx, text, "reset_password")
        if token is None:
            return None
        await self._users.verify_email(tx, token.user_id, token.email)
        user = await self._users.locked(tx, token.user_id)
        if user is None:
            return None
        await self._users.set_password(tx, user.id, password_hash)
        await self._tokens.revoke_all(tx, user.id)
        await self._api_keys.revoke_all(tx, user.id)
        await notices.tell(self._outbox, tx, "password_changed", user)
        await self._done(tx, "password.reset", str(user.id), origin)
        return user

    async def _done(self, tx: Transaction, event: str, user_id: str, origin: Origin) -> None:
        await self._audit.record(tx, event, origin=origin, actor=user_id, target=user_id)
