"""Registered clients (RFC 7591 terms) and their secrets."""

from identity_service.accounts.clients.metadata import (
    AUTH_METHODS,
    GRANT_TYPES,
    NO_AUTHENTICATION,
    Client,
    InvalidClientMetadata,
    NewClient,
    NewSecret,
)
from identity_service.accounts.clients.registry import Clients

__all__ = [
    "AUTH_METHODS",
    "GRANT_TYPES",
    "NO_AUTHENTICATION",
    "Client",
    "Clients",
    "InvalidClientMetadata",
    "NewClient",
    "NewSecret",
]
