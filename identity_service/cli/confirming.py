"""Giving back the API keys that putting a restored database right has suspended."""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from identity_service.accounts.api_keys import ApiKey
from identity_service.cli.common import ACTOR, AsJson, DataDir, Refused, opened, quiet_settings, say
from identity_service.infra.database import Transaction
from identity_service.infra.installation import read_installation, restore_number
from identity_service.main import Services


def confirm_api_keys(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="The keys to give back.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Give back every key that can be.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """
    List the API keys that a restore has suspended, or give back some of them, or all.

    Ask their owners which they had revoked. Who was disabled, or chose another password, since the restore gets none
    back; keys that nobody confirms are deleted after 90 days.
    """
    if ids and every:
        raise Refused("name keys, or say --all")
    settings = quiet_settings(data_dir)

    async def main() -> tuple[list[ApiKey], list[str]]:
        async with opened(settings) as services:
            found = await services.db.run(read_installation)
            if found is not None and not found.at_home:
                raise Refused("run `identity-service after-restore` first")
            if found is None or not found.restores:
                raise Refused("this database was never put right after a restore: no key is suspended")
            at = found.restores[-1]
            if not (ids or every):
                epoch = restore_number(at)
                return list(await services.db.run(lambda tx: services.api_keys.suspended(tx, at=at, epoch=epoch))), []
            returned = await _give_back(services, at, ids)
            return returned, sorted(set(ids or ()) - {key.id for key in returned})

    keys, left = asyncio.run(main())
    given = bool(ids or every)
    lines = [f"{key.id}  …{key.last4}  {key.owner}  {key.created_at:%Y-%m-%d}  {key.name}" for key in keys]
    lines += [
        f"{key_id}: not given back; it is not suspended, has expired, or its owner has changed" for key_id in left
    ]
    lines.append(f"{len(keys)} API keys {'given back' if given else 'are suspended, and can be given back'}")
    say(
        {"given_back" if given else "suspended": [_shown(key) for key in keys], "left": left},
        "\n".join(lines),
        as_json=as_json,
    )
    if left:
        raise typer.Exit(1)


async def _give_back(services: Services, at: datetime, ids: Sequence[str] | None) -> list[ApiKey]:
    """Give keys back, a batch in each transaction, and say so of each key; return them."""
    returned: list[ApiKey] = []

    async def one_batch(tx: Transaction) -> Sequence[ApiKey]:
        after = returned[-1].id if returned else ""
        keys = await services.api_keys.give_back(tx, at=at, epoch=restore_number(at), ids=ids or None, after=after)
        for key in keys:
            await services.audit.record(tx, "api_key.confirmed", origin=None, actor=ACTOR, target=key.id)
        return keys

    while keys := await services.db.run(one_batch):
        returned += keys
    return returned


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "user_id": str(key.user_id) if key.user_id else None,
        "client_id": key.client_id,
        "scope": list(key.scope),
        "last4": key.last4,
        "created_at": key.created_at.isoformat(),
        "last_used_at": key.last_used_at.isoformat() if key.last_used_at else None,
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
    }
