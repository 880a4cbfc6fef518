"""What a client can be registered with (RFC 7591 terms), and what it cannot."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import urlsplit

from identity_service.accounts.access import ScopeList, parse_scope
from identity_service.infra.runtime import Secret

TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105  # RFC 8693 §2.1
GRANT_TYPES = (
    "password",
    "refresh_token",
    "client_credentials",
    "authorization_code",
    "urn:ietf:params:oauth:grant-type:device_code",
    TOKEN_EXCHANGE,
)
NO_AUTHENTICATION = "none"
AUTH_METHODS = ("client_secret_basic", "client_secret_post", NO_AUTHENTICATION)
_SHORTEST_TOKEN = 60  # seconds
_LONGEST_ACCESS_TOKEN = 3600  # seconds; signing keys stay published for so long
_LONGEST_REFRESH = 366 * 86400  # seconds
_LONGEST_RETRY_WINDOW = 60  # seconds
_MOST_SCOPES, _LONGEST_NAME = 100, 200
_LOOPBACK_HOSTS = ("127.0.0.1", "::1")


class InvalidClientMetadata(ValueError):
    """A client was to be registered with something it cannot have; the message is `member: why`."""


@dataclass(frozen=True, slots=True)
class Client:
    """A registered client as stored. Rows may be a second old."""

    id: str
    name: str
    first_party: bool
    token_endpoint_auth_method: str
    grant_types: frozenset[str]
    redirect_uris: tuple[str, ...]
    scope: ScopeList
    audiences: tuple[str, ...]
    introspect: tuple[str, ...]
    cors_origins: tuple[str, ...]
    exchange_audiences: tuple[str, ...]
    require_pkce: bool
    access_token_ttl: int | None
    refresh_idle_ttl: int | None
    refresh_absolute_ttl: int | None
    refresh_retry_window: int
    enabled: bool
    epoch: int
    secrets: tuple[tuple[bytes, datetime | None], ...] = field(repr=False, default=())

    @property
    def public(self) -> bool:
        """Whether the client has no secret to prove itself with (RFC 6749 §2.1)."""
        return self.token_endpoint_auth_method == NO_AUTHENTICATION


@dataclass(frozen=True, slots=True)
class SecretRecord:
    """When a client's secret was made, and when it ends."""

    id: uuid.UUID
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewSecret:
    """A client's new secret, the only time its text is at hand."""

    id: uuid.UUID
    text: Secret


@dataclass(frozen=True, slots=True)
class NewClient:
    """What a client is to be registered with."""

    name: str
    grant_types: Sequence[str] = ()
    scope: Sequence[str] = ()
    audiences: Sequence[str] = ()
    redirect_uris: Sequence[str] = ()
    introspect: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    exchange_audiences: Sequence[str] = ()
    token_endpoint_auth_method: str = AUTH_METHODS[0]
    first_party: bool = False
    require_pkce: bool = True
    access_token_ttl: int | None = None
    refresh_idle_ttl: int | None = None
    refresh_absolute_ttl: int | None = None
    refresh_retry_window: int = 0

    def check(self) -> None:
        """Raise InvalidClientMetadata for the first thing that is wrong."""
        public = self.token_endpoint_auth_method == NO_AUTHENTICATION
        demand(
            0 < len(self.name) <= _LONGEST_NAME and self.name.isprintable(),
            f"name: 1 to {_LONGEST_NAME} printable characters",
        )
        demand(
            self.token_endpoint_auth_method in AUTH_METHODS,
            f"token_endpoint_auth_method: one of {', '.join(AUTH_METHODS)}",
        )
        for grant in self.grant_types:
            demand(grant in GRANT_TYPES, f"grant_types: {', '.join(GRANT_TYPES)}")
        demand(
            "password" not in self.grant_types or self.first_party,
            "grant_types: the password grant is for first-party clients",
        )
        demand(
            not public or "client_credentials" not in self.grant_types,
            "grant_types: client_credentials needs a client that can authenticate (RFC 6749 section 4.4)",
        )
        demand(
            not public or not self.introspect,
            "introspect: introspection needs a client that can authenticate (RFC 7662 section 2.1)",
        )
        demand(
            self.require_pkce or not public,
            "require_pkce: a public client cannot do without PKCE (RFC 9700 section 2.1.1)",
        )
        demand(
            all(parse_scope(scope) == (scope,) for scope in self.scope) and len(set(self.scope)) <= _MOST_SCOPES,
            f"scope: at most {_MOST_SCOPES} words of RFC 6749 section 3.3",
        )
        for uri in self.redirect_uris:
            demand(_is_redirect_uri(uri), "redirect_uris: https, a loopback address, or a private scheme; no fragment")
        for name in ("audiences", "introspect", "exchange_audiences"):
            demand(
                all(map(_is_absolute_uri, getattr(self, name))), f"{name}: absolute URIs without fragment (RFC 8707)"
            )
        demand(
            not public or not (self.exchange_audiences or TOKEN_EXCHANGE in self.grant_types),
            "exchange_audiences: exchanging tokens needs a client that can authenticate (RFC 8693 section 2.1)",
        )
        for origin in self.cors_origins:
            demand(_is_origin(origin), "cors_origins: scheme://host[:port], never *")
        demand(
            0 <= self.refresh_retry_window <= _LONGEST_RETRY_WINDOW,
            f"refresh_retry_window: 0 to {_LONGEST_RETRY_WINDOW} seconds",
        )
        demand(
            self.access_token_ttl is None or _SHORTEST_TOKEN <= self.access_token_ttl <= _LONGEST_ACCESS_TOKEN,
            f"access_token_ttl: {_SHORTEST_TOKEN} to {_LONGEST_ACCESS_TOKEN} seconds",
        )
        for name in ("refresh_idle_ttl", "refresh_absolute_ttl"):
            ttl = getattr(self, name)
            demand(
                ttl is None or _SHORTEST_TOKEN <= ttl <= _LONGEST_REFRESH,
                f"{name}: {_SHORTEST_TOKEN} to {_LONGEST_REFRESH} seconds",
            )


def demand(condition: bool, message: str) -> None:
    """Raise InvalidClientMetadata with the message unless the condition holds."""
    if not condition:
        raise InvalidClientMetadata(message)


def _is_absolute_uri(uri: str) -> bool:
    """Return whether `uri` is absolute and has no fragment (RFC 3986 §4.3, RFC 8707 §2)."""
    if not uri.isascii() or not uri.isprintable() or " " in uri or "#" in uri or len(uri) > 2000:
        return False
    try:
        parts = urlsplit(uri)
        return bool(parts.scheme) and bool(parts.netloc or parts.path) and parts.username is None
    except ValueError:
        return False


def _is_redirect_uri(uri: str) -> bool:
    """Return whether `uri` may be registered (RFC 6749 §3.1.2, RFC 8252 §7)."""
    if not _is_absolute_uri(uri):
        return False
    parts = urlsplit(uri)
    if parts.scheme == "https":
        return bool(parts.hostname)
    if parts.scheme == "http":
        return parts.hostname in (*_LOOPBACK_HOSTS, "localhost")
    return "." in parts.scheme  # a private-use scheme is a reversed domain name (RFC 8252 §7.1)


def _is_origin(origin: str) -> bool:
    if not _is_absolute_uri(origin):
        return False
    parts = urlsplit(origin)
    return parts.scheme in ("https", "http") and origin == f"{parts.scheme}://{parts.netloc}" and bool(parts.hostname)
