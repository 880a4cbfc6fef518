"""Watching the JWKS of every replica, and what it means for the tokens that were issued meanwhile."""

import asyncio
import time as real
from collections.abc import Mapping
from datetime import datetime
from typing import Final, final

import httpx2

from tests.rotation.load import Load
from tests.rotation.processes import Replica
from tests.rotation.record import Record, Sightings

CACHE: Final = 900.0
"""Seconds a cache may hold the JWKS: max-age and stale-while-revalidate of the answer."""
AHEAD: Final = 2 * CACHE
"""Seconds a key must have been in the JWKS of every replica before a token names it."""
_PAUSE = 0.01  # real seconds between two samples


@final
class Watcher:
    """Looks at one replica's JWKS as often as it can."""

    def __init__(self, replica: Replica, load: Load) -> None:
        self._replica = replica
        self._load = load
        self._sent: float | None = None

    def waits_for(self) -> float:
        """Return for how many real seconds the replica has owed an answer."""
        return real.monotonic() - self._sent if self._sent is not None and self._replica.serving else 0.0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(_PAUSE)
            if self._replica.serving:
                await self._look()
                self._sent = None

    async def _look(self) -> None:
        record, name, life = self._load.record, self._replica.name, self._replica.life
        needed = self._needed()
        look, self._sent = record.weather.look(), real.monotonic()
        sent = self._sent
        try:
            answer = await self._load.http.get(f"{self._replica.url}/.well-known/jwks.json")
        except httpx2.TransportError as error:
            if record.weather.calm_since(look):
                record.faults.add(f"{name} did not answer for its JWKS: {type(error).__name__}")
            return
        if answer.status_code != 200:
            record.faults.add(f"{name} answered {answer.status_code} for its JWKS")
            return
        now = self._load.time.now
        kids = [jwk["kid"] for jwk in answer.json()["keys"]]
        record.samples += 1
        record.empty += not kids
        sightings = record.sightings.setdefault((name, life), Sightings(since=now))
        for kid in kids:
            sightings.first.setdefault(kid, now)
            record.used("published", name, kid, sent)
        still_needed = self._needed()
        for kid, until in needed.items():
            if kid not in kids and until > now and kid in still_needed:
                record.unpublished.add(
                    f"{name} did not publish {kid[:8]} {until - now:.0f} s before its last token's end"
                )

    def _needed(self) -> dict[str, float]:
        """Return the keys that tokens were issued with, and when the last token of each expires."""
        needed: dict[str, float] = {}
        for pool in (self._load.siblings, self._load.own):
            for kid, until in pool.needed.items():
                needed[kid] = max(until, needed.get(kid, 0.0))
        return needed


def least_notice(sightings: Sightings, kid: str, used_at: float) -> float | None:
    """
    Return for how long one life of a replica had published a key when a token of it was issued; None if never.

    A replica that had not been there for so long cannot have published anything longer: infinity, if its first answer
    held the key.
    """
    first = sightings.first.get(kid)
    if first is None or first > used_at:
        return None
    return float("inf") if first == sightings.since else used_at - first


def judge_notice(record: Record, stored: Mapping[str, datetime]) -> float:
    """
    Count the tokens whose key was published too late, by the database or by any replica's JWKS.

    `stored` is each key's `published_at`. The very first key is let off: nobody could know it before. Returns the
    shortest notice that any replica gave, in seconds.
    """
    if not record.minted:
        return 0.0
    first_kid = min(record.minted, key=lambda token: token.issued_at).kid
    shortest = float("inf")
    for token in record.minted:
        if token.kid == first_kid:
            continue
        used_at = token.issued_at + 1  # `iat` is in whole seconds, rounded down
        if used_at - stored[token.kid].timestamp() < AHEAD:
            record.unpublished.add(f"{token.replica} signed with {token.kid[:8]}, stored too late")
            continue
        for (name, life), sightings in record.sightings.items():
            if not sightings.since < used_at <= sightings.until:
                continue
            notice = least_notice(sightings, token.kid, used_at)
            shortest = min(shortest, -1.0 if notice is None else notice)
            if notice is None or notice < AHEAD:
                seen = "not at all" if notice is None else f"{notice:.0f} s before"
                record.unpublished.add(f"{token.replica} signed with {token.kid[:8]}, which {name}/{life} had {seen}")
                break
    return shortest
