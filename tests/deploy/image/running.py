"""
Run the service as the rendered manifests say, on real servers, in a network of its own: `python -m …running IMAGE`.

The network has nothing but a loopback interface: the manifests' ports are free in it, and nobody outside is reached.
"""

import argparse
import json
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import psycopg
from joserfc import jwt
from joserfc.jwk import KeySet

from tests.deploy.image.contents import GID, UID
from tests.deploy.image.engine import limits, podman
from tests.deploy.image.place import Place, prepare, raise_loopback
from tests.deploy.image.pods import Runner, ask, logs, passes, running, state, wait_for_start
from tests.deploy.image.report import NotSo, Report, require

_PATIENCE = 30.0  # seconds that nothing here takes, however busy the machine is
_DEVELOPMENT = ("/docs", "/redoc", "/openapi.json", "/debug", "/metrics")

# Walks the file system as the service's own account, and prints what could be written to.
_WRITABLE = """
import os
found = []
for folder, folders, _ in os.walk("/"):
    if folder == "/":
        folders[:] = set(folders) - {"dev", "proc", "sys"}
    if os.access(folder, os.W_OK):
        found.append(folder)
for path in ("/etc/passwd", "/app/new", "/usr/local/bin/new", "/new"):
    try:
        open(path, "a").close()
    except OSError:
        pass
    else:
        found.append(path)
print(*found)
"""
_FILL = "import pathlib, sys; pathlib.Path('/tmp/large').write_bytes(bytes(int(sys.argv[1])))"
_GROW = "import sys; taken = bytearray(int(sys.argv[1])); print(len(taken))"


def check_running(report: Report, image: str, deploy: Path) -> None:
    """Run migration and server as the manifests say, and check what can only be seen while they run."""
    with ExitStack() as stack:
        with report.check("manifests", "", "every field of the manifests is understood here", needed=True):
            place = prepare(stack, image, deploy)
        _check_refusal(report, image)
        server = stack.enter_context(running(place.pod, image))
        _check_migration(report, place, server)
        with report.check(
            "start", "OPS-20", "it starts, and becomes ready, by the manifest's probes", needed=True
        ) as seen:
            name = server.start(place.container)
            seen.append(f"{wait_for_start(place.container, name):.1f} s")
            probes = {"liveness": place.container.liveness, "readiness": place.container.readiness}
            for kind, probe in probes.items():
                require(probe is not None, f"there is no {kind} probe")
                _until(lambda probe=probe: probe is not None and passes(probe), f"the {kind} probe passes")
        _check_confinement(report, place, server, name)
        _check_development(report, place)
        with report.check("sign-in", "", "a user made with the container's own commands signs in", needed=True) as seen:
            password, client = _make_user(name)
            seen += _sign_in(place, client, password)
        _check_drain(report, place, server, name, client, password)
        with report.check("secrets", "LOG-01", "no secret is in what the containers have written"):
            written = "".join(map(logs, server.started))
            spilled = [hidden[:4] for hidden in (*place.hidden, password) if hidden in written]
            require(not spilled, f"{len(spilled)} of them are, beginning with {', '.join(spilled)}")


def _check_refusal(report: Report, image: str) -> None:
    with report.check("refusal", "DEP-13", "without settings it refuses to start, and says which are missing") as seen:
        name = f"identity-image-test-bare-{secrets.token_hex(4)}"
        bare = ("--name", name, "--pull=never", "--network=host", "--no-healthcheck", *limits())
        try:
            ended = podman("run", *bare, image, timeout=_PATIENCE)
        finally:
            podman("rm", "--force", "--time", "0", name)
        require(ended.returncode == 2, f"it ended with {ended.returncode}: {ended.stderr}")
        require("IDENTITY_ISSUER is not set" in ended.stderr, ended.stderr)
        seen.append(f"exit {ended.returncode}")


def _check_migration(report: Report, place: Place, server: Runner) -> None:
    with report.check("unmigrated", "OPS-17", "a pod does not start on a database without the schema") as seen:
        require(place.pod.first, "there is no init container")
        code, said = server.finish(place.pod.first[0])
        require(code == 1 and said.count("\n") == 1 and "schema" in said, f"it ended with {code}: {said}")
        seen.append(said.strip())
    with report.check("migration", "OPS-18", "the migration's manifest migrates, twice the same", needed=True) as seen:
        with running(place.job, place.image) as job:
            for _ in range(2):
                begun = time.monotonic()
                code, said = job.finish(place.job.containers[0])
                require(code == 0, f"it ended with {code}: {said}")
                seen.append(f"{time.monotonic() - begun:.1f} s")
        with psycopg.connect(place.administrator, autocommit=True) as connection:
            connection.execute("SET SESSION AUTHORIZATION identity_migrator")
            connection.execute(place.grants)
    with report.check("init", "OPS-17", "then its init containers pass", needed=True):
        for container in place.pod.first:
            code, said = server.finish(container)
            require(code == 0, f"{container.name} ended with {code}: {said}")


def _check_confinement(report: Report, place: Place, server: Runner, name: str) -> None:
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
        allowed = {path for path, (volume, _) in place.container.mounts.items() if place.pod.volumes[volume].size}
        require(set(said.split()) == allowed, f"it can write to {said.strip()}")
        seen += sorted(allowed)
    with report.check("temporary", "DEP-10", "its temporary memory is as large as the manifest says") as seen:
        size = next((volume.size for volume in place.pod.volumes.values() if volume.size), 0)
        inside = server.finish(place.container, "python", "-c", _FILL, str(size))
        beyond = server.finish(place.container, "python", "-c", _FILL, str(size + 4096))
        require(inside[0] == 0 and beyond[0] == 1 and "No space left" in beyond[1], f"{inside}, {beyond}")
        seen.append(f"{size >> 20} MiB")
    with report.check("memory", "DEP-10", "who takes more memory than its limit is ended") as seen:
        limit = place.container.memory
        require(limit, "there is no limit")
        within = server.finish(place.container, "python", "-c", _GROW, str(int((limit or 0) * 0.8)))
        beyond = server.finish(place.container, "python", "-c", _GROW, str(int((limit or 0) * 1.1)))
        require(within[0] == 0, f"at 80 % it ended with {within}")
        require(beyond[0] == 137, f"at 110 % it ended with {beyond}")
        seen += [f"{(limit or 0) >> 20} MiB", *_peak(name)]


def _check_development(report: Report, place: Place) -> None:
    with report.check("endpoints", "DEP-13", "nothing that is for development answers at the public port"):
        for path in _DEVELOPMENT:
            status = ask(place.public, "GET", path, host=place.host)[0]
            require(status == 404, f"{path}: {status}")
    with report.check("seeds", "DEP-13", "a new installation has no user, client or key that anybody could know"):
        counts = {table: place.count(table) for table in ("users", "clients", "api_keys")}
        require(not any(counts.values()), f"{counts}")
        form = {"grant_type": "password", "username": "demo", "password": "demo"}
        status, body, _ = _token(place, form)
        require((status, body.get("error")) == (401, "invalid_client"), f"{status} {body}")
    with report.check(
        "metrics", "", "the management Service leads to metrics, under whatever name it is asked"
    ) as seen:
        status, text, _ = ask(place.management, "GET", "/metrics", host="10.244.1.7:9000")
        require(status == 200 and re.search(r"^identity_\w+", str(text), re.MULTILINE), f"{status} {text}"[:300])
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


def _sign_in(place: Place, client: str, password: str) -> Sequence[str]:
    """Sign in, check the token with the published keys, use it, and refresh."""
    form = {"grant_type": "password", "client_id": client, "username": "marie", "password": password}
    status, tokens, _ = _token(place, form)
    require(status == 200, f"{status} {tokens}")
    status, keys, _ = ask(place.public, "GET", "/.well-known/jwks.json", host=place.host)
    require(status == 200, f"{status} {keys}")
    claims = jwt.decode(tokens["access_token"], KeySet.import_key_set(keys), algorithms=["RS256"]).claims
    require(claims["iss"] == place.issuer, f"the issuer is {claims['iss']}")
    require(abs(claims["iat"] - time.time()) < 60, "its clock is not this machine's")
    bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
    status, profile, _ = ask(place.public, "GET", "/v1/users/me", host=place.host, headers=bearer)
    require(status == 200 and profile["username"] == "marie", f"{status} {profile}")
    form = {"grant_type": "refresh_token", "client_id": client, "refresh_token": tokens["refresh_token"]}
    status, renewed, _ = _token(place, form)
    require(status == 200, f"{status} {renewed}")
    return (f"key {keys['keys'][0]['kid'][:8]}", "refreshed")


def _check_drain(report: Report, place: Place, server: Runner, name: str, client: str, password: str) -> None:
    env, hook, grace = place.container.env, place.container.pre_stop, place.pod.grace
    with report.check("grace", "OPS-20", "the grace covers the hook, the delay and the drain") as seen:
        needed = hook + float(env.get("IDENTITY_SHUTDOWN_DELAY", 0)) + float(env.get("IDENTITY_SHUTDOWN_GRACE", 25))
        require(needed + 5 <= grace, f"{needed:.0f} s are needed, and 5 to leave; there are {grace}")
        require(hook >= 5, f"the hook gives who spreads requests {hook:.0f} s to look elsewhere")
        seen.append(f"{needed:.0f} of {grace} s")
    with report.check("hook", "OPS-20", "while the preStop hook runs, requests are answered as ever"):
        until = time.monotonic() + hook
        while time.monotonic() < until:
            require(ask(place.public, "GET", "/.well-known/jwks.json", host=place.host)[0] == 200, "a request failed")
            time.sleep(0.5)
    with report.check(
        "drain", "OPS-20", "on SIGTERM it turns red, finishes a sign-in that was begun, and exits 0"
    ) as seen:
        form = urlencode({"grant_type": "password", "client_id": client, "username": "marie", "password": password})
        codes: list[int] = []
        stopping = Thread(target=lambda: codes.append(server.stop(name, after_hook=hook)))
        with socket.create_connection(("127.0.0.1", place.public), timeout=_PATIENCE) as line:
            line.sendall(
                f"POST /token HTTP/1.1\r\nHost: {place.host}\r\nContent-Length: {len(form)}\r\n"
                f"Content-Type: application/x-www-form-urlencoded\r\n\r\n{form[:20]}".encode("ascii")
            )
            begun = time.monotonic()
            stopping.start()
            try:
                _until(lambda: ask(place.management, "GET", "/readyz", host="10.244.1.7")[0] == 503, "readiness is red")
                require(ask(place.management, "GET", "/healthz", host="10.244.1.7")[0] == 200, "liveness is red")
                _until(lambda: _refuses(place.public), "nobody new is accepted")
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


def _token(place: Place, form: dict[str, str]) -> tuple[int, Any, Any]:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return ask(place.public, "POST", "/token", host=place.host, body=urlencode(form), headers=headers)


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


def main() -> int:
    """Check a built image; print one line for each fact, and at the end, as JSON, the keys of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.image.running")
    parser.add_argument("image")
    parser.add_argument("deploy", type=Path)
    parser.add_argument("--until", default="", metavar="KEY", help="try nothing after this check")
    options = parser.parse_args()
    raise_loopback()
    report = Report(until=options.until)
    with suppress(NotSo):  # it is in the report
        check_running(report, options.image, options.deploy)
    sys.stdout.write(json.dumps({"failed": report.failed, "passed": report.passed}) + "\n")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
