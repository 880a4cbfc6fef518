"""The commands that serve, and the one that prepares the database for it."""

import fcntl
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Annotated

import typer
import uvicorn

from identity_service.cli.common import DataDir, Refused, settings_for
from identity_service.infra import telemetry
from identity_service.infra.migrate import migrate as migrate_database
from identity_service.main import create_app
from identity_service.settings import Settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [IDENTITY_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [IDENTITY_PORT].")] = None,
    data_dir: DataDir = None,
) -> None:
    """Serve with the settings of the environment: one process, as many replicas as you like."""
    settings = settings_for(data_dir, host=host, port=port)
    telemetry.configure_logging(level=settings.log_level, as_json=settings.log_json)
    run_server(settings)


def migrate(data_dir: DataDir = None) -> None:
    """Bring the database to this version's schema; running it again changes nothing."""
    settings = settings_for(data_dir)
    telemetry.configure_logging(level="WARNING", as_json=settings.log_json, stream=sys.stderr)
    migrate_database(settings.database)
    typer.echo("The schema is up to date.")


class _Server(uvicorn.Server):
    """Says when it is ready to answer."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start listening; then set aside, for the garbage collector, what lives as long as the process."""
        await super().startup(sockets)
        if self.started:
            gc.collect()
            gc.freeze()
            self._when_ready()


def run_server(settings: Settings, *, when_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until a signal ends it; leaves the process with 3 when the start was refused."""
    with _only_one_on_sqlite(settings):
        if settings.metrics_port is not None:
            telemetry.serve_metrics(settings.metrics_port, settings.host)
        config = uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            http="httptools",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=settings.shutdown_grace,
        )
        server = _Server(config, when_ready)
        server.run()
    if not server.started:
        raise typer.Exit(3)


@contextmanager
def _only_one_on_sqlite(settings: Settings) -> Iterator[None]:
    """Keep a second server off the same SQLite file: its caches and limits would not know of ours."""
    if not settings.on_sqlite:
        yield
        return
    database = Path(settings.database.removeprefix("sqlite+aiosqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another server is running on {database}; use PostgreSQL for several") from None
        yield
