"""
Who calls the JSON API and may they: the one door of every route.

A route cannot get a transaction but through its entry, and the entry checks the caller inside that transaction: a right
that was withdrawn a moment ago is gone, and no route can forget to ask.
"""

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

from fastapi import Request

from identity_service.accounts.access import Access
from identity_service.accounts.api_keys import ApiKeys, KeyRefused, LiveKey, PresentedKey
from identity_service.accounts.clients import Clients
from identity_service.accounts.users import User, Users
from identity_service.infra.audit import AuditTrail, Origin
from identity_service.infra.database import Database, Transaction
from identity_service.infra.ratelimit import Limiter, Rule, Spend
from identity_service.infra.ratelimit.catalogue import API_KEY_GUESSING
from identity_service.infra.runtime import Clock, Secret
from identity_service.verifier.core import VerifiedClaims
from identity_service.web.asgi import Headers
from identity_service.web.deps import (
    Bearer,
    FailureBudget,
    InsufficientScope,
    IPNetwork,
    Unauthenticated,
    origin_of,
    spend,
)
from identity_service.web.problems import BadRequest, Forbidden
from identity_service.web.strict import StrictRoute, check_parameters

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Caller:
    """
    Who is calling, as of this transaction.

    `scopes` is what the credential may do now: what it carries, within what its owner holds. `rights` is all that its
    owner holds. `actor` is whom the audit trail names.
    """

    actor: str
    origin: Origin
    scopes: frozenset[str]
    rights: frozenset[str]
    user: User | None
    client_id: str | None
    session_id: uuid.UUID | None = None
    key_id: str | None = None
    delegated: bool = False
    """Whether somebody else got this token in exchange (RFC 8693)."""

    @property
    def first_hand(self) -> bool:
        """Whether this is a sign-in, or a service's own token: what may make further credentials."""
        return self.key_id is None and not self.delegated


async def note(
    audit: AuditTrail,
    tx: Transaction,
    caller: Caller,
    event: str,
    target: str,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write into the audit trail what a caller did to whom or what."""
    await audit.record(
        tx,
        event,
        origin=caller.origin,
        actor=caller.actor,
        target=target,
        client_id=caller.client_id,
        detail=detail,
    )


@dataclass(frozen=True, slots=True)
class AccessRule:
    """
    What a route demands: a scope, a person behind it, and a credential that was not handed on. No scope: anybody.

    An API key lies in a file and an exchanged token with a service. What leaks may look and take away; it must give
    nothing that outlives it: no credential, no right, no account, no way into one.
    """

    scope: str | None
    person: bool = False
    first_hand: bool = False

    @property
    def not_first_hand(self) -> str:
        """What is said to a credential that was handed on."""
        return "This needs a session" + (" of the person's own." if self.person else ", or a service's own token.")


@final
class Visitor:
    """An anonymous caller of a route that is for everybody."""

    __slots__ = ("_db", "_limiter", "origin")

    def __init__(self, db: Database, limiter: Limiter, origin: Origin) -> None:
        self._db = db
        self._limiter = limiter
        self.origin = origin

    async def run(self, work: Callable[[Transaction], Awaitable[Answer]]) -> Answer:
        """Return what `work` makes of a committed transaction."""
        return await self._db.run(work)

    async def spend(self, spends: Sequence[Spend]) -> None:
        """Spend from limits; raises TooManyRequests, and then nothing was spent."""
        await spend(self._limiter, spends)


@final
class Entry:
    """A caller's way into a transaction."""

    __slots__ = ("_admit", "_db", "origin")

    def __init__(self, db: Database, admit: Callable[[Transaction], Awaitable[Caller]], origin: Origin) -> None:
        self._db = db
        self._admit = admit
        self.origin = origin

    async def run(self, work: Callable[[Transaction, Caller], Awaitable[Answer]], *, lock: str | None = None) -> Answer:
        """
        Check the caller and do `work`, in one transaction; with `lock`, wait for that lock first.

        Raises Unauthenticated, InsufficientScope. What is done outside, hashing a password, stands between two runs,
        and the second checks the caller again.
        """

        async def checked(tx: Transaction) -> Answer:
            if lock is not None:
                await tx.lock(lock)
            return await work(tx, await self._admit(tx))

        return await self._db.run(checked)


@final
class Callers:
    """Makes the dependencies that routes demand."""

    def __init__(
        self,
        db: Database,
        bearer: Bearer,
        users: Users,
        clients: Clients,
        access: Access,
        api_keys: ApiKeys,
        audit: AuditTrail,
        limiter: Limiter,
        local: Limiter,
        clock: Clock,
        *,
        caller_rule: Rule,
        network_rule: Rule,
        api_key: Rule,
        trusted_proxies: Sequence[IPNetwork],
    ) -> None:
        """
        `caller_rule` limits each caller of the API and `network_rule` who comes without a token, both in this process's
        own `local` count; `api_key` limits each key.
        """
        self._db = db
        self._bearer = bearer
        self._users = users
        self._clients = clients
        self._access = access
        self._api_keys = api_keys
        self._audit = audit
        self._limiter = limiter
        self._local = local
        self._caller_rule = caller_rule
        self._network_rule = network_rule
        self._api_key = api_key
        self._guesses = FailureBudget(limiter, clock, API_KEY_GUESSING)
        self._trusted_proxies = trusted_proxies

    def anybody(self) -> Callable[[Request], Awaitable[Visitor]]:
        """Return the dependency of a route that is for everybody; limited by network."""

        async def visitor(request: Request) -> Visitor:
            origin = self._origin(request)
            await spend(self._local, [Spend(self._network_rule, f"n:{origin.network}")])
            if isinstance(request.scope["route"], StrictRoute):  # pages take what a mail reader adds to their links
                check_parameters(request)
            return Visitor(self._db, self._limiter, origin)

        visitor.rule = AccessRule(None)  # type: ignore[attr-defined]  # read by the test that walks the routes
        return visitor

    def needs(
        self, scope: str, *, person: bool = False, first_hand: bool = False
    ) -> Callable[[Request], Awaitable[Entry]]:
        """Return the dependency of a route that demands what AccessRule says."""
        rule = AccessRule(scope, person, first_hand)

        async def entry(request: Request) -> Entry:
            headers = Headers(request.scope["headers"])
            keys = headers.all("x-api-key")
            if len(keys) > 1 or (keys and headers.all("authorization")):
                raise BadRequest("The request carries more than one credential.")
            origin = self._origin(request)
            if keys:
                return await self._by_api_key(request, Secret(keys[0]), origin, rule)
            claims = self._bearer.read(headers)
            request.scope["state"]["client_id"] = claims.client_id
            await spend(self._local, [Spend(self._caller_rule, f"t:{claims.subject}:{claims.client_id}")])
            handed_on = rule.first_hand and "act" in claims.claims
            if rule.scope not in claims.scope or handed_on:
                # Said before anything is said about the body, and of live tokens only.
                await self._db.run(lambda tx: self._bearer.check_live(tx, claims))
                raise Forbidden(rule.not_first_hand) if handed_on else InsufficientScope(scope)
            check_parameters(request)
            return Entry(self._db, lambda tx: self._by_token(tx, claims, origin, rule), origin)

        entry.rule = rule  # type: ignore[attr-defined]  # read by the test that walks the routes
        return entry

    def _origin(self, request: Request) -> Origin:
        return origin_of(request.scope, self._trusted_proxies)

    async def _by_token(self, tx: Transaction, claims: VerifiedClaims, origin: Origin, rule: AccessRule) -> Caller:
        await self._bearer.check_live(tx, claims)
        user, rights = None, frozenset[str]()
        if claims.session_id is not None:
            user = await self._users.get(tx, uuid.UUID(claims.subject))
            if user is None:
                raise Unauthenticated("invalid_token", reason="not_a_person")
            rights = await self._access.scopes_of(tx, user.role, fresh=True)
        elif (client := await self._clients.find(tx, claims.subject)) is not None:
            rights = frozenset(client.scope)
        # A token that a service got in exchange speaks for the person, and is not the person's own session.
        delegated = "act" in claims.claims
        own = claims.session_id is not None and not delegated
        caller = Caller(
            actor=claims.subject,
            origin=origin,
            scopes=rights & claims.scope,
            rights=rights,
            user=user,
            client_id=claims.client_id,
            session_id=uuid.UUID(claims.session_id) if own and claims.session_id is not None else None,
            delegated=delegated,
        )
        return _admitted(caller, rule)

    async def _by_api_key(self, request: Request, text: Secret, origin: Origin, rule: AccessRule) -> Entry:
        await spend(self._local, [Spend(self._network_rule, f"n:{origin.network}")])
        presented = self._api_keys.read(text)
        held: LiveKey | KeyRefused = KeyRefused("malformed")
        if presented is not None:
            known = presented
            held = await self._db.run(lambda tx: self._look_at_key(tx, known, origin))
        if presented is None or (isinstance(held, KeyRefused) and held.reason != "network"):
            # Only who shows a bad key is held up: others in the same network have good ones.
            who = ("api_key", origin.network)
            self._guesses.check(who)
            await self._guesses.book(who, f"k:{origin.network}")
            raise Unauthenticated("invalid_token", reason=f"api_key_{_word(held)}")
        if isinstance(held, KeyRefused):
            raise Forbidden("The key may not be used from here.")
        # Only a key that is right, and where it may be used, spends from its own limit: a finder must not use it up.
        request.scope["state"]["headers"] = await spend(self._limiter, [Spend(self._api_key, presented.key_id)])
        if rule.scope is not None and rule.scope not in held.scope:
            raise InsufficientScope(rule.scope)
        if rule.first_hand:
            raise Forbidden(rule.not_first_hand)
        check_parameters(request)
        return Entry(self._db, lambda tx: self._key_caller(tx, presented, origin, rule), origin)

    async def _look_at_key(self, tx: Transaction, presented: PresentedKey, origin: Origin) -> LiveKey | KeyRefused:
        """Return what a key is good for; one that was ours and is no longer good leaves its mark in the audit trail."""
        held = await self._api_keys.check(tx, presented, network=origin.network)
        if isinstance(held, KeyRefused) and held.genuine:
            await self._audit.record_failure(
                tx,
                "api_key.refused",
                origin=origin,
                target=presented.key_id,
                client_id=None,
                detail={"reason": held.reason},
                genuine=True,
            )
        return held

    async def _key_caller(self, tx: Transaction, presented: PresentedKey, origin: Origin, rule: AccessRule) -> Caller:
        held = await self._api_keys.check(tx, presented, network=origin.network)
        if isinstance(held, KeyRefused):
            raise Unauthenticated("invalid_token", reason=held.reason)
        await self._api_keys.note_use(tx, held)
        user, rights = None, frozenset[str]()
        if held.user_id is not None:
            user = await self._users.get(tx, held.user_id)
            rights = await self._access.scopes_of(tx, user.role, fresh=True) if user else frozenset()
        elif held.client_id is not None and (client := await self._clients.find(tx, held.client_id)) is not None:
            rights = frozenset(client.scope)
        caller = Caller(
            actor=str(held.user_id or held.client_id),
            origin=origin,
            scopes=rights & held.scope,
            rights=rights,
            user=user,
            client_id=held.client_id,
            key_id=held.id,
        )
        return _admitted(caller, rule)


def _word(held: LiveKey | KeyRefused) -> str:
    return held.reason if isinstance(held, KeyRefused) else "good"


def _admitted(caller: Caller, rule: AccessRule) -> Caller:
    """Return the caller if they may; raises InsufficientScope, Forbidden."""
    if rule.scope is not None and rule.scope not in caller.scopes:
        raise InsufficientScope(rule.scope)
    if rule.person and caller.user is None:
        raise Unauthenticated("invalid_token", reason="not_a_person")
    return caller
