"""The JSON API for operators: people, clients, roles, signing keys, and what goes on."""

from fastapi import APIRouter

from identity_service.accounts.access import Access
from identity_service.accounts.api_keys import ApiKeys
from identity_service.accounts.clients import Clients
from identity_service.accounts.refresh_families import RefreshFamilies
from identity_service.accounts.users import Users
from identity_service.infra.audit import AuditTrail
from identity_service.oauth.signing_keys import KeyActs, SigningKeys
from identity_service.web.account.parts import Mail
from identity_service.web.admin.audit import audit_router
from identity_service.web.admin.clients import clients_router
from identity_service.web.admin.roles import roles_router
from identity_service.web.admin.signing_keys import signing_keys_router
from identity_service.web.admin.stats import Figures, stats_router
from identity_service.web.admin.users import users_router
from identity_service.web.callers import Callers
from identity_service.web.paging import Cursors


def admin_routers(
    callers: Callers,
    *,
    users: Users,
    access: Access,
    families: RefreshFamilies,
    clients: Clients,
    api_keys: ApiKeys,
    signing_keys: SigningKeys,
    key_acts: KeyActs,
    audit: AuditTrail,
    cursors: Cursors,
    figures: Figures,
    mail: Mail | None,
) -> list[APIRouter]:
    """Return every route under `/v1/admin`; `mail` is None where no mail can be sent."""
    return [
        users_router(callers, users, access, families, api_keys, audit, cursors, mail),
        clients_router(callers, clients, access, audit, cursors),
        roles_router(callers, access, audit),
        signing_keys_router(callers, signing_keys, key_acts),
        audit_router(callers, audit, cursors),
        stats_router(callers, figures),
    ]
