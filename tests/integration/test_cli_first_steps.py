"""The commands of somebody who has just run `make run`: in whatever directory they are, and without any setting."""

import os
from pathlib import Path

import pytest

from tests.support.commands import CHEAP, Cli, Forge


def at(place: Path, forge: Forge, *options: str) -> Cli:
    """Return commands that are run in a directory, without a master key of their own."""
    place.mkdir(parents=True, exist_ok=True)
    return Cli(forge, {**CHEAP, "HOME": str(place)}, options)


@pytest.fixture
def checkout(tmp_path: Path, forge: Forge) -> Path:
    """A directory in which the default data directory and its keys were made."""
    made = tmp_path / "checkout"
    cli = at(made, forge, "--data-dir", ".data")
    assert cli.run("migrate").code == 0
    assert cli.run("keys", "rotate").code == 0
    return made


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_data_directory_is_the_same_from_every_directory(checkout: Path, tmp_path: Path, forge: Forge) -> None:
    """Its key is beside it, wherever a command is run; none is made where the command is."""
    assert {"keys/master.key", ".data/identity.db"} <= files(checkout)
    made = files(checkout)
    expected = at(checkout, forge, "--data-dir", ".data").json("keys", "list")
    (tmp_path / "link").symlink_to(checkout / ".data")
    for place, data_dir in [
        (tmp_path / "elsewhere", str(checkout / ".data")),
        (tmp_path / "elsewhere", "../checkout/.data"),
        (tmp_path / "elsewhere", "../checkout/.data/"),
        (tmp_path / "elsewhere", str(tmp_path / "link")),
        (tmp_path / "another" / ".data", str(checkout / ".data")),
        (checkout / ".data", "."),
    ]:
        cli = at(place, forge, "--data-dir", data_dir)
        assert cli.json("keys", "list") == expected
        assert cli.run("keys", "rotate").code == 0
    assert files(checkout) - {".data/identity.db-shm", ".data/identity.db-wal"} == made
    assert files(tmp_path / "elsewhere") | files(tmp_path / "another") == set()


def test_a_data_directory_that_is_made_from_elsewhere_is_found_from_within(tmp_path: Path, forge: Forge) -> None:
    """The rule looks at the data directory alone, also for who makes the key."""
    place = tmp_path / "checkout"
    outside = at(tmp_path / "elsewhere", forge, "--data-dir", str(place / ".data"))
    assert outside.run("migrate").code == 0
    rotated = outside.json("keys", "rotate")
    assert "keys/master.key" in files(place)
    assert at(place, forge, "--data-dir", ".data").json("keys", "rotate") == rotated


def test_a_key_inside_the_data_directory_is_found_where_there_is_none_beside_it(
    checkout: Path, tmp_path: Path, forge: Forge
) -> None:
    """A data directory that was moved, or made by an earlier version, brings its key along."""
    kids = [key["kid"] for key in at(checkout, forge, "--data-dir", ".data").json("keys", "list")]
    key = checkout / "keys" / "master.key"
    inside = checkout / ".data" / "master.key"
    key.rename(inside)
    for place in (checkout, tmp_path / "elsewhere"):
        cli = at(place, forge, "--data-dir", str(checkout / ".data"))
        assert [found["kid"] for found in cli.json("keys", "list")] == kids
    assert not key.exists()
    key.write_bytes(inside.read_bytes())
    inside.write_text("of no use\n")
    assert at(checkout, forge, "--data-dir", ".data").run("keys", "list").code == 0


@pytest.mark.parametrize("words", [("users", "list"), ("clients", "create", "X"), ("audit", "anchor")], ids=" ".join)
def test_a_command_that_needs_no_key_makes_none(tmp_path: Path, forge: Forge, words: tuple[str, ...]) -> None:
    """The first that needs one makes it, and with it opens all that there is."""
    place = tmp_path / "checkout"
    cli = at(place, forge, "--data-dir", ".data")
    assert cli.run("migrate").code == 0
    done = cli.run(*words)
    assert done.code == 0, done.err
    assert [name for name in files(place) if "key" in name] == []
    assert cli.run("keys", "rotate").code == 0
    assert "keys/master.key" in files(place)
    assert cli.run(*words).code == 0


@pytest.mark.parametrize("words", [("keys", "list"), ("audit", "verify")], ids=" ".join)
def test_who_only_looks_at_keys_makes_none(tmp_path: Path, forge: Forge, words: tuple[str, ...]) -> None:
    """It is told that there are none yet; with a key that was lost, that it must be put back."""
    place = tmp_path / "checkout"
    cli = at(place, forge, "--data-dir", ".data")
    assert cli.run("migrate").code == 0
    assert "there is no master key yet; `identity-service dev` makes one" in cli.run(*words).refused()
    assert [name for name in files(place) if "key" in name] == []
    assert cli.run("keys", "rotate").code == 0
    assert cli.run(*words).code == 0
    (place / "keys" / "master.key").unlink()
    for lost in (words, ("users", "list"), ("keys", "rotate")):
        assert "put back the one this database was made with" in cli.run(*lost).refused(2)
    assert not (place / "keys" / "master.key").exists()


HINT = "(for the database of `make run`, add --data-dir .data)"


@pytest.mark.parametrize("words", [("users", "list"), ("clients", "list"), ("migrate",), ("serve",)], ids=" ".join)
def test_settings_that_are_missing_lead_to_the_database_of_make_run(bare: Cli, words: tuple[str, ...]) -> None:
    """In the last line, after what production would need."""
    said = bare.run(*words).refused(2)
    assert "IDENTITY_DATABASE_URL is not set" in said
    assert said.splitlines()[-1] == HINT


def test_who_names_a_database_is_not_led_to_another(bare: Cli, tmp_path: Path) -> None:
    """Nor who names a data directory, nor who is told of another fault."""
    url = "postgresql+psycopg://identity@127.0.0.1:1/identity"
    for words, env in [
        (("users", "list"), {"IDENTITY_DATABASE_URL": url}),
        (("users", "list", "--data-dir", str(tmp_path)), {"IDENTITY_ENVIRONMENT": "production"}),
        (("users", "list"), {"IDENTITY_PORT": "none"}),
        (("users", "list"), {"IDENTITY_ALLOW_SQLITE": "true"}),
    ]:
        assert HINT not in bare.run(*words, **env).refused(2)


def test_the_hint_leads_there(checkout: Path, forge: Forge) -> None:
    """With what it says added, the command works."""
    assert HINT in at(checkout, forge).run("users", "list").refused(2)
    words = HINT.rpartition("add ")[2].rstrip(")").split()
    assert at(checkout, forge, *words).run("users", "list").code == 0
    assert os.listdir(checkout / ".data")
