"""The operators' API about people."""

import uuid
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, StringConstraints

from identity_service.accounts.access import ADMINISTRATORS_LOCK, Access
from identity_service.accounts.api_keys import ApiKeys
from identity_service.accounts.refresh_families import RefreshFamilies, Session
from identity_service.accounts.users import InvalidUser, NameTaken, State, User, Users
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.infra.outbox import MailQueueFull
from identity_service.web.account.parts import Mail, invalid, tell
from identity_service.web.account.sessions import SessionShown, session_page
from identity_service.web.admin.stewardship import Stewardship, identified
from identity_service.web.callers import Caller, Callers, Entry
from identity_service.web.documented import problems
from identity_service.web.paging import Cursors, CursorText, IfMatch, Limit, Page, check_if_match, tagged
from identity_service.web.problems import Conflict, NotFound
from identity_service.web.strict import Label, StrictModel, api_routes

_TAKEN = "The username or the address belongs to somebody already."

UserId = Annotated[str, Path(description="The user's id, their `sub`.")]
SessionId = Annotated[str, Path(description="The session's id, the `sid` of its tokens.")]
_Text = Annotated[str, StringConstraints(max_length=254)]
_Role = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Prefix = Annotated[
    str | None,
    Query(min_length=1, max_length=254, description="The beginning of a username or an address, or a whole id."),
]
RoleName = Annotated[str | None, Query(pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="Whoever has this role.")]
StateName = Annotated[State | None, Query(description="Without it: everybody who was not deleted.")]


class UserShown(BaseModel):
    """A person, as operators see one."""

    id: uuid.UUID
    username: str
    name: str | None
    email: str
    email_verified: bool
    role: str
    enabled: bool
    has_password: bool
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None

    @classmethod
    def of(cls, user: User) -> "UserShown":
        """Return what is shown of a user."""
        return cls(
            id=user.id,
            username=user.username,
            name=user.name,
            email=user.email,
            email_verified=user.email_verified_at is not None,
            role=user.role,
            enabled=user.enabled,
            has_password=user.has_password,
            created_at=user.created_at,
            updated_at=user.updated_at,
            deleted_at=user.deleted_at,
        )


class UserCreation(StrictModel):
    """A person to be made. They choose their password themselves: nobody else ever knows it."""

    username: _Text
    email: _Text
    name: Label | None = None
    role: _Role = "user"
    email_verified: bool = False


class UserPatch(StrictModel):
    """What is to be changed; absent members stay. `name` may be null: no name at all."""

    username: _Text = ""
    email: _Text = ""
    name: Label | None = None


class RoleChange(StrictModel):
    """The role that the person shall have."""

    role: _Role


class PasswordResetForced(BaseModel):
    """Whether a mail with a link is on its way; without one, somebody must set a password by command."""

    mail_sent: bool


def users_router(
    callers: Callers,
    users: Users,
    rules: Access,
    families: RefreshFamilies,
    api_keys: ApiKeys,
    audit: AuditTrail,
    cursors: Cursors,
    mail: Mail | None,
) -> APIRouter:
    """Return the routes under `/v1/admin/users`; `mail` is None where no mail can be sent."""
    router = api_routes("/v1/admin/users", tag="users")
    Reading = Annotated[Entry, Depends(callers.needs("users:read"))]  # noqa: N806  # a type
    Taking = Annotated[Entry, Depends(callers.needs("users:write"))]  # noqa: N806  # a type
    Giving = Annotated[Entry, Depends(callers.needs("users:write", first_hand=True))]  # noqa: N806  # a type
    stewards = Stewardship(users, rules, audit)

    async def invite(tx: Transaction, caller: Caller, user: User) -> bool:
        """Order a mail with which somebody chooses their password; return whether it was ordered."""
        if mail is None or not user.enabled:
            return False
        await mail.recovery.send(tx, "reset_password", user, origin=caller.origin)
        return True

    async def shown(tx: Transaction, user: User) -> UserShown:
        return UserShown.of(await stewards.known(tx, str(user.id)))

    # -- finding and making ---------------------------------------------------------------------------------------

    @router.get("", responses=problems())
    async def list_users(
        entry: Reading,
        q: Prefix = None,
        role: RoleName = None,
        state: StateName = None,
        limit: Limit = 50,
        cursor: CursorText = None,
    ) -> Page[UserShown]:
        """
        List users, the newest first.

        With `q`: whose username begins so, by username, then whose address begins so, by address.
        """
        filters = {"q": q, "role": role, "state": state}
        place = cursors.read("users", filters, cursor)

        found = await entry.run(lambda tx, _: users.search(tx, q=q, role=role, state=state, after=place, limit=limit))
        return Page[UserShown](
            items=[UserShown.of(user) for user in found.users],
            next_cursor=cursors.write("users", filters, found.place) if found.place is not None else None,
        )

    @router.post("", status_code=201, responses=problems(409))
    async def create_user(entry: Giving, body: UserCreation, response: Response) -> UserShown:
        """Make a user without a password; where mail can be sent, a mail asks them to choose one."""

        async def work(tx: Transaction, caller: Caller) -> UserShown:
            await stewards.check_role(tx, caller, body.role)
            try:
                user = await users.create(
                    tx,
                    username=body.username,
                    email=body.email,
                    role=body.role,
                    password_hash=None,
                    verified=body.email_verified,
                    name=body.name,
                )
            except InvalidUser as error:
                raise invalid(error) from None
            except NameTaken:
                raise Conflict(_TAKEN) from None
            await stewards.record(tx, caller, "user.created", user, {"role": user.role})
            await invite(tx, caller, user)
            return UserShown.of(user)

        return tagged(response, await entry.run(work))

    @router.get("/{user_id}", responses=problems())
    async def read_user(entry: Reading, user_id: UserId, response: Response) -> UserShown:
        """Return a user, also one that was deleted."""

        async def work(tx: Transaction, _: Caller) -> UserShown:
            return UserShown.of(await stewards.known(tx, user_id))

        return tagged(response, await entry.run(work))

    # -- changing -------------------------------------------------------------------------------------------------

    @router.patch("/{user_id}", responses=problems(409, 412))
    async def change_user(
        entry: Giving, user_id: UserId, body: UserPatch, response: Response, if_match: IfMatch = None
    ) -> UserShown:
        """
        Change what somebody is called, or their address, which is unproven then.

        The old address is told, links that were mailed to it die, and the new one gets a link that proves it. One's own
        address is changed where one's password is asked for.
        """
        given = body.model_fields_set

        async def work(tx: Transaction, caller: Caller) -> UserShown:
            user = await stewards.charge(tx, caller, user_id)
            check_if_match(if_match, UserShown.of(user))
            changed = user
            try:
                if given & {"username", "name"}:
                    changed = await users.rename(
                        tx,
                        user.id,
                        username=body.username if "username" in given else None,
                        name=body.name if "name" in given else ...,
                    )
                if "email" in given and body.email != user.email:
                    stewards.check_other(caller, user, "Change your own address where your password is asked for.")
                    changed = await users.set_email(tx, user.id, body.email, verified=False)
            except InvalidUser as error:
                raise invalid(error) from None
            except NameTaken:
                raise Conflict(_TAKEN) from None
            if changed.email != user.email and mail is not None:
                await mail.tokens.revoke_all(tx, user.id)
                await tell(mail, tx, "email_changed", user)
                await mail.recovery.send(tx, "verify_email", changed, origin=caller.origin)
            members = [member for member in sorted(given) if getattr(changed, member) != getattr(user, member)]
            if members:
                await stewards.record(tx, caller, "user.changed", user, {"members": members})
            return UserShown.of(changed)

        return tagged(response, await entry.run(work))

    @router.post("/{user_id}/disable", status_code=204, responses=problems(409))
    async def disable_user(entry: Taking, user_id: UserId) -> None:
        """Disable somebody; their sessions end."""

        async def work(tx: Transaction, caller: Caller) -> None:
            user = await stewards.charge(tx, caller, user_id)
            stewards.check_other(caller, user, "Nobody disables themselves.")
            await stewards.check_not_last(tx, user)
            if user.enabled:
                await users.set_enabled(tx, user.id, False)
                await stewards.record(tx, caller, "user.disabled", user)

        await entry.run(work, lock=ADMINISTRATORS_LOCK)

    @router.post("/{user_id}/enable", status_code=204, responses=problems())
    async def enable_user(entry: Giving, user_id: UserId) -> None:
        """Enable somebody again; sessions that ended stay ended."""

        async def work(tx: Transaction, caller: Caller) -> None:
            user = await stewards.charge(tx, caller, user_id)
            if not user.enabled:
                await users.set_enabled(tx, user.id, True)
                await stewards.record(tx, caller, "user.enabled", user)

        await entry.run(work, lock=ADMINISTRATORS_LOCK)

    @router.put("/{user_id}/role", responses=problems(409))
    async def change_role(entry: Giving, user_id: UserId, body: RoleChange) -> UserShown:
        """Give somebody another role; at our own API they gain and lose with it at once."""

        async def work(tx: Transaction, caller: Caller) -> UserShown:
            user = await stewards.charge(tx, caller, user_id)
            stewards.check_other(caller, user, "Nobody changes their own role.")
            await stewards.check_role(tx, caller, body.role)
            if body.role != user.role:
                await stewards.check_not_last(tx, user)
                try:
                    await users.set_role(tx, user.id, body.role)
                except InvalidUser as error:
                    raise invalid(error) from None
                await stewards.record(tx, caller, "user.role_changed", user, {"from": user.role, "to": body.role})
            return await shown(tx, user)

        return await entry.run(work, lock=ADMINISTRATORS_LOCK)

    # -- sessions and passwords -----------------------------------------------------------------------------------

    @router.get("/{user_id}/sessions", responses=problems())
    async def list_sessions(
        entry: Reading, user_id: UserId, limit: Limit = 50, cursor: CursorText = None
    ) -> Page[SessionShown]:
        """List somebody's live sessions, the most recently used first."""

        async def work(tx: Transaction, caller: Caller) -> list[Session]:
            user = await stewards.known(tx, user_id)
            return await families.sessions(tx, user.id, caller.session_id)

        held = await entry.run(work)
        return await session_page(cursors, "users.sessions", user_id, cursor, held, limit)

    @router.delete("/{user_id}/sessions", status_code=204, responses=problems())
    async def end_sessions(entry: Taking, user_id: UserId) -> None:
        """Sign somebody out everywhere."""

        async def work(tx: Transaction, caller: Caller) -> None:
            user = await stewards.charge(tx, caller, user_id)
            await users.end_sessions(tx, user.id)
            await stewards.record(tx, caller, "sessions.ended", user)

        await entry.run(work)

    @router.delete("/{user_id}/sessions/{session_id}", status_code=204, responses=problems())
    async def end_session(entry: Taking, user_id: UserId, session_id: SessionId) -> None:
        """Sign somebody out in one place."""

        async def work(tx: Transaction, caller: Caller) -> None:
            user = await stewards.charge(tx, caller, user_id)
            if not await families.end(tx, user.id, identified(session_id)):
                raise NotFound
            await stewards.record(tx, caller, "session.ended", user, {"session": session_id})

        await entry.run(work)

    @router.post("/{user_id}/force-password-reset", responses=problems(409))
    async def force_password_reset(entry: Taking, user_id: UserId) -> PasswordResetForced:
        """Forget somebody's password, end their sessions and keys; where mail can be sent, a mail asks for another."""

        async def work(tx: Transaction, caller: Caller) -> PasswordResetForced:
            user = await stewards.charge(tx, caller, user_id)
            stewards.check_other(caller, user, "Change your own password where the old one is asked for.")
            if user.has_password:  # or there is nothing to forget, and a mail may still be wanted
                await stewards.check_not_last(tx, user)
            await users.clear_password(tx, user.id)
            await api_keys.revoke_all(tx, user.id)
            await stewards.record(tx, caller, "user.password_reset_forced", user)
            try:
                return PasswordResetForced(mail_sent=await invite(tx, caller, user))
            except MailQueueFull:  # whoever fills the queue must not keep a stolen password alive
                return PasswordResetForced(mail_sent=False)

        return await entry.run(work, lock=ADMINISTRATORS_LOCK)

    # -- leaving and coming back ----------------------------------------------------------------------------------

    @router.delete("/{user_id}", status_code=204, responses=problems(409))
    async def delete_user(entry: Taking, user_id: UserId, purge: Annotated[bool, Query()] = False) -> None:
        """
        Delete somebody: everything of theirs ends at once, and their names are free.

        They can be restored for a while; with `purge` nothing is left that could be.
        """

        async def work(tx: Transaction, caller: Caller) -> None:
            user = await stewards.charge(tx, caller, user_id, deleted=purge)
            stewards.check_other(caller, user, "Nobody deletes themselves here.")
            await stewards.check_not_last(tx, user)
            if mail is not None:
                await mail.tokens.revoke_all(tx, user.id)
            if purge:
                await users.erase(tx, user.id)
            else:
                await users.delete(tx, user.id)
            await stewards.record(tx, caller, "user.purged" if purge else "user.deleted", user)

        await entry.run(work, lock=ADMINISTRATORS_LOCK)

    @router.post("/{user_id}/restore", responses=problems(409))
    async def restore_user(entry: Giving, user_id: UserId) -> UserShown:
        """
        Undo a deletion: the names come back, sessions, API keys and the password do not.

        Where mail can be sent, a mail asks for a new password.
        """

        async def work(tx: Transaction, caller: Caller) -> UserShown:
            user = await stewards.charge(tx, caller, user_id, deleted=True)
            if user.deleted_at is None:
                raise NotFound
            try:
                restored = await users.restore(tx, user.id)
            except NameTaken:
                raise Conflict("Somebody took one of the names meanwhile.") from None
            await api_keys.revoke_all(tx, user.id)
            await stewards.record(tx, caller, "user.restored", user)
            await invite(tx, caller, restored)
            return UserShown.of(restored)

        return await entry.run(work, lock=ADMINISTRATORS_LOCK)

    return router
