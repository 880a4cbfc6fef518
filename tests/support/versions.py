"""
Earlier versions of this code, taken out of the history and run beside it with today's libraries.

A version is told by its schema: the newest commit of the main line that asks for a revision is that revision's version.
"""

import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from identity_service.infra.tables import SCHEMA_REVISION
from tests.support.commands import CHEAP, Forge
from tests.support.server_process import ServerProcess
from tests.support.service import MASTER_KEY

ROOT = Path(__file__).parents[2]
_TABLES = "identity_service/infra/tables.py"
_REVISION = re.compile(r'^SCHEMA_REVISION = "(\d+)"$', re.MULTILINE)


class HistoryMissing(Exception):
    """The version before this one is not here; the message says how to get it."""


@dataclass(frozen=True)
class Version:
    """Code of one schema revision, in a folder. Commands and servers run it with this process's libraries."""

    schema: str
    folder: Path
    commit: str = "the working tree"

    def __str__(self) -> str:
        return f"{self.schema} ({self.commit[:7]})"

    def serve(self, database_url: str, redis_url: str | None = None, **env: str) -> ServerProcess:
        """Start a server of this version."""
        return ServerProcess(database_url, redis_url, code=self.folder, **env)

    def command(self, *words: str, database_url: str) -> str:
        """Run an operator's command of this version and return what it printed; fails if it does."""
        with self.commands(database_url) as run:
            return run(*words)

    @contextmanager
    def commands(self, database_url: str) -> Iterator[Callable[..., str]]:
        """Yield what runs a command and returns what it printed; many of them, for one start of Python."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        environment |= CHEAP | {
            "IDENTITY_ENVIRONMENT": "development",
            "IDENTITY_DATABASE_URL": database_url,
            "IDENTITY_MASTER_KEY": MASTER_KEY,
        }

        def run(*words: str, stdin: str = "") -> str:
            code, out, err = forge.run(words, environment, folder, stdin.encode())
            assert code == 0, f"{self}: {' '.join(words)}: {err}"
            return out

        with tempfile.TemporaryDirectory() as folder, closing(Forge(Path(folder), code=self.folder)) as forge:
            yield run


THIS = Version(SCHEMA_REVISION, ROOT)


def earlier_versions(folder: Path, root: Path = ROOT) -> list[Version]:
    """
    Unpack under `folder` one version for each schema before the working tree's own, the oldest first.

    Raises HistoryMissing where the history does not reach back to one, because a comparison with nothing proves
    nothing.
    """
    own = _revision((root / _TABLES).read_text("utf-8"))
    if _git(root, "rev-parse", "--is-inside-work-tree").strip() != b"true":
        raise HistoryMissing("this is no git checkout, and upgrades are tested from earlier versions: use `git clone`")
    if _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise HistoryMissing("this clone has no history to upgrade from: run `git fetch --unshallow`")
    found = {revision: commit for revision, commit in _oldest_first(root) if revision < own}
    if not found:
        raise HistoryMissing("the history has no version before this one: fetch the main line with all of its history")
    return [_unpacked(root, revision, found[revision], folder) for revision in sorted(found)]


def _oldest_first(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (schema revision, commit) of the main line's last commit before each change of the revision, and HEAD's."""
    changes = _git(root, "log", "--first-parent", "-m", "-G^SCHEMA_REVISION", "--format=%H", "--", _TABLES)
    for name in (*(f"{change}^" for change in reversed(changes.decode().split())), "HEAD"):
        commit = _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()
        if commit and (tables := _git(root, "show", f"{commit}:{_TABLES}")):
            yield _revision(tables.decode()), commit


def _revision(tables: str) -> str:
    found = _REVISION.search(tables)
    assert found is not None, f"{_TABLES} names no SCHEMA_REVISION"
    return found[1]


def _unpacked(root: Path, revision: str, commit: str, folder: Path) -> Version:
    place = folder / revision
    archive = _git(root, "archive", "--format=tar", commit, "identity_service", "migrations")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(place, filter="data")
    return Version(revision, place, commit)


def _git(root: Path, *words: str) -> bytes:
    """Return what git says, and nothing where it has nothing to say; whoever owns the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "-c", "safe.directory=*", *words]
    try:
        return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).stdout
    except FileNotFoundError:
        raise HistoryMissing("git is not installed, and upgrades are tested from earlier versions") from None
