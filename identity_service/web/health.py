"""Liveness and readiness, for the platform."""

import asyncio
import json
from collections.abc import Sequence
from typing import final

from sqlalchemy.exc import SQLAlchemyError

from identity_service.infra.database import Database, DatabaseUnavailable, PoolExhausted
from identity_service.infra.installation import Installation, read_installation
from identity_service.infra.tables import OLDEST_SCHEMA_REVISION
from identity_service.oauth.signing_keys import SigningKeys
from identity_service.web.asgi import JSON, NO_STORE, Receive, Reply, Scope, Send

_FRESH = 1.0  # seconds that an answer of the database serves, so that probes cannot load it
_PATIENCE = 2.5  # seconds that a probe waits for it; longer than a request does for a connection
_STALE = 10.0  # seconds after which "busy" means "away"


@final
class Drain:
    """Whether this process is leaving: it still answers, and nobody new shall be sent to it."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun = False


@final
class Liveness:
    """`GET /healthz`: this process answers. Never asks the database, whose outage no restart would mend."""

    methods: Sequence[str] = ("GET", "HEAD")
    quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one probe."""
        await Reply(200, b'{"status":"ok"}', (JSON, *NO_STORE)).send(send, head=scope["method"] == "HEAD")


@final
class Readiness:
    """
    `GET /readyz`: the database answers, its schema is new enough, a signing key is loaded, and nobody is leaving.

    Nor is it a restored copy, which may have come under a running server.
    """

    methods: Sequence[str] = ("GET", "HEAD")
    quiet = True

    def __init__(self, db: Database, keys: SigningKeys, drain: Drain) -> None:
        self._db = db
        self._keys = keys
        self._drain = drain
        self._answered_at = float("-inf")
        self._database = "unreachable"
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one probe: 200, or 503 with what is missing."""
        if self._drain.begun:
            checks = {"server": "draining"}
        else:
            checks = {"database": await self._check_database(), "signing_key": "ok" if self._keys.ready else "none"}
        ready = all(state == "ok" for state in checks.values())
        body = json.dumps({"status": "ready" if ready else "not ready", **checks}).encode("ascii")
        await Reply(200 if ready else 503, body, (JSON, *NO_STORE)).send(send, head=scope["method"] == "HEAD")

    async def _check_database(self) -> str:
        """Return how the database is; however many probes there are, it is asked once at a time."""
        now = asyncio.get_running_loop().time()
        if now - self._answered_at >= _FRESH:
            asking = self._asking
            if asking is None or asking.done():
                asking = self._asking = asyncio.create_task(self._ask())
            await asyncio.wait({asking}, timeout=_PATIENCE)
            if not asking.done():
                return "unreachable"
            asking.result()
        return self._database

    async def _ask(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            revision = await self._db.revision()
            async with self._db.transaction() as tx:
                found = await read_installation(tx)
        except PoolExhausted:  # busy is not away: the last answer stands, for a while
            if now - self._answered_at > _STALE:
                self._database = "unreachable"
        except (DatabaseUnavailable, SQLAlchemyError):
            self._database, self._answered_at = "unreachable", now
        else:
            self._database, self._answered_at = _state(revision, found), now


def _state(revision: str | None, found: Installation | None) -> str:
    if revision is None or revision < OLDEST_SCHEMA_REVISION:
        return "schema too old"
    return "ok" if found is None or found.at_home else "restored or copied"
