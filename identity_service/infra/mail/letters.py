"""
What mails say, and how they are written down (RFC 5322).

A mail holds at most one link and no other secret, loads nothing and runs nothing. Its words are in `templates/`, one
file each: the first line is the heading, the rest are paragraphs, which the HTML part repeats word for word.
"""

import re
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import parseaddr
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from identity_service.infra.mail.mailers import MailUndeliverable
from identity_service.infra.runtime import Secret

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).with_name("templates")
_LAYOUT = "layout.html"
_POLICY = SMTP.clone(cte_type="7bit")  # whatever stands between us and the reader, nothing needs to be recoded
_LONGEST_VALUE = 200  # characters of one value in a mail
_LINE = 76  # characters of a line in the text part
# Nothing that ends a header or an address, and nothing that begins an encoded word (RFC 2047 §2): the standard library
# decodes those inside addresses, and what they decode to may be a line of its own.
_ADDRESS = re.compile(r"(?!.*=\?)[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}")


@dataclass(frozen=True, slots=True)
class Template:
    """A kind of mail: the page its link opens, if it has one, and the names that it must be told."""

    page: str | None = None
    names: frozenset[str] = frozenset()


TEMPLATES: Mapping[str, Template] = {
    "verify_email": Template(page="/verify-email"),
    "reset_password": Template(page="/reset-password"),
    "change_email": Template(page="/change-email"),
    "email_change_requested": Template(),
    "email_changed": Template(),
    "account_exists": Template(),
    "username_taken": Template(),
    "password_changed": Template(),
    "api_key_created": Template(names=frozenset({"name"})),
    "api_key_expiring": Template(names=frozenset({"name", "expires_at"})),
    "account_deleted": Template(),
}
"""Every kind of mail. Each also knows `at`, when it was ordered; a name that ends in `_at` is an ISO 8601 instant."""


@dataclass(frozen=True, slots=True)
class Letterhead:
    """What is the same on every mail of this service; `mail_from` is an address, or a name and one in brackets."""

    service_name: str
    issuer: str
    mail_from: str


class Letter(NamedTuple):
    """A mail in words."""

    subject: str
    text: str
    html: str


def check(template: str, context: Mapping[str, Any], *, linked: bool) -> None:
    """Raise ValueError for a mail that could not be written later, when nobody is there any more to be told."""
    if (known := TEMPLATES.get(template)) is None:
        raise ValueError(f"there is no mail named {template}")
    if context.keys() != known.names:
        raise ValueError(f"{template} must be told exactly: {', '.join(sorted(known.names)) or 'nothing'}")
    if linked != (known.page is not None):
        raise ValueError(f"{template} {'needs a' if known.page else 'has no'} link")
    for name in context:
        if name.endswith("_at"):
            _instant(context[name])


def render(
    template: str, context: Mapping[str, Any], *, service_name: str, issuer: str, token: Secret | None = None
) -> Letter:
    """
    Return a mail in words; `token` goes into the link of a template that has one.

    The link begins with the issuer and never with anything a request said. A value is one line, and nothing in it is
    markup. Raises KeyError for an unknown template, jinja2's UndefinedError for a value that is missing.
    """
    page = TEMPLATES[template].page
    link = f"{issuer}{page}?token={token.reveal()}" if page is not None and token is not None else None
    values = {name: _shown(name, value) for name, value in context.items()} | {"service_name": _one_line(service_name)}
    values |= {} if link is None else {"link": link}
    environment = _environment()
    heading, _, body = environment.get_template(f"{template}.txt").render(values).strip().partition("\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in body.split("\n\n") if paragraph.strip()]
    html = environment.get_template(_LAYOUT).render(
        heading=heading, paragraphs=paragraphs, link=link, service_name=values["service_name"]
    )
    text = "\n\n".join(map(_wrapped, [*paragraphs, values["service_name"]])) + "\n"
    return Letter(f"{values['service_name']}: {heading}", text, html)


def compose(
    mail_id: uuid.UUID,
    *,
    template: str,
    recipient: str,
    context: Mapping[str, Any],
    ordered_at: datetime,
    letterhead: Letterhead,
    token: Secret | None = None,
) -> EmailMessage:
    """
    Return the message to one recipient, the same whenever it is asked for.

    Its Message-ID is made from `mail_id`, so that who receives a mail twice can tell. Raises MailUndeliverable for an
    address that cannot stand in a header as it is, and what `render` raises.
    """
    if not _ADDRESS.fullmatch(recipient):
        raise MailUndeliverable("address")
    known = {**context, "at": ordered_at.isoformat()}
    letter = render(template, known, service_name=letterhead.service_name, issuer=letterhead.issuer, token=token)
    name, address = parseaddr(letterhead.mail_from)
    sender = _address(address, name or letterhead.service_name)
    message = EmailMessage(policy=_POLICY)
    message["From"] = sender
    message["To"] = _address(recipient)
    message["Subject"] = letter.subject
    message["Date"] = ordered_at
    message["Message-ID"] = f"<{mail_id}@{sender.domain}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834 §5: no machine shall answer
    message.set_content(letter.text)
    message.add_alternative(letter.html, subtype="html")
    return message


@cache
def _environment() -> "Environment":
    # Only the process that writes mails, and only once it writes one, pays for the library.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _address(address: str, name: str = "") -> Address:
    local, _, domain = address.rpartition("@")
    return Address(name, local, domain)


def _instant(value: Any) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError("an instant without a zone is no instant")
    return moment.astimezone(UTC)


def _shown(name: str, value: Any) -> str:
    if name == "at" or name.endswith("_at"):
        moment = _instant(value)
        return f"{moment.day} {moment:%B %Y, %H:%M} UTC"
    return _one_line(str(value))


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, _LINE, break_long_words=False, break_on_hyphens=False)


def _one_line(value: str) -> str:
    """Return a value as one line without anything that steers: no line breaks, no reversed writing."""
    seen = "".join(letter if letter.isprintable() else " " for letter in value)
    return " ".join(seen.split())[:_LONGEST_VALUE]
