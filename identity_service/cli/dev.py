"""The development server: SQLite, a demo user, a demo client, and the lines to paste."""

import asyncio
import json
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from identity_service.accounts.clients import NO_AUTHENTICATION, NewClient
from identity_service.cli.common import ACTOR, AsJson, DataDir, Keys, settings_for, unless_named, with_services
from identity_service.cli.migrating import bring_up_to_date
from identity_service.cli.serving import only_one_on_sqlite, run_server
from identity_service.infra import telemetry
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Secret
from identity_service.main import Services
from identity_service.settings import Settings

_USERNAME = "demo"
_SIBLING = "https://orders.example"
_SIBLING_SCOPES = ("orders:read", "orders:write")
_SCOPES = ("account:read", "account:write", *_SIBLING_SCOPES)


@dataclass(frozen=True, slots=True)
class Demo:
    """What a person needs to sign in; kept beside the database, readable by its owner only."""

    username: str
    password: str
    client_id: str


def dev(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Serve on this machine with SQLite, a demo user and a demo client; prints how to sign in."""
    data_dir = data_dir or Path(".data")
    # Whatever database the environment names, the demo is not for it.
    settings = settings_for(
        data_dir,
        environment="development",
        database_url="",
        host=host,
        port=port,
        log_json=as_json,
        registration=unless_named("registration", "open"),
    )
    telemetry.configure_logging(level=settings.log_level, as_json=settings.log_json, stream=sys.stderr)
    with only_one_on_sqlite(settings):  # before anything is touched that a running server relies on
        bring_up_to_date(settings.database)
        demo = _prepare(settings, data_dir / "demo.json")
        settings = settings.model_copy(update={"default_client_id": demo.client_id})

        def announce() -> None:
            typer.echo(_as_json(settings, demo) if as_json else _as_text(settings, demo))
            sys.stdout.flush()

        run_server(settings, when_ready=announce, say=lambda line: typer.echo(line, err=True))


def _prepare(settings: Settings, path: Path) -> Demo:
    """Return the demo's credentials, making on the first run what does not exist yet."""
    kept = Demo(**json.loads(path.read_text("utf-8"))) if path.exists() else None

    async def work(services: Services, tx: Transaction) -> Demo:
        audiences = (settings.public_issuer, _SIBLING)
        if kept is not None and (client := await services.clients.find(tx, kept.client_id)) is not None:
            if client.audiences != audiences:  # served at another port than the last time
                await services.clients.update(tx, client, {"audiences": audiences})
            return kept
        await services.access.define(tx, _SIBLING_SCOPES)
        await services.access.grant(tx, "user", _SIBLING_SCOPES)
        new = NewClient(
            name="Demo",
            first_party=True,
            token_endpoint_auth_method=NO_AUTHENTICATION,
            grant_types=("password", "refresh_token"),
            scope=_SCOPES,
            audiences=audiences,
        )
        client, _ = await services.clients.register(tx, new)
        password = secrets.token_urlsafe(12)
        email = f"{_USERNAME}@example.org"
        hashed = await services.users.prepare_password(Secret(password), names=(_USERNAME, email))
        known = await services.users.by_name(tx, _USERNAME)
        if known is None:
            known = await services.users.create(
                tx, username=_USERNAME, email=email, role="user", password_hash=hashed, verified=True
            )
        else:
            await services.users.set_password(tx, known.id, hashed)
        await services.audit.record(
            tx, "demo.created", origin=None, actor=ACTOR, target=str(known.id), client_id=client.id
        )
        return Demo(_USERNAME, password, client.id)

    demo = asyncio.run(with_services(settings, work, keys=Keys.MADE))
    if demo != kept:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"username": demo.username, "password": demo.password, "client_id": demo.client_id}, file)
    return demo


def _as_json(settings: Settings, demo: Demo) -> str:
    return json.dumps(
        {
            "issuer": settings.public_issuer,
            "username": demo.username,
            "password": demo.password,
            "client_id": demo.client_id,
        }
    )


def _as_text(settings: Settings, demo: Demo) -> str:
    base = settings.public_issuer
    return f"""
Serving at {base}   (interactive documentation: {base}/docs)

  user {demo.username}, password {demo.password}, client {demo.client_id}

Sign in:
  TOKENS=$(curl -s {base}/token -d grant_type=password -d client_id={demo.client_id} \\
    -d username={demo.username} -d password={demo.password}); echo "$TOKENS"
  field() {{ echo "$TOKENS" | python3 -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }}

Who am I:
  curl -s {base}/v1/users/me -H "Authorization: Bearer $(field access_token)"; echo

Refresh (each refresh token works once; using one twice ends the session):
  TOKENS=$(curl -s {base}/token -d grant_type=refresh_token -d client_id={demo.client_id} \\
    -d refresh_token=$(field refresh_token)); echo "$TOKENS"

The keys that siblings verify with:
  curl -s {base}/.well-known/jwks.json; echo
"""
