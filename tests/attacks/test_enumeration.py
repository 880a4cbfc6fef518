"""Nobody learns from the token endpoint which users, names or clients there are."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import bcrypt
import httpx2
import pytest
from sqlalchemy import delete, select

from identity_service.infra.outbox import Outbox
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import PasswordHasher, Verification
from identity_service.infra.tables import outbox, users
from identity_service.settings import Settings
from tests.support.hashing import watch_verifications
from tests.support.people import link
from tests.support.refusals import refusal
from tests.support.service import PASSWORD, Registered, Service, running, test_settings
from tests.support.waiting import until

DELAY = 0.15
IMPORTED = bcrypt.hashpw(b"the password of another system", bcrypt.gensalt(4)).decode()


@pytest.fixture(params=["database_url", "sqlite_url"])
def either_url(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL database, then of a SQLite one."""
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["service", "embedded"])
def either(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL with Redis, then on SQLite with limits in memory."""
    found: Service = request.getfixturevalue(request.param)
    return found


async def the_refused(service: Service) -> dict[str, tuple[str, str]]:
    """Prepare one user of each kind that is refused; return a name and a password for each."""
    user, disabled = await service.a_user("known"), await service.a_user("disabled")
    await service.disable(disabled)
    await service.a_user("unverified", verified=False)
    await service.a_user("passwordless", password=None)
    await service.a_user("broken", password_hash="not a hash of any kind")
    await service.a_user("imported", password_hash=IMPORTED)
    deleted = await service.a_user("deleted")
    await service.execute(delete(users).where(users.c.id == deleted.id))
    return {
        "wrong password": (user.username, "not the password"),
        "wrong password, by address": (user.email, "not the password"),
        "unknown name": ("nobody", PASSWORD),
        "unknown address": ("nobody@example.org", PASSWORD),
        "no name at all": ("\u202e not a name\n", PASSWORD),
        "a name longer than any": ("n" * 5000, PASSWORD),
        "disabled, right password": ("disabled", PASSWORD),
        "disabled, wrong password": ("disabled", "not the password"),
        "unverified, right password": ("unverified", PASSWORD),
        "unverified, wrong password": ("unverified", "not the password"),
        "no password set": ("passwordless", PASSWORD),
        "unusable hash": ("broken", PASSWORD),
        "imported hash, wrong password": ("imported", "not the password"),
        "deleted": ("deleted", PASSWORD),
    }


def seen_by_the_caller(answer: httpx2.Response) -> tuple[int, bytes, tuple[tuple[str, str], ...]]:
    """Return all of an answer but the request's own id."""
    headers = tuple((name, value) for name, value in answer.headers.multi_items() if name != "x-request-id")
    return answer.status_code, answer.content, headers


async def sign_in(service: Service, client: Registered, name: str, password: str) -> httpx2.Response:
    """Try to sign in."""
    return await service.token(client, grant_type="password", username=name, password=password)


@pytest.mark.rfc("6749", "5.2")
@pytest.mark.case("ACC-01")
@pytest.mark.case("PWG-03")
async def test_every_failed_sign_in_is_answered_with_the_same_bytes(either_url: str) -> None:
    """Body and headers, whatever was wrong, at the first attempt and at the last before the limit."""
    settings = test_settings(either_url, require_verified_email=True)
    async with running(settings) as service:
        client, public = await service.a_client(), await service.a_client(public=True)
        kinds = await the_refused(service)
        seen = set()
        for name, password in kinds.values():
            for caller in (client, public):
                answer = await sign_in(service, caller, name, password)
                refusal(answer, "invalid_grant", name, password)
                seen.add(seen_by_the_caller(answer))
            service.clock.advance(60)
        assert len(seen) == 1
        reasons = {row.detail["reason"] for row in await service.events("sign_in.failed")}
        assert reasons == {"unknown_user", "wrong_password", "user_disabled", "email_unverified"}


@pytest.mark.case("ACC-01")
@pytest.mark.case("PWG-03")
async def test_every_failed_sign_in_costs_one_verification(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no hash a decoy is computed: the time, and what others wait for, is the same."""
    seen = watch_verifications(monkeypatch)
    async with running(test_settings(sqlite_url, require_verified_email=True)) as service:
        client = await service.a_client()
        for what, (name, password) in (await the_refused(service)).items():
            seen.clear()
            refusal(await sign_in(service, client, name, password), "invalid_grant")
            assert [each[0] for each in seen] == [password], what
            service.clock.advance(60)


async def timed(answer: Awaitable[httpx2.Response]) -> tuple[float, httpx2.Response]:
    """Return how long an answer took, by the clock that delays are kept by."""
    started = asyncio.get_running_loop().time()
    given = await answer
    return asyncio.get_running_loop().time() - started, given


@pytest.mark.case("PWG-03")
async def test_a_refusal_leaves_no_sooner_than_the_delay(sqlite_url: str) -> None:
    """For each kind of refusal alike; a refusal that says nothing about a person need not wait."""
    async with running(test_settings(sqlite_url, refusal_delay=DELAY, require_verified_email=True)) as service:
        client = await service.a_client()
        kinds = list((await the_refused(service)).items())
        took = await asyncio.gather(*(timed(sign_in(service, client, *credentials)) for _, credentials in kinds))
        for (what, _), (seconds, answer) in zip(kinds, took, strict=True):
            refusal(answer, "invalid_grant")
            assert seconds >= DELAY, what


@pytest.mark.case("PWG-03")
async def test_a_slow_refusal_leaves_at_the_next_multiple_of_the_delay(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What took longer for one name than the delay is (an imported hash that costs more) is rounded up as well."""

    async def slowly(_hasher: PasswordHasher, _password: Secret, stored: str | None, *, form: int) -> Verification:
        await asyncio.sleep(DELAY * 1.2 if stored is not None else 0)
        return Verification(False)

    async with running(test_settings(sqlite_url, refusal_delay=DELAY)) as service:
        client, user = await service.a_client(), await service.a_user()
        monkeypatch.setattr(PasswordHasher, "verify", slowly)
        seconds, answer = await timed(sign_in(service, client, user.username, PASSWORD))
        refusal(answer, "invalid_grant")
        assert seconds >= 2 * DELAY


@pytest.mark.case("PWG-03")
async def test_the_refusal_is_committed_before_the_delay(sqlite_url: str) -> None:
    """Waiting holds neither a connection nor the trace of what happened: who hangs up is recorded all the same."""
    async with running(test_settings(sqlite_url, refusal_delay=5)) as service:
        client = await service.a_client()
        waiting = asyncio.create_task(sign_in(service, client, "nobody", PASSWORD))
        await until(lambda: service.events("sign_in.failed"), "nothing is committed")
        assert len(await service.events("sign_in.failed")) == 1
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        other = await service.a_user()
        assert await service.sign_in(client, other)


@pytest.mark.case("ACC-05")
@pytest.mark.case("PWG-03")
async def test_names_that_do_not_exist_are_limited_like_those_that_do(either: Service) -> None:
    """After as many attempts, with the same bytes, and with the same time to wait."""
    service = either
    client = await service.a_client()
    await service.a_user("known")
    await service.disable(await service.a_user("disabled"))
    courses: dict[str, list[tuple[Any, ...]]] = {}
    for name in ("known", "nobody", "disabled", "nobody@example.org", "\u202eodd"):
        service.clock.advance(3600)  # what one network may try in all has nothing to do with names
        courses[name] = [seen_by_the_caller(await sign_in(service, client, name, "wrong password")) for _ in range(14)]
    assert len({tuple(course) for course in courses.values()}) == 1
    statuses = [status for status, *_ in courses["nobody"]]
    assert statuses == [400] * 10 + [429] * 4


@pytest.mark.rfc("6749", "5.2")
async def test_a_limited_answer_is_the_same_for_the_right_password(embedded: Service) -> None:
    """Who has used up the attempts does not learn from the next one that it would have been right."""
    client, user = await embedded.a_client(), await embedded.a_user()
    for _ in range(10):
        refusal(await sign_in(embedded, client, user.username, "wrong password"), "invalid_grant")
    right = await sign_in(embedded, client, user.username, PASSWORD)
    wrong = await sign_in(embedded, client, user.username, "wrong password")
    refusal(right, "temporarily_unavailable", PASSWORD, status=429)
    assert seen_by_the_caller(right) == seen_by_the_caller(wrong)


async def test_client_failures_are_limited_alike_for_unknown_clients(embedded: Service) -> None:
    """Guessing at ids tells no more than guessing at secrets."""
    client = await embedded.a_client()
    unknown = client.id[:-1] + ("x" if client.id[-1] != "x" else "y")
    courses = []
    for client_id in (client.id, unknown, "nonsense"):
        embedded.clock.advance(600)  # ids that do not exist share their failures
        answers = [
            await embedded.token(Registered(client_id, "wrong"), grant_type="client_credentials") for _ in range(33)
        ]
        courses.append(tuple(seen_by_the_caller(answer) for answer in answers))
    assert len(set(courses)) == 1
    assert [status for status, *_ in courses[0]] == [401] * 30 + [429] * 3


# -- what anybody may ask without a credential ------------------------------------------------------------------------

ASKED = (
    "known@example.org",
    "KNOWN@Example.ORG",
    "unverified@example.org",
    "disabled@example.org",
    "nobody@example.org",
)
NAMES = (*ASKED, "deleted@example.org", "passwordless", "known", "nobody", "\u202e not a name", "n" * 254, "kn\u0131wn")
ANONYMOUS = {
    "verification": ("/v1/email-verification", NAMES),
    "reset": ("/v1/password-reset", NAMES),
    "registration": ("/v1/users", ASKED),
}

WRITTEN_TO = {
    "verification": {"unverified@example.org"},
    "reset": {"known@example.org", "unverified@example.org", "passwordless@example.org"},
    "registration": {"known@example.org", "unverified@example.org", "nobody@example.org"},
}


def private(url: str, **changes: Any) -> Settings:
    """Return the settings under which nobody learns who has an account."""
    return test_settings(
        url, registration="private", require_verified_email=True, trusted_proxies=("127.0.0.1",), **changes
    )


async def ask(service: Service, path: str, name: str, number: int = 1) -> httpx2.Response:
    """Ask for what mails are sent for, from a network of its own."""
    body = {"email": name}
    if path == "/v1/users":
        body |= {"username": f"visitor{number}", "password": "a phrase of a visitor"}
    return await service.http.post(path, json=body, headers={"x-forwarded-for": f"192.0.2.{number}"})


@pytest.mark.case("ACC-04")
@pytest.mark.parametrize("what", ANONYMOUS)
async def test_who_asks_for_a_mail_is_answered_with_the_same_bytes(either_url: str, what: str) -> None:
    """Body and headers, whatever the name stands for, also when its mails are used up; only the mails differ."""
    path, names = ANONYMOUS[what]
    async with running(private(either_url)) as service:
        await the_refused(service)
        seen = set()
        for number, name in enumerate((*names, *names, *names, *names), 1):
            answer = await ask(service, path, name, number)
            assert answer.status_code == 202, answer.text
            assert not any(part in answer.text for part in (name, "visitor"))
            seen.add(seen_by_the_caller(answer))
        assert len(seen) == 1
        written_to = {row.recipient for row in await service.execute(select(outbox))}
        assert written_to == WRITTEN_TO[what]


@pytest.mark.case("ACC-04")
@pytest.mark.case("OPS-27")
@pytest.mark.parametrize("what", ANONYMOUS)
async def test_who_asks_for_a_mail_is_answered_no_sooner_than_the_delay(sqlite_url: str, what: str) -> None:
    """For each kind of name alike, while the mail server cannot be reached."""
    path, names = ANONYMOUS[what]
    settings = private(
        sqlite_url, refusal_delay=DELAY, smtp_host="127.0.0.1", smtp_port=9, mail_from="no-reply@example.org"
    )
    async with running(settings) as service:
        await the_refused(service)
        took = await asyncio.gather(*(timed(ask(service, path, name, n)) for n, name in enumerate(names, 1)))
        for name, (seconds, answer) in zip(names, took, strict=True):
            assert answer.status_code == 202
            assert seconds >= DELAY, name


@pytest.mark.case("ACC-04")
@pytest.mark.parametrize("what", ["verification", "reset", "registration"])
async def test_a_mail_that_takes_longer_to_order_is_rounded_up(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What is done only for a name that exists does not show in the time."""
    path, _ = ANONYMOUS[what]
    enqueue = Outbox.enqueue

    async def slowly(*given: Any, **named: Any) -> None:
        await asyncio.sleep(DELAY * 1.2)
        await enqueue(*given, **named)

    async with running(private(sqlite_url, refusal_delay=DELAY)) as service:
        await the_refused(service)
        monkeypatch.setattr(Outbox, "enqueue", slowly)
        seconds, answer = await timed(ask(service, path, "unverified@example.org"))
        assert answer.status_code == 202
        assert seconds >= 2 * DELAY


@pytest.mark.case("ACC-04")
async def test_what_was_ordered_is_committed_before_the_delay(sqlite_url: str) -> None:
    """Waiting holds no connection, and who hangs up is sent their mail all the same."""
    async with running(private(sqlite_url, refusal_delay=5)) as service:
        await service.a_user("known")
        waiting = asyncio.create_task(ask(service, "/v1/password-reset", "known"))
        await until(lambda: service.execute(select(outbox)), "nothing is committed")
        assert len(await service.execute(select(outbox))) == 1
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])


@pytest.mark.case("ACC-05")
@pytest.mark.parametrize("what", ANONYMOUS)
async def test_limits_of_a_network_fire_for_every_name_alike(either_url: str, what: str) -> None:
    """After as many requests, with the same bytes, and with the same time to wait."""
    path, _ = ANONYMOUS[what]
    async with running(private(either_url)) as service:
        await service.a_user("known", verified=False)
        courses = set()
        for number, name in enumerate(("known@example.org", "nobody@example.org"), 1):
            courses.add(tuple([seen_by_the_caller(await ask(service, path, name, number)) for _ in range(33)]))
        assert len(courses) == 1
        statuses = [status for status, *_ in courses.pop()]
        assert statuses == [202] * statuses.count(202) + [429] * statuses.count(429)
        assert statuses.count(429) > 0


@pytest.mark.case("ACC-04")
@pytest.mark.parametrize("path", ["/verify-email", "/reset-password", "/change-email"])
async def test_a_link_that_is_not_good_is_answered_with_the_same_bytes(embedded: Service, path: str) -> None:
    """Never issued, used, outdated, of a disabled account, malformed: on its page and at the API."""
    tokens = ["", "nonsense", f"{'pr' if path == '/reset-password' else 'ev'}_{'0' * 50}"]
    what = "password-reset" if path == "/reset-password" else "email-verification"
    for state in ("used", "outdated", "disabled"):
        user = await embedded.a_user(state, verified=False)
        await embedded.http.post(f"/v1/{what}", json={"email": user.email})
        token = await link(embedded, user.email, "reset_password" if path == "/reset-password" else "verify_email")
        if state == "used":
            body = {"token": token} | ({"new_password": "a phrase of a visitor"} if path == "/reset-password" else {})
            assert (await embedded.http.post(f"/v1/{what}/confirm", json=body)).status_code == 204
        elif state == "outdated":
            embedded.clock.advance(86400)
        else:
            await embedded.disable(user)
        tokens.append(token)
    seen: dict[str, set[Any]] = {"api": set(), "opened": set(), "pressed": set()}
    for token in tokens:
        body = {"token": token} | ({"new_password": "a phrase of a visitor"} if path == "/reset-password" else {})
        seen["api"].add(seen_by_the_caller(await embedded.http.post(f"/v1/{what}/confirm", json=body)))
        seen["opened"].add(seen_by_the_caller(await embedded.http.get(path, params={"token": token})))
        seen["pressed"].add(seen_by_the_caller(await embedded.http.post(path, data=body)))
    assert {name: len(answers) for name, answers in seen.items()} == {"api": 1, "opened": 1, "pressed": 1}
    assert {answer[0] for answers in seen.values() for answer in answers} == {400}
