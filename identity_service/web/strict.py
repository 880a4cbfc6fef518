"""
One strict way to read JSON: bounded, UTF-8, every member once, and no text that a database cannot hold.

Frameworks keep the last of a repeated member in silence, take NaN for a number, turn "yes" into true, and answer 500 to
a lone surrogate; each of these is a way past a check.
"""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Never

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from identity_service.web.problems import BadRequest, Fault, Invalid, Problem

_BODY_DEADLINE = 10.0  # seconds, for who announces a body and sends it slowly, or never
_DEEPEST = 8
_LARGEST_NUMBER = 2**53  # beyond it JSON's readers disagree (RFC 8259 §6), and the database's integers end


class StrictModel(BaseModel):
    """A body: no members but its own, no conversion between types, and no echo of what was sent."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, frozen=True)


class Unfit(ValueError):
    """A value cannot be. The message is shown to the caller: a constant of ours, which never repeats the value."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise Unfit("must be printable")
    return text


Label = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), AfterValidator(_printable)
]
"""A short text for people: one line, no control characters."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Invalid(Fault("", "a member is repeated"))
    return found


def _no_constant(_text: str) -> Never:
    raise BadRequest("The body is not JSON.")


def _integer(text: str) -> int:
    # Counted before it is converted: converting a number of many digits takes time in their square.
    if len(text) > 20 or abs(number := int(text)) > _LARGEST_NUMBER:
        raise Invalid(Fault("", "a number is too large"))
    return number


def _float(text: str) -> float:
    number = float(text) if len(text) <= 40 else math.inf
    if not math.isfinite(number):
        raise Invalid(Fault("", "a number is too large"))
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_members, parse_constant=_no_constant, parse_int=_integer, parse_float=_float
)


def _check(value: Any, depth: int = 0) -> None:
    """Raise Invalid for texts that cannot be stored, and for what is nested more deeply than anything of ours."""
    if depth > _DEEPEST:
        raise Invalid(Fault("", "nested too deeply"))
    if isinstance(value, str):
        if "\0" in value or not _encodable(value):
            raise Invalid(Fault("", "a text holds a character that cannot be stored"))
    elif isinstance(value, dict):
        for name, member in value.items():
            _check(name, depth)
            _check(member, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_json(body: bytes) -> Any:
    """Return what a body says; raises BadRequest for what is not JSON, Invalid for JSON that cannot be meant."""
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise BadRequest("The body is not JSON.") from None
    _check(value)
    return value


class _StrictRequest(Request):
    """A request whose body is read once, in time, and strictly."""

    async def body(self) -> bytes:
        """Return the whole body; raises Problem for one that takes too long."""
        try:
            async with asyncio.timeout(_BODY_DEADLINE):
                return await super().body()
        except TimeoutError:
            raise Problem(408, "The body took too long.", headers={"connection": "close"}) from None

    async def json(self) -> Any:
        """Return what the body says."""
        return parse_json(await self.body())


def check_parameters(request: Request) -> None:
    """
    Raise Invalid for a parameter in the URL that the route does not know.

    A filter that is misspelt would select everything, and an option that is would not be heeded.
    """
    known = sorted(parameter.alias for parameter in request.scope["route"].dependant.query_params)
    if not set(request.query_params) <= set(known):
        raise Invalid(Fault("", f"the URL has a parameter that is not known; known: {', '.join(known) or 'none'}"))


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


class StrictRoute(APIRoute):
    """A route that reads its body strictly, and whose answers nobody may keep."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the framework's handler."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if any(coding != "identity" for coding in request.headers.getlist("content-encoding")):
                raise Problem(415, "The body must not be compressed.")
            expected = self.body_field is not None and _has_body(request)
            if expected and not all(map(_is_json, request.headers.getlist("content-type") or [""])):
                raise Problem(415, "The body must be sent as application/json.")
            answer = await handler(_StrictRequest(request.scope, request.receive))
            answer.headers["cache-control"] = "no-store"  # it is about somebody, or holds a secret
            return answer

        return strict


def api_routes(prefix: str, *, tag: str) -> APIRouter:
    """Return a router for routes of the JSON API."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=StrictRoute)
