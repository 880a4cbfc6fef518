"""What a replica answers to a scrape, as Prometheus' own tool reads it."""

import subprocess

import httpx2

from tests.support.metrics import families
from tests.support.server_process import ServerProcess
from tests.support.servers import free_port
from tests.support.tools import tool


def test_a_scrape_is_in_order_and_shows_every_metric(database_url: str, redis_url: str) -> None:
    """From the first moment on: names, units and help are as they should be, and nothing is said twice."""
    port = free_port()
    with ServerProcess(database_url, redis_url, management_port=str(port)) as server:
        httpx2.get(f"{server.url}/.well-known/jwks.json", timeout=30)
        answer = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    checked = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=answer.text, capture_output=True, text=True, timeout=60
    )
    assert checked.stdout + checked.stderr == ""
    assert checked.returncode == 0
    for name, family in families().items():
        assert f"# TYPE {name} {family.kind}" in answer.text, name
    assert 'identity_http_requests_total{method="GET",route="/.well-known/jwks.json",status="200"} 1.0' in answer.text
    assert "identity_signing_ready 1.0" in answer.text
    assert "_created" not in answer.text
