"""Commands about the audit trail: what was done, and whether anybody has changed what it says."""

import asyncio
import csv
import difflib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from identity_service.accounts.user_imports import is_formula
from identity_service.cli.common import ACTOR, AsJson, DataDir, Keys, Refused, opened, quiet_settings, run, say
from identity_service.cli.files import Format, whole_file
from identity_service.infra.audit import EVENTS, Anchor, AuditEvent, ChainBroken, Filters, Verification
from identity_service.infra.database import Transaction
from identity_service.main import Services, load_data_keys

app = typer.Typer(help="The audit trail.", no_args_is_help=True, rich_markup_mode=None)

_PAGE = 1000  # rows
_COLUMNS = (
    "id",
    "seq",
    "at",
    "event",
    "actor",
    "target",
    "client_id",
    "network",
    "request_id",
    "occurrences",
    "detail",
)


def _instant(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter("an instant looks like 2026-01-31T12:00:00Z, or like 2026-01-31") from None


def parse_anchor(text: str) -> Anchor:
    """Return the anchor that a text is; raises typer.BadParameter."""
    seq, _, mac = text.partition(":")
    try:
        if seq.isascii() and seq.isdigit() and len(seal := bytes.fromhex(mac)) == 32:
            return Anchor(int(seq), seal)
    except ValueError:
        pass
    raise typer.BadParameter("an anchor looks like 1234:b5bb…, as `audit anchor` prints it")


def _event(text: str) -> str:
    if text in EVENTS:
        return text
    near = difflib.get_close_matches(text, EVENTS, n=3, cutoff=0.5)
    perhaps = f"; perhaps {' or '.join(near)}" if near else ""
    raise typer.BadParameter(f"there is no such event{perhaps} (`identity-service audit events` lists all)")


OfEvent = Annotated[
    str | None, typer.Option(parser=_event, metavar="EVENT", help="Only this event; `audit events` lists them.")
]
OfActor = Annotated[str | None, typer.Option(help="Only what this one did: a user's or client's id, cli, schedule.")]
OfTarget = Annotated[str | None, typer.Option(help="Only what was done to this one.")]
OfClient = Annotated[str | None, typer.Option(help="Only what came through this client.")]
Since = Annotated[
    datetime | None, typer.Option(parser=_instant, metavar="INSTANT", help="From then on; UTC unless it says else.")
]
Until = Annotated[datetime | None, typer.Option(parser=_instant, metavar="INSTANT", help="Until before then.")]


def _shown(event: AuditEvent) -> dict[str, Any]:
    row = {**asdict(event), "at": event.at.isoformat()}
    return {name: row[name] for name in _COLUMNS}


def _line(event: AuditEvent) -> str:
    line = f"{event.at.isoformat()}  {event.event:<28} {event.actor or '-'} → {event.target or '-'}"
    # What a terminal would obey is spelled out.
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in line)


@app.command("list")
def list_audit(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most to print; the newest come first.")] = 100,
    event: OfEvent = None,
    actor: OfActor = None,
    target: OfTarget = None,
    client_id: OfClient = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List audit rows."""
    wanted = Filters(event=event, actor=actor, target=target, client_id=client_id, since=since, until=until)

    async def work(services: Services, tx: Transaction) -> list[AuditEvent]:
        return await services.audit.search(tx, limit=limit, **wanted)

    found = run(data_dir, work)
    say([_shown(row) for row in found], "\n".join(map(_line, found)), as_json=as_json)


@app.command("events")
def list_events(as_json: AsJson = False) -> None:
    """List every event that there can be, and what it means."""
    width = max(map(len, EVENTS))
    say(dict(EVENTS), "\n".join(f"{name:<{width}}  {meaning}" for name, meaning in EVENTS.items()), as_json=as_json)


# -- the chain --------------------------------------------------------------------------------------------------------


@app.command("anchor")
def print_anchor(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Print the newest seal, to be kept where this database's administrators cannot change it; see `audit verify`."""

    async def work(services: Services, tx: Transaction) -> Anchor:
        try:
            return await services.audit_chain.newest(tx)
        except ChainBroken as broken:
            raise Refused(str(broken)) from None

    newest = run(data_dir, work)
    mac = newest.mac.hex()
    say({"seq": newest.seq, "mac": mac}, f"{newest.seq}:{mac}", as_json=as_json)


@app.command()
def verify(
    anchors: Annotated[
        list[Anchor] | None,
        typer.Option(
            "--anchor",
            parser=parse_anchor,
            metavar="SEQ:MAC",
            help="A seal that was kept; shows if later rows were cut.",
        ),
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """
    Check every seal and name the first row that was altered, removed, moved or forged; ends with 1 if one was.

    Rows that a restore has lost are named as well: `identity-service after-restore` has said so under a seal.
    """
    settings = quiet_settings(data_dir)

    async def main() -> Verification:
        async with opened(settings, Keys.READ) as services:
            await services.db.run(lambda tx: load_data_keys(services, tx, actor=ACTOR))
            walk = services.audit_chain.verification(*anchors or ())
            while await services.db.run(walk.advance):
                _progress(f"{walk.checked} rows hold")
            return walk

    walk = asyncio.run(main())
    _progress("", done=True)
    fault = walk.fault
    found = {
        "good": fault is None,
        "checked": walk.checked,
        "seq": walk.seq,
        "mac": walk.mac.hex(),
        "unsealed": walk.unsealed,
        "outdated_anchors": [anchor.seq for anchor in walk.outdated],
        "gaps": [
            {"from": gap.first, "to": gap.last, "goes_on_at": gap.resumed, "restored_at": gap.at.isoformat()}
            for gap in walk.gaps
        ],
        "fault": fault and {"seq": fault.seq, "wrong": fault.wrong.value, "sentence": fault.sentence},
    }
    lines = [
        f"{walk.checked} rows are sealed and hold; {walk.unsealed} wait to be sealed",
        *(f"anchor {anchor.seq}: retention has removed that row" for anchor in walk.outdated),
        *(f"{gap.at.isoformat()}: {gap}" for gap in walk.gaps),
        f"BROKEN at {fault.seq} ({fault.wrong}): {fault.sentence}" if fault else f"{walk.seq}:{walk.mac.hex()}",
    ]
    say(found, "\n".join(lines), as_json=as_json)
    if fault:
        raise typer.Exit(1)


def _progress(text: str, *, done: bool = False) -> None:
    """Show a person who waits how far it is, on a line that the next call writes over."""
    if sys.stderr.isatty():
        typer.echo(f"\r{text}", nl=done, err=True)


# -- export -----------------------------------------------------------------------------------------------------------


@app.command()
def export(
    written_as: Annotated[Format, typer.Option("--format", help="One JSON object a line, or a table.")] = Format.JSONL,
    event: OfEvent = None,
    actor: OfActor = None,
    target: OfTarget = None,
    client_id: OfClient = None,
    since: Since = None,
    until: Until = None,
    output: Annotated[
        Path | None, typer.Option(help="The file, for its owner's eyes only; standard output if none is named.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Write audit rows out, the oldest first. The trail says that they were: the export ends before that row."""
    settings = quiet_settings(data_dir)
    wanted = Filters(event=event, actor=actor, target=target, client_id=client_id, since=since, until=until)
    given = sorted(name for name, value in wanted.items() if value is not None)

    async def main(file: IO[str]) -> int:
        async with opened(settings) as services:
            count = await _write(services, _writer(written_as, file), wanted)
            detail = {"filters": given, "rows": count, "format": written_as.value}
            await services.db.run(
                lambda tx: services.audit.record(tx, "audit.exported", origin=None, actor=ACTOR, detail=detail)
            )
            return count

    with whole_file(output, force=force) if output else _to_standard_output() as file:
        count = asyncio.run(main(file))
    typer.echo(f"{count} rows exported", err=True)


async def _write(services: Services, write: Callable[[Iterable[AuditEvent]], None], wanted: Filters) -> int:
    """Write page after page, each read in a transaction of its own, up to this moment; return how many rows."""
    now = services.clock.now()
    wanted = {**wanted, "until": min(wanted["until"] or now, now)}
    count = 0
    after: tuple[datetime, int] | None = None

    async def following(tx: Transaction) -> list[AuditEvent]:
        return await services.audit.export(tx, after=after, limit=_PAGE, **wanted)

    while page := await services.db.run(following):
        write(page)
        count, after = count + len(page), (page[-1].at, page[-1].id)
        _progress(f"{count} rows")
    _progress("", done=True)
    return count


def _writer(written_as: Format, file: IO[str]) -> Callable[[Iterable[AuditEvent]], None]:
    if written_as is Format.JSONL:
        return lambda page: file.writelines(json.dumps(_shown(row)) + "\n" for row in page)
    table = csv.writer(file)
    table.writerow(_COLUMNS)
    return lambda page: table.writerows([_cell(value) for value in _shown(row).values()] for row in page)


def _cell(value: Any) -> Any:
    """Return a value for a table: spreadsheets take what begins with some signs for a formula, so it gets another."""
    if isinstance(value, dict):
        value = json.dumps(value)
    return f"'{value}" if isinstance(value, str) and is_formula(value) else value


@contextmanager
def _to_standard_output() -> Iterator[IO[str]]:
    """Yield a file without a name, and print it when the work is done: nothing leaves before the trail says so."""
    with TextIOWrapper(tempfile.TemporaryFile(), encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        file.buffer.seek(0)
        shutil.copyfileobj(file.buffer, sys.stdout.buffer)
        sys.stdout.buffer.flush()
