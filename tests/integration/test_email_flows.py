"""Links in mails: for one purpose, once, for a limited time, and only while the account is as it was."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import select

from identity_service.accounts.email_flows import EmailPurpose, EmailToken, EmailTokens
from identity_service.accounts.users import User
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import Outbox
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import email_tokens, metadata, outbox, users
from tests.support.clock import FrozenClock
from tests.support.races import blocked, database_errors, held
from tests.support.service import Service

LIFETIMES: dict[EmailPurpose, int] = {"verify_email": 86400, "reset_password": 1800, "change_email": 86400}
PURPOSES = list(LIFETIMES)
NEW_ADDRESS = "mika@new.example.org"


@pytest.fixture(params=["service", "embedded"])
def either(request: pytest.FixtureRequest) -> Service:
    """The service on PostgreSQL, then on SQLite."""
    found: Service = request.getfixturevalue(request.param)
    return found


def tokens_of(service: Service) -> EmailTokens:
    """Return the tokens of a service, under its clock and its keys."""
    return EmailTokens(service.clock, service.services.data_keys, lifetimes=LIFETIMES)


async def epoch_of(service: Service, user: User) -> int:
    """Return the user's epoch as it is."""
    epoch: int = (await service.execute(select(users.c.epoch).where(users.c.id == user.id)))[0][0]
    return epoch


async def issued(
    service: Service, user: User, purpose: EmailPurpose = "reset_password", email: str | None = None
) -> Secret:
    """Issue a token and return its text."""
    tokens, epoch = tokens_of(service), await epoch_of(service, user)
    token_id = await service.within(
        lambda tx: tokens.issue(tx, purpose=purpose, user_id=user.id, epoch=epoch, email=email or user.email)
    )
    text_of_it = await service.within(lambda tx: tokens.text_of(tx, token_id))
    assert text_of_it is not None
    return text_of_it


async def look(service: Service, token: Secret, purpose: EmailPurpose = "reset_password") -> EmailToken | None:
    """Look at a token."""
    return await service.within(lambda tx: tokens_of(service).look(tx, token, purpose))


async def consume(service: Service, token: Secret, purpose: EmailPurpose = "reset_password") -> EmailToken | None:
    """Use a token, in a committed transaction."""
    return await service.within(lambda tx: tokens_of(service).consume(tx, token, purpose))


def advance(service: Service, seconds: float) -> None:
    """Move the service's clock."""
    assert isinstance(service.clock, FrozenClock)
    service.clock.advance(seconds)


# -- used once --------------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-24")
@pytest.mark.parametrize("purpose", PURPOSES)
async def test_a_token_says_once_whose_it_is_and_what_it_proves(either: Service, purpose: EmailPurpose) -> None:
    """User and address come from the token alone: the one it was sent to, not the one the account has by now."""
    user, _other = await either.a_user(), await either.a_user()
    token = await issued(either, user, purpose, NEW_ADDRESS)
    assert await consume(either, token, purpose) == EmailToken(user.id, NEW_ADDRESS)
    assert await consume(either, token, purpose) is None
    assert await look(either, token, purpose) is None


@pytest.mark.case("ACC-26")
async def test_looking_at_a_token_does_not_use_it(either: Service) -> None:
    """Mail scanners open every link before its reader does."""
    user = await either.a_user()
    token = await issued(either, user)
    for _ in range(3):
        assert await look(either, token) == EmailToken(user.id, user.email)
    assert await consume(either, token) is not None


async def test_a_use_that_is_rolled_back_leaves_the_token(either: Service) -> None:
    """What the token was used for did not happen, so it is still good."""
    token = await issued(either, await either.a_user())

    async def work(tx: Transaction) -> None:
        assert await tokens_of(either).consume(tx, token, "reset_password") is not None
        raise LookupError

    with pytest.raises(LookupError):
        await either.within(work)
    assert await consume(either, token) is not None


@pytest.mark.parametrize("kept", [True, False], ids=["committed", "rolled back"])
async def test_of_two_uses_at_once_one_finds_the_token(service: Service, kept: bool) -> None:
    """The second waits for the first, and gets what the first leaves."""
    token = await issued(service, await service.a_user())
    async with held(service) as first:
        assert await tokens_of(service).consume(first.tx, token, "reset_password") is not None
        second = await blocked(service, consume(service, token))
        await (first.commit() if kept else first.roll_back())
        assert (await second is None) == kept
    assert await consume(service, token) is None


async def test_of_ten_uses_at_once_one_finds_the_token(either: Service) -> None:
    """Whatever their order."""
    token = await issued(either, await either.a_user())
    found = await asyncio.gather(*(consume(either, token) for _ in range(10)))
    assert sum(one is not None for one in found) == 1


# -- what ends a token ------------------------------------------------------------------------------------------------


async def disable(service: Service, user: User) -> None:
    await service.disable(user)


async def disable_and_enable(service: Service, user: User) -> None:
    await service.disable(user)
    await service.enable(user)


async def switch_off(service: Service, user: User) -> None:
    """Disable a user as no version of this service does: the epoch stays."""
    await service.patch_user(user, enabled=False)


async def change_password(service: Service, user: User) -> None:
    await service.change_password(user, "another good password")


async def delete(service: Service, user: User) -> None:
    await service.patch_user(user, deleted_at=service.clock.now())


async def purge(service: Service, user: User) -> None:
    await service.execute(users.delete().where(users.c.id == user.id))


async def revoke_all(service: Service, user: User) -> None:
    await service.within(lambda tx: tokens_of(service).revoke_all(tx, user.id))


async def issue_another(service: Service, user: User) -> None:
    await issued(service, user)


_ENDINGS = [disable, disable_and_enable, switch_off, change_password, delete, purge, revoke_all, issue_another]


@pytest.mark.case("ACC-25")
@pytest.mark.parametrize("ending", _ENDINGS, ids=lambda ending: ending.__name__)
async def test_a_token_ends_with_what_it_was_issued_for(
    either: Service, ending: Callable[[Service, User], Awaitable[None]]
) -> None:
    """It is refused to who uses it, who looks at it, and who would mail it; another user's is not touched."""
    user, other = await either.a_user(), await either.a_user()
    token, others = await issued(either, user), await issued(either, other)
    (token_id,) = (await either.execute(select(email_tokens.c.id).where(email_tokens.c.user_id == user.id)))[0]
    await ending(either, user)
    assert await look(either, token) is None
    assert await either.within(lambda tx: tokens_of(either).text_of(tx, token_id)) is None
    assert await consume(either, token) is None
    assert await consume(either, others) is not None


@pytest.mark.parametrize("purpose", PURPOSES)
async def test_a_token_ends_with_its_time(either: Service, purpose: EmailPurpose) -> None:
    """To the second."""
    user = await either.a_user()
    token = await issued(either, user, purpose)
    advance(either, LIFETIMES[purpose] - 1)
    assert await look(either, token, purpose) is not None
    advance(either, 1)
    assert await look(either, token, purpose) is None
    assert await consume(either, token, purpose) is None


async def test_a_newer_token_ends_the_older_of_its_purpose_only(either: Service) -> None:
    """Whoever asks again gets one good link, and the links of other mails go on."""
    user = await either.a_user()
    verify, old, new = [
        await issued(either, user, purpose) for purpose in ("verify_email", "reset_password", "reset_password")
    ]
    assert await consume(either, old) is None
    assert await consume(either, verify, "verify_email") is not None
    assert await consume(either, new) is not None


async def test_of_two_tokens_issued_at_once_the_last_one_is_good(service: Service) -> None:
    """Neither caller hears of the other."""
    user = await service.a_user()
    await issued(service, user)
    tokens = tokens_of(service)
    with database_errors() as errors:
        async with held(service) as first:
            first_id = await tokens.issue(
                first.tx, purpose="reset_password", user_id=user.id, epoch=0, email=user.email
            )
            text_of_first = await tokens.text_of(first.tx, first_id)
            second = await blocked(service, issued(service, user))
            await first.commit()
            text_of_second = await second
    assert errors == []
    assert text_of_first is not None
    assert await consume(service, text_of_first) is None
    assert await consume(service, text_of_second) is not None


async def test_many_tokens_issued_at_once_leave_one(either: Service) -> None:
    """A person who clicks impatiently gets several mails, of which one link works, and never an error."""
    user = await either.a_user()
    texts = await asyncio.gather(*(issue_and_derive(either, user) for _ in range(10)))
    found = [await consume(either, token) for token in texts if token is not None]
    assert sum(one is not None for one in found) == 1


async def issue_and_derive(service: Service, user: User) -> Secret | None:
    """Issue a token and return its text, from within one transaction."""
    tokens = tokens_of(service)

    async def work(tx: Transaction) -> Secret | None:
        token_id = await tokens.issue(tx, purpose="reset_password", user_id=user.id, epoch=0, email=user.email)
        return await tokens.text_of(tx, token_id)

    return await service.within(work)


# -- at the same time as a password change ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["committed", "rolled back"])
async def test_a_password_that_is_being_changed_ends_the_token_first(service: Service, kept: bool) -> None:
    """A link that somebody else holds cannot slip past the change that was meant to end it."""
    user = await service.a_user()
    token = await issued(service, user)
    async with held(service) as change:
        assert await service.services.users.set_password(change.tx, user.id, "a hash")
        use = await blocked(service, consume(service, token))
        await (change.commit() if kept else change.roll_back())
        assert (await use is None) == kept


async def test_a_password_change_waits_for_a_token_that_is_being_used(service: Service) -> None:
    """Both happen, the change last; neither waits for the other in a circle."""
    user = await service.a_user()
    token = await issued(service, user)
    tokens = tokens_of(service)

    async def change(tx: Transaction) -> None:
        await service.services.users.set_password(tx, user.id, "the owner's hash")
        await tokens.revoke_all(tx, user.id)

    with database_errors() as errors:
        async with held(service) as reset:
            assert await tokens.consume(reset.tx, token, "reset_password") is not None
            changing = await blocked(service, service.within(change))
            assert await service.services.users.set_password(reset.tx, user.id, "the reset's hash")
            await tokens.revoke_all(reset.tx, user.id)
            await reset.commit()
            await changing
    assert errors == []
    rows = await service.execute(select(users.c.password_hash).where(users.c.id == user.id))
    assert rows[0][0] == "the owner's hash"


# -- what is no token -------------------------------------------------------------------------------------------------


async def test_a_token_is_good_for_its_own_purpose_only(either: Service) -> None:
    """Who was let into a mailbox to confirm an address was not let in to choose a password."""
    user = await either.a_user()
    for purpose in PURPOSES:
        token = await issued(either, user, purpose)
        for other in set(PURPOSES) - {purpose}:
            assert await look(either, token, other) is None
            assert await consume(either, token, other) is None
        assert await consume(either, token, purpose) is not None


async def test_what_was_mistyped_costs_no_query(service: Service) -> None:
    """The checksum tells; only what we may have written is looked for."""
    token = (await issued(service, await service.a_user())).reveal()
    at = next(place for place in range(10, len(token)) if token[place] != token[place + 1])
    swapped = token[:at] + token[at + 1] + token[at] + token[at + 2 :]
    tx = service.services.db.transaction()
    assert tx._connection is None
    for text_of_it in (
        "",
        "pr_",
        token[:-1],
        token + "0",
        token.lower(),
        swapped,
        f"ev_{token[3:]}",
        "pr_é" * 20,
        "\0",
    ):
        assert text_of_it != token
        assert await tokens_of(service).look(tx, Secret(text_of_it), "reset_password") is None
        assert await tokens_of(service).consume(tx, Secret(text_of_it), "reset_password") is None
    assert tx._connection is None


# -- what the database holds ------------------------------------------------------------------------------------------


async def everything_in(service: Service, *tables: str) -> bytes:
    """Return all that the rows of these tables hold, in one heap."""
    heap = b""
    for name in tables:
        for row in await service.execute(select(metadata.tables[name])):
            for value in row:
                heap += value if isinstance(value, bytes) else str(value).encode()
                heap += b"\n"
    return heap


async def test_a_dump_of_the_database_holds_no_token(either: Service) -> None:
    """Neither the text nor the MAC in it, nor anything that a mail's row would have to carry."""
    user = await either.a_user()
    texts = []
    for purpose in PURPOSES:
        tokens, queue = tokens_of(either), Outbox(either.clock, limit=10)

        async def work(
            tx: Transaction, purpose: EmailPurpose = purpose, tokens: EmailTokens = tokens, queue: Outbox = queue
        ) -> Secret | None:
            token_id = await tokens.issue(tx, purpose=purpose, user_id=user.id, epoch=0, email=user.email)
            await queue.enqueue(tx, template=purpose, recipient=user.email, context={}, token_id=token_id)
            return await tokens.text_of(tx, token_id)

        texts.append(await either.within(work))
    heap = await everything_in(either, "email_tokens", "outbox")
    assert user.email.encode() in heap
    for token in texts:
        assert token is not None
        body = token.reveal()[3:-6].encode()
        assert body not in heap
        for start in range(0, len(body), 11):
            assert body[start : start + 11] not in heap


async def test_a_token_is_derived_alike_by_every_replica(either: Service) -> None:
    """From its row and the data key, so that a mail that is sent again carries the same link."""
    user = await either.a_user()
    tokens = tokens_of(either)
    token_id = await either.within(
        lambda tx: tokens.issue(tx, purpose="verify_email", user_id=user.id, epoch=0, email=user.email)
    )
    texts = {
        one.reveal()
        for one in [await either.within(lambda tx: tokens_of(either).text_of(tx, token_id)) for _ in range(3)]
        if one is not None
    }
    (token,) = texts
    assert token.startswith("ev_")
    assert await consume(either, Secret(token), "verify_email") is not None


async def test_a_token_whose_row_was_given_another_purpose_is_good_for_none(either: Service) -> None:
    """The purpose is part of the MAC: neither the text that was mailed nor the one derived now fits the row."""
    user = await either.a_user()
    token = await issued(either, user, "verify_email")
    await either.execute(email_tokens.update().values(purpose="reset_password"))
    (token_id,) = (await either.execute(select(email_tokens.c.id)))[0]
    derived = await either.within(lambda tx: tokens_of(either).text_of(tx, token_id))
    assert derived is not None
    assert derived.reveal()[3:-6] != token.reveal()[3:-6]
    for presented in (token, derived):
        for purpose in PURPOSES:
            assert await consume(either, presented, purpose) is None


async def test_expired_tokens_are_forgotten_in_batches(either: Service) -> None:
    """With the mails that still waited to carry them; live ones stay."""
    tokens, queue = tokens_of(either), Outbox(either.clock, limit=10)

    async def order(tx: Transaction, user: User, purpose: EmailPurpose) -> uuid.UUID:
        token_id = await tokens.issue(tx, purpose=purpose, user_id=user.id, epoch=0, email=user.email)
        await queue.enqueue(tx, template=purpose, recipient=user.email, context={}, token_id=token_id)
        return token_id

    people = [await either.a_user() for _ in range(3)]
    for user in people:
        await either.within(lambda tx, user=user: order(tx, user, "reset_password"))  # type: ignore[misc]
    kept = await either.within(lambda tx: order(tx, people[0], "verify_email"))
    advance(either, LIFETIMES["reset_password"])
    counts = [await either.within(lambda tx: tokens.clean_up(tx, 2)) for _ in range(3)]
    assert counts == [2, 1, 0]
    rows = await either.execute(select(outbox.c.token_id))
    assert [row.token_id for row in rows] == [kept]
