"""The list of audit events and the code that writes them know the same names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from identity_service.accounts.refresh_families import Verdict
from identity_service.infra.audit import EVENTS
from identity_service.infra.audit.events import check_known

PACKAGE = Path(__file__).parents[2] / "identity_service"
NAME = re.compile(r"[a-z_]+\.[a-z_]+")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class File:
    """A source file, with what its functions and tables are called."""

    def __init__(self, path: Path) -> None:
        self.name = str(path.relative_to(PACKAGE))
        self.tree = ast.parse(path.read_text("utf-8"))
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def events(self) -> Iterator[tuple[str, int]]:
        """Yield what is counted, or handed on with a transaction, and looks like an event; with its line."""
        for scope in [*self.functions, self.tree]:
            for call in calls(scope):
                counted = isinstance(call.func, ast.Attribute) and call.func.attr == "count"
                if counted or any(isinstance(given, ast.Name) and given.id == "tx" for given in call.args):
                    named = [keyword.value for keyword in call.keywords if keyword.arg == "event"]
                    for argument in [*call.args, *named]:
                        for text in self.texts(argument, scope):
                            if NAME.fullmatch(text):
                                yield text, call.lineno

    def texts(self, node: ast.expr, scope: ast.AST) -> Iterator[str]:
        """Yield the texts that an expression can be; of what is computed, only the beginning."""
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.IfExp():
                yield from self.texts(node.body, scope)
                yield from self.texts(node.orelse, scope)
            case ast.Name():
                yield from self._values(node.id, scope)
            case ast.Subscript(value=ast.Name(id=table)):
                yield from self._values(table, self.tree)
            case ast.Dict():
                for value in node.values:
                    yield from self.texts(value, scope)
            case ast.JoinedStr(
                values=[ast.Constant(value=str(beginning)), ast.FormattedValue(value=ast.Name(id=rest))]
            ):
                for word in self._handed(rest, scope):
                    yield beginning + word
            case ast.JoinedStr(values=[ast.Constant(value=str(beginning)), *_]):
                yield f"{beginning}computed"

    def _values(self, variable: str, scope: ast.AST) -> Iterator[str]:
        """Yield the texts that a variable is set to."""
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
                    yield from self.texts(node.value, scope)

    def _handed(self, parameter: str, scope: ast.AST) -> Iterator[str]:
        """Yield the texts that the callers of a function of this file hand it."""
        if not isinstance(scope, Function):
            return
        names = [argument.arg for argument in scope.args.args]
        place = names.index(parameter) - (names[0] == "self")
        for call in calls(self.tree):
            if isinstance(call.func, ast.Attribute) and call.func.attr == scope.name and len(call.args) > place:
                yield from self.texts(call.args[place], self.tree)


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def written() -> dict[str, set[str]]:
    """Return every event that the code writes, with the places."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = File(path)
        for event, line in file.events():
            found.setdefault(event, set()).add(f"{file.name}:{line}")
    return found


def test_every_event_in_the_code_is_described() -> None:
    """One that is not would end its act with an error, and only when it happens."""
    unknown = {event: places for event, places in written().items() if event not in EVENTS}
    assert unknown.keys() == {"refresh.computed"}, "describe them in EVENTS"


def test_the_reader_sees_the_ways_in_which_events_are_written() -> None:
    """Directly, by a variable, through a helper, for what a stranger fails at; so its silence means something."""
    found = written().keys()
    assert {"grant.password", "client.enabled", "client.disabled", "token.revoked", "sign_in.failed"} <= found
    assert {"key.rotation_scheduled", "data_key.created", "audit.exported", "audit.pruned"} <= found


def test_every_verdict_that_ends_a_family_has_its_event() -> None:
    """The name of that event is made from the verdict."""
    ending = {f"refresh.{verdict}" for verdict in Verdict if verdict.ends_family}
    assert ending == {event for event in EVENTS if event.startswith("refresh.")}


def test_an_event_is_described_in_one_line() -> None:
    """A name that fits its column, and what it means."""
    for event, meaning in EVENTS.items():
        check_known(event)
        assert NAME.fullmatch(event)
        assert len(event) <= 64
        assert 15 <= len(meaning) <= 110
        assert "\n" not in meaning
        assert not meaning.endswith(".")
    assert len(set(EVENTS.values())) == len(EVENTS)
