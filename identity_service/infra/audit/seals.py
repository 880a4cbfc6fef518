"""
What seals a row: a MAC over the seal before it and everything the row says, its place in the chain included.

The key is a data key, which lies in the database wrapped by the master key: rights on the database are not enough to
make a seal.
"""

import hmac
import json
from dataclasses import dataclass
from datetime import UTC
from enum import StrEnum
from typing import Any, final

from sqlalchemy import Row, select
from sqlalchemy.exc import DataError

from identity_service.infra.audit.events import RESTORED
from identity_service.infra.data_keys import DataKey, DataKeys
from identity_service.infra.database import Transaction
from identity_service.infra.tables import audit_chain

GENESIS = bytes(32)
"""What stands for the seal before the first one."""

UNREADABLE = (ValueError, TypeError, RecursionError, DataError)
"""What reading a row raises that holds a value which the service never writes, as somebody's hand may have done."""


class Wrong(StrEnum):
    """What can be wrong with a chain."""

    ALTERED = "altered"
    MISSING = "missing"
    MOVED = "moved"
    FORGED = "forged"
    CUT = "tail cut"
    REWRITTEN = "rewritten"
    BASE_MOVED = "base moved"
    HEAD_MOVED = "head moved"
    KEY_MISSING = "key missing"


@dataclass(frozen=True, slots=True)
class Fault:
    """The first place at which a chain does not hold, what is wrong there, and a sentence about it."""

    seq: int
    wrong: Wrong
    sentence: str


class ChainBroken(Exception):
    """The chain does not hold, so nothing may be built on it; `fault` says where."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"the audit chain is broken at {fault.seq} ({fault.wrong}): {fault.sentence}")
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Head:
    """The row of `audit_chain`: the newest seal, and the newest one that retention has removed (the base)."""

    seq: int
    mac: bytes
    base_seq: int
    base_mac: bytes
    base_kid: str | None
    base_proof: bytes | None


async def read_head(tx: Transaction, *, lock: bool = False) -> Head:
    """Return where the chain begins and ends, with `lock` so that nobody else moves it; raises ChainBroken."""
    c = audit_chain.c
    statement = select(c.seq, c.mac, c.base_seq, c.base_mac, c.base_kid, c.base_proof).where(c.id == 1)
    row = (await tx.execute(statement.with_for_update() if lock else statement)).first()
    if row is None:
        raise ChainBroken(Fault(0, Wrong.HEAD_MOVED, "the table audit_chain has lost its row"))
    return Head(**row._mapping)


def canonical(row: Row[Any], *, seq: int, kid: str) -> bytes:
    """
    Return everything a row says as JSON: members sorted, no spaces, ASCII, instants in UTC with microseconds.

    PostgreSQL and SQLite give back the same values, so a row has the same form on both.
    """
    content = {
        "id": row.id,
        "seq": seq,
        "kid": kid,
        "at": row.at.astimezone(UTC).isoformat(timespec="microseconds"),
        "event": row.event,
        "actor": row.actor,
        "target": row.target,
        "client_id": row.client_id,
        "network": row.network,
        "request_id": row.request_id,
        "occurrences": row.occurrences,
        "detail": row.detail,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


@final
class Seals:
    """Makes seals and checks them."""

    def __init__(self, keys: DataKeys) -> None:
        self._keys = keys

    @property
    def kid(self) -> str:
        """The id of the key that new seals are made with. Raises LookupError while no data keys are loaded."""
        return self._key.kid

    def seal(self, previous: bytes, row: Row[Any], *, seq: int, kid: str) -> bytes:
        """Return the seal (32 bytes) of a row that stands at `seq`, after the one sealed as `previous`."""
        return self._mac(b"row", previous, canonical(row, seq=seq, kid=kid), kid=kid)

    def holds(self, previous: bytes, row: Row[Any], *, seq: int) -> bool:
        """Return whether a row's seal is right for that place; False for one whose key is unknown."""
        if not isinstance(row.mac, bytes) or row.mac_kid not in self._key.kids:
            return False
        return hmac.compare_digest(self.seal(previous, row, seq=seq, kid=row.mac_kid), row.mac)

    def resumes(self, previous: bytes, row: Row[Any]) -> bool:
        """
        Return whether a row goes on behind places that a restore has lost, `previous` being the last seal that is left.

        Its own seal has that one in it, and its place: who can only write to the database cannot make such a row, nor
        use an old one to hide that something else is missing.
        """
        return row.event == RESTORED and self.holds(previous, row, seq=row.seq)

    def prove_base(self, seq: int, mac: bytes, *, kid: str) -> bytes:
        """Return the proof that it was the service that removed everything up to `seq`."""
        return self._mac(b"base", mac, str(seq).encode("ascii"), kid=kid)

    def knows(self, kid: str | None) -> bool:
        """Return whether a key is among the data keys."""
        return kid in self._key.kids

    def fault_of_base(self, head: Head) -> Fault | None:
        """Return what is wrong with the place where the chain begins, if anything."""
        if head.base_seq == 0 and head.base_mac == GENESIS and head.base_proof is None:
            return None
        if head.base_kid is not None and not self.knows(head.base_kid):
            return Fault(head.base_seq, Wrong.KEY_MISSING, key_missing(head.base_kid))
        if head.base_kid is not None and head.base_proof is not None:
            proof = self.prove_base(head.base_seq, head.base_mac, kid=head.base_kid)
            if hmac.compare_digest(proof, head.base_proof):
                return None
        return Fault(
            head.base_seq,
            Wrong.BASE_MOVED,
            f"everything up to {head.base_seq} is said to be removed, but not by retention: the proof is wrong",
        )

    @property
    def _key(self) -> DataKey:
        try:
            return self._keys["audit"]
        except KeyError:
            raise LookupError("the data key of the audit trail is not loaded: load the data keys first") from None

    def _mac(self, what: bytes, previous: bytes, content: bytes, *, kid: str) -> bytes:
        return self._key.mac(b"|".join((what, previous, content)), kid=kid)


def key_missing(kid: str) -> str:
    """Return the sentence for a seal whose key is not there."""
    return f"it was sealed with the audit key {kid}, which is not in the table data_keys (or the row names a wrong key)"
