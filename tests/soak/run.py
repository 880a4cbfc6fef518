"""One run: load, one trouble after the other, a look at the resources every second, and what it has all shown."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tests.faults.crowd import Crowd, at_work
from tests.faults.invariants import behind_what_was_told, breaches, consistent
from tests.faults.stage import Stage, StageFailed
from tests.soak.resources import MIB, Resources
from tests.soak.schedule import LIKELY, schedule
from tests.soak.trend import Trend, trend

_LOOK_EVERY: Final = 1.0  # seconds
_TAIL: Final = 0.05  # share of the time at the end in which nothing breaks any more
_LIFE: Final = 400  # acts after which a person gives way to another: what grows with people must be seen to end
_USED_UP: Final = 40  # sessions that are used up at the end to see which of their tokens work
# What may be gained after the warm-up. An allocator does not give back every page of a storm; a leak of a hundred bytes
# in each request comes to more than this within ten minutes.
_MEMORY: Final = (6 * MIB, 0.06)  # bytes, and the share of what is held; the larger of both
_DESCRIPTORS: Final = 6.0
_THREADS: Final = 2.0
_SESSIONS: Final = 2.0


@dataclass(frozen=True)
class Plan:
    """How long, from which seed, and how many people and machines."""

    seconds: float
    seed: int
    people: int = 8
    machines: int = 2


@dataclass(frozen=True)
class Storm:
    """A trouble that was: when, in seconds since the beginning, and what people were told meanwhile."""

    trouble: str
    begin: float
    end: float
    answers: int
    unavailable: int
    unanswered: int


@dataclass
class Outcome:
    """What a run has shown."""

    plan: Plan
    storms: list[Storm] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    trends: list[Trend] = field(default_factory=list)
    rates: list[tuple[float, int, int]] = field(default_factory=list)
    """Each second: answers so far, and how many of them were 503 or never came."""
    resources: Resources | None = None
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    """What was acknowledged, by the names of the audit trail, and rotations."""
    accounts: int = 0
    took: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Why the run failed; empty if it did not."""
        rising = [
            f"{each.what} rose by {each.rise:.1f}, and may by {each.allowed:.1f}"
            for each in self.trends
            if not each.flat
        ]
        lacking = [f"too little was done: {what}" for what, enough in self.enough().items() if not enough]
        return [*self.breaches, *rising, *lacking]

    def enough(self) -> dict[str, bool]:
        """Return what must have been done for the rest to mean anything, and whether it was."""
        minutes = self.plan.seconds / 60
        kinds = {name for storm in self.storms for name in storm.trouble.split(" + ")}
        return {
            "requests": sum(self.answers.values()) >= 1500 * minutes,
            "rotations": self.done["rotations"] >= 150 * minutes,
            "sign-ins": self.done["grant.password"] >= 25 * minutes,
            "troubles": len(self.storms) >= 2 * minutes - 1,
            "kinds of troubles": len(kinds) >= min(len(LIKELY), 2 * minutes - 1),
            "samples": len(self.trends) >= 4 or minutes < 1,
        }


async def soak(stage: Stage, plan: Plan, tell: Callable[[str], None]) -> Outcome:
    """Run a plan on a stage; `tell` hears a line about each trouble."""
    outcome, began = Outcome(plan), time.monotonic()
    resources = outcome.resources = Resources(stage)
    async with at_work(
        stage,
        people=plan.people,
        machines=plan.machines,
        looks_every=0.25,
        newcomers_every=2.0,
        life=_LIFE,
        seed=plan.seed,
    ) as crowd:
        looking = asyncio.create_task(_keep_looking(resources, crowd, outcome))
        try:
            await _break_things(stage, crowd, plan, outcome, tell)
            await crowd.stop()
            outcome.breaches += await breaches(stage, crowd, used_up=_USED_UP)
        except StageFailed as failed:
            outcome.breaches += [*crowd.ledger.complaints, f"the run could not go on: {failed}"]
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        _settle(outcome, crowd, resources)
    outcome.took = time.monotonic() - began
    return outcome


async def _keep_looking(resources: Resources, crowd: Crowd, outcome: Outcome) -> None:
    while True:
        await asyncio.to_thread(resources.look)
        answers = crowd.ledger.answers
        bad = sum(number for (_, status), number in answers.items() if status in (0, 503))
        outcome.rates.append((resources.now, sum(answers.values()), bad))
        await asyncio.sleep(_LOOK_EVERY)


async def _break_things(stage: Stage, crowd: Crowd, plan: Plan, outcome: Outcome, tell: Callable[[str], None]) -> None:
    """Let one trouble come after the other until the time is up, and look after each."""
    resources, ledger = outcome.resources, crowd.ledger
    assert resources is not None
    for step in schedule(plan.seed):
        left = plan.seconds * (1 - _TAIL) - resources.now
        if left <= step.pause:
            break
        await asyncio.sleep(step.pause)
        await crowd.busy(1)
        begin, before = resources.now, Counter(ledger.answers)
        await asyncio.gather(*(trouble(stage, ledger) for trouble in step.troubles))
        told = Counter(ledger.answers)
        told.subtract(before)
        storm = Storm(
            " + ".join(trouble.__name__ for trouble in step.troubles),
            begin,
            resources.now,
            answers=sum(told.values()),
            unavailable=sum(number for (_, status), number in told.items() if status == 503),
            unanswered=sum(number for (_, status), number in told.items() if status == 0),
        )
        outcome.storms.append(storm)
        found = await consistent(crowd.hands) + await behind_what_was_told(crowd.hands, ledger)
        outcome.breaches += [f"after {storm.trouble} at {begin:.0f} s: {breach}" for breach in found]
        tell(
            f"{begin:6.0f} s  {storm.trouble:<50} {storm.end - begin:5.1f} s {storm.answers:6} answers"
            f" {storm.unavailable:5} 503 {storm.unanswered:4} unanswered"
            + (f"   {len(ledger.complaints) + len(outcome.breaches)} BREACHES" if ledger.complaints or found else "")
        )
    await asyncio.sleep(max(0.0, plan.seconds - resources.now))


def _settle(outcome: Outcome, crowd: Crowd, resources: Resources) -> None:
    """Count what was done, and judge how the resources moved; a replica that was started anew is judged anew."""
    ledger = crowd.ledger
    outcome.answers, outcome.accounts = ledger.answers, len(ledger.accounts)
    for account in ledger.accounts:
        outcome.done += account.done
        outcome.done["user.registered"] += account.registered
        outcome.done["rotations"] += sum(len(session.tokens) - 1 for session in account.sessions)
    for (name, life), samples in resources.of.items():
        if samples[-1].at - samples[0].at < outcome.plan.seconds / 2:
            continue
        of = f"replica {name}" + (f", life {life}" if life > 1 else "")
        allowed = max(_MEMORY[0], _MEMORY[1] * samples[len(samples) // 2].memory) / MIB
        memory = [(each.at, each.memory / MIB) for each in samples]
        outcome.trends += _judged(f"{of}: memory, MiB", memory, allowed)
        outcome.trends += _judged(f"{of}: descriptors", [(each.at, each.descriptors) for each in samples], _DESCRIPTORS)
        outcome.trends += _judged(f"{of}: threads", [(each.at, each.threads) for each in samples], _THREADS)
    outcome.trends += _judged("PostgreSQL: sessions", resources.sessions, _SESSIONS)


def _judged(what: str, samples: "list[tuple[float, float]] | list[tuple[float, int]]", allowed: float) -> list[Trend]:
    found = trend(what, samples, allowed=allowed)
    return [] if found is None else [found]
