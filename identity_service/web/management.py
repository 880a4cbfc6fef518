"""What the platform asks, on a listener of its own: probes and metrics, which no client of ours may see or starve."""

import asyncio
from collections.abc import Sequence
from typing import final

from identity_service.infra import telemetry
from identity_service.web.asgi import NO_STORE, Receive, Reply, Scope, Send
from identity_service.web.edge import PROTECTION, Endpoint
from identity_service.web.health import Liveness, Readiness

_EXPOSITION = (b"content-type", telemetry.EXPOSITION_TYPE.encode("ascii"))


@final
class Metrics:
    """`GET /metrics`: what is counted in this process, in the text format of Prometheus."""

    methods: Sequence[str] = ("GET", "HEAD")
    quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one scrape; on a thread, since writing down a few thousand series takes tens of milliseconds."""
        shown = await asyncio.to_thread(telemetry.exposition)
        await Reply(200, shown, (_EXPOSITION, *NO_STORE)).send(send, head=scope["method"] == "HEAD")


@final
class Management:
    """The application of the management listener: it knows its three paths, and asks nobody who is calling."""

    def __init__(self, readiness: Readiness) -> None:
        self._endpoints: dict[str, Endpoint] = {"/healthz": Liveness(), "/readyz": readiness, "/metrics": Metrics()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await Reply(404, b"", (*NO_STORE, *PROTECTION)).send(send)
        elif scope["method"] not in endpoint.methods:
            await Reply(405, b"", (*NO_STORE, *PROTECTION, (b"allow", b"GET, HEAD"))).send(send)
        else:
            await endpoint(scope, receive, send)
