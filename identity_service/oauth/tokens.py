"""The life of an access token (RFC 9068): what it says, how it is issued, and what can end it before its time."""

import random
import secrets
import uuid
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeGuard, final

from sqlalchemy import String, bindparam, delete, select, text

from identity_service.accounts.access import ScopeList
from identity_service.accounts.api_keys import ApiKeys
from identity_service.accounts.clients import Client, Clients
from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import UtcDateTime, revoked_tokens
from identity_service.oauth.signing_keys import SigningKeys
from identity_service.verifier.core import LATEST, LEEWAY, VerifiedClaims, verify

ACCESS_TOKEN_TYP = "at+jwt"  # noqa: S105  # the JOSE header's word, RFC 9068 §2.1
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105  # its name in RFC 8693 §3
MOST_ACTORS = 4
"""How often a token may be exchanged on, one for another."""
_BY_API_KEY = "api_key"
_JITTER = 0.05
_JTI_BYTES = 16
_KEPT = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class UserClaims:
    """What a token says about the person it speaks for; there was no sign-in if it came out of an API key."""

    roles: Sequence[str]
    sid: str | None
    auth_time: datetime | None
    amr: Sequence[str]


@dataclass(frozen=True, slots=True)
class Lineage:
    """
    What a token was exchanged for (RFC 8693): all that must still be good for the token to be good.

    `actors` are the clients that exchanged, each with its epoch as it did so, and `parents` the ids of the tokens that
    were exchanged, both newest first. `key_id` is the API key it began with, `epoch` the subject's where no session
    stands for it.
    """

    actors: tuple[tuple[str, int], ...]
    parents: tuple[str, ...] = ()
    key_id: str | None = None
    epoch: int | None = None

    @classmethod
    def of(cls, claims: VerifiedClaims) -> Self | None:
        """Return a token's lineage, None for one that was not exchanged; raises ValueError for what we never write."""
        told = claims.claims
        if "act" not in told:
            return None
        names: list[Any] = []
        act = told["act"]
        while isinstance(act, dict) and len(names) <= MOST_ACTORS:
            names.append(act.get("sub"))
            act = act.get("act")
        epochs, parents = told.get("actor_epochs"), told.get("parents", [])
        key_id, epoch = told.get("key_id"), told.get("epoch")
        if (
            not (_are_texts(names) and _are_numbers(epochs) and _are_texts(parents))
            or not (key_id is None or _are_texts([key_id]))
            or not (epoch is None or _are_numbers([epoch]))
            or not (len(names) == len(epochs) <= MOST_ACTORS and len(parents) <= MOST_ACTORS)
        ):
            raise ValueError("the token says of its lineage what we never write")
        return cls(tuple(zip(names, epochs, strict=True)), tuple(parents), key_id, epoch)

    def claims(self) -> dict[str, Any]:
        """Return what a token says of it: `act` is RFC 8693 §4.1, the other claims are for our own endpoints."""
        act: dict[str, Any] | None = None
        for name, _ in reversed(self.actors):
            act = {"sub": name} if act is None else {"sub": name, "act": act}
        said: dict[str, Any] = {"act": act, "actor_epochs": [epoch for _, epoch in self.actors]}
        if self.parents:
            said["parents"] = list(self.parents)
        if self.key_id is not None:
            said |= {"key_id": self.key_id, "amr": [_BY_API_KEY]}
        if self.epoch is not None:
            said["epoch"] = self.epoch
        return said


@dataclass(frozen=True, slots=True)
class AccessToken:
    """An issued token and its remaining life in seconds."""

    text: str
    expires_in: int


@final
class Tokens:
    """Issues access tokens. They are stored nowhere."""

    def __init__(self, clock: Clock, keys: SigningKeys, *, issuer: str, lifetime: int) -> None:
        """`lifetime` is in seconds, for clients that have none of their own."""
        self._clock = clock
        self._keys = keys
        self.issuer = issuer
        self._lifetime = lifetime

    def issue(
        self,
        client: Client,
        *,
        subject: str,
        scope: ScopeList,
        audience: Sequence[str],
        user: UserClaims | None,
        lineage: Lineage | None = None,
        until: int | None = None,
    ) -> AccessToken:
        """
        Sign an access token; raises NoUsableKey.

        Its life is shortened at random by up to 5 %, so that a fleet that started together does not refresh together;
        and to end by `until`, in seconds since 1970.
        """
        lifetime = client.access_token_ttl or self._lifetime
        lifetime -= int(lifetime * _JITTER * random.random())  # noqa: S311  # spreads load, protects nothing
        issued_at = int(self._clock.now().timestamp())
        if until is not None:
            lifetime = max(0, min(lifetime, until - issued_at))
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "sub": subject,
            "aud": audience[0] if len(audience) == 1 else list(audience),
            "client_id": client.id,
            "iat": issued_at,
            "exp": issued_at + lifetime,
            "jti": secrets.token_urlsafe(_JTI_BYTES),
            "scope": " ".join(scope),
        }
        if lineage is not None:
            claims |= lineage.claims()
        elif user is None:
            claims["epoch"] = client.epoch  # what ends it early, as the session ends a user's
        if user is not None:
            claims |= {"roles": list(user.roles), "amr": list(user.amr)}
            if user.sid is not None and user.auth_time is not None:
                claims |= {"sid": user.sid, "auth_time": int(user.auth_time.timestamp())}
        return AccessToken(self._keys.sign(claims, typ=ACCESS_TOKEN_TYP), lifetime)


_REVOKED = (
    text("SELECT jti FROM revoked_tokens WHERE jti = :jti")
    .bindparams(bindparam("jti", type_=String()))
    .columns(jti=String())
)
_ANY_REVOKED = (
    text("SELECT jti FROM revoked_tokens WHERE jti IN (:jti, :parent1, :parent2, :parent3, :parent4)")
    .bindparams(*(bindparam(name, type_=String()) for name in ("jti", "parent1", "parent2", "parent3", "parent4")))
    .columns(jti=String())
)
_REVOKE = (
    text("INSERT INTO revoked_tokens (jti, expires_at) VALUES (:jti, :expires_at) ON CONFLICT DO NOTHING RETURNING jti")
    .bindparams(bindparam("jti", type_=String()), bindparam("expires_at", type_=UtcDateTime()))
    .columns(jti=String())
)


class _AnyAudience:
    """Holds every audience, for those who only want to know whether a token is one of ours."""

    def __contains__(self, _: object) -> bool:
        return True


ANY_AUDIENCE: Container[str] = _AnyAudience()


@final
class IssuedTokens:
    """
    Reads access tokens that come back, as strictly as siblings do.

    Of the database it asks what siblings cannot know: whether the token was ended before its time.
    """

    def __init__(
        self,
        clock: Clock,
        keys: SigningKeys,
        clients: Clients,
        families: RefreshFamilies,
        api_keys: ApiKeys,
        *,
        issuer: str,
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._clients = clients
        self._families = families
        self._api_keys = api_keys
        self.issuer = issuer

    def read(self, token: str, *, audiences: Container[str]) -> VerifiedClaims:
        """Return the claims of a token for one of `audiences`; raises TokenRefused. Asks no database."""
        now = self._clock.now().timestamp()
        return verify(token, key_of=self._keys.public_key, issuer=self.issuer, audiences=audiences, now=now)

    async def ended(self, tx: Transaction, claims: VerifiedClaims) -> str | None:
        """
        Return what has ended a token before its time, as a word for the log, or None while it is good.

        Asks the database each time; only what it says about the client may be a second old.
        """
        client = await self._clients.find(tx, claims.client_id)
        if client is None or not client.enabled:
            return "client_disabled"
        try:
            lineage = Lineage.of(claims)
        except ValueError:
            return "claim_malformed"
        if lineage is not None and (reason := await self._exchange_ended(tx, claims, lineage)) is not None:
            return reason
        if claims.session_id is not None:
            family_id, user_id = _identifier(claims.session_id), _identifier(claims.subject)
            if family_id is None or user_id is None:
                return "identifier_malformed"
            # A token that was exchanged is another client's than the session is, which is checked like the session.
            session_of = client.id if lineage is None else None
            if not await self._families.live(tx, family_id, user_id=user_id, client_id=session_of):
                return "session_ended"
        elif lineage is None and _is_outdated(claims.claims.get("epoch"), client):
            # A client's own token belongs to no session; what it cannot outlive is its client's epoch. Its time alone
            # would not do: a replica may issue it in the second after the epoch moved on, from the row it remembers.
            return "client_epoch"
        if "\0" in claims.token_id:
            return "identifier_malformed"  # which PostgreSQL would refuse to look for
        if lineage is None:
            revoked = await tx.fetch_hot(_REVOKED, {"jti": claims.token_id})
        else:
            names = ("jti", "parent1", "parent2", "parent3", "parent4")
            wanted = dict.fromkeys(names, claims.token_id) | dict(zip(names[1:], lineage.parents, strict=False))
            revoked = await tx.fetch_hot(_ANY_REVOKED, wanted)
        return "token_revoked" if revoked is not None else None

    async def _exchange_ended(self, tx: Transaction, claims: VerifiedClaims, lineage: Lineage) -> str | None:
        """Return what has ended an exchanged token: one of its actors, its API key, or the client it speaks for."""
        for name, epoch in lineage.actors:
            actor = await self._clients.find(tx, name)
            if actor is None or not actor.enabled or _is_outdated(epoch, actor):
                return "actor_ended"
        if claims.session_id is not None:
            return None
        user_id = _identifier(claims.subject)
        owner = claims.subject if user_id is None else user_id
        if lineage.key_id is not None and not await self._api_keys.alive(tx, lineage.key_id, owner, lineage.epoch):
            return "api_key_ended"
        if lineage.key_id is not None and user_id is not None:
            return None
        subject = await self._clients.find(tx, claims.subject)
        if subject is None or not subject.enabled or _is_outdated(lineage.epoch, subject):
            return "subject_ended"
        return None

    async def revoke(self, tx: Transaction, claims: VerifiedClaims) -> bool:
        """Let a token that `ended` found good be good no more; return False if somebody else just did the same."""
        expires_at = datetime.fromtimestamp(min(claims.expires_at + LEEWAY, LATEST), UTC)
        noted = await tx.fetch_hot(_REVOKE, {"jti": claims.token_id, "expires_at": expires_at})
        return noted is not None

    async def clean_up(self, tx: Transaction, *, batch: int) -> int:
        """Forget at most `batch` revoked tokens that expired a day ago: a day costs little, and clocks err."""
        doomed = (
            select(revoked_tokens.c.jti)
            .where(revoked_tokens.c.expires_at <= self._clock.now() - _KEPT)
            .order_by(revoked_tokens.c.expires_at)
            .limit(batch)
        )
        deleted = await tx.execute(delete(revoked_tokens).where(revoked_tokens.c.jti.in_(doomed.scalar_subquery())))
        return deleted.rowcount


def _identifier(claim: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(claim)
    except ValueError:
        return None


def _is_outdated(epoch: object, client: Client) -> bool:
    """Return whether a client's epoch has moved on; one that is greater is news to the row we remember."""
    return not isinstance(epoch, int) or epoch < client.epoch


def _are_texts(values: object) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) and "\0" not in value for value in values)


def _are_numbers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)
