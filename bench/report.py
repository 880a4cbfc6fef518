"""Tell the results: tables for people, one JSON document for machines."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.machine import RsaSpeed
from bench.measure import Result
from bench.operations import OPERATIONS
from bench.others import Others
from bench.tables import table
from bench.verifier import VERIFY, VERIFY_SYNC, Verification

MEGABYTE = 1024 * 1024
DISTURBED = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """What one number must reach, and where it is to go. `at_most`: less is better."""

    label: str
    required: float
    goal: float
    unit: str = ""
    at_most: bool = False

    def verdict(self, value: float) -> str:
        """Say how far `value` has come: missed, met, or at the goal."""
        sign = -1 if self.at_most else 1
        if sign * value < sign * self.required:
            return "MISSED"
        return "met" if sign * value < sign * self.goal else "goal reached"


RATIO_TARGETS = {
    "client_credentials": Target("client_credentials, ratio to RSA signatures", 0.55, 0.72),
    "refresh_token": Target("refresh_token, ratio to RSA signatures", 0.23, 0.40),
    "jwks": Target("JWKS, ratio to RSA signatures", 3.0, 6.0),
    "introspect": Target("introspection, ratio to RSA signatures", 0.5, 0.7),
    "token_exchange": Target("API key exchange, ratio to RSA signatures", 0.25, 0.5),
}
P99_TARGETS = {
    "jwks beside sign-ins": Target("JWKS while sign-ins wait for the hashing pool, p99", 20, 10, " ms", at_most=True),
    "user_search": Target("search among 1,000,000 users, p99", 50, 20, " ms", at_most=True),
}
SHARE_TARGET = Target("refresh_token while sign-ins wait for the hashing pool, share of its own rate", 0.70, 0.90)
VERIFIER_TARGETS = {name: Target(f"{name}, ratio to RSA verifications", 0.80, 0.90) for name in (VERIFY, VERIFY_SYNC)}
MEMORY_TARGET = Target("memory of the worker under load (PSS), no password hashing", 110, 85, " MB", at_most=True)
START_TARGET = Target("start to first token, existing database", 1.2, 0.5, " s", at_most=True)
ROLLING_TARGET = Target("requests that failed while all replicas were replaced", 0, 0, at_most=True)


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What was found out about the running service. `ceiling` is in requests per second, `starts` are in seconds."""

    ceiling: float
    fsync_seconds: float
    starts: Sequence[float]
    results: Sequence[Result]

    @property
    def pss_megabytes(self) -> float:
        """
        The largest memory that the worker had at the end of any operation, in units of 2**20 bytes.

        Password hashing is left out: it takes Argon2's memory times the threads of its pool, whatever the worker is.
        """
        hashing = ("password", *(operation.name for operation in OPERATIONS if operation.beside))
        return max((one.pss_bytes for one in self.results if one.name not in hashing), default=0) / MEGABYTE


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one benchmark found out; None stands for what was not asked for."""

    rsa: Sequence[RsaSpeed]
    verification: Verification | None
    service: ServiceReport | None
    others: Others
    notes: Sequence[str]

    @property
    def signs_per_second(self) -> float:
        """The yardstick: the median of the RSA measurements before, between and after the operations."""
        return median(speed.per_second for speed in self.rsa)

    @property
    def wrong(self) -> bool:
        """Whether any answer was wrong."""
        return any(result.wrong for result in self._results) or bool(self.others.complaints)

    @property
    def _results(self) -> Sequence[Result]:
        return self.service.results if self.service else ()

    def as_json(self) -> dict[str, Any]:
        """Return plain data: rates per second, latencies and CPU times in microseconds, memory in bytes."""
        return {
            "rsa2048": {
                "tool": self.rsa[0].tool,
                "signs_per_second": self.signs_per_second,
                "measured": [speed.per_second for speed in self.rsa],
            },
            **({"verification": _verification_as_json(self.verification)} if self.verification else {}),
            **(self._service_as_json(self.service) if self.service else {}),
            **self.others.as_json(),
            "targets": [
                {
                    "what": target.label,
                    "value": value,
                    "required": target.required,
                    "goal": target.goal,
                    "verdict": target.verdict(value),
                }
                for target, value in self._against_targets()
            ],
            "notes": self._all_notes(),
        }

    def _service_as_json(self, found: ServiceReport) -> dict[str, Any]:
        return {
            "generator_ceiling_per_second": found.ceiling,
            "fsync_us": found.fsync_seconds * 1e6,
            "operations": {result.name: self._operation(result) for result in found.results},
            "pss_bytes": max((result.pss_bytes for result in found.results), default=0),
            "start_seconds": {"median": median(found.starts), "measured": list(found.starts)},
        }

    def as_text(self) -> str:
        """Return the tables as text."""
        rates = [speed.per_second for speed in self.rsa]
        parts = [
            *(f"note: {note}" for note in self._all_notes()),
            f"{self.rsa[0].tool}: {self.signs_per_second:,.0f} signatures/s on the service's core"
            f" (median of {len(rates)}, {min(rates):,.0f}-{max(rates):,.0f})",
            *(_verification_as_text(self.verification) if self.verification else ()),
            *(self._service_as_text(self.service) if self.service else ()),
            *self.others.as_text(),
            "",
            table(
                ("target", "measured", "required", "goal", ""),
                [
                    (
                        target.label,
                        f"{value:.2f}{target.unit}",
                        f"{'≤' if target.at_most else '≥'} {target.required:g}{target.unit}",
                        f"{target.goal:g}{target.unit}",
                        target.verdict(value),
                    )
                    for target, value in self._against_targets()
                ],
            ),
        ]
        for result in self._results:
            if result.wrong:
                parts.append(f"\n{result.name}: {result.wrong} wrong answers, the first was:\n{result.complaint}")
        parts += [f"\n{complaint}" for complaint in self.others.complaints]
        return "\n".join(parts)

    def _service_as_text(self, found: ServiceReport) -> tuple[str, ...]:
        return (
            f"load generator ceiling: {found.ceiling:,.0f} requests/s",
            f"fsync of 8 KiB beside the database: {found.fsync_seconds * 1e6:,.0f} µs",
            "",
            table(_HEADINGS, [self._row(result) for result in found.results]),
            _LEGEND,
        )

    def _all_notes(self) -> list[str]:
        disturbed = [
            f"{result.name}: {result.disturbance:.0%} of a core went to processes that are none of ours; the rates are"
            " too low, the CPU times nearly right"
            for result in self._results
            if result.disturbance > DISTURBED
        ]
        return [*self.notes, *disturbed]

    def _against_targets(self) -> list[tuple[Target, float]]:
        found = [
            (RATIO_TARGETS[result.name], self._ratio(result))
            for result in self._results
            if result.name in RATIO_TARGETS and not result.wrong
        ]
        by_name = {result.name: result for result in self._results if not result.wrong}
        for name, target in P99_TARGETS.items():
            if name in by_name:
                found.append((target, self._operation(by_name[name])["p99_us"] / 1000))
        if {"refresh_token", "refresh beside sign-ins"} <= by_name.keys():
            share = by_name["refresh beside sign-ins"].per_second / by_name["refresh_token"].per_second
            found.append((SHARE_TARGET, share))
        if self.verification:
            found += [(target, self.verification.ratio(name)) for name, target in VERIFIER_TARGETS.items()]
        if self.service and self.service.pss_megabytes:
            found.append((MEMORY_TARGET, self.service.pss_megabytes))
        if self.service:
            found.append((START_TARGET, median(self.service.starts)))
        if self.others.rolled:
            found.append((ROLLING_TARGET, self.others.failed))
        return found

    def _ratio(self, result: Result) -> float:
        return result.per_second / self.signs_per_second

    def _operation(self, result: Result) -> dict[str, Any]:
        rates = [sample.per_second for sample in result.samples]
        service_us = median(sample.service_us for sample in result.samples)
        return {
            "connections": result.connections,
            "per_second": {"median": median(rates), "min": min(rates), "max": max(rates)},
            "ratio": self._ratio(result),
            "p50_us": median(sample.run.p50_us for sample in result.samples),
            "p99_us": median(sample.run.p99_us for sample in result.samples),
            "ratio_by_cpu": 1e6 / service_us / self.signs_per_second if service_us else 0.0,
            "service_cpu_us": service_us,
            "database_cpu_us": median(sample.database_us for sample in result.samples),
            "service_core_busy": median(sample.busy for sample in result.samples),
            "disturbance_cores": result.disturbance,
            "pss_bytes": result.pss_bytes,
            "wrong": result.wrong,
        }

    def _row(self, result: Result) -> tuple[str, ...]:
        found = self._operation(result)
        rate = found["per_second"]
        return (
            result.name,
            str(result.connections),
            f"{rate['median']:,.0f}",
            f"{rate['min']:,.0f}-{rate['max']:,.0f}",
            f"{found['ratio']:.2f}",
            f"{found['p50_us'] / 1000:.2f}",
            f"{found['p99_us'] / 1000:.2f}",
            f"{found['service_cpu_us']:,.0f}",
            f"{found['database_cpu_us']:,.0f}",
            f"{found['service_core_busy']:.0%}",
            f"{found['ratio_by_cpu']:.2f}",
            f"{result.pss_bytes / MEGABYTE:.0f}",
            str(result.wrong),
        )


def _verification_as_json(found: Verification) -> dict[str, Any]:
    return {
        name: {
            "us": {"median": found.microseconds(name), "min": min(rounds), "max": max(rounds)},
            "ratio": found.ratio(name),
        }
        for name, rounds in found.rounds.items()
    }


def _verification_as_text(found: Verification) -> tuple[str, ...]:
    rows = [
        (
            name,
            f"{found.microseconds(name):.1f}",
            f"{min(rounds):.1f}-{max(rounds):.1f}",
            f"{1e6 / found.microseconds(name):,.0f}",
            f"{found.ratio(name):.2f}",
        )
        for name, rounds in found.rounds.items()
    ]
    return ("", table(("checking a token", "CPU µs", "min-max", "tokens/s", "ratio"), rows), _VERIFICATION_LEGEND, "")


_VERIFICATION_LEGEND = "ratio: to the bare RSA operation of the same round, which is in all of them"
_LEGEND = (
    "ratio: req/s to RSA signatures/s; CPU: the worker's and the database's, per request;"
    " ratio by CPU: what the ratio would be if the worker kept its core busy"
)
_HEADINGS = (
    "operation",
    "conn.",
    "req/s",
    "min-max",
    "ratio",
    "p50 ms",
    "p99 ms",
    "CPU µs",
    "DB CPU µs",
    "core busy",
    "ratio by CPU",
    "PSS MB",
    "wrong",
)
