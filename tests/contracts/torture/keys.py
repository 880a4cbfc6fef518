"""
The keys of the set: fixed, published with their private halves, and worth nothing.

Everybody who builds the set gets the same tokens, byte for byte. Since everybody also has these private keys, no
system may ever trust one of them outside a test.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from identity_service.oauth.signing_keys.material import public_jwk
from tests.support.tokens import b64, unb64

Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_PRIVATE_MEMBERS = frozenset(("d", "p", "q", "dp", "dq", "qi"))
_PUBLISHED_AS: dict[str, dict[str, Any]] = {
    "encryption": {"use": "enc"},
    "wrapping": {"key_ops": ["wrapKey"]},
    "other-digest": {"use": "sig", "alg": "RS512"},
    "other-padding": {"use": "sig", "alg": "PS256"},
    "weak": {"use": "sig", "alg": "RS256"},
    "curve": {"use": "sig", "alg": "ES256"},
    "wide-curve": {"use": "sig", "alg": "ES384"},
    "edwards": {"use": "sig", "alg": "EdDSA"},
}
"""What the key set says about the keys that no access token may be signed with. Their `kid` is their name here."""
_CURVES: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}
# A type of key that came later than this file's readers (draft-ietf-cose-dilithium); RFC 7517 §5: to be ignored.
_OF_THE_FUTURE = {"kty": "AKP", "kid": "future", "use": "sig", "alg": "ML-DSA-44", "pub": b64(bytes(range(256)) * 5)}


@dataclass(frozen=True, slots=True)
class Key:
    """An asymmetric key of the set."""

    name: str
    kid: str
    private: Any
    jwk: dict[str, Any]


def _number(jwk: dict[str, str], member: str) -> int:
    return int.from_bytes(unb64(jwk[member]), "big")


def _private(jwk: dict[str, str]) -> Private:
    if jwk["kty"] == "RSA":
        n, e, d, p, q, dp, dq, qi = (_number(jwk, member) for member in ("n", "e", "d", "p", "q", "dp", "dq", "qi"))
        numbers = rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, rsa.RSAPublicNumbers(e, n))
        return numbers.private_key(unsafe_skip_rsa_key_validation=True)
    if jwk["kty"] == "EC":
        public = ec.EllipticCurvePublicNumbers(_number(jwk, "x"), _number(jwk, "y"), _CURVES[jwk["crv"]])
        return ec.EllipticCurvePrivateNumbers(_number(jwk, "d"), public).private_key()
    return ed25519.Ed25519PrivateKey.from_private_bytes(unb64(jwk["d"]))


@dataclass(frozen=True)
class Keys:
    """
    All keys. `good` and `second` are the only ones that may sign access tokens.

    `foreign`, `foreign_curve` and the secret `shared` are published nowhere; the others stand in the key set, for
    other uses.
    """

    good: Key
    second: Key
    foreign: Key
    encryption: Key
    wrapping: Key
    other_digest: Key
    other_padding: Key
    weak: Key
    curve: Key
    wide_curve: Key
    edwards: Key
    foreign_curve: Key
    shared: bytes
    jwks: dict[str, Any]


@cache
def load() -> Keys:
    """Return the keys; those with which access tokens are signed have the names that the service gives its own."""
    stored = json.loads(Path(__file__).with_name("keys.json").read_text("ascii"))["keys"]
    shared = stored.pop("shared")
    keys: dict[str, Key] = {}
    for name, members in stored.items():
        private = _private(members)
        public = {member: value for member, value in members.items() if member not in _PRIVATE_MEMBERS}
        if name in _PUBLISHED_AS:
            jwk = {**public, **_PUBLISHED_AS[name], "kid": name}
        elif isinstance(private, rsa.RSAPrivateKey):
            jwk = public_jwk(private.public_key())
        else:
            jwk = {**public, "kid": name}
        keys[name] = Key(name, jwk["kid"], private, jwk)
    weak = keys["weak"].jwk
    longer = {**weak, "kid": "weak-long", "n": b64(bytes(128) + unb64(weak["n"]))}
    published = [keys[name].jwk for name in ("good", *_PUBLISHED_AS, "second")]
    return Keys(
        **{name.replace("-", "_"): key for name, key in keys.items()},
        shared=unb64(shared["k"]),
        jwks={"keys": [*published[:-1], longer, _OF_THE_FUTURE, published[-1]]},
    )
