"""The operator's commands, run as processes of their own, in an environment of their own."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.service import MASTER_KEY

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from identity_service.cli import main; main()"]
_PATIENTLY = (
    "from identity_service.infra.database import pooler;"
    " pooler.SESSION_SETTINGS |= {'lock_timeout': '60000', 'statement_timeout': '60000'}"
)
PATIENT_PROGRAM = [*PROGRAM[:2], f"{_PATIENTLY}; {PROGRAM[2]}"]
"""The same, but it waits for a lock for as long as a busy machine may let it."""
PASSWORD = "Kanarienvogel-77"
OTHER_KEY = base64.b64encode(bytes(range(200, 232))).decode()
CHEAP = {"IDENTITY_ARGON2_MEMORY_KIB": "8", "IDENTITY_ARGON2_TIME_COST": "1"}


# Importing takes longer than most commands, so one process imports and forks for each command. What a command sees is
# what it would see as a process of its own: arguments, environment, directory, standard streams, and its exit code.
FORGE = (
    f"""
try:
    {_PATIENTLY}
except ImportError:  # an earlier version
    pass
"""
    + """
import json, os, sys
from identity_service.cli import main
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for number, name in enumerate(job["streams"]):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    sys.argv = ["identity-service", *job["words"]]
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 70
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""
)


class Forge:
    """Runs commands, one after the other, each in a process of its own; `code` is the folder with the package."""

    def __init__(self, folder: Path, *, code: Path = ROOT) -> None:
        self._streams = [folder / name for name in ("in", "out", "err")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=code,
            env=os.environ | {"PYTHONPATH": str(code)},
        )

    def run(self, words: Sequence[str | bytes], env: dict[str, str], cwd: str, stdin: bytes) -> tuple[int, str, str]:
        """Return the exit code and what was printed."""
        for stream, content in zip(self._streams, (stdin, b"", b""), strict=True):
            stream.write_bytes(content)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"words": [os.fsdecode(word) for word in words], "env": env, "cwd": cwd}
        self._process.stdin.write(json.dumps({**job, "streams": [str(stream) for stream in self._streams]}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return code, self._streams[1].read_text("utf-8"), self._streams[2].read_text("utf-8")

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which is one JSON document."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refused(self, code: int = 1) -> str:
        """Return the sentence it refused with; nothing else was printed."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.out == ""
        return self.err


@dataclass(frozen=True)
class Cli:
    """Runs commands in an environment of their own; no command may ever show a traceback or a secret."""

    forge: Forge
    env: dict[str, str]
    options: tuple[str, ...] = ()
    secrets: list[str] = field(default_factory=lambda: [PASSWORD, MASTER_KEY, OTHER_KEY])

    def environment(self, **changes: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("IDENTITY_")}
        return clean | {"PYTHONPATH": str(ROOT)} | self.env | changes

    def run(self, *words: str | bytes, stdin: str | bytes = "", **env: str) -> Result:
        content = stdin if isinstance(stdin, bytes) else stdin.encode()
        words = (*words, *self.options)
        result = Result(*self.forge.run(words, self.environment(**env), self.env["HOME"], content))
        assert "Traceback" not in result.out + result.err, result.out + result.err
        for secret in self.secrets:
            assert secret not in result.out + result.err
        return result

    def json(self, *words: str, stdin: str = "") -> Any:
        return self.run(*words, "--json", stdin=stdin).json

    def events(self) -> list[tuple[str, str | None]]:
        """Return what `cli` did as (event, target), oldest first; all else fell due by itself."""
        rows = self.json("audit", "list")
        assert all(row["actor"] in ("cli", "schedule") and row["network"] is None for row in rows)
        rows = [row for row in rows if row["actor"] == "cli"]
        return [(row["event"], row["target"]) for row in reversed(rows)]


def in_production(database_url: str, home: Path) -> dict[str, str]:
    """Return the environment of commands that are configured as in production."""
    return {
        "HOME": str(home),
        "IDENTITY_ISSUER": "https://id.example.test",
        "IDENTITY_DATABASE_URL": database_url,
        "IDENTITY_MASTER_KEY": MASTER_KEY,
    }
