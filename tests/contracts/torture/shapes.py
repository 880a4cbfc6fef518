"""Texts that are no compact JWS, or are spelt as none may be, or are too large to be looked at."""

import base64
import json
from collections.abc import Callable, Iterator

from tests.contracts.torture.forge import LONGEST, STRICT, Draft, Forge, bad, dumped, good, strict
from tests.contracts.torture.primitives import spare_bits_set
from tests.support.tokens import b64


def serialization(forge: Forge) -> Iterator[Draft]:
    """Other writings of a good token, and other texts in its place."""
    token = forge.token()
    header, payload, signature = token.split(".")
    yield from _json(forge)
    why = "It is {}; a compact JWS is three base64url texts with dots between them (RFC 7515 §7.1)."
    values: tuple[tuple[str, str, str, str], ...] = (
        ("empty", "the empty text", "", "malformed"),
        ("one-part", "one part", payload, "malformed"),
        ("two-parts", "header and payload", f"{header}.{payload}", "malformed"),
        ("four-parts", "a good token with a part more", f"{token}.{signature}", "malformed"),
        ("five-parts", "a good token with two parts more", f"{token}.{signature}.{signature}", "malformed"),
        ("dot-before", "a good token with a dot before it", "." + token, "malformed"),
        ("dot-behind", "a good token with a dot behind it", token + ".", "malformed"),
        ("one-dot", "a dot", ".", "malformed"),
        ("two-dots", "two dots", "..", "not_json"),
        ("four-dots", "four dots", "....", "malformed"),
        ("no-header", "a good token without its header", f".{payload}.{signature}", "not_json"),
        ("no-payload", "a good token whose payload is detached", f"{header}..{signature}", "signature_wrong"),
        ("two-tokens", "two good tokens with a blank between them", f"{token} {token}", "malformed"),
        ("two-tokens-comma", "two good tokens with a comma between them", f"{token},{token}", "malformed"),
        ("two-tokens-joined", "two good tokens, one after the other", token + token, "malformed"),
        ("other-separator", "a good token with colons for dots", token.replace(".", ":"), "malformed"),
        ("dots-escaped", "a good token with escaped dots", token.replace(".", "%2E"), "malformed"),
        ("dots-fullwidth", "a good token with fullwidth dots", token.replace(".", "\uff0e"), "malformed"),
        ("dots-ideographic", "a good token with ideographic dots", token.replace(".", "\u3002"), "malformed"),
        ("quoted", "a good token in quotes", f'"{token}"', "not_base64url"),
        ("scheme", "a good token with the scheme of its header field", f"Bearer {token}", "not_base64url"),
        ("brackets", "a good token in brackets", f"<{token}>", "not_base64url"),
        ("comma-behind", "a good token with a comma behind it", token + ",", "not_base64url"),
        ("semicolon", "a good token with a parameter", token + ";q=1", "not_base64url"),
        ("fragment", "a good token with a fragment", token + "#", "not_base64url"),
        ("tab-behind", "a good token with a tab behind it", token + "\t", "not_base64url"),
        ("line-end-behind", "a good token with a line end behind it", token + "\n", "not_base64url"),
        ("crlf-behind", "a good token with CRLF behind it", token + "\r\n", "not_base64url"),
        ("nul-behind", "a good token with NUL behind it", token + "\0", "not_base64url"),
        ("field-behind", "a good token with a header field behind it", token + "\r\nX-Admin: 1", "not_base64url"),
        ("mark-before", "a good token with a byte order mark", "\ufeff" + token, "malformed"),
        ("zero-width", "a good token with a letter of no width", token + "\u200b", "malformed"),
        ("no-break-blank", "a good token with a no-break blank behind it", token + "\u00a0", "malformed"),
        ("accent", "a good token with a letter that is not ASCII", token + "\u00e9", "malformed"),
        ("fullwidth", "a good token whose first letter is fullwidth", "\uff45" + token[1:], "malformed"),
        ("cyrillic", "a good token whose first letter only looks right", "\u0435" + token[1:], "malformed"),
        ("upper-case", "a good token in upper case", token.upper(), "not_json"),
        ("lower-case", "a good token in lower case", token.lower(), "not_base64url"),
        ("backwards", "a good token backwards", token[::-1], "not_base64url"),
        ("encoded", "a good token in base64url", b64(token.encode()), "malformed"),
        (
            "parts-encoded",
            "a good token whose parts are encoded twice",
            ".".join(b64(part.encode()) for part in token.split(".")),
            "not_json",
        ),
        (
            "decoded",
            "header and payload as plain JSON",
            f"{dumped(forge.header)}.{dumped(forge.claims)}.{signature}",
            "malformed",
        ),
        ("null", "the word null", "null", "malformed"),
        ("undefined", "the word undefined", "undefined", "malformed"),
        ("object", "what a careless script writes", "[object Object]", "malformed"),
        ("refresh-token", "a refresh token", "rt_" + "0" * 60, "malformed"),
        ("paseto", "a token of another kind", "v4.public." + payload, "not_base64url"),
        ("saml", "the beginning of a SAML assertion", base64.b64encode(b"<saml:Assertion>").decode(), "malformed"),
        ("certificate", "a certificate's beginning", "-----BEGIN CERTIFICATE-----", "malformed"),
        ("sql", "an attempt at a database", "' OR '1'='1", "malformed"),
        ("path", "a path", "../../../etc/passwd", "malformed"),
    )
    for slug, name, text, reason in values:
        yield bad(slug, why.format(name), text, reason)


def _json(forge: Forge) -> Iterator[Draft]:
    """The JSON serialization of JWS, which access tokens never use."""
    header, payload, signature = forge.token().split(".")
    foreign = forge.token(key=forge.keys.foreign).split(".")
    right = {"protected": header, "signature": signature}
    wrong = {"protected": foreign[0], "signature": foreign[2]}
    open_header = {"header": forge.header, "signature": signature}
    why = "A good signature, but in the JSON serialization (RFC 7515 §7.2): {}; a JWT is compact (RFC 7519 §1)."
    for slug, name, value in (
        ("json-flattened", "flattened", {"payload": payload, **right}),
        ("json-general", "with one signature", {"payload": payload, "signatures": [right]}),
        (
            "json-two-signatures",
            "with a right and a wrong signature",
            {"payload": payload, "signatures": [right, wrong]},
        ),
        ("json-wrong-first", "with a wrong and a right signature", {"payload": payload, "signatures": [wrong, right]}),
        ("json-no-signatures", "with no signature at all", {"payload": payload, "signatures": []}),
        ("json-unprotected", "with an unprotected header", {"payload": payload, **open_header}),
        ("json-both-headers", "with one header more", {"payload": payload, **right, "header": {"kid": "x"}}),
        ("json-list", "flattened, in a list", [{"payload": payload, **right}]),
        ("json-plain-payload", "with a payload that is not encoded", {"payload": forge.claims, **right}),
    ):
        text = json.dumps(value)
        yield bad(slug, why.format(name), text, "not_base64url" if text.count(".") == 2 else "malformed")
    yield bad("json-parts", why.format("as a list of its parts"), dumped([header, payload, signature]), "malformed")


def spelling(forge: Forge) -> Iterator[Draft]:
    """Base64 that is not quite base64url. What is signed is the text as it stands, so the signature is right."""
    header, payload, signature = forge.token().split(".")
    why = "The {} {}; base64url has one spelling for each text of bytes (RFC 7515 §2)."

    def rewritten(respell: Callable[[str], str]) -> Iterator[tuple[str, str]]:
        yield "header", forge.signed_as_is(f"{respell(header)}.{payload}")
        yield "payload", forge.signed_as_is(f"{header}.{respell(payload)}")
        yield "signature", f"{header}.{payload}.{respell(signature)}"

    respellings: tuple[tuple[str, str, Callable[[str], str]], ...] = (
        ("line-break", "is broken into lines", lambda text: f"{text[:8]}\n{text[8:]}"),
        ("crlf", "is broken into lines with CRLF", lambda text: f"{text[:8]}\r\n{text[8:]}"),
        ("blank-within", "has a blank in it", lambda text: f"{text[:8]} {text[8:]}"),
        ("tab-within", "has a tab in it", lambda text: f"{text[:8]}\t{text[8:]}"),
        ("blank-before", "has a blank before it", lambda text: f" {text}"),
        ("blank-behind", "has a blank behind it", lambda text: f"{text} "),
        ("nul-within", "has a NUL in it", lambda text: f"{text[:8]}\0{text[8:]}"),
        ("mark", "has an exclamation mark in it", lambda text: f"{text[:8]}!{text[8:]}"),
        ("four-marks", "has four exclamation marks in it", lambda text: f"{text[:8]}!!!!{text[8:]}"),
        ("four-line-ends", "has four line ends in it", lambda text: f"{text[:8]}\r\n\r\n{text[8:]}"),
        ("tilde", "has a tilde in it", lambda text: f"{text[:8]}~{text[8:]}"),
        ("equals-sign-within", "has an equals sign in it", lambda text: f"{text[:8]}={text[8:]}"),
        ("equals-signs-before", "begins with equals signs", lambda text: f"=={text}"),
        ("padding-escaped", "is padded with %3D", lambda text: text + "%3D" * (-len(text) % 4 or 1)),
        (
            "letter-more",
            "has so many letters that no bytes are spelt like that",
            lambda text: text + "A" * ((1 - len(text)) % 4),
        ),
    )
    for slug, name, respell in respellings:
        for part, token in rewritten(respell):
            yield bad(f"{slug}-{part}", why.format(part, name), token, "not_base64url")
    yield from _padding(forge)
    yield from _alphabet(forge)
    for part, token in rewritten(lambda text: text + "===="):
        yield bad(
            f"too-much-padding-{part}", why.format(part, "has four equals signs behind it"), token, "not_base64url"
        )


def _sized(forge: Forge, header_rest: int, payload_rest: int) -> tuple[str, str]:
    """Return header and payload whose lengths are such modulo 4."""
    parts = []
    for members, rest in ((forge.header, header_rest), (forge.claims, payload_rest)):
        segments = (b64(dumped({**members, "cty": "x" * number}).encode()) for number in range(4))
        parts.append(next(segment for segment in segments if len(segment) % 4 == rest))
    return parts[0], parts[1]


def _padding(forge: Forge) -> Iterator[Draft]:
    """Equals signs, and bits that stand for nothing, wherever there can be some."""
    why = "The {} {} (RFC 7515 §2, RFC 4648 §3.5)."
    for rest, signs in ((3, "="), (2, "==")):
        header, payload = _sized(forge, rest, rest)
        name = f"is padded with {signs}"
        yield bad(
            f"padded-{len(signs)}-header",
            why.format("header", name),
            forge.signed_as_is(f"{header}{signs}.{payload}"),
            "not_base64url",
        )
        yield bad(
            f"padded-{len(signs)}-payload",
            why.format("payload", name),
            forge.signed_as_is(f"{header}.{payload}{signs}"),
            "not_base64url",
        )
        name = "has a bit set behind its last byte"
        token = forge.signed_as_is(f"{spare_bits_set(header)}.{payload}")
        yield strict(f"spare-bits-{rest}-header", why.format("header", name), token, "not_base64url")
        token = forge.signed_as_is(f"{header}.{spare_bits_set(payload)}")
        yield strict(f"spare-bits-{rest}-payload", why.format("payload", name), token, "not_base64url")
        yield good(
            f"rest-{rest}",
            f"Header and payload have {rest} letters modulo 4, unpadded.",
            forge.signed_as_is(f"{header}.{payload}"),
        )
    header, payload = _sized(forge, 0, 0)
    yield good("rest-0", "Header and payload need no padding and have none.", forge.signed_as_is(f"{header}.{payload}"))
    token = forge.token()
    yield bad("padded-signature", why.format("signature", "is padded with =="), token + "==", "not_base64url")
    yield bad(
        "half-padded-signature",
        why.format("signature", "is padded with half of what would be right"),
        token + "=",
        "not_base64url",
    )
    what = why.format("signature", "has a bit set behind its last byte: a second spelling of a good token")
    signed, _, signature = token.rpartition(".")
    yield strict("spare-bits-signature", what, f"{signed}.{spare_bits_set(signature)}", "not_base64url")


def _alphabet(forge: Forge) -> Iterator[Draft]:
    """The letters of plain base64, where base64url has others."""
    header, payload = (
        b64(dumped({**members, "cty": "???>>>"}).encode())  # of each three, one ends a group of three bytes
        for members in (forge.header, forge.claims)
    )
    token = forge.signed_as_is(f"{header}.{payload}")
    signature = token.rsplit(".", 1)[1]
    yield good("alphabet", "Header, payload and signature have letters that only base64url has.", token)
    why = "The {} is spelt with {} of plain base64 (RFC 7515 §2, RFC 4648 §5)."
    for slug, name, letters in (
        ("both", "both letters", {"-": "+", "_": "/"}),
        ("plus", "the plus", {"-": "+"}),
        ("slash", "the slash", {"_": "/"}),
    ):
        plain = str.maketrans(letters)
        for part, respelt in (
            ("header", forge.signed_as_is(f"{header.translate(plain)}.{payload}")),
            ("payload", forge.signed_as_is(f"{header}.{payload.translate(plain)}")),
            ("signature", f"{header}.{payload}.{signature.translate(plain)}"),
        ):
            yield bad(f"alphabet-{slug}-{part}", why.format(part, name), respelt, "not_base64url")


def size(forge: Forge) -> Iterator[Draft]:
    """Long tokens. Nothing in them is wrong but their length."""

    def long(length: int) -> str:
        rest = length - len(b64(bytes(256))) - 1
        about = (rest - len(forge.unsigned())) * 3 // 4
        for header in ({}, *({"pad": "x" * number} for number in range(3))):  # no payload alone has every length
            for number in range(about - 40, about):
                claims = {"pad": "x" * number}
                if len(forge.unsigned(header, claims)) == rest:
                    return forge.token(header, claims)
        raise ValueError(length)

    what = f"It has {LONGEST} characters, the most that are read."
    yield good("longest", what, long(LONGEST), level=STRICT)
    for length in (LONGEST + 1, 20_000, 60_000):
        what = f"It has {length} characters; whoever reads without a limit works as hard as a stranger likes."
        yield strict(f"long-{length}", what, long(length), "malformed")
    header, payload, signature = forge.token().split(".")
    yield strict("header", "Its header alone has 40 000 characters.", forge.token({"pad": "x" * 30_000}), "malformed")
    what = "Its signature alone has 40 000 characters."
    yield bad("signature", what, f"{header}.{payload}.{signature * 117}", "malformed")
    yield bad("dots", "It is 50 000 dots and nothing else.", "." * 50_000, "malformed")
    yield bad("short-dots", "It is 16 000 dots, short enough to be read.", "." * 16_000, "malformed")
    yield bad("letters", "It is 50 000 letters.", "A" * 50_000, "malformed")
    yield bad("digits", "It is a number of 50 000 digits.", "1" * 50_000, "malformed")
