"""
Check this service's access tokens offline. Needs nothing of the server.

    verifier = TokenVerifier("https://id.example", "https://orders.example")
    claims = await verifier.verify(token, "orders:read")
"""

from typing import TYPE_CHECKING, Any

from identity_service.verifier.core import InsufficientScope, KeysUnavailable, TokenRefused, VerifiedClaims

if TYPE_CHECKING:
    from identity_service.verifier.token_verifier import TokenVerifier

__all__ = ["InsufficientScope", "KeysUnavailable", "TokenRefused", "TokenVerifier", "VerifiedClaims"]


def __getattr__(name: str) -> Any:
    """Load `TokenVerifier`, and the HTTP client it brings, when it is asked for: the server itself needs neither."""
    if name == "TokenVerifier":
        from identity_service.verifier.token_verifier import TokenVerifier

        return TokenVerifier
    raise AttributeError(name)
