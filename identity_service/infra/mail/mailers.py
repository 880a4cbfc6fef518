"""The ways a message leaves the house: over SMTP (RFC 5321), or into a folder on a developer's machine."""

import asyncio
import contextlib
import os
import re
import ssl
import tempfile
import uuid
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Literal, Protocol, final

from identity_service.infra.runtime import Secret

_LAST_WORD = 2.0  # seconds for QUIT, when the mail has long been accepted
_CLOSING = 421  # whatever was asked, the server is closing (RFC 5321 §3.8)
_POLICY_STATUS = re.compile(r"5\.7\.\d")
_LINK = re.compile(r"https?://\S+")


class MailPostponed(Exception):
    """
    The mail was not handed over, or nobody knows; it shall be tried again. The text names no address.

    `server_failed` says that nobody else's mail would have fared better: it is not about this one.
    """

    def __init__(self, reason: str, *, server_failed: bool) -> None:
        super().__init__(reason)
        self.server_failed = server_failed


class MailUndeliverable(Exception):
    """The mail can never be handed over to this recipient. The text names no address."""


class Mailer(Protocol):
    """Hands a message over to somebody who will deliver it."""

    async def send(self, message: EmailMessage) -> None:
        """Return when the message is in other hands. Raises MailUndeliverable, MailPostponed."""
        ...


@final
class SmtpMailer:
    """
    Hands messages over to one SMTP server, each on a connection of its own.

    With `starttls` and `tls` nothing is said in the clear, to no server whose certificate is not good for `host`: a
    mail that cannot be sent safely waits. The authorities trusted are the system's, or those of `SSL_CERT_FILE`.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        security: Literal["starttls", "tls", "none"],
        username: str = "",
        password: Secret | None = None,
        timeout: float = 20.0,
    ) -> None:
        """Prepare; nothing connects yet. `timeout` is in seconds and for the whole of a message."""
        self._host = host
        self._port = port
        self._security = security
        self._username = username
        self._password = password
        self._timeout = timeout
        self._trust: ssl.SSLContext | None = None

    async def send(self, message: EmailMessage) -> None:
        """Hand one message over. Raises MailUndeliverable when the recipient was refused for good, MailPostponed."""
        # A server that sends no mail need not pay for the library.
        from aiosmtplib import SMTP, SMTPDataError, SMTPException, SMTPRecipientsRefused

        (sender,), (recipient,) = message["From"].addresses, message["To"].addresses
        if self._security != "none" and self._trust is None:
            self._trust = await asyncio.to_thread(ssl.create_default_context)
        client = SMTP(
            hostname=self._host,
            port=self._port,
            username=self._username or None,
            password=self._password.reveal() if self._password else None,
            # The library would ask the resolver for this machine's name, which may take long and tells the name.
            local_hostname=sender.domain,
            timeout=self._timeout,
            use_tls=self._security == "tls",
            start_tls=self._security == "starttls",  # never None, which means: if the server happens to offer it
            tls_context=self._trust,
        )
        try:
            async with asyncio.timeout(self._timeout):
                await client.connect()
                await client.send_message(message, sender=sender.addr_spec, recipients=[recipient.addr_spec])
            with contextlib.suppress(SMTPException, OSError):
                await client.quit(timeout=_LAST_WORD)
        except SMTPRecipientsRefused as error:
            (refusal,) = error.recipients
            if _for_good(refusal.code, refusal.message):
                raise MailUndeliverable(f"{refusal.code}") from None
            raise MailPostponed(f"{refusal.code}", server_failed=refusal.code == _CLOSING) from None
        except SMTPDataError as error:
            raise MailPostponed(_reason(error), server_failed=error.code == _CLOSING) from None
        except (SMTPException, OSError) as error:
            raise MailPostponed(_reason(error), server_failed=True) from None
        finally:
            client.close()


def _for_good(code: int, text: str) -> bool:
    """
    Tell whether a refusal is about the recipient and will stand.

    X.7.X speaks of permission (RFC 3463 §3.8): a relay that does not know us yet would otherwise cost every mail.
    """
    return 500 <= code <= 599 and not _POLICY_STATUS.match(text)


def _reason(error: BaseException) -> str:
    """Return what went wrong, down to its cause, without the server's words: they repeat addresses."""
    code = getattr(error, "code", None)
    named = f"{type(error).__name__} {code}" if isinstance(code, int) else type(error).__name__
    return f"{named}: {_reason(error.__cause__)}" if error.__cause__ is not None else named


@final
class MailboxMailer:
    """Keeps each message as a file that only its owner may read, and says the link aloud; for development."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Prepare; `folder` is made when there is a message. `say` is handed one line for each."""
        self._folder = folder
        self._say = say

    async def send(self, message: EmailMessage) -> None:
        """Write one message to `<id>.eml`, as a whole or not at all. Raises MailPostponed."""
        path = self._folder / f"{uuid.UUID(message['Message-ID'].strip('<>').partition('@')[0])}.eml"
        try:
            await asyncio.to_thread(_write, path, message.as_bytes())
        except OSError as error:
            raise MailPostponed(_reason(error), server_failed=True) from None
        body = message.get_body(("plain",))
        link = _LINK.search(body.get_content()) if body else None
        self._say(f"mail to {message['To']}: {message['Subject']}: {link[0] if link else path}")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # readable by its owner only
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
