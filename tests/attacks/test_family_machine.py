"""
Refresh families, driven at random and compared with a model after every step.

The model is written from the published table of verdicts and knows nothing of the code; it runs against PostgreSQL and
against SQLite, so both agree with each other, too.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, update

from identity_service.accounts.refresh_families import Family
from identity_service.accounts.users import User
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import audit_events, refresh_families
from tests.support.races import held, loaded
from tests.support.reading import unverified_claims
from tests.support.service import Registered, Service, running, test_settings

IDLE, ABSOLUTE = 100, 300  # seconds
DEAD = (400, "invalid_grant", "The refresh token is not valid.")
REUSED = (400, "invalid_grant", "refresh token reuse detected; session revoked")
KEY_REUSED = (400, "invalid_request", "The Idempotency-Key belongs to an earlier rotation.")


@dataclass(frozen=True)
class Row:
    """What a family's row must say."""

    generation: int
    current: str
    parent: str | None
    key: str | None
    rotated_at: float
    idle_end: float
    absolute_end: float
    user_epoch: int
    client_epoch: int
    revoked: bool = False


@dataclass
class Modelled:
    """A family as the model sees it: its row, every token it ever handed out, and backups of the row."""

    id: str
    row: Row
    generations: dict[str, int]
    backups: list[tuple[Row, Any]] = field(default_factory=list)


@dataclass
class World:
    """What is around the families, and what must have been audited."""

    now: float = 0.0
    window: int = 0
    enabled: bool = True
    user_epoch: int = 0
    client_epoch: int = 0
    audited: Counter[str] = field(default_factory=Counter)

    def ended(self, row: Row) -> bool:
        """Whether the family was revoked, by itself or with others."""
        epochs = (row.user_epoch, row.client_epoch) == (self.user_epoch, self.client_epoch)
        return row.revoked or not self.enabled or not epochs


picks = st.integers(0, 11)
keys = st.sampled_from((None, None, "key-number-one-000", "key-number-two-000"))


def chosen(among: Sequence[Any], pick: int) -> Any:
    """Return one of `among`, the newest for 0."""
    return among[-1 - pick % len(among)]


def to_the_millisecond(seconds: float) -> float:
    """Return seconds without what adding them up has added; the service counts whole microseconds."""
    return round(seconds, 3)


def lives(world: World, row: Row) -> bool:
    """Whether the family's current token would be good."""
    return not world.ended(row) and world.now < row.idle_end and world.now < row.absolute_end


def judged(world: World, family: Modelled, token: str, key: str | None, *, ours: bool) -> str:
    """Go through the table, top to bottom."""
    row = family.row
    generation = family.generations[token]
    ended = world.now >= row.idle_end or world.now >= row.absolute_end
    elapsed = max(0.0, to_the_millisecond(world.now - row.rotated_at))
    permitted = (key is not None and key == row.key) or (world.window > 0 and elapsed < world.window)
    unseen = generation > row.generation or (generation == row.generation and token != row.current)
    if row.revoked:
        return "revoked"
    if unseen and ours:
        return "ahead_of_record"
    if world.ended(row):
        return "revoked"
    if not ours:
        return "foreign_client"
    if token == row.current:
        if ended:
            return "expired"
        return "key_reused" if key is not None and key == row.key else "rotated"
    if token == row.parent and permitted:
        return "expired" if ended else "retried"
    return "reuse_detected"


class FamilyMachine(RuleBasedStateMachine):
    """
    One user at one client, with another client looking on; each example has people of its own.

    What ends a family waits until it has some past, or few examples would come to anything interesting.
    """

    def __init__(self, runner: asyncio.Runner, service: Service, serial: list[int]) -> None:
        super().__init__()
        self.runner = runner
        self.service = service
        serial[0] += 1
        self.name = f"person{serial[0]}"
        self.epoch = service.clock.now().timestamp()
        self.world = World()
        self.families: list[Modelled] = []

    def run(self, work: Any) -> Any:
        """Run a coroutine to its end."""
        return self.runner.run(work)

    def live(self) -> list[Modelled]:
        return [family for family in self.families if lives(self.world, family.row)]

    def undone(self) -> list[Modelled]:
        """Families that are not revoked, whether they have expired or not."""
        return [family for family in self.families if not self.world.ended(family.row)]

    def grown(self) -> list[Modelled]:
        return [family for family in self.undone() if len(family.generations) > 3]

    def lost(self) -> list[tuple[Modelled, str]]:
        """Tokens that a restored database has never seen."""
        return [
            (family, token)
            for family in self.undone()
            for token, generation in family.generations.items()
            if generation >= family.row.generation and token != family.row.current
        ]

    @initialize(window=st.sampled_from((0, 0, 10)))
    def arrive(self, window: int) -> None:
        """Register the clients and the user, and sign in."""

        async def make() -> tuple[Registered, Registered, User]:
            ends = {"refresh_idle_ttl": IDLE, "refresh_absolute_ttl": ABSOLUTE}
            ours = await self.service.a_client(refresh_retry_window=window, **ends)
            theirs = await self.service.a_client(refresh_retry_window=window, **ends)
            return ours, theirs, await self.service.a_user(self.name)

        self.world.window = window
        self.ours, self.theirs, self.user = self.run(make())
        self.signs_in()

    @rule()
    @precondition(lambda self: self.world.enabled and len(self.live()) < 2)
    def signs_in(self) -> None:
        answer = self.run(self.service.sign_in(self.ours, self.user))
        token, now = answer["refresh_token"], self.world.now
        row = Row(
            generation=0,
            current=token,
            parent=None,
            key=None,
            rotated_at=now,
            idle_end=to_the_millisecond(now + IDLE),
            absolute_end=to_the_millisecond(now + ABSOLUTE),
            user_epoch=self.world.user_epoch,
            client_epoch=self.world.client_epoch,
        )
        self.world.audited["grant.password"] += 1
        self.families.append(Modelled(unverified_claims(answer["access_token"])["sid"], row, {token: 0}))

    # -- presenting -----------------------------------------------------------------------------------------------

    @rule(pick=picks, key=keys)
    @precondition(undone)
    def refreshes(self, pick: int, key: str | None) -> None:
        family = chosen(self.undone(), pick)
        self.present(family, family.row.current, key)

    @rule(pick=picks, key=keys, same_key=st.booleans())
    @precondition(lambda self: any(family.row.parent for family in self.undone()))
    def retries(self, pick: int, key: str | None, same_key: bool) -> None:
        family = chosen([family for family in self.undone() if family.row.parent], pick)
        assert family.row.parent is not None
        self.present(family, family.row.parent, family.row.key if same_key else key)

    @rule(pick=picks)
    @precondition(lambda self: any(family.row.key for family in self.undone()))
    def repeats_the_key(self, pick: int) -> None:
        family = chosen([family for family in self.undone() if family.row.key], pick)
        self.present(family, family.row.current, family.row.key)

    @rule(pick=picks, which=picks, key=keys)
    @precondition(grown)
    def replays(self, pick: int, which: int, key: str | None) -> None:
        family = chosen(self.grown(), pick)
        self.present(family, chosen(list(family.generations), which), key)

    @rule(pick=picks, key=keys)
    @precondition(lost)
    def presents_what_was_lost(self, pick: int, key: str | None) -> None:
        self.present(*chosen(self.lost(), pick), key)

    @rule(pick=picks, which=picks, key=keys)
    def presents_anything(self, pick: int, which: int, key: str | None) -> None:
        family = chosen(self.families, pick)
        if self.world.ended(family.row):
            self.present(family, chosen(list(family.generations), which), key)

    @rule(pick=picks, which=picks, key=keys)
    @precondition(grown)
    def another_client_presents(self, pick: int, which: int, key: str | None) -> None:
        family = chosen(self.grown(), pick)
        self.present(family, chosen(list(family.generations), which), key, ours=False)

    @rule(pick=picks, key=keys)
    def asks_for_too_much(self, pick: int, key: str | None) -> None:
        """A scope that was not granted: refused, and nothing has happened."""
        family = chosen(self.families, pick)
        verdict = judged(self.world, family, family.row.current, key, ours=True)
        answer = self.run(self.service.refresh(self.ours, family.row.current, key=key, scope="orders:write nothing"))
        expected = {"rotated": "invalid_scope", "key_reused": "invalid_request"}.get(verdict, "invalid_grant")
        assert (answer.status_code, answer.json()["error"]) == (400, expected)

    def present(self, family: Modelled, token: str, key: str | None, *, ours: bool = True) -> None:
        row, now = family.row, self.world.now
        verdict = judged(self.world, family, token, key, ours=ours)
        if verdict == "rotated":
            family.backups.append((row, self.run(self.stored(family))))
        answer = self.run(self.service.refresh(self.ours if ours else self.theirs, token, key=key))
        body = answer.json()
        if verdict == "rotated":
            assert answer.status_code == 200, (verdict, body)
            successor = body["refresh_token"]
            assert all(successor not in other.generations for other in self.families)
            family.row = replace(
                row,
                generation=row.generation + 1,
                current=successor,
                parent=token,
                key=key,
                rotated_at=now,
                idle_end=min(to_the_millisecond(now + IDLE), row.absolute_end),
            )
            family.generations[successor] = row.generation + 1
        elif verdict == "retried":
            assert answer.status_code == 200, (verdict, body)
            assert body["refresh_token"] == row.current
        else:
            expected = {"reuse_detected": REUSED, "key_reused": KEY_REUSED}.get(verdict, DEAD)
            assert (answer.status_code, body["error"], body["error_description"]) == expected, verdict
        if verdict in ("foreign_client", "ahead_of_record", "reuse_detected"):
            family.row = replace(row, revoked=True)
            self.world.audited[f"refresh.{verdict}"] += 1

    # -- ending ---------------------------------------------------------------------------------------------------

    @rule(pick=picks, which=picks, ours=st.sampled_from((True, False, False)))
    @precondition(grown)
    def revokes(self, pick: int, which: int, ours: bool) -> None:
        family = chosen(self.grown(), pick)
        who = self.ours if ours else self.theirs
        form = {"token": chosen(list(family.generations), which)}
        answer = self.run(self.service.http.post("/revoke", data=form, auth=who.auth))
        assert answer.status_code == (200 if ours else 400)
        if ours:
            family.row = replace(family.row, revoked=True)
            self.world.audited["token.revoked"] += 1

    @rule(how=st.sampled_from(("password", "disable", "client")))
    @precondition(lambda self: self.world.enabled and self.grown())
    def sessions_end(self, how: str) -> None:
        """A new password, a disabled user, a client disabled for a moment."""
        if how == "password":
            self.run(self.service.patch_user(self.user, epoch=self.world.user_epoch + 1))
            self.world.user_epoch += 1
        elif how == "disable":
            self.run(self.service.disable(self.user))
            self.world.enabled = False
            self.world.user_epoch += 1
        else:
            self.run(self.service.bump_client_epoch(self.ours))
            self.world.client_epoch += 1

    @rule()
    @precondition(lambda self: not self.world.enabled)
    def is_enabled(self) -> None:
        self.run(self.service.enable(self.user))
        self.world.enabled = True

    # -- the database and the clock -------------------------------------------------------------------------------

    @rule(pick=picks, back=st.integers(1, 4))
    @precondition(lambda self: any(family.backups for family in self.families))
    def is_restored(self, pick: int, back: int) -> None:
        """The row is what it was before one of the latest rotations; it may come back from the dead by that."""
        family = chosen([family for family in self.families if family.backups], pick)
        family.row, stored = family.backups[-min(back, len(family.backups))]
        statement = update(refresh_families).where(refresh_families.c.id == stored.id).values(stored._asdict())
        self.run(self.service.execute(statement))

    @rule(seconds=st.sampled_from((1, 4, 9.999, 10, 1, 4, 50, IDLE - 1, IDLE, -3)))
    def time_passes(self, seconds: float) -> None:
        self.service.clock.advance(seconds)
        self.world.now = to_the_millisecond(self.world.now + seconds)

    # -- what is true after each step -----------------------------------------------------------------------------

    async def stored(self, family: Modelled) -> Any:
        rows = await self.service.family_rows()
        return next(row for row in rows if str(row.id) == family.id)

    @invariant()
    def the_rows_say_what_the_model_says(self) -> None:
        rows = {str(row.id): row for row in self.run(self.rows())}
        for family in self.families:
            stored, row = rows[family.id], family.row
            moments = (stored.rotated_at, stored.idle_expires_at, stored.absolute_expires_at)
            said = [moment.timestamp() - self.epoch for moment in moments]
            assert said == pytest.approx([row.rotated_at, row.idle_end, row.absolute_end], abs=1e-3)
            assert (stored.generation, stored.revoked_at is not None) == (row.generation, row.revoked)
            assert (stored.user_epoch, stored.client_epoch) == (row.user_epoch, row.client_epoch)

    @invariant()
    def at_most_the_current_token_lives(self) -> None:
        """Try the newest few in a transaction that is undone: nothing but the model's current one may rotate."""
        for family in self.families:
            some = {family.row.current, family.row.parent, *list(family.generations)[-2:]} - {None}
            assert self.run(self.living(family, some)) == self.expected(family)

    @invariant()
    def the_trail_has_every_end_once(self) -> None:
        assert self.run(self.trail()) == self.world.audited

    def teardown(self) -> None:
        """At the end, try every token that was ever handed out."""
        for family in self.families:
            assert self.run(self.living(family, set(family.generations))) == self.expected(family)

    def expected(self, family: Modelled) -> set[str]:
        return {family.row.current} if lives(self.world, family.row) else set()

    async def rows(self) -> Any:
        c = refresh_families.c
        return await self.service.execute(select(refresh_families).where(c.client_id == self.ours.id))

    async def trail(self) -> Counter[str]:
        c = audit_events.c
        ours = c.target.in_([family.id for family in self.families])
        return Counter(row.event for row in await self.service.execute(select(c.event).where(ours)))

    async def living(self, family: Modelled, some: set[str]) -> set[str]:
        """Return which of some tokens would rotate now."""
        client, alive = await loaded(self.service, self.ours), set()
        for token in some:
            async with held(self.service) as trial:
                outcome = await self.service.services.families.rotate(trial.tx, Secret(token), client, retry_key=None)
            if isinstance(outcome, Family) and outcome.token.reveal() != family.row.current:
                alive.add(token)
        return alive


@pytest.mark.rfc("9700", "4.14.2")
@pytest.mark.parametrize("database", ["database_url", "sqlite_url"])
def test_families_do_what_the_table_says(request: pytest.FixtureRequest, database: str) -> None:
    """Rotated, retried, replayed, stolen, revoked, restored, expired, in any order: one live token at most."""
    url: str = request.getfixturevalue(database)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        service = runner.run(stack.enter_async_context(running(test_settings(url))))
        serial = [0]
        try:
            run_state_machine_as_test(
                lambda: FamilyMachine(runner, service, serial),
                settings=settings(
                    max_examples=60,
                    stateful_step_count=30,
                    derandomize=True,
                    phases=(Phase.generate,),  # a failure is told at once; without this line it is shrunk, in minutes
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(stack.aclose())
