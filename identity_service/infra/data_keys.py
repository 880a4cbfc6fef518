"""
The service's own random keys, one for each purpose: refresh tokens, the digests of retries, names hashed in limits and
audit, API keys, mailed links, the cursors of lists, and the seals of the audit trail.

They are created once, wrapped by a master key, and stay: changing the master key renews only the wrapping, so it
invalidates no token.
"""

import hmac
import os
from collections.abc import Mapping, Sequence
from typing import Any, final

import structlog
from sqlalchemy import Row, insert, select, update

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.runtime.envelope import MasterKeys, Wrapped
from identity_service.infra.tables import data_keys

log = structlog.get_logger(__name__)

PURPOSES = ("refresh", "retry", "names", "api_keys", "mail", "cursors", "audit")


@final
class DataKey:
    """One purpose's keys: the newest makes MACs, all of them are known by their id."""

    __slots__ = ("_keys", "kid")

    def __init__(self, kid: str, keys: Mapping[str, bytes]) -> None:
        self.kid = kid
        self._keys = dict(keys)

    @property
    def kids(self) -> tuple[str, ...]:
        """The ids of every key of this purpose."""
        return tuple(self._keys)

    def mac(self, message: bytes, *, kid: str | None = None) -> bytes:
        """Return HMAC-SHA256 (32 bytes) of `message` under the named key, or the newest; raises KeyError if unknown."""
        return hmac.digest(self._keys[kid or self.kid], message, "sha256")


@final
class DataKeys:
    """Every data key this process could unwrap, by purpose. Load it before the first request."""

    def __init__(self, master: MasterKeys, clock: Clock) -> None:
        self._master = master
        self._clock = clock
        self._by_purpose: dict[str, DataKey] = {}

    def __getitem__(self, purpose: str) -> DataKey:
        return self._by_purpose[purpose]

    def hash_name(self, name: str) -> str:
        """Return the keyed hash that stands for a name wherever one is kept: people type passwords into name fields."""
        return self["names"].mac(name.encode("utf-8", "surrogatepass"))[:16].hex()

    @staticmethod
    def _context(purpose: str, kid: str) -> str:
        return f"{purpose}|{kid}"

    async def load(self, tx: Transaction) -> list[str]:
        """
        Read every data key and create those that do not exist yet, under the schedule lock; return their purposes.

        Raises MasterKeyError when the database holds keys that our master keys cannot unwrap: making new ones would
        silently end every session.
        """
        rows, missing = await self._rows(tx), set[str]()
        if set(PURPOSES) - {row.purpose for row in rows}:
            await tx.lock("schedule")
            missing = set(PURPOSES) - {row.purpose for row in await self._rows(tx)}
            for purpose in sorted(missing):
                await self._create(tx, purpose)
            rows = await self._rows(tx)
        found: dict[str, dict[str, bytes]] = {}
        for row in rows:  # oldest first, so the last one of a purpose is its newest
            plain = self._master.unwrap(Wrapped(row.kek_id, row.wrapped), context=self._context(row.purpose, row.kid))
            found.setdefault(row.purpose, {})[row.kid] = plain
        self._by_purpose = {purpose: DataKey(list(keys)[-1], keys) for purpose, keys in found.items()}
        return sorted(missing)

    async def rewrap(self, tx: Transaction) -> int:
        """Wrap every data key with the first master key; return how many were not yet."""
        await tx.lock("schedule")
        rows = [row for row in await self._rows(tx) if row.kek_id != self._master.first_id]
        for row in rows:
            context = self._context(row.purpose, row.kid)
            renewed = self._master.rewrap(Wrapped(row.kek_id, row.wrapped), context=context)
            await tx.execute(
                update(data_keys)
                .where(data_keys.c.purpose == row.purpose, data_keys.c.kid == row.kid)
                .values(kek_id=renewed.kek_id, wrapped=renewed.blob)
            )
        return len(rows)

    async def _create(self, tx: Transaction, purpose: str) -> None:
        kid = os.urandom(4).hex()
        wrapped = self._master.wrap(os.urandom(32), context=self._context(purpose, kid))
        await tx.execute(
            insert(data_keys).values(
                purpose=purpose, kid=kid, kek_id=wrapped.kek_id, wrapped=wrapped.blob, created_at=self._clock.now()
            )
        )
        log.info("data_key.created", purpose=purpose, kid=kid)

    @staticmethod
    async def _rows(tx: Transaction) -> Sequence[Row[Any]]:
        statement = select(data_keys).order_by(data_keys.c.created_at, data_keys.c.kid)
        return (await tx.execute(statement)).all()
