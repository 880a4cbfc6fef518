"""nginx before the replicas: connections to them are kept, and the keys come from its cache for as long as they say."""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from bench.service import BenchError
from tests.support.tools import ToolMissing, tool

_PATIENCE_SECONDS = 20.0
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

# No replica is counted out after a failure (max_fails=0): one that is being replaced refuses connections at once, and
# then the next one is asked; were both counted out, nobody would be. A request that has been sent is never sent to
# another one, except a GET. nginx keeps an idle connection for a shorter time than the service does (75 s), so that the
# service does not close it just when it is used again.
_UPSTREAM = """
  upstream {name} {{
    {servers}
    keepalive 64;
    keepalive_requests 1000000;
    keepalive_timeout 60s;
  }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 1000000;
    client_max_body_size 64k;
    location / {{ proxy_pass http://{name}; }}
    location /.well-known/ {{
      proxy_pass http://{name};
      proxy_cache keys;
      proxy_cache_key $host$uri;
      proxy_cache_lock on;
      proxy_cache_background_update on;
    }}
  }}"""
_CONFIGURATION = """
{user}
worker_processes auto;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  {temporary}
  proxy_cache_path cache levels=1 keys_zone=keys:1m max_size=16m inactive=2h use_temp_path=off;
  proxy_http_version 1.1;
  proxy_connect_timeout 1s;
  proxy_read_timeout 30s;
  proxy_set_header Connection "";
  proxy_set_header Host $host;
  proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
{fronts}
}}
"""


class Nginx:
    """
    A running nginx. `fronts` are the ports that it listens on, each with the ports of the replicas behind it.

    Leave it with a `with` block. Raises BenchError if it is not to be had, or does not start.
    """

    def __init__(self, folder: Path, fronts: Mapping[int, Sequence[int]]) -> None:
        self._folder = folder
        self._log = folder / "nginx.log"
        for name in _TEMPORARY:
            (folder / name).mkdir()
        self._write(fronts)
        try:
            program = tool("nginx")
        except ToolMissing as missing:
            raise BenchError(str(missing)) from None
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "-p", folder, "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not all(_listens(port) for port in fronts):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise BenchError(f"nginx did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        """The process id of the first of its processes."""
        return self._process.pid

    def lead_to(self, fronts: Mapping[int, Sequence[int]]) -> None:
        """Go on with other replicas behind the fronts; who is being served is served to the end."""
        self._write(fronts)
        self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End it and wait for that."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_SECONDS)
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        """Return the running nginx."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    def _write(self, fronts: Mapping[int, Sequence[int]]) -> None:
        servers = {port: [f"server 127.0.0.1:{one} max_fails=0;" for one in behind] for port, behind in fronts.items()}
        text = _CONFIGURATION.format(
            user=f"user {getpass.getuser()};" if os.geteuid() == 0 else "",
            temporary=" ".join(f"{name}_temp_path {name};" for name in _TEMPORARY),
            fronts="".join(
                _UPSTREAM.format(name=f"replicas_{port}", port=port, servers=" ".join(lines))
                for port, lines in servers.items()
            ),
        )
        (self._folder / "nginx.conf").write_text(text, "utf-8")


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
