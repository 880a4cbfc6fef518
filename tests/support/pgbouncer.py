"""A real PgBouncer before a PostgreSQL server, configured as the file that is shipped says."""

import configparser
import signal
from pathlib import Path
from typing import Any, Final, Self, final

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy.engine import make_url

from identity_service.infra.database.pooler import SESSION_SETTINGS
from tests.support.servers import Box
from tests.support.tools import tool

SHIPPED: Final = Path(__file__).parents[2] / "deploy" / "pgbouncer" / "pgbouncer.ini"
_CONSOLE: Final = "console"
_OF_A_SITE: Final = ("listen_", "auth_", "client_tls_", "server_tls_")


def shipped_settings() -> dict[str, str]:
    """Return how the shipped file lets PgBouncer pool: everything but addresses, passwords and certificates."""
    parser = configparser.RawConfigParser()
    parser.read_string(SHIPPED.read_text("utf-8"))
    return {name: value for name, value in parser["pgbouncer"].items() if not name.startswith(_OF_A_SITE)}


@final
class PgBouncer:
    """
    A PgBouncer on a free port of 127.0.0.1, before the server that a database's URL names; for all its databases.

    Clients need no password. `settings` come before those of the shipped file. Leave it with `close` or a `with` block;
    `stop` (or `kill`) and `start` keep the port.
    """

    def __init__(self, database_url: str, **settings: str) -> None:
        self._server = make_url(database_url)
        self._settings = {**shipped_settings(), **settings}
        self._box = Box("identity-pgbouncer-", dies_by=signal.SIGKILL)
        try:
            program = tool("pgbouncer")
            self._program = self._box.reach(program, install=program.parents[1])
            self._box.start_on_a_free_port(self._start_on)
        except BaseException:
            self.close()
            raise

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._box.port

    @property
    def pid(self) -> int:
        """The process id of the running pooler."""
        assert self._box.pid is not None
        return self._box.pid

    def through(self, url: str) -> str:
        """Return a URL with the pooler's address in the place of the server's."""
        pooled = make_url(url).set(host="127.0.0.1", port=self.port, password=None)
        return pooled.render_as_string(hide_password=False)

    def console(self, command: str) -> list[dict[str, Any]]:
        """Run a command on the pooler's console and return its rows, if it has any."""
        address = f"postgresql://{_CONSOLE}@127.0.0.1:{self.port}/pgbouncer"
        with psycopg.connect(address, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.cursor(row_factory=dict_row)
            cursor.execute(command.encode("ascii"))
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Start the stopped pooler on the same port; return once it answers."""
        self._start_on(self.port)

    def stop(self) -> None:
        """Stop the pooler at once, as its service manager does: whoever is connected is cut off."""
        self._box.stop(signal.SIGTERM)

    def kill(self) -> None:
        """End the pooler as a crash would."""
        self._box.stop(signal.SIGKILL)

    def close(self) -> None:
        """Stop the pooler and delete its folder."""
        self.kill()
        self._box.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_on(self, port: int) -> None:
        self._box.start([self._program, self._configuration(port)])
        self._box.wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(self.console("SHOW VERSION"))
        except psycopg.OperationalError:
            return False

    def _configuration(self, port: int) -> Path:
        """Write the pooler's files and return the one that names the other."""
        folder, server = self._box.folder, self._server
        users = folder / "users.txt"
        users.write_text(f'"{_CONSOLE}" ""\n"{server.username}" "{server.password or ""}"\n', "utf-8")
        given = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(users),
            "admin_users": _CONSOLE,
            **self._settings,
        }
        lines = [
            "[databases]",
            f"* = host={server.host} port={server.port or 5432}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in given.items()),
        ]
        path = folder / "pgbouncer.ini"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path


def give_defaults(database_url: str, **changes: str) -> None:
    """Give the role of a database's URL, in that database, the defaults that the service needs behind a pooler."""
    address = make_url(database_url).set(drivername="postgresql")
    with psycopg.connect(address.render_as_string(hide_password=False), autocommit=True) as connection:
        for name, value in {**SESSION_SETTINGS, **changes}.items():
            statement = sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}").format(
                sql.Identifier(address.username or ""),
                sql.Identifier(address.database or ""),
                sql.Identifier(name),
                sql.Literal(value),
            )
            connection.execute(statement)
