"""
The password grant (RFC 6749 §4.3), fenced.

RFC 9700 §2.4 forbids it; it is here for first-party clients that need it, who must be registered for it, and each use
is audited and counted. It shares its limits with every other way to sign in.
"""

from dataclasses import dataclass, replace
from typing import final

from identity_service.accounts.access import Access, within
from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.accounts.throttle import Attempt, SignInThrottle
from identity_service.accounts.users import LONGEST_NAME, SignInFacts, Users
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import DatabaseUnavailable, Transaction
from identity_service.infra.ratelimit import Limited
from identity_service.infra.runtime.hashing import HashingBusy, Verification, normalise_password
from identity_service.oauth.errors import InvalidGrant, InvalidRequest, TooManyRequests, Unavailable
from identity_service.oauth.grants.pipeline import Grant, Proof, Refusal, TokenRequest, asked_scope, audiences_of
from identity_service.oauth.tokens import UserClaims

_DEPRECATION = ((b"deprecation", b"@1735689600"),)
"""RFC 9745: the grant has been deprecated since RFC 9700 (January 2025)."""


@dataclass(frozen=True, slots=True)
class PasswordEvidence:
    """A booked attempt, what is stored under the name, and whether the password matched it."""

    attempt: Attempt
    facts: SignInFacts | None
    verification: Verification | None = None


@final
class Password(Grant[PasswordEvidence]):
    """Exchanges a username or address and a password for tokens."""

    grant_type = "password"
    first_party_only = True

    def __init__(
        self,
        users: Users,
        families: RefreshFamilies,
        throttle: SignInThrottle,
        access: Access,
        audit: AuditTrail,
        *,
        issuer: str,
        require_verified_email: bool,
    ) -> None:
        self._users = users
        self._families = families
        self._throttle = throttle
        self._access = access
        self._audit = audit
        self._issuer = issuer
        self._require_verified_email = require_verified_email

    async def examine(self, tx: Transaction, request: TokenRequest) -> PasswordEvidence:
        """Book the attempt, then look the name up. Raises TooManyRequests before anything is looked at."""
        name = request.secret("username").reveal()
        if normalise_password(request.secret("password")) is None:
            # Nobody can have such a password, so this tells nothing about the name, and costs nothing.
            raise InvalidRequest("The password cannot be used.", reason="password_impossible")
        booked = await self._throttle.book(name[: LONGEST_NAME + 1], request.origin.network)
        if isinstance(booked, Limited):
            raise TooManyRequests(limit=booked.rule, retry_after=booked.retry_after)
        try:
            return PasswordEvidence(booked, await self._users.facts(tx, name))
        except DatabaseUnavailable:
            await self._throttle.withdraw(booked)
            raise

    async def weigh(self, request: TokenRequest, evidence: PasswordEvidence) -> PasswordEvidence:
        """Check the password; raises Unavailable when the hashing pool is full."""
        try:
            verification = await self._users.check_password(evidence.facts, request.secret("password"))
        except HashingBusy as busy:
            raise Unavailable(reason=f"hashing_{busy}", retry_after=2) from None
        return replace(evidence, verification=verification)

    async def prove(self, tx: Transaction, request: TokenRequest, evidence: PasswordEvidence) -> Proof | Refusal:
        """Start a family, or return the one refusal that every failure gets."""
        facts, verification = evidence.facts, evidence.verification
        if facts is None or verification is None or not verification.right:
            return await self._refuse(tx, request, evidence, "unknown_user" if facts is None else "wrong_password")
        if not facts.enabled:
            return await self._refuse(tx, request, evidence, "user_disabled")
        if self._require_verified_email and not facts.email_verified:
            return await self._refuse(tx, request, evidence, "email_unverified")
        asked = asked_scope(request, request.client.scope)
        granted = within(asked, await self._access.scopes_of(tx, facts.role))
        family = await self._families.start(
            tx,
            facts,
            request.client,
            scope=granted,
            audiences=audiences_of(request, self._issuer),
            amr=("pwd",),
            origin=request.origin,
        )
        if family is None:
            return await self._refuse(tx, request, evidence, "changed_meanwhile")
        if verification.renewed is not None:
            await self._users.renew_hash(tx, facts, verification.renewed)
        await self._audit.record(
            tx,
            "grant.password",
            origin=request.origin,
            actor=str(family.user_id),
            target=str(family.id),
            client_id=request.client.id,
            detail={"displaced": family.displaced, "hash_renewed": verification.renewed is not None},
        )
        return Proof(
            subject=str(family.user_id),
            scope=asked,
            audiences=family.audiences,
            user=UserClaims(roles=(family.role,), sid=str(family.id), auth_time=family.auth_time, amr=family.amr),
            refresh_token=family.token if "refresh_token" in request.client.grant_types else None,
            headers=_DEPRECATION,
        )

    async def settled(self, request: TokenRequest, evidence: PasswordEvidence) -> None:
        """Take the booked failure back, now that the sign-in is committed."""
        await self._throttle.succeeded(evidence.attempt)

    async def abandoned(self, request: TokenRequest, evidence: PasswordEvidence) -> None:
        """Take the booked failure back: an outage must not leave people throttled."""
        await self._throttle.withdraw(evidence.attempt)

    async def _refuse(self, tx: Transaction, request: TokenRequest, evidence: PasswordEvidence, reason: str) -> Refusal:
        await self._audit.record_failure(
            tx,
            "sign_in.failed",
            origin=request.origin,
            target=str(evidence.facts.user_id) if evidence.facts else f"name:{evidence.attempt.name_hash}",
            client_id=request.client.id,
            detail={"reason": reason},
            genuine=evidence.facts is not None,
        )
        return Refusal(InvalidGrant("The username or the password is wrong.", reason=reason), uniform=True)
