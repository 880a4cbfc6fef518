"""Build the image: from this checkout, and from a copy in which everything lies about that must not get in."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.image.engine import exists, podman
from tests.deploy.image.report import Impossible, say
from tests.deploy.image.stand_in import base_of, stand_in

ROOT = Path(__file__).parents[3]
CANARY = "must-not-be-in-an-image-5b1e"
EPOCH = "946684800"
"""The time of every file, as `make image` has it: one that never changes leaves layers that did not as they are."""

_NEEDED = ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml")
_NEEDED_FOLDERS = ("identity_service", "migrations", "requirements")
_LYING_ABOUT = (
    *(".env", ".git/config", ".venv/bin/activate", "docs/notes.md", "keys/master.pem", "tests/test_it.py"),
    *("identity_service/.env", "identity_service/.git/config", "identity_service/__pycache__/app.cpython-313.pyc"),
    *("identity_service/oauth/signing.pem", "migrations/.env.local", "migrations/versions/__pycache__/x.pyc"),
)
_MIRROR = ("cert", "extra-index-url", "index-url", "proxy", "timeout", "trusted-host")
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What every build of one run shares: the base, what the labels say, and the way to the package index."""

    base: str
    version: str
    revision: str
    mirror: tuple[str, ...]

    def build(self, tag: str, source: Path, *, cached: bool = True) -> str:
        """Build `tag` from the Dockerfile in `source`; return the image's id. Raises Impossible."""
        ended = podman(
            *("build", "--isolation", "chroot", "--pull=never", "--format", "oci", "--timestamp", EPOCH),
            *(() if cached else ("--no-cache",)),
            *("--build-arg", f"PYTHON_IMAGE={self.base}"),
            *("--label", f"org.opencontainers.image.revision={self.revision}"),
            *self.mirror,
            *("--quiet", "--tag", tag, "--file", str(source / "Dockerfile"), str(source)),
        )
        if ended.returncode != 0:
            raise Impossible(f"the build failed:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
        return ended.stdout.split()[-1].removeprefix("sha256:")


@contextmanager
def recipe() -> Iterator[Recipe]:
    """
    Yield how to build here.

    The base is PYTHON_IMAGE of the environment, else the Dockerfile's own if it is in this machine's storage, else a
    stand-in. What this machine needs to reach a package index is shown to the build, and stays outside the image.
    """
    own, minor, release = base_of((ROOT / "Dockerfile").read_text("utf-8"))
    base = os.environ.get("PYTHON_IMAGE") or (own if exists(own) else stand_in(minor, release))
    say(f"        base: {base}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    with tempfile.TemporaryDirectory(prefix="identity-pip-") as folder:
        yield Recipe(
            base=base,
            version=project["version"],
            revision=_revision(),
            mirror=tuple(_mirror(Path(folder))),
        )


@contextmanager
def copy_of_the_source(*edits: tuple[str, str, str]) -> Iterator[Path]:
    """
    Yield a copy of what an image is made of, at another path, with other modes and times, and littered with canaries.

    `edits` are replacements in files of it: (file, old, new).
    """
    with tempfile.TemporaryDirectory(prefix="identity-source-") as folder:
        copy = Path(folder) / "elsewhere"
        for name in _NEEDED_FOLDERS:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _NEEDED:
            shutil.copy(ROOT / name, copy / name)
        for edit in edits:
            replace_in(copy, *edit)
        for name in _LYING_ABOUT:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_text(f"{CANARY}\n", "utf-8")
        for path in copy.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.utime(path, (1_000_000_000, 1_000_000_000))
        yield copy


def replace_in(folder: Path, name: str, old: str, new: str) -> None:
    """Replace the first occurrence in a file; raises Impossible if there is none."""
    text = (folder / name).read_text("utf-8")
    if old not in text:
        raise Impossible(f"{name} no longer has what should be replaced in it: {old!r}")
    (folder / name).write_text(text.replace(old, new, 1), "utf-8")


def _mirror(folder: Path) -> Sequence[str]:
    """Return the flags that show this machine's index, proxy and authorities to the steps of a build."""
    settings = {}
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        if (key := name.rpartition(".")[2]) in _MIRROR:
            settings[key] = _AUTHORITIES if key == "cert" else value.strip("'\"")
    configuration = folder / ".config/pip/pip.conf"
    configuration.parent.mkdir(parents=True)
    lines = (f"{key} = {value}\n" for key, value in settings.items())
    configuration.write_text("".join(["[global]\n", *lines]), "utf-8")
    flags = ["--volume", f"{folder}:/root"]  # over a folder that is there: what is not would stay behind, empty
    named = next(filter(None, map(os.environ.get, ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"))), _AUTHORITIES)
    if Path(named).is_file():
        flags += ["--volume", f"{Path(named).resolve()}:{_AUTHORITIES}:ro"]
    return flags


def _revision() -> str:
    """Return the commit, as `make image` does."""
    words = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    ended = subprocess.run(words, capture_output=True, text=True)
    return ended.stdout.strip() or "unknown"
