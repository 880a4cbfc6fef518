"""When no mail can be taken any more, what needs mail says so, to everybody alike, and does nothing by half."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.operators import an_operator
from tests.support.people import mails, signed_in
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


async def test_a_link_that_arrived_gives_a_new_password_though_nobody_can_be_told(full: Service) -> None:
    """Whoever fills the queue must not keep others out of their account; they are told nothing for once."""
    user = await full.a_user("mika")
    token_id = await full.within(
        lambda tx: full.services.email_tokens.issue(
            tx, purpose="reset_password", user_id=user.id, epoch=0, email=user.email
        )
    )
    token = await full.within(lambda tx: full.services.email_tokens.text_of(tx, token_id))
    assert token is not None
    new = {"token": token.reveal(), "new_password": "a quite different phrase"}
    assert (await full.http.post("/v1/password-reset/confirm", json=new)).status_code == 204
    assert [row.target for row in await full.events("password.reset")] == [str(user.id)]
    assert await mails(full) == [("password_changed", "a@example.org")]


async def test_an_operator_ends_a_stolen_password_though_no_mail_can_wait(full: Service) -> None:
    """And is told that somebody has to be told otherwise."""
    boss, user = await an_operator(full), await full.a_user("mika")
    thief = await signed_in(full, user)
    answer = await boss("POST", f"/users/{user.id}/force-password-reset")
    assert (answer.status_code, answer.json()) == (200, {"mail_sent": False})
    assert (await thief("GET")).status_code == 401
    assert (await boss("GET", f"/users/{user.id}")).json()["has_password"] is False
    assert [row.target for row in await full.events("user.password_reset_forced")] == [str(user.id)]
    assert await full.events("password_reset.requested") == []


async def test_an_operators_change_that_must_be_told_is_not_made_untold(full: Service) -> None:
    """The address stays, and the trail says nothing of a change."""
    boss = await an_operator(full)
    user = await full.a_user()
    answer = await boss("PATCH", f"/users/{user.id}", {"email": "new@example.org"})
    assert answer.status_code == 503
    assert (await boss("GET", f"/users/{user.id}")).json()["email"] == user.email
    assert await full.events("user.changed") == []
