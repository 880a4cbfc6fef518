"""Run the proof: `python -m tests.rotation --help`."""

import argparse
import asyncio
import logging
import secrets
import sys

from identity_service.infra import telemetry
from identity_service.infra.migrate import migrate
from tests.rotation.clock import ProofFailed
from tests.rotation.proof import Plan, prove
from tests.rotation.report import table
from tests.support.servers import ServerUnavailableError, find_postgres


def main() -> int:
    """Prove and print the table; return 0 for a proof and 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.rotation",
        description="Rotate signing keys on two replicas in accelerated time, under load, with kills and a compromise.",
    )
    parser.add_argument("--rotations", type=int, default=20, help="how many rotations (default 20, at least 3)")
    parser.add_argument("--speed", type=float, default=400.0, help="seconds that pass in a real one (default 400)")
    options = parser.parse_args()
    if options.rotations < 3 or options.speed < 1:
        parser.error("at least 3 rotations, and no slower than real")
    telemetry.configure_logging(level="ERROR", stream=sys.stderr)
    # It reports each fetch that met a replica as it was killed.
    logging.getLogger("identity_service.verifier").setLevel(logging.ERROR)
    try:
        with find_postgres() as server:
            name = f"rotation_{secrets.token_hex(4)}"
            url = server.create_database(name)
            try:
                migrate(url)
                outcome = asyncio.run(prove(url, Plan.of(options.rotations, speed=options.speed), tell=_tell))
            finally:
                server.drop_database(name)
    except (ServerUnavailableError, ProofFailed) as error:
        _tell(str(error))
        return 1
    sys.stdout.write(table(outcome) + "\n")
    return 1 if outcome.faults else 0


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
