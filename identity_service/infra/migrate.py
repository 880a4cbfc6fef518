"""Bring a database to this version's schema. A command of its own in production; never a side effect of starting."""

from pathlib import Path

from sqlalchemy.engine import make_url


def _scripts() -> Path:
    """Return where the revisions are: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def migrate(url: str, *, revision: str = "head") -> None:
    """
    Run the revisions that `url`'s database lacks, up to `revision`; running it again changes nothing.

    Several processes at once queue up on PostgreSQL. Each revision is one transaction: a killed run leaves the last
    whole revision, and can be started again.
    """
    from alembic import command  # a server that only serves never needs it, nor the memory it takes
    from alembic.config import Config

    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        parsed = parsed.set(drivername="sqlite")
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", str(_scripts()))
    config.attributes["url"] = parsed
    command.upgrade(config, revision)
