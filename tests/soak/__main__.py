"""Run the soak: `python -m tests.soak --help`."""

import argparse
import asyncio
import logging
import secrets
import sys
from pathlib import Path

from identity_service.infra import telemetry
from tests.faults.stage import Stage, StageFailed
from tests.soak.chart import chart
from tests.soak.report import table
from tests.soak.run import Plan, soak
from tests.support.servers import ServerUnavailableError


def main() -> int:
    """Soak and print the table; return 0 if all was well and 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="Load two replicas while one thing after the other breaks, and compare what was told with what is.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--seed", type=int, help="what breaks and when; drawn and printed unless it is given")
    parser.add_argument("--people", type=int, default=8, help="how many people at a time (default 8)")
    parser.add_argument("--chart", type=Path, default=Path("soak.png"), help="where the chart goes (default soak.png)")
    options = parser.parse_args()
    if options.minutes <= 0 or options.people < 1:
        parser.error("some time, and somebody")
    seed = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    telemetry.configure_logging(level="ERROR", stream=sys.stderr)
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)
    _tell(f"seed {seed}, {options.minutes:g} minutes")
    try:
        with Stage() as stage:
            outcome = asyncio.run(soak(stage, Plan(60 * options.minutes, seed, options.people), _tell))
    except (ServerUnavailableError, StageFailed) as error:
        _tell(str(error))
        return 1
    options.chart.write_bytes(chart(outcome))
    sys.stdout.write(table(outcome) + f"\n\nThe chart is in {options.chart}.\n")
    return 1 if outcome.faults else 0


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
