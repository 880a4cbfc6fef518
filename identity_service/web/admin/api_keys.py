"""The operators' API about API keys: services' keys, and ending anybody's."""

import uuid
from collections.abc import Collection
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path

from identity_service.accounts import access
from identity_service.accounts.access import Access
from identity_service.accounts.api_keys import ApiKey, ApiKeys
from identity_service.accounts.clients import Client, Clients
from identity_service.accounts.users import Users
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.web.account.api_keys import KeyCreation, KeyId, KeyMade, KeyRotation, KeyRoutes, KeyShown
from identity_service.web.callers import Caller, Callers, Entry
from identity_service.web.documented import problems
from identity_service.web.paging import Cursors, CursorText, Limit, Page
from identity_service.web.problems import Conflict, Forbidden, NotFound
from identity_service.web.strict import api_routes

ClientId = Annotated[str, Path(max_length=64)]


def admin_api_keys_router(
    callers: Callers,
    api_keys: ApiKeys,
    clients: Clients,
    users: Users,
    rules: Access,
    cursors: Cursors,
    audit: AuditTrail,
) -> APIRouter:
    """
    Return the routes about keys under `/v1/admin`.

    A key is never made, rotated or ended by a key, nor by who acts for somebody: what leaks must not outlive its end.
    Nobody makes a key for a person but that person.
    """
    router = api_routes("/v1/admin", tag="api-keys")
    routes = KeyRoutes(api_keys, cursors, audit)
    Reading = Annotated[Entry, Depends(callers.needs("clients:read"))]  # noqa: N806  # a type
    Writing = Annotated[Entry, Depends(callers.needs("clients:write", first_hand=True))]  # noqa: N806  # a type
    ReadingUsers = Annotated[Entry, Depends(callers.needs("users:read"))]  # noqa: N806  # a type
    WritingUsers = Annotated[Entry, Depends(callers.needs("users:write", first_hand=True))]  # noqa: N806  # a type

    async def service(tx: Transaction, client_id: str) -> Client:
        """Return a client, which holds still until the transaction ends; raises NotFound."""
        client = await clients.locked(tx, client_id)
        if client is None:
            raise NotFound
        return client

    async def service_of(tx: Transaction, key_id: str) -> Client:
        """Return the service whose key it is; raises NotFound, also for a person's."""
        key = await api_keys.get(tx, key_id, None)
        if key is None or key.client_id is None:
            raise NotFound
        return await service(tx, key.client_id)

    def check_within(caller: Caller, held: Collection[str]) -> None:
        if access.missing(held, scopes=caller.scopes, rights=caller.rights):
            raise Forbidden("The key's owner holds more than you could hand on.")

    async def check_outranked(tx: Transaction, caller: Caller, key: ApiKey) -> None:
        """Raise Forbidden unless the caller may end this key: its owner holds no more than they could hand on."""
        if key.user_id is None:
            if "clients:write" not in caller.scopes:
                raise Forbidden("The key is a service's, which takes clients:write.")
            check_within(caller, (await service_of(tx, key.id)).scope)
            return
        owner = await users.get(tx, key.user_id)
        check_within(caller, await rules.scopes_of(tx, owner.role, fresh=True) if owner is not None else ())

    @router.get("/clients/{client_id}/api-keys", responses=problems())
    async def list_client_keys(
        entry: Reading, client_id: ClientId, limit: Limit = 50, cursor: CursorText = None
    ) -> Page[KeyShown]:
        """List a service's keys that were not revoked, newest first."""

        async def look(tx: Transaction, caller: Caller) -> Page[KeyShown]:
            if await clients.find(tx, client_id) is None:
                raise NotFound
            return routes.page(client_id, await api_keys.list(tx, client_id), limit, cursor)

        return await entry.run(look)

    @router.post("/clients/{client_id}/api-keys", status_code=201, responses=problems(409))
    async def create_client_key(entry: Writing, client_id: ClientId, body: KeyCreation) -> KeyMade:
        """Make a key for a service; `key`, which holds its secret, is shown this once."""

        async def make(tx: Transaction, caller: Caller) -> KeyMade:
            client = await service(tx, client_id)
            if client.public:
                raise Conflict("A public client cannot keep a key.")
            if not set(body.scope) <= set(client.scope):
                raise Forbidden("A key cannot be given more than its client may have.")
            return KeyMade.with_text(await routes.create(tx, caller, client_id, body))

        return await entry.run(make)

    @router.delete("/clients/{client_id}/api-keys/{key_id}", status_code=204, responses=problems())
    async def revoke_client_key(entry: Writing, client_id: ClientId, key_id: KeyId) -> None:
        """End a service's key, and every token it was exchanged for, at once."""

        async def revoke(tx: Transaction, caller: Caller) -> None:
            check_within(caller, (await service(tx, client_id)).scope)
            await routes.revoke(tx, caller, key_id, client_id)

        await entry.run(revoke)

    @router.get("/users/{user_id}/api-keys", responses=problems())
    async def list_user_keys(
        entry: ReadingUsers, user_id: uuid.UUID, limit: Limit = 50, cursor: CursorText = None
    ) -> Page[KeyShown]:
        """List a person's keys that were not revoked, newest first."""

        async def look(tx: Transaction, caller: Caller) -> Page[KeyShown]:
            if await users.get(tx, user_id) is None:
                raise NotFound
            return routes.page(user_id, await api_keys.list(tx, user_id), limit, cursor)

        return await entry.run(look)

    @router.post("/api-keys/{key_id}/rotate", responses=problems(409))
    async def rotate_client_key(
        entry: Writing, key_id: KeyId, body: Annotated[KeyRotation | None, Body()] = None
    ) -> KeyMade:
        """Give a service's key a new secret; the old one works for the overlap."""

        async def rotate(tx: Transaction, caller: Caller) -> KeyMade:
            owner = await service_of(tx, key_id)
            return KeyMade.with_text(await routes.rotate(tx, caller, key_id, owner.id, body, held=owner.scope))

        return await entry.run(rotate)

    @router.delete("/api-keys/{key_id}", status_code=204, responses=problems())
    async def revoke_key(entry: WritingUsers, key_id: KeyId) -> None:
        """End anybody's key, and every token it was exchanged for, at once."""

        async def revoke(tx: Transaction, caller: Caller) -> None:
            key = await api_keys.get(tx, key_id, None)
            if key is None:
                raise NotFound
            await check_outranked(tx, caller, key)
            await routes.revoke(tx, caller, key_id, key.owner)

        await entry.run(revoke)

    return router
