"""
The token endpoint's shared steps, and what a grant is.

A grant proves an authorization and returns it. It cannot issue a token, so it cannot skip a check on the way: whether
the client may use the grant, what scope and audience it gets, and the signing are here, once, for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar, final

from identity_service.accounts.access import Access, ScopeList, parse_scope, within
from identity_service.accounts.clients import Client
from identity_service.accounts.refresh_families import Audiences
from identity_service.infra.audit import Origin
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Secret
from identity_service.oauth.errors import (
    InvalidRequest,
    InvalidScope,
    InvalidTarget,
    OAuthError,
    UnauthorizedClient,
    UnsupportedGrantType,
)
from identity_service.oauth.tokens import ACCESS_TOKEN_TYPE, Lineage, Tokens, UserClaims

_UNSUPPORTED_SCOPES = frozenset(("openid", "offline_access"))
"""Scopes of OpenID Connect, which this version does not speak: refused when asked for, and in nobody's default."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A token request after the door: parsed, its client known, its scope well-formed."""

    grant_type: str
    client: Client
    origin: Origin
    scope: ScopeList | None
    resources: tuple[str, ...]
    parameters: Mapping[str, str] = field(repr=False)
    retry_key: Secret | None

    def secret(self, name: str) -> Secret:
        """Return a parameter the grant cannot do without; raises InvalidRequest."""
        value = self.parameters.get(name)
        if value is None:
            raise InvalidRequest(f"The parameter {name} is missing.", reason="parameter_missing")
        return Secret(value)


@dataclass(frozen=True, slots=True)
class Proof:
    """
    An authorization that was proven: for whom, and what it can be worth at most.

    `held` is what the subject may do now, where no role of a user says it. `lineage` is what a token is exchanged for,
    and `until`, in seconds since 1970, when it must end.
    """

    subject: str
    scope: ScopeList
    audiences: Audiences
    user: UserClaims | None = None
    refresh_token: Secret | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    held: frozenset[str] | None = None
    lineage: Lineage | None = None
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    A refusal that left a mark in the database, and therefore is returned and not raised.

    `uniform` asks the edge to let it leave at a fixed time, because how long the check took would tell something.
    """

    error: OAuthError
    uniform: bool = False


@dataclass(frozen=True, slots=True)
class Issued:
    """A successful answer (RFC 6749 §5.1); an exchange names the type of what it issued (RFC 8693 §2.2.1)."""

    access_token: str
    expires_in: int
    scope: ScopeList
    refresh_token: Secret | None
    headers: tuple[tuple[bytes, bytes], ...]
    issued_token_type: str | None = None


Evidence = TypeVar("Evidence")


class Grant(ABC, Generic[Evidence]):
    """
    One grant type, in three steps.

    Only `prove` is always needed. What takes long (hashing a password) belongs into `weigh`, between the two
    transactions, so that it holds no connection.
    """

    grant_type: ClassVar[str]
    first_party_only: ClassVar[bool] = False
    """Whether a client of somebody else's is refused, whatever it is registered for."""
    bounded_by_proof: ClassVar[bool] = False
    """Whether a scope or target that is too wide may be refused only after the verdict on what was presented."""
    target_parameters: ClassVar[tuple[str, ...]] = ("resource",)
    """The parameters that name what the token is for; others of that kind are ignored."""

    @abstractmethod
    async def examine(self, tx: Transaction, request: TokenRequest) -> Evidence:
        """Read what the check needs; raise for what is missing."""

    @abstractmethod
    async def weigh(self, request: TokenRequest, evidence: Evidence) -> Evidence:
        """Do the slow part of the check, outside any transaction."""

    @abstractmethod
    async def prove(self, tx: Transaction, request: TokenRequest, evidence: Evidence) -> Proof | Refusal:
        """Decide, write what the decision demands, and return it."""

    async def settled(self, request: TokenRequest, evidence: Evidence) -> None:
        """Do what may happen only after a successful commit."""

    async def abandoned(self, request: TokenRequest, evidence: Evidence) -> None:
        """Undo what examining did outside the database, because something behind us could not answer."""


class SimpleGrant(Grant[None]):
    """A grant that decides in one transaction."""

    async def examine(self, tx: Transaction, request: TokenRequest) -> None:
        """Need nothing beforehand."""

    async def weigh(self, request: TokenRequest, evidence: None) -> None:
        """Do nothing slow."""


def asked_scope(request: TokenRequest, allowed: ScopeList) -> ScopeList:
    """Return the scope that was asked for, or everything by default; raises InvalidScope for more than is allowed."""
    if request.scope is None:
        return tuple(scope for scope in allowed if scope not in _UNSUPPORTED_SCOPES)
    if not set(request.scope) <= set(allowed):
        raise InvalidScope("The scope is more than may be asked for.", reason="scope_not_allowed")
    return request.scope


def audiences_of(request: TokenRequest, issuer: str) -> Audiences:
    """
    Return what a new authorization is good for (RFC 8707 §2).

    Named resources are all it will ever cover. Unnamed, it covers whatever the client may ask for, and the first of
    those is the default; a client without any gets the issuer, which is our own API. Raises InvalidTarget.
    """
    known = request.client.audiences or (issuer,)
    audiences = Audiences(known[:1], known)
    if request.resources:
        chosen = choose_audience(request.resources, audiences, issuer)
        return Audiences(chosen, chosen)
    return audiences


def choose_audience(resources: Sequence[str], audiences: Audiences, issuer: str) -> tuple[str, ...]:
    """Return the audience of one token: what was asked for, or the default. Raises InvalidTarget (RFC 8707 §2)."""
    chosen = tuple(dict.fromkeys(resources)) or audiences.default
    if not set(chosen) <= set(audiences.allowed):
        raise InvalidTarget("The resource may not be asked for.", reason="target_not_allowed")
    if len(chosen) > 1 and issuer in chosen:
        # A token for a sibling must be useless at our own API, and the reverse.
        raise InvalidTarget("The issuer cannot be combined with another resource.", reason="target_mixed")
    return chosen


@final
class Pipeline:
    """The shared steps, over the grants this server has."""

    def __init__(self, grants: Sequence[Grant[object]], access: Access, tokens: Tokens) -> None:
        self._grants = {grant.grant_type: grant for grant in grants}
        self._access = access
        self._tokens = tokens

    @property
    def grant_types(self) -> tuple[str, ...]:
        """The grants that are switched on."""
        return tuple(self._grants)

    def admit(
        self,
        client: Client,
        parameters: Mapping[str, str],
        repeated: Mapping[str, tuple[str, ...]],
        *,
        origin: Origin,
        retry_key: Secret | None,
    ) -> TokenRequest:
        """Check what needs no look at the authorization: the grant, the client's right to it, the scope's form."""
        grant_type = parameters["grant_type"]
        if grant_type not in self._grants:
            raise UnsupportedGrantType("This grant type is not supported.", reason="unknown_grant_type")
        if grant_type not in client.grant_types:
            raise UnauthorizedClient("The client may not use this grant type.", reason="grant_not_registered")
        if self._grants[grant_type].first_party_only and not client.first_party:
            raise UnauthorizedClient("The client may not use this grant type.", reason="not_first_party")
        scope = None
        if "scope" in parameters:
            scope = parse_scope(parameters["scope"])
            if scope is None:
                raise InvalidScope("The scope is malformed.", reason="scope_malformed")
            if not _UNSUPPORTED_SCOPES.isdisjoint(scope):
                raise InvalidScope("The scope is not supported.", reason="scope_unsupported")
        grant = self._grants[grant_type]
        resources = tuple(target for name in grant.target_parameters for target in repeated.get(name, ()))
        request = TokenRequest(grant_type, client, origin, scope, resources, parameters, retry_key)
        if not grant.bounded_by_proof:
            asked_scope(request, client.scope)
            audiences_of(request, self._tokens.issuer)
        return request

    async def examine(self, tx: Transaction, request: TokenRequest) -> object:
        """Let the grant read what it needs."""
        return await self._grants[request.grant_type].examine(tx, request)

    async def weigh(self, request: TokenRequest, evidence: object) -> object:
        """Let the grant do its slow part."""
        return await self._grants[request.grant_type].weigh(request, evidence)

    async def exchange(self, tx: Transaction, request: TokenRequest, evidence: object) -> Issued | Refusal:
        """
        Let the grant prove the authorization, narrow it, and sign.

        A scope or target that was not granted is raised here, inside the transaction, so that the rollback gives back
        what proving consumed.
        """
        proof = await self._grants[request.grant_type].prove(tx, request, evidence)
        if isinstance(proof, Refusal):
            return proof
        scope = within(asked_scope(request, proof.scope), request.client.scope)
        if proof.user is not None:
            held: set[str] = set()
            for role in proof.user.roles:
                held |= await self._access.scopes_of(tx, role)
            scope = within(scope, held)
        if proof.held is not None:
            scope = within(scope, proof.held)
        if proof.lineage is not None and not scope:
            raise InvalidScope("Nothing is left of the scope.", reason="scope_empty")
        audience = choose_audience(request.resources, proof.audiences, self._tokens.issuer)
        token = self._tokens.issue(
            request.client,
            subject=proof.subject,
            scope=scope,
            audience=audience,
            user=proof.user,
            lineage=proof.lineage,
            until=proof.until,
        )
        issued_type = None if proof.lineage is None else ACCESS_TOKEN_TYPE
        return Issued(token.text, token.expires_in, scope, proof.refresh_token, proof.headers, issued_type)

    async def settled(self, request: TokenRequest, evidence: object) -> None:
        """Tell the grant that its success was committed."""
        await self._grants[request.grant_type].settled(request, evidence)

    async def abandoned(self, request: TokenRequest, evidence: object) -> None:
        """Tell the grant that nothing was decided."""
        await self._grants[request.grant_type].abandoned(request, evidence)
