"""
Going from one version to the next and back, with the real earlier versions out of the history.

Each earlier version runs as it was committed, with today's libraries, beside its successor on one PostgreSQL and Redis.
"""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from identity_service.infra.migrate import connected, migrate
from identity_service.infra.tables import OLDEST_SCHEMA_REVISION, SCHEMA_REVISION
from tests.support.migrations import downgrade, revisions, shape
from tests.support.server_process import ServerProcess
from tests.support.servers import PostgresServer
from tests.support.service import ISSUER, PASSWORD
from tests.support.tokens import parts_of
from tests.support.versions import ROOT, THIS, HistoryMissing, Version, earlier_versions

INTROSPECTION, API_KEYS = "0002", "0003"
"""The schema revisions that these came with."""
PEOPLE = ("ada", "grace", "edsger", "barbara", "donald", "radia")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    """Every version that had a schema of its own, the oldest first and the working tree last."""
    return [*earlier_versions(tmp_path_factory.mktemp("versions")), THIS]


@pytest.fixture
def empty_url(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[str]:
    """The URL of a database in which there is nothing."""
    name = f"upgrades_{tmp_path.parent.parent.name}_{tmp_path.name}".replace("-", "_").lower()[-60:]
    postgres_server.drop_database(name)
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'identity.db'}"
    found: str = request.getfixturevalue("empty_url")
    return found


@dataclass(frozen=True)
class Clients:
    """The clients that a version has registered: an app for people, and a service that asks what tokens are worth."""

    app: str
    service: tuple[str, str]


def prepare(version: Version, url: str) -> Clients:
    """Have a version make its schema, its clients and its people."""
    grants = ("--grant", "password", "--grant", "refresh_token")
    scope = ("--scope", "account:read account:write", "--audience", ISSUER)
    with version.commands(url) as run:
        run("migrate")
        app = json.loads(run("clients", "create", "app", "--public", "--first-party", *grants, *scope, "--json"))
        asks = ("--grant", "client_credentials", "--introspect", ISSUER)
        service = json.loads(run("clients", "create", "service", *asks, "--json"))
        for name in PEOPLE:
            email = ("--email", f"{name}@example.org")
            run("users", "create", name, *email, "--password-stdin", stdin=f"{PASSWORD}\n")
    return Clients(app["client_id"], (service["client_id"], service["client_secret"]))


@dataclass
class Replica:
    """One server of one version, asked over its socket."""

    version: Version
    server: ServerProcess
    http: httpx2.AsyncClient
    clients: Clients
    in_flight: int = 0

    async def token(self, **form: str) -> httpx2.Response:
        return await self.http.post("/token", data={"client_id": self.clients.app, **form})

    async def sign_in(self, name: str) -> dict[str, Any]:
        return self._good(await self.token(grant_type="password", username=name, password=PASSWORD))

    async def refresh(self, tokens: dict[str, Any]) -> dict[str, Any]:
        return self._good(await self.try_refresh(tokens))

    async def try_refresh(self, tokens: dict[str, Any]) -> httpx2.Response:
        return await self.token(grant_type="refresh_token", refresh_token=tokens["refresh_token"])

    async def me(self, tokens: dict[str, Any]) -> int:
        """Return with what status a person's own data are answered."""
        return (await self.http.get("/v1/users/me", headers=bearer(tokens))).status_code

    async def active(self, tokens: dict[str, Any]) -> bool:
        """Return what introspection says."""
        form = {"token": tokens["access_token"]}
        found: bool = self._good(await self.http.post("/introspect", data=form, auth=self.clients.service))["active"]
        return found

    async def revoke(self, tokens: dict[str, Any]) -> None:
        form = {"token": tokens["refresh_token"], "client_id": self.clients.app}
        assert (await self.http.post("/revoke", data=form)).status_code == 200

    async def kids(self) -> list[str]:
        return [key["kid"] for key in self._good(await self.http.get("/.well-known/jwks.json"))["keys"]]

    def _good(self, answer: httpx2.Response) -> dict[str, Any]:
        assert answer.status_code == 200, f"{self.version}: {answer.text}"
        body: dict[str, Any] = answer.json()
        return body


def bearer(tokens: dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {tokens['access_token']}"}


@asynccontextmanager
async def replica(version: Version, url: str, clients: Clients, redis_url: str | None = None) -> AsyncIterator[Replica]:
    """Start a server of a version, without holding up what else this process does."""
    server = await asyncio.to_thread(version.serve, url, redis_url, issuer=ISSUER, key_poll="0.2")
    try:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            yield Replica(version, server, http, clients)
    finally:
        await asyncio.to_thread(server.close)


async def until_equal(here: Replica, there: Replica) -> list[str]:
    """Return the keys that both publish, as soon as they agree; a replica looks five times a second."""
    deadline = time.monotonic() + 60
    while (kids := await here.kids()) != (others := await there.kids()):
        assert time.monotonic() < deadline, (kids, others)
        await asyncio.sleep(0.1)
    return kids


async def drive(here: Replica, there: Replica) -> None:
    """Do at `here` what people do, and see at `there` that it counts."""
    kids = await until_equal(here, there)
    tokens = await here.sign_in("ada")
    first = tokens
    for turn in range(6):
        assert parts_of(tokens["access_token"])[0]["kid"] in kids
        assert [await each.me(tokens) for each in (here, there)] == [200, 200]
        tokens = await (there, here)[turn % 2].refresh(tokens)
    if min(here.version.schema, there.version.schema) >= INTROSPECTION:
        assert [await each.active(tokens) for each in (here, there)] == [True, True]
    replay = await there.try_refresh(first)
    assert replay.json()["error_description"] == "refresh token reuse detected; session revoked"
    assert (await here.try_refresh(tokens)).json()["error"] == "invalid_grant"
    assert [await each.me(tokens) for each in (here, there)] == [401, 401]

    ended = await here.sign_in("grace")
    assert await there.me(ended) == 200
    await here.revoke(ended)
    assert (await there.try_refresh(ended)).json()["error"] == "invalid_grant"
    assert await there.me(ended) == 401
    if min(here.version.schema, there.version.schema) >= INTROSPECTION:
        assert not await there.active(ended)

    if min(here.version.schema, there.version.schema) >= API_KEYS:
        owner = await here.sign_in("edsger")
        new = {"name": "script", "scope": ["account:read"]}
        made = await here.http.post("/v1/users/me/api-keys", headers=bearer(owner), json=new)
        assert made.status_code == 201, made.text
        key = {"x-api-key": made.json()["key"]}
        assert (await there.http.get("/v1/users/me", headers=key)).status_code == 200
        await here.http.delete(f"/v1/users/me/api-keys/{made.json()['id']}", headers=bearer(owner))
        assert (await there.http.get("/v1/users/me", headers=key)).status_code == 401


@pytest.mark.case("OPS-17")
async def test_this_version_and_the_one_before_it_are_one_service_on_either_schema(
    versions: list[Version], empty_url: str, redis_url: str
) -> None:
    """
    Side by side they take each other's tokens, on the oldest schema that this one works on and on the newest.

    The schema moves on under both of them while they serve.
    """
    before = versions[-2]
    clients = await asyncio.to_thread(prepare, before, empty_url)
    if before.schema < OLDEST_SCHEMA_REVISION:
        await asyncio.to_thread(migrate, empty_url, revision=OLDEST_SCHEMA_REVISION)
    async with (
        replica(before, empty_url, clients, redis_url) as old,
        replica(THIS, empty_url, clients, redis_url) as new,
    ):
        for step in ("on the oldest schema", "on the newest"):
            if step == "on the newest":
                await asyncio.to_thread(migrate, empty_url)
            await drive(old, new)
            await drive(new, old)
            for each in (old, new):
                assert (await each.http.get("/readyz")).status_code == 200, step


@pytest.mark.case("OPS-17")
async def test_every_version_worked_beside_its_successor(
    versions: list[Version], postgres_server: PostgresServer, redis_url: str
) -> None:
    """From the first migration on: each on its successor's schema, with its successor running on the same database."""
    for older, newer in itertools.pairwise(versions[:-1]):
        name = f"beside_{os.getpid()}_{newer.schema}"
        url = postgres_server.create_database(name)
        try:
            clients = await asyncio.to_thread(prepare, older, url)
            await asyncio.to_thread(newer.command, "migrate", database_url=url)
            async with (
                replica(older, url, clients, redis_url) as here,
                replica(newer, url, clients, redis_url) as there,
            ):
                await drive(here, there)
                await drive(there, here)
        finally:
            postgres_server.drop_database(name)


class Balancer:
    """What stands before the replicas: hands out who is in rotation, and lets nobody go who still has to answer."""

    def __init__(self, url: str, redis_url: str, clients: Clients) -> None:
        self._where = (url, redis_url, clients)
        self._running: dict[int, AsyncExitStack] = {}
        self.rotation: list[Replica] = []
        self.answers: Counter[str] = Counter()

    async def join(self, version: Version) -> Replica:
        """Start a replica and put it into rotation once it says that it is ready."""
        url, redis_url, clients = self._where
        stack = AsyncExitStack()
        made = await stack.enter_async_context(replica(version, url, clients, redis_url))
        self._running[id(made)] = stack
        self.rotation.append(made)
        return made

    async def leave(self, leaving: Replica) -> None:
        """Take a replica out of rotation, let it finish, and end it as a deployment does."""
        self.rotation.remove(leaving)
        while leaving.in_flight:  # noqa: ASYNC110  # it takes milliseconds, and is no event of ours
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(leaving.server.stop) == 0, leaving.server.log_text()
        await self._running.pop(id(leaving)).aclose()

    async def close(self) -> None:
        for stack in self._running.values():
            await stack.aclose()

    @asynccontextmanager
    async def next(self, turn: int) -> AsyncIterator[Replica]:
        """Yield the replica whose turn it is."""
        chosen = self.rotation[turn % len(self.rotation)]
        chosen.in_flight += 1
        try:
            yield chosen
            self.answers[chosen.version.schema] += 1
        finally:
            chosen.in_flight -= 1


@pytest.mark.case("OPS-17")
async def test_no_refresh_fails_while_a_version_is_rolled_out_and_taken_back(
    versions: list[Version], empty_url: str, redis_url: str
) -> None:
    """
    Two replicas of the version before, the migration, two of this one, and back: under refreshes all the while.

    Nobody sends an Idempotency-Key, so one lost rotation would end a family. The schema stays at its newest when the
    version before comes back.
    """
    before = versions[-2]
    clients = await asyncio.to_thread(prepare, before, empty_url)
    balancer = Balancer(empty_url, redis_url, clients)
    refreshes: Counter[str] = Counter()
    done = asyncio.Event()

    async def person(number: int, name: str) -> dict[str, Any]:
        async with balancer.next(number) as where:
            tokens = await where.sign_in(name)
        for turn in itertools.count(number):
            if done.is_set():
                return tokens
            async with balancer.next(turn) as where:
                tokens = await where.refresh(tokens)
            refreshes[name] += 1
            async with balancer.next(turn + 1) as where:
                assert await where.me(tokens) == 200
            await asyncio.sleep(0.02)
        raise AssertionError

    async def more(number: int = 8) -> None:
        """Return when everybody has refreshed so many times more."""
        reached = dict(refreshes)
        while any(refreshes[name] < reached.get(name, 0) + number for name in PEOPLE):
            await asyncio.sleep(0.02)
            for task in people:
                if task.done():
                    await task  # it has failed, and says why

    people: list[asyncio.Task[dict[str, Any]]] = []
    try:
        old = [await balancer.join(before) for _ in range(2)]
        people += [asyncio.create_task(person(number, name)) for number, name in enumerate(PEOPLE)]
        await more()
        await asyncio.to_thread(THIS.command, "migrate", database_url=empty_url)
        await more()
        new = [await balancer.join(THIS) for _ in range(2)]
        await more()
        for each in old:
            await balancer.leave(each)
        await more()
        assert {each.version for each in balancer.rotation} == {THIS}
        back = [await balancer.join(before) for _ in range(2)]
        await more()
        for each in new:
            await balancer.leave(each)
        await more()
        assert {each.version for each in balancer.rotation} == {before}
        done.set()
        last = await asyncio.gather(*people)
        for tokens in last:
            assert await back[0].me(await back[1].refresh(tokens)) == 200
        assert all(balancer.answers[version.schema] > 16 * len(PEOPLE) for version in (before, THIS))
    finally:
        for task in people:
            task.cancel()
        await asyncio.gather(*people, return_exceptions=True)
        await balancer.close()
    with connected(empty_url) as connection:
        found = connection.exec_driver_sql("SELECT generation, revoked_at FROM refresh_families").all()
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == SCHEMA_REVISION
    THIS.command("audit", "verify", database_url=empty_url)
    assert sorted(found) == sorted((count + 1, None) for count in refreshes.values())


# -- what is kept -----------------------------------------------------------------------------------------------------


def contents(url: str, columns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return these columns of every row, as they print."""
    found = {}
    with connected(url) as connection:
        for table, names in columns.items():
            listed = ", ".join(f'"{name}"' for name in names)
            rows = connection.exec_driver_sql(f'SELECT {listed} FROM "{table}"').all()  # noqa: S608  # our own names
            found[table] = sorted(map(repr, rows))
    found["locks"] = [row for row in found["locks"] if "administrators" not in row]  # revision 0003 makes it
    return found


async def test_what_the_first_version_made_is_kept_by_every_revision_up_and_down(
    versions: list[Version], url: str
) -> None:
    """
    People, clients, keys, sessions and the audit trail of the first code that there was.

    Each revision leaves every value of before as it was, up and down, and does nothing when it is run again. Then what
    was made at the beginning works with this code, and what this code went on with works with the first again.
    """
    first = versions[0]
    clients = await asyncio.to_thread(prepare, first, url)
    async with replica(first, url, clients) as begun:
        tokens = await begun.sign_in("ada")
        spent = await begun.sign_in("grace")
        renewed = await begun.refresh(spent)
        gone = await begun.sign_in("edsger")
        await begun.revoke(gone)
        kids = await begun.kids()
        await asyncio.to_thread(begun.server.stop)
    first.command("users", "disable", "barbara", database_url=url)
    columns = shape(url)
    made = contents(url, columns)
    assert all(made[name] for name in ("users", "clients", "refresh_families", "signing_keys", "audit_events"))

    for revision in revisions()[1:]:
        await asyncio.to_thread(migrate, url, revision=revision)
        assert contents(url, columns) == made, revision
        everything = contents(url, shape(url))
        await asyncio.to_thread(migrate, url, revision=revision)
        assert contents(url, shape(url)) == everything, revision

    async with replica(THIS, url, clients) as now:
        assert set(kids) <= set(await now.kids())
        assert await now.me(tokens) == 200
        tokens = await now.refresh(tokens)
        replay = await now.try_refresh(spent)
        assert replay.json()["error_description"] == "refresh token reuse detected; session revoked"
        for dead in (renewed, gone):
            assert (await now.try_refresh(dead)).json()["error"] == "invalid_grant"
        assert (await now.sign_in("donald"))["refresh_token"]
        refused = await now.token(grant_type="password", username="barbara", password=PASSWORD)
        assert refused.json()["error"] == "invalid_grant"
        # One that is killed may have said COMMIT in its last moment, and be heard after the look at the rows.
        await asyncio.to_thread(now.server.stop)

    made = contents(url, columns)
    for revision in reversed(revisions()[:-1]):
        await asyncio.to_thread(downgrade, url, revision)
        assert contents(url, columns) == made, revision
    assert shape(url) == columns
    async with replica(first, url, clients) as again:
        assert await again.me(tokens) == 200
        assert (await again.refresh(tokens))["refresh_token"]
        assert (await again.sign_in("radia"))["refresh_token"]


# -- the history ------------------------------------------------------------------------------------------------------


def git(*words: str | Path) -> None:
    subprocess.run(["git", "-c", "safe.directory=*", *words], check=True, capture_output=True, timeout=120)


def test_a_clone_without_history_is_told_how_to_get_it(tmp_path: Path) -> None:
    """Upgrades that were not tried must not look as if they had been."""
    git("clone", "--quiet", "--depth", "1", f"file://{ROOT}", tmp_path / "shallow")
    with pytest.raises(HistoryMissing, match="git fetch --unshallow"):
        earlier_versions(tmp_path / "versions", tmp_path / "shallow")


def test_a_copy_without_git_is_told_to_be_cloned(tmp_path: Path) -> None:
    """An archive of the tree has no earlier versions in it."""
    shutil.copytree(ROOT / "identity_service", tmp_path / "copy" / "identity_service")
    with pytest.raises(HistoryMissing, match="git clone"):
        earlier_versions(tmp_path / "versions", tmp_path / "copy")


def test_every_schema_before_this_one_has_its_version(versions: list[Version]) -> None:
    """From the first migration on; each comes with the migrations up to its own."""
    assert [version.schema for version in versions] == sorted({version.schema for version in versions})
    assert versions[0].schema == revisions()[0]
    for version in versions:
        [head] = sorted(path.name for path in (version.folder / "migrations" / "versions").glob("*.py"))[-1:]
        assert head.startswith(version.schema)
