"""
Check this service's access tokens offline. Needs nothing of the server.

    verifier = TokenVerifier("https://id.example", "https://orders.example")
    claims = await verifier.verify(token, "orders:read")

and API keys, by exchanging them for access tokens:

    exchanger = ApiKeyExchanger(verifier, client_id="cl_…", client_secret="cs_…")
    claims = await exchanger.verify(api_key, "orders:read")
"""

from typing import TYPE_CHECKING, Any

from identity_service.verifier.core import InsufficientScope, KeysUnavailable, TokenRefused, VerifiedClaims

if TYPE_CHECKING:
    from identity_service.verifier.api_keys import ApiKeyExchanger, ExchangeUnavailable
    from identity_service.verifier.token_verifier import TokenVerifier

__all__ = [
    "ApiKeyExchanger",
    "ExchangeUnavailable",
    "InsufficientScope",
    "KeysUnavailable",
    "TokenRefused",
    "TokenVerifier",
    "VerifiedClaims",
]


def __getattr__(name: str) -> Any:
    """Load what brings the HTTP client when it is asked for: the server itself does not need it."""
    if name == "TokenVerifier":
        from identity_service.verifier.token_verifier import TokenVerifier

        return TokenVerifier
    if name in ("ApiKeyExchanger", "ExchangeUnavailable"):
        from identity_service.verifier import api_keys

        return getattr(api_keys, name)
    raise AttributeError(name)
