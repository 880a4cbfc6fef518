"""Passwords: what is stored of them, and the bounded pool that checks them."""

from identity_service.infra.runtime.hashing.foreign_hashes import StoredHash, UnusableHash, read_hash
from identity_service.infra.runtime.hashing.hasher import (
    NFKC_FORM,
    RAW_FORM,
    HashingBusy,
    PasswordHasher,
    Verification,
    normalise_password,
)

__all__ = [
    "NFKC_FORM",
    "RAW_FORM",
    "HashingBusy",
    "PasswordHasher",
    "StoredHash",
    "UnusableHash",
    "Verification",
    "normalise_password",
    "read_hash",
]
