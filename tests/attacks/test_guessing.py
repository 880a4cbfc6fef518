"""Guessing at passwords and secrets gets slow; and nobody is locked out by a stranger."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator

import httpx2
import pytest

from identity_service.accounts.throttle import Attempt
from identity_service.infra.ratelimit import Limited
from identity_service.infra.telemetry.metrics import TOKENS
from tests.support.hashing import watch_verifications
from tests.support.reading import unverified_claims
from tests.support.refusals import refusal
from tests.support.service import PASSWORD, Registered, Service, running, test_settings
from tests.support.wire import FORM, send

ATTEMPTS = 10
"""For one name from one network; then each further one waits longer."""
CLIENT_FAILURES = 30
"""For one client from one network."""
WRONG = "wrong password"
HERE, THERE = "198.51.100.7", "203.0.113.9"


@pytest.fixture(params=["service", "embedded"])
def either(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL with Redis, then on SQLite with limits in memory."""
    found: Service = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def proxied(database_url: str, redis_url: str) -> AsyncIterator[Service]:
    """The service behind two proxies it knows: the caller's own, and a network of them."""
    settings = test_settings(
        database_url, redis_url=redis_url, trusted_proxies=("127.0.0.1", "10.0.0.0/8", "2001:db8:ffff::/48")
    )
    async with running(settings) as service:
        yield service


async def guess(
    service: Service, client: Registered, name: str, password: str = WRONG, **headers: str
) -> httpx2.Response:
    """Try to sign in; header names are given with underscores."""
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    return await service.token(client, headers=sent, grant_type="password", username=name, password=password)


async def statuses(service: Service, client: Registered, name: str, times: int, **headers: str) -> list[int]:
    """Guess several times, one after the other."""
    return [(await guess(service, client, name, **headers)).status_code for _ in range(times)]


def wait_of(answer: httpx2.Response) -> int:
    """Return the seconds that a limited answer asks for."""
    refusal(answer, "temporarily_unavailable", status=429)
    assert answer.headers["ratelimit-remaining"] == "0"
    assert answer.headers["ratelimit-reset"] == answer.headers["retry-after"]
    return int(answer.headers["retry-after"])


# -- passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.case("PWG-08")
async def test_two_hundred_guesses_at_once_get_no_more_than_ten_verifications(
    either: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt is booked before the password is looked at, in one step: coming all together gains nothing."""
    client, user = await either.a_client(), await either.a_user()
    assert (await either.token(client, grant_type="client_credentials")).status_code == 200  # it is remembered now
    seen = watch_verifications(monkeypatch)
    names = itertools.cycle((user.username, user.username.upper(), user.username.title()))
    answers = await asyncio.gather(*(guess(either, client, next(names)) for _ in range(200)))
    counted = Counter(answer.status_code for answer in answers)
    assert 0 < len(seen) <= ATTEMPTS
    assert counted == {400: len(seen), 429: 200 - len(seen)}


@pytest.mark.case("PWG-08")
async def test_the_eleventh_guess_waits_and_each_further_one_waits_longer(
    either: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds, four, eight; trying too early is refused, unbooked and not looked at."""
    client, user = await either.a_client(), await either.a_user()
    seen = watch_verifications(monkeypatch)
    assert await statuses(either, client, user.username, ATTEMPTS + 3) == [400] * ATTEMPTS + [429] * 3
    assert len(seen) == ATTEMPTS
    waits = []
    for _ in range(5):
        waits.append(wait_of(await guess(either, client, user.username)))
        either.clock.advance(waits[-1] - 0.5)
        wait_of(await guess(either, client, user.username))
        either.clock.advance(0.5)
        refusal(await guess(either, client, user.username), "invalid_grant")
    assert waits == [2, 4, 8, 16, 32]
    assert len(seen) == ATTEMPTS + 5


@pytest.mark.case("ACC-08")
async def test_a_success_starts_the_count_anew(either: Service) -> None:
    """Nine failures, a success, nine failures, a success; a wait that is over is enough to get in."""
    client, user = await either.a_client(), await either.a_user()
    for _ in range(3):
        assert await statuses(either, client, user.username, ATTEMPTS - 1) == [400] * (ATTEMPTS - 1)
        assert (await guess(either, client, user.username, PASSWORD)).status_code == 200
    assert await statuses(either, client, user.username, ATTEMPTS + 1) == [400] * ATTEMPTS + [429]
    either.clock.advance(wait_of(await guess(either, client, user.username, PASSWORD)))
    assert (await guess(either, client, user.username, PASSWORD)).status_code == 200
    assert await statuses(either, client, user.username, ATTEMPTS) == [400] * ATTEMPTS


async def test_signing_in_often_is_no_guessing(either: Service) -> None:
    """A right password costs none of the limits."""
    client, user = await either.a_client(), await either.a_user()
    for _ in range(70):
        assert (await guess(either, client, user.username, PASSWORD)).status_code == 200


@pytest.mark.case("PWG-08")
async def test_another_spelling_or_another_client_is_no_other_account(either: Service) -> None:
    """Guesses through two clients and under every capitalisation count together."""
    first, second, user = await either.a_client(), await either.a_client(public=True), await either.a_user("person")
    answers = []
    for number, name in enumerate(("person", "PERSON", "Person", "pErson") * 4):
        answers.append((await guess(either, (first, second)[number % 2], name)).status_code)
    assert answers == [400] * ATTEMPTS + [429] * (16 - ATTEMPTS)
    address = [(await guess(either, first, name)).status_code for name in (user.email, user.email.upper()) * 6]
    assert address == [400] * ATTEMPTS + [429] * 2


@pytest.mark.case("ACC-05")
async def test_a_password_sprayed_over_many_names_is_stopped(either: Service) -> None:
    """Sixty names from one network, existing or not; then one every two seconds."""
    client, user = await either.a_client(), await either.a_user()
    spray = [(await guess(either, client, f"name{number}")).status_code for number in range(65)]
    assert spray == [400] * 60 + [429] * 5
    assert wait_of(await guess(either, client, user.username)) == 2
    either.clock.advance(2)
    assert await statuses(either, client, "name99", 2) == [400, 429]


@pytest.mark.case("ACC-07")
async def test_a_password_sprayed_from_many_networks_shows_in_the_metrics(proxied: Service) -> None:
    """No limit sees two guesses from each of two hundred networks; whoever watches the failures does."""
    client = await proxied.a_client()

    def failures() -> float:
        return float(TOKENS.labels("password", client.id, "invalid_grant")._value.get())

    before = failures()
    for number in range(400):
        answer = await guess(proxied, client, f"name{number}", x_forwarded_for=f"198.51.{number % 200}.1")
        assert answer.status_code == 400
    assert failures() == before + 400


# -- a stranger locks nobody out --------------------------------------------------------------------------------------


async def test_a_stranger_cannot_keep_a_user_out_of_a_network_they_use(proxied: Service) -> None:
    """After a hundred failures from all over, a new network hears no; the one the user has signed in from, yes."""
    client, user = await proxied.a_client(), await proxied.a_user()
    at_home = {"x_forwarded_for": HERE}
    assert (await guess(proxied, client, user.username, PASSWORD, **at_home)).status_code == 200
    for number in range(30):
        stranger = f"203.0.113.{number}"
        assert await statuses(proxied, client, user.username, 1, x_forwarded_for=stranger) == [400]
    wait_of(await guess(proxied, client, user.username, PASSWORD, x_forwarded_for="192.0.2.1"))
    assert (await guess(proxied, client, user.username, PASSWORD, **at_home)).status_code == 200


async def test_guesses_from_many_networks_count_together(proxied: Service) -> None:
    """Thirty for one name from anywhere, then ever more slowly."""
    client, user = await proxied.a_client(), await proxied.a_user()
    answers = [
        (await guess(proxied, client, user.username, x_forwarded_for=f"203.0.113.{number}")).status_code
        for number in range(35)
    ]
    assert answers == [400] * 30 + [429] * 5


# -- whose network ----------------------------------------------------------------------------------------------------

SPOOFED = (
    *(
        "203.0.113.{}",
        "a",
        "",
        ",",
        "203.0.113.{}, 203.0.113.{}",
        "unknown",
        "203.0.113.{}:4711",
        "::ffff:203.0.113.{}",
    ),
    *("2001:db8:{}::1", "x" * 3000, "203.0.113.{},,", "127.0.0.1", "10.0.0.1", "[2001:db8::{}]", "1", "0x7f000001"),
    *("::ffff:203.0.113.{}", "203.0.113.{};203.0.113.9"),
)


@pytest.mark.case("ACC-10")
async def test_without_known_proxies_no_header_chooses_the_network(either: Service) -> None:
    """Whatever it claims, in whichever header, the attempts of one peer count together."""
    client, user = await either.a_client(), await either.a_user()
    answers = []
    for number, value in enumerate(SPOOFED):
        claim = value.replace("{}", str(number))
        headers = {
            "x_forwarded_for": claim,
            "forwarded": f"for={claim}",
            "x_real_ip": claim,
            "true_client_ip": claim,
            "x_client_ip": claim,
        }
        answers += await statuses(either, client, user.username, 1, **headers)
    assert answers == [400] * ATTEMPTS + [429] * (len(SPOOFED) - ATTEMPTS)


@pytest.mark.case("ACC-10")
async def test_behind_proxies_the_right_most_unknown_address_counts(proxied: Service) -> None:
    """What stands to its left was written by the caller, and changes with every guess."""
    client, user = await proxied.a_client(), await proxied.a_user()
    chains = (
        *("{0}, 198.51.100.7", "198.51.100.7", "{0},{0},198.51.100.7,10.1.2.3", "10.9.9.9, 198.51.100.7 , 10.0.0.1"),
        *(
            "127.0.0.1, 198.51.100.7",
            "a, 198.51.100.7",
            ", 198.51.100.7",
            "::ffff:198.51.100.7",
            "x, ::ffff:198.51.100.7",
        ),
        *("198.51.100.7, 2001:db8:ffff::1", "{0}, 198.51.100.7, 127.0.0.1", "10.0.0.1, 198.51.100.7"),
    )
    answers = []
    for number, chain in enumerate(chains):
        claim = chain.replace("{0}", f"203.0.113.{number}")
        answers += await statuses(proxied, client, user.username, 1, x_forwarded_for=claim)
    assert answers == [400] * ATTEMPTS + [429] * (len(chains) - ATTEMPTS)
    assert await statuses(proxied, client, user.username, 1, x_forwarded_for=THERE) == [400]


@pytest.mark.case("ACC-10")
@pytest.mark.parametrize("rubbish", ["a", "", ",", "x" * 3000, "203.0.113.{}x", "unknown", "203.0.113.1:{}", "[::{}]"])
async def test_an_address_that_cannot_be_read_skips_no_limit(proxied: Service, rubbish: str) -> None:
    """Then the last proxy that could be read counts as the caller."""
    client, user = await proxied.a_client(), await proxied.a_user()
    answers = []
    for number in range(ATTEMPTS + 2):
        claim = rubbish.replace("{}", str(number))
        answers += await statuses(proxied, client, user.username, 1, x_forwarded_for=f"{claim}, 10.0.0.1")
    assert answers == [400] * ATTEMPTS + [429] * 2


@pytest.mark.case("ACC-10")
async def test_two_headers_are_read_as_one_list(proxied: Service) -> None:
    """The one the proxy appended is the last."""
    client, user = await proxied.a_client(), await proxied.a_user()
    form = f"grant_type=password&client_id={client.id}&client_secret={client.secret}"
    body = f"{form}&username={user.username}&password=wrong".encode()
    answers = []
    for number in range(ATTEMPTS + 2):
        spoofed = (b"x-forwarded-for", b"203.0.113.%d" % number)
        headers = [FORM, spoofed, (b"x-forwarded-for", HERE.encode())]
        answers.append((await send(proxied, "/token", body, headers=headers)).status)
    assert answers == [400] * ATTEMPTS + [429] * 2


@pytest.mark.case("ACC-10")
async def test_a_peer_that_is_no_proxy_is_not_believed(proxied: Service) -> None:
    """Who reaches us past the proxies speaks for the address they come from."""
    client, user = await proxied.a_client(), await proxied.a_user()
    form = f"grant_type=password&client_id={client.id}&client_secret={client.secret}"
    body = f"{form}&username={user.username}&password=wrong".encode()
    answers = []
    for number in range(ATTEMPTS + 2):
        headers = [FORM, (b"x-forwarded-for", b"203.0.113.%d, 10.0.0.1" % number)]
        answers.append((await send(proxied, "/token", body, headers=headers, peer="192.0.2.44")).status)
    assert answers == [400] * ATTEMPTS + [429] * 2


@pytest.mark.case("ACC-11")
async def test_an_ipv6_network_of_one_household_counts_as_one(proxied: Service) -> None:
    """A /64 has more addresses than anybody has guesses; the neighbour's /64 is another."""
    client, user = await proxied.a_client(), await proxied.a_user()
    answers = []
    for number in range(ATTEMPTS + 2):
        answers += await statuses(
            proxied, client, user.username, 1, x_forwarded_for=f"2001:db8:1:1:{number:x}::{number:x}"
        )
    assert answers == [400] * ATTEMPTS + [429] * 2
    assert await statuses(proxied, client, user.username, 1, x_forwarded_for="2001:db8:1:2::1") == [400]


@pytest.mark.case("ACC-11")
async def test_who_changes_between_the_networks_of_one_site_is_stopped_as_well(proxied: Service) -> None:
    """A /56 holds 256 networks of sixty guesses each; three hundred in all pass, and the next site goes on."""
    client = await proxied.a_client()

    async def spray(site: str) -> Counter[int]:
        answers = [
            await guess(proxied, client, f"name{number}", x_forwarded_for=f"2001:db8:{site}{number % 8:02x}::1")
            for number in range(320)
        ]
        return Counter(answer.status_code for answer in answers)

    assert await spray("1:2") == {400: 300, 429: 20}
    assert wait_of(await guess(proxied, client, "nobody", x_forwarded_for="2001:db8:1:2ff::9")) == 1
    assert (await guess(proxied, client, "nobody", x_forwarded_for="2001:db8:1:300::9")).status_code == 400


@pytest.mark.case("ACC-11")
async def test_right_passwords_cost_a_site_nothing(proxied: Service) -> None:
    client, user = await proxied.a_client(), await proxied.a_user()
    here = {"x_forwarded_for": "2001:db8:1:2::1"}
    for _ in range(305):
        await proxied.services.throttle.succeeded(await booked(proxied, user.username, "2001:db8:1:2::/64"))
    assert (await guess(proxied, client, user.username, PASSWORD, **here)).status_code == 200


async def booked(service: Service, name: str, network: str) -> Attempt:
    attempt = await service.services.throttle.book(name, network)
    assert isinstance(attempt, Attempt)
    return attempt


async def test_the_audit_trail_names_the_network_that_counts(proxied: Service) -> None:
    """Not the proxy, and not what the caller claims."""
    client, user = await proxied.a_client(), await proxied.a_user()
    for claim in (f"1.2.3.4, {HERE}", "2001:db8:1:1::5"):
        refusal(await guess(proxied, client, user.username, x_forwarded_for=claim), "invalid_grant")
    networks = [row.network for row in await proxied.events("sign_in.failed")]
    assert networks == [HERE, "2001:db8:1:1::/64"]


# -- clients ----------------------------------------------------------------------------------------------------------


async def own_token(service: Service, client: Registered, secret: str, network: str) -> httpx2.Response:
    """Ask for the client's own token with a secret, from a network."""
    return await service.token(
        Registered(client.id, secret), headers={"x-forwarded-for": network}, grant_type="client_credentials"
    )


@pytest.mark.rfc("6749", "2.3.1")
@pytest.mark.case("CLI-10")
async def test_guessing_a_clients_secret_is_limited_where_it_happens(proxied: Service) -> None:
    """One network waits, even with the right secret; from everywhere else the client is served."""
    client, other = await proxied.a_client(), await proxied.a_client()
    secret = client.secret or ""
    for _ in range(CLIENT_FAILURES):
        refusal(await own_token(proxied, client, "wrong", HERE), "invalid_client", status=401)
    assert wait_of(await own_token(proxied, client, "wrong", HERE)) == 2
    wait_of(await own_token(proxied, client, secret, HERE))
    assert (await own_token(proxied, client, secret, THERE)).status_code == 200
    assert (await own_token(proxied, other, other.secret or "", HERE)).status_code == 200
    proxied.clock.advance(2)
    assert (await own_token(proxied, client, secret, HERE)).status_code == 200
    refusal(await own_token(proxied, client, "wrong", HERE), "invalid_client", status=401)
    wait_of(await own_token(proxied, client, "wrong", HERE))


@pytest.mark.case("CLI-10")
async def test_many_guesses_at_a_secret_at_once_get_no_further(either: Service) -> None:
    """The failures are booked in one step as well."""
    client = await either.a_client()
    wrong = Registered(client.id, "wrong")
    answers = await asyncio.gather(*(either.token(wrong, grant_type="client_credentials") for _ in range(120)))
    counted = Counter(answer.status_code for answer in answers)
    assert counted[401] <= CLIENT_FAILURES
    assert counted == {401: counted[401], 429: 120 - counted[401]}
    events = await either.events("client.authentication_failed")
    assert 0 < len(events) <= ATTEMPTS, "a flood fills no table"


async def test_a_client_that_knows_its_secret_costs_the_limiter_nothing(
    embedded: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it asks."""
    client = await embedded.a_client()

    async def never(*_: object) -> Limited:
        raise AssertionError("the limiter was asked")

    monkeypatch.setattr(embedded.services.limiter, "spend", never, raising=False)
    for _ in range(CLIENT_FAILURES * 2):
        answer = await embedded.token(client, grant_type="client_credentials")
        assert unverified_claims(answer.json()["access_token"])["sub"] == client.id


@pytest.mark.case("CLI-10")
async def test_ids_that_somebody_makes_up_share_their_failures(embedded: Service) -> None:
    """Another invented id for each try is no way around the limit, and takes no room from anybody."""
    answers = [
        await embedded.token(Registered(f"cl_{number:022d}", "x"), grant_type="client_credentials")
        for number in range(CLIENT_FAILURES + 3)
    ]
    assert [answer.status_code for answer in answers] == [401] * CLIENT_FAILURES + [429] * 3
    client = await embedded.a_client()
    assert (await embedded.token(client, grant_type="client_credentials")).status_code == 200


async def test_secrets_sent_for_a_public_client_block_nobody(embedded: Service) -> None:
    """There is nothing to guess, so who sends them cannot keep its users from refreshing."""
    client, user = await embedded.a_client(public=True), await embedded.a_user()
    token = (await embedded.sign_in(client, user))["refresh_token"]
    for _ in range(CLIENT_FAILURES + 3):
        answer = await embedded.token(Registered(client.id, "x"), grant_type="refresh_token", refresh_token=token)
        assert answer.status_code == 401
    assert (await embedded.refresh(client, token)).status_code == 200
