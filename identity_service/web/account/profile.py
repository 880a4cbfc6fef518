"""What a person is called."""

import uuid
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from identity_service.accounts.users import InvalidUser, NameTaken, User
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Spend
from identity_service.infra.ratelimit.catalogue import USERNAME_CHANGE
from identity_service.web.account.parts import AccountParts, Text, invalid, limits_of, person_of
from identity_service.web.callers import Caller, Entry
from identity_service.web.deps import spend
from identity_service.web.documented import problems
from identity_service.web.paging import IfMatch, check_if_match, tagged
from identity_service.web.problems import Conflict, Forbidden, NotFound
from identity_service.web.strict import StrictModel, api_routes


class Profile(BaseModel):
    """A person, as they see themselves."""

    id: uuid.UUID
    username: str
    name: str | None
    email: str
    email_verified: bool
    role: str
    created_at: datetime

    @classmethod
    def of(cls, user: User) -> "Profile":
        """Return what a person sees of themselves."""
        return cls(
            id=user.id,
            username=user.username,
            name=user.name,
            email=user.email,
            email_verified=user.email_verified_at is not None,
            role=user.role,
            created_at=user.created_at,
        )


class ProfilePatch(StrictModel):
    """What is to be changed; absent members stay. `name` may be null: no name at all."""

    username: Text = ""
    name: Text | None = None


def profile_router(parts: AccountParts) -> APIRouter:
    """Return the routes that show and change the profile."""
    router = api_routes("/v1/users/me", tag="account")
    Reading = Annotated[Entry, Depends(parts.callers.needs("account:read", person=True))]  # noqa: N806  # a type
    Writing = Annotated[Entry, Depends(parts.callers.needs("account:write", person=True))]  # noqa: N806  # a type

    @router.get("", responses=problems())
    async def read_profile(entry: Reading, response: Response) -> Profile:
        """Return the signed-in person."""

        async def look(_tx: Transaction, caller: Caller) -> Profile:
            return Profile.of(person_of(caller))

        return tagged(response, await entry.run(look))

    @router.patch("", responses=problems(409, 412))
    async def change_profile(
        entry: Writing, body: ProfilePatch, response: Response, if_match: IfMatch = None
    ) -> Profile:
        """Change the username or the name; sessions stay."""

        async def change(tx: Transaction, caller: Caller) -> Profile:
            user = await parts.users.locked(tx, person_of(caller).id)
            if user is None:
                raise NotFound
            check_if_match(if_match, Profile.of(user))
            if not (given := body.model_fields_set):
                return Profile.of(user)
            try:
                renamed = await parts.users.rename(
                    tx,
                    user.id,
                    username=body.username if "username" in given else None,
                    name=body.name if "name" in given else ...,
                )
            except InvalidUser as error:
                raise invalid(error) from None
            except NameTaken:
                raise Conflict("The username is taken.") from None
            if members := [member for member in sorted(given) if getattr(renamed, member) != getattr(user, member)]:
                await parts.record(tx, caller, "user.changed", str(user.id), {"members": members})
            return Profile.of(renamed)

        async def whose(tx: Transaction, caller: Caller) -> str:
            if not caller.first_hand:
                raise Forbidden("The username is changed from a session of the person's own.")
            return await limits_of(tx, caller)

        if "username" in body.model_fields_set:
            await spend(parts.limiter, [Spend(USERNAME_CHANGE, await entry.run(whose))])
        return tagged(response, await entry.run(change))

    return router
