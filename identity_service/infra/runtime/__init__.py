"""What every part of the service is handed: the time, secrets that cannot print themselves, identifiers, endings."""

from identity_service.infra.runtime.clock import Clock, SteadyClock, SystemClock
from identity_service.infra.runtime.ids import new_id, parse_uuid
from identity_service.infra.runtime.secret import Secret
from identity_service.infra.runtime.tasks import to_its_end

__all__ = ["Clock", "Secret", "SteadyClock", "SystemClock", "new_id", "parse_uuid", "to_its_end"]
