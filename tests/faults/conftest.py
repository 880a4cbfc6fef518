"""The stage that most of these tests share: as long as all is well on it, it is not built anew."""

from collections.abc import Generator, Iterator

import pytest

from tests.faults.stage import Stage


class Stages:
    """Keeps one stage for the tests of this process, until one of them leaves it in a bad state."""

    def __init__(self) -> None:
        self._stage: Stage | None = None

    def take(self) -> Stage:
        """Return a stage on which every replica serves as it should."""
        stage, self._stage = self._stage, None
        return stage if stage is not None else Stage().__enter__()

    def give_back(self, stage: Stage) -> None:
        """Keep a stage on which all is well."""
        self._stage = stage

    def close(self) -> None:
        """Close the stage that is kept."""
        if self._stage is not None:
            self._stage.__exit__()


@pytest.fixture(scope="session")
def stages() -> Iterator[Stages]:
    stages = Stages()
    yield stages
    stages.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a fixture see whether its test has failed."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


PASSED = pytest.StashKey[bool]()


@pytest.fixture
def stage(stages: Stages, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Two replicas that serve, with everything that can break; the next test gets the same if this one passes."""
    stage = stages.take()
    try:
        yield stage
    finally:
        as_it_was = all(replica.serving for replica in stage.replicas) and not stage.spoiled
        if request.node.stash.get(PASSED, False) and as_it_was:
            stages.give_back(stage)
        else:
            stage.__exit__()
