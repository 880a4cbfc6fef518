"""The service under measurement: its own PostgreSQL, its command line, and one worker on one core."""

import base64
import compileall
import contextlib
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import argon2
import psycopg

import identity_service
from bench import machine
from bench.load import Call
from tests.support.servers import DURABLE, LocalPostgres, free_port, own_postgres

ISSUER = "https://id.example"
COMMAND = (str(Path(sys.executable).with_name("identity-service")),)
START_PATIENCE_SECONDS = 30.0
POLL_SECONDS = 0.002


# Half the names in no order; every twentieth a moderator, every thousandth disabled.
_SEED = """
    INSERT INTO users (id, username, email, email_canonical, email_verified_at, password_form, role, enabled, epoch,
                       created_at, updated_at)
    SELECT gen_random_uuid(), n, n || '@example.com', n || '@example.com', now(), 1,
           CASE WHEN i %% 20 = 0 THEN 'moderator' ELSE 'user' END, i %% 1000 <> 0, 0, now(), now()
    FROM (SELECT i, CASE WHEN i %% 2 = 0 THEN md5(i::text) ELSE 'user' || lpad(i::text, 8, '0') END AS n
          FROM generate_series(1, %(number)s) AS i) AS seeded
    ON CONFLICT DO NOTHING
"""


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A confidential client."""

    client_id: str
    client_secret: str


@dataclass(frozen=True, slots=True)
class Person:
    """A user and their password."""

    username: str
    password: str


class Service:
    """
    One worker of the service on `cores.service`, and its PostgreSQL on `cores.load`.

    Making it migrates a new database and registers the clients; `start` starts the worker. `disk` is a folder on the
    file system that holds the database.
    """

    def __init__(self, server: LocalPostgres, cores: machine.Cores, log: Path) -> None:
        database_url = server.create_database("bench")
        self.cores = cores
        self.port = free_port()
        self.disk = server.folder.parent
        self._log = log
        self._worker: subprocess.Popen[bytes] | None = None
        self._postmaster = _postmaster(database_url)
        machine.pin_tree(self._postmaster, cores.load)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")},
            "IDENTITY_ENVIRONMENT": "production",
            "IDENTITY_ISSUER": ISSUER,
            "IDENTITY_ALLOWED_HOSTS": '["127.0.0.1"]',
            "IDENTITY_DATABASE_URL": database_url,
            "IDENTITY_MASTER_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
            # One client and one network stand for thousands here.
            "IDENTITY_CLIENT_RATE": "1000000",
            "IDENTITY_API_KEY_RATE": "1000000",
        }
        # As an installation is: compiled, whatever this shell's environment says about writing it down.
        compileall.compile_dir(Path(identity_service.__file__).parent, quiet=1)
        self._command("migrate")
        self.client = Machine(**self._create_client("bench-machine", "--grant", "client_credentials"))
        self.resource_server = Machine(**self._create_client("bench-resource-server", "--introspect", ISSUER))
        self.exchanger = Machine(
            **self._create_client(
                "bench-exchanger", "--grant", "token_exchange", "--exchange-audience", "https://orders.example"
            )
        )
        self._database_url = database_url
        self._people: dict[str, Person] = {}
        self.app: str = self._create_client(
            *("bench-app", "--public", "--first-party", "--grant", "password", "--grant", "refresh_token"),
            *("--scope", "users:read", "--scope", "clients:write"),
        )["client_id"]

    def __enter__(self) -> Self:
        """Return the service; it is not started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the worker if it runs."""
        self.stop()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        assert self._worker is not None
        return self._worker.pid

    @property
    def database_pid(self) -> int:
        """The process id of PostgreSQL's first process, the parent of all its others."""
        return self._postmaster

    def user(self, username: str, *, role: str = "user") -> Person:
        """Return an enabled user with a random password, created when first asked for."""
        if (known := self._people.get(username)) is not None:
            return known
        person = self._people[username] = Person(username, secrets.token_urlsafe(24))
        self._command(
            *("users", "create", username, "--email", f"{username}@example.com", "--role", role),
            *("--password-stdin", "--json"),
            stdin=person.password,
        )
        return person

    def import_people(self, number: int) -> list[Person]:
        """Create enabled users at once, all with one random password."""
        password = secrets.token_urlsafe(24)
        hashed = argon2.PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1).hash(password)
        group = secrets.token_hex(3)
        people = [Person(f"bench-{group}-{one}", password) for one in range(number)]
        lines = [
            {"username": one.username, "email": f"{one.username}@example.com", "password_hash": hashed}
            for one in people
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            self._command("users", "import", file.name)
        return people

    def seed_users(self, number: int) -> None:
        """Put users into the database, by its own means: a million in a minute."""
        with psycopg.connect(self._database_url.replace("+psycopg", "", 1), autocommit=True) as connection:
            connection.execute(_SEED, {"number": number})
            connection.execute("ANALYZE users")

    def operator_token(self) -> str:
        """Return an access token of somebody who may do everything."""
        return self.ask(self.sign_in_call(self.user("bench-operator", role="super_admin")), "access_token")

    def create_api_keys(self, number: int) -> list[str]:
        """Create API keys of the confidential client that asks for tokens."""
        head = "\r\n".join(
            (
                f"POST /v1/admin/clients/{self.client.client_id}/api-keys HTTP/1.1",
                "Host: 127.0.0.1",
                "Content-Type: application/json",
                f"Authorization: Bearer {self.operator_token()}",
            )
        )
        bodies = [json.dumps({"name": f"key {one}", "scope": ["account:read"]}) for one in range(number)]
        return [self.ask(Call(head, body), "key", status=201) for body in bodies]

    def exchange_call(self, key: str) -> Call:
        """Exchange an API key for an access token, as a sibling service does (RFC 8693 §2.1)."""
        fields = (
            "grant_type=urn:ietf:params:oauth:grant-type:token-exchange"
            "&subject_token_type=urn:identity-service:params:oauth:token-type:api-key&subject_token=" + key
        )
        return Call(_form_head("/token", _basic(self.exchanger)), fields)

    def start(self) -> float:
        """Start the worker and return the seconds from the start of its process to the first token it issued."""
        call = self.machine_call()
        with self._log.open("ab") as log, machine.on_core(self.cores.service):
            began = time.perf_counter()
            self._worker = subprocess.Popen(
                [*COMMAND, "serve", "--host", "127.0.0.1", "--port", str(self.port)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        answer = "nothing"
        while (waited := time.perf_counter() - began) < START_PATIENCE_SECONDS and self._worker.poll() is None:
            try:
                answer = self.ask(call, "access_token")
            except (OSError, http.client.HTTPException, BenchError) as refusal:
                answer = str(refusal)
                time.sleep(POLL_SECONDS)
            else:
                return time.perf_counter() - began
        raise BenchError(f"No token {waited:.1f} s after the start; the last answer was: {answer}\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop the worker: politely, then not."""
        if self._worker is None:
            return
        self._worker.send_signal(signal.SIGTERM)
        try:
            self._worker.wait(10)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._worker = None

    def check_running(self) -> None:
        """Raise `BenchError` with the end of the worker's log if the worker has ended by itself."""
        if self._worker is None or self._worker.poll() is not None:
            status = self._worker.returncode if self._worker else "nothing"
            raise BenchError(f"The worker has ended under load (status {status}):\n{self.log_tail()}")

    def log_tail(self) -> str:
        """Return the last 2000 characters that the worker logged."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""

    def machine_call(self) -> Call:
        """Ask for a token by client_credentials, authenticated by Basic."""
        return Call(_form_head("/token", _basic(self.client)), "grant_type=client_credentials")

    def introspection_call(self, access_token: str) -> Call:
        """Ask, as a service that was shown a token, whether it is good and what it says (RFC 7662 §2.1)."""
        return Call(_form_head("/introspect", _basic(self.resource_server)), f"token={access_token}")

    def sign_in_call(self, person: Person) -> Call:
        """Sign a user in by the password grant, through the public first-party client."""
        fields = f"grant_type=password&client_id={self.app}&username={person.username}&password={person.password}"
        return Call(_form_head("/token"), fields)

    def refresh_call(self, refresh_token: str) -> Call:
        """Refresh with a token that each answer replaces."""
        fields = f"grant_type=refresh_token&client_id={self.app}&refresh_token="
        return Call(_form_head("/token"), fields, refresh_token)

    def ask(self, call: Call, member: str, *, status: int = 200) -> str:
        """Send one request on a connection of its own and return a string member of the JSON answer."""
        request_line, *headers = call.head.split("\r\n")
        method, path, _ = request_line.split(" ")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, call.body + call.carried, dict(line.split(": ", 1) for line in headers))
            response = connection.getresponse()
            body = response.read()
        if response.status != status:
            raise BenchError(f"{method} {path} answered {response.status}: {body[:300].decode(errors='replace')}")
        value = json.loads(body).get(member)
        if not isinstance(value, str):
            raise BenchError(f"{method} {path} answered without {member}")
        return value

    def _create_client(self, name: str, *options: str) -> dict[str, str]:
        printed = json.loads(self._command("clients", "create", name, *options, "--scope", "account:read", "--json"))
        return {key: printed[key] for key in ("client_id", "client_secret") if printed.get(key)}

    def _command(self, *arguments: str, stdin: str = "") -> str:
        done = subprocess.run(
            [*COMMAND, *arguments], env=self.environment, input=stdin, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise BenchError(f"identity-service {arguments[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout


@contextlib.contextmanager
def a_service(cores: machine.Cores) -> Iterator[Service]:
    """Start a durable PostgreSQL of our own, migrate it, make the clients; stop everything afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="identity-bench-")))
        server = stack.enter_context(own_postgres(DURABLE))
        yield stack.enter_context(Service(server, cores, folder / "worker.log"))


def bearer_call(path: str, access_token: str) -> Call:
    """Get `path` with a bearer token."""
    return Call(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {access_token}")


def get_call(path: str) -> Call:
    """Get `path` as anybody."""
    return Call(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1")


def _basic(client: Machine) -> str:
    pair = f"{client.client_id}:{client.client_secret}"
    return f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}"


def _form_head(path: str, *headers: str) -> str:
    fixed = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/x-www-form-urlencoded")
    return "\r\n".join((*fixed, *headers))


def _postmaster(url: str) -> int:
    """Find PostgreSQL's first process: the parent of the one that serves us."""
    with psycopg.connect(url.replace("postgresql+psycopg://", "postgresql://", 1)) as connection:
        row: Any = connection.execute("SELECT pg_backend_pid()").fetchone()
        return machine.parent(row[0])
