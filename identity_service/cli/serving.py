"""The command that serves."""

import asyncio
import fcntl
import gc
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvicorn

from identity_service.cli.common import Refused, settings_for
from identity_service.infra import telemetry
from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.runtime.envelope import MasterKeyError
from identity_service.main import Application, create_app
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


_DESCRIPTORS = 200  # for everything but connections of clients: databases, logs, the management listener
_TICK = 0.1


class _Server(uvicorn.Server):
    """
    The public listener, with the management listener beside it from the first moment to the last.

    A signal first turns readiness red and makes each answer end its connection, for `delay` seconds in which whoever
    spreads the requests sends them elsewhere. Then nothing new is accepted, and what is in flight is finished.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: Application,
        *,
        delay: float,
        management: tuple[uvicorn.Server, socket.socket] | None,
        when_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._app = app
        self._delay = delay
        self._management = management
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening; then set aside, for the garbage collector, what lives as long as the process."""
        if self._management is not None:
            server, listener = self._management
            server.config.load()
            server.lifespan = server.config.lifespan_class(server.config)
            await server.startup([listener])
        await super().startup(sockets)
        if self.started:
            gc.collect()
            gc.freeze()
            log.info("service.started", host=self.config.host, port=self.config.port)
            self._when_ready()

    async def main_loop(self) -> None:
        """Serve until a signal comes, and then for as long as requests may still be sent here."""
        await super().main_loop()
        self._app.drain.begun = True
        log.info("service.draining", seconds=self._delay)
        clock = asyncio.get_running_loop()
        until = clock.time() + self._delay
        while clock.time() < until and not self.force_exit:
            await asyncio.sleep(_TICK)
            await self.on_tick(0)  # keeps the date in the answers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in flight, within the time for it; the probes are answered until the end."""
        try:
            await super().shutdown(sockets)
        finally:
            if self._management is not None:
                await self._management[0].shutdown()


def run_server(
    settings: Settings, *, when_ready: Callable[[], None] = lambda: None, say: Callable[[str], None] = typer.echo
) -> None:
    """
    Serve until a signal ends it, with 0; with 3 if the address cannot be had.

    `say` hears of the mails that a development server writes instead of sending them.
    Raises Refused, UnsafeSettings, MasterKeyError, DatabaseUnavailable.
    """
    app = create_app(settings, say=say)
    refusals: list[Exception] = []
    config = server_config(
        _telling_refusals(app, refusals),
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_grace,
        limit_concurrency=_room_for(settings.max_connections),
    )
    server = _Server(
        config,
        app,
        delay=settings.shutdown_delay,
        management=_management(app, settings.management_address),
        when_ready=when_ready,
    )
    # The server hands a signal on when it has ended in good order; that is no accident, and ends with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        server.run()
    except SystemExit:
        if refusals:
            raise refusals[0] from refusals[0].__cause__
        raise


def _management(app: Application, address: tuple[str, int] | None) -> tuple[uvicorn.Server, socket.socket] | None:
    """Return the management listener's server, and the socket that it has already. Raises Refused."""
    if address is None:
        return None
    try:
        family, _, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where[:2], family=family)
    except OSError as error:
        raise Refused(f"the management port cannot be opened: {error.strerror}") from None
    config = server_config(
        app.management, lifespan="off", timeout_graceful_shutdown=1, limit_concurrency=_DESCRIPTORS // 4
    )
    return uvicorn.Server(config), listener


def _room_for(connections: int) -> int:
    """Return how many connections there can be, at most as many as wanted; takes the file descriptors for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    room = max(wanted - _DESCRIPTORS, 1)
    if room < connections:
        log.warning("service.few_descriptors", limit=hard, connections=room)
    return room


def server_config(app: AsgiApp, **options: Any) -> uvicorn.Config:
    """Return how the HTTP server serves us; `options` say where and how long."""
    given: dict[str, Any] = {"lifespan": "on", **options}
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=BoundedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        **given,
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
