"""
A real nginx that does what an Ingress controller makes of our Ingress objects.

The translation is that of the F5 NGINX Ingress Controller as far as we use it: a server for each host, a location for
each path, its own headers, and the annotations where it writes them. Only TLS is left out: it says that it is there.
"""

import http.client
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, final

from tests.deploy.site import Document, dig
from tests.support.servers import free_port
from tests.support.tools import tool

Answer = tuple[int, dict[str, str], bytes]

_PATIENCE: Final = 30.0
_TEMPORARY: Final = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_OWN_HEADERS: Final = """
    proxy_set_header Host $host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Host $host;
    proxy_set_header X-Forwarded-Port $server_port;
    proxy_set_header X-Forwarded-Proto https;
"""


def cache_line(readme: str) -> str:
    """Return what deploy/README.md has people add to the controller's own configuration."""
    [line] = re.findall(r"^\s*(proxy_cache_path .+;)$", readme, re.M)
    return str(line)


def configuration(ingresses: Sequence[Document], upstreams: Mapping[str, int], *, port: int, http_snippet: str) -> str:
    """Return nginx's configuration for these Ingress objects; `upstreams` are the ports of the Services."""
    locations: dict[str, list[str]] = {}
    for ingress in ingresses:
        annotations = dig(ingress, "metadata", "annotations", default={})
        for rule in ingress["spec"]["rules"]:
            found = locations.setdefault(rule["host"], [])
            for path in dig(rule, "http", "paths", default=[]):
                upstream = upstreams[path["backend"]["service"]["name"]]
                found += _locations(
                    path["path"], exact=path["pathType"] == "Exact", upstream=upstream, **_words(annotations)
                )
    lines = [
        "worker_processes 1; pid nginx.pid; error_log stderr; user root;",
        "events { worker_connections 64; }",
        "http { access_log off;",
        *(f"{name}_temp_path {name};" for name in _TEMPORARY),
        http_snippet,
    ]
    for host, inside in locations.items():
        lines += [f"server {{ listen 127.0.0.1:{port}; server_name {host};", *inside, "location / { return 404; } }"]
    lines += [f"server {{ listen 127.0.0.1:{port} default_server; return 404; }}", "}"]
    return "\n".join(lines)


def _words(annotations: Mapping[str, str]) -> dict[str, str]:
    return {
        "snippet": annotations.get("nginx.org/location-snippets", ""),
        "body": annotations.get("nginx.org/client-max-body-size", "1m"),
        "connect": annotations.get("nginx.org/proxy-connect-timeout", "60s"),
        "read": annotations.get("nginx.org/proxy-read-timeout", "60s"),
    }


def _locations(
    path: str, *, exact: bool, upstream: int, snippet: str, body: str, connect: str, read: str
) -> Iterator[str]:
    inside = f"""{{
    proxy_http_version 1.1;
    {snippet}
    proxy_connect_timeout {connect};
    proxy_read_timeout {read};
    client_max_body_size {body};
    {_OWN_HEADERS}
    proxy_pass http://127.0.0.1:{upstream};
    }}"""
    yield f"location = {path} {inside}"
    if not exact:
        yield f"location {path.rstrip('/')}/ {inside}"


def ask(
    port: int, host: str, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes = b""
) -> Answer:
    """Send one request with the path as it is; return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        given = {"Host": host, **(headers or {}), **({"Content-Length": str(len(body))} if body else {})}
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@final
class Nginx:
    """A running nginx; leave it with a `with` block."""

    def __init__(self, folder: Path, ingresses: Sequence[Document], upstreams: Mapping[str, int], readme: str) -> None:
        """Start it. Raises RuntimeError with what it said if it does not answer."""
        for name in _TEMPORARY:
            (folder / name).mkdir()
        snippet = cache_line(readme).replace("/var/cache/nginx/identity", str(folder / "cache"))
        self._log = folder / "said"
        for attempts_left in (2, 1, 0):
            self.port = free_port()
            text = configuration(ingresses, upstreams, port=self.port, http_snippet=snippet)
            (folder / "nginx.conf").write_text(text, "utf-8")
            try:
                self._start(folder)
            except RuntimeError as error:  # a stranger may have been quicker to take the port
                if not attempts_left or "address already in use" not in str(error).lower():
                    raise
            else:
                return

    def _start(self, folder: Path) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [tool("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def ask(self, host: str, path: str, **request: Any) -> Answer:
        """Send it one request, as `ask` does."""
        return ask(self.port, host, path, **request)

    def close(self) -> None:
        """End it and wait for that."""
        self._process.terminate()
        self._process.wait(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self.ask("nobody.example", "/")
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)
            else:
                if self._process.poll() is None:  # or it was somebody else who answered
                    return
        raise RuntimeError(f"nginx did not start: {self._log.read_text('utf-8', errors='replace')}")
