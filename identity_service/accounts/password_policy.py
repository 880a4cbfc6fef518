"""
What a password must be (NIST SP 800-63B §5.1.1.2): long enough, not a common one, no name that suggests itself.

No composition rules by default and no expiry; an installation that must demand classes of characters can.
"""

import gzip
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import normalise_password

LONGEST_PASSWORD = 128
_MOST_DIGITS = 8  # beside the service's name: a year, a date; more of them are worth something by themselves


class PasswordRefused(ValueError):
    """The password may not be used; the message tells the person why and does not repeat it."""


@cache
def _common() -> frozenset[str]:
    """Return the shipped list of passwords that are tried first (public leak statistics), in lower case."""
    packed = files("identity_service.accounts").joinpath("common_passwords.txt.gz").read_bytes()
    return frozenset(gzip.decompress(packed).decode("utf-8").split("\n"))


def _squeezed(text: str) -> str:
    """Return the letters and digits of a text, without case."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def _class_of(letter: str) -> str:
    category = unicodedata.category(letter)
    if category.startswith("N"):
        return "digit"
    if category == "Lu":
        return "upper"
    return "lower" if category.startswith("L") else "symbol"


@dataclass(frozen=True, slots=True)
class PasswordPolicy:
    """The rules of this installation, which people know as `service_name`. Lengths are in normalised characters."""

    shortest: int = 8
    classes: Sequence[str] = ()
    service_name: str = ""

    def accept(self, password: Secret, *, names: Sequence[str]) -> Secret:
        """
        Return the password normalised, ready to be hashed; raises PasswordRefused.

        `names` are the username and address it must not be.
        """
        normal = normalise_password(password)
        if normal is None:
            raise PasswordRefused("The password has characters that cannot be used, or is too long.")
        text = normal.reveal()
        if not self.shortest <= len(text) <= LONGEST_PASSWORD:
            raise PasswordRefused(f"The password must have {self.shortest} to {LONGEST_PASSWORD} characters.")
        if missing := [name for name in self.classes if name not in {_class_of(letter) for letter in text}]:
            raise PasswordRefused(f"The password needs at least one of each: {', '.join(missing)}.")
        plain = text.casefold()
        own = {part for name in names for part in (name.casefold(), name.casefold().partition("@")[0])}
        if plain in own:
            raise PasswordRefused("The password must not be the name or the address.")
        if self._is_service_name(text):
            raise PasswordRefused("The password must not be made of this service's name.")
        if plain in _common() or len(set(text)) == 1:
            raise PasswordRefused("The password is one of those that are tried first.")
        return normal

    def _is_service_name(self, text: str) -> bool:
        """Return whether a password is the service's name, dressed up with a few digits or signs (ASVS 6.2.11)."""
        name, squeezed = _squeezed(self.service_name), _squeezed(text)
        if not name or name not in squeezed:
            return False
        rest = squeezed.replace(name, "")
        return all(letter.isdigit() for letter in rest) and len(rest) <= _MOST_DIGITS
