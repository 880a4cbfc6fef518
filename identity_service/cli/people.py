"""Commands about people."""

import uuid
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from identity_service.accounts.access import ADMINISTRATORS_LOCK
from identity_service.accounts.password_policy import PasswordRefused
from identity_service.accounts.refresh_families import Session
from identity_service.accounts.users import InvalidUser, NameTaken, State, User
from identity_service.cli.common import ACTOR, AsJson, DataDir, Keys, Refused, read_password, run, say
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import MailQueueFull
from identity_service.main import Services

app = typer.Typer(help="People.", no_args_is_help=True, rich_markup_mode=None)

PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]
Name = Annotated[str, typer.Argument(help="Username or address.")]

_MOST_NAMESAKES = 20
"""How many are looked at of the deleted users whose names begin like one; those who bore that very name come first."""


def _shown(user: User) -> dict[str, Any]:
    return {
        "id": str(user.id),
        "username": user.username,
        "email": user.email,
        "email_verified": user.email_verified_at is not None,
        "role": user.role,
        "enabled": user.enabled,
        "created_at": user.created_at.isoformat(),
        **({"deleted_at": user.deleted_at.isoformat()} if user.deleted_at else {}),
    }


def _line(user: User) -> str:
    state = "deleted" if user.deleted_at else "enabled" if user.enabled else "disabled"
    return f"{user.id}  {user.username:<24} {user.role:<12} {state:<9} {user.email}"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The username: a-z, 0-9, dot, underscore, hyphen.")],
    email: Annotated[str, typer.Option(help="The address.")],
    role: Annotated[str, typer.Option(help="The role.")] = "user",
    password_stdin: PasswordStdin = False,
    verified: Annotated[bool, typer.Option("--verified/--unverified", help="Whether the address is proven.")] = True,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Create a user."""
    password = read_password(from_stdin=password_stdin)

    async def work(services: Services, tx: Transaction) -> User:
        try:
            services.users.check_names(name, email)
            hashed = await services.users.prepare_password(password, names=(name, email))
            user = await services.users.create(
                tx, username=name, email=email, role=role, password_hash=hashed, verified=verified
            )
        except (InvalidUser, PasswordRefused) as error:
            raise Refused(str(error)) from None
        except NameTaken:
            raise Refused("the username or the address belongs to somebody already") from None
        await _record(services, tx, "user.created", user.id, {"role": role})
        return user

    user = run(data_dir, work)
    say(_shown(user), _line(user), as_json=as_json)


@app.command("list")
def list_users(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most to print; the newest come first.")] = 100,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="List those who were deleted and can be restored, by the names they had.")
    ] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List users."""

    async def work(services: Services, tx: Transaction) -> list[User]:
        state = State.DELETED if deleted else None
        return (await services.users.search(tx, state=state, limit=limit)).users

    found = run(data_dir, work)
    say([_shown(user) for user in found], "\n".join(map(_line, found)), as_json=as_json)


async def _find(services: Services, tx: Transaction, name: str) -> User:
    user = await services.users.by_name(tx, name)
    if user is None:
        raise Refused("there is no such user")
    return user


async def _check_not_last(services: Services, tx: Transaction, user: User) -> None:
    """Raise Refused if nobody could do everything without this user; the caller holds the administrators' lock."""
    if await services.users.is_last_super_admin(tx, user):
        raise Refused("nobody could do everything any more: make another super_admin first")


async def _record(
    services: Services, tx: Transaction, event: str, user_id: uuid.UUID, detail: Mapping[str, Any] | None = None
) -> None:
    await services.audit.record(tx, event, origin=None, actor=ACTOR, target=str(user_id), detail=detail)


def identified(text: str) -> uuid.UUID | None:
    """Return the id that a text is, None for what is none."""
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


@app.command()
def disable(name: Name, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Disable a user and end all their sessions."""

    async def work(services: Services, tx: Transaction) -> User:
        await tx.lock(ADMINISTRATORS_LOCK)
        user = await _find(services, tx, name)
        await _check_not_last(services, tx, user)
        await services.users.set_enabled(tx, user.id, False)
        await _record(services, tx, "user.disabled", user.id)
        return await _find(services, tx, name)

    user = run(data_dir, work)
    say(_shown(user), _line(user), as_json=as_json)


@app.command()
def enable(name: Name, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Enable a user again; sessions that ended stay ended."""

    async def work(services: Services, tx: Transaction) -> User:
        user = await _find(services, tx, name)
        await services.users.set_enabled(tx, user.id, True)
        await _record(services, tx, "user.enabled", user.id)
        return await _find(services, tx, name)

    user = run(data_dir, work)
    say(_shown(user), _line(user), as_json=as_json)


@app.command("set-password")
def set_password(
    name: Name,
    password_stdin: PasswordStdin = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Set a new password and end all the user's sessions."""
    password = read_password(from_stdin=password_stdin)

    async def work(services: Services, tx: Transaction) -> User:
        user = await _find(services, tx, name)
        try:
            hashed = await services.users.prepare_password(password, names=(user.username, user.email))
        except PasswordRefused as error:
            raise Refused(str(error)) from None
        await services.users.set_password(tx, user.id, hashed)
        await _record(services, tx, "user.password_set", user.id)
        for known_as in (user.username, user.email):
            await services.throttle.forgive(known_as)
        return user

    user = run(data_dir, work, keys=Keys.MADE)
    say(_shown(user), _line(user), as_json=as_json)


@app.command()
def role(
    name: Name,
    role: Annotated[str, typer.Argument(help="The role that the user shall have.")],
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Give a user another role; at the service's own API they gain and lose with it at once."""

    async def work(services: Services, tx: Transaction) -> User:
        await tx.lock(ADMINISTRATORS_LOCK)
        user = await _find(services, tx, name)
        if role != user.role:
            await _check_not_last(services, tx, user)
            try:
                await services.users.set_role(tx, user.id, role)
            except InvalidUser as error:
                raise Refused(str(error)) from None
            await _record(services, tx, "user.role_changed", user.id, {"from": user.role, "to": role})
        return await _find(services, tx, name)

    user = run(data_dir, work)
    say(_shown(user), _line(user), as_json=as_json)


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="Username or address; with --purge also the id of a deleted user.")],
    purge: Annotated[bool, typer.Option("--purge", help="Leave nothing that could be restored.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Delete a user: all that is theirs ends, and their names are free. `users restore` can undo it for a while."""

    async def work(services: Services, tx: Transaction) -> User:
        await tx.lock(ADMINISTRATORS_LOCK)
        user_id = identified(name) if purge else None
        user = await services.users.locked(tx, user_id, deleted=True) if user_id is not None else None
        if user is None or user.deleted_at is None:
            user = await _find(services, tx, name)
        await _check_not_last(services, tx, user)
        await services.email_tokens.revoke_all(tx, user.id)
        if purge:
            await services.users.erase(tx, user.id)
        else:
            await services.users.delete(tx, user.id)
        await _record(services, tx, "user.purged" if purge else "user.deleted", user.id)
        return user

    user = run(data_dir, work)
    text = f"{user.id}  {user.username}: nothing is left" if purge else f"{user.id}  {user.username}: deleted"
    say({"id": str(user.id), "username": user.username, "purged": purge}, text, as_json=as_json)


_NOBODY_DELETED = "there is no such deleted user; `identity-service users list --deleted` shows those there are"


async def _deleted(services: Services, tx: Transaction, name: str) -> uuid.UUID:
    """Return the id of the deleted user who had this name; raises Refused, also where several had it."""
    wanted = name.lower()
    found = (await services.users.search(tx, q=wanted, state=State.DELETED, limit=_MOST_NAMESAKES)).users
    ids = [user.id for user in found if wanted in (user.username, user.email.lower())]
    if not ids:
        raise Refused(_NOBODY_DELETED)
    if len(ids) > 1:
        raise Refused(f"several deleted users had that name, say which: {', '.join(map(str, ids))}")
    return ids[0]


@app.command()
def restore(
    name: Annotated[str, typer.Argument(help="The id of the deleted user, or the username or address they had.")],
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Undo a deletion. The names come back; sessions, API keys and the password do not."""

    async def work(services: Services, tx: Transaction) -> User:
        try:
            user = await services.users.restore(tx, identified(name) or await _deleted(services, tx, name))
        except LookupError:
            raise Refused(_NOBODY_DELETED) from None
        except NameTaken:
            raise Refused("somebody took the username or the address meanwhile") from None
        await services.api_keys.revoke_all(tx, user.id)
        await _record(services, tx, "user.restored", user.id)
        return user

    user = run(data_dir, work)
    say(_shown(user), _line(user), as_json=as_json)


@app.command()
def sessions(
    name: Name,
    end: Annotated[bool, typer.Option("--end", help="Sign the user out everywhere.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List where a user is signed in, the most recently used first; with --end, what has just ended."""

    async def work(services: Services, tx: Transaction) -> list[Session]:
        user = await _find(services, tx, name)
        held = await services.families.sessions(tx, user.id)
        if end:
            await services.users.end_sessions(tx, user.id)
            await _record(services, tx, "sessions.ended", user.id)
        return held

    held = run(data_dir, work)
    shown = [
        {
            "id": str(session.id),
            "client_id": session.client_id,
            "user_agent": session.user_agent,
            "network": session.network,
            "created_at": session.created_at.isoformat(),
            "last_used_at": session.last_used_at.isoformat(),
            "expires_at": session.expires_at.isoformat(),
        }
        for session in held
    ]
    lines = [
        f"{session.id}  {session.last_used_at:%Y-%m-%d %H:%M}  {session.network or '-':<20} {session.client_name}"
        for session in held
    ]
    say(shown, "\n".join(lines), as_json=as_json)


@app.command("force-reset")
def force_reset(name: Name, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """
    Forget a user's password and end all their sessions and API keys.

    Where mail can be sent, a mail asks for a new password.
    """

    async def work(services: Services, tx: Transaction) -> tuple[User, bool]:
        await tx.lock(ADMINISTRATORS_LOCK)
        user = await _find(services, tx, name)
        if user.has_password:  # who has none could do nothing before either, and may need the mail once more
            await _check_not_last(services, tx, user)
        epoch = await services.users.clear_password(tx, user.id)
        await services.api_keys.revoke_all(tx, user.id)
        await _record(services, tx, "user.password_reset_forced", user.id)
        if services.mailer is None or not user.enabled or epoch is None:
            return user, False
        token_id = await services.email_tokens.issue(
            tx, purpose="reset_password", user_id=user.id, epoch=epoch, email=user.email
        )
        try:
            await services.outbox.enqueue(
                tx, template="reset_password", recipient=user.email, context={}, token_id=token_id
            )
        except MailQueueFull:  # whoever fills the queue must not keep a stolen password alive
            return user, False
        return user, True

    user, mail_sent = run(data_dir, work, keys=Keys.MADE)
    hint = (
        "a mail with a link is queued"
        if mail_sent
        else f"now run `identity-service users set-password {user.username}`"
    )
    say({**_shown(user), "mail_sent": mail_sent}, f"{_line(user)}\n{hint}", as_json=as_json)
