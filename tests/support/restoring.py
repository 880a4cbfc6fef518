"""A database that was lost and restored, and the commands that put it right."""

import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import select

from identity_service.infra.database import Database
from identity_service.infra.runtime import SystemClock
from identity_service.infra.tables import metadata
from identity_service.oauth.signing_keys import Actor
from tests.support.addresses import plain
from tests.support.commands import Cli
from tests.support.service import Service, running, test_settings


@asynccontextmanager
async def live(url: str, **changes: Any) -> AsyncIterator[Service]:
    """Serve a database by the time that it really is."""
    async with running(test_settings(url, **changes), SystemClock()) as service:
        yield service


async def serve_once(url: str) -> None:
    """Start on a database, and stop."""
    async with live(url):
        pass


@dataclass
class Place:
    """A database, and the commands that work on it."""

    url: str
    cli: Cli

    def restored(self, *words: str, **env: str) -> Any:
        """Put it right, and return what was done."""
        return self.cli.run("after-restore", *words, "--json", **env).json

    def refuses(self, *words: str, **env: str) -> str:
        """Return why it cannot be put right."""
        return self.cli.run("after-restore", *words, **env).refused()


async def newest_seal(service: Service) -> str:
    """Seal what there is, as the job does, and return the anchor that its log would have."""
    await service.run_job("audit_seal")
    newest = await service.within(service.services.audit_chain.newest)
    return f"{newest.seq}:{newest.mac.hex()}"


async def keys_in_use(service: Service) -> list[str]:
    """Return the ids in the key set."""
    found: list[str] = [key["kid"] for key in (await service.http.get("/.well-known/jwks.json")).json()["keys"]]
    return found


async def compromise(service: Service, kid: str) -> None:
    """Take a signing key out of use, as an operator does."""
    services = service.services
    spare = await services.signing_keys.generate(2)
    await service.within(lambda tx: services.key_acts.compromise(tx, [kid], spare, Actor("cli")))
    await service.within(services.signing_keys.poll)


async def rows_of(url: str, statement: Any) -> Any:
    """Run a statement that reads, and return its rows."""
    db = Database(url)
    try:
        return (await db.run(lambda tx: tx.execute(statement))).all()
    finally:
        await db.close()


async def write(url: str, statement: Any) -> None:
    """Run a statement that writes."""
    db = Database(url)
    try:
        await db.run(lambda tx: tx.execute(statement))
    finally:
        await db.close()


async def everything(url: str) -> list[Any]:
    """Return all rows of all tables."""
    return [await rows_of(url, select(table)) for table in metadata.sorted_tables]


def somebody_waits(url: str, *, while_it_runs: "subprocess.Popen[bytes]") -> bool:
    """Return as soon as a session of the database waits for a lock; False if the process ends before."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with psycopg.connect(plain(url), autocommit=True) as connection:
        while while_it_runs.poll() is None:
            if connection.execute(waiting).fetchone() != (0,):
                return True
            time.sleep(0.01)
    return False
