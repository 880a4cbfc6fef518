"""What the metrics say about the signing keys, as one replica sees them."""

from collections.abc import Sequence
from datetime import datetime
from math import nan

from identity_service.infra.telemetry.metrics import (
    SIGNING_KEY_ACTIVATION,
    SIGNING_KEY_AGE,
    SIGNING_KEY_STEPS,
    SIGNING_KEYS,
    SIGNING_KEYS_READ,
    SIGNING_READY,
)
from identity_service.oauth.signing_keys.schedule import KeyRecord, KeyState, Plan, state

_SHOWN = (KeyState.NEXT, KeyState.ACTIVE, KeyState.RETIRING)


def show_schedule(records: Sequence[KeyRecord], owed: Plan, now: datetime, *, ready: bool) -> None:
    """
    Bring the metrics up to date after a look at the schedule; `ready` says whether this replica can sign.

    `owed` is what the schedule owes at this look. Somebody takes these steps at once, so it stays above 0 only where
    nobody can.
    """
    states = [(state(record, records, now), record) for record in records]
    for shown in _SHOWN:
        ages = [(now - record.published_at).total_seconds() for found, record in states if found is shown]
        SIGNING_KEYS.labels(shown).set(len(ages))
        SIGNING_KEY_AGE.labels(shown).set(max(ages, default=nan))
    waits = [(record.activates_at - now).total_seconds() for found, record in states if found is KeyState.NEXT]
    SIGNING_KEY_ACTIVATION.set(min(waits, default=nan))
    SIGNING_KEY_STEPS.set(len(owed.create) + len(owed.retire))
    SIGNING_KEYS_READ.set(now.timestamp())
    SIGNING_READY.set(int(ready))
