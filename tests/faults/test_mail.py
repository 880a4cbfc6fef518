"""A mail server that is slow holds up neither people nor replicas that leave; and no mail is lost by it."""

import asyncio
import secrets
import time

import pytest

from tests.faults.asking import connected
from tests.faults.crowd import at_work
from tests.faults.invariants import told_and_stored
from tests.faults.stage import Stage
from tests.faults.troubles import until

PEOPLE = 6
SOON = 5.0  # seconds; a mail server is given thirty


@pytest.mark.case("OPS-27")
async def test_a_silent_mail_server_is_felt_by_nobody_and_loses_no_mail(stage: Stage) -> None:
    """Resets are accepted in normal time, both replicas leave in time, and the next ones send what was ordered."""
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
            assert await asyncio.gather(*(asyncio.to_thread(replica.leave) for replica in stage.replicas)) == [0, 0]
            stage.post.network.heal()
            connection.execute("UPDATE outbox SET next_attempt_at = now()")
        await asyncio.to_thread(stage.together, lambda replica: replica.start())
        await until(lambda: {user.email for user in users} <= recipients(stage), "every mail has come")
        assert await told_and_stored(stage, crowd) == []


def recipients(stage: Stage) -> set[str]:
    """Return whom mails have come for."""
    return {recipient for mail in stage.post.server.received for recipient in mail.recipients}
