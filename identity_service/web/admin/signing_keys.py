"""The operators' API about signing keys: the same acts as the commands', with the same words."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel

from identity_service.infra.database import Transaction
from identity_service.oauth.signing_keys import Actor, KeyActs, KeyRecord, KeyState, NoUsableKey, SigningKeys
from identity_service.web.callers import Caller, Callers, Entry
from identity_service.web.documented import problems
from identity_service.web.problems import Conflict, NotFound
from identity_service.web.strict import api_routes

Kid = Annotated[str, Path(max_length=64)]


class SigningKeyShown(BaseModel):
    """A signing key's life: what state it is in, and every instant that is settled."""

    kid: str
    state: str
    published_at: datetime
    activates_at: datetime
    retires_at: datetime | None
    removed_at: datetime | None
    compromised_at: datetime | None

    @classmethod
    def of(cls, record: KeyRecord, state: KeyState) -> "SigningKeyShown":
        """Return what is shown of a key."""
        return cls(
            kid=record.kid,
            state=state.value,
            published_at=record.published_at,
            activates_at=record.activates_at,
            retires_at=record.retires_at,
            removed_at=record.removed_at,
            compromised_at=record.compromised_at,
        )


def signing_keys_router(callers: Callers, keys: SigningKeys, acts: KeyActs) -> APIRouter:
    """Return the routes under `/v1/admin/signing-keys`."""
    router = api_routes("/v1/admin/signing-keys", tag="signing keys")
    Reading = Annotated[Entry, Depends(callers.needs("keys:read"))]  # noqa: N806  # a type
    Writing = Annotated[Entry, Depends(callers.needs("keys:write"))]  # noqa: N806  # a type
    Drastic = Annotated[Entry, Depends(callers.needs("keys:write", first_hand=True))]  # noqa: N806  # a type

    async def schedule(tx: Transaction) -> list[SigningKeyShown]:
        return [SigningKeyShown.of(record, state) for record, state in await keys.describe(tx)]

    def actor(caller: Caller) -> Actor:
        return Actor(caller.actor, caller.origin, caller.client_id)

    @router.get("", responses=problems())
    async def list_keys(entry: Reading) -> list[SigningKeyShown]:
        """List the signing keys with their states and instants."""
        return await entry.run(lambda tx, _: schedule(tx))

    @router.post("/rotate", responses=problems(409))
    async def rotate(entry: Writing) -> SigningKeyShown:
        """Let the waiting key sign as early as is safe; `activates_at` says when that is."""

        async def work(tx: Transaction, caller: Caller) -> SigningKeyShown:
            try:
                chosen = await acts.bring_forward(tx, actor(caller))
            except NoUsableKey:
                raise Conflict("No key is waiting; one is made within seconds.") from None
            return SigningKeyShown.of(chosen, KeyState.NEXT)

        return await entry.run(work)

    @router.post("/{kid}/compromise", responses=problems(409))
    async def compromise(entry: Drastic, kid: Kid) -> list[SigningKeyShown]:
        """
        Take a key out of the JWKS of every replica within seconds; the published next key takes over at once.

        To give up every published key at once there is only the command: siblings that cache the JWKS then refuse
        tokens for up to 15 minutes.
        """
        # Made before any lock is taken, and only for who may and has reason to: making a key takes up to a second.
        await entry.run(lambda tx, _: check_in_use(tx, kid))
        spare = await keys.generate(2)

        async def work(tx: Transaction, caller: Caller) -> list[SigningKeyShown]:
            await check_in_use(tx, kid)
            await acts.compromise(tx, [kid], spare, actor(caller))
            return await schedule(tx)

        return await entry.run(work)

    async def check_in_use(tx: Transaction, kid: str) -> None:
        """Raise NotFound for a key that is none, Conflict for one that nobody trusts any more."""
        states = {record.kid: state for record, state in await keys.describe(tx)}
        if kid not in states:
            raise NotFound
        if states[kid] in (KeyState.COMPROMISED, KeyState.RETIRED):
            raise Conflict("The key is out of use already.")

    return router
