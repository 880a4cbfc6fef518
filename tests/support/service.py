"""The service as tests see it: built as in production, asked over HTTP, its clock in the test's hand."""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
from sqlalchemy import delete, func, select, update
from sqlalchemy.sql import Executable

from identity_service.accounts.clients import NO_AUTHENTICATION, NewClient
from identity_service.accounts.users import User
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock, Secret
from identity_service.infra.tables import audit_events, refresh_families, users
from identity_service.infra.telemetry import Tracer, metrics
from identity_service.main import Services, create_app, load_keys
from identity_service.main.jobs import leased_jobs
from identity_service.settings import Settings
from tests.support.clock import FrozenClock
from tests.support.patience import patience

Answer = TypeVar("Answer")

ISSUER = "http://127.0.0.1:8000"
SIBLING = "https://orders.example"
MASTER_KEY = base64.b64encode(bytes(range(32))).decode()
PASSWORD = "correct horse battery staple"
BOOTSTRAP_SECRET = "0123456789abcdefghijklmnopqrstuvwxyz"


def test_settings(database_url: str, **changes: Any) -> Settings:
    """Return settings for a test: cheap hashes, no artificial delays, a master key of its own."""
    values: dict[str, Any] = {
        "environment": "development",
        "issuer": ISSUER,
        "database_url": database_url,
        "master_key": MASTER_KEY,
        "argon2_memory_kib": 8,
        "argon2_time_cost": 1,
        "refusal_delay": 0,
        "access_log": False,
        "database_pool_size": 8,
        "hash_wait": 30,
    }
    if changes.get("registration") == "private":
        values["require_verified_email"] = True  # the one does not go without the other
    return Settings(**{**values, **changes})


test_settings.__test__ = False  # type: ignore[attr-defined]  # its name is not that of a test


@dataclass(frozen=True)
class Registered:
    """A registered client and, if it has one, its secret."""

    id: str
    secret: str | None

    @property
    def auth(self) -> tuple[str, str] | None:
        """For HTTP Basic."""
        return (self.id, self.secret) if self.secret is not None else None

    @property
    def form(self) -> dict[str, str]:
        """For the request body."""
        return {"client_id": self.id} | ({"client_secret": self.secret} if self.secret is not None else {})


@dataclass
class Service:
    """A running service and the hands that prepare it."""

    app: Any
    services: Services
    clock: Clock
    http: httpx2.AsyncClient
    made: int = field(default=0)

    # -- preparing ------------------------------------------------------------------------------------------------

    async def within(self, work: Callable[[Transaction], Awaitable[Answer]]) -> Answer:
        """Do something in one committed transaction."""
        return await self.services.db.run(work)

    async def execute(self, statement: Executable) -> Any:
        """Run one statement, committed; return its rows, or the count of rows changed."""

        async def work(tx: Transaction) -> Any:
            result = await tx.execute(statement)
            return result.all() if result.returns_rows else result.rowcount

        return await self.within(work)

    async def a_client(self, **given: Any) -> Registered:
        """Register a client: by default a confidential first-party one that may use every grant of this version."""
        public = given.pop("public", False)
        values: dict[str, Any] = {
            "name": "Test",
            "first_party": True,
            "grant_types": ("password", "refresh_token")
            if public
            else ("password", "refresh_token", "client_credentials"),
            "scope": ("account:read", "account:write", "orders:read", "orders:write"),
            "audiences": (ISSUER, SIBLING),
            "token_endpoint_auth_method": NO_AUTHENTICATION if public else "client_secret_basic",
        }
        new = NewClient(**{**values, **given})

        async def work(tx: Transaction) -> Registered:
            client, secret = await self.services.clients.register(tx, new)
            await self.services.access.define(tx, client.scope)
            return Registered(client.id, secret.reveal() if secret else None)

        return await self.within(work)

    async def a_user(self, name: str | None = None, *, password: str | None = PASSWORD, **given: Any) -> User:
        """Create a user, whose role holds the scopes that test clients ask for."""
        self.made += 1
        name = name or f"user{self.made}"
        email = given.pop("email", f"{name}@example.org")
        role = given.pop("role", "user")
        verified = given.pop("verified", True)
        hashed = given.pop("password_hash", None)
        if hashed is None and password is not None:
            hashed = await self.services.users.prepare_password(Secret(password), names=(name, email))

        async def work(tx: Transaction) -> User:
            await self.services.access.define(tx, ("orders:read",))
            await self.services.access.grant(tx, role, ("orders:read",))
            return await self.services.users.create(
                tx, username=name, email=email, role=role, password_hash=hashed, verified=verified
            )

        return await self.within(work)

    async def disable(self, user: User) -> None:
        """Disable a user."""
        await self.within(lambda tx: self.services.users.set_enabled(tx, user.id, False))

    async def enable(self, user: User) -> None:
        """Enable a user."""
        await self.within(lambda tx: self.services.users.set_enabled(tx, user.id, True))

    async def change_password(self, user: User, password: str) -> None:
        """Set a new password, as an operator does."""
        hashed = await self.services.users.prepare_password(Secret(password), names=())
        await self.within(lambda tx: self.services.users.set_password(tx, user.id, hashed))

    async def bump_client_epoch(self, client: Registered) -> None:
        """Disable a client and enable it again, a second apart for the caches."""
        await self.within(lambda tx: self.services.clients.set_enabled(tx, client.id, False))
        await self.within(lambda tx: self.services.clients.set_enabled(tx, client.id, True))

    # -- asking ---------------------------------------------------------------------------------------------------

    async def token(
        self, client: Registered | None = None, *, headers: Mapping[str, str] | None = None, **form: Any
    ) -> httpx2.Response:
        """`POST /token`; a confidential client authenticates by Basic, a public one by its id."""
        body = dict(form)
        auth = client.auth if client else None
        if client is not None and auth is None:
            body["client_id"] = client.id
        return await self.http.post("/token", data=body, auth=auth, headers=dict(headers or {}))

    async def sign_in(self, client: Registered, user: User, password: str = PASSWORD, **form: Any) -> dict[str, Any]:
        """Sign in with the password grant and return the answer's body."""
        answer = await self.token(client, grant_type="password", username=user.username, password=password, **form)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def refresh(self, client: Registered, token: str, *, key: str | None = None, **form: Any) -> httpx2.Response:
        """Present a refresh token, with an Idempotency-Key or without."""
        headers = {"idempotency-key": key} if key is not None else {}
        return await self.token(client, headers=headers, grant_type="refresh_token", refresh_token=token, **form)

    async def introspect(self, client: Registered, token: str, **form: str) -> httpx2.Response:
        """`POST /introspect`."""
        return await self.http.post("/introspect", data={**client.form, "token": token, **form})

    async def revoke(self, client: Registered, token: str, **form: str) -> httpx2.Response:
        """`POST /revoke`."""
        return await self.http.post("/revoke", data={**client.form, "token": token, **form})

    async def me(self, access_token: str) -> httpx2.Response:
        """`GET /v1/users/me`."""
        return await self.http.get("/v1/users/me", headers={"authorization": f"Bearer {access_token}"})

    async def run_job(self, name: str) -> None:
        """Do what one replica does for all, now, whether it is due or not."""
        [job] = [job for job in leased_jobs(self.services) if job.name == name]
        await job.step()

    # -- looking --------------------------------------------------------------------------------------------------

    async def events(self, event: str) -> Sequence[Any]:
        """Return the audit rows of one kind, oldest first."""
        rows: Sequence[Any] = await self.execute(
            select(audit_events).where(audit_events.c.event == event).order_by(audit_events.c.id)
        )
        return rows

    async def live_families(self, user: User) -> int:
        """Return how many families of a user are neither revoked nor outdated."""
        c = refresh_families.c
        rows = await self.execute(
            select(func.count())
            .select_from(refresh_families.join(users, users.c.id == c.user_id))
            .where(c.user_id == user.id, c.revoked_at.is_(None), c.user_epoch == users.c.epoch)
        )
        count: int = rows[0][0]
        return count

    async def family_rows(self) -> Sequence[Any]:
        """Return every family's row."""
        rows: Sequence[Any] = await self.execute(select(refresh_families).order_by(refresh_families.c.id))
        return rows

    async def patch_user(self, user: User, **values: Any) -> None:
        """Write a user's row directly, where a test needs a state the service has no way to."""
        await self.execute(update(users).where(users.c.id == user.id).values(**values))


@asynccontextmanager
async def running(
    settings: Settings,
    clock: Clock | None = None,
    *,
    peer: str = "127.0.0.1",
    tracer: Tracer | None = None,
    patient: bool = True,
) -> AsyncIterator[Service]:
    """
    Run the service in this process, without a socket.

    Where time goes by, the jobs of each replica run as in production. A test that stops the clock drives all of them by
    itself: `step_keys`, `flush_audit`, and with `run_job` what one replica does for all, mails and cleaning up. Else
    what it sees would depend on how long the machine takes to get there.

    A service is `patient` with PostgreSQL and Redis, unless a test is about the impatience that it has in production.
    """
    clock = clock or FrozenClock()
    metrics._clients.clear()  # a process of its own would not have counted anybody yet
    with patience(settings) if patient else nullcontext():
        app = create_app(
            settings, clock=clock, own_jobs=not isinstance(clock, FrozenClock), leased_jobs=False, tracer=tracer
        )
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False, client=(peer, 50000))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url=settings.public_issuer) as http,
    ):
        yield Service(app, app.state.services, clock, http)


async def prepare_keys(settings: Settings) -> None:
    """Put data keys and signing keys into a fresh database, so that each test need not wait for new ones."""
    app = create_app(settings, clock=FrozenClock())
    services: Services = app.state.services
    await load_keys(services)
    async with services.db.transaction() as tx:
        await tx.execute(delete(audit_events))  # a test begins with a trail of its own
    await services.close()
