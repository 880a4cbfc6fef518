"""
Refresh families: chains of refresh tokens, one row each, however often they are refreshed.

A sign-in starts a family; each refresh moves it one generation on. A token names its family, generation and a random
nonce, and carries a MAC under a key that is not in the database in the clear. So garbage is refused without a query,
a dump holds no usable token, and the current token can be computed again from the row for a permitted retry.

A token presented twice has two holders and nobody can tell which one is the thief, so the whole family is revoked
(RFC 9700 §4.14.2). Whoever restores a database meets tokens it never handed out; the nonce tells those apart.
"""

import hmac
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, final

from sqlalchemy import (
    BigInteger,
    LargeBinary,
    Row,
    Select,
    String,
    Uuid,
    bindparam,
    delete,
    insert,
    select,
    text,
    update,
)

from identity_service.accounts.access import ScopeList
from identity_service.accounts.clients import Client
from identity_service.accounts.users import SignInFacts
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction, TransactionConflict
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.runtime.ids import decode_token, encode_token
from identity_service.infra.tables import UtcDateTime, clients, refresh_families, users

TOKEN_PREFIX = "rt_"  # noqa: S105  # what every refresh token begins with, not one
MOST_FAMILIES = 50
_KEPT_FAMILIES = 2 * MOST_FAMILIES
_NONCE_BYTES = 8
_CLAIM = struct.Struct(">16sQ8s")
_MAC_BYTES = 32


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
    """What became of a presented refresh token. The words are those of logs, metrics and the audit trail."""

    ROTATED = "rotated"
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
    statements, and the rotation is to be tried again.
    """
    if family is None:
        return Verdict.UNKNOWN
    if family.revoked or family.user_epoch != family.user_epoch_now or family.client_epoch != family.client_epoch_now:
        return Verdict.REVOKED
    if family.client_id != client_id:
        return Verdict.FOREIGN_CLIENT
    same_generation = presented.generation == family.generation
    if presented.generation > family.generation or (same_generation and presented.nonce != family.nonce):
        return Verdict.AHEAD
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


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long families live, in seconds, where a client has no lifetimes of its own."""

    idle: int = 14 * 86400
    absolute: int = 30 * 86400

    def of(self, client: Client) -> tuple[timedelta, timedelta]:
        """Return (idle, absolute) for a client; the idle time never exceeds the absolute one."""
        absolute = client.refresh_absolute_ttl or self.absolute
        idle = min(client.refresh_idle_ttl or self.idle, absolute)
        return timedelta(seconds=idle), timedelta(seconds=absolute)


@dataclass(frozen=True, slots=True)
class Audiences:
    """What a family may ask tokens for (RFC 8707 §2): what it gets unasked, and everything it may ask for."""

    default: tuple[str, ...]
    allowed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A live family, as the issuing of an access token needs it, with its current token."""

    id: uuid.UUID
    user_id: uuid.UUID
    token: Secret
    scope: ScopeList
    audiences: Audiences
    auth_time: datetime
    amr: tuple[str, ...]
    role: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A refresh token that yields nothing; `ended` is set when this call revoked the family."""

    verdict: Verdict
    family_id: uuid.UUID | None = None
    user_id: uuid.UUID | None = None
    ended: bool = False


# The one statement of the hot path. The client, the epochs and the lifetimes are part of the condition, so nothing is
# read first and written later. The table has no alias: SQLite refuses one in RETURNING.
_ROTATE = (
    text(
        """
        UPDATE refresh_families
        SET generation = generation + 1, parent_nonce = nonce, nonce = :new_nonce, mac_kid = :kid,
            retry_digest = :digest, rotated_at = :now,
            idle_expires_at = CASE WHEN :idle_end < absolute_expires_at THEN :idle_end ELSE absolute_expires_at END
        WHERE id = :id AND client_id = :client AND generation = :generation AND nonce = :nonce
          AND revoked_at IS NULL AND idle_expires_at > :now AND absolute_expires_at > :now
          AND (retry_digest = :digest) IS NOT TRUE
          AND user_epoch = (SELECT u.epoch FROM users u WHERE u.id = refresh_families.user_id AND u.enabled)
          AND client_epoch = (SELECT c.epoch FROM clients c WHERE c.id = refresh_families.client_id AND c.enabled)
        RETURNING generation, user_id, scope, audiences, auth_time, amr,
                  (SELECT u.role FROM users u WHERE u.id = refresh_families.user_id) AS role
        """
    )
    .bindparams(
        bindparam("new_nonce", type_=LargeBinary()),
        bindparam("kid", type_=String()),
        bindparam("digest", type_=LargeBinary()),
        bindparam("now", type_=UtcDateTime()),
        bindparam("idle_end", type_=UtcDateTime()),
        bindparam("id", type_=Uuid()),
        bindparam("client", type_=String()),
        bindparam("generation", type_=BigInteger()),
        bindparam("nonce", type_=LargeBinary()),
    )
    .columns(
        generation=BigInteger(),
        user_id=Uuid(),
        scope=String(),
        audiences=refresh_families.c.audiences.type,
        auth_time=UtcDateTime(),
        amr=String(),
        role=String(),
    )
)


@final
class RefreshFamilies:
    """Starts, rotates and revokes families."""

    def __init__(self, clock: Clock, keys: DataKeys, lifetimes: Lifetimes) -> None:
        self._clock = clock
        self._keys = keys
        self._lifetimes = lifetimes

    # -- tokens ---------------------------------------------------------------------------------------------------

    def read(self, presented: Secret) -> GenuineToken | None:
        """Return what a refresh token says, or None for one we never handed out; costs no query."""
        payload = decode_token(TOKEN_PREFIX, _CLAIM.size + _MAC_BYTES, presented.reveal())
        if payload is None:
            return None
        claim, mac = payload[: _CLAIM.size], payload[_CLAIM.size :]
        key = self._keys["refresh"]
        if not any(hmac.compare_digest(key.mac(claim, kid=kid), mac) for kid in key.kids):
            return None
        family, generation, nonce = _CLAIM.unpack(claim)
        return GenuineToken(uuid.UUID(bytes=family), generation, nonce)

    def _write(self, family_id: uuid.UUID, generation: int, nonce: bytes, kid: str) -> Secret:
        claim = _CLAIM.pack(family_id.bytes, generation, nonce)
        return Secret(encode_token(TOKEN_PREFIX, claim + self._keys["refresh"].mac(claim, kid=kid)))

    def _retry_digest(self, family_id: uuid.UUID, retry_key: Secret | None) -> bytes | None:
        if retry_key is None:
            return None
        return self._keys["retry"].mac(family_id.bytes + b"|" + retry_key.reveal().encode("ascii"))

    # -- the life of a family -------------------------------------------------------------------------------------

    async def start(
        self,
        tx: Transaction,
        facts: SignInFacts,
        client: Client,
        *,
        scope: ScopeList,
        audiences: Audiences,
        amr: Sequence[str],
    ) -> Family | None:
        """
        Start a family for a user whose password was right, or return None if that is no longer worth anything.

        The user's row is locked and everything that could have changed since the password was looked at is checked
        again, uncached: a sign-in in flight does not survive a disable or a password change.
        """
        now = self._clock.now()
        user = (
            await tx.execute(
                select(users.c.epoch, users.c.enabled, users.c.role)
                .where(users.c.id == facts.user_id)
                .with_for_update(key_share=True)
            )
        ).first()
        owner = (await tx.execute(select(clients.c.epoch, clients.c.enabled).where(clients.c.id == client.id))).first()
        if user is None or not user.enabled or user.epoch != facts.epoch:
            return None
        if owner is None or not owner.enabled or owner.epoch != client.epoch:
            return None
        idle, absolute = self._lifetimes.of(client)
        await self._make_room(tx, facts.user_id, client.id, now)
        family_id, nonce, kid = new_id(), os.urandom(_NONCE_BYTES), self._keys["refresh"].kid
        await tx.execute(
            insert(refresh_families).values(
                id=family_id,
                user_id=facts.user_id,
                client_id=client.id,
                user_epoch=user.epoch,
                client_epoch=owner.epoch,
                generation=0,
                nonce=nonce,
                mac_kid=kid,
                scope=" ".join(scope),
                audiences={"default": list(audiences.default), "allowed": list(audiences.allowed)},
                auth_time=now,
                amr=" ".join(amr),
                created_at=now,
                rotated_at=now,
                idle_expires_at=now + idle,
                absolute_expires_at=now + absolute,
            )
        )
        token = self._write(family_id, 0, nonce, kid)
        return Family(family_id, facts.user_id, token, scope, audiences, now, tuple(amr), user.role)

    async def rotate(
        self, tx: Transaction, presented: Secret, client: Client, *, retry_key: Secret | None
    ) -> Family | Rejected:
        """
        Exchange a refresh token for its successor, or say why not.

        A retry that is permitted gets the same successor again and writes nothing. Reuse is returned, not raised:
        raising would undo the revocation it has just made. Raises TransactionConflict when the row changed meanwhile
        and the rotation may be tried again.
        """
        genuine = self.read(presented)
        if genuine is None:
            return Rejected(Verdict.UNKNOWN)
        now = self._clock.now()
        idle, _ = self._lifetimes.of(client)
        digest = self._retry_digest(genuine.family_id, retry_key)
        nonce, kid = os.urandom(_NONCE_BYTES), self._keys["refresh"].kid
        row = await tx.fetch_hot(
            _ROTATE,
            {
                "new_nonce": nonce,
                "kid": kid,
                "digest": digest,
                "now": now,
                "idle_end": now + idle,
                "id": genuine.family_id,
                "client": client.id,
                "generation": genuine.generation,
                "nonce": genuine.nonce,
            },
        )
        if row is not None:
            generation, user_id, scope, audiences, auth_time, amr, role = row
            token = self._write(genuine.family_id, generation, nonce, kid)
            return _family(genuine.family_id, user_id, token, scope, audiences, auth_time, amr, role)
        return await self._settle(tx, genuine, client, digest, now)

    async def _settle(
        self, tx: Transaction, genuine: GenuineToken, client: Client, digest: bytes | None, now: datetime
    ) -> Family | Rejected:
        """Judge a token that did not rotate, holding its family's row, and do what the verdict demands."""
        row = (await tx.execute(_with_owners().where(refresh_families.c.id == genuine.family_id))).first()
        verdict = judge(
            _state(row) if row is not None else None,
            genuine,
            client_id=client.id,
            retry_digest=digest,
            retry_window=client.refresh_retry_window,
            now=now,
        )
        if row is None:
            return Rejected(verdict)
        if verdict is Verdict.CURRENT:
            raise TransactionConflict("the family changed under the rotation")
        if verdict is Verdict.RETRIED:
            token = self._write(row.id, row.generation, row.nonce, row.mac_kid)
            return _family(row.id, row.user_id, token, row.scope, row.audiences, row.auth_time, row.amr, row.role)
        if verdict.ends_family:
            await self._revoke(tx, [row.id], verdict)
        return Rejected(verdict, row.id, row.user_id, ended=verdict.ends_family)

    async def revoke(self, tx: Transaction, presented: GenuineToken, client: Client) -> uuid.UUID | Rejected | None:
        """
        End the family a token belongs to, at its own client's wish (RFC 7009 §2.1); any generation of it will do.

        Returns the user's id if the family was live, None if there was nothing left to end, and Rejected, with
        nothing changed, if the token is another client's.
        """
        row = (
            await tx.execute(
                select(refresh_families.c.client_id, refresh_families.c.user_id, refresh_families.c.revoked_at)
                .where(refresh_families.c.id == presented.family_id)
                .with_for_update()
            )
        ).first()
        if row is None:
            return None
        if row.client_id != client.id:
            return Rejected(Verdict.FOREIGN_CLIENT, presented.family_id, row.user_id)
        if row.revoked_at is not None:
            return None
        await self._revoke(tx, [presented.family_id], Verdict.REVOKED)
        user_id: uuid.UUID = row.user_id
        return user_id

    async def live(self, tx: Transaction, family_id: uuid.UUID, client_id: str) -> bool:
        """Return whether a family, its user and its client are all still good; what a bearer of its tokens needs."""
        row = (await tx.execute(_with_owners(lock=False).where(refresh_families.c.id == family_id))).first()
        if row is None:
            return False
        family = _state(row)
        return (
            not family.revoked
            and family.client_id == client_id
            and family.user_epoch == family.user_epoch_now
            and family.client_epoch == family.client_epoch_now
        )

    async def clean_up(self, tx: Transaction, *, batch: int) -> int:
        """Delete at most `batch` families past their absolute end; no token of theirs can be of use to anybody."""
        doomed = (
            select(refresh_families.c.id)
            .where(refresh_families.c.absolute_expires_at <= self._clock.now())
            .order_by(refresh_families.c.absolute_expires_at)
            .limit(batch)
        )
        deleted = await tx.execute(delete(refresh_families).where(refresh_families.c.id.in_(doomed.scalar_subquery())))
        return deleted.rowcount

    async def _make_room(self, tx: Transaction, user_id: uuid.UUID, client_id: str, now: datetime) -> None:
        """
        Keep a user from collecting families at one client: the least recently used live one gives way.

        The user's row is locked, so no two sign-ins count at once. Dead rows beyond the cap are deleted: their tokens
        were refused before and are refused after, and the table stays bounded whatever a script does.
        """
        c = refresh_families.c
        rows = (
            await tx.execute(
                select(c.id, c.revoked_at, c.idle_expires_at, c.absolute_expires_at)
                .where(c.user_id == user_id, c.client_id == client_id)
                .order_by(c.rotated_at.desc(), c.id.desc())
            )
        ).all()
        live = [
            row.id for row in rows if row.revoked_at is None and now < min(row.idle_expires_at, row.absolute_expires_at)
        ]
        if surplus := live[MOST_FAMILIES - 1 :]:
            await self._revoke(tx, surplus, "capped")
        keep = set(live)
        dead = [row.id for row in rows if row.id not in keep]
        if buried := dead[_KEPT_FAMILIES - MOST_FAMILIES :]:
            await tx.execute(delete(refresh_families).where(c.id.in_(buried)))

    async def _revoke(self, tx: Transaction, family_ids: Sequence[uuid.UUID], reason: str) -> None:
        await tx.execute(
            update(refresh_families)
            .where(refresh_families.c.id.in_(family_ids), refresh_families.c.revoked_at.is_(None))
            .values(revoked_at=self._clock.now(), revoked_reason=str(reason))
        )


def _family(
    family_id: uuid.UUID,
    user_id: uuid.UUID,
    token: Secret,
    scope: str,
    audiences: Mapping[str, list[str]],
    auth_time: datetime,
    amr: str,
    role: str,
) -> Family:
    """Return a family from the values its row stores."""
    covered = Audiences(tuple(audiences["default"]), tuple(audiences["allowed"]))
    return Family(family_id, user_id, token, tuple(scope.split()), covered, auth_time, tuple(amr.split()), role)


def _with_owners(*, lock: bool = True) -> Select[Any]:
    """Return a SELECT of families with their owners as they are now, which locks the family's row and no other."""
    user_epoch = select(users.c.epoch).where(users.c.id == refresh_families.c.user_id, users.c.enabled)
    client_epoch = select(clients.c.epoch).where(clients.c.id == refresh_families.c.client_id, clients.c.enabled)
    role = select(users.c.role).where(users.c.id == refresh_families.c.user_id)
    statement = select(
        refresh_families,
        user_epoch.scalar_subquery().label("user_epoch_now"),
        client_epoch.scalar_subquery().label("client_epoch_now"),
        role.scalar_subquery().label("role"),
    )
    return statement.with_for_update() if lock else statement


def _state(row: Row[Any]) -> FamilyState:
    return FamilyState(
        client_id=row.client_id,
        generation=row.generation,
        nonce=row.nonce,
        parent_nonce=row.parent_nonce,
        retry_digest=row.retry_digest,
        rotated_at=row.rotated_at,
        idle_expires_at=row.idle_expires_at,
        absolute_expires_at=row.absolute_expires_at,
        revoked=row.revoked_at is not None,
        user_epoch=row.user_epoch,
        client_epoch=row.client_epoch,
        user_epoch_now=row.user_epoch_now,
        client_epoch_now=row.client_epoch_now,
    )
