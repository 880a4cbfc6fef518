"""Settings: production by default, typed, frozen, and unsafe combinations refused in words that help."""

import base64
import os
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from identity_service.infra.runtime.envelope import MasterKeyError
from identity_service.main import development_key_file, load_master_keys
from identity_service.oauth.signing_keys import KeyPolicy
from identity_service.settings import Settings, UnsafeSettings, load_settings

KEY = base64.b64encode(bytes(range(100, 132))).decode()
CANARY = "Kanarienvogel"
DATABASE = f"postgresql+psycopg://identity:{CANARY}@db.internal:5432/identity"
GOOD = {"issuer": "https://id.example.test", "database_url": DATABASE, "master_key": KEY}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("IDENTITY_"):
            monkeypatch.delenv(name)


def refusal(**given: Any) -> str:
    """Return what a refused start says, after making sure that no secret value is in it."""
    with pytest.raises(UnsafeSettings) as caught:
        load_settings(**given)
    message = str(caught.value)
    assert CANARY not in message
    assert KEY not in message
    assert caught.value.__cause__ is None  # the library's own error would show what was given
    return message


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.case("OPS-32")
def test_production_is_the_default_and_starts_with_nothing_but_the_necessary() -> None:
    """Origin, database and master key are named; everything else has a safe default."""
    settings = load_settings(**GOOD)
    assert settings.production
    assert settings.hosts == ("id.example.test",)
    assert not settings.on_sqlite


@pytest.mark.case("OPS-31")
@pytest.mark.case("OPS-32")
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({}, "IDENTITY_ISSUER is not set"),
        (without("issuer"), "name the https origin"),
        (without("database_url"), "IDENTITY_DATABASE_URL is not set: postgresql+psycopg://"),
        (without("master_key"), "set IDENTITY_MASTER_KEY_FILE (one per line, made with: openssl rand -base64 32)"),
        ({**GOOD, "issuer": "http://id.example.test"}, "IDENTITY_ISSUER must be https"),
        ({**GOOD, "database_url": "sqlite+aiosqlite:////var/lib/identity.db"}, "set IDENTITY_ALLOW_SQLITE=true"),
        ({**GOOD, "default_client_id": "cl_x"}, "in production every client names itself"),
        ({**GOOD, "allowed_hosts": "*"}, "must name the hosts, not *"),
        ({**GOOD, "allowed_hosts": '["id.example.test", "*"]'}, "must name the hosts, not *"),
        ({**GOOD, "argon2_memory_kib": 8192}, "at least 19456 and 2"),
        ({**GOOD, "argon2_time_cost": 1}, "at least 19456 and 2"),
        ({**GOOD, "refusal_delay": 0}, "IDENTITY_REFUSAL_DELAY must be at least 0.1"),
        ({**GOOD, "log_level": "DEBUG"}, "must not be DEBUG in production"),
    ],
)
def test_production_refuses_what_is_unsafe(given: dict[str, Any], advice: str) -> None:
    """The message says what to do."""
    assert advice in refusal(**given)


@pytest.mark.case("OPS-32")
@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"trusted_proxies": "0.0.0.0/0"}, "IDENTITY_TRUSTED_PROXIES: trusting every address"),
        ({"trusted_proxies": "10.0.0.0/8, ::/0"}, "IDENTITY_TRUSTED_PROXIES: trusting every address"),
        ({"trusted_proxies": "*"}, "IDENTITY_TRUSTED_PROXIES: addresses or networks"),
        ({"trusted_proxies": '["10.0.0.1",'}, "IDENTITY_TRUSTED_PROXIES: words separated by commas"),
        ({"issuer": "https://id.example.test/"}, "IDENTITY_ISSUER: scheme://host[:port] and nothing more"),
        ({"issuer": "https://id.example.test/base"}, "nothing more"),
        ({"issuer": "https://id.example.test?x"}, "nothing more"),
        ({"issuer": f"https://u:{CANARY}@id.example.test"}, "nothing more"),
        ({"issuer": "https://id.example.test:port"}, "nothing more"),
        ({"issuer": "https://id.example.test:99999"}, "nothing more"),
        ({"issuer": "https://[::1"}, "nothing more"),
        ({"issuer": "ftp://id.example.test"}, "nothing more"),
        ({"issuer": "id.example.test"}, "nothing more"),
        ({"database_url": f"postgresql://u:{CANARY}@h/n"}, "must begin with postgresql+psycopg://"),
        ({"database_url": f"mysql://u:{CANARY}@h/n"}, "must begin with postgresql+psycopg://"),
        ({"database_url": f"postgresql+psycopg://u:a@b@c:{CANARY}/n"}, "percent-encoded"),
        ({"redis_url": f"http://:{CANARY}@h"}, "IDENTITY_REDIS_URL: redis://"),
        ({"redis_url": f"redis://h:{CANARY}"}, "IDENTITY_REDIS_URL: redis://"),
        (
            {"refresh_idle_ttl": 100_000, "refresh_absolute_ttl": 90_000},
            "must not exceed IDENTITY_REFRESH_ABSOLUTE_TTL",
        ),
        ({"signing_key_lead": 1919}, "IDENTITY_SIGNING_KEY_LEAD: "),
        ({"signing_key_lead": 7200, "signing_key_period": 7200}, "must be shorter than IDENTITY_SIGNING_KEY_PERIOD"),
        ({"access_token_ttl": 3601}, "IDENTITY_ACCESS_TOKEN_TTL: "),
        ({"access_token_ttl": 59}, "IDENTITY_ACCESS_TOKEN_TTL: "),
        ({"password_min_length": 7}, "IDENTITY_PASSWORD_MIN_LENGTH: "),
        ({"password_classes": "upper,emoji"}, "IDENTITY_PASSWORD_CLASSES: choose among"),
        ({"argon2_memory_kib": 65537}, "IDENTITY_ARGON2_MEMORY_KIB: "),
        ({"signing_key_bits": "1024"}, "IDENTITY_SIGNING_KEY_BITS: "),
        ({"port": CANARY}, "IDENTITY_PORT: "),
        ({"environment": "staging"}, "IDENTITY_ENVIRONMENT: "),
        ({"log_level": "debug"}, "IDENTITY_LOG_LEVEL: "),
        ({"master_key": KEY, "master_key_file": "keys/master.key"}, "not both"),
    ],
)
def test_what_makes_no_sense_is_refused_everywhere(given: dict[str, Any], advice: str) -> None:
    """In development too; one line for each fault, with the variable's name."""
    message = refusal(**{"environment": "development", **given})
    assert advice in message
    assert len(message.splitlines()) == 1


def test_every_fault_is_told_at_once() -> None:
    """Nobody has to start five times to hear five things; each has a line of its own."""
    lines = refusal(issuer="http://id.example.test", log_level="DEBUG").splitlines()
    assert len(lines) == 4
    assert all(line.startswith(("IDENTITY_", "no master key")) for line in lines)


def test_the_environment_is_read_and_the_command_line_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty variables count as unset."""
    for name, value in {"ENVIRONMENT": "development", "PORT": "9001", "HOST": "0.0.0.0", "MASTER_KEY": ""}.items():  # noqa: S104
        monkeypatch.setenv(f"IDENTITY_{name}", value)
    settings = load_settings(port=9002)
    assert (settings.port, settings.host, settings.production) == (9002, "0.0.0.0", False)  # noqa: S104
    assert settings.master_key.get_secret_value() == ""


@pytest.mark.parametrize("spelling", ["10.0.0.1, 10.1.0.0/16", '["10.0.0.1", "10.1.0.0/16"]', "10.0.0.1,,10.1.0.0/16,"])
def test_lists_come_with_commas_or_as_json(monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    """Both are what people write into deployment files."""
    monkeypatch.setenv("IDENTITY_TRUSTED_PROXIES", spelling)
    assert load_settings(**GOOD).trusted_proxies == ("10.0.0.1", "10.1.0.0/16")


def test_an_address_in_brackets_is_a_host_and_not_json() -> None:
    """`[::1]` begins as a JSON list does."""
    assert load_settings(**GOOD, allowed_hosts="[::1]").allowed_hosts == ("[::1]",)


def test_settings_cannot_be_changed() -> None:
    """What was checked at the start is what holds."""
    settings = load_settings(**GOOD)
    with pytest.raises(ValidationError):
        settings.access_token_ttl = 3600  # type: ignore[misc]


def test_settings_do_not_print_their_secrets() -> None:
    """Neither their repr nor their dump shows a password or a key."""
    settings = load_settings(**GOOD, redis_url=f"redis://:{CANARY}@h:6379/0")
    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert CANARY not in text
        assert KEY not in text


def test_the_library_does_not_repeat_what_was_given_either() -> None:
    """Should its own error ever be shown."""
    with pytest.raises(ValidationError) as caught:
        Settings(port=CANARY, hash_wait=CANARY, **{**GOOD, "database_url": f"mysql://{CANARY}"})  # type: ignore[arg-type]
    assert CANARY not in str(caught.value)
    assert CANARY not in repr(caught.value)


def test_development_needs_nothing(tmp_path: Path) -> None:
    """It serves on SQLite in its data directory, and answers loopback hosts."""
    settings = load_settings(environment="development", data_dir=tmp_path)
    assert settings.public_issuer == "http://127.0.0.1:8000"
    assert settings.database == f"sqlite+aiosqlite:///{tmp_path / 'identity.db'}"
    assert set(settings.hosts) == {"127.0.0.1", "localhost", "[::1]"}


@pytest.mark.case("OPS-24")
def test_production_on_sqlite_has_to_be_asked_for() -> None:
    """Asked for, it starts."""
    url = "sqlite+aiosqlite:////var/lib/identity.db"
    assert "IDENTITY_ALLOW_SQLITE" in refusal(**{**GOOD, "database_url": url})
    assert load_settings(**{**GOOD, "database_url": url}, allow_sqlite=True).on_sqlite


# -- the master key ---------------------------------------------------------------------------------------------------


def test_development_makes_a_master_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    """The second start finds the same key."""
    settings = load_settings(environment="development", data_dir=tmp_path / "new")
    before = os.umask(0)  # the mode must not depend on the caller's
    try:
        first = load_master_keys(settings)
    finally:
        os.umask(before)
    path = development_key_file(settings.data_dir)
    assert path == tmp_path / "new" / "master.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_master_keys(settings).ids == first.ids


def test_the_default_data_directory_keeps_its_key_under_keys() -> None:
    """Beside the checkout's own page about it."""
    assert development_key_file(Path(".data")) == Path("keys/master.key")


@pytest.mark.case("OPS-31")
@pytest.mark.parametrize("environment", ["production", "development"])
def test_a_key_file_that_was_named_is_never_made(tmp_path: Path, environment: str) -> None:
    """A new key could unwrap nothing that is in the database."""
    path = tmp_path / "master.key"
    settings = load_settings(**{**without("master_key"), "environment": environment, "master_key_file": path})
    with pytest.raises(MasterKeyError, match="cannot be read: FileNotFoundError"):
        load_master_keys(settings)
    assert not path.exists()


@pytest.mark.case("OPS-31")
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("changeme", "master key 1 is not base64|master key 1 has"),
        (CANARY, "master key 1"),
        (base64.b64encode(b"x" * 16).decode(), "has 16 bytes; 32 are needed"),
        (base64.b64encode(b"x" * 32).decode(), "is not random; make one with: openssl rand -base64 32"),
        (f"{KEY}\n{CANARY}!", "master key 2 is not base64"),
        ("# nothing\n\n", "no master key is set"),
    ],
)
def test_a_master_key_that_nobody_rolled_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    """Missing, placeholder, too short, constant: from the variable as from the file, and the value is not repeated."""
    path = tmp_path / "master.key"
    path.write_text(text)
    from_file = load_settings(**without("master_key"), master_key_file=path)
    from_variable = load_settings(**{**GOOD, "master_key": text})
    for settings in (from_file, from_variable):
        with pytest.raises(MasterKeyError, match=complaint) as caught:
            load_master_keys(settings)
        assert CANARY not in str(caught.value)
        assert KEY not in str(caught.value)


def test_a_key_file_holds_several_keys_and_the_first_wraps(tmp_path: Path) -> None:
    """Comments and blank lines are allowed."""
    other = base64.b64encode(bytes(range(32))).decode()
    path = tmp_path / "master.key"
    path.write_text(f"# since May\n{KEY}\n\n{other}\n")
    keys = load_master_keys(load_settings(**without("master_key"), master_key_file=path))
    alone = load_master_keys(load_settings(**GOOD))
    assert len(keys.ids) == 2
    assert keys.first_id == alone.first_id


def test_no_secret_has_a_default() -> None:
    """What is secret is empty until somebody sets it."""
    secret = [name for name, field in Settings.model_fields.items() if "Secret" in str(field.annotation)]
    assert set(secret) == {"database_url", "redis_url", "master_key", "bootstrap_secret", "smtp_password"}
    assert all(Settings.model_fields[name].default.get_secret_value() == "" for name in secret)


def test_the_smallest_lead_that_may_be_set_is_the_one_that_is_kept() -> None:
    """A setting that is silently raised would be a lie."""
    smallest = next(rule.ge for rule in Settings.model_fields["signing_key_lead"].metadata if hasattr(rule, "ge"))
    assert KeyPolicy(lead=timedelta(seconds=smallest)).safe_lead == timedelta(seconds=smallest)
    assert KeyPolicy(lead=timedelta(seconds=smallest - 1)).safe_lead == timedelta(seconds=smallest)
