"""A mail server that is slow holds up neither people nor replicas that leave; and no mail is lost by it."""

import asyncio
import secrets
import time
from collections.abc import Sequence

import psycopg
import pytest

from identity_service.accounts.users import User
from tests.faults.asking import connected
from tests.faults.crowd import at_work
from tests.faults.invariants import told_and_stored
from tests.faults.stage import Stage
from tests.faults.troubles import until

PEOPLE = 6
SOON = 20.0  # seconds for all of them; a mail server is given thirty for each


@pytest.mark.case("OPS-27")
async def test_a_silent_mail_server_is_felt_by_nobody_and_loses_no_mail(stage: Stage) -> None:
    """Resets are accepted in normal time, a replica leaves in time, and whoever is there sends what was ordered."""
    async with at_work(stage, people=2, newcomers_every=None) as crowd, connected() as http:
        users = [await crowd.hands.a_user(f"m{secrets.token_hex(6)}") for _ in range(PEOPLE)]
        stage.post.network.blackhole()
        await crowd.busy(10)
        began = time.monotonic()
        for number, user in enumerate(users):
            replica = stage.replicas[number % 2]
            answer = await http.post(
                f"{replica.url}/v1/password-reset",
                json={"email": user.email},
                headers={"x-forwarded-for": f"10.99.0.{number}"},
            )
            assert answer.status_code == 202
        assert time.monotonic() - began < SOON
        with await asyncio.to_thread(stage.connect) as connection:

            def claimed() -> int:
                row = connection.execute("SELECT count(*) FROM outbox WHERE attempts > 0").fetchone()
                return int(row[0]) if row else 0

            await until(claimed, "somebody tries to send")
            await crowd.stop()
            leaver = stage.replicas[0]
            assert await asyncio.to_thread(leaver.leave) == 0
            stage.post.network.cut()
            stage.post.network.heal()
            await until(lambda: hasten(connection, users) == 0, "every mail has gone", patience=60)
        assert {user.email for user in users} <= recipients(stage)
        await asyncio.to_thread(leaver.start)
        assert await told_and_stored(stage, crowd) == []


def hasten(connection: psycopg.Connection, users: Sequence[User]) -> int:
    """Let mails that were tried in vain be due now, and not in a minute; return how many wait."""
    whose = [user.email for user in users]
    return connection.execute("UPDATE outbox SET next_attempt_at = now() WHERE recipient = ANY(%s)", [whose]).rowcount


def recipients(stage: Stage) -> set[str]:
    """Return whom mails have come for."""
    return {recipient for mail in stage.post.server.received for recipient in mail.recipients}
