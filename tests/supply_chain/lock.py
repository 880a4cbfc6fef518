"""The locked requirements: files of `uv pip compile`, read again."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
REQUIREMENTS: Final = ROOT / "requirements"
SERVER: Final = REQUIREMENTS / "server.txt"
"""What is installed in the image."""
SERVER_WITH_TRACES: Final = REQUIREMENTS / "server-otel.txt"
"""The same with the extra `otel`, to export traces. Every other file is for working on it."""

_HEAD = re.compile(r"([a-z0-9][a-z0-9-]*)==([^\s;\\]+)(?: *; *([^\\]+?))?(?: *\\)?")
_HASH = re.compile(r" +--hash=sha256:([0-9a-f]{64})(?: *\\)?")
_VIA = re.compile(r" +#(?: +via)?(?: +(\S.*))?")


class BadLock(Exception):
    """A line is not what `uv pip compile --generate-hashes` writes, so what it means is not known."""


@dataclass(frozen=True, slots=True)
class Locked:
    """
    One package at one version, with the SHA-256 of each of its files.

    `marker` says where it is installed, None: everywhere. `via` are those who want it; the project itself is among them
    as `identity-service`.
    """

    name: str
    version: str
    marker: str | None
    hashes: tuple[str, ...]
    via: tuple[str, ...]


def read(path: Path) -> list[Locked]:
    """Return the packages of a file, in its order; raises BadLock for a line that it does not understand."""
    found = []
    for head, rest in _entries(path):
        match = _HEAD.fullmatch(head)
        if match is None:
            raise BadLock(f"{path.name}: {head!r}")
        hashes: list[str] = []
        via: list[str] = []
        for line in rest:
            if hashed := _HASH.fullmatch(line):
                hashes.append(hashed[1])
            elif named := _VIA.fullmatch(line):
                # One lock may be compiled within the bounds of another, which is then named as `-c file`.
                via += [named[1].partition(" ")[0]] if named[1] and not named[1].startswith("-c ") else []
            else:
                raise BadLock(f"{path.name}: {line!r}")
        if not hashes:
            raise BadLock(f"{path.name}: {match[1]} has no hash")
        found.append(Locked(match[1], match[2], match[3], tuple(hashes), tuple(via)))
    return found


def _entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each package's first line with the lines that belong to it."""
    head, rest = "", list[str]()
    for line in path.read_text("utf-8").splitlines():
        if line.startswith(" "):
            rest.append(line)
            continue
        if head:
            yield head, rest
        head, rest = line, []
    if head:
        yield head, rest
