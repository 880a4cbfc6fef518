"""Registering by oneself, where the installation lets people."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import SecretStr

from identity_service.accounts.password_policy import PasswordPolicy, PasswordRefused
from identity_service.accounts.recovery import MailPurpose, mail_key
from identity_service.accounts.registration import NewPerson, Taken
from identity_service.accounts.users import InvalidUser, User, check_display_name, check_email, check_username
from identity_service.infra.ratelimit import Limited, Spend
from identity_service.infra.ratelimit.catalogue import MAIL_ADDRESS, REGISTRATION_NETWORK
from identity_service.infra.runtime import Secret
from identity_service.web.account.parts import Accepted, AccountParts, Text, given_back
from identity_service.web.account.profile import Profile
from identity_service.web.callers import Visitor
from identity_service.web.documented import problems
from identity_service.web.problems import Conflict, Fault, Forbidden, Invalid
from identity_service.web.strict import StrictModel, api_routes
from identity_service.web.uniform import uniformly

_TAKEN = {"username": "The username is taken.", "email": "The address belongs to an account already."}


class NewUser(StrictModel):
    """Who registers."""

    username: Text
    email: Text
    password: SecretStr
    name: Text | None = None


def registration_router(parts: AccountParts) -> APIRouter:
    """Return `POST /v1/users` as this installation has it."""
    router = api_routes("/v1/users", tag="account")
    Visiting = Annotated[Visitor, Depends(parts.callers.anybody())]  # noqa: N806  # a type
    mode = parts.registration.mode

    async def booked_for_mail(purpose: MailPurpose, body: NewUser) -> list[Spend]:
        """Return what was booked for a mail to who registers; nothing if none may be sent."""
        spends = [Spend(MAIL_ADDRESS, mail_key(parts.data_keys, purpose, body.email))]
        if parts.mail is None or isinstance(await parts.limiter.spend(spends), Limited):
            return []
        return spends

    async def register(visitor: Visitor, body: NewUser) -> User | Taken:
        """
        Register somebody, or find a name taken; what this refuses depends on nothing but what was sent.

        The first mail of somebody new has a limit of its own, and so have those that tell what is taken: what was asked
        before about an address uses up nothing of what its owner asks for.
        """
        password = _checked(parts.policy, body)
        booked = [Spend(REGISTRATION_NETWORK, f"n:{visitor.origin.network}")]
        await visitor.spend(booked)
        async with given_back(parts.limiter, booked):
            hashed = await parts.users.prepare_password(password, names=(body.username, body.email))
            person = NewPerson(body.username, body.email, body.name, hashed)
            first = await booked_for_mail("registration", body)
            further = await booked_for_mail("registration_declined", body)
            async with given_back(parts.limiter, [*first, *further]):
                outcome = await visitor.run(
                    lambda tx: parts.registration.register(
                        tx, person, may_welcome=bool(first), may_refuse=bool(further), origin=visitor.origin
                    )
                )
            unused = [*further] if isinstance(outcome, User) else [*first]
            if mode == "open" and isinstance(outcome, Taken):  # who is told at once gets no mail
                unused += further
            await parts.limiter.settle(refund=unused)
            return outcome

    if mode == "closed":

        @router.post("", status_code=403, responses=problems())
        async def refuse_everybody(_visitor: Visiting) -> None:
            """Refuse: people do not register by themselves here."""
            raise Forbidden("Registration is closed.")

    elif mode == "open":

        @router.post("", status_code=201, responses=problems(409))
        async def register_openly(visitor: Visiting, body: NewUser) -> Profile:
            """Register; who cannot have a name learns which."""
            outcome = await register(visitor, body)
            if isinstance(outcome, Taken):
                raise Conflict(_TAKEN[outcome.which])
            return Profile.of(outcome)

    else:

        @router.post("", status_code=202, responses=problems())
        async def register_privately(visitor: Visiting, body: NewUser) -> Accepted:
            """Register; whether the names were free is told by mail only."""
            async with uniformly(parts.refusal_delay):
                await register(visitor, body)
            return Accepted(message="A mail to this address tells how to go on.")

    return router


def _checked(policy: PasswordPolicy, body: NewUser) -> Secret:
    """Return the password of somebody who can be registered as far as what they sent goes; raises Invalid."""
    faults, password = [], Secret(body.password.get_secret_value())
    checks: tuple[Callable[[], object], ...] = (
        lambda: check_username(body.username),
        lambda: check_email(body.email),
        lambda: check_display_name(body.name),
    )
    for check in checks:
        try:
            check()
        except InvalidUser as error:
            faults.append(Fault(f"/{error.field}", error.detail))
    try:
        policy.accept(password, names=(body.username, body.email))
    except PasswordRefused as refused:
        faults.append(Fault("/password", str(refused)))
    if faults:
        raise Invalid(*faults)
    return password
