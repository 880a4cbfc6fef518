"""Handing a person everything that is held about them."""

from typing import Annotated

from fastapi import APIRouter, Depends

from identity_service.accounts.personal_data import HeldData, PersonalData
from identity_service.infra.database import Transaction
from identity_service.web.account.parts import AccountParts, account_routes, person_of
from identity_service.web.callers import Caller, Entry
from identity_service.web.documented import problems


def export_router(parts: AccountParts) -> APIRouter:
    """Return `GET /export`."""
    router = account_routes("/v1/users/me")
    Reading = Annotated[Entry, Depends(parts.callers.needs("account:read", person=True, first_hand=True))]  # noqa: N806  # a type
    personal_data = PersonalData(parts.clock, parts.access, parts.audit)

    @router.get("/export", responses=problems())
    async def export(entry: Reading) -> HeldData:
        """Return everything that is held about the signed-in person, and no secret."""

        async def collect(tx: Transaction, caller: Caller) -> HeldData:
            person = person_of(caller)
            held = await personal_data.collect(tx, person.id)
            await parts.record(tx, caller, "account.exported", str(person.id))
            return held

        return await entry.run(collect)

    return router
