"""Making the first operator of a fresh installation."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, SecretStr

from identity_service.accounts.access import ADMINISTRATORS_LOCK, PERMISSIONS, SELF_SERVICE, SUPER_ADMIN
from identity_service.accounts.bootstrap import Bootstrap
from identity_service.accounts.clients import NO_AUTHENTICATION, NewClient
from identity_service.accounts.password_policy import PasswordRefused
from identity_service.accounts.users import InvalidUser, NameTaken
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit.catalogue import BOOTSTRAP
from identity_service.infra.runtime import Secret
from identity_service.web.account.parts import AccountParts, Text, invalid
from identity_service.web.account.profile import Profile
from identity_service.web.callers import Visitor
from identity_service.web.deps import FailureBudget
from identity_service.web.documented import problems
from identity_service.web.problems import Conflict, Fault, Forbidden, Invalid, NotFound
from identity_service.web.strict import StrictModel, api_routes

_OPERATORS = NewClient(
    name="Operators",
    first_party=True,
    token_endpoint_auth_method=NO_AUTHENTICATION,
    grant_types=("password", "refresh_token"),
    scope=sorted(SELF_SERVICE | PERMISSIONS),
)


class FirstOperator(StrictModel):
    """The secret of the installation, and who is to be its first operator."""

    secret: SecretStr
    username: Text
    email: Text
    password: SecretStr


class FirstOperatorMade(BaseModel):
    """The first operator, and the client that they sign in through: a public one, for operators' scopes."""

    user: Profile
    client_id: str


def bootstrap_router(parts: AccountParts, bootstrap: Bootstrap) -> APIRouter:
    """Return `POST /v1/bootstrap`."""
    router = api_routes("/v1", tag="bootstrap")
    Visiting = Annotated[Visitor, Depends(parts.callers.anybody())]  # noqa: N806  # a type
    guesses = FailureBudget(parts.limiter, parts.clock, BOOTSTRAP)

    async def check_unused(tx: Transaction) -> None:
        if await bootstrap.spent(tx):
            raise NotFound
        if await parts.users.enabled_super_admins(tx):
            raise Conflict("There is a super_admin already.")

    @router.post("/bootstrap", status_code=201, responses=problems(409))
    async def make_first_operator(visitor: Visiting, body: FirstOperator) -> FirstOperatorMade:
        """
        Make the first operator, and a client for them. The secret works once, for ever.

        Without the client they could not do anything: what a token carries is bounded by its client, and only somebody
        who has such a token can register one.
        """
        who = ("bootstrap", visitor.origin.network)
        guesses.check(who)
        if not bootstrap.proves(Secret(body.secret.get_secret_value())):
            await guesses.book(who, f"n:{visitor.origin.network}")
            raise Forbidden("The secret is wrong.")
        await visitor.run(check_unused)
        password = Secret(body.password.get_secret_value())
        try:
            parts.users.check_names(body.username, body.email)
            hashed = await parts.users.prepare_password(password, names=(body.username, body.email))
        except InvalidUser as error:
            raise invalid(error) from None
        except PasswordRefused as refused:
            raise Invalid(Fault("/password", str(refused))) from None

        async def make(tx: Transaction) -> FirstOperatorMade:
            await tx.lock(ADMINISTRATORS_LOCK)
            await check_unused(tx)
            if not await bootstrap.spend(tx):
                raise NotFound
            try:
                operator = await parts.users.create(
                    tx,
                    username=body.username,
                    email=body.email,
                    role=SUPER_ADMIN,
                    password_hash=hashed,
                    verified=True,
                )
            except NameTaken:
                raise Conflict("The username or the address is taken.") from None
            await parts.audit.record(
                tx, "bootstrap.spent", origin=visitor.origin, actor="bootstrap", target=str(operator.id)
            )
            client, _ = await parts.clients.register(tx, _OPERATORS)
            await parts.audit.record(tx, "client.created", origin=visitor.origin, actor="bootstrap", target=client.id)
            return FirstOperatorMade(user=Profile.of(operator), client_id=client.id)

        return await visitor.run(make)

    return router
