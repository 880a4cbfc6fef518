"""Proving an address, and getting back into an account whose password is lost."""

import re
from collections.abc import AsyncIterator
from email import message_from_bytes, policy
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select

from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.outbox import Outbox
from identity_service.infra.ratelimit.catalogue import SIGN_IN_ACCOUNT
from identity_service.infra.tables import email_tokens, users
from tests.support.people import an_app, link, mails, signed_in, with_key
from tests.support.races import blocked, held
from tests.support.service import ISSUER, PASSWORD, Service, running, test_settings

NEW = "a quite different phrase"


@pytest.fixture
async def people(any_url: str) -> AsyncIterator[Service]:
    """The service with the person's API; every request may come from a network of its own."""
    async with running(test_settings(any_url, trusted_proxies=("127.0.0.1",))) as service:
        yield service


async def ask(service: Service, what: str, name: str, network: str = "192.0.2.1") -> httpx2.Response:
    """Ask for the mail of `email-verification` or `password-reset`."""
    return await service.http.post(f"/v1/{what}", json={"email": name}, headers={"x-forwarded-for": network})


async def confirm(service: Service, token: str, network: str = "192.0.2.1") -> httpx2.Response:
    """Use a link that proves an address."""
    body, headers = {"token": token}, {"x-forwarded-for": network}
    return await service.http.post("/v1/email-verification/confirm", json=body, headers=headers)


async def reset(service: Service, token: str, password: str = NEW, network: str = "192.0.2.1") -> httpx2.Response:
    """Use a link that gives a new password."""
    body, headers = {"token": token, "new_password": password}, {"x-forwarded-for": network}
    return await service.http.post("/v1/password-reset/confirm", json=body, headers=headers)


async def verified(service: Service, name: str) -> bool:
    """Tell whether somebody's address is proven."""
    found = await service.within(lambda tx: service.services.users.by_name(tx, name))
    assert found is not None
    return found.email_verified_at is not None


async def signs_in(service: Service, name: str, password: str) -> bool:
    """Tell whether somebody can sign in so."""
    answer = await service.token(await an_app(service), grant_type="password", username=name, password=password)
    return answer.status_code == 200


def is_dead(answer: httpx2.Response) -> bool:
    """Tell whether a link was refused, in the only words there are for it."""
    return (answer.status_code, answer.json().get("title")) == (400, "This link is no longer good.")


# -- proving an address -----------------------------------------------------------------------------------------------


async def test_a_link_proves_the_address_it_was_sent_to(people: Service) -> None:
    """Once."""
    await people.a_user("mika", verified=False)
    assert (await ask(people, "email-verification", "MIKA@example.org")).status_code == 202
    assert await mails(people) == [("verify_email", "mika@example.org")]
    token = await link(people, "mika@example.org", "verify_email")
    assert not await verified(people, "mika")
    assert (await confirm(people, token)).status_code == 204
    assert await verified(people, "mika")
    assert is_dead(await confirm(people, token))
    assert [row.event for row in await people.events("email.verified")] == ["email.verified"]


@pytest.mark.parametrize(
    "name", ["proven@example.org", "off@example.org", "gone@example.org", "mika", "no@body.example", "?"]
)
async def test_a_link_is_sent_only_where_there_is_something_to_prove(people: Service, name: str) -> None:
    """Not to who has proven it, is disabled or deleted, nor for a username; the answer is the same."""
    await people.a_user("mika", verified=False)
    await people.a_user("proven")
    await people.disable(await people.a_user("off", verified=False))
    gone = await people.a_user("gone", verified=False)
    await people.within(lambda tx: people.services.users.delete(tx, gone.id))
    assert (await ask(people, "email-verification", name)).status_code == 202
    assert await mails(people) == []


async def test_the_older_link_dies_with_a_newer_one(people: Service) -> None:
    """And each at its time."""
    await people.a_user("mika", verified=False)
    await ask(people, "email-verification", "mika@example.org")
    first = await link(people, "mika@example.org", "verify_email")
    await ask(people, "email-verification", "mika@example.org")
    second = await link(people, "mika@example.org", "verify_email")
    assert is_dead(await confirm(people, first))
    people.clock.advance(86400)
    assert is_dead(await confirm(people, second))
    assert not await verified(people, "mika")


# -- a new password ---------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-25")
async def test_a_new_password_ends_everything_that_was_open(people: Service) -> None:
    """Sessions, links, keys; the address counts as proven; a mail tells of it; nobody is signed in by it."""
    user, app = await people.a_user("mika", verified=False), await an_app(people)
    mika, script = await signed_in(people, user, app), await with_key(people, user)
    await ask(people, "email-verification", user.email)
    other_link = await link(people, user.email, "verify_email")
    await mika("POST", "/email", {"email": "other@example.org", "password": PASSWORD})
    change_link = await link(people, "other@example.org", "change_email")
    assert (await ask(people, "password-reset", user.email)).status_code == 202
    token = await link(people, user.email, "reset_password")
    families = await people.family_rows()

    answer = await reset(people, token)
    assert (answer.status_code, answer.content) == (204, b"")
    assert "set-cookie" not in answer.headers
    assert await people.family_rows() == families
    assert (await mika("GET")).status_code == 401
    assert (await people.refresh(app, mika.refresh_token)).status_code == 400
    assert is_dead(await confirm(people, other_link))
    assert is_dead(await confirm(people, change_link))
    assert is_dead(await reset(people, token, "yet another phrase"))
    assert await verified(people, "mika")
    assert await signs_in(people, "mika", NEW)
    assert not await signs_in(people, "mika", PASSWORD)
    assert await people.execute(select(email_tokens)) == []
    assert ("password_changed", user.email) in await mails(people)
    assert [template for template, _ in await mails(people)].count("reset_password") == 0
    assert (await script("GET")).status_code == 401
    [event] = await people.events("password.reset")
    assert (event.actor, event.target) == (str(user.id), str(user.id))


@pytest.mark.parametrize("name", ["mika", "MIKA", "mika@example.org", "Mika@Example.ORG"])
async def test_a_lost_password_is_asked_for_by_any_name(people: Service, name: str) -> None:
    """A username or an address; the mail goes to the address as it is stored."""
    await people.a_user("mika", email="Mika@example.org")
    assert (await ask(people, "password-reset", name)).status_code == 202
    assert await mails(people) == [("reset_password", "Mika@example.org")]
    assert await signs_in(people, "mika", PASSWORD)


@pytest.mark.case("ACC-19")
@pytest.mark.parametrize(
    "name",
    [
        "m\u0131ke@example.org",
        "mike@ex\u0430mple.org",
        "mike@example.org\u200b",
        "\uff4dike@example.org",
        "mike@example.org,x@evil.example",
    ],
)
async def test_what_only_looks_like_an_address_is_sent_nothing(people: Service, name: str) -> None:
    """Neither what was typed nor what is stored."""
    await people.a_user("mike")
    answer = await ask(people, "password-reset", name)
    assert answer.status_code == 202
    assert await mails(people) == []


@pytest.mark.parametrize("name", ["off", "gone@example.org", "nobody"])
async def test_nobody_gets_back_into_what_is_closed(people: Service, name: str) -> None:
    """Disabled, deleted, never there: the same answer, and no mail."""
    await people.disable(await people.a_user("off"))
    gone = await people.a_user("gone")
    await people.within(lambda tx: people.services.users.delete(tx, gone.id))
    assert (await ask(people, "password-reset", name)).status_code == 202
    assert await mails(people) == []


@pytest.mark.case("ACC-25")
async def test_a_link_dies_with_what_it_was_made_for(people: Service) -> None:
    """When the account is disabled, and when its sessions were ended; enabling it does not bring the link back."""
    user = await people.a_user("mika")
    await ask(people, "password-reset", "mika")
    token = await link(people, user.email, "reset_password")
    await people.disable(user)
    assert is_dead(await reset(people, token))
    await people.enable(user)
    assert is_dead(await reset(people, token))
    people.clock.advance(3600)
    await ask(people, "password-reset", "mika")
    token = await link(people, user.email, "reset_password")
    people.clock.advance(1800)
    assert is_dead(await reset(people, token))
    assert await signs_in(people, "mika", PASSWORD)


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize("password", ["short", "password1", "mika@example.org", "MIKA2", "identity2026"])
async def test_a_password_that_is_refused_does_not_cost_the_link(people: Service, password: str) -> None:
    """422 with the reason; the link is as good as before."""
    await people.a_user("mika2", email="mika@example.org")
    await ask(people, "password-reset", "mika2")
    token = await link(people, "mika@example.org", "reset_password")
    answer = await reset(people, token, password)
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/new_password"]
    assert password not in answer.text.replace("mika@", "")
    assert (await reset(people, token)).status_code == 204


@pytest.mark.case("ACC-31")
async def test_a_step_that_was_left_out_gets_nowhere(people: Service) -> None:
    """No token, an empty one, one of another kind, half of one, another's letter."""
    await people.a_user("mika", verified=False)
    await ask(people, "email-verification", "mika@example.org")
    await ask(people, "password-reset", "mika")
    proof = await link(people, "mika@example.org", "verify_email")
    token = await link(people, "mika@example.org", "reset_password")
    for wrong in (
        "",
        proof,
        token[:-1],
        token + "0",
        token.replace("pr_", "ev_"),
        token.swapcase(),
        f" {token}",
        "pr_" + "0" * 50,
        "\u00e9",
    ):
        assert is_dead(await reset(people, wrong)), wrong
    for wrong in ("", token, proof.replace("ev_", "ec_")):
        assert is_dead(await confirm(people, wrong)), wrong
    for body in ({}, {"token": token}, {"new_password": NEW}, {"token": None, "new_password": NEW}):
        assert (await people.http.post("/v1/password-reset/confirm", json=body)).status_code == 422
    assert await signs_in(people, "mika", PASSWORD)
    assert not await verified(people, "mika")
    assert (await reset(people, token)).status_code == 204


async def test_a_new_password_forgives_the_failures_of_others(people: Service) -> None:
    """Who was locked out by a stranger's guessing gets in with the new password, by either name."""
    user, app = await people.a_user("mika"), await an_app(people)
    for name in ("mika", "mika@example.org"):
        for number in range(SIGN_IN_ACCOUNT.burst + 5):
            headers = {"x-forwarded-for": f"198.51.100.{number}"}
            await people.token(app, grant_type="password", username=name, password="wrong", headers=headers)
    assert not await signs_in(people, "mika", PASSWORD)
    await ask(people, "password-reset", "mika")
    assert (await reset(people, await link(people, user.email, "reset_password"))).status_code == 204
    assert await signs_in(people, "mika", NEW)
    assert await signs_in(people, "mika@example.org", NEW)


async def test_a_link_is_used_once_even_at_once(database_url: str) -> None:
    """Who comes second waits, and finds the link dead; the first password stays."""
    async with running(test_settings(database_url)) as service:
        user = await service.a_user("mika")
        await ask(service, "password-reset", "mika")
        token = await link(service, user.email, "reset_password")
        async with held(service) as first:
            await first.tx.execute(select(users.c.id).where(users.c.id == user.id).with_for_update())
            one = await blocked(service, reset(service, token, "the first new phrase"))
            two = await blocked(service, reset(service, token, "the second new phrase"), behind=1)
            await first.roll_back()
            statuses = sorted([(await one).status_code, (await two).status_code])
        assert statuses == [204, 400]
        assert [row.event for row in await service.events("password.reset")] == ["password.reset"]


async def test_a_change_that_fails_leaves_the_link_alive(people: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link and the password are one act."""
    user = await people.a_user("mika")
    await ask(people, "password-reset", "mika")
    token = await link(people, user.email, "reset_password")

    async def broken(_outbox: Outbox, _tx: Transaction, **_given: object) -> None:
        raise DatabaseUnavailable("a test")

    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "enqueue", broken)
        assert (await reset(people, token)).status_code == 503
    assert await signs_in(people, "mika", PASSWORD)
    assert (await reset(people, token)).status_code == 204


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-28")
async def test_one_account_is_sent_three_mails_an_hour(people: Service) -> None:
    """By whichever of its names it is asked for, and from wherever; the password stays good."""
    await people.a_user("mika")
    names = ["mika", "mika@example.org", "MIKA", "Mika@Example.org"]
    answers = [await ask(people, "password-reset", names[number % 4], f"192.0.2.{number}") for number in range(1, 200)]
    assert {(answer.status_code, answer.content) for answer in answers} == {(202, answers[0].content)}
    assert len(await people.events("password_reset.requested")) == 3
    assert await signs_in(people, "mika", PASSWORD)
    people.clock.advance(1200)
    await ask(people, "password-reset", "mika", "198.51.100.1")
    await ask(people, "password-reset", "mika", "198.51.100.2")
    assert len(await people.events("password_reset.requested")) == 4


async def test_one_network_asks_for_so_many_mails(people: Service) -> None:
    """Thirty, then one a minute, for names that exist and others; other networks do not notice."""
    await people.a_user("mika")
    for name in ("mika", "nobody"):
        network = "192.0.2.7" if name == "mika" else "192.0.2.8"
        statuses = [(await ask(people, "password-reset", name, network)).status_code for _ in range(32)]
        assert statuses == [202] * 30 + [429] * 2
        assert (await ask(people, "email-verification", name, network)).status_code == 429
    assert (await ask(people, "password-reset", "nobody", "192.0.2.9")).status_code == 202


async def test_who_tries_links_has_to_wait(people: Service) -> None:
    """Thirty that are none, then one in ten seconds; who has a good one, and other networks, do not notice."""
    user = await people.a_user("mika", verified=False)
    await ask(people, "email-verification", user.email, "192.0.2.200")
    proof = await link(people, user.email, "verify_email")
    await ask(people, "password-reset", "mika", "192.0.2.200")
    token = await link(people, user.email, "reset_password")
    guess = token[:-1] + ("x" if token[-1] != "x" else "y")
    statuses = []
    for number in range(32):
        tried = reset(people, guess) if number % 2 else confirm(people, guess)
        statuses.append((await tried).status_code)
    assert statuses == [400] * 30 + [429] * 2
    assert (await reset(people, guess, network="192.0.2.2")).status_code == 400
    assert (await confirm(people, proof)).status_code == 204
    assert (await reset(people, token)).status_code == 204


async def test_without_room_for_mails_all_hear_the_same(any_url: str) -> None:
    """503 for a name that exists and for one that does not."""
    async with running(test_settings(any_url, mail_queue=1)) as service:
        await service.a_user("mika", verified=False)
        await ask(service, "password-reset", "mika")
        for what in ("password-reset", "email-verification"):
            seen = set()
            for name in ("mika@example.org", "nobody@example.org"):
                answer = await ask(service, what, name)
                seen.add((answer.status_code, answer.content, answer.headers.get("retry-after")))
            assert len(seen) == 1
            status, _, retry_after = seen.pop()
            assert status == 503
            assert int(retry_after) >= 1


# -- what is mailed ---------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-22")
@pytest.mark.case("SEC-14")
async def test_links_begin_with_the_issuer_whatever_the_request_said(sqlite_url: str, tmp_path: Path) -> None:
    """Neither Host nor what a proxy adds is in the mail, which holds one link and no other secret."""
    async with running(test_settings(sqlite_url, data_dir=tmp_path, allowed_hosts=("evil.example",))) as service:
        await service.a_user("mika", verified=False)
        misleading = {
            "host": "evil.example",
            "x-forwarded-host": "evil.example",
            "x-forwarded-proto": "https",
            "forwarded": "host=evil.example;proto=https",
            "x-original-url": "https://evil.example/",
            "origin": "https://evil.example",
            "referer": "https://evil.example/",
        }
        for what, page in (("password-reset", "reset-password"), ("email-verification", "verify-email")):
            answer = await service.http.post(f"/v1/{what}", json={"email": "mika@example.org"}, headers=misleading)
            assert answer.status_code == 202
            template = page.replace("-", "_") if page == "verify-email" else "reset_password"
            token = await link(service, "mika@example.org", template)
            await service.run_job("outbox")
            [file] = (tmp_path / "mailbox").glob("*.eml")
            letter = message_from_bytes(file.read_bytes(), policy=policy.default)
            bodies = [part.get_content() for part in letter.walk() if part.get_content_maintype() == "text"]
            for body in bodies:
                assert set(re.findall(r"https?://[^\s\"<]+", body)) == {f"{ISSUER}/{page}?token={token}"}
            assert "evil.example" not in file.read_text()
            file.unlink()
