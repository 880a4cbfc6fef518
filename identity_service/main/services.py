"""Every object of the service, built once."""

import contextlib
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog

from identity_service.accounts.access import Access
from identity_service.accounts.api_keys import ApiKeys
from identity_service.accounts.bootstrap import Bootstrap
from identity_service.accounts.clients import Clients
from identity_service.accounts.email_flows import EmailTokens
from identity_service.accounts.password_policy import PasswordPolicy
from identity_service.accounts.refresh_families import Lifetimes, RefreshFamilies
from identity_service.accounts.throttle import SignInThrottle
from identity_service.accounts.users import Users
from identity_service.infra.audit import AuditChain, AuditTrail
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Database
from identity_service.infra.installation import read_installation
from identity_service.infra.leases import Leases
from identity_service.infra.mail import Mailer
from identity_service.infra.outbox import Outbox
from identity_service.infra.ratelimit import Limiter, MemoryLimiter
from identity_service.infra.ratelimit.catalogue import API_KEY_GUESSING, api_key_rule
from identity_service.infra.runtime import Clock, Secret, SteadyClock, SystemClock
from identity_service.infra.runtime.envelope import MasterKeyError, MasterKeys, new_master_key
from identity_service.infra.runtime.hashing import PasswordHasher
from identity_service.infra.tables import OLDEST_SCHEMA_REVISION
from identity_service.infra.telemetry import Tracer
from identity_service.infra.telemetry.metrics import LIMITER_DEGRADED
from identity_service.main.chain_alarm import ChainAlarm
from identity_service.main.mail_job import build_mailer
from identity_service.oauth.grants.client_credentials import ClientCredentials
from identity_service.oauth.grants.password import Password
from identity_service.oauth.grants.pipeline import Grant, Pipeline
from identity_service.oauth.grants.refresh_token import RefreshToken
from identity_service.oauth.grants.token_exchange import TokenExchange
from identity_service.oauth.signing_keys import KeyActs, KeyPolicy, SigningKeys
from identity_service.oauth.tokens import IssuedTokens, Tokens
from identity_service.settings import Settings, UnsafeSettings, weak_secret
from identity_service.web.deps import FailureBudget
from identity_service.web.paging import Cursors

log = structlog.get_logger(__name__)


class NoMasterKeyYet(MasterKeyError):
    """Nobody has made the master key of a development database yet, and nothing is wrapped with one."""


def load_master_keys(settings: Settings, *, make: bool = True) -> MasterKeys:
    """
    Return the master keys of the settings; development makes one on first use, readable by its owner only.

    Raises MasterKeyError; without `make`, NoMasterKeyYet where one would have been made. Nothing is ever generated
    where a key was named, or where a database holds keys already: a new one could unwrap none of them.
    """
    if text := settings.master_key.get_secret_value():
        return MasterKeys.parse(text)
    path = settings.master_key_file or development_key_file(settings.data_dir)
    ours_to_make = settings.master_key_file is None and not settings.production and not path.exists()
    if ours_to_make and not _holds_keys(settings):
        if not make:
            raise NoMasterKeyYet("there is no master key yet; `identity-service dev` makes one when it first starts")
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
    """
    Return where one machine keeps its master key: in `keys/` beside a data directory called `.data`, else inside it.

    That depends on the data directory alone, so a command finds the key wherever it is run. For a `.data` without a
    key beside it, one that is inside counts.
    """
    inside = data_dir / "master.key"
    default: Path = Settings.model_fields["data_dir"].default
    named = data_dir if data_dir.name == default.name else data_dir.resolve()
    if named.name != default.name:
        return inside
    beside = named.parent / "keys" / "master.key"
    return inside if inside.exists() and not beside.exists() else beside


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
    key_acts: KeyActs
    limiter: Limiter
    local_limiter: Limiter
    audit: AuditTrail
    audit_chain: AuditChain
    chain_alarm: ChainAlarm
    access: Access
    clients: Clients
    hasher: PasswordHasher
    password_policy: PasswordPolicy
    users: Users
    api_keys: ApiKeys
    email_tokens: EmailTokens
    outbox: Outbox
    mailer: Mailer | None
    bootstrap: Bootstrap | None
    leases: Leases
    cursors: Cursors
    throttle: SignInThrottle
    families: RefreshFamilies
    issued: IssuedTokens
    pipeline: Pipeline

    def note_limited(self, limit: str, network: str) -> None:
        """Count for the audit trail that a limit refused somebody."""
        event = "sign_in.throttled" if limit.startswith("sign_in.") else "limit.hit"
        self.audit.count(event, target=limit, network=network)

    async def close(self) -> None:
        """Give back connections and threads."""
        self.hasher.close()
        await self.limiter.close()
        await self.db.close()


async def schema_fault(db: Database) -> str | None:
    """Return what is wrong with a database whose schema is older than this code; None for one that is new enough."""
    revision = await db.revision()
    if revision is None or revision < OLDEST_SCHEMA_REVISION:
        return (
            f"the database's schema ({revision or 'none yet'}) is older than this version, which needs"
            f" {OLDEST_SCHEMA_REVISION}: run `identity-service migrate`"
        )
    return None


async def restore_fault(db: Database) -> str | None:
    """Return why a database must not be served that was restored or copied; None for one that stands where it stood."""
    found = await db.run(read_installation)
    if found is None or found.at_home:
        return None
    return (
        "the database was restored from a dump, or copied, and would bring back what was ended since: run"
        " `identity-service after-restore`, or, if it was only moved while nothing was served,"
        " `identity-service after-restore --nothing-lost`"
    )


def _silent(_line: str) -> None:
    """Say nothing."""


def build_services(
    settings: Settings,
    *,
    clock: Clock | None = None,
    say: Callable[[str], None] = _silent,
    make_master_key: bool = True,
) -> Services:
    """
    Build the objects; nothing connects yet. Raises MasterKeyError (see `load_master_keys`), UnsafeSettings.

    `say` hears of each mail that a development server writes instead of sending it.
    """
    clock = clock or SystemClock()
    master = load_master_keys(settings, make=make_master_key)
    db = Database(settings.database, pool_size=settings.database_pool_size, pooled=settings.pooled)
    data_keys = DataKeys(master, clock)
    key_policy = KeyPolicy(
        bits=settings.signing_key_bits,
        lead=timedelta(seconds=settings.signing_key_lead),
        period=timedelta(seconds=settings.signing_key_period),
    )
    signing_keys = SigningKeys(master, clock, key_policy)
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
    password_policy = PasswordPolicy(settings.password_min_length, settings.password_classes, settings.service_name)
    users = Users(clock, hasher, password_policy)
    api_keys = ApiKeys(clock, data_keys, max_ttl=settings.api_key_max_ttl)
    throttle = SignInThrottle(limiter, data_keys)
    families = RefreshFamilies(clock, data_keys, Lifetimes(settings.refresh_idle_ttl, settings.refresh_absolute_ttl))
    issuer = settings.public_issuer
    local_limiter = MemoryLimiter(SteadyClock())
    outbox = Outbox(clock, limit=settings.mail_queue)
    issued = IssuedTokens(clock, signing_keys, clients, families, api_keys, issuer=issuer)
    exchange = TokenExchange(
        api_keys,
        issued,
        users,
        clients,
        audit,
        limiter,
        FailureBudget(limiter, clock, API_KEY_GUESSING),
        clock,
        api_key=api_key_rule(settings.api_key_rate),
    )
    tokens = Tokens(clock, signing_keys, issuer=issuer, lifetime=settings.access_token_ttl)
    password = Password(
        users, families, throttle, access, audit, issuer=issuer, require_verified_email=settings.require_verified_email
    )
    grants: list[Grant[Any]] = [RefreshToken(families, audit), ClientCredentials(issuer=issuer), exchange]
    if settings.password_grant:
        grants.insert(0, password)
    return Services(
        settings=settings,
        clock=clock,
        db=db,
        data_keys=data_keys,
        signing_keys=signing_keys,
        key_acts=KeyActs(signing_keys, audit),
        limiter=limiter,
        local_limiter=local_limiter,
        audit=audit,
        audit_chain=AuditChain(clock, data_keys),
        chain_alarm=ChainAlarm(clock),
        access=access,
        clients=clients,
        hasher=hasher,
        password_policy=password_policy,
        users=users,
        api_keys=api_keys,
        email_tokens=EmailTokens(
            clock,
            data_keys,
            lifetimes={
                "verify_email": settings.email_verification_ttl,
                "change_email": settings.email_verification_ttl,
                "reset_password": settings.password_reset_ttl,
            },
        ),
        outbox=outbox,
        mailer=build_mailer(settings, say),
        bootstrap=_bootstrap(settings, clock),
        leases=Leases(clock),
        cursors=Cursors(data_keys),
        throttle=throttle,
        families=families,
        issued=issued,
        pipeline=Pipeline(grants, access, tokens),
    )


def _bootstrap(settings: Settings, clock: Clock) -> Bootstrap | None:
    """Return the way to the first operator, if a secret for it is set. Raises UnsafeSettings for an unreadable one."""
    secret = settings.bootstrap_secret.get_secret_value()
    if (path := settings.bootstrap_secret_file) is not None:
        try:
            secret = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UnsafeSettings(f"IDENTITY_BOOTSTRAP_SECRET_FILE: {type(error).__name__}: {path}") from None
        if weak_secret(secret):
            raise UnsafeSettings(
                "IDENTITY_BOOTSTRAP_SECRET_FILE holds something too short or too plain: use `openssl rand -base64 32`"
            )
    return Bootstrap(clock, Secret(secret)) if secret else None


def _limiter(settings: Settings, clock: Clock) -> Limiter:
    if not (url := settings.redis_url.get_secret_value()):
        return MemoryLimiter(clock)
    # The Redis client takes 15 MB and a tenth of a second; who has no Redis need not pay for it.
    from identity_service.infra.ratelimit.shared import FallbackLimiter, RedisLimiter, redis_client

    def report(degraded: bool) -> None:
        LIMITER_DEGRADED.set(int(degraded))
        log.warning("limiter.changed", degraded=degraded)

    return FallbackLimiter(RedisLimiter(redis_client(url), clock), clock, report)


def build_tracer(settings: Settings) -> Tracer | None:
    """Return what traces under these settings, by default nothing. Raises UnsafeSettings where it is not installed."""
    if not settings.traces_endpoint:
        return None
    try:
        from identity_service.infra.telemetry.otlp import OtlpTracer
    except ModuleNotFoundError as error:
        raise UnsafeSettings(
            f"IDENTITY_TRACES_ENDPOINT is set, and {error.name} is not installed: pip install identity-service[otel]"
        ) from None
    return OtlpTracer.exporting_to(settings.traces_endpoint, ratio=settings.traces_ratio)
