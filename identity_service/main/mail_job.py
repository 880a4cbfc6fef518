"""Sends the mails that wait: what one replica does for all, every few seconds."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar, final

import structlog

from identity_service.accounts.email_flows import EmailTokens
from identity_service.infra.audit import SCHEDULE, AuditTrail
from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.mail import (
    Letterhead,
    MailboxMailer,
    Mailer,
    MailPostponed,
    MailUndeliverable,
    SmtpMailer,
    compose,
)
from identity_service.infra.outbox import Outbox, OutboxMail
from identity_service.infra.runtime import Secret
from identity_service.infra.telemetry.metrics import MAILS, MAILS_WAITING, OLDEST_MAIL
from identity_service.settings import Settings

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")

_AT_ONCE = 4
_LAST_WORD = 5.0  # seconds that mails on their way are given when the server stops

SENT, POSTPONED, GIVEN_UP, DEAD_LINK = "sent", "postponed", "given_up", "dead_link"
NO_SERVER = "no_server"


class Run(Protocol):
    """Does work in one committed transaction, as `Database.run` does."""

    def __call__(self, work: Callable[[Transaction], Awaitable[Answer]], /) -> Awaitable[Answer]:
        """Return what `work` made of a transaction, after it was committed. Raises DatabaseUnavailable."""
        ...


def build_mailer(settings: Settings, say: Callable[[str], None]) -> Mailer | None:
    """Return the way mails take under these settings, or None where none can be sent; `say` hears of each link."""
    if settings.smtp_host:
        return SmtpMailer(
            host=settings.smtp_host,
            port=settings.smtp_port,
            security=settings.smtp_security,
            username=settings.smtp_username,
            password=Secret(settings.smtp_password.get_secret_value()),
        )
    return MailboxMailer(settings.mailbox, say) if settings.mailbox is not None else None


def build_letterhead(settings: Settings) -> Letterhead:
    """Return what every mail says about its sender; only a developer's machine may have no address of its own."""
    return Letterhead(settings.service_name, settings.public_issuer, settings.mail_from or "no-reply@localhost")


async def send_mails(
    run: Run, outbox: Outbox, tokens: EmailTokens, mailer: Mailer, letterhead: Letterhead, audit: AuditTrail
) -> int:
    """
    Send the mails that are due; return how many were sent.

    Four at a time are claimed and sent at once, so that a claim never waits longer than one mail takes. When the mail
    server failed each of them the rest is left for the next time: asking it once more for each mail helps nobody. Mails
    that it postpones one by one hold up no others. No transaction is open while a mail server thinks. Raises
    DatabaseUnavailable.
    """
    sender, sent = _Sender(run, outbox, tokens, mailer, letterhead, audit), 0
    while mails := await run(lambda tx: outbox.claim(tx, _AT_ONCE)):
        outcomes = await _all_of(sender.deliver(mail) for mail in mails)
        sent += outcomes.count(SENT)
        if len(mails) < _AT_ONCE or set(outcomes) == {NO_SERVER}:
            break
    await measure_mails(run, outbox)
    return sent


async def measure_mails(run: Run, outbox: Outbox) -> None:
    """Bring the gauges up to date, also in a replica that sends nothing. Raises DatabaseUnavailable."""
    count, oldest = await run(outbox.waiting)
    MAILS_WAITING.set(count)
    OLDEST_MAIL.set(oldest.timestamp() if oldest is not None else 0)


async def _all_of(work: Iterable[Coroutine[Any, Any, str]]) -> list[str]:
    """
    Return what each came to, when all have; raise what the first that failed raised.

    A cancellation first lets them end by themselves: a mail that is cut off after it was handed over is sent twice.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        await asyncio.wait(tasks, timeout=_LAST_WORD)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return await asyncio.gather(*tasks)


@final
class _Sender:
    """Sends one mail at a time, and notes what came of it."""

    def __init__(
        self, run: Run, outbox: Outbox, tokens: EmailTokens, mailer: Mailer, letterhead: Letterhead, audit: AuditTrail
    ) -> None:
        self._run = run
        self._outbox = outbox
        self._tokens = tokens
        self._mailer = mailer
        self._letterhead = letterhead
        self._audit = audit

    async def deliver(self, mail: OutboxMail) -> str:
        """Send a claimed mail and return its outcome; raises DatabaseUnavailable."""
        outcome, reason = await self._attempt(mail)
        if outcome in (POSTPONED, NO_SERVER) and self._outbox.overdue(mail):
            outcome = GIVEN_UP
        if outcome == GIVEN_UP:
            await self._run(lambda tx: self._give_up(tx, mail, reason))
        elif outcome == SENT:
            await self._run(lambda tx: self._outbox.sent(tx, mail.id))
        elif outcome == DEAD_LINK:
            await self._run(lambda tx: self._outbox.given_up(tx, mail.id))
        MAILS.labels(outcome).inc()
        say = log.info if outcome in (SENT, DEAD_LINK) else log.warning
        say(f"mail.{outcome}", mail=str(mail.id), template=mail.template, attempts=mail.attempts, reason=reason)
        return outcome

    async def _attempt(self, mail: OutboxMail) -> tuple[str, str]:
        try:
            token: Secret | None = None
            if (token_id := mail.token_id) is not None:
                token = await self._run(lambda tx: self._tokens.text_of(tx, token_id))
                if token is None:
                    return DEAD_LINK, ""
            message = compose(
                mail.id,
                template=mail.template,
                recipient=mail.recipient,
                context=mail.context,
                ordered_at=mail.created_at,
                letterhead=self._letterhead,
                token=token,
            )
            await self._mailer.send(message)
        except MailUndeliverable as error:
            return GIVEN_UP, f"refused: {error}"
        except MailPostponed as error:
            return NO_SERVER if error.server_failed else POSTPONED, str(error)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            # Our own fault, or a mail that a newer version ordered: another replica may know it.
            log.exception("mail.failed", mail=str(mail.id), template=mail.template)
            return POSTPONED, type(error).__name__
        return SENT, ""

    async def _give_up(self, tx: Transaction, mail: OutboxMail, reason: str) -> None:
        if await self._outbox.given_up(tx, mail.id):
            detail = {"template": mail.template, "attempts": mail.attempts, "reason": reason}
            await self._audit.record(
                tx, "mail.given_up", origin=None, actor=SCHEDULE, target=str(mail.id), detail=detail
            )
