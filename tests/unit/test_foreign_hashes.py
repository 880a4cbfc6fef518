"""
Hashes of other systems: each format that we know, made by code that is not ours; its limits; and damage.

The vectors are published: in Django's own tests, in RFC 7914, in the documentation of the library, in hashcat's list
of examples. All else here is computed with the primitives themselves.
"""

import hashlib
import hmac
import threading
import unicodedata
from collections.abc import AsyncIterator
from typing import Any

import bcrypt
import pytest
import structlog
from argon2.low_level import Type, hash_secret
from structlog.testing import LogCapture

from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import NFKC_FORM, RAW_FORM, PasswordHasher, UnusableHash, read_hash
from tests.support.foreign_hashes import MADE, SALT, TEXT_SALT

PASSWORD = "correct horse battery staple"

PUBLISHED = {
    "bcrypt": ("hashcat", "$2a$05$LhayLxezLhK1LhWvKxCyLOj0j1u.Kj0jZ0pEmm134uzrQlFvQJLF6"),
    "bcrypt 12": ("password", "$2b$12$GhvMmNVjRW29ulnudl.LbuAnUtN/LRfe1JsBm1Xu6LE3059z5Tr8m"),
    "bcrypt-sha256": (
        "password",
        "$bcrypt-sha256$v=2,t=2b,r=12$n79VH.0Q2TMWmt3Oqt9uku$Kq4Noyk3094Y2QlB8NdRT8SvGiI4ft2",
    ),
    "django argon2i, old version": (
        "secret",
        "argon2$argon2i$m=8,t=1,p=1$c29tZXNhbHQ$"
        "gwQOXSNhxiOxPOA0+PY10P9QFO4NAYysnqRt1GSQLE55m+2GYDt9FEjPMHhP2Cuf0nOEXXMocVrsJAtNSsKyfg",
    ),
    "django argon2i": ("secret", "argon2$argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$YC9+jJCrQhs5R6db7LlN8Q"),
    "django argon2id": (
        "secret",
        "argon2$argon2id$v=19$m=102400,t=2,p=8$Y041dExhNkljRUUy$TMa6A8fPJhCAUXRhJXCXdw",
    ),
    "django pbkdf2": (
        "lètmein",
        "pbkdf2_sha256$390000$seasalt$8xBlGd3jVgvJ+92hWPxi5ww0uuAuAnKgC45eudxro7c=",
    ),
    "django pbkdf2 sha1": ("lètmein", "pbkdf2_sha1$390000$seasalt2$aDapRanzW8aHTz97v2TcfHzWD+I="),
    "django scrypt": (
        "lètmein",
        "scrypt$16384$seasalt$8$1$"
        "Qj3+9PPyRjSJIebHnG81TMjsqtaIGxNQG/aEB/NYafTJ7tibgfYz71m0ldQESkXFRkdVCBhhY8mx7rQwite/Pw==",
    ),
    "scrypt": ("password", "$scrypt$ln=8,r=8,p=1$WKs1xljLudd6z9kbY0wpJQ$yCR4iDZYDKv+iEJj6yHY0lv/epnfB6f/w1EbXrsJOuQ"),
    "scrypt of RFC 7914, as werkzeug writes it": (
        "pleaseletmein",
        "scrypt:16384:8:1$SodiumChloride$7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887",
    ),
    "phpass": ("hashcat", "$P$984478476IagS59wHZvyQMArzfx58u."),
    "phpass of phpBB": ("hashcat", "$H$984478476IagS59wHZvyQMArzfx58u."),
    "WordPress 6.8": ("admin", "$wp$2y$10$Q1xinFjrZeLWJBvxviIL6u834Fu.evIEFHAUVisQ5O.w9Dm0sMdES"),
    "LDAP": ("hashcat", "{SSHA}AZKja92fbuuB9SpRlHqaoXxbTc43Mzc2MDM1Ng=="),
}


@pytest.fixture
async def hasher() -> AsyncIterator[PasswordHasher]:
    made = PasswordHasher(memory_kib=32, time_cost=2, threads=1, queue=2, wait=30.0)
    yield made
    made.close()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hasher logs."""
    capture = LogCapture()
    log = structlog.wrap_logger(None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(0))
    monkeypatch.setattr("identity_service.infra.runtime.hashing.hasher.log", log)
    return capture.entries


async def right(hasher: PasswordHasher, text: str, stored: str, form: int = RAW_FORM) -> bool:
    return (await hasher.verify(Secret(text), stored, form=form)).right


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
async def test_published_hashes_verify(hasher: PasswordHasher, name: str) -> None:
    """And nothing like the password does."""
    password, stored = PUBLISHED[name]
    assert await right(hasher, password, stored)
    for wrong in (password + "x", password.upper(), password[:-1], stored):
        assert not await right(hasher, wrong, stored)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "password", [PASSWORD, "Pässwörter für 🙂 sind länger", "x", "a $ign: ünd % a {brace}"], ids=range(4)
)
async def test_made_hashes_verify_once_and_are_ours_afterwards(
    hasher: PasswordHasher, name: str, password: str
) -> None:
    """The first right sign-in replaces them by Argon2id; a wrong one changes nothing."""
    stored = MADE[name](password)
    wrong = await hasher.verify(Secret(password + "x"), stored, form=RAW_FORM)
    assert (wrong.right, wrong.renewed) == (False, None)
    found = await hasher.verify(Secret(password), stored, form=RAW_FORM)
    assert found.right
    assert found.renewed is not None
    assert found.renewed.startswith("$argon2id$v=19$m=32,t=2,p=1$")
    assert await right(hasher, password, found.renewed, NFKC_FORM)
    assert not await right(hasher, password + "x", found.renewed, NFKC_FORM)


@pytest.mark.case("ACC-12")
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("theirs", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
async def test_an_imported_password_is_tried_as_it_was_typed(
    hasher: PasswordHasher, name: str, theirs: str, other: str
) -> None:
    """The other system did not normalise: one spelling is right until the hash is ours, then both are."""
    password = "Ångström und Ümläut"
    typed, retyped = unicodedata.normalize(theirs, password), unicodedata.normalize(other, password)
    stored = MADE[name](typed)
    assert not await right(hasher, retyped, stored)
    found = await hasher.verify(Secret(typed), stored, form=RAW_FORM)
    assert found.renewed is not None
    assert await right(hasher, typed, found.renewed, NFKC_FORM)
    assert await right(hasher, retyped, found.renewed, NFKC_FORM)


@pytest.mark.case("ACC-14")
@pytest.mark.parametrize("letter", ["x", "🙂"])
@pytest.mark.parametrize("name", MADE)
async def test_only_bcrypt_itself_looks_at_72_bytes(hasher: PasswordHasher, name: str, letter: str) -> None:
    """Two passwords equal so far are one under an imported bcrypt, until it is renewed; under all else they are two."""
    start = letter * (72 // len(letter.encode()))
    stored = MADE[name](start + "one")
    found = await hasher.verify(Secret(start + "one"), stored, form=RAW_FORM)
    assert found.renewed is not None
    assert await right(hasher, start + "two", stored) == (
        name.startswith(("bcrypt", "django bcrypt")) and "_" not in name
    )
    assert not await right(hasher, start + "two", found.renewed, NFKC_FORM)


@pytest.mark.case("ACC-15")
@pytest.mark.parametrize("name", MADE)
async def test_nul_surrogates_and_endless_passwords_match_nothing(hasher: PasswordHasher, name: str) -> None:
    """Not even a hash that was made of just that."""
    for text in ("abc\0x", "\0", "x" * 1025):
        stored = MADE[name](text.replace("\0", "") or "x" if "bcrypt" in name else text)
        assert not await right(hasher, text, stored)
    assert not await right(hasher, "half \ud83d", MADE[name]("half "))


async def test_white_space_around_a_wordpress_password_does_not_count(hasher: PasswordHasher) -> None:
    """WordPress takes it away before it hashes; elsewhere it counts."""
    assert await right(hasher, " \tsecret \n", MADE["WordPress 6.8"]("secret"))
    assert not await right(hasher, "sec ret", MADE["WordPress 6.8"]("secret"))
    for name, make in MADE.items():
        assert await right(hasher, " secret", make("secret")) == (name == "WordPress 6.8")


async def test_spare_bits_in_a_bcrypt_hash_are_nothing(hasher: PasswordHasher) -> None:
    """Some systems set bits that the letters have to spare; the library warns, and warnings are errors here."""
    stored = MADE["bcrypt 2a"](PASSWORD)
    letters = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    salt = letters[letters.index(stored[28]) | 5]
    digest = letters[letters.index(stored[-1]) | 3]
    untidy = stored[:28] + salt + stored[29:-1] + digest
    assert untidy != stored
    assert await right(hasher, PASSWORD, untidy)
    assert not await right(hasher, PASSWORD + "x", untidy)


@pytest.mark.parametrize("name", MADE)
async def test_the_work_is_done_in_the_pool(hasher: PasswordHasher, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the thread that answers everybody else."""
    places: set[str] = set()

    def watch(owner: Any, attribute: str) -> None:
        computed = getattr(owner, attribute)

        def watched(*given: Any, **named: Any) -> Any:
            places.add(threading.current_thread().name.partition("_")[0])
            return computed(*given, **named)

        monkeypatch.setattr(owner, attribute, watched)

    watch(hashlib, "scrypt")
    watch(hashlib, "pbkdf2_hmac")
    watch(hasher._context, "verify")
    stored = MADE[name](PASSWORD)
    places.clear()
    assert await right(hasher, PASSWORD, stored)
    assert places == {"password"}


@pytest.mark.parametrize("kind", [Type.I, Type.D])
async def test_a_costlier_hash_of_a_lesser_argon2_is_renewed(hasher: PasswordHasher, kind: Type) -> None:
    """Only Argon2id in its current version is measured against ours."""
    made = hash_secret(
        PASSWORD.encode(), SALT, time_cost=3, memory_cost=64, parallelism=1, hash_len=32, type=kind, version=19
    ).decode()
    assert (await hasher.verify(Secret(PASSWORD), made, form=RAW_FORM)).renewed is not None
    old = hash_secret(
        PASSWORD.encode(), SALT, time_cost=3, memory_cost=64, parallelism=1, hash_len=32, type=Type.ID, version=16
    ).decode()
    assert (await hasher.verify(Secret(PASSWORD), old, form=RAW_FORM)).renewed is not None


# -- limits -----------------------------------------------------------------------------------------------------------

SALT_64, DIGEST_64 = "c2FsdHNhbHQ", "A" * 43  # 8 and 32 bytes
ARGON2 = "$argon2id$v=19$m={m},t={t},p={p}$" + f"{SALT_64}${DIGEST_64}"
BCRYPT_TAIL = "." * 53
HEX = "00" * 64

AT_THE_LIMIT = {
    "argon2 memory": (ARGON2.format(m=262144, t=1, p=1), ARGON2.format(m=262145, t=1, p=1), "256 MiB"),
    "argon2 passes": (ARGON2.format(m=64, t=10, p=1), ARGON2.format(m=64, t=11, p=1), "10 passes"),
    "argon2 lanes": (ARGON2.format(m=1024, t=1, p=16), ARGON2.format(m=1024, t=1, p=17), "16 lanes"),
    "django argon2": (
        "argon2" + ARGON2.format(m=262144, t=1, p=1),
        "argon2" + ARGON2.format(m=262145, t=1, p=1),
        "256 MiB",
    ),
    "bcrypt": (f"$2b$14${BCRYPT_TAIL}", f"$2b$15${BCRYPT_TAIL}", "2^14"),
    "django bcrypt": (f"bcrypt$$2b$14${BCRYPT_TAIL}", f"bcrypt$$2b$15${BCRYPT_TAIL}", "2^14"),
    "django bcrypt_sha256": (f"bcrypt_sha256$$2b$14${BCRYPT_TAIL}", f"bcrypt_sha256$$2b$15${BCRYPT_TAIL}", "2^14"),
    "bcrypt-sha256": (
        f"$bcrypt-sha256$v=2,t=2b,r=14${'.' * 22}${'.' * 31}",
        f"$bcrypt-sha256$v=2,t=2b,r=15${'.' * 22}${'.' * 31}",
        "2^14",
    ),
    "WordPress": (f"$wp$2y$14${BCRYPT_TAIL}", f"$wp$2y$15${BCRYPT_TAIL}", "2^14"),
    "scrypt memory": (
        f"$scrypt$ln=18,r=8,p=1${SALT_64}${DIGEST_64}",
        f"$scrypt$ln=19,r=8,p=1${SALT_64}${DIGEST_64}",
        "256 MiB",
    ),
    "scrypt memory by its blocks": (
        f"$scrypt$ln=18,r=8,p=1${SALT_64}${DIGEST_64}",
        f"$scrypt$ln=18,r=9,p=1${SALT_64}${DIGEST_64}",
        "256 MiB",
    ),
    "scrypt lanes": (
        f"$scrypt$ln=14,r=8,p=16${SALT_64}${DIGEST_64}",
        f"$scrypt$ln=14,r=8,p=17${SALT_64}${DIGEST_64}",
        "16 lanes",
    ),
    "scrypt work": (
        f"$scrypt$ln=18,r=8,p=4${SALT_64}${DIGEST_64}",
        f"$scrypt$ln=18,r=8,p=5${SALT_64}${DIGEST_64}",
        "1 GiB",
    ),
    "scrypt blocks": (
        f"$scrypt$ln=1,r=64,p=16${SALT_64}${DIGEST_64}",
        f"$scrypt$ln=1,r=65,p=16${SALT_64}${DIGEST_64}",
        "blocks",
    ),
    "django scrypt": (
        f"scrypt$262144$salt$8$1${DIGEST_64}=",
        f"scrypt$524288$salt$8$1${DIGEST_64}=",
        "256 MiB",
    ),
    "werkzeug scrypt": (f"scrypt:262144:8:1$salt${HEX}", f"scrypt:524288:8:1$salt${HEX}", "256 MiB"),
    "pbkdf2": (
        f"$pbkdf2-sha256$5000000${SALT_64}${DIGEST_64}",
        f"$pbkdf2-sha256$5000001${SALT_64}${DIGEST_64}",
        "5,000,000",
    ),
    "PHC pbkdf2": (
        f"$pbkdf2-sha256$i=5000000,l=32${SALT_64}${DIGEST_64}",
        f"$pbkdf2-sha256$i=5000001,l=32${SALT_64}${DIGEST_64}",
        "5,000,000",
    ),
    "django pbkdf2": (
        f"pbkdf2_sha256$5000000$salt${DIGEST_64}=",
        f"pbkdf2_sha256$5000001$salt${DIGEST_64}=",
        "5,000,000",
    ),
    "werkzeug pbkdf2": (f"pbkdf2:sha512:5000000$salt${HEX}", f"pbkdf2:sha512:5000001$salt${HEX}", "5,000,000"),
    "phpass": ("$P$E" + "." * 30, "$P$F" + "." * 30, "2^16"),
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
async def test_what_costs_more_than_a_sign_in_may_is_refused(
    hasher: PasswordHasher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is imported, and at a sign-in too, before anything is computed. The dearest that may be is read."""
    within, beyond, word = AT_THE_LIMIT[name]
    read_hash(within)
    with pytest.raises(UnusableHash, match=word.replace("^", r"\^")) as refusal:
        read_hash(beyond)
    assert SALT_64 not in str(refusal.value)
    asked: list[str] = []
    monkeypatch.setattr(hasher._context, "verify", lambda _text, stored: asked.append(stored))
    monkeypatch.setattr(hashlib, "scrypt", None)
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", None)
    assert not await right(hasher, PASSWORD, beyond)
    assert asked == [hasher._decoy]


@pytest.mark.parametrize("iterations", [600_000, 870_000, 1_000_000, 1_200_000, 1_500_000])
def test_the_defaults_of_django_pass_and_have_room_to_grow(iterations: int) -> None:
    """They go up with each of its versions."""
    assert not read_hash(f"pbkdf2_sha256${iterations}${TEXT_SALT}${DIGEST_64}=").weak


@pytest.mark.parametrize("name", MADE)
def test_reading_a_hash_computes_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of a million lines takes no longer because of what they say."""
    stored = MADE[name](PASSWORD)
    for owner, attribute in [(hashlib, "scrypt"), (hashlib, "pbkdf2_hmac"), (hmac, "digest"), (bcrypt, "hashpw")]:
        monkeypatch.setattr(owner, attribute, None)
    assert read_hash(stored).weak


WEAK_AND_NOT = {
    "argon2": (ARGON2.format(m=7168, t=4, p=1), ARGON2.format(m=7168, t=5, p=1)),
    "bcrypt": (f"$2b$09${BCRYPT_TAIL}", f"$2b$10${BCRYPT_TAIL}"),
    "scrypt": (f"$scrypt$ln=13,r=8,p=1${SALT_64}${DIGEST_64}", f"$scrypt$ln=14,r=8,p=1${SALT_64}${DIGEST_64}"),
    "scrypt by its salt": (f"scrypt:32768:8:1$7letter${HEX}", f"scrypt:32768:8:1$8letters${HEX}"),
    "pbkdf2": (f"$pbkdf2-sha256$99999${SALT_64}${DIGEST_64}", f"$pbkdf2-sha256$100000${SALT_64}${DIGEST_64}"),
    "pbkdf2 by its salt": (f"pbkdf2_sha256$600000$7letter${DIGEST_64}=", f"pbkdf2_sha256$600000$8letters${DIGEST_64}="),
}


@pytest.mark.parametrize("name", WEAK_AND_NOT)
def test_what_is_found_out_fast_is_called_weak(name: str) -> None:
    """It is imported nevertheless: a person who never signed in again would be locked out."""
    weak, fair = WEAK_AND_NOT[name]
    assert read_hash(weak).weak
    assert not read_hash(fair).weak


def test_md5_and_one_round_of_sha1_are_always_weak() -> None:
    """However often it is repeated."""
    assert read_hash("$P$E" + "." * 30).weak
    assert read_hash(MADE["LDAP"](PASSWORD)).weak


def test_a_hash_tells_its_algorithm() -> None:
    """For the counts of an import."""
    told = {name: read_hash(make(PASSWORD)).scheme for name, make in MADE.items()}
    assert told["argon2d"] == "argon2d"
    assert told["django argon2"] == "argon2id"
    assert told["django bcrypt"] == told["bcrypt 2y"] == "bcrypt"
    assert told["django bcrypt_sha256"] == "bcrypt_sha256"
    assert told["WordPress 6.8"] == "wordpress"
    assert told["scrypt 64"] == told["werkzeug scrypt"] == "scrypt"
    assert told["pbkdf2"] == told["django pbkdf2 sha1"] == "pbkdf2_sha1"
    assert told["PHC pbkdf2 sha512"] == "pbkdf2_sha512"
    assert told["LDAP"] == "ldap_salted_sha1"


# -- damage -----------------------------------------------------------------------------------------------------------

DAMAGED = [
    *("", " ", "x", "$", "plain", "!", "!unusable", "*", "x" * 10_000, "\ud800", "ü", "$2b$", "$argon2id$"),
    # Formats of other systems that we do not check.
    *("sha1$salt$hash", "$6$rounds=5000$salt$hash", "$7$C6..../....SodiumChloride$x", "{MD5}X03MO1qnZdYdgyfeuILPmw=="),
    *("5f4dcc3b5aa765d61d8327deb882cf99", "$2x$05$" + "." * 53, "$2$05$" + "." * 53, "$S$C33783772bRXEx1aCsvY"),
    # Parts that are missing, too many, out of order, not in the one spelling a number has, or not decimal.
    *("$scrypt$xx=4,r=8,p=1$c2FsdA$" + DIGEST_64, "$scrypt$r=8,ln=4,p=1$c2FsdA$" + DIGEST_64),
    *("$scrypt$ln=4,r=8,p=1$c2FsdA", "$scrypt$ln=04,r=8,p=1$c2FsdA$" + DIGEST_64, "$scrypt$ln=4,r=8,p=1$$" + DIGEST_64),
    *("$scrypt$ln=0,r=8,p=1$c2FsdA$" + DIGEST_64, "$scrypt$ln=-4,r=8,p=1$c2FsdA$" + DIGEST_64),
    *("$scrypt$ln=99,r=8,p=1$c2FsdA$" + DIGEST_64, "$scrypt$ln=9999999999,r=8,p=1$c2FsdA$" + DIGEST_64),
    *("$scrypt$ln=16,r=1,p=1$c2FsdA$" + DIGEST_64, "$scrypt$ln=4,r=8,p=1$c2FsdA$" + DIGEST_64 + "$x"),
    *("$scrypt$ln=٤,r=8,p=1$c2FsdA$" + DIGEST_64, "$scrypt$ln=4,r=8,p=1$c2FsdA$" + DIGEST_64 + "\n"),
    *(
        "scrypt$15$salt$8$1$" + DIGEST_64 + "=",
        "scrypt$1$salt$8$1$" + DIGEST_64 + "=",
        "scrypt$16$$8$1$" + DIGEST_64 + "=",
    ),
    *("scrypt:15:8:1$salt$" + HEX, "scrypt:16:8$salt$" + HEX, "scrypt:16:8:1$salt$" + HEX[1:], "scrypt$salt$" + HEX),
    *("scrypt:16:8:1$salt$" + HEX.upper().replace("0", "G"), "scrypt:16:8:1$sa\nlt$" + HEX, "scrypt:16:8:1$s\0$" + HEX),
    *("pbkdf2:sha256:10$salt$" + HEX, "pbkdf2:md5:10$salt$" + "00" * 16, "pbkdf2:sha256$salt$" + HEX[:64]),
    *(
        "pbkdf2_sha256$x$salt$hash",
        "pbkdf2_sha256$0$salt$" + DIGEST_64 + "=",
        "pbkdf2_sha256$1e3$salt$" + DIGEST_64 + "=",
    ),
    *(
        "pbkdf2_sha256$10$salt$" + "A" * 44,
        "pbkdf2_sha512$10$salt$" + DIGEST_64 + "=",
        "pbkdf2_sha256$10$$" + DIGEST_64,
    ),
    *("$pbkdf2-sha256$4294967295$c2FsdHNhbHQ$" + DIGEST_64, "$pbkdf2-sha256$99999999999$c2FsdHNhbHQ$" + DIGEST_64),
    *("$pbkdf2-sha256$10$c2FsdHNhbHQ$" + "A" * 86, "$pbkdf2-md5$10$c2FsdHNhbHQ$" + "A" * 22, "$pbkdf2-sha256$10$$"),
    *("$pbkdf2-sha256$i=10,l=31$c2FsdHNhbHQ$" + DIGEST_64, "$pbkdf2-sha256$l=32,i=10$c2FsdHNhbHQ$" + DIGEST_64),
    *("$pbkdf2-sha256$i=10$c2FsdHNhbHQ$" + "A" * 14, "$pbkdf2-sha256$i=10$A$" + DIGEST_64, "$pbkdf2-sha256$i=10$!$!"),
    # Bits that the last letter has to spare: the library would refuse every password.
    "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHR" + "$" + "AAAAAAAAAAAAAAAAAAAAAA",
    "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ" + "$" + "AAAAAAAAAAAAAAAAAAAAAB",
    *("$argon2id$v=19$m=x,t=2,p=1$c2FsdHNhbHQ$" + DIGEST_64, "$argon2id$v=20$m=8,t=2,p=1$c2FsdHNhbHQ$" + DIGEST_64),
    *("$argon2id$v=19$t=2,m=8,p=1$c2FsdHNhbHQ$" + DIGEST_64, "$argon2x$v=19$m=8,t=2,p=1$c2FsdHNhbHQ$" + DIGEST_64),
    *(
        "$argon2id$v=19$m=8,t=2,p=1,keyid=x$c2FsdHNhbHQ$" + DIGEST_64,
        ARGON2.format(m=15, t=1, p=2),
        ARGON2.format(m=8, t=0, p=1),
    ),
    *("$argon2id$v=19$m=8,t=1,p=1$c2FsdA$" + DIGEST_64, "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$AAAAAA"),
    *("$2b$99$" + "." * 53, "$2b$03$" + "." * 53, "$2b$4$" + "." * 53, "$2b$04$" + "." * 52, "$2b$04$" + "." * 54),
    *(
        "$2b$04$" + "\0" * 53,
        "$2b$04$" + "." * 52 + "$",
        "bcrypt$2b$04$" + "." * 53,
        "bcrypt$$2b$",
        "bcrypt_sha256$$2b$04$",
    ),
    *(
        "$bcrypt-sha256$v=3,t=2b,r=4$" + "." * 22 + "$" + "." * 31,
        "$bcrypt-sha256$v=2,t=2y,r=4$" + "." * 22 + "$" + "." * 31,
    ),
    *("$wp$2y$04$" + "." * 52, "$wp$P$B" + "." * 30, "$wp2y$04$" + "." * 53),
    *("$P$4" + "." * 30, "$P$I" + "." * 29, "$P$I" + "." * 31, "$P$!" + "." * 30, "$H$" + "." * 31),
    *("{SSHA}", "{SSHA}!!", "{SSHA}" + "A" * 27 + "=", "{SSHA}" + "A" * 52, "{ssha}" + "A" * 32, "{SSHA}" + "A" * 33),
]


@pytest.mark.parametrize("stored", DAMAGED, ids=range(len(DAMAGED)))
async def test_a_damaged_hash_is_refused_and_never_a_fault(
    hasher: PasswordHasher, stored: str, logged: list[Any]
) -> None:
    """The import hears why; a sign-in is one wrong password more; the log holds fixed words and nothing of the hash."""
    with pytest.raises(UnusableHash) as refusal:
        read_hash(stored)
    assert str(refusal.value).isascii()
    assert len(str(refusal.value)) < 80
    for form in (RAW_FORM, NFKC_FORM):
        found = await hasher.verify(Secret(PASSWORD), stored, form=form)
        assert (found.right, found.renewed) == (False, None)
    expected = {"event": "password_hash.unusable", "log_level": "error", "reason": str(refusal.value)}
    assert logged == [expected, expected]


@pytest.mark.parametrize("name", MADE)
async def test_a_hash_with_one_letter_wrong_is_never_a_fault(hasher: PasswordHasher, name: str) -> None:
    """Wherever the damage is: it is refused, or it is a hash that the password does not match, or still the same."""
    stored = MADE[name]("x")
    for place in range(len(stored)):
        for letter in ("", "$", ",", "=", "0", "9", "\0", "ü", "\n", "\ud800"):
            hasher._verify(Secret("x"), stored[:place] + letter + stored[place + 1 :], RAW_FORM)


async def test_a_check_that_fails_in_the_library_is_a_wrong_password(
    hasher: PasswordHasher, logged: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Argon2 that gets no memory; the log names the kind of fault."""
    stored = MADE["argon2i"](PASSWORD)
    verify = hasher._context.verify

    def fail(text: Any, kept: str) -> bool:
        if kept == stored:
            raise ValueError("no memory for " + kept)
        return bool(verify(text, kept))

    monkeypatch.setattr(hasher._context, "verify", fail)
    assert not await right(hasher, PASSWORD, stored)
    assert logged == [{"event": "password_hash.unusable", "log_level": "error", "reason": "ValueError"}]
