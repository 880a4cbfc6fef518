"""What happens is what the metrics show: requests, tokens, sign-ins, keys, hashes, connections, jobs."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from identity_service.infra.audit import ChainBroken
from identity_service.infra.database import (
    Database,
    DatabaseUnavailable,
    PoolExhausted,
    Transaction,
    TransactionConflict,
)
from identity_service.infra.leases import Leases
from identity_service.infra.runtime.hashing import HashingBusy, PasswordHasher
from identity_service.infra.tables import audit_events, leases, signing_keys, users
from identity_service.infra.telemetry.metrics import JOB_DONE
from identity_service.main import jobs
from identity_service.main.jobs import step_keys
from identity_service.main.leased_jobs import LeasedJob, run_for_ever, run_once
from tests.support.asking import ask
from tests.support.clock import FrozenClock
from tests.support.metrics import counted, label_sets, value
from tests.support.service import PASSWORD, Service

REQUESTS, SECONDS = "identity_http_requests_total", "identity_http_request_seconds_count"


# -- requests ---------------------------------------------------------------------------------------------------------


async def test_a_request_is_counted_under_its_route_whatever_its_path(service: Service) -> None:
    """By the route's own name, so that no id and nothing a stranger writes is a label."""
    user = await service.a_user()
    by_name = {"method": "GET", "route": "/v1/admin/users/{user_id}", "status": "401"}
    with counted(2, REQUESTS, **by_name), counted(2, SECONDS, route=by_name["route"], outcome="refused"):
        for user_id in (user.id, "0192f0c1-0000-7000-8000-000000000000"):
            await service.http.get(f"/v1/admin/users/{user_id}")
    with counted(2, REQUESTS, method="GET", route="unmatched", status="404"):
        await service.http.get("/nothing/of/the/kind")
        await service.http.get("/v1/nothing")
    with counted(1, REQUESTS, method="POST", route="/token", status="401"):
        await service.http.post("/token", data={"grant_type": "client_credentials"})
    with counted(1, REQUESTS, method="GET", route="refused", status="414"):
        await service.http.get("/" + "x" * 9000)
    with counted(1, REQUESTS, method="GET", route="unknown host", status="404"):
        await service.http.get("/v1/users/me", headers={"host": "evil.example"})


@pytest.mark.case("SEC-11")
async def test_a_method_nobody_knows_adds_no_series(service: Service) -> None:
    """The HTTP parser knows few; whoever gets one past it is counted with all the others."""
    await ask(service.app, b"/token", method="BREW")
    before = label_sets(REQUESTS)
    with counted(2, REQUESTS, method="other", route="/token", status="405"):
        for method in ("MIX", "STIR"):
            await ask(service.app, b"/token", method=method)
    assert label_sets(REQUESTS) == before


# -- tokens and sign-ins ----------------------------------------------------------------------------------------------


async def test_passwords_are_counted_by_what_became_of_them(service: Service) -> None:
    """Guessing at names and guessing at passwords look different; both look different from a bad deployment."""
    client, user, away = await service.a_client(), await service.a_user(), await service.a_user()
    await service.disable(away)
    for outcome, username, password in (
        ("succeeded", user.username, PASSWORD),
        ("wrong_password", user.username, "wrong password"),
        ("unknown_user", "nobody-of-that-name", PASSWORD),
        ("user_disabled", away.username, PASSWORD),
    ):
        with counted(1, "identity_sign_ins_total", outcome=outcome):
            await service.token(client, grant_type="password", username=username, password=password)


async def test_replays_are_counted_by_kind(service: Service) -> None:
    """A token that was used, one of a family that ended for it, and one in the hands of another client."""
    client, other, user = await service.a_client(), await service.a_client(), await service.a_user()

    def verdict(kind: str) -> AbstractContextManager[None]:
        return counted(1, "identity_refresh_verdicts_total", verdict=kind)

    first = (await service.sign_in(client, user))["refresh_token"]
    second = (await service.refresh(client, first)).json()["refresh_token"]
    with verdict("reuse_detected"):
        await service.refresh(client, first)
    with verdict("revoked"):
        await service.refresh(client, second)
    stolen = (await service.sign_in(client, user))["refresh_token"]
    with verdict("foreign_client"):
        await service.refresh(other, stolen)


# -- signing keys -----------------------------------------------------------------------------------------------------


async def test_the_key_schedule_is_shown_as_it_is_read(service: Service) -> None:
    """Through a whole rotation, and with a next key that nobody can make."""
    clock = service.clock
    assert isinstance(clock, FrozenClock)
    policy = service.services.settings
    await step_keys(service.services)
    assert value("identity_signing_keys", state="active") == value("identity_signing_keys", state="next") == 1
    assert value("identity_signing_key_next_activation_seconds") == policy.signing_key_period
    clock.advance(policy.signing_key_period + 60)
    await step_keys(service.services)
    assert value("identity_signing_keys", state="retiring") == 1
    assert value("identity_signing_key_age_seconds", state="retiring") == policy.signing_key_period + 60
    assert value("identity_signing_keys_read_timestamp_seconds") == clock.now().timestamp()
    assert value("identity_signing_key_steps_due") == 0
    await service.execute(delete(signing_keys).where(signing_keys.c.activates_at > clock.now()))
    await service.within(service.services.signing_keys.poll)
    assert value("identity_signing_key_steps_due") == 1
    assert value("identity_signing_keys", state="next") == 0
    await step_keys(service.services)
    assert value("identity_signing_key_steps_due") == 0
    await service.execute(update(signing_keys).values(compromised_at=clock.now()))
    await service.within(service.services.signing_keys.poll)
    assert value("identity_signing_ready") == 0
    await step_keys(service.services)
    assert value("identity_signing_ready") == 1


# -- hashing ----------------------------------------------------------------------------------------------------------


@contextmanager
def hashing(*, wait: float) -> Iterator[PasswordHasher]:
    """One thread, one place in its queue."""
    hasher = PasswordHasher(memory_kib=32, time_cost=2, threads=1, queue=1, wait=wait)
    yield hasher
    hasher.close()


async def test_the_hashing_pool_shows_its_queue_its_waits_and_whom_it_refused() -> None:
    """And comes back to where it was when all is done."""
    pending, begun, release = value("identity_hashing_pending"), threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return release.wait(20)

    with (
        hashing(wait=20) as hasher,
        counted(1, "identity_hashing_refused_total", reason="queue_full"),
        counted(1, "identity_hashing_refused_total", reason="waited_too_long"),
        counted(1, "identity_hashing_wait_seconds_count"),
        counted(1, "identity_hashing_work_seconds_count"),
    ):
        first = asyncio.create_task(hasher._in_pool(work))
        await asyncio.to_thread(begun.wait, 20)
        hasher._wait = 0.05  # not before the first one works, which a busy machine may make wait for longer
        second = asyncio.create_task(hasher._in_pool(work))
        await asyncio.sleep(0)
        assert value("identity_hashing_pending") == pending + 2
        assert value("identity_hashing_capacity") == 2
        with pytest.raises(HashingBusy):
            await hasher._in_pool(work)
        with pytest.raises(HashingBusy):
            await second
        assert value("identity_hashing_pending") == pending + 1
        release.set()
        assert await first
        assert value("identity_hashing_pending") == pending


async def test_the_time_a_password_waits_is_not_the_time_it_takes() -> None:
    """A long queue calls for more threads, slow work for a cheaper hash."""
    names = ("identity_hashing_wait_seconds_sum", "identity_hashing_work_seconds_sum")
    before, begun, release = [value(name) for name in names], threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return release.wait(20)

    with hashing(wait=20) as hasher:
        first = asyncio.create_task(hasher._in_pool(work))
        await asyncio.to_thread(begun.wait, 20)
        second = asyncio.create_task(hasher._in_pool(lambda: True))
        await asyncio.sleep(0)  # it waits from now on
        await asyncio.sleep(0.03)
        release.set()
        await asyncio.gather(first, second)
    waited, worked = (value(name) - was for name, was in zip(names, before, strict=True))
    assert waited >= 0.02
    assert worked >= 0.02


# -- the database -----------------------------------------------------------------------------------------------------


async def test_connections_are_in_use_for_as_long_as_a_transaction_holds_them(database_url: str) -> None:
    """Not before its first statement, and no longer after any kind of end."""
    db, before = Database(database_url, pool_size=3), value("identity_database_connections_in_use")

    def in_use() -> float:
        return value("identity_database_connections_in_use") - before

    assert value("identity_database_pool_size") == 3
    with counted(2, "identity_database_pool_wait_seconds_count"):
        async with db.transaction() as one, db.transaction() as other, db.transaction():
            assert in_use() == 0
            await one.execute(select(1))
            await other.fetch_hot(text("SELECT 1"), {})
            assert in_use() == 2
    assert in_use() == 0
    with pytest.raises(DBAPIError):
        await db.run(lambda tx: tx.execute(text("SELECT no_such_column")))
    assert in_use() == 0
    held = asyncio.Event()

    async def hold(tx: Transaction) -> None:
        await tx.execute(select(1))
        held.set()
        await asyncio.sleep(20)

    task = asyncio.create_task(db.run(hold))
    await held.wait()
    assert in_use() == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert in_use() == 0
    await db.close()


async def test_database_trouble_is_counted_by_kind(database_url: str) -> None:
    """A full pool is ours, a server that cannot be reached is not, and a lost deadlock happens."""
    db = Database(database_url, pool_size=1, pool_timeout=0.05)
    with counted(1, "identity_database_errors_total", kind="pool_exhausted"):
        async with db.transaction() as holder:
            await holder.execute(select(1))
            with pytest.raises(PoolExhausted):
                async with db.transaction() as tx:
                    await tx.execute(select(1))
    with counted(1, "identity_database_errors_total", kind="conflict"), pytest.raises(TransactionConflict):
        async with db.transaction() as tx:
            await tx.execute(text("DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40P01'; END $$"))
    await db.close()
    nowhere = Database("postgresql+psycopg://nobody@127.0.0.1:1/none", pool_size=1)
    with counted(1, "identity_database_errors_total", kind="unavailable"), pytest.raises(DatabaseUnavailable):
        async with nowhere.transaction() as tx:
            await tx.execute(select(1))
    await nowhere.close()


async def test_a_broken_constraint_is_no_trouble_of_the_database(service: Service) -> None:
    """What a request did wrong wakes nobody."""
    await service.a_user("ada")
    kinds = ("unavailable", "pool_exhausted", "conflict")
    before = [value("identity_database_errors_total", kind=kind) for kind in kinds]
    with pytest.raises(IntegrityError):
        await service.execute(update(users).values(username=None))
    assert [value("identity_database_errors_total", kind=kind) for kind in kinds] == before


# -- jobs -------------------------------------------------------------------------------------------------------------


async def test_a_job_shows_how_often_it_is_due_and_a_run_that_did_not_end(service: Service) -> None:
    """Without the interval nobody could say that it is late."""
    db, ours = service.services.db, Leases(service.clock)
    loop = asyncio.create_task(run_for_ever(db, ours, LeasedJob("purge", 3600, 600, lambda: asyncio.sleep(0))))
    await asyncio.sleep(0)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert value("identity_job_interval_seconds", job_name="purge") == 3600
    with counted(1, "identity_job_runs_total", job_name="cleanup", outcome="unfinished"):
        assert not await run_once(db, ours, LeasedJob("cleanup", 60, 0.05, lambda: asyncio.sleep(20)))


async def test_each_replica_shows_when_a_job_was_last_done_by_any(service: Service) -> None:
    """One that was never done has no series: nobody knows a time for it."""
    JOB_DONE.clear()
    done_at = service.clock.now() - timedelta(minutes=5)
    await service.execute(update(leases).where(leases.c.name == "cleanup").values(done_at=done_at))
    await jobs._look_at_jobs(service.services)
    assert label_sets("identity_job_last_done_timestamp_seconds") == {(("job_name", "cleanup"),)}
    assert value("identity_job_last_done_timestamp_seconds", job_name="cleanup") == done_at.timestamp()


@pytest.mark.case("SEC-06")
async def test_a_replica_that_found_the_trail_broken_hears_when_another_finds_it_whole(service: Service) -> None:
    """Or its alarm would ring for as long as it lives."""
    clock, alarm = service.clock, {"job_name": "audit_seal"}
    assert isinstance(clock, FrozenClock)
    record = service.services.audit.record
    await service.within(lambda tx: record(tx, "user.created", origin=None, actor="cli", target="x"))
    await service.run_job("audit_seal")
    await service.execute(update(leases).where(leases.c.name == "audit_seal").values(done_at=clock.now()))
    sealed = update(audit_events).where(audit_events.c.seq.is_not(None))
    await service.execute(sealed.values(seq=audit_events.c.seq + 7))
    clock.advance(10)
    with pytest.raises(ChainBroken):
        await service.run_job("audit_seal")
    await jobs._look_at_jobs(service.services)
    assert value("identity_audit_chain_broken", **alarm) == 1, "what was done before the fault proves nothing"
    await service.execute(sealed.values(seq=audit_events.c.seq - 7))
    clock.advance(10)
    await service.execute(update(leases).where(leases.c.name == "audit_seal").values(done_at=clock.now()))
    await jobs._look_at_jobs(service.services)
    assert value("identity_audit_chain_broken", **alarm) == 0
