"""The README tells the truth of today where a machine can tell."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI

from identity_service.cli import app
from identity_service.infra.ratelimit import Rule, catalogue
from identity_service.infra.ratelimit.catalogue import api_key_rule, caller_rule, client_rule, network_rule
from identity_service.main import create_app
from identity_service.settings import Settings
from identity_service.web.documented import routes_of, rule_of
from tests.support.matrix import PAGE, in_order, marks_in, proofs_on
from tests.support.service import BOOTSTRAP_SECRET, test_settings

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text("utf-8")
_API = (_ROOT / "docs" / "api.md").read_text("utf-8")
_ROUTES, _, _REST = _API.partition("\n## Bodies\n")
_BODIES = _REST.partition("\n## ")[0]


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


@pytest.fixture
def app_of_everything(tmp_path: Path) -> FastAPI:
    """The application with everything switched on."""
    everything = test_settings(
        f"sqlite+aiosqlite:///{tmp_path / 'x.db'}",
        registration="open",
        bootstrap_secret=BOOTSTRAP_SECRET,
    )
    app = create_app(everything)
    app.state.services.hasher.close()
    return app


def test_the_api_page_lists_every_route_with_its_scope(app_of_everything: FastAPI) -> None:
    """A page that lists less hides something, one that lists more promises it."""
    app = app_of_everything
    offered = {
        (f"{method} {route.path}", rule_of(route).scope or "anybody")
        for route in routes_of(app.routes)
        for method in route.methods or ()
        if route.include_in_schema
    }
    assert set(re.findall(r"^\| `([A-Z]+ /v1/[^`]+)` \| `?([a-z:]+)`? \|", _ROUTES, re.M)) == offered


def test_the_api_page_lists_every_member_of_every_body(app_of_everything: FastAPI) -> None:
    """Which must be there, and in parentheses which may."""
    listed = {}
    for route, members in re.findall(r"^\| `([A-Z]+ /v1/[^`]+)` \| (.+) \|$", _BODIES, re.M):
        may = set(re.findall(r"\(`(\w+)`", members))
        listed[route] = (set(re.findall(r"`(\w+)`", members)) - may, may)
    must, may = listed["POST /v1/admin/clients"]  # "and what a change may say"
    listed["POST /v1/admin/clients"] = (must, may | (listed["PATCH /v1/admin/clients/{client_id}"][1] - must))
    described = app_of_everything.openapi()
    offered = {}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            if references := re.findall(r"#/components/schemas/(\w+)", str(content.get("application/json", ""))):
                schema = described["components"]["schemas"][references[0]]
                must = set(schema.get("required", ()))
                offered[f"{method.upper()} {path}"] = (must, set(schema["properties"]) - must)
    assert listed == offered


def test_the_api_page_lists_every_limit_with_its_numbers() -> None:
    """What is let through at once, and the interval at which plain limits go on."""
    listed = {
        name: (int(burst), rest)
        for name, burst, rest in re.findall(r"^\| `([a-z_.]+)` \| [^|]+ \| (\d+) \| ([^|]+) \|", _API, re.M)
    }
    defaults = Settings.model_fields
    general = [rule(defaults["client_rate"].default) for rule in (client_rule, caller_rule, network_rule)]
    configured = (*general, api_key_rule(defaults["api_key_rate"].default))
    constants = [rule for rule in vars(catalogue).values() if isinstance(rule, Rule)]
    rules = {rule.name: rule for rule in (*constants, *configured)}
    assert {name: burst for name, (burst, _) in listed.items()} == {name: rule.burst for name, rule in rules.items()}
    for name, rule in rules.items():
        first = rule.interval if rule.growth == 1 else rule.interval * rule.growth
        assert listed[name][1].startswith(f"{first:g} s"), name


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
