"""Whatever breaks for a few seconds, what people were told stays true, and afterwards all is well by itself."""

import pytest

from tests.faults import troubles
from tests.faults.crowd import at_work
from tests.faults.invariants import breaches
from tests.faults.stage import Stage
from tests.faults.troubles import Trouble

ROWS: dict[Trouble, tuple[str, ...]] = {
    troubles.postgres_is_away: ("OPS-01",),
    troubles.postgres_is_slow: ("OPS-08",),
    troubles.postgres_is_silent: ("OPS-01", "OPS-08"),
    troubles.postgres_is_silent_for_a_moment: ("OPS-01",),
    troubles.commits_are_cut_off: ("OPS-03", "REF-05"),
    troubles.connections_are_reset: ("OPS-03",),
    troubles.backends_are_terminated: ("OPS-03",),
    troubles.postgres_restarts: ("OPS-01", "OPS-03"),
    troubles.transactions_conflict: ("OPS-06",),
    troubles.postgres_only_reads: ("OPS-04",),
    troubles.redis_is_away: ("OPS-10",),
    troubles.redis_is_silent: ("OPS-10",),
    troubles.redis_is_slow: ("OPS-10",),
    troubles.redis_forgets: ("OPS-10",),
    troubles.redis_is_stale: ("OPS-10", "OPS-11"),
    troubles.replica_is_killed: ("OPS-22",),
    troubles.replica_freezes: ("OPS-22",),
}
"""Every trouble, and the rows of the threat list that it is about."""


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(trouble, id=trouble.__name__, marks=[pytest.mark.case(row) for row in rows])
        for trouble, rows in ROWS.items()
    ],
)
async def test_what_people_were_told_stays_true(stage: Stage, trouble: Trouble) -> None:
    """
    No acknowledged write is lost, no half of one is seen, and each family has one live token at most.

    What is fair meanwhile, 503 or no answer at all, the trouble says; a good token is refused at no time.
    """
    async with at_work(stage) as crowd:
        await crowd.busy()
        await trouble(stage, crowd.ledger)
        await crowd.busy()
        await crowd.stop()
        assert await breaches(stage, crowd) == []
