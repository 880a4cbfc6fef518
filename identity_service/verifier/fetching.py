"""What fetching keys and exchanging API keys share: which URLs, in which loop, how much of an answer, and forking."""

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class AnswerTooLong(Exception):
    """An answer is longer than anything that could be meant; the message says whose."""


def check_url(url: str, *, allow_http: bool, loopback: bool = True) -> str:
    """
    Return an absolute URL that the issuer may be asked at, for its keys or for a token; raises ValueError.

    Whoever can change the key set on its way can sign tokens, and whoever can read an exchange has an API key and a
    client's secret. So both go over TLS, or, with `loopback`, to this machine.
    """
    parts = urlsplit(url)
    local = loopback and parts.hostname in _LOOPBACK
    secure = parts.scheme == "https" or (parts.scheme == "http" and (allow_http or local))
    if not secure or not parts.hostname or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"not a plain https URL: {url!r}")
    return url


def run_alone(work: Callable[Given, Coroutine[Any, Any, Answer]], *args: Given.args, **kwargs: Given.kwargs) -> Answer:
    """
    Return what a coroutine function comes to, in an event loop of its own; blocks, in a thread that has no loop.

    It does what `asyncio.run` does, but for waiting until a name that takes long has been resolved.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work(*args, **kwargs))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def bounded_body(answer: "httpx2.Response", most: int) -> bytes:
    """Return the body as it is on the wire; raises AnswerTooLong as soon as it is more than `most` bytes."""
    body = b""
    async for chunk in answer.aiter_raw():
        body += chunk
        if len(body) > most:
            raise AnswerTooLong(f"{answer.url} answered more than {most} bytes")
    return body


def when_forked(method: Callable[[], None]) -> None:
    """
    Call a bound method in every child process, as long as its object lives.

    A child has neither the parent's threads nor anybody who would release the locks that they hold. What is registered
    is never taken back, so it keeps nothing alive.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(_call, weakref.WeakMethod(method)))


def _call(reference: "weakref.WeakMethod[Callable[[], None]]") -> None:
    if (method := reference()) is not None:
        method()
