"""Run the benchmark: `python -m bench --help`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from bench import machine
from bench.capacity import measure_capacity
from bench.fleet import a_fleet, measure_fleet
from bench.measure import generator_ceiling, measure, start_times
from bench.operations import OPERATIONS, Operation
from bench.others import Others
from bench.report import Report, ServiceReport
from bench.rolling import roll
from bench.service import BenchError, a_service
from bench.verifier import measure_verifier
from tests.support.servers import ServerUnavailableError

STARTS = 5
BUSY_LOAD_AVERAGE = 0.7
VERIFIER = "verifier"
REPLICAS = "replicas"
ROLLING = "rolling restart"
CAPACITY = "capacity"


def main() -> int:
    """Measure and print. Return 0 whatever the speed, 1 when an answer was wrong or nothing could be measured."""
    options = _arguments()
    cores = machine.choose_cores()
    notes = _notes(cores)
    os.sched_setaffinity(0, {cores.load})  # this process and what it starts keep off the service's core
    wanted = [operation for operation in OPERATIONS if not options.only or operation.name in options.only]
    try:
        rsa, verification, found = [machine.rsa_speed(cores.service)], None, None
        if not options.only or VERIFIER in options.only:
            _tell("checking tokens in one process")
            verification = measure_verifier(cores.service)
            rsa.append(machine.rsa_speed(cores.service))
        if wanted:
            found = _measure_service(cores, wanted, rsa, runs=options.runs, seconds=options.seconds)
        others = _measure_others(cores, options.only, runs=options.runs, seconds=options.seconds)
    except (BenchError, ServerUnavailableError) as error:
        _tell(str(error))
        return 1
    report = Report(rsa=rsa, verification=verification, service=found, others=others, notes=notes)
    print(json.dumps(report.as_json(), indent=2) if options.json else report.as_text())
    return 1 if report.wrong else 0


def _measure_service(
    cores: machine.Cores, wanted: Sequence[Operation], rsa: list[machine.RsaSpeed], *, runs: int, seconds: float
) -> ServiceReport:
    """Start the service and measure operations on it, and after each one the core's RSA speed, which goes to `rsa`."""
    ceiling, results = generator_ceiling(cores), []
    with a_service(cores) as service:
        _tell(f"the service is set up; starting it {STARTS} times")
        fsync = machine.fsync_seconds(service.disk)
        starts = start_times(service, STARTS)
        for operation in wanted:
            _tell(f"{operation.name}: {runs} runs of {seconds:g} s")
            results.append(measure(operation, service, runs=runs, seconds=seconds))
            rsa.append(machine.rsa_speed(cores.service))
    return ServiceReport(ceiling=ceiling, fsync_seconds=fsync, starts=starts, results=results)


def _measure_others(cores: machine.Cores, only: Sequence[str] | None, *, runs: int, seconds: float) -> Others:
    """Measure what is more than one operation on one worker."""
    capacity, fleet, rolled = None, [], []
    if not only or CAPACITY in only:
        _tell("what one process takes, and sign-ins on one core")
        capacity = measure_capacity(cores, runs=runs, seconds=seconds)
    if not only or {REPLICAS, ROLLING} & set(only):
        with a_fleet(cores) as running:
            if not only or REPLICAS in only:
                _tell("two replicas behind nginx")
                fleet = measure_fleet(running, runs=runs, seconds=seconds)
            if not only or ROLLING in only:
                _tell("rolling restarts under load")
                rolled = roll(running, seconds=seconds)
    return Others(len(cores.everywhere), fleet, rolled, capacity)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure one worker of the service on one core against its own PostgreSQL, and compare with what "
        "the same core can do in RSA-2048 signatures; what a sibling service pays to check a token; two replicas "
        "behind nginx on all cores, and how they are replaced under load; what an operator plans with. A missed "
        "target is reported; only a wrong answer, or a request that fails while replicas are replaced, fails.",
    )
    names = [*(operation.name for operation in OPERATIONS), VERIFIER, REPLICAS, ROLLING, CAPACITY]
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each run (default 3)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each operation (default 5)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {', '.join(names)}")
    options = parser.parse_args()
    if options.runs < 1 or options.seconds <= 0:
        parser.error("--runs and --seconds must be positive")
    return options


def _notes(cores: machine.Cores) -> list[str]:
    notes = []
    if cores.shared:
        notes.append("only one core: service, database and load generator share it, so the ratios come out too low")
    if (average := machine.load_average()) > BUSY_LOAD_AVERAGE:
        notes.append(f"the machine was busy before the benchmark began (load average {average:.1f}); expect noise")
    return notes


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
