"""What the JSON API answers when something is wrong: a problem (RFC 9457), never the framework's own echo."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from identity_service.infra.database import DatabaseUnavailable
from identity_service.web.asgi import Reply
from identity_service.web.deps import InsufficientScope, Unauthenticated
from identity_service.web.errors import problem, problem_of


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
        return respond(problem(422, "The request is not valid."))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = [(key.lower().encode(), value.encode()) for key, value in (error.headers or {}).items()]
        return respond(problem(error.status_code, error.detail, headers=headers))

    @app.exception_handler(DatabaseUnavailable)
    async def unavailable(request: Request, error: DatabaseUnavailable) -> Response:
        request.scope["state"]["reason"] = "database_unavailable"
        return respond(problem_of(error))
