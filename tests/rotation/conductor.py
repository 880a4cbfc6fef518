"""What happens in a run, one rotation after the other, and in whose way."""

import asyncio
import time as real
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, final

import psycopg
from sqlalchemy import select
from sqlalchemy.engine import make_url

from identity_service.infra.tables import audit_events, signing_keys
from identity_service.main import Services
from identity_service.oauth.signing_keys import Actor, KeyRecord, KeyState
from identity_service.oauth.signing_keys.material import generate
from tests.rotation.clock import ProofFailed, Time, until
from tests.rotation.load import Load, Token
from tests.rotation.processes import Replica
from tests.rotation.record import Compromise, Record
from tests.rotation.replica import LEAD

_CONDUCTOR: Final = Actor("conductor")
_EARLY: Final = 60.0
"""Seconds before the instant of a rotation when the lock is taken that holds the replicas up."""
PROMISE: Final = 5.0
"""Real seconds within which every replica must have polled after a compromise, be the machine as busy as it may."""

# A session is in a step while it has touched the schedule's lock and waits for something: for that lock, before it has
# read anything, or for the audit trail, when it has written the keys and not committed.
_IN_STEP = """
    SELECT DISTINCT a.application_name FROM pg_stat_activity a
    JOIN pg_locks held ON held.pid = a.pid AND held.granted AND held.relation = 'locks'::regclass
    JOIN pg_locks wanted ON wanted.pid = a.pid AND NOT wanted.granted
    WHERE a.datname = current_database()
      AND (wanted.relation IS NOT DISTINCT FROM 'audit_events'::regclass) = %s
"""
_HOLD_SCHEDULE = "SELECT name FROM locks WHERE name = 'schedule' FOR UPDATE"
_HOLD_AUDIT_TRAIL = "LOCK TABLE audit_events IN SHARE MODE"


class Trouble(StrEnum):
    """What stands in the way of a rotation."""

    NONE = "undisturbed"
    MEETING = "both replicas at the lock at once"
    KILLED_READING = "a replica killed before it read the schedule"
    KILLED_WRITING = "a replica killed between its writing and its commit"
    COMPROMISE = "the active key compromised"


@dataclass(frozen=True)
class Step:
    """One rotation: what stands in its way, and whether an operator brings it forward to the earliest safe instant."""

    trouble: Trouble
    brought_forward: bool = True


@final
class Conductor:
    """Lets the keys rotate, and gets in the way."""

    def __init__(self, services: Services, replicas: Sequence[Replica], load: Load) -> None:
        self._services = services
        self._replicas = replicas
        self._load = load
        self._time: Time = load.time
        self._record: Record = load.record
        address = make_url(services.settings.database).set(drivername="postgresql")
        self._address = address.render_as_string(hide_password=False)

    async def take(self, step: Step) -> None:
        """Let one rotation happen; return when both replicas sign with the new key and another one waits."""
        waiting = await self._waiting()
        stored = len(await self._stored())
        if step.trouble is Trouble.COMPROMISE:
            await self._compromise(waiting)
        else:
            if step.brought_forward:
                waiting = await self._bring_forward()
            await self._rotate(step.trouble, waiting)
        await until(
            lambda: [self._load.signing.get(replica.name) for replica in self._replicas] == [waiting.kid] * 2,
            f"both replicas signed with the new key ({step.trouble})",
        )
        if len(await self._stored()) != stored + 1:
            self._record.faults.add(f"a rotation did not leave exactly one new key ({step.trouble})")
        self._record.rotations[step.trouble] += 1

    async def _rotate(self, trouble: Trouble, waiting: KeyRecord) -> None:
        instant = waiting.activates_at.timestamp()
        stored = len(await self._stored())
        victim: Replica | None = None
        match trouble:
            case Trouble.NONE:
                await self._time.reach(instant)
            case Trouble.MEETING | Trouble.KILLED_READING:
                async with self._held_up(_HOLD_SCHEDULE, instant) as watcher:
                    await self._in_step(watcher, writing=False, number=2)
                    if trouble is Trouble.KILLED_READING:
                        victim = self._replicas[self._record.kills[trouble] % 2]
                        await self._kill(victim, watcher, trouble, writing=False)
            case Trouble.KILLED_WRITING:
                async with self._held_up(_HOLD_AUDIT_TRAIL, instant) as watcher:
                    await self._in_step(watcher, writing=False, number=1)
                    (name,) = await self._in_step(watcher, writing=True, number=1)
                    victim = next(replica for replica in self._replicas if replica.name == name)
                    await self._kill(victim, watcher, trouble, writing=True)
        await self._until_stored(stored + 1)
        if victim is not None:
            await victim.start()

    @asynccontextmanager
    async def _held_up(self, statement: str, instant: float) -> AsyncIterator[psycopg.AsyncConnection]:
        """
        Hold a lock from just before `instant` until the end of the block; yield a connection to look around with.

        Time passes the instant and then stands still, for a lock that is held for half a second real would be one of
        minutes. The storm is over when the survivors have taken their step.
        """
        stored = len(await self._stored())
        async with (
            await psycopg.AsyncConnection.connect(self._address, autocommit=True) as watcher,
            await psycopg.AsyncConnection.connect(self._address) as holder,
        ):
            await self._time.reach(instant - _EARLY)
            with self._record.weather.storm():
                with self._time.standing():
                    await holder.execute(statement)
                await self._time.reach(instant + 1)
                with self._time.standing():
                    yield watcher
                    await holder.rollback()
                    await self._until_stored(stored + 1)

    async def _in_step(self, watcher: psycopg.AsyncConnection, *, writing: bool, number: int) -> list[str]:
        """Wait until `number` replicas wait in the middle of a step; return their names."""
        deadline = real.monotonic() + 30
        while len(names := await self._waiting_names(watcher, writing=writing)) < number:
            if real.monotonic() > deadline:
                raise ProofFailed(f"of the replicas only {names} waited in the middle of a step")
            await asyncio.sleep(0.005)
        return names

    async def _waiting_names(self, watcher: psycopg.AsyncConnection, *, writing: bool) -> list[str]:
        cursor = await watcher.execute(_IN_STEP, [writing])
        names = {name for (name,) in await cursor.fetchall()}
        return [replica.name for replica in self._replicas if replica.name in names]

    async def _kill(
        self, victim: Replica, watcher: psycopg.AsyncConnection, trouble: Trouble, *, writing: bool
    ) -> None:
        """Kill a replica; it counts only if its session is still seen waiting in the step afterwards."""
        victim.kill()
        self._record.sightings[victim.name, victim.life].until = self._time.now
        if victim.name in await self._waiting_names(watcher, writing=writing):
            self._record.kills[trouble] += 1

    async def _bring_forward(self) -> KeyRecord:
        """Do what `identity-service keys rotate` does."""
        async with self._services.db.transaction() as tx:
            return await self._services.key_acts.bring_forward(tx, _CONDUCTOR)

    async def _compromise(self, waiting: KeyRecord) -> None:
        """Do what `identity-service keys compromise` does to the active key, when every sibling knows the next one."""
        await self._time.reach(waiting.published_at.timestamp() + LEAD)
        states = await self._services.db.run(self._services.signing_keys.describe)
        (kid,) = [record.kid for record, state in states if state is KeyState.ACTIVE]
        spare = [await asyncio.to_thread(generate, 2048) for _ in range(2)]
        await self._accepted_everywhere(kid)
        evidence = [pool.withdraw(kid) for pool in (self._load.own, self._load.siblings)]
        async with self._services.db.transaction() as tx:
            await self._services.key_acts.compromise(tx, [kid], spare, _CONDUCTOR)
        compromise = self._record.compromise = Compromise(kid, committed=real.monotonic())
        begun = {replica.name: replica.slot.begun for replica in self._replicas}
        self._load.spawn(self._show_evidence(evidence, compromise))
        for replica in self._replicas:
            await until(
                lambda replica=replica: replica.slot.ended > begun[replica.name],  # type: ignore[misc]
                f"{replica.name} polled after the compromise",
                patience=PROMISE,
            )
            compromise.promised[replica.name] = real.monotonic()

    async def _accepted_everywhere(self, kid: str) -> None:
        """Make sure that the key's tokens are good at every replica, or refusing them later would mean nothing."""
        for replica in self._replicas:
            for pool in (self._load.own, self._load.siblings):
                token = next(token for token in reversed(pool.tokens) if token.kid == kid)
                if not await self._load.show(replica, token):
                    raise ProofFailed(f"{replica.name} refused a token of the active key before it was compromised")

    async def _show_evidence(self, evidence: Sequence[Sequence[Token]], compromise: Compromise) -> None:
        """Show the compromised key's tokens to every replica until the last of each kind has expired."""
        longest = [max(tokens, key=lambda token: token.expires_at) for tokens in evidence]
        while left := [token for token in longest if token.expires_at > self._time.now]:
            for replica in self._replicas:
                for token in left:
                    if replica.serving:
                        compromise.refused += await self._load.show(replica, token) is False
            await asyncio.sleep(self._load.pause)

    async def _waiting(self) -> KeyRecord:
        states = await self._services.db.run(self._services.signing_keys.describe)
        found = [record for record, state in states if state is KeyState.NEXT]
        if len(found) != 1:
            raise ProofFailed(f"{len(found)} keys wait where there must be one")
        return found[0]

    async def _stored(self) -> set[str]:
        async with self._services.db.transaction() as tx:
            return set((await tx.execute(select(signing_keys.c.kid))).scalars())

    async def _until_stored(self, number: int) -> None:
        deadline = real.monotonic() + 30
        while len(await self._stored()) < number:
            if real.monotonic() > deadline:
                raise ProofFailed("nobody took the step that was owed")
            await asyncio.sleep(0.01)

    async def settle_accounts(self) -> None:
        """
        Look at the database at the end: every step was taken once, and told once.

        One key is made for each rotation, a compromise among them, besides the two to begin with; a compromised key
        is not retired.
        """
        async with self._services.db.transaction() as tx:
            events = (await tx.execute(select(audit_events.c.event, audit_events.c.actor, audit_events.c.target))).all()
        states = await self._services.db.run(self._services.signing_keys.describe)
        made = [row.target for row in events if row.event == "key.created"]
        retired = [row.target for row in events if row.event == "key.retired"]
        rotations = sum(self._record.rotations.values())
        planned = rotations - self._record.rotations[Trouble.COMPROMISE]
        for what, kids, wanted in (("created", made, rotations + 2), ("retired", retired, planned)):
            if len(kids) != wanted or len(set(kids)) != wanted:
                self._record.faults.add(f"{len(kids)} keys ({len(set(kids))} different ones) were {what}, not {wanted}")
        for state in (KeyState.ACTIVE, KeyState.NEXT):
            if (number := sum(found is state for _, found in states)) != 1:
                self._record.faults.add(f"{number} keys are {state} at the end")
