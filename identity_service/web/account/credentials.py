"""What needs the current password once more: another password, another address, leaving."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import SecretStr

from identity_service.accounts.access import ADMINISTRATORS_LOCK
from identity_service.accounts.password_policy import PasswordRefused
from identity_service.accounts.recovery import mail_key
from identity_service.accounts.users import InvalidUser, User, check_email
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Limited, Spend
from identity_service.infra.ratelimit.catalogue import EMAIL_CHANGE, MAIL_ADDRESS, PASSWORD_CHANGE_DONE
from identity_service.infra.runtime import Secret
from identity_service.web.account.parts import (
    Accepted,
    AccountParts,
    Mail,
    Text,
    given_back,
    if_done,
    invalid,
    person_of,
)
from identity_service.web.account.reauthentication import Reauthentication
from identity_service.web.callers import Caller, Entry
from identity_service.web.documented import problems
from identity_service.web.problems import Conflict, Fault, Invalid
from identity_service.web.strict import StrictModel, api_routes


class PasswordChange(StrictModel):
    """The password as it is and as it shall be."""

    current_password: SecretStr
    new_password: SecretStr
    keep_current_session: bool = False
    keep_api_keys: bool = True


class EmailChange(StrictModel):
    """The address that the person wants to use from now on."""

    email: Text
    password: SecretStr


class Farewell(StrictModel):
    """The person's own password, so that nobody else can make them leave."""

    password: SecretStr


def credentials_router(parts: AccountParts) -> APIRouter:
    """Return the routes that change the password and the address, and that delete the account."""
    router = api_routes("/v1/users/me", tag="account")
    Writing = Annotated[Entry, Depends(parts.callers.needs("account:write", person=True, first_hand=True))]  # noqa: N806  # a type
    reauthentication = Reauthentication(parts)

    async def who(_tx: Transaction, caller: Caller) -> User:
        return person_of(caller)

    @router.post("/password", status_code=204, responses=problems(409))
    async def change_password(entry: Writing, body: PasswordChange) -> None:
        """Choose a new password; every session ends, except this one if it shall be kept."""
        person = await entry.run(who)
        names = (person.username, person.email)
        new = Secret(body.new_password.get_secret_value())
        try:
            parts.policy.accept(new, names=names)
        except PasswordRefused as refused:
            raise Invalid(Fault("/new_password", str(refused))) from None

        async def change(tx: Transaction, caller: Caller) -> None:
            user = await reauthentication.locked(tx, caller, facts)
            epoch = await parts.users.set_password(tx, user.id, hashed)
            if body.keep_current_session and caller.session_id is not None and epoch is not None:
                await parts.families.keep(tx, caller.session_id, user.id, epoch=epoch)
            if not body.keep_api_keys:
                await parts.api_keys.revoke_all(tx, user.id)
            await parts.end_links(tx, user)
            await parts.notify(tx, "password_changed", user)
            kept = {"session_kept": body.keep_current_session, "api_keys_kept": body.keep_api_keys}
            await parts.record(tx, caller, "password.changed", str(user.id), kept)

        async with if_done(parts.limiter, [Spend(PASSWORD_CHANGE_DONE, f"u:{person.id}")]):
            facts = await reauthentication.demand(entry, body.current_password, act="password")
            hashed = await parts.users.prepare_password(new, names=names)
            await entry.run(change)

    @router.delete("", status_code=204, responses=problems(409))
    async def leave(entry: Writing, body: Farewell) -> None:
        """Delete the account: everything ends at once, and an operator can bring it back for a while."""
        facts = await reauthentication.demand(entry, body.password, act="deletion")

        async def delete(tx: Transaction, caller: Caller) -> None:
            user = await reauthentication.locked(tx, caller, facts)
            if await parts.users.is_last_super_admin(tx, user):
                raise Conflict("The last super_admin cannot leave. Make another one first.")
            await parts.end_links(tx, user)
            await parts.notify(tx, "account_deleted", user)
            await parts.users.delete(tx, user.id)
            await parts.record(tx, caller, "user.deleted", str(user.id))

        await entry.run(delete, lock=ADMINISTRATORS_LOCK)

    def change_of_address(mail: Mail) -> None:
        @router.post("/email", status_code=202, responses=problems(409))
        async def change_email(entry: Writing, body: EmailChange, response: Response) -> Accepted:
            """Ask for another address; it counts once its owner has opened the link that is sent to it."""
            try:
                check_email(body.email)
            except InvalidUser as error:
                raise invalid(error) from None
            person = await entry.run(who)
            if person.email == body.email:
                raise Invalid(Fault("/email", "is the address already"))
            mailed = [Spend(MAIL_ADDRESS, mail_key(parts.data_keys, "change_email", body.email))]

            async def order(tx: Transaction, caller: Caller) -> None:
                user = await reauthentication.locked(tx, caller, facts)
                if may_mail:
                    await mail.recovery.request_change(
                        tx, user, body.email, origin=caller.origin, client_id=caller.client_id
                    )

            async with if_done(parts.limiter, [Spend(EMAIL_CHANGE, f"u:{person.id}")]):
                facts = await reauthentication.demand(entry, body.password, act="email")
                # Not told: others may have asked for this address, and that is not this person's fault.
                may_mail = not isinstance(await parts.limiter.spend(mailed), Limited)
                async with given_back(parts.limiter, mailed if may_mail else ()):
                    await entry.run(order)
            return Accepted(message="A mail is on its way to the new address.")

    if parts.mail is not None:
        change_of_address(parts.mail)
    return router
