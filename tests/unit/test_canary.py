"""That a secret in a log fails the test it was written in, as a small project shows whose tests write some."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.canary import Leak, Scanner

_ROOT = Path(__file__).parents[2]
_PATIENCE = 300.0  # seconds; a run takes one
SECRET = "Kanarienvogel 4711"

CONFTEST = """
from tests.support.canary import CanaryPlugin

def pytest_configure(config):
    config.pluginmanager.register(CanaryPlugin())
"""
CLEAN = """
import logging
import structlog

log = structlog.get_logger("named")

def test_redacted():
    log.error("request.failed", password="".join(("Kanarien", "vogel 4711")))

def test_nothing():
    log.debug("request", route="/token", client_id="cl_0123456789012345678901", part_of="start_of_something")
    logging.getLogger("plain").error("nothing of the kind: %s", "rt_short")

def test_replaced():
    structlog.configure(processors=[lambda *_: "gone"], logger_factory=structlog.PrintLoggerFactory())
    logging.getLogger().handlers.clear()
"""
LEAKS = {
    "a debug event": ("test_leak", "fresh.debug", 'log.debug("fresh.debug", seen=SECRET)'),
    "a bound value": ("test_leak", "fresh.bound", 'log.bind(who=SECRET).info("fresh.bound")'),
    "a context": (
        "test_leak",
        "fresh.context",
        'structlog.contextvars.bind_contextvars(x=SECRET); log.info("fresh.context")',
    ),
    "an exception": (
        "test_leak",
        "fresh.failed",
        'try: int(SECRET)\n    except ValueError: log.exception("fresh.failed")',
    ),
    "another library": ("test_leak", "(not shown)", 'logging.getLogger("library").warning("heard %s", SECRET)'),
    "the event itself": ("test_leak", "(not shown)", "log.info(SECRET)"),
    "a thread": (
        "test_leak",
        "fresh.thread",
        'thread = threading.Thread(target=lambda: log.info("fresh.thread", x=SECRET)); thread.start(); thread.join()',
    ),
}
LEAKING = """
import logging
import threading
import pytest
import structlog

log = structlog.get_logger()
SECRET = "".join(("Kanarien", "vogel 4711"))
MY_PASSWORD = SECRET

def test_before(): ...

def test_leak():
    {statement}

def test_after(): ...
"""
AROUND = """
import pytest
import structlog

log = structlog.get_logger()
TOKEN = "rt_" + "a" * 40

@pytest.fixture
def before():
    log.info("planted", token_of=TOKEN)

@pytest.fixture
def after():
    yield
    log.info("planted", token_of=TOKEN)

def test_before(before): ...

def test_after(after): ...

def test_failing():
    log.info("planted", token_of=TOKEN)
    assert False, "for another reason"
"""
PLANTED = 'structlog.get_logger().info("planted.outside", it="rt_" + "a" * 40)'
NOTHING = """
def test_nothing(): ...
"""
OUTSIDE = {
    "while the tests are collected": (NOTHING + "import structlog\n{statement}", ""),
    "before the tests": (NOTHING, "\ndef pytest_sessionstart():\n    {statement}\n"),
    "after the tests": (NOTHING, "\ndef pytest_runtest_logfinish():\n    {statement}\n"),
}


class Project:
    """A folder with tests, in which pytest runs with the plugin and without anything else that is installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -rA\n", "utf-8")
        self.configure(CONFTEST)

    def configure(self, text: str) -> None:
        """Write its conftest."""
        (self._folder / "conftest.py").write_text(text, "utf-8")

    def run(self, text: str, *arguments: str) -> tuple[pytest.ExitCode, dict[str, str], str]:
        """Run the tests of a text; return how pytest ended, how each of them did, and what was said."""
        (self._folder / "test_it.py").write_text(text, "utf-8")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "xdist", *arguments],
            cwd=self._folder,
            env={**inherited, "PYTHONPATH": str(_ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=_PATIENCE,
            check=False,
        )
        outcomes = re.findall(r"^(PASSED|FAILED|ERROR) test_it\.py::(\w+)", ended.stdout, re.M)
        return pytest.ExitCode(ended.returncode), {name: outcome for outcome, name in outcomes}, ended.stdout


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.case("SEC-01")
@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_a_run_without_secrets_in_its_logs_passes(project: Project, processes: tuple[str, ...]) -> None:
    """A field named like a secret is blanked before it is written, as in production."""
    ended, outcomes, said = project.run(CLEAN, *processes)
    assert ended == pytest.ExitCode.OK, said
    assert set(outcomes.values()) == {"PASSED"}


@pytest.mark.case("SEC-01")
@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two workers"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_secret_in_a_log_fails_the_test_that_wrote_it(
    project: Project, leak: str, processes: tuple[str, ...]
) -> None:
    """That one only; the report names the logger and the event, and does not repeat the secret."""
    name, event, statement = LEAKS[leak]
    ended, outcomes, said = project.run(LEAKING.replace("{statement}", statement), *processes)
    assert ended == pytest.ExitCode.TESTS_FAILED, said
    assert outcomes == {"test_before": "PASSED", "test_after": "PASSED", name: "FAILED"}
    logger = "library" if leak == "another library" else "test_it"
    assert f"written into a log: constant of the tests in the event '{event}' of {logger}" in said
    assert SECRET not in said


@pytest.mark.case("SEC-01")
def test_set_up_tear_down_and_failing_tests_are_watched_too(project: Project) -> None:
    ended, outcomes, said = project.run(AROUND)
    assert ended == pytest.ExitCode.TESTS_FAILED
    assert {name: outcomes[name] for name in ("test_before", "test_after", "test_failing")} == {
        "test_before": "ERROR",
        "test_after": "ERROR",
        "test_failing": "FAILED",
    }
    assert said.count("A secret was written into a log: refresh token in the event 'planted' of test_it") >= 3
    assert "for another reason" in said
    assert "a" * 40 not in said


@pytest.mark.case("SEC-01")
@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two workers"])
@pytest.mark.parametrize("when", OUTSIDE)
def test_what_is_written_outside_of_every_test_fails_the_run(
    project: Project, when: str, processes: tuple[str, ...]
) -> None:
    """As the first test's fault or as the run's own."""
    text, configuration = (part.replace("{statement}", PLANTED) for part in OUTSIDE[when])
    project.configure(CONFTEST + "import structlog\n" + configuration)
    ended, _, said = project.run(text, *processes)
    assert ended == pytest.ExitCode.TESTS_FAILED, said
    assert "refresh token in the event 'planted.outside'" in said
    assert "a" * 40 not in said


@pytest.mark.case("SEC-01")
def test_what_another_test_has_replaced_is_put_back(project: Project) -> None:
    ended, outcomes, said = project.run(CLEAN + '\ndef test_later():\n    log.info("later", it="rt_" + "a" * 40)\n')
    assert ended == pytest.ExitCode.TESTS_FAILED, said
    assert [name for name, outcome in outcomes.items() if outcome != "PASSED"] == ["test_later"]


TELLING = """
import logging
import structlog

log = structlog.get_logger()

def test_before():
    log.warning("of.another.test")

def test_failing():
    log.debug("too.much.to.show")
    log.info("harmless", seen="this")
    log.warning("planted", it="rt_" + "a" * 40)
    logging.getLogger("library").warning("harmless as well")
    assert False
"""


def test_who_fails_shows_the_last_lines_of_the_log_in_which_there_is_no_secret(project: Project) -> None:
    """Its own ones; or nobody could tell why a test fails once in a thousand runs."""
    _, outcomes, said = project.run(TELLING)
    assert outcomes == {"test_before": "PASSED", "test_failing": "FAILED"}
    shown = said.partition("last words of the service's log")[2]
    assert '"event":"harmless"' in shown
    assert "harmless as well" in shown
    assert "a" * 40 not in said
    assert '"event":"of.another.test"' not in said
    assert '"event":"too.much.to.show"' not in said


JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJlIG9mIHRoaXM"
TEXTS = {
    "client secret": "cs_" + "0aZ" * 17,
    "refresh token": "rt_" + "0aZ" * 20,
    "token from a mail": "pr_" + "0aZ" * 20,
    "API key": "idk_0123456789a_" + "0aZ" * 16,
    "JWT": JWT,
    "authorization": "Basic Y2xfMDpjc19zZWNyZXQ=",
    "constant of the tests": "Kanarienvogel%204711",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_each_kind_of_secret_is_known(kind: str) -> None:
    """Anywhere in a line; and what only looks a little like one is not taken for it."""
    scanner = Scanner()
    scanner.learn(["Kanarienvogel 4711", "short"])
    for around in ("{}", 'x="{}"', "https://id.example/reset?token={}&x=1", "({}),"):
        scanner.write(json.dumps({"event": "e", "logger": "l", "seen": around.format(TEXTS[kind])}) + "\n")
        assert scanner.take() == [Leak(kind, "e", "l")]
        assert scanner.take() == []
    for harmless in (
        TEXTS[kind][:12],
        "short",
        "start_" + "a" * 12,
        "cl_" + "0" * 22,
        "Bearer error",
        "idk_0123456789a",
    ):
        scanner.write(harmless)
    assert scanner.take() == []


def test_the_log_of_another_process_is_searched_line_by_line() -> None:
    """JSON or not; one report for the same event of the same logger."""
    scanner = Scanner()
    line = json.dumps({"event": "e", "logger": "l", "seen": JWT})
    scanner.scan(f"harmless\n{line}\n{line}\nTraceback: {JWT}\n{json.dumps({'event': 'own', 'x': JWT})}", "a server")
    assert [str(leak) for leak in scanner.take()] == [
        "JWT in the event 'e' of a server, l",
        "JWT in the event '(no JSON)' of a server",
        "JWT in the event 'own' of a server",
    ]
