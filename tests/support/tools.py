"""
Programs that some tests run: found on this machine, or brought into a folder of this repository without installing.

`python -m tests.support.tools NAME…` brings them ahead of a run, which then needs no network; `make tools` does that.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[2] / ".tools"
"""Where brought programs are kept; git ignores it."""
PACKAGES: Final = {"promtool": "prometheus", "pgbouncer": "pgbouncer", "nginx": "nginx"}
"""Each program, and the Debian package that holds it."""

_ELSEWHERE: Final = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # where Debian keeps servers, off most people's PATH
_PATIENCE: Final = 300.0  # seconds for one command
_SCRIPT: Final = """\
#!/bin/sh
libraries=$(dirname "$0")/../lib/{name}
LD_LIBRARY_PATH="$libraries" exec "$libraries"/{name} "$@"
"""


class ToolMissing(Exception):
    """A program is neither here nor to be had; the message says what to install."""


def tool(name: str, *, folder: Path = FOLDER) -> Path:
    """
    Return the path of a program: this machine's own, else one that was brought, else one that is brought now.

    What is brought comes from Debian's package as it is, with the libraries that this machine lacks, and nothing is
    installed. Only the program is kept: data and configuration of the package are not. Raises ToolMissing.
    """
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), *_ELSEWHERE))
    if found := shutil.which(name, path=search):
        return Path(found)
    brought = folder / "bin" / name
    if not brought.exists():
        with _alone(folder):
            if not brought.exists():  # another process may have been quicker
                _bring(name, folder)
    return brought


def _bring(name: str, folder: Path) -> None:
    package = PACKAGES.get(name, name)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ToolMissing(f"The tests need the program {name}: install {package} (here is no apt to take it from).")
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as temporary:
        try:
            _unpack(name, package, Path(temporary), folder)
        except subprocess.CalledProcessError as error:
            said = " ".join((error.stderr or error.stdout or "it said nothing").split())[-300:]
            raise ToolMissing(
                f"The tests need the program {name}: install {package} ({error.cmd[0]} could not bring it: {said})."
            ) from None


def _unpack(name: str, package: str, work: Path, folder: Path) -> None:
    """Take the program out of its package, with what it links to and this machine has not, and put it in its place."""
    root = work / "root"
    archives = [_download(package, work)]
    _run("dpkg-deb", "-x", archives[0], root)
    program = next((path for path in root.glob(f"usr/*bin/{name}") if path.is_file()), None)
    if program is None:
        raise ToolMissing(f"The tests need the program {name}, and Debian's package {package} holds none; install it.")
    asked = {package}
    while _lacking(program, *_library_folders(root)):
        wanted = [one for archive in archives for one in _libraries_of(archive) if one not in asked]
        if not wanted:
            missing = ", ".join(_lacking(program, *_library_folders(root)))
            raise ToolMissing(f"The tests need the program {name}: install {package} (here it lacks {missing}).")
        asked |= set(wanted)
        archives = [_download(one, work) for one in dict.fromkeys(wanted)]
        for archive in archives:
            _run("dpkg-deb", "-x", archive, root)
    place = folder / "bin" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if _lacking(program):
        libraries = folder / "lib" / name
        shutil.rmtree(libraries, ignore_errors=True)
        libraries.mkdir(parents=True)
        while lacking := _lacking(program, libraries):  # then what these lack themselves
            for library in lacking:
                source = next(path for part in _library_folders(root) if (path := part / library).exists())
                shutil.copy(source, libraries / library)
        shutil.move(program, libraries / name)
        program = work / "script"
        program.write_text(_SCRIPT.format(name=shlex.quote(name)))
        program.chmod(0o755)
    program.rename(place)


def _download(package: str, work: Path) -> Path:
    """Return the archive of a package; where the machine's own package lists are empty, with lists of our own."""
    try:
        _run("apt-get", "-q", "download", package, cwd=work)
    except subprocess.CalledProcessError:
        state = work.parent / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True, exist_ok=True)
        own = ("-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}")
        if not any((state / "lists").glob("*Packages*")):
            _run("apt-get", "-q", *own, "update", cwd=work)
        _run("apt-get", "-q", *own, "download", package, cwd=work)
    return next(work.glob(f"{package}_*.deb"))


def _libraries_of(archive: Path) -> Iterator[str]:
    """Yield the packages of libraries that a package depends on: the first of each alternative."""
    for field in ("Pre-Depends", "Depends"):
        for entry in _run("dpkg-deb", "-f", archive, field).split(","):
            found = re.match(r"\s*(lib[a-z0-9.+-]+)", entry)
            if found and found[1] not in ("libc6", "libc-bin"):  # whoever runs us has it, and two of them do not mix
                yield found[1]


def _library_folders(root: Path) -> list[Path]:
    return [path for pattern in ("usr/lib/*-linux-*", "lib/*-linux-*") for path in sorted(root.glob(pattern))]


def _lacking(program: Path, *folders: Path) -> list[str]:
    """Return the libraries that are neither on this machine nor in these folders."""
    environment = {**os.environ, "LC_ALL": "C", "LD_LIBRARY_PATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(["ldd", program], env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    return re.findall(r"^\s*(\S+) => not found", done.stdout, re.M)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=_PATIENCE
    ).stdout


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep parallel test runs from bringing the same thing at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(names: Sequence[str]) -> int:
    """Find or bring the named programs and say where they are; return 1 if one is not to be had."""
    missing = 0
    for name in names:
        try:
            sys.stdout.write(f"{name}: {tool(name)}\n")
        except ToolMissing as error:
            sys.stderr.write(f"{error}\n")
            missing = 1
    return missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or sorted(PACKAGES)))
