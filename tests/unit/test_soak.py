"""The parts of the soak that judge: the seed alone says what breaks, a leak is no storm, a chart is a picture."""

import itertools
import random
import struct
import zlib
from collections.abc import Callable

import pytest

from tests.soak.chart import chart
from tests.soak.picture import Picture, text_width
from tests.soak.report import table
from tests.soak.resources import Resources, Sample
from tests.soak.run import Outcome, Plan, Storm
from tests.soak.schedule import LIKELY, Step, schedule
from tests.soak.trend import trend


def first(seed: int, number: int = 60) -> list[Step]:
    return list(itertools.islice(schedule(seed), number))


def test_the_same_seed_breaks_the_same_things_at_the_same_times() -> None:
    assert first(7) == first(7)
    assert first(7) != first(8)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_everything_comes_once_before_anything_comes_twice(seed: int) -> None:
    begin = [trouble for step in first(seed, len(LIKELY)) for trouble in step.troubles]
    assert set(begin) == set(LIKELY)
    assert any(len(step.troubles) == 2 for step in first(seed))


def samples(quantity: Callable[[float], float], seconds: int = 600) -> list[tuple[float, float]]:
    return [(float(at), quantity(at)) for at in range(seconds)]


NOISE = random.Random(1)  # noqa: S311  # nothing to guess here
FLAT: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 120.0,
    "noisy": lambda _: 120.0 + NOISE.uniform(-5, 5),
    "filling up in the beginning": lambda at: 120.0 - 30.0 * 0.97**at,
    "high in a storm at the end": lambda at: 150.0 if 500 <= at < 530 else 120.0,
    "a step during the warm-up": lambda at: 120.0 if at > 100 else 90.0,
    "falling": lambda at: 120.0 - at / 60,
}
RISING: dict[str, Callable[[float], float]] = {
    "a leak": lambda at: 120.0 + at / 60,
    "a noisy leak": lambda at: 120.0 + at / 60 + NOISE.uniform(-3, 3),
    "a leak that storms interrupt": lambda at: 60.0 if at % 50 < 10 else 120.0 + at / 60,
    "steps": lambda at: 120.0 + 3 * (at // 100),
}


@pytest.mark.parametrize("name", FLAT)
def test_what_is_flat_is_said_to_be(name: str) -> None:
    judged = trend(name, samples(FLAT[name]), allowed=2.0)
    assert judged is not None
    assert judged.flat, judged


@pytest.mark.parametrize("name", RISING)
def test_what_rises_is_said_to_rise(name: str) -> None:
    judged = trend(name, samples(RISING[name]), allowed=2.0)
    assert judged is not None
    assert not judged.flat, judged


def test_too_few_samples_are_judged_by_nobody() -> None:
    assert trend("nothing", [], allowed=1.0) is None
    assert trend("little", samples(lambda _: 1.0, 10), allowed=1.0) is None


def an_outcome() -> Outcome:
    """Return a run of a minute without any answers."""
    outcome = Outcome(Plan(60.0, seed=5))
    outcome.resources = Resources.__new__(Resources)
    outcome.resources.of = {("A", 1): [Sample(float(at), 120 * 2**20, 30, 7) for at in range(60)]}
    outcome.resources.sessions = [(float(at), 11) for at in range(60)]
    outcome.rates = [(float(at), 100 * at, at) for at in range(60)]
    outcome.storms = [Storm("postgres_is_away", 20.0, 24.0, 300, 20, 0)]
    return outcome


def test_a_run_in_which_little_happened_has_failed() -> None:
    outcome = an_outcome()
    assert [fault for fault in outcome.faults if fault.startswith("too little was done")]
    assert "BROKEN: too little was done: requests" in table(outcome)


def pixels(png: bytes) -> tuple[int, int, list[bytes]]:
    """Return the width, the height and the rows of a PNG, checking every sum in it."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        content = png[at + 8 : at + 8 + length]
        assert zlib.crc32(name + content) == struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0]
        chunks[name] = content
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind) == (8, 2)
    raw, stride = zlib.decompress(chunks[b"IDAT"]), 3 * width + 1
    assert len(raw) == stride * height
    return width, height, [raw[row * stride + 1 : (row + 1) * stride] for row in range(height)]


def test_a_picture_is_a_png_with_what_was_drawn() -> None:
    picture = Picture(40, 20)
    picture.fill(-5, 2, 3, 4, (255, 0, 0))
    picture.line(10, 10, 100, 10, (0, 0, 255))
    width, height, rows = pixels(picture.png())
    assert (width, height) == (40, 20)
    assert rows[2][:12] == b"\xff\0\0" * 3 + b"\xff\xff\xff"
    assert rows[10][30:] == b"\0\0\xff" * 30
    assert rows[5] == b"\xff" * 120


def test_letters_stay_where_they_are_said_to_be() -> None:
    picture = Picture(60, 12)
    picture.text(0, 0, "08: 5%", (0, 0, 0), scale=2)
    _, _, rows = pixels(picture.png())
    inked = [column for row in rows for column in range(60) if row[3 * column] == 0]
    assert max(inked) == text_width("08: 5%", scale=2) - 1
    assert min(inked) == 0


def test_a_chart_can_be_drawn_of_any_run() -> None:
    for outcome in (an_outcome(), Outcome(Plan(60.0, seed=1), resources=an_outcome().resources)):
        width, height, rows = pixels(chart(outcome))
        assert (width, height) == (len(rows[0]) // 3, len(rows))
        assert len({row[at : at + 3] for row in rows for at in range(0, len(row), 3)}) >= 5
