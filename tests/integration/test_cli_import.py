"""`users import` and `users export` through the real entry point: who arrives, who does not and why, who leaves."""

import asyncio
import csv
import io
import json
import os
import pty
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import unicodedata
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import event, func, select

from identity_service.accounts.user_imports import FIELDS, ImportRules, Line, read_csv, write_csv
from identity_service.accounts.users.imports import LARGEST_BATCH, ImportedUser, Outcome, UserImports
from identity_service.infra.runtime.hashing import NFKC_FORM, RAW_FORM
from identity_service.infra.tables import audit_events, users
from tests.support.addresses import plain
from tests.support.commands import CHEAP, PROGRAM, Cli, Forge, Result
from tests.support.foreign_hashes import MADE
from tests.support.races import blocked, held
from tests.support.servers import PostgresServer
from tests.support.service import MASTER_KEY, Service, running, test_settings

PASSWORD = "Ångström, Ümläute und 🙂"
OTHERS = ("sign-in with 'quotes'", "another one, please")
CANARY = "hunter2hunter2"


def cli_on(url: str, forge: Forge, home: Path) -> Cli:
    """Return commands on a database."""
    env = {
        **CHEAP,
        "HOME": str(home),
        "IDENTITY_ENVIRONMENT": "development",
        "IDENTITY_DATABASE_URL": url,
        "IDENTITY_MASTER_KEY": MASTER_KEY,
    }
    return Cli(forge, env, secrets=[MASTER_KEY, PASSWORD, CANARY, *OTHERS])


@pytest.fixture
def empty_urls(database_url: str, postgres_server: PostgresServer) -> Iterator[tuple[str, str]]:
    """Two databases without users."""
    name = database_url.rpartition("/")[2]
    yield database_url, postgres_server.create_database(f"{name}_second", name)
    postgres_server.drop_database(f"{name}_second")


@pytest.fixture
def on_postgres(database_url: str, forge: Forge, tmp_path: Path) -> Cli:
    """Commands on the database of this test's `service`."""
    return cli_on(database_url, forge, tmp_path)


@pytest.fixture(params=["PostgreSQL", "SQLite"])
def cli(request: pytest.FixtureRequest, forge: Forge, tmp_path: Path) -> Cli:
    """Commands on each kind of database."""
    url = request.getfixturevalue("database_url" if request.param == "PostgreSQL" else "sqlite_url")
    return cli_on(url, forge, tmp_path)


def a_line(username: str, /, **fields: Any) -> dict[str, Any]:
    return {"username": username, "email": f"{username}@example.org", **fields}


def write(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), "utf-8", newline="")
    return path


def summary(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.code == code, (result.out, result.err)
    found: dict[str, Any] = json.loads(result.out)
    return found


def counts(**given: Any) -> dict[str, Any]:
    zero = dict.fromkeys(("lines", "imported", "already_there", "refused", "without_password"), 0)
    return {"dry_run": False, **zero, "weak_hashes": {}, **given}


def exported(cli: Cli) -> list[dict[str, Any]]:
    result = cli.run("users", "export", "--with-password-hashes")
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def audited(cli: Cli, kind: str) -> list[dict[str, Any]]:
    """Return the audit rows of one kind, oldest first."""
    rows: list[dict[str, Any]] = cli.json("audit", "list", "--event", kind)
    return rows[::-1]


# -- signing in -------------------------------------------------------------------------------------------------------


async def signed_in(service: Service, name: str, password: str) -> str | None:
    """Sign in over HTTP; return the subject of the token, or None for the refusal."""
    client = await service.a_client(public=True)
    answer = await service.token(client, grant_type="password", username=name, password=password)
    if answer.status_code != 200:
        assert answer.json()["error"] == "invalid_grant", answer.text
        return None
    me = await service.me(answer.json()["access_token"])
    assert me.status_code == 200, me.text
    subject: str = me.json()["id"]
    return subject


async def stored(service: Service, name: str) -> Any:
    [row] = await service.execute(select(users).where(users.c.username == name))
    return row


@pytest.mark.case("ACC-12")
@pytest.mark.parametrize("form", ["jsonl", "csv"])
async def test_users_of_every_system_arrive_with_their_passwords_and_travel_on(
    empty_urls: tuple[str, str], forge: Forge, tmp_path: Path, form: str
) -> None:
    """
    Each signs in with the old password and is ours afterwards; exported, they sign in at a second installation.

    Under their old id, with the hash that they then have, typed on either keyboard if it is ours and as ever if not.
    """
    first_url, second_url = empty_urls
    here, there = (cli_on(url, forge, tmp_path) for url in empty_urls)
    names = {f"user{number}": make for number, make in enumerate(MADE.values())}
    ids = {name: str(uuid.uuid4()) for name in names}
    half = list(names)[::2]  # the others first sign in at the second installation
    lines = [
        a_line(name, id=ids[name], email_verified=True, password_hash=make(PASSWORD)) for name, make in names.items()
    ]
    file = write(tmp_path / "theirs.jsonl", lines)
    assert summary(here.run("users", "import", str(file), "--json"))["imported"] == len(MADE)

    async with running(test_settings(first_url, argon2_memory_kib=32)) as first:
        for name in half:
            assert (await stored(first, name)).password_form == RAW_FORM
            assert await signed_in(first, name, PASSWORD + "x") is None
            assert await signed_in(first, name, PASSWORD) == ids[name]
            row = await stored(first, name)
            assert row.password_hash.startswith("$argon2id$v=19$m=32,t=1,p=1$")
            assert row.password_form == NFKC_FORM
            assert await signed_in(first, name, unicodedata.normalize("NFD", PASSWORD)) == ids[name]
        own = await first.a_user("own", password=PASSWORD, email="Own@Example.org", role="moderator", verified=False)
        gone = await first.a_user("gone", password=PASSWORD)
        await first.disable(await first.a_user("barred", password=PASSWORD))
        await first.a_user("lacking", password=None)
        await first.within(lambda tx: first.services.users.delete(tx, gone.id))

    out = tmp_path / f"ours.{form}"
    assert here.json("users", "export", "--output", str(out), "--with-password-hashes")["users"] == len(MADE) + 3
    done = summary(there.run("users", "import", str(out), "--allow-roles", "moderator", "--json"))
    assert done["imported"] == len(MADE) + 3
    async with running(test_settings(second_url)) as second:
        for name, subject in ids.items():
            assert await signed_in(second, name, PASSWORD + "x") is None
            retyped = await signed_in(second, name, unicodedata.normalize("NFD", PASSWORD))
            assert retyped == (subject if name in half else None)
            assert await signed_in(second, name, PASSWORD) == subject
        assert await signed_in(second, "own@example.org", unicodedata.normalize("NFD", PASSWORD)) == str(own.id)
        assert await signed_in(second, "own", PASSWORD + "x") is None
        for name in ("gone", "barred", "lacking"):
            assert await signed_in(second, name, PASSWORD) is None
        row = await stored(second, "own")
        assert (row.role, row.email, row.email_verified_at) == ("moderator", "Own@Example.org", None)
        assert row.created_at == own.created_at
        assert (await stored(second, "user0")).email_verified_at is not None
        assert not (await stored(second, "barred")).enabled


# -- importing --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_imported_again_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    """Whoever is there is there already, whatever else their line says now; only who is missing comes in."""
    lines = [
        a_line("ada", id=str(uuid.uuid4()), role="moderator"),
        a_line("bob", name="Bob", password_hash=MADE["phpass"]("x")),
    ]
    file = write(tmp_path / "users.jsonl", lines)
    words = ("users", "import", str(file), "--allow-roles", "moderator,admin", "--json")
    first = summary(cli.run(*words))
    assert first == counts(lines=2, imported=2, without_password=1, weak_hashes={"phpass": 1})
    before = exported(cli)
    changed = [{**line, "name": "Other", "email": str(line["email"]).upper(), "enabled": False} for line in lines]
    write(file, [*changed, a_line("cy")])
    assert summary(cli.run(*words)) == counts(lines=3, imported=1, already_there=2, without_password=1)
    assert exported(cli)[:2] == before or [line for line in exported(cli) if line["username"] != "cy"] == before


def test_what_is_taken_is_refused_and_all_else_comes_in(cli: Cli, tmp_path: Path) -> None:
    """By a user who was there, or by an earlier line; the report says which line and why, and holds no secret."""
    subject = str(uuid.uuid4())
    write(tmp_path / "before.jsonl", [a_line("ada", id=subject), a_line("bea")])
    assert cli.run("users", "import", str(tmp_path / "before.jsonl")).code == 0
    secret = {"password_hash": CANARY}
    lines: list[dict[str, Any] | str] = [
        a_line("Bea", email="new1@example.org"),
        a_line("new2", email="BEA@example.org"),
        a_line("new3", id=subject),
        a_line("ada", id=str(uuid.uuid4())),
        a_line("good1"),
        a_line("Good1", email="new6@example.org"),
        a_line("new7", email="GOOD1@example.org"),
        "",
        a_line("good2", id="11111111-2222-4333-8444-555555555555"),
        a_line("new9", id="11111111-2222-4333-8444-555555555555".upper()),
        a_line("good1"),
        a_line("bad\nname", **secret),
        '{"username": "' + CANARY,
        a_line("new12", **secret),
        a_line("new13", role="admin"),
        a_line("good3"),
    ]
    file = write(tmp_path / "users.jsonl", lines)
    report = tmp_path / "report.jsonl"
    report.write_text("what was here before, and longer than what comes\n" * 100)
    words = ("users", "import", str(file), "--report", str(report), "--json")
    for batch in ("--batch=1000", "--batch=1"):
        expected = counts(lines=15, imported=3, refused=12, without_password=3)
        dry = summary(cli.run(*words, "--dry-run", batch), 1)
        assert dry == {**expected, "dry_run": True}
        told = report.read_text()
        assert summary(cli.run(*words, batch), 1) == expected
        assert report.read_text() == told
        rows = [json.loads(row) for row in told.splitlines()]
        assert [(row["line"], row.get("username")) for row in rows] == [
            *((1, "Bea"), (2, "new2"), (3, "new3"), (4, "ada"), (6, "Good1"), (7, "new7"), (10, "new9"), (11, "good1")),
            *((12, None), (13, None), (14, "new12"), (15, "new13")),
        ]
        reasons = [row["reason"] for row in rows]
        assert reasons[:4] == [
            *("username: belongs to another user", "email: belongs to another user"),
            *("id: belongs to another user, or to a deleted one", "username: belongs to another user"),
        ]
        assert all("stands in line 5 already" in reasons[place] for place in (4, 5, 7))
        assert "stands in line 9 already" in reasons[6]
        assert [said.partition(":")[0] for said in reasons[8:]] == [
            *("username", "the line is not valid JSON", "password_hash", "role"),
        ]
        assert CANARY not in told
        assert {line["username"] for line in exported(cli)} == {"ada", "bea", "good1", "good2", "good3"}
        undo(cli, "good")


def undo(cli: Cli, prefix: str) -> None:
    """Remove users whose name begins so."""
    url = cli.env["IDENTITY_DATABASE_URL"]
    if url.startswith("sqlite"):
        with sqlite3.connect(url.partition("///")[2]) as lite:
            lite.execute("DELETE FROM users WHERE username LIKE ?", (prefix + "%",))
        lite.close()
    else:
        with psycopg.connect(plain(url)) as connection:
            connection.execute("DELETE FROM users WHERE username LIKE %s", (prefix + "%",))


def test_a_report_is_for_its_owner_only(on_postgres: Cli, tmp_path: Path) -> None:
    """And never written over the file of users."""
    file = write(tmp_path / "users.jsonl", [a_line("ä")])
    report = tmp_path / "report.jsonl"
    assert on_postgres.run("users", "import", str(file), "--report", str(report)).code == 1
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(file)
    for same in (file, tmp_path / "link"):
        said = on_postgres.run("users", "import", str(file), "--report", str(same)).refused()
        assert "over the users" in said
    assert json.loads(file.read_text())["username"] == "ä"


def test_without_a_report_the_first_refusals_are_shown(on_postgres: Cli, tmp_path: Path) -> None:
    """On the screen, and how many more there are."""
    file = write(tmp_path / "users.jsonl", [a_line("ada"), *(a_line(f"-{number}") for number in range(12))])
    done = on_postgres.run("users", "import", str(file))
    assert done.code == 1
    assert done.out == (
        "13 lines: 1 imported, 0 already there, 12 refused\n1 have no password and must choose one by a reset\n"
    )
    shown = done.err.splitlines()
    assert [line.partition(":")[0] for line in shown[:10]] == [f"line {number}" for number in range(2, 12)]
    assert shown[10:] == ["and 2 more; --report writes all of them to a file"]


def test_a_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    """No user, no audit row."""
    file = write(tmp_path / "users.jsonl", [a_line("ada"), a_line("bob", password_hash=MADE["LDAP"]("x"))])
    done = cli.run("users", "import", str(file), "--dry-run")
    assert done.code == 0
    assert done.out.splitlines() == [
        "2 lines: 2 would be imported, 0 already there, 0 refused",
        "1 have no password and must choose one by a reset",
        "1 have a weak hash until they first sign in: ldap_salted_sha1 1",
    ]
    assert exported(cli) == []
    assert audited(cli, "users.imported") == audited(cli, "users.import_started") == []


def test_roles_above_user_are_named_by_whoever_imports(cli: Cli, tmp_path: Path) -> None:
    """The file alone makes nobody an administrator; a role that there is not stops the run before it begins."""
    lines = [a_line(f"a-{role}", role=role) for role in ("user", "moderator", "admin", "super_admin", "emperor")]
    file = write(tmp_path / "users.jsonl", lines)
    words = ("users", "import", str(file), "--json")
    assert summary(cli.run(*words), 1) == counts(lines=5, imported=1, refused=4, without_password=1)
    assert summary(cli.run(*words, "--allow-roles", "moderator, admin"), 1)["imported"] == 2
    assert {line["role"] for line in exported(cli)} == {"user", "moderator", "admin"}
    assert "no role emperor" in cli.run(*words, "--allow-roles", "super_admin,emperor").refused()
    assert {line["role"] for line in exported(cli)} == {"user", "moderator", "admin"}
    assert summary(cli.run(*words, "--allow-roles", "super_admin"), 1)["imported"] == 1


def test_a_role_that_is_refused_leads_to_the_option(on_postgres: Cli, tmp_path: Path) -> None:
    """Said once, however many lines there are, and with a report too; not when something else was wrong."""
    lines = [a_line("ada", role="admin"), a_line("-"), *(a_line(f"u{place}", role="moderator") for place in range(20))]
    words = ("users", "import", str(write(tmp_path / "users.jsonl", lines)))
    hint = "lines were refused for the role; --allow-roles names the roles that a file may give"
    for more in ((), ("--report", str(tmp_path / "report")), ("--dry-run",)):
        done = on_postgres.run(*words, *more)
        assert done.code == 1
        assert done.err.splitlines()[-1] == f"21 {hint}"
        assert (done.out + done.err).count("--allow-roles") == 1
    assert f"1 line was {hint.partition('were ')[2]}" in on_postgres.run(*words, "--allow-roles", "moderator").err
    assert "--allow-roles" not in on_postgres.run(*words, "--allow-roles", "moderator,admin").err


def test_a_run_is_one_row_in_the_audit_trail(cli: Cli, tmp_path: Path) -> None:
    """With its counts and nobody's name; a first row tells that it began, and outlives a run that is killed."""
    lines = [a_line(f"user{number}") for number in range(25)] + [a_line("-")]
    file = write(tmp_path / "users.jsonl", lines)
    for imported in (25, 0):
        assert cli.run("users", "import", str(file), "--batch", "10").code == 1
        last = audited(cli, "users.imported")[-1]
        assert (last["actor"], last["target"], last["occurrences"]) == ("cli", None, 1)
        assert last["detail"] == {
            "lines": 26,
            "imported": imported,
            "already_there": 25 - imported,
            "refused": 1,
            "without_password": imported,
            "weak_hashes": {},
        }
    assert len(audited(cli, "users.imported")) == 2
    assert len(audited(cli, "users.import_started")) == 1
    assert cli.events() == [("users.import_started", None), ("users.imported", None), ("users.imported", None)]


def test_a_table_from_a_spreadsheet_comes_in(cli: Cli, tmp_path: Path) -> None:
    """With quotes, line breaks in a cell that nobody wants, and TRUE in capitals."""
    file = tmp_path / "users.csv"
    file.write_bytes(
        "\ufeffusername,email,email_verified,name,address\r\n"
        'ada,ada@example.org,TRUE,"King, ""Ada""","12 Street\r\nTown"\r\n'
        'bob,bob@example.org,"never closed\r\n'
        "cy,cy@example.org,false,Cÿ,\r\n".encode()
    )
    assert "other columns" in cli.run("users", "import", str(file)).refused()
    words = ("users", "import", str(file), "--ignore-unknown")
    done = cli.run(*words)
    assert done.out.startswith("3 lines: 2 imported, 0 already there, 1 refused\n")
    assert done.err == "line 4: the line is not valid CSV\n"
    found = {line["username"]: (line["name"], line["email_verified"]) for line in exported(cli)}
    assert found == {"ada": ('King, "Ada"', True), "cy": ("Cÿ", False)}


def test_the_file_s_name_tells_its_format(on_postgres: Cli, tmp_path: Path) -> None:
    """Or the option does; what cannot be read is said in a sentence."""
    file = write(tmp_path / "users.txt", [a_line("ada")])
    assert "say --format" in on_postgres.run("users", "import", str(file)).refused()
    assert on_postgres.run("users", "import", str(file), "--format", "jsonl").code == 0
    assert "No such file" in on_postgres.run("users", "import", str(tmp_path / "none.csv")).refused()
    assert "directory" in on_postgres.run("users", "import", str(tmp_path), "--format", "csv").refused()
    write(file, [])
    assert "empty" in on_postgres.run("users", "import", str(file), "--format", "csv").refused()
    assert on_postgres.run("users", "import", str(file), "--format", "jsonl").out.startswith("0 lines")


def test_a_bar_is_seen_on_a_terminal_and_not_printed(on_postgres: Cli, tmp_path: Path) -> None:
    """It goes to standard error, so that standard output stays what was asked for; a pipe has no length, so no bar."""
    content = "".join(json.dumps(a_line(f"user{number}")) + "\n" for number in range(30)).encode()
    file = tmp_path / "users.jsonl"
    file.write_bytes(content)
    code, out, shown = on_a_terminal(on_postgres, ("users", "import", str(file), "--json", "--batch", "10"), b"")
    assert code == 0
    assert json.loads(out)["imported"] == 30
    assert b"Importing" in shown
    assert b"100%" in shown
    words = ("users", "import", "/dev/stdin", "--format", "jsonl", "--json")
    code, out, shown = on_a_terminal(on_postgres, words, content)
    assert (code, shown) == (0, b"")
    assert json.loads(out)["already_there"] == 30


def on_a_terminal(cli: Cli, words: tuple[str, ...], piped: bytes) -> tuple[int, bytes, bytes]:
    """Run a command whose standard error is a terminal; return its code, its output, and what the terminal shows."""
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=end, env=cli.environment()
    ) as process:
        os.close(end)
        out, _ = process.communicate(piped, timeout=300)
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    os.close(terminal)
    return process.returncode, out, shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says so when nobody holds the other end any more
        return b""


SIGNS = "=+-@\t\r\n＝＋－＠"  # noqa: RUF001  # what a spreadsheet takes for a formula


ONE_LINE = st.text(st.sampled_from(SIGNS.replace("\r\n", "") + "' aä,\"\\"), max_size=6)  # all that is ever stored


@given(texts=st.lists(ONE_LINE, min_size=1, max_size=4))
@example(texts=["=HYPERLINK(0)", "'=1", "''=1", "'", "''"])
def test_no_exported_text_is_a_formula_and_each_comes_back_as_it_was(texts: list[str]) -> None:
    """Whatever marks it has already; an empty cell is a field that is not there."""
    lines = [{"username": text, "name": text, "email": "a@example.org"} for text in texts]
    written = write_csv(lines, header=True)
    cells = [cell for row in csv.reader(io.StringIO(written, newline="")) for cell in row]
    assert [cell for cell in cells if cell.startswith(tuple(SIGNS))] == []
    fields = [line.fields for line in read_csv(io.BytesIO(written.encode()), ignore_unknown=False)]
    assert fields == [{name: text for name, text in line.items() if text} for line in lines]


def test_a_name_that_is_a_formula_travels_and_is_dead_on_the_way(cli: Cli, tmp_path: Path) -> None:
    """From one file to the next, through the database; a table from elsewhere may hold it bare or marked."""
    names = {
        "ada": '=HYPERLINK("https://evil.example","x")',
        "bob": "'=1",
        "cy": "-1",
        "di": "+1 & @2",
        "ed": "'quoted'",
    }
    file = write(tmp_path / "users.jsonl", [a_line(name, name=shown) for name, shown in names.items()])
    assert cli.run("users", "import", str(file)).code == 0
    table = tmp_path / "users.csv"
    assert cli.run("users", "export", "--output", str(table)).code == 0
    with table.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert {row["username"]: row["name"] for row in rows} == {
        name: shown if shown == "'quoted'" else f"'{shown}" for name, shown in names.items()
    }
    renamed = [{**row, "id": "", "username": f"{row['username']}2", "email": f"2{row['email']}"} for row in rows]
    with table.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, FIELDS)
        writer.writeheader()
        writer.writerows([*renamed, {"username": "fay", "email": "fay@example.org", "name": "=bare"}])
    assert cli.run("users", "import", str(table)).code == 0
    found = {line["username"]: line["name"] for line in exported(cli)}
    assert found == names | {f"{name}2": shown for name, shown in names.items()} | {"fay": "=bare"}


# -- breaking off, and racing -----------------------------------------------------------------------------------------


def test_a_run_that_is_killed_is_completed_by_the_next(on_postgres: Cli, database_url: str, tmp_path: Path) -> None:
    """In the end everybody is there exactly once."""
    number = 6_000
    file = write(tmp_path / "users.jsonl", (a_line(f"user{place}", name=f"Nr. {place}") for place in range(number)))
    with (
        subprocess.Popen(
            [*PROGRAM, "users", "import", str(file), "--batch", "5"],
            env=on_postgres.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process,
        psycopg.connect(plain(database_url), autocommit=True) as connection,
    ):
        deadline = time.monotonic() + 300
        while (arrived := _count(connection)) < 100:
            assert process.poll() is None, f"it ended with {process.returncode} when {arrived} had arrived"
            assert time.monotonic() < deadline, f"{arrived} have arrived"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert arrived < number
        assert len(audited(on_postgres, "users.import_started")) == 1
        assert audited(on_postgres, "users.imported") == []

        second = summary(on_postgres.run("users", "import", str(file), "--json"))
        assert second["already_there"] >= arrived
        assert second["imported"] > 0
        assert second["already_there"] + second["imported"] == number
        assert _count(connection) == number
        assert summary(on_postgres.run("users", "import", str(file), "--json"))["already_there"] == number
        row = connection.execute("SELECT count(DISTINCT name), count(DISTINCT username) FROM users").fetchone()
        assert row == (number, number)


def _count(connection: "psycopg.Connection[Any]") -> int:
    row = connection.execute("SELECT count(*) FROM users").fetchone()
    assert row is not None
    found: int = row[0]
    return found


def an_imported(username: str, /, **fields: Any) -> ImportedUser:
    return ImportRules(datetime.now(UTC), frozenset({"user"})).accept(Line(1, a_line(username, **fields)))[0]


async def test_a_name_that_is_being_taken_is_waited_for(service: Service) -> None:
    """The import neither takes it too nor fails: it waits, and leaves that line out if the other one stays."""
    batch = [an_imported("ada"), an_imported("bob"), an_imported("cy")]
    imports = UserImports(service.clock)
    for stays in (False, True):
        async with held(service) as other:
            await service.services.users.create(
                other.tx, username="bob", email="bob2@example.org", role="user", password_hash=None, verified=True
            )
            task = await blocked(service, service.within(lambda tx: imports.store(tx, batch)))
            await (other.commit() if stays else other.roll_back())
            outcomes = await task
        taken = Outcome.USERNAME_TAKEN if stays else Outcome.IMPORTED
        assert outcomes == [Outcome.IMPORTED, taken, Outcome.IMPORTED]
        await service.execute(users.delete())


async def test_a_batch_is_one_statement(service: Service, embedded: Service) -> None:
    """However many users it has, on both databases; a second only if some of them were taken."""
    await _count_statements(service)
    await _count_statements(embedded)


async def _count_statements(service: Service) -> None:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if re.search(r"\b(INTO|FROM) users\b", statement):
            seen.append(statement.split(None, 1)[0])

    event.listen(service.services.db.engine.sync_engine, "before_cursor_execute", note)
    imports = UserImports(service.clock)
    batch = [an_imported(f"user{number}") for number in range(LARGEST_BATCH)]
    outcomes = await service.within(lambda tx: imports.store(tx, batch))
    assert set(outcomes) == {Outcome.IMPORTED}
    assert seen == ["INSERT"]
    outcomes = await service.within(lambda tx: imports.store(tx, batch))
    assert set(outcomes) == {Outcome.ALREADY_THERE}
    assert seen == ["INSERT", "INSERT", "SELECT"]
    [(count,)] = await service.execute(select(func.count()).select_from(users))
    assert count == LARGEST_BATCH


async def test_the_id_of_a_deleted_user_is_not_given_again(service: Service) -> None:
    """Their names are free, their id is not: tokens and audit rows may still bear it."""
    user = await service.a_user("ada")
    await service.within(lambda tx: service.services.users.delete(tx, user.id))
    imports = UserImports(service.clock)
    batch = [an_imported("ada", id=str(user.id))]
    for step in (imports.compare, imports.store):
        assert await service.within(lambda tx, step=step: step(tx, batch)) == [Outcome.ID_TAKEN]
    assert await service.within(lambda tx: imports.store(tx, [an_imported("ada")])) == [Outcome.IMPORTED]


async def test_imported_users_have_what_their_line_says(service: Service) -> None:
    """And for the rest what a new user has."""
    batch = [an_imported("ada", created_at="2001-02-03T04:05:06Z", email_verified=True, name="Ada"), an_imported("bob")]
    await service.within(lambda tx: UserImports(service.clock).store(tx, batch))
    ada, bob = await stored(service, "ada"), await stored(service, "bob")
    now = service.clock.now()
    assert ada.created_at.isoformat() == "2001-02-03T04:05:06+00:00"
    assert (bob.created_at, bob.updated_at, ada.updated_at) == (now, now, now)
    assert (ada.email_verified_at, bob.email_verified_at) == (now, None)
    assert (ada.epoch, ada.enabled, ada.deleted_at, ada.name) == (0, True, None, "Ada")
    assert (ada.password_hash, ada.password_changed_at, ada.id.version) == (None, None, 7)


# -- exporting --------------------------------------------------------------------------------------------------------


def test_an_export_holds_everybody_and_no_hash_unless_asked(cli: Cli, tmp_path: Path) -> None:
    """More than one page of them, by their ids, in the fields that an import reads."""
    number = 2 * LARGEST_BATCH
    hashed = MADE["bcrypt 2b"](CANARY)
    lines = [a_line(f"user{place}", password_hash=hashed, id=str(uuid.uuid4())) for place in range(number)]
    file = write(tmp_path / "users.jsonl", lines)
    assert cli.run("users", "import", str(file)).code == 0
    result = cli.run("users", "export")
    assert result.code == 0
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["id"] for row in rows] == sorted(str(line["id"]) for line in lines)
    assert hashed not in result.out
    assert all(set(row) <= set(FIELDS) for row in rows)
    with_hashes = tmp_path / "all.csv"
    told = cli.json("users", "export", "--output", str(with_hashes), "--with-password-hashes")
    assert told == {"users": number, "password_hashes": True}
    with with_hashes.open(newline="") as table:
        found = list(csv.DictReader(table))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert {(row["password_hash"], row["password_form"]) for row in found} == {(hashed, "raw")}
    assert [row["detail"] for row in audited(cli, "users.exported")] == [
        {"users": number, "complete": True, "password_hashes": False},
        {"users": number, "complete": True, "password_hashes": True},
    ]
    assert summary(cli.run("users", "import", str(with_hashes), "--json"))["already_there"] == number


def test_an_export_is_for_its_owner_and_replaces_nothing_unasked(cli: Cli, tmp_path: Path) -> None:
    """Also when there is nobody; the old file stays until the new one is whole."""
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "users.csv"
    assert cli.run("users", "export", "--output", str(out)).out == "0 users exported\n"
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.read_text() == ",".join(FIELDS) + "\n"
    out.write_text("mine")
    assert "exists; --force replaces it" in cli.run("users", "export", "--output", str(out)).refused()
    assert out.read_text() == "mine"
    assert len(audited(cli, "users.exported")) == 1
    out.chmod(0o644)
    assert cli.run("users", "export", "--output", str(out), "--force").code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    (folder / "link.csv").symlink_to(folder / "elsewhere")
    for force in ((), ("--force",)):
        said = cli.run("users", "export", "--output", str(folder / "link.csv"), *force).refused()
        assert "link.csv is not a file" in said
    assert sorted(path.name for path in folder.iterdir()) == ["link.csv", "users.csv"]


def test_an_export_that_breaks_off_leaves_no_file_and_is_recorded(on_postgres: Cli, tmp_path: Path) -> None:
    """Half an export would look like a whole one; with --force the old one stays."""
    write(tmp_path / "users.jsonl", [a_line("ada")])
    assert on_postgres.run("users", "import", str(tmp_path / "users.jsonl")).code == 0
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.csv").write_text("old")
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40)); from identity_service.cli import main; main()"
    )
    for name, more in (("new.csv", ()), ("old.csv", ("--force",))):
        done = subprocess.run(
            [sys.executable, "-c", script, "users", "export", "--output", str(folder / name), *more],
            capture_output=True,
            text=True,
            env=on_postgres.environment(),
            check=False,
            timeout=300,
        )
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(r"identity-service: File too large\n", done.stderr)
    assert [path.name for path in folder.iterdir()] == ["old.csv"]
    assert (folder / "old.csv").read_text() == "old"
    assert [row["detail"]["complete"] for row in audited(on_postgres, "users.exported")] == [False, False]


def test_an_export_into_a_closed_pipe_is_recorded(on_postgres: Cli, tmp_path: Path) -> None:
    """As far as it came; `head` closes it."""
    lines = [a_line(f"user{number}", name="x" * 200) for number in range(3 * LARGEST_BATCH)]
    write(tmp_path / "users.jsonl", lines)
    assert on_postgres.run("users", "import", str(tmp_path / "users.jsonl")).code == 0
    with subprocess.Popen(
        [*PROGRAM, "users", "export", "--with-password-hashes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=on_postgres.environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(300) != 0
    [row] = audited(on_postgres, "users.exported")
    assert row["detail"]["complete"] is False
    assert row["detail"]["users"] < len(lines)


async def test_deleted_users_are_not_exported(service: Service, on_postgres: Cli) -> None:
    """They asked to be gone."""
    user = await service.a_user("ada")
    await service.a_user("bob")
    await service.within(lambda tx: service.services.users.delete(tx, user.id))
    found = await asyncio.to_thread(on_postgres.run, "users", "export")
    assert [json.loads(line)["username"] for line in found.out.splitlines()] == ["bob"]
    [(count,)] = await service.execute(select(func.count()).where(audit_events.c.event == "users.exported"))
    assert count == 1
