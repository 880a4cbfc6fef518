"""Sessions as their owner and an operator see them: which there are, ending one, and keeping one."""

import uuid
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from identity_service.accounts.refresh_families import Audiences, Session
from identity_service.accounts.users import User
from identity_service.infra.audit import Origin
from identity_service.infra.tables import clients, refresh_families
from tests.support.races import blocked, held, loaded
from tests.support.service import ISSUER, Registered, Service

MINUTE = timedelta(minutes=1)


async def sessions(service: Service, user: User, current: uuid.UUID | None = None) -> list[Session]:
    return await service.within(lambda tx: service.services.families.sessions(tx, user.id, current))


async def end(service: Service, user: User, session_id: uuid.UUID) -> bool:
    return await service.within(lambda tx: service.services.families.end(tx, user.id, session_id))


async def sign_in(service: Service, client: Registered, user: User) -> tuple[uuid.UUID, str]:
    """Sign a user in a minute later than whatever was before; return the session's id and its refresh token."""
    service.clock.advance(MINUTE)  # type: ignore[attr-defined]
    before = {session.id for session in await sessions(service, user)}
    tokens = await service.sign_in(client, user)
    [new] = {session.id for session in await sessions(service, user)} - before
    return new, tokens["refresh_token"]


async def alive(service: Service, client: Registered, token: str) -> bool:
    return (await service.refresh(client, token)).status_code == 200


async def test_a_session_says_where_and_when_it_began_and_was_used(anywhere: Service) -> None:
    """With the client's name; the most recently used comes first, and the one that asks is marked."""
    apps = [await anywhere.a_client(name=name) for name in ("Web", "Mobile")]
    user, other = await anywhere.a_user(), await anywhere.a_user()
    (web, web_token), (mobile, _) = [await sign_in(anywhere, app, user) for app in apps]
    await sign_in(anywhere, apps[0], other)
    began = anywhere.clock.now() - 2 * MINUTE
    assert [session.id for session in await sessions(anywhere, user)] == [mobile, web]
    anywhere.clock.advance(MINUTE)  # type: ignore[attr-defined]
    assert await alive(anywhere, apps[0], web_token)
    first, second = await sessions(anywhere, user, web)
    assert first == Session(
        id=web,
        client_id=apps[0].id,
        client_name="Web",
        user_agent=first.user_agent,
        network="127.0.0.1",
        created_at=began,
        last_used_at=began + 3 * MINUTE,
        expires_at=began + 3 * MINUTE + timedelta(days=14),
        current=True,
    )
    assert (second.id, second.client_name, second.current) == (mobile, "Mobile", False)
    assert first.place > second.place


@pytest.mark.parametrize(
    ("agent", "kept"),
    [("Firefox on Linux", "Firefox on Linux"), ("", None), ("x" * 300, "x" * 256), ("a\0b", "ab"), ("é", "é")],
    ids=["plain", "none", "long", "nul", "latin"],
)
async def test_the_program_of_the_sign_in_is_kept_as_far_as_it_can_be(
    anywhere: Service, agent: str, kept: str | None
) -> None:
    """It is a header, so it can be anything; nothing of it stops a sign-in."""
    client, user = await anywhere.a_client(), await anywhere.a_user()
    known = await loaded(anywhere, client)
    facts = await anywhere.within(lambda tx: anywhere.services.users.facts(tx, user.username))
    assert facts is not None
    family = await anywhere.within(
        lambda tx: anywhere.services.families.start(
            tx,
            facts,
            known,
            scope=("account:read",),
            audiences=Audiences((ISSUER,), (ISSUER,)),
            amr=("pwd",),
            origin=Origin("2001:db8::/64", "r", agent),
        )
    )
    assert family is not None
    [session] = await sessions(anywhere, user)
    assert (session.id, session.user_agent, session.network) == (family.id, kept, "2001:db8::/64")


DEATHS = ["revoked", "idle", "absolute", "user epoch", "user disabled", "client epoch", "client disabled"]


@pytest.mark.parametrize("how", DEATHS)
async def test_what_is_dead_is_no_session(anywhere: Service, how: str) -> None:
    """Neither listed nor counted, and it cannot be ended once more."""
    client, user = await anywhere.a_client(), await anywhere.a_user()
    family, _ = await sign_in(anywhere, client, user)
    services = anywhere.services
    row = update(refresh_families).where(refresh_families.c.id == family)
    assert await anywhere.within(services.families.count) == 1
    match how:
        case "revoked":
            await anywhere.execute(row.values(revoked_at=anywhere.clock.now()))
        case "idle":
            await anywhere.execute(row.values(idle_expires_at=anywhere.clock.now()))
        case "absolute":
            await anywhere.execute(row.values(absolute_expires_at=anywhere.clock.now()))
        case "user epoch":
            await anywhere.within(lambda tx: services.users.end_sessions(tx, user.id))
        case "user disabled":
            await anywhere.patch_user(user, enabled=False)  # the epoch stays
        case "client epoch":
            await anywhere.bump_client_epoch(client)
        case "client disabled":
            await anywhere.execute(update(clients).values(enabled=False))  # the epoch stays
    assert await sessions(anywhere, user) == []
    assert await anywhere.within(services.families.count) == 0
    assert not await end(anywhere, user, family)


async def test_ending_one_session_ends_that_one(anywhere: Service) -> None:
    """Its tokens are dead at once; the others of the user, and everybody else's, go on."""
    client = await anywhere.a_client()
    user, other = await anywhere.a_user(), await anywhere.a_user()
    doomed, doomed_token = await sign_in(anywhere, client, user)
    kept, kept_token = await sign_in(anywhere, client, user)
    _, foreign_token = await sign_in(anywhere, client, other)
    assert await end(anywhere, user, doomed)
    assert not await end(anywhere, user, doomed)
    assert [session.id for session in await sessions(anywhere, user)] == [kept]
    assert not await alive(anywhere, client, doomed_token)
    assert await alive(anywhere, client, kept_token)
    assert await alive(anywhere, client, foreign_token)
    [row] = await anywhere.execute(select(refresh_families).where(refresh_families.c.id == doomed))
    assert (row.revoked_at, row.revoked_reason) == (anywhere.clock.now(), "ended")


@pytest.mark.case("ADM-08")
async def test_nobody_ends_a_session_through_somebody_else(anywhere: Service) -> None:
    """The owner is part of the condition."""
    client = await anywhere.a_client()
    user, other = await anywhere.a_user(), await anywhere.a_user()
    foreign, token = await sign_in(anywhere, client, other)
    assert not await end(anywhere, user, foreign)
    assert not await end(anywhere, user, uuid.uuid4())
    assert await alive(anywhere, client, token)


# -- keeping one ------------------------------------------------------------------------------------------------------


async def change_password(service: Service, user: User, keep: uuid.UUID) -> bool:
    """Change a password as its owner does, and keep one session; return whether there was one to keep."""

    async def work(tx: Any) -> bool:
        epoch = await service.services.users.set_password(tx, user.id, "$argon2id$x")
        assert epoch is not None
        return await service.services.families.keep(tx, keep, user.id, epoch=epoch)

    return await service.within(work)


async def test_the_session_in_which_a_password_is_changed_can_go_on(anywhere: Service) -> None:
    """All the others end."""
    client, user = await anywhere.a_client(), await anywhere.a_user()
    mine, my_token = await sign_in(anywhere, client, user)
    _, other_token = await sign_in(anywhere, client, user)
    assert await change_password(anywhere, user, mine)
    assert [session.id for session in await sessions(anywhere, user)] == [mine]
    assert await alive(anywhere, client, my_token)
    assert not await alive(anywhere, client, other_token)


@pytest.mark.parametrize("which", ["somebody else's", "ended", "outdated", "unknown"])
async def test_only_a_live_session_of_that_user_is_kept(anywhere: Service, which: str) -> None:
    """Not one that was ended before, by itself or with all the others: it must not come back to life."""
    client = await anywhere.a_client()
    user, other = await anywhere.a_user(), await anywhere.a_user()
    foreign, foreign_token = await sign_in(anywhere, client, other)
    mine, my_token = await sign_in(anywhere, client, user)
    if which == "ended":
        assert await end(anywhere, user, mine)
    if which == "outdated":
        await anywhere.within(lambda tx: anywhere.services.users.end_sessions(tx, user.id))
    wanted = {"somebody else's": foreign, "unknown": uuid.uuid4()}.get(which, mine)
    assert not await change_password(anywhere, user, wanted)
    assert await sessions(anywhere, user) == []
    assert not await alive(anywhere, client, my_token)
    assert await alive(anywhere, client, foreign_token)


@pytest.mark.parametrize("column", ["idle_expires_at", "absolute_expires_at"])
async def test_an_expired_session_is_not_kept(anywhere: Service, column: str) -> None:
    """Neither by its idle nor by its absolute end."""
    client, user = await anywhere.a_client(), await anywhere.a_user()
    family, _ = await sign_in(anywhere, client, user)
    row = update(refresh_families).where(refresh_families.c.id == family)
    await anywhere.execute(row.values(**{column: anywhere.clock.now()}))
    assert not await change_password(anywhere, user, family)


@pytest.mark.case("REF-11")
async def test_a_refresh_of_the_kept_session_waits_and_goes_through(service: Service) -> None:
    """It meets the row while the password is being changed, and is not taken for a stranger's afterwards."""
    client, user = await service.a_client(), await service.a_user()
    mine, token = await sign_in(service, client, user)
    async with held(service) as change:
        epoch = await service.services.users.set_password(change.tx, user.id, "$argon2id$x")
        assert epoch is not None
        assert await service.services.families.keep(change.tx, mine, user.id, epoch=epoch)
        refreshing = await blocked(service, service.refresh(client, token))
        await change.commit()
        assert (await refreshing).status_code == 200
    assert [session.id for session in await sessions(service, user)] == [mine]
