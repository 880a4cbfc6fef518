"""
Accounts while the mail server, Redis or PostgreSQL fails in the middle: what was acknowledged is there, once.

Nobody hears 500. Who hears 503 does not know what became of their request: it happened as a whole or not at all, and
asking again ends well either way.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, text, update

from identity_service.accounts.users import User
from identity_service.infra.migrate import migrate
from identity_service.infra.ratelimit import catalogue
from identity_service.infra.runtime import SystemClock
from identity_service.infra.tables import (
    api_keys,
    audit_events,
    email_tokens,
    leases,
    outbox,
    spent_bootstrap_secrets,
    users,
)
from tests.support.fault_proxy import FaultProxy
from tests.support.operators import EVERY_SCOPE
from tests.support.people import OWN, Person, an_app, link, mails, signed_in, with_key
from tests.support.server_process import ServerProcess
from tests.support.servers import LocalPostgres, own_postgres
from tests.support.service import (
    BOOTSTRAP_SECRET,
    ISSUER,
    PASSWORD,
    Registered,
    Service,
    prepare_keys,
    running,
    test_settings,
)
from tests.support.smtp import HOST, SmtpServer, smtp_server
from tests.support.waiting import until

NEW_PASSWORD = "another horse, another battery"
AT_ONCE = 4
"""How many mails are on their way at the same time."""
_TURN = 3.0  # seconds in which every replica has had its turn at the outbox
_PATIENCE = 60.0  # seconds for what takes few, on a machine that is busy with other things


def told_to_come_back(answer: httpx2.Response) -> None:
    """Check the one answer to give while nobody knows: not a refusal, and not a fault of ours."""
    assert answer.status_code == 503, (answer.status_code, answer.text)
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/problem+json"


def newcomer(name: str) -> dict[str, str]:
    """Return what somebody registers with."""
    return {"username": name, "email": f"{name}@example.org", "password": PASSWORD}


# -- a transaction whose outcome nobody knows -------------------------------------------------------------------------


@dataclass
class Shaky:
    """The service behind a network that can be cut."""

    service: Service
    network: FaultProxy
    place: str
    """What is lost: the COMMIT, what becomes of it, or its answer."""

    async def traces(self) -> Counter[str]:
        """Return everything that an act leaves behind or takes away, each in a few words."""
        found: Counter[str] = Counter()
        for user in await self.service.execute(select(users)):
            proven = "proven" if user.email_verified_at else "not proven"
            found[f"{user.role} {user.username}, epoch {user.epoch}, {proven}"] += 1
        for row in await self.service.execute(select(audit_events.c.event)):
            found[f"event {row.event}"] += 1
        for template, recipient in await mails(self.service):
            found[f"mail {template} to {recipient}"] += 1
        for row in await self.service.execute(select(email_tokens.c.purpose)):
            found[f"link {row.purpose}"] += 1
        for row in await self.service.execute(select(api_keys)):
            found[f"key, {'rotated' if row.rotated_at else 'as it was made'}"] += 1
        for _ in await self.service.execute(select(spent_bootstrap_secrets)):
            found["spent secret"] += 1
        return found

    async def ask(self, act: Callable[[], Awaitable[httpx2.Response]], *, gains: set[str], losses: set[str]) -> bool:
        """
        Ask for an act and cut the connection at its COMMIT; return whether it has happened.

        Either all of `gains` came and all of `losses` went, or nothing did.
        """
        before = await self.traces()
        if self.place == "its answer is lost":
            # The first transaction that has stored something is the act's; those before it only look.
            self.network.cut_after(_then(b"INSERT 0 1", b"COMMIT"), stream="to_client", deliver=False)
        else:
            self.network.cut_after(
                _then(b"INSERT INTO audit_events", b"COMMIT"), deliver=self.place == "COMMIT is sent"
            )
        told_to_come_back(await act())
        assert self.network.cuts == 1
        await until(self._settled)
        after = await self.traces()
        changed = (set((after - before).elements()), set((before - after).elements()))
        assert changed in ((set(), set()), (gains, losses))
        happened = bool(changed[0])
        assert happened in {"COMMIT is lost": {False}, "its answer is lost": {True}}.get(self.place, {False, True})
        return happened

    async def _settled(self) -> bool:
        """Tell whether the server has noticed that it was cut off and has ended what it was doing."""
        busy = text(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()"
        )
        return bool((await self.service.execute(busy))[0][0] == 0)

    async def sign_in_status(self, user: User, password: str) -> int:
        """Return how a sign-in with a password ends."""
        app = await an_app(self.service)
        answer = await self.service.token(app, grant_type="password", username=user.username, password=password)
        return answer.status_code


def _then(first: bytes, second: bytes) -> Callable[[bytes], bool]:
    """Return a place: where `second` comes after `first`."""
    return lambda seen: second in seen.partition(first)[2]


@pytest.fixture(params=["COMMIT is lost", "COMMIT is sent", "its answer is lost"])
async def shaky(request: pytest.FixtureRequest, database_url: str, redis_url: str) -> AsyncIterator[Shaky]:
    async with FaultProxy.before(database_url) as network:
        settings = test_settings(
            network.through(database_url),
            redis_url=redis_url,
            key_poll=5,
            registration="open",
            bootstrap_secret=BOOTSTRAP_SECRET,
        )
        async with running(settings) as service:
            yield Shaky(service, network, request.param)


@pytest.mark.case("OPS-03")
async def test_who_does_not_know_whether_they_registered_registers_again(shaky: Shaky) -> None:
    """201 or 409, and in the end one person, one entry in the trail, and one mail."""
    service = shaky.service

    async def register() -> httpx2.Response:
        return await service.http.post("/v1/users", json=newcomer("mika"))

    traces = {
        "user mika, epoch 0, not proven",
        "event user.registered",
        "event email_verification.requested",
        "link verify_email",
        "mail verify_email to mika@example.org",
    }
    happened = await shaky.ask(register, gains=traces, losses=set())
    again = await register()
    assert again.status_code == (409 if happened else 201), again.text
    found = await shaky.traces()
    assert {trace: found[trace] for trace in traces} == dict.fromkeys(traces, 1)
    assert found.total() == len(traces) + happened, "and that the name was taken"
    token = await link(service, "mika@example.org", "verify_email")
    confirmed = await service.http.post("/v1/email-verification/confirm", json={"token": token})
    assert confirmed.status_code == 204


@pytest.mark.case("OPS-03")
async def test_who_does_not_know_whether_the_reset_was_done_opens_the_link_again(shaky: Shaky) -> None:
    """A link that did its work is spent and one that did not is good; one password is right, never both."""
    service = shaky.service
    user = await service.a_user("mika")
    person = await signed_in(service, user)
    assert (await service.http.post("/v1/password-reset", json={"email": user.email})).status_code == 202
    body = {"token": await link(service, user.email, "reset_password"), "new_password": NEW_PASSWORD}

    async def reset() -> httpx2.Response:
        return await service.http.post("/v1/password-reset/confirm", json=body)

    happened = await shaky.ask(
        reset,
        gains={
            "user mika, epoch 1, proven",
            "event password.reset",
            "mail password_changed to mika@example.org",
        },
        losses={
            "user mika, epoch 0, proven",
            "link reset_password",
            "mail reset_password to mika@example.org",
        },
    )
    right, wrong = (NEW_PASSWORD, PASSWORD) if happened else (PASSWORD, NEW_PASSWORD)
    assert await shaky.sign_in_status(user, right) == 200
    assert await shaky.sign_in_status(user, wrong) == 400
    assert (await person("GET")).status_code == (401 if happened else 200)
    assert (await reset()).status_code == (400 if happened else 204)
    assert await shaky.sign_in_status(user, NEW_PASSWORD) == 200
    assert await shaky.sign_in_status(user, PASSWORD) == 400
    assert len(await service.events("password.reset")) == 1
    assert await mails(service) == [("password_changed", user.email)]
    assert (await service.execute(select(users.c.epoch)))[0][0] == 1


@pytest.mark.case("OPS-03")
async def test_who_does_not_know_whether_a_key_was_rotated_rotates_it_again(shaky: Shaky) -> None:
    """The secret they have works until they have another one in their hands."""
    service = shaky.service
    user = await service.a_user("mika")
    person, script = await signed_in(service, user), await with_key(service, user)
    [key] = (await person("GET", "/api-keys")).json()["items"]

    async def rotate() -> httpx2.Response:
        return await person("POST", f"/api-keys/{key['id']}/rotate", {"overlap": 3600})

    happened = await shaky.ask(rotate, gains={"key, rotated", "event api_key.rotated"}, losses={"key, as it was made"})
    assert (await script("GET")).status_code == 200
    again = await rotate()
    assert again.status_code == 200, again.text
    assert (await Person(service, user, {"x-api-key": again.json()["key"]})("GET")).status_code == 200
    assert len(await service.events("api_key.rotated")) == 1 + happened
    assert [shown["id"] for shown in (await person("GET", "/api-keys")).json()["items"]] == [key["id"]]


@pytest.mark.case("OPS-03")
async def test_who_does_not_know_whether_the_password_was_changed_has_one_that_works(shaky: Shaky) -> None:
    """With a change goes every session, so asking again is 401 then; the old and the new one never work both."""
    service = shaky.service
    user, app = await service.a_user("mika"), await an_app(service)
    person = await signed_in(service, user, app)

    async def change() -> httpx2.Response:
        return await person("POST", "/password", {"current_password": PASSWORD, "new_password": NEW_PASSWORD})

    happened = await shaky.ask(
        change,
        gains={"user mika, epoch 1, proven", "event password.changed", "mail password_changed to mika@example.org"},
        losses={"user mika, epoch 0, proven"},
    )
    right, wrong = (NEW_PASSWORD, PASSWORD) if happened else (PASSWORD, NEW_PASSWORD)
    assert await shaky.sign_in_status(user, right) == 200
    assert await shaky.sign_in_status(user, wrong) == 400
    assert (await change()).status_code == (401 if happened else 204)
    assert (await service.refresh(app, person.refresh_token)).json()["error"] == "invalid_grant"
    assert await shaky.sign_in_status(user, NEW_PASSWORD) == 200
    assert await shaky.sign_in_status(user, PASSWORD) == 400
    assert len(await service.events("password.changed")) == 1
    assert await mails(service) == [("password_changed", user.email)]


@pytest.mark.case("OPS-03")
@pytest.mark.case("ADM-22")
async def test_who_does_not_know_whether_the_first_operator_was_made_asks_again(shaky: Shaky) -> None:
    """404 when the secret is spent, 201 when it is not; there is one operator in the end, who can sign in."""
    service = shaky.service

    async def bootstrap() -> httpx2.Response:
        return await service.http.post("/v1/bootstrap", json={"secret": BOOTSTRAP_SECRET, **newcomer("root")})

    events = ("event bootstrap.spent", "event client.created")
    traces = {"super_admin root, epoch 0, proven", *events, "spent secret"}
    happened = await shaky.ask(bootstrap, gains=traces, losses=set())
    again = await bootstrap()
    assert again.status_code == (404 if happened else 201), again.text
    assert await shaky.traces() == Counter(traces)
    [root] = await service.execute(select(users))
    assert await shaky.sign_in_status(root, PASSWORD) == 200


@pytest.mark.case("OPS-01")
async def test_who_had_to_ask_often_gets_their_mail_when_it_works_at_last(database_url: str, redis_url: str) -> None:
    """What an outage refused is not held against who asks again, as they were told to."""
    async with FaultProxy.before(database_url) as network:
        settings = test_settings(network.through(database_url), redis_url=redis_url, key_poll=5, registration="open")
        async with running(settings) as service:
            network.refuse()
            network.cut()
            for _ in range(5):
                told_to_come_back(await service.http.post("/v1/users", json=newcomer("mika")))
            network.heal()
            assert (await service.http.post("/v1/users", json=newcomer("mika"))).status_code == 201
            assert await mails(service) == [("verify_email", "mika@example.org")]


# -- without Redis ----------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-28")
@pytest.mark.parametrize("how", ["refuses", "is silent"])
async def test_without_redis_accounts_go_on_under_stricter_limits(database_url: str, redis_url: str, how: str) -> None:
    """Half of each burst, counted here, also of what was spent before; nobody waits long and nobody hears 500."""
    async with FaultProxy.before(redis_url) as network:
        settings = test_settings(
            database_url,
            redis_url=network.through(redis_url),
            key_poll=5,
            registration="open",
            trusted_proxies=("127.0.0.1",),
        )
        async with running(settings, patient=False) as service:
            app, mika = await an_app(service), await service.a_user("mika")
            person, script = await signed_in(service, mika, app), await with_key(service, mika)
            slowest = 0.0

            async def timed(asking: Awaitable[httpx2.Response]) -> httpx2.Response:
                nonlocal slowest
                began = time.monotonic()
                answer = await asking
                slowest = max(slowest, time.monotonic() - began)
                return answer

            async def post(path: str, network: str, **body: Any) -> int:
                answer = await timed(service.http.post(path, json=body, headers={"x-forwarded-for": network}))
                assert answer.status_code < 500, answer.text
                return answer.status_code

            async def register(name: str) -> int:
                return await post("/v1/users", "192.0.2.1", **newcomer(name))

            async def until_limited(ask: Callable[[str], Awaitable[int]]) -> Counter[int]:
                statuses = [await ask(f"stranger{number}") for number in range(40)]
                assert statuses == sorted(statuses), "once limited, limited until time has passed"
                return Counter(statuses[: statuses.index(429) + 1])

            assert await register("early") == 201
            if how == "refuses":
                network.refuse()
                network.cut()
            else:
                network.blackhole()

            half = catalogue.REGISTRATION_NETWORK.burst // 2
            assert await until_limited(register) == {201: half - 1, 429: 1}
            half = catalogue.MAIL_NETWORK.burst // 2
            assert await until_limited(
                lambda name: post("/v1/password-reset", "192.0.2.2", email=f"{name}@example.org")
            ) == {202: half, 429: 1}
            ordered = len(await mails(service))
            for number in range(3):
                assert await post("/v1/password-reset", f"198.51.100.{number}", email=mika.email) == 202
            assert len(await mails(service)) == ordered + catalogue.MAIL_ADDRESS.burst // 2

            for _ in range(3):
                assert (await timed(script("GET"))).status_code == 200
                await timed(signed_in_again(service, app, mika))
            [key] = (await person("GET", "/api-keys")).json()["items"]
            rotated = await timed(person("POST", f"/api-keys/{key['id']}/rotate"))
            assert rotated.status_code == 200
            guessed = {"current_password": "a wrong guess", "new_password": NEW_PASSWORD}
            guesses = [(await timed(person("POST", "/password", guessed))).status_code for _ in range(10)]
            half = catalogue.PASSWORD_CHANGE.burst // 2
            assert guesses == [403] * half + [429] * (10 - half)
            stolen = {"x-api-key": rotated.json()["key"][:-1]}
            guesses = [(await timed(Person(service, mika, stolen)("GET"))).status_code for _ in range(40)]
            half = catalogue.API_KEY_GUESSING.burst // 2
            assert Counter(guesses) == {401: half, 429: 40 - half}
            assert (await service.http.get("/readyz")).status_code == 200
            assert slowest < 5

            network.heal()
            await asyncio.sleep(1.05)  # it is asked again after a second
            assert await post("/v1/users", "192.0.2.3", **newcomer("late")) == 201
            registered = await service.execute(select(users.c.username).order_by(users.c.id))
            assert len(registered) == len(set(registered)) == len(await service.events("user.registered")) + 1


async def signed_in_again(service: Service, app: Registered, user: User) -> httpx2.Response:
    """Sign somebody in, which must work."""
    answer = await service.token(app, grant_type="password", username=user.username, password=PASSWORD)
    assert answer.status_code == 200, answer.text
    return answer


# -- two servers ------------------------------------------------------------------------------------------------------


class Replica:
    """One server, asked over its socket."""

    def __init__(self, server: ServerProcess, http: httpx2.AsyncClient) -> None:
        self.server = server
        self.http = http

    async def __call__(
        self,
        method: str,
        path: str,
        json: Any = None,
        *,
        token: str | None = None,
        key: str | None = None,
        network: str = "192.0.2.1",
    ) -> httpx2.Response:
        """Ask for something under `/v1` as somebody with a token or a key, from a network."""
        headers = {"x-forwarded-for": network}
        headers |= {"authorization": f"Bearer {token}"} if token else {}
        headers |= {"x-api-key": key} if key else {}
        answer = await self.http.request(method, f"/v1{path}", json=json, headers=headers)
        assert answer.status_code != 500, answer.text
        return answer

    async def token(self, client: Registered, **form: str) -> httpx2.Response:
        """Ask for tokens."""
        answer = await self.http.post("/token", data={**client.form, **form})
        assert answer.status_code != 500, answer.text
        return answer

    async def sign_in(self, client: Registered, username: str, password: str = PASSWORD) -> dict[str, str]:
        """Sign somebody in, for everything that they may do."""
        form = {"username": username, "password": password, "scope": " ".join(EVERY_SCOPE)}
        answer = await self.token(client, grant_type="password", **form)
        assert answer.status_code == 200, answer.text
        body: dict[str, str] = answer.json()
        return body


@asynccontextmanager
async def replica(url: str, redis_url: str, *, smtp_port: int | None = None) -> AsyncIterator[Replica]:
    """Start a server where people register; its mails go to a port of this machine."""
    mail = {"smtp_host": HOST, "smtp_port": str(smtp_port), "smtp_security": "none", "mail_from": "id@example.org"}
    settings = {"issuer": ISSUER, "registration": "open", "trusted_proxies": "127.0.0.1"}
    settings |= mail if smtp_port is not None else {}
    server = await asyncio.to_thread(lambda: ServerProcess(url, redis_url, **settings))
    try:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            yield Replica(server, http)
    finally:
        await asyncio.to_thread(server.close)


@asynccontextmanager
async def replicas(url: str, redis_url: str, *, smtp_port: int | None = None) -> AsyncIterator[tuple[Replica, Replica]]:
    """Start two servers on one PostgreSQL and one Redis."""
    async with AsyncExitStack() as stack:
        here, there = [await stack.enter_async_context(replica(url, redis_url, smtp_port=smtp_port)) for _ in range(2)]
        yield here, there


async def nothing_waits(hand: Service) -> bool:
    """Tell whether every mail has left; one that has waits no longer for its next attempt than it must."""
    await hand.execute(update(outbox).values(next_attempt_at=hand.clock.now()))
    return bool((await hand.execute(select(func.count()).select_from(outbox)))[0][0] == 0)


def arrived(smtp: SmtpServer) -> dict[str, Counter[str]]:
    """Return which messages everybody got, and how often each."""
    found: dict[str, Counter[str]] = {}
    for mail in smtp.received:
        [recipient] = mail.recipients
        found.setdefault(recipient, Counter())[mail.message_id] += 1
    return found


def link_in(smtp: SmtpServer, recipient: str) -> str:
    """Return the token in somebody's one mail that has a link."""
    texts = {mail.part("plain") for mail in smtp.received if mail.recipients == (recipient,)}
    [token] = {found[1] for text in texts if (found := re.search(r"\?token=(\S+)", text))}
    return token


@pytest.mark.case("OPS-27")
@pytest.mark.parametrize("how", ["refuses", "is silent"])
async def test_mails_that_a_dead_mail_server_did_not_take_arrive_once(
    database_url: str, redis_url: str, how: str
) -> None:
    """Nobody waits for it; when it is back each person gets one mail, from one of two servers, and its link works."""
    forgetful, new = [f"forgetful{number}" for number in range(4)], [f"new{number}" for number in range(4)]
    async with (
        smtp_server() as smtp,
        FaultProxy(HOST, smtp.port) as network,
        running(test_settings(database_url), SystemClock()) as hand,
        replicas(database_url, redis_url, smtp_port=network.port) as both,
    ):
        for name in forgetful:
            await hand.a_user(name)
        app = await an_app(hand)
        if how == "refuses":
            network.refuse()
        else:
            network.blackhole()
        slowest = 0.0

        async def post(number: int, path: str, body: dict[str, str]) -> int:
            nonlocal slowest
            began = time.monotonic()
            answer = await both[number % 2]("POST", path, body, network=f"192.0.2.{number}")
            slowest = max(slowest, time.monotonic() - began)
            return answer.status_code

        async def was_tried() -> bool:
            return bool(await hand.execute(select(outbox.c.id).where(outbox.c.attempts > 0)))

        assert await post(0, "/users", newcomer(new[0])) == 201
        await until(was_tried)
        for number, name in enumerate(new[1:]):
            assert await post(number, "/users", newcomer(name)) == 201
        for number, name in enumerate([*forgetful, *forgetful]):
            assert await post(number, "/password-reset", {"email": f"{name}@example.org"}) == 202
        assert slowest < 10, "a mail server has twenty seconds to answer"
        assert smtp.received == []

        gate = smtp.behaviour.gate = asyncio.Event()
        network.heal()
        assert not await nothing_waits(hand)
        await until(lambda: smtp.holding > 0, patience=_PATIENCE)
        await asyncio.sleep(1)
        held = smtp.holding
        assert not await nothing_waits(hand), "who holds the lease has not said yet that those are gone"
        await asyncio.sleep(_TURN)
        assert 0 < held <= smtp.holding <= AT_ONCE, "all were due, and the other server left them alone"
        gate.set()
        await until(lambda: nothing_waits(hand), patience=_PATIENCE)
        everybody = {f"{name}@example.org" for name in (*forgetful, *new)}
        assert {who: list(got.values()) for who, got in arrived(smtp).items()} == {who: [1] for who in everybody}

        for number, name in enumerate(new):
            body = {"token": link_in(smtp, f"{name}@example.org")}
            assert await post(number, "/email-verification/confirm", body) == 204
        for number, name in enumerate(forgetful):
            body = {"token": link_in(smtp, f"{name}@example.org"), "new_password": NEW_PASSWORD}
            assert await post(number, "/password-reset/confirm", body) == 204
            old = await both[number % 2].token(app, grant_type="password", username=name, password=PASSWORD)
            assert old.json()["error"] == "invalid_grant"
            await both[(number + 1) % 2].sign_in(await an_all_round_client(hand), name, NEW_PASSWORD)
        await until(lambda: nothing_waits(hand), patience=_PATIENCE)
        for name in forgetful:
            assert list(arrived(smtp)[f"{name}@example.org"].values()) == [1, 1], "the link, and that it was used"


class Undecided(SmtpServer):
    """A mail server that has the message, and takes its time to say so."""

    def __init__(self) -> None:
        super().__init__()
        self.answering = asyncio.Event()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        reply = await super().handle_DATA(server, session, envelope)
        await self.answering.wait()
        return reply


@pytest.mark.case("OPS-22")
@pytest.mark.case("OPS-27")
async def test_the_mails_of_a_killed_server_are_sent_by_another(database_url: str, redis_url: str) -> None:
    """When its lease has run out; those on their way come twice at most, the same message with the same link."""
    names = [f"new{number}" for number in range(AT_ONCE + 3)]
    smtp = Undecided()
    await smtp.start()
    try:
        async with (
            running(test_settings(database_url), SystemClock()) as hand,
            replica(database_url, redis_url, smtp_port=smtp.port) as victim,
        ):
            gate = smtp.behaviour.gate = asyncio.Event()  # or the first mail would be on its way alone
            for number, name in enumerate(names):
                answer = await victim("POST", "/users", newcomer(name), network=f"192.0.2.{number}")
                assert answer.status_code == 201
            smtp.behaviour.gate = None
            gate.set()
            await until(lambda: len(smtp.received) > 0, patience=_PATIENCE)
            await asyncio.sleep(1)
            held = select(leases.c.holder, leases.c.until).where(leases.c.name == "outbox")
            [(holder, until_when)] = await hand.execute(held)
            assert holder is not None
            assert until_when > hand.clock.now() + timedelta(seconds=60)
            victim.server.kill()
            await until(lambda: all(each.is_closing() for each in smtp.connections), "the dead server is still there")
            await asyncio.sleep(0.1)
            in_flight = Counter(mail.message_id for mail in smtp.received)
            smtp.answering.set()
            async with replica(database_url, redis_url, smtp_port=smtp.port) as heir:
                assert not await nothing_waits(hand)
                await asyncio.sleep(_TURN)
                assert Counter(mail.message_id for mail in smtp.received) == in_flight, "the lease stands"
                assert (await hand.execute(held))[0].holder == holder

                await hand.execute(update(leases).where(leases.c.name == "outbox").values(until=hand.clock.now()))
                await until(lambda: nothing_waits(hand), patience=_PATIENCE)
                got = arrived(smtp)
                assert got.keys() == {f"{name}@example.org" for name in names}
                assert all(len(messages) == 1 for messages in got.values()), "one Message-ID each"
                sent = sum(got.values(), Counter[str]())
                assert 1 <= len(in_flight) <= AT_ONCE
                assert sent == Counter(sent.keys()) + in_flight, "twice what was on its way, and nothing else"
                for name in names:
                    body = {"token": link_in(smtp, f"{name}@example.org")}
                    assert (await heir("POST", "/email-verification/confirm", body)).status_code == 204
    finally:
        await smtp.close()


@pytest.fixture
def postgres() -> Iterator[LocalPostgres]:
    """A PostgreSQL that the test may stop."""
    with own_postgres() as server:
        yield server


@pytest.mark.case("OPS-01")
@pytest.mark.case("OPS-03")
async def test_whoever_was_told_that_they_registered_did_whatever_became_of_the_database(
    postgres: LocalPostgres, redis_url: str
) -> None:
    """
    People register all the time, at two servers; PostgreSQL is stopped at once, and started again.

    They hear 201 or 503, and 409 when they ask again for what had happened. Each is there once, with one entry in the
    trail and one mail; and the two servers are one service.
    """
    url = postgres.create_database("accounts")
    await asyncio.to_thread(migrate, url)
    await prepare_keys(test_settings(url))
    heard: Counter[int] = Counter()
    registered: set[str] = set()
    done = asyncio.Event()
    async with (
        smtp_server() as smtp,
        running(test_settings(url, key_poll=5), SystemClock()) as hand,
        replicas(url, redis_url, smtp_port=smtp.port) as both,
    ):

        async def crowd(number: int) -> None:
            turn = 0
            while not done.is_set():
                turn += 1
                name = f"crowd{number}-{turn}"
                for attempt in range(1000):
                    network = f"10.{number}.{turn % 250}.{attempt % 250}"
                    answer = await both[(turn + attempt) % 2]("POST", "/users", newcomer(name), network=network)
                    heard[answer.status_code] += 1
                    if answer.status_code != 503:
                        break
                    told_to_come_back(answer)
                    await asyncio.sleep(0.05)
                assert answer.status_code == 201 or (answer.status_code == 409 and attempt), answer.text
                registered.add(name)

        people = [asyncio.create_task(crowd(number)) for number in range(4)]

        async def registered_reach(count: int) -> None:
            async def there_are() -> bool:
                for each in people:
                    if each.done():
                        each.result()
                return len(registered) >= count

            await until(there_are)

        await registered_reach(12)
        await asyncio.to_thread(postgres.stop, "immediate")
        before = heard[503]

        async def outage_was_heard_of() -> bool:
            return heard[503] >= before + 4

        await until(outage_was_heard_of)
        await asyncio.to_thread(postgres.start)
        await registered_reach(len(registered) + 12)
        done.set()
        await asyncio.gather(*people)
        assert set(heard) <= {201, 409, 503}

        rows = await hand.execute(select(users.c.id, users.c.username))
        assert sorted(row.username for row in rows) == sorted(registered)
        assert Counter(event.target for event in await hand.events("user.registered")) == Counter(
            str(row.id) for row in rows
        )
        await until(lambda: nothing_waits(hand), patience=_PATIENCE)
        got = arrived(smtp)
        assert got.keys() == {f"{name}@example.org" for name in registered}
        assert all(len(messages) == 1 for messages in got.values()), "one Message-ID each"
        twice = sum(got.values(), Counter[str]()).total() - len(registered)
        assert twice <= AT_ONCE, "only what was on its way when the database went"
        name = max(registered)
        body = {"token": link_in(smtp, f"{name}@example.org")}
        assert (await both[0]("POST", "/email-verification/confirm", body)).status_code == 204
        await they_are_one_service(hand, *both)


async def an_all_round_client(hand: Service) -> Registered:
    """Register a client for everything that people may do."""
    return await hand.a_client(public=True, scope=EVERY_SCOPE, audiences=[ISSUER])


async def they_are_one_service(hand: Service, here: Replica, there: Replica) -> None:
    """Check that what ends or changes at one server has ended or changed at the other, at once."""
    client = await an_all_round_client(hand)
    suffix = client.id[-8:].replace("_", "-")
    boss = await hand.a_user(f"boss-{suffix}", role="super_admin")
    mika = await hand.a_user(f"mika-{suffix}", role="moderator")
    operator = (await here.sign_in(client, boss.username))["access_token"]

    # a session
    lost, kept = await here.sign_in(client, mika.username), await there.sign_in(client, mika.username)
    token = kept["access_token"]
    assert (await there("GET", "/users/me", token=lost["access_token"])).status_code == 200
    sessions = (await here("GET", "/users/me/sessions", token=token)).json()["items"]
    [other] = [session["id"] for session in sessions if not session["current"]]
    assert (await here("DELETE", f"/users/me/sessions/{other}", token=token)).status_code == 204
    assert (await there("GET", "/users/me", token=lost["access_token"])).status_code == 401
    refused = await there.token(client, grant_type="refresh_token", refresh_token=lost["refresh_token"])
    assert refused.json()["error"] == "invalid_grant"
    assert (await there("GET", "/users/me", token=token)).status_code == 200

    # an API key
    body = {"name": "Script", "scope": list(OWN)}
    made = (await here("POST", "/users/me/api-keys", body, token=token)).json()
    assert (await there("GET", "/users/me", key=made["key"])).status_code == 200
    path = f"/users/me/api-keys/{made['id']}"
    rotated = (await here("POST", f"{path}/rotate", {"overlap": 0}, token=token)).json()
    assert (await there("GET", "/users/me", key=made["key"])).status_code == 401
    assert (await there("GET", "/users/me", key=rotated["key"])).status_code == 200
    assert (await here("DELETE", path, token=token)).status_code == 204
    assert (await there("GET", "/users/me", key=rotated["key"])).status_code == 401

    # a role
    role = f"/admin/users/{mika.id}/role"
    assert (await there("GET", "/admin/users", token=token)).status_code == 200
    assert (await here("PUT", role, {"role": "user"}, token=operator)).status_code == 200
    assert (await there("GET", "/admin/users", token=token)).status_code == 403
    await asyncio.sleep(1)  # for as long a role may be remembered by who issues tokens
    assert "users:read" not in (await there.sign_in(client, mika.username))["scope"].split()
    assert (await here("PUT", role, {"role": "moderator"}, token=operator)).status_code == 200
    assert (await there("GET", "/admin/users", token=token)).status_code == 200
    await asyncio.sleep(1)
    assert "users:read" in (await there.sign_in(client, mika.username))["scope"].split()

    # a password
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert (await here("POST", "/users/me/password", body, token=token)).status_code == 204
    assert (await there("GET", "/users/me", token=token)).status_code == 401
    old = await there.token(client, grant_type="password", username=mika.username, password=PASSWORD)
    assert old.json()["error"] == "invalid_grant"
    await there.sign_in(client, mika.username, NEW_PASSWORD)


@pytest.mark.case("KEY-05")
@pytest.mark.case("KEY-06")
@pytest.mark.case("ADM-10")
async def test_what_ends_at_one_server_ends_at_the_other_with_redis_and_without(
    database_url: str, redis_url: str
) -> None:
    """The database alone says what is so: Redis may go, fall silent and come back, and nothing lives again."""
    async with (
        FaultProxy.before(redis_url) as network,
        running(test_settings(database_url), SystemClock()) as hand,
        replicas(database_url, network.through(redis_url)) as both,
    ):
        await they_are_one_service(hand, *both)
        network.refuse()
        network.cut()
        await they_are_one_service(hand, *both)
        network.blackhole()
        await they_are_one_service(hand, *both)
        network.heal()
        await they_are_one_service(hand, *both)
