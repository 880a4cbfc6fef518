"""When no mail can be taken any more, what needs mail says so, to everybody alike, and does nothing by half."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.operators import an_operator
from tests.support.service import PASSWORD, Service, running, test_settings


@pytest.fixture(params=["open", "private"])
async def full(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Service]:
    """A service with one mail waiting where there is room for one."""
    async with running(test_settings(database_url, registration=request.param, mail_queue=1)) as service:

        async def order(tx: Any) -> None:
            await service.services.outbox.enqueue(
                tx, template="password_changed", recipient="a@example.org", context={}
            )

        await service.within(order)
        yield service


async def test_what_needs_mail_answers_503_whoever_it_is_about(full: Service) -> None:
    """With a time to come back at; nobody is registered, and known and unknown addresses look alike."""
    known = await full.a_user()
    new = {"username": "ada", "email": "ada@example.org", "password": PASSWORD}
    answers = [await full.http.post("/v1/users", json=new)]
    for path in ("/v1/password-reset", "/v1/email-verification"):
        answers += [await full.http.post(path, json={"email": email}) for email in (known.email, "x@example.org")]
    for answer in answers:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.content == answers[0].content
    assert await full.events("user.registered") == []


async def test_an_operators_change_that_must_be_told_is_not_made_untold(full: Service) -> None:
    """The address stays, and the trail says nothing of a change."""
    boss = await an_operator(full)
    user = await full.a_user()
    answer = await boss("PATCH", f"/users/{user.id}", {"email": "new@example.org"})
    assert answer.status_code == 503
    assert (await boss("GET", f"/users/{user.id}")).json()["email"] == user.email
    assert await full.events("user.changed") == []
