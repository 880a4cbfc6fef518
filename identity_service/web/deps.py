"""Who is calling, and may they: the network a request comes from, client authentication, bearer tokens."""

import base64
import binascii
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import final
from urllib.parse import unquote_to_bytes

from identity_service.accounts.clients import Client, Clients
from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.database import Database, Transaction
from identity_service.infra.ratelimit import Left, Limited, Limiter, Rule, Spend
from identity_service.infra.ratelimit.catalogue import CLIENT_AUTHENTICATION
from identity_service.infra.runtime import Clock, Secret
from identity_service.infra.tables import LONGEST_USER_AGENT
from identity_service.oauth.errors import InvalidClient, InvalidRequest, TooManyRequests
from identity_service.oauth.tokens import IssuedTokens
from identity_service.verifier.core import TokenRefused, VerifiedClaims
from identity_service.web.asgi import HeaderList, Headers, Scope

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MOST_BLOCKED = 10_000
_LONGEST_AUTHORIZATION = 4096


# -- where a request comes from ---------------------------------------------------------------------------------------


def _address(text: str) -> IPAddress | None:
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


@lru_cache(maxsize=10_000)
def _network(peer: str) -> str:
    """Return what limits are kept by: an IPv4 address, or an IPv6 /64, which one person can have whole."""
    address = _address(peer)
    if address is None:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def network_of(scope: Scope, headers: Headers, trusted: Sequence[IPNetwork]) -> str:
    """
    Return the network a request comes from.

    `X-Forwarded-For` counts only as far as it was written by trusted proxies: read from the right, the first address
    that is not one of them. What cannot be parsed ends the reading; it never skips a limit.
    """
    peer = (scope.get("client") or ("unknown", 0))[0]
    if not trusted:
        return _network(peer)
    client = peer
    hops = [hop for value in headers.all("x-forwarded-for") for hop in value.split(",")]
    while (address := _address(client)) is not None and any(address in network for network in trusted):
        if not hops or _address(hops[-1]) is None:
            break
        client = hops.pop().strip()
    return _network(client)


def origin_of(scope: Scope, trusted: Sequence[IPNetwork]) -> Origin:
    """Return where a request comes from, as limits, the audit trail and people's lists of sessions tell it."""
    headers = Headers(scope["headers"])
    agent = (headers.one("user-agent") or "")[:LONGEST_USER_AGENT]
    return Origin(network_of(scope, headers, trusted), scope["state"]["request_id"], agent)


# -- clients ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """What a request says about its client (RFC 6749 §2.3.1)."""

    client_id: str
    secret: Secret | None


_NOBODY = "Basic " + base64.b64encode(b":").decode("ascii")
"""What the interactive documentation sends when its client fields are left empty."""


def basic_was_used(headers: Headers) -> bool:
    """Whether the caller tried the Authorization header, and so is owed a challenge (RFC 6749 §5.2)."""
    return bool(headers.all("authorization"))


def client_credentials(headers: Headers, form: Mapping[str, str], *, default: str | None) -> ClientCredentials:
    """
    Return the credentials of a request, from the header or from the body.

    Raises InvalidRequest for two mechanisms in one request, InvalidClient for none or for a header that is unreadable.
    """
    authorization = headers.all("authorization")
    if default is not None and authorization == [_NOBODY]:
        authorization = []
    body_id, body_secret = form.get("client_id"), form.get("client_secret")
    if not authorization:
        if body_id is not None:
            return ClientCredentials(body_id, Secret(body_secret) if body_secret is not None else None)
        if default is not None and body_secret is None:
            return ClientCredentials(default, None)
        raise InvalidClient(reason="no_client")
    if len(authorization) > 1:
        raise InvalidClient(reason="two_authorization_headers")
    credentials = _basic(authorization[0])
    if body_secret is not None:
        raise InvalidRequest("The client authenticates in two ways at once.", reason="two_mechanisms")
    if body_id not in (None, credentials.client_id):
        raise InvalidRequest("The client_id differs from the Authorization header's.", reason="two_clients")
    return credentials


def _basic(value: str) -> ClientCredentials:
    """Read a Basic header; id and secret are form-urlencoded inside it (RFC 6749 §2.3.1)."""
    scheme, _, encoded = value.partition(" ")
    if scheme.lower() != "basic" or len(value) > _LONGEST_AUTHORIZATION:
        raise InvalidClient(reason="authorization_malformed")
    try:
        name, colon, secret = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        client_id, text = (unquote_to_bytes(part.replace(b"+", b" ")).decode("utf-8") for part in (name, secret))
    except (binascii.Error, ValueError):
        raise InvalidClient(reason="authorization_malformed") from None
    if not colon or not client_id or not text:
        raise InvalidClient(reason="authorization_malformed")
    return ClientCredentials(client_id, Secret(text))


def limit_headers(left: Sequence[Left]) -> HeaderList:
    """Return what an answer says about the tightest of the limits it has spent from; nothing where none tells."""
    if not left:
        return []
    tightest = min(left, key=lambda one: one.spends)
    return [
        (b"ratelimit-limit", str(tightest.rule.burst).encode("ascii")),
        (b"ratelimit-remaining", str(tightest.spends).encode("ascii")),
        (b"ratelimit-reset", str(tightest.full_in).encode("ascii")),
    ]


async def spend(limiter: Limiter, spends: Sequence[Spend]) -> HeaderList:
    """Spend from limits and return what the answer says of them; raises TooManyRequests, and then nothing was spent."""
    verdict = await limiter.spend(spends)
    if isinstance(verdict, Limited):
        raise TooManyRequests(limit=verdict.rule, retry_after=verdict.retry_after)
    return limit_headers(verdict.left)


@final
class FailureBudget:
    """
    Books failures under one rule, and remembers who has used theirs up until they may fail again.

    Only failures are booked, so who does everything right costs the limiter nothing.
    """

    def __init__(self, limiter: Limiter, clock: Clock, rule: Rule) -> None:
        self._limiter = limiter
        self._clock = clock
        self._rule = rule
        self._blocked: dict[tuple[str, str], datetime] = {}

    def check(self, who: tuple[str, str]) -> None:
        """Raise TooManyRequests for one who may fail no more. Asks nobody."""
        if self._blocked and (until := self._blocked.get(who)) is not None:
            if until > self._clock.now():
                raise self._limited(until)
            del self._blocked[who]

    async def book(self, who: tuple[str, str], bucket: str) -> None:
        """Book a failure of `who` in `bucket`; raises TooManyRequests when there have been too many."""
        verdict = await self._limiter.spend([Spend(self._rule, bucket)])
        if isinstance(verdict, Limited):
            until = self._clock.now() + timedelta(seconds=verdict.retry_after)
            if len(self._blocked) >= _MOST_BLOCKED:
                self._blocked.clear()
            self._blocked[who] = until
            raise self._limited(until)

    def _limited(self, until: datetime) -> TooManyRequests:
        seconds = max(1, -int((self._clock.now() - until).total_seconds() // 1))
        return TooManyRequests(limit=self._rule.name, retry_after=seconds)


@final
class ClientAuthenticator:
    """Checks client credentials, and slows down who guesses at them."""

    def __init__(
        self,
        db: Database,
        clients: Clients,
        limiter: Limiter,
        local: Limiter,
        audit: AuditTrail,
        keys: DataKeys,
        clock: Clock,
        *,
        general: Rule,
    ) -> None:
        """`general` limits what one client may ask for at all, in this process's own `local` count."""
        self._db = db
        self._local = local
        self._general = general
        self._clients = clients
        self._audit = audit
        self._keys = keys
        self._failures = FailureBudget(limiter, clock, CLIENT_AUTHENTICATION)

    async def authenticate(self, credentials: ClientCredentials, origin: Origin) -> Client:
        """
        Return the client; raises InvalidClient, TooManyRequests.

        Who used up the failures for a client from one network waits, whatever they send; other networks do not
        notice.
        """
        client = await self._proven(credentials, origin)
        await spend(self._local, [Spend(self._general, f"c:{client.id}:{origin.network}")])
        return client

    async def _proven(self, credentials: ClientCredentials, origin: Origin) -> Client:
        pair = (credentials.client_id[:64], origin.network)
        self._failures.check(pair)
        client = await self._db.run(lambda tx: self._clients.find(tx, credentials.client_id))
        if client is not None and client.enabled:
            if client.public:
                if credentials.secret is None:
                    return client
                raise InvalidClient(reason="secret_of_public_client")  # there is nothing to guess, so nothing is booked
            if (
                not client.public
                and credentials.secret is not None
                and self._clients.proves(client, credentials.secret)
            ):
                return client
        await self._failed(pair, client, origin)
        raise InvalidClient(reason="unknown_client" if client is None else "client_not_proven")

    async def _failed(self, pair: tuple[str, str], client: Client | None, origin: Origin) -> None:
        """Book a failure; raises TooManyRequests when there have been too many."""
        # Ids that somebody makes up share one bucket, or making up more of them would be a way around it.
        name = client.id if client else "unknown"
        await self._failures.book(pair, f"c:{name}:{origin.network}")
        await self._db.run(
            lambda tx: self._audit.record_failure(
                tx,
                "client.authentication_failed",
                origin=origin,
                target=client.id if client else f"name:{self._keys.hash_name(pair[0])}",
                client_id=client.id if client else None,
                detail={},
                genuine=client is not None,
            )
        )


# -- bearer tokens ----------------------------------------------------------------------------------------------------


class Unauthenticated(Exception):
    """The request lacks a good bearer token (RFC 6750 §3.1); `code` is None when it had none at all."""

    def __init__(self, code: str | None, *, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class InsufficientScope(Exception):
    """The token is good and may not do this (RFC 6750 §3.1)."""

    def __init__(self, scope: str) -> None:
        super().__init__(scope)
        self.scope = scope


@final
class Bearer:
    """Checks the access tokens that come to our own API: the same strict reading as siblings do, plus live state."""

    def __init__(self, tokens: IssuedTokens) -> None:
        self._tokens = tokens

    def read(self, headers: Headers) -> VerifiedClaims:
        """Return the claims of the request's token; raises Unauthenticated. Asks no database."""
        values = headers.all("authorization")
        if not values:
            raise Unauthenticated(None, reason="no_token")
        scheme, _, token = values[0].partition(" ")
        if len(values) > 1 or scheme.lower() != "bearer":
            raise Unauthenticated(None, reason="no_bearer_token")
        try:
            return self._tokens.read(token.strip(" "), audiences=(self._tokens.issuer,))
        except TokenRefused as refused:
            raise Unauthenticated("invalid_token", reason=refused.reason) from None

    async def check_live(self, tx: Transaction, claims: VerifiedClaims) -> None:
        """Raise Unauthenticated unless the token, its client, and its user's session are all still good."""
        if (reason := await self._tokens.ended(tx, claims)) is not None:
            raise Unauthenticated("invalid_token", reason=reason)
