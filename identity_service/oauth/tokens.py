"""The life of an access token (RFC 9068): what it says, how it is issued, and what can end it before its time."""

import random
import secrets
import uuid
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, final

from sqlalchemy import String, bindparam, delete, select, text

from identity_service.accounts.access import ScopeList
from identity_service.accounts.clients import Client, Clients
from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Clock
from identity_service.infra.tables import UtcDateTime, revoked_tokens
from identity_service.oauth.signing_keys import SigningKeys
from identity_service.verifier.core import LATEST, LEEWAY, VerifiedClaims, verify

ACCESS_TOKEN_TYP = "at+jwt"  # noqa: S105  # the JOSE header's word, RFC 9068 §2.1
_JITTER = 0.05
_JTI_BYTES = 16
_KEPT = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class UserClaims:
    """What a token says about the person it speaks for."""

    roles: Sequence[str]
    sid: str
    auth_time: datetime
    amr: Sequence[str]


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
        self, client: Client, *, subject: str, scope: ScopeList, audience: Sequence[str], user: UserClaims | None
    ) -> AccessToken:
        """
        Sign an access token; raises NoUsableKey.

        Its life is shortened at random by up to 5 %, so that a fleet that started together does not refresh together.
        """
        lifetime = client.access_token_ttl or self._lifetime
        lifetime -= int(lifetime * _JITTER * random.random())  # noqa: S311  # spreads load, protects nothing
        issued_at = int(self._clock.now().timestamp())
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
        if user is None:
            claims["epoch"] = client.epoch  # what ends it early, as the session ends a user's
        else:
            claims |= {
                "roles": list(user.roles),
                "sid": user.sid,
                "auth_time": int(user.auth_time.timestamp()),
                "amr": list(user.amr),
            }
        return AccessToken(self._keys.sign(claims, typ=ACCESS_TOKEN_TYP), lifetime)


_REVOKED = (
    text("SELECT jti FROM revoked_tokens WHERE jti = :jti")
    .bindparams(bindparam("jti", type_=String()))
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
        self, clock: Clock, keys: SigningKeys, clients: Clients, families: RefreshFamilies, *, issuer: str
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._clients = clients
        self._families = families
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
        if claims.session_id is None:
            # A client's own token belongs to no session; what it cannot outlive is its client's epoch. Its time alone
            # would not do: a replica may issue it in the second after the epoch moved on, from the row it remembers.
            epoch = claims.claims.get("epoch")
            if not isinstance(epoch, int) or epoch < client.epoch:  # a greater one is news to the row we remember
                return "client_epoch"
        else:
            family_id, user_id = _identifier(claims.session_id), _identifier(claims.subject)
            if family_id is None or user_id is None:
                return "identifier_malformed"
            if not await self._families.live(tx, family_id, user_id=user_id, client_id=client.id):
                return "session_ended"
        if "\0" in claims.token_id:
            return "identifier_malformed"  # which PostgreSQL would refuse to look for
        return "token_revoked" if await tx.fetch_hot(_REVOKED, {"jti": claims.token_id}) is not None else None

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
