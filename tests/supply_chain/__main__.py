"""`python -m tests.supply_chain check|sbom|licences|secrets|audit`; ends with 1 where something is wrong."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.supply_chain import floors, licences, sbom, secrets
from tests.supply_chain.audit import AuditFailed, audit
from tests.supply_chain.lock import REQUIREMENTS, ROOT, BadLock

_CHECKS: dict[str, Callable[[], list[str]]] = {
    "versions": floors.faults,
    "licences": licences.check,
    "secrets": secrets.faults,
}


def main(words: Sequence[str]) -> int:
    """Do what is asked; return the exit code."""
    match words:
        case ["check"]:
            return sum(_report(name, look) for name, look in _CHECKS.items()) and 1
        case ["secrets"]:
            return _report("secrets", secrets.faults)
        case ["licences"]:
            if faults := licences.faults(licences.served(), licences.policy()):
                return _report("licences", lambda: faults)
            licences.write()
            print(f"{licences.DOCUMENT.relative_to(ROOT)} is written.")
            return 0
        case ["sbom", *folder]:
            for path in sbom.write(*map(Path, folder[:1])):
                print(f"{path.name} is written to {path.parent}.")
            return 0
        case ["audit", *command] if command:
            return sum(_audit(path, command) for path in sorted(REQUIREMENTS.glob("*.txt"))) and 1
    print(__doc__, file=sys.stderr)
    return 2


def _report(name: str, look: Callable[[], list[str]]) -> int:
    """Print what is wrong; return whether anything is."""
    try:
        faults = look()
    except BadLock as error:
        faults = [f"a lock cannot be read: {error}"]
    for fault in faults:
        print(f"{name}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{name}: nothing wrong")
    return int(bool(faults))


def _audit(path: Path, command: Sequence[str]) -> int:
    def look() -> list[str]:
        try:
            return audit(path, command)
        except AuditFailed as failure:
            return [str(failure)]

    return _report(path.name, look)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
