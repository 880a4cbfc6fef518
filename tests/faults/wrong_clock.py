"""
A server on a machine whose clock is wrong by as much as a page of memory says, and can be set while it runs.

The page is written by whoever holds the other end: seconds, in its first number.
"""

import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Final

from identity_service.cli import main as serve
from identity_service.infra.runtime import clock
from tests.rotation.clock import Page

PROGRAM: Final = "from tests.faults.wrong_clock import main; main({!r})"
"""What to start, once it is told where the page is."""


def main(path: str) -> None:
    """Do what the command line does, in another time."""
    page, machines = Page(Path(path)), time.time

    class Wrong(datetime):
        """Tells the machine's time, wrongly."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=page.numbers[0])

    clock.datetime = Wrong  # type: ignore[attr-defined]
    time.time = lambda: machines() + page.numbers[0]
    serve()
