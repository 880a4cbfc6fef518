"""
One replica: the service as it serves in production, on the clock that everybody shares.

A program: `python -m tests.rotation.replica`. The first line of standard input is a `Launch` in JSON; when the input
ends, because the driver is gone, so does the replica. Its database sessions carry its name, and it tells on the page
where it serves and when it polls, so that a driver knows whom it sees waiting, and who has read what.
"""

import functools
import json
import os
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import event

from identity_service.cli.serving import server_config
from identity_service.infra import telemetry
from identity_service.infra.database import Transaction
from identity_service.main import Services, create_app
from identity_service.oauth.signing_keys import Plan
from identity_service.settings import Settings
from tests.rotation.clock import Page, SharedClock, Slot
from tests.support.service import test_settings

LEAD = 2100
"""
Seconds a key is published before it signs: twice what a cache may hold, and five minutes for what a poll may take.

A replica publishes a new key when it has read it, and a poll of a twentieth of a second is half a minute of this time.
"""
PERIOD = 3600
"""Seconds a key signs, unless a rotation is brought forward; the shortest the settings allow."""
POLL = 0.05
"""Real seconds between two looks at the key schedule."""
TOKEN_LIFE = 600
"""Seconds an access token lives where its client says nothing else."""


@dataclass(frozen=True)
class Launch:
    """What a replica is told."""

    page: str
    slot: int
    name: str
    database_url: str
    issuer: str


def settings_of(database_url: str, issuer: str) -> Settings:
    """Return the settings that the replicas, and the driver's own hands on their database, are built with."""
    return test_settings(
        database_url,
        issuer=issuer,
        access_token_ttl=TOKEN_LIFE,
        signing_key_lead=LEAD,
        signing_key_period=PERIOD,
        key_poll=POLL,
        hash_wait=30,
    )


def name_sessions(services: Services, name: str) -> None:
    """Give the database sessions a name to be told apart by in `pg_stat_activity`."""

    @event.listens_for(services.db.engine.sync_engine, "do_connect")
    def _on_connect(_dialect: object, _record: object, _words: object, options: dict[str, Any]) -> None:
        options["application_name"] = name


def tell_polls(services: Services, slot: Slot) -> None:
    """Count on the page the polls that begin, in their transaction and before they read, and those that have ended."""
    poll = services.signing_keys.poll

    @functools.wraps(poll)
    async def told(tx: Transaction) -> Plan:
        slot.begun += 1
        owed = await poll(tx)
        slot.ended = slot.begun
        return owed

    services.signing_keys.poll = told  # type: ignore[method-assign]  # looks on, and changes nothing


class _Server(uvicorn.Server):
    """Tells where it serves as soon as it does."""

    def __init__(self, config: uvicorn.Config, slot: Slot) -> None:
        super().__init__(config)
        self._slot = slot

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self._slot.port = sockets[0].getsockname()[1]


def _end_with_the_driver() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serve until killed, or until the driver is gone."""
    launch = Launch(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    page = Page(Path(launch.page))
    slot = Slot(page, launch.slot)
    telemetry.configure_logging(level="WARNING")
    app = create_app(settings_of(launch.database_url, launch.issuer), clock=SharedClock(page))
    name_sessions(app.state.services, launch.name)
    tell_polls(app.state.services, slot)
    _Server(server_config(app), slot).run([socket.create_server(("127.0.0.1", 0))])


if __name__ == "__main__":
    main()
