"""
Password hashes as other systems wrote them: what each says, what checking it costs, and the checks the library lacks.

`read_hash` takes a stored hash apart, strictly and without hashing anything. It refuses what nobody writes, and what
costs more than one sign-in may: the cost of a check is written in the hash, so whoever imports a hash decides it.

Three rules of the formats are worth knowing. bcrypt looks at the first 72 bytes of a password: two that are equal so
far are one, until the first right sign-in replaces the hash. Since WordPress 6.8 white space around a password does
not count there. None of these systems normalises Unicode, so the password is tried as it was typed.
"""

import binascii
import hashlib
import hmac
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from passlib.utils.binary import bcrypt64

LIBRARY_SCHEMES = (
    "bcrypt",
    "bcrypt_sha256",
    "django_bcrypt_sha256",
    "pbkdf2_sha1",
    "pbkdf2_sha256",
    "pbkdf2_sha512",
    "scrypt",
    "phpass",
    "ldap_salted_sha1",
)
"""The library's names of the formats that it checks, besides Argon2."""

# The dearest that one sign-in may cost: about two seconds of a core of 2026, four in the worst case.
_ARGON2_MEMORY = 256 * 1024  # KiB
_ARGON2_PASSES = 10
_BCRYPT_ROUNDS = 14  # a power of two
_SCRYPT_MEMORY = 256 * 2**20  # bytes
_SCRYPT_WORK = 4 * _SCRYPT_MEMORY  # bytes: the memory, written once for each lane
_SCRYPT_BLOCK = 64
_LANES = 16
_PBKDF2_ITERATIONS = 5_000_000
_PHPASS_ROUNDS = 16  # a power of two; 8 times what WordPress took, and the interpreter does nothing else meanwhile

# Below these a stolen hash is found out fast. Such users are imported all the same, and counted.
_WEAK_ARGON2 = 7168 * 5  # KiB times passes, the least that OWASP's list of equals has
_WEAK_BCRYPT = 10
_WEAK_SCRYPT = 2**14 * 8  # N times r times p, what its author recommended for sign-ins in 2009
_WEAK_PBKDF2 = 100_000
_WEAK_SALT = 8  # bytes

_DIGEST_SIZES = {"sha1": 20, "sha256": 32, "sha512": 64}
_PHPASS_NUMBERS = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_WHITE_SPACE = b" \t\n\r\0\x0b"  # what PHP's trim() removes


class UnusableHash(ValueError):
    """The text is no hash that can be checked. The message says why in fixed words, and holds nothing of the text."""


def _as_typed(password: bytes) -> bytes:
    return password


@final
@dataclass(frozen=True, slots=True)
class StoredHash:
    """
    What a stored hash says of itself.

    Either `spelling` is what the library is asked to check, with what `prepare` makes of the password, or `derive`
    computes what must equal `digest`.
    """

    scheme: str
    """The algorithm: a word for counts and reports."""
    weak: bool
    """Whether a stolen copy would be found out fast."""
    argon2id_effort: int = 0
    """KiB times passes, what guessing costs, of Argon2id in its current version; 0 for all else."""
    spelling: str = ""
    prepare: Callable[[bytes], bytes] = _as_typed
    derive: Callable[[bytes], bytes] | None = None
    digest: bytes = b""

    def matches(self, password: str, library: Callable[[bytes, str], bool]) -> bool:
        """Compute the hash of a password, with the library's `verify` where it knows the format, and compare them."""
        typed = password.encode()
        if self.derive is None:
            return bool(library(self.prepare(typed), self.spelling))
        return hmac.compare_digest(self.derive(typed), self.digest)


def read_hash(text: str) -> StoredHash:
    """Return what a stored hash says; raises UnusableHash for no known format, a damaged one, or one too costly."""
    for pattern, read in _FORMATS:
        if (found := pattern.fullmatch(text)) is not None:
            return read(found)
    raise UnusableHash("the format is not known")


# -- parts ------------------------------------------------------------------------------------------------------------


def _must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UnusableHash(otherwise)


def _bytes(text: str, *, shortest: int = 1, longest: int = 64) -> bytes:
    """Return what Base64 stands for, in the usual letters or with a dot for the plus, padded or not."""
    try:
        plain = text.replace(".", "+").rstrip("=")
        value = binascii.a2b_base64(plain + "=" * (-len(plain) % 4))
    except binascii.Error:
        raise UnusableHash("it is damaged") from None
    _must(shortest <= len(value) <= longest, "its salt or digest has no length that is in use")
    return value


def _digest(text: str) -> bytes:
    return _bytes(text, shortest=16)


# -- algorithms -------------------------------------------------------------------------------------------------------


def _argon2(found: re.Match[str]) -> StoredHash:
    memory, passes, lanes = int(found["m"]), int(found["t"]), int(found["p"])
    _must(memory <= _ARGON2_MEMORY, "argon2 with more than 256 MiB of memory")
    _must(passes <= _ARGON2_PASSES, "argon2 with more than 10 passes")
    _must(lanes <= _LANES, "argon2 with more than 16 lanes")
    _must(memory >= 8 * lanes, "it is damaged")
    for name, value in (("salt", _bytes(found["salt"], shortest=8)), ("digest", _digest(found["digest"]))):
        # The library knows one spelling of each value only, and would refuse every password for another one.
        _must(binascii.b2a_base64(value, newline=False).rstrip(b"=") == found[name].encode("ascii"), "it is damaged")
    current = found["type"] == "id" and found["version"] == "19"
    return StoredHash(
        f"argon2{found['type']}",
        weak=memory * passes < _WEAK_ARGON2,
        argon2id_effort=memory * passes if current else 0,
        spelling=found["hash"],
    )


def _bcrypt(
    found: re.Match[str], scheme: str, prepare: Callable[[bytes], bytes] = _as_typed, *, before: str = ""
) -> StoredHash:
    """Return a hash of the bcrypt family. Bits that its letters have to spare, some systems set: they are cleared."""
    rounds = int(found["rounds"])
    _must(rounds <= _BCRYPT_ROUNDS, "bcrypt with more than 2^14 rounds")
    salt, digest = (bcrypt64.check_repair_unused(found[part])[1] for part in ("salt", "digest"))
    spelling = f"{before}{found['start']}{salt}{found['between']}{digest}"
    return StoredHash(scheme, weak=rounds < _WEAK_BCRYPT, spelling=spelling, prepare=prepare)


def _plain_bcrypt(found: re.Match[str]) -> StoredHash:
    return _bcrypt(found, "bcrypt", lambda typed: typed[:72])  # bcrypt itself cuts there; the library raises


def _django_bcrypt_sha256(found: re.Match[str]) -> StoredHash:
    return _bcrypt(found, "bcrypt_sha256", before="bcrypt_sha256$")


def _library_bcrypt_sha256(found: re.Match[str]) -> StoredHash:
    return _bcrypt(found, "bcrypt_sha256")


def _wordpress(found: re.Match[str]) -> StoredHash:
    def prepare(typed: bytes) -> bytes:
        return b64encode(hmac.digest(b"wp-sha384", typed.strip(_WHITE_SPACE), "sha384"))

    return _bcrypt(found, "wordpress", prepare)


def _scrypt(n: int, found: re.Match[str], salt: bytes, digest: bytes, spelling: str = "") -> StoredHash:
    block, lanes = int(found["r"]), int(found["p"])
    _must(lanes <= _LANES, "scrypt with more than 16 lanes")
    _must(block <= _SCRYPT_BLOCK, "scrypt with blocks beyond any in use")
    _must(128 * n * block <= _SCRYPT_MEMORY, "scrypt with more than 256 MiB of memory")
    _must(128 * n * block * lanes <= _SCRYPT_WORK, "scrypt that writes more than 1 GiB")
    _must(1 < n < 2 ** (16 * block) and n & (n - 1) == 0, "it is damaged")  # RFC 7914 §2

    def derive(typed: bytes) -> bytes:
        memory = 128 * block * (n + lanes + 2)
        return hashlib.scrypt(typed, salt=salt, n=n, r=block, p=lanes, maxmem=memory, dklen=len(digest))

    weak = n * block * lanes < _WEAK_SCRYPT or len(salt) < _WEAK_SALT
    return StoredHash("scrypt", weak=weak, spelling=spelling, derive=None if spelling else derive, digest=digest)


def _phc_scrypt(found: re.Match[str]) -> StoredHash:
    logarithm, digest = int(found["ln"]), _digest(found["digest"])
    _must(logarithm <= 31, "it is damaged")
    known = len(digest) == 32  # what the library insists on
    return _scrypt(2**logarithm, found, _bytes(found["salt"]), digest, found.string if known else "")


def _django_scrypt(found: re.Match[str]) -> StoredHash:
    return _scrypt(int(found["n"]), found, found["salt"].encode(), _digest(found["digest"]))


def _werkzeug_scrypt(found: re.Match[str]) -> StoredHash:
    return _scrypt(int(found["n"]), found, found["salt"].encode(), bytes.fromhex(found["digest"]))


def _pbkdf2(found: re.Match[str], salt: bytes, digest: bytes, *, size: int | None, spelling: str = "") -> StoredHash:
    name, rounds = found["name"] or "sha1", int(found["rounds"])
    _must(rounds <= _PBKDF2_ITERATIONS, "pbkdf2 with more than 5,000,000 iterations")
    _must(len(digest) == (size or _DIGEST_SIZES[name]), "its salt or digest has no length that is in use")

    def derive(typed: bytes) -> bytes:
        return hashlib.pbkdf2_hmac(name, typed, salt, rounds, len(digest))

    weak = rounds < _WEAK_PBKDF2 or len(salt) < _WEAK_SALT
    return StoredHash(
        f"pbkdf2_{name}", weak=weak, spelling=spelling, derive=None if spelling else derive, digest=digest
    )


def _library_pbkdf2(found: re.Match[str]) -> StoredHash:
    return _pbkdf2(found, _bytes(found["salt"]), _digest(found["digest"]), size=None, spelling=found.string)


def _phc_pbkdf2(found: re.Match[str]) -> StoredHash:
    digest = _digest(found["digest"])
    return _pbkdf2(found, _bytes(found["salt"]), digest, size=int(found["length"] or len(digest)))


def _django_pbkdf2(found: re.Match[str]) -> StoredHash:
    # The library knows the format, but not every salt that the framework takes.
    return _pbkdf2(found, found["salt"].encode(), _digest(found["digest"]), size=None)


def _werkzeug_pbkdf2(found: re.Match[str]) -> StoredHash:
    return _pbkdf2(found, found["salt"].encode(), bytes.fromhex(found["digest"]), size=None)


def _phpass(found: re.Match[str]) -> StoredHash:
    rounds = _PHPASS_NUMBERS.index(found["rounds"])
    _must(7 <= rounds <= 30, "it is damaged")
    _must(rounds <= _PHPASS_ROUNDS, "phpass with more than 2^16 rounds")
    return StoredHash("phpass", weak=True, spelling=found.string)  # MD5, however often


def _ldap_salted_sha1(found: re.Match[str]) -> StoredHash:
    _bytes(found["digest"], shortest=24, longest=36)  # 20 of SHA-1, and a salt of 4 to 16
    return StoredHash("ldap_salted_sha1", weak=True, spelling=found.string)


# -- formats ----------------------------------------------------------------------------------------------------------

_NUMBER = "[1-9][0-9]{0,9}"
_BASE64 = "[A-Za-z0-9+/]+"
_PADDED = _BASE64 + "={0,2}"
_DOTTED = "[A-Za-z0-9./]+"
_HEX = "(?:[0-9a-f]{2}){16,64}"
_TEXT_SALT = r"[ -#%-~]{1,64}"  # whatever is printed, but the dollar that ends it
_BCRYPT_SALT = "(?P<salt>[./A-Za-z0-9]{22})"
_BCRYPT_DIGEST = "(?P<digest>[./A-Za-z0-9]{31})"
_BCRYPT = r"(?P<start>\$2[aby]\$(?P<rounds>0[4-9]|[12][0-9]|3[01])\$)" + _BCRYPT_SALT + "(?P<between>)" + _BCRYPT_DIGEST

_FORMATS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], StoredHash]]] = [
    (re.compile(pattern), read)
    for pattern, read in [
        (
            r"(?:argon2)?(?P<hash>\$argon2(?P<type>id|i|d)\$(?:v=(?P<version>16|19)\$)?"
            rf"m=(?P<m>{_NUMBER}),t=(?P<t>{_NUMBER}),p=(?P<p>{_NUMBER})\$(?P<salt>{_BASE64})\$(?P<digest>{_BASE64}))",
            _argon2,
        ),
        (rf"(?:bcrypt\$)?{_BCRYPT}", _plain_bcrypt),
        (rf"bcrypt_sha256\${_BCRYPT}", _django_bcrypt_sha256),
        (
            r"(?P<start>\$bcrypt-sha256\$(?:v=2,t=2b,r=|2[ab],)(?P<rounds>[4-9]|[12][0-9]|3[01])\$)"
            rf"{_BCRYPT_SALT}(?P<between>\$){_BCRYPT_DIGEST}",
            _library_bcrypt_sha256,
        ),
        (rf"\$wp{_BCRYPT}", _wordpress),
        (
            rf"\$scrypt\$ln=(?P<ln>{_NUMBER}),r=(?P<r>{_NUMBER}),p=(?P<p>{_NUMBER})"
            rf"\$(?P<salt>{_BASE64})\$(?P<digest>{_BASE64})",
            _phc_scrypt,
        ),
        (
            rf"scrypt\$(?P<n>{_NUMBER})\$(?P<salt>{_TEXT_SALT})\$(?P<r>{_NUMBER})\$(?P<p>{_NUMBER})"
            rf"\$(?P<digest>{_PADDED})",
            _django_scrypt,
        ),
        (
            rf"scrypt:(?P<n>{_NUMBER}):(?P<r>{_NUMBER}):(?P<p>{_NUMBER})\$(?P<salt>{_TEXT_SALT})\$(?P<digest>{_HEX})",
            _werkzeug_scrypt,
        ),
        (
            rf"\$pbkdf2(?:-(?P<name>sha256|sha512))?\$(?P<rounds>{_NUMBER})\$(?P<salt>{_DOTTED})\$(?P<digest>{_DOTTED})",
            _library_pbkdf2,
        ),
        (
            rf"\$pbkdf2-(?P<name>sha1|sha256|sha512)\$i=(?P<rounds>{_NUMBER})(?:,l=(?P<length>{_NUMBER}))?"
            rf"\$(?P<salt>{_BASE64})\$(?P<digest>{_BASE64})",
            _phc_pbkdf2,
        ),
        (
            rf"pbkdf2_(?P<name>sha1|sha256)\$(?P<rounds>{_NUMBER})\$(?P<salt>{_TEXT_SALT})\$(?P<digest>{_PADDED})",
            _django_pbkdf2,
        ),
        (
            rf"pbkdf2:(?P<name>sha1|sha256|sha512):(?P<rounds>{_NUMBER})\$(?P<salt>{_TEXT_SALT})\$(?P<digest>{_HEX})",
            _werkzeug_pbkdf2,
        ),
        (r"\$[PH]\$(?P<rounds>[./0-9A-Za-z])[./0-9A-Za-z]{30}", _phpass),
        (rf"\{{SSHA\}}(?P<digest>{_PADDED})", _ldap_salted_sha1),
    ]
]
