"""Headers and payloads that are no JSON object, or one that can be read in two ways. Each is rightly signed."""

import json
from collections.abc import Iterator

from tests.contracts.torture.forge import Draft, Forge, bad, dumped, good, put, strict
from tests.support.tokens import OMIT, changed


def _both(forge: Forge, slug: str, why: str, header: str | bytes, payload: str | bytes, reason: str) -> Iterator[Draft]:
    """Yield the case for the header and for the payload; `why` has a place for the part's name."""
    yield bad(f"{slug}-header", why.format("header"), forge.raw(header=header), reason)
    yield bad(f"{slug}-payload", why.format("payload"), forge.raw(payload=payload), reason)


def texts(forge: Forge) -> Iterator[Draft]:
    """What JSON is not, and how its objects must be."""
    yield from _not_objects(forge)
    yield from _not_json(forge)
    yield from _duplicates(forge)
    yield from _legal(forge)


def _not_objects(forge: Forge) -> Iterator[Draft]:
    why = "The {} is {}, not an object (RFC 7515 §4, RFC 7519 §7.2)."
    header, claims = dumped(forge.header), dumped(forge.claims)
    for slug, name, head, payload in (
        ("list", "a list of one good object", f"[{header}]", f"[{claims}]"),
        ("empty-list", "an empty list", "[]", "[]"),
        ("pairs", "a list of pairs", dumped(list(forge.header.items())), dumped(list(forge.claims.items()))),
        ("text", "a string", dumped(header), dumped(claims)),
        ("number", "a number", "1", "1"),
        ("true", "true", "true", "true"),
        ("null", "null", "null", "null"),
    ):
        yield from _both(forge, slug, why.format("{}", name), head, payload, "not_an_object")
    why = "The {} is empty, and so no JSON."
    yield from _both(forge, "empty", why, "", "", "not_json")
    yield bad("empty-object-header", "The header is an empty object.", forge.raw(header="{}"), "alg_not_allowed")
    yield bad("empty-object-payload", "The payload is an empty object.", forge.raw(payload="{}"), "iss_wrong")


def _not_json(forge: Forge) -> Iterator[Draft]:
    header, claims = dumped(forge.header), dumped(forge.claims)
    open_header, open_claims = header[:-1], claims[:-1]
    why = "The {} is not JSON (RFC 8259): "
    for slug, name, ending in (
        ("nan", "NaN is no number", ',"x":NaN}'),
        ("nan-in-list", "NaN is no number, wherever it stands", ',"x":[{"y":[NaN]}]}'),
        ("infinity", "Infinity is no number", ',"x":Infinity}'),
        ("minus-infinity", "-Infinity is no number", ',"x":-Infinity}'),
        ("undefined", "undefined is no value", ',"x":undefined}'),
        ("trailing-comma", "there is a comma behind the last member", ",}"),
        ("comma-missing", "a comma is missing", ' "x":1}'),
        ("colon-missing", "a colon is missing", ',"x" 1}'),
        ("value-missing", "a value is missing", ',"x":}'),
        ("unquoted", "a name has no quotes", ",x:1}"),
        ("single-quotes", "a name has the wrong quotes", ",'x':1}"),
        ("number-as-name", "a name is a number", ",1:1}"),
        ("comment", "there is a comment", ',"x":1/* comment */}'),
        ("line-comment", "there is a comment", ',"x":1// comment\n}'),
        ("hash-comment", "there is a comment", ',"x":1# comment\n}'),
        ("python-true", "a value is spelt as in Python", ',"x":True}'),
        ("capital-null", "a value is spelt wrongly", ',"x":Null}'),
        ("hexadecimal", "a number is hexadecimal", ',"x":0x10}'),
        ("leading-zero", "a number begins with a zero", ',"x":01}'),
        ("leading-plus", "a number begins with a plus", ',"x":+1}'),
        ("leading-point", "a number begins with a point", ',"x":.5}'),
        ("trailing-point", "a number ends with a point", ',"x":1.}'),
        ("exponent-missing", "a number's exponent is missing", ',"x":1e}'),
        ("separator", "a number has a separator", ',"x":1_000}'),
        ("arabic-digits", "a number has digits of another script", ',"x":\u0661\u0662}'),
        ("line-end-in-text", "a string has a line end in it", ',"x":"a\nb"}'),
        ("nul-in-text", "a string has a NUL in it", ',"x":"a\0b"}'),
        ("escape", "a string has an escape that there is not", ',"x":"\\x41"}'),
        ("escape-cut", "a string has half an escape", ',"x":"\\u00"}'),
        ("text-open", "a string does not end", ',"x":"a}'),
        ("open", "the object does not end", ""),
        ("wrong-bracket", "the object ends with another bracket", "]"),
        ("form-feed", "there is a blank that JSON does not have", "\f}"),
        ("no-break-blank", "there is a blank that JSON does not have", "\u00a0}"),
        ("behind", "there is another object behind it", "}{}"),
        ("brace-behind", "there is a brace behind it", "}}"),
        ("word-behind", "there is a word behind it", "} true"),
        ("nul-behind", "there is a NUL behind it", "}\0"),
        ("comma-behind", "there is a comma behind it", "},"),
    ):
        yield from _both(forge, slug, why + f"{name}.", open_header + ending, open_claims + ending, "not_json")
    why = "The {} is not UTF-8, or not JSON once it is (RFC 7515 §2, RFC 8259 §8.1): "
    inside = (',"x":"', '"}')
    for slug, name, raw in (
        ("latin-1", "a letter is Latin-1", b"\xe9"),
        ("ff", "there is a byte that UTF-8 does not have", b"\xff"),
        ("overlong", "a letter is spelt in two bytes where one does", b"\xc1\x81"),
        ("overlong-nul", "NUL is spelt in two bytes", b"\xc0\x80"),
        ("cut", "a letter is cut off", b"\xe2\x82"),
        ("continuation", "a letter's second byte stands alone", b"\x80"),
        ("surrogates", "a letter is spelt as two halves", b"\xed\xa0\xbd\xed\xb8\x80"),
        ("too-large", "a letter is beyond Unicode", b"\xf4\x90\x80\x80"),
    ):
        broken = [(text + inside[0]).encode() + raw + inside[1].encode() for text in (open_header, open_claims)]
        yield from _both(forge, slug, why + f"{name}.", broken[0], broken[1], "not_json")
    for slug, name, codec in (
        ("utf-16", "it is UTF-16", "utf-16-le"),
        ("utf-16-mark", "it is UTF-16 with its mark", "utf-16"),
        ("utf-32", "it is UTF-32", "utf-32-be"),
    ):
        yield from _both(forge, slug, why + f"{name}.", header.encode(codec), claims.encode(codec), "not_json")
    why = "The {} is other than JSON: "
    for slug, name, head, payload in (
        ("word", "a word", "alg", "iss"),
        ("deep", "five thousand lists that do not end", "[" * 5000, "[" * 5000),
        ("deep-objects", "a thousand objects that do not end", '{"a":' * 1000, '{"a":' * 1000),
        ("form", "a form", "alg=RS256&typ=at%2Bjwt", "iss=" + forge.issuer),
        ("xml", "XML", "<alg>RS256</alg>", "<iss>" + forge.issuer + "</iss>"),
        ("yaml", "YAML", "alg: RS256\ntyp: at+jwt\n", "iss: " + forge.issuer + "\n"),
        ("single-quotes-all", "as Python writes a dict", repr(forge.header), repr(forge.claims)),
    ):
        yield from _both(forge, slug, why + f"it is {name}.", head, payload, "not_json")
    for slug, name, raw in (
        ("cbor", "CBOR, as a beginning", b"\xa1\x01\x26"),
        ("gzip", "compressed", b"\x1f\x8b\x08\0"),
    ):
        yield from _both(forge, slug, why + f"it is {name}.", raw, raw, "not_json")
    for slug, name, before, behind in (
        ("mark", "a byte order mark before it (RFC 8259 §8.1)", "\ufeff", ""),
        ("blank-before", "a blank before it", " ", ""),
        ("line-end-behind", "a line end behind it", "", "\n"),
    ):
        what = f"The {{}} has {name}: another spelling of the same object, which no issuer has a reason for."
        yield strict(f"{slug}-header", what.format("header"), forge.raw(header=before + header + behind), "not_json")
        yield strict(f"{slug}-payload", what.format("payload"), forge.raw(payload=before + claims + behind), "not_json")


def _duplicates(forge: Forge) -> Iterator[Draft]:
    """A name that stands there twice: what one reader checks is not what another one uses."""
    why = "The {} {} stands there twice; {} (RFC 7515 §4, RFC 7519 §4, RFC 8725 §2.4)."
    late, right = "whoever takes the last reads a wrong one", "whoever takes the first reads a wrong one"
    issuer, other = "https://evil.example", "https://billing.example"
    header: tuple[tuple[str, str], ...] = (("alg", '"none"'), ("typ", '"JWT"'), ("kid", '"unknown"'))
    wrong: tuple[tuple[str, str], ...] = (
        ("iss", dumped(issuer)),
        ("aud", dumped(other)),
        ("exp", str(forge.now - 3600)),
        ("iat", str(forge.now + 3600)),
        ("client_id", "7"),
        ("sub", "null"),
        ("jti", '""'),
        ("scope", "[]"),
    )
    for part, members, values in (("header", forge.header, header), ("claim", forge.claims, wrong)):
        for name, value in values:
            genuine = dumped(members[name])
            rest = dumped(changed(members, {name: OMIT}))[:-1]
            for order, first, second, said, make in (
                ("wrong-last", genuine, value, late, bad),
                ("wrong-first", value, genuine, right, strict),
                ("same", genuine, genuine, "nobody can tell which one is meant", strict),
            ):
                text = f'{rest},"{name}":{first},"{name}":{second}}}'
                token = forge.raw(header=text) if part == "header" else forge.raw(payload=text)
                yield make(f"twice-{name}-{order}", why.format(part, name, said), token, "duplicate_member")
    genuine = dumped(forge.claims)[:-1]
    for slug, name, text, said in (
        ("escaped", "exp", genuine + f',"\\u0065xp":{forge.now + 999}}}', "once it is spelt with an escape"),
        ("unknown", "x", genuine + ',"x":1,"x":2}', "it is no known claim, but no object has two of a name"),
        ("nested", "y", genuine + ',"x":{"y":1,"y":2}}', "it stands inside another claim"),
        ("many", "x", genuine + ',"x":0' * 500 + "}", "and hundreds of times more"),
    ):
        yield strict(f"twice-{slug}", why.format("claim", name, said), forge.raw(payload=text), "duplicate_member")
    text = dumped(forge.header)[:-1] + ',"\\u0061lg":"none"}'
    yield bad("twice-alg-escaped", why.format("header", "alg", late), forge.raw(header=text), "duplicate_member")


def _legal(forge: Forge) -> Iterator[Draft]:
    """JSON that is unusual and right."""
    header, claims = forge.header, forge.claims
    indented = forge.raw(json.dumps(header, indent=2), json.dumps(claims, indent=2))
    yield good("indented", "Header and payload are indented, which changes nothing (RFC 8259 §2).", indented)
    reverse = forge.raw(dumped(dict(reversed(header.items()))), dumped(dict(reversed(claims.items()))))
    yield good("reversed", "The members stand in another order.", reverse)
    text = dumped(claims).replace('"exp"', '"\\u0065x\\u0070"').replace("https://", "https:\\/\\/")
    yield good(
        "escaped",
        "Names and values are spelt with escapes, which mean the same (RFC 8259 §7).",
        forge.raw(payload=text),
    )
    text = dumped(header).replace("at+jwt", "at\\u002bjwt").replace('"alg"', '"\\u0061lg"')
    yield good("escaped-header", "The header's names and values are spelt with escapes.", forge.raw(header=text))
    text = json.dumps({**claims, "name": "Zo\u00eb \u6f22\u5b57 \U0001f511"}, ensure_ascii=False)
    yield good("unicode", "A claim has letters beyond ASCII as they are, in UTF-8.", forge.raw(payload=text))
    nested = json.loads("[" * 40 + "]" * 40)
    yield good("nested", "A claim is forty lists deep.", forge.token(claims={"x": nested}))
    odd = {
        "": 1,
        "__proto__": {"scope": "admin:write"},
        "constructor": {},
        "EXP": 0,
        "Aud": "x",
        " iss": "x",
        "x": 1e300,
    }
    yield good(
        "odd-names",
        "There are claims with odd names; those of others are to be ignored (RFC 7519 §4).",
        forge.token(claims=odd),
    )
    text = put(claims, "exp", f"{forge.now + 590}.0e0")
    yield good("number", "The expiry is written with a fraction and an exponent.", forge.raw(payload=text))
    for slug, text, reason in (
        ("upper-case", dumped({**changed(claims, {"exp": OMIT}), "EXP": forge.now + 590}), "exp_missing_or_malformed"),
        ("blank", dumped({**changed(claims, {"iss": OMIT}), "iss ": forge.issuer}), "iss_wrong"),
    ):
        what = "The claim is there under almost its name; names are compared letter by letter (RFC 7519 §4)."
        yield bad(f"name-{slug}", what, forge.raw(payload=text), reason)
    what = "The header alg is there in upper case; names are compared letter by letter (RFC 7515 §4)."
    header_text = dumped({"ALG": "RS256", "typ": "at+jwt", "kid": header["kid"]})
    yield bad("name-alg", what, forge.raw(header=header_text), "alg_not_allowed")
