"""Tokens of other types, tokens inside tokens, and headers that are only unusual."""

import hashlib
from collections.abc import Iterator
from typing import Any

from tests.contracts.torture.forge import CLIENT, SUBJECT, Draft, Forge, bad, dumped, good
from tests.support.tokens import OMIT, b64

_OTHERS: tuple[tuple[str, Any], ...] = (
    ("null", None),
    ("empty", ""),
    ("true", True),
    ("number", 1),
    ("list", ["at+jwt"]),
    ("object", {"at+jwt": 1}),
    ("jwt", "JWT"),
    ("jwt-lower-case", "jwt"),
    ("jwt-in-full", "application/jwt"),
    ("id", "id+jwt"),
    ("logout", "logout+jwt"),
    ("dpop", "dpop+jwt"),
    ("event", "secevent+jwt"),
    ("entity", "entity-statement+jwt"),
    ("request", "oauth-authz-req+jwt"),
    ("introspection", "token-introspection+jwt"),
    ("client-authentication", "client-authentication+jwt"),
    ("refresh", "rt+jwt"),
    ("sd-jwt", "dc+sd-jwt"),
    ("jose", "JOSE"),
    ("jose-json", "JOSE+JSON"),
    ("at", "at"),
    ("at-jwe", "at+jwe"),
    ("at-minus-jwt", "at-jwt"),
    ("at-blank-jwt", "at jwt"),
    ("longer", "at+jwts"),
    ("more-before", "xat+jwt"),
    ("suffix", "x.at+jwt"),
    ("blank-behind", "at+jwt "),
    ("blank-before", " at+jwt"),
    ("nul-behind", "at+jwt\0"),
    ("line-end-behind", "at+jwt\n"),
    ("parameter", "at+jwt;v=1"),
    ("parameter-in-full", "application/at+jwt; charset=utf-8"),
    ("twice-in-full", "application/application/at+jwt"),
    ("text", "text/at+jwt"),
    ("slash", "/at+jwt"),
    ("pattern", "*/*"),
    ("escaped", "at%2Bjwt"),
    ("fullwidth", "\uff41\uff54+jwt"),
    ("dotless", "appl\u0131cation/at+jwt"),
)


def types(forge: Forge) -> Iterator[Draft]:
    """The header typ, and what other tokens of the same issuer look like."""
    why = "The type is {}: a token made for another use is no access token (RFC 9068 §4, RFC 8725 §3.11)."
    for slug, typ in _OTHERS:
        yield bad(slug, why.format(dumped(typ)), forge.token({"typ": typ}), "typ_not_allowed")
    yield bad("missing", why.format("missing"), forge.token({"typ": OMIT}), "typ_not_allowed")
    yield bad(
        "in-payload", why.format("in the payload"), forge.token({"typ": OMIT}, {"typ": "at+jwt"}), "typ_not_allowed"
    )
    yield bad("as-cty", why.format("given as cty"), forge.token({"typ": OMIT, "cty": "at+jwt"}), "typ_not_allowed")
    bare: dict[str, Any] = dict.fromkeys(("client_id", "scope", "roles", "amr", "auth_time"), OMIT)
    digest = b64(hashlib.sha256(b"access token").digest()[:16])
    openid = {**bare, "azp": CLIENT, "nonce": "n", "at_hash": digest, "email": "a@b.example"}
    logout = {**bare, "events": {"http://schemas.openid.net/event/backchannel-logout": {}}}
    assertion = {**bare, "iss": CLIENT, "sub": CLIENT, "sid": OMIT}
    answer = {**bare, "token_introspection": {"active": True, "sub": SUBJECT, "scope": "account:read"}}
    for slug, name, typ, claims in (
        ("whole-id-token", "an ID token (OpenID Connect Core §2)", "JWT", openid),
        ("whole-logout-token", "a logout token (OpenID Connect Back-Channel Logout §2.4)", "logout+jwt", logout),
        ("whole-assertion", "what a client proves itself with (RFC 7523 §3)", "JWT", assertion),
        ("whole-introspection", "an answer of introspection (RFC 9701 §5)", "token-introspection+jwt", answer),
    ):
        yield bad(slug, f"It is {name}, signed by the same key.", forge.token({"typ": typ}, claims), "typ_not_allowed")
    proof = {"iss": OMIT, "aud": OMIT, "htm": "GET", "htu": forge.audience}
    token = forge.token({"typ": "dpop+jwt", "jwk": forge.keys.foreign.jwk, "kid": OMIT}, proof, key=forge.keys.foreign)
    yield bad(
        "whole-proof",
        "It is a proof of possession with its own key in it (RFC 9449 §4.2).",
        token,
        "header_not_allowed",
    )
    what = "An ID token that claims the type of an access token; its client_id is missing (RFC 9068 §2.2)."
    yield bad("id-token-retyped", what, forge.token(claims=openid), "client_id_missing_or_malformed")
    for slug, typ in (
        ("upper-case", "AT+JWT"),
        ("mixed-case", "At+Jwt"),
        ("in-full", "application/at+jwt"),
        ("in-full-mixed-case", "Application/AT+JWT"),
    ):
        what = f"The type is {typ}; it may be spelt in full and in any case (RFC 7515 §4.1.9, RFC 9068 §4)."
        yield good(slug, what, forge.token({"typ": typ}))


def nested(forge: Forge) -> Iterator[Draft]:
    """Tokens inside tokens: what is good within does not make good what is around it."""
    inner, foreign = forge.token(), forge.keys.foreign
    why = "The payload is {}; an access token's claims stand in it themselves (RFC 9068 §2.2)."
    for slug, name, payload, reason in (
        ("token", "a good token", inner, "not_json"),
        ("text", "a good token as a JSON string", dumped(inner), "not_an_object"),
        ("list", "a list of a good token", dumped([inner]), "not_an_object"),
        ("member", "an object with a good token in it", dumped({"jwt": inner}), "iss_wrong"),
        ("claims", "an object with good claims in it", dumped({"claims": forge.claims}), "iss_wrong"),
        ("payload", "an object with good claims in it", dumped({"payload": forge.claims}), "iss_wrong"),
    ):
        header = dumped({**forge.header, "cty": "JWT"})
        yield bad(slug, why.format(name), forge.raw(header, payload), reason)
        what = why.format(f"{name}, and around it is a foreign signature")
        yield bad(f"{slug}-foreign", what, forge.raw(header, payload, key=foreign), "signature_wrong")
    outer = inner
    for _ in range(4):
        outer = forge.raw(dumped({**forge.header, "cty": "JWT"}), outer)
    yield bad("five-deep", why.format("a token in a token, five deep"), outer, "not_json")
    parts = inner.split(".")
    token = forge.raw(payload=f"{parts[0]}.{parts[1]}")
    yield bad("part", why.format("a good token without its signature"), token, "not_json")
    what = "The good claims stand in the header, and the payload is empty (RFC 7519 §5.3 allows copies only)."
    yield bad("claims-in-header", what, forge.raw(dumped({**forge.header, **forge.claims}), "{}"), "iss_wrong")


def headers(forge: Forge) -> Iterator[Draft]:
    """Headers that change nothing, and the plain good tokens."""
    yield good("plain", "A good token, as the service issues it.", forge.token())
    for slug, what, header in (
        ("cty", "The header cty says what the payload is.", {"cty": "json"}),
        (
            "unknown",
            "There are headers that nobody knows; they are to be ignored (RFC 7515 §4).",
            {"x": 1, "http://a.example/b": [None]},
        ),
        ("iss", "A claim is copied into the header (RFC 7519 §5.3).", {"iss": forge.issuer}),
        (
            "thumbprint",
            "There is a certificate's thumbprint; the kid has said already which key it is.",
            {"x5t#S256": b64(bytes(32))},
        ),
        ("nonce", "There is a nonce, which belongs to other protocols.", {"nonce": "n"}),
        ("long", "There is a header of 600 letters.", {"x": "x" * 600}),
    ):
        yield good(slug, what, forge.token(header))
    what = "The parameters are those of an encryption; in a signed token they are unknown, and ignored."
    yield good("apu", what, forge.token({"apu": "AAAA", "p2c": 2**31}))
    what = "The header alg stands in the payload as well, where it means nothing."
    yield good("alg-in-payload", what, forge.token(claims={"alg": "none", "kid": "x", "typ": "JWT", "crit": ["x"]}))
    what = "Another header holds the kid of our second key; the key is chosen by kid alone."
    yield good("second-kid", what, forge.token({"x5t": forge.keys.second.kid}))
    token = forge.token({"alg": "RS256", "b64url": False, "critical": ["x"], "jwks": {"keys": []}})
    yield good("almost", "The headers almost have the names of forbidden ones; unknown ones are to be ignored.", token)
    what = "There is no header but alg, typ and kid, and no claim but those that are needed (RFC 9068 §2.2)."
    needed = dict.fromkeys(("scope", "roles", "auth_time", "amr"), OMIT)
    yield good("least", what, forge.token(claims=needed))
    what = "It is good, and its signature was made for the other one of two audiences."
    left, right = forge.token(), forge.token(claims={"aud": "https://stock.example"})
    yield bad("halves", what, ".".join((*left.split(".")[:2], right.split(".")[2])), "signature_wrong")
