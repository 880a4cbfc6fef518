"""Walking along the chain to find the first place where it does not hold."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import Row, func, select

from identity_service.infra.audit.seals import (
    UNREADABLE,
    ChainBroken,
    Fault,
    Head,
    Seals,
    Wrong,
    key_missing,
    read_head,
)
from identity_service.infra.database import Transaction
from identity_service.infra.tables import audit_events

_NEIGHBOURS = 50  # places on each side where a row's right place is looked for

_c = audit_events.c


@dataclass(frozen=True, slots=True)
class Anchor:
    """A seal that was kept elsewhere. A chain that does not have it any more was cut or written anew."""

    seq: int
    mac: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """
    Places whose rows a restore has lost, as the row that stands behind them says under its seal.

    `first` is the first of them, `last` the last one that anybody knows of, if anybody does; `resumed` is where the
    chain goes on, and `at` when the database was put right.
    """

    first: int
    last: int | None
    resumed: int
    at: datetime

    def __str__(self) -> str:
        lost = f"{self.first} to {self.last}" if self.last else f"from {self.first} on, as far as there were any"
        return f"a restore has lost the rows {lost}; the chain goes on at {self.resumed}"


@final
class Verification:
    """
    One walk along the chain, page by page: neither memory nor the time of a statement grows with its length.

    Call `advance` in one transaction after the other until it returns False. Rows may be written, sealed and removed
    by retention meanwhile. Then `fault` is the first place where the chain does not hold, or None.
    """

    def __init__(self, seals: Seals, anchors: Sequence[Anchor], page: int) -> None:
        self._seals = seals
        self._anchors = sorted(anchors, key=lambda anchor: anchor.seq)
        self._page = page
        self._begun = False
        self.seq = 0
        """The newest place that holds; at the beginning, the newest one that retention has removed."""
        self.mac = b""
        self.checked = 0
        """How many rows hold."""
        self.unsealed = 0
        """How many rows wait to be sealed: of these the chain says nothing yet."""
        self.outdated: list[Anchor] = []
        """Anchors of rows that retention has removed: there is nothing left to compare them with."""
        self.gaps: list[Gap] = []
        """What restores have lost, and have said so."""
        self.fault: Fault | None = None

    async def advance(self, tx: Transaction) -> bool:
        """Look at the next page; return whether there is more to look at. Raises LookupError without data keys."""
        try:
            more = await self._advance(tx)
        except ChainBroken as broken:
            self.fault, more = broken.fault, False
        if not more:
            waiting = select(func.count()).select_from(audit_events).where(_c.seq.is_(None))
            self.unsealed = (await tx.execute(waiting)).scalar_one()
        return more

    async def _advance(self, tx: Transaction) -> bool:
        head = await read_head(tx)  # before the page, which then has every row that the head speaks of
        if not self._begun or head.base_seq > self.seq:
            await self._stand_at_base(tx, head)
        rows = await self._rows(tx)
        if rows is None:
            return True
        for row, follower in zip(rows[: self._page], [*rows[1:], None], strict=False):
            if row.seq != self.seq + 1:
                if self._seals.resumes(self.mac, row):
                    self._note_gap(row)
                else:
                    return await self._gap(tx, _next_is(row.seq), Wrong.MISSING)
            if follower is not None and follower.seq == row.seq:
                raise ChainBroken(Fault(row.seq, Wrong.FORGED, "there are two such rows"))
            if not self._seals.holds(self.mac, row, seq=row.seq):
                raise ChainBroken(await self._diagnose(tx, head, row, follower))
            self.seq, self.mac = row.seq, row.mac
            self.checked += 1
            self._compare_anchors()
        return bool(rows) or await self._end(tx, head)

    async def _stand_at_base(self, tx: Transaction, head: Head) -> None:
        """Stand where the chain begins, also when retention moves that place on while we walk."""
        if (fault := self._seals.fault_of_base(head)) is not None:
            raise ChainBroken(fault)
        oldest = (await tx.execute(select(func.min(_c.seq)))).scalar_one()
        if oldest is not None and oldest <= head.base_seq:
            sentence = f"retention has removed everything up to {head.base_seq}, and yet there is such a row"
            raise ChainBroken(Fault(oldest, Wrong.FORGED, sentence))
        self._begun, self.seq, self.mac = True, head.base_seq, head.base_mac
        self._compare_anchors()

    async def _rows(self, tx: Transaction) -> Sequence[Row[Any]] | None:
        """Return the next page and the row after it, or None when one of them cannot be read and must be found."""
        limit = self._page + 1 if self._page > 1 else 1
        following = select(audit_events).where(_c.seq > self.seq).order_by(_c.seq, _c.id)
        try:
            return (await tx.execute(following.limit(limit))).all()
        except UNREADABLE:
            if self._page > 1:
                self._page = 1
                return None
        number = (await tx.execute(following.with_only_columns(_c.seq).limit(1))).scalar_one()
        if number != self.seq + 1:
            raise ChainBroken(Fault(self.seq + 1, Wrong.MISSING, _next_is(number)))
        raise ChainBroken(Fault(number, Wrong.ALTERED, "it holds a value that the service never writes"))

    def _compare_anchors(self) -> None:
        while self._anchors and self._anchors[0].seq <= self.seq:
            anchor = self._anchors.pop(0)
            if anchor.seq < self.seq:
                self.outdated.append(anchor)
            elif not hmac.compare_digest(anchor.mac, self.mac):
                sentence = "its seal is not the one that was kept: the chain was written anew, at the latest from here"
                raise ChainBroken(Fault(self.seq, Wrong.REWRITTEN, sentence))

    def _note_gap(self, row: Row[Any]) -> None:
        """Note what a restore has lost before `row`; an anchor from among that proves that there were such rows."""
        lost = [anchor.seq for anchor in self._anchors if anchor.seq < row.seq]
        del self._anchors[: len(lost)]
        told = row.detail.get("known_to")
        last = max(lost if told is None else [*lost, told], default=None)
        # What was known may be older than the backup: then nothing is known to be lost.
        self.gaps.append(Gap(self.seq + 1, last if last and last > self.seq else None, row.seq, row.at))

    async def _gap(self, tx: Transaction, sentence: str, wrong: Wrong) -> bool:
        """Return True if it was retention that removed the next rows, a moment ago; else raise ChainBroken."""
        if (await read_head(tx)).base_seq > self.seq:
            return True
        raise ChainBroken(Fault(self.seq + 1, wrong, sentence))

    async def _end(self, tx: Transaction, head: Head) -> bool:
        """Compare the end of the chain with what is said to be its end; return whether there is more after all."""
        if head.seq > self.seq:
            return await self._gap(tx, f"the rows from here to the newest seal, {head.seq}, are gone", Wrong.CUT)
        if self._anchors:
            last = self._anchors[-1].seq
            sentence = (
                f"the chain ends here, and yet there was a seal {last}: the rows {self.seq + 1} to {last} are missing"
                " (in a restored database, until `identity-service after-restore` has said what was lost)"
            )
            raise ChainBroken(Fault(self.seq + 1, Wrong.CUT, sentence))
        if head.seq < self.seq:
            sentence = f"the newest seal is said to be {head.seq}, and yet the chain goes on"
            raise ChainBroken(Fault(head.seq + 1, Wrong.HEAD_MOVED, sentence))
        if not hmac.compare_digest(head.mac, self.mac):
            sentence = "the table audit_chain has another newest seal than this row"
            raise ChainBroken(Fault(self.seq, Wrong.HEAD_MOVED, sentence))
        return False

    async def _diagnose(self, tx: Transaction, head: Head, row: Row[Any], follower: Row[Any] | None) -> Fault:
        """Say what is wrong with a row that does not match its seal, as far as its surroundings tell."""
        if row.mac is None or row.mac_kid is None:
            return Fault(row.seq, Wrong.FORGED, "it has a place and no seal")
        if not self._seals.knows(row.mac_kid):
            return Fault(row.seq, Wrong.KEY_MISSING, key_missing(row.mac_kid))
        if row.seq > head.seq:
            return Fault(row.seq, Wrong.FORGED, "it stands behind the newest seal, and its own seal is wrong")
        if follower is not None and self._seals.holds(self.mac, follower, seq=row.seq):
            return Fault(row.seq, Wrong.FORGED, "it was put between two rows that belong together")
        for place, mac in await self._other_places(tx, row.seq):
            if self._seals.holds(mac, row, seq=place):
                return Fault(row.seq, Wrong.MOVED, f"the row that stands here was sealed as {place}")
        return Fault(row.seq, Wrong.ALTERED, "what it says is not what was sealed")

    async def _other_places(self, tx: Transaction, seq: int) -> list[tuple[int, bytes]]:
        """Return the places around this one, each after every seal around it."""
        places = range(max(1, seq - _NEIGHBOURS), seq + _NEIGHBOURS + 1)
        around = select(_c.mac).where(_c.seq >= places.start - 1, _c.seq < places.stop, _c.mac.is_not(None))
        seals = {self.mac, *(await tx.execute(around)).scalars()}
        return [(place, mac) for place in places if place != seq for mac in seals]


def _next_is(seq: int) -> str:
    return f"there is no such row; the next one is {seq}"
