"""The schedule as pure functions: who signs, where a key stands, and what is owed at an instant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum


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
    """How long a key shall be published before it signs; `safe_lead` is what is really kept."""
    period: timedelta = timedelta(days=30)
    """How long a key signs."""
    cache: timedelta = timedelta(seconds=900)
    """The longest a well-behaved cache may hold the JWKS: max-age + stale-while-revalidate of our answer."""
    token: timedelta = timedelta(seconds=3600)
    """The longest life any client's access tokens may be given."""
    leeway: timedelta = timedelta(seconds=30)
    skew: timedelta = timedelta(seconds=120)
    """How far the replicas may be apart: their clocks, and when each of them has last read the schedule."""

    @property
    def safe_lead(self) -> timedelta:
        """The lead that is really kept: a cache behind a cache, and a replica that publishes the key late."""
        return max(self.lead, 2 * self.cache + self.skew)

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
