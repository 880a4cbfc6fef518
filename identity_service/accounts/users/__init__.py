"""People: what they are called, how they are found, what they may sign in with, and how they leave."""

from identity_service.accounts.users.counts import Counts
from identity_service.accounts.users.deletion import LOWEST_ROLE
from identity_service.accounts.users.names import (
    LONGEST_NAME,
    InvalidUser,
    NameTaken,
    canonical_email,
    canonical_name,
    canonical_username,
    check_display_name,
    check_email,
    check_username,
)
from identity_service.accounts.users.people import Users
from identity_service.accounts.users.search import Found, Place, State
from identity_service.accounts.users.user import SignInFacts, User

__all__ = [
    "LONGEST_NAME",
    "LOWEST_ROLE",
    "Counts",
    "Found",
    "InvalidUser",
    "NameTaken",
    "Place",
    "SignInFacts",
    "State",
    "User",
    "Users",
    "canonical_email",
    "canonical_name",
    "canonical_username",
    "check_display_name",
    "check_email",
    "check_username",
]
