"""
The verifier works with the base install alone: `pip install identity-service`, without the server's extra.

The wheel is built from this checkout and unpacked into an empty environment, beside copies of exactly what its own
metadata demands. Nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any, final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.issuer import AUDIENCE, Issuer, key_set

_ROOT = Path(__file__).parents[2]
_NOW = 2_000_000_000
_DISTRIBUTIONS = {
    "anyio",
    "cffi",
    "cryptography",
    "h11",
    "httpcore2",
    "httpx2",
    "idna",
    "identity-service",
    "joserfc",
    "pycparser",
    "truststore",
    "typing-extensions",
}
_NOT_FOR_SIBLINGS = (
    *("aiosqlite", "alembic", "argon2", "bcrypt", "fastapi", "httptools", "passlib", "prometheus_client", "psycopg"),
    *("pydantic", "pydantic_settings", "redis", "sqlalchemy", "starlette", "structlog", "typer", "uvicorn", "uvloop"),
)


@final
class BaseInstall:
    """An environment with nothing in it but the wheel and its requirements."""

    def __init__(self, folder: Path) -> None:
        """`folder` is empty."""
        environment = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        paths = {"base": str(environment), "platbase": str(environment)}
        self.site = Path(sysconfig.get_path("purelib", "venv", paths))
        self._python = Path(sysconfig.get_path("scripts", "venv", paths), "python")
        with zipfile.ZipFile(_built_wheel(folder / "dist")) as wheel:
            wheel.extractall(self.site)
        (ours,) = distributions(path=[str(self.site)])
        for needed in _closure(ours):
            _copy(needed, self.site)

    def run(self, program: str, *arguments: str) -> Any:
        """Run a program in the environment, a warning being an error, and return what it printed as JSON."""
        done = self.python("-c", program, *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def python(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the environment's interpreter, a warning being an error."""
        return subprocess.run(
            [self._python, "-I", "-W", "error", *arguments],
            env={name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "IDENTITY_"))},
            capture_output=True,
            text=True,
            timeout=60,
        )


def _built_wheel(folder: Path) -> Path:
    """Build the wheel as a release does, with the build tool that is installed here."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def _closure(ours: Distribution) -> Iterable[Distribution]:
    """Return, from this environment, what a distribution without extras needs, and what that needs."""
    found: dict[tuple[str, str], Distribution] = {}
    waiting = [(ours, "")]
    while waiting:
        parent, of_extra = waiting.pop()
        for requirement in map(Requirement, parent.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
                continue
            needed = distribution(requirement.name)
            for extra in ("", *requirement.extras):
                if (wanted := (canonicalize_name(needed.name), extra)) not in found:
                    found[wanted] = needed
                    waiting.append((needed, extra))
    return {name: needed for (name, _), needed in found.items()}.values()


def _copy(source: Distribution, site: Path) -> None:
    """Copy what was installed, but for its commands."""
    assert source.files is not None
    for file in source.files:
        if ".." not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file.locate(), target)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    return BaseInstall(tmp_path_factory.mktemp("base"))


def test_the_base_install_brings_these_distributions_and_no_other(base: BaseInstall) -> None:
    """A sibling takes all of them into its own service, so each new one is a decision."""
    assert {canonicalize_name(found.name) for found in distributions(path=[str(base.site)])} == _DISTRIBUTIONS


_VERIFY = """
import asyncio, json, sys
import identity_service
from identity_service.verifier import TokenVerifier

issuer, audience, token, now, options = json.loads(sys.argv[1])

def verifier():
    return TokenVerifier(issuer, audience, clock=lambda: now, **options)

answers = [verifier().verify_sync(token, "orders:read"), asyncio.run(verifier().verify(token, "orders:read"))]
print(json.dumps([identity_service.__file__, *(dict(answer.claims) for answer in answers)]))
"""


@pytest.mark.parametrize("keys_come_from", ["the issuer", "a file"])
def test_a_token_is_verified_with_the_base_install_alone(
    base: BaseInstall, tmp_path: Path, keys_come_from: str
) -> None:
    """With and without an event loop; the file is for an issuer that does not answer."""
    options: dict[str, str] = {}
    with Issuer() as issuer:
        if keys_come_from == "a file":
            issuer.go_down()
            (tmp_path / "jwks.json").write_bytes(key_set("k1"))
            options["jwks_file"] = str(tmp_path / "jwks.json")
        token = issuer.mint(now=_NOW, sub="ada")
        file, *claims = base.run(_VERIFY, json.dumps([issuer.url, AUDIENCE, token, _NOW, options]))
    assert Path(file).is_relative_to(base.site)
    assert [(said["sub"], said["iat"]) for said in claims] == [("ada", _NOW)] * 2


_IMPORT = """
import importlib, json, sys

missing = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing[name] = error.name
print(json.dumps(missing))
"""


def test_nothing_of_the_server_comes_with_the_base_install(base: BaseInstall) -> None:
    assert base.run(_IMPORT, *_NOT_FOR_SIBLINGS) == {name: name for name in _NOT_FOR_SIBLINGS}


def test_every_module_of_the_verifier_can_be_imported_but_the_guard_for_fastapi(base: BaseInstall) -> None:
    """And that one says what is missing: the framework is the sibling's own."""
    package = "identity_service.verifier"
    modules = sorted(path.stem for path in (_ROOT / "identity_service" / "verifier").glob("*.py"))
    names = [package, *(f"{package}.{module}" for module in modules if module != "__init__")]
    assert base.run(_IMPORT, *names) == {f"{package}.fastapi": "fastapi"}


def test_the_command_says_that_it_needs_the_server(base: BaseInstall) -> None:
    """It is installed with the verifier, since an extra cannot bring a command of its own."""
    done = base.python("-m", "identity_service", "serve")
    assert done.returncode == 1
    assert "extra `server`" in done.stderr
    assert "Traceback" not in done.stderr
