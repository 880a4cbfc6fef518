"""Mistakes that must not do harm: a lost key file, a second server, a variable left over, an outage during sign-in."""

import subprocess
import sys
from pathlib import Path

import pytest

from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.cli.common import settings_for
from identity_service.cli.serving import only_one_on_sqlite
from identity_service.infra.data_keys import PURPOSES
from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.migrate import migrate
from identity_service.infra.runtime.envelope import MasterKeyError
from identity_service.infra.runtime.hashing import HashingBusy, PasswordHasher
from identity_service.main import load_keys, load_master_keys
from identity_service.settings import Settings, UnsafeSettings
from tests.support.service import PASSWORD, Service, running, test_settings


def _development(folder: Path, url: str = "") -> Settings:
    return Settings(environment="development", data_dir=folder, database_url=url)  # type: ignore[arg-type]  # as text


@pytest.mark.case("JWT-25")
def test_no_master_key_is_made_for_a_database_that_holds_keys(sqlite_url: str, tmp_path: Path) -> None:
    """A key file that was lost is asked for; a new one would only look like it."""
    with pytest.raises(MasterKeyError, match=r"put back the one this database was made with"):
        load_master_keys(_development(tmp_path / "elsewhere", sqlite_url))
    assert not (tmp_path / "elsewhere").exists()


def test_a_master_key_is_made_for_a_database_that_holds_none(tmp_path: Path) -> None:
    """Migrated or not; and the next start reads the same one."""
    settings = _development(tmp_path)
    made = load_master_keys(settings)
    migrate(settings.database)
    assert load_master_keys(settings).ids == made.ids
    (tmp_path / "master.key").unlink()
    assert load_master_keys(settings).ids != made.ids


def test_a_second_development_server_touches_nothing(tmp_path: Path) -> None:
    """It hears that there is one before it migrates, makes keys or changes the demo client."""
    with only_one_on_sqlite(_development(tmp_path)):
        words = [sys.executable, "-c", "from identity_service.cli import main; main()"]
        done = subprocess.run(
            [*words, "dev", "--data-dir", str(tmp_path), "--port", "1"], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "another server is running" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["identity.lock"]


def test_a_data_directory_in_the_environment_makes_no_server_a_development_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployment that lost its database's address refuses to start."""
    monkeypatch.setenv("IDENTITY_DATA_DIR", str(tmp_path))
    with pytest.raises(UnsafeSettings, match="IDENTITY_DATABASE_URL is not set"):
        settings_for(None)


@pytest.mark.case("SEC-04")
async def test_keys_that_fall_due_by_themselves_leave_their_rows(tmp_path: Path) -> None:
    """An empty database: a data key of each purpose, a signing key and the next one; a rotation: one out, one in."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"
    migrate(url)
    async with running(test_settings(url)) as service:
        assert [row.target for row in await service.events("data_key.created")] == sorted(PURPOSES)
        first, second = await service.events("key.created")
        service.clock.advance(31 * 86400)  # type: ignore[attr-defined]  # the tests' own clock
        await load_keys(service.services)
        [retired] = await service.events("key.retired")
        assert (retired.target, retired.actor) == (first.target, "schedule")
        assert [row.target for row in await service.events("key.created")][:2] == [first.target, second.target]


async def test_a_sign_in_that_nobody_could_judge_is_not_held_against_anybody(
    embedded: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashing pool was full, or the database away: 503 each time, and the next one finds no throttle."""
    client, user = await embedded.a_client(), await embedded.a_user()
    form = {"grant_type": "password", "username": user.username, "password": PASSWORD}

    async def busy(*_: object, **__: object) -> None:
        raise HashingBusy("queue_full")

    async def away(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("planted")

    for place, name, fault in ((PasswordHasher, "verify", busy), (RefreshFamilies, "start", away)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, fault)
            answers = [await embedded.token(client, **form) for _ in range(15)]
        assert {answer.status_code for answer in answers} == {503}
    assert (await embedded.token(client, **form)).status_code == 200
