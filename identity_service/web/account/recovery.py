"""Proving an address and choosing a new password, for programs; people use the pages."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import SecretStr

from identity_service.accounts.password_policy import PasswordRefused
from identity_service.infra.runtime import Secret
from identity_service.web.account.links import Links
from identity_service.web.account.parts import Accepted, AccountParts, Text
from identity_service.web.callers import Visitor
from identity_service.web.documented import problems
from identity_service.web.problems import Fault, Invalid
from identity_service.web.strict import StrictModel, api_routes

_ON_ITS_WAY = Accepted(message="If there is such an account, a mail is on its way.")


class LinkWanted(StrictModel):
    """Whose link is wanted: an address, or for a new password a username as well."""

    email: Text


class Confirmation(StrictModel):
    """What the link in the mail holds."""

    token: SecretStr


class NewPassword(StrictModel):
    """What the link in the mail holds, and the password that shall be."""

    token: SecretStr
    new_password: SecretStr


def recovery_router(parts: AccountParts, links: Links) -> APIRouter:
    """Return the routes of mailed links."""
    router = api_routes("/v1", tag="account")
    Visiting = Annotated[Visitor, Depends(parts.callers.anybody())]  # noqa: N806  # a type

    @router.post("/email-verification", status_code=202, responses=problems())
    async def order_verification(visitor: Visiting, body: LinkWanted) -> Accepted:
        """Order the mail that proves an address once more."""
        await links.order(visitor, "verify_email", body.email)
        return _ON_ITS_WAY

    @router.post("/email-verification/confirm", status_code=204, responses=problems(409))
    async def confirm_address(visitor: Visiting, body: Confirmation) -> None:
        """Prove an address, the one of the account or a new one for it."""
        await links.confirm(visitor, Secret(body.token.get_secret_value()))

    @router.post("/password-reset", status_code=202, responses=problems())
    async def order_reset(visitor: Visiting, body: LinkWanted) -> Accepted:
        """Order the mail with which a new password can be chosen; the old one stays good."""
        await links.order(visitor, "reset_password", body.email)
        return _ON_ITS_WAY

    @router.post("/password-reset/confirm", status_code=204, responses=problems())
    async def reset_password(visitor: Visiting, body: NewPassword) -> None:
        """Choose a new password; every session ends, and nobody is signed in."""
        password = Secret(body.new_password.get_secret_value())
        try:
            await links.reset(visitor, Secret(body.token.get_secret_value()), password)
        except PasswordRefused as refused:
            raise Invalid(Fault("/new_password", str(refused))) from None

    return router
