"""The `audit` commands through the real entry point: searching, checking the chain, and exporting."""

import asyncio
import csv
import io
import json
import os
import select
import stat
import subprocess
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from identity_service.infra.audit import EVENTS, Origin
from identity_service.infra.database import Transaction
from tests.support.addresses import plain
from tests.support.commands import OTHER_KEY, PROGRAM, Cli
from tests.support.trail import Trail, opened_trail

Answer = TypeVar("Answer")
COLUMNS = ["id", "seq", "at", "event", "actor", "target", "client_id", "network", "request_id", "occurrences", "detail"]


def on(where: Path | str, work: Callable[[Trail], Awaitable[Answer]]) -> Answer:
    """Do something to the trail of a data directory, or of a database."""
    url = f"sqlite+aiosqlite:///{where / 'identity.db'}" if isinstance(where, Path) else where

    async def main() -> Answer:
        async with opened_trail(url) as trail:
            return await work(trail)

    return asyncio.run(main())


def record(where: Path | str, *events: dict[str, Any]) -> None:
    """Write rows, a second apart from the beginning of 2026 on."""

    async def work(trail: Trail) -> None:
        for event in events:
            given = {"event": "client.updated", "origin": None, **event}
            name = given.pop("event")

            async def write(tx: Transaction, name: str = name, given: dict[str, Any] = given) -> None:
                await trail.audit.record(tx, name, **given)

            await trail.within(write)
            trail.clock.advance(1)

    on(where, work)


def sealed(where: Path | str, count: int) -> str:
    """Write and seal rows; return the anchor."""

    async def work(trail: Trail) -> str:
        await trail.write(count)
        await trail.seal()
        newest = await trail.newest()
        return f"{newest.seq}:{newest.mac.hex()}"

    return on(where, work)


def tamper(where: Path | str, *statements: str) -> None:
    """Do what somebody with every right on the database can do."""

    async def work(trail: Trail) -> None:
        for statement in statements:
            await trail.execute(statement)

    on(where, work)


# -- list -------------------------------------------------------------------------------------------------------------


def test_rows_are_listed_newest_first_and_by_what_is_asked_for(cli: Cli, folder: Path) -> None:
    """Each filter, and several; as lines, or with everything there is as JSON."""
    origin = Origin("198.51.100.1", "0123456789abcdef")
    record(
        folder,
        {"event": "user.created", "actor": "cli", "target": "u1"},
        {"event": "user.disabled", "actor": "ann", "target": "u1", "client_id": "cl_1", "origin": origin},
        {"event": "user.disabled", "actor": "bob", "target": "u2", "detail": {"why": "left"}},
    )

    def listed(*words: str) -> list[str]:
        return [row["target"] + " " + row["actor"] for row in cli.json("audit", "list", *words)]

    created, by_ann, by_bob = "u1 cli", "u1 ann", "u2 bob"
    for words, expected in [
        ("", [by_bob, by_ann, created]),
        ("--limit 2", [by_bob, by_ann]),
        ("--event user.disabled", [by_bob, by_ann]),
        ("--event user.disabled --limit 1", [by_bob]),
        ("--actor ann", [by_ann]),
        ("--target u1", [by_ann, created]),
        ("--client-id cl_1", [by_ann]),
        ("--target u1 --event user.created", [created]),
        ("--since 2026-01-01T00:00:01Z", [by_bob, by_ann]),
        ("--until 2026-01-01T00:00:01Z", [created]),
        ("--since 2026-01-01T01:00:01+01:00 --until 2026-01-01T00:00:02", [by_ann]),
        ("--since 2026-01-02", []),
        ("--until 2026-01-01", []),
        ("--event demo.created", []),
    ]:
        assert listed(*words.split()) == expected, words
    row = cli.json("audit", "list", "--actor", "ann")[0]
    assert list(row) == COLUMNS
    assert {**row, "id": None} == {
        "id": None,
        "seq": None,
        "at": "2026-01-01T00:00:01+00:00",
        "event": "user.disabled",
        "actor": "ann",
        "target": "u1",
        "client_id": "cl_1",
        "network": "198.51.100.1",
        "request_id": "0123456789abcdef",
        "occurrences": 1,
        "detail": {},
    }
    assert cli.run("audit", "list", "--limit", "1").out == (
        "2026-01-01T00:00:02+00:00  user.disabled                bob → u2\n"
    )


@pytest.mark.parametrize("word", ["yesterday", "2026-13-01", "0001-01-01T00:00:00+14:00", "", "2026-01-01T00:00:00Z;"])
@pytest.mark.parametrize("command", ["list", "export"])
def test_what_is_no_instant_ends_with_2(cli: Cli, command: str, word: str) -> None:
    """And says what one looks like."""
    for option in ("--since", "--until"):
        assert "an instant looks like" in cli.run("audit", command, option, word).refused(2).replace("\n", " ")


@pytest.mark.case("SEC-03")
def test_a_terminal_is_told_nothing_by_what_is_stored(cli: Cli, folder: Path) -> None:
    """Signs that would move its cursor, colour it or begin a line are spelled out."""
    record(folder, {"actor": "a\x1b[2J\r\nb\x7f\x9b", "target": "\u202egod\u2028\t\U0001f511ü"})
    out = cli.run("audit", "list").out
    assert out.endswith("a\\x1b[2J\\r\\nb\\x7f\\x9b → \\u202egod\\u2028\\t\U0001f511ü\n")
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("user.delete", "; perhaps user.deleted or "),
        ("signin.failed", "; perhaps sign_in.failed or "),
        ("nope", "there is no such event (`"),
        ("", "there is no such event (`"),
    ],
    ids=["misspelt", "two-faults", "unlike-any", "empty"],
)
@pytest.mark.parametrize("command", ["list", "export"])
def test_an_event_that_there_is_not_is_refused(cli: Cli, folder: Path, command: str, typed: str, near: str) -> None:
    """With the names it may have been meant for, and where all of them are; an empty answer would say "never"."""
    record(folder, {"event": "user.created"})
    said = cli.run("audit", command, "--event", typed).refused(2)
    assert "Invalid value for '--event'" in said
    assert near in said
    assert "`identity-service audit events` lists all" in said
    assert cli.json("audit", "list", "--event", "audit.exported") == []


def test_every_event_is_listed_with_what_it_means(bare: Cli, cli: Cli) -> None:
    """Without any database; each of them can be asked for."""
    assert bare.json("audit", "events") == dict(EVENTS)
    lines = bare.run("audit", "events").out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(EVENTS)
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}) == 1
    for event in list(EVENTS)[::10]:
        assert cli.run("audit", "list", "--event", event).code == 0


# -- anchor and verify ------------------------------------------------------------------------------------------------


def test_a_good_chain_is_told_as_good(cli: Cli, folder: Path) -> None:
    """With how much of it was looked at, how much waits, and the seal to keep; an empty one is good, too."""
    zero = "0:" + "00" * 32
    assert cli.run("audit", "anchor").out == f"{zero}\n"
    assert cli.run("audit", "verify").out == f"0 rows are sealed and hold; 0 wait to be sealed\n{zero}\n"
    anchor = sealed(folder, 3)
    record(folder, {}, {})
    assert cli.run("audit", "anchor").out == f"{anchor}\n"
    seq, mac = anchor.split(":")
    assert cli.json("audit", "anchor") == {"seq": int(seq), "mac": mac}
    done = cli.run("audit", "verify", "--anchor", anchor, "--anchor", zero)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"3 rows are sealed and hold; 2 wait to be sealed\n{anchor}\n"
    assert cli.json("audit", "verify") == {
        "good": True,
        "checked": 3,
        "seq": 3,
        "mac": mac,
        "unsealed": 2,
        "outdated_anchors": [],
        "gaps": [],
        "fault": None,
    }


@pytest.mark.case("SEC-06")
def test_a_bad_chain_ends_with_1_and_names_the_first_bad_row(cli: Cli, folder: Path) -> None:
    """In a sentence, and as JSON."""
    sealed(folder, 5)
    tamper(folder, "UPDATE audit_events SET actor = 'somebody' WHERE seq >= 3")
    done = cli.run("audit", "verify")
    assert (done.code, done.err) == (1, "")
    assert done.out == (
        "2 rows are sealed and hold; 0 wait to be sealed\nBROKEN at 3 (altered): what it says is not what was sealed\n"
    )
    done = cli.run("audit", "verify", "--json")
    found = json.loads(done.out)
    assert (done.code, found["good"], found["checked"]) == (1, False, 2)
    assert found["fault"] == {"seq": 3, "wrong": "altered", "sentence": "what it says is not what was sealed"}
    tamper(folder, "DELETE FROM audit_events WHERE seq = 2")
    assert "BROKEN at 2 (missing)" in cli.run("audit", "verify").out


@pytest.mark.case("SEC-06")
def test_a_cut_tail_is_found_by_the_anchor_that_was_kept(cli: Cli, folder: Path) -> None:
    """What is left is a good chain: nothing inside the database shows that it was longer."""
    early = sealed(folder, 3)
    late = sealed(folder, 2)
    tamper(
        folder,
        "DELETE FROM audit_events WHERE seq > 3",
        "UPDATE audit_chain SET seq = 3, mac = (SELECT mac FROM audit_events WHERE seq = 3)",
    )
    assert cli.run("audit", "verify").code == 0
    assert cli.run("audit", "verify", "--anchor", early).code == 0
    done = cli.run("audit", "verify", "--anchor", early, "--anchor", late)
    assert done.code == 1
    assert "BROKEN at 4 (tail cut): the chain ends here, and yet there was a seal 5" in done.out


@pytest.mark.case("SEC-06")
def test_a_production_database_is_verified(on_postgres: Cli, database_url: str) -> None:
    """As a command on its own, with the settings of the service; also after retention."""
    early = sealed(database_url, 5)

    async def retain(trail: Trail) -> int:
        return await trail.within(lambda tx: trail.chain.retain(tx, trail.clock.now() + timedelta(seconds=4)))

    assert on(database_url, retain) == 4
    gone = f"3:{'ab' * 32}"
    done = on_postgres.run("audit", "verify", "--anchor", early, "--anchor", gone)
    assert done.code == 0
    assert done.out == (
        f"1 rows are sealed and hold; 1 wait to be sealed\nanchor 3: retention has removed that row\n{early}\n"
    )
    assert on_postgres.json("audit", "verify", "--anchor", gone)["outdated_anchors"] == [3]
    tamper(database_url, "UPDATE audit_chain SET base_seq = 5, base_mac = mac", "DELETE FROM audit_events")
    done = on_postgres.run("audit", "verify")
    assert done.code == 1
    assert "BROKEN at 5 (base moved)" in done.out


def test_a_chain_without_its_end_is_a_sentence(cli: Cli, folder: Path) -> None:
    """Somebody has emptied the table that holds it."""
    sealed(folder, 1)
    tamper(folder, "DELETE FROM audit_chain")
    assert "audit_chain has lost its row" in cli.run("audit", "anchor").refused()
    done = cli.run("audit", "verify")
    assert (done.code, "BROKEN at 0 (head moved): the table audit_chain has lost its row" in done.out) == (1, True)


def test_nothing_is_verified_with_another_master_key(cli: Cli, folder: Path) -> None:
    """It says that the key is wrong, not that the chain is."""
    sealed(folder, 1)
    said = cli.run("audit", "verify", IDENTITY_MASTER_KEY=OTHER_KEY).refused(2)
    assert "BROKEN" not in said
    assert "master key" in said.lower()


@pytest.mark.parametrize(
    "word",
    ["7", "7:", ":" + "00" * 32, "7:" + "00" * 31, "7:" + "00" * 33, "-7:" + "00" * 32, "²:" + "00" * 32, "x:zz", ""],
    ids=["no seal", "empty seal", "no place", "short", "long", "negative", "no digit", "no hex", "empty"],
)
def test_what_is_no_anchor_ends_with_2(cli: Cli, word: str) -> None:
    """A mistyped one must not look like a chain that is bad, nor like one that is good."""
    assert "an anchor looks like" in cli.run("audit", "verify", "--anchor", word).refused(2).replace("\n", " ")


def test_a_person_who_waits_sees_how_far_it_is(cli: Cli, folder: Path) -> None:
    """On a terminal, and on standard error only: what is printed can be piped all the same."""
    sealed(folder, 1500)
    ours, theirs = os.openpty()
    for command, shown in (("verify", b"\r1000 rows hold\r1500 rows hold"), ("export", b"\r1000 rows\r1500 rows")):
        done = subprocess.run(
            [*PROGRAM, "audit", command, *cli.options],
            env=cli.environment(),
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=True,
            timeout=300,
        )
        seen = b""
        while shown not in seen:  # what was written passes through the kernel in its own time
            assert select.select([ours], [], [], 30)[0], seen
            seen += os.read(ours, 10_000)
        assert b"\r" not in done.stdout
        assert len(done.stdout.splitlines()) == (2 if command == "verify" else 1500)
    os.close(ours)
    os.close(theirs)


# -- export -----------------------------------------------------------------------------------------------------------


def test_every_row_is_exported_once_and_the_trail_says_so(cli: Cli, folder: Path) -> None:
    """Oldest first, over several pages; the row about the export is not part of it."""
    sealed(folder, 2500)
    done = cli.run("audit", "export")
    assert (done.code, done.err) == (0, "2500 rows exported\n")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, 2501))
    assert list(rows[0]) == COLUMNS
    assert rows[6]["detail"] == {"number": 7}
    [noted] = cli.json("audit", "list", "--event", "audit.exported")
    assert (noted["actor"], noted["detail"]) == ("cli", {"filters": [], "rows": 2500, "format": "jsonl"})
    again = cli.run("audit", "export", "--format", "csv")
    assert again.err == "2501 rows exported\n"
    table = list(csv.reader(io.StringIO(again.out, newline="")))
    assert table[0] == COLUMNS
    assert [line[1] for line in table[1:]] == [*map(str, range(1, 2501)), ""]


def test_an_export_has_the_rows_that_were_asked_for(cli: Cli, folder: Path) -> None:
    """The trail names the filters, and not what they were: that is whatever somebody typed."""
    record(folder, *({"actor": name, "target": "t"} for name in ("ann", "bob", "ann", "bob")))
    words = ("--actor", "ann", "--target", "t", "--since", "2026-01-01T00:00:01Z", "--until", "9999-12-31")
    rows = [json.loads(line) for line in cli.run("audit", "export", *words).out.splitlines()]
    assert [(row["actor"], row["at"]) for row in rows] == [("ann", "2026-01-01T00:00:02+00:00")]
    assert cli.run("audit", "export", "--event", "demo.created", "--client-id", "nobody").out == ""
    noted = cli.json("audit", "list", "--event", "audit.exported")
    assert [row["detail"]["filters"] for row in noted] == [
        ["client_id", "event"],
        ["actor", "since", "target", "until"],
    ]
    assert "nobody" not in json.dumps(noted)


def test_an_export_ends_with_the_moment_it_began(cli: Cli, folder: Path) -> None:
    """Or on a busy service it would never end; whatever `--until` says."""
    record(folder, {"actor": "ann"}, {"actor": "bob"})
    tamper(folder, "UPDATE audit_events SET at = '2999-01-01 00:00:00.000000' WHERE actor = 'bob'")
    for words in ((), ("--until", "9999-12-31")):
        out = cli.run("audit", "export", "--event", "client.updated", *words).out
        assert [json.loads(line)["actor"] for line in out.splitlines()] == ["ann"]


def test_an_export_is_a_file_for_its_owner_only(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """Whole or not at all; never over another one, unless that is asked for."""
    record(folder, {"actor": "ann"})
    output = tmp_path / "trail.jsonl"
    words = ("audit", "export", "--output", str(output))
    done = cli.run(*words)
    assert (done.code, done.out, done.err) == (0, "", "1 rows exported\n")
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert json.loads(output.read_text("utf-8"))["actor"] == "ann"
    before = output.read_bytes()
    said = cli.run(*words).refused()
    assert "exists; --force replaces it" in said
    assert output.read_bytes() == before
    assert len(cli.json("audit", "list", "--event", "audit.exported")) == 1
    output.chmod(0o644)
    assert cli.run(*words, "--force").code == 0
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert len(output.read_bytes().splitlines()) == 2
    assert [path.name for path in tmp_path.glob("*trail*")] == ["trail.jsonl"]
    assert list(tmp_path.glob(".export-*")) == []


def test_an_export_goes_into_files_only(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """Not over a folder, a device or a link, and not where there is no folder; nothing is read for it."""
    record(folder, {})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(elsewhere)
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path, link, tmp_path / "pipe", Path("/dev/null")):
        for force in ((), ("--force",)):
            assert f"{output} is not a file" in cli.run("audit", "export", "--output", str(output), *force).refused()
    missing = tmp_path / "nowhere" / "trail.csv"
    assert "No such file or directory" in cli.run("audit", "export", "--output", str(missing)).refused()
    assert elsewhere.read_text() == "precious"
    assert cli.json("audit", "list", "--event", "audit.exported") == []


HARMLESS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1+1", "＋1", "－1", "＠SUM(A1)"]  # noqa: RUF001


def test_a_spreadsheet_takes_no_cell_for_a_formula(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """What begins like one gets a sign before it; everything else comes back as it was."""
    usual = ["cli", "", "a=1", 'say "hi", ok', "two\nlines", "'quoted'", "é\U0001f511"]
    record(folder, *({"actor": text, "target": text, "detail": {"x": text}} for text in [*HARMLESS, *usual]))
    output = tmp_path / "trail.csv"
    assert cli.run("audit", "export", "--format", "csv", "--output", str(output)).code == 0
    with output.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))[1:]
    assert [line[4] for line in lines] == [f"'{text}" for text in HARMLESS] + usual
    assert [line[5] for line in lines] == [line[4] for line in lines]
    assert [json.loads(line[10]) for line in lines] == [{"x": text} for text in [*HARMLESS, *usual]]
    assert not any(cell.startswith(tuple(text[0] for text in HARMLESS)) for line in lines for cell in line)


def test_an_export_that_cannot_be_recorded_gives_nothing_away(
    on_postgres: Cli, database_url: str, tmp_path: Path
) -> None:
    """No audit, no export: neither on the screen nor as a file, whole or in part."""
    record(database_url, {"actor": "ann"})
    tamper(
        database_url,
        "CREATE FUNCTION planted() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'planted' USING ERRCODE = '53100'; END $$",
        "CREATE TRIGGER planted BEFORE INSERT ON audit_events FOR EACH ROW"
        " WHEN (NEW.event = 'audit.exported') EXECUTE FUNCTION planted()",
    )
    output = tmp_path / "trail.jsonl"
    for words in ((), ("--output", str(output))):
        assert "the database cannot be reached" in on_postgres.run("audit", "export", *words).refused()
    assert not output.exists()
    assert list(tmp_path.glob(".export-*")) == []
    with psycopg.connect(plain(database_url)) as connection:
        connection.execute("DROP TRIGGER planted ON audit_events")
    assert on_postgres.run("audit", "export", "--output", str(output)).code == 0
    assert len(output.read_bytes().splitlines()) == 1
