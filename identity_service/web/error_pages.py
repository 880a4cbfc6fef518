"""What the JSON API answers when something is wrong: a problem (RFC 9457), never the framework's own echo."""

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.outbox import MailQueueFull
from identity_service.infra.runtime.hashing import HashingBusy
from identity_service.oauth.errors import OAuthError
from identity_service.web.asgi import Reply
from identity_service.web.deps import InsufficientScope, Unauthenticated
from identity_service.web.errors import note, problem, problem_of
from identity_service.web.problems import Problem


def install_error_pages(app: FastAPI) -> None:
    """Answer every error of the JSON API as a problem (RFC 9457); the framework's own echo what was sent."""

    def respond(reply: Reply) -> Response:
        return Response(reply.body, reply.status, {key.decode(): value.decode() for key, value in reply.headers})

    @app.exception_handler(Unauthenticated)
    async def unauthenticated(request: Request, error: Unauthenticated) -> Response:
        request.scope["state"]["reason"] = error.reason
        challenge = f'Bearer error="{error.code}"' if error.code else "Bearer"
        return respond(
            problem(401, "A valid access token is needed.", headers=[(b"www-authenticate", challenge.encode())])
        )

    @app.exception_handler(InsufficientScope)
    async def insufficient(request: Request, error: InsufficientScope) -> Response:
        challenge = f'Bearer error="insufficient_scope", scope="{error.scope}"'
        return respond(
            problem(403, "The access token may not do this.", headers=[(b"www-authenticate", challenge.encode())])
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = [_fault(fault["loc"], fault["type"]) for fault in error.errors()]
        return respond(problem(422, "The request is not valid.", errors=faults))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = [(key.lower().encode(), value.encode()) for key, value in (error.headers or {}).items()]
        members = error.members if isinstance(error, Problem) else {}
        return respond(problem(error.status_code, error.detail, headers=headers, **members))

    @app.exception_handler(DatabaseUnavailable)
    @app.exception_handler(OAuthError)
    @app.exception_handler(HashingBusy)
    @app.exception_handler(MailQueueFull)
    async def known(request: Request, error: Exception) -> Response:
        note(request.scope, error)
        return respond(problem_of(error))


_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "has a member that is not known",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be one of the listed values",
    "enum": "must be one of the listed values",
    "string_too_short": "is too short",
    "string_too_long": "is too long",
    "too_long": "has too many items",
    "too_short": "has too few items",
}
"""Ours and not the validator's: its messages can repeat what was sent."""


def _fault(where: Sequence[int | str], kind: str) -> dict[str, str]:
    """Return what is wrong and where, without the value; the name of a member that we do not know is one."""
    place = where[1:-1] if kind == "extra_forbidden" else where[1:]
    pointer = "".join(f"/{part}".replace("~", "~0") if isinstance(part, str) else f"/{part}" for part in place)
    return {"pointer": pointer, "detail": _WORDS.get(kind, "is not valid")}
