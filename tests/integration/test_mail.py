"""Handing mails over: encrypted or not at all, once or again, and never to anybody else."""

import asyncio
import base64
import stat
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Literal

import pytest
import uvloop
from hatchling.builders.wheel import WheelBuilder

from identity_service.infra.mail import (
    TEMPLATES,
    Letterhead,
    MailboxMailer,
    MailPostponed,
    MailUndeliverable,
    SmtpMailer,
    compose,
)
from identity_service.infra.runtime import Secret
from tests.support.servers import free_port
from tests.support.smtp import (
    HOST,
    Behaviour,
    Certificate,
    SmtpServer,
    conversation,
    smtp_server,
    throw_away_certificate,
)

ROOT = Path(__file__).parents[2]
ISSUER = "https://id.example.org"
LETTERHEAD = Letterhead("Example ID", ISSUER, "Example ID <no-reply@example.org>")
ORDERED_AT = datetime(2026, 1, 1, 12, tzinfo=UTC)
TOKEN = "pr_sesame"
PASSWORD = "smtp password of the service"


def a_message(mail_id: uuid.UUID | None = None, *, recipient: str = "mika@example.org") -> EmailMessage:
    """Return a message with a link in it."""
    return compose(
        mail_id or uuid.uuid4(),
        template="reset_password",
        recipient=recipient,
        context={},
        ordered_at=ORDERED_AT,
        letterhead=LETTERHEAD,
        token=Secret(TOKEN),
    )


def mailer_for(server: SmtpServer, security: Literal["starttls", "tls", "none"] = "none", **given: Any) -> SmtpMailer:
    """Return a mailer that knows a server."""
    return SmtpMailer(host=HOST, port=server.port, security=security, **given)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """A certificate for the test's server, which nobody trusts yet."""
    return throw_away_certificate(tmp_path)


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> Callable[[Certificate], None]:
    """Make this process trust a certificate and no other authority, as an operator does."""
    return lambda certificate: monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))


# -- encryption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_mail_goes_to_a_server_with_a_good_certificate(
    security: Literal["starttls", "tls"], certificate: Certificate, trust: Callable[[Certificate], None]
) -> None:
    """Encrypted, to the one recipient, with the envelope's sender as in the message."""
    trust(certificate)
    async with smtp_server(certificate, implicit=security == "tls") as server:
        await mailer_for(server, security).send(a_message())
        (mail,) = server.received
    assert mail.encrypted
    assert (mail.sender, mail.recipients) == ("no-reply@example.org", ("mika@example.org",))
    assert f"{ISSUER}/reset-password?token={TOKEN}" in mail.part("plain")
    assert b"MAIL" not in server.heard_in_clear
    assert TOKEN.encode() not in server.heard_in_clear


@pytest.mark.parametrize("username", ["mailer", ""], ids=["with a password", "without"])
async def test_a_server_without_starttls_gets_nothing(username: str) -> None:
    """Somebody in between who takes the offer away does not get the mail instead."""
    async with smtp_server() as server:
        with pytest.raises(MailPostponed):
            await mailer_for(server, "starttls", username=username, password=Secret(PASSWORD)).send(a_message())
    assert server.received == []
    for word in (b"MAIL", b"AUTH", b"RCPT", b"DATA", TOKEN.encode(), base64.b64encode(PASSWORD.encode())):
        assert word not in server.heard_in_clear
    assert b"EHLO example.org" in server.heard_in_clear  # so there was somebody to tell it to


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_server_with_an_unknown_certificate_gets_nothing(
    security: Literal["starttls", "tls"], certificate: Certificate
) -> None:
    """A certificate that nobody vouches for is what anybody can make."""
    async with smtp_server(certificate, implicit=security == "tls") as server:
        with pytest.raises(MailPostponed, match="SSLCertVerificationError"):
            await mailer_for(server, security, username="mailer", password=Secret(PASSWORD)).send(a_message())
    assert server.received == []
    assert b"MAIL" not in server.heard_in_clear


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_server_with_the_certificate_of_another_gets_nothing(
    security: Literal["starttls", "tls"], tmp_path: Path, trust: Callable[[Certificate], None]
) -> None:
    """It is good, but not for this host."""
    certificate = throw_away_certificate(tmp_path, address="192.0.2.1")
    trust(certificate)
    async with smtp_server(certificate, implicit=security == "tls") as server:
        with pytest.raises(MailPostponed, match="SSLCertVerificationError"):
            await mailer_for(server, security).send(a_message())
    assert server.received == []


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_mails_are_encrypted_on_the_event_loop_that_servers_run_on(
    security: Literal["starttls", "tls"], certificate: Certificate, trust: Callable[[Certificate], None]
) -> None:
    """It brings its own TLS; the other tests run on the standard library's."""
    trust(certificate)
    started: Future[SmtpServer] = Future()
    done = threading.Event()

    async def serve() -> None:
        behaviour = Behaviour(credentials=("mailer", PASSWORD))
        async with smtp_server(certificate, implicit=security == "tls", behaviour=behaviour) as server:
            started.set_result(server)
            await asyncio.to_thread(done.wait)

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(asyncio.run, serve())
        server = started.result(60)
        good = mailer_for(server, security, username="mailer", password=Secret(PASSWORD))
        elsewhere = SmtpMailer(
            host="localhost", port=server.port, security=security
        )  # which the certificate is not for
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(good.send(a_message()))
                with pytest.raises(MailPostponed, match="SSLCertVerificationError"):
                    runner.run(elsewhere.send(a_message()))
        finally:
            done.set()
        serving.result(60)
    (mail,) = server.received
    assert (mail.user, mail.encrypted) == ("mailer", True)


# -- authentication ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_the_mailer_authenticates(
    security: Literal["starttls", "tls"], certificate: Certificate, trust: Callable[[Certificate], None]
) -> None:
    """With its name and password, once the connection is encrypted."""
    trust(certificate)
    behaviour = Behaviour(credentials=("mailer", PASSWORD))
    async with smtp_server(certificate, implicit=security == "tls", behaviour=behaviour) as server:
        await mailer_for(server, security, username="mailer", password=Secret(PASSWORD)).send(a_message())
        (mail,) = server.received
    assert (mail.user, mail.encrypted) == ("mailer", True)
    assert b"AUTH" not in server.heard_in_clear


@pytest.mark.parametrize("username", ["mailer", ""], ids=["wrong password", "no password"])
async def test_a_mail_waits_while_the_mailer_may_not_send(
    username: str, certificate: Certificate, trust: Callable[[Certificate], None]
) -> None:
    """It is our settings that are wrong, not the recipient."""
    trust(certificate)
    behaviour = Behaviour(credentials=("mailer", PASSWORD))
    async with smtp_server(certificate, behaviour=behaviour) as server:
        with pytest.raises(MailPostponed) as refused:
            await mailer_for(server, "starttls", username=username, password=Secret("not that")).send(a_message())
    assert server.received == []
    assert "not that" not in str(refused.value)


# -- refusals and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    ["550 5.1.1 <mika@example.org>: no such user", "501 5.1.3 bad address", "552 mailbox full", "553 no"],
)
async def test_a_recipient_who_is_refused_for_good_is_undeliverable(reply: str) -> None:
    """5yz is the last word (RFC 5321 §4.2.1), and ours does not repeat the server's: it names people."""
    async with smtp_server(behaviour=Behaviour(recipient_reply=reply)) as server:
        with pytest.raises(MailUndeliverable) as refused:
            await mailer_for(server).send(a_message())
    assert str(refused.value) == reply[:3]
    assert server.received == []


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(recipient_reply="450 4.2.0 <mika@example.org>: greylisted"),
        Behaviour(recipient_reply="451 try again later"),
        Behaviour(recipient_reply="421 4.3.2 closing"),
        Behaviour(recipient_reply="554 5.7.1 <mika@example.org>: relay access denied"),
        Behaviour(data_reply="451 4.3.0 no space"),
        Behaviour(data_reply="554 5.6.0 we do not like it"),
    ],
    ids=["greylisted", "later", "closing", "not a relay for us", "no space", "content refused"],
)
async def test_every_other_refusal_postpones_the_mail(behaviour: Behaviour) -> None:
    """Another time, or another setting, may let it through; the reason names no address."""
    async with smtp_server(behaviour=behaviour) as server:
        with pytest.raises(MailPostponed) as refused:
            await mailer_for(server).send(a_message())
        assert server.received == []
        assert "mika" not in str(refused.value)
        behaviour.recipient_reply = behaviour.data_reply = None
        await mailer_for(server).send(a_message())
        assert len(server.received) == 1


@pytest.mark.parametrize(
    ("behaviour", "server_failed"),
    [
        (Behaviour(recipient_reply="450 4.2.0 greylisted"), False),
        (Behaviour(recipient_reply="554 5.7.1 relay access denied"), False),
        (Behaviour(data_reply="452 4.3.1 too big for now"), False),
        (Behaviour(recipient_reply="421 4.3.2 closing"), True),
        (Behaviour(data_reply="421 4.3.2 closing"), True),
        (Behaviour(drops=1), True),
    ],
    ids=["recipient", "policy", "message", "closing before the message", "closing after it", "broken off"],
)
async def test_a_refusal_says_whether_others_would_have_fared_better(behaviour: Behaviour, server_failed: bool) -> None:
    """What is about one recipient or one message must not hold up the rest; 421 is about the server (RFC 5321 §3.8)."""
    async with smtp_server(behaviour=behaviour) as server:
        with pytest.raises(MailPostponed) as refused:
            await mailer_for(server).send(a_message())
    assert refused.value.server_failed is server_failed


async def test_a_server_that_is_away_postpones_the_mail() -> None:
    """Nobody listens at the port."""
    mailer = SmtpMailer(host=HOST, port=free_port(), security="none")
    with pytest.raises(MailPostponed, match="ConnectionRefusedError") as refused:
        await mailer.send(a_message())
    assert refused.value.server_failed


async def test_a_server_that_breaks_off_before_its_answer_postpones_the_mail() -> None:
    """It may have the mail or not; so it gets it again, under the same Message-ID."""
    mail_id = uuid.uuid4()
    async with smtp_server(behaviour=Behaviour(drops=1)) as server:
        with pytest.raises(MailPostponed, match="SMTPServerDisconnected"):
            await mailer_for(server).send(a_message(mail_id))
        await mailer_for(server).send(a_message(mail_id))
    assert [mail.message_id for mail in server.received] == [f"<{mail_id}@example.org>"] * 2


@pytest.mark.case("OPS-27")
async def test_a_server_that_takes_too_long_postpones_the_mail() -> None:
    """It took the message and thinks about it for ever."""
    async with smtp_server(behaviour=Behaviour(gate=asyncio.Event())) as server, asyncio.timeout(30):
        with pytest.raises(MailPostponed, match="TimeoutError"):
            await mailer_for(server, timeout=0.5).send(a_message())


async def test_a_server_that_answers_every_command_late_is_cut_off() -> None:
    """Each answer comes within the time limit, all of them together do not."""

    async def dawdle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test\r\n")
        while await reader.readline():
            await asyncio.sleep(0.3)
            writer.write(b"250 mail.test\r\n")

    async with conversation(dawdle) as port:
        mailer = SmtpMailer(host=HOST, port=port, security="none", timeout=0.5)
        with pytest.raises(MailPostponed, match="TimeoutError"):
            await mailer.send(a_message())


async def test_a_mail_that_was_accepted_is_sent_though_the_goodbye_fails() -> None:
    """Nothing after the server's 250 makes it unsaid; it would be sent twice."""

    async def curt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test\r\n")
        while line := await reader.readline():
            if line.startswith(b"QUIT"):
                break
            writer.write(b"354 go on\r\n" if line.startswith(b"DATA") else b"250 mail.test\r\n")
            if line.startswith(b"DATA"):
                await reader.readuntil(b"\r\n.\r\n")
                writer.write(b"250 mine now\r\n")

    async with conversation(curt) as port:
        await SmtpMailer(host=HOST, port=port, security="none").send(a_message())


# -- nobody else ------------------------------------------------------------------------------------------------------

_SMUGGLED = {
    "new line": "mika@example.org\r\nBcc: eve@evil.example",
    "line feed": "mika@example.org\nBcc: eve@evil.example",
    "second address": "mika@example.org, eve@evil.example",
    "second command": "mika@example.org>\r\nRCPT TO:<eve@evil.example",
    "name": "Mika <mika@example.org>",
    "parameter": "mika@example.org> SIZE=1",
    "comment": "mika(eve@evil.example)@example.org",
    "quoted": '"eve@evil.example, mika"@example.org',
    "encoded word": "=?utf-8?q?eve=40evil.example=2C?=@example.org",
    "encoded lines": "=?utf-8?q?mika=40example.org=0d=0aBcc:eve=40evil.example?=@example.org",
    "encoded in base64": "=?utf-8?b?ZXZlQGV2aWwuZXhhbXBsZSwg?=@example.org",
    "dotless i": "m\u0131ka@example.org",
    "nothing": "",
}


@pytest.mark.case("ACC-19")
@pytest.mark.parametrize("recipient", _SMUGGLED.values(), ids=list(_SMUGGLED))
def test_an_address_that_says_more_than_one_recipient_gets_no_mail(recipient: str) -> None:
    """What cannot stand in a header as it is does not get there."""
    with pytest.raises(MailUndeliverable, match=r"^address$"):
        a_message(recipient=recipient)


@pytest.mark.parametrize(
    "recipient",
    [
        "mika@example.org",
        "o'brien+tag@mail.example.org",
        "MIKA@Example.ORG",
        "a..b@example.org",
        "x{|}~`^!#$%&*/?=@x.org",
    ],
)
async def test_an_address_is_used_as_it_is_stored(recipient: str) -> None:
    """In the envelope and in the header, letter by letter."""
    async with smtp_server() as server:
        await mailer_for(server).send(a_message(recipient=recipient))
        (mail,) = server.received
    assert mail.recipients == (recipient,)
    assert f"\r\nTo: {recipient}\r\n".encode() in mail.content
    assert mail.message.keys().count("To") == 1
    assert not {"Bcc", "Cc"} & set(mail.message.keys())


async def test_what_people_type_stays_out_of_the_headers() -> None:
    """The name of a key is in the body, on one line; the headers are the same whatever it is."""
    name = "x\r\nBcc: eve@evil.example\r\n\r\n<script>alert(1)</script>\r\n.\r\nMAIL FROM:<eve@evil.example>"
    mail_id = uuid.uuid4()
    async with smtp_server() as server:
        for key in ("x", name):
            await mailer_for(server).send(
                compose(
                    mail_id,
                    template="api_key_created",
                    recipient="mika@example.org",
                    context={"name": key},
                    ordered_at=ORDERED_AT,
                    letterhead=LETTERHEAD,
                )
            )
        plain, evil = server.received
    boundary = "Content-Type"
    assert [item for item in plain.message.items() if item[0] != boundary] == [
        item for item in evil.message.items() if item[0] != boundary
    ]
    assert evil.recipients == ("mika@example.org",)
    assert "“x Bcc: eve@evil.example <script>alert(1)</script> . MAIL FROM:<eve@evil.example>”" in " ".join(
        evil.part("plain").split()
    )
    assert "<script>" not in evil.part("html")
    assert "&lt;script&gt;" in evil.part("html")


# -- what a message is ------------------------------------------------------------------------------------------------


@pytest.mark.rfc("5322", "3.6")
@pytest.mark.rfc("3834", "5")
async def test_a_message_says_who_when_and_that_a_machine_wrote_it() -> None:
    """Date and Message-ID are of the order, so that one sent again is the same."""
    mail_id = uuid.uuid4()
    async with smtp_server() as server:
        await mailer_for(server).send(a_message(mail_id))
        (mail,) = server.received
    message = mail.message
    assert message["From"] == "Example ID <no-reply@example.org>"
    assert message["Date"].datetime == ORDERED_AT
    assert message["Message-ID"] == f"<{mail_id}@example.org>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Subject"] == "Example ID: Choose a new password"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]


@pytest.mark.rfc("5322", "2.1.1")
@pytest.mark.parametrize("name", ["Schlüssel", "Schlüssel " * 15], ids=["short", "long"])
async def test_a_message_is_ascii_in_short_lines_whatever_it_says(name: str) -> None:
    """No relay has to recode it, which would break a signature that another one made."""
    message = compose(
        uuid.uuid4(),
        template="api_key_created",
        recipient="mika@example.org",
        context={"name": name},
        ordered_at=ORDERED_AT,
        letterhead=Letterhead("Ünity", ISSUER, "no-reply@example.org"),
    )
    async with smtp_server() as server:
        await mailer_for(server).send(message)
        (mail,) = server.received
    assert mail.content.isascii()
    assert max(map(len, mail.content.split(b"\r\n"))) <= 78
    assert name.strip() in " ".join(mail.part("plain").split())
    assert mail.message["Subject"] == "Ünity: A new API key was made"


def test_a_sender_without_a_name_goes_by_the_name_of_the_service() -> None:
    """People see who writes to them, whatever letters the name has."""
    letterhead = Letterhead('Ünity, "Inc" <eve@evil.example>', ISSUER, "no-reply@example.org")
    message = compose(
        uuid.uuid4(),
        template="account_exists",
        recipient="mika@example.org",
        context={},
        ordered_at=ORDERED_AT,
        letterhead=letterhead,
    )
    read = message_from_bytes(message.as_bytes(), policy=policy.default)
    (sender,) = read["From"].addresses
    assert (sender.display_name, sender.addr_spec) == (letterhead.service_name, "no-reply@example.org")


# -- development ------------------------------------------------------------------------------------------------------


async def test_a_mailbox_keeps_each_message_for_its_owner_and_says_the_link(tmp_path: Path) -> None:
    """One file for each mail, however often it is sent; nobody else on the machine may read it."""
    said: list[str] = []
    mail_id = uuid.uuid4()
    mailer = MailboxMailer(tmp_path / "mailbox", said.append)
    for _ in range(2):
        await mailer.send(a_message(mail_id))
    (path,) = (tmp_path / "mailbox").iterdir()
    assert path.name == f"{mail_id}.eml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert message_from_bytes(path.read_bytes(), policy=policy.default)["To"] == "mika@example.org"
    assert len(said) == 2
    assert f"{ISSUER}/reset-password?token={TOKEN}" in said[0].split()
    assert "mika@example.org" in said[0]


async def test_a_mailbox_says_where_a_mail_without_a_link_is(tmp_path: Path) -> None:
    """So that a developer finds it."""
    said: list[str] = []
    message = compose(
        uuid.uuid4(),
        template="account_exists",
        recipient="mika@example.org",
        context={},
        ordered_at=ORDERED_AT,
        letterhead=LETTERHEAD,
    )
    await MailboxMailer(tmp_path, said.append).send(message)
    assert f"{tmp_path}/" in said[0]
    assert said[0].endswith(".eml")


async def test_a_mailbox_that_cannot_be_written_postpones_the_mail(tmp_path: Path) -> None:
    """As a mail server that is away does."""
    (tmp_path / "mailbox").write_text("not a folder")
    with pytest.raises(MailPostponed):
        await MailboxMailer(tmp_path / "mailbox", print).send(a_message())


# -- shipping ---------------------------------------------------------------------------------------------------------


def test_the_wheel_carries_the_words_of_every_mail() -> None:
    """Templates are not code, and easily left behind."""
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    folder = "identity_service/infra/mail/templates"
    assert {f"{folder}/{name}" for name in (*(f"{name}.txt" for name in TEMPLATES), "layout.html")} <= shipped
