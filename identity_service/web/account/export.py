"""Handing a person everything that is held about them."""

from typing import Annotated

from fastapi import APIRouter, Depends

from identity_service.accounts.personal_data import HeldData, PersonalData
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Spend
from identity_service.infra.ratelimit.catalogue import EXPORT
from identity_service.web.account.parts import AccountParts, if_done, limits_of, person_of
from identity_service.web.callers import Caller, Entry
from identity_service.web.documented import problems
from identity_service.web.strict import api_routes


def export_router(parts: AccountParts) -> APIRouter:
    """Return `GET /export`."""
    router = api_routes("/v1/users/me", tag="account")
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

        async with if_done(parts.limiter, [Spend(EXPORT, await entry.run(limits_of))]):
            return await entry.run(collect)

    return router
