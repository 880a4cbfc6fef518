"""Build the image, look into it and run it: `python -m tests.deploy.image --help`."""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.deploy.image.building import ROOT, Recipe, copy_of_the_source, recipe
from tests.deploy.image.contents import check_contents, look_into
from tests.deploy.image.engine import discard, tidy
from tests.deploy.image.mutants import check_mutants
from tests.deploy.image.report import Impossible, Report, require, say

TAG = "localhost/identity-service:image-test"


def main() -> int:
    """Check everything; return 0 if every fact holds, 1 if one does not, 2 if it could not be tried."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.deploy.image",
        description="Build the image twice, look into it, and run it on podman as the rendered manifests say.",
    )
    parser.add_argument("--deploy", type=Path, default=ROOT / "deploy", help="the folder with the manifests")
    parser.add_argument(
        "--mutants",
        nargs="*",
        metavar="KEY",
        help="break image and manifests on purpose instead, to see that the checks notice: all of them, or those named",
    )
    options = parser.parse_args()
    begun = time.monotonic()
    try:
        with recipe() as made, ExitStack() as undo:
            undo.callback(tidy)
            if options.mutants is not None:
                unseen = check_mutants(made, options.deploy, options.mutants)
                return 1 if unseen else 0
            report = Report()
            discard(TAG)  # the last run's
            image = made.build(TAG, ROOT, cached=False)
            check_contents(report, look_into(image), made)
            with ThreadPoolExecutor(1) as meanwhile:  # running it is mostly waiting
                again = meanwhile.submit(_build_again, made)
                _check_running(report, image, options.deploy)
                with report.check(
                    "digest", "DEP-04", "a second build, elsewhere, without a cache, is the same"
                ) as seen:
                    require(again.result() == image, f"{image[:12]} and {again.result()[:12]}")
                    seen.append(image[:12])
    except Impossible as reason:
        say(f"The image could not be tried: {reason}")
        return 2
    verdict = f"{len(report.failed)} did not hold: {', '.join(report.failed)}" if report.failed else "all of them hold"
    say(f"{report.passed + len(report.failed)} facts in {time.monotonic() - begun:.0f} s; {verdict}")
    return 1 if report.failed else 0


def _build_again(made: Recipe) -> str:
    with copy_of_the_source() as copy:
        image = made.build(f"{TAG}-again", copy, cached=False)
    discard(f"{TAG}-again")
    return image


def _check_running(report: Report, image: str, deploy: Path) -> None:
    """Check the running service from a process in a network of its own, and add what it found to the report."""
    command = ["unshare", "--net", "--", sys.executable, "-m", "tests.deploy.image.running", image, str(deploy)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    last = ""
    for line in process.stdout or ():
        if last:
            say(last)
        last = line.rstrip("\n")
    process.wait()
    try:
        found = json.loads(last)
    except ValueError:
        raise Impossible(f"the checks of the running service ended with {process.returncode}: {last}") from None
    report.failed += found["failed"]
    report.passed += found["passed"]


if __name__ == "__main__":
    sys.exit(main())
