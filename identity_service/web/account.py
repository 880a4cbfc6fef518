"""The JSON API for the signed-in person."""

import uuid
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.security import OAuth2PasswordBearer
from pydantic import BaseModel

from identity_service.accounts.users import User, Users
from identity_service.infra.database import Database, Transaction
from identity_service.web.asgi import Headers
from identity_service.web.deps import Bearer, InsufficientScope, Unauthenticated


class Profile(BaseModel):
    """A person, as they see themselves."""

    id: uuid.UUID
    username: str
    email: str
    email_verified: bool
    role: str
    created_at: datetime


def account_router(db: Database, bearer: Bearer, users: Users) -> APIRouter:
    """Return the routes under `/v1/users/me`."""
    router = APIRouter(prefix="/v1/users/me", tags=["account"])
    documented = OAuth2PasswordBearer(
        tokenUrl="/token", scopes={"account:read": "Read one's own account"}, auto_error=False
    )

    async def me(request: Request) -> User:
        """Return the person a bearer token with `account:read` speaks for."""
        claims = bearer.read(Headers(request.scope["headers"]))

        async def look(tx: Transaction) -> User | None:
            await bearer.check_live(tx, claims)
            if "account:read" not in claims.scope:
                raise InsufficientScope("account:read")
            return None if claims.session_id is None else await users.get(tx, uuid.UUID(claims.subject))

        user = await db.run(look)
        if user is None:
            raise Unauthenticated("invalid_token", reason="not_a_person")
        return user

    @router.get("", dependencies=[Depends(documented)])
    async def read(user: Annotated[User, Depends(me)]) -> Profile:
        """Return the signed-in person."""
        return Profile(
            id=user.id,
            username=user.username,
            email=user.email,
            email_verified=user.email_verified_at is not None,
            role=user.role,
            created_at=user.created_at,
        )

    return router
