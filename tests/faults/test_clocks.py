"""Replicas whose machines' clocks are wrong, or are set while they serve, live in PostgreSQL's time all the same."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.faults.asking import connected
from tests.faults.crowd import Crowd, at_work
from tests.faults.invariants import breaches
from tests.faults.ledger import LIFE
from tests.faults.stage import Replica, Stage
from tests.faults.wrong_clock import PROGRAM
from tests.rotation.clock import Page
from tests.support.service import Registered
from tests.support.tokens import parts_of

SETTLED = 0.7  # seconds in which nothing may be felt of a jump


async def issued(http: httpx2.AsyncClient, replica: Replica, machine: Registered) -> dict[str, Any]:
    """Return the claims of a new token."""
    answer = await http.post(f"{replica.url}/token", data={"grant_type": "client_credentials", **machine.form})
    assert answer.status_code == 200, answer.text
    return parts_of(answer.json()["access_token"])[1]


async def tells_the_right_time(stage: Stage, crowd: Crowd, *, lasting: float = SETTLED) -> None:
    """Ask both replicas for tokens for a while: each is of now, and lives as long as it should."""
    over = time.monotonic() + lasting
    async with connected() as http:
        while time.monotonic() < over:
            for replica in stage.replicas:
                before = time.time()
                claims = await issued(http, replica, crowd.clients.machine)
                assert before - 5 <= claims["iat"] <= time.time() + 5, replica.name
                assert LIFE * 0.95 <= claims["exp"] - claims["iat"] <= LIFE
            await asyncio.sleep(0.02)


Clocks = dict[str, Page]


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[Stage, Clocks]]:
    """Two replicas whose machines' clocks are four minutes apart, and these clocks."""
    clocks: Clocks = {}
    for name, wrong in (("A", 120.0), ("B", -120.0)):
        clocks[name] = Page.create(tmp_path / name)
        clocks[name].numbers[0] = wrong

    # Polls are far apart: a jump must not be felt before PostgreSQL is asked either.
    with Stage(
        start=lambda replica: replica.start(PROGRAM.format(str(tmp_path / replica.name)), key_poll="5")
    ) as stage:
        yield stage, clocks


@pytest.mark.case("OPS-15")
async def test_nobody_notices_that_the_clocks_are_four_minutes_apart(apart: tuple[Stage, Clocks]) -> None:
    """
    One machine is two minutes ahead and the other behind; then each is set, by seconds and by an hour, back and forth.

    Everybody goes on meanwhile, at either replica.
    """
    stage, clocks = apart
    async with at_work(stage) as crowd:
        await crowd.busy(20)
        await tells_the_right_time(stage, crowd)
        for here, there in ((3600.0, -3600.0), (-3600.0, 3600.0), (1.0, 0.0)):
            clocks["A"].numbers[0], clocks["B"].numbers[0] = here, there
            await tells_the_right_time(stage, crowd)
            await crowd.busy(10)
        await crowd.stop()
        assert await breaches(stage, crowd) == []
