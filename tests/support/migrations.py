"""The revisions, what a database looks like between them, and several migrations at once."""

import subprocess
import sys
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from identity_service.infra.migrate import connected, script_config

_ROOT = Path(__file__).parents[2]


def revisions() -> list[str]:
    """Return every revision, the first one first."""
    scripts = ScriptDirectory.from_config(script_config()).walk_revisions()
    return [script.revision for script in reversed(list(scripts))]


def shape(url: str) -> dict[str, list[str]]:
    """Return the columns of each table."""
    with connected(url) as connection:
        found = inspect(connection)
        names = set(found.get_table_names()) - {"alembic_version"}
        return {name: [column["name"] for column in found.get_columns(name)] for name in sorted(names)}


def downgrade(url: str, revision: str) -> None:
    """Take a database back to a revision."""
    with connected(url) as connection:
        command.downgrade(script_config(connection=connection), revision)


def migrating_at_once(program: str, *words: str, number: int) -> list[tuple[int, str]]:
    """
    Run a program so many times at once; return each one's exit code and complaint.

    It says a line when it is ready, reads one, and begins: the time that Python takes to start would make a queue of
    its own.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(number)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    complaints = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, complaint) for process, complaint in zip(processes, complaints, strict=True)]
