"""A person's own API keys."""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Body, Depends, Path
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints

from identity_service.accounts import access
from identity_service.accounts.api_keys import MOST_NETWORKS, ApiKey, ApiKeys, InvalidKey, NewKey, Owner, TooManyKeys
from identity_service.accounts.users import User
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Transaction
from identity_service.infra.ratelimit import Limiter, Spend
from identity_service.infra.ratelimit.catalogue import API_KEY_CREATION
from identity_service.web.account.parts import given_back, limits_of, person_of
from identity_service.web.callers import Caller, Callers, Entry, note
from identity_service.web.deps import spend
from identity_service.web.documented import problems
from identity_service.web.paging import Cursors, CursorText, Limit, Page
from identity_service.web.problems import Conflict, Fault, Forbidden, Invalid, NotFound
from identity_service.web.strict import Label, StrictModel, Unfit, api_routes

Notify: TypeAlias = Callable[[Transaction, str, User, Mapping[str, Any]], Awaitable[None]]
"""Orders a mail: its template, to whom, and what it must be told."""

_LONGEST_OVERLAP = 7 * 86400  # seconds
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")


def _instant(value: object) -> datetime:
    """Return an instant of RFC 3339 in UTC; raises Unfit, also for one that UTC has no date for."""
    if not isinstance(value, str) or not _INSTANT.fullmatch(value):
        raise Unfit("must be an instant of RFC 3339, as 2030-01-31T12:00:00Z")
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except OverflowError:
        raise Unfit("must be an instant of RFC 3339, as 2030-01-31T12:00:00Z") from None


Instant = Annotated[datetime, BeforeValidator(_instant)]
KeyId = Annotated[str, Path(max_length=64)]


class KeyCreation(StrictModel):
    """A key to be made. Without `expires_at` it lives as long as the installation lets it."""

    name: Label
    scope: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=128)]], Field(min_length=1, max_length=100)
    ]
    expires_at: Instant | None = None
    networks: Annotated[
        list[Annotated[str, StringConstraints(max_length=50)]],
        Field(
            max_length=MOST_NETWORKS,
            description="Where it may be used from; none: anywhere. An exchange comes from the service's own address.",
        ),
    ] = Field(default_factory=list)


class KeyRotation(StrictModel):
    """How long the secret that is replaced still works, in seconds."""

    overlap: Annotated[int, Field(ge=0, le=_LONGEST_OVERLAP)] = 86400


class KeyShown(BaseModel):
    """A key, without its secret. `previous_expires_at` is when the secret before the newest one stops working."""

    id: str
    name: str
    scope: list[str]
    networks: list[str]
    last4: str
    created_at: datetime
    rotated_at: datetime | None
    previous_expires_at: datetime | None
    expires_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey) -> "KeyShown":
        """Return what is shown of a key."""
        return cls(**_shown(key))


class KeyMade(KeyShown):
    """A key with its secret: `key` is what to send in `X-API-Key`, and is shown this once."""

    key: str

    @classmethod
    def with_text(cls, made: NewKey) -> "KeyMade":
        """Return what is shown of a new key, or of one with a new secret."""
        return cls(key=made.text.reveal(), **_shown(made.key))


def _shown(key: ApiKey) -> dict[str, Any]:
    values = {name: getattr(key, name) for name in KeyShown.model_fields}
    return {**values, "scope": list(key.scope), "networks": list(key.networks)}


class KeyRoutes:
    """What the routes about people's keys and about services' keys share."""

    def __init__(self, api_keys: ApiKeys, cursors: Cursors, audit: AuditTrail) -> None:
        self.api_keys = api_keys
        self._cursors = cursors
        self._audit = audit

    def page(self, owner: Owner, keys: Sequence[ApiKey], limit: int, cursor: str | None) -> Page[KeyShown]:
        """Return one page of an owner's keys, which are few enough to be read at once."""
        page, following = self._cursors.page("api_keys", str(owner), cursor, keys, _place, limit)
        return Page[KeyShown](items=[KeyShown.of(key) for key in page], next_cursor=following)

    async def create(self, tx: Transaction, caller: Caller, owner: Owner, body: KeyCreation) -> NewKey:
        """Make a key that may do what its maker may hand on; raises Forbidden, Conflict, Invalid, NotFound."""
        _check_hands_on(caller, body.scope)
        try:
            made = await self.api_keys.create(
                tx,
                owner=owner,
                name=body.name,
                scope=body.scope,
                expires_at=body.expires_at,
                networks=body.networks,
            )
        except InvalidKey as error:
            raise Invalid(Fault(f"/{error.member}", str(error))) from None
        except TooManyKeys:
            raise Conflict("There are as many keys as there may be. Revoke one first.") from None
        except LookupError:
            raise NotFound from None
        ends = made.key.expires_at
        detail = {"scope": list(made.key.scope), "expires_at": ends.isoformat() if ends else None}
        await self.record(tx, caller, "created", made.key, {**detail, "networks": list(made.key.networks)})
        return made

    async def rotate(
        self,
        tx: Transaction,
        caller: Caller,
        key_id: str,
        owner: Owner,
        body: KeyRotation | None,
        *,
        held: Collection[str],
    ) -> NewKey:
        """
        Give a key a new secret; raises NotFound, Forbidden, Conflict.

        `held` is what the owner may do now. Who gets to see the secret gets what it is good for, so they must be able
        to hand that on, as if they made the key.
        """
        key = await self.api_keys.get(tx, key_id, owner)
        if key is None:
            raise NotFound
        _check_hands_on(caller, access.within(key.scope, held))
        overlap = (body or KeyRotation()).overlap
        try:
            made = await self.api_keys.rotate(tx, key_id, owner, timedelta(seconds=overlap))
        except InvalidKey:
            raise Conflict("The key has expired. Make a new one.") from None
        if made is None:
            raise NotFound
        await self.record(tx, caller, "rotated", made.key, {"overlap": overlap})
        return made

    async def revoke(self, tx: Transaction, caller: Caller, key_id: str, owner: Owner) -> None:
        """End a key at once; raises NotFound."""
        key = await self.api_keys.get(tx, key_id, owner)
        if key is None or not await self.api_keys.revoke(tx, key_id, owner):
            raise NotFound
        await self.record(tx, caller, "revoked", key, {})

    async def record(self, tx: Transaction, caller: Caller, what: str, key: ApiKey, detail: Mapping[str, Any]) -> None:
        """Note what was done to a key, and whose it is."""
        await note(self._audit, tx, caller, f"api_key.{what}", key.id, {"owner": str(key.owner), **detail})


def api_keys_router(
    callers: Callers,
    api_keys: ApiKeys,
    cursors: Cursors,
    audit: AuditTrail,
    limiter: Limiter,
    notify: Notify | None = None,
) -> APIRouter:
    """
    Return the routes under `/v1/users/me/api-keys`.

    Keys are made, rotated and revoked by who has signed in, never by a key: one that leaks must not outlive its end.
    """
    router = api_routes("/v1/users/me/api-keys", tag="api-keys")
    routes = KeyRoutes(api_keys, cursors, audit)
    Reading = Annotated[Entry, Depends(callers.needs("account:read", person=True))]  # noqa: N806  # a type
    Writing = Annotated[  # noqa: N806  # a type
        Entry, Depends(callers.needs("account:write", person=True, first_hand=True))
    ]

    @router.get("", responses=problems())
    async def list_keys(entry: Reading, limit: Limit = 50, cursor: CursorText = None) -> Page[KeyShown]:
        """List one's keys that were not revoked, newest first."""

        async def look(tx: Transaction, caller: Caller) -> Page[KeyShown]:
            person = person_of(caller)
            return routes.page(person.id, await api_keys.list(tx, person.id), limit, cursor)

        return await entry.run(look)

    @router.post("", status_code=201, responses=problems(409))
    async def create_key(entry: Writing, body: KeyCreation) -> KeyMade:
        """Make a key; `key`, which holds its secret, is shown this once."""

        async def make(tx: Transaction, caller: Caller) -> KeyMade:
            person = person_of(caller)
            if not set(body.scope) <= caller.scopes:
                raise Forbidden("A key cannot be given more than the token it is made with.")
            made = await routes.create(tx, caller, person.id, body)
            if notify is not None:
                await notify(tx, "api_key_created", person, {"name": made.key.name})
            return KeyMade.with_text(made)

        booked = [Spend(API_KEY_CREATION, await entry.run(limits_of))]
        await spend(limiter, booked)
        async with given_back(limiter, booked):
            return await entry.run(make)

    @router.post("/{key_id}/rotate", responses=problems(409))
    async def rotate_key(entry: Writing, key_id: KeyId, body: Annotated[KeyRotation | None, Body()] = None) -> KeyMade:
        """Give a key a new secret; the old one works for the overlap."""

        async def rotate(tx: Transaction, caller: Caller) -> KeyMade:
            person = person_of(caller)
            return KeyMade.with_text(await routes.rotate(tx, caller, key_id, person.id, body, held=caller.rights))

        return await entry.run(rotate)

    @router.delete("/{key_id}", status_code=204, responses=problems())
    async def revoke_key(entry: Writing, key_id: KeyId) -> None:
        """End a key, and every token it was exchanged for, at once."""
        await entry.run(lambda tx, caller: routes.revoke(tx, caller, key_id, person_of(caller).id))

    return router


def _check_hands_on(caller: Caller, scope: Collection[str]) -> None:
    if access.missing(scope, scopes=caller.scopes, rights=caller.rights):
        raise Forbidden("A key cannot be given more than you hold.")


def _place(key: ApiKey) -> list[str]:
    """Return where a key stands in its list, as JSON values that compare as the list is sorted."""
    return [key.created_at.isoformat(timespec="microseconds"), key.id]
