"""
Fail the test in which a secret is written into a log, whichever test it is.

A few tests look for secrets in logs; this looks during all the others, too. Every event of the service in this process
is rendered as in production, at its most talkative, and each line is searched as it is written. A server in a process
of its own is searched when it has ended. The report says which logger, which event and which kind of secret, never the
secret. The last lines in which there is none are kept until the next test, and shown if this one fails.
"""

import json
import logging
import re
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any, Final, TextIO, cast, final
from urllib.parse import quote, quote_plus

import pytest
import structlog

from identity_service.infra.telemetry import configure_logging

OPTION: Final = "--no-canary"
_SHORTEST: Final = 12  # letters; a shorter constant could be a word of the log's own
_LONGEST_EVENT: Final = 80
_KEPT: Final = 40  # lines
_NOT_KEPT: Final = '"level":"debug"'
_KINDS: Final = {
    "client secret": r"(?<![0-9A-Za-z])cs_[0-9A-Za-z]{30,}",
    "refresh token": r"(?<![0-9A-Za-z])rt_[0-9A-Za-z]{30,}",
    "token from a mail": r"(?<![0-9A-Za-z])(?:ev|pr|ec)_[0-9A-Za-z]{30,}",
    "API key": r"idk_[0-9A-Za-z]{11}_[0-9A-Za-z]{20,}",
    "JWT": r"eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}",
    "authorization": r"(?:[Bb]asic|[Bb]earer) [0-9A-Za-z+/._~-]{16,}",
}
# What every one of these holds; most lines hold none, and are done with.
_HINTS: Final = ("cs_", "rt_", "ev_", "pr_", "ec_", "idk_", "eyJ", "asic ", "earer ")
_PATTERNS: Final = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
_CONSTANTS: Final = ("PASSWORD", "MASTER_KEY")
_NOT_THE_SOURCE: Final = ("structlog", "logging", __name__)


@dataclass(frozen=True)
class Leak:
    """A secret that was seen: what kind, in which event, by which logger."""

    kind: str
    event: str
    logger: str

    def __str__(self) -> str:
        return f"{self.kind} in the event {self.event!r} of {self.logger}"


@final
class Scanner:
    """A stream for log lines that keeps what it found, and the last lines it found nothing in; for any thread."""

    def __init__(self) -> None:
        self._found: list[Leak] = []
        self._last: deque[str] = deque(maxlen=_KEPT)
        self._known: frozenset[str] = frozenset()

    def learn(self, secrets: Iterable[str]) -> None:
        """Look for these as well, also as they are spelled in a URL and in a form."""
        long_ones = [secret for secret in secrets if len(secret) >= _SHORTEST]
        self._known |= {spelled for one in long_ones for spelled in (one, quote(one, safe=""), quote_plus(one))}

    def write(self, line: str) -> int:
        """Search one line, as a logger writes it."""
        if kinds := self._kinds_in(line):
            event, logger = self._told(line)
            self._found += [Leak(kind, event, logger or _caller()) for kind in kinds]
        elif _NOT_KEPT not in line:
            self._last.append(line)
        return len(line)

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def scan(self, text: str, source: str) -> None:
        """Search a whole log that was written elsewhere, and call its loggers `source`."""
        for line in text.splitlines():
            if kinds := self._kinds_in(line):
                event, logger = self._told(line)
                self._found += [Leak(kind, event, f"{source}, {logger}" if logger else source) for kind in kinds]
            elif _NOT_KEPT not in line:
                self._last.append(f"{source}: {line}\n")

    def begin(self) -> None:
        """Keep no line of what was before."""
        self._last.clear()

    def told(self) -> str:
        """Return the last lines since then in which there was no secret, without those for finding faults."""
        return "".join(tuple(self._last))

    def sees(self, text: str) -> bool:
        """Return whether a text holds a secret."""
        return bool(self._kinds_in(text))

    def take(self) -> list[Leak]:
        """Return what was found since the last time."""
        found, self._found = self._found, []
        return list(dict.fromkeys(found))

    def _kinds_in(self, line: str) -> list[str]:
        kinds = ["constant of the tests"] if any(secret in line for secret in self._known) else []
        if any(hint in line for hint in _HINTS):
            kinds += [kind for kind, pattern in _PATTERNS.items() if pattern.search(line)]
        return kinds

    def _told(self, line: str) -> tuple[str, str | None]:
        """Return the event and the logger that a line names; the event itself may be what must not be seen."""
        try:
            told = json.loads(line)
            event, logger = str(told.get("event")), told.get("logger")
        except (ValueError, AttributeError):
            return "(no JSON)", None
        return "(not shown)" if self.sees(event) else event[:_LONGEST_EVENT], logger


SCANNER: Final = Scanner()
"""The one of this process."""


def _caller() -> str:
    """Return the module that is logging right now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in _NOT_THE_SOURCE and name not in _NOT_THE_SOURCE:
            return name
        frame = frame.f_back
    return "an unknown module"


def constants_of(module: ModuleType) -> Iterator[str]:
    """Yield what a test module calls a password or a master key."""
    for name, value in vars(module).items():
        if name.endswith(_CONSTANTS) and isinstance(value, str):
            yield value


@final
class CanaryPlugin:
    """Sends every log of this process to the scanner, and turns what it finds into failed tests."""

    def __init__(self) -> None:
        self._installed: dict[str, Any] = {}
        self._handlers: list[logging.Handler] = []

    def pytest_configure(self) -> None:
        """Begin before anything is logged."""
        self._install()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn the constants of the tests that will run, and of what helps them."""
        modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
        modules |= {module for name, module in tuple(sys.modules.items()) if name.startswith("tests.support.")}
        for module in modules:
            SCANNER.learn(constants_of(module))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Put back what an earlier test may have replaced."""
        SCANNER.begin()
        if structlog.get_config() != self._installed or self._handlers[0] not in logging.getLogger().handlers:
            self._install()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Fail the test in whose set-up, call or tear-down a secret was written; show the log of one that fails."""
        report = yield
        if report.failed and (told := SCANNER.told()):
            report.sections.append(("last words of the service's log", told))
        if leaks := SCANNER.take():
            text = "\n".join(f"A secret was written into a log: {leak}" for leak in leaks)
            report.sections = [section for section in report.sections if not SCANNER.sees(section[1])]
            if report.passed:
                report.outcome = "failed"
                report.longrepr = text
            else:
                report.sections.append(("canary", text))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run for what was written when no test followed, or where none runs: before parallel workers."""
        if leaks := SCANNER.take():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            for leak in leaks:
                sys.stderr.write(f"\nA secret was written into a log outside of the tests: {leak}\n")

    def _install(self) -> None:
        configure_logging(level="DEBUG", stream=cast(TextIO, SCANNER))
        # A logger that keeps its first configuration could not be listened to by the tests that want to.
        structlog.configure(cache_logger_on_first_use=False)
        self._installed = structlog.get_config()
        self._handlers = logging.getLogger().handlers[:1]
