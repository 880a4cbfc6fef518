"""
The OpenAPI document: what the framework cannot know by itself.

Every refusal a route can answer with, what each route demands, and the protocol's endpoints, which stand before the
framework.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from identity_service.accounts.access import PERMISSIONS, SELF_SERVICE

_ALWAYS = (400, 401, 403, 404, 408, 413, 414, 415, 422, 429, 431, 500, 503)
_WORDS = {
    400: "The request cannot be read, or carries more than one credential.",
    401: "A valid access token or API key is needed.",
    403: "The caller may not do this.",
    404: "There is no such thing.",
    408: "The body took too long.",
    409: "It contradicts what is.",
    412: "It was changed meanwhile (If-Match).",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is compressed, or is not sent as JSON.",
    422: "The request is not valid; `errors` says where.",
    429: "A limit was reached; `Retry-After` says for how long.",
    431: "The headers are too large.",
    500: "The service failed.",
    503: "The service cannot answer now; `Retry-After` says when to try again.",
}
_PROBLEM = "#/components/schemas/Problem"
_OAUTH_ERROR = "#/components/schemas/OAuthError"


class FaultShown(BaseModel):
    """One thing that is wrong with a body: where (a JSON pointer) and what."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """A refusal of the JSON API (RFC 9457)."""

    type: str
    title: str
    status: int
    errors: list[FaultShown] | None = None


def problems(*more: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: what any route can answer, and `more`."""
    return {
        code: {
            "description": _WORDS[code],
            "content": {"application/problem+json": {"schema": {"$ref": _PROBLEM}}},
        }
        for code in sorted({*_ALWAYS, *more})
    }


def routes_of(routes: Sequence[Any]) -> Iterator[APIRoute]:
    """Yield every route of the JSON API; the framework keeps an included router whole, so they form a tree."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        included = getattr(route, "original_router", route)
        yield from routes_of(list(getattr(included, "routes", ())))


def rule_of(route: APIRoute) -> Any:
    """Return what a route demands of its caller (an AccessRule); raises LookupError for one that demands nothing."""
    for dependency in route.dependant.dependencies:
        if (rule := getattr(dependency.call, "rule", None)) is not None:
            return rule
    raise LookupError(f"{route.path} has no access rule")


def document(app: FastAPI, *, grant_types: Sequence[str]) -> dict[str, Any]:
    """Return the OpenAPI document of the whole service."""
    described: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = described.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **_schemas()}
    components["securitySchemes"] = {
        "oauth2": {
            "type": "oauth2",
            "flows": {
                "password": {"tokenUrl": "/token", "scopes": dict.fromkeys(sorted(SELF_SERVICE | PERMISSIONS), "")}
            },
        },
        "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
        "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "client": {"type": "http", "scheme": "basic"},
    }
    for route in routes_of(app.routes):
        if not route.include_in_schema:
            continue
        rule = rule_of(route)
        security: list[dict[str, list[str]]] = []
        if rule.scope:
            security = [{"oauth2": [rule.scope]}, {"bearer": []}]
            security += [] if rule.first_hand else [{"api_key": []}]
        for method in route.methods or ():
            described["paths"][route.path_format][method.lower()]["security"] = security
    described["paths"] |= _protocol_paths(grant_types)
    return described


def _schemas() -> dict[str, Any]:
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {
        **problem.pop("$defs"),
        "Problem": problem,
        "OAuthError": {
            "type": "object",
            "description": "A refusal of the protocol's endpoints (RFC 6749 §5.2).",
            "required": ["error"],
            "properties": {"error": {"type": "string"}, "error_description": {"type": "string"}},
        },
    }


def _form(required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    properties = {name: {"type": "string"} for name in (*required, *optional)}
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": schema}}}


def _oauth(summary: str, body: Mapping[str, Any], answer: Mapping[str, Any], *refusals: int) -> dict[str, Any]:
    refused = {
        "application/json": {"schema": {"$ref": _OAUTH_ERROR}},
        "application/problem+json": {"schema": {"$ref": _PROBLEM}},
    }
    responses = {str(code): {"description": "Refused (RFC 6749 §5.2).", "content": refused} for code in refusals}
    return {
        "post": {
            "tags": ["protocol"],
            "summary": summary,
            "security": [{"client": []}, {}],
            "requestBody": body,
            "responses": {"200": answer, **responses},
        }
    }


def _json(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}


def _public(summary: str) -> dict[str, Any]:
    refused = {"application/problem+json": {"schema": {"$ref": _PROBLEM}}}
    refusals = {str(code): {"description": _WORDS[code], "content": refused} for code in (400, 404, 414, 431)}
    return {
        "get": {
            "tags": ["protocol"],
            "summary": summary,
            "security": [],
            "responses": {"200": _json(summary), "304": {"description": "Not changed."}, **refusals},
        }
    }


def _protocol_paths(grant_types: Sequence[str]) -> dict[str, Any]:
    client = ("client_id", "client_secret")
    token_body = _form(
        ["grant_type"],
        [
            *("username", "password", "refresh_token", "scope", "resource", "audience", *client),
            *("subject_token", "subject_token_type", "actor_token", "actor_token_type", "requested_token_type"),
        ],
    )
    token_schema = token_body["content"]["application/x-www-form-urlencoded"]["schema"]
    token_schema["properties"]["grant_type"]["enum"] = list(grant_types)
    presented = _form(["token"], ["token_type_hint", *client])
    refusals = (400, 401, 404, 408, 413, 414, 429, 431, 500, 503)
    return {
        "/token": _oauth("Exchange a grant for tokens (RFC 6749)", token_body, _json("Tokens"), *refusals),
        "/revoke": _oauth("Revoke a token (RFC 7009)", presented, {"description": "Revoked."}, *refusals),
        "/introspect": _oauth("Ask about a token (RFC 7662)", presented, _json("What it says"), 403, *refusals),
        "/.well-known/jwks.json": _public("The keys that tokens are checked with (RFC 7517)"),
        "/.well-known/oauth-authorization-server": _public("What this server can do (RFC 8414)"),
        "/.well-known/openid-configuration": _public("What this server can do (OIDC Discovery)"),
    }
