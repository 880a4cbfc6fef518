"""What every part of the service is handed: the time, secrets that cannot print themselves, identifiers."""

from identity_service.infra.runtime.clock import Clock, SteadyClock, SystemClock
from identity_service.infra.runtime.ids import new_id, parse_uuid
from identity_service.infra.runtime.secret import Secret

__all__ = ["Clock", "Secret", "SteadyClock", "SystemClock", "new_id", "parse_uuid"]
