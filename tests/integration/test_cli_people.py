"""Commands about people who are there already: roles, leaving and coming back, sessions, forgotten passwords."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from identity_service.infra.database import Transaction
from tests.support.clock import FrozenClock
from tests.support.commands import PASSWORD, Cli
from tests.support.races import held, waiting
from tests.support.service import Service, running, test_settings


def create(cli: Cli, name: str, role: str = "user") -> dict[str, Any]:
    """Make a user and return what is printed of them."""
    words = ("users", "create", name, "--email", f"{name}@example.org", "--role", role, "--password-stdin")
    shown: dict[str, Any] = cli.json(*words, stdin=PASSWORD)
    return shown


def did(cli: Cli, event: str) -> list[str]:
    """Return to whom `cli` did something; others have left rows as well."""
    return [row["target"] for row in cli.json("audit", "list") if (row["event"], row["actor"]) == (event, "cli")]


def beside(folder: Path, work: Callable[[Service], Awaitable[Any]]) -> Any:
    """Do something with a service on the same database, a minute after whatever a command has done."""

    async def run() -> Any:
        settings = test_settings(f"sqlite+aiosqlite:///{folder / 'identity.db'}")
        async with running(settings, FrozenClock(datetime.now(UTC) + timedelta(minutes=1))) as service:
            return await work(service)

    return asyncio.run(run())


async def signed_in_twice(service: Service) -> list[dict[str, Any]]:
    """Sign marie in from two clients, the second of which was used last."""
    tokens = []
    user = await service.within(lambda tx: service.services.users.by_name(tx, "marie"))
    assert user is not None
    for name in ("Web", "Mobile"):
        service.clock.advance(60)  # type: ignore[attr-defined]
        tokens.append(await service.sign_in(await service.a_client(name=name), user, PASSWORD))
    return tokens


def make_keys(folder: Path, user: dict[str, Any]) -> None:
    """Give somebody two API keys."""

    async def make(service: Service) -> None:
        for name in ("build", "backup"):

            async def create_key(tx: Transaction, name: str = name) -> None:
                await service.services.api_keys.create(
                    tx, owner=uuid.UUID(user["id"]), name=name, scope=("account:read",), expires_at=None, networks=()
                )

            await service.within(create_key)

    beside(folder, make)


def standing_keys(folder: Path, user: dict[str, Any]) -> int:
    """Return how many API keys of somebody are not revoked."""

    async def count(service: Service) -> int:
        return len(await service.within(lambda tx: service.services.api_keys.list(tx, uuid.UUID(user["id"]))))

    found: int = beside(folder, count)
    return found


def test_a_role_is_given_and_audited(cli: Cli) -> None:
    """Giving the role somebody has is nothing; one that does not exist is refused."""
    marie = create(cli, "marie")
    assert cli.json("users", "role", "MARIE", "moderator") == {**marie, "role": "moderator"}
    assert cli.json("users", "role", "marie@example.org", "moderator") == {**marie, "role": "moderator"}
    assert "moderator" in cli.run("users", "role", "marie", "moderator").out
    assert "there is no such role" in cli.run("users", "role", "marie", "emperor").refused()
    assert "there is no such user" in cli.run("users", "role", "nobody", "user").refused()
    assert cli.events().count(("user.role_changed", marie["id"])) == 1


@pytest.mark.case("ADM-06")
@pytest.mark.parametrize(
    "words",
    [
        ("role", "boss", "admin"),
        ("disable", "boss"),
        ("force-reset", "boss"),
        ("delete", "boss"),
        ("delete", "boss", "--purge"),
    ],
    ids=" ".join,
)
def test_the_last_super_admin_stays(cli: Cli, words: tuple[str, ...]) -> None:
    """With a second one who can help, the first may go."""
    boss = create(cli, "boss", "super_admin")
    assert "nobody could do everything any more" in cli.run("users", *words).refused()
    assert cli.json("users", "list") == [boss]
    assert cli.json("users", "role", "boss", "super_admin") == boss
    create(cli, "second", "super_admin")
    assert cli.run("users", *words).code == 0


@pytest.mark.case("ADM-06")
@pytest.mark.parametrize(
    "words",
    [("role", "boss1", "admin"), ("disable", "boss1"), ("force-reset", "boss1"), ("delete", "boss1")],
    ids=" ".join,
)
async def test_a_command_waits_for_who_is_removing_the_other_one(
    service: Service, on_postgres: Cli, words: tuple[str, ...]
) -> None:
    """Both could otherwise count two, and remove one each."""
    people = [await service.a_user(f"boss{number}", role="super_admin") for number in (1, 2)]
    assert on_postgres.run("users", "list").code == 0  # what takes long the first time is done
    async with held(service) as leaving:
        await leaving.tx.lock("administrators")
        await service.services.users.delete(leaving.tx, people[1].id)
        late = asyncio.create_task(asyncio.to_thread(on_postgres.run, "users", *words))
        while not await waiting(service):
            assert not late.done(), "it did not wait"
            await asyncio.sleep(0.01)
        await leaving.commit()
        assert "nobody could do everything any more" in (await late).refused()
    assert await service.within(service.services.users.enabled_super_admins) == 1


def test_a_deleted_user_is_restored_by_their_id(cli: Cli) -> None:
    """Their name is free meanwhile; who takes it keeps it."""
    marie = create(cli, "marie")
    gone = cli.json("users", "delete", "marie")
    assert gone == {"id": marie["id"], "username": "marie", "purged": False}
    assert "there is no such user" in cli.run("users", "delete", "marie").refused()
    assert cli.json("users", "list") == []
    [listed] = cli.json("users", "list", "--deleted")
    assert listed == {**marie, "enabled": listed["enabled"], "deleted_at": listed["deleted_at"]}
    assert datetime.fromisoformat(listed["deleted_at"]) > datetime.fromisoformat(marie["created_at"])
    assert cli.run("users", "list", "--deleted").out.split()[:4] == [marie["id"], "marie", "user", "deleted"]
    assert cli.json("users", "restore", marie["id"]) == marie
    assert cli.json("users", "list", "--deleted") == []
    assert cli.json("users", "list") == [marie]
    for unknown in (marie["id"], str(uuid.uuid4()), "marie", ""):
        said = cli.run("users", "restore", unknown).refused()
        assert "there is no such deleted user; `identity-service users list --deleted` shows those there are" in said
    assert marie["id"] in cli.run("users", "delete", "marie").out
    other = create(cli, "marie")
    assert other["id"] != marie["id"]
    assert "somebody took the username" in cli.run("users", "restore", marie["id"]).refused()
    did = [event for event, target in cli.events() if target == marie["id"]]
    assert did == ["user.created", "user.deleted", "user.restored", "user.deleted"]


def test_a_deleted_user_is_restored_by_a_name_they_had(cli: Cli) -> None:
    """As every other command finds them, by username or address; if several had it, their ids are said."""
    marie, mariette = create(cli, "marie"), create(cli, "mariette")
    for name in ("Marie", "marie@Example.org"):
        for gone in ("mariette", "marie"):
            cli.json("users", "delete", gone)
        assert "there is no such deleted user" in cli.run("users", "restore", "mari").refused()
        assert cli.json("users", "restore", name) == marie
        assert cli.json("users", "restore", mariette["id"]) == mariette
    cli.json("users", "delete", "marie")
    again = create(cli, "marie")
    assert "somebody took the username" in cli.run("users", "restore", "marie").refused()
    cli.json("users", "delete", "marie")
    for name in ("marie", "marie@example.org"):
        said = cli.run("users", "restore", name).refused()
        assert "several deleted users had that name" in said
        assert marie["id"] in said
        assert again["id"] in said
        assert mariette["id"] not in said
    assert cli.json("users", "restore", again["id"]) == again


def test_a_restored_users_keys_stay_dead(cli: Cli, folder: Path) -> None:
    """What was theirs before they left is no way back in."""
    marie = create(cli, "marie")
    make_keys(folder, marie)
    cli.json("users", "delete", "marie")
    assert standing_keys(folder, marie) == 2
    cli.json("users", "restore", marie["id"])
    assert standing_keys(folder, marie) == 0


def test_a_forced_reset_ends_the_keys_of_that_user(cli: Cli, folder: Path) -> None:
    """Whoever had the password may have made them."""
    marie, pierre = create(cli, "marie"), create(cli, "pierre")
    for user in (marie, pierre):
        make_keys(folder, user)
    cli.json("users", "force-reset", "marie")
    assert (standing_keys(folder, marie), standing_keys(folder, pierre)) == (0, 2)


def test_a_purge_leaves_nothing_to_restore(cli: Cli) -> None:
    """By name for who is there, by id for who was deleted; an id does not name somebody who is there."""
    marie, pierre = create(cli, "marie"), create(cli, "pierre")
    assert cli.json("users", "delete", "marie", "--purge")["purged"] is True
    cli.json("users", "delete", "pierre")
    assert "there is no such user" in cli.run("users", "delete", pierre["id"]).refused()
    assert "nothing is left" in cli.run("users", "delete", pierre["id"], "--purge").out
    for gone in (marie, pierre):
        assert "there is no such deleted user" in cli.run("users", "restore", gone["id"]).refused()
        assert cli.events().count(("user.purged", gone["id"])) == 1
    irene = create(cli, "irene")
    assert "there is no such user" in cli.run("users", "delete", irene["id"], "--purge").refused()


def test_sessions_are_listed_and_ended(cli: Cli, folder: Path) -> None:
    """The most recently used first; after `--end` there are none, and what is printed has just ended."""
    marie = create(cli, "marie")
    assert cli.json("users", "sessions", "marie") == []
    tokens = beside(folder, signed_in_twice)
    shown = cli.json("users", "sessions", "marie")
    mobile, web = (datetime.fromisoformat(session["last_used_at"]) for session in shown)
    assert mobile - web == timedelta(minutes=1)
    assert {session["network"] for session in shown} == {"127.0.0.1"}
    lines = cli.run("users", "sessions", "marie").out.splitlines()
    assert [line.split()[-1] for line in lines] == ["Mobile", "Web"]
    for token in tokens:
        assert token["refresh_token"] not in "".join(lines)
    assert cli.json("users", "sessions", "marie", "--end") == shown
    assert cli.json("users", "sessions", "marie") == []
    assert did(cli, "sessions.ended") == [marie["id"]]
    assert "there is no such user" in cli.run("users", "sessions", "nobody").refused()


def test_a_forced_reset_queues_a_mail_where_mail_can_be_sent(cli: Cli, folder: Path) -> None:
    """The password and the sessions are gone; the link is for that user."""
    marie = create(cli, "marie")
    beside(folder, signed_in_twice)
    assert cli.json("users", "force-reset", "marie") == {**marie, "mail_sent": True}
    assert cli.json("users", "sessions", "marie") == []
    assert "a mail with a link is queued" in cli.run("users", "force-reset", "marie").out

    async def look(service: Service) -> None:
        client = await service.a_client()
        answer = await service.token(client, grant_type="password", username="marie", password=PASSWORD)
        assert answer.status_code == 400
        [mail] = await service.within(lambda tx: service.services.outbox.claim(tx, 9))
        assert (mail.template, mail.recipient) == ("reset_password", "marie@example.org")
        assert mail.token_id is not None
        token_id = mail.token_id
        link = await service.within(lambda tx: service.services.email_tokens.text_of(tx, token_id))
        assert link is not None
        body = {"token": link.reveal(), "new_password": "a different battery"}
        assert (await service.http.post("/v1/password-reset/confirm", json=body)).status_code == 204

    beside(folder, look)
    assert did(cli, "user.password_reset_forced") == [marie["id"]] * 2


def test_a_forced_reset_without_mail_says_what_to_do(cli: Cli) -> None:
    """A disabled user gets no mail either."""
    production = {
        "IDENTITY_ENVIRONMENT": "production",
        "IDENTITY_ISSUER": "https://id.example.test",
        "IDENTITY_ALLOW_SQLITE": "true",
        "IDENTITY_ARGON2_MEMORY_KIB": "19456",
        "IDENTITY_ARGON2_TIME_COST": "2",
    }
    create(cli, "marie")
    said = cli.run("users", "force-reset", "marie", **production)
    assert said.code == 0, said.err
    assert "identity-service users set-password marie" in said.out
    cli.json("users", "disable", "marie")
    assert cli.json("users", "force-reset", "marie")["mail_sent"] is False


def test_who_has_no_password_can_be_sent_the_mail_again(cli: Cli, tmp_path: Path) -> None:
    """Also where nobody can do everything: a first super_admin who was imported, and lost the mail."""
    file = tmp_path / "users.jsonl"
    file.write_text('{"username": "boss", "email": "boss@example.org", "role": "super_admin"}\n')
    assert cli.run("users", "import", str(file), "--allow-roles", "super_admin").code == 0
    for _ in range(2):
        assert cli.json("users", "force-reset", "boss")["mail_sent"] is True


def test_a_full_queue_keeps_no_stolen_password_alive(cli: Cli, folder: Path) -> None:
    """The operator hears that no mail is on its way, and what to do instead."""
    create(cli, "marie")
    create(cli, "pierre")
    cli.json("users", "force-reset", "pierre")
    done = cli.run("users", "force-reset", "marie", IDENTITY_MAIL_QUEUE="1")
    assert (done.code, "users set-password marie" in done.out) == (0, True)

    async def sign_in(service: Service) -> int:
        client = await service.a_client()
        answer = await service.token(client, grant_type="password", username="marie", password=PASSWORD)
        return answer.status_code

    assert beside(folder, sign_in) == 400
