"""Cheap password hashes in every foreign format, computed with the primitives themselves and with no code of ours."""

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Callable

import bcrypt
from argon2.low_level import Type, hash_secret

SALT = b"sixteen bytes of"
TEXT_SALT = "7SaltOfLetters42"
_TEXT = TEXT_SALT.encode()


def _unpadded(value: bytes) -> str:
    return b64encode(value).decode().rstrip("=")


def _dotted(value: bytes) -> str:
    return _unpadded(value).replace("+", ".")


def _argon2(kind: Type, *, version: int = 19) -> Callable[[str], str]:
    def make(password: str) -> str:
        made = hash_secret(
            password.encode(), SALT, time_cost=1, memory_cost=16, parallelism=2, hash_len=32, type=kind, version=version
        )
        return made.decode()

    return make


def _bcrypt(ident: str) -> Callable[[str], str]:
    def make(password: str) -> str:
        made = bcrypt.hashpw(password.encode()[:72], b"$2b$04$" + b"A" * 21 + b"u").decode()
        return made.replace("$2b$", f"${ident}$")

    return make


def _wordpress(password: str) -> str:
    mixed = hmac.new(b"wp-sha384", password.encode(), hashlib.sha384).digest()
    return "$wp" + bcrypt.hashpw(b64encode(mixed), b"$2b$04$" + b"A" * 21 + b"u").decode().replace("$2b$", "$2y$")


def _django_bcrypt_sha256(password: str) -> str:
    inner = hashlib.sha256(password.encode()).hexdigest().encode()
    return "bcrypt_sha256$" + bcrypt.hashpw(inner, b"$2b$04$" + b"A" * 21 + b"u").decode()


def _library_bcrypt_sha256(password: str) -> str:
    inner = hmac.new(b"A" * 21 + b"u", password.encode(), hashlib.sha256).digest()
    made = bcrypt.hashpw(b64encode(inner), b"$2b$04$" + b"A" * 21 + b"u").decode()
    return f"$bcrypt-sha256$v=2,t=2b,r=4${made[7:29]}${made[29:]}"


def _old_library_bcrypt_sha256(password: str) -> str:
    inner = hashlib.sha256(password.encode()).digest()
    made = bcrypt.hashpw(b64encode(inner), b"$2a$04$" + b"A" * 21 + b"u").decode()
    return f"$bcrypt-sha256$2a,4${made[7:29]}${made[29:]}"


def _phpass(password: str) -> str:
    """Compute the portable hash from its definition: MD5 again and again, then six bits a letter, lowest first."""
    letters = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    digest = hashlib.md5(b"saltsalt" + password.encode(), usedforsecurity=False).digest()
    for _ in range(2**7):
        digest = hashlib.md5(digest + password.encode(), usedforsecurity=False).digest()
    groups = [digest[start : start + 3] for start in range(0, 16, 3)]
    text = "".join(
        letters[int.from_bytes(group, "little") >> 6 * place & 63]
        for group in groups
        for place in range(len(group) + 1)
    )
    return "$P$" + letters[7] + "saltsalt" + text


def _scrypt(password: str, size: int = 64, salt: bytes = SALT) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=16, r=8, p=2, dklen=size)


def _pbkdf2(name: str, password: str, salt: bytes = SALT) -> bytes:
    return hashlib.pbkdf2_hmac(name, password.encode(), salt, 10)


def _salted(password: str) -> str:
    salt = b"8 bytes!"
    return "{SSHA}" + b64encode(hashlib.sha1(password.encode() + salt, usedforsecurity=False).digest() + salt).decode()


MADE: dict[str, Callable[[str], str]] = {
    "argon2id": _argon2(Type.ID),
    "argon2i": _argon2(Type.I),
    "argon2d": _argon2(Type.D),
    "argon2i, old version": _argon2(Type.I, version=16),
    "django argon2": lambda text: "argon2" + _argon2(Type.ID)(text),
    "bcrypt 2a": _bcrypt("2a"),
    "bcrypt 2b": _bcrypt("2b"),
    "bcrypt 2y": _bcrypt("2y"),
    "django bcrypt": lambda text: "bcrypt$" + _bcrypt("2b")(text),
    "django bcrypt_sha256": _django_bcrypt_sha256,
    "passlib bcrypt-sha256": _library_bcrypt_sha256,
    "passlib bcrypt-sha256, old": _old_library_bcrypt_sha256,
    "WordPress 6.8": _wordpress,
    "scrypt 32": lambda text: f"$scrypt$ln=4,r=8,p=2${_unpadded(SALT)}${_unpadded(_scrypt(text, 32))}",
    "scrypt 64": lambda text: f"$scrypt$ln=4,r=8,p=2${_unpadded(SALT)}${_unpadded(_scrypt(text))}",
    "django scrypt": lambda text: f"scrypt$16${TEXT_SALT}$8$2${b64encode(_scrypt(text, salt=_TEXT)).decode()}",
    "werkzeug scrypt": lambda text: f"scrypt:16:8:2${TEXT_SALT}${_scrypt(text, salt=_TEXT).hex()}",
    "pbkdf2": lambda text: f"$pbkdf2$10${_dotted(SALT)}${_dotted(_pbkdf2('sha1', text))}",
    "phpass": _phpass,
    "LDAP": _salted,
}
for _name in ("sha256", "sha512"):
    MADE |= {
        f"pbkdf2 {_name}": lambda text, name=_name: f"$pbkdf2-{name}$10${_dotted(SALT)}${_dotted(_pbkdf2(name, text))}"
    }
for _name in ("sha1", "sha256", "sha512"):
    MADE |= {
        f"PHC pbkdf2 {_name}": lambda text, name=_name: (
            f"$pbkdf2-{name}$i=10${_unpadded(SALT)}${_unpadded(_pbkdf2(name, text))}"
        ),
        f"PHC pbkdf2 {_name} with its length": lambda text, name=_name: (
            f"$pbkdf2-{name}$i=10,l=20${_unpadded(SALT)}${_unpadded(_pbkdf2(name, text)[:20])}"
        ),
        f"werkzeug pbkdf2 {_name}": lambda text, name=_name: (
            f"pbkdf2:{name}:10${TEXT_SALT}${_pbkdf2(name, text, _TEXT).hex()}"
        ),
    }
for _name in ("sha1", "sha256"):
    MADE |= {
        f"django pbkdf2 {_name}": lambda text, name=_name: (
            f"pbkdf2_{name}$10${TEXT_SALT}${b64encode(_pbkdf2(name, text, _TEXT)).decode()}"
        ),
        f"django pbkdf2 {_name} with a salt of its own": lambda text, name=_name: (
            f"pbkdf2_{name}$10$sea-salt, coarse${b64encode(_pbkdf2(name, text, b'sea-salt, coarse')).decode()}"
        ),
    }
"""Makers of cheap hashes, by the format's name."""
