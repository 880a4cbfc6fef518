"""Mails that tell people what was done to what is theirs, and that nobody has to answer."""

from collections.abc import Mapping
from typing import Any

import structlog

from identity_service.accounts.users import User
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import MailQueueFull, Outbox

log = structlog.get_logger(__name__)


async def tell(
    outbox: Outbox, tx: Transaction, template: str, user: User, context: Mapping[str, Any] | None = None
) -> None:
    """
    Order a notice to a user's proven address.

    To no other: an address that somebody only claimed is a stranger's, whom they could have us write to. When the
    queue is full the act goes on without its notice, or whoever fills it could keep others from acting.
    """
    if user.email_verified_at is None:
        return
    try:
        await outbox.enqueue(tx, template=template, recipient=user.email, context=context or {})
    except MailQueueFull:
        log.warning("mail.not_ordered", template=template)
