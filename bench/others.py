"""Tell what is measured beside single operations: several replicas, rolling restarts, what an operator plans with."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.capacity import Capacity
from bench.fleet import CONTENDERS, DIRECT, FleetResult
from bench.rolling import NOT_TOLD, Rolled
from bench.tables import table

MEGABYTE = 1024 * 1024
_FLEET_LEGEND = (
    "ratio: to one replica that is asked directly, within the same round; CPU: of the replicas, of nginx and PgBouncer,"
    " and of PostgreSQL, per request.\nAll of them and the load generator share {cores} cores: with two, a second"
    " replica has no core of its own."
)
_ROLLING_LEGEND = "asked again: the connection ended before a word of the answer, and the request was sent once more"


@dataclass(frozen=True, slots=True)
class Others:
    """What was found out; nothing, or None, stands for what was not asked for. `cores` are all that there are."""

    cores: int
    fleet: Sequence[FleetResult] = ()
    rolled: Sequence[Rolled] = ()
    capacity: Capacity | None = None

    @property
    def failed(self) -> int:
        """How many requests failed in those rolling restarts in which nginx was told."""
        return sum(rolled.failed for rolled in self.rolled if rolled.way != NOT_TOLD)

    @property
    def complaints(self) -> list[str]:
        """What went wrong, in words."""
        wrong = [f"{one.name}: the first wrong answer was:\n{one.complaint}" for one in self.fleet if one.wrong]
        for rolled in self.rolled:
            if rolled.failed and rolled.way != NOT_TOLD:
                wrong.append(f"rolling restart, {rolled.way}: the first request that failed got:\n{rolled.complaint}")
        return wrong

    def as_json(self) -> dict[str, Any]:
        """Return plain data: rates per second, latencies and CPU times in microseconds, memory in bytes."""
        found: dict[str, Any] = {}
        if self.fleet:
            found["replicas"] = {one.name: _fleet_as_data(one) for one in self.fleet}
        if self.rolled:
            found["rolling_restart"] = [dataclasses.asdict(rolled) for rolled in self.rolled]
        if self.capacity:
            found["capacity"] = dataclasses.asdict(self.capacity)
        return found

    def as_text(self) -> list[str]:
        """Return the tables as text."""
        parts = []
        if self.fleet:
            rows = [_fleet_row(one, contender) for one in self.fleet for contender in CONTENDERS]
            parts += ["", table(_FLEET_HEADINGS, rows), _FLEET_LEGEND.format(cores=self.cores)]
        if self.rolled:
            parts += ["", table(_ROLLING_HEADINGS, [_rolling_row(one) for one in self.rolled]), _ROLLING_LEGEND]
        if self.capacity:
            parts += ["", table(("one process", "measured", ""), list(_capacity_rows(self.capacity)))]
        return parts


def _fleet_as_data(found: FleetResult) -> dict[str, Any]:
    return {
        contender: {
            "per_second": median(sample.per_second for sample in samples),
            "ratio": found.ratio(contender, DIRECT),
            "p50_us": median(sample.run.p50_us for sample in samples),
            "p99_us": median(sample.run.p99_us for sample in samples),
            "service_cpu_us": median(sample.service_us for sample in samples),
            "proxy_cpu_us": median(sample.proxy_us for sample in samples),
            "database_cpu_us": median(sample.database_us for sample in samples),
            "wrong": sum(sample.run.wrong for sample in samples),
        }
        for contender, samples in found.rounds.items()
    }


_FLEET_HEADINGS = (
    "operation",
    "asked",
    "conn.",
    "req/s",
    "min-max",
    "ratio",
    "p50 ms",
    "p99 ms",
    "CPU µs",
    "proxy CPU µs",
    "DB CPU µs",
    "wrong",
)


def _fleet_row(found: FleetResult, contender: str) -> tuple[str, ...]:
    data = _fleet_as_data(found)[contender]
    rates = [sample.per_second for sample in found.rounds[contender]]
    return (
        found.name,
        contender,
        str(found.connections),
        f"{data['per_second']:,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{data['ratio']:.2f}",
        f"{data['p50_us'] / 1000:.2f}",
        f"{data['p99_us'] / 1000:.2f}",
        f"{data['service_cpu_us']:,.0f}",
        f"{data['proxy_cpu_us']:,.0f}",
        f"{data['database_cpu_us']:,.0f}",
        str(data["wrong"]),
    )


_ROLLING_HEADINGS = (
    "rolling restart",
    "seconds",
    "requests",
    "p50 ms",
    "p99 ms",
    "longest ms",
    "p99 ms before",
    "asked again",
    "failed",
)


def _rolling_row(found: Rolled) -> tuple[str, ...]:
    meanwhile = found.meanwhile
    return (
        found.way,
        f"{meanwhile.seconds:.0f}",
        f"{meanwhile.requests:,}",
        f"{meanwhile.p50_us / 1000:.2f}",
        f"{meanwhile.p99_us / 1000:.2f}",
        f"{meanwhile.longest_us / 1000:.2f}",
        f"{found.before.p99_us / 1000:.2f}",
        str(found.before.repeated + meanwhile.repeated),
        str(found.failed),
    )


def _capacity_rows(found: Capacity) -> Sequence[tuple[str, ...]]:
    rows = [
        ("memory (PSS), idle", f"{found.idle_bytes / MEGABYTE:.0f} MB", ""),
        (
            f"and with {found.connections:,} idle connections",
            f"{found.connected_bytes / MEGABYTE:.0f} MB",
            f"{found.bytes_per_connection / 1024:.1f} KB each",
        ),
    ]
    for one in found.sign_ins:
        at = f"Argon2 at {one.memory_kib / 1024:.0f} MiB"
        rows += [
            (f"{at}, memory of a hashing thread", f"{one.bytes_per_thread / MEGABYTE:.0f} MB", ""),
            (
                f"{at}, sign-ins/s of a core",
                f"{one.per_core:.1f}",
                f"{one.cpu_ms:.0f} ms of CPU each; {one.per_second:.1f}/s were reached",
            ),
        ]
    return rows
