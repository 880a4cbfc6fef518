"""
The jobs that one replica does for all: each runs in every replica, and a lease in the database lets one work.

A crash loses nothing: every step of a job is a transaction of its own, and the lease of a dead replica runs out.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from identity_service.infra.database import Database, DatabaseUnavailable, Transaction
from identity_service.infra.leases import Leases, LeaseState, NoSuchLease
from identity_service.infra.runtime import to_its_end
from identity_service.infra.telemetry.metrics import JOB_DONE, JOB_INTERVAL, JOB_RUNS

log = structlog.get_logger(__name__)

_WATCHED_EVERY = 15.0  # seconds between two looks at how all the jobs stand
_LONGEST_SLEEP = 60.0  # seconds between two looks at whether a job is due
_MOST_BATCHES = 1000


@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job: what it does, how often it is due, and how long one run may take (both in seconds)."""

    name: str
    every: float
    hold: float
    step: Callable[[], Awaitable[object]]


async def run_once(db: Database, leases: Leases, job: LeasedJob) -> bool:
    """
    Do a job if it is due and nobody else does it; return whether it was done.

    A run that takes longer than its lease is ended before somebody else may begin. Raises what the job raises.
    """
    every, hold = timedelta(seconds=job.every), timedelta(seconds=job.hold)
    if not await db.run(lambda tx: leases.take(tx, job.name, every=every, hold=hold)):
        return False
    done = False
    try:
        async with asyncio.timeout(job.hold * 0.8) as limit:
            await job.step()
        done = True
    except TimeoutError:
        if not limit.expired():
            raise
        JOB_RUNS.labels(job.name, "unfinished").inc()
        log.warning("job.unfinished", job=job.name)
    finally:
        with contextlib.suppress(DatabaseUnavailable):  # then the lease runs out by itself
            await to_its_end(db.run(lambda tx: leases.give_back(tx, job.name, done=done)))
    return done


async def run_for_ever(db: Database, leases: Leases, job: LeasedJob) -> None:
    """
    Do a job whenever it is due; an outage of the database delays it, a fault of ours does not end it.

    Whether it is due stands in the database, so that replicas which live shorter than a job's interval do it as well.
    """
    JOB_INTERVAL.labels(job.name).set(job.every)
    while True:
        await asyncio.sleep(min(job.every, _LONGEST_SLEEP))
        try:
            if await run_once(db, leases, job):
                JOB_RUNS.labels(job.name, "done").inc()
        except (DatabaseUnavailable, NoSuchLease) as error:
            JOB_RUNS.labels(job.name, "postponed").inc()
            log.warning("job.postponed", job=job.name, reason=str(error))
        except Exception:
            JOB_RUNS.labels(job.name, "failed").inc()
            log.exception("job.failed", job=job.name)


def show_states(states: Sequence[LeaseState]) -> None:
    """Show in the metrics when each job last ended well."""
    for state in states:
        if state.done_at is not None:
            JOB_DONE.labels(state.name).set(state.done_at.timestamp())


async def watch(look: Callable[[], Awaitable[None]]) -> None:
    """Look at how everybody's jobs stand, again and again."""
    while True:
        try:
            await look()
        except DatabaseUnavailable:
            pass  # the jobs themselves say so
        except Exception:
            log.exception("job.failed", job="watch")
        await asyncio.sleep(_WATCHED_EVERY)


async def in_batches(db: Database, one_batch: Callable[[Transaction], Awaitable[int]]) -> int:
    """Repeat a piece of work in transactions of its own until it finds nothing more; return how much was done."""
    done = 0
    for _ in range(_MOST_BATCHES):
        count = await db.run(one_batch)
        done += count
        if not count:
            break
    return done
