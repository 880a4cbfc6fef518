"""Replicas end in the middle of what they do: by a crash, by order, and one after the other for a new version."""

import asyncio
import json
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import httpx2
import pytest

from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import PasswordHasher
from tests.faults.asking import connected
from tests.faults.crowd import Crowd, at_work
from tests.faults.gates import MOMENTS, gate, waiting
from tests.faults.invariants import breaches, told_and_stored
from tests.faults.stage import Replica, Stage
from tests.faults.troubles import until
from tests.support.balancer import Balancer
from tests.support.service import PASSWORD
from tests.support.waiting import until as soon

REFRESHING = {"refresh": 1.0}
PEOPLE = 3


# -- in the middle of a transaction -----------------------------------------------------------------------------------


@pytest.mark.case("OPS-03")
@pytest.mark.case("OPS-22")
@pytest.mark.case("REF-05")
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_replica_that_is_killed_in_mid_rotation_forks_and_loses_no_session(stage: Stage, moment: str) -> None:
    """Everybody asks the survivor again with the same key, and gets the one successor there is."""
    survivor, victim = stage.both

    def where() -> Sequence[str]:
        return [victim.url if victim.serving else survivor.url]

    async with at_work(
        stage, where=where, people=PEOPLE, machines=0, newcomers_every=None, looks_every=None, habits=REFRESHING
    ) as crowd:
        await crowd.busy(20)
        with crowd.ledger.storm(crash=True):
            with gate(stage, "refresh_families", moment) as connection:
                await until(lambda: waiting(connection) == PEOPLE, "everybody waits")
                await asyncio.to_thread(victim.kill)
            await asyncio.sleep(0.2)
        await crowd.busy(20)
        await crowd.stop()
        assert crowd.ledger.count("refresh", status=0) >= PEOPLE
        victim.start()
        assert await breaches(stage, crowd) == []


def logged_after_the_order(replica: Replica) -> list[int]:
    """Return the statuses of the token requests that a replica answered after it was last told to leave."""
    lines = [json.loads(line) for line in replica.log_text().splitlines() if line.startswith("{")]
    (told,) = [number for number, line in enumerate(lines) if line["event"] == "service.draining"][-1:]
    return [line["status"] for line in lines[told:] if line["event"] == "request" and line["route"] == "/token"]


async def told_to_leave(replica: Replica) -> int:
    """Tell a replica to leave, and nobody to ask it any more; return its exit code once it has left."""
    replica.serving = False
    replica.server.send(signal.SIGTERM)
    return await asyncio.to_thread(replica.ended)


@pytest.mark.case("OPS-21")
@pytest.mark.parametrize("moment", MOMENTS)
async def test_who_is_told_to_leave_in_mid_rotation_still_answers(stage: Stage, moment: str) -> None:
    """No storm at all: nobody loses an answer, and nobody hears that the service is away."""
    stayer, leaver = stage.both

    def where() -> Sequence[str]:
        return [leaver.url if leaver.serving else stayer.url]

    async with at_work(
        stage, where=where, people=PEOPLE, machines=0, newcomers_every=None, looks_every=None, habits=REFRESHING
    ) as crowd:
        await crowd.busy(20)
        with gate(stage, "refresh_families", moment) as connection:
            await until(lambda: waiting(connection) == PEOPLE, "everybody waits")
            leaving = asyncio.create_task(told_to_leave(leaver))
            await until(lambda: "service.draining" in leaver.log_text().rpartition("service.started")[2], "it leaves")
        assert await leaving == 0
        await crowd.busy(20)
        await crowd.stop()
        assert logged_after_the_order(leaver) == [200] * PEOPLE
        leaver.start()
        assert await breaches(stage, crowd) == []


async def hashes(http: httpx2.AsyncClient, replica: Replica, number: int) -> bool:
    """Tell whether so many passwords are being checked."""
    answer = await http.get(f"http://127.0.0.1:{replica.management_port}/metrics")
    return f"identity_hashing_pending {number:.1f}" in answer.text


@pytest.mark.case("OPS-21")
async def test_who_is_told_to_leave_while_it_hashes_still_lets_people_in(stage: Stage) -> None:
    """Two people sign in whose passwords take long to check, as many as are checked at once."""
    _, leaver = stage.both
    async with at_work(stage, people=0, newcomers_every=None, looks_every=None) as crowd, connected() as http:
        hasher = PasswordHasher(memory_kib=64 * 1024, time_cost=8)
        dear = await hasher.hash(Secret(PASSWORD))
        hasher.close()
        users = [await crowd.hands.a_user(f"d{secrets.token_hex(6)}", password_hash=dear) for _ in range(2)]
        form = {"grant_type": "password", "password": PASSWORD, **crowd.clients.app.form}
        asking = [
            asyncio.create_task(http.post(f"{leaver.url}/token", data={**form, "username": user.username}))
            for user in users
        ]
        await soon(lambda: hashes(http, leaver, len(users)), "both are being checked")
        assert await told_to_leave(leaver) == 0
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]
        await crowd.stop()
        assert logged_after_the_order(leaver).count(200) >= 2
        leaver.start()
        assert await told_and_stored(stage, crowd) == []


# -- behind a balancer ------------------------------------------------------------------------------------------------

LATE = 0.3  # seconds after which the balancer heeds what it has heard
BUSY = {"refresh": 6.0, "refresh_without_key": 3.0, "sign_in": 1.0, "revoke": 1.0, "introspect": 3.0, "look": 2.0}


@contextmanager
def balanced(stage: Stage, **how: Any) -> Iterator[Balancer]:
    """Put a balancer before the replicas; yield it when it knows that all are ready."""
    with Balancer(late=LATE, **how) as balancer:
        for replica in stage.replicas:
            join(balancer, replica)
        deadline = time.monotonic() + 10
        while not all(balancer.backend(replica.name).ready for replica in stage.replicas):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield balancer


def join(balancer: Balancer, replica: Replica) -> None:
    """Let a balancer know a replica at its present ports."""
    balancer.put(replica.name, replica.server.port, replica.management_port)


def behind(balancer: Balancer, stage: Stage) -> AbstractAsyncContextManager[Crowd]:
    """Let everybody work through a balancer, on connections that they keep."""
    return at_work(
        stage,
        where=lambda: [balancer.url],
        people=4,
        machines=4,
        looks_every=None,
        newcomers_every=None,
        habits=BUSY,
        pause=0.005,
    )


async def restart(
    balancer: Balancer, replica: Replica, number: signal.Signals = signal.SIGTERM, **changes: str
) -> None:
    """Replace a replica by another one, as a rollout does: the next one is begun only when this one is ready."""
    replica.server.send(number)
    await asyncio.to_thread(replica.ended)
    await asyncio.to_thread(replica.start, **changes)
    join(balancer, replica)
    await until(lambda: balancer.backend(replica.name).ready, f"{replica.name} is ready")


@pytest.mark.case("OPS-20")
async def test_a_rolling_restart_costs_nobody_a_single_request(stage: Stage) -> None:
    """Sign-ins, refreshes, machines' tokens, the JWKS, on kept connections, with a balancer that learns late."""
    with balanced(stage) as balancer:
        async with behind(balancer, stage) as crowd:
            await crowd.busy(30)
            before = sum(crowd.ledger.answers.values())
            for replica in stage.replicas:
                await restart(balancer, replica)
                await crowd.busy(30)
            await crowd.stop()
            answers = crowd.ledger.answers
            assert crowd.ledger.complaints == []
            assert {status for _, status in answers} <= {200, 400}
            assert {what for what, status in answers if status == 400} <= {"refresh of what is over"}
            assert sum(answers.values()) - before > 300
            assert balancer.turned_away == 0
            assert await breaches(stage, crowd) == []


@pytest.mark.case("OPS-20")
async def test_a_restart_that_lacks_something_is_noticed(stage: Stage) -> None:
    """A word, a delay, or anybody who heeds readiness: or the test before this one would show nothing."""
    _, leaver = stage.both

    async def lost(balancer: Balancer, number: signal.Signals, **changes: str) -> int:
        async with behind(balancer, stage) as crowd:
            await crowd.busy(10)
            await restart(balancer, leaver, number, **changes)
            await crowd.stop()
            return len([one for one in crowd.ledger.complaints if "no answer although nobody was killed" in one])

    with balanced(stage) as balancer:
        assert await lost(balancer, signal.SIGKILL, shutdown_delay="0") > 0
        assert await lost(balancer, signal.SIGTERM) > 0
    with balanced(stage, heeds_readiness=False) as balancer:
        assert await lost(balancer, signal.SIGTERM) > 0


@pytest.mark.case("OPS-22")
async def test_a_crash_costs_what_was_in_flight_and_is_over_when_the_balancer_knows(stage: Stage) -> None:
    """Everybody asks again, the survivor answers, and what was told stays true."""
    _, victim = stage.both
    with balanced(stage) as balancer:
        async with behind(balancer, stage) as crowd:
            await crowd.busy(30)
            ledger = crowd.ledger
            with ledger.storm(crash=True):
                await asyncio.to_thread(victim.kill)
                await until(lambda: not balancer.backend(victim.name).ready, "the balancer knows")
            lost = sum(number for (_, status), number in ledger.answers.items() if status == 0)
            await crowd.busy(60)
            await crowd.stop()
            assert lost >= 1
            assert sum(number for (_, status), number in ledger.answers.items() if status == 0) <= lost + 8
            victim.start()
            assert await breaches(stage, crowd) == []
