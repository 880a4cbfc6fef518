"""The refresh token grant (RFC 6749 §6, RFC 9700 §4.14), on top of refresh families."""

from typing import final

from identity_service.accounts.refresh_families import RefreshFamilies, Rejected, Verdict
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.oauth.errors import InvalidGrant, InvalidRequest, OAuthError
from identity_service.oauth.grants.pipeline import Proof, Refusal, SimpleGrant, TokenRequest
from identity_service.oauth.tokens import UserClaims


@final
class RefreshToken(SimpleGrant):
    """Exchanges a refresh token for its successor and a fresh access token."""

    grant_type = "refresh_token"
    bounded_by_proof = True

    def __init__(self, families: RefreshFamilies, audit: AuditTrail) -> None:
        self._families = families
        self._audit = audit

    async def prove(self, tx: Transaction, request: TokenRequest, evidence: None) -> Proof | Refusal:
        """
        Rotate. A plain rotation leaves no audit row; a family that ends here leaves one, with its end.

        The refusal of a token that ended its family is returned, so that the end is committed.
        """
        presented = request.secret("refresh_token")
        outcome = await self._families.rotate(tx, presented, request.client, retry_key=request.retry_key)
        if isinstance(outcome, Rejected):
            if outcome.ended:
                await self._audit.record(
                    tx,
                    f"refresh.{outcome.verdict}",
                    origin=request.origin,
                    actor=str(outcome.user_id),
                    target=str(outcome.family_id),
                    client_id=request.client.id,
                )
            return Refusal(_error(outcome.verdict))
        return Proof(
            subject=str(outcome.user_id),
            scope=outcome.scope,
            audiences=outcome.audiences,
            user=UserClaims(roles=(outcome.role,), sid=str(outcome.id), auth_time=outcome.auth_time, amr=outcome.amr),
            refresh_token=outcome.token,
        )


def _error(verdict: Verdict) -> OAuthError:
    """Return what the client hears: one answer for every dead token, save that reuse is told."""
    if verdict is Verdict.REUSE:
        return InvalidGrant("refresh token reuse detected; session revoked", reason=verdict)
    if verdict is Verdict.KEY_REUSED:
        return InvalidRequest("The Idempotency-Key belongs to an earlier rotation.", reason=verdict)
    return InvalidGrant("The refresh token is not valid.", reason=verdict)
