"""Commands about keys and what has expired."""

import asyncio
from datetime import datetime
from typing import Annotated, Any

import typer

from identity_service.cli.common import (
    ACTOR,
    AsJson,
    DataDir,
    Keys,
    Refused,
    opened,
    quiet_settings,
    run,
    say,
    settings_for,
)
from identity_service.infra.database import Transaction
from identity_service.main import Services
from identity_service.main.jobs import clean_up
from identity_service.oauth.signing_keys import Actor, KeyRecord, KeyState, NoUsableKey
from identity_service.oauth.signing_keys.material import generate

app = typer.Typer(help="Signing keys and the master key.", no_args_is_help=True, rich_markup_mode=None)

_BY_COMMAND = Actor(ACTOR)


def _shown(record: KeyRecord, state: KeyState) -> dict[str, Any]:
    def text(moment: datetime | None) -> str | None:
        return moment.isoformat() if moment else None

    return {
        "kid": record.kid,
        "state": state.value,
        "published_at": text(record.published_at),
        "activates_at": text(record.activates_at),
        "retires_at": text(record.retires_at),
        "removed_at": text(record.removed_at),
        "compromised_at": text(record.compromised_at),
    }


async def _schedule(services: Services, tx: Transaction) -> list[dict[str, Any]]:
    return [_shown(record, state) for record, state in await services.signing_keys.describe(tx)]


def _table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{row['kid']}  {row['state']:<11} signs from {row['activates_at']}"
        + (f", leaves the JWKS {row['removed_at']}" if row["removed_at"] else "")
        for row in rows
    )


@app.command("list")
def list_keys(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List signing keys with their states and instants."""
    rows = run(data_dir, _schedule, keys=Keys.READ)
    say(rows, _table(rows), as_json=as_json)


@app.command()
def rotate(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Let the next key sign as early as is safe, and say when that is."""

    async def work(services: Services, tx: Transaction) -> KeyRecord:
        try:
            return await services.key_acts.bring_forward(tx, _BY_COMMAND)
        except NoUsableKey:
            raise Refused("no key is waiting; a running server makes one within seconds") from None

    chosen = run(data_dir, work, keys=Keys.MADE)
    say(
        _shown(chosen, KeyState.NEXT),
        f"{chosen.kid} signs from {chosen.activates_at.isoformat()}; caches will have it by then",
        as_json=as_json,
    )


@app.command(context_settings={"ignore_unknown_options": True})  # an id may begin with a hyphen
def compromise(
    kid: Annotated[str | None, typer.Argument(help="The key that can no longer be trusted.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every key that is published.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """
    Take a key out of the JWKS of every replica within seconds; the published next key takes over at once.

    With --all the new key has never been published: siblings that cache the JWKS refuse tokens for up to 15 minutes.
    """
    if (kid is None) != every:
        raise Refused("name one key, or say --all")

    async def work(services: Services, tx: Transaction) -> tuple[list[str], list[dict[str, Any]]]:
        states = {record.kid: state for record, state in await services.signing_keys.describe(tx)}
        in_use = [name for name, state in states.items() if state not in (KeyState.COMPROMISED, KeyState.RETIRED)]
        chosen = in_use if kid is None else [kid]
        if not set(chosen) <= states.keys():
            raise Refused("there is no such key")
        gone = await services.key_acts.compromise(tx, chosen, spare, _BY_COMMAND)
        return gone, await _schedule(services, tx)

    bits = settings_for(data_dir).signing_key_bits
    spare = [generate(bits), generate(bits)]  # before any lock is taken: a large key can take seconds
    hit, rows = run(data_dir, work, keys=Keys.MADE)
    text = "\n".join([*(f"{name} is out of use" for name in hit), _table(rows)])
    if every:
        text += "\nThe new key was never published: siblings that cache the JWKS refuse tokens for up to 15 minutes."
    say({"compromised": hit, "keys": rows}, text, as_json=as_json)


@app.command()
def rewrap(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Wrap every key with the first master key; afterwards the others may be removed. Changes no token."""

    async def work(services: Services, tx: Transaction) -> dict[str, int]:
        done = {
            "data_keys": await services.data_keys.rewrap(tx),
            "signing_keys": await services.signing_keys.rewrap(tx),
        }
        await services.audit.record(tx, "key.rewrapped", origin=None, actor=ACTOR, detail=done)
        return done

    done = run(data_dir, work, keys=Keys.MADE)
    say(done, f"{done['data_keys']} data keys and {done['signing_keys']} signing keys wrapped anew", as_json=as_json)


def cleanup(
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Rows deleted in one transaction.")] = 1000,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Delete what has expired for good, in small transactions."""
    settings = quiet_settings(data_dir)

    async def main() -> dict[str, int]:
        async with opened(settings) as services:
            return await clean_up(services, batch=batch)

    deleted = asyncio.run(main())
    text = ", ".join(f"{count} {table.replace('_', ' ')}" for table, count in deleted.items()) + " deleted, all expired"
    say(deleted, text, as_json=as_json)
