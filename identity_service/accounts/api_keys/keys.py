"""Making, checking and ending keys: everything that touches their table."""

import hmac
import uuid
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, final

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, update

from identity_service.accounts.api_keys import spelling
from identity_service.accounts.api_keys.key import (
    ApiKey,
    InvalidKey,
    KeyRefused,
    LiveKey,
    NewKey,
    Owner,
    PresentedKey,
    TooManyKeys,
)
from identity_service.accounts.api_keys.networks import is_within, parse_networks
from identity_service.accounts.api_keys.statements import ALIVE, HELD, Held
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Transaction
from identity_service.infra.parts import in_parts
from identity_service.infra.runtime import Clock, Secret
from identity_service.infra.tables import api_keys, clients, users

_MOST_KEYS = 20  # live ones of one owner
_MOST_DEAD_KEYS = 4 * _MOST_KEYS
_KEPT = timedelta(days=90)
_USE_NOTED_EVERY = timedelta(minutes=1)
_NOT_FOR_KEYS = frozenset(("openid", "offline_access"))  # they are about a person who signs in
_SHOWN = tuple(api_keys.c[name] for name in ApiKey.__slots__)


@final
class ApiKeys:
    """Makes, checks and ends API keys."""

    def __init__(self, clock: Clock, keys: DataKeys, *, max_ttl: int | None) -> None:
        """`max_ttl` is in seconds: how long a key may live at most; None leaves it to whoever makes it."""
        self._clock = clock
        self._keys = keys
        self._max_ttl = timedelta(seconds=max_ttl) if max_ttl is not None else None

    # -- using a key --------------------------------------------------------------------------------------------------

    def read(self, text: Secret) -> PresentedKey | None:
        """Return what a text says that may be a key, or None for one we cannot have handed out; costs no query."""
        return spelling.read(text)

    async def check(self, tx: Transaction, presented: PresentedKey, *, network: str) -> LiveKey | KeyRefused:
        """
        Return the key if it is good and may be used from `network` (an IPv4 address or an IPv6 /64), or why not.

        One query. The secret is compared first: who has not got it learns nothing about the key.
        """
        row = await tx.fetch_hot(HELD, {"id": presented.key_id})
        if row is None:
            return KeyRefused("unknown")
        held, now, replaced = Held(*row), self._clock.now(), False
        if not hmac.compare_digest(self._digest(presented.text, held.mac_kid), held.digest):
            if held.previous_digest is None or not hmac.compare_digest(
                self._digest(presented.text, held.previous_mac_kid), held.previous_digest
            ):
                return KeyRefused("wrong_secret")
            replaced = True
        if held.revoked_at is not None:
            return KeyRefused("revoked")
        # What a secret is exchanged for must not outlive it, so a replaced one ends what it is shown for sooner.
        ends = [end for end in (held.expires_at, held.previous_expires_at if replaced else None) if end is not None]
        if any(end <= now for end in ends):
            return KeyRefused("expired")
        if not held.owner_enabled:
            return KeyRefused("owner_disabled")
        if held.networks and not is_within(network, held.networks):
            return KeyRefused("network")
        return LiveKey(
            id=presented.key_id,
            user_id=held.user_id,
            client_id=held.client_id,
            scope=frozenset(held.scope.split()),
            expires_at=min(ends, default=None),
            last_used_at=held.last_used_at,
            role=held.role,
            owner_scope=tuple((held.owner_scope or "").split()),
            owner_epoch=held.owner_epoch,
        )

    async def note_use(self, tx: Transaction, key: LiveKey) -> None:
        """
        Note that a key is in use, at most once a minute.

        Who finds the row locked leaves it alone: whoever holds it writes the same, and nobody shall wait for them.
        """
        now = self._clock.now()
        if key.last_used_at is not None and now - key.last_used_at < _USE_NOTED_EVERY:
            return
        c = api_keys.c
        due = (
            select(c.id)
            .where(c.id == key.id, or_(c.last_used_at.is_(None), c.last_used_at <= now - _USE_NOTED_EVERY))
            .with_for_update(skip_locked=True, key_share=True)
        )
        await tx.execute(update(api_keys).where(c.id == due.scalar_subquery()).values(last_used_at=now))

    async def alive(self, tx: Transaction, key_id: str, owner: Owner, epoch: int | None) -> bool:
        """
        Return whether a key of `owner` is still good, and with it the tokens it was exchanged for at their `epoch`.

        The owner's epoch moves on when they are disabled or sign out everywhere: the key comes back, old tokens do not.
        """
        if epoch is None:
            return False
        user, client = (owner, None) if isinstance(owner, uuid.UUID) else (None, owner)
        wanted = {"id": key_id, "now": self._clock.now(), "user": user, "client": client, "epoch": epoch}
        return await tx.fetch_hot(ALIVE, wanted) is not None

    # -- managing keys ------------------------------------------------------------------------------------------------

    async def create(
        self,
        tx: Transaction,
        *,
        owner: Owner,
        name: str,
        scope: Collection[str],
        expires_at: datetime | None,
        networks: Sequence[str],
    ) -> NewKey:
        """
        Make a key. Whether the caller may hand on `scope` is for the caller's door to say.

        The owner's row is locked, so that keys made at once are counted one after the other. Raises LookupError for an
        owner that is not there, InvalidKey, TooManyKeys.
        """
        if not scope or not _NOT_FOR_KEYS.isdisjoint(scope):
            raise InvalidKey("scope", "at least one scope, and none that is about a person who signs in")
        try:
            permitted = parse_networks(networks)
        except ValueError as error:
            raise InvalidKey("networks", str(error)) from None
        now = self._clock.now()
        end = self._end(expires_at, now)
        await self._lock(tx, owner)
        await self._make_room(tx, owner, now)
        key_id = spelling.new_id()
        stored, key_text = self._new_secret(key_id)
        made = await tx.execute(
            insert(api_keys)
            .values(
                id=key_id,
                user_id=owner if isinstance(owner, uuid.UUID) else None,
                client_id=owner if isinstance(owner, str) else None,
                name=name,
                scope=" ".join(sorted(set(scope))),
                networks=list(permitted),
                created_at=now,
                expires_at=end,
                **stored,
            )
            .returning(*_SHOWN)
        )
        return NewKey(_key(made.one()), key_text)

    async def list(self, tx: Transaction, owner: Owner) -> Sequence[ApiKey]:
        """Return an owner's keys that were not revoked, newest first; expired ones are among them for a while."""
        found = await tx.execute(select(*_SHOWN).where(_of(owner), api_keys.c.revoked_at.is_(None)))
        return sorted(map(_key, found), key=lambda key: (key.created_at, key.id), reverse=True)

    async def get(self, tx: Transaction, key_id: str, owner: Owner | None) -> ApiKey | None:
        """Return a key that was not revoked, if it is `owner`'s; an operator names no owner and gets anybody's."""
        if not spelling.is_id(key_id):
            return None
        row = (await tx.execute(select(*_SHOWN).where(*_standing(key_id, owner)))).first()
        return _key(row) if row is not None else None

    async def rotate(self, tx: Transaction, key_id: str, owner: Owner, overlap: timedelta) -> NewKey | None:
        """
        Give a key a new secret; the one it has works for `overlap` longer, the one before that no more.

        Returns None if `owner` has no such key, or it was revoked. Raises InvalidKey for a key that has expired: its
        end does not move.
        """
        if not spelling.is_id(key_id):
            return None
        now, c = self._clock.now(), api_keys.c
        stored, key_text = self._new_secret(key_id)
        changed = await tx.execute(
            update(api_keys)
            .where(*_standing(key_id, owner), or_(c.expires_at.is_(None), c.expires_at > now))
            .values(
                previous_digest=c.digest,
                previous_mac_kid=c.mac_kid,
                previous_expires_at=now + overlap,
                rotated_at=now,
                **stored,
            )
            .returning(*_SHOWN)
        )
        if (row := changed.first()) is not None:
            return NewKey(_key(row), key_text)
        if await self.get(tx, key_id, owner) is not None:
            raise InvalidKey("expires_at", "the key has expired")
        return None

    async def revoke(self, tx: Transaction, key_id: str, owner: Owner) -> bool:
        """End a key at once; return False if `owner` has no such key, or it was revoked before."""
        if not spelling.is_id(key_id):
            return False
        ended = await tx.execute(
            update(api_keys)
            .where(*_standing(key_id, owner))
            .values(revoked_at=self._clock.now())
            .returning(api_keys.c.id)
        )
        return ended.first() is not None

    async def revoke_all(self, tx: Transaction, owner: Owner) -> int:
        """End every key of an owner at once; return how many were not ended before."""
        ended = await tx.execute(
            update(api_keys).where(_of(owner), api_keys.c.revoked_at.is_(None)).values(revoked_at=self._clock.now())
        )
        return ended.rowcount

    # -- after a restore ----------------------------------------------------------------------------------------------

    async def suspend_all(
        self, tx: Transaction, *, at: datetime, earlier: Collection[datetime], for_good: Collection[str]
    ) -> int:
        """
        Suspend every live key as of the instant `at`, for nobody knows which were revoked in the time that is lost.

        A suspended key is a revoked one whose instant is `at`: what knows nothing of restores refuses it as well.
        Those that an earlier restore had suspended, at one of the instants `earlier`, stay so. Those that are known to
        have ended, `for_good`, are revoked a moment before, and so never given back. Returns how many are suspended.
        """
        c = api_keys.c
        unrevoked = or_(c.revoked_at.is_(None), c.revoked_at.in_(list(earlier)))
        for key_id in for_good:
            ended = update(api_keys).where(c.id == key_id, unrevoked)
            await tx.execute(ended.values(revoked_at=at - timedelta(microseconds=1)))
        suspended = 0
        async for part in in_parts(tx, c.id):
            live = (part, unrevoked, or_(c.expires_at.is_(None), c.expires_at > at))
            suspended += (await tx.execute(update(api_keys).where(*live).values(revoked_at=at))).rowcount
        return suspended

    async def suspended(self, tx: Transaction, *, at: datetime, epoch: int) -> Sequence[ApiKey]:
        """Return the keys that a restore has suspended and that can be given back, by their owners."""
        found = await tx.execute(select(*_SHOWN).where(*self._can_return(at, epoch)))
        return sorted(map(_key, found), key=lambda key: (str(key.owner), key.created_at, key.id))

    async def give_back(
        self,
        tx: Transaction,
        *,
        at: datetime,
        epoch: int,
        ids: Collection[str] | None = None,
        after: str = "",
        batch: int = 500,
    ) -> Sequence[ApiKey]:
        """
        Let suspended keys be good again, those of `ids` or all, a batch behind the id `after`; return them by id.

        `at` and `epoch` are the restore's. Whose epoch has moved on since, by another password, a disabled account, a
        deleted one, gets none back: then a key that was live would have ended, or might have.
        """
        c, suspended = api_keys.c, self._can_return(at, epoch)
        chosen = select(c.id).where(*suspended, c.id > after).order_by(c.id).limit(batch)
        if ids is not None:
            chosen = chosen.where(c.id.in_(list(ids)))
        order = list((await tx.execute(chosen)).scalars())  # the database's own, by which the next batch begins
        returning = update(api_keys).where(c.id.in_(order), *suspended).values(revoked_at=None).returning(*_SHOWN)
        returned = {row.id: _key(row) for row in await tx.execute(returning)}
        return [returned[key_id] for key_id in order if key_id in returned]

    def _can_return(self, at: datetime, epoch: int) -> tuple[ColumnElement[bool], ...]:
        c, u, o = api_keys.c, users.c, clients.c
        of_user = select(u.id).where(u.id == c.user_id, u.epoch == epoch, u.enabled, u.deleted_at.is_(None)).exists()
        of_client = select(o.id).where(o.id == c.client_id, o.epoch == epoch, o.enabled).exists()
        unexpired = or_(c.expires_at.is_(None), c.expires_at > self._clock.now())
        return c.revoked_at == at, unexpired, or_(of_user, of_client)

    # -- what is done without being asked -----------------------------------------------------------------------------

    async def expiring(self, tx: Transaction, *, within: timedelta, batch: int) -> Sequence[ApiKey]:
        """
        Return at most `batch` people's keys that end `within` a time; each is returned once, and never again.

        Keys of services are not among them: nobody reads a service's mail. Nor are those of people whose address is
        unproven: it may be a stranger's, and what a key is called is its owner's choice.
        """
        c, now = api_keys.c, self._clock.now()
        untold = and_(c.revoked_at.is_(None), c.expiry_warned_at.is_(None), c.expires_at > now)
        due = (
            select(c.id)
            .join(users, users.c.id == c.user_id)
            .where(untold, c.expires_at <= now + within, users.c.enabled, users.c.deleted_at.is_(None))
            .where(users.c.email_verified_at.is_not(None))
            .order_by(c.expires_at)
            .limit(batch)
        )
        told = await tx.execute(
            update(api_keys)
            .where(c.id.in_(due.scalar_subquery()), untold)
            .values(expiry_warned_at=now)
            .returning(*_SHOWN)
        )
        return [_key(row) for row in told]

    async def clean_up(self, tx: Transaction, *, batch: int) -> int:
        """Delete at most `batch` keys that were revoked or expired 90 days ago; return how many."""
        c, long_ago = api_keys.c, self._clock.now() - _KEPT
        doomed = (
            select(c.id)
            .where(or_(c.revoked_at <= long_ago, c.expires_at <= long_ago))
            .order_by(func.coalesce(c.revoked_at, c.expires_at))
            .limit(batch)
        )
        return (await tx.execute(delete(api_keys).where(c.id.in_(doomed.scalar_subquery())))).rowcount

    # -- the inside ---------------------------------------------------------------------------------------------------

    def _digest(self, key_text: Secret, kid: str) -> bytes:
        return self._keys["api_keys"].mac(spelling.digested(key_text), kid=kid)

    def _new_secret(self, key_id: str) -> tuple[dict[str, Any], Secret]:
        """Return what is stored of a new secret, and the key's text."""
        key_text, kid = spelling.new_text(key_id), self._keys["api_keys"].kid
        stored = {"digest": self._digest(key_text, kid), "mac_kid": kid, "last4": spelling.last4(key_text)}
        return stored, key_text

    def _end(self, asked: datetime | None, now: datetime) -> datetime | None:
        """Return when a new key ends; raises InvalidKey."""
        if asked is not None and asked <= now:
            raise InvalidKey("expires_at", "must be in the future")
        if self._max_ttl is None:
            return asked
        if asked is not None and asked > now + self._max_ttl:
            raise InvalidKey("expires_at", f"a key lives for {self._max_ttl.total_seconds():.0f} seconds at most")
        return asked or now + self._max_ttl

    @staticmethod
    async def _lock(tx: Transaction, owner: Owner) -> None:
        ids = users.c.id if isinstance(owner, uuid.UUID) else clients.c.id
        if (await tx.execute(select(ids).where(ids == owner).with_for_update(key_share=True))).first() is None:
            raise LookupError("there is no such owner")

    @staticmethod
    async def _make_room(tx: Transaction, owner: Owner, now: datetime) -> None:
        """
        Raise TooManyKeys if the owner can have no further key.

        Dead keys beyond a number are deleted, so that who makes and revokes keys for ever does not fill the table.
        """
        c = api_keys.c
        live = and_(c.revoked_at.is_(None), or_(c.expires_at.is_(None), c.expires_at > now))
        counted = await tx.execute(select(func.count()).select_from(api_keys).where(_of(owner), live))
        if counted.scalar_one() >= _MOST_KEYS:
            raise TooManyKeys
        dead = select(c.id).where(_of(owner), or_(c.revoked_at.is_not(None), c.expires_at <= now))
        surplus = dead.order_by(c.created_at.desc(), c.id).offset(_MOST_DEAD_KEYS)
        await tx.execute(delete(api_keys).where(c.id.in_(surplus.scalar_subquery())))


def _of(owner: Owner) -> ColumnElement[bool]:
    return api_keys.c.user_id == owner if isinstance(owner, uuid.UUID) else api_keys.c.client_id == owner


def _standing(key_id: str, owner: Owner | None) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions of a key that was not revoked; the owner is one of them."""
    found = (api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    return found if owner is None else (*found, _of(owner))


def _key(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    return ApiKey(**{**values, "scope": tuple(values["scope"].split()), "networks": tuple(values["networks"])})
