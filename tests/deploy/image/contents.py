"""What is in an image, and what it says of itself."""

import json
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.image.building import CANARY, ROOT, Recipe
from tests.deploy.image.engine import answer, inspect
from tests.deploy.image.report import Report, require

LARGEST = 330_000_000
UID = GID = 10001

_PROGRAMS = re.compile(r"/?(app/venv/bin|(usr/)?(local/)?s?bin)/[^/]+")
_BUILDS = re.compile(r"([\w.]+-)*(cc|c\+\+|gcc|g\+\+|clang|cpp|ld|as|tcc|rustc|cargo|go|make|cmake|ninja)(-[\d.]+)?")
_INSTALLS = re.compile(r"(pip|uv|poetry|conda|git|curl|wget)[\d.]*")
_NEVER = re.compile(r"\.git|\.hg|\.svn|\.env(\..*)?|\.netrc|\.pypirc|pip\.conf|id_(rsa|ecdsa|ed25519)")
_STICKY = {"tmp", "var/tmp", "run/lock"}
_HASHED = 0b11  # the flags of bytecode that is checked against a hash of its source


@dataclass(frozen=True, slots=True)
class Image:
    """One built image: its files, as a list, and its configuration."""

    name: str
    members: Mapping[str, tarfile.TarInfo]
    bytecode: Mapping[str, bytes]
    tainted: tuple[str, ...]
    config: Mapping[str, Any]
    size: int
    minor: str

    @property
    def packages(self) -> str:
        """Where the libraries are."""
        return f"app/venv/lib/python{self.minor}/site-packages"

    def files(self) -> Iterator[tuple[str, tarfile.TarInfo]]:
        """Yield the regular files."""
        return ((name, member) for name, member in self.members.items() if member.isreg())


def look_into(name: str) -> Image:
    """Read an image's files, without running anything in it."""
    found = inspect("image", name)
    container = answer("create", "--pull=never", "--entrypoint", "/nothing", name)
    try:
        with tempfile.TemporaryDirectory(prefix="identity-image-", dir="/var/tmp") as folder:  # large
            archive = Path(folder) / "files.tar"
            answer("export", "--output", str(archive), container)
            members, bytecode, tainted = {}, {}, []
            with tarfile.open(archive) as files:
                for member in files:
                    path = member.name.removeprefix("./")
                    members[path] = member
                    if not member.isreg() or (reader := files.extractfile(member)) is None:
                        continue
                    if path.endswith(".pyc"):
                        bytecode[path] = reader.read(16)
                    elif path.startswith("app/") and CANARY.encode() in reader.read():
                        tainted.append(path)
    finally:
        answer("rm", "--force", container)
    minors = {match[1] for path in members if (match := re.match(r"app/venv/lib/python([\d.]+)/", path))}
    return Image(name, members, bytecode, tuple(tainted), found["Config"], found["Size"], max(minors, default="?"))


def check_contents(report: Report, image: Image, recipe: Recipe) -> None:
    """Check what is in the image and what is not."""
    _check_rights(report, image)
    _check_leftovers(report, image)
    _check_origin(report, image, recipe)
    _check_config(report, image, recipe)
    with report.check("size", "", f"the image is smaller than {LARGEST // 10**6} MB") as seen:
        seen += [f"{image.size / 1e6:.0f} MB", *_largest(image)]
        require(image.size < LARGEST, f"it has {image.size / 1e6:.0f} MB")


def _check_rights(report: Report, image: Image) -> None:
    with report.check("setuid", "DEP-01", "no file gives rights to who runs it") as seen:
        _none((name for name, member in image.files() if member.mode & 0o6000), "setuid or setgid")
        seen.append(f"{sum(1 for _ in image.files())} files")
    with report.check("owned", "DEP-01", "nothing belongs to the account of the service or can be written by it"):
        ours = (name for name, member in image.members.items() if member.uid == UID or member.gid == GID)
        _none(ours, f"belongs to {UID}")
        open_to_all = (
            name
            for name, member in image.members.items()
            if member.mode & 0o002 and not member.issym() and not (name in _STICKY and member.mode & 0o1000)
        )
        _none(open_to_all, "can be written by everybody")


def _check_leftovers(report: Report, image: Image) -> None:
    programs = {name: PurePosixPath(name).name for name in image.members if _PROGRAMS.fullmatch(name)}
    with report.check("compilers", "DEP-06", "there is no compiler, linker or build tool") as seen:
        _none((path for path, name in programs.items() if _BUILDS.fullmatch(name)), "builds programs")
        seen.append(f"{len(programs)} programs")
    with report.check("installers", "DEP-06", "nothing can install or fetch: no pip, git, curl"):
        modules = re.compile(r".*/python3[\d.]*/.*\b(pip|ensurepip|setuptools|uv)(-[^/]*)?")
        found = (path for path, name in programs.items() if _INSTALLS.fullmatch(name))
        _none([*found, *(path for path in image.members if modules.fullmatch(path))], "installs")
    with report.check("leftovers", "DEP-06", "no .git, .env, tests, docs or sources, only the environment under /app"):
        _none((path for path in image.members if _NEVER.fullmatch(PurePosixPath(path).name)), "does not belong here")
        under = {PurePosixPath(path).parts[1] for path in image.members if path.startswith("app/") and path != "app/"}
        require(under == {"venv"}, f"/app holds {', '.join(sorted(under))}")
        ours = (path for path in image.members if path.startswith("app/"))
        _none((path for path in ours if {"tests", "test", "docs"} & set(PurePosixPath(path).parts)), "not for running")
        require(not image.tainted, f"files that lay about got in: {', '.join(image.tainted)}")
    with report.check("scripts", "DEP-13", "the environment has one program besides the interpreter: identity-service"):
        scripts = {PurePosixPath(path).name for path in programs if path.startswith("app/")}
        extra = scripts - {"identity-service", "python", "python3", f"python{image.minor}"}
        require(not extra, f"also {', '.join(sorted(extra))}")


def _check_origin(report: Report, image: Image, recipe: Recipe) -> None:
    with report.check("locked", "DEP-04", "the libraries are those of requirements/server.txt, and no other") as seen:
        wanted = {*_locked(image.minor), f"identity-service {recipe.version}"}
        found = set(_distributions(image))
        require(found == wanted, f"not on the list: {found - wanted or 'none'}; missing: {wanted - found or 'none'}")
        seen.append(f"{len(found)} distributions")
    with report.check("bytecode", "DEP-04", "bytecode names its source by a hash, and our own is all there") as seen:
        _none((path for path, head in image.bytecode.items() if head[4] != _HASHED), "depends on a time")
        package = f"{image.packages}/identity_service/"
        sources = [path for path, _ in image.files() if path.startswith(package) and path.endswith(".py")]
        tag = f".cpython-{image.minor.replace('.', '')}.pyc"
        compiled = (PurePosixPath(path) for path in sources)
        missing = [
            path for path in compiled if str(path.parent / "__pycache__" / (path.stem + tag)) not in image.bytecode
        ]
        require(sources, "the package is not there")
        _none(map(str, missing), "has no bytecode")
        require(any("/migrations/versions/" in path for path in sources), "the migrations are not in the package")
        seen.append(f"{len(image.bytecode)} files")


def _check_config(report: Report, image: Image, recipe: Recipe) -> None:
    config = image.config
    with report.check("account", "DEP-01", f"the image's own user is {UID}:{GID}, by number") as seen:
        require(config.get("User") == f"{UID}:{GID}", f"it is {config.get('User') or 'root'!r}")
        seen.append(f"working directory {config.get('WorkingDir')}")
    with report.check("entry", "OPS-20", "the service is process 1, without a shell before it, and SIGTERM ends it"):
        entry, command = config.get("Entrypoint"), config.get("Cmd")
        require(entry == ["/app/venv/bin/identity-service"], f"the entry point is {entry}")
        require(command == ["serve"], f"the command is {command}")
        require(config.get("StopSignal") in ("SIGTERM", "15"), f"the signal is {config.get('StopSignal')!r}")
    with report.check("ports", "OPS-20", "it exposes the public and the management port"):
        require(set(config.get("ExposedPorts", {})) == {"8000/tcp", "9000/tcp"}, f"{config.get('ExposedPorts')}")
    with report.check("production", "DEP-13", "it is for production unless told otherwise, and holds no setting else"):
        environment = dict(entry.partition("=")[::2] for entry in config.get("Env", ()))
        ours = {name: value for name, value in environment.items() if name.startswith("IDENTITY_")}
        listeners = {"IDENTITY_HOST", "IDENTITY_PORT", "IDENTITY_MANAGEMENT_HOST", "IDENTITY_MANAGEMENT_PORT"}
        require(ours.get("IDENTITY_ENVIRONMENT") == "production", "IDENTITY_ENVIRONMENT is not production")
        require(ours.keys() == listeners | {"IDENTITY_ENVIRONMENT"}, f"it sets {', '.join(sorted(ours))}")
    with report.check("labels", "DEP-04", "its labels say what it is and what it was made from") as seen:
        labels = config.get("Labels") or {}
        told = {
            key: labels.get(f"org.opencontainers.image.{key}") for key in ("title", "version", "revision", "licenses")
        }
        wanted = ("identity-service", recipe.version, recipe.revision, "Apache-2.0")
        require(tuple(told.values()) == wanted, f"they say {json.dumps(told)}")
        seen.append(f"{recipe.version}, {recipe.revision[:12]}")


def _none(paths: Iterable[str], what: str) -> None:
    found = sorted(paths)
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    require(not found, f"{what}: /{', /'.join(found[:5])}{more}")


def _locked(minor: str) -> Iterator[str]:
    """Yield what the list of hashes installs on this platform under Python `minor`."""
    environment = {**default_environment(), "python_version": minor, "python_full_version": f"{minor}.0", "extra": ""}
    text = (ROOT / "requirements/server.txt").read_text("utf-8")
    for line in re.findall(r"^([A-Za-z0-9].*?)\s*\\$", text, re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield f"{canonicalize_name(requirement.name)} {str(requirement.specifier).removeprefix('==')}"


def _distributions(image: Image) -> Iterator[str]:
    """Yield every distribution in the image, wherever it lies."""
    for path in image.members:
        if match := re.fullmatch(r".*/([^/]+)-([^-/]+)\.(dist|egg)-info/METADATA", path):
            yield f"{canonicalize_name(match[1])} {match[2]}"


def _largest(image: Image) -> Iterator[str]:
    """Yield where most of the bytes are."""
    parts: Counter[str] = Counter()
    for path, member in image.files():
        if path.endswith(".pyc"):
            parts["bytecode"] += member.size
        elif path.startswith(f"{image.packages}/"):
            parts[path.removeprefix(f"{image.packages}/").split("/")[0].removesuffix(".libs")] += member.size
        else:
            parts["interpreter" if path.startswith("usr/local/") else "Debian"] += member.size
    return (f"{name} {size / 1e6:.0f}" for name, size in parts.most_common(9))
