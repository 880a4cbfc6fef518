"""Encrypted tokens (JWE) where a signed one is expected. They are really encrypted, and none may be decrypted."""

import json
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from tests.contracts.torture.forge import Draft, Forge, bad, dumped
from tests.contracts.torture.primitives import (
    CONTENT_KEY,
    agreed_key,
    deflated,
    deflated_zeros,
    encrypted,
    key_wrapped,
    oaep,
    password_key,
    pkcs1_encrypted,
)
from tests.support.tokens import b64

_SALT = bytes(range(16))


def _ephemeral(forge: Forge) -> tuple[dict[str, str], bytes]:
    """Return the sender's public half for ECDH-ES, and the key agreed with the one that the key set has."""
    own = ec.derive_private_key(int.from_bytes(CONTENT_KEY, "big") >> 1, ec.SECP256R1())
    numbers = own.public_key().public_numbers()
    public = {
        "kty": "EC",
        "crv": "P-256",
        "x": b64(numbers.x.to_bytes(32, "big")),
        "y": b64(numbers.y.to_bytes(32, "big")),
    }
    return public, agreed_key(own, forge.keys.curve.private.public_key(), "A128GCM")


def made(forge: Forge) -> Iterator[tuple[str, str, str]]:
    """Yield slug, description and token of each that holds a good token; whoever has the key can open it."""
    inner = forge.token().encode()
    claims = dumped(forge.claims).encode()
    ours, key = forge.keys.good, CONTENT_KEY[:16]
    public = ours.private.public_key()
    gcm: dict[str, Any] = {"enc": "A128GCM", "cty": "JWT", "kid": ours.kid}
    for alg, wrapped in (
        ("RSA-OAEP", oaep(public, key, "sha1")),
        ("RSA-OAEP-256", oaep(public, key, "sha256")),
        ("RSA1_5", pkcs1_encrypted(public, key)),
    ):
        yield (
            alg.lower(),
            f"encrypted for our public key with {alg}",
            encrypted({"alg": alg, **gcm}, wrapped, inner, key),
        )
    header = {"alg": "RSA-OAEP", "typ": "at+jwt", **gcm}
    wrapped = oaep(public, key, "sha1")
    yield (
        "typed",
        "encrypted for our public key, its type that of an access token",
        encrypted(header, wrapped, inner, key),
    )
    yield "claims", "encrypted claims without any signature", encrypted({**header, "cty": "json"}, wrapped, claims, key)
    header = {"alg": "RSA-OAEP", "zip": "DEF", **gcm}
    yield "compressed", "compressed before it was encrypted", encrypted(header, wrapped, deflated(inner), key)
    shared = {"kid": "shared", "cty": "JWT"}
    kek = forge.keys.shared
    token = encrypted({"alg": "A256KW", "enc": "A128GCM", **shared}, key_wrapped(kek, key), inner, key)
    yield "a256kw", "encrypted with a shared secret", token
    token = encrypted({"alg": "dir", "enc": "A128CBC-HS256", **shared}, b"", inner, kek)
    yield "dir", "encrypted directly with a shared secret", token
    public_half, agreed = _ephemeral(forge)
    token = encrypted({"alg": "ECDH-ES", "enc": "A128GCM", "epk": public_half, "kid": "curve"}, b"", inner, agreed)
    yield "ecdh-es", "encrypted for a key on a curve", token
    alg, count = "PBES2-HS256+A128KW", 1000
    derived = password_key(b"secret", alg, _SALT, count, 16)
    header = {"alg": alg, "enc": "A128GCM", "p2s": b64(_SALT), "p2c": count, "cty": "JWT"}
    yield "pbes2", "encrypted with a password", encrypted(header, key_wrapped(derived, key), inner, key)


def encryption(forge: Forge) -> Iterator[Draft]:
    """Whether they could be opened or not."""
    why = "It is {}, where a signed token is expected; nothing is decrypted (RFC 7516 §9, RFC 9068 §4)."
    tokens = list(made(forge))
    for slug, name, token in tokens:
        yield bad(slug, why.format(name), token, "malformed")
    ours, key = forge.keys.good, CONTENT_KEY[:16]
    public = ours.private.public_key()
    header: dict[str, Any] = {"alg": "RSA-OAEP", "enc": "A128GCM", "zip": "DEF", "kid": ours.kid}
    bomb = encrypted(header, oaep(public, key, "sha1"), deflated_zeros(4000), key)
    yield bad("bomb", why.format("encrypted, a million zeros that were compressed"), bomb, "malformed")
    pbes2 = {"alg": "PBES2-HS512+A256KW", "enc": "A128CBC-HS256", "p2s": b64(_SALT), "p2c": 2**31}
    token = encrypted(pbes2, bytes(40), b"{}", CONTENT_KEY)
    yield bad("pbes2-2-31", why.format("encrypted with a password, to be derived in 2^31 rounds"), token, "malformed")
    token = encrypted({**pbes2, "p2c": 10**30}, bytes(40), b"{}", CONTENT_KEY)
    yield bad("pbes2-10-30", why.format("encrypted with a password, to be derived in 10^30 rounds"), token, "malformed")
    off_curve = {"kty": "EC", "crv": "P-256", "x": b64(bytes(31) + b"\1"), "y": b64(bytes(31) + b"\1")}
    header = {"alg": "ECDH-ES", "enc": "A128GCM", "epk": off_curve, "kid": "curve"}
    token = encrypted(header, b"", b"{}", key)
    yield bad(
        "ecdh-es-off-curve",
        why.format("encrypted to learn a private key, with a point that is on no curve"),
        token,
        "malformed",
    )
    parts = tokens[0][2].split(".")
    yield bad("tag-empty", why.format("encrypted, and its tag is empty"), ".".join((*parts[:4], "")), "malformed")
    yield bad("tag-missing", why.format("encrypted, and its tag is missing"), ".".join(parts[:4]), "malformed")
    signed = b64(dumped(forge.header).encode())
    token = ".".join((signed, *parts[1:]))
    yield bad(
        "header-of-a-signed-one",
        why.format("in five parts, and its header is that of a good signed token"),
        token,
        "malformed",
    )
    members = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    token = json.dumps(dict(zip(members, parts, strict=True)))
    yield bad("json", why.format("encrypted, in JSON (RFC 7516 §7.2)"), token, "malformed")
    why = "Three parts, and the header says {}: an encrypted token's header on a signed one's shape (RFC 7516 §9)."
    for slug, alg in (("rsa-oaep", "RSA-OAEP"), ("dir", "dir"), ("pbes2", pbes2["alg"]), ("ecdh-es", "ECDH-ES")):
        extra = {**pbes2, "alg": alg} if slug == "pbes2" else {"alg": alg, "enc": "A128GCM"}
        yield bad(f"three-parts-{slug}", why.format(alg), forge.token(extra), "alg_not_allowed")
