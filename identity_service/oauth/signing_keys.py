"""
The life of a signing key: next → active → retiring → retired, or compromised at any time; and the JWKS.

Every instant is stored on the key and never computed again from settings, so a changed setting cannot strand a token.
A key is published long before it signs and stays published long after, so a verifier whose cache is as old as our
headers allow never meets a token it cannot check (RFC 7517; the waiting times are `KeyPolicy`).

Replicas hold the keys in memory. A replica signs with the uncompromised published key whose activation came last, by
its own clock: a rotation happens at its instant even if nobody polls, and the old key is retired afterwards, when some
replica sees that its successor is active.
"""

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, final

import structlog
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pydantic_core import to_json
from sqlalchemy import insert, or_, select, update

from identity_service.infra import telemetry
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.runtime.envelope import MasterKeyError, MasterKeys, Wrapped
from identity_service.infra.tables import signing_keys

log = structlog.get_logger(__name__)

ALGORITHM = "RS256"


class KeyState(StrEnum):
    """Where a key stands in its life."""

    NEXT = "next"
    ACTIVE = "active"
    RETIRING = "retiring"
    RETIRED = "retired"
    COMPROMISED = "compromised"


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """How long keys wait and work. Only decisions yet to be made use it; instants already stored stand."""

    bits: int = 2048
    lead: timedelta = timedelta(hours=24)
    """How long a key is published before it signs; never less than twice `cache`."""
    period: timedelta = timedelta(days=30)
    """How long a key signs."""
    cache: timedelta = timedelta(seconds=900)
    """The longest a well-behaved cache may hold the JWKS: max-age + stale-while-revalidate of our answer."""
    token: timedelta = timedelta(seconds=3600)
    """The longest life any client's access tokens may be given."""
    leeway: timedelta = timedelta(seconds=30)
    skew: timedelta = timedelta(seconds=120)

    @property
    def safe_lead(self) -> timedelta:
        """The lead that is really kept."""
        return max(self.lead, 2 * self.cache)

    @property
    def afterlife(self) -> timedelta:
        """How long a key stays published after it stopped signing."""
        return self.token + self.leeway + self.cache + self.skew


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One row of the schedule, without the private key."""

    kid: str
    public_jwk: Mapping[str, str]
    published_at: datetime
    activates_at: datetime
    retires_at: datetime | None = None
    removed_at: datetime | None = None
    compromised_at: datetime | None = None

    def published(self, now: datetime) -> bool:
        """Whether the key stands in the JWKS."""
        return self.compromised_at is None and (self.removed_at is None or self.removed_at > now)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the schedule owes at an instant: keys to create, and keys whose successor has become active."""

    create: tuple[datetime, ...] = ()
    retire: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.create or self.retire)


def signer(records: Iterable[KeyRecord], now: datetime) -> KeyRecord | None:
    """
    Return the key that signs at `now`: of the published ones, the one that was activated last.

    Where none is due yet, it is the one that is due first: a clock may be behind the one that activated a key, by as
    much as measuring it can be wrong, and a key that verifiers can have is better than none or a new one.
    """
    published = [record for record in records if record.published(now)]
    able = [record for record in published if record.activates_at <= now]
    if not able:
        return min(published, key=lambda record: (record.activates_at, record.kid), default=None)
    return max(able, key=lambda record: (record.activates_at, record.kid))


def state(record: KeyRecord, records: Iterable[KeyRecord], now: datetime) -> KeyState:
    """Return where `record` stands among `records` at `now`."""
    if record.compromised_at is not None:
        return KeyState.COMPROMISED
    if not record.published(now):
        return KeyState.RETIRED
    if record is signer(records, now):
        return KeyState.ACTIVE
    return KeyState.NEXT if record.activates_at > now else KeyState.RETIRING


def plan(records: Sequence[KeyRecord], now: datetime, policy: KeyPolicy) -> Plan:
    """
    Return what is to be done at `now`, as a pure function of the stored schedule.

    There is always one key that signs and one that waits, published; on an empty table the first key signs at once.
    """
    active = signer(records, now)
    create = []
    if active is None:
        create.append(now)
    if not any(record is not active and record.published(now) and record.activates_at > now for record in records):
        started = active.activates_at if active else now
        create.append(max(started + policy.period, now + policy.safe_lead))
    retire = [
        record.kid
        for record in records
        if record is not active and record.published(now) and record.activates_at <= now and record.retires_at is None
    ]
    return Plan(tuple(create), tuple(retire))


@dataclass(frozen=True, slots=True)
class NewKey:
    """Key material that no row holds yet."""

    kid: str
    public_jwk: Mapping[str, str]
    der: bytes


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _jwk(public: rsa.RSAPublicKey) -> dict[str, str]:
    """Return the public members (RFC 7518 §6.3.1) with the RFC 7638 thumbprint as `kid`."""
    numbers = public.public_numbers()
    n = _b64(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big"))
    e = _b64(numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big"))
    canonical = json.dumps({"e": e, "kty": "RSA", "n": n}, separators=(",", ":"), sort_keys=True)
    kid = _b64(hashlib.sha256(canonical.encode("ascii")).digest())
    return {"kty": "RSA", "use": "sig", "alg": ALGORITHM, "kid": kid, "n": n, "e": e}


def _generate(bits: int) -> NewKey:
    private = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    jwk = _jwk(private.public_key())
    der = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return NewKey(jwk["kid"], jwk, der)


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A key in memory: its two halves as objects, since parsing one costs more than a hundred signatures."""

    private: rsa.RSAPrivateKey
    public: rsa.RSAPublicKey
    jwk: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A prebuilt public answer: the bytes and their strong entity tag."""

    body: bytes
    etag: bytes

    @classmethod
    def of(cls, value: object) -> "Document":
        """Return `value` as compact JSON with its tag."""
        body = json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")
        return cls(body, b'"' + hashlib.sha256(body).hexdigest()[:32].encode("ascii") + b'"')


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
        record = signer(self._usable(), self._clock.now())
        if record is None:
            raise NoUsableKey
        header = self._headers.get((record.kid, typ))
        if header is None:
            fields = {"alg": ALGORITHM, "typ": typ, "kid": record.kid}
            header = base64.urlsafe_b64encode(json.dumps(fields, separators=(",", ":")).encode("ascii")).rstrip(b"=")
            self._headers[(record.kid, typ)] = header
        payload = to_json(claims)
        signed = header + b"." + base64.urlsafe_b64encode(payload).rstrip(b"=")
        signature = self._loaded[record.kid].private.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode("ascii")

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
        return signer(self._usable(), self._clock.now()) is not None

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
        telemetry.SIGNING_KEYS_BROKEN.set(len(broken))
        self._records = tuple(records)
        for kid in self._loaded.keys() - {record.kid for record in records}:
            del self._loaded[kid]
        return plan(self._records, self._clock.now(), self._policy)

    async def prepare(self, owed: Plan) -> list[NewKey]:
        """Generate the keys a plan asks for, before any lock is taken: a large key can take seconds."""
        return [await asyncio.to_thread(_generate, self._policy.bits) for _ in owed.create]

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
            plain = self._master.unwrap(Wrapped(row.kek_id, row.wrapped), context=context)
            renewed = self._master.wrap(plain, context=context)
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
        if not isinstance(private, rsa.RSAPrivateKey) or (jwk := _jwk(private.public_key())) != record.public_jwk:
            raise MasterKeyError(f"the public half of signing key {record.kid} is not its own")
        return LoadedKey(private, private.public_key(), jwk)
