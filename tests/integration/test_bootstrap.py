"""The first operator, made with a secret that works once."""

import asyncio
import hashlib
from typing import Any

import httpx2
import pytest
from sqlalchemy import delete, select

from identity_service.accounts.access import ADMINISTRATORS_LOCK
from identity_service.infra.runtime.hashing import PasswordHasher
from identity_service.infra.tables import audit_events, spent_bootstrap_secrets, users
from tests.support.people import an_app
from tests.support.races import blocked, held
from tests.support.service import PASSWORD, Registered, Service, running, test_settings

SECRET = "kZ2mVq8xR4tN7wB1cJ6hL9pD3sF5gY0a"
ROOT = {"secret": SECRET, "username": "root", "email": "Root@example.org", "password": PASSWORD}


@pytest.fixture(params=["database_url", "sqlite_url"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL database, then of a SQLite one."""
    found: str = request.getfixturevalue(request.param)
    return found


def settings(url: str, **changes: Any) -> Any:
    """Return settings with a bootstrap secret; every request may come from a network of its own."""
    return test_settings(url, bootstrap_secret=SECRET, trusted_proxies=("127.0.0.1",), **changes)


async def bootstrap(service: Service, network: str = "192.0.2.1", **given: Any) -> httpx2.Response:
    """Ask for the first operator."""
    return await service.http.post("/v1/bootstrap", json=ROOT | given, headers={"x-forwarded-for": network})


async def everybody(service: Service) -> list[tuple[str, str]]:
    """Return every user's name and role."""
    return [(row.username, row.role) for row in await service.execute(select(users).order_by(users.c.id))]


@pytest.mark.case("ADM-22")
async def test_the_secret_makes_the_first_operator_once(url: str) -> None:
    """With an address that counts as proven; the secret is spent, and its digest is all that is kept of it."""
    async with running(settings(url)) as service:
        answer = await bootstrap(service)
        assert answer.status_code == 201
        assert answer.headers["cache-control"] == "no-store"
        profile = answer.json()["user"]
        assert (profile["username"], profile["email"], profile["email_verified"], profile["role"]) == (
            *("root", "Root@example.org", True, "super_admin"),
        )
        again = await bootstrap(service, username="other", email="other@example.org")
        assert again.status_code == 404
        assert await everybody(service) == [("root", "super_admin")]
        [spent] = await service.execute(select(spent_bootstrap_secrets))
        assert spent.digest == hashlib.sha256(SECRET.encode()).digest()
        [event] = await service.events("bootstrap.spent")
        assert (event.target, event.network) == (profile["id"], "192.0.2.1")
        assert SECRET not in str(await service.execute(select(audit_events)))
        token = await service.token(await an_app(service), grant_type="password", username="root", password=PASSWORD)
        assert token.status_code == 200


async def test_the_first_operator_can_operate(url: str) -> None:
    """With the client that is made beside them, and without a shell: they register the next one."""
    async with running(settings(url)) as service:
        client_id = (await bootstrap(service)).json()["client_id"]
        signed_in = await service.token(
            Registered(client_id, None), grant_type="password", username="root", password=PASSWORD
        )
        headers = {"authorization": f"Bearer {signed_in.json()['access_token']}"}
        made = await service.http.post("/v1/admin/clients", json={"name": "Shop"}, headers=headers)
        assert made.status_code == 201
        assert client_id in {row.target for row in await service.events("client.created")}


@pytest.mark.case("ADM-22")
async def test_a_spent_secret_stays_dead(url: str) -> None:
    """After a restart, and after the operator it made was deleted and forgotten."""
    async with running(settings(url)) as service:
        assert (await bootstrap(service)).status_code == 201
        [user] = await service.execute(select(users))
        await service.within(lambda tx: service.services.users.delete(tx, user.id))
        assert (await bootstrap(service)).status_code == 404
        await service.execute(delete(users))
    async with running(settings(url)) as service:
        assert (await bootstrap(service)).status_code == 404
        assert await everybody(service) == []


@pytest.mark.case("ADM-22")
async def test_without_a_secret_there_is_nothing_to_try(url: str) -> None:
    """No route, no default credentials, nobody in a fresh installation."""
    async with running(test_settings(url)) as service:
        for secret in (SECRET, "", "admin"):
            assert (await bootstrap(service, secret=secret)).status_code == 404
        assert await everybody(service) == []


@pytest.mark.case("ADM-22")
async def test_where_there_is_an_operator_the_secret_makes_no_other(url: str) -> None:
    """409; it is not spent by that, and good when nobody can do everything any more."""
    async with running(settings(url)) as service:
        first = await service.a_user("first", role="super_admin")
        assert (await bootstrap(service)).status_code == 409
        assert await service.execute(select(spent_bootstrap_secrets)) == []
        await service.within(lambda tx: service.services.users.delete(tx, first.id))
        assert (await bootstrap(service)).status_code == 201


@pytest.mark.parametrize("secret", ["", SECRET[:-1], SECRET + "a", SECRET.lower(), "\u00e9" * 32, "x" * 5000])
async def test_a_wrong_secret_makes_nobody(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """403, before anything is hashed or looked up."""
    hashed: list[object] = []
    async with running(settings(sqlite_url)) as service:
        monkeypatch.setattr(PasswordHasher, "hash", lambda *given: hashed.append(given))
        answer = await bootstrap(service, secret=secret)
        assert (answer.status_code, answer.json()["title"]) == (403, "The secret is wrong.")
        assert not secret or secret not in answer.text
        assert await everybody(service) == []
    assert hashed == []


async def test_who_guesses_at_the_secret_has_to_wait(url: str) -> None:
    """Five tries, then one a minute, the right one too; other networks do not notice."""
    async with running(settings(url)) as service:
        statuses = [(await bootstrap(service, secret=f"guess {number}")).status_code for number in range(7)]
        assert statuses == [403] * 5 + [429] * 2
        assert (await bootstrap(service)).status_code == 429
        assert await everybody(service) == []
        assert (await bootstrap(service, "192.0.2.2", password="short")).status_code == 422
        service.clock.advance(60)
        assert (await bootstrap(service)).status_code == 201


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({"username": "no name"}, "/username"),
        ({"email": "nowhere"}, "/email"),
        ({"password": "password1"}, "/password"),
        ({"password": "root@example.org"}, "/password"),
        ({"role": "user"}, ""),
        ({"secret": None}, "/secret"),
    ],
)
async def test_an_operator_that_cannot_be_does_not_cost_the_secret(
    sqlite_url: str, given: dict[str, Any], pointer: str
) -> None:
    """422, and the next try is as good as the first."""
    async with running(settings(sqlite_url)) as service:
        answer = await bootstrap(service, **given)
        assert answer.status_code == 422
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
        assert (await bootstrap(service)).status_code == 201


async def test_a_name_that_is_taken_does_not_cost_the_secret(url: str) -> None:
    """409, and nothing of it is kept."""
    async with running(settings(url)) as service:
        await service.a_user("root", email="other@example.org")
        assert (await bootstrap(service)).status_code == 409
        assert await service.execute(select(spent_bootstrap_secrets)) == []
        assert (await bootstrap(service, username="other")).status_code == 201


@pytest.mark.case("ADM-22")
async def test_of_many_at_once_one_makes_an_operator(database_url: str) -> None:
    """The others find the secret spent."""
    async with running(settings(database_url)) as service:
        answers = await asyncio.gather(
            *(
                bootstrap(service, f"192.0.2.{number}", username=f"root{number}", email=f"root{number}@example.org")
                for number in range(1, 9)
            )
        )
        assert sorted(answer.status_code for answer in answers) == [201] + [404] * 7
        assert len(await everybody(service)) == 1


@pytest.mark.case("ADM-22")
async def test_who_comes_second_by_a_moment_waits_for_the_first(database_url: str) -> None:
    """Somebody who is being made an operator in another way counts as one."""
    async with running(settings(database_url)) as service, held(service) as other:
        await other.tx.lock(ADMINISTRATORS_LOCK)
        await service.services.users.create(
            other.tx,
            username="promoted",
            email="promoted@example.org",
            role="super_admin",
            password_hash="a hash",
            verified=True,
        )
        late = await blocked(service, bootstrap(service))
        await other.commit()
        assert (await late).status_code == 409
        assert await everybody(service) == [("promoted", "super_admin")]
