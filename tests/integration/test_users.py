"""People: one password and one name in all their spellings, imported hashes, and accounts that never look alike."""

import asyncio
import threading
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from passlib import hash as foreign
from sqlalchemy import func, select

from identity_service.accounts.users import InvalidUser, NameTaken
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit.catalogue import SIGN_IN_ACCOUNT_NETWORK
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import NFKC_FORM, RAW_FORM, HashingBusy, PasswordHasher
from identity_service.infra.tables import users
from tests.support.service import PASSWORD, Registered, Service, running, test_settings

WIDE = "".join("\u3000" if letter == " " else chr(ord(letter) + 0xFEE0) for letter in "correct horse 7")


async def try_sign_in(service: Service, client: Registered, name: str, password: str) -> int:
    return (await service.token(client, grant_type="password", username=name, password=password)).status_code


# -- passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-12")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ångström-Überfluß", unicodedata.normalize("NFD", "Ångström-Überfluß")),
        ("correct horse 7", WIDE),
        ("five-finger", "\ufb01ve-\ufb01nger"),
    ],
)
async def test_one_password_signs_in_however_it_was_typed(service: Service, one: str, other: str) -> None:
    """Set in either spelling, by sign-up or by an operator, it opens the account in both."""
    client = await service.a_client()
    for number, typed in enumerate((one, other)):
        user = await service.a_user(f"person{number}", password=typed)
        for spelling in (one, other):
            assert await try_sign_in(service, client, user.username, spelling) == 200
        await service.change_password(user, "x" + typed)
        for spelling in (one, other):
            assert await try_sign_in(service, client, user.username, "x" + spelling) == 200
            assert await try_sign_in(service, client, user.username, spelling) == 400


@pytest.mark.case("ACC-14")
@pytest.mark.parametrize("letter", ["x", "🙂"])
async def test_passwords_equal_in_their_first_72_bytes_open_different_doors(service: Service, letter: str) -> None:
    """The rest of a long password counts."""
    client = await service.a_client()
    start = letter * (72 // len(letter.encode()))
    user = await service.a_user(password=start + "1st")
    assert await try_sign_in(service, client, user.username, start + "1st") == 200
    for wrong in (start + "2nd", start, start + "1s"):
        assert await try_sign_in(service, client, user.username, wrong) == 400


@pytest.mark.case("ACC-15")
@pytest.mark.parametrize("typed", ["abcdefgh\0", "abcdefgh\uffff", "abcdefgh\U000e0fff", "x" * 2000])
async def test_an_impossible_password_is_refused_alike_for_everybody(service: Service, typed: str) -> None:
    """It cannot be set, and at sign-in it tells nothing about the name and leaves nothing behind."""
    client, user = await service.a_client(), await service.a_user()
    answers = [
        await service.token(client, grant_type="password", username=name, password=typed)
        for name in (user.username, "nobody.at.all")
    ]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["error"] == "invalid_request"
    assert await service.live_families(user) == 0
    assert await try_sign_in(service, client, user.username, PASSWORD) == 200


@pytest.mark.case("ACC-15")
async def test_a_lone_surrogate_in_the_form_is_no_fault_of_ours(service: Service) -> None:
    """Neither as UTF-8 that no encoder writes, nor in the name."""
    client, user = await service.a_client(), await service.a_user()
    headers = {"content-type": "application/x-www-form-urlencoded"}
    for field in (f"username={user.username}&password=abcdefgh%ED%A0%80", "username=a%ED%A0%80&password=abcdefghi"):
        body = f"grant_type=password&{field}".encode()
        answer = await service.http.post("/token", content=body, headers=headers, auth=client.auth)
        assert answer.status_code == 400
        assert answer.json()["error"] == "invalid_request"


# -- imported hashes --------------------------------------------------------------------------------------------------

IMPORTED = {
    "bcrypt": foreign.bcrypt.using(rounds=4).hash,
    "scrypt": foreign.scrypt.using(rounds=4).hash,
    "pbkdf2": foreign.pbkdf2_sha256.using(rounds=10).hash,
    "django": foreign.django_pbkdf2_sha256.using(rounds=10).hash,
    "django_bcrypt_sha256": foreign.django_bcrypt_sha256.using(rounds=4).hash,
}


async def password_of(service: Service, name: str) -> tuple[str, int]:
    [row] = await service.execute(select(users.c.password_hash, users.c.password_form).where(users.c.username == name))
    return row.password_hash, row.password_form


@pytest.mark.parametrize("scheme", IMPORTED)
async def test_an_imported_hash_is_ours_after_the_first_sign_in(service: Service, scheme: str) -> None:
    """A wrong password leaves it as it is; the right one replaces it, after which every spelling matches."""
    composed = "Ångström-Überfluß"
    decomposed = unicodedata.normalize("NFD", composed)
    client = await service.a_client()
    user = await service.a_user(password_hash=IMPORTED[scheme](decomposed))
    await service.patch_user(user, password_form=RAW_FORM)
    before = await password_of(service, user.username)
    assert await try_sign_in(service, client, user.username, "something else") == 400
    assert await password_of(service, user.username) == before

    tokens = await service.sign_in(client, user, decomposed)
    stored, form = await password_of(service, user.username)
    assert stored.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert form == NFKC_FORM
    assert await try_sign_in(service, client, user.username, composed) == 200
    assert await try_sign_in(service, client, user.username, decomposed) == 200
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200  # nothing was signed out


async def test_a_costlier_imported_hash_stays(service: Service) -> None:
    """A sign-in never makes an account easier to crack."""
    foreign.argon2.get_backend()
    stored = foreign.argon2.using(memory_cost=512, time_cost=3, parallelism=1).hash(PASSWORD)
    client = await service.a_client()
    user = await service.a_user(password_hash=stored)
    await service.patch_user(user, password_form=RAW_FORM)
    await service.sign_in(client, user)
    assert (await password_of(service, user.username))[0] == stored


@pytest.mark.parametrize(
    "stored", ["!", "plain", "$2b$12$short", "$argon2id$v=19$m=8,t=1,p=1$!$!", "pbkdf2_sha256$x$y$z"]
)
async def test_a_damaged_hash_is_a_wrong_password(service: Service, stored: str) -> None:
    """One damaged row is no 500, and tells nobody that it is damaged."""
    client, user, other = await service.a_client(), await service.a_user(), await service.a_user()
    await service.patch_user(user, password_hash=stored)
    answers = [
        await service.token(client, grant_type="password", username=name, password="wrong password")
        for name in (user.username, other.username)
    ]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json() == answers[1].json()
    assert await try_sign_in(service, client, user.username, stored) == 400


async def test_an_account_without_a_password_opens_to_none(service: Service) -> None:
    """Not even to an empty one."""
    client, user = await service.a_client(), await service.a_user(password=None)
    for typed in ("", "None", PASSWORD):
        assert await try_sign_in(service, client, user.username, typed) == 400


async def test_a_renewal_does_not_undo_a_password_set_meanwhile(service: Service) -> None:
    """The new hash of the old password replaces that very hash, or nothing."""
    user = await service.a_user(password_hash=IMPORTED["bcrypt"](PASSWORD))
    facts = await service.within(lambda tx: service.services.users.facts(tx, user.username))
    assert facts is not None
    await service.change_password(user, "a different battery")
    before = await password_of(service, user.username)
    await service.within(lambda tx: service.services.users.renew_hash(tx, facts, "$argon2id$old"))
    assert await password_of(service, user.username) == before


# -- names ------------------------------------------------------------------------------------------------------------


async def test_names_and_addresses_are_found_in_any_case(service: Service) -> None:
    """Mail goes to the address as it was given."""
    client = await service.a_client()
    user = await service.a_user("Marie.Curie", email="Marie.Curie@Sorbonne.Example")
    assert (user.username, user.email) == ("marie.curie", "Marie.Curie@Sorbonne.Example")
    for name in ("marie.curie", "MARIE.CURIE", "marie.curie@sorbonne.example", "Marie.Curie@SORBONNE.EXAMPLE"):
        assert await try_sign_in(service, client, name, PASSWORD) == 200


LOOKALIKES = [
    *(
        "Admin",
        "ADMIN",
        "\uff41\uff44\uff4d\uff49\uff4e",
        "admin ",
        " admin",
        "admin\u200b",
        "\u0430dmin",
        "adm\u0131n",
    ),
    *("admin\n", "admin\t", "a\u0301dmin", "admin\u00ad", "\u202eadmin", "admin\ufeff", "\ud800admin"),
]


@pytest.mark.case("ACC-18")
async def test_no_second_account_looks_like_the_first(service: Service) -> None:
    """Full-width, zero-width, Cyrillic, blanks: no name, or a taken one; at sign-in, nobody."""
    client = await service.a_client()
    await service.a_user("admin")
    for name in LOOKALIKES:
        same = name.isascii() and name.isalpha()
        with pytest.raises(NameTaken if same else InvalidUser):
            await service.a_user(name, email="other@example.org")
        if not same and "\ud800" not in name:
            assert await try_sign_in(service, client, name, PASSWORD) == 400, ascii(name)
    [count] = await service.execute(select(func.count()).select_from(users))
    assert count[0] == 1


@pytest.mark.case("ACC-18")
async def test_letters_that_fold_into_ascii_are_not_folded(service: Service) -> None:
    """The Kelvin sign lower-cases to k, ß to ss, the long s to s; none of them may reach the other's account."""
    client = await service.a_client()
    for name, lookalike in [("kelvin", "\u212aelvin"), ("strasse", "stra\u00dfe"), ("sam", "\u017fam")]:
        await service.a_user(name)
        with pytest.raises(InvalidUser):
            await service.a_user(lookalike, email="other@example.org")
        assert await try_sign_in(service, client, lookalike, PASSWORD) == 400


@pytest.mark.case("ACC-19")
async def test_one_address_belongs_to_one_account(service: Service) -> None:
    """Other cases are the same address; what is none, or two, is refused."""
    await service.a_user("mike", email="mike@example.org")
    for email, expected in [
        ("MIKE@Example.Org", NameTaken),
        ("mike@example.ORG", NameTaken),
        ("m\u0131ke@example.org", InvalidUser),
        ("mike@ex\u0430mple.org", InvalidUser),
        ("mike@example.org ", InvalidUser),
        ("mike@example.org\n", InvalidUser),
        ("mike@example.org\r\nBcc: eve@example.org", InvalidUser),
        ("Mike <mike@example.org>", InvalidUser),
        ("mike@example.org,eve@example.org", InvalidUser),
        ("mike@@example.org", InvalidUser),
        ("mike", InvalidUser),
        ("@example.org", InvalidUser),
        ("mike@-example.org", InvalidUser),
        ("m" * 65 + "@example.org", InvalidUser),
    ]:
        with pytest.raises(expected):
            await service.a_user("other", email=email)


async def test_a_name_cannot_be_an_address_nor_an_address_a_name(service: Service) -> None:
    """Or one person's name could be another's address, and the sign-in would have to choose."""
    await service.a_user("eve", email="eve@example.org")
    with pytest.raises(InvalidUser):
        await service.a_user("eve@example.org", email="mallory@example.org")


async def outcomes_of_twenty(service: Service, same: str) -> list[str]:
    """Create twenty users at once that share a name or an address; return how each creation ended, sorted."""

    async def create(number: int) -> str:
        name = "Marie" if same == "username" else f"marie{number}"
        email = "Marie@example.org" if same == "email" else f"marie{number}@example.org"
        try:
            await service.a_user(name, email=email, password_hash="!")
        except NameTaken:
            return "taken"
        return "created"

    outcomes = sorted(await asyncio.gather(*(create(number) for number in range(20))))
    [count] = await service.execute(select(func.count()).select_from(users))
    assert count[0] == 1
    return outcomes


@pytest.mark.case("ACC-18")
@pytest.mark.case("ACC-19")
@pytest.mark.parametrize("same", ["username", "email"])
async def test_twenty_who_want_one_name_at_once_get_it_once(service: Service, same: str) -> None:
    """The unique index decides; the nineteen others hear that the name is taken."""
    assert await outcomes_of_twenty(service, same) == ["created"] + ["taken"] * 19


@pytest.mark.case("ACC-18")
@pytest.mark.case("ACC-19")
@pytest.mark.parametrize("same", ["username", "email"])
async def test_twenty_on_sqlite_as_well(embedded: Service, same: str) -> None:
    """The embedded database decides alike."""
    assert await outcomes_of_twenty(embedded, same) == ["created"] + ["taken"] * 19


async def test_a_scope_that_two_define_at_once_is_defined_once(service: Service) -> None:
    """Registering two clients of one new service at the same time works: the second finds done what it wanted."""
    access = service.services.access

    async def define_and_grant(tx: Transaction) -> None:
        await access.define(tx, ("stock:read",))
        await access.grant(tx, "user", ("stock:read",))

    async with service.services.db.transaction() as held:
        await define_and_grant(held)
        second = asyncio.create_task(service.within(define_and_grant))
        done, _ = await asyncio.wait({second}, timeout=0.2)
        assert not done
    await second
    assert "stock:read" in await service.within(lambda tx: access.scopes_of(tx, "user"))


@pytest.mark.case("ACC-18")
@pytest.mark.parametrize("commits", [True, False])
async def test_who_comes_second_waits_for_what_the_first_decides(service: Service, commits: bool) -> None:
    """While the first creation is open, nobody can say whether the name is taken; looking first would say no."""

    async def create(tx: Transaction, email: str) -> None:
        await service.services.users.create(
            tx, username="marie", email=email, role="user", password_hash="!", verified=True
        )

    held = service.services.db.transaction()
    await held.__aenter__()
    await create(held, "one@example.org")
    second = asyncio.create_task(service.within(lambda tx: create(tx, "two@example.org")))
    done, _ = await asyncio.wait({second}, timeout=0.2)
    assert not done
    fault = None if commits else RuntimeError("the first one fails")
    await held.__aexit__(type(fault) if fault else None, fault, None)
    if commits:
        with pytest.raises(NameTaken):
            await second
    else:
        await second
    [row] = await service.execute(select(users.c.email))
    assert row.email == ("one@example.org" if commits else "two@example.org")


async def test_a_role_that_does_not_exist_makes_no_user(service: Service) -> None:
    """The message names the field."""
    with pytest.raises(InvalidUser, match="role"):
        await service.within(
            lambda tx: service.services.users.create(
                tx, username="marie", email="m@example.org", role="emperor", password_hash=None, verified=True
            )
        )


# -- the pool, from outside -------------------------------------------------------------------------------------------


@asynccontextmanager
async def occupied(hasher: PasswordHasher, places: int) -> AsyncIterator[None]:
    """Keep so many places of the pool taken."""
    release = threading.Event()
    tasks = [asyncio.create_task(hasher._in_pool(lambda: release.wait(60))) for _ in range(places)]
    await asyncio.sleep(0)
    assert hasher.pending == places
    try:
        yield
    finally:
        release.set()
        await asyncio.gather(*tasks)


@pytest.mark.case("ACC-42")
@pytest.mark.parametrize(("places", "wait"), [(3, 30.0), (1, 0.05)], ids=["full", "late"])
async def test_a_busy_pool_says_come_back_and_everything_else_goes_on(
    database_url: str, redis_url: str, places: int, wait: float
) -> None:
    """503 with Retry-After for whom there is no place or no turn; keys, health and refreshes are answered at once."""
    settings = test_settings(database_url, redis_url=redis_url, hash_threads=1, hash_queue=2, hash_wait=30.0)
    async with running(settings) as service:
        client, user = await service.a_client(), await service.a_user()
        tokens = await service.sign_in(client, user)
        hasher = service.services.hasher
        async with occupied(hasher, places):
            patience, hasher._wait = hasher._wait, wait  # who has a turn gets it in time, also on a busy machine
            for name in (user.username, "nobody.at.all"):
                busy = await service.token(client, grant_type="password", username=name, password=PASSWORD)
                assert busy.status_code == 503
                assert int(busy.headers["retry-after"]) >= 1
                assert busy.json()["error"] == "temporarily_unavailable"
            for _ in range(SIGN_IN_ACCOUNT_NETWORK.burst):  # nobody looked at the password, so it is no failure
                assert await try_sign_in(service, client, user.username, PASSWORD) == 503
            async with asyncio.timeout(20):  # the pool is busy for longer
                for path in ("/.well-known/jwks.json", "/healthz", "/readyz"):
                    assert (await service.http.get(path)).status_code == 200
                assert (await service.refresh(client, tokens["refresh_token"])).status_code == 200
            hasher._wait = patience
        assert await try_sign_in(service, client, user.username, PASSWORD) == 200


@pytest.mark.case("ACC-42")
async def test_three_hundred_sign_ins_at_once_are_answered_or_sent_back(database_url: str) -> None:
    """The pool never holds more than it may; each request ends in 200, 429 or 503, and none in a fault."""
    settings = test_settings(
        database_url, hash_threads=1, hash_queue=3, argon2_memory_kib=32768, trusted_proxies="127.0.0.1"
    )
    async with running(settings) as service:
        client = await service.a_client()
        names = [(await service.a_user()).username for _ in range(10)]
        most = 0

        async def one(number: int) -> int:
            nonlocal most
            answer = await service.token(
                client,
                headers={"x-forwarded-for": f"10.0.0.{number % 250}"},
                grant_type="password",
                username=names[number % 10],
                password=PASSWORD,
            )
            most = max(most, service.services.hasher.pending)
            return answer.status_code

        answers = await asyncio.gather(*(one(number) for number in range(300)))
        assert set(answers) <= {200, 429, 503}
        assert 200 in answers
        assert 503 in answers
        assert most <= 4
        assert service.services.hasher.pending == 0


async def test_a_pool_that_stops_is_busy_and_no_fault(service: Service) -> None:
    """A request that arrives while the service goes down may come back to another replica."""
    service.services.hasher.close()
    with pytest.raises(HashingBusy):
        await service.services.users.prepare_password(Secret(PASSWORD), names=())
    answer = await service.token(await service.a_client(), grant_type="password", username="a", password=PASSWORD)
    assert answer.status_code == 503
