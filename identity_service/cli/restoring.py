"""What has to be done before a restored database is served."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from identity_service.accounts.access import ADMINISTRATORS_LOCK
from identity_service.accounts.bootstrap import close_bootstrap
from identity_service.accounts.users import User
from identity_service.cli.audit import parse_anchor
from identity_service.cli.common import ACTOR, AsJson, DataDir, Keys, Refused, opened, quiet_settings, say
from identity_service.cli.lost_trail import Act, Since, read_acts, since
from identity_service.cli.people import identified
from identity_service.cli.serving import only_one_on_sqlite
from identity_service.infra.audit import RESTORED, Anchor, ChainBroken, Sealed, Standing
from identity_service.infra.database import Transaction
from identity_service.infra.installation import (
    Installation,
    mark_installation,
    other_sessions,
    read_installation,
    restore_number,
)
from identity_service.main import Services, load_data_keys
from identity_service.oauth.signing_keys import Actor, KeyState, NewKey
from identity_service.oauth.signing_keys.material import generate

_BY_COMMAND = Actor(ACTOR)
_TOLERANCE = timedelta(minutes=2)  # by which clocks may differ
_PATIENCE = 20  # looks, a fifth of a second apart, until connections that are being closed are gone
_UNKNOWABLE = """What was done between the backup and the restore is undone, and nobody here can know of it. Look after:
  - users and clients that were disabled or deleted: --disabled-user, --deleted-user, --disabled-client, also later
  - passwords and addresses that were changed: the old ones are back (`identity-service users force-reset`)
  - roles and scopes that were withdrawn, client secrets that were replaced: they are back
  - people, clients and keys that were new: they are gone"""

Names = list[str] | None
Anchors = Annotated[
    list[Anchor] | None,
    typer.Option(
        "--anchor", parser=parse_anchor, metavar="SEQ:MAC", help="The newest seal that the log, or somebody, has kept."
    ),
]


@dataclass(frozen=True, slots=True)
class Orders:
    """What the operator knows that the database does not."""

    compromised: Sequence[str] = ()
    disabled_users: Sequence[str] = ()
    deleted_users: Sequence[str] = ()
    disabled_clients: Sequence[str] = ()
    anchors: Sequence[Anchor] = ()
    acts: Sequence[Act] = ()
    unnoticed: bool = False


@dataclass(slots=True)
class Done:
    """What was done; it is printed, and as JSON it has these names."""

    restored_at: str
    users: int = 0
    clients: int = 0
    links: int = 0
    api_keys_suspended: int = 0
    signing_keys_out_of_use: list[str] = field(default_factory=list)
    signing_key: str = ""
    compromised: list[str] = field(default_factory=list)
    users_disabled: list[str] = field(default_factory=list)
    users_deleted: list[str] = field(default_factory=list)
    users_purged: list[str] = field(default_factory=list)
    clients_disabled: list[str] = field(default_factory=list)
    api_keys_ended: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    to_look_at: list[dict[str, str | None]] = field(default_factory=list)
    rows_lost_after: int | None = None
    rows_known_to: int | None = None
    anchor: str | None = None
    chain_fault: str | None = None


# -- after-restore ----------------------------------------------------------------------------------------------------


def after_restore(
    compromised: Annotated[
        Names, typer.Option(metavar="KID", help="A signing key that can no longer be trusted, known here or not.")
    ] = None,
    disabled_user: Annotated[
        Names, typer.Option(metavar="NAME", help="Somebody who was disabled since the backup: username, address or id.")
    ] = None,
    deleted_user: Annotated[
        Names, typer.Option(metavar="NAME", help="Somebody who was deleted since the backup: username, address or id.")
    ] = None,
    disabled_client: Annotated[
        Names, typer.Option(metavar="ID", help="A client that was disabled or deleted since the backup.")
    ] = None,
    trail: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `audit export` wrote of the database that was lost, as JSON lines."),
    ] = None,
    anchors: Anchors = None,
    nothing_lost: Annotated[
        bool, typer.Option("--nothing-lost", help="It was moved while nothing was served: only note where it is now.")
    ] = False,
    unnoticed: Annotated[
        bool, typer.Option("--unnoticed", help="It was restored in a way that it cannot notice itself.")
    ] = False,
    servers_stopped: Annotated[
        bool, typer.Option("--servers-stopped", help="No server runs, whatever is connected: a pooler, say.")
    ] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """
    Put a restored database right, which is not served before: what was ended since the backup must not come back.

    Ends every session, token and mailed link, suspends the API keys, replaces the signing keys, and says in the audit
    trail what is lost. With --trail, what was taken away since the backup is taken away again. All of it is done, or
    nothing; after an interruption, run it again.
    """
    if nothing_lost and (unnoticed or trail or compromised or disabled_user or deleted_user or disabled_client):
        raise Refused("--nothing-lost goes with --anchor only: where nothing is lost, nothing is to be done again")
    orders = Orders(
        compromised=compromised or (),
        disabled_users=disabled_user or (),
        deleted_users=deleted_user or (),
        disabled_clients=disabled_client or (),
        anchors=anchors or (),
        acts=read_acts(trail) if trail is not None else (),
        unnoticed=unnoticed,
    )
    settings = quiet_settings(data_dir)
    # Before any lock is taken: a large key can take seconds.
    spare = [] if nothing_lost else [generate(settings.signing_key_bits) for _ in range(2)]

    async def main() -> Done | bool:
        async with AsyncExitStack() as stack:
            stack.enter_context(only_one_on_sqlite(settings))
            services = await stack.enter_async_context(opened(settings, Keys.READ))
            await services.db.run(lambda tx: load_data_keys(services, tx, actor=ACTOR))
            if not servers_stopped:
                await _check_alone(services)
            if nothing_lost:
                return await services.db.run(lambda tx: _move(services, tx, orders.anchors))
            return await services.db.run(lambda tx: _put_right(services, tx, orders, spare))

    done = asyncio.run(main())
    if isinstance(done, Done):
        say(asdict(done), "\n".join(_told(done)), as_json=as_json)
    else:
        text = "noted: this is where the database is served from now on" if done else "it stands where it stood"
        say({"moved": done}, text, as_json=as_json)


async def _check_alone(services: Services) -> None:
    """Raise Refused while servers are connected: they would go on with what they remember."""
    for _ in range(_PATIENCE):
        if not (others := await services.db.run(other_sessions)):
            return
        await asyncio.sleep(0.2)
    raise Refused(
        f"{others} other connections of the identity service are open: stop the servers first"
        " (if none runs, and a pooler keeps connections, say --servers-stopped)"
    )


async def _found(tx: Transaction) -> Installation:
    if (found := await read_installation(tx)) is None:
        raise Refused("the database's schema is older than this command: run `identity-service migrate` first")
    return found


async def _move(services: Services, tx: Transaction, anchors: Iterable[Anchor]) -> bool:
    """Note that this is where the database is served; return whether it was not before."""
    await tx.lock(ADMINISTRATORS_LOCK)
    found = await _found(tx)
    for anchor in anchors:
        if await services.audit_chain.compare(tx, anchor) in (Standing.BEYOND, Standing.OTHER):
            raise Refused(f"something is lost: the audit trail does not have the seal {anchor.seq}")
    if found.at_home:
        return False
    await services.audit.record(tx, "database.moved", origin=None, actor=ACTOR)
    await mark_installation(tx, restored_at=max(found.restores, default=None))
    return True


async def _put_right(services: Services, tx: Transaction, orders: Orders, spare: Sequence[NewKey]) -> Done:
    """Do all that is to be done, in one transaction; raises Refused."""
    await tx.lock(ADMINISTRATORS_LOCK)
    found = await _found(tx)
    if found.at_home and not orders.unnoticed:
        last = f", and was last put right at {found.restores[-1].isoformat()}" if found.restores else ""
        raise Refused(
            f"the database stands where it stood{last}. If it was restored all the same, to a point in time or as a"
            " copied file, say --unnoticed"
        )
    at = services.clock.now()
    newest = await services.audit.newest_at(tx)
    if newest is not None and newest > at + _TOLERANCE:
        raise Refused(f"the clock says {at.isoformat()}, and the audit trail has a row of {newest.isoformat()}")
    done = Done(at.isoformat())
    try:
        done.users = await services.users.end_all_sessions(tx, restore_number(at))
        done.clients = await services.clients.end_all_sessions(tx, restore_number(at))
    except ValueError as error:
        raise Refused(f"the clock says {at.isoformat()}, which cannot be: {error}") from None
    done.links = await services.email_tokens.revoke_every(tx)
    told = await since(tx, services.audit, orders.acts)
    done.api_keys_ended = told.ended_keys
    done.api_keys_suspended = await services.api_keys.suspend_all(
        tx, at=at, earlier=found.restores, for_good=told.ended_keys
    )
    await _replace_keys(services, tx, orders, told, spare, done)
    await _end_again(services, tx, orders, told, done)
    await close_bootstrap(tx, services.clock)
    if services.bootstrap is not None:
        await services.bootstrap.spend(tx)  # for servers of a version that does not know what the line above means
    await _resume_trail(services, tx, orders.anchors, at, done)
    await mark_installation(tx, restored_at=at)
    return done


async def _replace_keys(
    services: Services, tx: Transaction, orders: Orders, told: Since, spare: Sequence[NewKey], done: Done
) -> None:
    """
    Take every published key out of use, also the one that waits, for in the lost time it may have signed.

    So whatever was signed before is refused wherever the key set is asked for.
    """
    states = {record.kid: state for record, state in await services.signing_keys.describe(tx)}
    in_use = [kid for kid, state in states.items() if state not in (KeyState.COMPROMISED, KeyState.RETIRED)]
    done.signing_keys_out_of_use = await services.key_acts.compromise(tx, in_use, spare, _BY_COMMAND)
    done.signing_key = spare[0].kid
    named = dict.fromkeys([*orders.compromised, *told.compromised])
    done.compromised = [kid for kid in named if kid in states]
    done.unknown += [kid for kid in orders.compromised if kid not in states]


async def _end_again(services: Services, tx: Transaction, orders: Orders, told: Since, done: Done) -> None:
    """
    Do once more what the operator knows, and the trail tells, of the time since the backup.

    Who came in that time is not here: what the operator names is told then, what the trail names is no news.
    """
    record = services.audit.record
    for name in (*orders.disabled_users, *told.disabled_users):
        if (user := await _who(services, tx, name)) is not None and user.enabled:
            await services.users.set_enabled(tx, user.id, False)
            await record(tx, "user.disabled", origin=None, actor=ACTOR, target=str(user.id))
            done.users_disabled.append(str(user.id))
        elif user is None and name in orders.disabled_users:
            done.unknown.append(name)
    for name in (*orders.deleted_users, *told.deleted_users):
        if (user := await _who(services, tx, name)) is not None:
            await services.users.delete(tx, user.id)
            await record(tx, "user.deleted", origin=None, actor=ACTOR, target=str(user.id))
            done.users_deleted.append(str(user.id))
        elif name in orders.deleted_users:
            done.unknown.append(name)
    for name in told.purged_users:
        await _who(services, tx, name)  # for its refusal
        if (user_id := identified(name)) is not None and await services.users.erase(tx, user_id):
            await record(tx, "user.purged", origin=None, actor=ACTOR, target=name)
            done.users_purged.append(name)
    for client_id in (*orders.disabled_clients, *told.disabled_clients):
        if await services.clients.set_enabled(tx, client_id, False):
            await record(tx, "client.disabled", origin=None, actor=ACTOR, target=client_id)
            done.clients_disabled.append(client_id)
        elif client_id in orders.disabled_clients:
            done.unknown.append(client_id)
    for act in told.to_look_at:
        user_id = identified(act.target)
        user = await services.users.get(tx, user_id) if user_id is not None else None
        if user is not None or user_id is None:
            username = user.username if user is not None else None
            row = {"at": act.at.isoformat(), "event": act.event, "target": act.target, "username": username}
            done.to_look_at.append(row)


async def _who(services: Services, tx: Transaction, name: str) -> User | None:
    """Return whom a name or an id means; raises Refused for who has to stay."""
    user_id = identified(name)
    user = await services.users.get(tx, user_id) if user_id else await services.users.by_name(tx, name)
    if user is not None and await services.users.is_last_super_admin(tx, user):
        raise Refused(f"{name}: nobody could do everything any more; make another super_admin first")
    return user


async def _resume_trail(
    services: Services, tx: Transaction, anchors: Iterable[Anchor], at: datetime, done: Done
) -> None:
    """
    Let the audit trail go on behind what is lost, and say what was done.

    A chain that was tampered with is no reason not to end sessions: then the row is written like any other.
    """
    # Of what has rows of its own, or is long, the number: a row of the trail holds so much.
    detail = {
        "restored_at": done.restored_at,
        "users": done.users,
        "clients": done.clients,
        "links": done.links,
        "api_keys_suspended": done.api_keys_suspended,
        "api_keys_ended": len(done.api_keys_ended),
        "users_disabled": len(done.users_disabled),
        "users_deleted": len(done.users_deleted) + len(done.users_purged),
        "clients_disabled": len(done.clients_disabled),
        "compromised": done.compromised,
        "to_look_at": len(done.to_look_at),
    }
    try:
        newest = await services.audit_chain.newest(tx)
        beyond = [newest.seq]
        for anchor in anchors:
            match await services.audit_chain.compare(tx, anchor):
                case Standing.BEYOND:
                    beyond.append(anchor.seq)
                case Standing.OTHER:
                    raise Refused(
                        f"the audit trail has another seal at {anchor.seq}: either the anchor is another database's, or"
                        " servers have sealed rows since the restore. Leave it out, and keep it"
                    )
        known_to = max(beyond) if max(beyond) > newest.seq else None
        sealed: Sealed = await services.audit_chain.resume(
            tx, restore_number(at), actor=ACTOR, detail=detail, known_to=known_to
        )
    except ValueError as error:
        raise Refused(f"the clock says {at.isoformat()}, which cannot be: {error}") from None
    except ChainBroken as broken:
        await services.audit.record(tx, RESTORED, origin=None, actor=ACTOR, detail=detail)
        done.chain_fault = str(broken)
    else:
        done.rows_lost_after, done.rows_known_to = newest.seq, known_to
        done.anchor = f"{sealed.seq}:{sealed.mac.hex()}"


def _told(done: Done) -> list[str]:
    """Return what was done, and what is left to do, for people."""
    rows = f"after {done.rows_lost_after}" + (f", up to {done.rows_known_to} at least" if done.rows_known_to else "")
    lines = [
        f"This database can be served. Put right at {done.restored_at}:",
        f"  {done.users} users and {done.clients} clients: every session and every token has ended",
        f"  {done.links} mailed links have ended",
        f"  {done.api_keys_suspended} API keys are suspended; `identity-service confirm-api-keys` gives them back",
        *(f"  signing key {kid} is out of use" for kid in done.signing_keys_out_of_use),
        f"  signing key {done.signing_key} signs; siblings that cache the JWKS refuse its tokens for up to 15 minutes",
        *(f"  {user_id} is disabled again" for user_id in (*done.users_disabled, *done.clients_disabled)),
        *(f"  {user_id} is deleted again" for user_id in (*done.users_deleted, *done.users_purged)),
        "  no bootstrap secret works any more",
    ]
    if done.chain_fault:
        lines.append(f"  THE AUDIT TRAIL DOES NOT HOLD and could not go on: {done.chain_fault}")
    else:
        lines.append(f"  the audit trail has lost the rows {rows}; keep its new anchor: {done.anchor}")
    if done.unknown:
        lines.append(f"Not in this database, so nothing was done about: {', '.join(done.unknown)}")
    if done.to_look_at:
        lines.append("Undone by the restore, as the trail says; look at each:")
        lines += [f"  {row['at']}  {row['event']:<28} {row['username'] or row['target']}" for row in done.to_look_at]
    return [*lines, _UNKNOWABLE]
