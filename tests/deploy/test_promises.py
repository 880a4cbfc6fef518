"""
Every promise of deploy/ is kept, and every rule can tell.

The rules are in `promises/`. A rule that nothing breaks is one that nobody knows to work, so each comes with single
faults, and each fault must be found by the rule that it was made for and by hardly any other.
"""

import importlib
import pkgutil
import sys
from typing import Any

import pytest

from tests.deploy import promises
from tests.deploy.promises import PROMISES, Breakage
from tests.deploy.site import Facts, Site

for module in pkgutil.iter_modules(promises.__path__):
    importlib.import_module(f"{promises.__name__}.{module.name}")

_BREAKAGES = [breakage for promise in PROMISES.values() for breakage in promise.breakages]
_AT_MOST = 3


@pytest.fixture(scope="module")
def facts() -> Facts:
    """What the code says."""
    return Facts.of_the_code()


@pytest.fixture(scope="module")
def site(facts: Facts) -> Site:
    """What is in deploy/."""
    return Site.as_shipped(facts)


def _marked(name: str) -> Any:
    """Return a rule's name with the rows of the threat list that its module stands for."""
    module = sys.modules[PROMISES[name].check.__module__]
    return pytest.param(name, marks=[pytest.mark.case(case) for case in getattr(module, "CASES", ())])


@pytest.mark.parametrize("name", [_marked(name) for name in sorted(PROMISES)])
def test_the_promise_is_kept(site: Site, name: str) -> None:
    """By what is in deploy/ as it is."""
    assert PROMISES[name].faults(site) == []


@pytest.mark.parametrize("breakage", _BREAKAGES, ids=[breakage.what for breakage in _BREAKAGES])
def test_a_single_fault_is_found(site: Site, breakage: Breakage) -> None:
    """By the rule that it was made for, and by at most two others."""
    broken = site.copy()
    breakage.change(broken)
    finders = {name for name, promise in PROMISES.items() if promise.faults(broken)}
    assert breakage.promise.name in finders
    assert len(finders) <= _AT_MOST, finders


def test_every_rule_is_broken_by_something() -> None:
    """And there are as many rules as there were promises, at least."""
    assert [name for name, promise in PROMISES.items() if not promise.breakages] == []
    assert len({breakage.what for breakage in _BREAKAGES}) == len(_BREAKAGES)
    assert len(PROMISES) >= 100
