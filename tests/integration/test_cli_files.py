"""The files that commands export into: there when all of it is, for their owner only, and in nobody's place."""

import asyncio
import errno
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from identity_service.cli.common import Refused
from identity_service.cli.files import whole_file
from tests.support.commands import PATIENT_PROGRAM, Cli
from tests.support.races import held, waiting
from tests.support.service import Service

EXPORTS = pytest.mark.parametrize("command", ["audit", "users"])
READ = {"audit": "audit_events", "users": "users"}
"""What each of the exports reads."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for the file alone."""
    made = tmp_path / "out"
    made.mkdir()
    return made


@contextmanager
def exporting(cli: Cli, command: str, output: Path, *more: str) -> Iterator["subprocess.Popen[str]"]:
    """Run an export, which is over when the block is left."""
    with subprocess.Popen(
        [*PATIENT_PROGRAM, command, "export", "--output", str(output), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli.environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def names_in(folder: Path) -> set[str]:
    """Return what is in a folder."""
    return {path.name for path in folder.iterdir()}


async def until_it_waits(service: Service, process: "subprocess.Popen[str]") -> None:
    """Return once an export stands before a table that is held."""
    while not await waiting(service):
        assert process.poll() is None, process.communicate()
        await asyncio.sleep(0.01)


@EXPORTS
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
@pytest.mark.parametrize("old", [None, "old"], ids=["no file", "an old file"])
async def test_an_export_that_is_ended_leaves_nothing_under_the_name(
    service: Service, on_postgres: Cli, out: Path, command: str, end: signal.Signals, old: str | None
) -> None:
    """Half of it would look like all of it. What a killed one cannot clear up has another name."""
    output = out / "rows.jsonl"
    if old is not None:
        output.write_text(old)
    async with held(service) as other:
        await other.tx.execute(text(f"LOCK TABLE {READ[command]} IN ACCESS EXCLUSIVE MODE"))
        with exporting(on_postgres, command, output, *([] if old is None else ["--force"])) as process:
            await until_it_waits(service, process)
            [unfinished] = names_in(out) - {output.name}
            assert unfinished.startswith(".")
            assert stat.S_IMODE((out / unfinished).stat().st_mode) == 0o600
            process.send_signal(end)
            await asyncio.to_thread(process.wait, 30)
        assert process.returncode != 0
    cleared_up = set() if end == signal.SIGKILL else {unfinished}
    assert not names_in(out) & cleared_up
    assert output.exists() is (old is not None)
    assert old is None or output.read_text() == old


@EXPORTS
async def test_an_export_takes_no_place_that_was_taken_meanwhile(
    service: Service, on_postgres: Cli, out: Path, command: str
) -> None:
    """Of two at once the later one is refused; `--force` replaces whatever is there in the end."""
    output = out / "rows.jsonl"
    for force in ([], ["--force"]):
        output.unlink(missing_ok=True)
        async with held(service) as other:
            await other.tx.execute(text(f"LOCK TABLE {READ[command]} IN ACCESS EXCLUSIVE MODE"))
            with exporting(on_postgres, command, output, *force) as process:
                await until_it_waits(service, process)
                output.write_text("another one's")
                await other.commit()
                _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == (0 if force else 1), said
        assert force or f"{output} exists; --force replaces it" in said
        assert (output.read_text() == "another one's") is not bool(force)
        assert names_in(out) == {output.name}


@pytest.mark.parametrize("force", [False, True], ids=["without force", "with force"])
def test_a_file_has_its_name_when_all_of_it_is_there(out: Path, force: bool) -> None:
    """And not a moment earlier; nothing else stays beside it."""
    output = out / "rows.jsonl"
    with whole_file(output, force=force) as file:
        file.write("one\ntwo\r\nthree é\n")
        assert not output.exists()
    assert output.read_bytes() == "one\ntwo\r\nthree é\n".encode()
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert names_in(out) == {output.name}


def test_a_file_system_without_links_does_no_worse(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a stick: the file comes whole, and takes nobody's place."""

    def no_links(*_given: object, **_named: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    output = out / "rows.jsonl"
    with whole_file(output, force=False) as file:
        file.write("whole")
    assert output.read_text() == "whole"
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    output.unlink()
    with pytest.raises(Refused, match="exists"), whole_file(output, force=False):
        output.write_text("another one's")
    assert output.read_text() == "another one's"
    assert names_in(out) == {output.name}
