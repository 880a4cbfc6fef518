"""PostgreSQL has no connection left, or our own pool has none: said soon, and over as soon as there is one."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import psycopg
import pytest

from tests.faults import troubles
from tests.faults.asking import connected
from tests.faults.crowd import at_work
from tests.faults.invariants import breaches
from tests.faults.stage import Stage

ASKING = ("refresh", "introspect", "sign_in", "rename", "profile", "revoke", "make_key")
SOON = 5.0  # seconds: much sooner than an answer from the database, which takes several pieces of a second or more


OURS = "pid FROM pg_stat_activity WHERE application_name = 'identity-service'"


def take_every_connection(stage: Stage) -> ExitStack:
    """Be another tenant of the server, who connects whenever anybody can; return what gives it all back."""
    taken = ExitStack()
    connection = taken.enter_context(stage.connect())
    while True:
        try:
            taken.enter_context(stage.connect())
        except psycopg.OperationalError:
            if not connection.execute(f"SELECT {OURS}").fetchall():
                return taken
            connection.execute("SELECT pg_terminate_backend(pid), " + OURS)


@pytest.fixture
def crowded() -> Iterator[Stage]:
    """A stage on a PostgreSQL with room for few."""
    with Stage(options={"max_connections": "30"}) as stage:
        yield stage


@pytest.mark.case("OPS-25")
async def test_connections_that_others_have_taken_are_an_outage_and_no_stampede(crowded: Stage) -> None:
    """
    503 for what needs the database; the keys are served; nobody connects more often than somebody asks.

    A request tries once, and so does a look at the key schedule; then nobody does before there is another one.
    """
    async with at_work(crowded) as crowd:
        await crowd.busy(20)
        ledger = crowd.ledger
        with ledger.storm(outage=True):
            taken = await asyncio.to_thread(take_every_connection, crowded)
            with taken:
                asked = sum(ledger.answers.values())
                tried = sum(replica.postgres.connections for replica in crowded.replicas)
                away = ledger.count(*ASKING, status=503) + 10
                await troubles.until(lambda: ledger.count(*ASKING, status=503) >= away, "people are turned away")
                asked = sum(ledger.answers.values()) - asked
                tried = sum(replica.postgres.connections for replica in crowded.replicas) - tried
            await troubles.recovered(crowded)
        assert ledger.count("jwks", status=200) == ledger.count("jwks") > 10
        assert 0 < tried <= asked + 30
        await crowd.busy(20)
        await crowd.stop()
        assert await breaches(crowded, crowd) == []


async def slowest_answer(http: httpx2.AsyncClient, stage: Stage, path: str, until: float) -> float:
    """Ask every replica for something that needs no database, again and again; return how long it took at most."""
    slowest = 0.0
    while time.monotonic() < until:
        for replica in stage.replicas:
            began = time.monotonic()
            assert (await http.get(f"{replica.url}{path}")).status_code == 200
            slowest = max(slowest, time.monotonic() - began)
        await asyncio.sleep(0.05)
    return slowest


@pytest.mark.case("OPS-08")
async def test_a_pool_that_a_slow_database_exhausts_turns_people_away_and_recovers(stage: Stage) -> None:
    """Those who find no connection hear so after two seconds; liveness and the keys do not wait behind them."""
    async with at_work(stage, people=24, newcomers_every=None, looks_every=None) as crowd, connected() as http:
        await crowd.busy(60)
        over = time.monotonic() + 6.0
        slow = asyncio.create_task(troubles.postgres_is_too_slow(stage, crowd.ledger))
        found = await asyncio.gather(
            *(slowest_answer(http, stage, path, over) for path in ("/healthz", "/.well-known/jwks.json"))
        )
        await slow
        assert max(found) < SOON / 2
        turned_away = sum(number for (_, status), number in crowd.ledger.answers.items() if status == 503)
        assert turned_away >= 10
        await crowd.busy(60)
        await crowd.stop()
        assert await breaches(stage, crowd) == []
