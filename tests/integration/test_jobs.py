"""What a server does by itself, driven by hand: mails, warnings, purging, sealing, forgetting."""

import email
from collections.abc import AsyncIterator
from datetime import timedelta
from email.message import EmailMessage
from email.policy import default
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select, update
from structlog.testing import capture_logs

from identity_service.accounts.users import User
from identity_service.infra.audit import ChainBroken
from identity_service.infra.database import Transaction
from identity_service.infra.tables import api_keys, audit_events, email_tokens, outbox, users
from identity_service.infra.telemetry.metrics import AUDIT_CHAIN_BROKEN
from tests.support.service import PASSWORD, Service, running, test_settings

DAY = 86400


@pytest.fixture
async def open_service(database_url: str, tmp_path: Path) -> AsyncIterator[Service]:
    """Anybody may register; mails are written to a folder of the test."""
    async with running(test_settings(database_url, registration="open", data_dir=tmp_path)) as service:
        yield service


def mails(service: Service) -> list[EmailMessage]:
    folder = service.services.settings.mailbox
    assert folder is not None
    read = [email.message_from_bytes(path.read_bytes(), policy=default) for path in sorted(folder.glob("*.eml"))]
    return [message for message in read if isinstance(message, EmailMessage)]


async def count(service: Service, table: object) -> int:
    rows = await service.execute(select(func.count()).select_from(table))  # type: ignore[arg-type]
    number: int = rows[0][0]
    return number


async def test_a_mail_that_was_ordered_is_written_once(open_service: Service) -> None:
    """The second run finds nothing to do."""
    new = {"username": "ada", "email": "ada@example.org", "password": PASSWORD}
    assert (await open_service.http.post("/v1/users", json=new)).status_code == 201
    assert mails(open_service) == []
    for _ in range(2):
        await open_service.run_job("outbox")
        [mail] = mails(open_service)
        assert mail["To"] == "ada@example.org"
    assert await count(open_service, outbox) == 0


async def test_people_are_warned_once_before_a_key_of_theirs_ends(open_service: Service) -> None:
    """A week ahead, by name and not by secret; keys of services have nobody to read the mail."""
    keys, clock = open_service.services.api_keys, open_service.clock
    person, client = await open_service.a_user(), await open_service.a_client()
    for owner, name in ((person.id, "backup"), (client.id, "of a service")):
        await open_service.within(
            lambda tx, owner=owner, name=name: keys.create(
                tx,
                owner=owner,
                name=name,
                scope=["account:read"],
                expires_at=clock.now() + timedelta(days=30),
                networks=[],
            )
        )
    await open_service.run_job("key_expiry")
    assert await count(open_service, outbox) == 0
    clock.advance(24 * DAY)  # type: ignore[attr-defined]
    for _ in range(2):
        await open_service.run_job("key_expiry")
    assert await count(open_service, outbox) == 1
    await open_service.run_job("outbox")
    [mail] = mails(open_service)
    assert mail["To"] == person.email
    body = mail.get_body(("plain",))
    assert body is not None
    assert "backup" in body.get_content()
    assert "idk_" not in mail.as_string()


async def keys_of(service: Service, user: User, *lifetimes: float) -> None:
    """Make keys that end after so many days, each named by the number."""
    for days in lifetimes:
        await service.within(
            lambda tx, days=days: service.services.api_keys.create(
                tx,
                owner=user.id,
                name=f"for {days} days",
                scope=["account:read"],
                expires_at=service.clock.now() + timedelta(days=days),
                networks=[],
            )
        )


async def warned_of(service: Service) -> list[tuple[str, str]]:
    """Return the warnings that wait, as their recipient and the name of the key."""
    rows = await service.execute(select(outbox).where(outbox.c.template == "api_key_expiring"))
    return sorted((row.recipient, row.context["name"]) for row in rows)


@pytest.mark.case("KEY-16")
async def test_nobody_has_a_stranger_warned_of_keys(anywhere: Service) -> None:
    """What a key is called is its owner's choice, and an address that they only claim is somebody else's."""
    mallory = await anywhere.a_user("mallory", email="victim@example.net", verified=False)
    await keys_of(anywhere, mallory, 1, 8)
    anywhere.clock.advance(2 * DAY)  # type: ignore[attr-defined]
    await anywhere.run_job("key_expiry")
    assert await count(anywhere, outbox) == 0
    await anywhere.patch_user(mallory, email_verified_at=anywhere.clock.now())
    await anywhere.run_job("key_expiry")
    assert await warned_of(anywhere) == [("victim@example.net", "for 8 days")]


@pytest.mark.case("KEY-16")
async def test_a_key_that_was_made_for_a_week_ends_without_a_warning(anywhere: Service) -> None:
    """Whoever made it knows; one that lives longer is warned of."""
    user = await anywhere.a_user()
    await keys_of(anywhere, user, 1, 7, 7.5)
    await anywhere.run_job("key_expiry")
    assert await warned_of(anywhere) == []
    anywhere.clock.advance(0.75 * DAY)  # type: ignore[attr-defined]
    await anywhere.run_job("key_expiry")
    assert await warned_of(anywhere) == [(user.email, "for 7.5 days")]


@pytest.mark.case("KEY-16")
async def test_as_many_warnings_are_ordered_as_can_wait(any_url: str) -> None:
    """The others in later runs, each once; the places of people who are signed in stay theirs."""
    async with running(test_settings(any_url, mail_queue=10)) as service:
        users_ = [await service.a_user() for _ in range(2)]
        for user in users_:
            await keys_of(service, user, *(10 + number / 10 for number in range(8)))
        service.clock.advance(5 * DAY)  # type: ignore[attr-defined]
        seen: list[tuple[str, str]] = []
        for expected in (9, 7, 0):
            await service.run_job("key_expiry")
            waiting = await warned_of(service)
            assert len(waiting) == expected
            seen += waiting
            await service.execute(delete(outbox))
        assert len(set(seen)) == 16


@pytest.mark.case("REF-25")
async def test_what_waits_to_be_mailed_goes_with_the_person(anywhere: Service) -> None:
    """But for the notice that tells them so; and not what somebody is sent who has the address now."""
    leaving, staying = await anywhere.a_user("ada"), await anywhere.a_user("mika")

    async def order(tx: Transaction) -> None:
        for user in (leaving, staying):
            for template in ("password_changed", "account_deleted"):
                await anywhere.services.outbox.enqueue(tx, template=template, recipient=user.email, context={})

    async def waiting() -> list[tuple[str, str]]:
        return sorted((row.recipient, row.template) for row in await anywhere.execute(select(outbox)))

    await anywhere.within(order)
    await anywhere.within(lambda tx: anywhere.services.users.delete(tx, leaving.id))
    anywhere.clock.advance(30 * DAY + 60)  # type: ignore[attr-defined]
    successor = await anywhere.a_user("ada2", email=leaving.email)
    context = {"name": "k"}
    await anywhere.within(
        lambda tx: anywhere.services.outbox.enqueue(
            tx, template="api_key_created", recipient=successor.email, context=context
        )
    )
    await anywhere.run_job("purge")
    assert await waiting() == [
        (leaving.email, "account_deleted"),
        (leaving.email, "api_key_created"),
        (staying.email, "account_deleted"),
        (staying.email, "password_changed"),
    ]


@pytest.mark.case("REF-25")
async def test_a_deleted_account_is_forgotten_for_good_after_its_time(open_service: Service) -> None:
    """Not a day before; the trail keeps that it happened, and the names can be had again."""
    user = await open_service.a_user("ada")
    await open_service.within(lambda tx: open_service.services.users.delete(tx, user.id))
    open_service.clock.advance(30 * DAY - 60)  # type: ignore[attr-defined]
    await open_service.run_job("purge")
    assert await count(open_service, users) == 1
    open_service.clock.advance(120)  # type: ignore[attr-defined]
    await open_service.run_job("purge")
    assert await count(open_service, users) == 0
    [row] = await open_service.events("user.purged")
    assert row.target == str(user.id)
    assert (await open_service.a_user("ada")).id != user.id


async def test_what_has_expired_for_good_is_deleted(open_service: Service) -> None:
    """Links that nobody used, and keys that were revoked long ago."""
    user = await open_service.a_user(verified=False)
    assert (await open_service.http.post("/v1/password-reset", json={"email": user.email})).status_code == 202
    keys = open_service.services.api_keys
    made = await open_service.within(
        lambda tx: keys.create(tx, owner=user.id, name="k", scope=["account:read"], expires_at=None, networks=[])
    )
    await open_service.within(lambda tx: keys.revoke(tx, made.key.id, user.id))
    await open_service.run_job("cleanup")
    assert (await count(open_service, email_tokens), await count(open_service, api_keys)) == (1, 1)
    open_service.clock.advance(100 * DAY)  # type: ignore[attr-defined]
    await open_service.run_job("cleanup")
    assert (await count(open_service, email_tokens), await count(open_service, api_keys)) == (0, 0)
    assert await count(open_service, outbox) == 0  # a mail goes with its link


@pytest.mark.case("SEC-06")
async def test_the_trail_is_sealed_and_a_change_of_a_sealed_row_raises_the_alarm(service: Service) -> None:
    """The metric says so for as long as it is so, and retention removes nothing any more."""
    await service.a_user()
    await service.within(
        lambda tx: service.services.audit.record(tx, "user.created", origin=None, actor="cli", target="x")
    )
    await service.run_job("audit_seal")
    assert await service.execute(select(audit_events.c.id).where(audit_events.c.seq.is_(None))) == []
    alarm = AUDIT_CHAIN_BROKEN.labels("audit_retention")
    await service.execute(update(audit_events).values(actor="somebody else"))
    service.clock.advance(500 * DAY)  # type: ignore[attr-defined]
    with pytest.raises(ChainBroken):
        await service.run_job("audit_retention")
    assert alarm._value.get() == 1
    assert await count(service, audit_events) >= 1
    await service.execute(update(audit_events).values(actor="cli"))
    await service.run_job("audit_retention")
    assert alarm._value.get() == 0
    [pruned] = await service.execute(select(audit_events))
    assert pruned.event == "audit.pruned"


@pytest.mark.case("SEC-06")
async def test_a_change_in_the_middle_of_the_trail_is_found_by_nothing_but_the_walk_along_all_of_it(
    service: Service,
) -> None:
    """Neither sealing, which looks at the end, nor retention, which looks at the beginning, meets that row."""
    for target in range(250):
        await service.within(
            lambda tx, name=str(target): service.services.audit.record(  # type: ignore[misc]
                tx, "user.created", origin=None, actor="cli", target=name
            )
        )
    await service.run_job("audit_seal")
    alarm = AUDIT_CHAIN_BROKEN.labels("audit_verify")
    with capture_logs() as logs:
        await service.run_job("audit_verify")
    assert alarm._value.get() == 0
    assert [line["rows"] for line in logs if line["event"] == "audit.verified"] == [await count(service, audit_events)]
    row = update(audit_events).where(audit_events.c.target == "120")
    await service.execute(row.values(actor="somebody else"))
    for job in ("audit_seal", "audit_retention"):
        await service.run_job(job)
    with pytest.raises(ChainBroken):
        await service.run_job("audit_verify")
    assert alarm._value.get() == 1
    await service.execute(row.values(actor="cli"))
    await service.run_job("audit_verify")
    assert alarm._value.get() == 0
