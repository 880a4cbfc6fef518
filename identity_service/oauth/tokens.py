"""The life of an access token (RFC 9068): what it says, and how it is issued."""

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from identity_service.accounts.access import ScopeList
from identity_service.accounts.clients import Client
from identity_service.infra.runtime import Clock
from identity_service.oauth.signing_keys import SigningKeys

ACCESS_TOKEN_TYP = "at+jwt"  # noqa: S105  # the JOSE header's word, RFC 9068 §2.1
_JITTER = 0.05
_JTI_BYTES = 16


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
        if user is not None:
            claims |= {
                "roles": list(user.roles),
                "sid": user.sid,
                "auth_time": int(user.auth_time.timestamp()),
                "amr": list(user.amr),
            }
        return AccessToken(self._keys.sign(claims, typ=ACCESS_TOKEN_TYP), lifetime)
