"""The command that serves."""

import fcntl
import gc
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Annotated, Any

import structlog
import typer
import uvicorn

from identity_service.cli.common import Refused, settings_for
from identity_service.infra import telemetry
from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.runtime.envelope import MasterKeyError
from identity_service.main import create_app
from identity_service.settings import Settings, UnsafeSettings
from identity_service.web.asgi import AsgiApp, Receive, Scope, Send
from identity_service.web.protocol import BoundedProtocol

log = structlog.get_logger(__name__)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [IDENTITY_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [IDENTITY_PORT].")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Serve the database of `dev`.")] = None,
) -> None:
    """
    Serve with the settings of the environment: one process, as many replicas as you like.

    Only `--data-dir` makes it a development server; the variable alone does not, nor does a forgotten database.
    """
    settings = settings_for(data_dir, host=host, port=port)
    telemetry.configure_logging(level=settings.log_level, as_json=settings.log_json)
    with only_one_on_sqlite(settings):
        run_server(settings)


_REFUSALS = (UnsafeSettings, MasterKeyError, DatabaseUnavailable)


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
            log.info("service.started", host=self.config.host, port=self.config.port)
            self._when_ready()


def run_server(
    settings: Settings, *, when_ready: Callable[[], None] = lambda: None, say: Callable[[str], None] = typer.echo
) -> None:
    """
    Serve until a signal ends it, with 0; with 3 if the address cannot be had.

    `say` hears of the mails that a development server writes instead of sending them.
    Raises Refused, UnsafeSettings, MasterKeyError, DatabaseUnavailable.
    """
    if settings.metrics_port is not None:
        try:
            telemetry.serve_metrics(settings.metrics_port, settings.host)
        except OSError as error:
            raise Refused(f"the metrics port cannot be opened: {error.strerror}") from None
    refusals: list[Exception] = []
    config = server_config(
        _telling_refusals(create_app(settings, say=say), refusals),
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_grace,
    )
    # The server hands a signal on when it has ended in good order; that is no accident, and ends with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        _Server(config, when_ready).run()
    except SystemExit:
        if refusals:
            raise refusals[0] from refusals[0].__cause__
        raise


def server_config(app: AsgiApp, **options: Any) -> uvicorn.Config:
    """Return how the HTTP server serves us; `options` say where and how long."""
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        **options,
    )


def _telling_refusals(app: AsgiApp, refusals: list[Exception]) -> AsgiApp:
    """Return the application; why it refused to start goes to `refusals` and not, as a traceback, to the log."""

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: MutableMapping[str, Any]) -> None:
            error = sys.exc_info()[1]
            if message["type"] == "lifespan.startup.failed" and isinstance(error, _REFUSALS):
                refusals.append(error)
                message = {"type": message["type"], "message": ""}
            await send(message)

        await app(scope, receive, sending)

    def guarded(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return lifespan(scope, receive, send) if scope["type"] == "lifespan" else app(scope, receive, send)

    return guarded


@contextmanager
def only_one_on_sqlite(settings: Settings) -> Iterator[None]:
    """Keep a second server off the same SQLite file: its caches and limits would not know of ours."""
    if (database := settings.sqlite_file) is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another server is running on {database}; stop it first, or use PostgreSQL") from None
        yield
