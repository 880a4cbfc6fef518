"""Registered clients (RFC 7591 terms) and their secrets."""

from identity_service.accounts.clients.metadata import (
    AUTH_METHODS,
    GRANT_TYPES,
    LONGEST_ACCESS_TOKEN,
    LONGEST_RETRY_WINDOW,
    NO_AUTHENTICATION,
    SHORTEST_ACCESS_TOKEN,
    Client,
    InvalidClientMetadata,
    NewClient,
    NewSecret,
    SecretRecord,
)
from identity_service.accounts.clients.registry import MOST_SECRETS, Clients

__all__ = [
    "AUTH_METHODS",
    "GRANT_TYPES",
    "LONGEST_ACCESS_TOKEN",
    "LONGEST_RETRY_WINDOW",
    "MOST_SECRETS",
    "NO_AUTHENTICATION",
    "SHORTEST_ACCESS_TOKEN",
    "Client",
    "Clients",
    "InvalidClientMetadata",
    "NewClient",
    "NewSecret",
    "SecretRecord",
]
