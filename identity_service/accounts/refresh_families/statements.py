"""The statements that run at every refresh and every request, as constants: the driver takes them as they are."""

from sqlalchemy import BigInteger, LargeBinary, String, Uuid, bindparam, text

from identity_service.infra.tables import UtcDateTime, refresh_families

ROTATE = (
    text(
        """
        UPDATE refresh_families
        SET generation = generation + 1, parent_nonce = nonce, nonce = :new_nonce, mac_kid = :kid,
            retry_digest = :digest, rotated_at = :now,
            idle_expires_at = CASE WHEN :idle_end < absolute_expires_at THEN :idle_end ELSE absolute_expires_at END
        WHERE id = :id AND client_id = :client AND generation = :generation AND nonce = :nonce
          AND revoked_at IS NULL AND idle_expires_at > :now AND absolute_expires_at > :now
          AND (retry_digest = :digest) IS NOT TRUE
          AND user_epoch = (SELECT u.epoch FROM users u WHERE u.id = refresh_families.user_id AND u.enabled)
          AND client_epoch = (SELECT c.epoch FROM clients c WHERE c.id = refresh_families.client_id AND c.enabled)
        RETURNING generation, user_id, scope, audiences, auth_time, amr,
                  (SELECT u.role FROM users u WHERE u.id = refresh_families.user_id) AS role
        """
    )
    .bindparams(
        bindparam("new_nonce", type_=LargeBinary()),
        bindparam("kid", type_=String()),
        bindparam("digest", type_=LargeBinary()),
        bindparam("now", type_=UtcDateTime()),
        bindparam("idle_end", type_=UtcDateTime()),
        bindparam("id", type_=Uuid()),
        bindparam("client", type_=String()),
        bindparam("generation", type_=BigInteger()),
        bindparam("nonce", type_=LargeBinary()),
    )
    .columns(
        generation=BigInteger(),
        user_id=Uuid(),
        scope=String(),
        audiences=refresh_families.c.audiences.type,
        auth_time=UtcDateTime(),
        amr=String(),
        role=String(),
    )
)
"""
Rotate a family, if all is as it must be.

The client, the epochs and the lifetimes are part of the condition, so nothing is read first and written later. The
table has no alias: SQLite refuses one in RETURNING.
"""

LIVE = (
    text(
        """
        SELECT f.id
        FROM refresh_families f
        JOIN users u ON u.id = f.user_id AND u.enabled AND u.epoch = f.user_epoch
        JOIN clients c ON c.id = f.client_id AND c.enabled AND c.epoch = f.client_epoch
        WHERE f.id = :id AND f.user_id = :user AND f.client_id = COALESCE(:client, f.client_id)
          AND f.revoked_at IS NULL AND f.absolute_expires_at > :now
        """
    )
    .bindparams(
        bindparam("id", type_=Uuid()),
        bindparam("user", type_=Uuid()),
        bindparam("client", type_=String()),
        bindparam("now", type_=UtcDateTime()),
    )
    .columns(id=Uuid())
)
"""Find a family that is live, and whose user and client are."""
