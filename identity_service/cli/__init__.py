"""
Operator commands.

Every command takes its settings from the environment (`IDENTITY_…`); with `--data-dir`, or `IDENTITY_DATA_DIR`, it
works on the database of `identity-service dev` in that directory. What changes something is audited as done by `cli`.
"""

import os
import sys

import typer

from identity_service.cli import audit, confirming, dev, imports, keys, migrating, people, registry, restoring, serving
from identity_service.cli.common import Refused
from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.runtime.envelope import MasterKeyError
from identity_service.settings import UnsafeSettings

app = typer.Typer(
    help="Run and operate the identity service.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
app.command("dev")(dev.dev)
app.command("serve")(serving.serve)
app.command("migrate")(migrating.migrate)
app.command("cleanup")(keys.cleanup)
app.command("after-restore")(restoring.after_restore)
app.command("confirm-api-keys")(confirming.confirm_api_keys)
people.app.command("import")(imports.import_users)
people.app.command("export")(imports.export_users)
app.add_typer(people.app, name="users")
app.add_typer(registry.clients_app, name="clients")
app.add_typer(registry.roles_app, name="roles")
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")


def main() -> None:
    """Run a command; say in a sentence what stands in its way, and end with 1 for a refusal, 2 for bad settings."""
    os.umask(0o077)  # whatever a command writes, a database or a key, is for its owner only
    try:
        "".join(sys.argv).encode()
        app()
    except UnicodeEncodeError:
        typer.echo("identity-service: the arguments are not valid UTF-8", err=True)
        sys.exit(1)
    except (UnsafeSettings, MasterKeyError) as error:
        typer.echo(f"identity-service will not start:\n{error}", err=True)
        sys.exit(2)
    except Refused as error:
        typer.echo(f"identity-service: {error}", err=True)
        sys.exit(1)
    except DatabaseUnavailable as error:
        typer.echo(f"identity-service: the database cannot be reached: {_reason(error)}", err=True)
        typer.echo("If the command was to change something, look whether it did before you repeat it.", err=True)
        sys.exit(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        typer.echo(f"identity-service: {error.strerror or type(error).__name__}{where}", err=True)
        sys.exit(1)


def _reason(error: DatabaseUnavailable) -> str:
    """Return the driver's own first line, which names the host and never the password, or our word for it."""
    cause = getattr(error.__cause__, "orig", error.__cause__)
    return str(cause or error).strip().partition("\n")[0]
