"""
The token exchange grant (RFC 8693): an API key or one of our access tokens in, a short access token out.

The client that exchanges becomes the actor of the new token, and its subject stays who it was: nobody can become
somebody without a token of theirs. What comes out is never worth more, and never lives longer, than what went in, and
it ends with it. An API key costs one SELECT and one signature.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar, Protocol, TypeAlias, final

from identity_service.accounts.access import ScopeList, within
from identity_service.accounts.api_keys import ApiKeys, KeyRefused, LiveKey
from identity_service.accounts.clients import Client, Clients
from identity_service.accounts.refresh_families import Audiences
from identity_service.accounts.users import Users
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Limited, Limiter, Rule, Spend
from identity_service.infra.runtime import Clock
from identity_service.oauth.errors import (
    InvalidGrant,
    InvalidRequest,
    InvalidTarget,
    TooManyRequests,
    UnauthorizedClient,
)
from identity_service.oauth.grants.pipeline import Grant, Proof, TokenRequest, choose_audience
from identity_service.oauth.tokens import (
    ACCESS_TOKEN_TYPE,
    ANY_AUDIENCE,
    MOST_ACTORS,
    IssuedTokens,
    Lineage,
    UserClaims,
)
from identity_service.verifier.core import TokenRefused, VerifiedClaims

API_KEY_TYPE = "urn:identity-service:params:oauth:token-type:api-key"


class GuessBudget(Protocol):
    """Slows down who presents what was never a credential."""

    def check(self, who: tuple[str, str]) -> None:
        """Raise TooManyRequests for one who may fail no more."""
        ...

    async def book(self, who: tuple[str, str], bucket: str) -> None:
        """Book a failure; raises TooManyRequests when there have been too many."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom the new token speaks for, and what bounds it. `key_id` is set if an API key is what was presented."""

    id: str
    scope: ScopeList
    user: UserClaims | None
    held: frozenset[str] | None
    lineage: Lineage
    until: int | None
    key_id: str | None = None


Evidence: TypeAlias = Subject | KeyRefused


def _not_good(reason: str) -> InvalidGrant:
    """
    Return the refusal of a subject token that is not, or no longer, good for this client.

    §2.2.2 names invalid_request and lets other codes be used as appropriate. A resource server must tell a caller's
    dead key, which it answers 401, from a request of its own that is wrong.
    """
    return InvalidGrant("The subject token is not valid.", reason=reason)


@final
class TokenExchange(Grant[Evidence]):
    """Exchanges an API key or an access token for an access token that names the client as its actor."""

    grant_type = "urn:ietf:params:oauth:grant-type:token-exchange"
    bounded_by_proof = True
    target_parameters: ClassVar[tuple[str, ...]] = ("resource", "audience")  # §2.1: both name targets, and may mix

    def __init__(
        self,
        api_keys: ApiKeys,
        issued: IssuedTokens,
        users: Users,
        clients: Clients,
        audit: AuditTrail,
        limiter: Limiter,
        guesses: GuessBudget,
        clock: Clock,
        *,
        api_key: Rule,
    ) -> None:
        """`api_key` limits each key, `guesses` what one client presents that is no good key."""
        self._api_keys = api_keys
        self._issued = issued
        self._users = users
        self._clients = clients
        self._audit = audit
        self._limiter = limiter
        self._guesses = guesses
        self._clock = clock
        self._api_key = api_key

    async def examine(self, tx: Transaction, request: TokenRequest) -> Evidence:
        """
        Read what the subject token stands for, with everything it depends on.

        An API key that is not good is returned and not raised: the mark that it leaves is to be committed.
        """
        if request.client.public:
            raise UnauthorizedClient("The client may not use this grant type.", reason="public_client")
        kind = self._kind(request)
        choose_audience(request.resources, _targets(request.client), self._issued.issuer)
        await self._check_actor(tx, request)
        return await (self._of_key(tx, request) if kind == API_KEY_TYPE else self._of_token(tx, request))

    async def weigh(self, request: TokenRequest, evidence: Evidence) -> Evidence:
        """Spend from the key's limit, or book a key that is none; raises TooManyRequests, InvalidGrant."""
        if isinstance(evidence, KeyRefused):
            # Only who presents a bad key is held up: others reach us through the same client, with good ones.
            if evidence.reason != "network":
                who = (request.client.id, request.origin.network)
                self._guesses.check(who)
                await self._guesses.book(who, f"k:{request.client.id}:{request.origin.network}")
            raise _not_good(f"api_key_{evidence.reason}")
        if evidence.key_id is not None:
            verdict = await self._limiter.spend([Spend(self._api_key, evidence.key_id)])
            if isinstance(verdict, Limited):
                raise TooManyRequests(limit=verdict.rule, retry_after=verdict.retry_after)
        return evidence

    async def prove(self, tx: Transaction, request: TokenRequest, evidence: Evidence) -> Proof:
        """Return the subject, cut to what the client may have at all. There is no refresh token; keys last longer."""
        assert isinstance(evidence, Subject)  # noqa: S101  # weighing has refused the others
        if evidence.until is not None and evidence.until <= int(self._clock.now().timestamp()):
            raise _not_good("expired")
        return Proof(
            subject=evidence.id,
            scope=within(evidence.scope, request.client.scope),
            audiences=_targets(request.client),
            user=evidence.user,
            held=evidence.held,
            lineage=evidence.lineage,
            until=evidence.until,
        )

    # -- the request (§2.1) -------------------------------------------------------------------------------------------

    @staticmethod
    def _kind(request: TokenRequest) -> str:
        """Return the subject token's type; raises InvalidRequest for types that are not offered."""
        said: Mapping[str, str] = request.parameters
        if said.get("requested_token_type", ACCESS_TOKEN_TYPE) != ACCESS_TOKEN_TYPE:
            raise InvalidRequest("Only access tokens are issued.", reason="requested_token_type")
        if "subject_token" not in said or "subject_token_type" not in said:
            raise InvalidRequest("subject_token and subject_token_type are needed.", reason="parameter_missing")
        kind = said["subject_token_type"]
        if kind not in (API_KEY_TYPE, ACCESS_TOKEN_TYPE):
            raise InvalidRequest("The subject_token_type is not supported.", reason="subject_token_type")
        if ("actor_token" in said) != ("actor_token_type" in said):
            raise InvalidRequest("actor_token and actor_token_type need each other.", reason="actor_token_type")
        if said.get("actor_token_type", ACCESS_TOKEN_TYPE) != ACCESS_TOKEN_TYPE:
            raise InvalidRequest("The actor_token_type is not supported.", reason="actor_token_type")
        return kind

    async def _check_actor(self, tx: Transaction, request: TokenRequest) -> None:
        """
        Raise InvalidRequest for an actor who is not the client itself.

        The client is the actor, and has proven who it is; a token of its own says so once more. Somebody else's would
        let it name an actor who has never agreed, which takes a `may_act` that we do not issue (§4.4).
        """
        if "actor_token" not in request.parameters:
            return
        try:
            actor = self._issued.read(request.parameters["actor_token"], audiences=ANY_AUDIENCE)
        except TokenRefused as refused:
            raise _no_actor(refused.reason) from None
        if actor.subject != request.client.id or "act" in actor.claims:
            raise _no_actor("not_the_client")
        if (reason := await self._issued.ended(tx, actor)) is not None:
            raise _no_actor(reason)

    # -- API keys -----------------------------------------------------------------------------------------------------

    async def _of_key(self, tx: Transaction, request: TokenRequest) -> Evidence:
        presented = self._api_keys.read(request.secret("subject_token"))
        if presented is None:
            return KeyRefused("malformed")
        held = await self._api_keys.check(tx, presented, network=request.origin.network)
        if isinstance(held, LiveKey):
            await self._api_keys.note_use(tx, held)
            return _subject_of_key(held, request.client)
        if held.genuine:
            await self._audit.record_failure(
                tx,
                "api_key.refused",
                origin=request.origin,
                target=presented.key_id,
                client_id=request.client.id,
                detail={"reason": held.reason},
                genuine=True,
            )
        return held

    # -- access tokens ------------------------------------------------------------------------------------------------

    async def _of_token(self, tx: Transaction, request: TokenRequest) -> Subject:
        client = request.client
        try:
            claims = self._issued.read(request.parameters["subject_token"], audiences=ANY_AUDIENCE)
        except TokenRefused as refused:
            raise _not_good(refused.reason) from None
        if claims.client_id != client.id and not set(claims.audience).intersection(client.introspect):
            raise _not_good("foreign_token")
        if (reason := await self._issued.ended(tx, claims)) is not None:
            raise _not_good(reason)
        before = Lineage.of(claims) or Lineage(())
        lineage = Lineage(
            actors=((client.id, client.epoch), *before.actors),
            parents=(claims.token_id, *before.parents),
            key_id=before.key_id,
            epoch=claims.claims.get("epoch"),
        )
        if len(lineage.actors) > MOST_ACTORS:
            raise InvalidRequest("The token has been exchanged too often.", reason="too_many_actors")
        user, held = await self._owner(tx, claims)
        return Subject(claims.subject, tuple(sorted(claims.scope)), user, held, lineage, until=int(claims.expires_at))

    async def _owner(self, tx: Transaction, claims: VerifiedClaims) -> tuple[UserClaims | None, frozenset[str] | None]:
        """Return what the new token says of a user, with the role they have now, or what a client may do now."""
        subject = await self._clients.find(tx, claims.subject)
        if subject is not None:
            return None, frozenset(subject.scope)
        user = await self._users.get(tx, uuid.UUID(claims.subject))
        if user is None:
            raise _not_good("not_a_person")
        signed_in = claims.claims.get("auth_time")
        auth_time = datetime.fromtimestamp(signed_in, UTC) if signed_in is not None else None
        return UserClaims((user.role,), claims.session_id, auth_time, claims.claims["amr"]), None


def _targets(client: Client) -> Audiences:
    """Return what a client may exchange tokens for; raises InvalidTarget for one that may for nothing."""
    if not client.exchange_audiences:
        raise InvalidTarget("The client may not exchange tokens for anything.", reason="no_exchange_audience")
    return Audiences(client.exchange_audiences[:1], client.exchange_audiences)


def _no_actor(reason: str) -> InvalidRequest:
    return InvalidRequest("The actor token must be one of the client's own.", reason=f"actor_{reason}")


def _subject_of_key(key: LiveKey, client: Client) -> Subject:
    """Return whom a good key speaks for: a person without a session, or a service."""
    person = key.user_id is not None
    return Subject(
        id=str(key.user_id or key.client_id),
        scope=tuple(sorted(key.scope)),
        user=UserClaims((key.role,) if key.role else (), None, None, ("api_key",)) if person else None,
        held=None if person else frozenset(key.owner_scope),
        lineage=Lineage(((client.id, client.epoch),), key_id=key.id, epoch=key.owner_epoch),
        until=int(key.expires_at.timestamp()) if key.expires_at is not None else None,
        key_id=key.id,
    )
