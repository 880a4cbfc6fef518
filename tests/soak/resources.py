"""What the replicas hold of the machine: memory, file descriptors, threads, sessions of PostgreSQL."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import psycopg

from tests.faults.stage import Replica, Stage

MIB: Final = 1024 * 1024
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SESSIONS: Final = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'identity-service'"


@dataclass(frozen=True)
class Sample:
    """
    What a replica held at one moment; `at` in seconds since the beginning.

    `memory` is its resident set in bytes, which, other than its proportional share, does not change when the other
    replica ends and leaves it alone with the pages that both have mapped.
    """

    at: float
    memory: int
    descriptors: int
    threads: int


@final
class Resources:
    """Looks at the replicas, and remembers."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._began = time.monotonic()
        self.of: dict[tuple[str, int], list[Sample]] = {}
        """The samples of each life of each replica, by its name and the number of the life."""
        self.sessions: list[tuple[float, int]] = []
        """How many sessions PostgreSQL has with all replicas, and when."""

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def look(self) -> None:
        """Take a sample of everything that can be seen now."""
        for replica in self._stage.serving:
            with contextlib.suppress(OSError):  # it has just ended
                self.of.setdefault((replica.name, replica.life), []).append(self._sample(replica))
        with contextlib.suppress(psycopg.Error), self._stage.connect() as connection:  # it may be away
            row = connection.execute(_SESSIONS).fetchone()
            self.sessions.append((self.now, row[0] if row else 0))

    def _sample(self, replica: Replica) -> Sample:
        process = Path("/proc", str(replica.server.pid))
        resident = int((process / "statm").read_text().split()[1]) * _PAGE
        descriptors, threads = (len(list((process / name).iterdir())) for name in ("fd", "task"))
        return Sample(self.now, resident, descriptors, threads)
