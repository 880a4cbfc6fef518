"""
Run the service as the rendered manifests say, on real servers, in a network of its own: `python -m …running IMAGE`.

The network has nothing but a loopback interface: the manifests' ports are free in it, and nobody outside is reached.
"""

import argparse
import base64
import fcntl
import json
import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
from joserfc import jwt
from joserfc.jwk import KeySet

from tests.deploy.image.contents import GID, UID
from tests.deploy.image.engine import limits, podman
from tests.deploy.image.manifest import Container, Object, Pod, one, pod_of, read, target_port
from tests.deploy.image.pods import Runner, ask, logs, passes, running, state, wait_for_start
from tests.deploy.image.report import NotSo, Report, require
from tests.support.servers import own_postgres, own_redis

_NAME = "identity-service"
_PATIENCE = 30.0  # seconds that nothing here takes, however busy the machine is
_DEVELOPMENT = ("/docs", "/redoc", "/openapi.json", "/debug", "/metrics")

# Walks the file system as the service's own account, and prints what could be written to.
_WRITABLE = """
import os
found = [folder for folder, folders, _ in os.walk("/")
         if not folders.__setitem__(slice(None), [f for f in folders if os.path.join(folder, f) not in
                                                   ("/proc", "/sys", "/dev")]) and os.access(folder, os.W_OK)]
for path in ("/etc/passwd", "/app/new", "/usr/local/bin/new", "/new"):
    try:
        open(path, "a").close()
    except OSError:
        pass
    else:
        found.append(path)
print(*found)
"""
_FILL = "import sys; open('/tmp/large', 'wb').write(bytes(int(sys.argv[1])))"
_GROW = "import sys; taken = bytearray(int(sys.argv[1])); print(len(taken))"


@dataclass(frozen=True, slots=True)
class Site:
    """What one run of the checks is about: an image, manifests, and the values of this place's secrets."""

    image: str
    server: Object
    pod: Pod
    job: Pod
    public: int
    management: int
    hidden: Sequence[str]
    administrator: str
    grants: str

    @property
    def container(self) -> Container:
        """The container that serves."""
        return self.pod.containers[0]

    @property
    def issuer(self) -> str:
        """The issuer that the manifest names."""
        return self.container.env["IDENTITY_ISSUER"]

    @property
    def host(self) -> str:
        """What clients put into the Host header."""
        return urlsplit(self.issuer).netloc

    def count(self, table: str) -> int:
        """Return how many rows a table has."""
        with psycopg.connect(self.administrator) as connection:
            row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608  # names of ours
        return int(row[0]) if row else -1


def check_running(report: Report, image: str, deploy: Path) -> None:
    """Run migration and server as the manifests say, and check what can only be seen while they run."""
    with ExitStack() as stack:
        with report.check("manifests", "", "every field of the manifests is understood here", needed=True):
            site = _prepare(stack, image, deploy)
        _check_refusal(report, image)
        server = stack.enter_context(running(site.pod, image))
        _check_migration(report, site, server)
        with report.check(
            "start", "OPS-20", "it starts, and becomes ready, by the manifest's probes", needed=True
        ) as seen:
            name = server.start(site.container)
            seen.append(f"{wait_for_start(site.container, name):.1f} s")
            probes = {"liveness": site.container.liveness, "readiness": site.container.readiness}
            for kind, probe in probes.items():
                require(probe is not None, f"there is no {kind} probe")
                _until(lambda probe=probe: probe is not None and passes(probe), f"the {kind} probe passes")
        _check_confinement(report, site, server, name)
        _check_development(report, site)
        with report.check("sign-in", "", "a user made with the container's own commands signs in", needed=True) as seen:
            password, client = _make_user(name)
            seen += _sign_in(site, client, password)
        _check_drain(report, site, server, name, client, password)
        with report.check("secrets", "LOG-01", "no secret is in what the containers have written"):
            written = "".join(map(logs, server.started))
            spilled = [hidden[:4] for hidden in (*site.hidden, password) if hidden in written]
            require(not spilled, f"{len(spilled)} of them are, beginning with {', '.join(spilled)}")


def _prepare(stack: ExitStack, image: str, deploy: Path) -> Site:
    """Start the servers, make the roles, and read the manifests."""
    postgres, redis = stack.enter_context(own_postgres()), stack.enter_context(own_redis())
    administrator = postgres.create_database("identity").replace("+psycopg", "")
    with psycopg.connect(administrator, autocommit=True) as connection:
        connection.execute((deploy / "postgresql/roles.sql").read_text("utf-8"))
    words = {role: secrets.token_urlsafe(24) for role in ("identity_service", "identity_migrator")}
    place = urlsplit(administrator)
    urls = {
        role: f"postgresql+psycopg://{role}:{word}@{place.hostname}:{place.port}/identity"
        for role, word in words.items()
    }
    master = base64.b64encode(os.urandom(32)).decode("ascii")
    smtp = secrets.token_urlsafe(24)
    known = {
        ("identity-database", "url"): urls["identity_service"],
        ("identity-database-migrator", "url"): urls["identity_migrator"],
        ("identity-redis", "url"): redis.url,
        ("identity-smtp", "password"): smtp,
        ("identity-master-key", "keys"): f"{master}\n",
    }

    def secret(name: str, key: str) -> str:
        require((name, key) in known, f"nobody knows of a Secret {name} with the key {key}")
        return known[name, key]

    rendered = deploy / "kubernetes/rendered"
    objects, jobs = read(rendered / "production.yaml"), read(rendered / "migrate.yaml")
    server = one(objects, "Deployment", _NAME)
    pod = pod_of(server, objects, secret)
    public, management = (
        target_port(one(objects, "Service", name), server, pod.containers[0]) for name in (_NAME, f"{_NAME}-management")
    )
    return Site(
        image=image,
        server=server,
        pod=pod,
        job=pod_of(one(jobs, "Job", f"{_NAME}-migrate"), jobs, secret),
        public=public,
        management=management,
        hidden=(*words.values(), master, smtp),
        administrator=administrator,
        grants=(deploy / "postgresql/grants.sql").read_text("utf-8"),
    )


def _check_refusal(report: Report, image: str) -> None:
    with report.check("refusal", "DEP-13", "without settings it refuses to start, and says which are missing") as seen:
        bare = ("--rm", "--pull=never", "--network=host", "--no-healthcheck", *limits())
        ended = podman("run", *bare, image, timeout=_PATIENCE * 2)
        require(ended.returncode == 2, f"it ended with {ended.returncode}: {ended.stderr}")
        require("IDENTITY_ISSUER is not set" in ended.stderr, ended.stderr)
        seen.append(f"exit {ended.returncode}")


def _check_migration(report: Report, site: Site, server: Runner) -> None:
    with report.check("unmigrated", "OPS-17", "a pod does not start on a database without the schema") as seen:
        require(site.pod.first, "there is no init container")
        code, said = server.finish(site.pod.first[0])
        require(code == 1 and "schema" in said, f"it ended with {code}: {said}")
        seen.append(said.strip().splitlines()[-1])
    with report.check("migration", "OPS-18", "the migration's manifest migrates, twice the same", needed=True) as seen:
        with running(site.job, site.image) as job:
            for _ in range(2):
                begun = time.monotonic()
                code, said = job.finish(site.job.containers[0])
                require(code == 0, f"it ended with {code}: {said}")
                seen.append(f"{time.monotonic() - begun:.1f} s")
        with psycopg.connect(site.administrator, autocommit=True) as connection:
            connection.execute("SET SESSION AUTHORIZATION identity_migrator")
            connection.execute(site.grants)
    with report.check("init", "OPS-17", "then its init containers pass", needed=True):
        for container in site.pod.first:
            code, said = server.finish(container)
            require(code == 0, f"{container.name} ended with {code}: {said}")


def _check_confinement(report: Report, site: Site, server: Runner, name: str) -> None:
    """Check the running process from outside, where the kernel says what holds, and from inside."""
    text = Path(f"/proc/{state(name)['Pid']}/status").read_text("utf-8")
    status = {key: value.split() for key, _, value in (line.partition(":") for line in text.splitlines())}
    with report.check("uid", "DEP-01", f"the process is {UID}:{GID} in every sense, and in no other group") as seen:
        for key, wanted in (("Uid", UID), ("Gid", GID)):
            require(set(status[key]) == {str(wanted)}, f"{key} is {' '.join(status[key])}")
        require(set(status["Groups"]) <= {str(GID)}, f"its groups are {' '.join(status['Groups'])}")
        seen.append(f"uid {status['Uid'][0]}")
    with report.check("capabilities", "DEP-01", "it has no capability, and cannot get one"):
        held = {key: value[0] for key, value in status.items() if key.startswith("Cap") and int(value[0], 16)}
        require(not held, f"it has {held}")
        require(status["NoNewPrivs"] == ["1"], "no_new_privs is not set")
    with report.check("seccomp", "DEP-01", "its system calls are filtered") as seen:
        mode = status.get("Seccomp")
        require(mode in (["2"], None), f"seccomp is in mode {mode}")
        seen.append("this kernel has no seccomp" if mode is None else "mode 2")
    with report.check("read-only", "DEP-01", "it can write to its temporary memory and nowhere else") as seen:
        code, said = _inside(name, "python", "-c", _WRITABLE)
        require(code == 0, said)
        allowed = {path for path, (volume, _) in site.container.mounts.items() if site.pod.volumes[volume].size}
        require(set(said.split()) == allowed, f"it can write to {said.strip()}")
        seen += sorted(allowed)
    with report.check("temporary", "DEP-10", "its temporary memory is as large as the manifest says") as seen:
        size = next((volume.size for volume in site.pod.volumes.values() if volume.size), 0)
        inside = server.finish(site.container, "python", "-c", _FILL, str(size))
        beyond = server.finish(site.container, "python", "-c", _FILL, str(size + 4096))
        require(inside[0] == 0 and beyond[0] == 1 and "No space left" in beyond[1], f"{inside}, {beyond}")
        seen.append(f"{size >> 20} MiB")
    with report.check("memory", "DEP-10", "who takes more memory than its limit is ended") as seen:
        limit = site.container.memory
        require(limit, "there is no limit")
        within = server.finish(site.container, "python", "-c", _GROW, str(int((limit or 0) * 0.8)))
        beyond = server.finish(site.container, "python", "-c", _GROW, str(int((limit or 0) * 1.1)))
        require(within[0] == 0, f"at 80 % it ended with {within}")
        require(beyond[0] == 137, f"at 110 % it ended with {beyond}")
        seen += [f"{(limit or 0) >> 20} MiB", *_peak(name)]


def _check_development(report: Report, site: Site) -> None:
    with report.check("endpoints", "DEP-13", "nothing that is for development answers at the public port"):
        for path in _DEVELOPMENT:
            status = ask(site.public, "GET", path, host=site.host)[0]
            require(status == 404, f"{path}: {status}")
    with report.check("seeds", "DEP-13", "a new installation has no user, client or key that anybody could know"):
        counts = {table: site.count(table) for table in ("users", "clients", "api_keys")}
        require(not any(counts.values()), f"{counts}")
        form = {"grant_type": "password", "username": "demo", "password": "demo"}
        status, body, _ = _token(site, form)
        require((status, body.get("error")) == (401, "invalid_client"), f"{status} {body}")
    with report.check(
        "metrics", "", "the management Service leads to metrics, under whatever name it is asked"
    ) as seen:
        status, text, _ = ask(site.management, "GET", "/metrics", host="10.244.1.7:9000")
        require(status == 200 and re.search(r"^identity_\w+", text, re.MULTILINE), f"{status} {text[:200]}")
        seen.append(f"{len(text.splitlines())} lines")


def _make_user(name: str) -> tuple[str, str]:
    """Make a user and a client by the commands in the container; return the password and the client's id."""
    password = f"{secrets.token_urlsafe(18)}-Aa1"
    create = ("users", "create", "marie", "--email", "marie@example.org", "--password-stdin", "--json")
    code, said = _inside(name, "identity-service", *create, said=f"{password}\n")
    require(code == 0, f"users create ended with {code}: {said}")
    grants = ("--grant", "password", "--grant", "refresh_token", "--scope", "account:read")
    create = ("clients", "create", "web", "--public", "--first-party", *grants, "--json")
    code, said = _inside(name, "identity-service", *create)
    require(code == 0, f"clients create ended with {code}: {said}")
    return password, str(json.loads(said)["client_id"])


def _sign_in(site: Site, client: str, password: str) -> Sequence[str]:
    """Sign in, check the token with the published keys, use it, and refresh."""
    form = {"grant_type": "password", "client_id": client, "username": "marie", "password": password}
    status, tokens, _ = _token(site, form)
    require(status == 200, f"{status} {tokens}")
    status, keys, _ = ask(site.public, "GET", "/.well-known/jwks.json", host=site.host)
    require(status == 200, f"{status} {keys}")
    claims = jwt.decode(tokens["access_token"], KeySet.import_key_set(keys), algorithms=["RS256"]).claims
    require(claims["iss"] == site.issuer, f"the issuer is {claims['iss']}")
    require(abs(claims["iat"] - time.time()) < 60, "its clock is not this machine's")
    bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
    status, profile, _ = ask(site.public, "GET", "/v1/users/me", host=site.host, headers=bearer)
    require(status == 200 and profile["username"] == "marie", f"{status} {profile}")
    form = {"grant_type": "refresh_token", "client_id": client, "refresh_token": tokens["refresh_token"]}
    status, renewed, _ = _token(site, form)
    require(status == 200, f"{status} {renewed}")
    return (f"key {keys['keys'][0]['kid'][:8]}", "refreshed")


def _check_drain(report: Report, site: Site, server: Runner, name: str, client: str, password: str) -> None:
    env, hook, grace = site.container.env, site.container.pre_stop, site.pod.grace
    with report.check("grace", "OPS-20", "the grace covers the hook, the delay and the drain") as seen:
        needed = hook + float(env.get("IDENTITY_SHUTDOWN_DELAY", 0)) + float(env.get("IDENTITY_SHUTDOWN_GRACE", 25))
        require(needed + 5 <= grace, f"{needed:.0f} s are needed, and 5 to leave; there are {grace}")
        require(hook >= 5, f"the hook gives who spreads requests {hook:.0f} s to look elsewhere")
        seen.append(f"{needed:.0f} of {grace} s")
    with report.check("hook", "OPS-20", "while the preStop hook runs, requests are answered as ever"):
        until = time.monotonic() + hook
        while time.monotonic() < until:
            require(ask(site.public, "GET", "/.well-known/jwks.json", host=site.host)[0] == 200, "a request failed")
            time.sleep(0.5)
    with report.check(
        "drain", "OPS-20", "on SIGTERM it turns red, finishes a sign-in that was begun, and exits 0"
    ) as seen:
        form = urlencode({"grant_type": "password", "client_id": client, "username": "marie", "password": password})
        codes: list[int] = []
        stopping = Thread(target=lambda: codes.append(server.stop(name, after_hook=hook)))
        with socket.create_connection(("127.0.0.1", site.public), timeout=_PATIENCE) as line:
            line.sendall(
                f"POST /token HTTP/1.1\r\nHost: {site.host}\r\nContent-Length: {len(form)}\r\n"
                f"Content-Type: application/x-www-form-urlencoded\r\n\r\n{form[:20]}".encode("ascii")
            )
            begun = time.monotonic()
            stopping.start()
            try:
                _until(lambda: ask(site.management, "GET", "/readyz", host="10.244.1.7")[0] == 503, "readiness is red")
                require(ask(site.management, "GET", "/healthz", host="10.244.1.7")[0] == 200, "liveness is red")
                _until(lambda: _refuses(site.public), "nobody new is accepted")
                time.sleep(1)  # a second more, in which a server that does not wait would be gone
                line.sendall(form[20:].encode("ascii"))
                answer = b"".join(iter(lambda: line.recv(65536), b""))
                require(answer.startswith(b"HTTP/1.1 200 ") and b'"access_token"' in answer, f"{answer[:200]!r}")
            finally:
                stopping.join()
        took = time.monotonic() - begun
        require(codes == [0], f"it ended with {codes}\n{logs(name)[-1000:]}")
        require(took < grace - hook, f"it took {took:.0f} s")
        seen += [f"{took:.1f} s after the signal", f"of {grace - hook:.0f}"]


def _inside(name: str, *words: str, said: str | None = None) -> tuple[int, str]:
    """Run a command in a running container; return its exit code and its output, or its complaint."""
    ended = podman("exec", "--interactive", name, *words, said=said, timeout=_PATIENCE * 2)
    return ended.returncode, ended.stdout if ended.returncode == 0 else ended.stderr


def _token(site: Site, form: dict[str, str]) -> tuple[int, Any, Any]:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return ask(site.public, "POST", "/token", host=site.host, body=urlencode(form), headers=headers)


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    last = ""
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except OSError as error:
            last = f" ({error})"
        time.sleep(0.05)
    raise NotSo(f"it never came to pass that {what}{last}")


def _peak(name: str) -> Sequence[str]:
    """Return the most memory that a container has taken, where this kernel keeps account of it."""
    reader = "import sys; print(open(sys.argv[1]).read())"
    for file in ("/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes"):
        code, said = _inside(name, "python", "-c", reader, file)
        if code == 0 and said.strip().isdecimal():
            return (f"the server took {int(said) >> 20}",)
    return ()


def _raise_loopback() -> None:
    """Bring up the loopback interface of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, request))[1]  # SIOCGIFFLAGS
        fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP


def main() -> int:
    """Check a built image; print one line for each fact, and at the end, as JSON, the keys of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.image.running")
    parser.add_argument("image")
    parser.add_argument("deploy", type=Path)
    options = parser.parse_args()
    _raise_loopback()
    report = Report()
    with suppress(NotSo):  # it is in the report
        check_running(report, options.image, options.deploy)
    sys.stdout.write(json.dumps({"failed": report.failed, "passed": report.passed}) + "\n")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
