"""Under which licences the server's dependencies are, what is allowed, and whether they themselves say the same."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from tests.supply_chain.lock import ROOT, SERVER, SERVER_WITH_TRACES, Locked, read

DOCUMENT: Final = ROOT / "docs" / "licences.md"
_POLICY: Final = Path(__file__).with_name("licences.toml")

# How packages spell it that do not use SPDX yet, with the identifiers that it may stand for.
_CLASSIFIERS: Final = {
    "Apache Software License": {"Apache-2.0"},
    "BSD License": {"BSD-2-Clause", "BSD-3-Clause"},
    "ISC License (ISCL)": {"ISC"},
    "MIT License": {"MIT"},
    "Mozilla Public License 2.0 (MPL 2.0)": {"MPL-2.0"},
}
_TEXTS: Final = {
    "3-Clause BSD License": {"BSD-3-Clause"},
    "Apache-2.0": {"Apache-2.0"},
    "Apache 2.0": {"Apache-2.0"},
    "BSD": {"BSD-2-Clause", "BSD-3-Clause"},
    "BSD-3-Clause": {"BSD-3-Clause"},
    "ISC License": {"ISC"},
    "MIT": {"MIT"},
    "MIT License": {"MIT"},
}


@dataclass(frozen=True, slots=True)
class Policy:
    """What is allowed anywhere, what for named packages only, and what each package was found to be under."""

    allowed: Mapping[str, str]
    exceptions: Mapping[str, tuple[frozenset[str], str]]
    packages: Mapping[str, str]

    def permits(self, package: str, identifier: str) -> bool:
        """Return whether a package may be under this licence."""
        names, _why = self.exceptions.get(identifier, (frozenset[str](), ""))
        return identifier in self.allowed or package in names


def policy(path: Path = _POLICY) -> Policy:
    """Return what is written down."""
    known = tomllib.loads(path.read_text("utf-8"))
    exceptions = {
        name: (frozenset(entry["packages"]), entry["why"].strip()) for name, entry in known["exceptions"].items()
    }
    return Policy(known["allowed"], exceptions, known["packages"])


def faults(packages: Iterable[Locked], rules: Policy) -> list[str]:
    """Return a sentence for each package that may not be here, or of which nobody has said what it is."""
    found = []
    names = set()
    for package in packages:
        names.add(package.name)
        expression = rules.packages.get(package.name)
        if expression is None:
            found.append(f"{package.name}: nobody has looked at its licence yet; enter it in {_POLICY.name}")
        elif not _permitted(package.name, expression, rules):
            found.append(f"{package.name}: {expression} is not allowed")
        elif (told := told_by_itself(package)) is not None and not _agrees(expression, told):
            says = told if isinstance(told, str) else " or ".join(sorted(told)) or "nothing that is known here"
            found.append(f"{package.name} {package.version}: {_POLICY.name} has {expression}, the package says {says}")
    gone = (name for name in rules.packages if name not in names)
    return found + [f"{name}: it is not locked any more; remove it from {_POLICY.name}" for name in gone]


def told_by_itself(package: Locked) -> str | frozenset[str] | None:
    """
    Return what the installed package says of itself: an SPDX expression, or the identifiers that its words may mean.

    None where it is not installed here in the locked version: it is for another platform.
    """
    try:
        about = metadata.distribution(package.name).metadata
    except metadata.PackageNotFoundError:
        return None
    if about["Version"] != package.version:
        return None
    if "License-Expression" in about:
        return about["License-Expression"]
    licence = about["License"] if "License" in about else ""  # noqa: SIM401  # the type that is declared has no `get`
    words = {classifier.rpartition(" :: ")[2] for classifier in about.get_all("Classifier") or []}
    meant = set[str]().union(*(_CLASSIFIERS.get(word, set()) for word in words))
    return frozenset(meant | _TEXTS.get(licence, set()))


def _permitted(package: str, expression: str, rules: Policy) -> bool:
    """Tell whether a choice is allowed. AND binds more tightly than OR; brackets have to be multiplied out."""
    choices = (choice.split(" AND ") for choice in expression.split(" OR "))
    return any(all(rules.permits(package, part) for part in choice) for choice in choices)


def _agrees(expression: str, told: str | frozenset[str]) -> bool:
    if isinstance(told, str):
        return expression == told
    return set(re.split(" AND | OR ", expression)) <= told


def served() -> list[Locked]:
    """Return everything that any server is made of: the image, and what the extra `otel` adds to it."""
    packages = {package.name: package for path in (SERVER_WITH_TRACES, SERVER) for package in read(path)}
    return [packages[name] for name in sorted(packages)]


def document(packages: Iterable[Locked], rules: Policy) -> str:
    """Return the list for people, which is the same on every machine."""
    always = {package.name for package in read(SERVER)}
    lines = [
        "# Licences of what the server is made of",
        "",
        "Written by `make licences` from `requirements/server*.txt` and `tests/supply_chain/licences.toml`;",
        "`make check` fails for a package that is not allowed, and for one that says something else of itself.",
        "",
        "| package | version | licence | |",
        "|---|---|---|---|",
        *(
            f"| {package.name} | {package.version} | {rules.packages[package.name]} |"
            f" {'' if package.name in always else 'only with the extra `otel` '}|"
            for package in packages
        ),
        "",
        "## What is allowed",
        "",
        *(f"- `{name}`: {why}" for name, why in rules.allowed.items()),
        "",
        "For named packages only:",
        "",
        *(f"- `{name}` ({', '.join(sorted(names))}): {why}" for name, (names, why) in rules.exceptions.items()),
        "",
    ]
    return "\n".join(lines)


def write() -> None:
    """Write the list."""
    DOCUMENT.write_text(document(served(), policy()), "utf-8")


def check() -> list[str]:
    """Return what is wrong with the server's licences, and with the list if it was not written anew."""
    packages, rules = served(), policy()
    found = faults(packages, rules)
    if not found and (not DOCUMENT.exists() or DOCUMENT.read_text("utf-8") != document(packages, rules)):
        found.append(f"{DOCUMENT.relative_to(ROOT)} is not up to date: run `make licences`")
    return found
