"""Commands about people."""

from typing import Annotated, Any

import typer

from identity_service.accounts.password_policy import PasswordRefused
from identity_service.accounts.users import InvalidUser, NameTaken, User
from identity_service.cli.common import ACTOR, AsJson, DataDir, Refused, read_password, run, say
from identity_service.infra.database import Transaction
from identity_service.main import Services

app = typer.Typer(help="People.", no_args_is_help=True, rich_markup_mode=None)

PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]


def _shown(user: User) -> dict[str, Any]:
    return {
        "id": str(user.id),
        "username": user.username,
        "email": user.email,
        "email_verified": user.email_verified_at is not None,
        "role": user.role,
        "enabled": user.enabled,
        "created_at": user.created_at.isoformat(),
    }


def _line(user: User) -> str:
    return f"{user.id}  {user.username:<24} {user.role:<12} {'enabled' if user.enabled else 'disabled':<9} {user.email}"


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
        await services.audit.record(
            tx, "user.created", origin=None, actor=ACTOR, target=str(user.id), detail={"role": role}
        )
        return user

    user = run(data_dir, work)
    say(_shown(user), _line(user), as_json=as_json)


@app.command("list")
def list_users(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most to print; the newest come first.")] = 100,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List users."""

    async def work(services: Services, tx: Transaction) -> list[User]:
        return await services.users.all(tx, limit=limit)

    found = run(data_dir, work)
    say([_shown(user) for user in found], "\n".join(map(_line, found)), as_json=as_json)


def _set_enabled(name: str, enabled: bool, data_dir: Any) -> User:
    async def work(services: Services, tx: Transaction) -> User:
        user = await _find(services, tx, name)
        await services.users.set_enabled(tx, user.id, enabled)
        event = "user.enabled" if enabled else "user.disabled"
        await services.audit.record(tx, event, origin=None, actor=ACTOR, target=str(user.id))
        return await _find(services, tx, name)

    return run(data_dir, work)


async def _find(services: Services, tx: Transaction, name: str) -> User:
    user = await services.users.by_name(tx, name)
    if user is None:
        raise Refused("there is no such user")
    return user


@app.command()
def disable(
    name: Annotated[str, typer.Argument(help="Username or address.")], as_json: AsJson = False, data_dir: DataDir = None
) -> None:
    """Disable a user and end all their sessions."""
    user = _set_enabled(name, False, data_dir)
    say(_shown(user), _line(user), as_json=as_json)


@app.command()
def enable(
    name: Annotated[str, typer.Argument(help="Username or address.")], as_json: AsJson = False, data_dir: DataDir = None
) -> None:
    """Enable a user again; sessions that ended stay ended."""
    user = _set_enabled(name, True, data_dir)
    say(_shown(user), _line(user), as_json=as_json)


@app.command("set-password")
def set_password(
    name: Annotated[str, typer.Argument(help="Username or address.")],
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
        await services.audit.record(tx, "user.password_set", origin=None, actor=ACTOR, target=str(user.id))
        for known_as in (user.username, user.email):
            await services.throttle.forgive(known_as)
        return user

    user = run(data_dir, work, keys=True)
    say(_shown(user), _line(user), as_json=as_json)
