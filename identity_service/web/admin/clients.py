"""The operators' API about registered clients and their secrets."""

import uuid
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Response
from pydantic import BaseModel, Field, StringConstraints

from identity_service.accounts import access
from identity_service.accounts.access import Access
from identity_service.accounts.clients import Client, Clients, InvalidClientMetadata, NewClient
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.web.callers import Caller, Callers, Entry, note
from identity_service.web.documented import problems
from identity_service.web.paging import Cursors, CursorText, IfMatch, Limit, Page, check_if_match, tagged
from identity_service.web.problems import Conflict, Fault, Forbidden, Invalid, NotFound
from identity_service.web.strict import Label, StrictModel, api_routes

_LISTING = "clients"
_LONGEST_OVERLAP = 90 * 86400  # seconds

ClientId = Annotated[str, Path(max_length=64)]
_Uri = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
_Uris = Annotated[list[_Uri], Field(max_length=50)]
_Words = Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=128)]], Field(max_length=100)]


class _Metadata(StrictModel):
    """What both a new client and a change of one may say."""

    scope: _Words | None = None
    audiences: _Uris | None = None
    exchange_audiences: _Uris | None = None
    redirect_uris: _Uris | None = None
    introspect: _Uris | None = None
    cors_origins: _Uris | None = None
    grant_types: _Words | None = None
    first_party: bool | None = None
    require_pkce: bool | None = None
    access_token_ttl: int | None = None
    refresh_idle_ttl: int | None = None
    refresh_absolute_ttl: int | None = None
    refresh_retry_window: int | None = None

    def said(self) -> dict[str, Any]:
        """
        Return the members that were sent; null stands for the installation's default, where there is one.

        Raises Invalid for null where there is none: it would be taken for a change, and change nothing.
        """
        sent = {name: getattr(self, name) for name in self.model_fields_set}
        if nulls := [name for name, value in sent.items() if value is None and name not in _MAY_BE_NULL]:
            raise Invalid(*(Fault(f"/{name}", "must not be null") for name in sorted(nulls)))
        return sent


_TOLD = ("scope", "grant_types", "audiences", "exchange_audiences", "introspect", "redirect_uris", "cors_origins")
_MAY_BE_NULL = frozenset(("access_token_ttl", "refresh_idle_ttl", "refresh_absolute_ttl"))


class ClientCreation(_Metadata):
    """A client to be registered."""

    name: Label
    token_endpoint_auth_method: Annotated[str, StringConstraints(max_length=32)] | None = None


class ClientPatch(_Metadata):
    """What is to be changed; absent members stay."""

    name: Label | None = None


class SecretCreation(StrictModel):
    """How long the secrets that exist still work, in seconds."""

    overlap: Annotated[int, Field(ge=0, le=_LONGEST_OVERLAP)] = 86400


class ClientShown(BaseModel):
    """A client, without its secrets."""

    client_id: str
    name: str
    first_party: bool
    token_endpoint_auth_method: str
    grant_types: list[str]
    scope: list[str]
    audiences: list[str]
    exchange_audiences: list[str]
    redirect_uris: list[str]
    introspect: list[str]
    cors_origins: list[str]
    require_pkce: bool
    access_token_ttl: int | None
    refresh_idle_ttl: int | None
    refresh_absolute_ttl: int | None
    refresh_retry_window: int
    enabled: bool

    @classmethod
    def of(cls, client: Client) -> "ClientShown":
        """Return what is shown of a client."""
        values = {name: getattr(client, name) for name in cls.model_fields if name != "client_id"}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return cls(**{**values, **lists, "client_id": client.id, "grant_types": sorted(client.grant_types)})


class ClientCreated(BaseModel):
    """A new client; its secret is shown this once, and null for one that has none."""

    client: ClientShown
    client_secret: str | None


class SecretShown(BaseModel):
    """When a secret was made and when it ends; never the secret."""

    id: uuid.UUID
    created_at: datetime
    expires_at: datetime | None


class SecretCreated(BaseModel):
    """A new secret, shown this once; by its id it can be ended."""

    id: uuid.UUID
    client_secret: str


def clients_router(
    callers: Callers, clients: Clients, access_rules: Access, audit: AuditTrail, cursors: Cursors
) -> APIRouter:
    """Return the routes under `/v1/admin/clients`."""
    router = api_routes("/v1/admin/clients", tag="clients")
    Reading = Annotated[Entry, Depends(callers.needs("clients:read"))]  # noqa: N806  # a type
    Taking = Annotated[Entry, Depends(callers.needs("clients:write"))]  # noqa: N806  # a type
    Giving = Annotated[Entry, Depends(callers.needs("clients:write", first_hand=True))]  # noqa: N806  # a type

    async def check_scope(tx: Transaction, caller: Caller, scope: list[str]) -> None:
        """Raise Invalid for scopes that do not exist, Forbidden for those the caller could not hand on."""
        if not set(scope) <= await access_rules.existing(tx, scope):
            raise Invalid(Fault("/scope", "names a scope that is not defined"))
        if access.missing(scope, scopes=caller.scopes, rights=caller.rights):
            raise Forbidden("A client cannot be given more than you hold.")

    async def record(
        tx: Transaction, caller: Caller, event: str, client_id: str, detail: dict[str, Any] | None = None
    ) -> None:
        await note(audit, tx, caller, event, client_id, detail)

    async def charge(tx: Transaction, caller: Caller, client_id: str) -> Client:
        """
        Return a client that the caller may change, as it stays until the transaction ends; raises NotFound, Forbidden.

        Whoever can have a secret of it, or change what it may do, can do all that it may do.
        """
        client = await clients.locked(tx, client_id)
        if client is None:
            raise NotFound
        if access.missing(client.scope, scopes=caller.scopes, rights=caller.rights):
            raise Forbidden("This client may do more than you could hand on.")
        return client

    @router.get("", responses=problems())
    async def list_clients(entry: Reading, limit: Limit = 50, cursor: CursorText = None) -> Page[ClientShown]:
        """List clients."""
        place = cursors.read(_LISTING, None, cursor)
        after = place[0] if place else None
        found = await entry.run(lambda tx, _: clients.listed(tx, after=after, limit=limit + 1))
        page = found[:limit]
        following = cursors.write(_LISTING, None, [page[-1].id]) if len(found) > limit else None
        return Page(items=[ClientShown.of(client) for client in page], next_cursor=following)

    @router.post("", status_code=201, responses=problems())
    async def create(entry: Giving, body: ClientCreation) -> ClientCreated:
        """Register a client."""
        said = body.said()

        async def work(tx: Transaction, caller: Caller) -> ClientCreated:
            await check_scope(tx, caller, said.get("scope", []))
            try:
                client, secret = await clients.register(tx, NewClient(**said))
            except InvalidClientMetadata as error:
                raise _invalid(error) from None
            await record(tx, caller, "client.created", client.id, _told(client, said))
            return ClientCreated(client=ClientShown.of(client), client_secret=secret.reveal() if secret else None)

        return await entry.run(work)

    @router.get("/{client_id}", responses=problems())
    async def read(entry: Reading, client_id: ClientId, response: Response) -> ClientShown:
        """Return a client."""

        async def work(tx: Transaction, caller: Caller) -> ClientShown:
            if (client := await clients.find(tx, client_id)) is None:
                raise NotFound
            return ClientShown.of(client)

        return tagged(response, await entry.run(work))

    @router.patch("/{client_id}", responses=problems(412))
    async def change(
        entry: Giving, client_id: ClientId, body: ClientPatch, response: Response, if_match: IfMatch = None
    ) -> ClientShown:
        """Change what a client is registered with; tokens that were issued stay good until they expire."""
        said = body.said()

        async def work(tx: Transaction, caller: Caller) -> ClientShown:
            client = await charge(tx, caller, client_id)
            check_if_match(if_match, ClientShown.of(client))
            if "scope" in said:
                await check_scope(tx, caller, said["scope"])
            try:
                changed = await clients.update(tx, client, said)
            except InvalidClientMetadata as error:
                raise _invalid(error) from None
            await record(tx, caller, "client.updated", client_id, {"members": sorted(said), **_told(changed, said)})
            return ClientShown.of(changed)

        return tagged(response, await entry.run(work))

    async def set_enabled(entry: Entry, client_id: str, enabled: bool) -> None:
        async def work(tx: Transaction, caller: Caller) -> None:
            client = await charge(tx, caller, client_id)
            if client.enabled == enabled:
                return
            await clients.set_enabled(tx, client_id, enabled)
            await record(tx, caller, "client.enabled" if enabled else "client.disabled", client_id)

        await entry.run(work)

    @router.post("/{client_id}/disable", status_code=204, responses=problems())
    async def disable(entry: Taking, client_id: ClientId) -> None:
        """Disable a client; its families and tokens end with it."""
        await set_enabled(entry, client_id, False)

    @router.post("/{client_id}/enable", status_code=204, responses=problems())
    async def enable(entry: Giving, client_id: ClientId) -> None:
        """Enable a client again; what ended stays ended."""
        await set_enabled(entry, client_id, True)

    @router.delete("/{client_id}", status_code=204, responses=problems(409))
    async def remove(entry: Taking, client_id: ClientId) -> None:
        """Forget a client that was disabled before, with its secrets, keys and families."""

        async def work(tx: Transaction, caller: Caller) -> None:
            if (await charge(tx, caller, client_id)).enabled:
                raise Conflict("Disable the client first.")
            await clients.delete(tx, client_id)
            await record(tx, caller, "client.deleted", client_id)

        await entry.run(work)

    @router.get("/{client_id}/secrets", responses=problems())
    async def list_secrets(entry: Reading, client_id: ClientId) -> list[SecretShown]:
        """List when a client's secrets were made and end."""

        async def work(tx: Transaction, caller: Caller) -> list[SecretShown]:
            if await clients.find(tx, client_id) is None:
                raise NotFound
            held = await clients.secrets_of(tx, client_id)
            return [SecretShown(id=one.id, created_at=one.created_at, expires_at=one.expires_at) for one in held]

        return await entry.run(work)

    @router.post("/{client_id}/secrets", status_code=201, responses=problems(409))
    async def rotate_secret(
        entry: Giving, client_id: ClientId, body: Annotated[SecretCreation | None, Body()] = None
    ) -> SecretCreated:
        """Make a new secret; those that exist end after the overlap, and at most two are live."""
        overlap = (body or SecretCreation()).overlap

        async def work(tx: Transaction, caller: Caller) -> SecretCreated:
            if (await charge(tx, caller, client_id)).public:
                raise Conflict("A public client has no secret.")
            secret = await clients.rotate_secret(tx, client_id, overlap=timedelta(seconds=overlap))
            await record(tx, caller, "client.secret_rotated", client_id, {"overlap": overlap})
            return SecretCreated(id=secret.id, client_secret=secret.text.reveal())

        return await entry.run(work)

    @router.delete("/{client_id}/secrets/{secret_id}", status_code=204, responses=problems())
    async def end_secret(entry: Taking, client_id: ClientId, secret_id: uuid.UUID) -> None:
        """End one secret at once."""

        async def work(tx: Transaction, caller: Caller) -> None:
            await charge(tx, caller, client_id)
            if not await clients.delete_secret(tx, client_id, secret_id):
                raise NotFound
            await record(tx, caller, "client.secret_deleted", client_id)

        await entry.run(work)

    return router


def _told(client: Client, said: Collection[str]) -> dict[str, list[str]]:
    """Return what the audit trail tells of a client: the lists that say what it may do and from where."""
    return {name: sorted(getattr(client, name)) for name in _TOLD if name in said}


def _invalid(error: InvalidClientMetadata) -> Invalid:
    """Return the refusal for metadata that cannot be; the messages are constants that name the member first."""
    member, colon, detail = str(error).partition(": ")
    return Invalid(Fault(f"/{member}", detail) if colon and member.isidentifier() else Fault("", str(error)))
