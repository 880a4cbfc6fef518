"""
A base image for a machine that no registry answers: the same distribution, and this machine's own CPython.

It stands in for `python:…-slim`: Debian's minimal system without documentation, an interpreter under /usr/local with
pip and without bytecode. It is for tests only, and never leaves this machine.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.image.engine import answer, exists
from tests.deploy.image.report import Impossible, say

# What an interpreter's extension modules are linked to, and what the real image has besides.
_PACKAGES = (
    "ca-certificates,tzdata,usr-is-merged,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,"
    "libssl3,libuuid1,zlib1g"
)
_LEFT_OUT = ("__pycache__", "config-*", "dist-packages", "idlelib", "site-packages", "test", "tests", "tkinter")

_ASK = """
import json, ssl, sys, sysconfig
print(json.dumps({
    "binary": getattr(sys, "_base_executable", sys.executable),
    "minor": "%d.%d" % sys.version_info[:2],
    "version": sys.version,
    "library": sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix}),
    "shared": [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED") else [],
}))
"""


@dataclass(frozen=True)
class _Python:
    binary: Path
    minor: str
    version: str
    library: Path
    shared: Path | None


def stand_in(wanted: str, release: str) -> str:
    """
    Return the name of an image with CPython `wanted` (3.13) on a Debian release, or with the Python that runs this.

    Making it takes half a minute and needs root; it is kept. Raises Impossible.
    """
    python = _find(wanted)
    recipe = Path(__file__).read_bytes() + f"{python} {release}".encode()
    name = f"localhost/identity-service-stand-in:{python.minor}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if exists(name):
        return name
    if shutil.which("mmdebstrap") is None:
        raise Impossible("mmdebstrap is not here (apt-get install --no-install-recommends podman runc mmdebstrap)")
    say(f"        making a stand-in for the base image: Debian {release} with CPython {python.minor}")
    with tempfile.TemporaryDirectory(prefix="identity-stand-in-", dir="/var/tmp") as folder:  # large
        root = Path(folder) / "root"
        left_out = (f"--dpkgopt=path-exclude=/usr/share/{what}/*" for what in ("doc", "locale", "man"))
        plain = '--aptopt=APT::Install-Recommends "false"'
        _do(
            "mmdebstrap", "--quiet", "--variant=minbase", plain, *left_out, f"--include={_PACKAGES}", release, str(root)
        )
        _install(python, root)
        archive = Path(folder) / "root.tar"
        _do("tar", "-C", str(root), "--exclude=./dev/*", "-cf", str(archive), ".")
        answer("import", "--quiet", "--change", "ENV LANG=C.UTF-8", str(archive), name)
    return name


def _find(wanted: str) -> _Python:
    """Return the interpreter of the wanted version if there is one on this machine, else the one that runs this."""
    places = [shutil.which(f"python{wanted}"), *Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python{wanted}")]
    for place in [*filter(None, places), sys.executable]:
        ended = subprocess.run([place, "-c", _ASK], capture_output=True, text=True)
        if ended.returncode == 0:
            told = json.loads(ended.stdout)
            shared = Path(*told["shared"]) if told["shared"] else None
            binary = Path(told["binary"]).resolve()
            found = _Python(binary, told["minor"], told["version"], Path(told["library"]), shared)
            if found.minor == wanted or place == sys.executable:
                return found
    raise Impossible("no CPython can be had for the base image")


def _install(python: _Python, root: Path) -> None:
    local = root / "usr/local"
    binary = Path(shutil.copy2(python.binary, local / "bin" / f"python{python.minor}"))
    for name in ("python3", "python"):
        (local / "bin" / name).symlink_to(binary.name)
    parts = [binary]
    if python.shared is not None:
        parts.append(Path(shutil.copy2(python.shared, local / "lib")))
    library = local / "lib" / f"python{python.minor}"
    shutil.copytree(python.library, library, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    if shutil.which("strip"):
        _do("strip", "--strip-unneeded", *map(str, [*parts, *library.glob("lib-dynload/*.so")]))
    _do("chroot", str(root), "ldconfig")
    ask = "import site; print(site.getsitepackages()[0])"
    packages = root / _do("chroot", str(root), "/usr/local/bin/python", "-B", "-c", ask).strip().lstrip("/")
    packages.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_pip(python.library)) as wheel:
        wheel.extractall(packages)


def _pip(library: Path) -> Path:
    """Return the wheel of pip that comes with an interpreter, or that Debian keeps for all of its own."""
    for folder in (library / "ensurepip/_bundled", Path("/usr/share/python-wheels")):
        if wheels := sorted(folder.glob("pip-*.whl")):
            return wheels[-1]
    raise Impossible(f"{library} brings no pip (apt-get install python3-venv)")


def _do(*words: str) -> str:
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode != 0:
        raise Impossible(f"{words[0]} failed (it needs root):\n{ended.stderr.strip()}")
    return ended.stdout


def base_of(dockerfile: str) -> tuple[str, str, str]:
    """Return the Dockerfile's own base image, its Python version (3.13) and its Debian release (bookworm)."""
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+/python:(\d+\.\d+)-slim-([a-z]+))$", dockerfile, re.MULTILINE)
    if found is None:
        raise Impossible("the Dockerfile must name its base: ARG PYTHON_IMAGE=…/python:3.x-slim-release")
    return found[1], found[2], found[3]
