"""Commands that bring users in from another system, and that take them out."""

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO, final

import typer

from identity_service.accounts.user_imports import (
    ROLE_NOT_ALLOWED,
    FileRefused,
    ImportRules,
    Line,
    LineRefused,
    export_line,
    read_csv,
    read_jsonl,
    write_csv,
    write_jsonl,
)
from identity_service.accounts.users.imports import LARGEST_BATCH, ImportedUser, Outcome, UserImports
from identity_service.cli.common import ACTOR, AsJson, DataDir, Refused, opened, quiet_settings, say, split
from identity_service.cli.files import Format, whole_file
from identity_service.infra.database import Transaction
from identity_service.main import Services
from identity_service.settings import Settings

_SHOWN = 10  # refused lines on the screen, where no report was asked for

Refuse = Callable[[Line, str], None]


FormatOption = Annotated[Format | None, typer.Option("--format", help="The format; else the file's name tells it.")]


# -- import -----------------------------------------------------------------------------------------------------------


@final
@dataclass(slots=True)
class Summary:
    """What a run did; with `dry_run`, what it would have done."""

    dry_run: bool
    lines: int = 0
    imported: int = 0
    already_there: int = 0
    refused: int = 0
    refused_for_role: int = 0
    without_password: int = 0
    weak_hashes: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, Any]:
        """Return it for machines."""
        return {
            "lines": self.lines,
            "imported": self.imported,
            "already_there": self.already_there,
            "refused": self.refused,
            "without_password": self.without_password,
            "weak_hashes": dict(self.weak_hashes),
        }

    def text(self) -> str:
        """Return it for people."""
        done = "would be imported" if self.dry_run else "imported"
        said = [
            f"{self.lines} lines: {self.imported} {done}, {self.already_there} already there, {self.refused} refused"
        ]
        if self.without_password:
            said.append(f"{self.without_password} have no password and must choose one by a reset")
        if self.weak_hashes:
            kinds = ", ".join(f"{scheme} {count}" for scheme, count in sorted(self.weak_hashes.items()))
            said.append(f"{self.weak_hashes.total()} have a weak hash until they first sign in: {kinds}")
        return "\n".join(said)


def import_users(
    file: Annotated[Path, typer.Argument(help="The users: a JSON object on each line, or CSV with a header.")],
    file_format: FormatOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    allow_roles: Annotated[
        list[str] | None, typer.Option(help="Roles besides `user` that the file may give, with commas between.")
    ] = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Pass over fields that this service does not have.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST_BATCH, help="Lines in one transaction.")] = LARGEST_BATCH,
    report: Annotated[Path | None, typer.Option(help="Write refused lines here: number, username, reason.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """
    Import users, with the password hashes they have.

    A line that cannot be imported is refused, the run goes on, and ends with 1. Importing a file again imports what is
    missing and changes nobody who is there, so a run that broke off is simply repeated.

    Fields: username and email; and, as far as they are known, email_verified (default false), name, role (user),
    enabled (true), created_at (ISO 8601 with an offset), id (a UUID, which stays the subject), password_hash, and
    password_form (raw, as the password was typed, or nfkc). Who has no password_hash chooses a password by a reset.
    In CSV an apostrophe before what a spreadsheet takes for a formula is no part of it; `users export` puts it there.
    """
    chosen = file_format or _format_of(file)
    if report is not None and report.exists() and report.samefile(file):
        raise Refused("the report would be written over the users")
    settings = quiet_settings(data_dir)
    summary = Summary(dry_run)
    with (
        file.open("rb") as source,
        _refusals(report) as refuse,
        _progress(source) as advance,
        contextlib.closing(_SeenNames()) as seen,
    ):
        lines = read_jsonl(source) if chosen is Format.JSONL else read_csv(source, ignore_unknown=ignore_unknown)
        run = _ImportRun(lines, batch, seen, summary, refuse, advance)
        try:
            asyncio.run(run.main(settings, roles=split(allow_roles), ignore_unknown=ignore_unknown))
        except FileRefused as error:
            raise Refused(str(error)) from None
    if summary.refused_for_role:
        few = "1 line was" if summary.refused_for_role == 1 else f"{summary.refused_for_role} lines were"
        typer.echo(f"{few} refused for the role; --allow-roles names the roles that a file may give", err=True)
    say({"dry_run": dry_run, **summary.counts()}, summary.text(), as_json=as_json)
    if summary.refused:
        raise typer.Exit(1)


@final
class _ImportRun:
    """One run: its lines, batch after batch, checked, stored in a transaction for each, and counted."""

    def __init__(
        self,
        lines: Iterator[Line],
        batch: int,
        seen: "_SeenNames",
        summary: Summary,
        refuse: Refuse,
        advance: Callable[[], None],
    ) -> None:
        self._lines = lines
        self._batch = batch
        self._summary = summary
        self._refuse = refuse
        self._advance = advance
        self._seen = seen
        self._begun = False

    async def main(self, settings: Settings, *, roles: list[str], ignore_unknown: bool) -> None:
        """Import everything; raises Refused for a role that does not exist, FileRefused."""
        async with opened(settings) as services:
            if unknown := set(roles) - set(await services.db.run(services.access.role_names)):
                raise Refused(f"there is no role {', '.join(sorted(unknown))}")
            rules = ImportRules(services.clock.now(), frozenset(("user", *roles)), ignore_unknown)
            while batch := list(islice(self._lines, self._batch)):
                await self._import(services, rules, batch)
                self._advance()
            if not self._summary.dry_run:
                await services.db.run(
                    lambda tx: services.audit.record(
                        tx, "users.imported", origin=None, actor=ACTOR, detail=self._summary.counts()
                    )
                )

    async def _import(self, services: Services, rules: ImportRules, batch: list[Line]) -> None:
        """Import one batch, and tell which of its lines were refused, in their order."""
        summary = self._summary
        refused: dict[int, str] = {}
        accepted: dict[int, ImportedUser] = {}
        weak: dict[int, str] = {}
        for line in batch:
            try:
                user, kept = rules.accept(line)
                self._seen.claim(line.number, user)
            except LineRefused as error:
                refused[line.number] = str(error)
                continue
            accepted[line.number] = user
            if kept is not None and kept.weak:
                weak[line.number] = kept.scheme
        users = list(accepted.values())
        outcomes = await services.db.run(lambda tx: self._store(services, tx, users))
        self._begun = self._begun or Outcome.IMPORTED in outcomes
        for (number, user), outcome in zip(accepted.items(), outcomes, strict=True):
            match outcome:
                case Outcome.IMPORTED:
                    summary.imported += 1
                    summary.without_password += user.password_hash is None
                    if number in weak:
                        summary.weak_hashes[weak[number]] += 1
                case Outcome.ALREADY_THERE:
                    summary.already_there += 1
                case _:
                    refused[number] = outcome.value
        summary.lines += len(batch)
        summary.refused += len(refused)
        summary.refused_for_role += list(refused.values()).count(ROLE_NOT_ALLOWED)
        for line in batch:
            if line.number in refused:
                self._refuse(line, refused[line.number])

    async def _store(self, services: Services, tx: Transaction, users: list[ImportedUser]) -> list[Outcome]:
        imports = UserImports(services.clock)
        if self._summary.dry_run:
            return await imports.compare(tx, users)
        outcomes = await imports.store(tx, users)
        if not self._begun and Outcome.IMPORTED in outcomes:
            # A run that is killed leaves users behind, and then this row.
            await services.audit.record(tx, "users.import_started", origin=None, actor=ACTOR)
        return outcomes


@final
class _SeenNames:
    """
    Remembers which line named whom first, however many lines there are.

    What it knows is in a temporary file of the database library, which has no name and vanishes with the process, and
    is nothing but keyed digests.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def claim(self, number: int, user: ImportedUser) -> None:
        """Note the username, the address and the id of a line; raises LineRefused if an earlier one has one of them."""
        names = [f"username {user.username}", f"email {user.email_canonical}", *([f"id {user.id}"] if user.id else [])]
        digests = [hashlib.blake2b(name.encode(), key=self._key, digest_size=16).digest() for name in names]
        found = (self._db.execute("SELECT line FROM seen WHERE digest = ?", (digest,)).fetchone() for digest in digests)
        if earlier := min((line for (line,) in filter(None, found)), default=None):
            raise LineRefused(f"its username, address or id stands in line {earlier} already")
        self._db.executemany("INSERT INTO seen VALUES (?, ?)", [(digest, number) for digest in digests])

    def close(self) -> None:
        """Forget everything."""
        self._db.close()


@contextlib.contextmanager
def _refusals(report: Path | None) -> Iterator[Refuse]:
    """Yield what tells of a refused line: in the report, or for the first few on the screen when all is done."""
    if report is None:
        shown: list[str] = []
        more = 0

        def remember(line: Line, reason: str) -> None:
            nonlocal more
            if len(shown) < _SHOWN:
                shown.append(f"line {line.number}: {reason}")
            else:
                more += 1

        yield remember
        if more:
            shown.append(f"and {more} more; --report writes all of them to a file")
        for text in shown:
            typer.echo(text, err=True)
        return
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:

        def write(line: Line, reason: str) -> None:
            named = {"username": line.username} if line.username is not None else {}
            file.write(json.dumps({"line": line.number, **named, "reason": reason}, ensure_ascii=False) + "\n")

        yield write


@contextlib.contextmanager
def _progress(source: BinaryIO) -> Iterator[Callable[[], None]]:
    """Yield what moves a bar to where reading is; there is one only on a terminal, and for a file with an end."""
    if not source.seekable() or not sys.stderr.isatty():
        yield lambda: None
        return
    with typer.progressbar(length=os.fstat(source.fileno()).st_size, label="Importing", file=sys.stderr) as bar:
        yield lambda: bar.update(source.tell() - bar.pos)


# -- export -----------------------------------------------------------------------------------------------------------


def export_users(
    output: Annotated[Path | None, typer.Option(help="Write to this new file, readable by you only.")] = None,
    file_format: FormatOption = None,
    with_password_hashes: Annotated[
        bool, typer.Option("--with-password-hashes", help="Include the hashes: whoever has them can guess passwords.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """
    Export every user who is not deleted, in the form that `users import` reads.

    Users who come, go or change while it runs may be in it or not. Without --output they are printed.
    """
    chosen = file_format or (_format_of(output) if output else Format.JSONL)
    settings = quiet_settings(data_dir)
    with whole_file(output, force=force) if output else _standard_output() as file:
        count = asyncio.run(_export(settings, file, chosen, with_password_hashes))
    if output is not None:
        say({"users": count, "password_hashes": with_password_hashes}, f"{count} users exported", as_json=as_json)


async def _export(settings: Settings, file: TextIO, chosen: Format, with_password_hashes: bool) -> int:
    """Write every user and record it, however far it came; return how many there were."""
    written, complete = 0, False
    async with opened(settings) as services:
        try:
            async for page in _pages(services):
                lines = [export_line(user, with_password_hash=with_password_hashes) for user in page]
                file.write(write_jsonl(lines) if chosen is Format.JSONL else write_csv(lines, header=not written))
                file.flush()
                written += len(page)
            complete = True
        finally:
            detail = {"users": written, "complete": complete, "password_hashes": with_password_hashes}
            await services.db.run(
                lambda tx: services.audit.record(tx, "users.exported", origin=None, actor=ACTOR, detail=detail)
            )
    return written


async def _pages(services: Services) -> AsyncIterator[list[ImportedUser]]:
    """Yield all users, many at a time, each time in a transaction of its own; the last page may be empty."""
    imports = UserImports(services.clock)
    page = await services.db.run(partial(imports.page, after=None, limit=LARGEST_BATCH))
    yield page
    while len(page) == LARGEST_BATCH:
        page = await services.db.run(partial(imports.page, after=page[-1].id, limit=LARGEST_BATCH))
        yield page


def _standard_output() -> TextIO:
    return open(sys.stdout.fileno(), "w", encoding="utf-8", newline="", closefd=False)


# -- both -------------------------------------------------------------------------------------------------------------


def _format_of(path: Path) -> Format:
    """Return the format that a file's name tells; raises Refused."""
    try:
        return Format(path.suffix.lower().removeprefix("."))
    except ValueError:
        raise Refused("the file's name ends neither in .jsonl nor in .csv: say --format") from None
