"""What the person's API is made of, and the few words that all of its routes use."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, StringConstraints

from identity_service.accounts import notices
from identity_service.accounts.access import Access
from identity_service.accounts.api_keys import ApiKeys
from identity_service.accounts.bootstrap import Bootstrap
from identity_service.accounts.clients import Clients
from identity_service.accounts.email_flows import EmailTokens
from identity_service.accounts.password_policy import PasswordPolicy
from identity_service.accounts.recovery import Recovery
from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.accounts.registration import Registration
from identity_service.accounts.throttle import SignInThrottle
from identity_service.accounts.users import InvalidUser, User, Users
from identity_service.infra.audit import AuditTrail
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.outbox import MailQueueFull, Outbox
from identity_service.infra.ratelimit import Limiter, Spend
from identity_service.infra.runtime import Clock
from identity_service.infra.runtime.hashing import HashingBusy
from identity_service.web.callers import Caller, Callers, note
from identity_service.web.deps import Unauthenticated, spend
from identity_service.web.paging import Cursors
from identity_service.web.problems import Fault, Invalid

Text = Annotated[str, StringConstraints(max_length=254)]
"""A text that somebody typed, to be checked by who knows what it must be."""


class Accepted(BaseModel):
    """What is answered whatever was found: the rest comes by mail."""

    message: str


@dataclass(frozen=True, slots=True)
class Mail:
    """What sends links by mail, and does what they are for."""

    outbox: Outbox
    tokens: EmailTokens
    recovery: Recovery


@dataclass(frozen=True, slots=True)
class AccountParts:
    """
    The objects behind the person's API and the pages of mailed links.

    `mail` is None where no mail can be sent, and `bootstrap` where no secret is configured: what needs them is not
    there at all then. `refusal_delay` is in seconds.
    """

    callers: Callers
    users: Users
    policy: PasswordPolicy
    families: RefreshFamilies
    access: Access
    clients: Clients
    api_keys: ApiKeys
    throttle: SignInThrottle
    limiter: Limiter
    audit: AuditTrail
    data_keys: DataKeys
    cursors: Cursors
    clock: Clock
    registration: Registration
    mail: Mail | None
    bootstrap: Bootstrap | None
    refusal_delay: float
    service_name: str

    async def notify(
        self, tx: Transaction, template: str, user: User, context: Mapping[str, Any] | None = None
    ) -> None:
        """Tell a user what was done; see `tell`."""
        await tell(self.mail, tx, template, user, context)

    async def end_links(self, tx: Transaction, user: User) -> None:
        """End every link that was mailed to a user."""
        if self.mail is not None:
            await self.mail.tokens.revoke_all(tx, user.id)

    async def record(
        self, tx: Transaction, caller: Caller, event: str, target: str, detail: dict[str, Any] | None = None
    ) -> None:
        """Note what a caller did to something of theirs."""
        await note(self.audit, tx, caller, event, target, detail)


async def tell(
    mail: Mail | None, tx: Transaction, template: str, user: User, context: Mapping[str, Any] | None = None
) -> None:
    """Order a notice to a user's proven address, where mail can be sent at all; see `notices.tell`."""
    if mail is not None:
        await notices.tell(mail.outbox, tx, template, user, context)


def person_of(caller: Caller) -> User:
    """Return the person who calls, by themselves or with a key of theirs; raises Unauthenticated."""
    if caller.user is None:
        raise Unauthenticated("invalid_token", reason="not_a_person")
    return caller.user


async def limits_of(_tx: Transaction, caller: Caller) -> str:
    """Return the key under which a person's own limits are counted."""
    return f"u:{person_of(caller).id}"


def invalid(error: InvalidUser) -> Invalid:
    """Return the refusal of a name, an address or a role that cannot be."""
    return Invalid(Fault(f"/{error.field}", error.detail))


@asynccontextmanager
async def if_done(limiter: Limiter, spends: Sequence[Spend]) -> AsyncIterator[None]:
    """
    Spend before the block, and give it all back when the block is not carried through; raises TooManyRequests.

    Who is over the limit is refused before any work, and only what was done counts.
    """
    await spend(limiter, spends)
    try:
        yield
    except Exception:
        await limiter.settle(refund=spends)
        raise


@asynccontextmanager
async def given_back(limiter: Limiter, spends: Sequence[Spend]) -> AsyncIterator[None]:
    """Give spends back when something behind us could not answer: who has to come again must not be held up for it."""
    try:
        yield
    except (DatabaseUnavailable, HashingBusy, MailQueueFull):
        await limiter.settle(refund=spends)
        raise
