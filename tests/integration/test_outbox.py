"""Mails wait in the transaction of their act, and leave: nothing is lost, nothing sent twice unless something died."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import select, update

from identity_service.accounts.email_flows import EmailTokens
from identity_service.accounts.users import User
from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.mail import Letterhead, MailboxMailer, Mailer, SmtpMailer
from identity_service.infra.outbox import MailQueueFull, Outbox
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import outbox
from identity_service.main.mail_job import MAILS, MAILS_WAITING, OLDEST_MAIL, build_letterhead, build_mailer, send_mails
from tests.support.clock import FrozenClock
from tests.support.races import held
from tests.support.service import Service, test_settings
from tests.support.smtp import HOST, Behaviour, SmtpServer, smtp_server
from tests.support.waiting import until

Answer = TypeVar("Answer")

ISSUER = "https://id.example.org"
LETTERHEAD = Letterhead("Example ID", ISSUER, "no-reply@example.org")
MINUTES = 60


@dataclass
class MailRoom:
    """What orders and sends the mails of a service, wired by hand."""

    service: Service
    limit: int = 1000
    outbox: Outbox = field(init=False)
    tokens: EmailTokens = field(init=False)

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.service.clock, limit=self.limit)
        lifetimes = {"verify_email": 30 * 86400, "reset_password": 1800, "change_email": 86400}
        self.tokens = EmailTokens(
            self.service.clock,
            self.service.services.data_keys,
            lifetimes=lifetimes,  # type: ignore[arg-type]
        )

    async def order(
        self, recipient: str = "mika@example.org", template: str = "account_exists", **context: Any
    ) -> None:
        """Order a mail without a link."""
        await self.service.within(
            lambda tx: self.outbox.enqueue(tx, template=template, recipient=recipient, context=context)
        )

    async def order_link(self, user: User, template: Any = "verify_email") -> uuid.UUID:
        """Order a mail with a link, and return the id of its token."""

        async def work(tx: Transaction) -> uuid.UUID:
            token_id = await self.tokens.issue(tx, purpose=template, user_id=user.id, epoch=0, email=user.email)
            await self.outbox.enqueue(tx, template=template, recipient=user.email, context={}, token_id=token_id)
            return token_id

        return await self.service.within(work)

    async def send(self, mailer: Mailer, run: Any = None) -> int:
        """Send what is due."""
        return await send_mails(
            run or self.service.services.db.run,
            self.outbox,
            self.tokens,
            mailer,
            LETTERHEAD,
            self.service.services.audit,
        )

    async def rows(self) -> list[Any]:
        """Return what waits, in the order in which it was ordered."""
        rows: list[Any] = await self.service.execute(select(outbox).order_by(outbox.c.id))
        return rows

    def advance(self, seconds: float) -> None:
        """Move the clock."""
        assert isinstance(self.service.clock, FrozenClock)
        self.service.clock.advance(seconds)


@pytest.fixture(params=["service", "embedded"])
def room(request: pytest.FixtureRequest) -> MailRoom:
    """The mail room on PostgreSQL, then on SQLite."""
    return MailRoom(request.getfixturevalue(request.param))


@pytest.fixture
def busy_room(service: Service) -> MailRoom:
    """The mail room on PostgreSQL, where several things really happen at once."""
    return MailRoom(service)


def mailer_for(server: SmtpServer, timeout: float = 20.0) -> SmtpMailer:
    """Return a mailer that knows a server."""
    return SmtpMailer(host=HOST, port=server.port, security="none", timeout=timeout)


@asynccontextmanager
async def counted(outcome: str, by: float) -> AsyncIterator[None]:
    """Assert that the metric of an outcome grows by so much."""
    before = MAILS.labels(outcome)._value.get()
    yield
    assert MAILS.labels(outcome)._value.get() - before == by


# -- ordering ---------------------------------------------------------------------------------------------------------


async def test_a_mail_is_ordered_with_the_act_or_not_at_all(room: MailRoom) -> None:
    """An act that is undone tells nobody that it happened."""

    async def work(tx: Transaction) -> None:
        await room.outbox.enqueue(tx, template="password_changed", recipient="mika@example.org", context={})
        raise LookupError

    with pytest.raises(LookupError):
        await room.service.within(work)
    assert await room.rows() == []


@pytest.mark.parametrize(
    ("template", "context", "linked"),
    [
        ("no_such_mail", {}, False),
        ("api_key_created", {}, False),
        ("api_key_created", {"name": "x", "key": "y"}, False),
        ("api_key_expiring", {"name": "x", "expires_at": "tomorrow"}, False),
        ("api_key_expiring", {"name": "x", "expires_at": "2026-01-01T00:00:00"}, False),
        ("reset_password", {}, False),
        ("password_changed", {}, True),
    ],
    ids=["unknown", "untold", "told more", "no instant", "no zone", "no link", "a link too many"],
)
async def test_a_mail_that_could_not_be_written_is_not_ordered(
    room: MailRoom, template: str, context: dict[str, str], linked: bool
) -> None:
    """Whoever orders it hears so; later there would be nobody to tell."""
    with pytest.raises(ValueError, match=r"."):
        await room.service.within(
            lambda tx: room.outbox.enqueue(
                tx,
                template=template,
                recipient="mika@example.org",
                context=context,
                token_id=uuid.uuid4() if linked else None,
            )
        )
    assert await room.rows() == []


@pytest.mark.case("OPS-27")
async def test_only_so_many_mails_wait(room: MailRoom) -> None:
    """One more is refused, and what wanted it with it; when one has left there is room again."""
    room = MailRoom(room.service, limit=3)
    for _ in range(3):
        await room.order()
    with pytest.raises(MailQueueFull):
        await room.order()
    with pytest.raises(MailQueueFull):
        await room.service.within(room.outbox.check_room)
    assert len(await room.rows()) == 3
    await room.service.within(lambda tx: room.outbox.sent(tx, uuid.uuid4()))
    with pytest.raises(MailQueueFull):
        await room.order()
    first = (await room.rows())[0].id
    await room.service.within(lambda tx: room.outbox.sent(tx, first))
    await room.service.within(room.outbox.check_room)
    await room.order()
    assert len(await room.rows()) == 3


async def test_strangers_cannot_take_the_places_of_people_who_are_signed_in(room: MailRoom) -> None:
    """Or else a flood of forgotten passwords would keep everybody from changing theirs."""
    room = MailRoom(room.service, limit=20)
    for _ in range(17):
        await room.order()
    await room.service.within(room.outbox.check_room)
    await room.order()
    with pytest.raises(MailQueueFull):
        await room.service.within(room.outbox.check_room)
    for _ in range(2):
        await room.order(template="password_changed")
    with pytest.raises(MailQueueFull):
        await room.order(template="password_changed")


# -- sending ----------------------------------------------------------------------------------------------------------


async def test_what_is_due_is_sent_once(room: MailRoom) -> None:
    """All of it, each to its own recipient, with its own link; then nothing waits."""
    people = [await room.service.a_user() for _ in range(11)]
    for user in people:
        await room.order_link(user)
    async with smtp_server() as server, counted("sent", 11):
        assert await room.send(mailer_for(server)) == 11
        assert await room.send(mailer_for(server)) == 0
    assert sorted(mail.recipients for mail in server.received) == sorted((user.email,) for user in people)
    assert len({mail.message_id for mail in server.received}) == 11
    links = [line for mail in server.received for line in mail.part("plain").splitlines() if "token=" in line]
    assert len(set(links)) == 11
    assert all(link.startswith(f"{ISSUER}/verify-email?token=ev_") for link in links)
    assert await room.rows() == []


async def test_the_link_that_is_sent_opens_what_it_was_issued_for(room: MailRoom) -> None:
    """From the mail to the token and back to the user."""
    user = await room.service.a_user()
    await room.order_link(user, "reset_password")
    async with smtp_server() as server:
        await room.send(mailer_for(server))
    (mail,) = server.received
    (link,) = [line for line in mail.part("plain").splitlines() if "token=" in line]
    assert link in mail.part("html")
    token = Secret(link.partition("token=")[2])
    found = await room.service.within(lambda tx: room.tokens.consume(tx, token, "reset_password"))
    assert found is not None
    assert found.user_id == user.id


async def test_a_mail_goes_out_under_the_same_message_id_when_its_sender_died(room: MailRoom) -> None:
    """Nobody can know whether the mail left; after a minute it is sent, by whoever is there, as the same mail."""
    await room.order()
    (dead,) = await room.service.within(lambda tx: room.outbox.claim(tx, 10))
    async with smtp_server() as server:
        room.advance(59)
        assert await room.send(mailer_for(server)) == 0
        room.advance(1)
        assert await room.send(mailer_for(server)) == 1
    assert [mail.message_id for mail in server.received] == [f"<{dead.id}@example.org>"]


async def test_a_mail_that_was_sent_but_not_noted_is_sent_again_as_the_same(room: MailRoom) -> None:
    """The database went away in between: at least once, and the receiver can tell."""
    user = await room.service.a_user()
    await room.order_link(user)
    calls = 0

    async def run(work: Callable[[Transaction], Awaitable[Answer]]) -> Answer:
        nonlocal calls
        calls += 1
        if calls == 3:  # claimed, link derived, and now the note that it was sent
            raise DatabaseUnavailable("gone")
        return await room.service.services.db.run(work)

    async with smtp_server() as server:
        with pytest.raises(DatabaseUnavailable):
            await room.send(mailer_for(server), run)
        room.advance(MINUTES)
        assert await room.send(mailer_for(server)) == 1
    first, second = server.received
    assert first.message_id == second.message_id
    assert first.part("plain") == second.part("plain")
    assert await room.rows() == []


async def test_a_server_that_breaks_off_gets_the_mail_again_as_the_same(room: MailRoom) -> None:
    """It took the message and died before it answered."""
    await room.order()
    async with smtp_server(behaviour=Behaviour(drops=1)) as server:
        assert await room.send(mailer_for(server)) == 0
        assert len(await room.rows()) == 1
        room.advance(MINUTES)
        assert await room.send(mailer_for(server)) == 1
    first, second = server.received
    assert first.message_id == second.message_id
    assert await room.rows() == []


# -- several senders --------------------------------------------------------------------------------------------------


async def test_two_senders_at_once_send_no_mail_twice(room: MailRoom) -> None:
    """Each takes what the other has not."""
    for number in range(20):
        await room.order(f"user{number}@example.org")
    async with smtp_server() as server:
        counts = await asyncio.gather(*(room.send(mailer_for(server)) for _ in range(2)))
    assert sum(counts) == 20
    assert len(server.received) == 20
    assert len({mail.recipients for mail in server.received}) == 20


async def test_a_sender_passes_over_what_another_is_just_taking(busy_room: MailRoom) -> None:
    """It neither waits for the other's claim nor takes the same mail when that is through."""
    room = busy_room
    for _ in range(3):
        await room.order()
    async with held(room.service) as first:
        taken = await room.outbox.claim(first.tx, 2)
        others = await room.service.within(lambda tx: room.outbox.claim(tx, 10))
        await first.commit()
    assert len(taken) == 2
    assert len(others) == 1
    assert {mail.id for mail in taken}.isdisjoint({mail.id for mail in others})
    assert await room.service.within(lambda tx: room.outbox.claim(tx, 10)) == []


async def test_a_claim_is_of_the_mails_that_have_been_due_the_longest(room: MailRoom) -> None:
    """And of no more than were asked for."""
    for number in range(5):
        await room.order(f"user{number}@example.org")
        room.advance(1)
    claims = [await room.service.within(lambda tx: room.outbox.claim(tx, 2)) for _ in range(4)]
    assert [[mail.recipient[4] for mail in claim] for claim in claims] == [["0", "1"], ["2", "3"], ["4"], []]
    assert {mail.attempts for claim in claims for mail in claim} == {1}


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.case("OPS-27")
async def test_nothing_is_lost_and_nothing_doubled_while_the_mail_server_is_away(room: MailRoom) -> None:
    """The mails wait, and each leaves once when the server is back."""
    async with smtp_server() as server:
        await server.stop()
        for number in range(9):
            await room.order(f"user{number}@example.org")
        async with counted("no_server", 4):  # who did not answer four times is not asked five more times
            assert await room.send(mailer_for(server)) == 0
        assert len(await room.rows()) == 9
        await server.start()
        sent = 0
        for _ in range(3):
            sent += await room.send(mailer_for(server))
            room.advance(MINUTES)
        assert sent == 9
    assert sorted(mail.recipients[0] for mail in server.received) == [
        f"user{number}@example.org" for number in range(9)
    ]
    assert await room.rows() == []


@pytest.mark.case("OPS-27")
async def test_who_cannot_be_written_to_now_holds_up_nobody_else(room: MailRoom) -> None:
    """Forty whom the mail server puts off, ordered before one whom it does not."""

    class Relay:
        """A server that knows some recipients, and one that wants to be asked later about all others."""

        async def send(self, message: EmailMessage) -> None:
            known = "good" in str(message["To"])
            await mailer_for(willing if known else hesitant).send(message)

    for number in range(40):
        await room.order(f"poison{number}@nowhere.example")
        room.advance(1)
    await room.order("good@example.org")
    async with (
        smtp_server() as willing,
        smtp_server(behaviour=Behaviour(recipient_reply="450 4.2.0 come back later")) as hesitant,
        counted("postponed", 40),
    ):
        assert await room.send(Relay()) == 1
    assert [mail.recipients for mail in willing.received] == [("good@example.org",)]
    assert {row.attempts for row in await room.rows()} == {1}


async def test_a_mail_that_is_refused_for_now_is_tried_ever_less_often(room: MailRoom) -> None:
    """After 1, 2, 5, 10 and 30 minutes, then every hour; not a second earlier."""
    await room.order()
    behaviour = Behaviour(recipient_reply="450 4.2.0 come back later")
    async with smtp_server(behaviour=behaviour) as server:
        await room.send(mailer_for(server))
        for attempt, minutes in enumerate((1, 2, 5, 10, 30, 60, 60, 60), start=1):
            (row,) = await room.rows()
            assert row.attempts == attempt
            assert row.next_attempt_at - room.service.clock.now() == timedelta(minutes=minutes)
            room.advance(minutes * MINUTES - 1)
            await room.send(mailer_for(server))
            assert (await room.rows())[0].attempts == attempt
            room.advance(1)
            await room.send(mailer_for(server))
        behaviour.recipient_reply = None
        room.advance(60 * MINUTES)
        assert await room.send(mailer_for(server)) == 1
    assert len(server.received) == 1


async def test_a_mail_is_not_tried_for_ever_while_the_mail_server_is_away(room: MailRoom) -> None:
    """After a day it is given up, and audited."""
    await room.order()
    async with smtp_server() as server:
        await server.stop()
        await room.send(mailer_for(server))
        room.advance(24 * 3600)
        await room.send(mailer_for(server))
        await server.start()
    assert await room.rows() == []
    (event,) = await room.service.events("mail.given_up")
    assert event.detail["attempts"] == 2


@pytest.mark.parametrize("outcome", ["delivered", "given up"])
async def test_after_a_day_a_mail_has_its_last_chance(room: MailRoom, outcome: str) -> None:
    """However long nobody was there to send it, it is tried once more before it is given up."""
    await room.order()
    behaviour = Behaviour(recipient_reply="451 later")
    async with smtp_server(behaviour=behaviour) as server:
        room.advance(24 * 3600 - 1)
        await room.send(mailer_for(server))
        assert len(await room.rows()) == 1
        room.advance(MINUTES)
        if outcome == "delivered":
            behaviour.recipient_reply = None
        await room.send(mailer_for(server))
    assert await room.rows() == []
    assert len(server.received) == (1 if outcome == "delivered" else 0)
    assert len(await room.service.events("mail.given_up")) == (0 if outcome == "delivered" else 1)


async def test_a_mail_that_is_refused_for_good_is_given_up_and_audited(room: MailRoom) -> None:
    """Once, under the id of the mail; the row names no address. Other mails go their way."""
    await room.order("gone@example.org")
    (row,) = await room.rows()
    behaviour = Behaviour(recipient_reply="550 5.1.1 <gone@example.org>: no such user")
    async with smtp_server(behaviour=behaviour) as server, counted("given_up", 1):
        assert await room.send(mailer_for(server)) == 0
        behaviour.recipient_reply = None
        await room.order()
        assert await room.send(mailer_for(server)) == 1
    assert [mail.recipients for mail in server.received] == [("mika@example.org",)]
    (event,) = await room.service.events("mail.given_up")
    assert event.target == str(row.id)
    assert event.detail == {"template": "account_exists", "attempts": 1, "reason": "refused: 550"}
    assert "gone" not in str(event)


async def test_an_address_that_cannot_be_written_to_is_given_up(room: MailRoom) -> None:
    """Whatever got into the row, no second recipient hears of it."""
    await room.order("mika@example.org\r\nBcc: eve@evil.example")
    async with smtp_server() as server:
        assert await room.send(mailer_for(server)) == 0
    assert server.received == []
    assert len(await room.service.events("mail.given_up")) == 1


async def test_a_mail_that_this_version_does_not_know_waits_for_one_that_does(room: MailRoom) -> None:
    """While versions run side by side, the newer one orders what the older one cannot write; the rest goes out."""
    await room.order()
    await room.service.execute(update(outbox).values(template="of_the_next_version"))
    await room.order("other@example.org")
    async with smtp_server() as server:
        assert await room.send(mailer_for(server)) == 1
        (row,) = await room.rows()
        assert (row.template, row.attempts) == ("of_the_next_version", 1)
        await room.service.execute(update(outbox).values(template="account_exists"))
        room.advance(MINUTES)
        assert await room.send(mailer_for(server)) == 1


async def test_a_dead_link_is_not_sent(room: MailRoom) -> None:
    """Of tokens that were used or replaced the mail is gone with them; of one that is outdated it goes now."""
    used, replaced, outdated, expired = [await room.service.a_user() for _ in range(4)]
    for user in (used, replaced, outdated, expired):
        await room.order_link(user, "reset_password")
    await room.service.within(lambda tx: room.tokens.revoke_all(tx, used.id))
    await room.order_link(replaced, "reset_password")
    await room.service.change_password(outdated, "another good password")
    async with smtp_server() as server, counted("dead_link", 1):
        assert await room.send(mailer_for(server)) == 2
    assert sorted(mail.recipients[0] for mail in server.received) == sorted([replaced.email, expired.email])
    await room.order_link(expired, "reset_password")
    room.advance(1800)
    async with smtp_server() as server, counted("dead_link", 1):
        assert await room.send(mailer_for(server)) == 0
    assert server.received == []
    assert await room.rows() == []
    assert await room.service.events("mail.given_up") == []


# -- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.case("OPS-27")
async def test_a_slow_mail_server_holds_no_connection_to_the_database(busy_room: MailRoom) -> None:
    """However long it thinks, the pool is whole, and new mails can be ordered."""
    room = busy_room
    for _ in range(4):
        await room.order_link(await room.service.a_user())
    gate = asyncio.Event()
    async with smtp_server(behaviour=Behaviour(gate=gate)) as server:
        sending = asyncio.ensure_future(room.send(mailer_for(server)))
        await server.holds(4)
        pool: Any = room.service.services.db.engine.pool
        await until(lambda: pool.checkedout() == 0)  # a background job may have one for a moment
        await room.order("later@example.org")
        assert not sending.done()
        gate.set()
        await sending
        await room.send(mailer_for(server))
    assert len(server.received) == 5


async def test_no_more_than_four_mails_are_on_their_way_at_once(room: MailRoom) -> None:
    """What is not on its way is not claimed either, so a claim never outlives its minute in a queue."""
    for _ in range(9):
        await room.order()
    on_their_way = most = 0

    class Watched:
        async def send(self, message: EmailMessage) -> None:
            nonlocal on_their_way, most
            on_their_way += 1
            most = max(most, on_their_way)
            assert len([row for row in await room.rows() if row.attempts]) <= 4
            on_their_way -= 1

    assert await room.send(Watched()) == 9
    assert most == 4


async def test_a_mail_on_its_way_may_arrive_while_the_server_stops(room: MailRoom) -> None:
    """A stop in good order makes no mail go out twice."""
    await room.order()
    gate = asyncio.Event()
    async with smtp_server(behaviour=Behaviour(gate=gate)) as server:
        sending = asyncio.ensure_future(room.send(mailer_for(server)))
        await server.holds(1)
        sending.cancel()
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert len(server.received) == 1
    assert await room.rows() == []


async def test_a_mail_that_does_not_arrive_in_time_is_left_when_the_server_stops(
    room: MailRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop does not wait for a mail server that does not answer; the mail is tried again later."""
    monkeypatch.setattr("identity_service.main.mail_job._LAST_WORD", 0.1)
    await room.order()
    behaviour = Behaviour(gate=asyncio.Event())
    async with smtp_server(behaviour=behaviour) as server:
        sending = asyncio.ensure_future(room.send(mailer_for(server)))
        await server.holds(1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(sending, 60)
        behaviour.gate = None
        room.advance(MINUTES)
        assert await room.send(mailer_for(server)) == 1
    assert len(server.received) == 1


# -- what is seen of it -----------------------------------------------------------------------------------------------


async def test_the_gauges_tell_how_many_mails_wait_and_since_when(room: MailRoom) -> None:
    """So that an alarm can tell a backlog from a busy minute."""
    behaviour = Behaviour(recipient_reply="451 later")
    began = room.service.clock.now()
    async with smtp_server(behaviour=behaviour) as server:
        for _ in range(3):
            await room.order()
            room.advance(1)
        await room.send(mailer_for(server))
        assert (MAILS_WAITING._value.get(), OLDEST_MAIL._value.get()) == (3, began.timestamp())
        behaviour.recipient_reply = None
        room.advance(MINUTES)
        await room.send(mailer_for(server))
        assert (MAILS_WAITING._value.get(), OLDEST_MAIL._value.get()) == (0, 0)


# -- wiring -----------------------------------------------------------------------------------------------------------


async def test_the_settings_choose_the_way_mails_take(tmp_path: Path) -> None:
    """SMTP where a server is named, files in development, nothing in a production without a mail server."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'x.db'}"
    development = test_settings(url, data_dir=tmp_path)
    smtp = test_settings(url, smtp_host="mail.example.org", mail_from="Example ID <no-reply@example.org>")
    production = test_settings(
        url,
        environment="production",
        issuer=ISSUER,
        allow_sqlite=True,
        argon2_memory_kib=19456,
        argon2_time_cost=2,
        refusal_delay=0.25,
    )
    assert isinstance(build_mailer(development, lambda _: None), MailboxMailer)
    assert isinstance(build_mailer(smtp, lambda _: None), SmtpMailer)
    assert build_mailer(production, lambda _: None) is None
    assert build_letterhead(smtp) == Letterhead("Identity", smtp.public_issuer, "Example ID <no-reply@example.org>")
    assert build_letterhead(development).mail_from == "no-reply@localhost"


async def test_a_developer_is_told_the_link_at_once(embedded: Service, tmp_path: Path) -> None:
    """The whole way, with the settings' own mailer and letterhead."""
    room, said = MailRoom(embedded), list[str]()
    settings = test_settings(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}", data_dir=tmp_path)
    mailer = build_mailer(settings, said.append)
    assert mailer is not None
    await room.order_link(await embedded.a_user())
    services = embedded.services
    sent = await send_mails(
        services.db.run, room.outbox, room.tokens, mailer, build_letterhead(settings), services.audit
    )
    assert sent == 1
    (line,) = said
    assert f"{settings.public_issuer}/verify-email?token=ev_" in line
