"""What the edge counts when a request does not come to a good end."""

import asyncio
from typing import Any

import pytest

from tests.support.asking import ask
from tests.support.metrics import counted, label_sets
from tests.unit.test_edge import Stub, edge_of

REQUESTS = "identity_http_requests_total"


class Endless(Stub):
    """Answers nobody."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(20)


async def test_what_is_cut_off_in_the_middle_is_counted_as_failed() -> None:
    """Whatever it began with: who asked has nothing in their hands."""
    endpoint = Stub()
    endpoint.begun, endpoint.fault = True, RuntimeError("planted")
    with (
        counted(1, REQUESTS, method="POST", route="/token", status="500"),
        counted(0, REQUESTS, method="POST", route="/token", status="200"),
        pytest.raises(RuntimeError),
    ):
        await ask(edge_of(endpoint, Stub()), b"/token", method="POST")


async def test_a_fault_before_the_answer_is_counted_under_its_route() -> None:
    """An endpoint's by its path; the framework's is nobody's, since it may have been on the way to any."""
    endpoint, framework = Stub(), Stub()
    endpoint.fault = framework.fault = RuntimeError("planted")
    edge = edge_of(endpoint, framework)
    with counted(1, REQUESTS, method="POST", route="/token", status="500"):
        await ask(edge, b"/token", method="POST")
    with counted(1, REQUESTS, method="GET", route="unmatched", status="500"):
        await ask(edge, b"/v1/anything")


async def test_who_leaves_before_the_answer_is_counted_and_not_timed() -> None:
    """The client hung up, or the server ended the request."""

    class Gone(Stub):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            return

    timed = label_sets("identity_http_request_seconds_count")
    with counted(2, REQUESTS, method="PUT", route="unmatched", status="none"):
        with pytest.raises(ValueError, match="not enough values"):  # nothing was sent for the helper to read
            await ask(edge_of(Stub(), Gone()), b"/nobody", method="PUT")
        waiting = asyncio.create_task(ask(edge_of(Stub(), Endless()), b"/nobody", method="PUT"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert label_sets("identity_http_request_seconds_count") == timed


async def test_who_leaves_an_endpoint_is_counted_under_its_route() -> None:
    """Not as one that nobody knows: it was this endpoint that kept them waiting."""

    with counted(1, REQUESTS, method="POST", route="/token", status="none"):
        waiting = asyncio.create_task(ask(edge_of(Endless(), Stub()), b"/token", method="POST"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
