"""The chart of a run: what was asked and what was held, over the time, with the troubles behind it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.soak.picture import Colour, Picture, text_width
from tests.soak.resources import MIB
from tests.soak.run import Outcome

_WIDTH: Final = 1400
_LEFT, _RIGHT, _TOP, _PANEL, _GAP = 90, 20, 40, 170, 46
_INK: Final[Colour] = (40, 40, 40)
_GRID: Final[Colour] = (215, 215, 215)
_STORM: Final[Colour] = (246, 232, 208)
_COLOURS: Final[Sequence[Colour]] = ((31, 96, 170), (200, 70, 40), (60, 140, 60), (120, 80, 160))
_TICKS: Final = (1, 2, 5)
_SHORT: Final = 64  # letters of a name in a legend


@dataclass(frozen=True)
class Curve:
    """One line: its name, its colour, and its points in (seconds, quantity)."""

    name: str
    colour: Colour
    points: Sequence[tuple[float, float]]


def chart(outcome: Outcome) -> bytes:
    """Return the chart as PNG; the time in which something was broken has another ground."""
    panels = _panels(outcome)
    end = max([point[0] for curves in panels.values() for curve in curves for point in curve.points], default=1.0)
    picture = Picture(_WIDTH, _TOP + len(panels) * (_PANEL + _GAP))
    plan = outcome.plan
    title = f"seed {plan.seed}, {plan.seconds / 60:g} minutes, {len(outcome.storms)} troubles (their time is tinted)"
    picture.text(_LEFT, 12, title, _INK)
    for number, (name, curves) in enumerate(panels.items()):
        _panel(picture, _TOP + number * (_PANEL + _GAP) + 14, name, curves, outcome, end)
    return picture.png()


def _panels(outcome: Outcome) -> dict[str, list[Curve]]:
    resources = outcome.resources
    assert resources is not None
    rates = outcome.rates
    spans = [(late, early) for early, late in itertools.pairwise(rates) if late[0] > early[0]]
    asked = [(late[0], (late[1] - early[1]) / (late[0] - early[0])) for late, early in spans]
    failed = [(late[0], (late[2] - early[2]) / (late[0] - early[0])) for late, early in spans]
    names = sorted({name for name, _ in resources.of})

    def held(what: str, unit: float = 1.0) -> list[Curve]:
        return [
            Curve(
                f"replica {name}" if life == 1 else "",
                _COLOURS[names.index(name)],
                [(sample.at, getattr(sample, what) / unit) for sample in samples],
            )
            for (name, life), samples in sorted(resources.of.items())
        ]

    return {
        "answers a second": [Curve("all", _COLOURS[0], asked), Curve("503 or none", _COLOURS[1], failed)],
        "resident memory, MiB": held("memory", MIB),
        "file descriptors": held("descriptors"),
        "sessions of PostgreSQL, both replicas": [Curve("", _COLOURS[2], resources.sessions)],
    }


def _panel(picture: Picture, top: int, name: str, curves: list[Curve], outcome: Outcome, end: float) -> None:
    bottom, right = top + _PANEL, _WIDTH - _RIGHT
    highest = max([point[1] for curve in curves for point in curve.points], default=1.0)
    step = _step(highest, 4)
    ceiling = step * max(1, math.ceil(highest / step))

    def x_of(seconds: float) -> float:
        return _LEFT + seconds / end * (right - _LEFT)

    def y_of(value: float) -> float:
        return bottom - value / ceiling * _PANEL

    for storm in outcome.storms:
        picture.fill(round(x_of(storm.begin)), top, round(x_of(storm.end)) + 1, bottom, _STORM)
    for number in range(round(ceiling / step) + 1):
        y = round(y_of(number * step))
        picture.fill(_LEFT, y, right, y + 1, _GRID)
        label = f"{number * step:g}"
        picture.text(_LEFT - 10 - text_width(label), y - 5, label, _INK)
    every = _step(end, 10)
    for number in range(int(end / every) + 1):
        x = round(x_of(number * every))
        picture.fill(x, bottom, x + 1, bottom + 5, _INK)
        label = f"{number * every:g} s"
        picture.text(x - text_width(label) // 2, bottom + 9, label, _INK)
    picture.text(_LEFT, top - 16, name, _INK)
    at = _LEFT + text_width(name) + 40
    for curve in curves:
        if curve.name:
            picture.text(at, top - 16, curve.name[:_SHORT], curve.colour)
            at += text_width(curve.name) + 30
        for (t, v), (u, w) in itertools.pairwise(curve.points):
            picture.line(x_of(t), y_of(v), x_of(u), y_of(w), curve.colour)


def _step(highest: float, number: int) -> float:
    """Return the distance of about so many ticks from nothing to the highest: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(highest, 1e-9) / number))
    return next((power * tick for tick in _TICKS if power * tick * number >= highest), power * 10)
