"""
Count which sections of the RFCs the tests prove, and write it down.

A test says what it proves by `@pytest.mark.rfc(number, section)`. The marks travel with the reports, so the count is
the same whether the tests run in this process or in several. Every run that touches a marked test ends with a short
matrix; `make conformance` runs all marked tests, prints the long one and writes the page.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import pytest

OPTION: Final = "--conformance"
PAGE: Final = Path("docs", "conformance.md")
_MARK: Final = "rfc"
_NUMBER = re.compile(r"[1-9]\d*")
_SECTION = re.compile(r"(?:\d+|[A-Z])(?:\.\d+)*")
_ROW = re.compile(
    r"^\| \[([^]]+)\]\(https://www\.rfc-editor\.org/rfc/rfc(\d+)#\S+\) \| `([^`]+)` \| `([^`]+)` \|", re.M
)

_OPENING = """\
# Conformance

Which section of which RFC is proven by which test. The page claims what the tests show and no more: a section that is
not listed is not proven here, and one that is listed is proven as far as its tests go.

The page is made by `make conformance`, and only when every test on it has run and passed; do not edit it. A test names
its section by `@pytest.mark.rfc("6749", "5.2")`, and `make test` fails while the page and the tests disagree. “Cases”
says how many times the test runs, each time with other values.
"""


class Proof(NamedTuple):
    """That a test stands for a section; `file` is relative to the project, `test` the function (`Class::function`)."""

    number: str
    section: str
    file: str
    test: str


@dataclass
class Cases:
    """How many cases of a test passed, and how many did not."""

    passed: int = 0
    failed: int = 0


Matrix = Mapping[Proof, Cases]


# -- while the tests run ----------------------------------------------------------------------------------------------


@final
@dataclass(eq=False)
class ConformancePlugin:
    """
    A plugin of pytest that collects marks and outcomes; to be registered in every process of a run.

    With `--conformance` the run writes the page, provided that all marked tests took part and passed; if it cannot, it
    says why and fails.
    """

    config: pytest.Config
    collected: int = 0
    cases: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether this run is to write the page; a worker never does."""
        return bool(self.config.getoption(OPTION)) and not hasattr(self.config, "workerinput")

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Count what is marked, before anything is left out."""
        self.collected += item.get_closest_marker(_MARK) is not None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Let a test's reports carry its marks, to another process too."""
        marks = {_checked(mark.args, item.nodeid) for mark in item.iter_markers(_MARK)}
        item.user_properties.extend((_MARK, f"{number} {section}") for number, section in sorted(marks))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a case ended: it passed if its call did, and neither set-up nor tear-down failed."""
        for name, value in report.user_properties:
            if name == _MARK:
                number, section = str(value).split()
                self.cases.setdefault(report.nodeid, set()).add((number, section))
        if report.failed:  # also the report of a worker that crashed, which has no properties
            self.failed.add(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.add(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker of pytest-xdist counted; each worker collects all tests."""
        self.collected = max(self.collected, getattr(node, "workeroutput", {}).get(_MARK, 0))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the page, or find out why not; a worker only passes on its count."""
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput[_MARK] = self.collected
        elif self.writes:
            self.problems = list(self._problems(exitstatus))
            if not self.problems:
                (self.config.rootpath / PAGE).write_text(page(self.matrix()), "utf-8", newline="\n")
            elif exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the matrix, if a marked test ran: a line for each section with `--conformance`, else for each RFC."""
        matrix = self.matrix()
        if not matrix and not self.problems:
            return
        terminalreporter.section("conformance")
        for line, failed in _lines(matrix, by_section=self.writes):
            terminalreporter.line(line, red=failed)
        if self.problems:
            terminalreporter.line(f"{PAGE.as_posix()} is not written:", red=True)
            for problem in self.problems:
                terminalreporter.line(f"- {problem}", red=True)
        elif self.writes:
            terminalreporter.line(f"{PAGE.as_posix()} is written.", green=True)

    def matrix(self) -> Matrix:
        """Return what the reports have told so far."""
        counted: dict[Proof, Cases] = defaultdict(Cases)
        for nodeid, marks in self.cases.items():
            # The name ends where a case's values begin, or the group by which pytest-xdist keeps tests together.
            file, test = re.split(r"[\[@]", nodeid, maxsplit=1)[0].split("::", 1)
            for number, section in marks:
                cases = counted[Proof(number, section, file, test)]
                if nodeid in self.passed and nodeid not in self.failed:
                    cases.passed += 1
                else:
                    cases.failed += 1
        return counted

    def _problems(self, exitstatus: int) -> Iterator[str]:
        matrix = self.matrix()
        if exitstatus != pytest.ExitCode.OK or any(cases.failed for cases in matrix.values()):
            yield "not everything passed"
        if self.config.args_source is not pytest.Config.ArgsSource.TESTPATHS or len(self.cases) < self.collected:
            yield "not every marked test ran: name no tests, and leave none out"
        else:
            marked = marks_in(self.config.rootpath / "tests")
            yield from (f"marked, but did not run: {_words(proof)}" for proof in in_order(marked - matrix.keys()))
            yield from (
                f"its mark is not found in its file: {_words(proof)}" for proof in in_order(matrix.keys() - marked)
            )


def _lines(matrix: Matrix, *, by_section: bool) -> Iterator[tuple[str, bool]]:
    """Yield the lines of the matrix, and whether something failed in each."""
    groups: dict[str, list[Proof]] = defaultdict(list)
    for proof in in_order(matrix):
        groups[f"RFC {proof.number} §{proof.section}" if by_section else f"RFC {proof.number}"].append(proof)
    width = max(map(len, groups), default=0)
    for name, proofs in groups.items():
        sections, tests = len({proof.section for proof in proofs}), len({(proof.file, proof.test) for proof in proofs})
        failed = sum(matrix[proof].failed for proof in proofs)
        covered = "" if by_section else f"{sections:4} section{'s' if sections > 1 else ' '}"
        passed = sum(matrix[proof].passed for proof in proofs)
        yield (
            f"{name:{width}}{covered}{tests:5} test{'s' if tests > 1 else ' '}{passed:6} passed{failed:5} failed",
            failed > 0,
        )


# -- on the page ------------------------------------------------------------------------------------------------------


def page(matrix: Matrix) -> str:
    """Return the page's text, which depends on nothing but the tests."""
    parts = [_OPENING]
    number = None
    for proof in in_order(matrix):
        if proof.number != number:
            number = proof.number
            parts.append(f"\n## RFC {number}\n\n| section | test | file | cases |\n|---|---|---|---:|\n")
        anchor = f"{'section' if proof.section[0].isdigit() else 'appendix'}-{proof.section}"
        link = f"[{proof.section}](https://www.rfc-editor.org/rfc/rfc{number}#{anchor})"
        cases = matrix[proof]
        parts.append(f"| {link} | `{proof.test}` | `{proof.file}` | {cases.passed + cases.failed} |\n")
    return "".join(parts)


def proofs_on(text: str) -> set[Proof]:
    """Return what a page lists that `page` made."""
    return {Proof(number, section, file, test) for section, number, test, file in _ROW.findall(text)}


def in_order(proofs: Iterable[Proof]) -> list[Proof]:
    """Return proofs as a reader looks for them: by RFC and section, 9 before 10, then by file and test."""
    return sorted(proofs, key=lambda proof: (int(proof.number), _natural(proof.section), proof.file, proof.test))


def _natural(section: str) -> list[tuple[bool, int, str]]:
    parts = section.split(".")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _words(proof: Proof) -> str:
    return f"RFC {proof.number} §{proof.section}, {proof.file}::{proof.test}"


# -- in the source ----------------------------------------------------------------------------------------------------


def marks_in(folder: Path) -> set[Proof]:
    """
    Return what the tests under `folder`, which stands in the project's root, say they prove; nothing is imported.

    A mark counts where pytest sees it: on a function, a class, in `pytestmark`, and on a case, `pytest.param(…,
    marks=…)`; it may stand in a constant or in a decorator that the module defines. Raises pytest.UsageError for a mark
    that is none.
    """
    return {
        Proof(number, section, path.relative_to(folder.parent).as_posix(), test)
        for path in folder.rglob("*.py")
        for test, (number, section) in _Module(path).marked()
    }


class _Module:
    """One file of tests, parsed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._body = ast.parse(path.read_text("utf-8")).body
        self._named: dict[str, list[ast.AST]] = {name: [value] for name, value in _assigned(self._body)}
        self._named |= {node.name: [*node.body] for node in self._body if isinstance(node, ast.FunctionDef)}

    def marked(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield each test with each of its marks."""
        return self._visit(self._body, "", frozenset())

    def _visit(
        self, body: Sequence[ast.stmt], prefix: str, inherited: frozenset[tuple[str, str]]
    ) -> Iterator[tuple[str, tuple[str, str]]]:
        inherited |= self._marks([value for name, value in _assigned(body) if name == "pytestmark"])
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from self._visit(
                    node.body, f"{prefix}{node.name}::", inherited | self._marks(node.decorator_list)
                )
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # What pytest does not collect inherits nothing; a mark of its own would be a mistake to be told.
                marks = self._marks(node.decorator_list) | (inherited if node.name.startswith("test") else frozenset())
                yield from ((f"{prefix}{node.name}", mark) for mark in marks)

    def _marks(self, expressions: Iterable[ast.expr]) -> frozenset[tuple[str, str]]:
        """Return the marks in expressions and in what they name."""
        found: set[tuple[str, str]] = set()
        seen: set[str] = set()
        waiting: list[ast.AST] = list(expressions)
        while waiting:
            node = waiting.pop()
            waiting.extend(ast.iter_child_nodes(node))
            if isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                waiting.extend(self._named.get(node.id, ()))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in (f"pytest.mark.{_MARK}", f"mark.{_MARK}"):
                arguments = [argument.value if isinstance(argument, ast.Constant) else ... for argument in node.args]
                found.add(_checked(arguments, f"{self._path}:{node.lineno}"))
        return frozenset(found)


def _assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names that a body binds to a value, with the value."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _checked(arguments: Sequence[object], where: str) -> tuple[str, str]:
    """Return the number and the section of a mark; raise pytest.UsageError if it has not just these."""
    match arguments:
        case (str(number), str(section)) if _NUMBER.fullmatch(number) and _SECTION.fullmatch(section):
            return number, section
    raise pytest.UsageError(f'{where}: an rfc mark is written rfc("6749", "5.2"), both texts literal')
