"""
What people were told, and what must therefore be true.

Nothing here knows the code of the service. An answer is sure when it says what happened: 2xx that it did, 4xx that it
did not. Nobody knows after 503, or where no answer came; who needs to know asks again.
"""

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, final

from tests.rotation.record import Weather

_MOST_COMPLAINTS: Final = 50
LIFE: Final = 600.0
"""Seconds that an access token lives at most."""
REST: Final = 1.5
"""
Seconds of calm after which no request can still be under way that its sender has given up.

A refresh that arrives after its own repetition and the one after that is a replay, as far as anybody can tell; people
refresh every few minutes, and here every few milliseconds.
"""


@dataclass(frozen=True)
class Told:
    """An answer; its status is 0 when none came."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether what was asked for was acknowledged."""
        return 200 <= self.status < 300

    @property
    def sure(self) -> bool:
        """Whether it is known what became of the request."""
        return self.status not in (0, 503)

    @property
    def error(self) -> str:
        """The OAuth error's code, or nothing."""
        return str(self.body.get("error", "")) if isinstance(self.body, dict) else ""


@dataclass(eq=False)
class Session:
    """A family of refresh tokens as its owner knows it."""

    id: uuid.UUID
    tokens: list[str]
    """Every refresh token that was handed out, the newest last."""
    access_token: str
    expires_at: float
    over: str = ""
    """Why it is surely over; empty while its newest token must be good."""
    unsure_at: float = float("-inf")
    """When one of its requests was last given up that may still be under way, by `time.monotonic`."""


@dataclass(eq=False)
class Key:
    """An API key as its owner knows it."""

    id: str
    text: str
    over: bool = False


@dataclass(eq=False)
class Account:
    """A person's account; the acts are counted that were acknowledged, and that nobody knows of."""

    id: uuid.UUID
    username: str
    password: str
    name: str | None = None
    registered: bool = False
    sessions: list[Session] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    """What was acknowledged, by the names of the audit trail."""
    unknown: Counter[str] = field(default_factory=Counter)
    """What may have been done although nobody was told so, by the same names."""

    @property
    def live(self) -> list[Session]:
        """The sessions that are not over."""
        return [session for session in self.sessions if not session.over]

    def end_sessions(self, why: str, *, but: Sequence[Session] = ()) -> None:
        """Note that all sessions are over, except these."""
        for session in self.live:
            if session not in but:
                session.over = why


@final
class Ledger:
    """Everything that people were told."""

    def __init__(self) -> None:
        self.outages = Weather()
        """Storms in which 503 is a fair answer."""
        self.crashes = Weather()
        """Storms in which it is fair that no answer comes."""
        self.accounts: list[Account] = []
        self.answers: Counter[tuple[str, int]] = Counter()
        """How often each kind of request was answered with each status."""
        self.slowest: dict[str, float] = {}
        """The longest that an answer to each kind of request took, in seconds."""
        self.kids: dict[str, float] = {}
        """The keys that tokens were signed with, and when each was last seen, by `time.monotonic`."""
        self.complaints: list[str] = []
        """What was answered and must not have been."""
        self._calm_since = time.monotonic()
        self._storms = 0

    @contextmanager
    def storm(self, *, outage: bool = False, crash: bool = False) -> Iterator[None]:
        """Say what is fair for the duration of the block."""
        self._storms += 1
        try:
            with ExitStack() as stack:
                for fair, weather in ((outage, self.outages), (crash, self.crashes)):
                    if fair:
                        stack.enter_context(weather.storm())
                yield
        finally:
            self._storms -= 1
            self._calm_since = time.monotonic()

    def rested(self, session: Session) -> bool:
        """Return whether no request of a session can still be under way that its sender has given up."""
        if session.unsure_at == float("-inf"):
            return True
        since = max(session.unsure_at, self._calm_since)
        return not self._storms and time.monotonic() - since >= REST

    def needed_kids(self) -> set[str]:
        """Return the keys of all tokens that may still be good."""
        now = time.monotonic()
        return {kid for kid, seen in self.kids.items() if now - seen < LIFE}

    def complain(self, sentence: str) -> None:
        """Note something that must not be."""
        if len(self.complaints) < _MOST_COMPLAINTS:
            self.complaints.append(sentence)

    def hear(self, what: str, told: Told, *, looks: tuple[int, int], hung_up: bool, took: float) -> None:
        """Note an answer, and judge what can be judged whatever was asked for."""
        self.answers[what, told.status] += 1
        self.slowest[what] = max(self.slowest.get(what, 0.0), took)
        if told.status == 0:
            if not hung_up and self.crashes.calm_since(looks[1]):
                self.complain(f"{what}: no answer although nobody was killed ({told.body})")
            return
        if told.status == 503:
            if self.outages.calm_since(looks[0]):
                self.complain(f"{what}: 503 although nothing was away: {told.body}")
            if not told.headers.get("retry-after", "").isdecimal():
                self.complain(f"{what}: 503 without Retry-After")
            if told.error not in ("", "temporarily_unavailable"):
                self.complain(f"{what}: 503 that says {told.error}")
        elif told.status >= 500:
            self.complain(f"{what}: {told.status}: {told.body}")

    def count(self, *kinds: str, status: int | None = None) -> int:
        """Return how many answers there were to requests of these kinds, of one status or of any."""
        return sum(
            number
            for (what, got), number in self.answers.items()
            if what in kinds and (status is None or got == status)
        )
