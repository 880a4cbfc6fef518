"""The judge: what a genuine refresh token is that did not rotate, as a pure function."""

import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class GenuineToken:
    """A refresh token whose MAC is right: this service once handed it out."""

    family_id: uuid.UUID
    generation: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class FamilyState:
    """What a family's row says, and what its user and client are now; an epoch is None while its owner is disabled."""

    client_id: str
    generation: int
    nonce: bytes
    parent_nonce: bytes | None
    retry_digest: bytes | None
    rotated_at: datetime
    idle_expires_at: datetime
    absolute_expires_at: datetime
    revoked: bool
    user_epoch: int
    client_epoch: int
    user_epoch_now: int | None
    client_epoch_now: int | None

    def expired(self, now: datetime) -> bool:
        """Whether the family is past its idle or its absolute end."""
        return now >= self.idle_expires_at or now >= self.absolute_expires_at


class Verdict(StrEnum):
    """What a refresh token is that did not rotate. The words are those of logs, metrics and the audit trail."""

    RETRIED = "retried"
    UNKNOWN = "unknown"
    REVOKED = "revoked"
    FOREIGN_CLIENT = "foreign_client"
    AHEAD = "ahead_of_record"
    EXPIRED = "expired"
    KEY_REUSED = "idempotency_key_reused"
    REUSE = "reuse_detected"
    CURRENT = "current"

    @property
    def ends_family(self) -> bool:
        """Whether the family is revoked for it."""
        return self in (Verdict.FOREIGN_CLIENT, Verdict.AHEAD, Verdict.REUSE)


def judge(
    family: FamilyState | None,
    presented: GenuineToken,
    *,
    client_id: str,
    retry_digest: bytes | None,
    retry_window: int,
    now: datetime,
) -> Verdict:
    """
    Say what a genuine token that did not rotate is; the first rule that matches wins.

    `retry_window` is in seconds. `CURRENT` means that the token is good after all: the row changed between the two
    statements, and the rotation is to be tried again. A token that the row has never seen is told also where an epoch
    has moved on: putting a restored database right moves every epoch, and these tokens show how much was lost.
    """
    if family is None:
        return Verdict.UNKNOWN
    if family.revoked:
        return Verdict.REVOKED
    foreign = family.client_id != client_id
    same_generation = presented.generation == family.generation
    unseen = presented.generation > family.generation or (same_generation and presented.nonce != family.nonce)
    if unseen and not foreign:
        return Verdict.AHEAD
    if family.user_epoch != family.user_epoch_now or family.client_epoch != family.client_epoch_now:
        return Verdict.REVOKED
    if foreign:
        return Verdict.FOREIGN_CLIENT
    same_key = retry_digest is not None and retry_digest == family.retry_digest
    if same_generation:
        if family.expired(now):
            return Verdict.EXPIRED
        return Verdict.KEY_REUSED if same_key else Verdict.CURRENT
    predecessor = presented.generation == family.generation - 1 and presented.nonce == family.parent_nonce
    elapsed = max(timedelta(0), now - family.rotated_at)
    if predecessor and (same_key or elapsed < timedelta(seconds=retry_window)):
        return Verdict.EXPIRED if family.expired(now) else Verdict.RETRIED
    return Verdict.REUSE
