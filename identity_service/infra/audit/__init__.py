"""
The audit trail: what was done, by whom, from where; written in the transaction of the act, and sealed after it.

An act whose row cannot be written does not happen. Failures of strangers are the exception in number: anybody can
cause them, so only the first few of a minute get a row of their own, and the rest of the minute one row with a count.
"""

from identity_service.infra.audit.chain import AuditChain, Sealed, Standing
from identity_service.infra.audit.events import EVENTS, RESTORED, SCHEDULE
from identity_service.infra.audit.seals import ChainBroken, Fault, Wrong
from identity_service.infra.audit.trail import AuditEvent, AuditTrail, Filters, Origin
from identity_service.infra.audit.verification import Anchor, Gap, Verification

__all__ = [
    "EVENTS",
    "RESTORED",
    "SCHEDULE",
    "Anchor",
    "AuditChain",
    "AuditEvent",
    "AuditTrail",
    "ChainBroken",
    "Fault",
    "Filters",
    "Gap",
    "Origin",
    "Sealed",
    "Standing",
    "Verification",
    "Wrong",
]
