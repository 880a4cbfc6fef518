"""One replica at a time does a job; a dead one's lease runs out; a crash loses nothing."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import select

from identity_service.infra.database import Database, DatabaseUnavailable, Transaction
from identity_service.infra.leases import Leases, NoSuchLease
from identity_service.infra.tables import leases
from identity_service.main.jobs import leased_jobs
from identity_service.main.leased_jobs import JOB_RUNS, LeasedJob, run_for_ever, run_once
from tests.support.clock import FrozenClock
from tests.support.patience import patient_database
from tests.support.service import Service
from tests.support.waiting import until

MINUTE = timedelta(minutes=1)
HOLD = timedelta(minutes=5)


@pytest.fixture
async def db(any_url: str) -> AsyncIterator[Database]:
    database = patient_database(any_url)
    yield database
    await database.close()


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


async def take(db: Database, mine: Leases, *, name: str = "cleanup") -> bool:
    return await db.run(lambda tx: mine.take(tx, name, every=MINUTE, hold=HOLD))


async def give_back(db: Database, mine: Leases, *, done: bool = True) -> None:
    await db.run(lambda tx: mine.give_back(tx, "cleanup", done=done))


async def test_of_two_replicas_one_gets_the_lease(db: Database, clock: FrozenClock) -> None:
    """And the other one does when the first gives it back without having finished."""
    one, two = Leases(clock), Leases(clock)
    assert await take(db, one)
    assert not await take(db, two)
    await give_back(db, one, done=False)
    assert await take(db, two)


async def test_a_job_that_was_done_is_not_due_at_once(db: Database, clock: FrozenClock) -> None:
    """Five replicas that each ask every minute do it once a minute in all."""
    one, two = Leases(clock), Leases(clock)
    assert await take(db, one)
    await give_back(db, one)
    assert not await take(db, two)
    clock.advance(60)
    assert await take(db, two)


async def test_the_lease_of_a_dead_replica_runs_out(db: Database, clock: FrozenClock) -> None:
    """Nobody has to be asked, and nothing restarted."""
    dead, heir = Leases(clock), Leases(clock)
    assert await take(db, dead)
    clock.advance(HOLD.total_seconds() - 1)
    assert not await take(db, heir)
    clock.advance(1)
    assert await take(db, heir)


async def test_who_lost_its_lease_cannot_give_it_back(db: Database, clock: FrozenClock) -> None:
    """A replica that slept through its lease does not take it from its heir."""
    sleeper, heir, third = Leases(clock), Leases(clock), Leases(clock)
    assert await take(db, sleeper)
    clock.advance(HOLD.total_seconds())
    assert await take(db, heir)
    await give_back(db, sleeper)
    assert not await take(db, third)


async def test_a_job_without_a_row_is_noticed(db: Database, clock: FrozenClock) -> None:
    """It would never run, and nobody would know."""
    with pytest.raises(NoSuchLease, match="unheard_of"):
        await take(db, Leases(clock), name="unheard_of")


async def test_a_job_whose_lease_comes_with_the_next_migration_is_postponed(db: Database, clock: FrozenClock) -> None:
    """This version on the schema of the one before: no fault of ours, and no traceback once a minute."""
    postponed = JOB_RUNS.labels("unheard_of", "postponed")
    before = postponed._value.get()
    never = LeasedJob("unheard_of", 0.01, 60.0, asyncio.Event().wait)
    task = asyncio.create_task(run_for_ever(db, Leases(clock), never))
    await until(lambda: postponed._value.get() > before)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)  # or it would leave a connection that nobody closes


async def test_a_lease_done_by_a_clock_that_ran_ahead_is_due_again(db: Database, clock: FrozenClock) -> None:
    """Or a wrong clock, corrected since, would stop the job for as long as it was wrong."""
    clock.advance(86400)
    ahead = Leases(clock)
    assert await take(db, ahead)
    await give_back(db, ahead)
    clock.advance(-86400)
    assert await take(db, Leases(clock))


async def test_who_is_stopped_while_giving_back_has_given_back_when_it_ends(
    db: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops a server closes the database next: nothing may still be on its way then."""
    began, go_on = asyncio.Event(), asyncio.Event()
    give = Leases.give_back

    async def slowly(self: Leases, tx: Transaction, name: str, *, done: bool) -> None:
        began.set()
        await go_on.wait()
        await give(self, tx, name, done=done)

    async def step() -> None:
        return

    monkeypatch.setattr(Leases, "give_back", slowly)
    running = asyncio.create_task(run_once(db, Leases(clock), LeasedJob("cleanup", 60, 300, step)))
    await began.wait()
    running.cancel()
    assert await asyncio.wait([running], timeout=0.1) == (set(), {running})
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    clock.advance(60)
    assert await take(db, Leases(clock))


async def test_two_that_ask_at_the_same_instant_do_not_both_get_it(database_url: str, clock: FrozenClock) -> None:
    """The second waits for the first transaction, which is held open by hand, and then finds the lease taken."""
    db = patient_database(database_url)
    one, two = Leases(clock), Leases(clock)
    async with db.transaction() as held:
        assert await one.take(held, "cleanup", every=MINUTE, hold=HOLD)
        second = asyncio.create_task(take(db, two))
        await asyncio.sleep(0.2)
        assert not second.done()
    assert not await second
    await db.close()


async def test_a_job_that_fails_gives_its_lease_back_and_stays_due(db: Database, clock: FrozenClock) -> None:
    """Another replica, or the same one, tries again."""
    runs = []

    async def step() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("a fault of ours")

    mine = Leases(clock)
    job = LeasedJob("cleanup", 60, 300, step)
    with pytest.raises(RuntimeError):
        await run_once(db, mine, job)
    assert await run_once(db, mine, job)
    assert not await run_once(db, mine, job)
    assert len(runs) == 2


async def test_a_replica_that_lives_shortly_does_what_is_due_seldom(
    db: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a service that is rolled out every hour would never do what is due every hour."""
    monkeypatch.setattr("identity_service.main.leased_jobs._LONGEST_SLEEP", 0.01)
    runs, done = 0, asyncio.Event()

    async def step() -> None:
        nonlocal runs
        runs += 1
        done.set()

    loop = asyncio.create_task(run_for_ever(db, Leases(clock), LeasedJob("purge", 3600, 300, step)))
    async with asyncio.timeout(20):
        await done.wait()
    await asyncio.sleep(0.2)
    assert runs == 1, "and no more often than it is due"
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop


async def test_a_run_that_takes_too_long_is_ended_before_somebody_else_may_begin(
    db: Database, clock: FrozenClock
) -> None:
    """It goes on in the next run; two never work at once."""
    ended = []

    async def step() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(1)

    assert not await run_once(db, Leases(clock), LeasedJob("cleanup", 60, 0.5, step))
    assert ended == [1]
    assert await take(db, Leases(clock))


async def test_a_stopping_server_gives_its_leases_back(db: Database, clock: FrozenClock) -> None:
    """The next replica need not wait for them to run out."""
    began = asyncio.Event()

    async def step() -> None:
        began.set()
        await asyncio.sleep(30)

    running = asyncio.create_task(run_once(db, Leases(clock), LeasedJob("cleanup", 60, 300, step)))
    await began.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await take(db, Leases(clock))


@pytest.mark.parametrize("fault", [RuntimeError("a fault of ours"), KeyError("a name that is not there")], ids=repr)
async def test_a_loop_outlives_a_fault_and_an_outage(db: Database, clock: FrozenClock, fault: Exception) -> None:
    """Both are counted, each as what it is, and the job is done when it can be."""
    runs: list[int] = []
    third = asyncio.Event()

    async def step() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise fault
        if len(runs) == 2:
            raise DatabaseUnavailable("away")
        third.set()

    def counted(outcome: str) -> float:
        return float(JOB_RUNS.labels("purge", outcome)._value.get())

    before = {outcome: counted(outcome) for outcome in ("failed", "postponed")}
    loop = asyncio.create_task(run_for_ever(db, Leases(clock), LeasedJob("purge", 0.01, 300, step)))
    async with asyncio.timeout(20):
        await third.wait()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert {outcome: counted(outcome) - before[outcome] for outcome in ("failed", "postponed")} == {
        "failed": 1,
        "postponed": 1,
    }


async def test_every_job_has_its_lease(service: Service) -> None:
    """A job that the migrations forgot would never run."""

    async def names(tx: Transaction) -> set[str]:
        return set((await tx.execute(select(leases.c.name))).scalars())

    assert {job.name for job in leased_jobs(service.services)} == await service.within(names)
