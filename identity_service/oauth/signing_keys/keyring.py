"""The keys of one process, and the steps of the schedule that all replicas share."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, final

import structlog
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pydantic_core import to_json
from sqlalchemy import insert, or_, select, update

from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.runtime.envelope import MasterKeyError, MasterKeys, Wrapped
from identity_service.infra.tables import signing_keys
from identity_service.infra.telemetry.metrics import SIGNING_KEYS_BROKEN
from identity_service.oauth.signing_keys.figures import show_schedule
from identity_service.oauth.signing_keys.material import (
    ALGORITHM,
    Document,
    LoadedKey,
    NewKey,
    b64url,
    generate,
    public_jwk,
)
from identity_service.oauth.signing_keys.schedule import KeyPolicy, KeyRecord, KeyState, Plan, plan, signer, state

log = structlog.get_logger(__name__)


class NoUsableKey(Exception):
    """No signing key is loaded; the service is not ready."""


@final
class SigningKeys:
    """The keys of this process, and the steps of the schedule that all replicas share."""

    def __init__(self, master: MasterKeys, clock: Clock, policy: KeyPolicy) -> None:
        self._master = master
        self._clock = clock
        self._policy = policy
        self._records: tuple[KeyRecord, ...] = ()
        self._loaded: dict[str, LoadedKey] = {}
        self._broken: frozenset[str] = frozenset()
        self._headers: dict[tuple[str, str], bytes] = {}
        self._jwks: tuple[tuple[str, ...], Document] = ((), Document.of({"keys": []}))

    # -- what the rest of the service asks of it ------------------------------------------------------------------

    def sign(self, claims: Mapping[str, Any], *, typ: str) -> str:
        """
        Return `claims` as a compact JWS (RFC 7515 §7.1), RS256, with the key that signs now.

        Costs one RSA signature (about 200 µs for 2048 bits). Raises NoUsableKey when there is none.
        """
        record = self._signer()
        if record is None:
            raise NoUsableKey
        header = self._headers.get((record.kid, typ))
        if header is None:
            fields = {"alg": ALGORITHM, "typ": typ, "kid": record.kid}
            header = b64url(to_json(fields))
            self._headers[(record.kid, typ)] = header
        signed = header + b"." + b64url(to_json(claims))
        signature = self._loaded[record.kid].private.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return (signed + b"." + b64url(signature)).decode("ascii")

    def public_key(self, kid: str) -> rsa.RSAPublicKey | None:
        """Return the published key of that id, or None: retired and compromised keys verify nothing here."""
        now = self._clock.now()
        for record in self._usable():
            if record.kid == kid and record.published(now):
                return self._loaded[kid].public
        return None

    def jwks(self) -> Document:
        """Return the key set (RFC 7517 §5) as bytes; built anew only when a key joins or leaves it."""
        now = self._clock.now()
        published = [record for record in self._usable() if record.published(now)]
        kids = tuple(record.kid for record in published)
        if kids != self._jwks[0]:
            self._jwks = (kids, Document.of({"keys": [dict(self._loaded[kid].jwk) for kid in kids]}))
        return self._jwks[1]

    @property
    def ready(self) -> bool:
        """Whether a token can be signed now."""
        return self._signer() is not None

    @property
    def records(self) -> tuple[KeyRecord, ...]:
        """The schedule as last read."""
        return self._records

    # -- the schedule ---------------------------------------------------------------------------------------------

    async def poll(self, tx: Transaction) -> Plan:
        """
        Read the schedule, load what is new, and return what the schedule owes now.

        A row that cannot be unwrapped is reported and left out, and the keys already loaded stay: a mistake with the
        master key must not stop a replica that works. Raises MasterKeyError only when nothing can be loaded at all.
        """
        records, wrapped = await self._read(tx)
        broken: dict[str, str] = {}
        for record in records:
            if record.kid in self._loaded or not record.published(self._clock.now()):
                continue
            try:
                self._loaded[record.kid] = self._load(record, wrapped[record.kid])
            except MasterKeyError as error:
                broken[record.kid] = str(error)
        for kid in broken.keys() - self._broken:
            log.error("signing_key.unusable", kid=kid, reason=broken[kid])
        if broken and not self._loaded:
            raise MasterKeyError(next(iter(broken.values())))
        self._broken = frozenset(broken)
        SIGNING_KEYS_BROKEN.set(len(broken))
        self._records = tuple(records)
        for kid in self._loaded.keys() - {record.kid for record in records}:
            del self._loaded[kid]
        now = self._clock.now()
        owed = plan(self._records, now, self._policy)
        show_schedule(self._records, owed, now, ready=self.ready)
        return owed

    async def prepare(self, owed: Plan) -> list[NewKey]:
        """Generate the keys a plan asks for, before any lock is taken."""
        return await self.generate(len(owed.create))

    async def generate(self, count: int) -> list[NewKey]:
        """Return new key material; a large key can take seconds, so it is made on a thread and under no lock."""
        return [await asyncio.to_thread(generate, self._policy.bits) for _ in range(count)]

    async def advance(self, tx: Transaction, spare: Sequence[NewKey]) -> Plan:
        """
        Take the steps that are due, under the schedule lock; return those that were taken.

        The schedule is read again under the lock, so of any number of replicas exactly one takes each step.
        """
        await tx.lock("schedule")
        records, _ = await self._read(tx)
        now = self._clock.now()
        owed = plan(records, now, self._policy)
        taken = replace(owed, create=owed.create[: len(spare)])
        for key, activates_at in zip(spare, taken.create, strict=False):
            await self._insert(tx, key, published_at=now, activates_at=activates_at)
        if taken.retire:
            await tx.execute(
                update(signing_keys)
                .where(signing_keys.c.kid.in_(taken.retire))
                .values(retires_at=now, removed_at=now + self._policy.afterlife)
            )
            log.info(
                "signing_key.retired", kids=list(taken.retire), removed_at=(now + self._policy.afterlife).isoformat()
            )
        return taken

    async def rotate(self, tx: Transaction) -> KeyRecord:
        """
        Bring the waiting key's activation forward to the earliest safe instant, and return it.

        It is never moved before every cache can have seen the key, and no second waiting key is made. Asking twice
        changes nothing. Raises NoUsableKey when no key is waiting.
        """
        await tx.lock("schedule")
        records, _ = await self._read(tx)
        now = self._clock.now()
        waiting = [record for record in records if state(record, records, now) is KeyState.NEXT]
        if not waiting:
            raise NoUsableKey
        chosen = min(waiting, key=lambda record: record.activates_at)
        earliest = max(now, chosen.published_at + self._policy.safe_lead)
        if earliest < chosen.activates_at:
            await tx.execute(update(signing_keys).where(signing_keys.c.kid == chosen.kid).values(activates_at=earliest))
            chosen = replace(chosen, activates_at=earliest)
        return chosen

    async def compromise(self, tx: Transaction, kids: Sequence[str], spare: Sequence[NewKey]) -> list[str]:
        """
        Take keys out of use for good; return the ids of those that were in use.

        If none is left to sign, the published next key takes over at once, since siblings already hold it; if that
        one is compromised too, `spare[0]`, which no sibling has seen yet, does. `spare[1]` waits as the next one.
        """
        await tx.lock("schedule")
        records, _ = await self._read(tx)
        now = self._clock.now()
        hit = [record.kid for record in records if record.kid in kids and record.compromised_at is None]
        await tx.execute(update(signing_keys).where(signing_keys.c.kid.in_(hit)).values(compromised_at=now))
        left = [record for record in records if record.published(now) and record.kid not in hit]
        fit = [record for record in left if record.activates_at <= now and record.retires_at is None]
        waiting = [record for record in left if record.activates_at > now]
        started, unused = max((record.activates_at for record in fit), default=now), list(spare)
        if not fit and waiting:
            successor = min(waiting, key=lambda record: record.activates_at)
            await tx.execute(update(signing_keys).where(signing_keys.c.kid == successor.kid).values(activates_at=now))
            waiting.remove(successor)
        elif not fit:
            await self._insert(tx, unused.pop(0), published_at=now, activates_at=now)
        if not waiting:
            activates_at = max(started + self._policy.period, now + self._policy.safe_lead)
            await self._insert(tx, unused.pop(0), published_at=now, activates_at=activates_at)
        return hit

    async def rewrap(self, tx: Transaction) -> int:
        """Wrap every private key with the first master key; return how many were not yet."""
        await tx.lock("schedule")
        rows = (await tx.execute(select(signing_keys).where(signing_keys.c.kek_id != self._master.first_id))).all()
        for row in rows:
            context = self._context(row.kid)
            renewed = self._master.rewrap(Wrapped(row.kek_id, row.wrapped), context=context)
            await tx.execute(
                update(signing_keys)
                .where(signing_keys.c.kid == row.kid)
                .values(kek_id=renewed.kek_id, wrapped=renewed.blob)
            )
        return len(rows)

    async def describe(self, tx: Transaction) -> list[tuple[KeyRecord, KeyState]]:
        """Return every key that ever was, oldest activation first, with its state now."""
        rows = (await tx.execute(select(signing_keys).order_by(signing_keys.c.activates_at))).all()
        records = [self._record(row) for row in rows]
        return [(record, state(record, records, self._clock.now())) for record in records]

    # -- rows and material ----------------------------------------------------------------------------------------

    def _signer(self) -> KeyRecord | None:
        """
        Return the key that signs now, by the whole schedule.

        Where this replica cannot load that one, another published key steps in, as long as it stays published for the
        life of any token it signs now; after that it is better to say that there is none.
        """
        now = self._clock.now()
        due = signer(self._records, now)
        if due is None or due.kid in self._loaded:
            return due
        lasting = now + self._policy.token + self._policy.leeway
        return signer([key for key in self._usable() if key.removed_at is None or key.removed_at >= lasting], now)

    def _usable(self) -> list[KeyRecord]:
        return [record for record in self._records if record.kid in self._loaded]

    @staticmethod
    def _context(kid: str) -> str:
        return f"signing|{kid}|{ALGORITHM}"

    @staticmethod
    def _record(row: Any) -> KeyRecord:
        return KeyRecord(
            kid=row.kid,
            public_jwk=row.public_jwk,
            published_at=row.published_at,
            activates_at=row.activates_at,
            retires_at=row.retires_at,
            removed_at=row.removed_at,
            compromised_at=row.compromised_at,
        )

    async def _read(self, tx: Transaction) -> tuple[list[KeyRecord], dict[str, Wrapped]]:
        """Return the rows that can still matter; retired ones are history."""
        now = self._clock.now()
        statement = (
            select(signing_keys)
            .where(signing_keys.c.compromised_at.is_(None))
            .where(or_(signing_keys.c.removed_at.is_(None), signing_keys.c.removed_at > now))
            .order_by(signing_keys.c.activates_at.desc(), signing_keys.c.kid)
        )
        rows = (await tx.execute(statement)).all()
        return [self._record(row) for row in rows], {row.kid: Wrapped(row.kek_id, row.wrapped) for row in rows}

    async def _insert(self, tx: Transaction, key: NewKey, *, published_at: datetime, activates_at: datetime) -> None:
        wrapped = self._master.wrap(key.der, context=self._context(key.kid))
        await tx.execute(
            insert(signing_keys).values(
                kid=key.kid,
                alg=ALGORITHM,
                public_jwk=dict(key.public_jwk),
                kek_id=wrapped.kek_id,
                wrapped=wrapped.blob,
                created_at=published_at,
                published_at=published_at,
                activates_at=activates_at,
            )
        )
        log.info("signing_key.created", kid=key.kid, activates_at=activates_at.isoformat())

    def _load(self, record: KeyRecord, wrapped: Wrapped) -> LoadedKey:
        """Unwrap a private key and make sure that what we publish for it is really its other half."""
        der = self._master.unwrap(wrapped, context=self._context(record.kid))
        # The consistency check costs tens of milliseconds; authenticated encryption already vouches for these bytes.
        private = serialization.load_der_private_key(der, password=None, unsafe_skip_rsa_key_validation=True)
        if not isinstance(private, rsa.RSAPrivateKey) or (jwk := public_jwk(private.public_key())) != record.public_jwk:
            raise MasterKeyError(f"the public half of signing key {record.kid} is not its own")
        return LoadedKey(private, private.public_key(), jwk)
