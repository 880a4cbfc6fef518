"""Registered clients (RFC 7591 terms) and their secrets."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, final
from urllib.parse import urlsplit

from sqlalchemy import delete, insert, select, update

from identity_service.accounts.access import ScopeList, parse_scope
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.runtime.cache import RowCache
from identity_service.infra.runtime.ids import encode_token
from identity_service.infra.tables import client_secrets, clients

GRANT_TYPES = (
    "password",
    "refresh_token",
    "client_credentials",
    "authorization_code",
    "urn:ietf:params:oauth:grant-type:device_code",
    "urn:ietf:params:oauth:grant-type:token-exchange",
)
NO_AUTHENTICATION = "none"
AUTH_METHODS = ("client_secret_basic", "client_secret_post", NO_AUTHENTICATION)
MOST_SECRETS = 2
SHORTEST_ACCESS_TOKEN, LONGEST_ACCESS_TOKEN = 60, 3600  # seconds; signing keys stay published for the longest
LONGEST_RETRY_WINDOW = 60  # seconds
_LONGEST_REFRESH = 366 * 86400  # seconds
_SECRET_BYTES = 32
_CLIENT_ID = re.compile(r"cl_[0-9A-Za-z]{22}")
_LOOPBACK_HOSTS = ("127.0.0.1", "::1")


class InvalidClientMetadata(ValueError):
    """A client was to be registered with something it cannot have; the message says what and why."""


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
class NewClient:
    """What a client is to be registered with."""

    name: str
    grant_types: Sequence[str] = ()
    scope: Sequence[str] = ()
    audiences: Sequence[str] = ()
    redirect_uris: Sequence[str] = ()
    introspect: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
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
        _demand(0 < len(self.name) <= 200 and self.name.isprintable(), "name: 1 to 200 printable characters")
        _demand(
            self.token_endpoint_auth_method in AUTH_METHODS,
            f"token_endpoint_auth_method: one of {', '.join(AUTH_METHODS)}",
        )
        for grant in self.grant_types:
            _demand(grant in GRANT_TYPES, f"grant_types: {', '.join(GRANT_TYPES)}")
        _demand("password" not in self.grant_types or self.first_party, "the password grant is for first-party clients")
        _demand(
            not public or "client_credentials" not in self.grant_types,
            "client_credentials needs a client that can authenticate (RFC 6749 section 4.4)",
        )
        _demand(
            not public or not self.introspect,
            "introspection needs a client that can authenticate (RFC 7662 section 2.1)",
        )
        _demand(self.require_pkce or not public, "a public client cannot do without PKCE (RFC 9700 section 2.1.1)")
        _demand(
            all(parse_scope(scope) == (scope,) for scope in self.scope) and len(set(self.scope)) <= 100,
            "scope: at most 100 words of RFC 6749 section 3.3",
        )
        for uri in self.redirect_uris:
            _demand(_is_redirect_uri(uri), "redirect_uris: https, a loopback address, or a private scheme; no fragment")
        for uri in (*self.audiences, *self.introspect):
            _demand(_is_absolute_uri(uri), "audiences and introspect: absolute URIs without fragment (RFC 8707)")
        for origin in self.cors_origins:
            _demand(_is_origin(origin), "cors_origins: scheme://host[:port], never *")
        _demand(0 <= self.refresh_retry_window <= LONGEST_RETRY_WINDOW, "refresh_retry_window: 0 to 60 seconds")
        _demand(
            self.access_token_ttl is None or SHORTEST_ACCESS_TOKEN <= self.access_token_ttl <= LONGEST_ACCESS_TOKEN,
            "access_token_ttl: 60 to 3600 seconds",
        )
        for ttl in (self.refresh_idle_ttl, self.refresh_absolute_ttl):
            _demand(ttl is None or 60 <= ttl <= _LONGEST_REFRESH, "refresh lifetimes: 60 seconds to 366 days")


def _demand(condition: bool, message: str) -> None:
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


def _digest(secret: str) -> bytes:
    # A generated secret carries 256 bits: there is nothing to guess, so a fast digest serves, and a slow one would
    # let anybody make the token endpoint work hard.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


@final
class Clients:
    """Reads, authenticates and changes clients."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._cache: RowCache[str, Client | None] = RowCache(clock)

    async def find(self, tx: Transaction, client_id: str) -> Client | None:
        """Return the client of that id, enabled or not, at most a second old; None if there is none."""
        if not _CLIENT_ID.fullmatch(client_id):
            return None  # not one of ours; the database need not be asked
        return await self._cache.get(client_id, lambda: self._load(tx, client_id))

    def proves(self, client: Client, secret: Secret) -> bool:
        """Return whether `secret` is one of the client's live secrets, in a time that does not depend on it."""
        presented, now, right = _digest(secret.reveal()), self._clock.now(), False
        for digest, expires_at in client.secrets:
            live = expires_at is None or expires_at > now
            right |= hmac.compare_digest(digest, presented) and live
        return right

    async def register(self, tx: Transaction, new: NewClient) -> tuple[Client, Secret | None]:
        """
        Store a client under a generated id; return it with its secret, which is never shown again.

        Ids are never chosen, so none can be made to equal a user's `sub` (RFC 9700 §4.15). Raises
        InvalidClientMetadata.
        """
        new.check()
        now = self._clock.now()
        client_id = "cl_" + encode_token("", secrets.token_bytes(16))[:22]
        await tx.execute(
            insert(clients).values(
                id=client_id,
                name=new.name,
                first_party=new.first_party,
                token_endpoint_auth_method=new.token_endpoint_auth_method,
                grant_types=sorted(set(new.grant_types)),
                redirect_uris=list(new.redirect_uris),
                scope=" ".join(dict.fromkeys(new.scope)),
                audiences=list(dict.fromkeys(new.audiences)),
                introspect=list(dict.fromkeys(new.introspect)),
                cors_origins=list(new.cors_origins),
                require_pkce=new.require_pkce,
                access_token_ttl=new.access_token_ttl,
                refresh_idle_ttl=new.refresh_idle_ttl,
                refresh_absolute_ttl=new.refresh_absolute_ttl,
                refresh_retry_window=new.refresh_retry_window,
                enabled=True,
                epoch=0,
                epoch_at=now,
                created_at=now,
                updated_at=now,
            )
        )
        secret = None if new.token_endpoint_auth_method == NO_AUTHENTICATION else await self._add_secret(tx, client_id)
        return await self._known(tx, client_id), secret

    async def rotate_secret(self, tx: Transaction, client_id: str, *, overlap: timedelta) -> Secret:
        """
        Add a new secret and let the others end after `overlap`; at most two are live, the oldest gives way.

        Raises LookupError for an unknown client, InvalidClientMetadata for one that has no secrets.
        """
        # One rotation at a time, or two at once would leave three secrets.
        await tx.execute(select(clients.c.id).where(clients.c.id == client_id).with_for_update())
        client = await self._known(tx, client_id)
        _demand(not client.public, "a public client has no secret")
        now = self._clock.now()
        live = select(client_secrets.c.id).where(client_secrets.c.client_id == client_id)
        newest_first = (
            (await tx.execute(live.order_by(client_secrets.c.created_at.desc(), client_secrets.c.id.desc())))
            .scalars()
            .all()
        )
        await tx.execute(delete(client_secrets).where(client_secrets.c.id.in_(newest_first[MOST_SECRETS - 1 :])))
        await tx.execute(
            update(client_secrets).where(client_secrets.c.client_id == client_id).values(expires_at=now + overlap)
        )
        self._cache.forget(client_id)
        return await self._add_secret(tx, client_id)

    async def set_enabled(self, tx: Transaction, client_id: str, enabled: bool) -> bool:
        """
        Enable or disable a client; return False if there is none.

        Disabling moves its epoch on: its families and its own tokens die with it, and enabling does not revive them.
        """
        values: dict[str, Any] = {"enabled": enabled, "updated_at": self._clock.now()}
        if not enabled:
            values |= {"epoch": clients.c.epoch + 1, "epoch_at": self._clock.now()}
        changed = await tx.execute(
            update(clients).where(clients.c.id == client_id).values(values).returning(clients.c.id)
        )
        self._cache.forget(client_id)
        return changed.first() is not None

    async def set_audiences(self, tx: Transaction, client_id: str, audiences: Sequence[str]) -> None:
        """Replace what tokens the client may ask for; running families keep what they were granted."""
        await tx.execute(
            update(clients)
            .where(clients.c.id == client_id)
            .values(audiences=list(audiences), updated_at=self._clock.now())
        )
        self._cache.forget(client_id)

    async def all(self, tx: Transaction) -> list[Client]:
        """Return every client, oldest first."""
        rows = (await tx.execute(select(clients).order_by(clients.c.created_at, clients.c.id))).all()
        return [self._client(row, ()) for row in rows]

    async def _add_secret(self, tx: Transaction, client_id: str) -> Secret:
        secret = Secret(encode_token("cs_", secrets.token_bytes(_SECRET_BYTES)))
        await tx.execute(
            insert(client_secrets).values(
                id=new_id(), client_id=client_id, digest=_digest(secret.reveal()), created_at=self._clock.now()
            )
        )
        return secret

    async def _known(self, tx: Transaction, client_id: str) -> Client:
        client = await self._load(tx, client_id)
        if client is None:
            raise LookupError(client_id)
        return client

    async def _load(self, tx: Transaction, client_id: str) -> Client | None:
        row = (await tx.execute(select(clients).where(clients.c.id == client_id))).first()
        if row is None:
            return None
        held = await tx.execute(
            select(client_secrets.c.digest, client_secrets.c.expires_at).where(client_secrets.c.client_id == client_id)
        )
        return self._client(row, held.all())

    @staticmethod
    def _client(row: Any, held: Iterable[Any]) -> Client:
        return Client(
            id=row.id,
            name=row.name,
            first_party=row.first_party,
            token_endpoint_auth_method=row.token_endpoint_auth_method,
            grant_types=frozenset(row.grant_types),
            redirect_uris=tuple(row.redirect_uris),
            scope=tuple(row.scope.split()),
            audiences=tuple(row.audiences),
            introspect=tuple(row.introspect),
            cors_origins=tuple(row.cors_origins),
            require_pkce=row.require_pkce,
            access_token_ttl=row.access_token_ttl,
            refresh_idle_ttl=row.refresh_idle_ttl,
            refresh_absolute_ttl=row.refresh_absolute_ttl,
            refresh_retry_window=row.refresh_retry_window,
            enabled=row.enabled,
            epoch=row.epoch,
            secrets=tuple((secret.digest, secret.expires_at) for secret in held),
        )
