"""What is printed at the end of a run."""

from collections import Counter
from collections.abc import Iterator

from tests.soak.run import Outcome

_WIDTH = 46


def table(outcome: Outcome) -> str:
    """Return the table, and the verdict below it."""
    return "\n".join([*_load(outcome), "", *_storms(outcome), "", *_trends(outcome), "", *_verdict(outcome)])


def _load(outcome: Outcome) -> Iterator[str]:
    answers = outcome.answers
    total = sum(answers.values())
    yield _line("seed", outcome.plan.seed)
    yield _line("seconds", f"{outcome.took:.0f}")
    yield _line("people, over the time", outcome.accounts)
    yield _line("requests", total)
    yield _line("  answered", total - _of(answers, 0) - _of(answers, 503))
    yield _line("  503", _of(answers, 503))
    yield _line("  without an answer (killed, or hung up on)", _of(answers, 0))
    for what in ("rotations", *sorted(set(outcome.done) - {"rotations"})):
        yield _line(f"acknowledged: {what}", outcome.done[what])


def _storms(outcome: Outcome) -> Iterator[str]:
    yield f"{'trouble':<54}{'times':>6}{'seconds':>9}{'answers':>9}{'503':>7}{'none':>7}"
    for name in sorted({storm.trouble for storm in outcome.storms}):
        these = [storm for storm in outcome.storms if storm.trouble == name]
        yield (
            f"{name:<54}{len(these):>6}{sum(storm.end - storm.begin for storm in these):>9.0f}"
            f"{sum(storm.answers for storm in these):>9}{sum(storm.unavailable for storm in these):>7}"
            f"{sum(storm.unanswered for storm in these):>7}"
        )


def _trends(outcome: Outcome) -> Iterator[str]:
    yield f"{'after the warm-up':<34}{'first':>9}{'last':>9}{'highest':>9}{'rise':>9}{'allowed':>9}"
    for each in outcome.trends:
        verdict = "" if each.flat else "   NOT FLAT"
        yield (
            f"{each.what:<34}{each.first:>9.1f}{each.last:>9.1f}{each.highest:>9.1f}{each.rise:>9.2f}"
            f"{each.allowed:>9.1f}{verdict}"
        )


def _verdict(outcome: Outcome) -> list[str]:
    return [f"BROKEN: {fault}" for fault in outcome.faults] or ["Everything that anybody was told is true."]


def _of(answers: Counter[tuple[str, int]], wanted: int) -> int:
    return sum(number for (_, status), number in answers.items() if status == wanted)


def _line(what: str, value: object) -> str:
    return f"{what:<{_WIDTH}}{value!s:>12}"
