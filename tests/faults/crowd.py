"""Everybody who uses the service while something breaks: people, machines, an operator, newcomers, and who looks on."""

import asyncio
import itertools
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, final

from sqlalchemy import select

from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.tables import users
from tests.faults.asking import Line, Where, connected
from tests.faults.ledger import Account, Ledger
from tests.faults.people import HABITS, Clients, Operator, Person
from tests.faults.stage import Replica, Stage, StageFailed
from tests.support.service import ISSUER, PASSWORD, SIBLING, Service
from tests.support.tokens import parts_of

_PATIENCE: Final = 60.0  # seconds for everybody to end what they have begun, or to get a few things done
_OWN: Final = ("account:read", "account:write")


async def register_clients(service: Service) -> Clients:
    """Register what people and machines come through."""
    exchange = "urn:ietf:params:oauth:grant-type:token-exchange"
    return Clients(
        app=await service.a_client(public=True, scope=_OWN, audiences=[ISSUER], name="The app"),
        machine=await service.a_client(grant_types=("client_credentials",), audiences=[SIBLING]),
        operator=await service.a_client(
            grant_types=("client_credentials",), scope=(*_OWN, "orders:read", "users:write"), audiences=[ISSUER]
        ),
        exchanger=await service.a_client(grant_types=(exchange,), scope=_OWN, exchange_audiences=(SIBLING,)),
        asker=await service.a_client(grant_types=(), introspect=(ISSUER, SIBLING)),
    )


@final
class Machine:
    """A client that acts for itself: it asks for tokens, has them looked at, and ends some."""

    def __init__(self, clients: Clients, line: Line, ledger: Ledger, chance: random.Random) -> None:
        self._clients = clients
        self._line = line
        self._ledger = ledger
        self._chance = chance

    async def act(self) -> None:
        """Ask for a token and have it introspected; end every tenth, which is then active nowhere. Fetch the keys."""
        if self._chance.random() < 0.3:
            told = await self._line.ask("jwks", "GET", "/.well-known/jwks.json")
            if told.sure and not told.done:
                self._ledger.complain(f"the JWKS was refused: {told.status}")
        form = {"grant_type": "client_credentials"}
        told = await self._line.ask("client_credentials", "POST", "/token", data=form, auth=self._clients.machine.auth)
        if not told.done:
            if told.sure:
                self._ledger.complain(f"a machine was refused: {told.status} {told.body}")
            return
        token = told.body["access_token"]
        self._ledger.kids[parts_of(token)[0]["kid"]] = time.monotonic()
        await self._expect(token, active=True)
        if self._chance.random() < 0.1:
            told, _ = await self._line.insist(
                "revoke", "POST", "/revoke", data={"token": token}, auth=self._clients.machine.auth
            )
            if not told.done:
                self._ledger.complain(f"a machine's token was not revoked: {told.status} {told.body}")
            await self._expect(token, active=False)

    async def _expect(self, token: str, *, active: bool) -> None:
        form = {"token": token}
        told = await self._line.ask("introspect", "POST", "/introspect", data=form, auth=self._clients.asker.auth)
        if told.sure and not (told.done and told.body["active"] is active):
            self._ledger.complain(f"a machine's token should have been active: {active}, and was not so: {told.status}")


@final
class Onlooker:
    """Fetches the JWKS of one replica: every key that a token was signed with is in it, whoever signed."""

    def __init__(self, replica: Replica, line: Line, ledger: Ledger) -> None:
        self._replica = replica
        self._line = line
        self._ledger = ledger

    async def act(self) -> None:
        """Look once."""
        if not self._replica.serving:
            return
        needed = self._ledger.needed_kids()
        told = await self._line.ask("jwks", "GET", "/.well-known/jwks.json", at=self._replica.url)
        if told.done:
            published = {key["kid"] for key in told.body["keys"]}
            if missing := needed - published:
                self._ledger.complain(f"the JWKS of {self._replica.name} lacks {len(missing)} keys that signed tokens")
        elif told.sure:
            self._ledger.complain(f"the JWKS was refused: {told.status}")


@final
class Crowd:
    """
    Everybody, at work until told to stop.

    People keep their connections; every other machine opens a new one for each request, as scripts do. What each of
    them does is drawn from `seed`; when, the computer decides.
    """

    def __init__(
        self,
        stage: Stage,
        hands: Service,
        clients: Clients,
        line: Line,
        fresh_line: Line,
        ledger: Ledger,
        *,
        habits: Mapping[str, float],
        pause: float,
        life: int | None,
        seed: int,
    ) -> None:
        self.ledger = ledger
        self.clients = clients
        self._stage = stage
        self.hands = hands
        self._line = line
        self._fresh_line = fresh_line
        self._habits = habits
        self._pause = pause
        self._life = life
        self._chance = random.Random(seed)  # noqa: S311  # nothing to guess here
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._operator = Operator(clients.operator, line, ledger)

    async def come(
        self, *, people: int, machines: int, looks_every: float | None, newcomers_every: float | None
    ) -> None:
        """Let so many come, and begin."""
        for _ in range(people):
            self._begin(self._live(await self._somebody()))
        for number in range(machines):
            line = self._fresh_line if number % 2 == 0 else self._line
            machine = Machine(self.clients, line.of(f"10.1.0.{number + 1}"), self.ledger, self._child())
            self._begin(self._keep(machine.act, self._pause))
        for replica in self._stage.replicas if looks_every is not None else ():
            self._begin(self._keep(Onlooker(replica, self._line, self.ledger).act, looks_every or 0.0))
        if newcomers_every is not None:
            self._begin(self._keep(self._newcomer, newcomers_every))

    async def busy(self, acts: int = 25) -> None:
        """Wait until so many things were done from now on; raises StageFailed if they are not."""
        reached = self._done() + acts
        await self._until(lambda: self._done() >= reached, f"{acts} things were done")

    async def stop(self) -> None:
        """Let everybody end what they have begun; raises what went wrong with them."""
        self._over.set()
        async with asyncio.timeout(_PATIENCE + 30):
            await asyncio.gather(*self._tasks)
        self._tasks.clear()

    async def abandon(self) -> None:
        """End everybody at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _live(self, person: Person) -> None:
        """Let somebody act until all is over; whose life is over gives way to somebody else."""
        acts = itertools.count(1)
        while not self._over.is_set():
            await person.act(self._habits)
            if self._life is not None and next(acts) % self._life == 0:
                person = await self._somebody()
            await asyncio.sleep(self._pause)

    async def _somebody(self) -> Person:
        """Return somebody new, whose account was there before."""
        name = f"p{secrets.token_hex(6)}"
        try:
            user = await self.hands.a_user(name)
        except DatabaseUnavailable:  # in the middle of a fault; perhaps there is such an account now, perhaps not
            await asyncio.sleep(0.2)
            return await self._somebody()
        account = Account(user.id, name, PASSWORD)
        self.ledger.accounts.append(account)
        return self._person(account)

    def _person(self, account: Account) -> Person:
        number = len(self.ledger.accounts)
        line = self._line.of(f"10.{2 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}")
        return Person(account, self.clients, line, self.ledger, self._child(), self._operator)

    async def _newcomer(self) -> None:
        """Register somebody, who can then sign in."""
        name = f"n{secrets.token_hex(6)}"
        body = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
        line = self._line.of(f"10.200.{self._chance.randrange(250)}.{self._chance.randrange(1, 250)}")
        told, unsure = await line.insist("register", "POST", "/v1/users", json=body)
        if told.done:
            account = Account(uuid.UUID(told.body["id"]), name, PASSWORD, registered=True)
        elif told.status == 409 and unsure:
            account = Account(await self._id_of(name), name, PASSWORD, registered=True)
        else:
            if told.status != 429:  # without Redis the limits are stricter
                self.ledger.complain(f"a newcomer was refused: {told.status} {told.body}")
            return
        self.ledger.accounts.append(account)
        await self._person(account).sign_in()

    async def _id_of(self, name: str) -> uuid.UUID:
        try:
            rows = await self.hands.execute(select(users.c.id).where(users.c.username == name))
        except DatabaseUnavailable:
            await asyncio.sleep(0.2)
            return await self._id_of(name)
        found: uuid.UUID = rows[0].id
        return found

    def _child(self) -> random.Random:
        return random.Random(self._chance.random())  # noqa: S311  # nothing to guess here

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _keep(self, act: Any, pause: float) -> None:
        while not self._over.is_set():
            await act()
            await asyncio.sleep(pause)

    def _done(self) -> int:
        return sum(sum(account.done.values()) + _rotations(account) for account in self.ledger.accounts)

    async def _until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not true():
            for task in self._tasks:
                if task.done():
                    task.result()
            if time.monotonic() > deadline:
                raise StageFailed(f"within {_PATIENCE:.0f} s it did not come about that {what}")
            await asyncio.sleep(0.02)


def _rotations(account: Account) -> int:
    return sum(len(session.tokens) - 1 for session in account.sessions)


@asynccontextmanager
async def at_work(
    stage: Stage,
    *,
    people: int = 5,
    machines: int = 1,
    looks_every: float | None = 0.1,
    newcomers_every: float | None = 0.5,
    habits: Mapping[str, float] = HABITS,
    pause: float = 0.02,
    life: int | None = None,
    where: Where | None = None,
    seed: int = 1,
) -> AsyncIterator[Crowd]:
    """
    Let people, machines, newcomers and onlookers work on a stage until the end of the block.

    `where` says which origins they ask; by default each replica that serves. `life` is after how many acts a person
    gives way to another one. Onlookers and newcomers may stay away.
    """
    ledger, chance = Ledger(), random.Random(seed)  # noqa: S311  # nothing to guess here

    def anywhere() -> Sequence[str]:
        return [replica.url for replica in stage.serving]

    async with stage.hands() as hands, connected() as kept, connected(kept=0) as fresh:
        line, fresh_line = (Line(http, where or anywhere, ledger, "10.0.0.1", chance) for http in (kept, fresh))
        clients = await register_clients(hands)
        crowd = Crowd(stage, hands, clients, line, fresh_line, ledger, habits=habits, pause=pause, life=life, seed=seed)
        try:
            await crowd.come(people=people, machines=machines, looks_every=looks_every, newcomers_every=newcomers_every)
            yield crowd
        finally:
            await crowd.abandon()
