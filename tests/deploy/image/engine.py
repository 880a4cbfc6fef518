"""Podman, called with what makes it work on a machine without systemd and on kernels that crun does not know."""

import functools
import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from tests.deploy.image.report import Impossible

_LONG = 600.0  # seconds; a first build fetches everything


@functools.cache
def _program() -> tuple[str, ...]:
    if shutil.which("podman") is None:
        raise Impossible("podman is not here (apt-get install --no-install-recommends podman runc mmdebstrap)")
    runtime = ("--runtime", "runc") if shutil.which("runc") else ()
    return ("podman", "--cgroup-manager", "cgroupfs", *runtime)


def podman(*words: str, said: str | None = None, timeout: float = _LONG) -> subprocess.CompletedProcess[str]:
    """Run podman to its end, with `said` on its standard input; the caller looks at how it ended."""
    return subprocess.run(
        [*_program(), *words],
        cwd=tempfile.gettempdir(),  # what watches a container leaves a file named oom where it was started
        input=said or "",
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def answer(*words: str) -> str:
    """Return what podman prints; raises Impossible if it fails."""
    ended = podman(*words)
    if ended.returncode != 0:
        raise Impossible(f"podman {' '.join(words[:3])} failed:\n{ended.stderr.strip()}")
    return ended.stdout.strip()


def inspect(kind: str, name: str) -> dict[str, Any]:
    """Return what podman knows of an image or a container."""
    found: dict[str, Any] = json.loads(answer(kind, "inspect", name))[0]
    return found


def exists(image: str) -> bool:
    """Tell whether an image is in this machine's storage."""
    return podman("image", "exists", image).returncode == 0


def discard(image: str) -> None:
    """Take a name from an image, and remove it with the layers that no other has if it was the last one."""
    podman("rmi", image)  # by force, it would take the containers of an image that has another name still


def tidy() -> None:
    """Remove what builds of the Dockerfile's first stage have left behind."""
    podman("image", "prune", "--force", "--filter", "label=org.opencontainers.image.title=identity-service-build")


def limits() -> Sequence[str]:
    """Return the flags for files and processes that this machine can grant; podman's own default may be too many."""
    flags = []
    for name, which, wanted in (("nofile", resource.RLIMIT_NOFILE, 16_384), ("nproc", resource.RLIMIT_NPROC, 4096)):
        hard = resource.getrlimit(which)[1]
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        flags += ["--ulimit", f"{name}={most}:{most}"]
    return flags
