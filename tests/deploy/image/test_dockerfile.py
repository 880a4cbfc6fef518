"""What can be said of the Dockerfile without building it; the rest is for `make image-test`."""

import re
import tomllib

import pytest

from tests.deploy.image.building import EPOCH, ROOT
from tests.deploy.image.faults import IN_IMAGES, IN_IMAGES_THAT_RUN, IN_MANIFESTS
from tests.deploy.image.stand_in import base_of

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
STEPS = re.sub(r"\\\n|^#.*\n", " ", DOCKERFILE, flags=re.MULTILINE).splitlines()


@pytest.mark.case("DEP-04")
def test_the_label_says_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f'org.opencontainers.image.version="{project["version"]}"' in DOCKERFILE


@pytest.mark.case("DEP-04")
def test_the_base_is_an_argument_in_every_stage() -> None:
    """And its default is a version, of which no digest is made up here."""
    name, minor, release = base_of(DOCKERFILE)
    assert (name, minor, release) == ("docker.io/library/python:3.13-slim-bookworm", "3.13", "bookworm")
    stages = [step for step in STEPS if step.startswith("FROM ")]
    assert stages == ["FROM ${PYTHON_IMAGE} AS build", "FROM ${PYTHON_IMAGE}"]


@pytest.mark.case("DEP-04")
def test_nothing_is_installed_without_a_hash() -> None:
    """What comes from an index is a wheel whose hash is on record; our own wheel comes from the step before."""
    installs = [part for step in STEPS for part in step.split("&&") if "pip" in part and " install " in part]
    assert len(installs) == 3
    for install in installs:
        words = set(install.split())
        assert {"--no-deps", "--no-compile"} <= words
        assert "--no-index" in words or {"--require-hashes", "--only-binary=:all:"} <= words


@pytest.mark.case("DEP-06")
def test_only_what_is_named_gets_near_a_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    wanted = ("LICENSE", "README.md", "pyproject.toml", "identity_service", "migrations")
    assert [line for line in lines if line.startswith("!")] == [
        *(f"!{name}" for name in wanted),
        *("!requirements/build.txt", "!requirements/server.txt", "!requirements/server-otel.txt"),
    ]


def test_the_place_of_building_has_left_no_trace() -> None:
    """A mirror, a proxy and their authorities belong to whoever builds."""
    assert not re.search(r"(?i)proxy|index-url|trusted-host|\.crt|\.pem|ssl_cert|pip\.conf", DOCKERFILE)


def test_the_files_of_a_tested_image_have_the_time_that_make_image_gives_them() -> None:
    """Or what was shown to be the same bytes would not be what people build."""
    assert f"epoch={EPOCH};" in (ROOT / "Makefile").read_text("utf-8")


def test_every_fault_can_still_be_made() -> None:
    """A mutant whose text has gone from its file would prove nothing, and only be noticed when the mutants are run."""
    for fault in (*IN_IMAGES, *IN_IMAGES_THAT_RUN, *IN_MANIFESTS):
        for name, old, _ in fault.edits:
            place = ROOT / "deploy" / name if fault in IN_MANIFESTS else ROOT / name
            assert old in place.read_text("utf-8"), f"{fault.what}: {name}"
