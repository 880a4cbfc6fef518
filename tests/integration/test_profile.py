"""What people see and change about themselves, and how they leave."""

import json
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from identity_service.infra.tables import audit_events, email_tokens, refresh_families, users
from tests.support.hashing import watch_verifications
from tests.support.people import Person, an_app, link, mails, signed_in, with_key
from tests.support.races import blocked, held
from tests.support.service import PASSWORD, Service, running, test_settings

NEW = "a quite different phrase"


async def confirm(service: Service, token: str) -> int:
    """Use a link that proves an address; return the status."""
    return (await service.http.post("/v1/email-verification/confirm", json={"token": token})).status_code


async def signs_in(service: Service, name: str, password: str) -> bool:
    """Tell whether somebody can sign in so."""
    answer = await service.token(await an_app(service), grant_type="password", username=name, password=password)
    return answer.status_code == 200


# -- seeing and naming ------------------------------------------------------------------------------------------------


async def test_people_see_themselves(anywhere: Service) -> None:
    """With an entity tag; nobody may keep the answer."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    answer = await mika("GET")
    assert answer.status_code == 200
    assert answer.json() == {
        "id": str(mika.user.id),
        "username": "mika",
        "name": None,
        "email": "mika@example.org",
        "email_verified": True,
        "role": "user",
        "created_at": "2026-01-01T00:00:00Z",
    }
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["etag"].startswith('"')


async def test_people_change_what_they_are_called(anywhere: Service) -> None:
    """What is not sent stays; their sessions stay; the trail says what was changed, not to what."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    assert (await mika("PATCH", json={"name": "Mika Häkkinen"})).json()["name"] == "Mika Häkkinen"
    answer = await mika("PATCH", json={"username": "Hakkinen"})
    assert (answer.json()["username"], answer.json()["name"]) == ("hakkinen", "Mika Häkkinen")
    assert (await mika("PATCH", json={"name": None})).json()["name"] is None
    assert await signs_in(anywhere, "hakkinen", PASSWORD)
    assert not await signs_in(anywhere, "mika", PASSWORD)
    assert (await mika("GET")).headers["etag"] == (await mika("PATCH", json={})).headers["etag"]
    rows = await anywhere.events("user.changed")
    assert [row.detail["members"] for row in rows] == [["name"], ["username"], ["name"]]
    assert {(row.actor, row.target) for row in rows} == {(str(mika.user.id),) * 2}


async def test_what_stays_the_same_is_not_written_down_as_changed(anywhere: Service) -> None:
    """The trail names the members that differ, and grows by nothing where none does."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    for patch in ({"name": "Mika"}, {"name": "Mika"}, {"name": " Mika "}, {"username": "MIKA"}):
        assert (await mika("PATCH", json=patch)).status_code == 200
    assert (await mika("PATCH", json={"username": "mika", "name": "Other"})).status_code == 200
    assert [row.detail["members"] for row in await anywhere.events("user.changed")] == [["name"]] * 2


async def test_a_change_is_refused_when_somebody_else_came_first(anywhere: Service) -> None:
    """With If-Match, and only then (RFC 9110 §13.1.1)."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    seen = (await mika("GET")).headers["etag"]
    changed = await mika("PATCH", json={"name": "One"}, if_match=seen)
    assert changed.status_code == 200
    assert changed.headers["etag"] != seen
    assert (await mika("PATCH", json={"name": "Two"}, if_match=seen)).status_code == 412
    assert (await mika("PATCH", json={"name": "Two"}, if_match=changed.headers["etag"])).status_code == 200
    assert (await mika("PATCH", json={"name": "Three"}, if_match="*")).status_code == 200


async def test_two_changes_at_once_do_not_both_match(database_url: str) -> None:
    """The tag is compared while nobody else can change the person."""
    async with running(test_settings(database_url)) as service:
        mika = await signed_in(service, await service.a_user("mika"))
        seen = (await mika("GET")).headers["etag"]
        async with held(service) as first:
            await service.services.users.rename(first.tx, mika.user.id, name="First")
            second = await blocked(service, mika("PATCH", json={"name": "Second"}, if_match=seen))
            await first.commit()
            assert (await second).status_code == 412


async def test_a_key_does_not_use_up_its_owners_tries_at_a_username(anywhere: Service) -> None:
    """It may not change the name, so it spends nothing."""
    user = await anywhere.a_user("mika")
    script, mika = await with_key(anywhere, user), await signed_in(anywhere, user)
    for _ in range(12):
        assert (await script("PATCH", json={"username": "script"})).status_code == 403
    assert (await mika("PATCH", json={"username": "hakkinen"})).status_code == 200


@pytest.mark.case("ACC-04")
async def test_nobody_finds_out_by_trying_which_usernames_there_are(anywhere: Service) -> None:
    """A refusal says that a name is taken; ten an hour say it, and a name for oneself takes one."""
    await anywhere.a_user("ada")
    mika, other = [await signed_in(anywhere, await anywhere.a_user(name)) for name in ("mika", "other")]
    tried = [(await mika("PATCH", json={"username": "ada"})).status_code for _ in range(11)]
    assert tried == [409] * 10 + [429]
    assert (await mika("PATCH", json={"username": "nobody.yet"})).status_code == 429
    assert (await mika("PATCH", json={"name": "Mika"})).status_code == 200
    assert (await other("PATCH", json={"username": "ada"})).status_code == 409


@pytest.mark.parametrize(
    ("patch", "status", "pointer"),
    [
        ({"username": "ada"}, 409, None),
        ({"username": "ADA"}, 409, None),
        ({"username": "a b"}, 422, "/username"),
        ({"username": ""}, 422, "/username"),
        ({"username": None}, 422, "/username"),
        ({"name": ""}, 422, "/name"),
        ({"name": "two\nlines"}, 422, "/name"),
        ({"name": "a\u202eb"}, 422, "/name"),
        ({"role": "super_admin"}, 422, ""),
        ({"email": "other@example.org"}, 422, ""),
        ({"email_verified": True}, 422, ""),
        ({"enabled": False, "name": "x"}, 422, ""),
    ],
)
async def test_a_profile_holds_nothing_that_cannot_be(
    anywhere: Service, patch: dict[str, Any], status: int, pointer: str | None
) -> None:
    """Names that are taken or impossible, and members that people do not change by themselves."""
    await anywhere.a_user("ada")
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    before = (await mika("GET")).json()
    answer = await mika("PATCH", json=patch)
    assert answer.status_code == status, answer.text
    if pointer is not None:
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert (await mika("GET")).json() == before
    assert await anywhere.events("user.changed") == []


@pytest.mark.case("ACC-39")
async def test_a_key_changes_the_profile_and_nothing_that_takes_the_account_over(anywhere: Service) -> None:
    """With every scope of its owner, and with the right password in its hands."""
    script = await with_key(anywhere, await anywhere.a_user("mika"))
    assert (await script("PATCH", json={"name": "By script"})).json()["name"] == "By script"
    refused = [
        ("PATCH", "", {"username": "script"}),
        ("POST", "/password", {"current_password": PASSWORD, "new_password": NEW}),
        ("POST", "/email", {"email": "new@example.org", "password": PASSWORD}),
        ("DELETE", "", {"password": PASSWORD}),
        ("GET", "/export", None),
    ]
    for method, path, body in refused:
        answer = await script(method, path, body)
        assert (answer.status_code, "session of the person's own" in answer.json()["title"]) == (403, True), path
    assert await mails(anywhere) == []
    assert await signs_in(anywhere, "mika", PASSWORD)


@pytest.mark.case("ACC-39")
async def test_a_token_without_the_scope_changes_nothing(anywhere: Service) -> None:
    """Reading needs account:read, changing account:write."""
    user = await anywhere.a_user("mika")
    reader = await signed_in(anywhere, user, scope=["account:read"])
    writer = await signed_in(anywhere, user, scope=["account:write"])
    bodies = {
        ("PATCH", ""): {"name": "x"},
        ("POST", "/password"): {"current_password": PASSWORD, "new_password": NEW},
        ("POST", "/email"): {"email": "new@example.org", "password": PASSWORD},
        ("DELETE", ""): {"password": PASSWORD},
        ("DELETE", "/sessions"): None,
    }
    for (method, path), body in bodies.items():
        assert (await reader(method, path, body)).status_code == 403, path
    for path in ("", "/sessions", "/export"):
        assert (await writer("GET", path)).status_code == 403, path
        assert (await reader("GET", path)).status_code == 200, path


# -- the password -----------------------------------------------------------------------------------------------------


async def change(person: Person, **given: Any) -> tuple[int, Any]:
    """Change the password; return the status, and what is answered beside it."""
    body = {"current_password": PASSWORD, "new_password": NEW} | given
    answer = await person("POST", "/password", body)
    return answer.status_code, answer.json() if answer.content else None


async def test_a_new_password_ends_every_session(anywhere: Service) -> None:
    """Also the one it was changed in, and every link that was mailed; the person is told by mail."""
    user = await anywhere.a_user("mika")
    app, script = await an_app(anywhere), await with_key(anywhere, user)
    mika, elsewhere = await signed_in(anywhere, user, app), await signed_in(anywhere, user, app)
    await ask_for(mika, "new@example.org")
    token = await link(anywhere, "new@example.org", "change_email")
    assert await change(mika) == (204, None)
    for person in (mika, elsewhere):
        assert (await person("GET")).status_code == 401
        assert (await anywhere.refresh(app, person.refresh_token)).status_code == 400
    assert await mails(anywhere) == [("email_change_requested", user.email), ("password_changed", user.email)]
    assert await confirm(anywhere, token) == 400
    assert (await script("GET")).status_code == 200
    assert await signs_in(anywhere, "mika", NEW)
    assert not await signs_in(anywhere, "mika", PASSWORD)
    [event] = await anywhere.events("password.changed")
    assert (event.actor, event.detail) == (str(user.id), {"session_kept": False, "api_keys_kept": True})


async def test_a_new_password_can_end_the_keys_as_well(anywhere: Service) -> None:
    """Where somebody else may have made them."""
    user = await anywhere.a_user("mika")
    mika, script = await signed_in(anywhere, user), await with_key(anywhere, user)
    assert await change(mika, keep_api_keys=False) == (204, None)
    assert (await script("GET")).status_code == 401
    [event] = await anywhere.events("password.changed")
    assert event.detail["api_keys_kept"] is False


async def test_an_address_that_was_never_proven_is_sent_no_notice(anywhere: Service) -> None:
    """It may be a stranger's, whom somebody could have us write to."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika", verified=False))
    assert (await change(mika, keep_current_session=True))[0] == 204
    assert (await mika("DELETE", json={"password": NEW})).status_code == 204
    assert await mails(anywhere) == []


async def test_an_act_goes_on_without_its_notice_when_no_more_mails_can_wait(any_url: str) -> None:
    """Whoever fills the queue must not keep others from changing a password that was stolen."""
    async with running(test_settings(any_url, mail_queue=1)) as service:
        mika = await signed_in(service, await service.a_user("mika"))
        await service.a_user("ada")
        await service.http.post("/v1/password-reset", json={"email": "ada@example.org"})
        assert (await change(mika))[0] == 204
        assert await signs_in(service, "mika", NEW)
        assert await mails(service) == [("reset_password", "ada@example.org")]


async def test_the_session_in_which_a_password_is_changed_may_stay(anywhere: Service) -> None:
    """That one and no other; it can change the password again."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    mika, elsewhere = await signed_in(anywhere, user, app), await signed_in(anywhere, user, app)
    assert await change(mika, keep_current_session=True) == (204, None)
    assert (await elsewhere("GET")).status_code == 401
    assert (await anywhere.refresh(app, elsewhere.refresh_token)).status_code == 400
    assert (await mika("GET")).status_code == 200
    assert (await anywhere.refresh(app, mika.refresh_token)).status_code == 200
    assert (await change(mika, current_password=NEW, new_password="one more good phrase"))[0] == 204


async def test_a_wrong_current_password_changes_nothing(anywhere: Service) -> None:
    """403, the password and every session stay, and the trail knows."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    status, problem = await change(mika, current_password="not the password")
    assert (status, problem["title"]) == (403, "The password is wrong.")
    assert (await mika("GET")).status_code == 200
    assert await mails(anywhere) == []
    assert await signs_in(anywhere, "mika", PASSWORD)
    [event] = await anywhere.events("reauthentication.failed")
    assert (event.target, event.detail) == (str(mika.user.id), {"for": "password"})


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize(
    "password", ["short", "password1", "mika@example.org", "Identity-2026", "x" * 2000, "nul\0nul\0"]
)
async def test_a_new_password_must_be_a_good_one(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    """422 with the reason, without asking for the current one and without an echo."""
    async with running(test_settings(sqlite_url)) as service:
        mika = await signed_in(service, await service.a_user("mika"))
        verified = watch_verifications(monkeypatch)
        status, problem = await change(mika, new_password=password)
        assert status == 422
        assert password not in json.dumps(problem)
        assert verified == []
        assert await signs_in(service, "mika", PASSWORD)


@pytest.mark.case("ACC-39")
async def test_who_holds_a_stolen_session_cannot_guess_on(anywhere: Service) -> None:
    """Ten tries over all that asks for the password, then one a minute, the right one too; others do not notice."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    thief, ada = await signed_in(anywhere, user, app), await signed_in(anywhere, await anywhere.a_user("ada"), app)
    acts = [
        ("POST", "/password", {"current_password": "guess", "new_password": NEW}),
        ("POST", "/email", {"email": "thief@example.org", "password": "guess"}),
        ("DELETE", "", {"password": "guess"}),
    ]
    statuses = [(await thief(*acts[number % 3])).status_code for number in range(12)]
    assert statuses == [403] * 10 + [429] * 2
    status, _ = await change(thief)
    assert status == 429
    assert (await change(ada))[0] == 204
    anywhere.clock.advance(60)
    assert (await change(thief))[0] == 204


async def test_a_right_password_costs_no_try(anywhere: Service) -> None:
    """However often it is said: afterwards there are as many wrong ones as before."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    current = PASSWORD
    for number in range(5):
        new = f"phrase of number {number}"
        assert (await change(mika, current_password=current, new_password=new, keep_current_session=True))[0] == 204
        assert await ask_for(mika, f"new{number}@example.org", new) == 202
        current = new
    statuses = [(await mika("DELETE", json={"password": "guess"})).status_code for _ in range(11)]
    assert statuses == [403] * 10 + [429]


@pytest.mark.case("ACC-28")
async def test_a_password_is_changed_so_often_and_no_more(anywhere: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times, then once in ten minutes; who is over it is refused before anything is hashed, and alone."""
    app = await an_app(anywhere)
    mika, ada = [await signed_in(anywhere, await anywhere.a_user(name), app) for name in ("mika", "ada")]
    same: dict[str, Any] = {"new_password": PASSWORD, "keep_current_session": True}
    for _ in range(3):
        assert (await change(mika, **same, current_password="guess"))[0] == 403
    assert [(await change(mika, **same))[0] for _ in range(5)] == [204] * 5
    with monkeypatch.context() as patched:
        verifications = watch_verifications(patched)
        assert (await change(mika, **same))[0] == 429
        assert (await change(mika, **same, current_password="guess"))[0] == 429
        assert len(verifications) == 0
    assert await mails(anywhere) == [("password_changed", "mika@example.org")] * 5
    assert (await change(ada, **same))[0] == 204
    anywhere.clock.advance(600)
    assert [(await change(mika, **same))[0] for _ in range(2)] == [204, 429]


async def test_of_two_new_passwords_at_once_one_is_stored(database_url: str) -> None:
    """The other was proven by a password that is none any more: 409, also from a session that stayed."""
    async with running(test_settings(database_url)) as service:
        users_, families = service.services.users, service.services.families
        user = await service.a_user("mika")
        mika = await signed_in(service, user)
        [family] = await service.family_rows()
        async with held(service) as first:
            epoch = await users_.set_password(first.tx, user.id, "another hash")
            assert epoch is not None
            await families.keep(first.tx, family.id, user.id, epoch=epoch)
            second = await blocked(
                service, mika("POST", "/password", {"current_password": PASSWORD, "new_password": NEW})
            )
            await first.commit()
            assert (await second).status_code == 409
        [(stored,)] = await service.execute(select(users.c.password_hash))
        assert stored == "another hash"


async def test_who_has_no_password_cannot_say_it_again(anywhere: Service) -> None:
    """A person without one must choose it through a link."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    await anywhere.patch_user(mika.user, password_hash=None)
    assert (await change(mika))[0] == 403


# -- the address ------------------------------------------------------------------------------------------------------


async def ask_for(person: Person, email: str, password: str = PASSWORD) -> int:
    """Ask for another address; return the status."""
    return (await person("POST", "/email", {"email": email, "password": password})).status_code


@pytest.mark.case("ACC-29")
async def test_a_new_address_counts_once_it_is_proven(anywhere: Service) -> None:
    """The old one is told twice; until the link was opened, nothing but the old one is of use."""
    user = await anywhere.a_user("mika")
    mika = await signed_in(anywhere, user)
    assert await ask_for(mika, "New@example.org") == 202
    assert await mails(anywhere) == [("change_email", "New@example.org"), ("email_change_requested", user.email)]
    assert (await mika("GET")).json()["email"] == user.email
    assert not await signs_in(anywhere, "new@example.org", PASSWORD)
    await anywhere.http.post("/v1/password-reset", json={"email": "new@example.org"})
    assert len(await mails(anywhere)) == 2
    await anywhere.http.post("/v1/password-reset", json={"email": user.email})
    old_link = await link(anywhere, user.email, "reset_password")

    assert await confirm(anywhere, await link(anywhere, "New@example.org", "change_email")) == 204
    profile = (await mika("GET")).json()
    assert (profile["email"], profile["email_verified"]) == ("New@example.org", True)
    assert await signs_in(anywhere, "new@example.org", PASSWORD)
    assert not await signs_in(anywhere, user.email, PASSWORD)
    assert ("email_changed", user.email) in await mails(anywhere)
    reset = {"token": old_link, "new_password": NEW}
    assert (await anywhere.http.post("/v1/password-reset/confirm", json=reset)).status_code == 400
    [event] = await anywhere.events("email.changed")
    assert event.target == str(user.id)


async def test_only_the_newest_address_asked_for_can_be_proven(anywhere: Service) -> None:
    """And once; a link does not outlive the next request, whatever became of that."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    await anywhere.a_user("ada")
    await ask_for(mika, "one@example.org")
    first = await link(anywhere, "one@example.org", "change_email")
    await ask_for(mika, "two@example.org")
    second = await link(anywhere, "two@example.org", "change_email")
    assert await confirm(anywhere, first) == 400
    await ask_for(mika, "ada@example.org")
    assert await confirm(anywhere, second) == 400
    await ask_for(mika, "three@example.org")
    third = await link(anywhere, "three@example.org", "change_email")
    assert await confirm(anywhere, third) == 204
    assert await confirm(anywhere, third) == 400


async def test_nobody_learns_by_asking_for_an_address_whose_it_is(anywhere: Service) -> None:
    """The answer is the same; its owner is told, and the person's export shows the same as well."""
    await anywhere.a_user("ada", email="Ada@example.org")
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    answers, links = [], []
    for email in ("nobody@example.org", "ada@EXAMPLE.org"):
        answers.append(await mika("POST", "/email", {"email": email, "password": PASSWORD}))
        links.append([found["purpose"] for found in (await mika("GET", "/export")).json()["links"]])
    assert answers[0].status_code == answers[1].status_code == 202
    assert answers[0].content == answers[1].content
    assert links == [["change_email"]] * 2
    assert await mails(anywhere) == [
        ("account_exists", "Ada@example.org"),
        *[("email_change_requested", "mika@example.org")] * 2,
    ]


async def test_an_address_that_was_taken_meanwhile_cannot_be_proven(anywhere: Service) -> None:
    """409, and everything stays as it is."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    await ask_for(mika, "new@example.org")
    token = await link(anywhere, "new@example.org", "change_email")
    await anywhere.a_user("new")
    assert await confirm(anywhere, token) == 409
    assert (await mika("GET")).json()["email"] == "mika@example.org"
    assert await anywhere.events("email.changed") == []


@pytest.mark.parametrize(
    ("email", "status"),
    [("nowhere", 422), ("m\u0131ka@example.org", 422), ("mika@example.org", 422), ("Mika@example.org", 202)],
)
async def test_an_address_must_be_one_and_another(anywhere: Service, email: str, status: int) -> None:
    """The same in another spelling is another: mail goes to what is stored."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    assert await ask_for(mika, email) == status
    if status == 202:
        assert await confirm(anywhere, await link(anywhere, email, "change_email")) == 204
        assert (await mika("GET")).json()["email"] == email
    else:
        assert await mails(anywhere) == []


@pytest.mark.case("ACC-29")
async def test_a_new_address_needs_the_password(anywhere: Service) -> None:
    """403, and nobody is written to."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    assert await ask_for(mika, "new@example.org", "not the password") == 403
    assert await mails(anywhere) == []


@pytest.mark.case("ACC-28")
async def test_asking_for_addresses_sends_no_flood(anywhere: Service) -> None:
    """Three mails an hour to one address, which nobody is told; one person asks five times, which they are told."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    assert [await ask_for(mika, "victim@example.org") for _ in range(7)] == [202] * 5 + [429] * 2
    assert await mails(anywhere) == [
        ("change_email", "victim@example.org"),
        *[("email_change_requested", "mika@example.org")] * 3,
    ]
    assert len(await anywhere.events("email_change.requested")) == 3
    anywhere.clock.advance(1200)
    again = await signed_in(anywhere, mika.user)
    assert [await ask_for(again, "victim@example.org") for _ in range(2)] == [202, 429]
    assert len(await anywhere.events("email_change.requested")) == 4


async def test_nobody_is_refused_for_what_others_asked_about_an_address(anywhere: Service) -> None:
    """Mallory asked for it first, and often; its owner hears what everybody hears, and their link stays good."""
    app = await an_app(anywhere)
    mika, mallory = [await signed_in(anywhere, await anywhere.a_user(name), app) for name in ("mika", "mallory")]
    assert await ask_for(mika, "new@example.org") == 202
    token = await link(anywhere, "new@example.org", "change_email")
    assert [await ask_for(mallory, "new@example.org") for _ in range(3)] == [202] * 3
    assert await ask_for(mika, "new@example.org") == 202
    assert await ask_for(mika, "other@example.org", "not the password") == 403
    assert await confirm(anywhere, token) == 204


async def test_a_request_that_was_refused_costs_nothing(anywhere: Service) -> None:
    """Neither a wrong password nor one's own address is counted among the addresses that were asked for."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    for _ in range(6):
        assert await ask_for(mika, "mika@example.org") == 422
        assert await ask_for(mika, "new@example.org", "not the password") == 403
    assert [await ask_for(mika, f"new{number}@example.org") for number in range(6)] == [202] * 5 + [429]


# -- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.case("REF-25")
async def test_who_leaves_is_gone_at_once(anywhere: Service) -> None:
    """Sessions, keys and links end; a last mail goes to the stored address; the names are free for somebody new."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    mika, script = await signed_in(anywhere, user, app), await with_key(anywhere, user)
    await ask_for(mika, "new@example.org")
    token = await link(anywhere, "new@example.org", "change_email")
    assert (await mika("DELETE", json={"password": PASSWORD})).status_code == 204
    assert (await mika("GET")).status_code == 401
    assert (await script("GET")).status_code == 401
    assert (await anywhere.refresh(app, mika.refresh_token)).status_code == 400
    assert await confirm(anywhere, token) == 400
    assert not await signs_in(anywhere, "mika", PASSWORD)
    assert await mails(anywhere) == [("account_deleted", user.email), ("email_change_requested", user.email)]
    [event] = await anywhere.events("user.deleted")
    assert (event.actor, event.target) == (str(user.id), str(user.id))

    again = await anywhere.a_user("mika")
    assert again.id != user.id
    assert (await mika("GET")).status_code == 401
    assert (await script("GET")).status_code == 401
    assert (await anywhere.refresh(app, mika.refresh_token)).status_code == 400


async def test_leaving_needs_the_password(anywhere: Service) -> None:
    """403, and they stay."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    assert (await mika("DELETE", json={"password": "not the password"})).status_code == 403
    assert (await mika("DELETE")).status_code == 422
    assert (await mika("GET")).status_code == 200


async def test_the_last_super_admin_cannot_leave(anywhere: Service) -> None:
    """While there is another who is enabled they can."""
    first, second = [await anywhere.a_user(name, role="super_admin") for name in ("first", "second")]
    one, other = await signed_in(anywhere, first), await signed_in(anywhere, second)
    assert (await one("DELETE", json={"password": PASSWORD})).status_code == 204
    assert (await other("DELETE", json={"password": PASSWORD})).status_code == 409
    assert (await other("GET")).status_code == 200
    assert [template for template, _ in await mails(anywhere)] == ["account_deleted"]


async def test_of_two_super_admins_who_leave_at_once_one_stays(database_url: str) -> None:
    """Each waits for the other to be gone before counting who is left."""
    async with running(test_settings(database_url)) as service:
        first, second = [await service.a_user(name, role="super_admin") for name in ("first", "second")]
        other = await signed_in(service, second)
        async with held(service) as leaving:
            await leaving.tx.lock("administrators")
            assert await service.services.users.enabled_super_admins(leaving.tx) == 2
            await service.services.users.delete(leaving.tx, first.id)
            waiting = await blocked(service, other("DELETE", json={"password": PASSWORD}))
            await leaving.commit()
            assert (await waiting).status_code == 409


# -- the export -------------------------------------------------------------------------------------------------------


async def test_people_get_everything_that_is_held_about_them(anywhere: Service) -> None:
    """Their row, sessions, keys, links, mails and trail, with what they may do; and no secret of any kind."""
    user, app = await anywhere.a_user("mika", verified=False), await an_app(anywhere)
    mika = await signed_in(anywhere, user, app)
    await anywhere.execute(update(refresh_families).values(user_agent="curl/8.0"))
    await with_key(anywhere, user, ["account:read"])
    await anywhere.http.post("/v1/email-verification", json={"email": user.email})
    await change(mika, current_password="not the password")
    ada = await anywhere.a_user("ada", verified=False)
    await signed_in(anywhere, ada, app)
    await with_key(anywhere, ada)
    await anywhere.http.post("/v1/email-verification", json={"email": ada.email})
    answer = await mika("GET", "/export")
    assert answer.status_code == 200
    held_data = answer.json()
    assert held_data.keys() == {
        *("exported_at", "profile", "scopes", "sessions", "api_keys", "links", "mails", "events", "shortened")
    }
    assert held_data["profile"]["email"] == user.email
    assert held_data["scopes"] == ["account:read", "account:write", "orders:read"]
    assert [(found["user_agent"], found["network"]) for found in held_data["sessions"]] == [("curl/8.0", "127.0.0.1")]
    assert [(found["name"], found["scope"]) for found in held_data["api_keys"]] == [("Script", "account:read")]
    assert [(found["purpose"], found["email"]) for found in held_data["links"]] == [("verify_email", user.email)]
    assert [(found["template"], found["recipient"]) for found in held_data["mails"]] == [("verify_email", user.email)]
    assert [found["event"] for found in held_data["events"]] == [
        "reauthentication.failed",
        "email_verification.requested",
        "grant.password",
    ]
    assert held_data["shortened"] == []
    assert str(ada.id) not in answer.text
    assert ada.email not in answer.text
    [row] = await anywhere.execute(select(users).where(users.c.id == user.id))
    assert row.password_hash not in answer.text
    digests = [held_link.digest for held_link in await anywhere.execute(select(email_tokens))]
    [family] = [found for found in await anywhere.family_rows() if found.user_id == user.id]
    for secret in (*digests, family.nonce):
        assert secret.hex() not in answer.text
    assert "digest" not in answer.text
    assert "nonce" not in answer.text
    [event] = await anywhere.events("account.exported")
    assert event.actor == str(user.id)


async def test_one_person_exports_so_often_and_no_more(anywhere: Service) -> None:
    """Ten times, then once in six minutes: it reads more than all else that people ask; each is written down."""
    mika, ada = [await signed_in(anywhere, await anywhere.a_user(name)) for name in ("mika", "ada")]
    assert [(await mika("GET", "/export")).status_code for _ in range(12)] == [200] * 10 + [429] * 2
    assert len(await anywhere.events("account.exported")) == 10
    assert (await ada("GET", "/export")).status_code == 200
    anywhere.clock.advance(360)
    assert [(await mika("GET", "/export")).status_code for _ in range(2)] == [200, 429]


async def test_an_export_does_not_tell_where_others_act_from(anywhere: Service) -> None:
    """What an operator did is told, and not from which network they did it; what strangers did is."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    subject = str(mika.user.id)
    rows = [
        {"event": "user.disabled", "actor": "an operator", "network": "203.0.113.7"},
        {"event": "sign_in.failed", "actor": None, "network": "198.51.100.9"},
        {"event": "other.person", "actor": "an operator", "network": "203.0.113.8", "target": "another"},
    ]
    for row in rows:
        values = {"at": anywhere.clock.now(), "target": subject, "occurrences": 1, "detail": {}} | row
        await anywhere.execute(insert(audit_events).values(values))
    events = {found["event"]: found["network"] for found in (await mika("GET", "/export")).json()["events"]}
    assert events == {"user.disabled": None, "sign_in.failed": "198.51.100.9", "grant.password": "127.0.0.1"}


async def test_a_long_export_is_cut_and_says_so(sqlite_url: str) -> None:
    """The newest thousand of each kind."""
    async with running(test_settings(sqlite_url)) as service:
        mika = await signed_in(service, await service.a_user("mika"))
        values = {"at": service.clock.now(), "occurrences": 1, "detail": {}, "event": "x", "actor": str(mika.user.id)}
        await service.execute(insert(audit_events).values([values | {"request_id": str(n)} for n in range(1000)]))
        await service.execute(update(audit_events).where(audit_events.c.request_id == "999").values(event="the newest"))
        answer = (await mika("GET", "/export")).json()
        assert len(answer["events"]) == 1000
        assert answer["events"][0]["event"] == "the newest"
        assert answer["shortened"] == ["events"]


async def test_nothing_of_a_person_is_forgotten_in_the_export(anywhere: Service) -> None:
    """Whoever adds a column to one of these tables decides here whether it is told."""
    kept_back = {
        users: {"password_hash", "password_form", "epoch", "email_canonical", "deleted_at", "deleted_as"},
        refresh_families: {
            *("user_id", "user_epoch", "client_epoch", "generation", "nonce", "parent_nonce", "mac_kid"),
            *("retry_digest", "audiences"),
        },
    }
    user = await anywhere.a_user("mika")
    answer = (await (await signed_in(anywhere, user))("GET", "/export")).json()
    told = {users: answer["profile"].keys() - {"has_password"}, refresh_families: answer["sessions"][0].keys()}
    for table, names in kept_back.items():
        assert {column.name for column in table.columns} - names == told[table]
    assert (await anywhere.execute(select(func.count()).select_from(users)))[0][0] == 1
