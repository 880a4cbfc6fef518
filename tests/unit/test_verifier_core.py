"""The strict reading of an access token, word by word: what is refused, and for which reason."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given
from hypothesis import strategies as st

from identity_service.verifier.core import LEEWAY, TokenRefused, VerifiedClaims, verify
from tests.support.tokens import OMIT, b64, changed, compact

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ISSUER = "https://id.example"
SIBLING = "https://orders.example"
NOW = 1_800_000_000
HEADER = {"alg": "RS256", "typ": "at+jwt", "kid": "k1"}
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "sub": "cl_x",
    "aud": SIBLING,
    "client_id": "cl_x",
    "iat": NOW,
    "exp": NOW + 600,
    "jti": "j",
    "scope": "orders:read orders:write",
}


def read(token: str, *, now: float = NOW, audience: str = SIBLING) -> VerifiedClaims:
    keys = {"k1": KEY.public_key()}
    return verify(token, key_of=keys.get, issuer=ISSUER, audiences=(audience,), now=now)


def token(header: dict[str, Any] | None = None, claims: dict[str, Any] | None = None) -> str:
    return compact(changed(HEADER, header or {}), changed(CLAIMS, claims or {}), KEY)


def reason(text: str, *, now: float = NOW, audience: str = SIBLING) -> str:
    """Return why a token is refused, making sure that the refusal says nothing else."""
    with pytest.raises(TokenRefused) as refused:
        read(text, now=now, audience=audience)
    assert str(refused.value) == refused.value.reason
    assert refused.value.__cause__ is None
    return refused.value.reason


@pytest.mark.rfc("9068", "2.2")
def test_a_good_token_says_what_it_says() -> None:
    claims = read(token(claims={"sid": "s", "roles": ["user"]}))
    assert claims.subject == "cl_x"
    assert claims.client_id == "cl_x"
    assert claims.audience == (SIBLING,)
    assert claims.scope == {"orders:read", "orders:write"}
    assert (claims.issued_at, claims.expires_at) == (NOW, NOW + 600)
    assert claims.session_id == "s"
    assert claims.claims["roles"] == ["user"]
    assert "roles" not in repr(claims)


def test_what_a_token_does_not_say_is_empty() -> None:
    claims = read(token(claims={"scope": OMIT}))
    assert (claims.scope, claims.roles, claims.session_id) == (frozenset(), frozenset(), None)
    assert read(token(claims={"roles": []})).roles == frozenset()
    assert read(token(claims={"roles": ["user", "admin", "user"]})).roles == {"user", "admin"}
    assert read(token(claims={"scope": " a  b "})).scope == {"a", "b"}


def test_what_was_checked_cannot_be_changed_afterwards() -> None:
    claims = read(token())
    for name in ("subject", "scope", "claims", "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(claims, name, "somebody else")
    with pytest.raises(TypeError):
        claims.claims["sub"] = "somebody else"  # type: ignore[index]
    with pytest.raises(TypeError):
        del claims.claims["exp"]  # type: ignore[attr-defined]
    assert claims == read(token())
    assert claims.subject == "cl_x"


def test_what_is_printed_of_a_token_names_the_parties_and_says_nothing_about_them() -> None:
    """It ends up in logs."""
    said = {"sub": "user-1", "sid": "s-4711", "roles": ["admin"], "email": "a@b.example", "name": "Ada", "jti": "j-1"}
    claims = read(token(claims=said))
    assert repr(claims) == f"VerifiedClaims(subject='user-1', client_id='cl_x', audience=('{SIBLING}',))"
    assert str(claims) == f"{claims}" == repr(claims)


@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt", "application/AT+jwt"])
def test_the_type_may_be_spelt_in_full_and_in_any_case(typ: str) -> None:
    assert read(token({"typ": typ}))


def cases(row: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.case(row)] if row else []


HEADERS: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("JWT-01", {"alg": alg}, "alg_not_allowed")
        for alg in ("none", "None", "nOnE", "NONE", "", OMIT, ["RS256"], None, 256, {"alg": "RS256"}, "rs256", "RS256 ")
    ),
    *(
        ("JWT-03", {"alg": alg}, "alg_not_allowed")
        for alg in ("RS384", "RS512", "PS256", "ES256", "EdDSA", "HS256", "RSA-OAEP-256", "dir")
    ),
    ("JWT-04", {"jwk": {"kty": "RSA", "n": "AQAB", "e": "AQAB"}}, "header_not_allowed"),
    ("JWT-04", {"jku": "https://evil.example/jwks.json"}, "header_not_allowed"),
    ("JWT-04", {"x5u": "https://evil.example/chain.pem"}, "header_not_allowed"),
    ("JWT-04", {"x5c": ["MIIB"]}, "header_not_allowed"),
    ("JWT-07", {"crit": ["x"]}, "header_not_allowed"),
    ("JWT-07", {"crit": ["b64"], "b64": False}, "header_not_allowed"),
    ("JWT-07", {"b64": False}, "header_not_allowed"),
    ("JWT-07", {"crit": []}, "header_not_allowed"),
    ("JWT-07", {"crit": "exp"}, "header_not_allowed"),
    ("JWT-07", {"crit": None}, "header_not_allowed"),
    ("JWT-15", {"zip": "DEF"}, "header_not_allowed"),
    ("JWT-15", {"enc": "A128GCM"}, "header_not_allowed"),
    *(
        ("JWT-05", {"kid": kid}, "kid_malformed")
        for kid in (OMIT, None, "", 7, ["k1"], {"k1": 1}, "k" * 129, "k" * 10240)
    ),
    *(
        ("JWT-05", {"kid": kid}, "kid_unknown")
        for kid in ("k2", "K1", "k1 ", "k1\0", "\0", "../../etc/passwd", "' OR 1=1--", "\ud800", "k" * 128)
    ),
    *(
        ("", {"typ": typ}, "typ_not_allowed")
        for typ in ("JWT", "jwt", OMIT, None, "", "at", "id+jwt", "dpop+jwt", ["at+jwt"], "application/jwt", "at+jwt ")
    ),
]


@pytest.mark.rfc("8725", "3.1")
@pytest.mark.parametrize(("changes", "expected"), [pytest.param(*row[1:], marks=cases(row[0])) for row in HEADERS])
def test_a_header_may_say_one_thing_only(changes: dict[str, Any], expected: str) -> None:
    """Although the signature is right each time."""
    assert reason(token(changes)) == expected


LISTS = [SIBLING, 7], {SIBLING: 1}, [[SIBLING]], [None], True
TIMES = (OMIT, None, "1800000600", True, [], {}, -1, -0.1, 2**63, 2**64, 10**400, 1e300, "NaN")
CLAIM_ROWS: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("JWT-11", {"iss": iss}, "iss_wrong")
        for iss in (
            *(OMIT, None, "", [ISSUER], "https://id.exampl", "https://id.example.evil.example", "https://id.example/"),
            *("https://ID.example", "http://id.example", "https://id.example:443", " https://id.example"),
        )
    ),
    *(("JWT-10", {"aud": aud}, "aud_missing_or_malformed") for aud in (OMIT, None, 7, *LISTS)),
    *(
        ("JWT-10", {"aud": aud}, "aud_wrong")
        for aud in ([], "", "https://billing.example", "https://orders.example/", ["https://billing.example"], "https")
    ),
    ("JWT-10", {"aud": [ISSUER, SIBLING]}, "aud_mixed"),
    *(("JWT-12", {"exp": exp}, "exp_missing_or_malformed") for exp in TIMES),
    *(("JWT-12", {"iat": iat}, "iat_missing_or_malformed") for iat in TIMES),
    *(("JWT-12", {"nbf": nbf}, "nbf_missing_or_malformed") for nbf in TIMES if nbf is not OMIT),
    ("JWT-12", {"exp": NOW - LEEWAY}, "expired"),
    ("JWT-12", {"exp": 0}, "expired"),
    ("JWT-12", {"iat": NOW + LEEWAY + 1}, "not_yet_valid"),
    ("JWT-12", {"nbf": NOW + LEEWAY + 1}, "not_yet_valid"),
    *(("", {"sub": sub}, "sub_missing_or_malformed") for sub in (OMIT, None, "", 7, ["cl_x"])),
    *(("", {"client_id": value}, "client_id_missing_or_malformed") for value in (OMIT, None, "", 7)),
    *(("", {"jti": value}, "jti_missing_or_malformed") for value in (OMIT, None, "", 7)),
    *(("", {"scope": value}, "claim_malformed") for value in (None, 7, ["orders:read"])),
    *(("", {"sid": value}, "claim_malformed") for value in (7, ["s"], {})),
    *(
        ("", {"roles": value}, "claim_malformed")
        for value in (None, "admin", 7, True, {"admin": True}, [7], [None], ["user", None], [["admin"]], [True])
    ),
]


@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize(("changes", "expected"), [pytest.param(*row[1:], marks=cases(row[0])) for row in CLAIM_ROWS])
def test_every_claim_is_needed_and_read_strictly(changes: dict[str, Any], expected: str) -> None:
    assert reason(token(claims=changes)) == expected


@pytest.mark.case("JWT-12")
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 4000, "1" * 5000])
@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
def test_numbers_that_json_does_not_have_or_nobody_needs_are_refused(claim: str, number: str) -> None:
    payload = json.dumps({**CLAIMS, claim: 0}).replace(f'"{claim}": 0', f'"{claim}": {number}')
    assert reason(compact(HEADER, payload, KEY)) in ("not_json", f"{claim}_missing_or_malformed")


@pytest.mark.rfc("9068", "4")
def test_the_leeway_holds_to_the_second() -> None:
    assert read(token(), now=NOW + 600 + LEEWAY - 0.001)
    assert reason(token(), now=NOW + 600 + LEEWAY) == "expired"
    assert read(token(), now=NOW - LEEWAY)
    assert reason(token(), now=NOW - LEEWAY - 0.001) == "not_yet_valid"


@pytest.mark.case("JWT-10")
def test_a_token_for_several_siblings_is_good_at_each() -> None:
    both = token(claims={"aud": [SIBLING, "https://billing.example"]})
    assert read(both).audience == (SIBLING, "https://billing.example")
    assert read(both, audience="https://billing.example")
    assert reason(both, audience=ISSUER) == "aud_wrong"


@pytest.mark.case("JWT-10")
def test_a_token_for_the_issuer_is_for_nobody_else() -> None:
    """The issuer never combines itself with others; a token that does was not made by it as it is."""
    assert read(token(claims={"aud": ISSUER}), audience=ISSUER)
    assert read(token(claims={"aud": [ISSUER]}), audience=ISSUER)
    assert reason(token(claims={"aud": [ISSUER, SIBLING]}), audience=ISSUER) == "aud_mixed"
    assert reason(token(claims={"aud": ISSUER}), audience=SIBLING) == "aud_wrong"


@pytest.mark.rfc("8725", "3.10")
def test_a_signature_by_another_key_under_a_known_name_is_refused() -> None:
    assert reason(compact(HEADER, CLAIMS, OTHER_KEY)) == "signature_wrong"


@pytest.mark.rfc("8725", "3.1")
def test_the_public_key_is_no_shared_secret() -> None:
    """The oldest of the confusions: an HMAC made with what everybody may know."""
    pem = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for alg, expected in (("HS256", "alg_not_allowed"), ("RS256", "signature_wrong")):
        signed = f"{b64(json.dumps({**HEADER, 'alg': alg}).encode())}.{b64(json.dumps(CLAIMS).encode())}"
        forged = f"{signed}.{b64(hmac.digest(pem, signed.encode(), 'sha256'))}"
        assert reason(forged) == expected


@pytest.mark.case("JWT-03")
@pytest.mark.parametrize("algorithm", [hashes.SHA384(), hashes.SHA512()], ids=["RS384", "RS512"])
def test_the_right_key_with_another_digest_is_refused(algorithm: hashes.HashAlgorithm) -> None:
    """A key works with one algorithm, also when the header claims that one."""
    signed = f"{b64(json.dumps(HEADER).encode())}.{b64(json.dumps(CLAIMS).encode())}"
    signature = KEY.sign(signed.encode(), padding.PKCS1v15(), algorithm)
    assert reason(f"{signed}.{b64(signature)}") == "signature_wrong"


@pytest.mark.case("JWT-03")
def test_the_right_key_with_another_padding_is_refused() -> None:
    signed = f"{b64(json.dumps(HEADER).encode())}.{b64(json.dumps(CLAIMS).encode())}"
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256().digest_size)
    assert reason(f"{signed}.{b64(KEY.sign(signed.encode(), pss, hashes.SHA256()))}") == "signature_wrong"


def good() -> tuple[str, str, str]:
    header, payload, signature = token().split(".")
    return header, payload, signature


SHAPES: list[tuple[str, Callable[[], str], str]] = [
    ("empty", lambda: "", "malformed"),
    ("one part", lambda: "abc", "malformed"),
    ("two parts", lambda: ".".join(good()[:2]), "malformed"),
    ("four parts", lambda: ".".join((*good(), "x")), "malformed"),
    ("five parts, as encrypted tokens have", lambda: ".".join((good()[0], "", "AAAA", "AAAA", "AAAA")), "malformed"),
    ("only dots", lambda: "..", "not_json"),
    ("no signature", lambda: ".".join((*good()[:2], "")), "signature_wrong"),
    ("short signature", lambda: ".".join((*good()[:2], good()[2][:-2])), "signature_wrong"),
    ("padding", lambda: ".".join((good()[0] + "=", *good()[1:])), "not_base64url"),
    ("padded signature", lambda: ".".join((*good()[:2], good()[2] + "==")), "not_base64url"),
    ("standard alphabet", lambda: ".".join((good()[0], good()[1], "+/" + good()[2][2:])), "not_base64url"),
    ("line break", lambda: ".".join((good()[0][:8] + "\n" + good()[0][8:], *good()[1:])), "not_base64url"),
    ("blank at the end", lambda: token() + " ", "not_base64url"),
    ("not ASCII", lambda: token() + "é", "malformed"),
    ("too long", lambda: token(claims={"x": "x" * 16384}), "malformed"),
    ("header no object", lambda: compact([HEADER], CLAIMS, KEY), "not_an_object"),
    ("header no JSON", lambda: compact(b"{", CLAIMS, KEY), "not_json"),
    ("header not UTF-8", lambda: compact(b'{"alg":"RS256\xff"}', CLAIMS, KEY), "not_json"),
    ("header too deep", lambda: compact('{"a":' * 3000 + "1" + "}" * 3000, "{}", KEY), "malformed"),
    ("header deep", lambda: compact("[" * 5000, "{}", KEY), "not_json"),
    ("header named twice", lambda: compact('{"alg":"none","alg":"RS256"}', CLAIMS, KEY), "duplicate_member"),
    ("payload a list", lambda: compact(HEADER, [CLAIMS], KEY), "not_an_object"),
    ("payload a string", lambda: compact(HEADER, '"x"', KEY), "not_an_object"),
    ("payload null", lambda: compact(HEADER, "null", KEY), "not_an_object"),
    ("payload empty", lambda: compact(HEADER, "", KEY), "not_json"),
    ("payload not UTF-8", lambda: compact(HEADER, b'{"iss":"\xff"}', KEY), "not_json"),
    ("payload with a mark", lambda: compact(HEADER, b"\xef\xbb\xbf{}", KEY), "not_json"),
    ("payload UTF-16", lambda: compact(HEADER, json.dumps(CLAIMS).encode("utf-16"), KEY), "not_json"),
    ("claim twice", lambda: compact(HEADER, json.dumps(CLAIMS)[:-1] + ', "sub": "y"}', KEY), "duplicate_member"),
    *(
        (
            f"{name} somewhere",
            lambda name=name: compact(HEADER, json.dumps(CLAIMS)[:-1] + f', "x": [{name}]}}', KEY),
            "not_json",
        )
        for name in ("NaN", "Infinity", "-Infinity")
    ),
    ("trailing text", lambda: compact(HEADER, json.dumps(CLAIMS) + "{}", KEY), "not_json"),
]


@pytest.mark.case("JWT-14")
@pytest.mark.parametrize(("make", "expected"), [pytest.param(*row[1:], id=row[0]) for row in SHAPES])
def test_what_is_no_token_is_refused(make: Callable[[], str], expected: str) -> None:
    assert reason(make()) == expected


@pytest.mark.case("JWT-14")
def test_the_last_letters_spare_bits_must_be_zero() -> None:
    """One signature has one spelling: no copy of a token differs from it in a letter that says nothing."""
    header, payload, signature = good()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(signature) % 4 == 2
    twin = signature[:-1] + alphabet[alphabet.index(signature[-1]) ^ 1]
    assert base64.urlsafe_b64decode(twin + "==") == base64.urlsafe_b64decode(signature + "==")
    assert reason(f"{header}.{payload}.{twin}") == "not_base64url"


@pytest.mark.case("JWT-14")
def test_rubbish_is_refused_fast() -> None:
    rubbish = ["x" * 2_000_000, "." * 2_000_000, ".".join(["A" * 5000] * 3), compact("[" * 5000, "{}", KEY)]
    for text in rubbish:
        began = time.process_time()
        reason(text)
        assert time.process_time() - began < 0.05


@pytest.mark.case("JWT-15")
@pytest.mark.parametrize(
    "header",
    [
        {"alg": "PBES2-HS512+A256KW", "enc": "A128CBC-HS256", "p2c": 2**31, "p2s": "AAAA"},
        {"alg": "dir", "enc": "A128GCM", "zip": "DEF"},
        {"alg": "RSA1_5", "enc": "A128GCM", "kid": "k1"},
    ],
)
def test_an_encrypted_token_is_not_decrypted(header: dict[str, Any]) -> None:
    began = time.process_time()
    assert reason(f"{b64(json.dumps(header).encode())}.AAAA.AAAA.AAAA.AAAA") == "malformed"
    assert reason(f"{b64(json.dumps(header).encode())}.AAAA.AAAA") == "alg_not_allowed"
    assert time.process_time() - began < 0.05


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}"))
def test_any_text_is_refused_and_nothing_else_happens(text: str) -> None:
    with pytest.raises(TokenRefused):
        read(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*CLAIMS, "nbf", "sid"]), json_values)
def test_whatever_a_claim_holds_it_is_read_or_refused(name: str, value: object) -> None:
    """A signature proves who made a token, not that it can be trusted to be well-formed."""
    try:
        claims = read(compact(HEADER, {**CLAIMS, name: value}, KEY))
    except TokenRefused:
        return
    assert claims.expires_at > NOW - LEEWAY
    assert isinstance(claims.subject, str)


@given(st.sampled_from([*HEADER, "crit", "cty", "x"]), json_values)
def test_whatever_a_header_holds_it_is_read_or_refused(name: str, value: object) -> None:
    try:
        read(compact({**HEADER, name: value}, CLAIMS, KEY))
    except TokenRefused:
        return
    assert name in ("cty", "x") or value == HEADER[name] or (name == "typ" and "at+jwt" in str(value).lower())


@given(st.integers(min_value=0), st.integers(0, 255))
def test_a_changed_signature_is_refused(place: int, value: int) -> None:
    header, payload, signature = GOOD.split(".")
    raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
    if raw[place % len(raw)] == value:
        return
    raw[place % len(raw)] = value
    assert reason(f"{header}.{payload}.{b64(bytes(raw))}") == "signature_wrong"


GOOD = token()


def test_the_keys_digest_is_no_way_in() -> None:
    """A token that names its key by anything but its id is not looked at."""
    thumbprint = b64(hashlib.sha256(b"x").digest())
    assert reason(token({"kid": OMIT, "x5t#S256": thumbprint})) == "kid_malformed"


# -- headers are remembered -------------------------------------------------------------------------------------------

FORBIDDEN = [{"alg": "none"}, {"alg": "HS256"}, {"jku": "https://evil.example"}, {"typ": "JWT"}, {"kid": 7}]


@pytest.mark.case("JWT-04")
@pytest.mark.parametrize("change", FORBIDDEN, ids=str)
def test_a_header_that_was_refused_stays_refused(change: dict[str, Any]) -> None:
    first = reason(token(change))
    assert read(token())
    assert [reason(token(change)) for _ in range(3)] == [first] * 3


@pytest.mark.rfc("8725", "3.10")
def test_a_header_that_is_known_vouches_for_nothing() -> None:
    """All tokens of a key have the same header; it is read once, and the rest of each token every time."""
    header = {"alg": "RS256", "typ": "at+jwt", "kid": "k1", "x": "of a forger who came first"}
    forged, genuine = compact(header, CLAIMS, OTHER_KEY), compact(header, CLAIMS, KEY)
    assert [reason(forged) for _ in range(2)] == ["signature_wrong"] * 2
    assert read(genuine)
    assert reason(forged) == "signature_wrong"
    assert reason(".".join((*genuine.split(".")[:2], ""))) == "signature_wrong"
    assert reason(compact(header, {**CLAIMS, "exp": 0}, KEY)) == "expired"
    assert reason(compact(header, {**CLAIMS, "aud": "https://billing.example"}, KEY)) == "aud_wrong"
    assert read(genuine)


@pytest.mark.case("JWT-08")
def test_a_header_that_is_known_keeps_no_key_alive() -> None:
    """Which key its name stands for is asked anew for each token."""
    genuine = token()
    assert read(genuine)
    others: dict[str, Any] = {"issuer": ISSUER, "audiences": (SIBLING,), "now": NOW}
    with pytest.raises(TokenRefused, match="kid_unknown"):
        verify(genuine, key_of=lambda kid: None, **others)
    with pytest.raises(TokenRefused, match="signature_wrong"):
        verify(genuine, key_of=lambda kid: OTHER_KEY.public_key(), **others)
    asked: list[str] = []
    for _ in range(3):
        verify(genuine, key_of=lambda kid: asked.append(kid) or KEY.public_key(), **others)
    assert asked == ["k1"] * 3


def test_headers_by_the_thousand_push_nothing_good_out_of_place() -> None:
    genuine = token()
    assert read(genuine)
    _, payload, signature = genuine.split(".")
    for number in range(1000):
        header = b64(json.dumps({**HEADER, "kid": f"stranger-{number}"}).encode())
        assert reason(f"{header}.{payload}.{signature}") == "kid_unknown"
    assert read(genuine)
    assert reason(compact({**HEADER, "kid": "stranger-999"}, CLAIMS, KEY)) == "kid_unknown"


def test_one_audience_is_given_as_a_collection_of_one() -> None:
    """In a text every part of it would be found."""
    with pytest.raises(TypeError, match="collection"):
        verify(token(), key_of=lambda kid: KEY.public_key(), issuer=ISSUER, audiences=SIBLING, now=NOW)


def test_only_a_space_separates_scopes() -> None:
    claims = read(token(claims={"scope": " orders:read\u00a0admin:write  a\tb "}))
    assert claims.scope == {"orders:read\u00a0admin:write", "a\tb"}
