"""`after-restore`: what it is told, what it says, what stands in its way; all of it happens, or nothing."""

import asyncio
import fcntl
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import delete, insert, make_url, select, update

from identity_service.accounts.access import SUPER_ADMIN
from identity_service.infra.database import Database
from identity_service.infra.installation import restore_number
from identity_service.infra.migrate import migrate
from identity_service.infra.tables import (
    audit_chain,
    audit_events,
    users,
)
from identity_service.settings import UnsafeSettings
from tests.support.addresses import plain
from tests.support.backups import Backups
from tests.support.commands import OTHER_KEY, PROGRAM, ROOT, Cli
from tests.support.keys import a_key, an_exchanger, exchange
from tests.support.people import an_app, signed_in
from tests.support.reading import refused
from tests.support.restoring import (
    Place,
    everything,
    keys_in_use,
    live,
    newest_seal,
    rows_of,
    serve_once,
    somebody_waits,
    write,
)
from tests.support.service import (
    PASSWORD,
)

At = Callable[[str], Place]


# -- what the operator knows ------------------------------------------------------------------------------------------


async def test_what_the_operator_knows_is_done_again(lively_url: str, backups: Backups, at: At) -> None:
    """Disabled and deleted people and clients, by any of their names; who is not here is told and no obstacle."""
    async with live(lively_url) as service:
        ann, bob, eve, kim = [await service.a_user(name) for name in ("ann", "bob", "eve", "kim")]
        shop = await service.a_client()
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    words = ["--disabled-user", "ANN", "--disabled-user", str(bob.id), "--disabled-user", "nobody"]
    words += ["--deleted-user", eve.email, "--disabled-client", shop.id, "--disabled-client", "cl_unknown"]
    done = place.restored(*words)
    assert done["users_disabled"] == [str(ann.id), str(bob.id)]
    assert done["users_deleted"] == [str(eve.id)]
    assert done["clients_disabled"] == [shop.id]
    assert done["unknown"] == ["nobody", "cl_unknown"]
    async with live(place.url) as service:
        app = await an_app(service)
        for user in (ann, bob, eve):
            form = {"grant_type": "password", "username": user.username, "password": PASSWORD}
            refused(await service.token(app, **form), "invalid_grant")
        assert (await service.token(shop, grant_type="client_credentials")).status_code == 401
        assert (await (await signed_in(service, kim, app))("GET")).status_code == 200
        assert await service.a_user("eve")
        events = [(event.event, event.target) for event in await service.execute(select(audit_events))]
        assert {("user.disabled", str(ann.id)), ("user.disabled", str(bob.id))} <= set(events)
        assert {("user.deleted", str(eve.id)), ("client.disabled", shop.id)} <= set(events)
    assert [user["id"] for user in place.cli.json("users", "list", "--deleted")] == [str(eve.id)]
    said = place.cli.run("audit", "list", "--event", "database.restored", "--json").json[0]
    assert (said["detail"]["users_disabled"], said["detail"]["users_deleted"]) == (2, 1)


async def test_what_the_exported_trail_tells_is_done_again(
    lively_url: str, backups: Backups, at: At, tmp_path: Path
) -> None:
    """What was taken away since the backup is taken away, what was given is not given; the rest is told."""
    lost, file = at(lively_url), tmp_path / "trail.jsonl"
    run = lost.cli.json
    async with live(lively_url) as service:
        app, gateway = await an_app(service), await an_exchanger(service)
        names = ["off", "on-again", "gone", "back", "purged", "before", "given", "kept", "mail"]
        users_by_name = {name: await service.a_user(name) for name in names}
        off, gone, purged, kept = [users_by_name[name] for name in ("off", "gone", "purged", "kept")]
        keyed = await signed_in(service, kept, app)
        shop, shut = await service.a_client(), await service.a_client()
        revoked, rotated, good = [await a_key(service, kept, "account:read", "orders:read") for _ in range(3)]
        [signer, *_] = await keys_in_use(service)
        run("users", "disable", "given")
        run("users", "disable", "before")
        await service.patch_user(
            users_by_name["before"], enabled=True
        )  # whose row is in the backup; so nobody looks at it again
        backup = backups.dump(lively_url)
        for words in (
            *("users disable off", "users disable on-again", "users enable on-again", "users enable given"),
            *("users delete gone", "users delete back", "users restore back", "users delete --purge purged"),
            *(f"clients disable {shop.id}", f"clients disable {shut.id}", f"clients delete {shut.id}"),
            *(f"keys compromise {signer}", "users force-reset mail", "users role mail moderator"),
        ):
            run(*words.split())
        late = await service.a_user("late")
        run("users", "disable", late.username)
        path = "/v1/users/me/api-keys"
        assert (await service.http.delete(f"{path}/{revoked.id}", headers=keyed.headers)).status_code == 204
        rotation = await service.http.post(f"{path}/{rotated.id}/rotate", json={}, headers=keyed.headers)
        assert rotation.status_code == 200, rotation.text
        assert lost.cli.run("audit", "export", "--output", str(file)).code == 0
    place = at(backups.restore_elsewhere(backup))
    done = place.restored("--trail", str(file))
    assert done["users_disabled"] == [str(off.id)]
    assert (done["users_deleted"], done["users_purged"]) == ([str(gone.id)], [str(purged.id)])
    assert done["clients_disabled"] == [shop.id, shut.id]
    assert done["compromised"] == [signer]
    assert (done["api_keys_ended"], done["api_keys_suspended"]) == ([revoked.id, rotated.id], 1)
    assert done["unknown"] == []
    told = {(row["event"], row["username"] or row["target"]) for row in done["to_look_at"]}
    assert told == {
        ("client.deleted", shut.id),
        ("user.password_reset_forced", "mail"),
        ("user.role_changed", "mail"),
    }
    listed = {user["username"]: user["enabled"] for user in place.cli.json("users", "list")}
    assert listed == {
        "off": False,
        "on-again": True,
        "back": True,
        "before": True,
        "given": False,
        "kept": True,
        "mail": True,
    }
    assert [user["id"] for user in place.cli.json("users", "list", "--deleted")] == [str(gone.id)]
    assert [key["id"] for key in place.cli.json("confirm-api-keys", "--all")["given_back"]] == [good.id]
    assert place.cli.json("audit", "list", "--event", "user.purged")[0]["target"] == str(purged.id)
    said = at(backups.restore_elsewhere(backup)).cli.run("after-restore", "--trail", str(file)).out
    assert re.search(r"user\.password_reset_forced +mail\n", said)
    assert gateway.id not in said


NO_ROWS = [
    *("x", "[]", "null", '"x"', '{"id": 1}', "id,seq,at,event", "\udcff"),
    *(
        f'{{"event": "user.disabled", "id": {number}, "at": {moment}, "target": "u"}}'
        for number, moment in [
            *(('"x"', '"2026-01-01T00:00:00Z"'), (1, '"yesterday"'), (1, "1"), (1, "null")),
            (1, '"2026-01-01T00:00:00"'),
        ]
    ),
]


@pytest.mark.parametrize("content", NO_ROWS)
def test_a_file_that_is_no_trail_is_refused(lively_url: str, at: At, tmp_path: Path, content: str) -> None:
    """With the line; nothing was done by then."""
    file = tmp_path / "trail.jsonl"
    good = '{"event": "grant.password", "id": 1, "at": "2026-01-01T00:00:00+00:00", "target": null}\n'
    file.write_bytes((good + content + "\n").encode("utf-8", "surrogateescape"))
    assert "line 2: not a row of" in at(lively_url).refuses("--unnoticed", "--trail", str(file))


def test_a_file_that_is_not_there_is_told(lively_url: str, at: At) -> None:
    """By its name."""
    assert "No such file or directory: /nowhere" in at(lively_url).refuses("--unnoticed", "--trail", "/nowhere")


async def test_the_last_who_can_do_everything_stays(lively_url: str, backups: Backups, at: At) -> None:
    """Then nothing is done at all; with a successor it is."""
    async with live(lively_url) as service:
        await service.a_user("root", role=SUPER_ADMIN)
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    for word in ("--disabled-user", "--deleted-user"):
        assert "make another super_admin first" in place.refuses(word, "root")
    assert await rows_of(place.url, select(users.c.epoch)) == [(0,)]
    create = ("users", "create", "next", "--email", "n@example.org", "--role", SUPER_ADMIN, "--password-stdin")
    assert place.cli.run(*create, stdin=PASSWORD).code == 0
    assert len(place.restored("--disabled-user", "root")["users_disabled"]) == 1


async def test_people_are_told_what_was_done_and_what_nobody_knows(lively_url: str, backups: Backups, at: At) -> None:
    """The text has every number, and the commands for the rest."""
    async with live(lively_url) as service:
        await a_key(service, await service.a_user("ann"))
        await service.a_user("bob")
        await newest_seal(service)
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    done = place.cli.run("after-restore", "--disabled-user", "ann", "--compromised", "gone")
    assert done.code == 0
    for said in (
        *("can be served", "2 users and 0 clients", "0 mailed links", "1 API keys are suspended", "confirm-api-keys"),
        *(
            "is disabled again",
            "no bootstrap secret",
            "is out of use",
            "up to 15 minutes",
            "nothing was done about: gone",
        ),
        *("the audit trail has lost the rows after", "keep its new anchor: ", "users force-reset", "--deleted-user"),
    ):
        assert said in done.out, said


# -- the audit trail --------------------------------------------------------------------------------------------------


async def test_an_anchor_says_up_to_where_rows_are_lost(lively_url: str, backups: Backups, at: At) -> None:
    """One from before the backup must fit; one that does not is another database's, or of a chain that went on."""
    async with live(lively_url) as service:
        await service.a_user("ann")
        before = await newest_seal(service)
        backup = backups.dump(lively_url)
        await service.within(lambda tx: service.services.audit.record(tx, "demo.created", origin=None))
        after = await newest_seal(service)
    place = at(backups.restore_elsewhere(backup))
    seq, mac = before.split(":")
    other = f"{seq}:{mac[::-1]}"
    assert f"another seal at {seq}" in place.refuses("--anchor", other)
    done = place.restored("--anchor", before, "--anchor", after)
    assert (done["rows_lost_after"], done["rows_known_to"]) == (int(seq), int(after.split(":")[0]))
    [row] = place.cli.json("audit", "list", "--event", "database.restored")
    assert (row["actor"], row["detail"]["after"], row["detail"]["known_to"]) == ("cli", int(seq), int(seq) + 1)
    assert row["detail"]["restored_at"] == done["restored_at"]
    assert {"users", "clients", "links", "api_keys_suspended", "compromised"} <= row["detail"].keys()
    assert place.cli.run("audit", "verify", "--anchor", other).code == 1


async def test_a_trail_that_was_tampered_with_is_no_reason_not_to_end_sessions(
    lively_url: str, backups: Backups, at: At
) -> None:
    """It cannot go on, which is said loudly; all the rest is done."""
    async with live(lively_url) as service:
        await service.a_user("ann")
        await newest_seal(service)
        await service.execute(update(audit_chain).values(seq=audit_chain.c.seq - 1))
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    done = place.cli.run("after-restore")
    assert "THE AUDIT TRAIL DOES NOT HOLD" in done.out
    assert await rows_of(place.url, select(users.c.epoch)) != [(0,)]
    [row] = await rows_of(place.url, select(audit_events).where(audit_events.c.event == "database.restored"))
    assert row.seq is None
    async with live(place.url) as service:
        assert (await service.http.get("/readyz")).status_code == 200


# -- all or nothing ---------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_it_has_done_nothing_and_can_be_run_again(
    lively_url: str, backups: Backups, at: At, tmp_path: Path
) -> None:
    """It stands before its very last step when it is killed."""

    async def fill() -> None:
        async with live(lively_url) as service:
            await service.a_user("ann")
            await service.a_client()
            await newest_seal(service)

    asyncio.run(fill())
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    before = asyncio.run(everything(place.url))
    with psycopg.connect(plain(place.url)) as holder:
        holder.execute("SELECT * FROM installation FOR UPDATE")
        assert any(killed_while_it_waits(place, tmp_path) for _ in range(5))
    assert asyncio.run(everything(place.url)) == before
    with pytest.raises(UnsafeSettings):
        asyncio.run(serve_once(place.url))
    assert place.restored()["users"] == 1
    asyncio.run(serve_once(place.url))


def killed_while_it_waits(place: Place, folder: Path) -> bool:
    """Kill the command while it waits for a lock; return False if it gave up before that was noticed."""
    command = subprocess.Popen(
        [*PROGRAM, "after-restore"], cwd=folder, env=place.cli.environment(), stderr=subprocess.DEVNULL
    )
    try:
        return somebody_waits(place.url, while_it_runs=command)
    finally:
        command.kill()
        command.wait()


def test_what_cannot_be_recorded_does_not_happen(lively_url: str, backups: Backups, at: At) -> None:
    """No audit, no change."""
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    before = asyncio.run(everything(place.url))
    with psycopg.connect(plain(place.url), autocommit=True) as connection:
        connection.execute(
            "ALTER TABLE audit_events ADD CONSTRAINT planted CHECK (event <> 'database.restored') NOT VALID"
        )
    done = subprocess.run(
        [*PROGRAM, "after-restore"], env=place.cli.environment(), capture_output=True, check=False, timeout=300
    )
    assert done.returncode != 0
    assert asyncio.run(everything(place.url)) == before


def test_a_second_run_finds_nothing_to_do(lively_url: str, backups: Backups, at: At) -> None:
    """Who does not know whether the first one was committed runs it again, and is told."""
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    done = place.restored()
    before = asyncio.run(everything(place.url))
    assert f"was last put right at {done['restored_at']}" in place.refuses()
    assert asyncio.run(everything(place.url)) == before


# -- what stands in its way -------------------------------------------------------------------------------------------


def test_what_is_at_home_is_put_right_only_on_demand(lively_url: str, at: At) -> None:
    """A restore to a point in time copies files, and nobody can see it; the operator says so."""
    place = at(lively_url)
    assert "say --unnoticed" in place.refuses()
    assert place.restored("--unnoticed")["restored_at"]
    assert place.restored("--unnoticed")["rows_lost_after"] is not None


async def test_a_copied_file_of_sqlite_is_put_right_on_demand(cli: Cli, folder: Path) -> None:
    """All of it works there as well."""
    made = cli.json("users", "create", "ann", "--email", "a@example.org", "--password-stdin", stdin=PASSWORD)
    assert "say --unnoticed" in cli.run("after-restore").refused()
    done = cli.json("after-restore", "--unnoticed", "--disabled-user", "ann")
    assert (done["users"], done["users_disabled"], len(done["signing_keys_out_of_use"])) == (1, [made["id"]], 2)
    url = f"sqlite+aiosqlite:///{folder / 'identity.db'}"
    number = restore_number(datetime.fromisoformat(done["restored_at"]))
    assert await rows_of(url, select(users.c.epoch)) == [(number + 1,)]
    assert cli.json("confirm-api-keys") == {"suspended": [], "left": []}
    assert cli.json("audit", "verify")["gaps"][0]["from"] == 1


async def test_while_servers_are_connected_nothing_is_done(lively_url: str, backups: Backups, at: At) -> None:
    """They would go on with what they remember; a pooler's connections are no servers."""
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    db = Database(place.url)
    try:
        await db.revision()
        assert "stop the servers first" in await asyncio.to_thread(place.refuses)
        assert "stop the servers first" in await asyncio.to_thread(place.refuses, "--nothing-lost")
        assert (await asyncio.to_thread(place.restored, "--servers-stopped"))["users"] == 0
    finally:
        await db.close()


def test_on_sqlite_a_running_server_stands_in_the_way(cli: Cli, folder: Path) -> None:
    """By the lock that keeps a second server away."""
    with (folder / "identity.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another server is running" in cli.run("after-restore", "--unnoticed").refused()


async def test_a_clock_that_is_wrong_is_told_before_anything_is_done(lively_url: str, backups: Backups, at: At) -> None:
    """Epochs and places in the trail are made of the time: a time that was before could have been used before."""
    async with live(lively_url) as service:
        ann = await service.a_user("ann")
        await service.patch_user(ann, epoch=restore_number(datetime.now(UTC) + timedelta(hours=1)))
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    assert "somebody's epoch has come as far already" in place.refuses()
    await write(place.url, update(users).values(epoch=0))
    future = datetime.now(UTC) + timedelta(hours=1)
    row = {"at": future, "event": "demo.created", "occurrences": 1, "detail": {}}
    await write(place.url, insert(audit_events).values(row))
    assert f"has a row of {future.isoformat()}" in place.refuses()
    await write(place.url, delete(audit_events).where(audit_events.c.at == future))
    assert place.restored()["users"] == 1


def test_without_the_right_master_key_nothing_is_done(lively_url: str, backups: Backups, at: At) -> None:
    """The backup of the database is worth nothing without it; the refusal names the key that is wanted."""
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    before = asyncio.run(everything(place.url))
    assert "master key" in place.cli.run("after-restore", IDENTITY_MASTER_KEY=OTHER_KEY).refused(2)
    assert asyncio.run(everything(place.url)) == before


def test_an_older_schema_is_migrated_first(backups: Backups, at: At) -> None:
    """A backup of the version before this one has no place to note anything in."""
    older = backups.a_database()
    migrate(older, revision="0004")
    place = at(backups.restore_elsewhere(backups.dump(older)))
    assert "identity-service migrate" in place.refuses()


# -- moved, nothing lost ----------------------------------------------------------------------------------------------


async def test_a_database_that_was_moved_goes_on_as_it_was(lively_url: str, backups: Backups, at: At) -> None:
    """Sessions, keys, links and API keys stay; the trail has a row, and the anchor proves that nothing is lost."""
    async with live(lively_url) as service:
        app, gateway, ann = await an_app(service), await an_exchanger(service), await service.a_user("ann")
        session, key = await signed_in(service, ann, app), await a_key(service, ann)
        kids = await keys_in_use(service)
        anchor = await newest_seal(service)
    place = at(backups.restore_elsewhere(backups.dump(lively_url)))
    for words in (["--unnoticed"], ["--compromised", "x"], ["--disabled-user", "ann"], ["--disabled-client", "x"]):
        assert "goes with --anchor only" in place.refuses("--nothing-lost", *words)
    assert place.restored("--nothing-lost", "--anchor", anchor) == {"moved": True}
    assert place.restored("--nothing-lost") == {"moved": False}
    async with live(place.url) as service:
        assert (await service.http.get("/v1/users/me", headers=session.headers)).status_code == 200
        assert (await service.refresh(app, session.refresh_token)).status_code == 200
        assert (await exchange(service, gateway, key)).status_code == 200
        assert await keys_in_use(service) == kids
        [event] = await service.events("database.moved")
        assert event.actor == "cli"
        await newest_seal(service)
    verified = place.cli.json("audit", "verify", "--anchor", anchor)
    assert (verified["good"], verified["gaps"]) == (True, [])


async def test_an_anchor_contradicts_who_says_that_nothing_is_lost(lively_url: str, backups: Backups, at: At) -> None:
    """The trail ends before it; nothing is noted."""
    async with live(lively_url) as service:
        await service.a_user("ann")
        await newest_seal(service)
        backup = backups.dump(lively_url)
        await service.within(lambda tx: service.services.audit.record(tx, "demo.created", origin=None))
        anchor = await newest_seal(service)
    place = at(backups.restore_elsewhere(backup))
    seq = anchor.split(":")[0]
    assert f"does not have the seal {seq}" in place.refuses("--nothing-lost", "--anchor", anchor)
    other = f"{int(seq) - 1}:{anchor.split(':')[1]}"
    assert "something is lost" in place.refuses("--nothing-lost", "--anchor", other)
    with pytest.raises(UnsafeSettings):
        await serve_once(place.url)


async def test_a_move_remembers_the_restore_before_it(lively_url: str, backups: Backups, at: At) -> None:
    """Keys that are suspended can still be given back."""
    async with live(lively_url) as service:
        key = await a_key(service, await service.a_user("ann"))
    first = at(backups.restore_elsewhere(backups.dump(lively_url)))
    first.restored()
    second = at(backups.restore_elsewhere(backups.dump(first.url)))
    assert second.restored("--nothing-lost") == {"moved": True}
    assert [given["id"] for given in second.cli.json("confirm-api-keys", "--all")["given_back"]] == [key.id]


# -- the database's roles ---------------------------------------------------------------------------------------------


async def test_the_service_s_own_role_is_enough(backups: Backups, at: At) -> None:
    """With the roles of deploy/postgresql: the owner of the tables dumps and restores, the service puts right."""

    def prepared() -> dict[str, str]:
        """Return the addresses of a new database, for each role."""
        url = make_url(backups.a_database())
        run_script(url.render_as_string(hide_password=False), "roles.sql")
        roles = ("identity_migrator", "identity_service")
        return {role: url.set(username=role).render_as_string(hide_password=False) for role in roles}

    old, new = prepared(), prepared()
    migrate(old["identity_migrator"])
    run_script(old["identity_migrator"], "grants.sql")
    async with live(old["identity_service"]) as service:
        app, ann = await an_app(service), await service.a_user("ann")
        await newest_seal(service)
    backups.restore(backups.dump(old["identity_migrator"]), new["identity_migrator"], "--no-owner", "--no-privileges")
    run_script(new["identity_migrator"], "grants.sql")
    place = at(new["identity_service"])
    assert place.restored("--disabled-user", "nobody")["users"] == 1
    async with live(place.url) as service:
        assert (await (await signed_in(service, ann, app))("GET")).status_code == 200
        await newest_seal(service)
    assert place.cli.json("audit", "verify")["good"]
    moved = prepared()
    backups.restore(backups.dump(new["identity_migrator"]), moved["identity_migrator"], "--no-owner", "--no-privileges")
    run_script(moved["identity_migrator"], "grants.sql")
    assert at(moved["identity_service"]).restored("--nothing-lost") == {"moved": True}


def run_script(url: str, name: str) -> None:
    """Run a script of deploy/postgresql as whom the URL names."""
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute((ROOT / "deploy" / "postgresql" / name).read_bytes())
