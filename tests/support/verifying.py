"""How a verifier turns a token down."""

import pytest

from identity_service.verifier import KeysUnavailable, TokenRefused, TokenVerifier


def reason(verifier: TokenVerifier, token: str) -> str:
    """Return why a token is refused."""
    with pytest.raises(TokenRefused) as refused:
        verifier.verify_sync(token)
    return refused.value.reason


def unavailable(verifier: TokenVerifier, token: str) -> bool:
    """Return whether nobody can tell."""
    with pytest.raises(KeysUnavailable):
        verifier.verify_sync(token)
    return True
