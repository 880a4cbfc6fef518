"""
The pages that mailed links open: a form each, and nothing that runs.

Opening a link changes nothing: scanners open them before people do. Only the form's button does (POST), and what it
sends is the link's own secret, so that no page of another site can press it. The pages load nothing and run nothing,
they may be framed by nobody, and no address of theirs is told to others.
"""

import base64
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from identity_service.accounts.email_flows import EmailPurpose
from identity_service.accounts.password_policy import PasswordRefused
from identity_service.infra.runtime import Secret
from identity_service.web.account.links import DeadLink, Links
from identity_service.web.account.parts import AccountParts, Mail
from identity_service.web.asgi import Headers
from identity_service.web.callers import Visitor
from identity_service.web.errors import as_oauth
from identity_service.web.forms import ClientGone, check_media_type, parse_form, read_body

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).with_name("templates")
_HEADINGS: Mapping[EmailPurpose, str] = {
    "verify_email": "Confirm your address",
    "change_email": "Confirm your new address",
    "reset_password": "Choose a new password",
}
_TEXTS: Mapping[EmailPurpose, str] = {
    "verify_email": "Confirm that this address is yours.",
    "change_email": "Confirm that your account shall use this address from now on.",
}
_DONE: Mapping[EmailPurpose, str] = {
    "verify_email": "Your address is confirmed. You can close this page.",
    "change_email": "Your account uses the new address from now on. You can close this page.",
    "reset_password": "Your password was changed. Sign in with the new one.",
}


@cache
def _style() -> str:
    return (_FOLDER / "style.css").read_text("utf-8")


@cache
def _environment() -> "Environment":
    # Only who shows a page pays for the library.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup(_style())  # noqa: S704  # a file of ours
    return environment


@cache
def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_style().encode("utf-8")).digest()).decode("ascii")
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{digest}'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )


@final
class Pages:
    """Writes the pages of one service."""

    def __init__(self, service_name: str) -> None:
        self._service_name = service_name

    def show(
        self, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
    ) -> Response:
        """Return a page as an answer that nobody may keep."""
        html = _environment().get_template(template).render(service_name=self._service_name, **values)
        fixed = {"content-security-policy": _policy(), "cache-control": "no-store"}
        return Response(html, status, {**(headers or {}), **fixed}, media_type="text/html")

    def refusal(self, error: Exception) -> Response | None:
        """Return the page for what went wrong, or None for a fault of ours."""
        if (known := as_oauth(error)) is not None:
            waits = getattr(known, "retry_after", None)
            headers = {"retry-after": str(waits)} if waits is not None else {}
            return self.message(known.description, status=known.status, headers=headers)
        if isinstance(error, HTTPException):
            return self.message(error.detail, status=error.status_code)
        return None

    def message(self, text: str, *, heading: str = "That did not work", **given: Any) -> Response:
        """Return a page that says one thing."""
        return self.show("message.html", heading=heading, text=text, **given)


def pages_router(parts: AccountParts, mail: Mail) -> APIRouter:
    """Return the pages `/verify-email`, `/change-email` and `/reset-password`."""
    pages = Pages(parts.service_name)
    links = Links(parts, mail)

    class PageRoute(APIRoute):
        """A route that answers people: what goes wrong is a page as well."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            """Wrap the framework's handler."""
            handler = super().get_route_handler()

            async def shown(request: Request) -> Response:
                try:
                    return await handler(request)
                except ClientGone:
                    return Response(status_code=400)
                except Exception as error:
                    page = pages.refusal(error)
                    if page is None:
                        raise
                    return page

            return shown

    router = APIRouter(route_class=PageRoute, include_in_schema=False)
    Visiting = Annotated[Visitor, Depends(parts.callers.anybody())]  # noqa: N806  # a type

    def form(
        purpose: EmailPurpose, path: str, token: Secret, *, status: int = 200, fault: str | None = None
    ) -> Response:
        """Return the form that uses a link."""
        known: dict[str, Any] = {"path": path, "token": token.reveal(), "heading": _HEADINGS[purpose]}
        if purpose == "reset_password":
            return pages.show("password.html", status=status, fault=fault, **known)
        return pages.show("confirm.html", status=status, text=_TEXTS[purpose], **known)

    async def use(visitor: Visitor, purpose: EmailPurpose, token: Secret, password: str | None) -> None:
        if purpose == "reset_password":
            await links.reset(visitor, token, Secret(password or ""))
        else:
            await links.confirm(visitor, token)

    def add(purpose: EmailPurpose, path: str) -> None:
        @router.get(path)
        async def show(visitor: Visiting, request: Request) -> Response:
            """Show the form, if the link is still good; this uses nothing."""
            given = request.query_params.getlist("token")
            if len(given) != 1:
                raise DeadLink
            token = Secret(given[0])
            await links.owner_of(visitor, token, purpose)
            return form(purpose, path, token)

        @router.post(path)
        async def act(visitor: Visiting, request: Request) -> Response:
            """Use the link."""
            headers = Headers(request.scope["headers"])
            check_media_type(headers)
            sent = parse_form(await read_body(headers, request.receive)).values
            token = Secret(sent.get("token", ""))
            try:
                await use(visitor, purpose, token, sent.get("new_password"))
            except PasswordRefused as refused:
                return form(purpose, path, token, status=422, fault=str(refused))
            return pages.message(_DONE[purpose], heading="Done")

    add("verify_email", "/verify-email")
    add("change_email", "/change-email")
    add("reset_password", "/reset-password")
    return router
