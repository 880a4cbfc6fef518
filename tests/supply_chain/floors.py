"""Versions that are known to be bad are refused, without asking anybody."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.supply_chain.lock import REQUIREMENTS, ROOT, Locked, read

_FILE: Final = Path(__file__).with_name("floors.toml")
_NEVER: Final = "never"


@dataclass(frozen=True, slots=True)
class Floor:
    """The first good version of a package, None if there is none, and what is wrong before it."""

    package: str
    first_good: Version | None
    why: str

    def allows(self, version: str) -> bool:
        """Return whether a version is good enough."""
        return self.first_good is not None and Version(version) >= self.first_good


def floors() -> dict[str, Floor]:
    """Return what is known, by package."""
    known = tomllib.loads(_FILE.read_text("utf-8"))
    return {
        name: Floor(name, None if entry["below"] == _NEVER else Version(entry["below"]), entry["why"])
        for name, entry in known.items()
    }


def faults(requirements: Path = REQUIREMENTS, project: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return a sentence for each bad version that is locked, or that a requirement of ours would allow."""
    known = floors()
    found = []
    for path in sorted(requirements.glob("*.txt")):
        found += [f"{path.name}: {fault}" for fault in _locked(read(path), known)]
    found += [f"{project.name}: {fault}" for fault in _allowed(_declared(tomllib.loads(project.read_text())), known)]
    return found


def _locked(packages: Iterable[Locked], known: Mapping[str, Floor]) -> list[str]:
    return [
        f"{package.name} {package.version}: {floor.why}"
        for package in packages
        if (floor := known.get(package.name)) and not floor.allows(package.version)
    ]


def _allowed(requirements: Iterable[Requirement], known: Mapping[str, Floor]) -> list[str]:
    """Who installs without the lock gets what a requirement allows, so it must begin where the good versions do."""
    found = []
    for requirement in requirements:
        floor = known.get(canonicalize_name(requirement.name))
        begins = [
            Version(part.version.removesuffix(".*"))
            for part in requirement.specifier
            if part.operator in (">=", "==", "~=", "===", ">")
        ]
        if floor and (floor.first_good is None or not begins or max(begins) < floor.first_good):
            found.append(f"{requirement} allows what is bad: {floor.why}")
    return found


def _declared(project: Mapping[str, Any]) -> list[Requirement]:
    """Return every requirement that we name ourselves."""
    about = project["project"]
    texts = [*about["dependencies"]]
    for group in (*about["optional-dependencies"].values(), *project["dependency-groups"].values()):
        texts += [text for text in group if isinstance(text, str)]
    return [Requirement(text) for text in texts]
