"""Tokens that choose their own algorithm: none, a shared secret that everybody knows, or another signature."""

import base64
import hmac
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives import serialization

from tests.contracts.torture.forge import Draft, Forge, bad, dumped, sealed
from tests.contracts.torture.primitives import digest_of, ecdsa, eddsa, pss
from tests.support.tokens import OMIT, b64

_NONE: tuple[tuple[str, Any], ...] = (
    ("none", "none"),
    ("capital", "None"),
    ("upper-case", "NONE"),
    ("mixed-case", "nOnE"),
    ("blank-behind", "none "),
    ("blank-before", " none"),
    ("nul-behind", "none\0"),
    ("line-end-behind", "none\n"),
    ("fullwidth", "\uff4e\uff4f\uff4e\uff45"),
    ("empty", ""),
    ("missing", OMIT),
    ("null", None),
    ("false", False),
    ("true", True),
    ("zero", 0),
    ("number", 256),
    ("empty-list", []),
    ("list-of-none", ["none"]),
    ("list-of-ours", ["RS256"]),
    ("list-of-both", ["none", "RS256"]),
    ("empty-object", {}),
    ("object", {"alg": "RS256"}),
)


def none(forge: Forge) -> Iterator[Draft]:
    """Headers that name no algorithm, with no signature and with one that is right."""
    for slug, alg in _NONE:
        header = {"alg": alg}
        named = "no alg" if alg is OMIT else f"alg {dumped(alg)}"
        why = f"The header has {named}, which is not the string RS256 (RFC 8725 §3.1, §3.2); "
        yield bad(f"{slug}-unsigned", why + "there is no signature.", forge.unsigned(header) + ".", "alg_not_allowed")
        yield bad(f"{slug}-signed", why + "the signature would be right.", forge.token(header), "alg_not_allowed")
    why = "The header says none and there is no signature (RFC 7519 §6); "
    unsigned = forge.unsigned({"alg": "none"})
    yield bad("two-parts", why + "even the last dot is missing.", unsigned, "malformed")
    yield bad("some-signature", why + "instead there are a few other bytes.", unsigned + ".AAAA", "alg_not_allowed")
    bare = ".".join((b64(dumped({"alg": "none"}).encode()), unsigned.split(".")[1], ""))
    yield bad("nothing-else", why + "and neither typ nor kid.", bare, "alg_not_allowed")


def _secrets(forge: Forge) -> Iterator[tuple[str, str, bytes]]:
    """Yield everything that somebody might take for the secret when handed our public key."""
    key = forge.keys.good.private.public_key()
    numbers = key.public_numbers()
    modulus = numbers.n.to_bytes(256, "big")
    spki, pkcs1 = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.PublicFormat.PKCS1
    for name, form in (("spki", spki), ("pkcs1", pkcs1)):
        pem = key.public_bytes(serialization.Encoding.PEM, form)
        der = key.public_bytes(serialization.Encoding.DER, form)
        yield f"{name}-pem", f"the public key as PEM ({name})", pem
        yield f"{name}-pem-no-line-end", f"the public key as PEM ({name}) without its last line end", pem.rstrip()
        yield f"{name}-pem-two-line-ends", f"the public key as PEM ({name}) with one more line end", pem + b"\n"
        yield f"{name}-pem-crlf", f"the public key as PEM ({name}) with CRLF", pem.replace(b"\n", b"\r\n")
        yield f"{name}-pem-escaped", f"the public key as PEM ({name}) with \\n spelt out", pem.replace(b"\n", b"\\n")
        yield f"{name}-pem-body", f"the middle of the PEM ({name}) in one line", base64.b64encode(der)
        yield f"{name}-der", f"the public key as DER ({name})", der
        yield f"{name}-der-base64url", f"the public key as DER ({name}) in base64url", b64(der).encode()
    ssh = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    yield "ssh", "the public key as OpenSSH writes it", ssh
    yield "modulus", "the modulus as bytes", modulus
    yield "modulus-signed", "the modulus as bytes with a zero before them", b"\0" + modulus
    yield "modulus-base64url", "the modulus as it stands in the key set", b64(modulus).encode()
    yield "modulus-base64", "the modulus in base64", base64.b64encode(modulus)
    yield "modulus-hex", "the modulus in hexadecimal", modulus.hex().encode()
    yield "modulus-decimal", "the modulus in decimal", str(numbers.n).encode()
    yield "exponent", "the public exponent as it stands in the key set", b"AQAB"
    jwk, jwks = forge.keys.good.jwk, forge.keys.jwks
    yield "jwk", "the JWK as compact JSON", dumped(jwk).encode()
    yield "jwk-sorted", "the JWK with its members in order", dumped(dict(sorted(jwk.items()))).encode()
    canonical = dumped({name: jwk[name] for name in ("e", "kty", "n")}).encode()
    yield "jwk-canonical", "the JWK as its thumbprint is taken of (RFC 7638 §3)", canonical
    yield "jwks", "the key set as compact JSON", dumped(jwks).encode()
    yield "jwks-ours", "a key set of the two keys that sign", dumped({"keys": [jwk, forge.keys.second.jwk]}).encode()
    yield "kid", "the kid", jwk["kid"].encode()
    yield "issuer", "the issuer", forge.issuer.encode()
    yield "empty", "nothing", b""
    yield "null", "the word null", b"null"
    yield "secret", "the word secret", b"secret"


def hmac_with_public_key(forge: Forge) -> Iterator[Draft]:
    """Signatures that are an HMAC under something that everybody knows."""

    def made(alg: str, bits: str, secret: bytes, **header: Any) -> str:
        signed = forge.unsigned({"alg": alg, **header})
        return sealed(signed, hmac.digest(secret, signed.encode(), f"sha{bits}"))

    why = "An HMAC whose secret is {}: a verifier that lets the header choose takes the public key for the secret {}"
    for slug, name, secret in _secrets(forge):
        said = why.format(name, "(RFC 8725 §2.1, §3.1).")
        yield bad(f"hs256-{slug}", said, made("HS256", "256", secret), "alg_not_allowed")
        if slug in ("spki-pem", "spki-der", "jwk", "jwks", "empty"):
            for bits in ("384", "512"):
                yield bad(f"hs{bits}-{slug}", said, made(f"HS{bits}", bits, secret), "alg_not_allowed")
            said = why.format(name, "(RFC 8725 §3.1); the header claims RS256.")
            yield bad(f"rs256-{slug}", said, made("RS256", "256", secret), "signature_wrong")
    pem = forge.keys.good.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    said = "An HMAC under the public key as PEM; the header writes the algorithm as {} (RFC 8725 §2.1)."
    for slug, alg in (
        ("lower-case", "hs256"),
        ("mixed-case", "Hs256"),
        ("blank-behind", "HS256 "),
        ("hmac", "HMAC"),
        ("sha256", "SHA256"),
        ("hmacsha256", "HMACSHA256"),
    ):
        yield bad(f"spelt-{slug}", said.format(dumped(alg)), made(alg, "256", pem), "alg_not_allowed")
    said = "An HMAC under a secret that the issuer may share with a client: only RS256 is ours (RFC 8725 §3.1)"
    shared = forge.keys.shared
    yield bad("shared", said + ".", made("HS256", "256", shared), "alg_not_allowed")
    yield bad("shared-named", said + ".", made("HS256", "256", shared, kid="shared"), "alg_not_allowed")
    token = made("RS256", "256", shared, kid="shared")
    yield bad("shared-rs256", said + ", as the header claims.", token, "kid_unknown")


_NAMES = (
    *("RS1", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "ES256K", "EdDSA", "Ed25519"),
    *("HS256", "ML-DSA-44", "RSA1_5", "RSA-OAEP", "RSA-OAEP-256", "dir", "A128KW", "A256GCMKW", "ECDH-ES"),
    *(
        "PBES2-HS256+A128KW",
        "rs256",
        "Rs256",
        "RS256 ",
        " RS256",
        "RS256\0",
        "RS256\n",
        "RS-256",
        "RS 256",
        "RS256,none",
    ),
    *("RS2560", "RS25", "RS", "SHA256withRSA", "RSASSA-PKCS1-v1_5", "1.2.840.113549.1.1.11", "\uff32\uff33256", "*"),
)


def other(forge: Forge) -> Iterator[Draft]:
    """Other algorithms: really used, or only named."""
    why = "The header names {}; the signature is RS256 and right, but only that name is allowed (RFC 8725 §3.1)."
    for number, alg in enumerate(_NAMES):
        slug = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in alg)
        token = forge.token({"alg": alg})
        yield bad(
            f"only-named-{number:02}-{slug.strip('-').lower() or 'any'}",
            why.format(dumped(alg)),
            token,
            "alg_not_allowed",
        )
    good = forge.keys.good
    for bits in ("256", "384", "512"):
        for family in ("RS", "PS"):
            if (alg := family + bits) == "RS256":
                continue
            for named, reason in ((alg, "alg_not_allowed"), ("RS256", "signature_wrong")):
                signed = forge.unsigned({"alg": named})
                message = signed.encode()
                pkcs1 = forge.signature(message, digest=digest_of(bits))
                signature = pss(good.private, message, bits) if family == "PS" else pkcs1
                what = (
                    f"Signed by the right key with {alg}, and the header says {named}: a key works with one algorithm"
                )
                what += " only (RFC 8725 §3.1)."
                yield bad(f"signed-{alg.lower()}-named-{named.lower()}", what, sealed(signed, signature), reason)
    signed = forge.unsigned()
    unsalted = pss(good.private, signed.encode(), "256", salt_size=0)
    what = "PSS without salt under a header that says RS256; both paddings are deterministic, and only one is ours."
    yield bad("signed-ps256-no-salt", what, sealed(signed, unsalted), "signature_wrong")
    yield from _curves(forge)


def _curves(forge: Forge) -> Iterator[Draft]:
    keys = forge.keys
    curve, wide, edwards, foreign = keys.curve, keys.wide_curve, keys.edwards, keys.foreign_curve

    def made(header: dict[str, Any], sign: Any) -> str:
        signed = forge.unsigned(header)
        return sealed(signed, sign(signed.encode()))

    cases: tuple[tuple[str, Any, Any, str], ...] = (
        ("es256", curve, lambda message: ecdsa(curve.private, message, "256"), "ES256"),
        ("es384", wide, lambda message: ecdsa(wide.private, message, "384"), "ES384"),
        ("eddsa", edwards, lambda message: eddsa(edwards.private, message), "EdDSA"),
        ("ed25519", edwards, lambda message: eddsa(edwards.private, message), "Ed25519"),
    )
    for slug, key, sign, alg in cases:
        what = (
            f"Signed with {alg} by a key of the key set that is made for it; access tokens are signed with RS256 alone"
        )
        yield bad(slug, what + ".", made({"alg": alg, "kid": key.kid}, sign), "alg_not_allowed")
        if slug != "ed25519":
            token = made({"kid": key.kid}, sign)
            yield bad(f"{slug}-named-rs256", what + ", as the header claims.", token, "kid_unknown")
            token = made({"alg": alg}, sign)
            yield bad(f"{slug}-under-our-kid", what + ", and that key is RSA.", token, "alg_not_allowed")
    what = "Signed with ES256 by a key that is published nowhere."
    token = made({"alg": "ES256"}, lambda message: ecdsa(foreign.private, message, "256"))
    yield bad("es256-foreign", what, token, "alg_not_allowed")
    what = "An ES256 signature in DER, where JWS wants the two numbers (RFC 7518 §3.4)."
    token = made({"alg": "ES256", "kid": curve.kid}, lambda message: ecdsa(curve.private, message, "256", der=True))
    yield bad("es256-der", what, token, "alg_not_allowed")
    what = "An ES256 signature of zeros, which some took for right whatever was signed (CVE-2022-21449)."
    yield bad("es256-zeros", what, made({"alg": "ES256", "kid": curve.kid}, lambda _: bytes(64)), "alg_not_allowed")
    yield bad("es256-zeros-rs256", what, made({"kid": curve.kid}, lambda _: bytes(64)), "kid_unknown")
    what = "An Ed25519 signature of zeros."
    yield bad("eddsa-zeros", what, made({"alg": "EdDSA", "kid": edwards.kid}, lambda _: bytes(64)), "alg_not_allowed")
