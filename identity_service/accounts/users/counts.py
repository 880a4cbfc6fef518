"""How many users there are, cheaply enough to be asked for while a million people sign in."""

from dataclasses import dataclass

from sqlalchemy import func, literal, select, union_all

from identity_service.accounts.users.search import DISABLED, State
from identity_service.accounts.users.user import WAS_SOMEBODY
from identity_service.infra.database import Transaction
from identity_service.infra.tables import users


@dataclass(frozen=True, slots=True)
class Counts:
    """How many users there are, by role and by state; those that were deleted are in no number but their own."""

    by_role: dict[str, int]
    by_state: dict[State, int]


async def count_users(tx: Transaction) -> Counts:
    """
    Return how many users there are, as one statement saw them.

    Each number is that of an index, which PostgreSQL counts without looking at the rows: asking each row whether it was
    deleted would read the whole table, so deleted rows are counted with the others and subtracted.
    """
    c, n, nothing = users.c, func.count(), literal("")
    deleted, unverified = c.deleted_at.is_not(None), c.email_verified_at.is_(None)
    statement = union_all(
        select(literal("all").label("what"), c.role.label("role"), n.label("n")).group_by(c.role),
        select(literal("deleted"), c.role, n).where(deleted).group_by(c.role),
        select(literal("disabled"), nothing, n).select_from(users).where(DISABLED),
        select(literal("unverified"), nothing, n).where(unverified),
        select(literal("deleted_unverified"), nothing, n).where(deleted, unverified),
        select(literal("deleted_somebody"), nothing, n).where(deleted, WAS_SOMEBODY),
    )
    counted = {(row.what, row.role): row.n for row in await tx.execute(statement)}
    gone = {role: number for (what, role), number in counted.items() if what == "deleted"}
    by_role = {role: number - gone.get(role, 0) for (what, role), number in counted.items() if what == "all"}
    total, total_gone = sum(by_role.values()), sum(gone.values())
    disabled = counted["disabled", ""] - total_gone  # who is deleted is disabled as well
    return Counts(
        by_role=by_role,
        by_state={
            State.ENABLED: total - disabled,
            State.DISABLED: disabled,
            State.UNVERIFIED: counted["unverified", ""] - counted["deleted_unverified", ""],
            State.DELETED: counted["deleted_somebody", ""],
        },
    )
