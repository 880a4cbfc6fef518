"""The verifier as a FastAPI dependency; FastAPI is the sibling's own, the base install does not bring it."""

import logging
import re
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Security
from fastapi.openapi.models import OAuthFlowClientCredentials, OAuthFlowPassword, OAuthFlows
from fastapi.security import HTTPBearer, OAuth2, SecurityScopes
from starlette.requests import HTTPConnection

from identity_service.verifier.core import InsufficientScope, KeysUnavailable, TokenRefused, VerifiedClaims
from identity_service.verifier.token_verifier import TokenVerifier

log = logging.getLogger("identity_service.verifier")

_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")
_RETRY_AFTER = "5"  # seconds


class Protect:
    """
    Guards routes of one service.

        protect = Protect("https://id.example", "https://orders.example")

        @app.get("/orders", dependencies=[protect.require("orders:read")])

    or, for a route that wants to know who is calling:

        async def orders(caller: Annotated[VerifiedClaims, protect.require("orders:read")]): ...
    """

    def __init__(self, issuer: str, audience: str, *, name: str = "identity_service", **options: Any) -> None:
        """
        Take what `TokenVerifier` takes; `name` is the security scheme's in the OpenAPI document.

        There a second one, `name` with `_token` behind it, says the same for tools that are handed a token.
        `verified` is the dependency behind every `require`; a test may override it.
        """
        self.verifier = TokenVerifier(issuer, audience, **options)
        token_url = f"{issuer.rstrip('/')}/token"
        password = OAuthFlowPassword(tokenUrl=token_url)
        client_credentials = OAuthFlowClientCredentials(tokenUrl=token_url)
        # The document lists the scopes that some route has asked for.
        self._documented = (password.scopes, client_credentials.scopes)
        scheme = OAuth2(
            flows=OAuthFlows(password=password, clientCredentials=client_credentials),
            scheme_name=name,
            description=f"An access token of {issuer}, asked for with `resource={audience}`.",
            auto_error=False,
        )
        pasted = HTTPBearer(bearerFormat="at+jwt", scheme_name=f"{name}_token", auto_error=False)

        async def verified(
            connection: HTTPConnection,
            wanted: SecurityScopes,
            _scheme: Annotated[Any, Depends(scheme)],
            _pasted: Annotated[Any, Depends(pasted)],
        ) -> VerifiedClaims:
            return await self._verified(connection, tuple(dict.fromkeys(wanted.scopes)))

        self.verified = verified

    def require(self, *scopes: str) -> Any:
        """
        Return the dependency that lets in whoever brings a good token that allows all of `scopes`.

        It yields the token's `VerifiedClaims`. Others are answered 401 or 403 with a challenge (RFC 6750 §3), or 503
        when the issuer's keys cannot be had. Call it while the routes are made: what it asks for goes into the OpenAPI
        document. Raises ValueError for what is no scope (RFC 6749 §3.3).
        """
        if not all(_SCOPE.fullmatch(scope) for scope in scopes):
            raise ValueError(f"each of these must be one scope, without blanks or quotes: {scopes!r}")
        for scopes_of_flow in self._documented:
            scopes_of_flow.update((scope, "") for scope in scopes)
        return Security(self.verified, scopes=list(scopes))

    async def _verified(self, connection: HTTPConnection, scopes: tuple[str, ...]) -> VerifiedClaims:
        values = connection.headers.getlist("authorization")
        scheme, _, token = (values[0] if len(values) == 1 else "").partition(" ")
        if scheme.lower() != "bearer":
            raise _refusal(401, "not authenticated", scopes)
        try:
            return await self.verifier.verify(token.strip(" "), *scopes)
        except InsufficientScope:
            raise _refusal(403, "insufficient scope", scopes, error="insufficient_scope") from None
        except TokenRefused as refused:
            log.info("a token was refused: %s", refused.reason)
            raise _refusal(401, "invalid token", scopes, error="invalid_token") from None
        except KeysUnavailable:
            raise HTTPException(503, "tokens cannot be checked now", {"Retry-After": _RETRY_AFTER}) from None


def _refusal(status: int, detail: str, scopes: tuple[str, ...], *, error: str | None = None) -> HTTPException:
    """Return a refusal with its challenge; a request without a token is told no error (RFC 6750 §3.1)."""
    told = [f'error="{error}"'] if error else []
    told += [f'scope="{" ".join(scopes)}"'] if scopes else []
    return HTTPException(status, detail, {"WWW-Authenticate": " ".join(("Bearer", ", ".join(told))).strip()})
