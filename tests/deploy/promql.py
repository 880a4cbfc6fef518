"""Reading PromQL as far as the tests need it, and asking promtool."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.tools import tool

ROOT: Final = Path(__file__).parents[2]
MONITORING: Final = ROOT / "deploy" / "kubernetes" / "components" / "monitoring"

TARGET_LABELS: Final = {"job", "instance", "namespace", "pod", "container", "endpoint", "service", "node", "le"}
"""What Prometheus and its operator attach, and `le`; a label of ours by such a name would be renamed by them."""

_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_MATCHER = re.compile(r'([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def rules() -> list[dict[str, Any]]:
    """Return the alerting rules, in their order."""
    document = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text("utf-8"))
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def selectors(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the metrics that an expression reads, each with its matchers: label, operator, value."""
    plain = _GROUPING.sub(" ", expression)
    for found in re.finditer(r'([a-zA-Z_:][\w:]*)\s*(\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?\s*(\(?)', plain):
        name, braces, called = found.groups()
        quoted = any(text.start() < found.start() < text.end() for text in _TEXT.finditer(plain))
        inside = any(box.start() < found.start() < box.end() for box in re.finditer(r"\{[^{}]*\}|\[[^\[\]]*\]", plain))
        if quoted or inside or called or name in _WORDS or re.fullmatch(r"\d.*|[smhdwy]", name):
            continue
        matchers = [(label, operator, json.loads(value)) for label, operator, value in _MATCHER.findall(braces or "")]
        yield name, matchers


def grouped_by(expression: str) -> set[str]:
    """Return the labels that an expression groups or joins by."""
    return {label for inside in _GROUPING.findall(expression) for label in re.findall(r"\w+", inside)}


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool to its end."""
    command = [str(word) for word in (tool("promtool"), *words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_rules(alerting: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Return what promtool has to say against these rules; nothing where they are in order."""
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "checked", "rules": [dict(rule) for rule in alerting]}]}))
    done = promtool("check", "rules", path)
    return "" if done.returncode == 0 else done.stdout + done.stderr
