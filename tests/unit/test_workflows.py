"""The workflows do what a person does, with as few rights as that takes; what documents tell people to run exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from identity_service.cli import app
from tests.supply_chain.lock import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
PINNED = re.compile(r"uses: [a-z-]+/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def workflow(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return found


def zizmor(folder: Path) -> subprocess.CompletedProcess[str]:
    """Look at workflows as `make check` does."""
    command = [BIN / "zizmor", "--offline", "--persona=auditor", "--no-progress", "--quiet", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_and_pinned_actions_and_nothing_else(path: Path) -> None:
    """What CI does, anybody can do; and nobody can move what it runs."""
    text = path.read_text("utf-8")
    uses = re.findall(r"uses: .*", text)
    assert uses
    assert all(PINNED.fullmatch(line) for line in uses)
    jobs = workflow(path)["jobs"].values()
    steps = [step for job in jobs for step in job["steps"]]
    assert all(step["uses"].startswith("actions/") for step in steps if "uses" in step)
    runs = [step["run"] for step in steps if "run" in step]
    assert runs
    for run in runs:
        command, target = run.split()
        assert (command, target in TARGETS) == ("make", True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_and_nothing_more(path: Path) -> None:
    """It keeps no credentials, knows no secrets, ends in time, and never runs a stranger's code with our rights."""
    content = workflow(path)
    assert content["permissions"] == {}
    for job in content["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    text = path.read_text("utf-8")
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert "workflow_run" not in text


def test_the_tests_of_upgrades_get_the_history() -> None:
    """Without it they fail, as they should."""
    steps = workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["steps"]
    assert steps[0]["with"]["fetch-depth"] == 0
    assert steps[-1]["run"] == "make test"


def test_every_python_that_is_promised_is_tested() -> None:
    """By the classifiers of the package."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    promised = re.findall(r"Programming Language :: Python :: (\d\.\d+)", project)
    matrix = workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert matrix == promised


def test_an_auditor_of_workflows_finds_nothing() -> None:
    """The strictest it knows."""
    looked = zizmor(ROOT / ".github")
    assert looked.returncode == 0, looked.stdout


@pytest.mark.parametrize(
    ("good", "bad", "finding"),
    [
        ("@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2", "@v6", "unpinned-uses"),
        ("persist-credentials: false", "persist-credentials: true", "artipacked"),
        ("permissions: {}", "permissions: write-all", "excessive-permissions"),
        ("- run: make check", "- run: echo ${{ github.event.pull_request.title }}", "template-injection"),
        ("  pull_request:", "  pull_request_target:", "dangerous-triggers"),
    ],
)
def test_the_auditor_would_find_a_fault(tmp_path: Path, good: str, bad: str, finding: str) -> None:
    """Each planted in a copy of its own."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert good in text
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (folder / "ci.yml").write_text(text.replace(good, bad))
    looked = zizmor(tmp_path / ".github")
    assert looked.returncode != 0
    assert finding in looked.stdout


@pytest.mark.parametrize(
    ("schema", "paths"),
    [("vendor.github-workflows", WORKFLOWS), ("vendor.dependabot", [ROOT / ".github" / "dependabot.yml"])],
)
def test_what_is_for_github_is_of_the_form_that_github_reads(schema: str, paths: list[Path]) -> None:
    """A key that is misspelled is not heeded."""
    command = [BIN / "check-jsonschema", "--builtin-schema", schema, *map(str, paths)]
    looked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert looked.returncode == 0, looked.stdout + looked.stderr


def test_make_check_does_all_that_needs_no_network() -> None:
    """Who runs it locally hears what CI would say."""
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe is not None
    assert "-m tests.supply_chain check" in recipe[1]
    assert "zizmor --offline --persona=auditor" in recipe[1]
    assert "audit " not in recipe[1].replace("=auditor ", "")


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/upgrades.md"])
def test_every_command_that_a_document_tells_people_to_run_exists(document: str) -> None:
    """With its options: in an emergency nobody looks for the right spelling."""
    text = (ROOT / document).read_text("utf-8")
    told = re.findall(r"\bidentity-service ([^`\n]+)", text)
    assert len(told) > 2
    for line in told:
        command: Any = typer.main.get_command(app)
        words = line.split()
        while words and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
        assert all(word.startswith("--") or word.isupper() or word.isdigit() for word in words), line
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS
