"""Where a person is signed in, and signing out there."""

import asyncio
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from identity_service.accounts.refresh_families import Session
from identity_service.infra.database import Transaction
from identity_service.web.account.device import devices_of
from identity_service.web.account.parts import AccountParts, person_of
from identity_service.web.callers import Caller, Entry
from identity_service.web.documented import problems
from identity_service.web.paging import Cursors, CursorText, Limit, Page
from identity_service.web.problems import NotFound
from identity_service.web.strict import api_routes

_LISTING = "sessions"


class SessionShown(BaseModel):
    """A place where the person is signed in. `device` is what the program there says of itself, if it is known."""

    id: uuid.UUID
    client_id: str
    client_name: str
    device: str | None
    network: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool

    @classmethod
    def of(cls, session: Session, device: str | None) -> "SessionShown":
        """Return what is shown of a session."""
        return cls(
            id=session.id,
            client_id=session.client_id,
            client_name=session.client_name,
            device=device,
            network=session.network,
            created_at=session.created_at,
            last_used_at=session.last_used_at,
            expires_at=session.expires_at,
            current=session.current,
        )


def sessions_router(parts: AccountParts) -> APIRouter:
    """Return the routes under `/sessions`."""
    router = api_routes("/v1/users/me/sessions", tag="account")
    Reading = Annotated[Entry, Depends(parts.callers.needs("account:read", person=True))]  # noqa: N806  # a type
    Writing = Annotated[Entry, Depends(parts.callers.needs("account:write", person=True))]  # noqa: N806  # a type

    @router.get("", responses=problems())
    async def list_sessions(entry: Reading, limit: Limit = 50, cursor: CursorText = None) -> Page[SessionShown]:
        """List live sessions, the most recently used first."""

        async def look(tx: Transaction, caller: Caller) -> tuple[str, list[Session]]:
            person = person_of(caller)
            return str(person.id), await parts.families.sessions(tx, person.id, caller.session_id)

        owner, sessions = await entry.run(look)
        return await session_page(parts.cursors, _LISTING, owner, cursor, sessions, limit)

    @router.delete("", status_code=204, responses=problems())
    async def end_sessions(entry: Writing, except_current: Annotated[bool, Query()] = False) -> None:
        """Sign out everywhere, or everywhere else."""

        async def end(tx: Transaction, caller: Caller) -> None:
            person = person_of(caller)
            try:
                epoch = await parts.users.end_sessions(tx, person.id)
            except LookupError:  # deleted in this moment
                raise NotFound from None
            if except_current and caller.session_id is not None:
                await parts.families.keep(tx, caller.session_id, person.id, epoch=epoch)
            await parts.record(tx, caller, "sessions.ended", str(person.id), {"current_kept": except_current})

        await entry.run(end)

    @router.delete("/{session_id}", status_code=204, responses=problems())
    async def end_session(entry: Writing, session_id: uuid.UUID) -> None:
        """Sign out in one place."""

        async def end(tx: Transaction, caller: Caller) -> None:
            person = person_of(caller)
            if not await parts.families.end(tx, person.id, session_id):
                raise NotFound
            await parts.record(tx, caller, "session.ended", str(person.id), {"session": str(session_id)})

        await entry.run(end)

    return router


async def session_page(
    cursors: Cursors, listing: str, owner: str, cursor: str | None, sessions: Sequence[Session], limit: int
) -> Page[SessionShown]:
    """Return one page of somebody's sessions, with what their programs say of themselves."""
    page, following = cursors.page(listing, owner, cursor, sessions, lambda session: session.place, limit)
    devices = await asyncio.to_thread(devices_of, [session.user_agent for session in page])
    return Page[SessionShown](
        items=[SessionShown.of(session, devices[session.user_agent]) for session in page], next_cursor=following
    )
