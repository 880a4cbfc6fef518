"""Taking somebody's account over through the ways that lead back into it."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import select

from identity_service.infra.tables import email_tokens, outbox, users
from tests.support.people import an_app, link, mails, signed_in
from tests.support.races import blocked, held
from tests.support.service import PASSWORD, Service, running, test_settings

NEW = "a quite different phrase"


async def ask(service: Service, name: str, what: str = "password-reset", **more: Any) -> int:
    """Ask for a mail; return the status."""
    return (await service.http.post(f"/v1/{what}", json={"email": name} | more)).status_code


async def reset(service: Service, token: str, **more: Any) -> int:
    """Use a link that gives a new password; return the status."""
    body = {"token": token, "new_password": NEW} | more
    return (await service.http.post("/v1/password-reset/confirm", json=body)).status_code


async def signs_in(service: Service, name: str, password: str) -> bool:
    """Tell whether somebody can sign in so."""
    answer = await service.token(await an_app(service), grant_type="password", username=name, password=password)
    return answer.status_code == 200


@pytest.fixture(params=["service", "embedded"])
def people(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL with Redis, then on SQLite with limits in memory."""
    found: Service = request.getfixturevalue(request.param)
    return found


@pytest.mark.case("ACC-24")
@pytest.mark.parametrize("member", ["email", "user_id", "id", "username", "sub", "user"])
async def test_whose_password_is_set_is_the_links_alone_to_say(people: Service, member: str) -> None:
    """Naming somebody else beside the token is refused; the token's own user is the only one who can be meant."""
    attacker, victim = await people.a_user("attacker"), await people.a_user("victim")
    await ask(people, "attacker")
    token = await link(people, attacker.email, "reset_password")
    for named in (victim.email, str(victim.id), victim.username):
        assert await reset(people, token, **{member: named}) == 422
    page = await people.http.post("/reset-password", data={"token": token, "new_password": NEW, member: victim.email})
    assert page.status_code == 200
    assert await signs_in(people, "attacker", NEW)
    assert await signs_in(people, "victim", PASSWORD)
    assert not await signs_in(people, "victim", NEW)


@pytest.mark.case("ACC-24")
async def test_a_mail_goes_to_one_address_and_that_is_the_stored_one(people: Service) -> None:
    """However somebody writes themselves into the request beside the victim."""
    await people.a_user("victim", email="Victim@example.org")
    tries: list[Any] = [
        ["victim@example.org", "attacker@evil.example"],
        {"address": "victim@example.org"},
        "victim@example.org, attacker@evil.example",
        "victim@example.org\r\nbcc: attacker@evil.example",
        "victim@example.org%0abcc:attacker@evil.example",
        '"victim@example.org"@evil.example',
        "<victim@example.org>",
        "victim@example.org attacker@evil.example",
    ]
    for typed in tries:
        assert await ask(people, typed) in (202, 422)
    assert await ask(people, "victim", cc="attacker@evil.example") == 422
    assert await mails(people) == []
    assert await ask(people, "VICTIM@EXAMPLE.ORG") == 202
    assert await mails(people) == [("reset_password", "Victim@example.org")]


@pytest.mark.case("ACC-31")
async def test_what_the_database_holds_opens_nothing(people: Service) -> None:
    """Neither a dump of the links nor of the mails that wait has a token in it."""
    user = await people.a_user("victim", verified=False)
    await ask(people, "victim")
    await ask(people, user.email, "email-verification")
    stolen = [row.digest for row in await people.execute(select(email_tokens))]
    ids = [row.id for row in await people.execute(select(email_tokens))]
    for prefix in ("pr_", "ev_", ""):
        for value in (*(digest.hex() for digest in stolen), *(str(token_id) for token_id in ids)):
            assert await reset(people, prefix + value) == 400
    dumped = str(await people.execute(select(outbox)))
    for template in ("reset_password", "verify_email"):
        assert (await link(people, user.email, template)) not in dumped


async def test_a_link_does_not_prove_an_address_that_came_later(people: Service) -> None:
    """Who asked to prove one address, and had another put in by an operator meanwhile, has proven the old one."""
    user = await people.a_user("mika", verified=False)
    await ask(people, user.email, "email-verification")
    token = await link(people, user.email, "verify_email")
    await people.patch_user(user, email="other@example.org", email_canonical="other@example.org")
    answer = await people.http.post("/v1/email-verification/confirm", json={"token": token})
    assert answer.status_code == 400
    assert [row.email_verified_at for row in await people.execute(select(users))] == [None]


async def test_an_account_made_in_somebodys_name_becomes_theirs(people: Service) -> None:
    """Who registered with another's address loses session and password when its owner chooses one."""
    squatter = await signed_in(people, await people.a_user("squatter", email="victim@example.org", verified=False))
    assert await ask(people, "victim@example.org") == 202
    assert await reset(people, await link(people, "victim@example.org", "reset_password")) == 204
    assert (await squatter("GET")).status_code == 401
    assert not await signs_in(people, "squatter", PASSWORD)
    assert await signs_in(people, "victim@example.org", NEW)


@pytest.mark.case("ACC-28")
@pytest.mark.parametrize("mode", ["open", "private"])
async def test_nobody_uses_up_the_mails_of_an_address_before_it_registers(sqlite_url: str, mode: str) -> None:
    """Neither by asking for a link that nobody is due, nor by registering with it under a name that is taken."""
    settings = test_settings(sqlite_url, registration=mode, trusted_proxies=("127.0.0.1",))
    async with running(settings) as service:
        await service.a_user("taken")
        victim = {"username": "victim", "email": "victim@example.net", "password": PASSWORD}
        for number in range(5):
            network = {"x-forwarded-for": f"192.0.2.{number}"}
            for path, body in (
                ("/v1/email-verification", {"email": "Victim@example.net"}),
                ("/v1/users", victim | {"username": "taken"}),
            ):
                assert (await service.http.post(path, json=body, headers=network)).status_code in (202, 409)
        before = await mails(service)
        assert before == ([] if mode == "open" else [("username_taken", "victim@example.net")] * 3)
        assert (await service.http.post("/v1/users", json=victim)).status_code in (201, 202)
        assert await mails(service) == [*before, ("verify_email", "victim@example.net")]
        assert await ask(service, "victim@example.net", "email-verification") == 202
        assert len(await service.events("email_verification.requested")) == 2


@pytest.mark.case("ACC-28")
@pytest.mark.case("ACC-29")
async def test_an_account_in_somebodys_name_does_not_write_to_them(people: Service) -> None:
    """An address that was never proven hears nothing of another that is asked for, nor of the change."""
    mallory = await signed_in(people, await people.a_user("mallory", email="victim@example.net", verified=False))
    statuses = []
    for number in range(7):
        body = {"email": f"mallory{number}@evil.example", "password": PASSWORD}
        statuses.append((await mallory("POST", "/email", body)).status_code)
    assert statuses == [202] * 5 + [429] * 2
    token = await link(people, "mallory4@evil.example", "change_email")
    assert (await people.http.post("/v1/email-verification/confirm", json={"token": token})).status_code == 204
    assert [recipient for _, recipient in await mails(people) if recipient == "victim@example.net"] == []


@pytest.mark.case("ACC-29")
async def test_a_thief_of_a_session_cannot_move_the_account_away(people: Service) -> None:
    """Without the password there is no other address, and a pending one dies with the owner's next password."""
    user = await people.a_user("mika")
    thief = await signed_in(people, user)
    for password in ("", "guess"):
        body = {"email": "thief@evil.example", "password": password}
        assert (await thief("POST", "/email", body)).status_code == 403
    assert await mails(people) == []
    await thief("POST", "/email", {"email": "thief@evil.example", "password": PASSWORD})
    token = await link(people, "thief@evil.example", "change_email")
    await ask(people, "mika")
    assert await reset(people, await link(people, user.email, "reset_password")) == 204
    answer = await people.http.post("/v1/email-verification/confirm", json={"token": token})
    assert answer.status_code == 400


async def test_a_reset_and_a_change_of_address_do_not_both_win(service: Service) -> None:
    """A link to the new address waits for a password that is being reset through the old one, and finds itself dead."""
    user = await service.a_user("mika")
    thief = await signed_in(service, user)
    await thief("POST", "/email", {"email": "thief@evil.example", "password": PASSWORD})
    token = await link(service, "thief@evil.example", "change_email")
    async with held(service) as owner:
        await service.services.users.set_password(owner.tx, user.id, "another hash")
        body = {"token": token}
        change = await blocked(service, service.http.post("/v1/email-verification/confirm", json=body))
        await service.services.email_tokens.revoke_all(owner.tx, user.id)
        await owner.commit()
        assert (await change).status_code == 400
    assert [row.email for row in await service.execute(select(users))] == [user.email]


@pytest.mark.case("OPS-27")
async def test_a_mail_server_that_is_away_delays_nobody(sqlite_url: str) -> None:
    """The request is answered before anybody speaks to it; the mail waits, and its link stays good."""
    settings = test_settings(sqlite_url, smtp_host="192.0.2.1", smtp_port=25, mail_from="no-reply@example.org")
    async with running(settings) as service:
        user = await service.a_user("mika")
        async with asyncio.timeout(15):  # who speaks to it waits for 20 seconds
            assert await ask(service, "mika") == 202
        assert await mails(service) == [("reset_password", user.email)]
        assert await reset(service, await link(service, user.email, "reset_password")) == 204


@pytest.mark.case("ACC-26")
async def test_a_link_that_a_hundred_scanners_opened_is_as_good_as_new(people: Service) -> None:
    """From many networks and one: opening it is no guess, and uses nothing."""
    user = await people.a_user("mika")
    await ask(people, "mika")
    token = await link(people, user.email, "reset_password")
    statuses = {(await people.http.get("/reset-password", params={"token": token})).status_code for _ in range(100)}
    assert statuses == {200}
    assert await reset(people, token) == 204


@pytest.mark.case("ACC-28")
async def test_nobody_uses_up_the_verification_mails_of_an_account_by_registering_again(database_url: str) -> None:
    """Three of them hear in private mode that there is an account; its owner can still ask for the link."""
    settings = test_settings(database_url, registration="private", trusted_proxies=("127.0.0.1",))
    async with running(settings) as service:
        await service.a_user("victim", email="victim@example.net", verified=False)
        for number in range(4):
            body = {"username": f"x{number}", "email": "victim@example.net", "password": "correct horse battery"}
            assert (await service.http.post("/v1/users", json=body)).status_code == 202
        assert (
            await service.http.post("/v1/email-verification", json={"email": "victim@example.net"})
        ).status_code == 202
        assert await mails(service) == [
            *[("account_exists", "victim@example.net")] * 3,
            ("verify_email", "victim@example.net"),
        ]
