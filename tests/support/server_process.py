"""A real server in a process of its own, for what only a socket, a signal or a crash can show."""

import atexit
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self, final

from tests.support.canary import SCANNER
from tests.support.servers import free_port
from tests.support.service import MASTER_KEY

_ROOT = Path(__file__).parents[2]
_START_DEADLINE = 90.0
_STOP_DEADLINE = 60.0
_LISTENS = "service.started"  # in either form of the log
COMMAND = "from identity_service.cli import main; main()"


@final
class ServerProcess:
    """
    `identity-service serve` on a free port of 127.0.0.1, ready to answer; its log goes to a file.

    `env` holds settings by their names without the prefix, in small letters: `refusal_delay="0"`. Unless they say
    otherwise the server runs in development with the tests' master key and cheap hashes. `program` is what Python runs
    instead of the command line, with `serve` as its argument: a server that a test has done something to. `code` is
    the folder that its package is in. Raises RuntimeError with the log if it does not start. Leave it with `stop`
    (SIGTERM), `kill` (SIGKILL) or a `with` block.
    """

    def __init__(
        self,
        database_url: str,
        redis_url: str | None = None,
        *,
        program: str = COMMAND,
        code: Path = _ROOT,
        **env: str,
    ) -> None:
        self._program = program
        self._code = code
        self._folder = tempfile.TemporaryDirectory(prefix="identity-server-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name, "server.log")
        self._settings = {
            "environment": "development",
            "master_key": MASTER_KEY,
            "argon2_memory_kib": "8",
            "argon2_time_cost": "1",
            "refusal_delay": "0",
            "data_dir": self._folder.name,
            "database_url": database_url,
            "redis_url": redis_url or "",
            **env,
        }
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)  # for a test run that ends without having left the block
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The origin the server listens at, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How the process ended (negative: by that signal), or None while it runs."""
        return self._process.poll() if self._process else None

    def log_text(self) -> str:
        """Return everything the server has written so far."""
        return self._log.read_text("utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal and return at once."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = _STOP_DEADLINE) -> int:
        """Wait until the process has ended by itself; return how. Raises subprocess.TimeoutExpired."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.wait(timeout)

    def stop(self) -> int | None:
        """End the server in good order and return its exit code; kill it if that takes too long."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int | None:
        """End the server as a crash would."""
        return self._end(signal.SIGKILL)

    def close(self) -> None:
        """End the server, if it still runs, search its log for secrets, and delete it."""
        self.kill()
        atexit.unregister(self.kill)
        if self._log.exists():
            SCANNER.scan(self.log_text(), "a server process")
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        for attempts_left in (2, 1, 0):
            self.port = free_port()
            self._spawn()
            if self._wait_until_ready():
                return
            self.kill()
            log = self.log_text()
            if not attempts_left or "address already in use" not in log.lower():
                raise RuntimeError(f"the server did not start:\n{log}")

    def _spawn(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        environment |= {f"IDENTITY_{name.upper()}": value for name, value in self._settings.items()}
        environment |= {"IDENTITY_PORT": str(self.port), "PYTHONPATH": str(self._code), "PYTHONUNBUFFERED": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._program, "serve"],
                cwd=self._folder.name,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the test run, which stops the server when it is done with it
            )

    def _wait_until_ready(self) -> bool:
        deadline = time.monotonic() + _START_DEADLINE
        while self.returncode is None and time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/readyz")
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                status = None
            finally:
                connection.close()
            # Another test run may have taken the port while this server was on its way to it.
            if status == http.client.OK and _LISTENS in self.log_text():
                return True
            time.sleep(0.05)
        return False

    def _end(self, number: signal.Signals) -> int | None:
        if (process := self._process) is None:
            return None
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(_STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode
