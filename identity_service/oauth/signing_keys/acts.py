"""What operators do to signing keys, by command or over HTTP: the act, and the row that says who did it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.database import Transaction
from identity_service.oauth.signing_keys.keyring import SigningKeys
from identity_service.oauth.signing_keys.material import NewKey
from identity_service.oauth.signing_keys.schedule import KeyRecord


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: a user, a client or a command, from where, and through which client."""

    name: str
    origin: Origin | None = None
    client_id: str | None = None


@final
class KeyActs:
    """Rotation and compromise, audited."""

    def __init__(self, keys: SigningKeys, audit: AuditTrail) -> None:
        self._keys = keys
        self._audit = audit

    async def bring_forward(self, tx: Transaction, actor: Actor) -> KeyRecord:
        """Let the waiting key sign as early as is safe; return it. Raises NoUsableKey where none is waiting."""
        chosen = await self._keys.rotate(tx)
        await self._record(tx, "key.rotation_scheduled", chosen, actor)
        return chosen

    async def compromise(
        self, tx: Transaction, kids: Sequence[str], spare: Sequence[NewKey], actor: Actor
    ) -> list[str]:
        """Take keys out of use, and put others in their place as needed; return those that went."""
        gone = await self._keys.compromise(tx, kids, spare)
        records = {record.kid: record for record, _ in await self._keys.describe(tx)}
        for kid in gone:
            await self._record(tx, "key.compromised", records[kid], actor)
        for key in spare:
            if key.kid in records:
                await self._record(tx, "key.created", records[key.kid], actor)
        return gone

    async def _record(self, tx: Transaction, event: str, key: KeyRecord, actor: Actor) -> None:
        await self._audit.record(
            tx,
            event,
            origin=actor.origin,
            actor=actor.name,
            target=key.kid,
            client_id=actor.client_id,
            detail={"activates_at": key.activates_at.isoformat()},
        )
