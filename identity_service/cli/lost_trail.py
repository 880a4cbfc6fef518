"""What an exported audit trail says was done in the time that a restore has lost."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from identity_service.cli.common import Refused
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction

_BATCH = 500
DONE_AGAIN = frozenset(
    (
        *("key.compromised", "api_key.revoked", "api_key.rotated"),
        *("user.disabled", "user.enabled", "user.deleted", "user.restored", "user.purged"),
        *("client.disabled", "client.enabled", "client.deleted"),
    )
)
"""What is done again, as far as it took something away."""
TO_LOOK_AT = frozenset(
    (
        *("password.changed", "password.reset", "user.password_set", "user.password_reset_forced", "email.changed"),
        *("user.role_changed", "user.changed", "role.withdrawn", "role.updated", "role.deleted", "scope.deleted"),
        *("client.updated", "client.deleted", "client.secret_rotated", "client.secret_deleted", "key.rewrapped"),
    )
)
"""What is undone by the restore, and only an operator can judge."""


@dataclass(frozen=True, slots=True)
class Act:
    """A row of the trail that matters after a restore."""

    id: int
    at: datetime
    event: str
    target: str


@dataclass(slots=True)
class Since:
    """What is to be done again, each by its id, and what is to be looked at."""

    compromised: list[str] = field(default_factory=list)
    disabled_users: list[str] = field(default_factory=list)
    deleted_users: list[str] = field(default_factory=list)
    purged_users: list[str] = field(default_factory=list)
    disabled_clients: list[str] = field(default_factory=list)
    ended_keys: list[str] = field(default_factory=list)
    to_look_at: list[Act] = field(default_factory=list)


def read_acts(path: Path) -> list[Act]:
    """Return what matters of a file that `audit export` wrote as JSON lines; raises Refused for what is none."""
    acts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if row["event"] in DONE_AGAIN | TO_LOOK_AT:
                    at = datetime.fromisoformat(row["at"])
                    acts.append(Act(int(row["id"]), at, row["event"], str(row["target"] or "")))
                    if at.tzinfo is None:
                        raise ValueError
            except (ValueError, TypeError, KeyError):
                raise Refused(f"{path}, line {number}: not a row of `identity-service audit export`") from None
    return acts


async def since(tx: Transaction, trail: AuditTrail, acts: Sequence[Act]) -> Since:
    """Return what those of the acts come to that this database does not know of."""
    lost: list[Act] = []
    for batch in _batches(acts):
        missing = await trail.missing(tx, {act.id: act.at for act in batch})
        lost += [act for act in batch if act.id in missing]
    return sum_up(lost)


def sum_up(acts: Iterable[Act]) -> Since:
    """Return what acts, the oldest first, come to: who was disabled and enabled again is neither."""
    found = Since()
    disabled: dict[str, bool] = {}
    gone: dict[str, str | None] = {}
    closed: dict[str, bool] = {}
    for act in acts:
        match act.event.split("."):
            case ["key", "compromised"]:
                found.compromised.append(act.target)
            case ["api_key", _]:
                found.ended_keys.append(act.target)
            case ["user", "disabled" | "enabled" as done]:
                disabled[act.target] = done == "disabled"
            case ["user", "deleted" | "purged" | "restored" as done]:
                gone[act.target] = None if done == "restored" else done
            case ["client", "disabled" | "enabled" | "deleted" as done]:
                closed[act.target] = done != "enabled"
        if act.event in TO_LOOK_AT:
            found.to_look_at.append(act)
    found.disabled_users = [target for target, is_so in disabled.items() if is_so and not gone.get(target)]
    found.deleted_users = [target for target, how in gone.items() if how == "deleted"]
    found.purged_users = [target for target, how in gone.items() if how == "purged"]
    found.disabled_clients = [target for target, is_so in closed.items() if is_so]
    return found


def _batches(acts: Sequence[Act]) -> Iterator[Sequence[Act]]:
    for start in range(0, len(acts), _BATCH):
        yield acts[start : start + _BATCH]
