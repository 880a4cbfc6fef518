"""Commands about registered clients, and about roles."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Annotated, Any

import typer

from identity_service.accounts.access import InvalidScopeName
from identity_service.accounts.clients import (
    AUTH_METHODS,
    GRANT_TYPES,
    NO_AUTHENTICATION,
    Client,
    InvalidClientMetadata,
    NewClient,
    NewSecret,
)
from identity_service.accounts.clients.metadata import TOKEN_EXCHANGE
from identity_service.cli.common import ACTOR, AsJson, DataDir, Refused, run, say, split
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Secret
from identity_service.main import Services

clients_app = typer.Typer(help="Registered clients.", no_args_is_help=True, rich_markup_mode=None)
roles_app = typer.Typer(help="Roles, which are sets of scopes.", no_args_is_help=True, rich_markup_mode=None)

_GRANT_NAMES = {grant.rpartition(":")[2].replace("-", "_"): grant for grant in GRANT_TYPES}

Words = list[str] | None
Seconds = Annotated[int | None, typer.Option(help="Seconds.")]
ClientId = Annotated[str, typer.Argument(help="The client_id.")]


def _shown(client: Client, secret: Secret | None = None) -> dict[str, Any]:
    shown: dict[str, Any] = {"client_id": client.id}
    if secret is not None:
        shown["client_secret"] = secret.reveal()
    return shown | {
        "name": client.name,
        "first_party": client.first_party,
        "token_endpoint_auth_method": client.token_endpoint_auth_method,
        "grant_types": sorted(client.grant_types),
        "scope": " ".join(client.scope),
        "audiences": list(client.audiences),
        "redirect_uris": list(client.redirect_uris),
        "introspect": list(client.introspect),
        "exchange_audiences": list(client.exchange_audiences),
        "cors_origins": list(client.cors_origins),
        "require_pkce": client.require_pkce,
        "access_token_ttl": client.access_token_ttl,
        "refresh_idle_ttl": client.refresh_idle_ttl,
        "refresh_absolute_ttl": client.refresh_absolute_ttl,
        "refresh_retry_window": client.refresh_retry_window,
        "enabled": client.enabled,
    }


def _grant(word: str) -> str:
    """Return a grant type by its short name, `token_exchange`, or as it is written."""
    return _GRANT_NAMES.get(word.replace("-", "_"), word)


def _short(grant: str) -> str:
    return next(word for word, name in _GRANT_NAMES.items() if name == grant)


def _table(found: Sequence[Client]) -> str:
    """Return clients for people, a line for each: id, state, type, name, grants, scopes, audiences."""
    rows = [
        (
            client.id,
            "enabled" if client.enabled else "disabled",
            "public" if client.public else "confidential",
            client.name,
            ",".join(sorted(map(_short, client.grant_types))) or "-",
            ",".join(client.scope) or "-",
            ",".join(client.audiences) or "-",
        )
        for client in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _useless(client: Client, served: Iterable[str]) -> list[str]:
    """Return what the client was registered with to no purpose; `served` are the grants that this service has."""
    names = ", ".join(sorted(map(_short, client.grant_types - set(served))))
    begins_sessions = client.grant_types - {"refresh_token", "client_credentials", TOKEN_EXCHANGE}
    exchanges = TOKEN_EXCHANGE in client.grant_types
    faults = {
        f"this service does not have the grant {names}": bool(names),
        "token_exchange is of no use without an --exchange-audience": exchanges and not client.exchange_audiences,
        "--exchange-audience is of no use without --grant token_exchange": (
            bool(client.exchange_audiences) and not exchanges
        ),
        "authorization_code is of no use without a --redirect-uri": (
            "authorization_code" in client.grant_types and not client.redirect_uris
        ),
        "refresh_token is of no use without a grant that a person signs in by": (
            "refresh_token" in client.grant_types and not begins_sessions
        ),
    }
    return [fault for fault, found in faults.items() if found]


def _tell(new_scopes: Iterable[str], faults: Iterable[str] = ()) -> None:
    """Say, beside what is printed, which scopes there were not before, and what is of no use."""
    for scope in new_scopes:
        typer.echo(f"defined new scope {scope}", err=True)
    for fault in faults:
        typer.echo(f"warning: {fault}", err=True)


@clients_app.command()
def create(
    name: Annotated[str, typer.Argument(help="What people call it.")],
    grant: Annotated[Words, typer.Option(help="A grant type it may use.")] = None,
    scope: Annotated[Words, typer.Option(help="A scope it may ask for.")] = None,
    audience: Annotated[Words, typer.Option(help="A resource it may get tokens for; the first is its default.")] = None,
    redirect_uri: Annotated[Words, typer.Option(help="A redirect URI, compared exactly.")] = None,
    introspect: Annotated[Words, typer.Option(help="An audience whose tokens it may introspect.")] = None,
    exchange_audience: Annotated[
        Words, typer.Option(help="A resource it may exchange tokens and API keys for; the first is its default.")
    ] = None,
    cors_origin: Annotated[Words, typer.Option(help="An origin its pages are served from.")] = None,
    public: Annotated[bool, typer.Option("--public", help="It cannot keep a secret (browser, phone).")] = False,
    first_party: Annotated[bool, typer.Option("--first-party", help="It is ours.")] = False,
    no_pkce: Annotated[bool, typer.Option("--no-pkce", help="Do without PKCE; confidential clients only.")] = False,
    access_token_ttl: Seconds = None,
    refresh_idle_ttl: Seconds = None,
    refresh_absolute_ttl: Seconds = None,
    refresh_retry_window: Annotated[int, typer.Option(help="Seconds to repeat a refresh in without a key.")] = 0,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Register a client; prints its id and, this once, its secret."""
    new = NewClient(
        name=name,
        grant_types=[_grant(word) for word in split(grant)],
        scope=split(scope),
        audiences=split(audience),
        redirect_uris=split(redirect_uri),
        introspect=split(introspect),
        exchange_audiences=split(exchange_audience),
        cors_origins=split(cors_origin),
        token_endpoint_auth_method=NO_AUTHENTICATION if public else AUTH_METHODS[0],
        first_party=first_party,
        require_pkce=not no_pkce,
        access_token_ttl=access_token_ttl,
        refresh_idle_ttl=refresh_idle_ttl,
        refresh_absolute_ttl=refresh_absolute_ttl,
        refresh_retry_window=refresh_retry_window,
    )

    async def work(services: Services, tx: Transaction) -> tuple[Client, Secret | None, list[str], list[str]]:
        try:
            client, secret = await services.clients.register(tx, new)
        except InvalidClientMetadata as error:
            raise Refused(str(error)) from None
        new_scopes = await services.access.define(tx, client.scope)
        await services.audit.record(tx, "client.created", origin=None, actor=ACTOR, target=client.id)
        return client, secret, new_scopes, _useless(client, services.pipeline.grant_types)

    client, secret, new_scopes, faults = run(data_dir, work)
    _tell(new_scopes, faults)
    text = f"client_id     {client.id}"
    if secret is not None:
        text += f"\nclient_secret {secret.reveal()}   (shown this once)"
    say(_shown(client, secret), text, as_json=as_json)


@clients_app.command()
def update(
    client_id: ClientId,
    name: Annotated[str | None, typer.Option(help="What people call it.")] = None,
    grant: Annotated[Words, typer.Option(help="The grant types it may use.")] = None,
    scope: Annotated[Words, typer.Option(help="The scopes it may ask for.")] = None,
    audience: Annotated[Words, typer.Option(help="The resources it may get tokens for.")] = None,
    exchange_audience: Annotated[Words, typer.Option(help="The audiences it may exchange tokens for.")] = None,
    redirect_uri: Annotated[Words, typer.Option(help="The redirect URIs.")] = None,
    introspect: Annotated[Words, typer.Option(help="The audiences whose tokens it may introspect.")] = None,
    cors_origin: Annotated[Words, typer.Option(help="The origins its pages are served from.")] = None,
    access_token_ttl: Seconds = None,
    refresh_idle_ttl: Seconds = None,
    refresh_absolute_ttl: Seconds = None,
    refresh_retry_window: Seconds = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Change a client; what is not named stays, and a list is replaced as a whole (an empty text empties it)."""
    grants = None if grant is None else [_grant(word) for word in split(grant)]
    lists = {
        "scope": scope,
        "audiences": audience,
        "exchange_audiences": exchange_audience,
        "redirect_uris": redirect_uri,
        "introspect": introspect,
        "cors_origins": cors_origin,
    }
    given: dict[str, Any] = {
        "name": name,
        "grant_types": grants,
        **{field: None if words is None else split(words) for field, words in lists.items()},
        "access_token_ttl": access_token_ttl,
        "refresh_idle_ttl": refresh_idle_ttl,
        "refresh_absolute_ttl": refresh_absolute_ttl,
        "refresh_retry_window": refresh_retry_window,
    }
    changes = {field: value for field, value in given.items() if value is not None}

    async def work(services: Services, tx: Transaction) -> tuple[Client, list[str], list[str]]:
        client = await services.clients.locked(tx, client_id)
        if client is None:
            raise Refused("there is no such client")
        try:
            client = await services.clients.update(tx, client, changes)
        except InvalidClientMetadata as error:
            raise Refused(str(error)) from None
        new_scopes = await services.access.define(tx, client.scope)
        detail = {"members": sorted(changes)}
        await services.audit.record(tx, "client.updated", origin=None, actor=ACTOR, target=client_id, detail=detail)
        return client, new_scopes, _useless(client, services.pipeline.grant_types)

    if not changes:
        raise Refused("say what is to be changed")
    client, new_scopes, faults = run(data_dir, work)
    _tell(new_scopes, faults)
    say(_shown(client), _table([client]), as_json=as_json)


@clients_app.command()
def delete(client_id: ClientId, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Forget a client that was disabled before, with its secrets, keys and families."""

    async def work(services: Services, tx: Transaction) -> None:
        client = await services.clients.locked(tx, client_id)
        if client is None:
            raise Refused("there is no such client")
        if client.enabled:
            raise Refused("disable the client first")
        await services.clients.delete(tx, client_id)
        await services.audit.record(tx, "client.deleted", origin=None, actor=ACTOR, target=client_id)

    run(data_dir, work)
    say({"client_id": client_id, "deleted": True}, f"{client_id} deleted", as_json=as_json)


@clients_app.command("list")
def list_clients(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List clients: id, state, type, name, and the grants, scopes and audiences they may ask for."""

    async def work(services: Services, tx: Transaction) -> list[Client]:
        return await services.clients.all(tx)

    found = run(data_dir, work)
    say([_shown(client) for client in found], _table(found), as_json=as_json)


@clients_app.command("rotate-secret")
def rotate_secret(
    client_id: ClientId,
    overlap: Annotated[int, typer.Option(min=0, max=90 * 86400, help="Seconds the old secret still works.")] = 86400,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Make a new secret and let the old one end after an overlap; prints it this once."""

    async def work(services: Services, tx: Transaction) -> NewSecret:
        try:
            secret = await services.clients.rotate_secret(tx, client_id, overlap=timedelta(seconds=overlap))
        except LookupError:
            raise Refused("there is no such client") from None
        except InvalidClientMetadata as error:
            raise Refused(str(error)) from None
        await services.audit.record(tx, "client.secret_rotated", origin=None, actor=ACTOR, target=client_id)
        return secret

    secret = run(data_dir, work).text.reveal()
    say(
        {"client_id": client_id, "client_secret": secret, "old_secret_ends_in": overlap},
        f"client_secret {secret}   (shown this once; the old one works for {overlap} s)",
        as_json=as_json,
    )


def _set_enabled(client_id: str, enabled: bool, data_dir: Any, as_json: bool) -> None:
    async def work(services: Services, tx: Transaction) -> None:
        if not await services.clients.set_enabled(tx, client_id, enabled):
            raise Refused("there is no such client")
        event = "client.enabled" if enabled else "client.disabled"
        await services.audit.record(tx, event, origin=None, actor=ACTOR, target=client_id)

    run(data_dir, work)
    say(
        {"client_id": client_id, "enabled": enabled},
        f"{client_id} {'enabled' if enabled else 'disabled'}",
        as_json=as_json,
    )


@clients_app.command()
def disable(client_id: ClientId, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Disable a client; its families and tokens end with it."""
    _set_enabled(client_id, False, data_dir, as_json)


@clients_app.command()
def enable(client_id: ClientId, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Enable a client again; what ended stays ended."""
    _set_enabled(client_id, True, data_dir, as_json)


@roles_app.command("list")
def list_roles(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List roles, lowest first, with their scopes."""

    async def work(services: Services, tx: Transaction) -> dict[str, list[str]]:
        names = await services.access.role_names(tx)
        return {name: sorted(await services.access.scopes_of(tx, name)) for name in names}

    found = run(data_dir, work)
    say(found, "\n".join(f"{name:<12} {' '.join(scopes)}" for name, scopes in found.items()), as_json=as_json)


def _change_role(role: str, scopes: list[str], data_dir: Any, *, grant: bool) -> None:
    async def work(services: Services, tx: Transaction) -> list[str]:
        new: list[str] = []
        if role not in await services.access.role_names(tx):
            raise Refused("there is no such role")
        if grant:
            try:
                new = await services.access.define(tx, scopes)
            except InvalidScopeName as error:
                raise Refused(str(error)) from None
            await services.access.grant(tx, role, scopes)
        else:
            await services.access.withdraw(tx, role, scopes)
        event = "role.granted" if grant else "role.withdrawn"
        await services.audit.record(tx, event, origin=None, actor=ACTOR, target=role, detail={"scopes": scopes})
        return new

    _tell(run(data_dir, work))
    typer.echo(f"{role}: {'granted' if grant else 'withdrawn'} {' '.join(scopes)}")


RoleName = Annotated[str, typer.Argument(help="The role.")]
Scopes = Annotated[list[str], typer.Argument(help="Scopes.")]


@roles_app.command()
def grant(role: RoleName, scopes: Scopes, data_dir: DataDir = None) -> None:
    """Add scopes to a role."""
    _change_role(role, scopes, data_dir, grant=True)


@roles_app.command()
def withdraw(role: RoleName, scopes: Scopes, data_dir: DataDir = None) -> None:
    """Take scopes from a role; its users lose them at their next refresh."""
    _change_role(role, scopes, data_dir, grant=False)
