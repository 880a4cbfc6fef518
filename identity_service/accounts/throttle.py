"""
Throttling of sign-ins: guessing gets slower and slower, and nobody can be locked out by a stranger.

Each attempt is booked as a failure before the password is checked, in one atomic step over every replica, and taken
back if it was right; firing many at once gains nothing. Names that do not exist are treated as those that do.
"""

from dataclasses import dataclass
from typing import final

from identity_service.accounts.users import canonical_email, canonical_username
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.ratelimit import Allowed, Limited, Limiter, Rule, Spend

_DAY = 86400.0

NETWORK = Rule(name="sign_in.network", burst=60, interval=2.0, memory=3600.0, credential=True)
"""Failures from one network, whatever the names: spraying one password over many accounts."""
ACCOUNT_NETWORK = Rule(
    name="sign_in.account_network", burst=10, interval=1.0, growth=2.0, max_interval=900.0, memory=_DAY, credential=True
)
"""Failures for one name from one network."""
ACCOUNT = Rule(
    name="sign_in.account",
    burst=30,
    interval=1.0,
    growth=1.3,
    max_interval=900.0,
    closed_after=100,
    memory=_DAY,
    credential=True,
)
"""Failures for one name from anywhere. A network that signed in before does not feel it, so its owner gets through."""
KNOWN_FOR = 90 * _DAY


@dataclass(frozen=True, slots=True)
class Attempt:
    """A booked sign-in attempt; `name_hash` stands for the name wherever it is kept."""

    name_hash: str
    spends: tuple[Spend, Spend, Spend]
    known_mark: str


@final
class SignInThrottle:
    """Books attempts and takes back those that were right."""

    def __init__(self, limiter: Limiter, keys: DataKeys) -> None:
        self._limiter = limiter
        self._keys = keys

    def name_hash(self, name: str) -> str:
        """
        Return the keyed hash of a name.

        Spellings of one name have one hash, or each would be another set of guesses. A username and its address stay
        two names, with a budget each: limits they shared would tell that they belong together.
        """
        return self._keys.hash_name(canonical_email(name) or canonical_username(name) or name)

    async def book(self, name: str, network: str) -> Attempt | Limited:
        """Book an attempt, or say how long to wait."""
        hashed = self.name_hash(name)
        known = f"known:{hashed}:{network}"
        attempt = Attempt(
            hashed,
            (
                Spend(NETWORK, f"n:{network}"),
                Spend(ACCOUNT_NETWORK, f"an:{hashed}:{network}"),
                Spend(ACCOUNT, f"a:{hashed}", exempt_by=known),
            ),
            known,
        )
        match await self._limiter.spend(attempt.spends):
            case Limited() as limited:
                return limited
            case Allowed():
                return attempt

    async def succeeded(self, attempt: Attempt) -> None:
        """Take the booking back: the password was right, and this network is now one the account is used from."""
        network, account_network, account = attempt.spends
        await self._limiter.settle(
            refund=[network], reset=[account_network, account], mark=[attempt.known_mark], mark_for=KNOWN_FOR
        )

    async def withdraw(self, attempt: Attempt) -> None:
        """Take the booking back: nobody looked at the password, because something behind us could not answer."""
        await self._limiter.settle(refund=attempt.spends)

    async def forgive(self, name: str) -> None:
        """Forget a name's failures over all networks: its password was set anew. Those of each network fade alone."""
        await self._limiter.settle(reset=[Spend(ACCOUNT, f"a:{self.name_hash(name)}")])
