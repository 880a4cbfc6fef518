"""The run as a whole: what is asked of it, how it is set up, and what it has shown."""

import asyncio
import tempfile
import time as real
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, final

import httpx2
from sqlalchemy import select

from identity_service.infra.tables import signing_keys
from identity_service.main import Services, build_services, load_keys
from tests.rotation.clock import Page, ProofFailed, SharedClock, Slot, Time
from tests.rotation.conductor import Conductor, Step, Trouble
from tests.rotation.load import Load, Pool
from tests.rotation.processes import Relay, Replica
from tests.rotation.record import Record
from tests.rotation.replica import LEAD, Launch, settings_of
from tests.rotation.siblings import Origin, ten_siblings
from tests.rotation.watch import CACHE, Watcher, judge_notice
from tests.support.service import SIBLING, Service

_START: Final = datetime(2026, 1, 1, tzinfo=UTC)
_HEAD_START: Final = LEAD - 600
"""Seconds that pass between the making of the first keys and the start of the run; the first rotation is near."""
_TAIL: Final = CACHE
"""Seconds the run goes on after the last rotation: until every cache has been renewed."""
_LATE: Final = 0.2
"""Real seconds without a poll or an answer after which time waits for a replica."""
_LONGEST_LIFE: Final = 3600
"""Seconds; the longest life a client's access tokens may be given."""
_CYCLE: Final = (Trouble.MEETING, Trouble.KILLED_WRITING, Trouble.NONE, Trouble.KILLED_READING)


@dataclass(frozen=True)
class Plan:
    """What a run is to do: its rotations in their order, and how many seconds shall pass in a real one."""

    steps: Sequence[Step]
    speed: float = 400.0
    pause: float = 0.04

    @classmethod
    def of(cls, rotations: int, **given: float) -> "Plan":
        """
        Return a plan with that many rotations: troubles in turn, a compromise at two thirds, and every fourth rotation
        left to the schedule.
        """
        steps = [Step(_CYCLE[n % 4], brought_forward=n % 4 != 2) for n in range(rotations - 1)]
        steps.insert(rotations * 2 // 3, Step(Trouble.COMPROMISE))
        return cls(steps, **given)

    def number(self, *troubles: Trouble) -> int:
        """Return how many rotations meet one of these troubles."""
        return sum(step.trouble in troubles for step in self.steps)


@dataclass
class Outcome:
    """What a run has shown."""

    plan: Plan
    record: Record
    notice: float
    """The least time, in seconds, that a key stood in every replica's JWKS before a token named it."""
    lived: float
    """Seconds of the accelerated time."""
    took: float
    """Real seconds."""
    waited: float
    """Real seconds in which time stood still, because this machine was busy elsewhere."""

    @property
    def faults(self) -> list[str]:
        """Why this is no proof; empty if it is one."""
        record = self.record
        zeros = {
            "valid tokens were refused": record.refused,
            "tokens were signed by an unpublished key": record.unpublished,
            "uses of a compromised key came after the promised time": record.resurrected,
            "token requests failed": record.not_issued,
            "other faults": record.faults,
        }
        found = [f"{zero.count} {what}: {'; '.join(zero.examples)}" for what, zero in zeros.items() if zero.count]
        if record.empty:
            found.append(f"the JWKS was empty {record.empty} times")
        return found + [f"too little was done: {what}" for what, enough in self.enough().items() if not enough]

    def enough(self) -> dict[str, bool]:
        """Return what must have been done for the zeros to mean anything, and whether it was."""
        record, steps = self.record, len(self.plan.steps)
        siblings = [checks for name, checks in record.checks.items() if not name.startswith("replica")]
        own = [checks for name, checks in record.checks.items() if name.startswith("replica")]
        ten = len(siblings) == 10
        oldest = sorted(checks.oldest_copy for checks in siblings if checks.oldest_copy is not None)
        kids = {token.kid for token in record.minted}
        compromise = record.compromise
        return {
            "rotations": sum(record.rotations.values()) == steps == len(kids) - 1,
            "replicas killed": all(
                record.kills[trouble] == self.plan.number(trouble)
                for trouble in (Trouble.KILLED_READING, Trouble.KILLED_WRITING)
            ),
            "tokens issued by every replica in each of its lives": all(
                record.minted_by[f"{name}/{life}"] >= 5 for name, life in record.sightings
            )
            and len(record.minted) >= 100 * steps,
            "checks by ten siblings": ten and all(c.number >= 50 * steps for c in siblings),
            "checks at the very end of a token's life": ten and all(c.near_the_end >= 5 * steps for c in siblings),
            "siblings that met every key": ten and all(c.kids == kids for c in siblings),
            "copies of the JWKS as old as they may be": len(oldest) == 8
            and oldest[0] >= 0.9 * CACHE
            and oldest[-1] >= 1.8 * CACHE,
            "checks at our own API and by introspection": len(own) == 4
            and all(checks.number >= 25 * steps and checks.kids == kids for checks in own),
            "looks at the JWKS": record.samples >= 100 * steps,
            "a compromise": compromise is not None and len(compromise.promised) == 2 and compromise.refused >= 20,
        }


@final
class Stage:
    """Everything a run stands on: a database with keys, clients and users, and two replicas that serve."""

    def __init__(self, services: Services, replicas: Sequence[Replica], time: Time, origin: Origin) -> None:
        self.services = services
        self.replicas = replicas
        self.time = time
        self.origin = origin

    @classmethod
    @asynccontextmanager
    async def set_up(cls, database_url: str, speed: float) -> AsyncIterator["Stage"]:
        """Prepare a migrated database that holds no keys; raises ProofFailed when a replica does not start."""
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="identity-rotation-")))
            path = folder / "page"
            page = Page.create(path)
            time = Time(page, _START, speed)
            relay = await stack.enter_async_context(Relay.listening())
            settings = settings_of(database_url, relay.url)
            services = build_services(settings, clock=SharedClock(page))
            stack.push_async_callback(services.close)
            await load_keys(services)
            replicas = []
            for number, name in enumerate(("replica A", "replica B")):
                launch = Launch(str(path), number, name, database_url, relay.url)
                replicas.append(Replica(launch, Slot(page, number), folder / f"{number}.log"))
                stack.callback(replicas[-1].kill)
            time.now += _HEAD_START
            await asyncio.gather(*(replica.start() for replica in replicas))
            relay.replicas = replicas
            origin = Origin(relay.url, time)
            stack.push_async_callback(origin.close)
            yield cls(services, replicas, time, origin)

    async def load(self, http: httpx2.AsyncClient, record: Record, group: asyncio.TaskGroup, pause: float) -> Load:
        """Start everything that asks for tokens, checks them and watches."""
        issuer = self.services.settings.public_issuer
        audiences = (issuer, SIBLING)
        hands = Service(None, self.services, self.services.clock, http)
        asker = await hands.a_client(introspect=(SIBLING,), audiences=audiences)
        load = Load(
            time=self.time,
            record=record,
            http=http,
            siblings=Pool(self.time),
            own=Pool(self.time),
            issuer=issuer,
            audience=SIBLING,
            asker=asker,
            spawn=group.create_task,
            pause=pause,
        )
        service = await hands.a_client(audiences=audiences)
        patient = await hands.a_client(audiences=audiences, access_token_ttl=_LONGEST_LIFE)
        web = await hands.a_client(audiences=audiences, access_token_ttl=_LONGEST_LIFE, public=True)
        watchers = [Watcher(replica, load) for replica in self.replicas]
        for replica in self.replicas:
            user = await hands.a_user()
            group.create_task(load.mint_for(replica, service))
            group.create_task(load.mint_for(replica, patient))
            group.create_task(load.mint_for_user(replica, web, user))
            group.create_task(load.check_at_home(replica))
        for sibling in ten_siblings(issuer, SIBLING, self.time, self.origin, group.create_task):
            group.create_task(load.check_at(sibling))
        for watcher in watchers:
            group.create_task(watcher.run())
        group.create_task(load.sweep())
        self.time.keeps_up = lambda: all(
            not replica.serving or (replica.since_poll() < _LATE and watcher.waits_for() < _LATE)
            for replica, watcher in zip(self.replicas, watchers, strict=True)
        )
        group.create_task(self.time.run())
        return load


async def prove(database_url: str, plan: Plan, tell: Callable[[str], None] = lambda _line: None) -> Outcome:
    """Run a plan on a migrated database that holds no keys; `tell` hears a line before each rotation."""
    record = Record()
    began = real.monotonic()
    async with Stage.set_up(database_url, plan.speed) as stage:
        first = stage.time.now
        async with httpx2.AsyncClient(timeout=60, trust_env=False) as http:
            await _run(stage, plan, record, http, tell)
        async with stage.services.db.transaction() as tx:
            rows = await tx.execute(select(signing_keys.c.kid, signing_keys.c.published_at))
            stored = {row.kid: row.published_at for row in rows}
        notice = judge_notice(record, stored)
        for replica in stage.replicas:
            for line in replica.log_text().splitlines():
                if '"level":"error"' in line or line.startswith("Traceback"):
                    record.faults.add(f"{replica.name} logged an error: … {line[-300:]}")
        lived, waited = stage.time.now - first, stage.time.waited
    return Outcome(plan, record, notice, lived, real.monotonic() - began, waited)


class _Over(Exception):
    """Everything was done."""


async def _run(stage: Stage, plan: Plan, record: Record, http: httpx2.AsyncClient, tell: Callable[[str], None]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            load = await stage.load(http, record, group, plan.pause)
            conductor = Conductor(stage.services, stage.replicas, load)
            for number, step in enumerate(plan.steps, 1):
                tell(f"rotation {number} of {len(plan.steps)}: {step.trouble}")
                await conductor.take(step)
            await stage.time.reach(stage.time.now + _TAIL)
            await conductor.settle_accounts()
            raise _Over
    except* _Over:
        pass  # what ends the tasks of the load, which have no end of their own
    except* ProofFailed as failed:
        for failure in failed.exceptions:
            record.faults.add(str(failure))
