"""
What mailed links do, for the JSON API and for the hosted pages alike.

Nobody guesses at links (256 bits), but who tries makes the database look; a network that keeps trying waits.
"""

from typing import Final, final

from identity_service.accounts.email_flows import EmailPurpose, OrderedPurpose
from identity_service.accounts.recovery import mail_key
from identity_service.accounts.users import NameTaken, User
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Limited, Spend
from identity_service.infra.ratelimit.catalogue import LINK_GUESSING, MAIL_ADDRESS, MAIL_NETWORK
from identity_service.infra.runtime import Secret
from identity_service.web.account.parts import AccountParts, Mail, given_back
from identity_service.web.callers import Visitor
from identity_service.web.deps import FailureBudget
from identity_service.web.problems import BadRequest, Conflict
from identity_service.web.uniform import uniformly


class DeadLink(BadRequest):
    """The link was used, is outdated, or never was one: the same words for all."""

    TEXT: Final = "This link is no longer good."

    def __init__(self) -> None:
        super().__init__(self.TEXT)


@final
class Links:
    """Orders mails with links, and uses the links."""

    def __init__(self, parts: AccountParts, mail: Mail) -> None:
        self._parts = parts
        self._recovery = mail.recovery
        self._guesses = FailureBudget(parts.limiter, parts.clock, LINK_GUESSING)

    async def order(self, visitor: Visitor, purpose: OrderedPurpose, typed: str) -> None:
        """
        Order the mail with a link, if there is anybody to get one; nothing that is seen from outside tells.

        Raises TooManyRequests for the network only: that too many mails went to one address stays untold.
        """
        limiter = self._parts.limiter
        booked = [Spend(MAIL_NETWORK, f"n:{visitor.origin.network}")]
        await visitor.spend(booked)
        async with uniformly(self._parts.refusal_delay), given_back(limiter, booked):
            user = await visitor.run(lambda tx: self._recovery.asked_for(tx, purpose, typed))
            if user is None:
                return  # nothing is booked for an address that nobody has: whoever registers it needs their mails
            mailed = [Spend(MAIL_ADDRESS, mail_key(self._parts.data_keys, purpose, user.email))]
            if isinstance(await limiter.spend(mailed), Limited):
                return
            async with given_back(limiter, mailed):
                await visitor.run(lambda tx: self._recovery.send(tx, purpose, user, origin=visitor.origin))

    async def owner_of(self, visitor: Visitor, text: Secret, purpose: EmailPurpose) -> User:
        """Return whom a link is for, without using it; raises DeadLink, TooManyRequests."""
        user = await visitor.run(lambda tx: self._recovery.owner_of(tx, text, purpose))
        if user is None:
            await self._dead(visitor)
            raise DeadLink
        return user

    async def confirm(self, visitor: Visitor, text: Secret) -> None:
        """Use a link that proves an address, the stored or a new one; raises DeadLink, Conflict, TooManyRequests."""

        async def use(tx: Transaction) -> bool:
            return await self._recovery.verify(tx, text, origin=visitor.origin) or await self._recovery.change(
                tx, text, origin=visitor.origin
            )

        try:
            used = await visitor.run(use)
        except NameTaken:
            raise Conflict("The address belongs to another account meanwhile.") from None
        if not used:
            await self._dead(visitor)
            raise DeadLink

    async def reset(self, visitor: Visitor, text: Secret, password: Secret) -> None:
        """
        Use a link that gives its owner a new password; raises DeadLink, TooManyRequests, PasswordRefused, HashingBusy.

        The link is looked at first, so that a password that cannot be does not cost it.
        """
        owner = await self.owner_of(visitor, text, "reset_password")
        hashed = await self._parts.users.prepare_password(password, names=(owner.username, owner.email))
        user = await visitor.run(lambda tx: self._recovery.reset(tx, text, hashed, origin=visitor.origin))
        if user is None:
            raise DeadLink
        for name in (user.username, user.email):
            await self._parts.throttle.forgive(name)

    async def _dead(self, visitor: Visitor) -> None:
        """Book a link that is none; who shows a good one is not held up by others in the same network."""
        self._guesses.check(_who(visitor))
        await self._guesses.book(_who(visitor), f"n:{visitor.origin.network}")


def _who(visitor: Visitor) -> tuple[str, str]:
    return "link", visitor.origin.network
