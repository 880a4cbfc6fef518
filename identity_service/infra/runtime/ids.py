"""Identifiers, and the alphabet of everything opaque that we hand out."""

import os
import re
import struct
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


_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def parse_uuid(text: str) -> uuid.UUID | None:
    """Return the UUID that a text spells with its four hyphens (RFC 9562 §4); None for the spellings of others."""
    return uuid.UUID(text) if _UUID.fullmatch(text) else None


_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_VALUES = {pair: value for value, pair in enumerate(_PAIRS)} | {letter: value for value, letter in enumerate(_ALPHABET)}
_BASE = len(_PAIRS)  # letters are read and written two at a time, which halves the work
_CHUNK_BYTES, _CHUNK_LETTERS = 8, 11
_CHECKSUM_LETTERS = 6


def _chunk(value: int) -> str:
    """Return 64 bits as 11 letters."""
    value, last = divmod(value, 62)
    value, fifth = divmod(value, _BASE)
    value, fourth = divmod(value, _BASE)
    value, third = divmod(value, _BASE)
    first, second = divmod(value, _BASE)
    return f"{_PAIRS[first]}{_PAIRS[second]}{_PAIRS[third]}{_PAIRS[fourth]}{_PAIRS[fifth]}{_ALPHABET[last]}"


def _number(letters: str) -> int:
    """Return what 11 letters stand for; raises KeyError for a letter that is none."""
    value = _VALUES[letters[0:2]]
    for start in (2, 4, 6, 8):
        value = value * _BASE + _VALUES[letters[start : start + 2]]
    return value * 62 + _VALUES[letters[10]]


def _checksum(text: str) -> str:
    return _chunk(zlib.crc32(text.encode("ascii")))[-_CHECKSUM_LETTERS:]


def encode_token(prefix: str, payload: bytes) -> str:
    """
    Return `prefix` + base62 of `payload` + a CRC32 of both, so that scanners recognise a token and typos cost no query.

    `payload` is a multiple of 8 bytes: each 8 become 11 letters, which keeps the arithmetic in machine words and
    gives every payload exactly one spelling.
    """
    if len(payload) % _CHUNK_BYTES:
        raise ValueError("the payload must be a multiple of 8 bytes")
    text = prefix + "".join(map(_chunk, struct.unpack(f">{len(payload) // _CHUNK_BYTES}Q", payload)))
    return text + _checksum(text)


def decode_token(prefix: str, size: int, token: str) -> bytes | None:
    """Return the payload of `size` bytes, or None for anything that `encode_token` did not spell exactly so."""
    length = size // _CHUNK_BYTES * _CHUNK_LETTERS
    if len(token) != len(prefix) + length + _CHECKSUM_LETTERS or not token.startswith(prefix) or not token.isascii():
        return None
    if _checksum(token[:-_CHECKSUM_LETTERS]) != token[-_CHECKSUM_LETTERS:]:
        return None
    starts = range(len(prefix), len(prefix) + length, _CHUNK_LETTERS)
    try:
        numbers = [_number(token[start : start + _CHUNK_LETTERS]) for start in starts]
        return struct.pack(f">{len(numbers)}Q", *numbers)
    except (KeyError, struct.error):  # a letter of another alphabet, or 11 letters that stand for more than 64 bits
        return None
