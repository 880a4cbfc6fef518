"""
What the service says while PostgreSQL or Redis is away, and that nothing was lost when they are back.

Whoever hears `invalid_grant` in an outage throws a good refresh token away; so trouble behind us is always 503.
"""

import asyncio
import itertools
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch

import httpx2
import psycopg
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.engine import make_url

from identity_service.infra.database import Database
from identity_service.infra.migrate import migrate
from identity_service.infra.runtime import SystemClock
from tests.support.server_process import ServerProcess
from tests.support.servers import LocalPostgres, LocalRedis, own_postgres, own_redis
from tests.support.service import ISSUER, PASSWORD, Registered, Service, prepare_keys, running, test_settings
from tests.support.tokens import parts_of
from tests.support.waiting import until

_TEMPLATE = "outage_template"
_BEARABLE = 5.0  # seconds; an answer takes none while all is well, and whoever waits for what never comes waits longer
_numbers = itertools.count(1)


# -- a PostgreSQL that can be stopped ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[LocalPostgres]:
    """A PostgreSQL of this module's own, with a database to copy."""
    with own_postgres() as server:
        url = server.create_database(_TEMPLATE)
        migrate(url)
        asyncio.run(prepare_keys(test_settings(url)))
        yield server


@pytest.fixture
def postgres(own_server: LocalPostgres) -> Iterator[LocalPostgres]:
    """The same, running when the test begins and again when it has ended."""
    yield own_server
    if own_server._box.pid is None:
        own_server.start()


@pytest.fixture
async def shaky(postgres: LocalPostgres) -> AsyncIterator[Service]:
    """The service on a PostgreSQL that the test may stop."""
    url = postgres.create_database(f"outage_{next(_numbers)}", _TEMPLATE)
    async with running(test_settings(url, key_poll=5)) as service:
        yield service


@pytest.fixture
async def impatient(postgres: LocalPostgres) -> AsyncIterator[Service]:
    """The service with one connection, which waits no longer than in production."""
    url = postgres.create_database(f"outage_{next(_numbers)}", _TEMPLATE)
    async with running(test_settings(url, key_poll=5, database_pool_size=1), patient=False) as service:
        yield service


def unavailable(answer: httpx2.Response) -> None:
    """The one answer to give while something behind us is away."""
    assert answer.status_code == 503, (answer.status_code, answer.text)
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["cache-control"] == "no-store"
    assert "www-authenticate" not in answer.headers
    if answer.headers["content-type"] == "application/json":
        assert answer.json()["error"] == "temporarily_unavailable"
    else:
        assert answer.headers["content-type"] == "application/problem+json"


async def eventually_ready(service: Service) -> None:
    """Wait until the probe, which remembers its answer for a second, has noticed that all is well."""

    async def ready() -> bool:
        return bool((await service.http.get("/readyz")).status_code == 200)

    await until(ready, "it should be ready again")


Asking = Callable[[], Awaitable[httpx2.Response]]


async def every_request(service: Service, client: Registered, user: Any, tokens: dict[str, Any]) -> dict[str, Asking]:
    """Return everything that needs the database, by name."""
    server = await service.a_client(grant_types=(), introspect=(ISSUER,))
    return {
        "password": lambda: service.token(client, grant_type="password", username=user.username, password=PASSWORD),
        "wrong password": lambda: service.token(client, grant_type="password", username=user.username, password="no"),
        "refresh_token": lambda: service.refresh(client, tokens["refresh_token"]),
        "client_credentials": lambda: service.token(client, grant_type="client_credentials"),
        "wrong secret": lambda: service.token(Registered(client.id, "wrong"), grant_type="client_credentials"),
        "unknown client": lambda: service.token(Registered("cl_" + "0" * 22, "x"), grant_type="client_credentials"),
        "revoke": lambda: service.http.post("/revoke", data={"token": tokens["refresh_token"]}, auth=client.auth),
        "revoke access token": lambda: service.revoke(client, tokens["access_token"]),
        "introspect": lambda: service.introspect(server, tokens["access_token"]),
        "bearer": lambda: service.me(tokens["access_token"]),
    }


@pytest.mark.rfc("7009", "2.2.1")
@pytest.mark.case("OPS-01")
@pytest.mark.case("INT-05")
async def test_an_outage_of_the_database_is_told_as_such_and_ends_no_session(
    shaky: Service, postgres: LocalPostgres
) -> None:
    """
    503 for everything that needs it, also where the answer would have been a refusal; 200 for what does not.

    Afterwards everything goes on without a restart, with the very token that met the outage.
    """
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    documents = ["/.well-known/jwks.json", "/.well-known/openid-configuration", "/healthz"]
    before = [(await shaky.http.get(path)).content for path in documents]
    shaky.clock.advance(2)  # nothing is remembered for longer than a second
    requests = await every_request(shaky, client, user, tokens)

    postgres.stop("immediate")
    for _ in range(2):
        for name, ask in requests.items():
            began = time.monotonic()
            answer = await ask()
            assert time.monotonic() - began < _BEARABLE, name
            unavailable(answer)
    assert [(await shaky.http.get(path)).content for path in documents] == before
    await asyncio.sleep(1)
    probe = await shaky.http.get("/readyz")
    assert (probe.status_code, probe.json()["database"]) == (503, "unreachable")
    assert (await shaky.http.get("/healthz")).status_code == 200

    postgres.start()
    await eventually_ready(shaky)
    assert (await requests["bearer"]()).status_code == 200
    assert (await requests["introspect"]()).json()["active"] is True
    assert (await requests["client_credentials"]()).status_code == 200
    assert (await requests["wrong secret"]()).status_code == 401
    assert (await requests["unknown client"]()).status_code == 401
    assert (await requests["password"]()).status_code == 200
    refreshed = await requests["refresh_token"]()
    assert refreshed.status_code == 200
    assert (await shaky.refresh(client, refreshed.json()["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-01")
async def test_an_outage_between_the_client_and_the_grant_is_no_refusal_either(
    shaky: Service, postgres: LocalPostgres
) -> None:
    """The client was remembered, so it is the grant that meets the outage."""
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    requests = await every_request(shaky, client, user, tokens)
    postgres.stop()
    await requests["introspect"]()
    for name in ("password", "wrong password", "refresh_token", "revoke", "revoke access token", "introspect"):
        unavailable(await requests[name]())
    assert (await requests["client_credentials"]()).status_code == 200, "it needs nothing but the client and a key"
    postgres.start()
    assert (await requests["refresh_token"]()).status_code == 200


@pytest.mark.case("OPS-01")
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_of_the_database_is_noticed_once_for_all_connections(
    shaky: Service, postgres: LocalPostgres, mode: Any
) -> None:
    """The first one that turns out to be dead speaks for the rest of the pool; the request is simply tried again."""
    client, user = await shaky.a_client(), await shaky.a_user()
    token = (await shaky.sign_in(client, user))["refresh_token"]
    await asyncio.gather(*(shaky.execute(text("SELECT pg_sleep(0.05)")) for _ in range(8)))
    postgres.stop(mode)
    postgres.start()
    for _ in range(10):
        answer = await shaky.refresh(client, token)
        assert answer.status_code == 200, answer.text
        token = answer.json()["refresh_token"]


@pytest.mark.case("OPS-01")
@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.parametrize("name", ["password", "refresh_token", "client_credentials", "revoke", "introspect", "bearer"])
async def test_a_restart_of_the_database_between_two_requests_costs_at_most_a_retry(
    shaky: Service, postgres: LocalPostgres, name: str, mode: Any
) -> None:
    """Every pooled connection is dead and does not know it yet."""
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    requests = await every_request(shaky, client, user, tokens)
    await asyncio.gather(*(shaky.execute(text("SELECT pg_sleep(0.05)")) for _ in range(8)))
    shaky.clock.advance(2)
    postgres.stop(mode)
    postgres.start()
    answer = await requests[name]()
    if answer.status_code != 200:
        unavailable(answer)
        assert (await requests[name]()).status_code == 200
    again = await asyncio.gather(*(shaky.me(tokens["access_token"]) for _ in range(8)))
    assert {answer.status_code for answer in again} == ({401} if name == "revoke" else {200})


@contextmanager
def by_hand(service: Service) -> Iterator[Any]:
    """A session beside the service's, in the test's hand."""
    address = make_url(service.services.settings.database).set(drivername="postgresql")
    with psycopg.connect(address.render_as_string(hide_password=False), autocommit=True) as connection:
        yield connection


@contextmanager
def locked(service: Service, table: str) -> Iterator[None]:
    """Hold every row of a table, as somebody's unfinished transaction would."""
    with by_hand(service) as connection, connection.transaction():
        connection.execute(f"SELECT 1 FROM {table} FOR UPDATE")  # noqa: S608  # a constant of this file
        yield


async def stuck(connection: Any) -> int:
    """Wait until one of the service's sessions waits for a lock; return its process id."""
    found: list[int] = []

    def somebody_waits() -> bool:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchall()
        found[:] = [row[0] for row in rows]
        return bool(found)

    await until(somebody_waits, "the request should be waiting for the lock")
    return found[0]


@pytest.mark.case("OPS-03")
@pytest.mark.parametrize(("name", "table"), [("refresh_token", "refresh_families"), ("password", "users")])
async def test_a_connection_killed_in_mid_transaction_loses_nothing(shaky: Service, name: str, table: str) -> None:
    """Before COMMIT everybody knows that nothing happened, so the service tries again by itself, and succeeds."""
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    requests = await every_request(shaky, client, user, tokens)
    with by_hand(shaky) as connection:
        with locked(shaky, table):
            asking = asyncio.create_task(requests[name]())
            for _ in range(2):
                killed = await stuck(connection)
                connection.execute("SELECT pg_terminate_backend(%s, 30000)", [killed])
            assert await stuck(connection) != killed
        answer = await asking
        left_over = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
        ).fetchone()
    assert answer.status_code == 200, answer.text
    assert left_over == (0,)
    families = await shaky.family_rows()
    assert [family.generation for family in families] == ([1] if name == "refresh_token" else [0, 0])
    assert (await shaky.refresh(client, answer.json()["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-03")
async def test_who_loses_every_attempt_hears_503_and_keeps_the_token(shaky: Service) -> None:
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    with by_hand(shaky) as connection, locked(shaky, "refresh_families"):
        asking = asyncio.create_task(shaky.refresh(client, tokens["refresh_token"]))
        for _ in range(3):
            connection.execute("SELECT pg_terminate_backend(%s, 30000)", [await stuck(connection)])
        unavailable(await asking)
    (family,) = await shaky.family_rows()
    assert (family.generation, family.revoked_at) == (0, None)
    assert (await shaky.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-06")
@pytest.mark.parametrize("how", ["the lock's own limit", "a cancelled statement"])
async def test_a_wait_that_takes_too_long_is_given_up_with_503(impatient: Service, how: str) -> None:
    """A statement past its limit ends as a cancelled one does (57014); both leave the token as it was."""
    client, user = await impatient.a_client(), await impatient.a_user()
    tokens = await impatient.sign_in(client, user)
    took: list[float] = []
    while len(took) < 3 and not (took and took[-1] < 4):  # the machine may have stood still meanwhile
        with by_hand(impatient) as connection, locked(impatient, "refresh_families"):
            began = time.monotonic()
            asking = asyncio.create_task(impatient.refresh(client, tokens["refresh_token"]))
            waiting = await stuck(connection)
            if how == "a cancelled statement":
                connection.execute("SELECT pg_cancel_backend(%s)", [waiting])
            unavailable(await asking)
            took.append(time.monotonic() - began)
    assert took[-1] < 4, took
    assert (await impatient.refresh(client, tokens["refresh_token"])).status_code == 200


_FAULT = """
CREATE SEQUENCE attempts;
GRANT USAGE ON SEQUENCE attempts TO PUBLIC;
CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('attempts') <= {times} THEN RAISE EXCEPTION 'made up' USING ERRCODE = '{code}'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER fault BEFORE UPDATE ON refresh_families FOR EACH ROW EXECUTE FUNCTION fault();
"""


def attempts(connection: Any) -> int:
    return int(connection.execute("SELECT last_value FROM attempts").fetchone()[0])


@pytest.mark.case("OPS-06")
@pytest.mark.parametrize("code", ["40001", "40P01"])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_conflict_is_tried_again_a_few_times(shaky: Service, code: str, times: int) -> None:
    """Serialization failure and deadlock: the transaction left no trace, so the client need not hear of it."""
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    with by_hand(shaky) as connection:
        connection.execute(_FAULT.format(code=code, times=times))
        answer = await shaky.refresh(client, tokens["refresh_token"])
        assert attempts(connection) == times + 1
    assert answer.status_code == 200
    (family,) = await shaky.family_rows()
    assert family.generation == 1


@pytest.mark.case("OPS-06")
@pytest.mark.parametrize(
    ("code", "tried"),
    [("40001", 3), ("40P01", 3), ("57P01", 3), ("55P03", 1), ("57014", 1), ("53100", 1), ("53200", 1), ("25006", 1)],
)
async def test_trouble_that_stays_is_503_after_a_bounded_number_of_attempts(
    shaky: Service, code: str, tried: int
) -> None:
    """Disk full, out of memory, read-only, lock timeout: never 500, never a refusal, and the token stays good."""
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    with by_hand(shaky) as connection:
        connection.execute(_FAULT.format(code=code, times=1000))
        unavailable(await shaky.refresh(client, tokens["refresh_token"]))
        assert attempts(connection) == tried
        connection.execute("DROP TRIGGER fault ON refresh_families")
    assert (await shaky.refresh(client, tokens["refresh_token"])).status_code == 200


@pytest.mark.case("OPS-04")
async def test_a_database_that_only_reads_is_an_outage_for_what_writes(shaky: Service) -> None:
    """As a replica is after a fail-over to the wrong one."""
    client, user = await shaky.a_client(), await shaky.a_user()
    tokens = await shaky.sign_in(client, user)
    name = make_url(shaky.services.settings.database).database
    requests = await every_request(shaky, client, user, tokens)
    with by_hand(shaky) as connection:
        for read_only in ("on", "off"):
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {read_only}")
            await shaky.services.db.engine.dispose()
            if read_only == "on":
                for writes in ("password", "refresh_token", "revoke", "wrong password"):
                    unavailable(await requests[writes]())
                assert (await requests["bearer"]()).status_code == 200
    assert (await requests["refresh_token"]()).status_code == 200
    assert (await requests["password"]()).status_code == 200


@pytest.mark.case("OPS-08")
async def test_when_every_connection_is_taken_requests_are_turned_away_soon(impatient: Service) -> None:
    """The probe of liveness does not queue behind them; and as soon as there is a connection, all is well."""
    client, user = await impatient.a_client(), await impatient.a_user()
    tokens = await impatient.sign_in(client, user)
    async with impatient.services.db.transaction() as tx:
        await tx.execute(text("SELECT 1"))
        began = time.monotonic()
        asking = [asyncio.create_task(impatient.refresh(client, tokens["refresh_token"])) for _ in range(3)]
        await asyncio.sleep(0.1)
        with patch.object(Database, "transaction", side_effect=AssertionError("who waits for a connection, queues")):
            assert (await impatient.http.get("/healthz")).status_code == 200
            assert (await impatient.http.get("/.well-known/jwks.json")).status_code == 200
        for answer in await asyncio.gather(*asking):
            unavailable(answer)
        assert time.monotonic() - began < 6, "after seven seconds PostgreSQL's silence would have ended it"
    assert (await impatient.refresh(client, tokens["refresh_token"])).status_code == 200


# -- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_server_of_ours() -> Iterator[LocalRedis]:
    with own_redis() as server:
        yield server


@contextmanager
def silent(*, full: bool) -> Iterator[str]:
    """A server that takes everything and gives nothing; a full one does not even accept."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8 if full else 0):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


async def sign_in_works_and_is_limited(service: Service) -> None:
    """Right passwords get through, guessing does not go on for long, and no request takes long."""
    client, user, victim = await service.a_client(), await service.a_user(), await service.a_user()
    slowest = 0.0

    async def timed(asking: Awaitable[httpx2.Response]) -> httpx2.Response:
        nonlocal slowest
        began = time.monotonic()
        answer = await asking
        slowest = max(slowest, time.monotonic() - began)
        return answer

    for _ in range(3):
        answer = await timed(service.token(client, grant_type="password", username=user.username, password=PASSWORD))
        assert answer.status_code == 200, answer.text
    assert (await timed(service.refresh(client, answer.json()["refresh_token"]))).status_code == 200
    statuses = []
    for _ in range(15):
        guess = await timed(service.token(client, grant_type="password", username=victim.username, password="guess"))
        statuses.append(guess.status_code)
    assert set(statuses) == {400, 429}
    assert statuses == sorted(statuses), "once limited, limited until time has passed"
    assert statuses.count(400) <= 10
    right = await timed(service.token(client, grant_type="password", username=victim.username, password=PASSWORD))
    assert right.status_code == 429, "whoever guesses does not learn that the next one was right"
    assert (await service.http.get("/readyz")).status_code == 200
    assert slowest < _BEARABLE


@pytest.mark.parametrize("how", ["refuses", "is silent", "does not accept"])
async def test_without_redis_from_the_start_people_sign_in_and_guessing_is_slow(database_url: str, how: str) -> None:
    with ExitStack() as stack:
        if how == "refuses":
            deaf = stack.enter_context(socket.socket())  # has the port and does not listen
            deaf.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"
        else:
            url = stack.enter_context(silent(full=how == "does not accept"))
        settings = test_settings(database_url, redis_url=url, key_poll=5)
        async with running(settings, patient=False) as service:
            await sign_in_works_and_is_limited(service)


async def test_redis_may_stop_and_come_back_in_the_middle(database_url: str, redis_server_of_ours: LocalRedis) -> None:
    """While it is away the limits are this process's own, and stricter; nobody is signed out."""
    async with running(test_settings(database_url, redis_url=redis_server_of_ours.url, key_poll=5)) as service:
        await sign_in_works_and_is_limited(service)
        client, user = await service.a_client(), await service.a_user()
        tokens = await service.sign_in(client, user)
        redis_server_of_ours.stop()
        await sign_in_works_and_is_limited(service)
        refreshed = await service.refresh(client, tokens["refresh_token"])
        assert refreshed.status_code == 200
        redis_server_of_ours.start()
        await asyncio.sleep(1.05)  # it is asked again after a second
        await sign_in_works_and_is_limited(service)
        with redis.Redis.from_url(redis_server_of_ours.url) as client_of_redis:
            assert client_of_redis.dbsize() > 0, "the limits are kept there again"
        assert (await service.refresh(client, refreshed.json()["refresh_token"])).status_code == 200


# -- several processes ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def prepared(url: str) -> AsyncIterator[tuple[Registered, list[Any]]]:
    """Register a client and people in a database, as a replica that has gone by the time others come."""
    async with running(test_settings(url), SystemClock()) as service:
        client = await service.a_client()
        users = [await service.a_user() for _ in range(4)]
    yield client, users


class Remote:
    """One replica, asked over its socket."""

    def __init__(self, server: ServerProcess, client: Registered) -> None:
        self.server = server
        self.client = client
        self.http = httpx2.AsyncClient(base_url=server.url, timeout=60)

    async def token(self, *, key: str | None = None, **form: str) -> httpx2.Response:
        headers = {"idempotency-key": key} if key else {}
        return await self.http.post("/token", data=form, headers=headers, auth=self.client.auth)

    async def sign_in(self, user: Any) -> dict[str, Any]:
        answer = await self.token(grant_type="password", username=user.username, password=PASSWORD)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def refresh(self, token: str, *, key: str | None = None) -> httpx2.Response:
        return await self.token(grant_type="refresh_token", refresh_token=token, key=key)

    async def me(self, access_token: str) -> httpx2.Response:
        return await self.http.get("/v1/users/me", headers={"authorization": f"Bearer {access_token}"})


@asynccontextmanager
async def replicas(
    url: str, client: Registered, *, redis_url: str | None = None, number: int = 2
) -> AsyncIterator[Any]:
    """Start real servers under one issuer."""
    with ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess(url, redis_url, issuer=ISSUER)) for _ in range(number)]
        remotes = [Remote(server, client) for server in servers]
        try:
            yield remotes
        finally:
            for remote in remotes:
                await remote.http.aclose()


@pytest.mark.case("OPS-10")
@pytest.mark.case("REF-09")
async def test_two_servers_are_one_service(database_url: str, redis_url: str) -> None:
    """What one issues the other takes; what was used at one cannot be used at the other, even if Redis forgets all."""
    async with (
        prepared(database_url) as (client, (user, *_)),
        replicas(database_url, client, redis_url=redis_url) as (here, there),
    ):
        tokens = await here.sign_in(user)
        assert (await there.me(tokens["access_token"])).status_code == 200
        documents = [(await each.http.get("/.well-known/jwks.json")).content for each in (here, there)]
        kids = [[key["kid"] for key in json.loads(document)["keys"]] for document in documents]
        assert parts_of(tokens["access_token"])[0]["kid"] in kids[0]
        assert kids[0] == kids[1]

        second = (await there.refresh(tokens["refresh_token"])).json()
        third = (await here.refresh(second["refresh_token"])).json()
        with redis.Redis.from_url(redis_url) as client_of_redis:
            client_of_redis.flushdb()
        replay = await there.refresh(tokens["refresh_token"])
        assert replay.status_code == 400
        assert replay.json()["error_description"] == "refresh token reuse detected; session revoked"
        for each in (here, there):
            assert (await each.refresh(third["refresh_token"])).json()["error"] == "invalid_grant"
            assert (await each.me(third["access_token"])).status_code == 401

        ended = await here.sign_in(user)
        form = {"token": ended["refresh_token"]}
        assert (await here.http.post("/revoke", data=form, auth=client.auth)).status_code == 200
        assert (await there.me(ended["access_token"])).status_code == 401


@pytest.mark.case("OPS-22")
@pytest.mark.case("REF-05")
async def test_a_killed_server_takes_nothing_with_it_that_was_acknowledged(database_url: str, redis_url: str) -> None:
    """
    People refresh all the time, at both; one is killed in the middle.

    Who got no answer asks the other with the same token and key, and gets the same successor or the first one; and
    what anybody was told before the crash is still true after it.
    """
    async with (
        prepared(database_url) as (client, users),
        replicas(database_url, client, redis_url=redis_url) as (survivor, victim),
    ):
        done = asyncio.Event()
        cut_off = 0
        turns = dict.fromkeys(range(len(users)), 0)

        async def person(number: int) -> str:
            nonlocal cut_off
            token = (await survivor.sign_in(users[number]))["refresh_token"]
            while not done.is_set():
                key = secrets.token_hex(16)
                where = (survivor, victim)[turns[number] % 2]
                try:
                    answer = await where.refresh(token, key=key)
                except httpx2.TransportError:
                    cut_off += 1
                    answer = await survivor.refresh(token, key=key)
                assert answer.status_code == 200, answer.text
                token = answer.json()["refresh_token"]
                turns[number] += 1
            return token

        people = [asyncio.create_task(person(number)) for number in range(len(users))]
        while min(turns.values()) < 10:
            await asyncio.sleep(0.01)
            assert not any(each.done() for each in people)
        victim.server.kill()
        reached = dict(turns)
        while any(turns[number] < reached[number] + 10 for number in turns):
            await asyncio.sleep(0.01)
            assert not any(each.done() for each in people)
        done.set()
        latest = await asyncio.gather(*people)
        assert cut_off >= len(users)
        for token in latest:
            assert (await survivor.refresh(token)).status_code == 200
        assert (await survivor.http.get("/readyz")).status_code == 200


# -- SQLite -----------------------------------------------------------------------------------------------------------


@pytest.mark.case("OPS-24")
async def test_a_second_server_on_the_same_file_is_refused(sqlite_url: str) -> None:
    """Its caches and limits would not know of the first one's; the first one is not disturbed."""
    async with (
        prepared(sqlite_url) as (client, (user, *_)),
        replicas(sqlite_url, client, number=1) as (only,),
    ):
        with pytest.raises(RuntimeError, match="another server is running"):
            ServerProcess(sqlite_url, issuer=ISSUER)
        assert (await only.sign_in(user))["refresh_token"]


@pytest.mark.case("OPS-24")
async def test_a_killed_server_on_a_file_goes_on_where_it_was(sqlite_url: str) -> None:
    """Neither a lock nor a half-written page stands in the way; sessions and their history are still there."""
    async with prepared(sqlite_url) as (client, (user, *_)):
        async with replicas(sqlite_url, client, number=1) as (first,):
            tokens = await first.sign_in(user)
            current = (await first.refresh(tokens["refresh_token"])).json()
            first.server.kill()
        async with replicas(sqlite_url, client, number=1) as (second,):
            assert (await second.me(current["access_token"])).status_code == 200
            renewed = await second.refresh(current["refresh_token"])
            assert renewed.status_code == 200
            replay = await second.refresh(tokens["refresh_token"])
            assert replay.json()["error_description"] == "refresh token reuse detected; session revoked"
