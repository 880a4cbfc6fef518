"""
One strict way to read a form: bounded, UTF-8, and every parameter at most once.

Frameworks take the last of a repeated field in silence, replace bytes that are not UTF-8, and hand out uploaded files
where text is expected; at a token endpoint each of these is an attack.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from identity_service.oauth.errors import InvalidRequest, RequestTooLarge
from identity_service.web.asgi import Headers, Receive

LARGEST_BODY = 64 * 1024
MOST_FIELDS = 100
_BODY_DEADLINE = 10.0  # seconds, for a client that announces a body and sends it slowly, or never
_MAY_REPEAT = frozenset(("resource", "audience"))  # RFC 8707 §2, RFC 8693 §2.1
_FORM_TYPE = "application/x-www-form-urlencoded"


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


@dataclass(frozen=True, slots=True)
class Form:
    """The parameters of a request. An empty value counts as absent (RFC 6749 §3.1)."""

    values: Mapping[str, str] = field(repr=False)
    repeated: Mapping[str, tuple[str, ...]] = field(repr=False)


def check_media_type(headers: Headers) -> None:
    """Refuse a body that is no plain UTF-8 form; raises InvalidRequest."""
    types = headers.all("content-type")
    media, _, parameters = types[0].partition(";") if types else ("", "", "")
    if len(types) != 1 or media.strip().lower() != _FORM_TYPE:
        raise InvalidRequest("The body must be application/x-www-form-urlencoded.", reason="media_type")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if charset not in ("", "utf-8"):
        raise InvalidRequest("The body must be UTF-8.", reason="charset")
    if any(coding != "identity" for coding in headers.all("content-encoding")):
        raise InvalidRequest("The body must not be compressed.", reason="content_encoding")


async def read_body(headers: Headers, receive: Receive) -> bytes:
    """Return the whole body; raises RequestTooLarge, ClientGone, and InvalidRequest for one that takes too long."""
    declared = headers.one("content-length") or "0"
    if not declared.isascii() or not declared.isdigit():
        raise InvalidRequest("The Content-Length is malformed.", reason="content_length")
    if len(declared) > 10 or int(declared) > LARGEST_BODY:
        raise RequestTooLarge("The body is too large.", reason="body_too_large")
    try:
        async with asyncio.timeout(_BODY_DEADLINE):
            return await _pieces(receive)
    except TimeoutError:
        raise InvalidRequest("The body took too long.", reason="body_too_slow") from None


async def _pieces(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise RequestTooLarge("The body is too large.", reason="body_too_large")
        if not message.get("more_body", False):
            return bytes(body)


def _decode(raw: bytes) -> str:
    if b"%" not in raw and b"+" not in raw:
        return raw.decode("utf-8")
    return unquote_to_bytes(raw.replace(b"+", b" ")).decode("utf-8")


def parse_form(body: bytes) -> Form:
    """
    Return the parameters of a urlencoded body; raises InvalidRequest for too many, repeated or malformed ones.

    NUL is refused everywhere: no parameter has a use for it, and the database cannot store it.
    """
    if body.count(b"&") >= MOST_FIELDS:
        raise InvalidRequest("There are too many parameters.", reason="too_many_parameters")
    values: dict[str, str] = {}
    repeated: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    try:
        for pair in body.split(b"&"):
            if not pair:
                continue
            raw_name, _, raw_value = pair.partition(b"=")
            name, value = _decode(raw_name), _decode(raw_value)
            if "\0" in value or "\0" in name:
                raise InvalidRequest("A parameter has a NUL character.", reason="nul")
            if name in _MAY_REPEAT:
                if value:
                    repeated[name] = (*repeated.get(name, ()), value)
                continue
            if name in seen:
                raise InvalidRequest("A parameter is repeated.", reason="parameter_repeated")
            seen.add(name)
            if value:
                values[name] = value
    except UnicodeDecodeError:
        raise InvalidRequest("The body must be UTF-8.", reason="not_utf8") from None
    return Form(values, repeated)


_NEVER_IN_QUERY = frozenset(
    (
        *("grant_type", "client_id", "client_secret", "username", "password", "refresh_token", "scope", "resource"),
        *("audience", "token", "token_type_hint", "code", "code_verifier", "redirect_uri", "device_code"),
        *("client_assertion", "client_assertion_type", "subject_token", "actor_token"),
    )
)


def refuse_query(query: bytes) -> None:
    """Raise InvalidRequest when the URL carries what belongs into the body (RFC 6749 §2.3.1): URLs end up in logs."""
    if not query:
        return
    for pair in query[:LARGEST_BODY].split(b"&"):
        name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" ")).decode("utf-8", "replace")
        if name in _NEVER_IN_QUERY:
            raise InvalidRequest("Parameters belong into the body, not into the URL.", reason="parameter_in_url")
