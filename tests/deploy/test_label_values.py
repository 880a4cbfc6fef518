"""
What alerts and panels compare labels with are values that the service gives them.

An alert on a verdict that is spelled otherwise in the code is silent for ever, and nothing else would notice.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from identity_service.accounts.refresh_families import Verdict
from identity_service.infra import database
from identity_service.infra.ratelimit import Rule, catalogue
from identity_service.infra.telemetry.metrics import count_request
from identity_service.main import create_app
from identity_service.web.documented import routes_of
from tests.deploy.promql import rules, selectors
from tests.deploy.test_dashboard import expressions
from tests.support.metrics import families, label_sets
from tests.support.service import test_settings


def matchers() -> Iterator[tuple[str, str, str]]:
    """Yield each value that a label of ours is compared with: metric, label, and one alternative of the pattern."""
    for expression in (*(rule["expr"] for rule in rules()), *(expression for _, expression in expressions())):
        for metric, found in selectors(expression):
            for label, operator, value in found:
                for alternative in value.split("|") if "~" in operator else [re.escape(value)]:
                    if label != "namespace":
                        yield metric, label, alternative


@pytest.fixture
def given(tmp_path: Path) -> dict[str, set[str]]:
    """The values that labels can have, by label; those of counters that exist from the start, from the registry."""
    app = create_app(test_settings(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}"))
    app.state.services.hasher.close()
    for status in (200, 400, 500):
        count_request("GET", "/healthz", status, 0.001)
    shown = {label: set[str]() for family in families().values() for label in family.labels}
    for family in families().values():
        for series in family.series:
            for labels in label_sets(series):
                for label, value in labels:
                    shown.setdefault(label, set()).add(value)
    shown["route"] = set(app.edge._endpoints) | {route.path for route in routes_of(app.routes)}
    shown["limit"] = {rule.name for rule in vars(catalogue).values() if isinstance(rule, Rule)}
    shown["verdict"] &= set(Verdict)
    shown["outcome"] |= {"issued", "done"}
    return shown


def test_every_value_that_a_label_is_compared_with_can_occur(given: dict[str, set[str]]) -> None:
    """Patterns as well: each alternative of them matches something."""
    compared = set(matchers())
    assert len(compared) > 12
    impossible = {
        (metric, label, wanted)
        for metric, label, wanted in compared
        if not any(re.fullmatch(wanted, value) for value in given[label])
    }
    assert impossible == set()


def test_the_kinds_of_database_trouble_are_those_of_the_exceptions(given: dict[str, set[str]]) -> None:
    """Each has its own word, and its counter from the start."""
    kinds = {
        trouble.kind for trouble in (database.DatabaseUnavailable, database.PoolExhausted, database.TransactionConflict)
    }
    assert given["kind"] == kinds
    assert len(kinds) == 3
