"""What people are called: the one spelling of a username and of an address, and what can be neither."""

import re

_USERNAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# Not `=?`, which begins an encoded word (RFC 2047 §2): readers of mail decode it to something else.
_EMAIL = re.compile(
    r"(?!.*=\?)[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9-]{2,63}"
)
LONGEST_NAME = 254
LONGEST_DISPLAY_NAME = 200

NAME_OF_THE_DELETED = "~"
"""What the username of a deleted user begins with; nobody can register such a name."""
DOMAIN_OF_THE_DELETED = "deleted.invalid"
"""Where deleted users have their address: a domain that cannot exist (RFC 6761 §6.4), and that nobody may name."""


class InvalidUser(ValueError):
    """A user was to be stored with something that cannot be; the message says which field and why."""

    def __init__(self, field: str, detail: str) -> None:
        """`detail` is a constant that never repeats what was sent."""
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


class NameTaken(Exception):
    """The username or the address belongs to somebody already."""


def canonical_username(typed: str) -> str | None:
    """
    Return the one spelling of a username, or None for what can be none.

    Only ASCII letters, digits and `._-`, case-folded: letters that merely look alike cannot make a second account.
    """
    folded = typed.lower() if typed.isascii() else ""
    return folded if _USERNAME.fullmatch(folded) else None


def canonical_email(typed: str) -> str | None:
    """
    Return the spelling an address is looked up by, or None for what can be none.

    ASCII only: the lower-case form of other letters can be somebody else's address (dotless i). Mail always goes to the
    address as stored.
    """
    if not typed.isascii() or len(typed) > LONGEST_NAME or not _EMAIL.fullmatch(typed):
        return None
    folded = typed.lower()
    # Or somebody could take the address that another user's deletion needs, and so forbid it.
    return None if folded.endswith("@" + DOMAIN_OF_THE_DELETED) else folded


def canonical_name(typed: str) -> str:
    """Return the one spelling of an address or a username; what can be neither stays as it was typed."""
    return canonical_email(typed) or canonical_username(typed) or typed


def check_username(typed: str) -> str:
    """Return the canonical username; raises InvalidUser."""
    if (name := canonical_username(typed)) is None:
        raise InvalidUser("username", "1 to 64 of a-z, 0-9, dot, underscore, hyphen; begins with a letter or digit")
    return name


def check_email(typed: str) -> str:
    """Return the canonical address; raises InvalidUser."""
    if (address := canonical_email(typed)) is None:
        raise InvalidUser("email", "not an address this service can write to")
    return address


def check_display_name(typed: str | None) -> str | None:
    """
    Return what a person wants to be called, without blanks around it, or None for nothing; raises InvalidUser.

    One line of printable characters: marks that turn the direction of writing, or take no room, could make a page show
    something else than what is stored.
    """
    if typed is None:
        return None
    name = typed.strip()
    if not 1 <= len(name) <= LONGEST_DISPLAY_NAME or not name.isprintable():
        raise InvalidUser("name", f"1 to {LONGEST_DISPLAY_NAME} printable characters, on one line")
    return name
