"""
Every setting, its default, and the combinations the service refuses to start with.

Read once from the environment (`IDENTITY_…`), typed and frozen. The default environment is production, and no secret
has a default: what would be unsafe must be asked for, and some of it cannot be had.
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from email.utils import parseaddr
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

Words = Annotated[tuple[str, ...], NoDecode]
"""Several words in one variable: separated by commas, or a JSON list."""

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_DAY = 86400
_MAIL_FROM = re.compile(r"[^\s@<>]+@[^\s@<>]+")


class UnsafeSettings(Exception):
    """The service must not start like this; the message says what to do and repeats no value."""


class DatabaseSettings(BaseSettings):
    """Where the database is: all that `migrate` needs, so that nobody has to give it an issuer or a master key."""

    model_config = SettingsConfigDict(
        env_prefix="IDENTITY_", frozen=True, extra="ignore", hide_input_in_errors=True, env_ignore_empty=True
    )

    environment: Literal["production", "development"] = "production"
    data_dir: Path = Path(".data")
    database_url: SecretStr = SecretStr("")
    database_pooler: Literal["none", "transaction"] = "none"
    allow_sqlite: bool = False
    log_json: bool = True

    @property
    def production(self) -> bool:
        """Whether everything unsafe is refused."""
        return self.environment == "production"

    @property
    def database(self) -> str:
        """The database's URL; in development, unless one is named, a file in the data directory."""
        named = self.database_url.get_secret_value()
        return named or f"sqlite+aiosqlite:///{(self.data_dir / 'identity.db').absolute()}"

    @property
    def pooled(self) -> bool:
        """Whether the database's URL leads to a connection pooler."""
        return self.database_pooler != "none"

    @property
    def on_sqlite(self) -> bool:
        """Whether the database is the embedded one."""
        return self.database.startswith("sqlite")

    @property
    def sqlite_file(self) -> Path | None:
        """Where the embedded database is kept; None for another database."""
        return Path(self.database.removeprefix("sqlite+aiosqlite:///")) if self.on_sqlite else None

    def _database_refusals(self) -> dict[str, bool]:
        """Return what production refuses about the database, each with whether it is so."""
        return {
            "IDENTITY_DATABASE_URL is not set: postgresql+psycopg://user@host/name": (
                not self.database_url.get_secret_value() and not self.allow_sqlite
            ),
            "SQLite serves one machine only; if that is meant, set IDENTITY_ALLOW_SQLITE=true": (
                bool(self.database_url.get_secret_value()) and self.on_sqlite and not self.allow_sqlite
            ),
        }

    @model_validator(mode="after")
    def _production_is_safe(self) -> Self:
        if self.production:
            _refuse(self._database_refusals())
        return self

    @model_validator(mode="after")
    def _database_is_known(self) -> Self:
        if not self.database.startswith(("postgresql+psycopg://", "sqlite+aiosqlite:///")):
            raise ValueError("IDENTITY_DATABASE_URL must begin with postgresql+psycopg:// or sqlite+aiosqlite:///")
        try:
            make_url(self.database)
        except (ArgumentError, ValueError):
            raise ValueError("IDENTITY_DATABASE_URL: scheme://user:password@host:port/name, percent-encoded") from None
        return self


class Settings(DatabaseSettings):
    """The settings of one process. Durations are in seconds."""

    issuer: str = ""
    database_pool_size: int = Field(10, ge=1, le=100)
    redis_url: SecretStr = SecretStr("")
    master_key: SecretStr = SecretStr("")
    master_key_file: Path | None = None

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    management_host: str = ""
    management_port: int | None = Field(None, ge=1, le=65535)
    allowed_hosts: Words = ()
    trusted_proxies: Words = ()
    default_client_id: str | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access_log: bool = True
    traces_endpoint: str = ""
    traces_ratio: float = Field(0.1, ge=0, le=1)
    shutdown_delay: float = Field(0, ge=0, le=120)
    shutdown_grace: int = Field(25, ge=0, le=600)
    max_connections: int = Field(1000, ge=10, le=100_000)

    access_token_ttl: int = Field(600, ge=60, le=3600)
    refresh_idle_ttl: int = Field(14 * _DAY, ge=60, le=366 * _DAY)
    refresh_absolute_ttl: int = Field(30 * _DAY, ge=60, le=366 * _DAY)

    password_grant: bool = True
    require_verified_email: bool = False
    password_min_length: int = Field(8, ge=8, le=64)
    password_classes: Words = ()
    argon2_memory_kib: int = Field(19456, ge=8, le=65536)
    argon2_time_cost: int = Field(2, ge=1, le=10)
    argon2_parallelism: int = Field(1, ge=1, le=8)
    hash_threads: int = Field(2, ge=1, le=64)
    hash_queue: int = Field(64, ge=0, le=10_000)
    hash_wait: float = Field(2.0, gt=0, le=30)
    refusal_delay: float = Field(0.25, ge=0, le=5)

    registration: Literal["open", "private", "closed"] = "closed"
    service_name: str = Field("Identity", min_length=1, max_length=60)
    purge_after: int = Field(30 * _DAY, ge=0, le=3660 * _DAY)
    audit_retention: int = Field(400 * _DAY, ge=_DAY, le=36600 * _DAY)
    bootstrap_secret: SecretStr = SecretStr("")
    bootstrap_secret_file: Path | None = None

    mail_from: str = ""
    smtp_host: str = ""
    smtp_port: int = Field(587, ge=1, le=65535)
    smtp_security: Literal["starttls", "tls", "none"] = "starttls"
    smtp_username: str = ""
    smtp_password: SecretStr = SecretStr("")
    mail_queue: int = Field(10_000, ge=1, le=1_000_000)
    email_verification_ttl: int = Field(_DAY, ge=300, le=30 * _DAY)
    password_reset_ttl: int = Field(1800, ge=300, le=_DAY)

    api_key_rate: int = Field(600, ge=1, le=1_000_000)
    api_key_max_ttl: int | None = Field(None, ge=3600, le=3660 * _DAY)
    client_rate: int = Field(200, ge=1, le=1_000_000)

    signing_key_bits: Literal[2048, 3072, 4096] = 2048
    signing_key_lead: int = Field(_DAY, ge=1920, le=30 * _DAY)
    signing_key_period: int = Field(30 * _DAY, ge=3600, le=366 * _DAY)
    key_poll: float = Field(2.0, gt=0, le=5)

    @field_validator("allowed_hosts", "trusted_proxies", "password_classes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _json_list(value) if value.startswith("[") and '"' in value else _words(value)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            try:
                network = ipaddress.ip_network(entry, strict=False)
            except ValueError:
                raise ValueError("addresses or networks, as 10.0.0.0/8, separated by commas") from None
            if network.prefixlen == 0:
                raise ValueError("trusting every address as a proxy lets anybody choose their own; name your proxies")
        return value

    @field_validator("password_classes")
    @classmethod
    def _classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if set(value) - {"upper", "lower", "digit", "symbol"}:
            raise ValueError("choose among upper, lower, digit, symbol")
        return value

    @field_validator("traces_endpoint")
    @classmethod
    def _collector(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            good = (
                parts.scheme in ("https", "http")
                and bool(parts.hostname)
                and parts.port != 0
                and not (parts.username or parts.password or parts.query or parts.fragment)
            )
        except ValueError:
            good = False
        if value and not good:
            raise ValueError("where a collector takes OTLP over HTTP, as http://collector:4318/v1/traces")
        return value

    @field_validator("signing_key_bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @property
    def management_address(self) -> tuple[str, int] | None:
        """Where probes and metrics are served, on the public listener's host unless named; None for nowhere."""
        return None if self.management_port is None else (self.management_host or self.host, self.management_port)

    @property
    def public_issuer(self) -> str:
        """The issuer, which every link and every token is built from (never from a request)."""
        return self.issuer or f"http://127.0.0.1:{self.port}"

    @property
    def mailbox(self) -> Path | None:
        """Where a development server writes its mails; None where they are sent, and in production."""
        if self.production or self.smtp_host:
            return None
        default: Path = type(self).model_fields["data_dir"].default
        return Path(".mailbox") if self.data_dir.resolve() == default.resolve() else self.data_dir / "mailbox"

    @property
    def sends_mail(self) -> bool:
        """Whether mail can be sent at all; what needs it is switched off otherwise."""
        return bool(self.smtp_host) or self.mailbox is not None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The Host values that are answered: the issuer's own, and those that are named."""
        own = urlsplit(self.public_issuer).hostname or ""
        own = f"[{own}]" if ":" in own else own
        local = () if self.production else _LOOPBACK
        return tuple(dict.fromkeys((own, *local, *self.allowed_hosts)))

    @model_validator(mode="after")
    def _issuer_is_an_origin(self) -> Self:
        try:
            parts = urlsplit(self.public_issuer)
            good = (
                self.public_issuer == f"{parts.scheme}://{parts.netloc}"
                and parts.scheme in ("https", "http")
                and bool(parts.hostname)
                and parts.username is None
                and parts.port != 0
            )
        except ValueError:
            good = False
        if not good:
            raise ValueError("IDENTITY_ISSUER: scheme://host[:port] and nothing more, as clients shall see it")
        return self

    @model_validator(mode="after")
    def _lifetimes_fit(self) -> Self:
        if self.refresh_idle_ttl > self.refresh_absolute_ttl:
            raise ValueError("IDENTITY_REFRESH_IDLE_TTL must not exceed IDENTITY_REFRESH_ABSOLUTE_TTL")
        if self.signing_key_lead >= self.signing_key_period:
            raise ValueError("IDENTITY_SIGNING_KEY_LEAD must be shorter than IDENTITY_SIGNING_KEY_PERIOD")
        if self.master_key.get_secret_value() and self.master_key_file is not None:
            raise ValueError("set IDENTITY_MASTER_KEY or IDENTITY_MASTER_KEY_FILE, not both")
        return self

    @model_validator(mode="after")
    def _mail_is_possible(self) -> Self:
        if self.smtp_host and not self.mail_from:
            raise ValueError("IDENTITY_MAIL_FROM is not set: name the address that mails come from")
        name, address = parseaddr(self.mail_from)
        writable = bool(_MAIL_FROM.fullmatch(address)) and address.isascii() and (name + address).isprintable()
        if self.mail_from and not writable:
            raise ValueError("IDENTITY_MAIL_FROM: an ASCII address, or a name and such an address in angle brackets")
        if not self.service_name.isprintable():
            raise ValueError("IDENTITY_SERVICE_NAME: 1 to 60 printable characters")
        if self.registration == "private" and not self.require_verified_email:
            raise ValueError(
                "IDENTITY_REGISTRATION=private needs IDENTITY_REQUIRE_VERIFIED_EMAIL=true: otherwise, who can sign"
                " in at once knows that the address was free"
            )
        needs_mail = self.registration == "private" or (self.registration == "open" and self.require_verified_email)
        if needs_mail and not self.sends_mail:
            raise ValueError("IDENTITY_SMTP_HOST is not set: this kind of registration needs mail")
        return self

    @model_validator(mode="after")
    def _bootstrap_secret_is_strong(self) -> Self:
        secret = self.bootstrap_secret.get_secret_value()
        if secret and self.bootstrap_secret_file is not None:
            raise ValueError("set IDENTITY_BOOTSTRAP_SECRET or IDENTITY_BOOTSTRAP_SECRET_FILE, not both")
        if secret and weak_secret(secret):
            raise ValueError("IDENTITY_BOOTSTRAP_SECRET: at least 32 random characters: openssl rand -base64 32")
        return self

    @model_validator(mode="after")
    def _production_is_safe(self) -> Self:
        if not self.production:
            return self
        refusals = {
            "IDENTITY_ISSUER is not set: name the https origin that clients reach this service by": not self.issuer,
            "IDENTITY_ISSUER must be https in production": bool(self.issuer) and not self.issuer.startswith("https://"),
            **self._database_refusals(),
            "no master key: set IDENTITY_MASTER_KEY_FILE (one per line, made with: openssl rand -base64 32)": (
                not self.master_key.get_secret_value() and self.master_key_file is None
            ),
            "IDENTITY_DEFAULT_CLIENT_ID is for development: in production every client names itself": (
                self.default_client_id is not None
            ),
            "IDENTITY_ALLOWED_HOSTS must name the hosts, not *": "*" in self.allowed_hosts,
            "IDENTITY_ARGON2_MEMORY_KIB and IDENTITY_ARGON2_TIME_COST must be at least 19456 and 2": (
                self.argon2_memory_kib < 19456 or self.argon2_time_cost < 2
            ),
            "IDENTITY_REFUSAL_DELAY must be at least 0.1: without it the time tells which names exist": (
                self.refusal_delay < 0.1
            ),
            "IDENTITY_SMTP_SECURITY must be starttls or tls: mails carry links that open accounts": (
                bool(self.smtp_host) and self.smtp_security == "none" and self.smtp_host not in _LOOPBACK
            ),
            "IDENTITY_LOG_LEVEL must not be DEBUG in production": self.log_level == "DEBUG",
        }
        _refuse(refusals)
        return self

    @model_validator(mode="after")
    def _redis_is_known(self) -> Self:
        if url := self.redis_url.get_secret_value():
            wrong = "IDENTITY_REDIS_URL: redis://, rediss:// or unix://, then user:password@host:port/number"
            try:
                known = urlsplit(url).scheme in ("redis", "rediss", "unix") and urlsplit(url).port != 0
            except ValueError:
                raise ValueError(wrong) from None
            if not known:
                raise ValueError(wrong)
        return self


def _refuse(refusals: Mapping[str, bool]) -> None:
    """Raise ValueError with each message that applies."""
    if wrong := [message for message, applies in refusals.items() if applies]:
        raise ValueError("\n".join(wrong))


def weak_secret(text: str) -> bool:
    """Return whether a secret is shorter or plainer than what a random generator gives."""
    return len(text) < 32 or len(set(text)) < 12


def _json_list(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError("words separated by commas, or a JSON list") from None
    return value if isinstance(value, list) else [value]


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def load_settings(**given: Any) -> Settings:
    """
    Return the settings of the environment, with `given` (from the command line) before them.

    Raises UnsafeSettings with one line per fault.
    """
    return _load(Settings, given)


def load_database_settings(**given: Any) -> DatabaseSettings:
    """Return what the environment says about the database alone; `given` and what is raised as in `load_settings`."""
    return _load(DatabaseSettings, given)


_Kind = TypeVar("_Kind", bound=DatabaseSettings)


def _load(kind: type[_Kind], given: Mapping[str, Any]) -> _Kind:
    try:
        return kind(**given)
    except ValidationError as error:
        lines = []
        for fault in error.errors(include_input=False, include_url=False, include_context=False):
            name = "_".join(("IDENTITY", *(str(part).upper() for part in fault["loc"][:1]))) if fault["loc"] else ""
            message = fault["msg"].removeprefix("Value error, ")
            lines += [f"{name}: {part}" if name else part for part in message.splitlines()]
        raise UnsafeSettings("\n".join(lines)) from None
