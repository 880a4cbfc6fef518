"""The rules of the house that no linter knows, read from the code itself."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from identity_service.infra.tables import OWNERS, SCHEMA_REVISION, metadata
from identity_service.main import create_app
from identity_service.web.documented import routes_of, rule_of
from identity_service.web.oauth import FormEndpoint
from tests.support.service import test_settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "identity_service"
DYNAMIC = "?"  # a statement about a table whose name is computed


@dataclass(frozen=True)
class Module:
    """A source file, parsed."""

    name: str
    tree: ast.Module

    def within(self, *packages: str) -> bool:
        return any(self.name == package or self.name.startswith(f"{package}.") for package in packages)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[Any]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


@functools.cache
def modules() -> tuple[Module, ...]:
    """Return every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, ast.parse(path.read_text("utf-8"))))
    return tuple(found)


def spelled(node: ast.expr) -> str:
    """Return `a.b.c` for a chain of names, and "" for what is none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{spelled(node.value)}.{node.attr}"
    return ""


# -- tables -----------------------------------------------------------------------------------------------------------

_WRITERS = {"insert", "update", "delete"}
_RAW = re.compile(r"\b(?:INSERT\s+INTO|UPDATE|DELETE\s+FROM|TRUNCATE(?:\s+TABLE)?)\s+(?:ONLY\s+)?([a-z_]+|\?)", re.I)


def _literal(node: ast.AST) -> str:
    """Return the text of a string, with a question mark where an f-string computes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) if isinstance(part, ast.Constant) else DYNAMIC for part in node.values)
    return ""


def _docstrings(module: Module) -> set[int]:
    """Return the identities of the strings that are documentation."""
    return {id(statement.value) for statement in module.nodes(ast.Expr)}


def writes(module: Module) -> Iterator[tuple[str, int]]:
    """Yield the tables that a module writes, with the lines: by `insert(t)`, `t.insert()`, or in a text."""
    documentation = _docstrings(module)
    for call in module.nodes(ast.Call):
        before, _, verb = spelled(call.func).rpartition(".")
        if verb in _WRITERS:
            first = spelled(call.args[0]) if call.args else ""
            # `users.delete()` is the table's own; with arguments it is somebody of that name who was asked to.
            sides = (first,) if call.args else (before,)
            table = next((name for side in sides if (name := side.rpartition(".")[2]) in metadata.tables), None)
            if table is not None:
                yield table, call.lineno
            elif not before and first != "table":  # `insert(something)`, and we cannot tell what
                yield DYNAMIC, call.lineno
    for node in module.nodes(ast.Constant, ast.JoinedStr):
        if id(node) not in documentation:
            for table in _RAW.findall(_literal(node)):
                if table == DYNAMIC or table in metadata.tables:
                    yield table, node.lineno


def test_a_table_is_written_by_its_owner_only() -> None:
    """Whoever wants a row changed asks the module that knows the row's rules."""
    strangers = [
        f"{module.name}:{line} writes {table}"
        for module in modules()
        for table, line in writes(module)
        if table not in OWNERS or not module.within(OWNERS[table])
    ]
    assert strangers == []


def test_every_owner_really_writes_its_table() -> None:
    """The reader above sees the writes that there are, so that its silence means something."""
    written = {
        (table, owner)
        for owner in set(OWNERS.values())
        for module in modules()
        if module.within(owner)
        for table, _ in writes(module)
    }
    unwritten = {table for table, owner in OWNERS.items() if (table, owner) not in written}
    assert unwritten == {"locks"}  # its rows are made by the migration


def test_every_table_has_an_owner_that_exists() -> None:
    """A new table without an owner is noticed."""
    assert OWNERS.keys() == metadata.tables.keys()
    for owner in set(OWNERS.values()) - {"migrations"}:
        importlib.import_module(owner)


def test_the_code_asks_for_the_newest_migration() -> None:
    """`SCHEMA_REVISION` is the head of the migrations, and there is one head."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA_REVISION]


# -- who may do what --------------------------------------------------------------------------------------------------

_MAY_COMMIT = (
    "identity_service.web",
    "identity_service.cli",
    "identity_service.main",
    "identity_service.infra.database",
    "identity_service.infra.migrate",  # each revision is a transaction of its own, which alembic opens
    "identity_service.infra.migration_plan",
)


def test_only_the_edge_opens_transactions() -> None:
    """One use case is one transaction, opened in sight; nothing below the edge commits."""
    offenders = []
    for module in modules():
        if module.within(*_MAY_COMMIT):
            continue
        for call in module.nodes(ast.Call):
            name = spelled(call.func)
            opens = name.endswith((".transaction", "db.run", "database.run", ".commit", ".rollback", ".begin"))
            if opens or name in ("create_async_engine", "create_engine"):
                offenders.append(f"{module.name}:{call.lineno} calls {name}")
    assert offenders == []


_CLOCKS = {
    *("datetime.now", "datetime.utcnow", "datetime.today", "datetime.datetime.now", "datetime.datetime.utcnow"),
    *("date.today", "datetime.date.today", "time.time", "time.time_ns", "time.gmtime", "time.localtime", "func.now"),
}
# A log line's own time: nothing is decided by it.
_MAY_READ_THE_TIME = {"identity_service.main.jobs": {"datetime.now"}}


def test_nobody_reads_the_time_past_the_clock() -> None:
    """Time is handed in; what reads it elsewhere cannot be tested and knows nothing of the database's clock."""
    offenders = [
        f"{module.name}:{call.lineno} calls {spelled(call.func)}"
        for module in modules()
        if not module.within("identity_service.infra.runtime")
        for call in module.nodes(ast.Call)
        if spelled(call.func) in _CLOCKS - _MAY_READ_THE_TIME.get(module.name, set())
    ]
    assert offenders == []


def test_randomness_that_protects_comes_from_the_system() -> None:
    """`random` spreads lifetimes and refreshes and nothing else; tokens, ids and keys come from `secrets`."""
    users = {
        f"{module.name} calls {spelled(call.func)}"
        for module in modules()
        for call in module.nodes(ast.Call)
        if spelled(call.func).startswith("random.")
    }
    assert users <= {
        "identity_service.oauth.tokens calls random.random",
        "identity_service.verifier.keys calls random.uniform",
    }


def test_settings_are_read_from_the_environment_in_one_place() -> None:
    """A variable that is read anywhere else is one that nobody finds in the table of settings."""
    readers = {
        module.name
        for module in modules()
        for node in module.nodes(ast.Attribute)
        if spelled(node) in ("os.environ", "os.getenv", "os.environb")
    }
    assert readers <= {"identity_service.cli.common"}  # looks whether a variable is there, for --data-dir


def test_secrets_are_compared_in_constant_time() -> None:
    """Nothing revealed is compared with `==`."""
    offenders = [
        f"{module.name}:{node.lineno}"
        for module in modules()
        for node in module.nodes(ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Call) and spelled(side.func).endswith(".reveal")
    ]
    assert offenders == []


def test_nothing_prints() -> None:
    """Commands speak through typer, servers through structlog."""
    printers = [
        f"{module.name}:{call.lineno}"
        for module in modules()
        for call in module.nodes(ast.Call)
        if spelled(call.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert printers == []


# -- documentation ----------------------------------------------------------------------------------------------------


def _undocumented(body: list[ast.stmt], where: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{where}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node.body, f"{where}.{node.name}")


# What implements a protocol of its own package is told there what it does.
_TOLD_ELSEWHERE = re.compile(r"\.ratelimit\.\w+\.\w+Limiter\.(spend|settle|close)$|\.SystemClock\.now$")


def test_everything_public_says_what_it_does() -> None:
    """Every module, class and function that others may use has a docstring."""
    silent = [module.name for module in modules() if module.tree.body and ast.get_docstring(module.tree) is None]
    for module in modules():
        silent += _undocumented(module.tree.body, module.name)
    assert [name for name in silent if not _TOLD_ELSEWHERE.search(name)] == []


# -- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.case("ADM-25")
def test_every_route_of_the_api_says_who_may_call_it(tmp_path: Path) -> None:
    """A route without an access rule opens by accident; each depends on the door, which has one."""
    app = create_app(test_settings(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}"))
    app.state.services.hasher.close()
    routes = list(routes_of(app.routes))
    assert len(routes) > 50
    for route in routes:
        rule_of(route)  # raises for one that has none


# The protocol's endpoints stand before the framework: these authenticate their client, and those are for everybody.
_FOR_CLIENTS = {"/token", "/revoke", "/introspect"}
_FOR_EVERYBODY = {
    *("/.well-known/jwks.json", "/.well-known/oauth-authorization-server", "/.well-known/openid-configuration"),
    *("/healthz", "/readyz"),
}


def test_every_endpoint_before_the_framework_authenticates_or_is_public_on_purpose(tmp_path: Path) -> None:
    """A new endpoint has to be put on one of the two lists; there is no third kind."""
    app = create_app(test_settings(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}"))
    app.state.services.hasher.close()
    endpoints = app.edge._endpoints
    assert endpoints.keys() == _FOR_CLIENTS | _FOR_EVERYBODY
    assert {path for path, endpoint in endpoints.items() if isinstance(endpoint, FormEndpoint)} == _FOR_CLIENTS
    assert all(set(endpoints[path].methods) == {"GET", "HEAD"} for path in _FOR_EVERYBODY)


# -- tests ------------------------------------------------------------------------------------------------------------


def test_no_test_is_skipped() -> None:
    """A test that does not run proves nothing; what a test needs, the suite brings (another system's kernel aside)."""
    forbidden = ("pytest.skip", "pytest.mark.skip", "pytest.importorskip", "pytest.mark.xfail")
    skipping = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and spelled(node) in forbidden
    ]
    assert skipping == []
