"""Commands about keys, the audit trail and what has expired."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from identity_service.cli.common import ACTOR, AsJson, DataDir, Refused, opened, run, say, settings_for
from identity_service.infra import telemetry
from identity_service.infra.database import Transaction
from identity_service.main import Services
from identity_service.oauth.signing_keys import KeyRecord, KeyState, NewKey, NoUsableKey
from identity_service.oauth.signing_keys.material import generate

app = typer.Typer(help="Signing keys and the master key.", no_args_is_help=True, rich_markup_mode=None)
audit_app = typer.Typer(help="The audit trail.", no_args_is_help=True, rich_markup_mode=None)


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
    rows = run(data_dir, _schedule, keys=True)
    say(rows, _table(rows), as_json=as_json)


@app.command()
def rotate(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Let the next key sign as early as is safe, and say when that is."""

    chosen = run(data_dir, bring_forward, keys=True)
    say(
        _shown(chosen, KeyState.NEXT),
        f"{chosen.kid} signs from {chosen.activates_at.isoformat()}; caches will have it by then",
        as_json=as_json,
    )


async def bring_forward(services: Services, tx: Transaction) -> KeyRecord:
    """Let the waiting key sign as early as is safe, and record it; return it. Raises Refused where none is waiting."""
    try:
        chosen = await services.signing_keys.rotate(tx)
    except NoUsableKey:
        raise Refused("no key is waiting; a running server makes one within seconds") from None
    await _record(services, tx, "key.rotation_scheduled", chosen)
    return chosen


async def withdraw(services: Services, tx: Transaction, kids: Sequence[str], spare: Sequence[NewKey]) -> list[str]:
    """Take compromised keys out of use, put others in their place as needed, and record it; return those that went."""
    gone = await services.signing_keys.compromise(tx, kids, spare)
    for kid in gone:
        await services.audit.record(tx, "key.compromised", origin=None, actor=ACTOR, target=kid)
    made = {key.kid for key in spare}
    for record, _ in await services.signing_keys.describe(tx):
        if record.kid in made:
            await _record(services, tx, "key.created", record)
    return gone


async def _record(services: Services, tx: Transaction, event: str, key: KeyRecord) -> None:
    detail = {"activates_at": key.activates_at.isoformat()}
    await services.audit.record(tx, event, origin=None, actor=ACTOR, target=key.kid, detail=detail)


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
        return await withdraw(services, tx, chosen, spare), await _schedule(services, tx)

    bits = settings_for(data_dir).signing_key_bits
    spare = [generate(bits), generate(bits)]  # before any lock is taken: a large key can take seconds
    hit, rows = run(data_dir, work, keys=True)
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

    done = run(data_dir, work, keys=True)
    say(done, f"{done['data_keys']} data keys and {done['signing_keys']} signing keys wrapped anew", as_json=as_json)


@audit_app.command("list")
def list_audit(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most to print; the newest come first.")] = 100,
    event: Annotated[str | None, typer.Option(help="Only this event.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List audit rows."""

    async def work(services: Services, tx: Transaction) -> list[dict[str, Any]]:
        rows = await services.audit.recent(tx, limit=limit, event=event)
        return [{**row._mapping, "at": row.at.isoformat()} for row in rows]

    rows = run(data_dir, work)
    lines = [f"{row['at']}  {row['event']:<28} {row['actor'] or '-'} → {row['target'] or '-'}" for row in rows]
    say(rows, "\n".join(lines), as_json=as_json)


def cleanup(
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Rows deleted in one transaction.")] = 1000,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Delete what has expired for good, in small transactions."""
    settings = settings_for(data_dir)
    telemetry.configure_logging(level="WARNING", as_json=settings.log_json, stream=sys.stderr)

    async def main() -> dict[str, int]:
        async with opened(settings) as services:
            return {
                "refresh_families": await _clean_up(services, lambda tx: services.families.clean_up(tx, batch=batch)),
                "revoked_tokens": await _clean_up(services, lambda tx: services.issued.clean_up(tx, batch=batch)),
            }

    deleted = asyncio.run(main())
    text = f"{deleted['refresh_families']} families and {deleted['revoked_tokens']} revoked tokens deleted, all expired"
    say(deleted, text, as_json=as_json)


async def _clean_up(services: Services, one_batch: Callable[[Transaction], Awaitable[int]]) -> int:
    """Delete batch after batch, each in a transaction of its own, until there is nothing left."""
    deleted = 0
    while done := await services.db.run(one_batch):
        deleted += done
    return deleted
