"""Signing keys rotate again and again at two replicas, one of which is killed: the JWKS lacks no key at any time."""

import asyncio

import pytest

from tests.faults.crowd import at_work
from tests.faults.invariants import breaches
from tests.faults.stage import Stage
from tests.faults.troubles import keys_rotate, replica_is_killed

ROTATIONS = 6


@pytest.mark.case("OPS-13")
@pytest.mark.case("OPS-14")
async def test_the_jwks_lacks_no_key_that_signs_or_has_signed(stage: Stage) -> None:
    """
    Every replica's is looked at every ten milliseconds, against the keys of all tokens that anybody was given.

    `make prove-rotation` does so with the real waiting times, in accelerated time, and with a compromise.
    """
    async with at_work(stage, people=2, looks_every=0.01) as crowd:
        await crowd.busy(10)
        before = len(crowd.ledger.kids)
        await keys_rotate(stage, crowd.ledger, rotations=ROTATIONS // 2)
        await asyncio.gather(replica_is_killed(stage, crowd.ledger), crowd.busy(10))
        await keys_rotate(stage, crowd.ledger, rotations=ROTATIONS // 2)
        await crowd.busy(10)
        await crowd.stop()
        assert len(crowd.ledger.kids) >= before + ROTATIONS // 2
        assert crowd.ledger.count("jwks", status=200) > 200
        assert await breaches(stage, crowd) == []
