"""
Signatures and encryptions that libraries refuse to make, or make differently each time.

Where a scheme takes random bytes it is given fixed ones, and RSA is done with plain numbers, so that any padding can
be signed, also a wrong one.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.padding import PKCS7

from tests.support.tokens import b64, unb64

SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
"""What stands before a SHA-256 digest in an RS256 signature (RFC 8017 §9.2, note 1)."""
CONTENT_KEY = hashlib.sha256(b"content").digest()
_SALT = hashlib.sha512(b"salt").digest()
_IV = hashlib.sha256(b"initialization vector").digest()
_DIGESTS: dict[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


def digest_of(bits: str) -> hashes.HashAlgorithm:
    """Return the SHA-2 function whose size stands in an algorithm's name."""
    return _DIGESTS[bits]


# -- RSA as numbers ---------------------------------------------------------------------------------------------------


def rsa_private(key: rsa.RSAPrivateKey, block: bytes) -> bytes:
    """Return RSASP1 (RFC 8017 §5.2.1) of any block of bytes, padded however the caller likes."""
    numbers = key.private_numbers()
    modulus = numbers.public_numbers.n
    size = (modulus.bit_length() + 7) // 8
    return pow(int.from_bytes(block, "big"), numbers.d, modulus).to_bytes(size, "big")


def rsa_public(key: rsa.RSAPublicKey, block: bytes) -> bytes:
    """Return RSAEP (RFC 8017 §5.1.1) of a block of bytes."""
    numbers = key.public_numbers()
    size = (numbers.n.bit_length() + 7) // 8
    return pow(int.from_bytes(block, "big"), numbers.e, numbers.n).to_bytes(size, "big")


def padded(info: bytes, size: int = 256, *, kind: int = 1, filler: bytes = b"\xff") -> bytes:
    """Return 00 kind filler… 00 info, which with the usual kind and filler is EMSA-PKCS1-v1_5 (RFC 8017 §9.2)."""
    return bytes((0, kind)) + filler * (size - 3 - len(info)) + b"\0" + info


def _mask(seed: bytes, length: int, digest: str) -> bytes:
    """Return MGF1 (RFC 8017 §B.2.1)."""
    blocks = (hashlib.new(digest, seed + counter.to_bytes(4, "big")).digest() for counter in range(length // 20 + 1))
    return b"".join(blocks)[:length]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def pss(key: rsa.RSAPrivateKey, message: bytes, bits: str, *, salt_size: int | None = None) -> bytes:
    """Return an RSASSA-PSS signature (RFC 8017 §8.1.1, §9.1.1) with a fixed salt."""
    digest = f"sha{bits}"
    size = hashlib.new(digest).digest_size
    salt = _SALT[: size if salt_size is None else salt_size]
    hashed = hashlib.new(digest, bytes(8) + hashlib.new(digest, message).digest() + salt).digest()
    block = bytes(256 - len(salt) - size - 2) + b"\1" + salt
    masked = _xor(block, _mask(hashed, len(block), digest))
    return rsa_private(key, bytes((masked[0] & 0x7F,)) + masked[1:] + hashed + b"\xbc")


# -- curves -----------------------------------------------------------------------------------------------------------


def ecdsa(key: ec.EllipticCurvePrivateKey, message: bytes, bits: str, *, der: bool = False) -> bytes:
    """Return an ECDSA signature, deterministic (RFC 6979), as r and s (RFC 7518 §3.4) or in DER."""
    signature = key.sign(message, ec.ECDSA(digest_of(bits), deterministic_signing=True))
    if der:
        return signature
    size = (key.curve.key_size + 7) // 8
    return b"".join(number.to_bytes(size, "big") for number in decode_dss_signature(signature))


def eddsa(key: ed25519.Ed25519PrivateKey, message: bytes) -> bytes:
    """Return an Ed25519 signature (RFC 8032)."""
    return key.sign(message)


# -- encryption -------------------------------------------------------------------------------------------------------


def deflated(plain: bytes) -> bytes:
    """
    Return what `zip: DEF` means (RFC 7516 §4.1.3), in one stored block (RFC 1951 §3.2.4).

    No compressor makes it, because two of them need not make the same bytes.
    """
    size = len(plain)
    return b"\1" + size.to_bytes(2, "little") + (size ^ 0xFFFF).to_bytes(2, "little") + plain


def deflated_zeros(repeats: int) -> bytes:
    """Return 1 + 258 * `repeats` zero bytes, deflated with the fixed codes (RFC 1951 §3.2.6) to less than a 150th."""
    zero, same_again, end = "00110000", "11000101" + "00000", "0000000"
    bits = "1" + "10" + zero + same_again * repeats + end
    return bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8))


def encrypted(header: Mapping[str, Any], wrapped: bytes, plain: bytes, key: bytes) -> str:
    """Return a compact JWE (RFC 7516 §7.1) of `plain`, encrypted as the header's `enc` says under `key`."""
    protected = b64(json.dumps(header).encode())
    aad = protected.encode()
    if header["enc"] == "A128GCM":
        iv = _IV[:12]
        sealed = AESGCM(key).encrypt(iv, plain, aad)
        text, tag = sealed[:-16], sealed[-16:]
    else:  # A128CBC-HS256, RFC 7518 §5.2
        iv = _IV[:16]
        padder = PKCS7(128).padder()
        encryptor = Cipher(algorithms.AES(key[16:]), modes.CBC(iv)).encryptor()
        text = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
        authenticated = aad + iv + text + (len(aad) * 8).to_bytes(8, "big")
        tag = hmac.digest(key[:16], authenticated, "sha256")[:16]
    return ".".join((protected, b64(wrapped), b64(iv), b64(text), b64(tag)))


def oaep(key: rsa.RSAPublicKey, plain: bytes, digest: str) -> bytes:
    """Return RSAES-OAEP (RFC 8017 §7.1.1) of `plain` with a fixed seed."""
    size = hashlib.new(digest).digest_size
    block = hashlib.new(digest, b"").digest() + bytes(256 - len(plain) - 2 * size - 2) + b"\1" + plain
    seed = _SALT[:size]
    masked = _xor(block, _mask(seed, len(block), digest))
    return rsa_public(key, b"\0" + _xor(seed, _mask(masked, size, digest)) + masked)


def pkcs1_encrypted(key: rsa.RSAPublicKey, plain: bytes) -> bytes:
    """Return RSAES-PKCS1-v1_5 (RFC 8017 §7.2.1) of `plain` with a fixed filling."""
    return rsa_public(key, padded(plain, kind=2, filler=b"\x5a"))


def key_wrapped(kek: bytes, plain: bytes) -> bytes:
    """Return AES Key Wrap (RFC 3394)."""
    return keywrap.aes_key_wrap(kek, plain)


def password_key(password: bytes, algorithm: str, salt: bytes, count: int, size: int) -> bytes:
    """Return the key that PBES2 derives from a password (RFC 7518 §4.8.1)."""
    return hashlib.pbkdf2_hmac("sha256", password, algorithm.encode() + b"\0" + salt, count, size)


def agreed_key(own: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePublicKey, enc: str) -> bytes:
    """Return the key that ECDH-ES agrees upon for `A128GCM` (RFC 7518 §4.6.2)."""
    shared = own.exchange(ec.ECDH(), other)
    info = len(enc).to_bytes(4, "big") + enc.encode() + bytes(8) + (128).to_bytes(4, "big")
    return hashlib.sha256((1).to_bytes(4, "big") + shared + info).digest()[:16]


def spare_bits_set(segment: str) -> str:
    """Return another spelling of the same bytes: with a bit set that stands for none of them (RFC 4648 §3.5)."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = segment[:-1] + alphabet[alphabet.index(segment[-1]) ^ 1]
    if len(segment) % 4 not in (2, 3) or unb64(twin) != unb64(segment):
        raise ValueError("this segment has no spare bits")
    return twin
