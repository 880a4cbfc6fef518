"""
What well-known libraries make of the same tokens, each set up as strictly as its documentation tells how to.

Run as a program, it prints the table of docs/torture.md. A library that accepts more than we do need not be at fault:
many cases are a matter of taste, and some are left to the application. Those that are not are why this set exists.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from unittest import mock

import jwt
from authlib.oauth2.rfc6750.errors import InvalidTokenError
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, import_key
from joserfc.jwt import JWTClaimsRegistry, decode

from tests.contracts.torture import AUDIENCE, ISSUER, NOW, Case, build
from tests.contracts.torture.claims import LEEWAY
from tests.contracts.torture.keys import load

NEEDED = ("iss", "aud", "exp", "iat", "sub", "client_id", "jti")
_TYPES = ("at+jwt", "application/at+jwt")
Refusal = type[Exception] | tuple[type[Exception], ...]
Reader = Callable[[str], object]


class Refused(Exception):
    """What an application refuses by itself, since its library leaves it to it: the type, and the choice of the key."""


def _check_type(header: Mapping[str, Any]) -> None:
    if str(header.get("typ")).lower() not in _TYPES:
        raise Refused


def pyjwt(issuer: str, audience: str, now: int) -> tuple[Reader, Refusal]:
    """Return a reader with PyJWT; it has no clock to hand in, so its own is replaced."""
    keys = {key.key_id: key for key in jwt.PyJWKSet.from_dict(load().jwks) if key.public_key_use in ("sig", None)}

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(now, tz or UTC)

    def read(token: str) -> object:
        header = jwt.get_unverified_header(token)
        _check_type(header)
        if (key := keys.get(header.get("kid"))) is None:
            raise Refused
        with mock.patch("jwt.api_jwt.datetime", Clock):
            return jwt.decode(
                token,
                key,
                algorithms=["RS256"],
                issuer=issuer,
                audience=audience,
                leeway=LEEWAY,
                options={"require": list(NEEDED), "enforce_minimum_key_length": True},
            )

    return read, (jwt.PyJWTError, Refused)


def _key_set() -> KeySet:
    """Return the keys that joserfc can read; it warns of the short one."""
    keys = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for jwk in load().jwks["keys"]:
            if jwk["kty"] in ("RSA", "EC", "OKP"):
                keys.append(import_key(jwk))
    return KeySet(keys)


def joserfc(issuer: str, audience: str, now: int) -> tuple[Reader, Refusal]:
    """Return a reader with joserfc."""
    keys = _key_set()
    needed: dict[str, Any] = {name: {"essential": True} for name in NEEDED}
    needed |= {"iss": {"essential": True, "value": issuer}, "aud": {"essential": True, "value": audience}}
    claims = JWTClaimsRegistry(now=now, leeway=LEEWAY, **needed)

    def read(token: str) -> object:
        found = decode(token, keys, algorithms=["RS256"])
        _check_type(found.header)
        claims.validate(found.claims)
        return found

    return read, (JoseError, Refused)


def authlib(issuer: str, audience: str, now: int) -> tuple[Reader, Refusal]:
    """Return a reader with Authlib's validator for RFC 9068, which chooses everything by itself but the clock."""
    keys = _key_set()

    class Validator(JWTBearerTokenValidator):
        def get_jwks(self) -> KeySet:
            return keys

    validator = Validator(issuer=issuer, resource_server=audience)

    def read(token: str) -> object:
        found = validator.authenticate_token(token)
        found.validate(now=now, leeway=LEEWAY)
        return found

    return read, (JoseError, InvalidTokenError)


LIBRARIES: dict[str, Callable[[str, str, int], tuple[Reader, Refusal]]] = {
    "PyJWT": pyjwt,
    "joserfc": joserfc,
    "Authlib": authlib,
}


def answer(reader: Reader, refusal: Refusal, token: str) -> str:
    """Return "accepted", "refused", or the name of an exception that nobody who uses the library expects."""
    try:
        reader(token)
    except refusal:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return "accepted"


def compare(issuer: str, audience: str, now: int, cases: Sequence[Case]) -> dict[str, dict[str, str]]:
    """Return, for each library, what it makes of each case."""
    answers: dict[str, dict[str, str]] = {}
    for name, prepare in LIBRARIES.items():
        reader, refusal = prepare(issuer, audience, now)
        answers[name] = {case.id: answer(reader, refusal, case.token) for case in cases}
    return answers


def table(answers: Mapping[str, Mapping[str, str]], cases: Sequence[Case]) -> str:
    """Return, in Markdown, how many of the cases to be refused each library accepts, group by group."""

    def accepted(library: str, group: str, level: str) -> int:
        return sum(
            answers[library][case.id] == "accepted"
            for case in cases
            if not case.accept and case.group == group and case.level == level
        )

    lines = ["| group | to be refused | " + " | ".join(f"{name} {version(name)}" for name in answers) + " |"]
    lines.append("|---|--:|" + "--:|" * len(answers))
    for group in dict.fromkeys(case.group for case in cases):
        levels = [case.level for case in cases if not case.accept and case.group == group]
        cells = [f"{levels.count('must')} + {levels.count('strict')}"]
        cells += [f"{accepted(name, group, 'must')} + {accepted(name, group, 'strict')}" for name in answers]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def details(given: Mapping[str, str], cases: Sequence[Case]) -> str:
    """Return the names of the cases in which one library differs from us."""
    parts = []
    for name, accept, level, wrong in (
        ("accepted, must be refused", False, "must", {"accepted"}),
        ("accepted, refused by the strict", False, "strict", {"accepted"}),
        ("refused, to be accepted", True, None, set(given.values()) - {"accepted"}),
        ("other exceptions", False, None, set(given.values()) - {"accepted", "refused"}),
    ):
        ids = [
            f"{case.id} ({given[case.id]})" if name == "other exceptions" else case.id
            for case in cases
            if case.accept is accept and level in (None, case.level) and given[case.id] in wrong
        ]
        parts.append(f"{name}: {len(ids)}\n  " + "\n  ".join(ids))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    made = build()
    compared = compare(ISSUER, AUDIENCE, NOW, made)
    sys.stdout.write(table(compared, made))
    for library, answers in compared.items():
        sys.stdout.write(f"\n{library} {version(library)}\n{details(answers, made)}")
