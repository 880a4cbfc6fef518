"""
The protocol's endpoints for machines: token, revocation, introspection, JWKS, discovery.

They stand before the framework: they parse for themselves, and strictly. Each opens its transactions in sight, and
nothing is said before it is committed.
"""

import asyncio
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from pydantic_core import to_json

from identity_service.accounts.clients import AUTH_METHODS, NO_AUTHENTICATION, Client
from identity_service.accounts.refresh_families import GenuineToken, RefreshFamilies, Rejected, Verdict
from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.database import Database, Transaction
from identity_service.infra.runtime import Secret
from identity_service.infra.telemetry.metrics import REFRESH_VERDICTS, SIGN_INS, count_token
from identity_service.oauth.errors import IntrospectionNotAllowed, InvalidGrant, InvalidRequest, Unavailable
from identity_service.oauth.grants.pipeline import Issued, Pipeline, Refusal, TokenRequest
from identity_service.oauth.signing_keys import Document, SigningKeys
from identity_service.oauth.tokens import ANY_AUDIENCE, IssuedTokens
from identity_service.verifier.core import TokenRefused, VerifiedClaims
from identity_service.web.asgi import JSON, NO_STORE, Headers, Receive, Reply, Scope, Send
from identity_service.web.deps import (
    ClientAuthenticator,
    FailureBudget,
    IPNetwork,
    basic_was_used,
    client_credentials,
    origin_of,
)
from identity_service.web.errors import as_oauth, note_refusal, oauth_reply
from identity_service.web.forms import ClientGone, Form, check_media_type, parse_form, read_body, refuse_query
from identity_service.web.uniform import until_uniform

_SHORTEST_KEY, _LONGEST_KEY = 16, 255
_FOREIGN = "The token was not issued to this client."
_ACTIVE = {"active": True, "token_type": "Bearer"}
_INACTIVE = Reply(200, b'{"active":false}', (JSON, *NO_STORE))
_JWKS_CACHE = b"public, max-age=300, stale-while-revalidate=600, stale-if-error=3600"


def _retry_key(headers: Headers) -> Secret | None:
    """Return the Idempotency-Key, if there is one; raises InvalidRequest for one that cannot be used."""
    values = headers.all("idempotency-key")
    if not values:
        return None
    key = values[0]
    visible = all("\x21" <= letter <= "\x7e" for letter in key)
    if len(values) > 1 or not visible or not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
        raise InvalidRequest(
            "The Idempotency-Key must be one value of 16 to 255 visible ASCII characters.", reason="idempotency_key"
        )
    return Secret(key)


class FormEndpoint(ABC):
    """What the endpoints for clients share: POST only, a strict form, an authenticated client, OAuth errors."""

    methods: Sequence[str] = ("POST",)
    quiet = False

    def __init__(
        self,
        authenticator: ClientAuthenticator,
        *,
        trusted_proxies: Sequence[IPNetwork],
        default_client_id: str | None,
    ) -> None:
        self._authenticator = authenticator
        self._trusted_proxies = trusted_proxies
        self._default_client_id = default_client_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        headers = Headers(scope["headers"])
        try:
            refuse_query(scope["query_string"])
            check_media_type(headers)
            form = parse_form(await read_body(headers, receive))
            origin = origin_of(scope, self._trusted_proxies)
            reply = await self.answer(headers, form, origin, scope)
        except ClientGone:
            return
        except Exception as error:  # the one place where a fault becomes an answer
            note_refusal(scope, error)
            reply = oauth_reply(error, basic_was_used=basic_was_used(headers))
        await reply.send(send)

    @abstractmethod
    async def answer(self, headers: Headers, form: Form, origin: Origin, scope: Scope) -> Reply:
        """Return the answer to a parsed request."""

    async def _client(self, headers: Headers, form: Form, origin: Origin, scope: Scope) -> Client:
        """Authenticate the client and name it in the request's log line; raises InvalidClient, InvalidRequest."""
        credentials = client_credentials(headers, form.values, default=self._default_client_id)
        client = await self._authenticator.authenticate(credentials, origin)
        scope["state"] |= {"client_id": client.id, "cors_origins": client.cors_origins}
        return client


@final
class TokenEndpoint(FormEndpoint):
    """`POST /token` (RFC 6749 §3.2)."""

    def __init__(
        self,
        authenticator: ClientAuthenticator,
        db: Database,
        pipeline: Pipeline,
        *,
        trusted_proxies: Sequence[IPNetwork],
        default_client_id: str | None,
        refusal_delay: float,
    ) -> None:
        """`refusal_delay` is in seconds: refusals whose duration would tell something leave at its next multiple."""
        super().__init__(authenticator, trusted_proxies=trusted_proxies, default_client_id=default_client_id)
        self._db = db
        self._pipeline = pipeline
        self._refusal_delay = refusal_delay
        for verdict in set(Verdict) - {Verdict.CURRENT, Verdict.RETRIED}:
            REFRESH_VERDICTS.labels(verdict)  # a counter that appears with its first event shows no increase for it

    async def answer(self, headers: Headers, form: Form, origin: Origin, scope: Scope) -> Reply:
        """Authenticate the client, prove the grant, commit, and only then speak."""
        started = asyncio.get_running_loop().time()
        grant_type = form.values.get("grant_type")
        if grant_type is None:
            raise InvalidRequest("The parameter grant_type is missing.", reason="parameter_missing")
        client = await self._client(headers, form, origin, scope)
        label = grant_type if grant_type in self._pipeline.grant_types else "other"
        try:
            request = self._pipeline.admit(
                client,
                form.values,
                form.repeated,
                origin=origin,
                retry_key=_retry_key(headers) if grant_type == "refresh_token" else None,
            )
            evidence = await self._db.run(lambda tx: self._pipeline.examine(tx, request))
            outcome = await self._decide(request, evidence)
        except Exception as error:
            known = as_oauth(error)
            count_token(label, client.id, known.code if known else "fault")
            raise
        if isinstance(outcome, Refusal):
            count_token(label, client.id, outcome.error.code)
            if grant_type == "refresh_token":
                REFRESH_VERDICTS.labels(outcome.error.reason).inc()
            elif grant_type == "password":
                SIGN_INS.labels(outcome.error.reason).inc()
            if outcome.uniform:
                await until_uniform(started, self._refusal_delay)
            raise outcome.error
        count_token(label, client.id, "issued")
        if grant_type == "password":
            SIGN_INS.labels("succeeded").inc()
        await self._pipeline.settled(request, evidence)
        return _token_reply(outcome)

    async def _decide(self, request: TokenRequest, evidence: object) -> Issued | Refusal:
        """Weigh and exchange; when something behind us cannot answer, let the grant undo its preparation."""
        try:
            evidence = await self._pipeline.weigh(request, evidence)
            return await self._db.run(lambda tx: self._pipeline.exchange(tx, request, evidence))
        except Exception as error:
            if isinstance(as_oauth(error), Unavailable):
                await self._pipeline.abandoned(request, evidence)
            raise


def _token_reply(issued: Issued) -> Reply:
    body = {"access_token": issued.access_token, "token_type": "Bearer", "expires_in": issued.expires_in}
    if issued.refresh_token is not None:
        body["refresh_token"] = issued.refresh_token.reveal()
    if issued.issued_token_type is not None:
        body["issued_token_type"] = issued.issued_token_type
    body["scope"] = " ".join(issued.scope)
    return Reply(200, to_json(body), (JSON, *NO_STORE, *issued.headers))


class PresentedTokenEndpoint(FormEndpoint):
    """What revocation and introspection share: an authenticated client shows a token, and does not get to guess."""

    def __init__(
        self,
        authenticator: ClientAuthenticator,
        db: Database,
        tokens: IssuedTokens,
        families: RefreshFamilies,
        guesses: FailureBudget,
        *,
        trusted_proxies: Sequence[IPNetwork],
    ) -> None:
        super().__init__(authenticator, trusted_proxies=trusted_proxies, default_client_id=None)
        self._db = db
        self._tokens = tokens
        self._families = families
        self._guesses = guesses

    async def answer(self, headers: Headers, form: Form, origin: Origin, scope: Scope) -> Reply:
        """Authenticate the client and answer about the token; a hint of its type is not needed (RFC 7009 §2.1)."""
        client = await self._client(headers, form, origin, scope)
        if (text := form.values.get("token")) is None:
            raise InvalidRequest("The parameter token is missing.", reason="parameter_missing")
        return await self.answer_about(Secret(text), client, origin, scope)

    @abstractmethod
    async def answer_about(self, token: Secret, client: Client, origin: Origin, scope: Scope) -> Reply:
        """Return the answer to an authenticated client that shows a token."""

    async def _read(self, token: Secret, client: Client, origin: Origin, scope: Scope) -> VerifiedClaims | None:
        """
        Return the claims of an access token of ours, whoever it is meant for; None for one that is good no more.

        Texts that were never ours are booked, and beyond a budget answered 429 (RFC 7662 §4); who shows real tokens
        is not held up by them. An unknown key id is not counted: the key may just have left the set, and was real then.
        """
        try:
            return self._tokens.read(token.reveal(), audiences=ANY_AUDIENCE)
        except TokenRefused as refused:
            scope["state"]["reason"] = refused.reason
            if refused.reason not in ("expired", "not_yet_valid", "kid_unknown"):
                who = (client.id, origin.network)
                self._guesses.check(who)
                await self._guesses.book(who, f"t:{client.id}:{origin.network}")
            return None


@final
class RevocationEndpoint(PresentedTokenEndpoint):
    """`POST /revoke` (RFC 7009): a refresh token ends with its whole family, an access token by itself."""

    def __init__(
        self,
        authenticator: ClientAuthenticator,
        db: Database,
        tokens: IssuedTokens,
        families: RefreshFamilies,
        guesses: FailureBudget,
        audit: AuditTrail,
        *,
        trusted_proxies: Sequence[IPNetwork],
    ) -> None:
        super().__init__(authenticator, db, tokens, families, guesses, trusted_proxies=trusted_proxies)
        self._audit = audit

    async def answer_about(self, token: Secret, client: Client, origin: Origin, scope: Scope) -> Reply:
        """End the token; one that nobody knows is answered as one that was ended (RFC 7009 §2.2)."""
        if (refresh_token := self._families.read(token)) is not None:
            await self._end_family(refresh_token, client, origin)
        elif (claims := await self._read(token, client, origin, scope)) is not None:
            await self._end_access_token(claims, client, origin)
        return Reply(200, b"", NO_STORE)

    async def _end_family(self, presented: GenuineToken, client: Client, origin: Origin) -> None:
        async def end(tx: Transaction) -> uuid.UUID | Rejected | None:
            ended = await self._families.revoke(tx, presented, client)
            if isinstance(ended, uuid.UUID):
                await self._record(tx, str(presented.family_id), {"user": str(ended)}, client, origin)
            return ended

        ended = await self._db.run(end)
        if isinstance(ended, Rejected):
            raise InvalidGrant(_FOREIGN, reason=ended.verdict)

    async def _end_access_token(self, claims: VerifiedClaims, client: Client, origin: Origin) -> None:
        if claims.client_id != client.id:
            raise InvalidGrant(_FOREIGN, reason="foreign_client")

        async def end(tx: Transaction) -> None:
            if await self._tokens.ended(tx, claims) is None and await self._tokens.revoke(tx, claims):
                await self._record(tx, claims.token_id, {"subject": claims.subject}, client, origin)

        await self._db.run(end)

    async def _record(
        self, tx: Transaction, target: str, detail: dict[str, str], client: Client, origin: Origin
    ) -> None:
        await self._audit.record(
            tx, "token.revoked", origin=origin, actor=client.id, target=target, client_id=client.id, detail=detail
        )


@final
class IntrospectionEndpoint(PresentedTokenEndpoint):
    """`POST /introspect` (RFC 7662): what an access token says, while it is good in every respect."""

    async def answer_about(self, token: Secret, client: Client, origin: Origin, scope: Scope) -> Reply:
        """
        Answer a client about tokens for the audiences it may ask about, by live state.

        Whatever is wrong, the answer is the same (§2.2); only when the database cannot say is there none.
        """
        if not client.introspect:
            raise IntrospectionNotAllowed("The client may not introspect tokens.", reason="no_introspection")
        if self._families.read(token) is not None:
            scope["state"]["reason"] = "refresh_token"
            return _INACTIVE
        claims = await self._read(token, client, origin, scope)
        if claims is None:
            return _INACTIVE
        if not set(claims.audience).intersection(client.introspect):
            scope["state"]["reason"] = "aud_wrong"
            return _INACTIVE
        if (reason := await self._db.run(lambda tx: self._tokens.ended(tx, claims))) is not None:
            scope["state"]["reason"] = reason
            return _INACTIVE
        # First because it matters most, and last because no claim may overrule it.
        body = json.dumps({**_ACTIVE, **claims.claims, **_ACTIVE}, separators=(",", ":"))
        return Reply(200, body.encode("ascii"), (JSON, *NO_STORE))


class DocumentEndpoint(ABC):
    """A public document: prebuilt bytes, a strong entity tag, 304 (RFC 9110 §13.1.2). Asks no database."""

    methods: Sequence[str] = ("GET", "HEAD")
    quiet = True

    def __init__(self, cache_control: bytes) -> None:
        self._cache_control = cache_control

    @abstractmethod
    def document(self) -> Document:
        """Return the document as it is now."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        document = self.document()
        caching = ((b"cache-control", self._cache_control), (b"etag", document.etag))
        asked = Headers(scope["headers"]).one("if-none-match")
        if asked is not None and _matches(asked, document.etag.decode("ascii")):
            await Reply(304, b"", caching).send(send)
            return
        await Reply(200, document.body, (JSON, *caching)).send(send, head=scope["method"] == "HEAD")


def _matches(asked: str, etag: str) -> bool:
    """Compare weakly, as If-None-Match does (RFC 9110 §13.1.2)."""
    return asked.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in asked.split(","))


@final
class JwksEndpoint(DocumentEndpoint):
    """`GET /.well-known/jwks.json` (RFC 7517 §5)."""

    def __init__(self, keys: SigningKeys) -> None:
        super().__init__(_JWKS_CACHE)
        self._keys = keys

    def document(self) -> Document:
        """Return the key set."""
        return self._keys.jwks()


@final
class MetadataEndpoint(DocumentEndpoint):
    """`GET /.well-known/oauth-authorization-server` (RFC 8414 §3) and its OpenID twin (OIDC Discovery §4)."""

    def __init__(self, *, issuer: str, grant_types: Sequence[str]) -> None:
        super().__init__(b"public, max-age=300")
        self._document = Document.of(
            {
                "issuer": issuer,
                "token_endpoint": f"{issuer}/token",
                "revocation_endpoint": f"{issuer}/revoke",
                "introspection_endpoint": f"{issuer}/introspect",
                "jwks_uri": f"{issuer}/.well-known/jwks.json",
                "response_types_supported": [],
                "grant_types_supported": list(grant_types),
                "token_endpoint_auth_methods_supported": list(AUTH_METHODS),
                "revocation_endpoint_auth_methods_supported": list(AUTH_METHODS),
                "introspection_endpoint_auth_methods_supported": [
                    method for method in AUTH_METHODS if method != NO_AUTHENTICATION
                ],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
            }
        )

    def document(self) -> Document:
        """Return the metadata; it lists only what is switched on."""
        return self._document
