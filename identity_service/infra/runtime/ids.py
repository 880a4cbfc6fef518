"""Identifiers, and the alphabet of everything opaque that we hand out."""

import os
import time
import uuid
import zlib


def new_id() -> uuid.UUID:
    """Return a UUIDv7 (RFC 9562 §5.7): 48 bits of milliseconds, then random bits, so that indexes grow at one end."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}
_CHUNK_BYTES, _CHUNK_LETTERS = 8, 11
_CHECKSUM_LETTERS = 6


def _letters(value: int, width: int) -> str:
    letters = []
    for _ in range(width):
        value, digit = divmod(value, 62)
        letters.append(_ALPHABET[digit])
    return "".join(reversed(letters))


def _number(letters: str) -> int:
    value = 0
    for letter in letters:
        value = value * 62 + _VALUES[letter]
    return value


def encode_token(prefix: str, payload: bytes) -> str:
    """
    Return `prefix` + base62 of `payload` + a CRC32 of both, so that scanners recognise a token and typos cost no query.

    `payload` is a multiple of 8 bytes: each 8 become 11 letters, which keeps the arithmetic in machine words and
    gives every payload exactly one spelling.
    """
    if len(payload) % _CHUNK_BYTES:
        raise ValueError("the payload must be a multiple of 8 bytes")
    body = "".join(
        _letters(int.from_bytes(payload[start : start + _CHUNK_BYTES], "big"), _CHUNK_LETTERS)
        for start in range(0, len(payload), _CHUNK_BYTES)
    )
    return prefix + body + _letters(zlib.crc32((prefix + body).encode("ascii")), _CHECKSUM_LETTERS)


def decode_token(prefix: str, size: int, token: str) -> bytes | None:
    """Return the payload of `size` bytes, or None for anything that `encode_token` did not spell exactly so."""
    length = size // _CHUNK_BYTES * _CHUNK_LETTERS
    if len(token) != len(prefix) + length + _CHECKSUM_LETTERS or not token.startswith(prefix) or not token.isascii():
        return None
    body, checksum = token[len(prefix) : -_CHECKSUM_LETTERS], token[-_CHECKSUM_LETTERS:]
    if _letters(zlib.crc32((prefix + body).encode("ascii")), _CHECKSUM_LETTERS) != checksum:
        return None
    payload = bytearray()
    try:
        for start in range(0, length, _CHUNK_LETTERS):
            payload += _number(body[start : start + _CHUNK_LETTERS]).to_bytes(_CHUNK_BYTES, "big")
    except (KeyError, OverflowError):
        return None
    return bytes(payload)
