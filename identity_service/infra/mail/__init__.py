"""Mails: their words, how one becomes a message, and the ways a message leaves the house."""

from identity_service.infra.mail.letters import TEMPLATES, Letter, Letterhead, check, compose, render
from identity_service.infra.mail.mailers import MailboxMailer, Mailer, MailPostponed, MailUndeliverable, SmtpMailer

__all__ = [
    "TEMPLATES",
    "Letter",
    "Letterhead",
    "MailPostponed",
    "MailUndeliverable",
    "MailboxMailer",
    "Mailer",
    "SmtpMailer",
    "check",
    "compose",
    "render",
]
