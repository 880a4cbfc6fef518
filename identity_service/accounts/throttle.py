"""
Throttling of sign-ins: guessing gets slower and slower, and nobody can be locked out by a stranger.

Each attempt is booked as a failure before the password is checked, in one atomic step over every replica, and taken
back if it was right; firing many at once gains nothing. Names that do not exist are treated as those that do.
"""

import ipaddress
from dataclasses import dataclass
from typing import final

from identity_service.accounts.users import canonical_name
from identity_service.infra.data_keys import DataKeys
from identity_service.infra.ratelimit import Allowed, Limited, Limiter, Spend
from identity_service.infra.ratelimit.catalogue import (
    SIGN_IN_ACCOUNT,
    SIGN_IN_ACCOUNT_NETWORK,
    SIGN_IN_NETWORK,
    SIGN_IN_SITE,
)

_DAY = 86400.0

KNOWN_FOR = 90 * _DAY
_SITE_BITS = 56


@dataclass(frozen=True, slots=True)
class Attempt:
    """A booked sign-in attempt: what it spent of the place's and of the name's budgets; `name_hash` is the name's."""

    name_hash: str
    of_place: tuple[Spend, ...]
    of_name: tuple[Spend, ...]
    known_mark: str

    @property
    def spends(self) -> tuple[Spend, ...]:
        """All that it spent."""
        return self.of_place + self.of_name


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
        return self._keys.hash_name(canonical_name(name))

    async def book(self, name: str, network: str) -> Attempt | Limited:
        """Book an attempt, or say how long to wait."""
        hashed = self.name_hash(name)
        known = f"known:{hashed}:{network}"
        attempt = Attempt(
            hashed,
            (Spend(SIGN_IN_NETWORK, f"n:{network}"), *(Spend(SIGN_IN_SITE, f"s:{site}") for site in _site(network))),
            (
                Spend(SIGN_IN_ACCOUNT_NETWORK, f"an:{hashed}:{network}"),
                Spend(SIGN_IN_ACCOUNT, f"a:{hashed}", exempt_by=known),
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
        await self._limiter.settle(
            refund=attempt.of_place, reset=attempt.of_name, mark=[attempt.known_mark], mark_for=KNOWN_FOR
        )

    async def withdraw(self, attempt: Attempt) -> None:
        """Take the booking back: nobody looked at the password, because something behind us could not answer."""
        await self._limiter.settle(refund=attempt.spends)

    async def forgive(self, name: str) -> None:
        """Forget a name's failures over all networks: its password was set anew. Those of each network fade alone."""
        await self._limiter.settle(reset=[Spend(SIGN_IN_ACCOUNT, f"a:{self.name_hash(name)}")])


def _site(network: str) -> list[str]:
    """Return the /56 that an IPv6 /64 belongs to; nothing for an IPv4 address, which stands alone."""
    if ":" not in network:
        return []
    return [str(ipaddress.IPv6Network(network).supernet(new_prefix=_SITE_BITS))]
