"""What the JSON API answers when something is wrong: a problem (RFC 9457), never the framework's own echo."""

from collections.abc import Mapping
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.outbox import MailQueueFull
from identity_service.infra.runtime.hashing import HashingBusy
from identity_service.oauth.errors import OAuthError
from identity_service.web.asgi import Reply
from identity_service.web.deps import InsufficientScope, Unauthenticated
from identity_service.web.errors import note_refusal, problem, problem_of
from identity_service.web.problems import Problem
from identity_service.web.strict import Unfit


def install_error_pages(app: FastAPI) -> None:
    """Answer every error of the JSON API as a problem (RFC 9457); the framework's own echo what was sent."""

    def respond(reply: Reply) -> Response:
        return Response(reply.body, reply.status, {key.decode(): value.decode() for key, value in reply.headers})

    @app.exception_handler(Unauthenticated)
    async def unauthenticated(request: Request, error: Unauthenticated) -> Response:
        request.scope["state"]["reason"] = error.reason
        challenge = f'Bearer error="{error.code}"' if error.code else "Bearer"
        return respond(
            problem(
                401, "A valid access token or API key is needed.", headers=[(b"www-authenticate", challenge.encode())]
            )
        )

    @app.exception_handler(InsufficientScope)
    async def insufficient(request: Request, error: InsufficientScope) -> Response:
        challenge = f'Bearer error="insufficient_scope", scope="{error.scope}"'
        return respond(
            problem(403, f"This needs the scope {error.scope}.", headers=[(b"www-authenticate", challenge.encode())])
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = [_fault(fault, _members(request)) for fault in error.errors()]
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
        note_refusal(request.scope, error)
        return respond(problem_of(error))


_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "has a member that is not known",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "list_type": "must be a list",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be one of {expected}",
    "enum": "must be one of {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    **dict.fromkeys(
        ("datetime_type", "datetime_parsing", "datetime_from_date_parsing", "timezone_aware"),
        "must be an instant with an offset, as 2030-01-31T12:00:00Z",
    ),
    "uuid_parsing": "must be a UUID",
    "uuid_type": "must be a UUID",
}
_RULES = ("expected", "ge", "le", "min_length", "max_length", "pattern")
"""Ours and not the validator's, whose messages can repeat what was sent; what they name is the route's own rule."""


def _members(request: Request) -> str:
    """Return the members that the body of this route may have."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = field.field_info.annotation if field is not None else None
    models = [one for one in (model, *get_args(model)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return ", ".join(sorted({name for one in models for name in one.model_fields}))


def _fault(fault: Mapping[str, Any], members: str) -> dict[str, str]:
    """Return what is wrong and where, without the value; the name of a member that we do not know is one."""
    where, kind = fault["loc"], fault["type"]
    place = where[1:-1] if kind == "extra_forbidden" else where[1:]
    pointer = "".join(f"/{part}".replace("~", "~0") if isinstance(part, str) else f"/{part}" for part in place)
    rule = {name: value for name, value in fault.get("ctx", {}).items() if name in _RULES}
    detail = _WORDS.get(kind, "is not valid").format_map(rule)
    if kind == "extra_forbidden" and not place:
        detail += f"; known: {members}"
    if isinstance(unfit := fault.get("ctx", {}).get("error"), Unfit):
        detail = str(unfit)
    return {"pointer": pointer, "detail": detail}
