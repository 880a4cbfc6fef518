"""When the page of proofs is written and when it is not, as small projects show whose tests are run with the plugin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.matrix import OPTION, PAGE, Cases, Matrix, Proof, page

_ROOT = Path(__file__).parents[2]
_PATIENCE = 300.0  # seconds; a run takes one
_BEFORE = "what an earlier run has written"

CONFIGURATION = """
[pytest]
testpaths = tests
addopts = --strict-markers
markers =
    rfc(number, section): the section
"""
CONFTEST = """
from tests.support.matrix import OPTION, ConformancePlugin

def pytest_addoption(parser):
    parser.addoption(OPTION, action="store_true")

def pytest_configure(config):
    config.pluginmanager.register(ConformancePlugin(config))
"""
GOOD = """
import pytest

@pytest.mark.rfc("6749", "5.2")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_refusals(number): ...

@pytest.mark.rfc("6749", "10.3")
@pytest.mark.rfc("9068", "4")
def test_tokens(): ...

def test_nothing_of_the_kind(): ...
"""
PROVEN: Matrix = {
    Proof("6749", "5.2", "tests/test_good.py", "test_refusals"): Cases(passed=3),
    Proof("6749", "10.3", "tests/test_good.py", "test_tokens"): Cases(passed=1),
    Proof("9068", "4", "tests/test_good.py", "test_tokens"): Cases(passed=1),
}
FAULTS = {
    "in its call": """
import pytest

@pytest.mark.rfc("9068", "4")
@pytest.mark.parametrize("number", [1, 2])
def test_claims(number):
    assert number == 1
""",
    "after its call": """
import pytest

@pytest.fixture
def room():
    yield
    raise OSError

@pytest.mark.rfc("9068", "4")
def test_claims(room): ...
""",
    "by not running": """
import pytest

@pytest.mark.rfc("9068", "4")
@pytest.mark.skip(reason="another day")
def test_claims(): ...
""",
}


class Project:
    """A folder with tests, in which pytest runs with the plugin and without anything else that is installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("docs", "tests"):
            (folder / name).mkdir()
        (folder / "pytest.ini").write_text(CONFIGURATION, "utf-8")
        (folder / "conftest.py").write_text(CONFTEST, "utf-8")
        (folder / PAGE).write_text(_BEFORE, "utf-8")
        self.add("test_good.py", GOOD)

    def add(self, name: str, text: str) -> None:
        """Put a file beside the good tests."""
        (self._folder / "tests" / name).write_text(text, "utf-8")

    def run(self, *arguments: str) -> tuple[pytest.ExitCode, str]:
        """Return how pytest ended and what it said."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", *arguments],
            cwd=self._folder,
            env={**inherited, "PYTHONPATH": str(_ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=_PATIENCE,
            check=False,
        )
        return pytest.ExitCode(ended.returncode), ended.stdout

    @property
    def page(self) -> str:
        """What is written."""
        return (self._folder / PAGE).read_text("utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose tests all pass, with the page of an earlier run."""
    return Project(tmp_path)


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_the_page_is_written_when_every_marked_test_has_passed(project: Project, processes: tuple[str, ...]) -> None:
    """With the same counts, however many processes the tests were spread over."""
    ended, said = project.run(OPTION, *processes)
    assert (ended, project.page) == (pytest.ExitCode.OK, page(PROVEN)), said
    assert "docs/conformance.md is written." in said
    for line in (
        "RFC 6749 §5.2     1 test      3 passed    0 failed",
        "RFC 6749 §10.3    1 test      1 passed    0 failed",
        "RFC 9068 §4       1 test      1 passed    0 failed",
    ):
        assert line in said


def test_tests_without_a_mark_may_be_left_out(project: Project) -> None:
    ended, said = project.run(OPTION, "-m", "rfc")
    assert (ended, project.page) == (pytest.ExitCode.OK, page(PROVEN)), said


def test_a_run_that_is_not_asked_to_write_sums_up_and_writes_nothing(project: Project) -> None:
    ended, said = project.run()
    assert (ended, project.page) == (pytest.ExitCode.OK, _BEFORE), said
    assert "RFC 6749   2 sections    2 tests     4 passed    0 failed" in said
    assert "RFC 9068   1 section     1 test      1 passed    0 failed" in said
    assert "written" not in said


@pytest.mark.parametrize(("fault", "passed"), list(zip(FAULTS, (2, 1, 1), strict=True)), ids=FAULTS)
def test_the_page_is_not_written_when_a_marked_test_has_failed(project: Project, fault: str, passed: int) -> None:
    """Nor when one was skipped, for which alone pytest would end well."""
    project.add("test_bad.py", FAULTS[fault])
    ended, said = project.run(OPTION)
    assert (ended, project.page) == (pytest.ExitCode.TESTS_FAILED, _BEFORE), said
    assert f"RFC 9068 §4       2 tests     {passed} passed    1 failed\n" in said
    assert "docs/conformance.md is not written:\n- not everything passed\n" in said


def test_the_page_is_not_written_when_another_test_has_failed(project: Project) -> None:
    project.add("test_bad.py", "def test_claims():\n    assert False\n")
    ended, said = project.run(OPTION)
    assert (ended, project.page) == (pytest.ExitCode.TESTS_FAILED, _BEFORE), said
    assert "RFC 9068 §4       1 test      1 passed    0 failed\n" in said
    assert "docs/conformance.md is not written:\n- not everything passed\n" in said


@pytest.mark.parametrize(
    "selection",
    [("-k", "not tokens"), ("-k", "not refusals or 1", "-n", "2"), ("tests",), ("--ignore", "tests/test_more.py")],
    ids=["a test left out", "a case left out by two workers", "a path named", "a file left out"],
)
def test_the_page_is_not_written_when_a_marked_test_may_not_have_run(
    project: Project, selection: tuple[str, ...]
) -> None:
    project.add("test_more.py", GOOD)
    ended, said = project.run(OPTION, *selection)
    assert (ended, project.page) == (pytest.ExitCode.TESTS_FAILED, _BEFORE), said
    assert "failed" not in said.replace("0 failed", "")
    if "--ignore" in selection:
        assert "- marked, but did not run: RFC 6749 §5.2, tests/test_more.py::test_refusals\n" in said
    else:
        assert "docs/conformance.md is not written:\n- not every marked test ran: name no tests" in said


@pytest.mark.parametrize("section", ["SECTION", '"4"[:]'], ids=["a name", "an expression"])
def test_a_mark_that_cannot_be_read_off_its_file_is_an_error_of_its_author(project: Project, section: str) -> None:
    project.add("test_bad.py", marked(f'rfc("9068", {section})'))
    ended, said = project.run(OPTION)
    assert (ended, project.page) == (pytest.ExitCode.USAGE_ERROR, _BEFORE), said
    assert f"{Path('tests', 'test_bad.py')}:6: an rfc mark is written" in said


@pytest.mark.parametrize("mark", ['rfc("RFC 9068", "4")', 'rfc("9068", "§4")', 'rfc(9068, "4")', 'rfc("9068")'])
def test_a_mark_that_names_no_section_fails_its_test(project: Project, mark: str) -> None:
    """Also in a run that writes nothing."""
    project.add("test_bad.py", marked(mark))
    ended, said = project.run()
    assert (ended, project.page) == (pytest.ExitCode.TESTS_FAILED, _BEFORE), said
    assert "tests/test_bad.py::test_claims: an rfc mark is written" in said


def marked(mark: str) -> str:
    """Return a file with one test, which has that mark."""
    return f'import pytest\n\nSECTION = "4"\n\n\n@pytest.mark.{mark}\ndef test_claims(): ...\n'
