"""The dashboard imports into any Grafana, and shows metrics that there are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.promql import ROOT, TARGET_LABELS, check_rules, grouped_by, selectors
from tests.support.metrics import families

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "identity-service.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
OF_THE_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield each expression with its panel's title, with Grafana's variables filled in as it would."""
    for panel in SHOWN:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$namespace", "a|b")


def test_it_can_be_imported_beside_others() -> None:
    """A name of its own, no id of somebody's database, and the data source is chosen when it is opened."""
    assert DASHBOARD["uid"] == "identity-service"
    assert "id" not in DASHBOARD
    assert DASHBOARD["schemaVersion"] >= 36  # from there on a data source is named by type and uid
    assert VARIABLES.keys() == {"datasource", "namespace"}
    assert (VARIABLES["datasource"]["type"], VARIABLES["datasource"]["query"]) == ("datasource", "prometheus")

    def sources(value: object) -> Iterator[object]:
        if isinstance(value, dict):
            yield from ([value["datasource"]] if "datasource" in value else [])
            for inner in value.values():
                yield from sources(inner)
        if isinstance(value, list):
            for inner in value:
                yield from sources(inner)

    named = list(sources(DASHBOARD))
    assert len(named) > 2 * len(SHOWN)
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in named)


def test_its_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    """Grafana would silently drop one, or push it elsewhere."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24
        for cell in (
            (x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])
        ):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
    for panel in SHOWN:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) >= 1


def test_every_expression_parses(tmp_path: Path) -> None:
    """By Prometheus' own parser, as rules that would record them; each by itself, to name the one that does not."""
    recorded = [{"record": f"checked:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions())]
    assert check_rules(recorded, tmp_path) == ""
    broken = [{"record": "checked:broken", "expr": recorded[0]["expr"] + ")"}]
    assert "parse" in check_rules(broken, tmp_path)


def test_every_metric_and_label_is_one_of_ours() -> None:
    """A panel that stays empty looks like a quiet service."""
    known = {series: family for family in families().values() for series in family.series}
    shown = set()
    for title, expression in expressions():
        read = list(selectors(expression))
        assert read, title
        for metric, matchers in read:
            if metric not in OF_THE_PROCESS:
                assert metric in known, f"{title}: {metric}"
                shown.add(known[metric].name)
                labels = {label for label, _, _ in matchers}
                assert labels <= {*known[metric].labels, "namespace"}, f"{title}: {metric}"
                assert "namespace" in labels, f"{title}: {metric}"
        labels = {label for metric, _ in read if metric in known for label in known[metric].labels}
        assert grouped_by(expression) <= labels | TARGET_LABELS, title
    assert families().keys() == shown, "what is counted and not shown is looked for in vain"


def test_the_names_beside_the_lines_are_labels_of_what_is_drawn() -> None:
    """`{{…}}` of a label that was aggregated away is empty."""
    known = {series: family for family in families().values() for series in family.series}
    for panel in SHOWN:
        for target in panel["targets"]:
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            aggregated = re.search(r"\b(?:sum|max|min)\b", target["expr"]) is not None
            drawn = grouped_by(target["expr"]) if aggregated else TARGET_LABELS
            assert wanted <= drawn, panel["title"]
            assert aggregated or all(not known[m].labels for m, _ in selectors(target["expr"]) if m in known)


def test_what_is_told_of_the_database_is_never_summed() -> None:
    """Each replica shows it; with three replicas a sum would be three times the truth."""
    shared = {name for name, row in _page_rows() if "*Shared.*" in row}
    assert len(shared) >= 8
    sums = re.compile(r"\b(?:sum|avg|rate|increase)\b[^{]*?\b(identity_\w+)")
    alerts = (ROOT / "deploy/kubernetes/components/monitoring/prometheusrule.yaml").read_text("utf-8")
    for text in (*(expression for _, expression in expressions()), alerts):
        assert set(sums.findall(text)) & shared == set(), text


def _page_rows() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    return re.findall(r"^\| `(identity_\w+)` (\|.*)$", page, re.M)


@pytest.mark.parametrize("replacement", ["identity_signing_redy", "identity_signing_ready_total"])
def test_a_misspelt_metric_would_be_noticed(replacement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    misspelt = json.loads(json.dumps(SHOWN).replace("identity_signing_ready", replacement))
    monkeypatch.setattr(f"{__name__}.SHOWN", misspelt)
    with pytest.raises(AssertionError, match=replacement):
        test_every_metric_and_label_is_one_of_ours()
