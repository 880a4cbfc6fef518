"""Whether a quantity is flat: a criterion that a storm does not trip and a leak does not pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

_WARM_UP: Final = 0.25  # share of the time in which caches fill, pools settle and each thing happens for the first time
_FEWEST: Final = 12  # samples


@dataclass(frozen=True)
class Trend:
    """
    How a quantity moved after the warm-up, and how much it may have.

    `rise` is what the Theil-Sen line, whose slope is the median of the slopes between all pairs of samples, rises by
    from the end of the warm-up to the end. A quantity is flat when that is no more than `allowed`.
    """

    what: str
    first: float
    last: float
    highest: float
    rise: float
    allowed: float
    seconds: float

    @property
    def flat(self) -> bool:
        """Whether it rose by no more than it may."""
        return self.rise <= self.allowed


def trend(what: str, samples: Sequence[tuple[float, float]], *, allowed: float) -> Trend | None:
    """
    Judge samples of (seconds, quantity), the first quarter of their time left out; None for too few to judge.

    `first` and `last` are the medians of the first and the last third of what is judged.
    """
    if not samples:
        return None
    begin, end = samples[0][0], samples[-1][0]
    settled = [(at, value) for at, value in samples if at >= begin + _WARM_UP * (end - begin)]
    if len(settled) < _FEWEST:
        return None
    slopes = [(w - v) / (u - t) for number, (t, v) in enumerate(settled) for u, w in settled[number + 1 :] if u > t]
    seconds = settled[-1][0] - settled[0][0]
    third = len(settled) // 3
    return Trend(
        what,
        first=median(value for _, value in settled[:third]),
        last=median(value for _, value in settled[-third:]),
        highest=max(value for _, value in samples),
        rise=median(slopes) * seconds,
        allowed=allowed,
        seconds=seconds,
    )
