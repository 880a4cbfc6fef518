"""The table."""

from tests.rotation.conductor import PROMISE
from tests.rotation.proof import Outcome
from tests.rotation.record import Compromise
from tests.rotation.watch import AHEAD

_WIDTH = 62


def table(outcome: Outcome) -> str:
    """Return what a run has shown, for people."""
    record = outcome.record
    kills = sum(record.kills.values())
    lines = [
        _line("rotations", sum(record.rotations.values())),
        *(_line(f"  {trouble}", count) for trouble, count in record.rotations.items()),
        _line("replicas killed in the middle of a step", kills),
        _line("tokens issued", len(record.minted)),
        _line("JWKS samples", record.samples),
        _line("shortest time a key was in every JWKS before it signed", f"{outcome.notice:.0f} s", f"≥ {AHEAD:.0f} s"),
        "",
        f"{'who checked':<26}{'checks':>10}{'near the end':>16}{'oldest copy of the keys':>28}",
        *(
            f"{name:<26}{checks.number:>10}{checks.near_the_end:>16}"
            f"{'' if checks.oldest_copy is None else f'{checks.oldest_copy:.0f} s':>28}"
            for name, checks in sorted(record.checks.items())
        ),
        "",
        *_compromise(record.compromise),
        _line("valid tokens refused", record.refused.count, "0"),
        _line("tokens by a key not published, or not for long enough", record.unpublished.count, "0"),
        _line("uses of the compromised key after the promised time", record.resurrected.count, "0"),
        _line("token requests that failed (kills aside)", record.not_issued.count, "0"),
        _line("empty JWKS", record.empty, "0"),
        "",
        f"{outcome.lived / 3600:.1f} hours in {outcome.took:.0f} s: {outcome.plan.speed:.0f} seconds in one, and"
        f" {outcome.waited:.1f} s of waiting for this machine",
    ]
    verdict = [f"NOT PROVEN: {fault}" for fault in outcome.faults] or ["Proven: rotation hurt nobody."]
    return "\n".join([*lines, "", *verdict])


def _compromise(compromise: Compromise | None) -> list[str]:
    if compromise is None:
        return []
    polled = max(compromise.promised.values(), default=compromise.committed) - compromise.committed
    rows = [_line("compromised key: every replica had polled after", f"{polled:.2f} s", f"≤ {PROMISE:g} s")]
    rows += [_line(f"  {what} for the last time after", f"{last:.2f} s") for what, last in compromise.last.items()]
    return [*rows, _line("  refused, rightly", compromise.refused), ""]


def _line(what: str, value: object, wanted: str = "") -> str:
    return f"{what:<{_WIDTH}}{value!s:>10}" + (f"   ({wanted})" if wanted else "")
