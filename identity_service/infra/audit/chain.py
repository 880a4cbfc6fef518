"""Sealing rows into the chain, and removing the oldest when they have been kept for long enough."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, final

from sqlalchemy import Row, bindparam, delete, func, select, update

from identity_service.infra.audit.events import RESTORED, SCHEDULE
from identity_service.infra.audit.seals import (
    UNREADABLE,
    ChainBroken,
    Fault,
    Head,
    Seals,
    Wrong,
    key_missing,
    read_head,
)
from identity_service.infra.audit.trail import AuditTrail
from identity_service.infra.audit.verification import Anchor, Verification
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import audit_chain, audit_events

_c = audit_events.c


@dataclass(frozen=True, slots=True)
class Sealed:
    """How many rows were sealed, and the newest seal. Kept elsewhere, `seq` and `mac` show when later rows are cut."""

    count: int
    seq: int
    mac: bytes


class Standing(Enum):
    """How the chain stands to an anchor."""

    HELD = "it has that very seal"
    PRUNED = "retention has removed that row"
    BEYOND = "it ends before that place, or has lost it"
    OTHER = "it has another seal there"


@final
class AuditChain:
    """
    Chains the trail's rows, in batches and after they were committed: who writes a row waits for nobody.

    The order of the chain is the order of sealing. A transaction that commits late leaves a row with a smaller id than
    some that are sealed already; it is simply sealed later. The chain shows what was changed after it was sealed, so
    rows are to be sealed within seconds.
    """

    def __init__(self, clock: Clock, data_keys: DataKeys) -> None:
        self._clock = clock
        self._seals = Seals(data_keys)
        self._trail = AuditTrail(clock)

    async def seal(self, tx: Transaction, batch: int = 1000) -> Sealed:
        """
        Seal the oldest rows that are not sealed yet, `batch` at most; return how many, and the newest seal.

        One sealer works at a time; a second one waits. Who calls it logs what it returns once that is committed.
        Raises ChainBroken where rows stand past the end of the chain, or where one that waits cannot be read, and
        LookupError while no data keys are loaded.
        """
        head = await self._end(tx)
        waiting = select(audit_events).where(_c.seq.is_(None)).order_by(_c.id).limit(batch)
        seq, mac, kid, sealed = head.seq, head.mac, self._seals.kid, []
        try:
            for row in (await tx.execute(waiting)).all():
                mac = self._seals.seal(mac, row, seq=seq + 1, kid=kid)
                seq += 1
                sealed.append({"row": row.id, "place": seq, "seal": mac})
        except UNREADABLE:
            sentence = "a row that waits for its seal holds a value that the service never writes"
            raise ChainBroken(Fault(seq + 1, Wrong.FORGED, sentence)) from None
        if not sealed:
            return Sealed(0, seq, mac)
        await tx.execute(
            update(audit_events)
            .where(_c.id == bindparam("row"))
            .values(seq=bindparam("place"), mac=bindparam("seal"), mac_kid=kid),
            sealed,
        )
        await tx.execute(update(audit_chain).values(seq=seq, mac=mac, sealed_at=self._clock.now()))
        return Sealed(len(sealed), seq, mac)

    async def resume(
        self, tx: Transaction, place: int, *, actor: str, detail: Mapping[str, Any], known_to: int | None
    ) -> Sealed:
        """
        Go on at `place` after a restore, and say so in the row that stands there; return its seal.

        The rows that were sealed after the backup are gone, and their seals may be known elsewhere. So no place is used
        a second time: `place` is behind all that can ever have been reached. `known_to` is the last place that is
        known to be lost. Rows of the backup that were not sealed yet are sealed behind this one.

        Raises ChainBroken as `seal` does, ValueError for a place that the chain has reached.
        """
        head = await self._end(tx)
        if place <= max(head.seq, known_to or 0) + 1:
            raise ValueError(f"the chain has reached {max(head.seq, known_to or 0)} already")
        lost = {"after": head.seq, "known_to": known_to}
        row_id = await self._trail.record(tx, RESTORED, origin=None, actor=actor, detail={**detail, **lost})
        row = (await tx.execute(select(audit_events).where(_c.id == row_id))).one()
        kid = self._seals.kid
        mac = self._seals.seal(head.mac, row, seq=place, kid=kid)
        await tx.execute(update(audit_events).where(_c.id == row_id).values(seq=place, mac=mac, mac_kid=kid))
        await tx.execute(update(audit_chain).values(seq=place, mac=mac, sealed_at=self._clock.now()))
        return Sealed(1, place, mac)

    async def newest(self, tx: Transaction) -> Anchor:
        """Return the newest seal, for people to keep where the database's administrators cannot reach."""
        head = await read_head(tx)
        return Anchor(head.seq, head.mac)

    async def compare(self, tx: Transaction, anchor: Anchor) -> Standing:
        """Return how the chain stands to an anchor, going by that one row; raises ChainBroken."""
        head = await read_head(tx)
        if anchor.seq < head.base_seq:
            return Standing.PRUNED
        held = (await tx.execute(select(_c.mac).where(_c.seq == anchor.seq))).scalar()
        if anchor.seq == head.base_seq:
            held = head.base_mac
        if held is None:
            return Standing.BEYOND
        return Standing.HELD if hmac.compare_digest(held, anchor.mac) else Standing.OTHER

    async def retain(self, tx: Transaction, older_than: datetime, batch: int = 1000) -> int:
        """
        Remove the oldest sealed rows as long as they are older than that, `batch` at most; return how many.

        The chain then begins after them, and the proof that it was us who moved its beginning takes the master key.
        The trail says that rows were removed.
        Only rows whose seals hold are removed, or else a row could be got rid of by making it look old. Raises
        ChainBroken where the very next one does not hold: then nothing is removed any more until somebody has looked.
        """
        head = await read_head(tx, lock=True)
        if (fault := self._seals.fault_of_base(head)) is not None:
            raise ChainBroken(fault)
        sealed = select(audit_events).where(_c.seq > head.base_seq, _c.seq <= head.seq)
        seq, mac = head.base_seq, head.base_mac
        try:
            rows = (await tx.execute(sealed.order_by(_c.seq).limit(batch))).all()
        except UNREADABLE:
            sentence = "this row, or one soon behind it, holds a value that the service never writes"
            raise ChainBroken(Fault(seq + 1, Wrong.ALTERED, sentence)) from None
        for row in rows:
            if (fault := self._fault(row, seq, mac)) is not None:
                if seq == head.base_seq:
                    raise ChainBroken(fault)
                break
            if row.at >= older_than:
                break
            seq, mac = row.seq, row.mac
        if seq == head.base_seq:
            return 0
        return await self._remove(tx, head, seq, mac)

    def verification(self, *anchors: Anchor, page: int = 1000) -> Verification:
        """Return a walk along the whole chain, `page` rows at a time, which has not begun."""
        return Verification(self._seals, anchors, page)

    @staticmethod
    async def _end(tx: Transaction) -> Head:
        """Return where the chain begins and ends, so that nobody else moves it; raises ChainBroken."""
        head = await read_head(tx, lock=True)
        newest = (await tx.execute(select(func.max(_c.seq)))).scalar_one() or 0
        if newest > head.seq:
            sentence = f"the newest seal is said to be {head.seq}, but there is a row at {newest}"
            raise ChainBroken(Fault(head.seq + 1, Wrong.HEAD_MOVED, sentence))
        return head

    def _fault(self, row: Row[Any], seq: int, mac: bytes) -> Fault | None:
        if row.seq != seq + 1 and not self._seals.resumes(mac, row):
            return Fault(seq + 1, Wrong.MISSING, "there is no such row")
        if self._seals.holds(mac, row, seq=row.seq):
            return None
        if row.mac_kid is not None and not self._seals.knows(row.mac_kid):
            return Fault(row.seq, Wrong.KEY_MISSING, key_missing(row.mac_kid))
        return Fault(row.seq, Wrong.ALTERED, "the row does not match its seal")

    async def _remove(self, tx: Transaction, head: Head, seq: int, mac: bytes) -> int:
        """Remove the rows from the beginning of the chain to `seq`, and say so in the trail itself."""
        kid = self._seals.kid
        proof = self._seals.prove_base(seq, mac, kid=kid)
        gone = await tx.execute(delete(audit_events).where(_c.seq > head.base_seq, _c.seq <= seq))
        await tx.execute(update(audit_chain).values(base_seq=seq, base_mac=mac, base_kid=kid, base_proof=proof))
        detail = {"rows": gone.rowcount, "up_to": seq}
        await self._trail.record(tx, "audit.pruned", origin=None, actor=SCHEDULE, detail=detail)
        return gone.rowcount
