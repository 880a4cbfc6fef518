"""The client credentials grant (RFC 6749 §4.4): a service that acts for itself."""

from typing import final

from identity_service.infra.database import Transaction
from identity_service.oauth.grants.pipeline import Proof, SimpleGrant, TokenRequest, audiences_of


@final
class ClientCredentials(SimpleGrant):
    """
    The client's own authentication is the authorization.

    No refresh token (RFC 6749 §4.4.3): a client that can authenticate needs none. No audit row either: the answer
    needs no database, and the request is counted by client.
    """

    grant_type = "client_credentials"

    def __init__(self, *, issuer: str) -> None:
        self._issuer = issuer

    async def prove(self, tx: Transaction, request: TokenRequest, evidence: None) -> Proof:
        """Return the client itself as the subject; its id can never equal a user's."""
        return Proof(
            subject=request.client.id,
            scope=request.client.scope,
            audiences=audiences_of(request, self._issuer),
        )
