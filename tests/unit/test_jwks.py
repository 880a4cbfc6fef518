"""Which keys of a key set are taken, for how long they may be kept, and where they may come from."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier import TokenVerifier, jwks
from identity_service.verifier.fetching import check_url
from identity_service.verifier.jwks import BadKeySet, JwksSource, lifetimes, read_key_set
from tests.support.issuer import AUDIENCE, key_set, private_key, public_jwk
from tests.support.tokens import OMIT, b64

ISSUER = "https://id.example"
NO_ADDRESS = r"not a plain https URL|Invalid IPv6 URL"
GOOD_URLS = [ISSUER, "http://127.0.0.1:8000", "http://localhost", "http://[::1]:8000", "https://id.example/tenant/a"]
# Each of these is no address that keys may come from, and its name says why.
BAD_URLS = {
    "plain http": "http://id.example",
    "http in capitals": "HTTP://id.example",
    "a name that begins with this machine's": "http://localhost.evil.example",
    "an address that begins with this machine's": "http://127.0.0.1.evil.example",
    "this machine's name before the @": "http://127.0.0.1@evil.example",
    "this machine's other name before the @": "https://localhost:80@evil.example",
    "a user before the @": "https://user@id.example",
    "a private network": "http://10.0.0.1",
    "every interface": "http://0.0.0.0",
    "a query": "https://id.example?a=b",
    "a fragment": "https://id.example#a",
    "no scheme": "id.example",
    "only a scheme's end": "//id.example",
    "no host": "https://",
    "no host but a path": "https:///path",
    "a file": "file:///etc/jwks.json",
    "another protocol": "ftp://id.example",
    "no IPv6 address": "https://[::1",
    "nothing": "",
}


# -- where keys may come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", GOOD_URLS)
def test_keys_come_over_tls_or_from_this_machine(url: str) -> None:
    assert check_url(url, allow_http=False) == url
    assert TokenVerifier(url, AUDIENCE).issuer == url
    assert TokenVerifier(ISSUER, AUDIENCE, jwks_uri=url)


@pytest.mark.case("JWT-04")
@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS.keys())
def test_an_address_that_keys_must_not_come_from_is_refused_before_anything_is_fetched(url: str) -> None:
    with pytest.raises(ValueError, match=NO_ADDRESS):
        check_url(url, allow_http=False)
    with pytest.raises(ValueError, match=NO_ADDRESS):
        TokenVerifier(url, AUDIENCE)
    with pytest.raises(ValueError, match=NO_ADDRESS):
        TokenVerifier(ISSUER, AUDIENCE, jwks_uri=url)


def test_http_from_elsewhere_has_to_be_asked_for() -> None:
    """And asking for it allows nothing besides."""
    assert TokenVerifier("http://id.internal", AUDIENCE, allow_http=True)
    assert TokenVerifier(ISSUER, AUDIENCE, jwks_uri="http://id.internal/jwks", allow_http=True)
    for url in ("ftp://id.internal", "http://user@id.internal", "http://id.internal?a=b", "http://id.internal#a"):
        with pytest.raises(ValueError, match="not a plain https URL"):
            TokenVerifier(url, AUDIENCE, allow_http=True)


# -- what a verifier may be told --------------------------------------------------------------------------------------


@pytest.mark.case("JWT-10")
@pytest.mark.parametrize(
    ("issuer", "audience"),
    [(ISSUER, ISSUER), (ISSUER, f"{ISSUER}/"), (f"{ISSUER}/", ISSUER), (ISSUER, "")],
    ids=["the same", "a slash more", "a slash less", "empty"],
)
def test_the_issuer_is_no_audience_of_a_sibling(issuer: str, audience: str) -> None:
    """Whoever took the issuer's own tokens could be handed one by anybody, and act at the issuer with it."""
    with pytest.raises(ValueError, match=r"never the issuer: a token for the issuer's own API .* as its bearer"):
        TokenVerifier(issuer, audience)


@pytest.mark.parametrize(
    "options",
    [
        *({"leeway": seconds} for seconds in (-1, 300.5, 10**9, float("nan"))),
        {"max_stale": -1},
        *({"timeout": seconds} for seconds in (0, -1)),
    ],
    ids=str,
)
def test_spans_that_cannot_be_meant_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"leeway: 0 to 300 seconds; max_stale: not negative; timeout: positive"):
        TokenVerifier(ISSUER, AUDIENCE, **options)


def test_the_bounds_themselves_are_allowed() -> None:
    assert TokenVerifier(ISSUER, AUDIENCE, leeway=0, max_stale=0, timeout=0.001)
    assert TokenVerifier(ISSUER, AUDIENCE, leeway=300)


def test_a_key_file_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"keys\.json"):
        TokenVerifier(ISSUER, AUDIENCE, jwks_file=tmp_path / "keys.json")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "malformed: not_json"),
        (b"[]", "malformed: not_an_object"),
        (key_set(), "holds no RS256 key"),
        (key_set(public_jwk("k1", d="AQAB")), "no public key"),
    ],
    ids=["empty", "a list", "no keys", "a private key"],
)
def test_a_key_file_of_no_use_is_told_at_once(tmp_path: Path, content: bytes, why: str) -> None:
    """With the file's name, and what is wrong with it."""
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"keys\.json: the key set .*{why}"):
        TokenVerifier(ISSUER, AUDIENCE, jwks_file=str(path))


# -- reading a key set ------------------------------------------------------------------------------------------------


@pytest.mark.rfc("7517", "5")
def test_a_key_set_is_read() -> None:
    keys = read_key_set(key_set("k1", "k2"))
    assert {kid: key.public_numbers() for kid, key in keys.items()} == {
        kid: private_key(kid).public_key().public_numbers() for kid in ("k1", "k2")
    }
    assert all(isinstance(key, rsa.RSAPublicKey) for key in keys.values())


@pytest.mark.rfc("7517", "5")
def test_members_that_nobody_knows_and_white_space_are_passed_over() -> None:
    document = json.dumps({"keys": [public_jwk("k1", x="y", x5t="AA")], "x": [1]}).encode()
    assert read_key_set(b"\r\n\t " + document + b"\n").keys() == {"k1"}


@pytest.mark.rfc("7517", "4")
@pytest.mark.parametrize(
    "members",
    [{"alg": OMIT}, {"use": OMIT}, {"key_ops": ["verify"]}, {"key_ops": ["verify", "x"]}, {"kid": "k" * 128}],
    ids=["no alg", "no use", "verify", "verify and more", "a long kid"],
)
def test_a_key_need_not_say_everything(members: dict[str, Any]) -> None:
    assert len(read_key_set(key_set(public_jwk("k1", **members)))) == 1


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


MODULUS = public_jwk("k1")["n"]
NOT_OURS: dict[str, dict[str, Any]] = {
    "a shared secret": {"kty": "oct", "kid": "k", "alg": "HS256"},
    "an elliptic curve": {"kty": "EC", "kid": "k", "crv": "P-256", "x": "AA", "y": "AA", "alg": "ES256"},
    "an Edwards curve": {"kty": "OKP", "kid": "k", "crv": "Ed25519", "x": "AA"},
    "a type of the future": {"kty": "XYZ", "kid": "k"},
    "a type that is no text": public_jwk("k1", kid="k", kty=["RSA"]),
    "no type": public_jwk("k1", kid="k", kty=OMIT),
    "for encryption": public_jwk("k1", kid="k", use="enc"),
    "a use that is no text": public_jwk("k1", kid="k", use=None),
    **{f"for {alg}": public_jwk("k1", kid="k", alg=alg) for alg in ("RS512", "PS256", "RSA-OAEP-256", "none", "rs256")},
    "an alg that is no text": public_jwk("k1", kid="k", alg=None),
    "only for encrypting": public_jwk("k1", kid="k", key_ops=["encrypt"]),
    "for no operation": public_jwk("k1", kid="k", key_ops=[]),
    "an operation that is a text": public_jwk("k1", kid="k", key_ops="verify"),
    "no kid": public_jwk("k1", kid=OMIT),
    "an empty kid": public_jwk("k1", kid=""),
    "a kid that is no text": public_jwk("k1", kid=7),
    "a kid that is too long": public_jwk("k1", kid="k" * 129),
    "no modulus": public_jwk("k1", kid="k", n=OMIT),
    "a modulus that is no text": public_jwk("k1", kid="k", n=7),
    "an empty modulus": public_jwk("k1", kid="k", n=""),
    "a modulus of other letters": public_jwk("k1", kid="k", n="é" * 342),
    "a modulus with a letter too many": public_jwk("k1", kid="k", n="!" + MODULUS),
    "a modulus with a letter of the other alphabet": public_jwk("k1", kid="k", n=MODULUS[:9] + "+" + MODULUS[10:]),
    "a modulus with padding": public_jwk("k1", kid="k", n=MODULUS + "=="),
    "a modulus with a line break": public_jwk("k1", kid="k", n=MODULUS + "\n"),
    "1024 bits": public_jwk("k1", kid="k", n=number(2**1024 - 105)),
    "1024 bits, with zeros before them": public_jwk("k1", kid="k", n=b64(bytes(128) + (2**1024 - 105).to_bytes(128))),
    "2047 bits": public_jwk("k1", kid="k", n=number(2**2047 - 9)),
    "16384 bits": public_jwk("k1", kid="k", n=number(2**16384 - 9)),
    "no exponent": public_jwk("k1", kid="k", e=OMIT),
    "an exponent that is no text": public_jwk("k1", kid="k", e=65537),
    "an empty exponent": public_jwk("k1", kid="k", e=""),
    "the exponent 1": public_jwk("k1", kid="k", e=number(1)),
    "the exponent 3": public_jwk("k1", kid="k", e=number(3)),
    "an even exponent": public_jwk("k1", kid="k", e=number(65538)),
    "an exponent that takes long": public_jwk("k1", kid="k", e=number(2**64 + 1)),
}


@pytest.mark.rfc("7517", "5")
@pytest.mark.parametrize("jwk", NOT_OURS.values(), ids=NOT_OURS.keys())
@pytest.mark.filterwarnings("ignore:Key size should be")  # the library warns, and goes on
def test_a_key_that_is_not_ours_is_passed_over(jwk: dict[str, Any]) -> None:
    """An issuer may publish what is meant for others, and what comes later; its good keys are taken all the same."""
    assert read_key_set(key_set(jwk, "k2")).keys() == {"k2"}
    with pytest.raises(BadKeySet, match="holds no RS256 key"):
        read_key_set(key_set(jwk))


@pytest.mark.parametrize("member", ["d", "p", "q", "dp", "dq", "qi", "oth", "k"])
@pytest.mark.parametrize("kind", ["RSA", "oct"])
def test_a_set_that_gives_a_secret_away_is_refused(kind: str, member: str) -> None:
    """Whoever publishes one has lost control of the others too."""
    with pytest.raises(BadKeySet, match="no public key"):
        read_key_set(key_set("k2", public_jwk("k1", kty=kind, **{member: "AQAB"})))


USELESS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "malformed: not_json"),
    "no JSON": (b"<html></html>", "malformed: not_json"),
    "half of it": (key_set("k1")[:-2], "malformed: not_json"),
    "more than it": (key_set("k1") + b"{}", "malformed: not_json"),
    "not UTF-8": (b'{"keys": [], "x": "\xff"}', "malformed: not_json"),
    "with a byte order mark": (b"\xef\xbb\xbf" + key_set("k1"), "malformed: not_json"),
    "in UTF-16": (key_set("k1").decode().encode("utf-16"), "malformed: not_json"),
    "NaN somewhere": (key_set("k1")[:-1] + b', "x": NaN}', "malformed: not_json"),
    "very deep": (b'{"keys":' * 100_000, "malformed: not_json"),
    "a list": (json.dumps([public_jwk("k1")]).encode(), "malformed: not_an_object"),
    "two lists of keys": (key_set("k1")[:-1] + b', "keys": []}', "malformed: duplicate_member"),
    "a key with two moduli": (key_set("k1").replace(b'"e":', b'"n": "AQAB", "e":'), "malformed: duplicate_member"),
    "no list of keys": (b"{}", "no list of keys"),
    "an object of keys": (b'{"keys": {}}', "no list of keys"),
    "no keys": (key_set(), "holds no RS256 key"),
    "a key that is a text": (b'{"keys": ["k1"]}', "no public key"),
    "one kid twice": (key_set("k1", public_jwk("k2", kid="k1")), "two keys of one kid"),
    "one key twice": (key_set("k1", "k1"), "two keys of one kid"),
    "101 keys": (key_set(*(public_jwk("k1", kid=f"k{number}") for number in range(101))), "too long a one"),
}


@pytest.mark.rfc("7517", "5")
@pytest.mark.parametrize(("document", "why"), USELESS.values(), ids=USELESS.keys())
def test_a_set_that_is_malformed_or_ambiguous_or_of_no_use_is_refused(document: bytes, why: str) -> None:
    with pytest.raises(BadKeySet, match=f"the key set .*{why}"):
        read_key_set(document)


def test_a_hundred_keys_are_not_too_many() -> None:
    assert len(read_key_set(key_set(*(public_jwk("k1", kid=f"k{number}") for number in range(100))))) == 100


def test_a_kid_may_be_taken_again_by_a_key_that_is_not_ours() -> None:
    """A kid names a key among those of its kind."""
    assert read_key_set(key_set("k1", public_jwk("k2", kid="k1", use="enc"))).keys() == {"k1"}


# -- for how long -----------------------------------------------------------------------------------------------------

# Cache-Control, Age, and for how long the set is then fresh and usable.
LIFETIMES: list[tuple[str | None, str | None, float, float]] = [
    ("public, max-age=300, stale-while-revalidate=600, stale-if-error=3600", None, 300, 900),  # what our issuer says
    (None, None, 300, 300),
    ("", None, 300, 300),
    ("public", None, 300, 300),
    ("max-age=120", None, 120, 120),
    ("MAX-AGE=120, Stale-While-Revalidate=60", None, 120, 180),
    ("max-age = 120", None, 120, 120),
    ('max-age="120"', None, 120, 120),
    ("stale-while-revalidate=60", None, 300, 360),
    ("s-maxage=600, max-age=120", None, 120, 120),
    # Bounded from above: an issuer plans its rotations with it.
    ("max-age=900", None, 900, 900),
    ("max-age=901", None, 900, 900),
    ("max-age=31536000, immutable", None, 900, 900),
    ("max-age=99999999999999999999999", None, 900, 900),
    ("max-age=300, stale-while-revalidate=99999999999", None, 300, 900),
    # Bounded from below: no header makes us ask for every token.
    ("max-age=0", None, 30, 30),
    ("max-age=29", None, 30, 30),
    ("max-age=31", None, 31, 31),
    ("max-age=0, stale-while-revalidate=600", None, 30, 600),
    ("no-store", None, 30, 30),
    ("no-cache", None, 30, 30),
    ("No-Store, max-age=300, stale-while-revalidate=600", None, 30, 30),
    ("max-age=300, no-cache", None, 30, 30),
    # What is no number of seconds says nothing.
    ("max-age=-5", None, 300, 300),
    ("max-age=abc", None, 300, 300),
    ("max-age=", None, 300, 300),
    ("max-age", None, 300, 300),
    # A cache on the way has held it already.
    ("max-age=300", "100", 200, 200),
    ("max-age=300, stale-while-revalidate=600", "100", 200, 800),
    ("max-age=300", "300", 30, 30),
    ("max-age=300, stale-while-revalidate=600", "500", 30, 400),
    ("max-age=300", "1000000", 30, 30),
    ("max-age=86400", "100", 800, 800),
    ("max-age=300", "-100", 300, 300),
    ("max-age=300", "100.5", 300, 300),
    ("max-age=300", "soon", 300, 300),
    ("max-age=300", "", 300, 300),
    ("max-age=300", "9" * 400, 300, 300),
    ("max-age=300", "²", 300, 300),
    ("max-age=300", "100, 200", 300, 300),
]


@pytest.mark.rfc("9111", "4.2")
@pytest.mark.rfc("5861", "3")
@pytest.mark.parametrize(("control", "age", "fresh", "usable"), LIFETIMES)
def test_headers_say_for_how_long_within_bounds(
    control: str | None, age: str | None, fresh: float, usable: float
) -> None:
    told = {"cache-control": control, "age": age}
    headers = httpx2.Headers({name: value for name, value in told.items() if value is not None}, encoding="utf-8")
    assert lifetimes(headers) == (fresh, usable)


def test_every_span_is_a_span() -> None:
    """Whatever is told: at least 30 seconds, at most 900, and usable for as long as fresh, or longer."""
    told = [(control or "", age or "") for control, age, _, _ in LIFETIMES]
    odd = ["max-age=60, max-age=600", "max-age=1e9", "max-age=٩٩٩٩٩", "max-age=" + "0" * 500, 'max-age="', "=,=;" * 500]
    for control, age in [*told, *((control, "100") for control in odd)]:
        fresh, usable = lifetimes({"cache-control": control, "age": age})
        assert 30 <= fresh <= usable <= 900, control


# -- the source -------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8414", "3.1")
@pytest.mark.parametrize(
    ("issuer", "expected"),
    [
        ("https://id.example", "https://id.example/.well-known/oauth-authorization-server"),
        ("https://id.example/", "https://id.example/.well-known/oauth-authorization-server"),
        ("https://id.example:8443/a/b", "https://id.example:8443/.well-known/oauth-authorization-server/a/b"),
        ("https://id.example/a/", "https://id.example/.well-known/oauth-authorization-server/a"),
        ("http://[::1]:8000/a", "http://[::1]:8000/.well-known/oauth-authorization-server/a"),
    ],
)
def test_the_well_known_part_stands_between_host_and_path(issuer: str, expected: str) -> None:
    assert JwksSource(issuer, None, allow_http=False, timeout=1)._metadata_url == expected


@pytest.mark.rfc("9111", "4.2.1")
@pytest.mark.parametrize("control", ["max-age=60, max-age=600", "max-age=60, max-age=abc, max-age=600"])
def test_of_two_spans_the_first_counts(control: str) -> None:
    assert lifetimes({"cache-control": control})[0] in (30, 60)


@pytest.mark.parametrize("options", [{"max_stale": float("nan")}, {"timeout": float("nan")}], ids=str)
def test_what_is_no_number_is_no_span(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        TokenVerifier("https://id.example", AUDIENCE, **options)


# -- finding it -------------------------------------------------------------------------------------------------------


class Web:
    """Answers for an issuer that is elsewhere: its metadata, and the same keys at every other address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, jwks_uri: str) -> None:
        self.jwks_uri = jwks_uri
        self.asked: list[str] = []
        monkeypatch.setattr(jwks, "_get", self._get)

    async def _get(self, url: str, _headers: object) -> tuple[dict[str, str], bytes]:
        self.asked.append(url)
        if "/.well-known/oauth" in url:
            return {}, json.dumps({"issuer": ISSUER, "jwks_uri": self.jwks_uri}).encode()
        return {}, key_set("k1")


@pytest.mark.rfc("8414", "3.2")
@pytest.mark.parametrize("uri", ["http://127.0.0.1:2375/keys", "http://localhost/keys", "http://[::1]/keys"])
def test_an_issuer_elsewhere_cannot_send_anybody_to_their_own_machine(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """What listens there was never meant for it."""
    web = Web(monkeypatch, uri)
    with pytest.raises(BadKeySet, match="no jwks_uri that can be trusted"):
        JwksSource(ISSUER, None, allow_http=False, timeout=5).fetch(past_caches=False)
    assert uri not in web.asked


def test_keys_that_have_moved_are_looked_for_within_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the old place still answers: the issuer may have left it for a reason."""
    web, now = Web(monkeypatch, "https://old.example/keys"), 1000.0
    monkeypatch.setattr(jwks.time, "monotonic", lambda: now)
    source = JwksSource(ISSUER, None, allow_http=False, timeout=5)
    source.fetch(past_caches=False)
    web.jwks_uri = "https://new.example/keys"
    now += 86400
    source.fetch(past_caches=False)
    assert web.asked[-1] == "https://old.example/keys"
    now += 1
    source.fetch(past_caches=False)
    assert web.asked[-1] == "https://new.example/keys"
