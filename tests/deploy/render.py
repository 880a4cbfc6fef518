"""
Render the manifests, and record what they were rendered from: `make manifests`.

What a cluster is given is in the repository, so that it can be read, reviewed and tested where there is no kustomize.
`SOURCES` holds the digest of every source and of every rendering, in the form of `sha256sum`: whoever changes either by
hand is found out on every machine.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

KUBERNETES: Final = Path(__file__).parents[2] / "deploy" / "kubernetes"
RENDERED: Final = KUBERNETES / "rendered"
RECORD: Final = RENDERED / "SOURCES"
TARGETS: Final[Mapping[str, Path]] = {
    "namespace.yaml": KUBERNETES / "namespace",
    "dev.yaml": KUBERNETES / "overlays" / "dev",
    "migrate.yaml": KUBERNETES / "overlays" / "production" / "migrate",
    "production.yaml": KUBERNETES / "overlays" / "production",
}
"""File → the kustomization that it is made from."""

_HEADER = "# Made by `make manifests` from the sources beside it; do not edit.\n"


def kustomize() -> list[str] | None:
    """Return the command that renders a directory, or None where there is none."""
    if program := shutil.which("kustomize"):
        return [program, "build"]
    if program := shutil.which("kubectl"):
        return [program, "kustomize"]
    return None


def render(command: list[str], source: Path) -> str:
    """Return what a kustomization renders to. Raises RuntimeError with what the program said."""
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source}: {done.stderr.strip()}")
    return done.stdout


def sources(folder: Path) -> set[Path]:
    """Return every file that a kustomization is made of, itself and what it takes in from others included."""
    file = folder / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text("utf-8"))
    found = {file}
    for name in (*kustomization.get("resources", ()), *kustomization.get("components", ())):
        path = (folder / name).resolve()
        found |= sources(path) if path.is_dir() else {path}
    for generator in kustomization.get("configMapGenerator", ()):
        found |= {(folder / name).resolve() for name in generator.get("envs", ())}
    return found


def digests() -> str:
    """Return the digest of each source and of each rendering, one line each, as `sha256sum` writes them."""
    files = {RENDERED / name for name in TARGETS}.union(*map(sources, TARGETS.values()))
    lines = []
    for path in sorted(files):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{digest}  {path.relative_to(KUBERNETES).as_posix()}\n")
    return "".join(lines)


def main() -> int:
    """Render everything; return the process's exit code."""
    if (command := kustomize()) is None:
        sys.stderr.write("neither kustomize nor kubectl is here; the manifests were not rendered\n")
        return 1
    RENDERED.mkdir(exist_ok=True)
    for name, source in TARGETS.items():
        (RENDERED / name).write_text(_HEADER + render(command, source), "utf-8")
    RECORD.write_text(digests(), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
