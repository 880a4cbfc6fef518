"""What a key is: presented, good, refused, listed, new."""

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from identity_service.accounts.access import ScopeList
from identity_service.accounts.api_keys.networks import Networks
from identity_service.infra.runtime import Secret

Owner: TypeAlias = uuid.UUID | str
"""A user's id, or a client's."""


class InvalidKey(ValueError):
    """A key was to be made as none can be; `member` is what is wrong, the message says why."""

    def __init__(self, member: str, message: str) -> None:
        super().__init__(message)
        self.member = member


class TooManyKeys(Exception):
    """The owner has as many live keys as one may have."""


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A text whose form and checksum are right; whether there is such a key is another question."""

    key_id: str
    text: Secret


@dataclass(frozen=True, slots=True)
class LiveKey:
    """A key that was presented and is good, with its owner as they are now."""

    id: str
    user_id: uuid.UUID | None
    client_id: str | None
    scope: frozenset[str]
    expires_at: datetime | None
    last_used_at: datetime | None
    role: str | None = None
    """The owner's role, if the owner is a person."""
    owner_scope: ScopeList = ()
    """What the owner may do at most, if the owner is a client."""
    owner_epoch: int = 0
    """The owner's epoch, if the owner is a client."""


@dataclass(frozen=True, slots=True)
class KeyRefused:
    """
    Why a key that was presented is not good, as a word for the log.

    `malformed`, `unknown` and `wrong_secret` are guesses. The others go to somebody who has, or had, the key:
    `revoked`, `expired` (also a secret whose overlap is over), `owner_disabled`, `network`.
    """

    reason: str

    @property
    def genuine(self) -> bool:
        """Whether the secret is one that we handed out."""
        return self.reason not in ("malformed", "unknown", "wrong_secret")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is listed: everything but the secret."""

    id: str
    user_id: uuid.UUID | None
    client_id: str | None
    name: str
    scope: ScopeList
    networks: Networks
    last4: str
    created_at: datetime
    rotated_at: datetime | None
    expires_at: datetime | None
    last_used_at: datetime | None
    previous_expires_at: datetime | None

    @property
    def owner(self) -> Owner:
        """Whose key it is."""
        owner = self.user_id or self.client_id
        assert owner is not None  # noqa: S101  # the table's constraint
        return owner


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key with its text, which is never shown again."""

    key: ApiKey
    text: Secret
