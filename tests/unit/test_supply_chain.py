"""What is locked: versions, hashes, licences, and the bill of materials that is made of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.supply_chain import floors, licences, sbom
from tests.supply_chain.lock import REQUIREMENTS, ROOT, SERVER, BadLock, Locked, read

LOCKS = sorted(REQUIREMENTS.glob("*.txt"))
NAMES = [path.name for path in LOCKS]


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    """A copy of the locks, for a test to spoil."""
    return Path(shutil.copytree(REQUIREMENTS, tmp_path / "requirements"))


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.case("DEP-04")
@pytest.mark.parametrize("path", LOCKS, ids=NAMES)
def test_everything_is_locked_by_version_and_hash(path: Path) -> None:
    """And no lock names a registry or a place on somebody's machine."""
    packages = read(path)
    assert len(packages) > 4
    assert len({package.name for package in packages}) == len(packages)
    text = path.read_text("utf-8")
    assert "://" not in text
    assert "-e " not in text
    assert len(re.findall("--hash=sha256:", text)) == sum(len(package.hashes) for package in packages)


def test_the_locks_are_those_that_the_document_explains() -> None:
    """And each is compiled by `make lock`."""
    told = re.findall(r"^\| `(\S+\.txt)`", (ROOT / "docs" / "supply-chain.md").read_text("utf-8"), re.MULTILINE)
    compiled = re.findall(r"-o requirements/(\S+)", (ROOT / "Makefile").read_text("utf-8"))
    assert sorted(told) == sorted(compiled) == NAMES


@pytest.mark.parametrize("path", LOCKS, ids=NAMES)
def test_what_is_in_two_locks_is_the_same_in_both(path: Path) -> None:
    """The tests run what is served, and the wheel is built with what was tested."""
    tested = {package.name: package for package in read(REQUIREMENTS / "dev.txt")}
    for package in read(path):
        other = tested.get(package.name, package)
        if path.name != "audit.txt":
            assert (other.version, other.hashes) == (package.version, package.hashes)


@pytest.mark.parametrize(
    "line",
    [
        "aiosqlite==0.22.1",
        "aiosqlite>=0.22 \\\n    --hash=sha256:" + 64 * "0",
        "aiosqlite==0.22.1 \\\n    --hash=md5:" + 32 * "0",
        "git+https://example.org/aiosqlite",
        "--index-url https://example.org/simple",
    ],
    ids=["no hash", "no version", "a weak hash", "from elsewhere", "a registry"],
)
def test_a_line_that_locks_nothing_is_not_read_as_if_it_did(tmp_path: Path, line: str) -> None:
    """Whoever reads it would take it for something that it is not."""
    (tmp_path / "x.txt").write_text(f"{line}\n")
    with pytest.raises(BadLock):
        read(tmp_path / "x.txt")


# -- versions that are known to be bad --------------------------------------------------------------------------------


def test_no_bad_version_is_locked_or_allowed() -> None:
    """In any lock, nor by what we ask for ourselves."""
    assert floors.faults() == []


@pytest.mark.case("DEP-03")
@pytest.mark.parametrize(
    ("package", "bad"),
    [
        ("starlette", "1.3.0"),
        ("python-multipart", "0.0.26"),
        ("joserfc", "1.7.4"),
        ("joserfc", "1.6.2"),
        ("authlib", "1.7.0"),
        ("pyjwt", "2.12.1"),
        ("redis", "4.6.0"),
        ("h11", "0.14.0"),
        ("passlib", "1.7.4"),
        ("python-jose", "3.5.0"),
    ],
)
def test_a_lock_with_a_bad_version_is_refused(locks: Path, package: str, bad: str) -> None:
    """Whether it was moved there or came in with something else; the sentence says what is wrong with it."""
    server = locks / "server.txt"
    kept = "".join(f"{head}\n" + "".join(f"{line}\n" for line in rest) for head, rest in entries(server, package))
    server.write_text(f"{kept}{package}=={bad} \\\n    --hash=sha256:{64 * 'a'}\n    # via x\n")
    [fault] = floors.faults(locks)
    assert fault.startswith(f"server.txt: {package} {bad}: ")
    assert fault.endswith(floors.floors()[package].why)


def entries(path: Path, without: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of a lock, package by package, but for one package."""
    rest: list[str] = []
    head = ""
    for line in [*path.read_text("utf-8").splitlines(), ""]:
        if line.startswith(" "):
            rest.append(line)
            continue
        if head and not head.startswith(f"{without}=="):
            yield head, rest
        head, rest = line, []


@pytest.mark.case("DEP-03")
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ('"joserfc>=1.8,<2"', '"joserfc>=1.7,<2"'),
        ('"redis[hiredis]>=8.1,<9"', '"redis[hiredis]"'),
        ('"pyjwt>=2.13"', '"pyjwt"'),
    ],
)
def test_a_requirement_that_would_allow_a_bad_version_is_refused(tmp_path: Path, good: str, bad: str) -> None:
    """The base package is installed without our locks, by siblings."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert good in project
    (tmp_path / "pyproject.toml").write_text(project.replace(good, bad))
    [fault] = floors.faults(REQUIREMENTS, tmp_path / "pyproject.toml")
    assert "allows what is bad" in fault


# -- licences ---------------------------------------------------------------------------------------------------------


def test_every_licence_is_allowed_and_the_list_is_up_to_date() -> None:
    """`make licences` writes it; here nothing is left to write."""
    assert licences.check() == []


def test_what_was_written_down_is_what_the_packages_say() -> None:
    """Of every package that is installed here, and that is each but for those of other platforms."""
    everything = licences.served()
    unseen = {package.name for package in everything if licences.told_by_itself(package) is None}
    assert unseen <= {package.name for package in everything if package.marker is not None}
    assert licences.told_by_itself(Locked("typer", "0.0.1", None, (), ())) is None


def package(name: str) -> Locked:
    [found] = [locked for locked in read(SERVER) if locked.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "licence", "fault"),
    [
        ("typer", "GPL-3.0-only", "typer: GPL-3.0-only is not allowed"),
        ("typer", "LGPL-3.0-only", "typer: LGPL-3.0-only is not allowed"),
        ("typer", "MIT AND AGPL-3.0-only", "typer: MIT AND AGPL-3.0-only is not allowed"),
        ("typer", "(MIT)", "typer: (MIT) is not allowed"),
        ("typer", "ISC", "has ISC, the package says MIT"),
        ("jinja2", "MIT", "has MIT, the package says BSD-2-Clause or BSD-3-Clause"),
        ("psycopg", "LGPL-3.0-only", None),
        ("cryptography", "Apache-2.0 OR BSD-3-Clause", None),
        ("greenlet", "MIT AND PSF-2.0", None),
    ],
)
def test_a_licence_is_allowed_by_name_and_must_be_true(name: str, licence: str, fault: str | None) -> None:
    """The LGPL is for the database driver alone."""
    rules = replace(licences.policy(), packages={name: licence})
    found = licences.faults([package(name)], rules)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_one_good_choice_is_enough() -> None:
    """Whoever may choose takes the one that is allowed."""
    rules = replace(licences.policy(), packages={"x": "GPL-2.0-only OR MIT AND ISC"})
    assert licences.faults([Locked("x", "1", None, ("0",), ())], rules) == []


def test_a_package_that_nobody_has_looked_at_is_refused_and_one_that_is_gone_is_told() -> None:
    """The list stays that of what is there."""
    rules = replace(licences.policy(), packages={"gone": "MIT"})
    found = licences.faults([package("typer")], rules)
    assert found == [
        "typer: nobody has looked at its licence yet; enter it in licences.toml",
        "gone: it is not locked any more; remove it from licences.toml",
    ]


# -- the bill of materials --------------------------------------------------------------------------------------------


@pytest.fixture(params=sbom.FILES.values(), ids=sbom.FILES.keys())
def lock(request: pytest.FixtureRequest) -> Path:
    """Each lock that a server is installed from."""
    found: Path = request.param
    return found


@pytest.fixture
def bill(lock: Path) -> dict[str, Any]:
    """The bill of materials of what is installed from it."""
    found: dict[str, Any] = json.loads(sbom.text(lock))
    return found


@pytest.mark.case("DEP-04")
def test_the_bill_of_materials_is_valid_cyclonedx(lock: Path) -> None:
    """By the schema of its specification, strictly; and a licence that nobody knows would not be."""
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(sbom.text(lock)) is None
    assert validator.validate_str(sbom.text(lock).replace('"id": "ISC"', '"id": "Mine"')) is not None


@pytest.mark.case("DEP-04")
def test_the_bill_of_materials_names_everything_that_is_locked(bill: dict[str, Any], lock: Path) -> None:
    """With version, licence and the digest of every file."""
    rules = licences.policy()
    told = {
        (
            part["name"],
            part["version"],
            part["purl"],
            part["licenses"][0].get("expression") or part["licenses"][0]["license"]["id"],
            tuple(entry["content"] for entry in part["externalReferences"][0]["hashes"]),
        )
        for part in bill["components"]
    }
    assert told == {
        (each.name, each.version, f"pkg:pypi/{each.name}@{each.version}", rules.packages[each.name], each.hashes)
        for each in read(lock)
    }
    optional = {part["name"] for part in bill["components"] if part["scope"] == "optional"}
    assert "colorama" in optional  # for Windows
    assert not optional & {"uvloop", "psycopg-binary", "starlette"}
    about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert bill["metadata"]["component"]["version"] == about["version"]


def test_the_bill_of_materials_tells_who_needs_what(bill: dict[str, Any]) -> None:
    """Everything is there for somebody, and in the end for us; what the packages say of themselves is in it."""
    needs = {entry["ref"]: set(entry["dependsOn"]) for entry in bill["dependencies"]}
    assert needs.keys() == {part["bom-ref"] for part in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    reached: set[str] = set()
    ahead = {bill["metadata"]["component"]["bom-ref"]}
    while ahead:
        reached |= ahead
        ahead = set().union(*(needs[ref] for ref in ahead)) - reached
    assert reached == needs.keys()
    starlette = next(ref for ref in needs if ref.startswith("pkg:pypi/starlette@"))
    assert any(ref.startswith("pkg:pypi/anyio@") for ref in needs[starlette])
    assert any(text.startswith("anyio") for text in metadata.requires("starlette") or [])


@pytest.mark.case("DEP-04")
def test_the_bill_of_materials_is_the_same_bytes_wherever_and_whenever_it_is_made(tmp_path: Path) -> None:
    """No time, no serial number, no order that depends on a process."""
    made = []
    for number, zone in enumerate(("UTC", "Pacific/Auckland")):
        environment = os.environ | {"TZ": zone, "PYTHONHASHSEED": str(number + 1), "PYTHONPATH": str(ROOT)}
        folder = tmp_path / zone.replace("/", "-")
        program = [sys.executable, "-m", "tests.supply_chain", "sbom", str(folder)]
        subprocess.run(program, cwd=tmp_path, env=environment, check=True, capture_output=True)
        made.append({path.name: path.read_text("utf-8") for path in folder.iterdir()})
    assert made[0] == made[1] == {name: sbom.text(lock) for name, lock in sbom.FILES.items()}
    for text in made[0].values():
        assert "timestamp" not in text
        assert "serialNumber" not in text
        assert str(ROOT) not in text


def test_the_bill_of_materials_follows_the_lock() -> None:
    """Another file under the same name would show."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    packages = read(SERVER)
    changed = [replace(packages[0], hashes=(64 * "0",)), *packages[1:]]
    assert sbom.bill(changed, licences.policy(), about) != sbom.bill(packages, licences.policy(), about)
