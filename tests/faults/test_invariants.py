"""What is asked after every fault finds what is wrong: in the database, an answer, a log, the service itself."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.faults import invariants
from tests.faults.broken import PROGRAM, WRONGS
from tests.faults.crowd import Crowd, at_work
from tests.faults.invariants import in_logs, left_open, one_live_token_each, told_and_stored
from tests.faults.ledger import Ledger, Told
from tests.faults.people import HABITS
from tests.faults.stage import Stage
from tests.faults.troubles import commits_are_cut_off, keys_rotate, recovered


@dataclass(frozen=True)
class Breach:
    """What is done to a table, perhaps to one session in it, and words of what must be found then."""

    table: str
    statement: str
    found: str


_LIVE = """
    SELECT f.id FROM refresh_families f JOIN users u ON u.id = f.user_id
    WHERE f.revoked_at IS NULL AND f.user_epoch = u.epoch AND f.generation > 0 ORDER BY f.id DESC LIMIT 1
"""
_ONE = f"id = ({_LIVE})"
BREACHES = {
    "an acknowledged rotation is lost": Breach(
        "refresh_families",
        "UPDATE refresh_families SET generation = generation - 1, nonce = parent_nonce WHERE {one}",
        "is not the stored one",
    ),
    "a family is a branch of its own": Breach(
        "refresh_families",
        "UPDATE refresh_families SET nonce = 'another!' WHERE {one}",
        "is not the stored one",
    ),
    "a session is lost": Breach(
        "refresh_families",
        "DELETE FROM refresh_families WHERE {one}",
        "was acknowledged, and is not there",
    ),
    "a session comes back from the dead": Breach(
        "refresh_families",
        "UPDATE refresh_families SET revoked_at = NULL, revoked_reason = NULL WHERE revoked_reason = 'revoked'",
        "recorded ends of sessions that go on",
    ),
    "a session ends unasked": Breach(
        "refresh_families",
        "UPDATE refresh_families SET revoked_at = now(), revoked_reason = 'ended' WHERE {one}",
        "over in fact: True",
    ),
    "a change is lost": Breach("users", "UPDATE users SET name = 'Nobody'", "the acknowledged name is"),
    "somebody is disabled": Breach("users", "UPDATE users SET enabled = false", "is disabled although"),
    "sessions end unrecorded": Breach(
        "users", "UPDATE users SET epoch = epoch + 1", "people whose sessions ended otherwise than is recorded"
    ),
    "a key is lost": Breach("api_keys", "DELETE FROM api_keys", "recorded API keys that are not there"),
    "a revoked key is good again": Breach(
        "api_keys",
        "UPDATE api_keys SET revoked_at = NULL WHERE revoked_at IS NOT NULL",
        "API keys whose end is not recorded once",
    ),
    "an act is not recorded": Breach(
        "audit_events",
        "DELETE FROM audit_events WHERE id = (SELECT max(id) FROM audit_events WHERE event = 'grant.password')",
        "sessions that no sign-in is recorded for",
    ),
    "an act is recorded twice": Breach(
        "audit_events",
        "INSERT INTO audit_events (at, event, actor, target, network, request_id, occurrences, detail)"
        " SELECT at, event, actor, target, network, request_id, occurrences, detail FROM audit_events"
        " WHERE event = 'api_key.created' LIMIT 1",
        "acts that one request did twice",
    ),
    "what is sealed is changed": Breach(
        "audit_events", "UPDATE audit_events SET actor = 'somebody else' WHERE seq = 3", "the audit chain does not hold"
    ),
    "what was sealed is cut off": Breach(
        "audit_events", "DELETE FROM audit_events WHERE seq = (SELECT max(seq) FROM audit_events)", "the audit chain"
    ),
}


async def found_after(stage: Stage, crowd: Crowd, breach: Breach) -> list[str]:
    """Do something to a table, ask, and undo it, and what asking has sealed."""
    kept = {breach.table, "audit_chain"}
    with stage.connect() as connection:
        connection.execute("SET session_replication_role = replica")  # no foreign key shall help
        for table in kept:
            connection.execute(f"CREATE TABLE kept_{table} AS TABLE {table}")
        try:
            assert connection.execute(breach.statement.format(one=_ONE)).rowcount > 0
            return await told_and_stored(stage, crowd)
        finally:
            with connection.transaction():
                for table in kept:
                    connection.execute(f"DELETE FROM {table}")  # noqa: S608  # a constant of this file
                    connection.execute(f"INSERT INTO {table} SELECT * FROM kept_{table}")  # noqa: S608
                    connection.execute(f"DROP TABLE kept_{table}")


_NO_ENDS = {"refresh": 1.0}  # who has no session signs in
_TO_BE_DONE = ("user.changed", "token.revoked", "api_key.created", "api_key.revoked")  # or it cannot be undone


@contextmanager
def nobody_seals(stage: Stage) -> Iterator[None]:
    """Keep the replicas from sealing, who would find a breach in the trail by themselves, and say so."""
    taken = (
        "UPDATE leases SET holder = 'the test', until = now() + interval '1 hour' WHERE name = %s AND holder IS NULL"
    )
    with stage.connect() as connection:
        while connection.execute(taken, ["audit_seal"]).rowcount == 0:
            time.sleep(0.01)
        try:
            yield
        finally:
            connection.execute("UPDATE leases SET holder = NULL, until = NULL WHERE holder = 'the test'")


async def test_a_breach_in_the_database_is_found_whichever_it_is(stage: Stage, subtests: pytest.Subtests) -> None:
    """Each is done and undone on a stage on which all is well otherwise."""
    habits = {**HABITS, "make_key": 10, "end_key": 10, "be_disabled": 1}
    async with at_work(stage, people=6, newcomers_every=None, habits=habits) as crowd:
        await crowd.busy(80)
        while not all(any(account.done[act] for account in crowd.ledger.accounts) for act in _TO_BE_DONE):
            await crowd.busy(20)
        habits.clear()
        habits.update(_NO_ENDS)  # there shall be a session left to do something to
        await crowd.busy(20)
        await crowd.stop()
        with nobody_seals(stage):
            assert await told_and_stored(stage, crowd) == []
            for name, breach in BREACHES.items():
                with subtests.test(name):
                    found = await found_after(stage, crowd, breach)
                    assert any(breach.found in sentence for sentence in found), found
            assert await told_and_stored(stage, crowd) == []


async def test_a_key_that_one_replica_does_not_know_is_found(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that has not read the schedule for a while publishes too little, and signs with another key."""
    monkeypatch.setattr(invariants, "_PATIENCE", 0.5)
    async with at_work(stage, people=1, newcomers_every=None, looks_every=None) as crowd:
        await crowd.stop()
        behind = stage.replicas[1]
        behind.postgres.blackhole()
        await keys_rotate(stage, crowd.ledger, rotations=1, known_to=stage.replicas[:1])
        found = await told_and_stored(stage, crowd)
        behind.postgres.heal()
        assert [sentence for sentence in found if sentence.startswith("signing keys")]
        monkeypatch.undo()
        await recovered(stage)
        assert await told_and_stored(stage, crowd) == []


_SPARE = """
CREATE FUNCTION spare() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.revoked_at := NULL; NEW.revoked_reason := NULL; RETURN NEW; END $$;
CREATE TRIGGER spare BEFORE UPDATE ON refresh_families FOR EACH ROW WHEN (NEW.revoked_at IS NOT NULL)
    EXECUTE FUNCTION spare();
"""
_SPARE_NONE = "DROP TRIGGER spare ON refresh_families; DROP FUNCTION spare();"


async def test_a_session_with_another_live_token_than_its_newest_is_found(stage: Stage) -> None:
    """Whether it survives the replay of an older one, or lives no more at all."""
    stage.spoiled = True  # the trail knows of ends that were none
    async with at_work(stage, people=2, machines=0, newcomers_every=None, looks_every=None, habits=_NO_ENDS) as crowd:
        await crowd.busy(20)
        await crowd.stop()
        with stage.connect() as connection:
            connection.execute(_SPARE)
            found = await one_live_token_each(stage, crowd, 2)
            connection.execute(_SPARE_NONE)
            assert [sentence for sentence in found if "has outlived the replay" in sentence], found
            connection.execute("UPDATE refresh_families SET revoked_at = now(), revoked_reason = 'ended'")
            found = await one_live_token_each(stage, crowd, 2)
            assert [sentence for sentence in found if "is refused" in sentence], found


async def test_a_transaction_that_is_left_open_is_found(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "_PATIENCE", 0.5)
    with stage.connect() as connection, connection.transaction():
        connection.execute("SELECT 1")
        (found,) = await left_open(stage)
    assert "idle in a transaction" in found
    assert await left_open(stage) == []


@pytest.mark.parametrize(
    "line",
    [
        '{"exception":"Traceback (most recent call last):\\n","event":"job.failed","level":"error"}',
        '{"event":"Task exception was never retrieved","level":"error","logger":"asyncio"}',
        '{"event":"request","route":"/token","status":500,"level":"info"}',
        "Fatal Python error: Segmentation fault",
        '  File "x.py", line 1, in y\nTraceback (most recent call last):',
    ],
)
def test_a_fault_of_ours_in_a_log_is_found(line: str) -> None:
    ordinary = '{"event":"request","route":"/token","status":503,"level":"info"}\n{"event":"x","level":"warning"}\n'
    assert in_logs(ordinary) == []
    assert len(in_logs(ordinary + line)) == 1


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (Told(500, {}), "500"),
        (Told(503, {}, {"retry-after": "1"}), "nothing was away"),
        (Told(0, "ReadError"), "nobody was killed"),
    ],
)
def test_an_answer_that_nothing_excuses_is_found(told: Told, found: str) -> None:
    ledger = Ledger()
    ledger.hear("refresh", told, looks=(ledger.outages.look(), ledger.crashes.look()), hung_up=False, took=0)
    (complaint,) = ledger.complaints
    assert found in complaint


def test_in_a_storm_an_outage_is_fair_and_what_it_says_must_be_right() -> None:
    ledger = Ledger()
    with ledger.storm(outage=True):
        looks = (ledger.outages.look(), ledger.crashes.look())
        ledger.hear("refresh", Told(503, {}, {"retry-after": "1"}), looks=looks, hung_up=False, took=0)
        assert ledger.complaints == []
        ledger.hear("refresh", Told(503, {"error": "invalid_grant"}, {}), looks=looks, hung_up=False, took=0)
    assert len(ledger.complaints) == 2


@pytest.fixture(params=WRONGS)
def broken(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A stage with one replica, in which something is wrong."""
    with Stage(replicas=1, start=lambda replica: replica.start(PROGRAM.format(request.param))) as stage:
        yield stage


async def test_a_service_with_something_wrong_is_found_out(broken: Stage) -> None:
    """Each of these passes as long as nothing breaks and nobody is disabled."""
    habits = {"refresh_without_key": 4.0, "sign_in": 4.0, "revoke": 3.0, "be_disabled": 1.0}
    async with at_work(broken, habits=habits, machines=0, newcomers_every=None, looks_every=None) as crowd:
        await crowd.busy(20)
        await commits_are_cut_off(broken, crowd.ledger)
        await crowd.busy(20)
        while not any(account.done["user.disabled"] for account in crowd.ledger.accounts):
            await crowd.busy(5)
        await crowd.stop()
        assert await told_and_stored(broken, crowd) != []
