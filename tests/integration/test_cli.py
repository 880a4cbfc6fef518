"""Every operator command through the real entry point: what it prints, how it refuses, and how it ends."""

import base64
import json
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from identity_service.cli import app
from tests.support.commands import CHEAP, OTHER_KEY, PASSWORD, PROGRAM, Cli, Forge
from tests.support.servers import free_port
from tests.support.service import MASTER_KEY

# -- help -------------------------------------------------------------------------------------------------------------


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every command and group of commands."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_every_command_explains_itself() -> None:
    """`--help` of each names it, says what it does and what its options are for."""
    found = list(commands(typer.main.get_command(app)))
    expected = """dev serve migrate cleanup users_create users_list users_disable users_enable users_set-password
        clients_create clients_list clients_rotate-secret clients_disable clients_enable keys_list keys_rotate
        keys_compromise keys_rewrap audit_list roles_list roles_grant roles_withdraw"""
    assert {tuple(words.split("_")) for words in expected.split()} <= set(found)
    for path in found:
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0
        usage, said, *_ = [line for line in result.output.splitlines() if line.strip()]
        assert usage.strip().startswith("Usage:")
        assert all(word in usage for word in path)
        assert said.strip().endswith((".", "...")) or len(said) > 20
        listed = [line for line in result.output.splitlines() if line.startswith("  --")]
        assert listed
        assert all(len(line.split(None, 2)) >= 2 for line in listed)


def test_the_program_is_installed() -> None:
    """The name on the command line is `identity-service`; without a word it shows what there is."""
    program = Path(sys.executable).with_name("identity-service")
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert "Usage: identity-service" in done.stdout + done.stderr
    assert "rotate" not in done.stdout


def test_a_word_that_is_no_command_ends_with_2(bare: Cli) -> None:
    """And a sentence."""
    assert "No such command" in bare.run("usres").refused(2)


# -- people -----------------------------------------------------------------------------------------------------------


def test_the_life_of_a_user(cli: Cli) -> None:
    """Create, list, disable, enable, set-password; each leaves its row in the audit trail."""
    made = cli.json(
        *("users", "create", "Marie", "--email", "Marie@Example.org", "--role", "admin", "--password-stdin"),
        stdin=PASSWORD + "\n",
    )
    assert uuid.UUID(made["id"]).version == 7
    assert made["created_at"].endswith("+00:00")
    assert {key: made[key] for key in made.keys() - {"id", "created_at"}} == {
        "username": "marie",
        "email": "Marie@Example.org",
        "email_verified": True,
        "role": "admin",
        "enabled": True,
    }
    assert cli.json("users", "list") == [made]
    assert cli.json("users", "disable", "MARIE") == {**made, "enabled": False}
    assert cli.json("users", "enable", "marie@example.org") == made
    assert cli.json("users", "set-password", "marie", "--password-stdin", stdin="Nachtigall-88\r\n") == made
    assert "marie" in cli.run("users", "list").out
    target = made["id"]
    expected = ["user.created", "user.disabled", "user.enabled", "user.password_set"]
    assert cli.events() == [(event, target) for event in expected]
    [row] = cli.json("audit", "list", "--event", "user.created", "--limit", "1")
    assert row["detail"] == {"role": "admin"}


def test_what_cannot_be_a_user_is_refused_with_the_reason(cli: Cli) -> None:
    """One sentence each, exit 1, and nothing is stored or audited."""
    create = ("users", "create")
    good = ("--email", "marie@example.org", "--password-stdin")
    assert cli.run(*create, "marie", *good, stdin=PASSWORD).code == 0
    for words, stdin, sentence in [
        ((*create, "marie", "--email", "x@example.org", "--password-stdin"), PASSWORD, "belongs to somebody already"),
        ((*create, "mar ie", *good), PASSWORD, "username: 1 to 64 of a-z"),
        ((*create, "pierre", "--email", "pierre", "--password-stdin"), PASSWORD, "email: not an address"),
        ((*create, "pierre", "--email", "p@example.org", "--role", "king", "--password-stdin"), PASSWORD, "role: "),
        ((*create, "pierre", "--email", "p@example.org", "--password-stdin"), "password", "tried first"),
        ((*create, "pierre", "--email", "p@example.org", "--password-stdin"), "", "cannot be used"),
        ((*create, "pierre", "--email", "p@example.org"), PASSWORD, "--password-stdin"),
        ((*create, "pierre", "--email", "p@example.org", "--password-stdin"), b"\xff\xfe-not-text\n", "UTF-8"),
        ((*create, b"pi\xffrre", "--email", "p@example.org", "--password-stdin"), PASSWORD, "not valid UTF-8"),
        (("users", "disable", "nobody"), "", "there is no such user"),
    ]:
        said = cli.run(*words, stdin=stdin).refused()
        assert sentence in said
        assert len(said.splitlines()) == 1
    assert [user["username"] for user in cli.json("users", "list")] == ["marie"]
    assert [event for event, _ in cli.events()] == ["user.created"]


# -- clients and roles ------------------------------------------------------------------------------------------------


def test_the_life_of_a_client(cli: Cli) -> None:
    """The secret is shown when it is made and never again."""
    made = cli.json(
        *("clients", "create", "Orders", "--grant", "password,refresh_token", "--grant", "client_credentials"),
        *("--scope", "orders:read orders:write", "--audience", "https://orders.example", "--first-party"),
        *("--redirect-uri", "https://orders.example/cb", "--introspect", "https://orders.example"),
        *("--access-token-ttl", "120"),
    )
    secret = made.pop("client_secret")
    assert secret.startswith("cs_")
    client_id = made["client_id"]
    assert client_id.startswith("cl_")
    assert {key: made[key] for key in ("grant_types", "scope", "audiences", "redirect_uris", "introspect")} == {
        "grant_types": ["client_credentials", "password", "refresh_token"],
        "scope": "orders:read orders:write",
        "audiences": ["https://orders.example"],
        "redirect_uris": ["https://orders.example/cb"],
        "introspect": ["https://orders.example"],
    }
    assert (made["first_party"], made["require_pkce"], made["access_token_ttl"]) == (True, True, 120)
    cli.secrets.append(secret)
    assert cli.json("clients", "list") == [made]
    rotated = cli.json("clients", "rotate-secret", client_id, "--overlap", "60")
    assert rotated.keys() == {"client_id", "client_secret", "old_secret_ends_in"}
    assert rotated["client_secret"] != secret
    assert rotated["old_secret_ends_in"] == 60
    cli.secrets.append(rotated["client_secret"])
    assert cli.json("clients", "disable", client_id) == {"client_id": client_id, "enabled": False}
    assert cli.json("clients", "enable", client_id) == {"client_id": client_id, "enabled": True}
    public = cli.json("clients", "create", "Browser", "--grant", "refresh_token", "--public")
    assert "client_secret" not in public
    assert public["token_endpoint_auth_method"] == "none"
    events = ["client.created", "client.secret_rotated", "client.disabled", "client.enabled"]
    assert cli.events() == [*((event, client_id) for event in events), ("client.created", public["client_id"])]


@pytest.mark.case("TOK-19")
def test_what_cannot_be_a_client_is_refused_with_the_reason(cli: Cli) -> None:
    """One sentence each; an id cannot be chosen, and so cannot be made to equal somebody's subject."""
    create = ("clients", "create", "X")
    for words, sentence in [
        ((*create, "--grant", "implicit"), "grant_types: "),
        ((*create, "--grant", "password"), "first-party"),
        ((*create, "--grant", "client_credentials", "--public"), "can authenticate"),
        ((*create, "--scope", 'quo"te'), "scope: "),
        ((*create, "--audience", "orders"), "audiences: absolute URIs"),
        ((*create, "--redirect-uri", "http://orders.example/cb"), "redirect_uris: "),
        ((*create, "--no-pkce", "--public"), "PKCE"),
        (("clients", "create", "two\nlines"), "name: "),
        (("clients", "disable", "cl_" + "0" * 22), "there is no such client"),
        (("clients", "rotate-secret", "nobody"), "there is no such client"),
        (("roles", "grant", "user", "a b"), "a scope is one word"),
        (("roles", "grant", "user", "x" * 129), "a scope is one word"),
        (("roles", "grant", "emperor", "x"), "there is no such role"),
    ]:
        said = cli.run(*words).refused()
        assert sentence in said
        assert len(said.splitlines()) == 1
    assert "No such option" in cli.run(*create, "--client-id", str(uuid.uuid4())).refused(2)
    assert cli.json("clients", "list") == []
    assert cli.events() == []


def test_roles_gain_and_lose_scopes(cli: Cli) -> None:
    """A scope that is new is defined on the way."""
    before = cli.json("roles", "list")
    assert list(before) == ["user", "moderator", "admin", "super_admin"]
    cli.run("roles", "grant", "user", "stock:read", "stock:write")
    cli.run("roles", "withdraw", "user", "stock:write", "account:write")
    after = cli.json("roles", "list")
    assert set(after["user"]) - set(before["user"]) == {"stock:read"}
    assert set(before["user"]) - set(after["user"]) >= {"account:write"}
    assert cli.events() == [("role.granted", "user"), ("role.withdrawn", "user")]


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_life_of_the_keys(cli: Cli, tmp_path: Path) -> None:
    """On an empty database: migrate, list, rotate, compromise one and all, rewrap."""
    cli = Cli(cli.forge, cli.env, ("--data-dir", str(tmp_path / "fresh")), cli.secrets)
    assert cli.run("migrate").out == cli.run("migrate").out == "The schema is up to date.\n"
    active, waiting = cli.json("keys", "list")
    assert (active["state"], waiting["state"]) == ("active", "next")
    assert active.keys() == {
        *("kid", "state", "published_at", "activates_at", "retires_at", "removed_at", "compromised_at"),
    }
    rotated = cli.json("keys", "rotate")
    assert rotated["kid"] == waiting["kid"]
    assert rotated["activates_at"] < waiting["activates_at"]
    assert cli.json("keys", "rotate") == rotated

    gone = cli.json("keys", "compromise", active["kid"])
    assert gone["compromised"] == [active["kid"]]
    states = {key["kid"]: key["state"] for key in gone["keys"]}
    assert states[active["kid"]] == "compromised"
    assert states[waiting["kid"]] == "active"
    assert sorted(states.values()) == ["active", "compromised", "next"]

    everything = cli.run("keys", "compromise", "--all")
    assert "siblings that cache the JWKS refuse tokens for up to 15 minutes" in everything.out
    after = {key["kid"]: key["state"] for key in cli.json("keys", "list")}
    assert sorted(after.values()) == ["active", "compromised", "compromised", "compromised", "next"]
    for words, sentence in [
        ((), "name one key, or say --all"),
        ((active["kid"], "--all"), "name one key, or say --all"),
        (("unheard-of",), "there is no such key"),
    ]:
        assert sentence in cli.run("keys", "compromise", *words).refused()

    assert cli.json("keys", "rewrap") == {"data_keys": 0, "signing_keys": 0}
    renewed = cli.run("keys", "rewrap", "--json", IDENTITY_MASTER_KEY=f"{OTHER_KEY},{MASTER_KEY}").json
    assert renewed == {"data_keys": 7, "signing_keys": 5}
    assert cli.run("keys", "list", "--json", IDENTITY_MASTER_KEY=OTHER_KEY).code == 0
    assert "is wanted, but only" in cli.run("keys", "list").refused(2)
    events = [event for event, _ in cli.events()]
    one, both = ["key.compromised", "key.created"], ["key.compromised"] * 2 + ["key.created"] * 2
    assert events == ["key.rotation_scheduled"] * 2 + one + both + ["key.rewrapped"] * 2
    born = {target for event, target in cli.events() if event == "key.created"}
    assert born == after.keys() - {active["kid"], waiting["kid"]}


def test_a_client_is_changed_and_forgotten(cli: Cli) -> None:
    """What is not named stays; a client that is in use goes only after it was disabled."""
    words = ("--grant", "client_credentials", "--scope", "stock:read", "--audience", "https://stock.example")
    before = cli.json("clients", "create", "Stock", *words)
    client_id = before["client_id"]
    after = cli.json("clients", "update", client_id, "--scope", "stock:read stock:write", "--access-token-ttl", "90")
    secret = before.pop("client_secret")
    assert secret
    assert after == {**before, "scope": "stock:read stock:write", "access_token_ttl": 90}
    assert cli.json("clients", "update", client_id, "--audience", "")["audiences"] == []
    assert "say what" in cli.run("clients", "update", client_id).refused()
    assert "no such client" in cli.run("clients", "update", "cl_x", "--name", "Y").refused()
    assert "absolute URIs" in cli.run("clients", "update", client_id, "--audience", "stock").refused()
    assert "disable" in cli.run("clients", "delete", client_id).refused()
    cli.run("clients", "disable", client_id)
    assert cli.json("clients", "delete", client_id) == {"client_id": client_id, "deleted": True}
    assert "no such client" in cli.run("clients", "delete", client_id).refused()
    assert [event for event, _ in cli.events()][-2:] == ["client.disabled", "client.deleted"]


def test_cleaning_up_deletes_what_has_expired_for_good(cli: Cli, folder: Path) -> None:
    """In small transactions; what can still be of use stays."""
    user = cli.json("users", "create", "a", "--email", "a@example.org", "--password-stdin", stdin=PASSWORD)["id"]
    client = cli.json("clients", "create", "X")["client_id"]
    with sqlite3.connect(folder / "identity.db") as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(refresh_families)")]
        for number in range(5):
            past, future = "2020-01-01 00:00:00.000000", "2999-01-01 00:00:00.000000"
            values = dict.fromkeys(names, "") | {
                "id": uuid.uuid4().hex,
                "user_id": uuid.UUID(user).hex,
                "client_id": client,
                "audiences": "{}",
                **dict.fromkeys((name for name in names if name.endswith(("_at", "_time"))), past),
                "absolute_expires_at": future if number == 0 else past,
            }
            marks = ", ".join("?" * len(names))
            connection.execute(f"INSERT INTO refresh_families VALUES ({marks})", [values[name] for name in names])  # noqa: S608
    connection.close()
    nothing = dict.fromkeys(("refresh_families", "revoked_tokens", "email_tokens", "api_keys"), 0)
    assert cli.json("cleanup", "--batch", "3") == {**nothing, "refresh_families": 4}
    assert cli.run("cleanup").out.startswith("0 refresh families, 0 revoked tokens, ")


# -- which database ---------------------------------------------------------------------------------------------------


def test_the_data_directory_comes_from_the_environment_or_the_command_line(cli: Cli, folder: Path) -> None:
    """What is said on the command line goes before a database that the environment names."""
    by_variable = Cli(cli.forge, {**cli.env, "IDENTITY_DATA_DIR": str(folder)})
    by_variable.run("roles", "grant", "user", "stock:read")
    assert cli.events() == [("role.granted", "user")]
    unreachable = "postgresql+psycopg://u:Kanarienvogel-77@127.0.0.1:1/x"
    assert cli.run("roles", "list", "--json", IDENTITY_DATABASE_URL=unreachable).json
    assert (
        "cannot be reached"
        in by_variable.run(
            "roles", "list", IDENTITY_DATABASE_URL=unreachable, IDENTITY_ENVIRONMENT="development"
        ).refused()
    )


def test_on_postgresql_the_commands_take_their_settings_from_the_environment(on_postgres: Cli) -> None:
    """The same commands on the same schema."""
    made = on_postgres.json("users", "create", "marie", "--email", "m@example.org", "--password-stdin", stdin=PASSWORD)
    client = on_postgres.json("clients", "create", "X", "--grant", "client_credentials")
    assert on_postgres.json("keys", "list")
    assert set(on_postgres.json("cleanup").values()) == {0}
    assert on_postgres.run("migrate").code == 0
    assert on_postgres.events() == [("user.created", made["id"]), ("client.created", client["client_id"])]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.case("OPS-32")
def test_settings_that_are_unsafe_end_with_2_and_say_what_to_do(bare: Cli) -> None:
    """Production is the default, and it starts with nothing missing."""
    said = bare.run("serve").refused(2)
    assert said.startswith("identity-service will not start:\n")
    for variable in ("IDENTITY_ISSUER", "IDENTITY_DATABASE_URL", "IDENTITY_MASTER_KEY_FILE"):
        assert variable in said


@pytest.mark.case("OPS-31")
@pytest.mark.parametrize(
    "key", ["changeme", "a2FuYXJpZW52b2dlbA==", base64.b64encode(b"Kanarienvogel-77" * 2).decode()]
)
def test_a_master_key_that_is_none_ends_with_2(on_postgres: Cli, key: str) -> None:
    """Placeholder, too short, not random; the value is not repeated."""
    said = on_postgres.run("serve", IDENTITY_MASTER_KEY=key).refused(2)
    assert "master key 1" in said
    assert key not in said


def test_a_database_that_was_not_migrated_is_told_so(tmp_path: Path, forge: Forge) -> None:
    """By every kind of command, in one sentence."""
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "identity.db").touch()
    fresh = Cli(forge, {**CHEAP, "HOME": str(tmp_path)}, ("--data-dir", str(tmp_path / "fresh")))
    for words, code in [(("users", "list"), 1), (("cleanup",), 1), (("serve",), 2)]:
        done = fresh.run(*words)
        assert done.code == code
        assert "run `identity-service migrate`" in done.err


@pytest.mark.parametrize("words", [("migrate",), ("users", "list"), ("cleanup",), ("serve",)], ids=" ".join)
def test_a_database_that_is_away_is_told_so(on_postgres: Cli, words: tuple[str, ...]) -> None:
    """Without its password, and without a traceback."""
    nobody_there = f"postgresql+psycopg://identity:{PASSWORD}@127.0.0.1:1/identity"
    done = on_postgres.run(*words, IDENTITY_DATABASE_URL=nobody_there)
    assert done.code == 1
    assert "the database cannot be reached: connection failed" in done.err
    assert len(done.err.splitlines()) == 2


def test_a_data_directory_that_is_none_is_told_so(bare: Cli, tmp_path: Path) -> None:
    """In one sentence, with its name."""
    (tmp_path / "file").touch()
    said = bare.run("users", "list", "--data-dir", str(tmp_path / "file")).refused()
    assert str(tmp_path / "file") in said
    assert len(said.splitlines()) == 1


# -- the server of `dev` ----------------------------------------------------------------------------------------------


@dataclass
class Dev:
    """A running development server."""

    process: subprocess.Popen[str]
    lines: list[str]
    http: httpx2.Client
    log: Path

    def stop(self) -> float:
        """Send SIGTERM; return how long the end took, after seeing that it was a good one."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        rest, _ = self.process.communicate(timeout=120)
        self.lines += rest.splitlines()
        assert self.process.returncode == 0, self.log.read_text()
        return time.monotonic() - begun

    @property
    def announced(self) -> dict[str, str]:
        """The line it printed when it was ready."""
        found: dict[str, str] = json.loads(self.lines[0])
        return found

    def sign_in(self) -> httpx2.Response:
        demo = self.announced
        form = {name: demo[name] for name in ("username", "password", "client_id")}
        return self.http.post("/token", data={"grant_type": "password", **form})

    def me(self, token: str) -> httpx2.Response:
        return self.http.get("/v1/users/me", headers={"authorization": f"Bearer {token}"})


@contextmanager
def dev(cli: Cli, log: Path, *words: str, ready: Callable[[str], bool] = bool) -> Iterator[Dev]:
    """Run `dev` and wait until it says that it is ready."""
    port = free_port()
    command: Sequence[str] = [*PROGRAM, "dev", "--port", str(port), *words, *cli.options]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=cli.environment(), cwd=cli.env["HOME"]
        )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if ready(line):
                break
        assert lines, log.read_text()
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield Dev(process, lines, http, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.case("ADM-22")
def test_dev_is_ready_to_be_used_by_who_started_it(tmp_path: Path, forge: Forge) -> None:
    """
    From an empty directory to tokens, one line of JSON; beside it the other commands work on the same data.

    The second run, at another port, has the same user, client and keys.
    """
    folder = tmp_path / "data"
    cli = Cli(forge, {**CHEAP, "HOME": str(tmp_path)}, ("--data-dir", str(folder)))
    with dev(cli, tmp_path / "first.log", "--json") as server:
        first = server.announced
        assert first.keys() == {"issuer", "username", "password", "client_id"}
        assert first["issuer"] == str(server.http.base_url).rstrip("/")
        assert len(first["password"]) >= 16
        tokens = server.sign_in().json()
        assert server.me(tokens["access_token"]).json()["username"] == first["username"]
        refresh = {"grant_type": "refresh_token", "client_id": first["client_id"]}
        renewed = server.http.post("/token", data={**refresh, "refresh_token": tokens["refresh_token"]})
        assert renewed.status_code == 200
        kids = {key["kid"] for key in server.http.get("/.well-known/jwks.json").json()["keys"]}
        assert server.http.get("/docs").status_code == 200
        for name in ("master.key", "demo.json"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600

        made = cli.json("clients", "create", "X", "--grant", "client_credentials", "--scope", "orders:read")
        credentials = (made["client_id"], made["client_secret"])
        issued = server.http.post("/token", data={"grant_type": "client_credentials"}, auth=credentials)
        assert issued.status_code == 200  # usable as soon as the command has ended
        cli.json("clients", "disable", made["client_id"])
        time.sleep(1.1)
        assert (
            server.http.post("/token", data={"grant_type": "client_credentials"}, auth=credentials).status_code == 401
        )

        cli.json("users", "disable", "demo")
        assert server.me(renewed.json()["access_token"]).status_code == 401
        dead = server.http.post("/token", data={**refresh, "refresh_token": renewed.json()["refresh_token"]})
        assert (dead.status_code, dead.json()["error"]) == (400, "invalid_grant")
        assert server.sign_in().status_code == 400
        cli.json("users", "enable", "demo")

        second = cli.run("dev", "--port", str(free_port()))
        assert "another server is running" in second.refused()
        assert server.stop() < 20
        assert len(server.lines) == 1

    by_variable = Cli(cli.forge, {**cli.env, "IDENTITY_DATA_DIR": str(folder)})
    with dev(by_variable, tmp_path / "second.log", "--json") as server:
        again = server.announced
        assert {**again, "issuer": ""} == {**first, "issuer": ""}
        assert again["issuer"] != first["issuer"]
        answer = server.sign_in()
        assert answer.status_code == 200
        assert server.me(answer.json()["access_token"]).status_code == 200
        assert {key["kid"] for key in server.http.get("/.well-known/jwks.json").json()["keys"]} == kids
        assert server.stop() < 20
    for log in (tmp_path / "first.log", tmp_path / "second.log"):
        assert all(json.loads(line)["event"] for line in log.read_text().splitlines())


def test_dev_prints_for_people_what_they_can_paste(tmp_path: Path, forge: Forge) -> None:
    """Credentials and four curl lines; the first of them signs in."""
    cli = Cli(forge, {**CHEAP, "HOME": str(tmp_path)}, ("--data-dir", str(tmp_path / "data")))
    with dev(cli, tmp_path / "log", ready=lambda line: "jwks.json" in line) as server:
        text = "\n".join(server.lines)
        base = str(server.http.base_url).rstrip("/")
        for path in ("/token", "/v1/users/me", "/.well-known/jwks.json"):
            assert f"curl -s {base}{path}" in text
        assert "grant_type=refresh_token" in text
        form = dict(re.findall(r"-d ([a-z_]+)=([^\s;)]+)", text.split("Who am I")[0]))
        assert form["grant_type"] == "password"
        assert server.http.post("/token", data=form).status_code == 200
        assert server.stop() < 20


def test_a_port_that_is_taken_ends_the_server_in_words(cli: Cli, folder: Path) -> None:
    """Not with a traceback; the port of the metrics neither."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        busy = cli.run("serve", "--port", port)
        assert busy.code != 0
        assert "address already in use" in busy.out + busy.err
        assert "management port cannot be opened" in cli.run("serve", IDENTITY_MANAGEMENT_PORT=port).refused()


def test_a_folder_without_a_database_is_told_and_left_alone(tmp_path: Path, forge: Forge) -> None:
    """A typing error makes no second world."""
    folder = tmp_path / "mistyped"
    cli = Cli(forge, {**CHEAP, "HOME": str(tmp_path)}, ("--data-dir", str(folder)))
    for words in (("users", "list"), ("keys", "list"), ("cleanup",)):
        assert "there is no database at" in cli.run(*words).refused()
    assert not folder.exists()


def test_what_a_command_writes_is_for_its_owner_only(tmp_path: Path, forge: Forge) -> None:
    """The folder, the database and the key, whoever makes them first."""
    folder = tmp_path / "new"
    cli = Cli(forge, {**CHEAP, "HOME": str(tmp_path)}, ("--data-dir", str(folder)))
    assert cli.run("migrate").code == 0
    assert cli.run("keys", "rotate").code == 0
    made = [folder, *folder.iterdir()]
    assert {path.name for path in made} >= {"new", "identity.db", "master.key"}
    assert [path.name for path in made if path.stat().st_mode & 0o077] == []
