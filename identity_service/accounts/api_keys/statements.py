"""The statements that every use of a key runs, as constants: the driver takes them as they are."""

import uuid
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import BigInteger, Boolean, LargeBinary, String, Uuid, bindparam, text

from identity_service.infra.tables import UtcDateTime, api_keys


class Held(NamedTuple):
    """What `HELD` returns, in its order."""

    user_id: uuid.UUID | None
    client_id: str | None
    scope: str
    networks: list[str]
    digest: bytes
    mac_kid: str
    previous_digest: bytes | None
    previous_mac_kid: str
    previous_expires_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    role: str | None
    owner_scope: str | None
    owner_epoch: int
    owner_enabled: bool


HELD = (
    text(
        """
        SELECT k.user_id, k.client_id, k.scope, k.networks, k.digest, k.mac_kid,
               k.previous_digest, k.previous_mac_kid, k.previous_expires_at, k.expires_at, k.last_used_at,
               k.revoked_at, u.role, c.scope AS owner_scope, coalesce(u.epoch, c.epoch) AS owner_epoch,
               CASE WHEN k.user_id IS NULL THEN c.enabled ELSE u.enabled AND u.deleted_at IS NULL END AS owner_enabled
        FROM api_keys k LEFT JOIN users u ON u.id = k.user_id LEFT JOIN clients c ON c.id = k.client_id
        WHERE k.id = :id
        """
    )
    .bindparams(bindparam("id", type_=String()))
    .columns(
        user_id=Uuid(),
        client_id=String(),
        scope=String(),
        networks=api_keys.c.networks.type,
        digest=LargeBinary(),
        mac_kid=String(),
        previous_digest=LargeBinary(),
        previous_mac_kid=String(),
        previous_expires_at=UtcDateTime(),
        expires_at=UtcDateTime(),
        last_used_at=UtcDateTime(),
        revoked_at=UtcDateTime(),
        role=String(),
        owner_scope=String(),
        owner_epoch=BigInteger(),
        owner_enabled=Boolean(),
    )
)
"""Find a key. The owner is part of the one query, so a key ends with its owner and nothing has to be remembered."""

ALIVE = (
    text(
        """
        SELECT k.id
        FROM api_keys k LEFT JOIN users u ON u.id = k.user_id LEFT JOIN clients c ON c.id = k.client_id
        WHERE k.id = :id AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > :now)
          AND ((k.user_id = :user AND u.enabled AND u.deleted_at IS NULL AND u.epoch <= :epoch)
               OR (k.client_id = :client AND c.enabled AND c.epoch <= :epoch))
        """
    )
    .bindparams(
        bindparam("id", type_=String()),
        bindparam("now", type_=UtcDateTime()),
        bindparam("user", type_=Uuid()),
        bindparam("client", type_=String()),
        bindparam("epoch", type_=BigInteger()),
    )
    .columns(id=String())
)
"""Find a key that is good, and whose owner is."""
