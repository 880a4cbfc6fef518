"""The README tells the truth of today where a machine can tell."""

import re
from pathlib import Path

from identity_service.cli import app
from identity_service.settings import Settings
from tests.support.matrix import PAGE, in_order, marks_in, proofs_on

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text("utf-8")


def test_the_readme_lists_every_setting_and_no_other() -> None:
    """A setting that nobody can find is one that nobody sets."""
    listed = set(re.findall(r"IDENTITY_[A-Z0-9_]+", _README))
    assert listed == {f"IDENTITY_{name.upper()}" for name in Settings.model_fields}


def test_the_readme_names_every_command() -> None:
    """Groups stand with their commands, `users create|list|…`."""
    for group in app.registered_groups:
        assert group.typer_instance is not None
        names = {command.name or command.callback.__name__ for command in group.typer_instance.registered_commands}  # type: ignore[union-attr]
        row = next((line for line in _README.splitlines() if line.startswith(f"| `{group.name} ")), "")
        missing = {name for name in names if name not in row}
        assert not missing, f"{group.name}: {missing}"


def test_the_pages_that_the_readme_links_to_exist() -> None:
    """Within this repository."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", _README):
        assert (_ROOT / target).exists(), target


def test_every_decision_is_in_the_index() -> None:
    """And the index names no page that is not there."""
    folder = _ROOT / "docs" / "decisions"
    linked = set(re.findall(r"\]\((\d{4}[^)]+)\)", (folder / "README.md").read_text("utf-8")))
    assert linked == {path.name for path in folder.glob("[0-9]*.md")}


def test_the_conformance_page_lists_what_the_tests_say_they_prove() -> None:
    """Every section with every test that is marked with it, and nothing that is gone."""
    listed, marked = proofs_on((_ROOT / PAGE).read_text("utf-8")), marks_in(_ROOT / "tests")
    assert in_order(listed ^ marked) == [], "run make conformance"
