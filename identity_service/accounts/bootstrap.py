"""
The first operator: made with a secret that whoever installs the service chose, and that works once.

A fresh installation has no credentials at all (ASVS 6.3.2). What was used is remembered for ever, by its digest: not in
the user it made, who may be deleted, and not in the process, which may be restarted with the same secret.
"""

import hashlib
import hmac
from typing import final

from sqlalchemy import select

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock, Secret
from identity_service.infra.tables import spent_bootstrap_secrets

_EVERY_SECRET = bytes(32)
"""Stands among the digests of spent secrets for every secret there could be; it is the digest of none that is known."""


async def close_bootstrap(tx: Transaction, clock: Clock) -> None:
    """
    Let no secret make a first operator here any more.

    For a restored database: which secrets were spent in the time that is lost, nobody knows.
    """
    entry = tx.insert(spent_bootstrap_secrets).values(digest=_EVERY_SECRET, spent_at=clock.now())
    await tx.execute(entry.on_conflict_do_nothing())


@final
class Bootstrap:
    """Knows the secret of this installation, and whether it was used."""

    def __init__(self, clock: Clock, secret: Secret) -> None:
        self._clock = clock
        self._digest = _digest(secret)

    def proves(self, presented: Secret) -> bool:
        """Return whether a secret is ours, in a time that does not depend on it; asks no database."""
        return hmac.compare_digest(self._digest, _digest(presented))

    async def spent(self, tx: Transaction) -> bool:
        """Return whether the secret was used, or none works here any more."""
        c = spent_bootstrap_secrets.c
        used = select(c.digest).where(c.digest.in_([self._digest, _EVERY_SECRET])).limit(1)
        return (await tx.execute(used)).first() is not None

    async def spend(self, tx: Transaction) -> bool:
        """Use the secret up, once and for all; return False if it was used before, or is being used right now."""
        entry = tx.insert(spent_bootstrap_secrets).values(digest=self._digest, spent_at=self._clock.now())
        noted = await tx.execute(entry.on_conflict_do_nothing().returning(spent_bootstrap_secrets.c.digest))
        return noted.first() is not None


def _digest(secret: Secret) -> bytes:
    return hashlib.sha256(secret.reveal().encode("utf-8", "surrogatepass")).digest()
