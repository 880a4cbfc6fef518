"""
Deadlines that a busy machine does not break.

In production a Redis that owes an answer for a tenth of a second is left alone, and the limits are stricter for a
minute; who waits for a lock or for a connection hears 503 after two seconds. A busy machine stands still for longer
than that now and then, and a test about something else would meet an outage that there is none of.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final
from unittest.mock import patch

from identity_service.infra.database import Database, engine
from identity_service.main import services
from identity_service.settings import Settings

PATIENCE: Final = 30
"""Seconds for what takes milliseconds."""
_LONG_WAITS: Final = {
    "lock_timeout": str(PATIENCE * 1000),
    "statement_timeout": str(PATIENCE * 1000),
    "idle_in_transaction_session_timeout": "0",  # a transaction that a test holds lasts until the test ends it
}


def patient_database(url: str, **given: Any) -> Database:
    """Return a database that waits for locks and for connections for as long as any machine may take."""
    options = {**_LONG_WAITS, **given.pop("options", {})}
    with patch.object(engine, "_CONNECT_TIMEOUT", PATIENCE), patch.object(engine, "_BUSY_TIMEOUT", PATIENCE):
        return Database(url, **{"pool_timeout": PATIENCE, "patience": 2 * PATIENCE, **given}, options=options)


@contextmanager
def patience(settings: Settings) -> Iterator[None]:
    """Let a service that is built of these settings meanwhile wait for PostgreSQL and Redis in the same way."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(services, "Database", patient_database))
        if settings.redis_url.get_secret_value():  # who has no Redis does without its client
            from identity_service.infra.ratelimit import shared

            longer = {"redis_client": {"timeout": PATIENCE}, "RedisLimiter": {"deadline": PATIENCE}}
            for name, words in longer.items():
                patches.enter_context(patch.object(shared, name, partial(getattr(shared, name), **words)))
        yield
