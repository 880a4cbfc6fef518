"""What makes the secrets for compose."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

from identity_service.infra.runtime.envelope import MasterKeys
from tests.deploy.site import DEPLOY, documents

_FOLDER = DEPLOY / "compose"


def prepare(folder: Path) -> dict[str, str]:
    """Run the script in a folder of its own; return what it has made."""
    folder.mkdir(exist_ok=True)
    shutil.copy(_FOLDER / "prepare", folder)
    subprocess.run([folder / "prepare"], check=True, env={"PATH": os.environ["PATH"]})
    return {path.name: path.read_text("ascii") for path in (folder / "secrets").iterdir()}


def test_every_secret_of_compose_is_made(tmp_path: Path) -> None:
    """And nothing that nobody reads."""
    [compose] = documents(_FOLDER / "compose.yaml")
    read = {secret["file"] for secret in compose["secrets"].values()}
    read |= {name for service in compose["services"].values() for name in service.get("env_file", [])}
    assert {f"secrets/{name}" for name in prepare(tmp_path)} == read


def test_each_role_connects_with_its_own_password(tmp_path: Path) -> None:
    """What is in the address is what the database was given; no two are alike."""
    made = prepare(tmp_path)
    for role, file in (("migrator", "migrate.env"), ("service", "service.env")):
        address = (
            f"IDENTITY_DATABASE_URL=postgresql+psycopg://identity_{role}:{made[f'{role}_password']}@postgres/identity"
        )
        assert made[file].splitlines()[0] == address
    assert len({made[f"{role}_password"] for role in ("postgres", "migrator", "service")}) == 3
    assert all(len(made[f"{role}_password"]) == 64 for role in ("postgres", "migrator", "service"))
    assert len(MasterKeys.parse(made["master_key"]).ids) == 1


def test_secrets_that_are_there_stay(tmp_path: Path) -> None:
    """A new master key could open none of the keys that the database has."""
    assert prepare(tmp_path) == prepare(tmp_path)


def test_nobody_else_on_this_machine_reads_them(tmp_path: Path) -> None:
    """The files can be read in containers, whose users are others; the directory is its owner's alone."""
    prepare(tmp_path)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()} == {0o444}
