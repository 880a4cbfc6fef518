"""Backups as an operator makes and restores them: with PostgreSQL's own programs, of the server's own version."""

import contextlib
import itertools
import subprocess
from pathlib import Path
from typing import ClassVar, final

from tests.support.addresses import plain
from tests.support.servers import LocalPostgres

_numbers = itertools.count(1)


@final
class Backups:
    """Dumps databases of a server of our own, restores them there, and copies its files."""

    TEMPLATE: ClassVar[str] = "template_with_keys"

    def __init__(self, server: LocalPostgres, folder: Path) -> None:
        self.server = server
        self._folder = folder

    def a_database(self, template: str | None = None) -> str:
        """Create a database, empty or as the template is, and return its URL."""
        return self.server.create_database(f"place_{next(_numbers)}", template)

    def dump(self, url: str, *options: str) -> Path:
        """Dump a database into a file that pg_restore reads."""
        path = self._folder / f"backup_{next(_numbers)}.dump"
        self.server.run_client("pg_dump", "--format=custom", "--file", path, "--dbname", plain(url), *options)
        return path

    def restore(self, dump: Path, url: str, *options: str) -> str:
        """Restore a dump into a database, up to the first complaint; return the database's URL."""
        self.server.run_client("pg_restore", "--exit-on-error", "--dbname", plain(url), *options, dump)
        return url

    def restore_elsewhere(self, dump: Path, *options: str) -> str:
        """Restore a dump into a new database and return its URL."""
        return self.restore(dump, self.a_database(), *options)

    def load(self, dump: Path, url: str) -> None:
        """Load a dump's rows into tables that are there; rows that are there as well stay, and are complained of."""
        with contextlib.suppress(RuntimeError):
            self.server.run_client("pg_restore", "--data-only", "--disable-triggers", "--dbname", plain(url), dump)

    def go_on_with_copied_files(self) -> None:
        """Stop the server, copy its files, and go on with the copy, as a standby would; the URLs stay."""
        copy = self.server.data.with_name("copy")
        self.server.stop()
        subprocess.run(["cp", "-a", self.server.data, copy], check=True)
        self.server.data.rename(self.server.data.with_name(f"before_{next(_numbers)}"))
        copy.rename(self.server.data)
        self.server.start()
