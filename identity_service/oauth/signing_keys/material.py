"""Keys as material: made, spelled as JWK, held in memory, and published."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ALGORITHM = "RS256"


@dataclass(frozen=True, slots=True)
class NewKey:
    """Key material that no row holds yet."""

    kid: str
    public_jwk: Mapping[str, str]
    der: bytes


def b64url(raw: bytes) -> bytes:
    """Return the base64url spelling without padding (RFC 7515 §2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _number(value: int) -> str:
    return b64url(value.to_bytes((value.bit_length() + 7) // 8, "big")).decode("ascii")


def public_jwk(public: rsa.RSAPublicKey) -> dict[str, str]:
    """Return the public members (RFC 7518 §6.3.1) with the RFC 7638 thumbprint as `kid`."""
    numbers = public.public_numbers()
    n = _number(numbers.n)
    e = _number(numbers.e)
    canonical = json.dumps({"e": e, "kty": "RSA", "n": n}, separators=(",", ":"), sort_keys=True)
    kid = b64url(hashlib.sha256(canonical.encode("ascii")).digest()).decode("ascii")
    return {"kty": "RSA", "use": "sig", "alg": ALGORITHM, "kid": kid, "n": n, "e": e}


def generate(bits: int) -> NewKey:
    """Return a fresh RSA key of `bits` bits; can take seconds for the large ones."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    jwk = public_jwk(private.public_key())
    der = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return NewKey(jwk["kid"], jwk, der)


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A key in memory: its two halves as objects, since parsing one costs more than a hundred signatures."""

    private: rsa.RSAPrivateKey
    public: rsa.RSAPublicKey
    jwk: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A prebuilt public answer: the bytes and their strong entity tag."""

    body: bytes
    etag: bytes

    @classmethod
    def of(cls, value: object) -> "Document":
        """Return `value` as compact JSON with its tag."""
        body = json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")
        return cls(body, b'"' + hashlib.sha256(body).hexdigest()[:32].encode("ascii") + b'"')
