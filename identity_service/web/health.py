"""Liveness and readiness, for the platform."""

import asyncio
import json
from collections.abc import Sequence
from typing import final

from sqlalchemy.exc import SQLAlchemyError

from identity_service.infra.database import Database, DatabaseUnavailable, PoolExhausted
from identity_service.infra.tables import OLDEST_SCHEMA_REVISION
from identity_service.oauth.signing_keys import SigningKeys
from identity_service.web.asgi import JSON, NO_STORE, Receive, Reply, Scope, Send

_FRESH = 1.0  # seconds that an answer of the database serves, so that probes cannot load it


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
    """`GET /readyz`: the database answers, its schema is new enough, and a signing key is loaded."""

    methods: Sequence[str] = ("GET", "HEAD")
    quiet = True

    def __init__(self, db: Database, keys: SigningKeys) -> None:
        self._db = db
        self._keys = keys
        self._asked_at = float("-inf")
        self._database = "unreachable"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one probe: 200, or 503 with what is missing."""
        checks = {"database": await self._check_database(), "signing_key": "ok" if self._keys.ready else "none"}
        ready = all(state == "ok" for state in checks.values())
        body = json.dumps({"status": "ready" if ready else "not ready", **checks}).encode("ascii")
        await Reply(200 if ready else 503, body, (JSON, *NO_STORE)).send(send, head=scope["method"] == "HEAD")

    async def _check_database(self) -> str:
        now = asyncio.get_running_loop().time()
        if now - self._asked_at >= _FRESH:
            self._asked_at = now
            try:
                revision = await self._db.revision()
            except PoolExhausted:
                pass  # busy is not away: the last answer stands
            except (DatabaseUnavailable, SQLAlchemyError):
                self._database = "unreachable"
            else:
                new_enough = revision is not None and revision >= OLDEST_SCHEMA_REVISION
                self._database = "ok" if new_enough else "schema too old"
        return self._database
