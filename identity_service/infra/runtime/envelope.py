"""
Envelope encryption: master keys wrap data keys and private keys, and never touch anything else.

Losing the database alone reveals no key, and changing the master key changes no token: only the wrapping is renewed.
AES-256-GCM binds each wrapped value to the row it belongs to (its context), so rows cannot be swapped.
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
_KEY_BYTES = 32


class MasterKeyError(Exception):
    """The master keys we were given cannot serve; the message says which one is wanted and holds no secret."""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A wrapped value as the database keeps it: the id of the master key that wrapped it, and nonce + ciphertext."""

    kek_id: str
    blob: bytes


def new_master_key() -> str:
    """Return a fresh master key in the form the key file holds: base64 of 32 random bytes."""
    return base64.b64encode(os.urandom(_KEY_BYTES)).decode("ascii")


@final
class MasterKeys:
    """
    The master keys of this process: the first wraps, all unwrap.

    A key's id is computed from the key, so an id can never be given to other bytes by mistake.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys:
            raise MasterKeyError("no master key is set")
        self._ciphers = {self._id_of(key): AESGCM(key) for key in keys}
        self.first_id = self._id_of(keys[0])

    @classmethod
    def parse(cls, text: str) -> "MasterKeys":
        """
        Read one base64 key of 32 bytes per line (or comma); blank lines and lines that begin with # are skipped.

        Raises MasterKeyError for anything else, and for values no random generator would give.
        """
        keys = []
        for number, line in enumerate(text.replace(",", "\n").splitlines(), start=1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            try:
                key = base64.b64decode(entry, validate=True)
            except (binascii.Error, ValueError):
                raise MasterKeyError(f"master key {number} is not base64") from None
            if len(key) != _KEY_BYTES:
                raise MasterKeyError(f"master key {number} has {len(key)} bytes; {_KEY_BYTES} are needed")
            if len(set(key)) < _KEY_BYTES // 2:
                raise MasterKeyError(f"master key {number} is not random; make one with: openssl rand -base64 32")
            keys.append(key)
        return cls(keys)

    @staticmethod
    def _id_of(key: bytes) -> str:
        return hashlib.sha256(b"identity-service master key id\0" + key).hexdigest()[:12]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the keys held, the wrapping one first."""
        return tuple(self._ciphers)

    def wrap(self, plain: bytes, *, context: str) -> Wrapped:
        """Wrap `plain` with the first master key, bound to `context` (what the row is) and to the key's id."""
        nonce = os.urandom(_NONCE_BYTES)
        bound = f"{context}|{self.first_id}".encode()
        return Wrapped(self.first_id, nonce + self._ciphers[self.first_id].encrypt(nonce, plain, bound))

    def unwrap(self, wrapped: Wrapped, *, context: str) -> bytes:
        """Return what was wrapped in this context; raises MasterKeyError if the key is missing or the row is not it."""
        cipher = self._ciphers.get(wrapped.kek_id)
        if cipher is None:
            raise MasterKeyError(f"master key {wrapped.kek_id} is wanted, but only {', '.join(self.ids)} is here")
        bound = f"{context}|{wrapped.kek_id}".encode()
        try:
            return cipher.decrypt(wrapped.blob[:_NONCE_BYTES], wrapped.blob[_NONCE_BYTES:], bound)
        except (InvalidTag, ValueError):  # the latter for a nonce cut short
            raise MasterKeyError(f"a row wrapped by master key {wrapped.kek_id} was altered or swapped") from None

    def rewrap(self, wrapped: Wrapped, *, context: str) -> Wrapped:
        """Wrap anew, with the first master key, what any of ours had wrapped; raises as `unwrap` does."""
        return self.wrap(self.unwrap(wrapped, context=context), context=context)
