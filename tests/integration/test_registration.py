"""Registering by oneself: openly, privately, or not at all."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select

from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import HashingBusy, PasswordHasher
from identity_service.infra.tables import outbox, users
from tests.support.people import an_app, link, mails, signed_in
from tests.support.races import blocked, held
from tests.support.service import PASSWORD, Service, running, test_settings

MIKA: dict[str, Any] = {"username": "mika", "email": "Mika@example.org", "password": PASSWORD, "name": "Mika"}


@pytest.fixture(params=["database_url", "sqlite_url"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL database, then of a SQLite one."""
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def open_service(url: str) -> AsyncIterator[Service]:
    """The service where people register openly."""
    async with running(test_settings(url, registration="open")) as service:
        yield service


@pytest.fixture
async def private_service(url: str) -> AsyncIterator[Service]:
    """The service where nobody learns by registering who has an account."""
    async with running(private(url)) as service:
        yield service


def private(url: str, **changes: Any) -> Any:
    """Return the settings of private registration; every request may come from a network of its own."""
    return test_settings(
        url, registration="private", require_verified_email=True, trusted_proxies=("127.0.0.1",), **changes
    )


async def register(service: Service, network: str = "192.0.2.1", **given: Any) -> httpx2.Response:
    """Register with Mika's data, some of it replaced; from a network where the service trusts its proxy."""
    return await service.http.post("/v1/users", json=MIKA | given, headers={"x-forwarded-for": network})


async def stored(service: Service) -> list[Any]:
    """Return the row of everybody who was not deleted, oldest first."""
    return list(await service.execute(select(users).where(users.c.deleted_at.is_(None)).order_by(users.c.id)))


# -- openly -----------------------------------------------------------------------------------------------------------


async def test_who_registers_openly_sees_who_they_are(open_service: Service) -> None:
    """201 and the profile; the address as typed is stored and not proven; a link is on its way to it."""
    answer = await register(open_service)
    assert answer.status_code == 201
    [row] = await stored(open_service)
    assert answer.json() == {
        "id": str(row.id),
        "username": "mika",
        "name": "Mika",
        "email": "Mika@example.org",
        "email_verified": False,
        "role": "user",
        "created_at": "2026-01-01T00:00:00Z",
    }
    assert answer.headers["cache-control"] == "no-store"
    assert await mails(open_service) == [("verify_email", "Mika@example.org")]
    [event] = await open_service.events("user.registered")
    assert (event.actor, event.target, event.network) == (str(row.id), str(row.id), "127.0.0.1")
    assert (await open_service.sign_in(await an_app(open_service), row))["scope"] == "account:read account:write"


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ({"email": "other@example.org"}, "The username is taken."),
        ({"email": "other@example.org", "username": "MIKA"}, "The username is taken."),
        ({"username": "other"}, "The address belongs to an account already."),
        ({"username": "other", "email": "mika@EXAMPLE.org"}, "The address belongs to an account already."),
        ({}, "The address belongs to an account already."),
    ],
)
async def test_a_name_that_is_taken_is_told_openly(open_service: Service, given: dict[str, Any], title: str) -> None:
    """409 says which of the two it is, however it is spelled; nobody is told by mail."""
    await register(open_service)
    ordered = await mails(open_service)
    answer = await register(open_service, **given)
    assert (answer.status_code, answer.json()["title"]) == (409, title)
    assert len(await stored(open_service)) == 1
    assert await mails(open_service) == ordered
    [event] = await open_service.events("registration.declined")
    assert event.detail == {"taken": "email" if "address" in title else "username"}


@pytest.mark.case("ACC-18")
@pytest.mark.parametrize(
    ("username", "status"),
    [
        ("Admin", 409),
        ("ADMIN", 409),
        ("\uff41\uff44\uff4d\uff49\uff4e", 422),
        ("admin ", 422),
        (" admin", 422),
        ("admin\u200b", 422),
        ("\u0430dmin", 422),
        ("adm\u0131n", 422),
        ("\u212aelvin", 422),
        ("stra\u00dfe", 422),
        ("ad\u00admin", 422),
        ("admin\u0301", 422),
    ],
)
async def test_no_username_looks_like_another(sqlite_url: str, username: str, status: int) -> None:
    """What only looks alike cannot be registered, what is the same in another case is taken."""
    async with running(test_settings(sqlite_url, registration="open")) as service:
        await service.a_user("admin")
        answer = await register(service, username=username)
        assert answer.status_code == status, answer.text
        assert len(await stored(service)) == 1


async def test_what_cannot_be_registered_is_told_member_by_member(open_service: Service) -> None:
    """422 with a pointer to each, in words that repeat nothing; it costs no registration, and nothing is stored."""
    for _ in range(25):
        answer = await register(open_service, username="no name", email="nowhere", password="short", name="a\tb")
        assert answer.status_code == 422
    errors = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert errors.keys() == {"/username", "/email", "/password", "/name"}
    assert "8 to 128 characters" in errors["/password"]
    for sent in ("no name", "nowhere", "short"):
        assert sent not in answer.text
    assert await stored(open_service) == []
    assert (await register(open_service)).status_code == 201


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize(
    "password", ["Identity2026", "password1", "Mika@example.org", "mika@EXAMPLE.org", "12345678", "x" * 129]
)
async def test_a_password_that_would_be_guessed_is_refused(sqlite_url: str, password: str) -> None:
    """The service's name with a year, a common one, the own address: with the reason, and without an echo."""
    async with running(test_settings(sqlite_url, registration="open")) as service:
        answer = await register(service, password=password)
        assert answer.status_code == 422
        assert [error["pointer"] for error in answer.json()["errors"]] == ["/password"]
        assert password not in answer.text
        assert await stored(service) == []


@pytest.mark.parametrize(
    "given",
    [
        {"role": "super_admin"},
        {"email_verified": True},
        {"enabled": True},
        {"id": "00000000-0000-7000-8000-000000000000"},
        {"password": None},
        {"username": 5},
        {"name": ["Mika"]},
    ],
)
async def test_nobody_chooses_more_about_themselves_than_they_may(sqlite_url: str, given: dict[str, Any]) -> None:
    """A member that is not known, or of another type, is refused with all the rest."""
    async with running(test_settings(sqlite_url, registration="open")) as service:
        assert (await register(service, **given)).status_code == 422
        assert await stored(service) == []


async def test_registration_works_where_no_mail_can_be_sent(sqlite_url: str) -> None:
    """Openly and without a link; what needs mail is not there."""
    settings = test_settings(
        sqlite_url,
        environment="production",
        issuer="https://identity.example",
        allow_sqlite=True,
        argon2_memory_kib=19456,
        argon2_time_cost=2,
        refusal_delay=0.1,
        registration="open",
    )
    async with running(settings) as service:
        assert (await register(service)).status_code == 201
        assert await mails(service) == []
        for path in ("email-verification", "email-verification/confirm", "password-reset", "password-reset/confirm"):
            assert (await service.http.post(f"/v1/{path}", json={"email": "mika@example.org"})).status_code == 404
        for page in ("verify-email", "reset-password", "change-email"):
            assert (await service.http.get(f"/{page}")).status_code == 404
        [row] = await stored(service)
        person = await signed_in(service, row)
        assert (await person("POST", "/email", {"email": "new@example.org", "password": PASSWORD})).status_code == 404


async def test_closed_registration_refuses_everybody(sqlite_url: str) -> None:
    """403, whatever is sent."""
    async with running(test_settings(sqlite_url)) as service:
        for answer in (await register(service), await service.http.post("/v1/users", content=b"nonsense")):
            assert (answer.status_code, answer.json()["title"]) == (403, "Registration is closed.")
        assert await stored(service) == []


# -- privately --------------------------------------------------------------------------------------------------------

SENT = {
    "nothing known": ({"username": "new", "email": "new@example.org"}, [("verify_email", "new@example.org")]),
    "the address": ({"username": "new", "email": "mika@EXAMPLE.ORG"}, [("account_exists", "Mika@example.org")]),
    "the username": ({"username": "MIKA", "email": "new@example.org"}, [("username_taken", "new@example.org")]),
    "both, of one person": ({}, [("account_exists", "Mika@example.org")]),
    "both, of two people": ({"email": "ada@example.org"}, [("account_exists", "ada@example.org")]),
    "the address of a disabled person": ({"username": "new", "email": "off@example.org"}, []),
    "the names of a deleted person": (
        {"username": "gone", "email": "gone@example.org"},
        [("verify_email", "gone@example.org")],
    ),
}


async def known_people(service: Service) -> None:
    """Register Mika, and have others who are known in other ways."""
    await service.a_user("mika", email="Mika@example.org")
    await service.a_user("ada")
    await service.disable(await service.a_user("off"))
    gone = await service.a_user("gone")
    await service.within(lambda tx: service.services.users.delete(tx, gone.id))


@pytest.mark.case("ACC-04")
@pytest.mark.parametrize("known", SENT)
async def test_only_the_mail_tells_what_was_known(private_service: Service, known: str) -> None:
    """The answer is 202 in any case; a mail goes to the new address or to the stored one."""
    await known_people(private_service)
    given, expected = SENT[known]
    answer = await register(private_service, **given)
    assert (answer.status_code, answer.json()) == (202, {"message": "A mail to this address tells how to go on."})
    assert await mails(private_service) == expected


async def test_a_private_registration_is_used_after_its_link_was_opened(private_service: Service) -> None:
    """Until then signing in fails as it does with a wrong password: who registered cannot tell whether they did."""
    await private_service.a_user("ada")
    app = await an_app(private_service)
    for email in ("mika@example.org", "ada@example.org"):
        assert (await register(private_service, email=email)).status_code == 202
    refusals = {
        (await private_service.token(app, grant_type="password", username=name, password=password)).content
        for name, password in (("mika@example.org", PASSWORD), ("ada@example.org", "not the password"))
    }
    assert len(refusals) == 1
    token = await link(private_service, "mika@example.org", "verify_email")
    answer = await private_service.http.post("/v1/email-verification/confirm", json={"token": token})
    assert answer.status_code == 204
    [_, mika] = await stored(private_service)
    assert await private_service.sign_in(app, mika)


@pytest.mark.case("ACC-04")
@pytest.mark.parametrize("username", ["new", "NEW"])
async def test_a_username_is_gone_whether_its_address_was_known_or_not(private_service: Service, username: str) -> None:
    """Or who asks for the name again, with an address of their own, would learn what the first mail was to tell."""
    await private_service.a_user("ada")
    for number, email in enumerate(("ada@example.org", "free@example.org")):
        first = await register(private_service, username=f"{username}{number}", email=email)
        again = await register(private_service, username=f"new{number}", email=f"own{number}@example.org")
        assert (again.status_code, again.content) == (first.status_code, first.content) == (202, first.content)
        assert ("username_taken", f"own{number}@example.org") in await mails(private_service)
    names = [row.username for row in await stored(private_service)]
    assert names == ["ada", "new1"]


@pytest.mark.case("ACC-04")
async def test_a_password_is_hashed_before_anything_is_looked_up(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is the same for what is known and what is new, and done while nothing has been asked yet."""
    async with running(private(sqlite_url)) as service:
        await known_people(service)
        hashed: list[str] = []
        original = PasswordHasher.hash

        async def watched(hasher: PasswordHasher, password: Secret) -> str:
            hashed.append(password.reveal())
            assert await stored(service) == before
            return await original(hasher, password)

        monkeypatch.setattr(PasswordHasher, "hash", watched)
        for given, _ in SENT.values():
            before = await stored(service)
            hashed.clear()
            assert (await register(service, **given)).status_code == 202
            assert hashed == [PASSWORD]
            service.clock.advance(3600)


@pytest.mark.case("ACC-21")
async def test_of_fifty_who_register_one_address_at_once_one_is_stored(database_url: str) -> None:
    """The others hear the same."""
    async with running(private(database_url)) as service:
        answers = await asyncio.gather(
            *(register(service, f"192.0.2.{number}", username=f"mika{number}") for number in range(1, 51))
        )
        assert {(answer.status_code, answer.content) for answer in answers} == {(202, answers[0].content)}
        assert len(await stored(service)) == 1
        ordered = [template for template, _ in await mails(service)]
        # Three may tell what is taken. Who is stored has booked one of them as well, and gives it back when stored:
        # in time for somebody else, or not.
        told, welcomed = ordered.count("account_exists"), ordered.count("verify_email")
        assert (told, welcomed) in {(2, 1), (3, 1), (3, 0)}
        assert len(ordered) == told + welcomed


@pytest.mark.case("ACC-21")
@pytest.mark.parametrize("mode", ["private", "open"])
async def test_who_comes_second_by_a_moment_finds_the_name_taken(database_url: str, mode: str) -> None:
    """A registration waits for one that is not committed yet, and sees what became of it."""
    settings = test_settings(database_url, registration=mode, require_verified_email=True)
    async with running(settings) as service, held(service) as first:
        await service.services.users.create(
            first.tx, username="first", email="mika@example.org", role="user", password_hash=None, verified=True
        )
        second = await blocked(service, register(service))
        await first.commit()
        assert (await second).status_code == {"private": 202, "open": 409}[mode]
        assert [row.username for row in await stored(service)] == ["first"]
        expected = [("account_exists", "mika@example.org")] if mode == "private" else []
        assert await mails(service) == expected


async def test_a_name_that_was_given_up_meanwhile_is_free(database_url: str) -> None:
    """Who waited for a registration that was undone is registered."""
    async with running(test_settings(database_url, registration="open")) as service, held(service) as first:
        await service.services.users.create(
            first.tx, username="mika", email="mika@example.org", role="user", password_hash=None, verified=True
        )
        second = await blocked(service, register(service))
        await first.roll_back()
        assert (await second).status_code == 201


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_one_network_registers_so_many(private_service: Service) -> None:
    """Twenty, then one in three minutes; other networks do not notice."""
    statuses = [
        (await register(private_service, username=f"mika{number}", email=f"mika{number}@example.org")).status_code
        for number in range(22)
    ]
    assert statuses == [202] * 20 + [429] * 2
    limited = await register(private_service, username="mika20", email="mika20@example.org")
    assert 0 < int(limited.headers["retry-after"]) <= 180
    assert (await register(private_service, "192.0.2.2", username="other", email="o@example.org")).status_code == 202
    private_service.clock.advance(180)
    assert (await register(private_service, username="mika20", email="mika20@example.org")).status_code == 202
    assert len(await stored(private_service)) == 22


@pytest.mark.case("ACC-28")
async def test_one_address_is_sent_three_mails_an_hour(private_service: Service) -> None:
    """Of each kind, whoever asks, from wherever; the answer does not tell that it was too many."""
    answers = [await register(private_service, f"192.0.2.{number}", username=f"mika{number}") for number in range(1, 7)]
    assert {(answer.status_code, answer.content) for answer in answers} == {(202, answers[0].content)}
    kinds = [template for template, _ in await mails(private_service)]
    assert sorted(kinds) == ["account_exists"] * 3 + ["verify_email"]
    private_service.clock.advance(1200)
    await register(private_service, "192.0.2.9", username="mika9")
    assert len(await mails(private_service)) == 5


@pytest.mark.case("ACC-28")
async def test_who_registers_with_an_address_whose_mails_are_used_up_is_stored(private_service: Service) -> None:
    """Only who registered it three times before uses up the first mail; the fourth is sent none, and asks later."""
    for number in range(4):
        assert (await register(private_service, f"192.0.2.{number}")).status_code == 202
        [row] = await stored(private_service)
        assert row.email == MIKA["email"]
        assert await mails(private_service) == ([("verify_email", MIKA["email"])] if number < 3 else [])
        if number < 3:
            await private_service.within(lambda tx, row=row: private_service.services.users.erase(tx, row.id))
    private_service.clock.advance(1200)
    await private_service.http.post("/v1/email-verification", json={"email": MIKA["email"]})
    assert await mails(private_service) == [("verify_email", MIKA["email"])]


async def test_without_room_for_mails_nobody_registers(url: str) -> None:
    """503 before anything is looked up: for a new address, for a known one, and for one that gets no mail."""
    async with running(private(url, mail_queue=1)) as service:
        await service.a_user("ada")
        await service.disable(await service.a_user("off"))
        assert (await register(service)).status_code == 202
        seen = set()
        for email in ("new@example.org", "ada@example.org", "off@example.org"):
            answer = await register(service, username="new", email=email)
            seen.add((answer.status_code, answer.content, answer.headers.get("retry-after")))
        assert len(seen) == 1
        assert seen.pop()[0] == 503
        assert len(await stored(service)) == 3
        assert (await service.execute(select(func.count()).select_from(outbox)))[0][0] == 1


async def test_a_busy_service_does_not_count_who_could_not_register(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 while passwords cannot be hashed; afterwards as many may register as before."""

    async def busy(_hasher: PasswordHasher, _password: Secret) -> str:
        raise HashingBusy("queue_full")

    async with running(test_settings(sqlite_url, registration="open")) as service:
        with monkeypatch.context() as patched:
            patched.setattr(PasswordHasher, "hash", busy)
            assert {(await register(service)).status_code for _ in range(30)} == {503}
        assert (await register(service)).status_code == 201
