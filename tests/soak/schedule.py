"""What breaks and when, drawn from a seed: the same for the same seed and the same time."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.faults import troubles
from tests.faults.troubles import Trouble

# How often each comes, in relation to the others. The dear ones, which hold everybody up for seconds, are rare.
LIKELY: Final[dict[Trouble, int]] = {
    troubles.postgres_is_away: 3,
    troubles.postgres_is_slow: 3,
    troubles.postgres_is_too_slow: 2,
    troubles.postgres_is_silent: 1,
    troubles.postgres_is_silent_for_a_moment: 3,
    troubles.commits_are_cut_off: 5,
    troubles.connections_are_reset: 3,
    troubles.backends_are_terminated: 3,
    troubles.postgres_restarts: 3,
    troubles.transactions_conflict: 3,
    troubles.postgres_only_reads: 2,
    troubles.redis_is_away: 2,
    troubles.redis_is_silent: 2,
    troubles.redis_is_slow: 2,
    troubles.redis_forgets: 2,
    troubles.redis_is_stale: 2,
    troubles.replica_is_killed: 4,
    troubles.replica_leaves: 3,
    troubles.replica_freezes: 2,
    troubles.keys_rotate_once: 3,
    troubles.mail_is_silent: 2,
}
# One of these may come at the same time as one of those: neither stands in the other's way.
_THESE: Final = (
    troubles.replica_is_killed,
    troubles.replica_leaves,
    troubles.redis_is_away,
    troubles.redis_forgets,
    troubles.mail_is_silent,
    troubles.keys_rotate_once,
)
_THOSE: Final = (
    troubles.postgres_is_away,
    troubles.postgres_is_slow,
    troubles.postgres_is_silent_for_a_moment,
    troubles.connections_are_reset,
    troubles.backends_are_terminated,
    troubles.redis_is_silent,
)
_TWO_AT_ONCE: Final = 0.3  # the share of steps, once everything has come by itself
_PAUSES: Final = (2.0, 8.0)  # seconds between the end of one trouble and the next, at least and at most


@dataclass(frozen=True)
class Step:
    """One trouble, or two at once, and how many seconds to wait before."""

    pause: float
    troubles: tuple[Trouble, ...]


def schedule(seed: int) -> Iterator[Step]:
    """Yield what breaks, without an end: every trouble once, in some order, and then by how likely it is."""
    chance = random.Random(seed)  # noqa: S311  # nothing to guess here
    first = list(LIKELY)
    chance.shuffle(first)
    while True:
        pause = chance.uniform(*_PAUSES)
        if first:
            yield Step(pause, (first.pop(),))
        elif chance.random() < _TWO_AT_ONCE:
            yield Step(pause, (chance.choice(_THESE), chance.choice(_THOSE)))
        else:
            yield Step(pause, tuple(chance.choices(list(LIKELY), list(LIKELY.values()))))
