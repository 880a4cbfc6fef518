"""Builds every object once and wires it together; runs the background jobs of a server."""

import asyncio
import contextlib
import ipaddress
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI

from identity_service.accounts.access import Access
from identity_service.accounts.clients import Clients
from identity_service.accounts.password_policy import PasswordPolicy
from identity_service.accounts.refresh_families import Lifetimes, RefreshFamilies
from identity_service.accounts.throttle import SignInThrottle
from identity_service.accounts.users import Users
from identity_service.infra import telemetry
from identity_service.infra.audit import AuditTrail
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Database, DatabaseUnavailable, Transaction
from identity_service.infra.ratelimit import Limiter, MemoryLimiter
from identity_service.infra.runtime import Clock, SystemClock
from identity_service.infra.runtime.envelope import MasterKeyError, MasterKeys, new_master_key
from identity_service.infra.runtime.hashing import PasswordHasher
from identity_service.infra.tables import SCHEMA_REVISION
from identity_service.oauth.grants.client_credentials import ClientCredentials
from identity_service.oauth.grants.password import Password
from identity_service.oauth.grants.pipeline import Grant, Pipeline
from identity_service.oauth.grants.refresh_token import RefreshToken
from identity_service.oauth.signing_keys import KeyPolicy, NewKey, Plan, SigningKeys
from identity_service.oauth.tokens import IssuedTokens, Tokens
from identity_service.settings import Settings, UnsafeSettings
from identity_service.web.account import account_router
from identity_service.web.asgi import Receive, Scope, Send
from identity_service.web.deps import TOKEN_GUESSING, Bearer, ClientAuthenticator, FailureBudget
from identity_service.web.edge import Edge, Endpoint, Guard
from identity_service.web.error_pages import install_error_pages
from identity_service.web.forms import LARGEST_BODY
from identity_service.web.health import Liveness, Readiness
from identity_service.web.oauth import (
    IntrospectionEndpoint,
    JwksEndpoint,
    MetadataEndpoint,
    RevocationEndpoint,
    TokenEndpoint,
)

log = structlog.get_logger(__name__)

_SCHEDULE = "schedule"
"""Who the audit trail names for what falls due by itself."""
_FLUSH_EVERY = 30.0  # seconds between two writings of the failures that were held back


def load_master_keys(settings: Settings) -> MasterKeys:
    """
    Return the master keys of the settings; development makes one on first use, readable by its owner only.

    Raises MasterKeyError. Nothing is ever generated where a key was named, or where a database holds keys already: a
    new one could unwrap none of them.
    """
    if text := settings.master_key.get_secret_value():
        return MasterKeys.parse(text)
    path = settings.master_key_file or development_key_file(settings.data_dir)
    ours_to_make = settings.master_key_file is None and not settings.production and not path.exists()
    if ours_to_make and not _holds_keys(settings):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(new_master_key() + "\n")
    try:
        return MasterKeys.parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MasterKeyError(
            f"the master key file cannot be read: {type(error).__name__}: {path}; put back the one this database was"
            " made with (nothing else can open its keys)"
        ) from None
    except MasterKeyError as error:
        raise MasterKeyError(f"{path}: {error}") from None


def development_key_file(data_dir: Path) -> Path:
    """Return where one machine keeps its master key: `keys/` for the default data directory, else inside it."""
    default: Path = Settings.model_fields["data_dir"].default
    return Path("keys/master.key") if data_dir.resolve() == default.resolve() else data_dir / "master.key"


def _holds_keys(settings: Settings) -> bool:
    """Return whether the embedded database of the settings was wrapped by some master key before."""
    if (path := settings.sqlite_file) is None or not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("SELECT 1 FROM data_keys").fetchone() is not None
        except sqlite3.OperationalError:
            return False


@dataclass(frozen=True, slots=True)
class Services:
    """Every object of the service, built once."""

    settings: Settings
    clock: Clock
    db: Database
    data_keys: DataKeys
    signing_keys: SigningKeys
    limiter: Limiter
    audit: AuditTrail
    access: Access
    clients: Clients
    hasher: PasswordHasher
    users: Users
    throttle: SignInThrottle
    families: RefreshFamilies
    issued: IssuedTokens
    pipeline: Pipeline

    async def close(self) -> None:
        """Give back connections and threads."""
        self.hasher.close()
        await self.limiter.close()
        await self.db.close()


def build_services(settings: Settings, *, clock: Clock | None = None) -> Services:
    """Build the objects; nothing connects yet. Raises MasterKeyError."""
    clock = clock or SystemClock()
    master = load_master_keys(settings)
    db = Database(settings.database, pool_size=settings.database_pool_size)
    data_keys = DataKeys(master, clock)
    policy = KeyPolicy(
        bits=settings.signing_key_bits,
        lead=timedelta(seconds=settings.signing_key_lead),
        period=timedelta(seconds=settings.signing_key_period),
    )
    signing_keys = SigningKeys(master, clock, policy)
    limiter = _limiter(settings, clock)
    audit = AuditTrail(clock)
    access = Access(clock)
    clients = Clients(clock)
    hasher = PasswordHasher(
        memory_kib=settings.argon2_memory_kib,
        time_cost=settings.argon2_time_cost,
        parallelism=settings.argon2_parallelism,
        threads=settings.hash_threads,
        queue=settings.hash_queue,
        wait=settings.hash_wait,
    )
    users = Users(clock, hasher, PasswordPolicy(settings.password_min_length, settings.password_classes))
    throttle = SignInThrottle(limiter, data_keys)
    families = RefreshFamilies(clock, data_keys, Lifetimes(settings.refresh_idle_ttl, settings.refresh_absolute_ttl))
    issuer = settings.public_issuer
    tokens = Tokens(clock, signing_keys, issuer=issuer, lifetime=settings.access_token_ttl)
    password = Password(
        users, families, throttle, access, audit, issuer=issuer, require_verified_email=settings.require_verified_email
    )
    grants: list[Grant[Any]] = [RefreshToken(families, audit), ClientCredentials(issuer=issuer)]
    if settings.password_grant:
        grants.insert(0, password)
    return Services(
        settings=settings,
        clock=clock,
        db=db,
        data_keys=data_keys,
        signing_keys=signing_keys,
        limiter=limiter,
        audit=audit,
        access=access,
        clients=clients,
        hasher=hasher,
        users=users,
        throttle=throttle,
        families=families,
        issued=IssuedTokens(clock, signing_keys, clients, families, issuer=issuer),
        pipeline=Pipeline(grants, access, tokens),
    )


def _limiter(settings: Settings, clock: Clock) -> Limiter:
    if not (url := settings.redis_url.get_secret_value()):
        return MemoryLimiter(clock)
    # The Redis client takes 15 MB and a tenth of a second; who has no Redis need not pay for it.
    from identity_service.infra.ratelimit.shared import FallbackLimiter, RedisLimiter, redis_client

    def report(degraded: bool) -> None:
        telemetry.LIMITER_DEGRADED.set(int(degraded))
        log.warning("limiter.changed", degraded=degraded)

    return FallbackLimiter(RedisLimiter(redis_client(url), clock), clock, report)


# -- background jobs --------------------------------------------------------------------------------------------------


async def load_keys(services: Services) -> None:
    """Load every key before the first request, making those that an empty database lacks. Raises MasterKeyError."""
    await services.db.run(lambda tx: _load_data_keys(services, tx))
    await step_keys(services)


async def step_keys(services: Services) -> None:
    """Read the key schedule, correct the clock by the database's, and take the steps that are due."""
    owed = await services.db.run(lambda tx: _poll(services, tx))
    if owed:
        spare = await services.signing_keys.prepare(owed)
        await services.db.run(lambda tx: _advance(services, tx, spare))
        await services.db.run(services.signing_keys.poll)


async def correct_clock(services: Services, tx: Transaction) -> None:
    """Set the clock by the database's, so that instants mean the same here as where they were stored."""
    clock = services.clock
    if isinstance(clock, SystemClock) and not services.db.on_sqlite:
        asked_at = clock.now()
        reference = await tx.database_time()
        clock.correct(reference=reference.astimezone(UTC), asked_at=asked_at, answered_at=clock.now())


async def _load_data_keys(services: Services, tx: Transaction) -> None:
    for purpose in await services.data_keys.load(tx):
        await services.audit.record(tx, "data_key.created", origin=None, actor=_SCHEDULE, target=purpose)


async def _poll(services: Services, tx: Transaction) -> Plan:
    await correct_clock(services, tx)
    return await services.signing_keys.poll(tx)


async def _advance(services: Services, tx: Transaction, spare: Sequence[NewKey]) -> None:
    taken = await services.signing_keys.advance(tx, spare)
    for key, activates_at in zip(spare, taken.create, strict=False):
        detail = {"activates_at": activates_at.isoformat()}
        await services.audit.record(tx, "key.created", origin=None, actor=_SCHEDULE, target=key.kid, detail=detail)
    for kid in taken.retire:
        await services.audit.record(tx, "key.retired", origin=None, actor=_SCHEDULE, target=kid)


async def _repeat(name: str, every: float, job: Any) -> None:
    """Run a job for ever; an outage of the database delays it, a fault of ours is logged and does not end it."""
    while True:
        await asyncio.sleep(every)
        try:
            await job()
        except DatabaseUnavailable as error:
            log.warning("job.postponed", job=name, reason=str(error))
        except Exception:
            log.exception("job.failed", job=name)


async def _flush_audit(services: Services) -> None:
    services.audit.flushed(await services.db.run(services.audit.flush))


# -- the application --------------------------------------------------------------------------------------------------


async def _check_default_client(services: Services) -> None:
    """Refuse to let nameless requests stand for a client that has a secret, or that is not ours."""
    if (client_id := services.settings.default_client_id) is None:
        return
    client = await services.db.run(lambda tx: services.clients.find(tx, client_id))
    if client is None or not client.public or not client.first_party:
        raise UnsafeSettings("IDENTITY_DEFAULT_CLIENT_ID must name a public first-party client")


class Application(FastAPI):
    """FastAPI with the edge before it: the hot endpoints are answered without waking the framework."""

    edge: Edge

    async def framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what the edge has no endpoint for."""
        await super().__call__(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self.edge(scope, receive, send)


def create_app(settings: Settings, *, clock: Clock | None = None) -> FastAPI:
    """
    Build the application. Its lifespan loads the keys, refusing to start without them, and runs the jobs.

    `app.state.services` holds the objects, for tests and for the development server.
    """
    services = build_services(settings, clock=clock)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        revision = await services.db.revision()
        if revision is None or revision < SCHEMA_REVISION:
            raise UnsafeSettings("the database's schema is older than this version: run `identity-service migrate`")
        await load_keys(services)
        await _check_default_client(services)
        if settings.production and not settings.trusted_proxies:
            log.warning("service.no_trusted_proxies", hint="behind a proxy, everybody shares its limits")
        jobs = [
            asyncio.create_task(_repeat("keys", settings.key_poll, lambda: step_keys(services))),
            asyncio.create_task(_repeat("audit", _FLUSH_EVERY, lambda: _flush_audit(services))),
        ]
        log.info("service.ready", issuer=settings.public_issuer, environment=settings.environment)
        try:
            yield
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            with contextlib.suppress(DatabaseUnavailable):
                await _flush_audit(services)
            await services.close()

    docs = not settings.production
    app = Application(
        title="identity_service",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
        telemetry={"tracing": False},  # it would export query strings
        max_body_size=LARGEST_BODY,
    )
    app.state.services = services
    app.include_router(account_router(services.db, Bearer(services.issued), services.users))
    install_error_pages(app)
    app.add_middleware(Guard)
    app.edge = Edge(
        app.framework,
        endpoints=_endpoints(services),
        allowed_hosts=settings.hosts,
        https=settings.public_issuer.startswith("https://"),
        access_log=settings.access_log,
        docs=docs,
    )
    return app


def _endpoints(services: Services) -> dict[str, Endpoint]:
    settings = services.settings
    proxies = [ipaddress.ip_network(entry, strict=False) for entry in settings.trusted_proxies]
    authenticator = ClientAuthenticator(
        services.db, services.clients, services.limiter, services.audit, services.data_keys, services.clock
    )
    guesses = FailureBudget(services.limiter, services.clock, TOKEN_GUESSING)
    metadata = MetadataEndpoint(issuer=settings.public_issuer, grant_types=services.pipeline.grant_types)
    return {
        "/token": TokenEndpoint(
            authenticator,
            services.db,
            services.pipeline,
            trusted_proxies=proxies,
            default_client_id=settings.default_client_id,
            refusal_delay=settings.refusal_delay,
        ),
        "/revoke": RevocationEndpoint(
            authenticator,
            services.db,
            services.issued,
            services.families,
            guesses,
            services.audit,
            trusted_proxies=proxies,
        ),
        "/introspect": IntrospectionEndpoint(
            authenticator, services.db, services.issued, services.families, guesses, trusted_proxies=proxies
        ),
        "/.well-known/jwks.json": JwksEndpoint(services.signing_keys),
        "/.well-known/oauth-authorization-server": metadata,
        "/.well-known/openid-configuration": metadata,
        "/healthz": Liveness(),
        "/readyz": Readiness(services.db, services.signing_keys),
    }
