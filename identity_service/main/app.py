"""The application: its lifespan, its routes and the endpoints that stand before them."""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from fastapi import APIRouter, FastAPI

from identity_service.accounts.recovery import Recovery
from identity_service.accounts.registration import Registration
from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.ratelimit.catalogue import (
    TOKEN_GUESSING,
    api_key_rule,
    caller_rule,
    client_rule,
    network_rule,
)
from identity_service.infra.runtime import Clock
from identity_service.infra.telemetry import Tracer
from identity_service.main.jobs import flush_audit, for_all, load_keys, repeat, step_keys
from identity_service.main.services import Services, build_services, build_tracer, restore_fault, schema_fault
from identity_service.settings import Settings, UnsafeSettings
from identity_service.web.account.api_keys import api_keys_router
from identity_service.web.account.parts import AccountParts, Mail
from identity_service.web.account.routes import account_router
from identity_service.web.admin import admin_routers
from identity_service.web.admin.api_keys import admin_api_keys_router
from identity_service.web.admin.stats import Figures
from identity_service.web.asgi import Receive, Scope, Send
from identity_service.web.callers import Callers
from identity_service.web.cors import Cors, CorsOrigins
from identity_service.web.deps import Bearer, ClientAuthenticator, FailureBudget, IPNetwork
from identity_service.web.documented import document
from identity_service.web.edge import Edge, Endpoint, Guard
from identity_service.web.error_pages import install_error_pages
from identity_service.web.forms import LARGEST_BODY
from identity_service.web.health import Drain, Liveness, Readiness
from identity_service.web.management import Management
from identity_service.web.oauth import (
    IntrospectionEndpoint,
    JwksEndpoint,
    MetadataEndpoint,
    RevocationEndpoint,
    TokenEndpoint,
)
from identity_service.web.pages import pages_router

log = structlog.get_logger(__name__)

_FLUSH_EVERY = 30.0  # seconds between two writings of the failures that were held back


async def _check_default_client(services: Services) -> None:
    """Refuse to let nameless requests stand for a client that has a secret, or that is not ours."""
    if (client_id := services.settings.default_client_id) is None:
        return
    client = await services.db.run(lambda tx: services.clients.find(tx, client_id))
    if client is None or not client.public or not client.first_party:
        raise UnsafeSettings("IDENTITY_DEFAULT_CLIENT_ID must name a public first-party client")


async def _prepare(services: Services) -> None:
    """Load the keys, and refuse to start where something is wrong that requests would stumble over."""
    if fault := await services.db.pooler_fault() or await schema_fault(services.db) or await restore_fault(services.db):
        raise UnsafeSettings(fault)
    await load_keys(services)
    await _check_default_client(services)
    if services.settings.production and not services.settings.trusted_proxies:
        log.warning("service.no_trusted_proxies", hint="behind a proxy, everybody shares its limits")


class Application(FastAPI):
    """FastAPI with the edge before it: the hot endpoints are answered without waking the framework."""

    edge: Edge
    drain: Drain
    management: Management

    async def framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what the edge has no endpoint for."""
        await super().__call__(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self.edge(scope, receive, send)


def create_app(
    settings: Settings,
    *,
    clock: Clock | None = None,
    say: Callable[[str], None] = lambda _line: None,
    own_jobs: bool = True,
    leased_jobs: bool = True,
    tracer: Tracer | None = None,
) -> Application:
    """
    Build the application. Its lifespan loads the keys, refusing to start without them, and runs the jobs.

    `app.state.services` holds the objects, for tests and for the development server; `say` hears of mails that are
    written instead of sent. Without `own_jobs` whoever holds the application does what each replica does by itself,
    such as looking at the key schedule, and without `leased_jobs` what one does for all. `tracer` traces in place of
    the one that the settings ask for. Raises MasterKeyError, UnsafeSettings.
    """
    tracer = tracer or build_tracer(settings)
    services = build_services(settings, clock=clock, say=say)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as leaving:
            leaving.push_async_callback(services.close)  # also when this start is refused
            if tracer is not None:
                leaving.push_async_callback(asyncio.to_thread, tracer.close)
            await _prepare(services)
            jobs = []
            if own_jobs:
                jobs += [
                    asyncio.create_task(repeat("keys", settings.key_poll, lambda: step_keys(services))),
                    asyncio.create_task(repeat("audit", _FLUSH_EVERY, lambda: flush_audit(services))),
                ]
            if leased_jobs:
                jobs += [asyncio.create_task(coroutine) for coroutine in for_all(services)]
            log.info("service.ready", issuer=settings.public_issuer, environment=settings.environment)
            try:
                yield
            finally:
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)
                with contextlib.suppress(DatabaseUnavailable):
                    await flush_audit(services)

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
    for router in _routers(services):
        app.include_router(router)
    install_error_pages(app)
    app.openapi = lambda: document(app, grant_types=services.pipeline.grant_types)  # type: ignore[method-assign]
    app.add_middleware(Guard)
    app.drain = Drain()
    readiness = Readiness(services.db, services.signing_keys, app.drain)
    app.management = Management(readiness)
    app.edge = Edge(
        app.framework,
        endpoints=_endpoints(services, readiness),
        allowed_hosts=settings.hosts,
        https=settings.public_issuer.startswith("https://"),
        access_log=settings.access_log,
        docs=docs,
        cors=Cors(CorsOrigins(services.db, services.clients, services.clock)),
        trusted_proxies=_proxies(settings),
        drain=app.drain,
        on_limited=services.note_limited,
        tracer=tracer,
    )
    return app


def _proxies(settings: Settings) -> list[IPNetwork]:
    return [ipaddress.ip_network(entry, strict=False) for entry in settings.trusted_proxies]


def _routers(services: Services) -> list[APIRouter]:
    """Return the routes of the JSON API; what needs mail is there only where mails can be sent."""
    settings = services.settings
    callers = Callers(
        services.db,
        Bearer(services.issued),
        services.users,
        services.clients,
        services.access,
        services.api_keys,
        services.audit,
        services.limiter,
        services.local_limiter,
        services.clock,
        caller_rule=caller_rule(settings.client_rate),
        network_rule=network_rule(settings.client_rate),
        api_key=api_key_rule(settings.api_key_rate),
        trusted_proxies=_proxies(settings),
    )
    mail = None
    if services.mailer is not None:
        recovery = Recovery(services.users, services.api_keys, services.email_tokens, services.outbox, services.audit)
        mail = Mail(services.outbox, services.email_tokens, recovery)
    registration = Registration(
        services.users,
        services.audit,
        services.data_keys,
        mode=settings.registration,
        outbox=mail.outbox if mail else None,
        recovery=mail.recovery if mail else None,
    )
    parts = AccountParts(
        callers=callers,
        users=services.users,
        policy=services.password_policy,
        families=services.families,
        access=services.access,
        clients=services.clients,
        api_keys=services.api_keys,
        throttle=services.throttle,
        limiter=services.limiter,
        audit=services.audit,
        data_keys=services.data_keys,
        cursors=services.cursors,
        clock=services.clock,
        registration=registration,
        mail=mail,
        bootstrap=services.bootstrap,
        refusal_delay=settings.refusal_delay,
        service_name=settings.service_name,
    )
    figures = Figures(services.clock, services.users, services.families, services.outbox, services.audit.event_counts)
    operators = admin_routers(
        callers,
        users=services.users,
        access=services.access,
        families=services.families,
        clients=services.clients,
        api_keys=services.api_keys,
        signing_keys=services.signing_keys,
        key_acts=services.key_acts,
        audit=services.audit,
        cursors=services.cursors,
        figures=figures,
        mail=mail,
    )
    pages = [pages_router(parts, mail)] if mail is not None else []
    keys = [
        api_keys_router(callers, services.api_keys, services.cursors, services.audit, services.limiter, parts.notify),
        admin_api_keys_router(
            callers,
            services.api_keys,
            services.clients,
            services.users,
            services.access,
            services.cursors,
            services.audit,
        ),
    ]
    return [account_router(parts), *keys, *operators, *pages]


def _endpoints(services: Services, readiness: Readiness) -> dict[str, Endpoint]:
    settings = services.settings
    proxies = _proxies(settings)
    authenticator = ClientAuthenticator(
        services.db,
        services.clients,
        services.limiter,
        services.local_limiter,
        services.audit,
        services.data_keys,
        services.clock,
        general=client_rule(settings.client_rate),
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
        "/readyz": readiness,
    }
