"""Reading the metrics of this process, as a scrape would."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import REGISTRY


@dataclass(frozen=True)
class Family:
    """A metric as the code defines it, by the name that its definition gives."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    @property
    def series(self) -> set[str]:
        """The names that its samples have."""
        suffixes = {"histogram": ("_bucket", "_count", "_sum")}.get(self.kind, ("",))
        return {self.name + suffix for suffix in suffixes}


def families() -> dict[str, Family]:
    """Return every metric of ours, by name; there are no public words for their labels."""
    found = {}
    for collector in set(REGISTRY._names_to_collectors.values()):
        name = getattr(collector, "_original_name", "")
        if name.startswith("identity_"):
            found[name] = Family(name, collector._type, tuple(collector._labelnames), collector._documentation)  # type: ignore[attr-defined]
    return found


def value(name: str, **labels: str) -> float:
    """Return what a series shows; 0 for one that is not there."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


@contextmanager
def counted(by: float, name: str, **labels: str) -> Iterator[None]:
    """Assert that a series grows by so much within the block."""
    before = value(name, **labels)
    yield
    grown = value(name, **labels) - before
    assert grown == by, f"{name}{labels} grew by {grown:g}"


def label_sets(name: str) -> set[tuple[tuple[str, str], ...]]:
    """Return the labels of every series of that name."""
    return {
        tuple(sorted(sample.labels.items()))
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name
    }
