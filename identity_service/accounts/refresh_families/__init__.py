"""
Refresh families: chains of refresh tokens, one row each, however often they are refreshed.

A sign-in starts a family; each refresh moves it one generation on. A token names its family, generation and a random
nonce, and carries a MAC under a key that is not in the database in the clear. So garbage is refused without a query,
a dump holds no usable token, and the current token can be computed again from the row for a permitted retry.

A token presented twice has two holders and nobody can tell which one is the thief, so the whole family is revoked
(RFC 9700 §4.14.2). Whoever restores a database meets tokens it never handed out; the nonce tells those apart.
"""

from identity_service.accounts.refresh_families.families import (
    MOST_FAMILIES,
    Audiences,
    Family,
    Lifetimes,
    RefreshFamilies,
    Rejected,
)
from identity_service.accounts.refresh_families.sessions import Session
from identity_service.accounts.refresh_families.token import TOKEN_PREFIX
from identity_service.accounts.refresh_families.verdict import FamilyState, GenuineToken, Verdict, judge

__all__ = [
    "MOST_FAMILIES",
    "TOKEN_PREFIX",
    "Audiences",
    "Family",
    "FamilyState",
    "GenuineToken",
    "Lifetimes",
    "RefreshFamilies",
    "Rejected",
    "Session",
    "Verdict",
    "judge",
]
