"""
What the files in deploy/ promise, one rule for each promise, and for each rule what breaks it.

No schema and no API server sees a wrong probe port, a selector that picks nothing or a grace that is too short: so the
rules are ours. A rule is a generator of faults, named for what it promises; `broken_by` shows it a manifest with a
single fault, which it, and hardly any other, must find.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

from tests.deploy.site import Site


@final
@dataclass(eq=False)
class Promise:
    """One rule; `faults` is empty while the promise is kept."""

    check: Callable[[Site], Iterator[str]]
    breakages: "list[Breakage]" = field(default_factory=list)

    @property
    def name(self) -> str:
        """What is promised."""
        return self.check.__name__

    def faults(self, site: Site) -> list[str]:
        """Return what is wrong."""
        return list(self.check(site))

    def broken_by(self, what: str, change: Callable[[Site], Any]) -> None:
        """Add a single fault that this rule is there to find."""
        self.breakages.append(Breakage(self, what, change))


@final
@dataclass(frozen=True)
class Breakage:
    """A single fault; `change` works it into a copy of the site."""

    promise: Promise
    what: str
    change: Callable[[Site], Any]


PROMISES: dict[str, Promise] = {}
"""Every rule by its name."""


def promise(check: Callable[[Site], Iterator[str]]) -> Promise:
    """Make a rule of a generator of faults. Raises ValueError for a name that is taken."""
    made = Promise(check)
    if made.name in PROMISES:
        raise ValueError(f"there are two rules called {made.name}")
    PROMISES[made.name] = made
    return made
