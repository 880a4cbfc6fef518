"""Finding people: by the beginning of a name, by role and state, in pages, and by an index on PostgreSQL."""

import re
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import event, insert, text

from identity_service.accounts.users import Counts, State, User
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import new_id
from identity_service.infra.tables import roles, users
from tests.support.service import Service


async def people(service: Service, *rows: dict[str, Any]) -> list[uuid.UUID]:
    """Store users as they are described, the oldest first; return their ids."""
    now = service.clock.now()
    ids = sorted(new_id() for _ in rows)
    filled = []
    for user_id, row in zip(ids, rows, strict=True):
        username = row.get("username", f"u{user_id.hex}")
        email = row.get("email", f"{username}@example.org")
        common = {"email_verified_at": now, "password_form": 1, "role": "user", "enabled": True, "epoch": 0}
        stored = {**common, "created_at": now, "updated_at": now, "email_canonical": email.lower()}
        filled.append({"id": user_id, "username": username, "email": email, **stored, **row})
    await service.execute(insert(users).values(filled))
    return ids


async def search(service: Service, *, limit: int = 100, **wanted: Any) -> list[User]:
    """Return everybody who is found, collected from pages of `limit`; each page but the last is full."""
    found: list[User] = []
    after = None
    while True:
        page = await service.within(
            lambda tx, after=after: service.services.users.search(tx, **wanted, after=after, limit=limit)
        )
        found += page.users
        if page.place is None:
            return found
        assert len(page.users) == limit
        assert len(found) < 100, "it never ends"
        after = page.place


def names(found: Sequence[User]) -> list[str]:
    return [user.username for user in found]


# -- whom it finds ----------------------------------------------------------------------------------------------------

ROLES = ("user", "moderator", "admin")
STATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "disabled": {"enabled": False},
    "unverified": {"email_verified_at": None},
    "both": {"enabled": False, "email_verified_at": None},
}


def expected_of(state: State | None) -> set[str]:
    match state:
        case None:
            return set(STATES)
        case State.ENABLED:
            return {"plain", "unverified"}
        case State.DISABLED:
            return {"disabled", "both"}
        case State.UNVERIFIED:
            return {"unverified", "both"}
    return set()


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_filters_combine_and_the_newest_come_first(anywhere: Service, limit: int) -> None:
    """Each role with each state and without, in pages of any size; nobody twice, nobody left out."""
    made = [(role, state) for role in ROLES for state in STATES for _ in range(2)]
    ids = await people(anywhere, *({"role": role, **STATES[state]} for role, state in made))
    for role in (None, *ROLES, "emperor"):
        for state in (None, State.ENABLED, State.DISABLED, State.UNVERIFIED, State.DELETED):
            wanted = [
                user_id
                for user_id, (has, is_) in zip(ids, made, strict=True)
                if role in (None, has) and is_ in expected_of(state)
            ]
            found = await search(anywhere, role=role, state=state, limit=limit)
            assert [user.id for user in found] == wanted[::-1], (role, state)


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_usernames_come_before_addresses_and_nobody_comes_twice(anywhere: Service, limit: int) -> None:
    """Usernames in their order, then those whose address alone begins so, in the order of addresses."""
    await people(
        anywhere,
        {"username": "anna", "email": "anna@example.org"},
        {"username": "anna.b", "email": "zoe@example.org"},
        {"username": "ann", "email": "ann@example.org"},
        {"username": "an", "email": "anna2@example.org"},
        {"username": "bob", "email": "ANNA1@example.org"},
        {"username": "anna-z", "email": "anna-z@example.org"},
        {"username": "anna_z", "email": "x1@example.org"},
        {"username": "annab", "email": "x2@example.org"},
        {"username": "anna0", "email": "anna@example.com"},
        {"username": "joanna", "email": "joanna@example.org"},
    )
    # In the order of the bytes: hyphen, dot, digits, underscore, letters.
    by_name = ["anna", "anna-z", "anna.b", "anna0", "anna_z", "annab"]
    assert names(await search(anywhere, q="anna", limit=limit)) == [*by_name, "bob", "an"]
    assert names(await search(anywhere, q="anna@", limit=limit)) == ["anna0", "anna"]
    assert names(await search(anywhere, q="ANNA.", limit=limit)) == ["anna.b"]
    assert names(await search(anywhere, q="anna1@EXAMPLE.org", limit=limit)) == ["bob"]
    assert await search(anywhere, q="annaa", limit=limit) == []


async def test_a_search_keeps_to_its_filters(anywhere: Service) -> None:
    """In either of its lists."""
    await people(
        anywhere,
        {"username": "anna1", "role": "admin"},
        {"username": "anna2", "enabled": False},
        {"username": "bob1", "email": "anna3@example.org", "role": "admin"},
        {"username": "bob2", "email": "anna4@example.org", "enabled": False},
        {"username": "bob3", "email": "anna5@example.org", "email_verified_at": None},
    )
    assert names(await search(anywhere, q="anna", role="admin")) == ["anna1", "bob1"]
    assert names(await search(anywhere, q="anna", state=State.DISABLED)) == ["anna2", "bob2"]
    assert names(await search(anywhere, q="anna", state=State.UNVERIFIED)) == ["bob3"]
    assert names(await search(anywhere, q="anna", state=State.ENABLED, role="user")) == ["bob3"]


@pytest.mark.case("ADM-15")
@pytest.mark.case("ADM-17")
@pytest.mark.parametrize(
    "q",
    ["%", "_", "a%", "a_na", "\\", "*", "a?", "' OR 1=1 --", '"', "a\0", "\0", "é", "\u212aelvin", "a\u0301", "\ud800"],
    ids=ascii,
)
async def test_nothing_in_a_prefix_has_a_meaning(anywhere: Service, q: str) -> None:
    """No wildcard, no quote, no letter that folds into another: it is a beginning, or nobody's."""
    await people(anywhere, {"username": "anna"}, {"username": "kelvin"}, {"username": "a.na"})
    assert await search(anywhere, q=q) == []


async def test_what_may_stand_in_a_name_is_found_as_it_stands(anywhere: Service) -> None:
    """An underscore is an underscore."""
    await people(anywhere, {"username": "a_na"}, {"username": "abna", "email": "100%_x@example.org"})
    assert names(await search(anywhere, q="a_")) == ["a_na"]
    assert names(await search(anywhere, q="100%_")) == ["abna"]
    assert await search(anywhere, q="100%x") == []


async def test_the_last_characters_of_the_alphabet_end_no_range_too_early(anywhere: Service) -> None:
    """A tilde is the greatest character that an address can hold."""
    await people(anywhere, {"username": "a", "email": "a~~~@example.org"}, {"username": "b", "email": "b@example.org"})
    assert names(await search(anywhere, q="a~")) == ["a"]
    assert names(await search(anywhere, q="a~~~")) == ["a"]


@pytest.mark.parametrize("limit", [1, 100])
async def test_a_whole_id_finds_its_user_first(anywhere: Service, limit: int) -> None:
    """And whoever is called so, for it is a username that somebody can choose; each once, and by the filters."""
    [user_id] = await people(anywhere, {"username": "marie"})
    others = [(str(user_id), "y@example.org"), ("x", f"{user_id}@example.org")]
    await people(anywhere, *({"username": username, "email": email} for username, email in others))
    [own] = await people(anywhere, {"username": "self"})
    await anywhere.execute(users.update().where(users.c.id == own).values(username=str(own)))
    for typed in (str(user_id), str(user_id).upper()):
        assert names(await search(anywhere, q=typed, limit=limit)) == ["marie", str(user_id), "x"]
    assert [user.id for user in await search(anywhere, q=str(own), limit=limit)] == [own]
    assert names(await search(anywhere, q=str(user_id), role="admin", limit=limit)) == []
    assert names(await search(anywhere, q=user_id.hex, limit=limit)) == []
    assert names(await search(anywhere, q=str(user_id)[:-1], limit=limit)) == [str(user_id), "x"]


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_deleted_users_are_found_by_the_names_they_had(anywhere: Service, limit: int) -> None:
    """Only by who asks for deleted ones; several may have had one name."""
    ids = []
    for number in range(3):
        user = await anywhere.a_user("anna", email=f"Anna{number}@example.org", password_hash="!")
        ids.append(user.id)
        await anywhere.within(lambda tx, user=user: anywhere.services.users.delete(tx, user.id))
    other = await anywhere.a_user("bob", email="anna.b@example.org", password_hash="!")
    await anywhere.within(lambda tx: anywhere.services.users.delete(tx, other.id))
    await anywhere.a_user("anna", email="anna@example.org", password_hash="!")
    deleted = await search(anywhere, q="anna", state=State.DELETED, limit=limit)
    assert [user.id for user in deleted] == [*ids, other.id]
    assert names(await search(anywhere, q="ANNA1", state=State.DELETED, limit=limit)) == ["anna"]
    assert names(await search(anywhere, q=str(other.id), state=State.DELETED, limit=limit)) == ["bob"]
    assert [user.id for user in await search(anywhere, state=State.DELETED, limit=limit)] == [other.id, *ids[::-1]]
    for q in (None, "anna", "~", str(other.id)):
        assert other.id not in [user.id for user in await search(anywhere, q=q, limit=limit)]
    assert names(await search(anywhere, q="anna", limit=limit)) == ["anna"]


async def test_who_is_made_while_somebody_pages_shifts_nobody(anywhere: Service) -> None:
    """A page goes on behind the last one that was shown, whatever was added or deleted before it."""
    await people(anywhere, *({"username": f"anna{number}"} for number in (2, 4, 6)))
    finding = anywhere.services.users
    for q, seen, rest in [("anna", ["anna2"], ["anna4", "anna6"]), (None, ["anna6"], ["anna4", "anna2"])]:
        first = await anywhere.within(lambda tx, q=q: finding.search(tx, q=q, limit=1))
        assert names(first.users) == seen
        new = await people(anywhere, {"username": "anna1"})
        second = await anywhere.within(lambda tx, q=q, first=first: finding.search(tx, q=q, after=first.place, limit=5))
        assert names(second.users) == rest
        await anywhere.execute(users.delete().where(users.c.id == new[0]))


# -- how it finds them ------------------------------------------------------------------------------------------------


async def plans(service: Service, **wanted: Any) -> list[str]:
    """Return PostgreSQL's plan of every statement that a search runs."""
    engine = service.services.db.engine.sync_engine
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        if statement.startswith("SELECT"):
            seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        await service.within(lambda tx: service.services.users.search(tx, **wanted))
    finally:
        event.remove(engine, "before_cursor_execute", note)
    found = []

    async def explain(tx: Transaction) -> None:
        for statement, parameters in seen:
            assert tx._connection is not None or await tx.execute(text("SELECT 1"))
            assert tx._connection is not None
            rows = await tx._connection.exec_driver_sql("EXPLAIN " + statement, parameters)
            found.append("\n".join(row[0] for row in rows))

    await service.within(explain)
    return found


@pytest.fixture
async def crowded(service: Service) -> Service:
    """The service with ten thousand users, and statistics about them."""
    await service.execute(insert(roles).values(name="auditor", rank=50))
    await service.execute(
        text(
            """
            INSERT INTO users (id, username, email, email_canonical, email_verified_at, password_form, role, enabled,
                               epoch, created_at, updated_at)
            SELECT gen_random_uuid(), chr(97 + n % 26) || md5(n::text), md5(n::text) || '@example.org',
                   md5(n::text) || '@example.org', CASE WHEN n % 50 = 0 THEN NULL ELSE now() END, 1,
                   CASE WHEN n % 5000 = 0 THEN 'auditor' WHEN n % 10 = 0 THEN 'moderator' ELSE 'user' END,
                   n % 100 <> 1, 0, now(), now()
            FROM generate_series(1, 10000) n
            """
        )
    )
    async with service.services.db.engine.connect() as connection:
        await connection.exec_driver_sql("ANALYZE users")
        await connection.commit()
    return service


@pytest.mark.case("ADM-15")
async def test_a_prefix_is_found_and_sorted_by_the_indexes_in_byte_order(crowded: Service) -> None:
    """However the database itself sorts words: no scan of the table, and nothing to sort."""
    [by_name] = await plans(crowded, q="f", limit=20)
    [_, by_address] = await plans(crowded, q="1", limit=20)  # no username begins with a digit
    assert re.match(r"Limit .*\n +->  Index Scan using ix_users_username_c on users", by_name)
    assert re.match(r"Limit .*\n +->  Index Scan using ix_users_email_canonical_c on users", by_address)
    for plan in (by_name, by_address):
        assert "Index Cond" in plan
        assert "Sort" not in plan


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({}, "pk_users"),
        ({"role": "moderator"}, "ix_users_role_id"),
        ({"state": State.DISABLED}, "ix_users_disabled"),
        ({"state": State.UNVERIFIED}, "ix_users_unverified"),
    ],
    ids=["everybody", "role", "disabled", "unverified"],
)
async def test_each_list_is_read_from_the_end_of_an_index(crowded: Service, wanted: dict[str, Any], index: str) -> None:
    """The newest are at its end, so nothing is sorted and reading stops with the page."""
    [plan] = await plans(crowded, **wanted, limit=20)
    assert re.match(rf"Limit .*\n +->  Index Scan Backward using {index} on users", plan)
    assert "Sort" not in plan


@pytest.mark.parametrize(
    "wanted",
    [{"q": "f", "role": "auditor"}, {"role": "auditor", "state": State.DISABLED}, {"state": State.DELETED}],
    ids=["prefix of a rare role", "rare role and state", "deleted"],
)
async def test_the_few_are_found_by_what_makes_them_few(crowded: Service, wanted: dict[str, Any]) -> None:
    """Also after the server has seen the statement often, and could make one plan for all values of it."""
    common = {**wanted, "role": "user"}
    for _ in range(15):
        await crowded.within(lambda tx: crowded.services.users.search(tx, **common, limit=20))
    for plan in await plans(crowded, **wanted, limit=20):
        assert "Seq Scan" not in plan
        assert re.search(r"ix_users_role_(id|username_c|email_canonical_c)\b|ix_users_deleted_at", plan), plan


@pytest.mark.case("ADM-15")
async def test_a_prefix_within_a_role_is_a_range_of_one_index(crowded: Service) -> None:
    """A role that many have is too large to sort and too small to be met soon among all names."""
    by_name, by_address = await plans(crowded, q="f", role="auditor", limit=20)
    assert re.match(r"Limit .*\n +->  Index Scan using ix_users_role_username_c on users", by_name)
    assert re.match(r"Limit .*\n +->  Index Scan using ix_users_role_email_canonical_c on users", by_address)
    for plan in (by_name, by_address):
        assert "Sort" not in plan


async def test_the_server_never_settles_on_one_plan_for_all_values(service: Service) -> None:
    """The best plan for a common role walks the names, and for a rare one must not."""

    async def mode(tx: Transaction) -> str:
        await service.services.users.search(tx, q="a", limit=1)
        setting: str = (await tx.execute(text("SHOW plan_cache_mode"))).scalar_one()
        return setting

    assert await service.within(mode) == "force_custom_plan"
    after = await service.within(lambda tx: tx.execute(text("SHOW plan_cache_mode")))
    assert after.scalar_one() == "auto"  # the connection's next user is not concerned


# -- counting ---------------------------------------------------------------------------------------------------------


async def test_users_are_counted_by_role_and_state(anywhere: Service) -> None:
    """Deleted ones in no number but their own, whatever else they were."""
    count = anywhere.services.users.counts
    nobody = Counts({}, {State.ENABLED: 0, State.DISABLED: 0, State.UNVERIFIED: 0, State.DELETED: 0})
    assert await anywhere.within(count) == nobody
    await people(anywhere, *({"role": role, **state} for role in ROLES for state in STATES.values()))
    gone = [await anywhere.a_user(role="admin", verified=verified, password_hash="!") for verified in (True, False)]
    gone.append(await anywhere.a_user(role="super_admin", password_hash="!"))
    for user in gone:
        await anywhere.within(lambda tx, user=user: anywhere.services.users.delete(tx, user.id))
    counted = await anywhere.within(count)
    assert {role: number for role, number in counted.by_role.items() if number} == dict.fromkeys(ROLES, 4)
    assert counted.by_state == {State.ENABLED: 6, State.DISABLED: 6, State.UNVERIFIED: 6, State.DELETED: 3}
