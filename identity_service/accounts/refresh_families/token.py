"""How a refresh token is spelled, and told from anything else."""

import hmac
import struct
import uuid
from typing import final

from identity_service.accounts.refresh_families.verdict import GenuineToken
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.ids import decode_token, encode_token

TOKEN_PREFIX = "rt_"  # noqa: S105  # what every refresh token begins with, not one
NONCE_BYTES = 8
_CLAIM = struct.Struct(">16sQ8s")
_MAC_BYTES = 32


@final
class RefreshTokens:
    """Writes and reads refresh tokens with the data keys of this process."""

    def __init__(self, keys: DataKeys) -> None:
        self._keys = keys

    @property
    def newest_kid(self) -> str:
        """The id of the data key that new tokens are made with."""
        return self._keys["refresh"].kid

    def read(self, presented: Secret) -> GenuineToken | None:
        """Return what a refresh token says, or None for one we never handed out; costs no query."""
        payload = decode_token(TOKEN_PREFIX, _CLAIM.size + _MAC_BYTES, presented.reveal())
        if payload is None:
            return None
        claim, mac = payload[: _CLAIM.size], payload[_CLAIM.size :]
        key = self._keys["refresh"]
        if not any(hmac.compare_digest(key.mac(claim, kid=kid), mac) for kid in key.kids):
            return None
        family, generation, nonce = _CLAIM.unpack(claim)
        return GenuineToken(uuid.UUID(bytes=family), generation, nonce)

    def write(self, family_id: uuid.UUID, generation: int, nonce: bytes, kid: str) -> Secret:
        """Return the token of a generation; the same one whenever it is asked for."""
        claim = _CLAIM.pack(family_id.bytes, generation, nonce)
        return Secret(encode_token(TOKEN_PREFIX, claim + self._keys["refresh"].mac(claim, kid=kid)))

    def retry_digest(self, family_id: uuid.UUID, retry_key: Secret | None) -> bytes | None:
        """Return what the row keeps of an Idempotency-Key: nothing that could be tried out without the data key."""
        if retry_key is None:
            return None
        return self._keys["retry"].mac(family_id.bytes + b"|" + retry_key.reveal().encode("ascii"))
