"""The Ingress objects before the real service, translated for a real nginx: what gets through, and what is kept."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.deploy.nginx import Nginx, ask
from tests.deploy.promises.forwarding import CLAIMS
from tests.deploy.site import DEPLOY, Document, documents
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.xdist_group("ingress")

_PUBLIC, _ADMIN = "id.example", "admin.id.example"
_README = (DEPLOY / "README.md").read_text("utf-8")
DISGUISES = (
    "/v1/admin/users",
    "/v1//admin/users",
    "/v1/./admin/users",
    "/v1/users/../admin/users",
    "/v1/users/%2e%2e/admin/users",
    "/v1/users/%2E./admin/users",
    "/v1/users/..%2fadmin/users",
    "/v1/users/..%5cadmin/users",
    "/v1/users/x/../../admin/users",
    "/v1/users//../admin/users",
    "/v1/users/..;/admin/users",
    "/v1/users;/../admin/users",
    "/v1/%61dmin/users",
    "/V1/ADMIN/users",
    "/token/../v1/admin/users",
    "/.well-known/../v1/admin/users",
    "/.well-known/..%2fv1/admin/users",
    "/v1/bootstrap",
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/",
)
"""Ways to spell what is not public, some of which begin like what is."""
_SERVICES = ("identity-service", "identity-service-discovery")


def ingresses() -> list[Document]:
    """Return the Ingress objects of the component."""
    files = sorted((DEPLOY / "kubernetes" / "components" / "ingress").glob("*.yaml"))
    return [found for found in documents(*files) if found["kind"] == "Ingress"]


def a_server(sqlite_template: Path, folder: Path) -> ServerProcess:
    """Start the service, behind a proxy of this machine."""
    shutil.copy(sqlite_template, folder / "identity.db")
    url = f"sqlite+aiosqlite:///{folder / 'identity.db'}"
    return ServerProcess(url, issuer=f"https://{_PUBLIC}", allowed_hosts=_ADMIN, trusted_proxies="127.0.0.1/32")


@pytest.fixture(scope="module")
def server(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The service, for tests that leave it as it is."""
    with a_server(sqlite_template, tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def nginx(server: ServerProcess, tmp_path: Path) -> Iterator[Nginx]:
    """A proxy before it that has kept nothing yet."""
    with Nginx(tmp_path, ingresses(), dict.fromkeys(_SERVICES, server.port), _README) as running:
        yield running


class _Echo(http.server.BaseHTTPRequestHandler):
    """Remembers the headers of each request."""

    heard: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        self.heard.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of something that remembers what it was asked with."""
    _Echo.heard.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listener.server_port
        listener.shutdown()
        thread.join()


@pytest.mark.case("DEP-11")
def test_keys_are_kept_as_the_server_says_and_served_without_it(sqlite_template: Path, tmp_path: Path) -> None:
    """Its Cache-Control arrives as it was written, and is what nginx goes by."""
    (tmp_path / "nginx").mkdir()
    with (
        a_server(sqlite_template, tmp_path) as server,
        Nginx(tmp_path / "nginx", ingresses(), dict.fromkeys(_SERVICES, server.port), _README) as nginx,
    ):
        _ask_with_and_without(server, nginx)


def _ask_with_and_without(server: ServerProcess, nginx: Nginx) -> None:
    status, first, keys = nginx.ask(_PUBLIC, "/.well-known/jwks.json")
    assert status == 200
    assert first["cache-control"] == "public, max-age=300, stale-while-revalidate=600, stale-if-error=3600"
    server.kill()
    status, second, kept = nginx.ask(_PUBLIC, "/.well-known/jwks.json")
    assert (status, kept, second["etag"]) == (200, keys, first["etag"])
    assert second["cache-control"] == first["cache-control"]
    assert nginx.ask(_PUBLIC, "/.well-known/jwks.json", headers={"If-None-Match": first["etag"]})[0] == 304
    assert nginx.ask(_PUBLIC, "/.well-known/jwks.json?x=1")[0] == 502  # not kept, and nothing is kept for it
    assert nginx.ask(_PUBLIC, "/token", method="POST", body=b"grant_type=x")[0] == 502


@pytest.mark.case("DEP-11")
@pytest.mark.parametrize(
    "spelled",
    ["/.well-known/%6Awks.json", "/.well-known/./jwks.json", "/.well-known//jwks.json", "/.well-known/x/../jwks.json"],
)
def test_another_spelling_never_stands_in_for_the_keys(nginx: Nginx, spelled: str) -> None:
    """A refusal of it that was kept as the answer for the real one would take everybody's keys away."""
    assert nginx.ask(_PUBLIC, spelled)[0] == 404
    assert nginx.ask(_PUBLIC, "/.well-known/jwks.json")[0] == 200


@pytest.mark.case("DEP-11")
@pytest.mark.parametrize("path", DISGUISES)
def test_no_spelling_leads_from_the_public_host_to_what_is_not_public(nginx: Nginx, path: str) -> None:
    """The admin API would say 401 to somebody without a token; here nobody is even asked for one."""
    for method in ("GET", "POST"):
        assert nginx.ask(_PUBLIC, path, method=method)[0] in (400, 404)


@pytest.mark.case("DEP-11")
@pytest.mark.parametrize("path", [path for path in DISGUISES if path.startswith(("/v1/users/", "/.well-known/"))])
def test_what_a_proxy_takes_for_public_as_it_is_spelled_the_service_does_not_take_for_more(
    server: ServerProcess, path: str
) -> None:
    """Not every gateway looks through the dots before it compares a prefix; the service takes none of them."""
    for method in ("GET", "POST"):
        assert ask(server.port, _PUBLIC, path, method=method)[0] == 404


def test_the_admin_api_is_at_its_own_host_and_nothing_else_is(nginx: Nginx) -> None:
    """So that the refusals above are not those of a server that is not there."""
    assert nginx.ask(_ADMIN, "/v1/admin/users")[0] == 401
    assert nginx.ask(_PUBLIC, "/v1/users/me")[0] == 401
    assert nginx.ask(_PUBLIC, "/token", method="POST", body=b"grant_type=password")[0] in (400, 401)
    for path in ("/token", "/v1/users/me", "/.well-known/jwks.json", "/v1/admin/../users/me"):
        assert nginx.ask(_ADMIN, path)[0] == 404
    assert nginx.ask("other.example", "/.well-known/jwks.json")[0] == 404


def test_a_body_is_refused_at_the_size_that_the_service_would_refuse(nginx: Nginx) -> None:
    """Before it has cost anybody anything."""
    assert nginx.ask(_PUBLIC, "/token", method="POST", body=b"a" * (64 * 1024 + 1))[0] == 413


@pytest.mark.case("DEP-11")
@pytest.mark.parametrize("path", ["/token", "/v1/users/me", "/.well-known/jwks.json"])
def test_nobody_claims_anything_by_a_header(echo: int, tmp_path: Path, path: str) -> None:
    """Neither who they are, nor where they come from, nor what they ask."""
    claims = sorted(CLAIMS | {"x-forwarded-proto"})
    with Nginx(tmp_path, ingresses(), dict.fromkeys(_SERVICES, echo), _README) as running:
        headers = {**dict.fromkeys(claims, "claimed"), "X-Forwarded-For": "203.0.113.7", "X-Other": "claimed"}
        assert running.ask(_PUBLIC, path, headers=headers)[0] == 200
    [heard] = _Echo.heard
    assert [name for name, value in heard.items() if value == "claimed"] == ["x-other"]
    assert heard["x-forwarded-for"] == "203.0.113.7, 127.0.0.1"
    assert (heard["host"], heard["x-forwarded-proto"], heard["x-real-ip"]) == (_PUBLIC, "https", "127.0.0.1")
