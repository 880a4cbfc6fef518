"""Starting, rotating and revoking families: everything that touches their table."""

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, final

from sqlalchemy import Row, Select, delete, insert, select, update

from identity_service.accounts.access import ScopeList
from identity_service.accounts.clients import Client
from identity_service.accounts.refresh_families.sessions import Session, Sessions, origin_values
from identity_service.accounts.refresh_families.statements import LIVE, ROTATE
from identity_service.accounts.refresh_families.token import NONCE_BYTES, RefreshTokens
from identity_service.accounts.refresh_families.verdict import FamilyState, GenuineToken, Verdict, judge
from identity_service.accounts.users import SignInFacts
from identity_service.infra.audit import Origin
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction, TransactionConflict
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.tables import clients, refresh_families, users

MOST_FAMILIES = 50
_KEPT_FAMILIES = 2 * MOST_FAMILIES


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
    displaced: int = 0
    """How many older families gave way to this one as it started."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A refresh token that yields nothing; `ended` is set when this call revoked the family."""

    verdict: Verdict
    family_id: uuid.UUID | None = None
    user_id: uuid.UUID | None = None
    ended: bool = False


@final
class RefreshFamilies:
    """Starts, rotates and revokes families."""

    def __init__(self, clock: Clock, keys: DataKeys, lifetimes: Lifetimes) -> None:
        self._clock = clock
        self._tokens = RefreshTokens(keys)
        self._lifetimes = lifetimes
        self._sessions = Sessions(clock)

    def read(self, presented: Secret) -> GenuineToken | None:
        """Return what a refresh token says, or None for one we never handed out; costs no query."""
        return self._tokens.read(presented)

    async def start(
        self,
        tx: Transaction,
        facts: SignInFacts,
        client: Client,
        *,
        scope: ScopeList,
        audiences: Audiences,
        amr: Sequence[str],
        origin: Origin | None = None,
    ) -> Family | None:
        """
        Start a family for a user whose password was right, or return None if that is no longer worth anything.

        `origin` is where the sign-in came from, for the list in which its owner recognises it.
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
        # Held, so that it cannot be deleted before the family is stored.
        stored = select(clients.c.epoch, clients.c.enabled).where(clients.c.id == client.id)
        owner = (await tx.execute(stored.with_for_update(read=True, key_share=True))).first()
        if user is None or not user.enabled or user.epoch != facts.epoch:
            return None
        if owner is None or not owner.enabled or owner.epoch != client.epoch:
            return None
        idle, absolute = self._lifetimes.of(client)
        displaced = await self._make_room(tx, facts.user_id, client.id, now)
        family_id, nonce, kid = new_id(), os.urandom(NONCE_BYTES), self._tokens.newest_kid
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
                **origin_values(origin),
            )
        )
        token = self._tokens.write(family_id, 0, nonce, kid)
        return Family(family_id, facts.user_id, token, scope, audiences, now, tuple(amr), user.role, displaced)

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
        digest = self._tokens.retry_digest(genuine.family_id, retry_key)
        nonce, kid = os.urandom(NONCE_BYTES), self._tokens.newest_kid
        row = await tx.fetch_hot(
            ROTATE,
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
            token = self._tokens.write(genuine.family_id, generation, nonce, kid)
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
            token = self._tokens.write(row.id, row.generation, row.nonce, row.mac_kid)
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

    async def live(self, tx: Transaction, family_id: uuid.UUID, *, user_id: uuid.UUID, client_id: str | None) -> bool:
        """
        Return whether a family, its user and its client are all still good; what a bearer of its tokens needs.

        `client_id` is whom the token was issued to; None for one that another client got by exchange (RFC 8693).
        """
        now = self._clock.now()
        row = await tx.fetch_hot(LIVE, {"id": family_id, "user": user_id, "client": client_id, "now": now})
        return row is not None

    async def sessions(self, tx: Transaction, user_id: uuid.UUID, current: uuid.UUID | None = None) -> list[Session]:
        """Return a user's live sessions, the most recently used first; `current` is the family of who asks."""
        return await self._sessions.of(tx, user_id, current)

    async def end(self, tx: Transaction, user_id: uuid.UUID, session_id: uuid.UUID) -> bool:
        """End one session of a user; return False if they have no such live one."""
        return await self._sessions.end(tx, user_id, session_id)

    async def keep(self, tx: Transaction, family_id: uuid.UUID, user_id: uuid.UUID, *, epoch: int) -> bool:
        """Let one live family outlive the step that has just moved its user's epoch on; return whether it did."""
        return await self._sessions.keep(tx, family_id, user_id, epoch=epoch)

    async def count(self, tx: Transaction) -> int:
        """Return how many live families there are."""
        return await self._sessions.count(tx)

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

    async def _make_room(self, tx: Transaction, user_id: uuid.UUID, client_id: str, now: datetime) -> int:
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
        return len(surplus)

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


def _with_owners() -> Select[Any]:
    """Return a SELECT of families with their owners as they are now, which locks the family's row and no other."""
    user_epoch = select(users.c.epoch).where(users.c.id == refresh_families.c.user_id, users.c.enabled)
    client_epoch = select(clients.c.epoch).where(clients.c.id == refresh_families.c.client_id, clients.c.enabled)
    role = select(users.c.role).where(users.c.id == refresh_families.c.user_id)
    return select(
        refresh_families,
        user_epoch.scalar_subquery().label("user_epoch_now"),
        client_epoch.scalar_subquery().label("client_epoch_now"),
        role.scalar_subquery().label("role"),
    ).with_for_update()


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
