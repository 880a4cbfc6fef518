"""Claims that say the wrong thing, or nothing, or the right thing in the wrong form. Each is rightly signed."""

from collections.abc import Iterator
from typing import Any

from tests.contracts.torture.forge import CLIENT, OTHER_AUDIENCE, SUBJECT, Draft, Forge, bad, dumped, good, put, strict
from tests.support.tokens import OMIT

LEEWAY = 30
LATEST = 253402300799
"""The last second of the year 9999, the latest time that is taken for one."""


def _shown(value: Any) -> str:
    return "missing" if value is OMIT else dumped(value)


def issuer(forge: Forge) -> Iterator[Draft]:
    """The claim iss."""
    ours = forge.issuer
    host = ours.partition("://")[2]
    values: tuple[tuple[str, Any], ...] = (
        ("missing", OMIT),
        ("null", None),
        ("empty", ""),
        ("true", True),
        ("number", 7),
        ("list", [ours]),
        ("list-of-two", [ours, "https://evil.example"]),
        ("object", {ours: 1}),
        ("other", "https://evil.example"),
        ("shortened", ours[:-1]),
        ("lengthened", ours + "x"),
        ("prefix-of-a-host", ours + ".evil.example"),
        ("userinfo", ours + "@evil.example"),
        ("user-of-ours", f"https://evil@{host}"),
        ("slash", ours + "/"),
        ("path", ours + "/realms/other"),
        ("query", ours + "?"),
        ("fragment", ours + "#"),
        ("dot", ours + "."),
        ("port", ours + ":443"),
        ("upper-case", ours.upper()),
        ("upper-case-host", f"https://{host.upper()}"),
        ("http", f"http://{host}"),
        ("no-scheme", host),
        ("subdomain", f"https://www.{host}"),
        ("escaped", ours.replace(".", "%2E")),
        ("blank-before", " " + ours),
        ("blank-behind", ours + " "),
        ("line-end-behind", ours + "\n"),
        ("nul-behind", ours + "\0"),
        ("lookalike", ours.replace("e", "\u0435")),
        ("fullwidth", ours.replace("i", "\uff49")),
        ("two", f"{ours} https://evil.example"),
        ("pattern", "*"),
        ("pattern-of-ours", "https://*"),
        ("audience", OTHER_AUDIENCE),
    )
    why = "The issuer is {}; it is compared as it is, letter by letter (RFC 9068 §4, RFC 8725 §3.8)."
    for slug, value in values:
        yield bad(slug, why.format(_shown(value)), forge.token(claims={"iss": value}), "iss_wrong")


def audience(forge: Forge) -> Iterator[Draft]:
    """The claim aud."""
    ours, other = forge.audience, OTHER_AUDIENCE
    host = ours.partition("://")[2]
    why = "The audience is {}, which is neither a string nor a list of strings (RFC 7519 §4.1.3)."
    malformed: tuple[tuple[str, Any], ...] = (
        ("missing", OMIT),
        ("null", None),
        ("true", True),
        ("number", 7),
        ("object", {ours: 1}),
        ("nested", [[ours]]),
        ("list-with-number", [ours, 7]),
        ("list-with-null", [ours, None]),
        ("list-with-object", [{"aud": ours}, ours]),
        ("list-of-null", [None]),
    )
    for slug, value in malformed:
        yield bad(slug, why.format(_shown(value)), forge.token(claims={"aud": value}), "aud_missing_or_malformed")
    why = "The audience is {}, and we are not named; it is compared letter by letter (RFC 9068 §4, RFC 8725 §3.9)."
    values: tuple[tuple[str, Any], ...] = (
        ("empty", ""),
        ("empty-list", []),
        ("list-of-empty", [""]),
        ("other", other),
        ("list-of-others", [other, "https://stock.example"]),
        ("client", CLIENT),
        ("subject", SUBJECT),
        ("shortened", ours[:-1]),
        ("lengthened", ours + "x"),
        ("prefix-of-a-host", ours + ".evil.example"),
        ("slash", ours + "/"),
        ("path", ours + "/v1"),
        ("dot", ours + "."),
        ("port", ours + ":443"),
        ("upper-case", ours.upper()),
        ("http", f"http://{host}"),
        ("no-scheme", host),
        ("blank-before", " " + ours),
        ("blank-behind", ours + " "),
        ("nul-behind", ours + "\0"),
        ("lookalike", ours.replace("e", "\u0435")),
        ("two-in-one", f"{ours} {other}"),
        ("two-with-comma", f"{ours},{other}"),
        ("json-in-text", dumped([ours])),
        ("pattern", "*"),
        ("pattern-of-ours", "https://*"),
    )
    for slug, value in values:
        yield bad(slug, why.format(dumped(value)), forge.token(claims={"aud": value}), "aud_wrong")
    yield good(
        "list",
        "The audience is a list of us alone, which is as good as the string (RFC 7519 §4.1.3).",
        forge.token(claims={"aud": [ours]}),
    )
    yield from _several(forge)


def _several(forge: Forge) -> Iterator[Draft]:
    """Audiences that name us among others; the issuer is never one of several."""
    ours, other = forge.audience, OTHER_AUDIENCE
    for slug, value in (
        ("first", [ours, other]),
        ("last", [other, "https://stock.example", ours]),
        ("twice", [ours, ours]),
    ):
        token = forge.token(claims={"aud": value})
        if forge.own_api:
            what = "The issuer's own API stands in a list of several audiences, and its tokens are good nowhere else."
            yield strict(f"several-{slug}", what, token, "aud_mixed")
        else:
            yield good(f"several-{slug}", f"The audience is {dumped(value)}, and we are named.", token)
    if not forge.own_api:
        what = "The audience is the issuer's own API, whose tokens are good nowhere else."
        yield bad("issuer", what, forge.token(claims={"aud": forge.issuer}), "aud_wrong")
        what = "We stand in a list with the issuer's own API, whose tokens are good nowhere else."
        yield strict("issuer-among-several", what, forge.token(claims={"aud": [forge.issuer, ours]}), "aud_mixed")
        yield strict("issuer-last", what, forge.token(claims={"aud": [ours, other, forge.issuer]}), "aud_mixed")


def time(forge: Forge) -> Iterator[Draft]:
    """The claims exp, iat and nbf."""
    yield from _forms(forge)
    yield from _numbers(forge)
    now = forge.now
    for slug, exp in (
        ("leeway", now - LEEWAY),
        ("leeway-fraction", now - LEEWAY - 0.25),
        ("leeway-past", now - LEEWAY - 1),
        ("hour", now - 3600),
        ("one", 1),
        ("zero", 0),
    ):
        what = f"It ended {now - exp} seconds ago, and {LEEWAY} are forgiven (RFC 7519 §4.1.4)."
        yield bad(f"exp-{slug}", what, forge.token(claims={"exp": exp}), "expired")
    for slug, exp in (
        ("within-leeway", now - LEEWAY + 1),
        ("last-moment", now - LEEWAY + 0.25),
        ("now", now),
        ("last", LATEST),
    ):
        what = f"It ends at {exp}, and a clock may be {LEEWAY} seconds slow (RFC 7519 §4.1.4)."
        yield good(f"exp-{slug}", what, forge.token(claims={"exp": exp}))
    for name, make in (("nbf", bad), ("iat", strict)):
        meaning = "is not to be used" if name == "nbf" else "was not made"
        for slug, ahead in (
            ("leeway-fraction", LEEWAY + 0.25),
            ("leeway-past", LEEWAY + 1),
            ("hour", 3600),
            ("year", 31_536_000),
        ):
            what = f"By its {name} it {meaning} before {ahead} seconds from now, and {LEEWAY} are forgiven."
            claims = {name: now + ahead, "exp": now + 10**8}
            yield make(f"{name}-{slug}", what, forge.token(claims=claims), "not_yet_valid")
        for slug, value in (
            ("leeway", now + LEEWAY),
            ("now", now),
            ("fraction", now - 0.5),
            ("long-ago", 1),
            ("zero", 0),
        ):
            what = f"Its {name} is {value}, not more than {LEEWAY} seconds from now."
            yield good(f"{name}-{slug}", what, forge.token(claims={name: value}))
    yield good(
        "exp-fraction",
        "Its expiry has a fraction, as a NumericDate may (RFC 7519 §2).",
        forge.token(claims={"exp": now + 0.5}),
    )


def _forms(forge: Forge) -> Iterator[Draft]:
    """What is no time at all."""
    now = forge.now
    values: tuple[tuple[str, Any], ...] = (
        ("null", None),
        ("text", str(now + 590)),
        ("text-empty", ""),
        ("text-nan", "NaN"),
        ("date", "2099-01-01T00:00:00Z"),
        ("true", True),
        ("false", False),
        ("list", [now + 590]),
        ("empty-list", []),
        ("object", {"$date": now + 590}),
        ("empty-object", {}),
    )
    for name in ("exp", "iat", "nbf"):
        reason = f"{name}_missing_or_malformed"
        if name != "nbf":
            what = f"There is no {name}, which an access token needs (RFC 9068 §2.2, §4)."
            yield bad(f"{name}-missing", what, forge.token(claims={name: OMIT}), reason)
        for slug, value in values:
            what = f"The {name} is {dumped(value)}, not a number (RFC 7519 §2)."
            yield bad(f"{name}-{slug}", what, forge.token(claims={name: value}), reason)


def _numbers(forge: Forge) -> Iterator[Draft]:
    """Numbers that are no times, and texts that are no numbers."""
    numbers = (
        ("negative", "-1"),
        ("negative-fraction", "-0.5"),
        ("milliseconds", str(forge.now * 1000)),
        ("after-9999", str(LATEST + 1)),
        ("2-53", str(2**53)),
        ("2-63", str(2**63)),
        ("2-64", str(2**64)),
        ("2-64-and-now", str(2**64 + forge.now)),
        ("1e300", "1e300"),
        ("1e400", "1e400"),
        ("minus-1e400", "-1e400"),
        ("many-digits", "1" * 400),
        ("very-many-digits", "9" * 4000),
    )
    for name in ("exp", "iat", "nbf"):
        for slug, text in numbers:
            shown = text if len(text) < 30 else f"a number of {len(text)} digits"
            what = f"The {name} is {shown}, which is no time that a token can mean; clocks and readers overflow on it."
            # Whatever is made of such a number: an end before 1970 has passed, and a beginning after 9999 lies ahead.
            clear = (name, text.startswith("-")) in (("exp", True), ("nbf", False))
            make = bad if clear else strict
            yield make(
                f"{name}-{slug}", what, forge.raw(payload=put(forge.claims, name, text)), f"{name}_missing_or_malformed"
            )
        for slug, text in (
            ("nan", "NaN"),
            ("infinity", "Infinity"),
            ("minus-infinity", "-Infinity"),
            ("leading-zero", f"0{forge.now + 590}"),
            ("leading-plus", f"+{forge.now + 590}"),
            ("hexadecimal", hex(forge.now + 590)),
            ("expression", f"{forge.now}+590"),
            ("digits-without-end", "1" * 5000),
        ):
            shown = text if len(text) < 30 else f"a number of {len(text)} digits"
            what = f"The {name} is {shown}, which is no number that JSON has or any reader can hold (RFC 8259 §6)."
            yield bad(f"{name}-{slug}", what, forge.raw(payload=put(forge.claims, name, text)), "not_json")


def others(forge: Forge) -> Iterator[Draft]:
    """The claims sub, client_id, jti, scope, sid and roles."""
    values: tuple[tuple[str, Any], ...] = (
        ("missing", OMIT),
        ("null", None),
        ("number", 7),
        ("zero", 0),
        ("true", True),
        ("list", ["x"]),
        ("empty-list", []),
        ("object", {"id": "x"}),
        ("empty-object", {}),
    )
    for name in ("sub", "client_id", "jti"):
        why = f"The {name} is {{}}, and an access token needs one, which is a string (RFC 9068 §2.2)."
        reason = f"{name}_missing_or_malformed"
        for slug, value in values:
            yield bad(f"{name}-{slug}", why.format(_shown(value)), forge.token(claims={name: value}), reason)
        for slug, value, what in (
            ("empty", "", "is empty, and so nobody's"),
            ("long", "x" * 129, "is longer than any that the issuer gives"),
            ("not-ascii", "x\u00fc", "holds a letter that the issuer never uses, and that others may spell otherwise"),
        ):
            yield strict(f"{name}-{slug}", f"The {name} {what}.", forge.token(claims={name: value}), reason)
    yield strict(
        "cnf",
        "The token is bound to a key that its bearer has not shown (RFC 7800 §3, RFC 9449 §7).",
        forge.token(claims={"cnf": {"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}}),
        "cnf_not_supported",
    )
    for slug, value in values[1:]:
        what = f"The scope is {dumped(value)}, not a string (RFC 8693 §4.2)."
        yield bad(f"scope-{slug}", what, forge.token(claims={"scope": value}), "claim_malformed")
        what = f"The sid is {dumped(value)}, not a string; whoever looks a session up must not be handed anything else."
        yield strict(f"sid-{slug}", what, forge.token(claims={"sid": value}), "claim_malformed")
    yield bad(
        "scope-words",
        "The scope is a list of words, not a string (RFC 8693 §4.2).",
        forge.token(claims={"scope": ["account:read"]}),
        "claim_malformed",
    )
    for slug, value in (
        ("null", None),
        ("text", "admin"),
        ("number", 7),
        ("true", True),
        ("object", {"admin": True}),
        ("list-of-numbers", [7]),
        ("list-of-null", [None]),
        ("list-with-list", ["user", ["admin"]]),
        ("list-with-object", ["user", {"value": "admin"}]),
    ):
        what = f"The roles are {dumped(value)}, not a list of strings; a role looked for in a text is found in many."
        yield strict(f"roles-{slug}", what, forge.token(claims={"roles": value}), "claim_malformed")
    person = {"roles": OMIT, "sid": OMIT, "auth_time": OMIT, "amr": OMIT}
    for slug, what, claims in (
        (
            "scope-missing",
            "There is no scope, which is not needed (RFC 9068 §2.2.3); nothing is allowed then.",
            {"scope": OMIT},
        ),
        ("scope-empty", "The scope is empty; nothing is allowed then.", {"scope": ""}),
        ("scope-one", "The scope is one word.", {"scope": "account:read"}),
        ("roles-missing", "There are no roles, which are not needed.", {"roles": OMIT}),
        ("roles-empty", "The list of roles is empty.", {"roles": []}),
        ("roles-several", "There are several roles.", {"roles": ["user", "admin"]}),
        (
            "client-itself",
            "A client speaks for itself: it is the subject, and there is no session (RFC 9068 §2.2).",
            {**person, "sub": CLIENT, "epoch": 0},
        ),
        ("jti-odd", "The token's own name is long and odd.", {"jti": "urn:x: /?#" * 12}),
        (
            "extra",
            "There are claims that nobody knows, of every form (RFC 7519 §4).",
            {"x": [1, {"y": None}], "https://a.example/b": True},
        ),
        (
            "identity",
            "There are claims about the person (RFC 9068 §2.2.2).",
            {"email": "a@b.example", "name": "A", "acr": "1"},
        ),
    ):
        yield good(slug, what, forge.token(claims=claims))
