"""All of the person's API."""

from fastapi import APIRouter

from identity_service.web.account.bootstrap import bootstrap_router
from identity_service.web.account.credentials import credentials_router
from identity_service.web.account.export import export_router
from identity_service.web.account.links import Links
from identity_service.web.account.parts import AccountParts
from identity_service.web.account.profile import profile_router
from identity_service.web.account.recovery import recovery_router
from identity_service.web.account.registration import registration_router
from identity_service.web.account.sessions import sessions_router


def account_router(parts: AccountParts) -> APIRouter:
    """Return every route of the person's API; what needs mail, or a bootstrap secret, is there only where they are."""
    router = APIRouter()
    for make in (registration_router, profile_router, credentials_router, sessions_router, export_router):
        router.include_router(make(parts))
    if parts.mail is not None:
        router.include_router(recovery_router(parts, Links(parts, parts.mail)))
    if parts.bootstrap is not None:
        router.include_router(bootstrap_router(parts, parts.bootstrap))
    return router
