"""The machine's clock, corrected to the database's."""

from datetime import UTC, datetime, timedelta, tzinfo

import pytest

from identity_service.infra.runtime import SystemClock
from identity_service.infra.runtime import clock as clock_module

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
BUSY = timedelta(seconds=30)
"""How far apart two readings may be on a busy machine; what would be wrong is wrong by minutes."""


def error(clock: SystemClock, offset: timedelta) -> timedelta:
    """Return how far `clock` is from a machine clock that is corrected by `offset`."""
    return abs(clock.now() - datetime.now(UTC) - offset)


def test_an_uncorrected_clock_is_the_machines_and_aware() -> None:
    clock = SystemClock()
    assert clock.now().tzinfo is UTC
    assert error(clock, timedelta(0)) < BUSY


def test_the_answer_belongs_to_the_middle_of_the_round_trip() -> None:
    clock = SystemClock()
    correction = clock.correct(
        reference=NOON + timedelta(minutes=5), asked_at=NOON, answered_at=NOON + 200 * MILLISECOND
    )
    assert correction == timedelta(minutes=5) - 100 * MILLISECOND
    assert error(clock, correction) < BUSY


@pytest.mark.case("OPS-15")
@pytest.mark.parametrize("wrong_by", [timedelta(minutes=5), timedelta(minutes=-5), timedelta(hours=1)])
def test_a_machine_with_a_wrong_clock_lives_in_the_databases_time(wrong_by: timedelta) -> None:
    """Corrections do not add up: once the clock is right, the next measurement finds nothing to correct."""
    clock = SystemClock()
    for _ in range(3):
        asked_at = clock.now()
        clock.correct(reference=datetime.now(UTC) - wrong_by, asked_at=asked_at, answered_at=clock.now())
        assert error(clock, -wrong_by) < BUSY


@pytest.mark.case("OPS-15")
@pytest.mark.parametrize("jump", [timedelta(hours=-1), timedelta(hours=1), timedelta(seconds=-1)])
def test_a_corrected_clock_does_not_jump_with_the_machines(jump: timedelta, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sets the machine's clock between two polls; nothing that was stored may seem to be older or newer."""
    clock = SystemClock()
    clock.correct(reference=datetime.now(UTC), asked_at=clock.now(), answered_at=clock.now())
    before = clock.now()

    class Set(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + jump

    monkeypatch.setattr(clock_module, "datetime", Set)
    assert timedelta(0) <= clock.now() - before < BUSY


def test_a_clock_that_was_never_corrected_follows_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite there is no other time: a machine that starts in 1970 and is then set must not be stuck there."""
    clock = SystemClock()

    class Set(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(clock_module, "datetime", Set)
    assert error(clock, timedelta(days=1)) < BUSY


def test_a_slow_answer_changes_nothing() -> None:
    """After more than a second of travel nobody knows which instant the answer speaks of."""
    clock = SystemClock()
    clock.correct(reference=NOON + timedelta(seconds=7), asked_at=NOON, answered_at=NOON)
    slow = timedelta(seconds=1) + timedelta(microseconds=1)
    kept = clock.correct(reference=NOON + timedelta(hours=1), asked_at=NOON, answered_at=NOON + slow)
    assert kept == timedelta(seconds=7)


def test_an_answer_within_a_second_is_believed() -> None:
    clock = SystemClock()
    taken = clock.correct(reference=NOON, asked_at=NOON, answered_at=NOON + timedelta(seconds=1))
    assert taken == -500 * MILLISECOND
