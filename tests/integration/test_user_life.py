"""What becomes of people: other names, another address, a forgotten password, leaving and coming back."""

import asyncio
import uuid
from datetime import datetime, timedelta

import pytest
from sqlalchemy import func, select

from identity_service.accounts.access import ADMINISTRATORS_LOCK, SUPER_ADMIN
from identity_service.accounts.users import Found, InvalidUser, NameTaken, State, User, check_email
from identity_service.infra.database import Transaction
from identity_service.infra.tables import api_keys, outbox, refresh_families, users
from tests.support.races import blocked, held
from tests.support.service import PASSWORD, Service


async def stored(service: Service, user: User, *, deleted: bool = False) -> User | None:
    return await service.within(lambda tx: service.services.users.get(tx, user.id, deleted=deleted))


async def delete(service: Service, user: User) -> bool:
    return await service.within(lambda tx: service.services.users.delete(tx, user.id))


async def restore(service: Service, user: User) -> User:
    return await service.within(lambda tx: service.services.users.restore(tx, user.id))


async def purge(service: Service, before: datetime, batch: int = 100) -> list[uuid.UUID]:
    return await service.within(lambda tx: service.services.users.purge(tx, before=before, batch=batch))


# -- names ------------------------------------------------------------------------------------------------------------


async def test_who_finds_a_name_taken_can_go_on_in_the_same_transaction(anywhere: Service) -> None:
    """Private registration has to write a mail instead; a transaction that is broken could not."""
    people = anywhere.services.users
    await anywhere.a_user("marie", email="marie@example.org")

    async def work(tx: Transaction) -> User:
        for username, email in [("marie", "other@example.org"), ("other", "MARIE@example.org")]:
            with pytest.raises(NameTaken):
                await people.create(tx, username=username, email=email, role="user", password_hash=None, verified=True)
        return await people.create(
            tx, username="irene", email="irene@example.org", role="user", password_hash=None, verified=False, name=" I "
        )

    irene = await anywhere.within(work)
    assert await stored(anywhere, irene) == irene
    assert (irene.name, irene.email_verified_at, irene.has_password, irene.epoch) == ("I", None, False, 0)


@pytest.mark.case("ADM-07")
@pytest.mark.case("INP-21")
@pytest.mark.parametrize(
    "name",
    ["", "   ", "a\nb", "a\0b", "x" * 201, "\u202egnp.exe", "a\u200bb", "tab\there"],
    ids=["empty", "blank", "two lines", "nul", "long", "right to left", "no width", "tab"],
)
async def test_what_cannot_be_a_name_is_neither_stored_nor_taken_as_a_change(embedded: Service, name: str) -> None:
    """The rule is the same for a new user and for a later change."""
    user = await embedded.a_user()
    people = embedded.services.users
    with pytest.raises(InvalidUser, match="name: "):
        await embedded.within(lambda tx: people.rename(tx, user.id, name=name))
    with pytest.raises(InvalidUser, match="name: "):
        await embedded.within(
            lambda tx: people.create(
                tx, username="x", email="x@example.org", role="user", password_hash=None, verified=True, name=name
            )
        )


async def test_a_rename_changes_what_is_given_and_nothing_else(anywhere: Service) -> None:
    """An absent name stays, None takes it away; sessions stay."""
    user, people = await anywhere.a_user("marie"), anywhere.services.users
    anywhere.clock.advance(60)  # type: ignore[attr-defined]
    named = await anywhere.within(lambda tx: people.rename(tx, user.id, name="Marie Curie"))
    assert (named.username, named.name, named.epoch) == ("marie", "Marie Curie", 0)
    assert named.updated_at == anywhere.clock.now() > user.updated_at
    renamed = await anywhere.within(lambda tx: people.rename(tx, user.id, username="M.Curie"))
    assert (renamed.username, renamed.name) == ("m.curie", "Marie Curie")
    nameless = await anywhere.within(lambda tx: people.rename(tx, user.id, name=None))
    assert nameless.name is None
    assert await stored(anywhere, user) == nameless


@pytest.mark.case("ADM-07")
async def test_a_change_obeys_the_rules_of_a_new_user(anywhere: Service) -> None:
    """A name or an address that nobody could register, or that somebody has, is not had by a change either."""
    await anywhere.a_user("taken", email="taken@example.org")
    user, people = await anywhere.a_user("marie"), anywhere.services.users
    for username, expected in [("TAKEN", NameTaken), ("~x", InvalidUser), ("a b", InvalidUser), ("", InvalidUser)]:
        with pytest.raises(expected):
            await anywhere.within(lambda tx, username=username: people.rename(tx, user.id, username=username))
    for email, expected in [("Taken@Example.org", NameTaken), ("nobody", InvalidUser), ("a@b\n.org", InvalidUser)]:
        with pytest.raises(expected):
            await anywhere.within(lambda tx, email=email: people.set_email(tx, user.id, email, verified=True))
    with pytest.raises(InvalidUser, match="role: "):
        await anywhere.within(lambda tx: people.set_role(tx, user.id, "emperor"))
    assert await stored(anywhere, user) == user


async def test_a_new_address_is_unproven_until_it_is_proven(anywhere: Service) -> None:
    """Mail goes to it as it was typed; it is found in any case."""
    user, people = await anywhere.a_user("marie"), anywhere.services.users
    changed = await anywhere.within(lambda tx: people.set_email(tx, user.id, "M.Curie@Example.org", verified=False))
    assert (changed.email, changed.email_verified_at) == ("M.Curie@Example.org", None)
    found = await anywhere.within(lambda tx: people.by_name(tx, "m.curie@example.ORG"))
    assert found == changed
    assert await anywhere.within(lambda tx: people.by_name(tx, user.email)) is None


async def test_only_the_very_address_that_is_stored_can_be_proven(anywhere: Service) -> None:
    """Who proved an address and changed it meanwhile has proven nothing; proving it twice keeps the first instant."""
    user, people = await anywhere.a_user(email="one@example.org", verified=False), anywhere.services.users

    async def verify(email: str) -> bool:
        return await anywhere.within(lambda tx: people.verify_email(tx, user.id, email))

    for other in ("two@example.org", "ONE@example.org", ""):
        assert not await verify(other)
        current = await stored(anywhere, user)
        assert current is not None
        assert current.email_verified_at is None
    assert await verify("one@example.org")
    first = anywhere.clock.now()
    anywhere.clock.advance(60)  # type: ignore[attr-defined]
    assert await verify("one@example.org")
    current = await stored(anywhere, user)
    assert current is not None
    assert current.email_verified_at == first


async def test_a_proof_that_waits_for_a_change_of_the_address_proves_nothing(service: Service) -> None:
    """The condition is part of the statement, so it is asked of the row as it is when its turn comes."""
    user, people = await service.a_user(email="one@example.org", verified=False), service.services.users
    async with held(service) as change:
        await people.set_email(change.tx, user.id, "two@example.org", verified=False)
        late = await blocked(service, service.within(lambda tx: people.verify_email(tx, user.id, "one@example.org")))
        await change.commit()
        assert not await late
    current = await stored(service, user)
    assert current is not None
    assert current.email_verified_at is None


# -- passwords and sessions -------------------------------------------------------------------------------------------


async def test_each_end_of_all_sessions_is_a_new_epoch(anywhere: Service) -> None:
    """A new password, a forgotten one, signing out everywhere, disabling; enabling, a role and names are none."""
    user, people = await anywhere.a_user(), anywhere.services.users

    async def epoch() -> int:
        current = await stored(anywhere, user)
        assert current is not None
        return current.epoch

    assert await anywhere.within(lambda tx: people.set_password(tx, user.id, "$argon2id$x")) == 1 == await epoch()
    assert await anywhere.within(lambda tx: people.clear_password(tx, user.id)) == 2 == await epoch()
    assert await anywhere.within(lambda tx: people.end_sessions(tx, user.id)) == 3 == await epoch()
    assert await anywhere.within(lambda tx: people.set_enabled(tx, user.id, False))
    assert await epoch() == 4
    assert await anywhere.within(lambda tx: people.set_enabled(tx, user.id, True))
    assert await anywhere.within(lambda tx: people.set_role(tx, user.id, "moderator"))
    await anywhere.within(lambda tx: people.rename(tx, user.id, name="M"))
    assert await epoch() == 4


async def test_a_forgotten_password_opens_nothing_until_a_new_one_is_set(service: Service) -> None:
    """Not the old one, and not an empty one; the sessions are gone, too."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    await service.within(lambda tx: service.services.users.clear_password(tx, user.id))
    for password in (PASSWORD, "None", "x"):
        answer = await service.token(client, grant_type="password", username=user.username, password=password)
        assert answer.status_code == 400
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 400
    assert (await service.me(tokens["access_token"])).status_code == 401
    await service.change_password(user, "a different battery")
    await service.sign_in(client, user, "a different battery")


async def test_nobody_is_changed_who_is_not_there(anywhere: Service) -> None:
    """Each step says so, for an unknown id as for somebody who was deleted; nothing of theirs moves."""
    gone, people = await anywhere.a_user(), anywhere.services.users
    assert await delete(anywhere, gone)
    before = await anywhere.execute(select(users))
    for user_id in (gone.id, uuid.uuid4()):

        async def each(tx: Transaction, user_id: uuid.UUID = user_id) -> list[object]:
            return [
                await people.set_password(tx, user_id, "$argon2id$x"),
                await people.clear_password(tx, user_id),
                await people.set_enabled(tx, user_id, True),
                await people.set_role(tx, user_id, "admin"),
                await people.verify_email(tx, user_id, gone.email),
                await people.delete(tx, user_id),
                await people.get(tx, user_id),
                await people.locked(tx, user_id),
            ]

        assert await anywhere.within(each) == [None, None, False, False, False, False, None, None]
        for lost in (
            lambda tx, user_id=user_id: people.end_sessions(tx, user_id),
            lambda tx, user_id=user_id: people.rename(tx, user_id, name="x"),
            lambda tx, user_id=user_id: people.set_email(tx, user_id, "x@example.org", verified=True),
        ):
            with pytest.raises(LookupError):
                await anywhere.within(lost)
    assert await anywhere.execute(select(users)) == before


async def test_two_who_change_one_user_take_turns(service: Service) -> None:
    """`locked` holds the row, so that what was read is still so when it is written."""
    user, people = await service.a_user(), service.services.users
    async with held(service) as first:
        assert await people.locked(first.tx, user.id) == user
        await people.rename(first.tx, user.id, name="First")
        second = await blocked(service, service.within(lambda tx: people.locked(tx, user.id)))
        await first.commit()
        seen = await second
        assert seen is not None
        assert seen.name == "First"


# -- the last who can do everything -----------------------------------------------------------------------------------


async def test_only_enabled_super_admins_who_are_there_count(anywhere: Service) -> None:
    """A disabled or deleted one could not help."""
    people = anywhere.services.users
    bosses = [await anywhere.a_user(role=SUPER_ADMIN) for _ in range(4)]
    await anywhere.a_user(role="admin")

    async def left() -> int:
        return await anywhere.within(people.enabled_super_admins)

    async def last(user: User) -> bool:
        current = await stored(anywhere, user, deleted=True)
        assert current is not None

        async def look(tx: Transaction) -> bool:
            await tx.lock(ADMINISTRATORS_LOCK)
            return await people.is_last_super_admin(tx, current)

        return await anywhere.within(look)

    assert await left() == 4
    await anywhere.disable(bosses[0])
    await delete(anywhere, bosses[1])
    assert await left() == 2
    assert not await last(bosses[3])
    await anywhere.within(lambda tx: people.set_role(tx, bosses[2].id, "admin"))
    assert await left() == 1
    assert [await last(boss) for boss in bosses] == [False, False, False, True]


async def test_nobody_asks_who_is_the_last_without_the_lock(anywhere: Service) -> None:
    """Two who ask at once would each hear that there is another."""
    boss = await anywhere.a_user(role=SUPER_ADMIN)
    with pytest.raises(RuntimeError, match="administrators"):
        await anywhere.within(lambda tx: anywhere.services.users.is_last_super_admin(tx, boss))


# -- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.case("REF-25")
async def test_a_deleted_user_is_found_by_nothing_but_their_id(anywhere: Service) -> None:
    """Neither under the old names nor under those the row has now; who asks for deleted ones sees the old names."""
    user, people = await anywhere.a_user("marie", email="Marie@example.org"), anywhere.services.users
    assert await delete(anywhere, user)
    [row] = await anywhere.execute(select(users))
    assert row.username == f"~{user.id.hex}"
    assert row.email == row.email_canonical == f"~{user.id.hex}@deleted.invalid"
    assert (row.enabled, row.password_hash, row.epoch, row.deleted_at) == (False, None, 1, anywhere.clock.now())
    for name in ("marie", "marie@example.org", row.username, row.email):
        assert await anywhere.within(lambda tx, name=name: people.facts(tx, name)) is None
        assert await anywhere.within(lambda tx, name=name: people.by_name(tx, name)) is None
    assert await stored(anywhere, user) is None
    shown = await stored(anywhere, user, deleted=True)
    assert shown is not None
    assert (shown.username, shown.email, shown.enabled) == ("marie", "Marie@example.org", False)
    assert await anywhere.within(lambda tx: people.locked(tx, user.id, deleted=True)) == shown
    assert await anywhere.within(lambda tx: people.search(tx, limit=9)) == Found([], None)


def test_nobody_can_take_the_names_that_a_deletion_needs() -> None:
    """Or whoever knows somebody's id could make them undeletable."""
    for email in (f"~{uuid.uuid4().hex}@deleted.invalid", "me@DELETED.invalid"):
        with pytest.raises(InvalidUser):
            check_email(email)
    assert check_email("me@undeleted.invalid") == "me@undeleted.invalid"


@pytest.mark.case("REF-25")
async def test_who_comes_back_under_the_same_names_is_somebody_else(service: Service) -> None:
    """Another `sub`, and nothing of the old one's works: refresh token, access token, API key, password."""
    client = await service.a_client()
    old = await service.a_user("marie", email="marie@example.org")
    tokens = await service.sign_in(client, old)
    key = await service.within(
        lambda tx: service.services.api_keys.create(
            tx, owner=old.id, name="k", scope=("account:read",), expires_at=None, networks=()
        )
    )
    assert await delete(service, old)
    new = await service.a_user("marie", email="marie@example.org", password="another horse battery")
    assert new.id != old.id
    assert (await service.refresh(client, tokens["refresh_token"])).status_code == 400
    assert (await service.me(tokens["access_token"])).status_code == 401
    presented = service.services.api_keys.read(key.text)
    assert presented is not None
    held_key = await service.within(lambda tx: service.services.api_keys.check(tx, presented, network="127.0.0.1"))
    assert getattr(held_key, "reason", None) == "owner_disabled"
    answer = await service.token(client, grant_type="password", username="marie", password=PASSWORD)
    assert answer.status_code == 400
    fresh = await service.sign_in(client, new, "another horse battery")
    assert (await service.me(fresh["access_token"])).json()["id"] == str(new.id)


async def test_a_deletion_can_be_undone_while_the_names_are_free(anywhere: Service) -> None:
    """Names, role and the proof of the address come back; the password and the sessions do not."""
    user = await anywhere.a_user("marie", email="Marie@example.org", role="moderator")
    assert await delete(anywhere, user)
    restored = await restore(anywhere, user)
    assert restored == await stored(anywhere, user)
    assert (restored.username, restored.email, restored.role) == (user.username, user.email, user.role)
    assert (restored.enabled, restored.has_password, restored.epoch) == (True, False, 1)
    assert restored.email_verified_at == user.email_verified_at
    assert await anywhere.within(lambda tx: anywhere.services.users.by_name(tx, "marie@example.org")) == restored
    with pytest.raises(LookupError):
        await restore(anywhere, user)
    renamed = await anywhere.within(lambda tx: anywhere.services.users.rename(tx, user.id, username="m.curie"))
    assert renamed.username == "m.curie"
    assert await delete(anywhere, restored)  # and again
    again = await restore(anywhere, user)
    assert (again.username, again.epoch) == ("m.curie", 2)


@pytest.mark.parametrize("taken", ["username", "email"])
async def test_nobody_loses_a_name_to_somebody_who_comes_back(anywhere: Service, taken: str) -> None:
    """The new owner keeps it, and the deleted one stays as they are."""
    user = await anywhere.a_user("marie", email="marie@example.org")
    assert await delete(anywhere, user)
    name, email = ("marie", "other@example.org") if taken == "username" else ("other", "MARIE@example.org")
    new = await anywhere.a_user(name, email=email)
    with pytest.raises(NameTaken):
        await restore(anywhere, user)
    assert await stored(anywhere, user) is None
    assert await stored(anywhere, new) == new


async def test_of_two_who_delete_one_user_at_once_one_does(service: Service) -> None:
    """The second finds them deleted, and does not keep the placeholder as the name they had."""
    user = await service.a_user("marie")
    async with held(service) as first:
        assert await service.services.users.delete(first.tx, user.id)
        second = await blocked(service, delete(service, user))
        await first.commit()
        assert not await second
    assert (await restore(service, user)).username == "marie"


async def test_a_name_that_is_held_by_nobody_is_taken_and_nobodys(anywhere: Service) -> None:
    """It is found by no name and no id, counted and listed nowhere, and cannot be restored."""
    people = anywhere.services.users
    await anywhere.within(lambda tx: people.hold_name(tx, "ghost"))
    [row] = await anywhere.execute(select(users))
    with pytest.raises(NameTaken):
        await anywhere.a_user("ghost")
    for name in ("ghost", row.email):
        assert await anywhere.within(lambda tx, name=name: people.facts(tx, name)) is None
    for find in (people.get, people.locked):
        for deleted in (True, False):
            assert (
                await anywhere.within(lambda tx, find=find, deleted=deleted: find(tx, row.id, deleted=deleted)) is None
            )
    with pytest.raises(LookupError):
        await anywhere.within(lambda tx: people.restore(tx, row.id))
    for state in (None, *State):
        for q in (None, "ghost", str(row.id), row.email):
            found = await anywhere.within(lambda tx, q=q, state=state: people.search(tx, q=q, state=state, limit=9))
            assert found.users == []
    counted = await anywhere.within(people.counts)
    assert set(counted.by_state.values()) == {0}
    assert set(counted.by_role.values()) == {0}
    assert await purge(anywhere, anywhere.clock.now() + timedelta(seconds=1)) == [row.id]
    assert (await anywhere.a_user("ghost")).username == "ghost"


# -- for good ---------------------------------------------------------------------------------------------------------


async def test_the_purge_takes_the_longest_deleted_first_and_all_that_was_theirs(anywhere: Service) -> None:
    """A batch at a time, and nobody who was deleted at the instant or after it, or never."""
    client = await anywhere.a_client()
    people = [await anywhere.a_user() for _ in range(5)]
    for user in people[:4]:
        await anywhere.sign_in(client, user)
        await anywhere.within(
            lambda tx, user=user: anywhere.services.api_keys.create(
                tx, owner=user.id, name="k", scope=("account:read",), expires_at=None, networks=()
            )
        )
    for user in people[:4]:
        await delete(anywhere, user)
        anywhere.clock.advance(60)  # type: ignore[attr-defined]
    before = anywhere.clock.now() - timedelta(seconds=60)  # the very instant at which the fourth left
    assert await purge(anywhere, before, batch=2) == [people[0].id, people[1].id]
    assert await purge(anywhere, before, batch=2) == [people[2].id]
    assert await purge(anywhere, before, batch=2) == []
    for table in (refresh_families, api_keys):
        assert (await anywhere.execute(select(func.count()).select_from(table)))[0][0] == 1
    assert {row.id for row in await anywhere.execute(select(users.c.id))} == {people[3].id, people[4].id}


async def test_who_is_restored_while_the_purge_waits_stays(service: Service) -> None:
    """The purge chose them while they were deleted; when it gets to the row they are not."""
    user = await service.a_user()
    await delete(service, user)
    before = service.clock.now() + timedelta(days=1)
    async with held(service) as rescue:
        await service.services.users.restore(rescue.tx, user.id)
        late = await blocked(service, purge(service, before))
        await rescue.commit()
        assert await late == []
    assert await stored(service, user) is not None


async def test_what_is_erased_is_gone_at_once(anywhere: Service) -> None:
    """Deleted before or not."""
    client, people = await anywhere.a_client(), anywhere.services.users
    one, other = await anywhere.a_user(), await anywhere.a_user()
    await anywhere.sign_in(client, one)
    await delete(anywhere, other)
    for user in (one, other):
        assert await anywhere.within(lambda tx, user=user: people.erase(tx, user.id))
        assert not await anywhere.within(lambda tx, user=user: people.erase(tx, user.id))
    assert await anywhere.execute(select(users)) == []
    assert await anywhere.family_rows() == []


async def test_an_erasure_takes_the_mails_that_wait(anywhere: Service) -> None:
    """Deleted before or not; not the notice of it, and not those to who has the address now."""
    people, mail = anywhere.services.users, anywhere.services.outbox

    async def order(template: str, user: User) -> None:
        await anywhere.within(lambda tx: mail.enqueue(tx, template=template, recipient=user.email, context={}))

    async def waiting() -> list[tuple[str, str]]:
        return sorted((row.recipient, row.template) for row in await anywhere.execute(select(outbox)))

    one, other, stays = [await anywhere.a_user(name) for name in ("one", "other", "stays")]
    for user in (one, other, stays):
        await order("password_changed", user)
        await order("account_deleted", user)
    await delete(anywhere, other)
    anywhere.clock.advance(60)  # type: ignore[attr-defined]
    await order("email_changed", await anywhere.a_user("next", email=other.email))
    for user in (one, other):
        assert await anywhere.within(lambda tx, user=user: people.erase(tx, user.id))
    assert await waiting() == [
        (one.email, "account_deleted"),
        (other.email, "account_deleted"),
        (other.email, "email_changed"),
        (stays.email, "account_deleted"),
        (stays.email, "password_changed"),
    ]


async def test_a_sign_in_under_way_does_not_survive_a_deletion(service: Service) -> None:
    """The password was right when it was looked at; the family is not started."""
    client, user = await service.a_client(), await service.a_user()
    async with held(service) as leaving:
        await service.services.users.delete(leaving.tx, user.id)
        signing_in = await blocked(
            service, service.token(client, grant_type="password", username=user.username, password=PASSWORD)
        )
        await leaving.commit()
        assert (await signing_in).status_code == 400
    assert await service.live_families(user) == 0


async def test_twenty_deletions_at_once_free_twenty_names(anywhere: Service) -> None:
    """The placeholders do not collide, and each user keeps the names they had."""
    people = [await anywhere.a_user(password_hash="!") for _ in range(20)]
    assert all(await asyncio.gather(*(delete(anywhere, user) for user in people)))
    again = [await anywhere.a_user(user.username, email=user.email, password_hash="!") for user in people]
    assert len({user.id for user in again} | {user.id for user in people}) == 40
    for user in people:
        shown = await stored(anywhere, user, deleted=True)
        assert shown is not None
        assert (shown.username, shown.email) == (user.username, user.email)
