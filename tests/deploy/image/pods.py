"""
Run a pod as a kubelet would, on podman: its volumes, its first containers, its probes, and its end.

The network is whatever namespace this process is in, so that what the manifest says about ports stands as it is.
"""

import contextlib
import http.client
import json
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from tests.deploy.image.engine import inspect, limits, podman
from tests.deploy.image.manifest import Container, Pod, Probe, Volume
from tests.deploy.image.report import NotSo, require

POD_ADDRESS = "10.244.1.7"
"""What a kubelet would put into a probe's Host header; nobody listens there."""

_KEPT = 120.0  # seconds for what should take two or three


@final
class Runner:
    """Runs the containers of one pod, from the image under test, on volumes of its own."""

    def __init__(self, pod: Pod, image: str, folder: Path) -> None:
        self.pod = pod
        self._image = image
        self._folder = folder
        self._directories = {name: self._directory(name, volume) for name, volume in pod.volumes.items()}
        self.started: list[str] = []

    def flags(self, container: Container) -> Sequence[str]:
        """Return the flags of `podman run` that say what the manifest says."""
        security = container.security
        require(container.image.split("@")[0].split(":")[0].endswith("/identity-service"), f"image {container.image}")
        flags = ["--pull=never", "--network=host", "--no-healthcheck", "--read-only-tmpfs=false", *limits()]
        flags += ["--read-only"] if security.read_only else []
        flags += ["--privileged"] if security.privileged else []
        flags += [] if security.escalation else ["--security-opt=no-new-privileges"]
        flags += [] if security.seccomp else ["--security-opt=seccomp=unconfined"]
        flags += [f"--cap-drop={name}" for name in security.drop] + [f"--cap-add={name}" for name in security.add]
        if security.user is not None:
            flags.append(f"--user={security.user}" + ("" if security.group is None else f":{security.group}"))
        elif security.non_root:
            user = str(inspect("image", self._image)["Config"].get("User", "")).partition(":")[0]
            require(user.isdecimal() and int(user), f"a kubelet does not run user {user or 'root'!r} as non-root")
        require(not (security.non_root and security.user == 0), "a kubelet does not run user 0 as non-root")
        groups = [*self.pod.groups, *([] if self.pod.fs_group is None else [self.pod.fs_group])]
        flags += [f"--group-add={group}" for group in groups]
        flags += [] if container.memory is None else [f"--memory={container.memory}"]
        flags += [f"--env-file={self._environment(container)}"]
        return [*flags, *self._mounts(container)]

    def start(self, container: Container, *instead: str) -> str:
        """Start a container, with other words than its own if there are any; return its name."""
        words = instead or (*container.command, *container.args)
        entry = ["--entrypoint", json.dumps(words[:1])] if instead or container.command else []
        name = f"identity-image-test-{container.name}-{secrets.token_hex(4)}"
        self.started.append(name)
        flags = ["--detach", "--name", name, *self.flags(container), *entry]
        ended = podman("run", *flags, self._image, *(words[1:] if entry else words))
        require(ended.returncode == 0, f"{shlex.join(words)} could not be started: {ended.stderr.strip()}")
        return name

    def finish(self, container: Container, *instead: str) -> tuple[int, str]:
        """Run a container to its end, as `start` does; return its exit code and what it said."""
        name = self.start(container, *instead)
        ended = podman("wait", name, timeout=_KEPT)
        require(ended.returncode == 0, ended.stderr)
        return int(ended.stdout.split()[-1]), logs(name)

    def stop(self, name: str, *, after_hook: float) -> int:
        """
        End a container as a kubelet does after its preStop hook, which took `after_hook` seconds of the grace.

        Sends the image's signal, kills what is left when the grace is over, and returns the exit code.
        """
        left = max(int(self.pod.grace - after_hook), 1)
        ended = podman("stop", "--time", str(left), name, timeout=left + _KEPT)
        require(ended.returncode == 0, ended.stderr)
        return int(inspect("container", name)["State"]["ExitCode"])

    def close(self) -> None:
        """Remove every container that was started."""
        for name in self.started:
            podman("rm", "--force", "--time", "0", name)

    def _mounts(self, container: Container) -> Iterator[str]:
        for path, (volume, read_only) in container.mounts.items():
            if volume not in self.pod.volumes:
                raise NotSo(f"{container.name} mounts {volume}, which is no volume of the pod")
            size = self.pod.volumes[volume].size
            if size is not None:
                mode = "ro" if read_only else "rw"
                yield f"--tmpfs={path}:{mode},nosuid,nodev,noexec,size={size},mode=1777"
            else:
                yield f"--volume={self._directories[volume]}:{path}:ro"

    def _environment(self, container: Container) -> Path:
        file = self._folder / f"{container.name}.env"
        broken = [name for name, value in container.env.items() if "\n" in value]
        require(not broken, f"more than one line: {', '.join(broken)}")
        file.touch(0o600)
        file.write_text("".join(f"{name}={value}\n" for name, value in container.env.items()), "utf-8")
        return file

    def _directory(self, name: str, volume: Volume) -> Path:
        """Lay a volume's files out as a kubelet does: links into a folder that a change would replace as a whole."""
        top = self._folder / f"volume-{name}"
        data = top / "..2026_01_01"
        data.mkdir(parents=True)
        (top / "..data").symlink_to(data.name)
        group = self.pod.fs_group
        for file, (content, mode) in volume.files.items():
            (data / file).write_text(content, "utf-8")
            # With fsGroup a kubelet gives the files to the group, which may read them whatever their mode says.
            (data / file).chmod(mode if group is None else mode | 0o440)
            (top / file).symlink_to(Path("..data", file))
            os.chown(data / file, 0, group or 0)
        for folder in (top, data):
            os.chown(folder, 0, group or 0)
            folder.chmod(0o755)
        return top


@contextmanager
def running(pod: Pod, image: str) -> Iterator[Runner]:
    """Yield a runner for a pod, and leave nothing of it behind."""
    with tempfile.TemporaryDirectory(prefix="identity-pod-") as folder, contextlib.ExitStack() as stack:
        Path(folder).chmod(0o711)
        runner = Runner(pod, image, Path(folder))
        stack.callback(runner.close)
        yield runner


def logs(name: str) -> str:
    """Return what a container has written."""
    told = podman("logs", name)
    return told.stdout + told.stderr


def state(name: str) -> Mapping[str, Any]:
    """Return what podman knows about a container's state: Running, Pid, ExitCode, OOMKilled."""
    found: Mapping[str, Any] = inspect("container", name)["State"]
    return found


def passes(probe: Probe) -> bool:
    """Probe once, as a kubelet does."""
    try:
        return (
            200
            <= ask(probe.port, "GET", probe.path, host=f"{POD_ADDRESS}:{probe.port}", timeout=probe.timeout)[0]
            < 400
        )
    except OSError:
        return False


def wait_for_start(container: Container, name: str) -> float:
    """Probe until the container has started; return the seconds it took. Raises NotSo when a kubelet would give up."""
    probe = container.startup
    if probe is None:
        raise NotSo("there is no startup probe")
    begun = time.monotonic()
    time.sleep(probe.delay)
    deadline = begun + probe.delay + probe.period * probe.failures
    while not passes(probe):
        require(state(name)["Running"], f"it has ended:\n{logs(name)[-3000:]}")
        require(
            time.monotonic() < deadline, f"no probe has passed in {probe.period * probe.failures:.0f} s:\n{logs(name)}"
        )
        time.sleep(min(probe.period, 0.25))  # a kubelet would ask less often; nothing is gained by waiting
    return time.monotonic() - begun


def ask(
    port: int,
    method: str,
    path: str,
    *,
    host: str,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> tuple[int, Any, Mapping[str, str]]:
    """Send one request to this machine; return the status, the body (JSON is read), and the headers."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        line.request(method, path, body, {"Host": host, **(headers or {})})
        answer = line.getresponse()
        read = answer.read().decode("utf-8")
        kind = answer.headers.get_content_type()
        return answer.status, json.loads(read) if kind.endswith("json") and read else read, answer.headers
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from error
    finally:
        line.close()
