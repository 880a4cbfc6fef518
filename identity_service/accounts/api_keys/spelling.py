"""
How a key is spelled: `idk_<id>_<secret><checksum>`.

11 letters of id, 44 of secret (256 bits), 6 of CRC32 over all that stands before them.
"""

import re
import secrets

from identity_service.accounts.api_keys.key import PresentedKey
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.ids import decode_token, encode_token

_PREFIX = "idk_"
_ID_BYTES, _ID_LETTERS = 8, 11
_SECRET_BYTES = 32
_CHECKSUM_LETTERS = 6
_HEAD_LETTERS = len(_PREFIX) + _ID_LETTERS + 1
_ID = re.compile(rf"[0-9A-Za-z]{{{_ID_LETTERS}}}")
_HEAD = re.compile(rf"{_PREFIX}{_ID.pattern}_")


def new_id() -> str:
    """Return the id of a new key."""
    return encode_token("", secrets.token_bytes(_ID_BYTES))[:_ID_LETTERS]


def is_id(text: str) -> bool:
    """Return whether a text can be the id of a key; what cannot need not be looked for."""
    return _ID.fullmatch(text) is not None


def new_text(key_id: str) -> Secret:
    """Return the text of a key with a new secret."""
    return Secret(encode_token(f"{_PREFIX}{key_id}_", secrets.token_bytes(_SECRET_BYTES)))


def read(text: Secret) -> PresentedKey | None:
    """Return what a text says that may be a key, or None for one we cannot have handed out; costs no query."""
    spelled = text.reveal()
    if not _HEAD.match(spelled) or decode_token(spelled[:_HEAD_LETTERS], _SECRET_BYTES, spelled) is None:
        return None
    return PresentedKey(spelled[len(_PREFIX) : _HEAD_LETTERS - 1], text)


def digested(text: Secret) -> bytes:
    """Return the part of a key that its digest is made of: id and secret, so that no secret fits another id."""
    return text.reveal()[len(_PREFIX) : -_CHECKSUM_LETTERS].encode("ascii")


def last4(text: Secret) -> str:
    """Return the last letters of the secret, by which people tell their keys apart."""
    return text.reveal()[:-_CHECKSUM_LETTERS][-4:]
