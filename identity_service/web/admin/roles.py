"""The operators' API about roles and scopes."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, Field, StringConstraints

from identity_service.accounts import access
from identity_service.accounts.access import Access, InUse, InvalidRole, InvalidScopeName, Role
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.web.callers import Caller, Callers, Entry, note
from identity_service.web.documented import problems
from identity_service.web.paging import IfMatch, check_if_match, tagged
from identity_service.web.problems import Conflict, Fault, Forbidden, Invalid, NotFound
from identity_service.web.strict import StrictModel, api_routes

RoleName = Annotated[str, Path(max_length=64)]
ScopeName = Annotated[str, Query(min_length=1, max_length=128)]
_Word = Annotated[str, StringConstraints(min_length=1, max_length=128)]
_Words = Annotated[list[_Word], Field(max_length=200)]
_Description = Annotated[str, StringConstraints(max_length=500)]


class RoleCreation(StrictModel):
    """A role to be made; it holds what its parent holds, and `scopes`."""

    name: _Word
    parent: _Word | None = None
    description: _Description = ""
    scopes: _Words = Field(default_factory=list)


class RolePatch(StrictModel):
    """What is to be changed; absent members stay."""

    description: _Description = ""
    scopes: _Words = Field(default_factory=list)


class RoleShown(BaseModel):
    """A role: the scopes given to it, and all that it holds."""

    name: str
    parent: str | None
    description: str
    scopes: list[str]
    held: list[str]

    @classmethod
    def of(cls, role: Role) -> "RoleShown":
        """Return what is shown of a role."""
        return cls(
            name=role.name,
            parent=role.parent,
            description=role.description,
            scopes=list(role.scopes),
            held=sorted(role.held),
        )


class ScopeCreation(StrictModel):
    """A scope to be defined, one word of RFC 6749 §3.3."""

    name: _Word
    description: _Description = ""


class ScopePatch(StrictModel):
    """What the scope is for."""

    description: _Description


class ScopeShown(BaseModel):
    """A scope and what it is for."""

    name: str
    description: str


def roles_router(callers: Callers, rules: Access, audit: AuditTrail) -> APIRouter:
    """Return the routes under `/v1/admin/roles` and `/v1/admin/scopes`."""
    router = api_routes("/v1/admin", tag="roles")
    Reading = Annotated[Entry, Depends(callers.needs("roles:read"))]  # noqa: N806  # a type
    Writing = Annotated[Entry, Depends(callers.needs("roles:write", first_hand=True))]  # noqa: N806  # a type

    async def record(
        tx: Transaction, caller: Caller, event: str, target: str, detail: dict[str, Any] | None = None
    ) -> None:
        await note(audit, tx, caller, event, target, detail)

    def check_grant(caller: Caller, scopes: set[str] | frozenset[str]) -> None:
        """Raise Forbidden for scopes that the caller could not hand on."""
        if access.missing(scopes, scopes=caller.scopes, rights=caller.rights):
            raise Forbidden("A role cannot be given more than you hold.")

    async def changeable(tx: Transaction, caller: Caller, name: str) -> Role:
        """Return a role that the caller may change: one that holds no more than they do, and is not their own."""
        role = await rules.role(tx, name, lock=True)
        if role is None:
            raise NotFound
        check_grant(caller, role.held)
        if caller.user is not None and caller.user.role == name:
            raise Forbidden("Nobody changes their own role.")
        return role

    async def check_those_above(tx: Transaction, caller: Caller, name: str) -> None:
        """Raise Forbidden if what is taken from a role is taken from one that holds more than the caller as well."""
        everyone = await rules.roles(tx)
        parents = {role.name: role.parent for role in everyone}
        for role in everyone:
            if name in access.line_of(role.name, parents):
                check_grant(caller, role.held)

    @router.get("/roles", responses=problems())
    async def list_roles(entry: Reading) -> list[RoleShown]:
        """List roles, lowest first."""
        return [RoleShown.of(role) for role in await entry.run(lambda tx, _: rules.roles(tx))]

    @router.post("/roles", status_code=201, responses=problems(409))
    async def create_role(entry: Writing, body: RoleCreation) -> RoleShown:
        """Make a role."""

        async def work(tx: Transaction, caller: Caller) -> RoleShown:
            try:
                role = await rules.create_role(
                    tx, body.name, parent=body.parent, description=body.description, names=body.scopes
                )
            except InvalidRole as error:
                raise _invalid(error) from None
            except InUse as error:
                raise Conflict(str(error)) from None
            check_grant(caller, role.held)
            await record(tx, caller, "role.created", role.name, {"scopes": list(role.scopes)})
            return RoleShown.of(role)

        return await entry.run(work)

    @router.get("/roles/{name}", responses=problems())
    async def read_role(entry: Reading, name: RoleName, response: Response) -> RoleShown:
        """Return a role."""

        async def work(tx: Transaction, caller: Caller) -> RoleShown:
            if (role := await rules.role(tx, name)) is None:
                raise NotFound
            return RoleShown.of(role)

        return tagged(response, await entry.run(work))

    @router.patch("/roles/{name}", responses=problems(412))
    async def change_role(
        entry: Writing, name: RoleName, body: RolePatch, response: Response, if_match: IfMatch = None
    ) -> RoleShown:
        """Change a role; whoever has it gains and loses with it, at our own API at once."""
        description = body.description if "description" in body.model_fields_set else None
        scopes = body.scopes if "scopes" in body.model_fields_set else None

        async def work(tx: Transaction, caller: Caller) -> RoleShown:
            role = await changeable(tx, caller, name)
            check_if_match(if_match, RoleShown.of(role))
            if scopes is not None and not set(role.scopes) <= set(scopes):
                await check_those_above(tx, caller, name)
            try:
                changed = await rules.update_role(tx, name, description=description, names=scopes)
            except InvalidRole as error:
                raise _invalid(error) from None
            check_grant(caller, changed.held - role.held)  # as it was written: a scope may have been defined just now
            gone, new = sorted(role.held - changed.held), sorted(changed.held - role.held)
            for event, moved in (("role.withdrawn", gone), ("role.granted", new)):
                if moved:
                    await record(tx, caller, event, name, {"scopes": moved})
            if description is not None:
                await record(tx, caller, "role.updated", name)
            return RoleShown.of(changed)

        return tagged(response, await entry.run(work))

    @router.delete("/roles/{name}", status_code=204, responses=problems(409))
    async def delete_role(entry: Writing, name: RoleName) -> None:
        """Delete a role that nobody has."""

        async def work(tx: Transaction, caller: Caller) -> None:
            await changeable(tx, caller, name)
            try:
                await rules.delete_role(tx, name)
            except InUse as error:
                raise Conflict(str(error)) from None
            await record(tx, caller, "role.deleted", name)

        await entry.run(work)

    @router.get("/scopes", responses=problems())
    async def list_scopes(entry: Reading) -> list[ScopeShown]:
        """List the scopes that are defined, by name."""
        found = await entry.run(lambda tx, _: rules.defined(tx))
        return [ScopeShown(name=scope.name, description=scope.description) for scope in found]

    @router.post("/scopes", status_code=201, responses=problems(409))
    async def create_scope(entry: Writing, body: ScopeCreation) -> ScopeShown:
        """Define a scope; it belongs to no role yet but the highest."""

        async def work(tx: Transaction, caller: Caller) -> ScopeShown:
            try:
                new = await rules.define(tx, [body.name], description=body.description)
            except InvalidScopeName:
                raise Invalid(Fault("/name", "is no word of RFC 6749 section 3.3")) from None
            if not new:
                raise Conflict("There is a scope of this name.")
            await record(tx, caller, "scope.created", body.name)
            return ScopeShown(name=body.name, description=body.description)

        return await entry.run(work)

    @router.patch("/scopes", responses=problems())
    async def change_scope(entry: Writing, name: ScopeName, body: ScopePatch) -> ScopeShown:
        """Say what a scope is for."""

        async def work(tx: Transaction, caller: Caller) -> ScopeShown:
            if not await rules.describe(tx, name, body.description):
                raise NotFound
            await record(tx, caller, "scope.updated", name)
            return ScopeShown(name=name, description=body.description)

        return await entry.run(work)

    @router.delete("/scopes", status_code=204, responses=problems(409))
    async def delete_scope(entry: Writing, name: ScopeName) -> None:
        """Delete a scope that no role holds and no client may ask for."""

        async def work(tx: Transaction, caller: Caller) -> None:
            try:
                await rules.delete_scope(tx, name)
            except LookupError:
                raise NotFound from None
            except InUse as error:
                raise Conflict(str(error)) from None
            await record(tx, caller, "scope.deleted", name)

        await entry.run(work)

    return router


def _invalid(error: InvalidRole) -> Invalid:
    """Return the refusal for a role that cannot be; the messages are constants that name the member first."""
    member, _, detail = str(error).partition(": ")
    return Invalid(Fault(f"/{member}", detail))
