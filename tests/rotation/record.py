"""What a run has seen, and what it holds against the service."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

USES = ("signed", "published", "accepted", "introspected")
"""What a replica does with a key: the last two are our own API, and introspection with the answer `active`."""
_MOST_EXAMPLES = 5


@final
class Weather:
    """Whether a replica is being held up or killed just now, so that a request may fail for no fault of rotation."""

    def __init__(self) -> None:
        self._storms = 0
        self._seen = 0

    @contextmanager
    def storm(self) -> Iterator[None]:
        """Say that requests may fail for the duration of the block."""
        self._storms += 1
        self._seen += 1
        try:
            yield
        finally:
            self._storms -= 1

    def look(self) -> int:
        """Return what `calm_since` wants to know of the moment when a request was sent."""
        return -1 if self._storms else self._seen

    def calm_since(self, look: int) -> bool:
        """Tell whether no storm touched the time since `look`."""
        return look == self._seen


@final
class Findings:
    """A number that must be zero, and the first few reasons why it is not."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, example: str, times: int = 1) -> None:
        """Count something that must not be."""
        self.count += times
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(example)


@dataclass
class Checks:
    """What one checker of tokens did: a sibling, or a replica's own API."""

    number: int = 0
    near_the_end: int = 0
    """Checks of tokens in the last twentieth of their life."""
    oldest_copy: float | None = None
    """The age of the oldest copy of the JWKS that a check was made with, in seconds; None where it cannot be seen."""
    kids: set[str] = field(default_factory=set)
    """The keys whose tokens were accepted."""


@dataclass(frozen=True)
class Minted:
    """One token that was issued, by whom and when, by its own word."""

    kid: str
    issued_at: float
    replica: str


@dataclass
class Sightings:
    """What the watcher of one replica's life saw: when each key was first in the JWKS, and since when it looks."""

    since: float
    first: dict[str, float] = field(default_factory=dict)
    until: float = float("inf")


@dataclass
class Compromise:
    """
    What became of the compromised key, in real seconds after the commit.

    `promised` says from when on a replica must know: when it ended a poll that began after the commit. Only what was
    asked after that counts as too late.
    """

    kid: str
    committed: float
    promised: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))
    late: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """How often a replica refused the key's tokens, rightly."""


@final
class Record:
    """Everything a run has seen."""

    def __init__(self) -> None:
        self.weather = Weather()
        self.refused = Findings()
        """Valid tokens that a sibling, our own API or introspection refused."""
        self.unpublished = Findings()
        """Tokens whose key had not been in every replica's JWKS for long enough, or was not there while they lived."""
        self.resurrected = Findings()
        """Uses of the compromised key after the promised time."""
        self.not_issued = Findings()
        """Token requests that failed although nobody was being killed."""
        self.faults = Findings()
        """Everything else that is wrong: steps taken twice, errors in a log, a run that did not get to its end."""
        self.checks: defaultdict[str, Checks] = defaultdict(Checks)
        self.minted: list[Minted] = []
        self.minted_by: Counter[str] = Counter()
        self.sightings: dict[tuple[str, int], Sightings] = {}
        self.samples = 0
        self.empty = 0
        self.rotations: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.compromise: Compromise | None = None

    def used(self, what: str, replica: str, kid: str, sent: float) -> None:
        """Note one of the uses of a key by a replica, asked for at `sent` by `time.monotonic`."""
        if (compromise := self.compromise) is None or kid != compromise.kid:
            return
        compromise.last[what] = max(compromise.last[what], time.monotonic() - compromise.committed)
        promised = compromise.promised.get(replica)
        if promised is not None and sent > promised:
            compromise.late[what] += 1
            self.resurrected.add(f"{replica} {what} it {sent - compromise.committed:.2f} s after the compromise")
