"""What a server does by itself: keep its keys and its clock, and write down what it counted."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, timedelta
from typing import Any

import structlog

from identity_service.infra.audit import SCHEDULE, ChainBroken
from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.outbox import MailQueueFull
from identity_service.infra.runtime import SystemClock
from identity_service.main.leased_jobs import LeasedJob, in_batches, run_for_ever, show_states, watch
from identity_service.main.mail_job import build_letterhead, measure_mails, send_mails
from identity_service.main.services import Services
from identity_service.oauth.signing_keys import NewKey, Plan

log = structlog.get_logger(__name__)

_HOUR = 3600.0
_DAY = 24 * _HOUR
_BATCH = 500  # rows deleted in one transaction: no request waits for longer than that takes
_STRIDE, _REST = 100, 0.01  # rows that are looked at in one go, and seconds in which requests alone are served
_WARNED_BEFORE = timedelta(days=7)


async def load_keys(services: Services) -> None:
    """Load every key before the first request, making those that an empty database lacks. Raises MasterKeyError."""
    await services.db.run(lambda tx: load_data_keys(services, tx))
    await step_keys(services)


async def step_keys(services: Services) -> None:
    """Read the key schedule, correct the clock by the database's, and take the steps that are due."""
    owed = await services.db.run(lambda tx: _poll(services, tx))
    if owed:
        spare = await services.signing_keys.prepare(owed)
        await services.db.run(lambda tx: _advance(services, tx, spare))
        await services.db.run(services.signing_keys.poll)


async def correct_clock(services: Services, tx: Transaction) -> None:
    """Set the clock by the database's, so that instants mean the same here as where they were stored."""
    clock = services.clock
    if isinstance(clock, SystemClock) and not services.db.on_sqlite:
        asked_at = clock.now()
        reference = await tx.database_time()
        clock.correct(reference=reference.astimezone(UTC), asked_at=asked_at, answered_at=clock.now())


async def load_data_keys(services: Services, tx: Transaction, *, actor: str = SCHEDULE) -> None:
    """
    Load the data keys, making those that are missing; raises MasterKeyError.

    `load_keys` does so, too. This alone takes no step of the signing keys' schedule: for who only looks.
    """
    for purpose in await services.data_keys.load(tx):
        await services.audit.record(tx, "data_key.created", origin=None, actor=actor, target=purpose)


async def _poll(services: Services, tx: Transaction) -> Plan:
    await correct_clock(services, tx)
    return await services.signing_keys.poll(tx)


async def _advance(services: Services, tx: Transaction, spare: Sequence[NewKey]) -> None:
    taken = await services.signing_keys.advance(tx, spare)
    for key, activates_at in zip(spare, taken.create, strict=False):
        detail = {"activates_at": activates_at.isoformat()}
        await services.audit.record(tx, "key.created", origin=None, actor=SCHEDULE, target=key.kid, detail=detail)
    for kid in taken.retire:
        await services.audit.record(tx, "key.retired", origin=None, actor=SCHEDULE, target=kid)


async def repeat(name: str, every: float, job: Any) -> None:
    """Run a job for ever; an outage of the database delays it, a fault of ours is logged and does not end it."""
    while True:
        await asyncio.sleep(every)
        try:
            await job()
        except DatabaseUnavailable as error:
            log.warning("job.postponed", job=name, reason=str(error))
        except Exception:
            log.exception("job.failed", job=name)


async def flush_audit(services: Services) -> None:
    """Write down the failures that were counted and not written."""
    services.audit.flushed(await services.db.run(services.audit.flush))


# -- what one replica does for all ------------------------------------------------------------------------------------


def leased_jobs(services: Services) -> list[LeasedJob]:
    """Return the jobs that need doing once, whichever replica does them."""
    jobs = [
        LeasedJob("cleanup", 60.0, 600.0, lambda: clean_up(services)),
        LeasedJob("purge", _HOUR, 600.0, lambda: _purge(services)),
        LeasedJob("audit_seal", 5.0, 120.0, lambda: _seal_audit(services)),
        LeasedJob("audit_retention", _HOUR, 600.0, lambda: _retain_audit(services)),
        LeasedJob("audit_verify", _DAY, 8 * _HOUR, lambda: _verify_audit(services)),
    ]
    if services.mailer is not None:
        jobs += [
            LeasedJob("outbox", 2.0, 300.0, lambda: _send_mails(services)),
            LeasedJob("key_expiry", _HOUR, 600.0, lambda: _warn_of_expiry(services)),
        ]
    return jobs


def for_all(services: Services) -> list[Coroutine[Any, Any, None]]:
    """Return the loops of the jobs that one replica does for all, and of who watches them."""
    loops = [run_for_ever(services.db, services.leases, job) for job in leased_jobs(services)]
    return [*loops, watch(lambda: _look_at_jobs(services))]


async def _look_at_jobs(services: Services) -> None:
    """Keep the metrics of all jobs true in this replica, also of those that another one does."""
    states = await services.db.run(services.leases.all)
    show_states(states)
    services.chain_alarm.hear(states)
    await measure_mails(services.db.run, services.outbox)


async def clean_up(services: Services, *, batch: int = _BATCH) -> dict[str, int]:
    """Delete what has expired for good, in small transactions; return how many rows went, by table."""
    work: dict[str, Callable[[Transaction], Awaitable[int]]] = {
        "refresh_families": lambda tx: services.families.clean_up(tx, batch=batch),
        "revoked_tokens": lambda tx: services.issued.clean_up(tx, batch=batch),
        "email_tokens": lambda tx: services.email_tokens.clean_up(tx, batch=batch),
        "api_keys": lambda tx: services.api_keys.clean_up(tx, batch=batch),
    }
    return {name: await in_batches(services.db, one_batch) for name, one_batch in work.items()}


async def _purge(services: Services) -> None:
    """Forget for good whom somebody deleted so long ago that nobody will want them back."""
    before = services.clock.now() - timedelta(seconds=services.settings.purge_after)

    async def one_batch(tx: Transaction) -> int:
        gone = await services.users.purge(tx, before=before, batch=_BATCH)
        for user_id in gone:
            await services.audit.record(tx, "user.purged", origin=None, actor=SCHEDULE, target=str(user_id))
        return len(gone)

    await in_batches(services.db, one_batch)


async def _seal_audit(services: Services) -> None:
    """Seal what was written since the last time; each batch's seal goes to the log, where no database can cut it."""
    with services.chain_alarm.watching("audit_seal"):
        while True:
            sealed = await services.db.run(services.audit_chain.seal)
            if not sealed.count:
                return
            log.info("audit.sealed", rows=sealed.count, seq=sealed.seq, mac=sealed.mac.hex())


async def _retain_audit(services: Services) -> None:
    """Remove the sealed rows that were kept long enough."""
    older_than = services.clock.now() - timedelta(seconds=services.settings.audit_retention)
    with services.chain_alarm.watching("audit_retention"):
        await in_batches(services.db, lambda tx: services.audit_chain.retain(tx, older_than, _BATCH))


async def _verify_audit(services: Services) -> None:
    """Walk along the whole chain at a pace that no request feels: a few thousand rows a second."""
    with services.chain_alarm.watching("audit_verify"):
        walk = services.audit_chain.verification(page=_STRIDE)
        more = True
        while more:
            more = await services.db.run(walk.advance)
            await asyncio.sleep(_REST)
        if walk.fault is not None:
            raise ChainBroken(walk.fault)
        log.info("audit.verified", rows=walk.checked, seq=walk.seq, mac=walk.mac.hex(), gaps=len(walk.gaps))


async def _send_mails(services: Services) -> None:
    assert services.mailer is not None  # noqa: S101  # or there is no such job
    letterhead = build_letterhead(services.settings)
    await send_mails(
        services.db.run, services.outbox, services.email_tokens, services.mailer, letterhead, services.audit
    )


async def _warn_of_expiry(services: Services) -> None:
    """
    Tell people, once, which of their API keys end soon.

    Each key in a transaction of its own: when no more mails can wait, those that were ordered stay ordered, and the
    others' turn is in the next run. The places that are kept for people who are signed in stay free. A key that was
    made to end so soon needs no warning.
    """

    async def one_key(tx: Transaction) -> int:
        await services.outbox.check_room(tx)
        ending = await services.api_keys.expiring(tx, within=_WARNED_BEFORE, batch=1)
        for key in ending:
            user = await services.users.get(tx, key.user_id) if key.user_id is not None else None
            if user is not None and key.expires_at is not None and key.expires_at - key.created_at > _WARNED_BEFORE:
                context = {"name": key.name, "expires_at": key.expires_at.isoformat()}
                await services.outbox.enqueue(tx, template="api_key_expiring", recipient=user.email, context=context)
        return len(ending)

    try:
        await in_batches(services.db, one_key)
    except MailQueueFull:
        log.warning("mail.not_ordered", template="api_key_expiring")
