"""
The alerts ring when they shall and at no other time; each has a runbook, and asks for metrics that there are.

For each alert there are series that make it ring and series that come close and do not. That these would notice a
mistake is shown on the alerts themselves: every number, comparison, name and label in an expression is falsified in
turn, and each time some case must fail.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.alert_cases import CASES
from tests.deploy.promql import MONITORING, ROOT, TARGET_LABELS, check_rules, grouped_by, promtool, rules, selectors
from tests.support.metrics import families

RUNBOOKS = ROOT / "deploy" / "runbooks"
SECTIONS = ["What it means", "What to look at", "What to do", "How it ends"]
RULES = {rule["alert"]: rule for rule in rules()}


def run_cases(rule: Mapping[str, Any], folder: Path) -> str:
    """Return what promtool says against the cases of a rule; nothing where it behaves as they say."""
    alert = rule["alert"]
    bare = {key: value for key, value in rule.items() if key not in ("annotations", "labels")}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "tested", "rules": [bare]}]}))
    tests = [
        {
            "name": case.title,
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
            "alert_rule_test": [
                {
                    "eval_time": case.at,
                    "alertname": alert,
                    "exp_alerts": [{"exp_labels": dict(labels)} for labels in case.rings],
                }
            ],
        }
        for case in CASES[alert]
    ]
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", folder / "tests.yaml")
    return "" if done.returncode == 0 else done.stdout + done.stderr


# -- the alerts behave ------------------------------------------------------------------------------------------------


def test_promtool_finds_nothing_wrong_with_the_rules(tmp_path: Path) -> None:
    """Expressions parse, templates do, and none stands there twice."""
    assert check_rules(rules(), tmp_path) == ""


def test_every_alert_has_cases_of_both_kinds() -> None:
    """And there are none of an alert that is gone."""
    assert CASES.keys() == RULES.keys()
    for alert, cases in CASES.items():
        assert {bool(case.rings) for case in cases} == {True, False}, alert
        assert len({case.title for case in cases}) == len(cases), alert


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_rings_when_it_shall_and_only_then(alert: str, tmp_path: Path) -> None:
    """By Prometheus' own evaluation."""
    assert run_cases(RULES[alert], tmp_path) == ""


# -- a mistake in an expression would be noticed ----------------------------------------------------------------------

_FLIPPED = {">": "<", "<": ">", "==": "!="}
_INVERTED = {"=": "!=", "!=": "=", "=~": "!~", "!~": "=~"}
_OTHER_WORD = {"and": "unless", "or": "and", "unless": "and", "max": "min", "min": "max", "sum": "max"}
# What makes no difference: where more than nothing is asked for, a sum says what a maximum does; and of a series that
# is only asked whether it is there, it does not matter which value is taken.
_EQUIVALENT = {
    ("ConnectionsRefused", "sum 1 → max"),
    ("PasswordHashingSaturated", "sum 1 → max"),
    ("DatabasePoolSaturated", "sum 1 → max"),
    ("JobStuck", "max 6 → min"),
    ("JobStuck", "max 4 → min"),
}


def _variants(expression: str) -> Iterator[tuple[str, str]]:
    """Yield the expression with one mistake, each by a title."""

    def each(pattern: str, make: Any) -> Iterator[tuple[str, str]]:
        for number, found in enumerate(re.finditer(pattern, expression), 1):
            for word, text in make(found):
                yield f"{word.format(number)}", expression[: found.start()] + text + expression[found.end() :]

    yield "never", "vector(1) > 2"
    yield "always", "vector(1)"
    yield from each(r"(?<= )(?:>|<|==)(?= )", lambda found: [(f"{found[0]} {{}} flipped", _FLIPPED[found[0]])])
    yield from each(
        r"(?<![\w.\[\"/|.])(?:0\.\d+|[1-9]\d*)(?![\w.\]\"])",
        lambda found: [(f"{found[0]} {{}} times {by:g}", f"{float(found[0]) * by:g}") for by in (2, 0.5)],
    )
    yield from each(
        r'(?<=\w)(=~|!~|!=|=)(?=")', lambda found: [(f"matcher {{}} {found[0]} inverted", _INVERTED[found[0]])]
    )
    yield from each(
        r'=~"([^"]*\|[^"]*)"|!~"([^"]*\|[^"]*)"',
        lambda found: [
            (f"{{}} without {word}", found[0].replace(word, "none")) for word in (found[1] or found[2]).split("|")
        ],
    )
    yield from each(r"identity_[a-z_]+", lambda found: [(f"{found[0]} {{}} misspelt", found[0] + "x")])
    yield from each(
        r"by \(([a-z_, ]+)\)",
        lambda found: [
            (f"by {{}} without {left_out}", f"by ({', '.join(label for label in labels if label != left_out)})")
            for labels in [found[1].split(", ")]
            for left_out in labels
        ],
    )
    yield from each(
        r"\b(?:and|or|unless|max|min|sum)\b",
        lambda found: [(f"{found[0]} {{}} → {_OTHER_WORD[found[0]]}", _OTHER_WORD[found[0]])],
    )


def _mistakes(rule: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rule with one mistake."""
    for title, expression in _variants(rule["expr"]):
        if (rule["alert"], title) not in _EQUIVALENT:
            yield title, {**rule, "expr": expression}
    if "for" in rule:
        minutes = int(rule["for"].removesuffix("m"))
        yield "at once", {key: value for key, value in rule.items() if key != "for"}
        yield "for three times as long", {**rule, "for": f"{3 * minutes}m"}


@pytest.mark.parametrize("alert", RULES)
def test_a_mistake_in_an_alert_fails_one_of_its_cases(alert: str, tmp_path: Path) -> None:
    """Each comparison, number, matcher, name, grouping, operator and duration is falsified, one at a time."""
    mistakes = list(_mistakes(RULES[alert]))
    assert len(mistakes) >= 5
    unnoticed = [title for title, rule in mistakes if run_cases(rule, tmp_path) == ""]
    assert unnoticed == []


# -- what they speak of exists ----------------------------------------------------------------------------------------


def test_every_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    """With a summary that is one line."""
    for alert, rule in RULES.items():
        assert rule["labels"] == {"severity": rule["labels"]["severity"], "service": "identity-service"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, alert
        assert len(rule["annotations"]["summary"]) < 80


def test_every_alert_has_its_runbook() -> None:
    """Named after it, with the four sections in their order, each with something in it."""
    for alert, rule in RULES.items():
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", alert).lower() + ".md"
        assert rule["annotations"]["runbook_url"] == f"deploy/runbooks/{name}"
        text = (RUNBOOKS / name).read_text("utf-8")
        assert text.startswith(f"# {alert}\n"), name
        parts = re.split(r"^## (.+)$", text, flags=re.M)
        assert parts[1::2] == SECTIONS, name
        assert all(len(part.strip()) > 50 for part in parts[2::2]), name


def test_every_runbook_has_its_alert() -> None:
    """The index lists the alerts with how bad each is, and leads to every page there is."""
    index = (RUNBOOKS / "README.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| \[(\w+)\]\([a-z-]+\.md\) \| (\w+) \|", index, re.M))
    assert listed == {alert: rule["labels"]["severity"] for alert, rule in RULES.items()}
    linked = set(re.findall(r"\]\(([a-z-]+\.md)\)", index))
    assert linked == {path.name for path in RUNBOOKS.glob("*.md")} - {"README.md"}
    for page in RUNBOOKS.glob("*.md"):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
            assert (RUNBOOKS / target).exists(), f"{page.name}: {target}"


def test_every_metric_that_an_alert_or_a_runbook_names_is_one_of_ours() -> None:
    """With the labels that it is asked for, and those alone that Prometheus adds."""
    known = {series: family for family in families().values() for series in family.series}
    for alert, rule in RULES.items():
        read = list(selectors(rule["expr"]))
        assert read, alert
        for metric, matchers in read:
            assert metric in known, f"{alert}: {metric}"
            assert {label for label, _, _ in matchers} <= set(known[metric].labels), f"{alert}: {metric}"
        labels = {label for metric, _ in read for label in known[metric].labels}
        assert grouped_by(rule["expr"]) <= labels | TARGET_LABELS, alert
    for page in RUNBOOKS.glob("*.md"):
        mentioned = set(re.findall(r"\bidentity_[a-z_]+", page.read_text("utf-8")))
        assert mentioned <= known.keys() | families().keys(), page.name


def test_no_label_of_ours_is_one_that_prometheus_sets() -> None:
    """It would be renamed when it is scraped, and every expression about it would be about something else."""
    assert {label for family in families().values() for label in family.labels} & TARGET_LABELS == set()


def test_the_scrape_asks_the_port_and_the_path_that_there_are() -> None:
    """By the names that the Service and the listener have."""
    monitor = yaml.safe_load((MONITORING / "servicemonitor.yaml").read_text("utf-8"))
    [endpoint] = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("management", "/metrics")
    assert monitor["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] == "identity-service"
