"""Asking a signed-in person for their password again, before what a stolen session must not be enough for."""

from typing import final

from pydantic import SecretStr

from identity_service.accounts.users import SignInFacts, User
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Spend
from identity_service.infra.ratelimit.catalogue import PASSWORD_CHANGE
from identity_service.infra.runtime import Secret
from identity_service.web.account.parts import AccountParts, given_back, person_of
from identity_service.web.callers import Caller, Entry
from identity_service.web.deps import spend
from identity_service.web.problems import Conflict, Forbidden


@final
class Reauthentication:
    """Checks the current password, and slows down who guesses at it."""

    def __init__(self, parts: AccountParts) -> None:
        self._parts = parts

    async def demand(self, entry: Entry, password: SecretStr, *, act: str) -> SignInFacts:
        """
        Return what is stored about the person whose password this is; `act` names for the audit trail what it is for.

        Raises Forbidden for a wrong password, TooManyRequests, HashingBusy. Every try is booked
        before the password is looked at, and taken back when it was right or nobody could look.
        """
        facts = await entry.run(self._facts)
        booked = [Spend(PASSWORD_CHANGE, f"u:{facts.user_id}")]
        await spend(self._parts.limiter, booked)
        async with given_back(self._parts.limiter, booked):
            verification = await self._parts.users.check_password(facts, Secret(password.get_secret_value()))
        if not verification.right:
            await entry.run(lambda tx, caller: self._failed(tx, caller, act))
            raise Forbidden("The password is wrong.")
        await self._parts.limiter.settle(refund=booked)
        return facts

    async def locked(self, tx: Transaction, caller: Caller, facts: SignInFacts) -> User:
        """
        Return the person, whom nobody else changes until this transaction ends; raises Conflict.

        What was checked about them must still be so: a new password, or anything else that ends all sessions, may have
        come between.
        """
        user = await self._parts.users.locked(tx, person_of(caller).id)
        if user is None or user.id != facts.user_id or user.epoch != facts.epoch:
            raise Conflict("The account was changed meanwhile.")
        return user

    async def _facts(self, tx: Transaction, caller: Caller) -> SignInFacts:
        facts = await self._parts.users.facts(tx, person_of(caller).username)
        if facts is None or facts.user_id != person_of(caller).id:
            raise Conflict("The account was changed meanwhile.")
        return facts

    async def _failed(self, tx: Transaction, caller: Caller, act: str) -> None:
        await self._parts.audit.record_failure(
            tx,
            "reauthentication.failed",
            origin=caller.origin,
            target=caller.actor,
            client_id=caller.client_id,
            detail={"for": act},
            genuine=True,
        )
