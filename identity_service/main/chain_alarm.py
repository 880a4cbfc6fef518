"""The alarm that rings while this replica knows the audit trail to be tampered with."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import final

import structlog

from identity_service.infra.audit import ChainBroken
from identity_service.infra.leases import LeaseState
from identity_service.infra.runtime import Clock
from identity_service.infra.telemetry.metrics import AUDIT_CHAIN_BROKEN

log = structlog.get_logger(__name__)


@final
class ChainAlarm:
    """What each job that looks at the chain has found: it rings until that job, in any replica, finds it whole."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._broken_at: dict[str, datetime] = {}

    @contextlib.contextmanager
    def watching(self, job: str) -> Iterator[None]:
        """Ring where the block finds the chain broken, and no longer where it does not."""
        try:
            yield
        except ChainBroken as broken:
            AUDIT_CHAIN_BROKEN.labels(job).set(1)
            self._broken_at[job] = self._clock.now()
            log.error("audit.chain_broken", job=job, seq=broken.fault.seq, fault=broken.fault.wrong)
            raise
        self._stop(job)

    def hear(self, states: Sequence[LeaseState]) -> None:
        """Stop for each job that another replica has done since this one found the chain broken."""
        for state in states:
            broken_at = self._broken_at.get(state.name)
            if broken_at is not None and state.done_at is not None and state.done_at > broken_at:
                self._stop(state.name)

    def _stop(self, job: str) -> None:
        AUDIT_CHAIN_BROKEN.labels(job).set(0)
        self._broken_at.pop(job, None)
