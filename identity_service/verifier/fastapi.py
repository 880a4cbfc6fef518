"""The verifier as a FastAPI dependency; FastAPI is the sibling's own, the base install does not bring it."""

import logging
import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Security
from fastapi.openapi.models import OAuthFlowClientCredentials, OAuthFlowPassword, OAuthFlows
from fastapi.security import APIKeyHeader, HTTPBearer, OAuth2, SecurityScopes
from starlette.requests import HTTPConnection

from identity_service.verifier.api_keys import ApiKeyExchanger, ExchangeUnavailable
from identity_service.verifier.core import InsufficientScope, KeysUnavailable, TokenRefused, VerifiedClaims
from identity_service.verifier.token_verifier import TokenVerifier

log = logging.getLogger("identity_service.verifier")

_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")
_RETRY_AFTER = "5"  # seconds
_API_KEY = "X-API-Key"
_SHARED = ("allow_http", "clock", "timeout")  # what the verifier is told, and the exchanger should hear too


class ApiKeys:
    """Lets `Protect` take API keys too: this service's own client, and what else `ApiKeyExchanger` takes."""

    def __init__(self, client_id: str, client_secret: str, **options: Any) -> None:
        """Prepare for one `Protect`, whose `allow_http`, `clock` and `timeout` hold here too unless given anew."""
        self._options = {"client_id": client_id, "client_secret": client_secret, **options}

    def exchanger(self, verifier: TokenVerifier, **shared: Any) -> ApiKeyExchanger:
        """Return the exchanger beside a verifier. Raises ValueError."""
        return ApiKeyExchanger(verifier, **{**shared, **self._options})


class Protect:
    """
    Guards routes of one service.

        protect = Protect("https://id.example", "https://orders.example")

        @app.get("/orders", dependencies=[protect.require("orders:read")])

    or, for a route that wants to know who is calling:

        async def orders(caller: Annotated[VerifiedClaims, protect.require("orders:read")]): ...

    With `api_keys=ApiKeys(client_id, client_secret)` callers may bring an API key in `X-API-Key` instead of a token.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        *,
        name: str = "identity_service",
        api_keys: ApiKeys | None = None,
        **options: Any,
    ) -> None:
        """
        Take what `TokenVerifier` takes; `name` is the security scheme's in the OpenAPI document.

        There a second one, `name` with `_token` behind it, says the same for tools that are handed a token, and one
        with `_api_key` behind it stands for API keys. `verified` is the dependency behind every `require`; a test may
        override it.
        """
        self.verifier = TokenVerifier(issuer, audience, **options)
        self.exchanger: ApiKeyExchanger | None = None
        if api_keys is not None:
            shared = {option: options[option] for option in _SHARED if option in options}
            self.exchanger = api_keys.exchanger(self.verifier, **shared)
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
        header = APIKeyHeader(name=_API_KEY, scheme_name=f"{name}_api_key", auto_error=False)
        key_scheme: Callable[..., Any] = header if api_keys is not None else _no_scheme

        async def verified(
            connection: HTTPConnection,
            wanted: SecurityScopes,
            _scheme: Annotated[Any, Depends(scheme)],
            _pasted: Annotated[Any, Depends(pasted)],
            _key: Annotated[Any, Depends(key_scheme)],
        ) -> VerifiedClaims:
            return await self._verified(connection, tuple(dict.fromkeys(wanted.scopes)))

        self.verified = verified

    def require(self, *scopes: str) -> Any:
        """
        Return the dependency that lets in whoever brings a good token, or API key, that allows all of `scopes`.

        It yields the `VerifiedClaims`. Others are answered 400, 401 or 403 with a challenge (RFC 6750 §3), or 503 when
        the issuer cannot be asked what must be asked. Call it while the routes are made: what it asks for goes into
        the OpenAPI document. Raises ValueError for what is no scope (RFC 6749 §3.3).
        """
        if not all(_SCOPE.fullmatch(scope) for scope in scopes):
            raise ValueError(f"each of these must be one scope, without blanks or quotes: {scopes!r}")
        for scopes_of_flow in self._documented:
            scopes_of_flow.update((scope, "") for scope in scopes)
        return Security(self.verified, scopes=list(scopes))

    async def _verified(self, connection: HTTPConnection, scopes: tuple[str, ...]) -> VerifiedClaims:
        values = connection.headers.getlist("authorization")
        keys = connection.headers.getlist(_API_KEY) if self.exchanger is not None else []
        if len(keys) > 1 or (keys and values):
            raise _refusal(400, "more than one credential", scopes, error="invalid_request")
        checker: TokenVerifier | ApiKeyExchanger
        if self.exchanger is not None and keys:
            checker, kind, credential = self.exchanger, "an API key", keys[0]
        else:
            scheme, _, token = (values[0] if len(values) == 1 else "").partition(" ")
            if scheme.lower() != "bearer":
                raise _refusal(401, "not authenticated", scopes)
            checker, kind, credential = self.verifier, "a token", token.strip(" ")
        try:
            return await checker.verify(credential, *scopes)
        except InsufficientScope:
            raise _refusal(403, "insufficient scope", scopes, error="insufficient_scope") from None
        except TokenRefused as refused:
            log.info("%s was refused: %s", kind, refused.reason)
            raise _refusal(401, f"invalid {kind.partition(' ')[2]}", scopes, error="invalid_token") from None
        except KeysUnavailable:
            raise HTTPException(503, "tokens cannot be checked now", {"Retry-After": _RETRY_AFTER}) from None
        except ExchangeUnavailable as unavailable:
            log.info("an API key could not be checked: %s", unavailable.reason)
            wait = {"Retry-After": str(math.ceil(unavailable.retry_after))}
            raise HTTPException(503, "API keys cannot be checked now", wait) from None


async def _no_scheme() -> None:
    """Stand where the scheme for API keys would, in a document that has none."""


def _refusal(status: int, detail: str, scopes: tuple[str, ...], *, error: str | None = None) -> HTTPException:
    """Return a refusal with its challenge; a request without a credential is told no error (RFC 6750 §3.1)."""
    told = [f'error="{error}"'] if error else []
    told += [f'scope="{" ".join(scopes)}"'] if scopes else []
    return HTTPException(status, detail, {"WWW-Authenticate": " ".join(("Bearer", ", ".join(told))).strip()})
