"""Guessing gets slower and slower, nobody can lock anybody out, and names that do not exist behave as those that do."""

from collections.abc import AsyncIterator

import httpx2
import pytest
import redis.asyncio

from identity_service.infra.ratelimit.catalogue import SIGN_IN_ACCOUNT, SIGN_IN_ACCOUNT_NETWORK, SIGN_IN_NETWORK
from identity_service.main.jobs import flush_audit
from tests.support.service import PASSWORD, Registered, Service, running, test_settings

WRONG = "wrong horse battery staple"


class Guesser:
    """Signs in from any network it likes, behind a proxy that is trusted."""

    def __init__(self, service: Service, client: Registered) -> None:
        self.service = service
        self._client = client

    async def tries(self, name: str, password: str = WRONG, *, network: str = "198.51.100.1") -> httpx2.Response:
        return await self.service.token(
            self._client,
            headers={"x-forwarded-for": network},
            grant_type="password",
            username=name,
            password=password,
        )

    async def status(self, name: str, password: str = WRONG, *, network: str = "198.51.100.1") -> int:
        return (await self.tries(name, password, network=network)).status_code

    async def fails(self, name: str, times: int, *, network: str = "198.51.100.1") -> None:
        for _ in range(times):
            assert await self.status(name, network=network) == 400


@pytest.fixture(params=["redis", "memory"])
async def guesser(request: pytest.FixtureRequest, database_url: str, redis_url: str) -> AsyncIterator[Guesser]:
    """Limits kept in Redis, and in memory; both have to agree."""
    settings = test_settings(
        database_url, redis_url=redis_url if request.param == "redis" else "", trusted_proxies="127.0.0.1"
    )
    async with running(settings) as service:
        yield Guesser(service, await service.a_client())


@pytest.fixture
async def on_redis(database_url: str, redis_url: str) -> AsyncIterator[Guesser]:
    """Limits kept in Redis."""
    async with running(test_settings(database_url, redis_url=redis_url, trusted_proxies="127.0.0.1")) as service:
        yield Guesser(service, await service.a_client())


@pytest.mark.parametrize("known", [True, False], ids=["a user", "nobody"])
async def test_each_wrong_guess_makes_the_next_wait_longer(guesser: Guesser, known: bool) -> None:
    """Ten at once, then 2, 4, 8 … seconds, a quarter of an hour at most; for names that nobody has as well."""
    name = (await guesser.service.a_user()).username if known else "nobody.at.all"
    await guesser.fails(name, SIGN_IN_ACCOUNT_NETWORK.burst)
    waits = []
    for _ in range(11):
        limited = await guesser.tries(name)
        assert limited.status_code == 429
        waits.append(int(limited.headers["retry-after"]))
        assert limited.headers["ratelimit-reset"] == limited.headers["retry-after"]
        guesser.service.clock.advance(waits[-1] - 0.001)
        assert await guesser.status(name) == 429
        guesser.service.clock.advance(0.001)
        await guesser.fails(name, 1)
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]


async def test_waiting_is_for_the_right_password_too(guesser: Guesser) -> None:
    """Or the wait would be an oracle that costs nothing."""
    user = await guesser.service.a_user()
    await guesser.fails(user.username, SIGN_IN_ACCOUNT_NETWORK.burst)
    right, wrong = await guesser.tries(user.username, PASSWORD), await guesser.tries(user.username)
    assert right.status_code == wrong.status_code == 429
    assert right.json() == wrong.json()
    assert right.headers["retry-after"] == wrong.headers["retry-after"]


async def test_one_network_does_not_slow_down_another(guesser: Guesser) -> None:
    """The owner signs in from home while somebody guesses elsewhere."""
    user = await guesser.service.a_user()
    await guesser.fails(user.username, SIGN_IN_ACCOUNT_NETWORK.burst)
    assert await guesser.status(user.username) == 429
    assert await guesser.status(user.username, PASSWORD, network="203.0.113.7") == 200


async def test_a_right_password_clears_the_account(guesser: Guesser) -> None:
    """Failures count only while they are consecutive."""
    user = await guesser.service.a_user()
    for _ in range(3):
        await guesser.fails(user.username, SIGN_IN_ACCOUNT_NETWORK.burst - 1)
        assert await guesser.status(user.username, PASSWORD) == 200
    await guesser.fails(user.username, SIGN_IN_ACCOUNT_NETWORK.burst)
    assert await guesser.status(user.username) == 429


async def test_other_spellings_of_a_name_are_no_further_guesses(guesser: Guesser) -> None:
    """Case makes no other account, and so no other count: `Admin`, `aDmin`, `ADMIN@example.org` …"""
    await guesser.service.a_user("admin")
    for name in ("admin", "ADMIN", "Admin", "aDmin", "adMin", "admIn", "admiN", "ADmin", "ADMin", "ADMIn"):
        await guesser.fails(name, 1)
    assert await guesser.status("AdMiN") == 429
    for number in range(SIGN_IN_ACCOUNT_NETWORK.burst):
        address = "admin@example.org"
        await guesser.fails(address[:number] + address[number:].upper(), 1)
    assert await guesser.status("admin@Example.org") == 429


async def spend_the_account(guesser: Guesser, name: str) -> None:
    """Guess a hundred times, each from another network, with all the patience that is asked for."""
    for number in range(SIGN_IN_ACCOUNT.closed_after or 0):
        network = f"203.0.113.{number}"
        if (answer := await guesser.tries(name, network=network)).status_code == 429:
            guesser.service.clock.advance(int(answer.headers["retry-after"]))
            answer = await guesser.tries(name, network=network)
        assert answer.status_code == 400


@pytest.mark.parametrize("known", [True, False], ids=["a user", "nobody"])
async def test_after_a_hundred_failures_strangers_stay_out(guesser: Guesser, known: bool) -> None:
    """However long they wait between their guesses; and a name that nobody has looks the same."""
    name = (await guesser.service.a_user()).username if known else "nobody.at.all"
    await spend_the_account(guesser, name)
    for _ in range(3):
        guesser.service.clock.advance(3600)
        assert await guesser.status(name, PASSWORD, network="192.0.2.1") == 429


async def test_the_owner_gets_through_from_where_they_signed_in_before(guesser: Guesser) -> None:
    """That is what keeps a stranger from locking anybody out; and the success opens the account again."""
    user = await guesser.service.a_user()
    assert await guesser.status(user.username, PASSWORD, network="192.0.2.77") == 200
    await spend_the_account(guesser, user.username)
    assert await guesser.status(user.username, PASSWORD, network="192.0.2.1") == 429
    assert await guesser.status(user.username, WRONG, network="192.0.2.77") == 400
    assert await guesser.status(user.username, PASSWORD, network="192.0.2.77") == 200
    assert await guesser.status(user.username, PASSWORD, network="192.0.2.1") == 200


async def test_a_password_that_was_set_anew_opens_the_account(guesser: Guesser) -> None:
    """An operator can let the owner back in, by either name."""
    user = await guesser.service.a_user("marie", email="Marie@Example.org")
    await spend_the_account(guesser, "marie")
    assert await guesser.status("marie", PASSWORD, network="192.0.2.1") == 429
    await guesser.service.services.throttle.forgive(user.username)
    assert await guesser.status("marie", PASSWORD, network="192.0.2.1") == 200


async def test_a_throttled_account_still_refreshes(guesser: Guesser) -> None:
    """Guessing keeps nobody from the session they have."""
    user = await guesser.service.a_user()
    client = guesser._client
    tokens = await guesser.service.sign_in(client, user)
    await guesser.fails(user.username, SIGN_IN_ACCOUNT_NETWORK.burst)
    assert await guesser.status(user.username) == 429
    assert (await guesser.service.refresh(client, tokens["refresh_token"])).status_code == 200


async def test_one_password_tried_on_many_names_is_slowed_down_as_well(guesser: Guesser) -> None:
    """A network has sixty failures at once, and one in two seconds after that, whatever the names."""
    for number in range(SIGN_IN_NETWORK.burst):
        assert await guesser.status(f"user.{number}") == 400
    assert await guesser.status("yet.another") == 429
    assert await guesser.status("yet.another", network="203.0.113.7") == 400
    guesser.service.clock.advance(SIGN_IN_NETWORK.interval)
    assert await guesser.status("yet.another") == 400
    assert await guesser.status("and.another") == 429


async def test_right_passwords_cost_a_network_nothing(guesser: Guesser) -> None:
    """Hundreds of people behind one address sign in undisturbed."""
    user = await guesser.service.a_user()
    for _ in range(SIGN_IN_NETWORK.burst + 5):
        assert await guesser.status(user.username, PASSWORD) == 200


# -- where a request comes from ---------------------------------------------------------------------------------------


@pytest.mark.case("ACC-10")
@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "198.51.100.{}"},
        {"x-forwarded-for": "a{}"},
        {"x-forwarded-for": "{}, 1.2.3.4" + "9" * 3000},
        {"x-forwarded-for": "1.2.3.4, 198.51.100.{}"},
        {"forwarded": "for=198.51.100.{}"},
        {"x-real-ip": "198.51.100.{}"},
    ],
    ids=["address", "no address", "long", "list", "forwarded", "real-ip"],
)
async def test_nobody_gets_another_network_by_writing_one(embedded: Service, headers: dict[str, str]) -> None:
    """Without trusted proxies the connection's own address counts, whatever the headers say."""
    client = await embedded.a_client()
    answers = [
        await embedded.token(
            client,
            headers={name: value.format(number) for name, value in headers.items()},
            grant_type="password",
            username="marie",
            password=WRONG,
        )
        for number in range(SIGN_IN_ACCOUNT_NETWORK.burst + 1)
    ]
    assert [answer.status_code for answer in answers] == [400] * SIGN_IN_ACCOUNT_NETWORK.burst + [429]


@pytest.mark.case("ACC-10")
@pytest.mark.parametrize("written", ["10.9.9.{}, 198.51.100.1", "x{}, 198.51.100.1", "{}", "junk{}, also junk"])
async def test_behind_a_trusted_proxy_only_what_it_wrote_counts(on_redis: Guesser, written: str) -> None:
    """The right-most address is the proxy's word; what stands left of it is the client's, and junk skips nothing."""
    for number in range(SIGN_IN_ACCOUNT_NETWORK.burst):
        await on_redis.fails("marie", 1, network=written.format(number))
    assert await on_redis.status("marie", network=written.format(99)) == 429


@pytest.mark.case("ACC-11")
async def test_a_whole_ipv6_network_is_one(on_redis: Guesser) -> None:
    """One person can have a /64 and change addresses in it at every request; a mapped IPv4 address is that address."""
    for number in range(SIGN_IN_ACCOUNT_NETWORK.burst):
        await on_redis.fails("marie", 1, network=f"2001:db8:0:1:{number:x}::{number:x}")
    assert await on_redis.status("marie", network="2001:db8:0:1:ffff::1") == 429
    assert await on_redis.status("marie", network="2001:db8:0:2::1") == 400
    await on_redis.fails("pierre", SIGN_IN_ACCOUNT_NETWORK.burst, network="198.51.100.9")
    assert await on_redis.status("pierre", network="::ffff:198.51.100.9") == 429


# -- what Redis is told -----------------------------------------------------------------------------------------------


@pytest.mark.case("SEC-01")
async def test_redis_is_told_no_names(on_redis: Guesser, redis_url: str) -> None:
    """People type passwords into the name field; limits are kept by keyed hashes."""
    canaries = ("kanarienvogel", "kanarie@example.org", "Kanarienvogel-7!")
    user = await on_redis.service.a_user(canaries[0], email=canaries[1])
    for name in (*canaries, "KANARIENVOGEL"):
        await on_redis.status(name)
    assert await on_redis.status(user.username, PASSWORD) == 200
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        keys = [key async for key in client.scan_iter()]
        everything = b"".join([key + (await client.get(key) or b"") for key in keys]).lower()
    assert len(keys) > 3
    for canary in (*canaries, str(user.id)):
        assert canary.lower().encode() not in everything


async def test_refusals_by_a_limit_are_counted_and_written_down_together(service: Service) -> None:
    """One row for many, with the limit and the network: a flood costs the database nothing while it lasts."""
    client, user = await service.a_client(public=True), await service.a_user()
    for _ in range(15):
        await service.token(client, grant_type="password", username=user.username, password="wrong")
    for _ in range(40):
        await service.http.get("/v1/users/me", headers={"x-api-key": "idk_nonsense"})
    assert await service.events("sign_in.throttled") == []
    await flush_audit(service.services)
    [throttled] = await service.events("sign_in.throttled")
    assert (throttled.target, throttled.network) == ("sign_in.account_network", "127.0.0.1")
    assert throttled.occurrences == 5
    [limited] = await service.events("limit.hit")
    assert (limited.target, limited.occurrences) == ("api_key_guessing", 10)
