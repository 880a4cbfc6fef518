"""
Ask a database of vulnerabilities about everything that is locked, and believe it only where it has answered.

pip-audit leaves out what its service does not know, says so in passing, and goes on to report that nothing was found.
Here a package without an answer is as bad as one with a vulnerability.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from tests.supply_chain.lock import Locked, read


class AuditFailed(Exception):
    """Nobody knows how things stand; the message says what pip-audit said."""


def audit(path: Path, command: Sequence[str]) -> list[str]:
    """
    Return a sentence for each locked package that has a vulnerability or that was not looked at.

    `command` is how pip-audit is called. Raises AuditFailed where it gives no report.
    """
    packages = read(path)
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, path.name)
        # Without the markers: what only another platform installs is looked at, too.
        everything.write_text("".join(_line(package) for package in packages), "utf-8")
        options = ["--requirement", str(everything), "--disable-pip", "--require-hashes", "--format", "json"]
        done = subprocess.run(
            [*command, *options, "--progress-spinner", "off"], capture_output=True, text=True, check=False
        )
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise AuditFailed(f"pip-audit gave no report (exit code {done.returncode}) and said: {said[0]}") from None
    return _judged(packages, answers)


def _judged(packages: Iterable[Locked], answers: Iterable[dict[str, Any]]) -> list[str]:
    known = {canonicalize_name(answer["name"]): answer for answer in answers}
    found = []
    for package in packages:
        answer = known.get(canonicalize_name(package.name), {"skip_reason": "it is missing from the report"})
        vulnerabilities = answer.get("vulns")
        if answer.get("skip_reason") or answer.get("version") != package.version or vulnerabilities is None:
            reason = answer.get("skip_reason") or f"the report is about {answer.get('version')}"
            found.append(f"{package.name} {package.version} was not audited: {reason}")
            continue
        for vulnerability in vulnerabilities:
            names = ", ".join(dict.fromkeys((vulnerability["id"], *vulnerability.get("aliases", ()))))
            good = ", ".join(vulnerability.get("fix_versions", ())) or "no version yet"
            found.append(f"{package.name} {package.version}: {names}; mended in {good}")
    return found


def _line(package: Locked) -> str:
    hashes = "".join(f" \\\n    --hash=sha256:{digest}" for digest in package.hashes)
    return f"{package.name}=={package.version}{hashes}\n"
