"""The page about metrics says what the code shows, no less and no more."""

import re
from pathlib import Path

import pytest

from identity_service.infra.telemetry.metrics import MOST_CLIENTS
from identity_service.settings import Settings
from tests.support.metrics import families

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
ROWS = {
    name: (kind, labels, unit, meaning)
    for name, kind, labels, unit, meaning in re.findall(
        r"^\| `(identity_\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.M
    )
}


def test_the_page_lists_every_metric_and_no_other() -> None:
    """Each in one row."""
    assert ROWS.keys() == families().keys()
    assert len(re.findall(r"^\| `identity_", PAGE, re.M)) == len(ROWS)
    assert set(re.findall(r"\bidentity_\w+", PAGE)) == ROWS.keys()


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_says_what_the_code_says(name: str) -> None:
    """Its kind, its labels in their order, its unit, and the words that a scrape shows."""
    family = families()[name]
    kind, labels, unit, meaning = ROWS[name]
    assert kind == family.kind
    assert tuple(re.findall(r"`(\w+)`", labels)) == family.labels
    assert bool(family.labels) == ("`" in labels)
    assert meaning.startswith(family.text)
    assert ("Unix time" in family.text or "timestamp" in name) == (unit == "time stamp")
    assert (name.endswith("_seconds") and unit != "time stamp") == (unit == "seconds")


def test_the_page_names_the_settings_and_numbers_that_there_are() -> None:
    """Those of the traces among them."""
    settings = {f"IDENTITY_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"IDENTITY_[A-Z_]+", PAGE)) <= settings
    assert f"the first {MOST_CLIENTS} that a process meets" in PAGE
    assert f"`IDENTITY_TRACES_RATIO` ({Settings.model_fields['traces_ratio'].default})" in PAGE
