"""What the commands share: settings, one transaction, and how they speak."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import SecretStr

from identity_service.infra import telemetry
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.envelope import new_master_key
from identity_service.main import NoMasterKeyYet, Services, build_services, correct_clock, load_keys, schema_fault
from identity_service.settings import (
    DatabaseSettings,
    Settings,
    UnsafeSettings,
    load_database_settings,
    load_settings,
)

Answer = TypeVar("Answer")
AnySettings = TypeVar("AnySettings", bound=DatabaseSettings)

ACTOR = "cli"
"""Who the audit trail names for what a command did."""

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Work on the database of `dev` in this directory.", envvar="IDENTITY_DATA_DIR"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Refused(Exception):
    """The command cannot do what it was asked; the message is for the person."""


class Keys(Enum):
    """What a command does with keys, and so whether it may make the master key of a development database."""

    UNUSED = "it needs none"
    READ = "it loads those there are"
    MADE = "it loads them, and makes those that are missing"


def settings_for(data_dir: Path | None, **given: Any) -> Settings:
    """Return the settings of the environment, with what the command line says before them; raises UnsafeSettings."""
    return _settings(load_settings, data_dir, given)


def database_settings_for(data_dir: Path | None) -> DatabaseSettings:
    """Return where the database is, and ask for nothing else; raises UnsafeSettings."""
    return _settings(load_database_settings, data_dir, {})


def _settings(load: Callable[..., AnySettings], data_dir: Path | None, given: dict[str, Any]) -> AnySettings:
    given = {name: value for name, value in given.items() if value is not None}
    if data_dir is not None:
        given["data_dir"] = data_dir
        if str(data_dir) != os.environ.get("IDENTITY_DATA_DIR"):  # said on the command line, before any named database
            given["database_url"] = ""
        named = given.get("database_url", os.environ.get("IDENTITY_DATABASE_URL"))
        if not named and not os.environ.get("IDENTITY_ENVIRONMENT"):
            given.setdefault("environment", "development")
    try:
        return load(**given)
    except UnsafeSettings as error:
        if data_dir is None and "IDENTITY_DATABASE_URL is not set" in str(error):
            raise UnsafeSettings(f"{error}\n(for the database of `make run`, add --data-dir .data)") from None
        raise


def quiet_settings(data_dir: Path | None) -> Settings:
    """Return the settings for a command that does one thing; it logs what went wrong, and to standard error only."""
    settings = settings_for(data_dir)
    telemetry.configure_logging(level="WARNING", as_json=settings.log_json, stream=sys.stderr)
    return settings


def unless_named(name: str, value: str) -> str | None:
    """Return a value for a setting that the environment does not name, None for one that it does."""
    return None if os.environ.get(f"IDENTITY_{name.upper()}") else value


@asynccontextmanager
async def opened(settings: Settings, keys: Keys = Keys.UNUSED) -> AsyncIterator[Services]:
    """Yield the services on a database whose schema is new enough; raises Refused."""
    if (path := settings.sqlite_file) is not None and not path.exists():
        raise Refused(f"there is no database at {path}; `identity-service dev` and `identity-service migrate` make one")
    try:
        services = build_services(settings, make_master_key=keys is Keys.MADE)
    except NoMasterKeyYet as error:
        if keys is Keys.READ:
            raise Refused(str(error)) from None
        # Nothing was ever wrapped here and nothing will be by this command: a key that nobody keeps is good enough.
        services = build_services(settings.model_copy(update={"master_key": SecretStr(new_master_key())}))
    try:
        if fault := await services.db.pooler_fault() or await schema_fault(services.db):
            raise Refused(fault)
        await services.db.run(lambda tx: correct_clock(services, tx))
        yield services
    finally:
        await services.close()


async def with_services(
    settings: Settings, work: Callable[[Services, Transaction], Awaitable[Answer]], *, keys: Keys = Keys.UNUSED
) -> Answer:
    """Do `work` in one transaction, after loading the keys if it needs any."""
    async with opened(settings, keys) as services:
        if keys is not Keys.UNUSED:
            await load_keys(services)
        return await services.db.run(lambda tx: work(services, tx))


def run(
    data_dir: Path | None, work: Callable[[Services, Transaction], Awaitable[Answer]], *, keys: Keys = Keys.UNUSED
) -> Answer:
    """Do `work` on the configured database and return what it answers."""
    return asyncio.run(with_services(quiet_settings(data_dir), work, keys=keys))


def say(value: Any, text: str, *, as_json: bool) -> None:
    """Print `value` as JSON, or the text for people."""
    typer.echo(json.dumps(value, default=str) if as_json else text)


def split(values: list[str] | None) -> list[str]:
    """Accept an option several times, and several words in one."""
    return [word for value in values or [] for word in re.split(r"[,\s]+", value) if word]


def read_password(*, from_stdin: bool) -> Secret:
    """Return a password from standard input, or ask for one."""
    if from_stdin:
        try:
            return Secret(sys.stdin.buffer.readline().decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise Refused("the password on standard input is not valid UTF-8") from None
    if not sys.stdin.isatty():
        raise Refused("give the password on standard input, with --password-stdin")
    return Secret(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
