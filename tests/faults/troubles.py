"""
What is done to a stage: each trouble comes, lasts for a few seconds and goes, and says what is fair meanwhile.

A storm ends when the replicas say that they are well and what they say is fresh. From then on nothing may fail.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import psycopg
import redis

from tests.faults.gates import gate, waiting
from tests.faults.ledger import Ledger
from tests.faults.stage import Replica, Stage, StageFailed
from tests.support.fault_proxy import FaultProxy


class Trouble(Protocol):
    """Something that is done to a stage; returns when it is over and what it did to is well again."""

    __name__: str

    async def __call__(self, stage: Stage, ledger: Ledger, /) -> None:
        """Let it come, last and go."""
        ...


_FRESH: Final = 1.1  # seconds after which what a replica says about its readiness is no longer remembered
_STARTS: Final = 20
_PATIENCE: Final = 20.0  # seconds for something to come about that takes milliseconds
_GIVEN_UP: Final = '"event":"database.silent"'
COMMIT: Final = b"COMMIT"
_END_WAITING: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'advisory'"
LOST_COMMITS: Final[dict[str, dict[str, Any]]] = {
    "COMMIT is lost": {"deliver": False},
    "COMMIT is sent": {},
    "its answer is lost": {"stream": "to_client", "deliver": False},
}
"""The places at which a connection is cut in the middle of a commit: it did not happen, who knows, it did."""


async def until(true: Callable[[], object], what: str, *, patience: float = _PATIENCE) -> None:
    """Wait until something is true, for `patience` seconds; raises StageFailed."""
    deadline = time.monotonic() + patience
    while not true():
        if time.monotonic() > deadline:
            raise StageFailed(f"it did not come about that {what}")
        await asyncio.sleep(0.01)


async def recovered(stage: Stage) -> None:
    """Wait until every replica has looked again and found that all is well."""
    await asyncio.sleep(_FRESH)
    await stage.well()


@contextmanager
def _healed(*proxies: FaultProxy) -> Iterator[None]:
    """Let networks be good again at the end of the block."""
    try:
        yield
    finally:
        for proxy in proxies:
            proxy.heal()


# -- PostgreSQL -------------------------------------------------------------------------------------------------------


async def postgres_is_away(stage: Stage, ledger: Ledger) -> None:
    """Connections are reset, and new ones refused."""
    networks = [replica.postgres for replica in stage.replicas]
    with ledger.storm(outage=True):
        with _healed(*networks):
            for network in networks:
                network.refuse()
                network.cut()
            await asyncio.sleep(1.5)
        await recovered(stage)


async def postgres_is_slow(stage: Stage, ledger: Ledger) -> None:
    """Every piece takes a tenth of a second in each direction."""
    await _delayed(stage, ledger, seconds=0.1, lasting=1.2)


async def postgres_is_too_slow(stage: Stage, ledger: Ledger) -> None:
    """Every piece takes more than a second, so that all connections are taken all the time."""
    await _delayed(stage, ledger, seconds=1.2, lasting=4.0)


async def _delayed(stage: Stage, ledger: Ledger, *, seconds: float, lasting: float) -> None:
    networks = [replica.postgres for replica in stage.replicas]
    with ledger.storm(outage=True):
        with _healed(*networks):
            for network in networks:
                network.delay(seconds)
            await asyncio.sleep(lasting)
        await recovered(stage)


async def postgres_is_silent(stage: Stage, ledger: Ledger) -> None:
    """Everything is swallowed, for longer than anybody waits; what was swallowed arrives afterwards."""
    before = stage.log_text().count(_GIVEN_UP)
    await _silent(stage, ledger, lasting=9.0)
    if stage.log_text().count(_GIVEN_UP) == before:
        ledger.complain("nobody has given up a connection on which PostgreSQL said nothing for nine seconds")


async def postgres_is_silent_for_a_moment(stage: Stage, ledger: Ledger) -> None:
    """Everything is swallowed, and then it goes on as if nothing had been."""
    await _silent(stage, ledger, lasting=1.5)


async def _silent(stage: Stage, ledger: Ledger, *, lasting: float) -> None:
    networks = [replica.postgres for replica in stage.replicas]
    with ledger.storm(outage=True):
        with _healed(*networks):
            for network in networks:
                network.blackhole()
            await asyncio.sleep(lasting)
        await recovered(stage)


async def commits_are_cut_off(stage: Stage, ledger: Ledger, *, rounds: int = 2) -> None:
    """
    Connections are cut in the middle of a commit, again and again.

    First any commit at every place of the conversation; then those of sessions and people, which are held up in their
    COMMIT until their clients are gone, and then take place, or do not.
    """
    with ledger.storm(outage=True):
        for place in LOST_COMMITS.values():
            for replica in stage.serving:
                cuts = replica.postgres.cuts
                replica.postgres.cut_after(COMMIT, **place)
                await until(lambda r=replica, n=cuts: r.postgres.cuts > n, "somebody commits")  # type: ignore[misc]
        for number in range(2 * rounds):
            table = ("refresh_families", "users")[number % 4 == 3]
            with gate(stage, table, "in its COMMIT") as connection:
                await until(lambda c=connection: waiting(c), f"somebody writes into {table}")  # type: ignore[misc]
                await asyncio.sleep(0.05)
                if number % 2:
                    connection.execute(_END_WAITING)
                for replica in stage.serving:
                    replica.postgres.cut()
            await asyncio.sleep(0.1)
        await recovered(stage)


async def connections_are_reset(stage: Stage, ledger: Ledger) -> None:
    """All connections to PostgreSQL are reset, a dozen times, at any moment."""
    with ledger.storm(outage=True):
        for number in range(12):
            stage.replicas[number % len(stage.replicas)].postgres.cut()
            await asyncio.sleep(0.13)
        await recovered(stage)


async def backends_are_terminated(stage: Stage, ledger: Ledger) -> None:
    """An administrator ends the sessions of PostgreSQL, in the order of their ids, in whatever they are doing."""
    with ledger.storm(outage=True):
        with await asyncio.to_thread(stage.connect) as connection:
            for number in range(30):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'identity-service' ORDER BY pid OFFSET %s LIMIT 1",
                    [number % 7],
                )
                await asyncio.sleep(0.05)
        await recovered(stage)


async def postgres_restarts(stage: Stage, ledger: Ledger) -> None:
    """PostgreSQL crashes and recovers, three times in a row."""
    with ledger.storm(outage=True):
        for _ in range(3):
            await asyncio.to_thread(stage.postgres.stop, "immediate")
            await asyncio.to_thread(stage.postgres.start)
            await asyncio.sleep(0.3)
        await recovered(stage)


_CONFLICTS: Final = """
CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.25 THEN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END IF;
    IF random() < 0.25 THEN RAISE EXCEPTION 'made up' USING ERRCODE = '40P01'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER conflict BEFORE INSERT OR UPDATE ON refresh_families FOR EACH ROW EXECUTE FUNCTION conflict();
"""
_NO_CONFLICTS: Final = "DROP TRIGGER conflict ON refresh_families; DROP FUNCTION conflict();"


async def transactions_conflict(stage: Stage, ledger: Ledger) -> None:
    """Nearly every second write of a session loses to a conflict or a deadlock, which PostgreSQL rolls back."""
    with ledger.storm(outage=True), await asyncio.to_thread(stage.connect) as connection:
        connection.execute(_CONFLICTS)
        try:
            await asyncio.sleep(2.0)
        finally:
            connection.execute(_NO_CONFLICTS)


async def postgres_only_reads(stage: Stage, ledger: Ledger) -> None:
    """As after a fail-over to the wrong server: whoever connects anew can read and not write."""
    with ledger.storm(outage=True), await asyncio.to_thread(stage.connect) as connection:
        try:
            _allow_writing(connection, allowed=False)
            await asyncio.sleep(1.5)
        finally:
            _allow_writing(connection, allowed=True)
        await recovered(stage)


def _allow_writing(connection: psycopg.Connection, *, allowed: bool) -> None:
    connection.execute("SET default_transaction_read_only = off")
    name = connection.info.dbname
    connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {'off' if allowed else 'on'}")
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'identity-service'"
    )


# -- Redis: nothing may fail for want of it ---------------------------------------------------------------------------


async def redis_is_away(stage: Stage, ledger: Ledger) -> None:
    """Connections are reset, and new ones refused."""
    networks = [replica.redis for replica in stage.replicas]
    with ledger.storm(), _healed(*networks):
        for network in networks:
            network.refuse()
            network.cut()
        await asyncio.sleep(1.2)


async def redis_is_silent(stage: Stage, ledger: Ledger) -> None:
    """Everything is swallowed."""
    networks = [replica.redis for replica in stage.replicas]
    with ledger.storm(), _healed(*networks):
        for network in networks:
            network.blackhole()
        await asyncio.sleep(1.2)


async def redis_is_slow(stage: Stage, ledger: Ledger) -> None:
    """Every piece takes longer than anybody waits for Redis, or nearly so."""
    networks = [replica.redis for replica in stage.replicas]
    with ledger.storm(), _healed(*networks):
        for seconds in (0.04, 0.2):
            for network in networks:
                network.delay(seconds)
            await asyncio.sleep(0.6)


async def redis_forgets(stage: Stage, ledger: Ledger) -> None:
    """Redis is emptied, again and again; then it is another server, which has never heard of us."""
    with ledger.storm():
        for _ in range(3):
            await asyncio.to_thread(stage.redis.flushall)
            await asyncio.sleep(0.2)
        await asyncio.to_thread(stage.redis.stop)
        await asyncio.to_thread(stage.redis.start)
        await asyncio.sleep(0.5)


async def redis_is_stale(stage: Stage, ledger: Ledger) -> None:
    """Redis becomes what it was a second ago, as after a fail-over to a replica that lags."""
    with ledger.storm(), redis.Redis.from_url(stage.redis.url) as client:
        for _ in range(2):
            kept = {key: (client.dump(key), max(0, client.pttl(key))) for key in client.scan_iter()}
            await asyncio.sleep(0.6)
            client.flushall()
            for key, (value, lifetime) in kept.items():
                if value is not None:
                    client.restore(key, lifetime, value, replace=True)


# -- processes --------------------------------------------------------------------------------------------------------


async def replica_is_killed(stage: Stage, ledger: Ledger) -> None:
    """One replica ends as in a crash, and is started again."""
    victim = stage.serving[-1]
    with ledger.storm(crash=True):
        await asyncio.to_thread(victim.kill)
        await asyncio.sleep(0.3)
        await _started(victim, ledger)


async def replica_leaves(stage: Stage, ledger: Ledger) -> None:
    """One replica is told to leave, as at the rollout of a new version, and another one comes: nobody notices."""
    leaver = stage.serving[-1]
    with ledger.storm():
        leaver.serving = False  # nobody is sent there any more
        if (code := await asyncio.to_thread(leaver.leave)) != 0:
            ledger.complain(f"a replica that was told to leave ended with {code}")
        await _started(leaver, ledger)


async def _started(replica: Replica, ledger: Ledger) -> None:
    """Start a replica, again when it cannot because something else is away, as a platform does."""
    for _ in range(_STARTS):
        try:
            await asyncio.to_thread(replica.start)
        except RuntimeError as refused:
            if "Traceback" in str(refused):
                ledger.complain(f"a start that was refused says: {refused}")
            await asyncio.sleep(0.5)
        else:
            return
    raise StageFailed(f"{replica.name} does not start again")


async def replica_freezes(stage: Stage, ledger: Ledger) -> None:
    """One replica stands still with whatever it holds, as on a machine that is paused, and goes on."""
    victim = stage.serving[-1]
    with ledger.storm(outage=True):
        victim.server.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(2.5)
        finally:
            victim.server.send(signal.SIGCONT)
        await recovered(stage)


# -- keys -------------------------------------------------------------------------------------------------------------

_HASTEN: Final = """
    UPDATE signing_keys SET activates_at = now()
    WHERE kid = %s AND activates_at > now() AND compromised_at IS NULL AND removed_at IS NULL
"""
_WAITING: Final = "SELECT kid FROM signing_keys WHERE activates_at > now() AND compromised_at IS NULL"


async def keys_rotate(
    stage: Stage, ledger: Ledger, *, rotations: int = 4, known_to: Sequence[Replica] | None = None
) -> None:
    """
    The waiting key is due now, as soon as every replica publishes it; both replicas then owe the same step.

    In production that takes a day, because caches must learn of it as well.
    """
    with ledger.storm(), await asyncio.to_thread(stage.connect) as connection:
        for _ in range(rotations):
            kid = await _published(connection, stage.serving if known_to is None else known_to)
            connection.execute(_HASTEN, [kid])
            await until(lambda: connection.execute(_WAITING).fetchone() is not None, "another key waits")


async def keys_rotate_once(stage: Stage, ledger: Ledger) -> None:
    """One rotation."""
    await keys_rotate(stage, ledger, rotations=1)


async def _published(connection: psycopg.Connection, replicas: Sequence[Replica]) -> str:
    """Return the waiting key once these replicas publish it."""
    async with asyncio.timeout(_PATIENCE):
        while True:
            row = connection.execute(_WAITING).fetchone()
            if row is not None and all([row[0] in await replica.published() for replica in replicas]):
                kid: str = row[0]
                return kid
            await asyncio.sleep(0.02)


# -- mail -------------------------------------------------------------------------------------------------------------


async def mail_is_silent(stage: Stage, ledger: Ledger) -> None:
    """The mail server accepts connections and says nothing."""
    with ledger.storm(), _healed(stage.post.network):
        stage.post.network.blackhole()
        await asyncio.sleep(6.0)
