"""
The one question after every fault: does what people were told agree with what the database holds?

`told_and_stored` asks it of a stage on which everybody has stopped; `breaches` uses some sessions up as well, to see
which of their tokens work. `consistent` asks the part of it that is true at any moment, even in the middle of a fault:
what one transaction wrote is seen whole or not at all.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import select, text

from identity_service.accounts.refresh_families import GenuineToken
from identity_service.infra.audit import Anchor
from identity_service.infra.database import Transaction
from identity_service.infra.runtime import Secret
from identity_service.infra.tables import audit_events, refresh_families, users
from tests.faults.asking import connected
from tests.faults.crowd import Crowd
from tests.faults.ledger import REST, Account, Ledger, Session
from tests.faults.stage import Replica, Stage
from tests.support.reading import key_id
from tests.support.service import Registered, Service

_PATIENCE: Final = 10.0  # seconds for the end of a transaction that was cut off, and for a poll of the keys

# What one transaction writes in two places; each statement returns what stands in one of them only, or twice.
_TOGETHER: Final = {
    "sessions that no sign-in is recorded for": """
        SELECT f.id::text FROM refresh_families f
        LEFT JOIN audit_events a ON a.event = 'grant.password' AND a.target = f.id::text
        GROUP BY f.id HAVING count(a.id) <> 1
    """,
    "recorded sign-ins without their session": """
        SELECT a.target FROM audit_events a LEFT JOIN refresh_families f ON f.id::text = a.target
        WHERE a.event = 'grant.password' AND f.id IS NULL
    """,
    "sessions whose end is not recorded once": """
        SELECT f.id::text FROM refresh_families f
        LEFT JOIN audit_events a ON a.target = f.id::text AND a.event =
            CASE f.revoked_reason WHEN 'revoked' THEN 'token.revoked' ELSE 'refresh.' || f.revoked_reason END
        WHERE f.revoked_reason IN ('revoked', 'reuse_detected', 'foreign_client', 'ahead_of_record')
        GROUP BY f.id HAVING count(a.id) <> 1
    """,
    "recorded ends of sessions that go on": """
        SELECT f.id::text FROM audit_events a JOIN refresh_families f ON f.id::text = a.target
        WHERE (a.event LIKE 'refresh.%' OR a.event = 'token.revoked') AND f.revoked_at IS NULL
    """,
    "sessions ahead of their owner": """
        SELECT f.id::text FROM refresh_families f JOIN users u ON u.id = f.user_id JOIN clients c ON c.id = f.client_id
        WHERE f.user_epoch > u.epoch OR f.client_epoch > c.epoch
    """,
    "people whose sessions ended otherwise than is recorded": """
        SELECT u.id::text FROM users u LEFT JOIN audit_events a ON a.target = u.id::text
            AND a.event IN ('user.disabled', 'password.changed', 'sessions.ended', 'user.deleted', 'password.reset',
                            'user.password_reset_forced')
        GROUP BY u.id HAVING count(a.id) <> u.epoch
    """,
    "people who are disabled, or not, otherwise than is recorded": """
        SELECT u.id::text FROM users u LEFT JOIN audit_events a ON a.target = u.id::text
            AND a.event IN ('user.disabled', 'user.enabled')
        GROUP BY u.id HAVING u.enabled <> (count(a.id) % 2 = 0)
    """,
    "API keys that were not recorded once": """
        SELECT k.id FROM api_keys k LEFT JOIN audit_events a ON a.event = 'api_key.created' AND a.target = k.id
        GROUP BY k.id HAVING count(a.id) <> 1
    """,
    "recorded API keys that are not there": """
        SELECT a.target FROM audit_events a LEFT JOIN api_keys k ON k.id = a.target
        WHERE a.event = 'api_key.created' AND k.id IS NULL
    """,
    "API keys whose end is not recorded once": """
        SELECT k.id FROM api_keys k LEFT JOIN audit_events a ON a.event = 'api_key.revoked' AND a.target = k.id
        GROUP BY k.id HAVING count(a.id) <> (k.revoked_at IS NOT NULL)::int
    """,
    "signing keys that were not recorded once": """
        SELECT k.kid FROM signing_keys k LEFT JOIN audit_events a ON a.event = 'key.created' AND a.target = k.kid
        GROUP BY k.kid HAVING count(a.id) <> 1
    """,
    "signing keys whose end is not recorded once": """
        SELECT k.kid FROM signing_keys k LEFT JOIN audit_events a ON a.event = 'key.retired' AND a.target = k.kid
        GROUP BY k.kid HAVING count(a.id) <> (k.retires_at IS NOT NULL)::int
    """,
    "recorded signing keys that are not there": """
        SELECT a.target FROM audit_events a LEFT JOIN signing_keys k ON k.kid = a.target
        WHERE a.event = 'key.created' AND k.kid IS NULL
    """,
    "acts that one request did twice": """
        SELECT a.request_id || ' ' || a.event FROM audit_events a
        WHERE a.request_id <> ''
            AND a.event IN ('grant.password', 'api_key.created', 'user.registered', 'user.disabled', 'password.changed')
        GROUP BY a.request_id, a.event HAVING count(*) <> 1
    """,
}
_ON_REGISTRATION: Final = ("user.registered", "email_verification.requested")
_KEYS: Final = """
    SELECT kid, CASE WHEN activates_at > now() THEN 'next' WHEN retires_at IS NULL THEN 'active' ELSE 'retiring' END
        AS state
    FROM signing_keys WHERE compromised_at IS NULL AND (removed_at IS NULL OR removed_at > now())
"""
_IDLE: Final = """
    SELECT pid, application_name, now() - state_change FROM pg_stat_activity
    WHERE datname = current_database() AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()
"""
_BAD_LOG: Final = re.compile(
    r'never retrieved|never awaited|Traceback|ResourceWarning|^Fatal|"level":"(?:error|critical)"|"status":5(?!03\b)'
)
_LONGEST_LINE: Final = 1500


async def breaches(stage: Stage, crowd: Crowd, *, used_up: int = 4) -> list[str]:
    """Return all that is not as it must be, once everybody has stopped; uses up so many sessions to find out."""
    return [*await told_and_stored(stage, crowd), *await one_live_token_each(stage, crowd, used_up)]


async def told_and_stored(stage: Stage, crowd: Crowd) -> list[str]:
    """Return everything that is not as it must be, once everybody has stopped; nothing if all is well."""
    hands, ledger = crowd.hands, crowd.ledger
    await hands.services.db.engine.dispose()  # what broke may have cut our own connections as well
    found = list(ledger.complaints)
    found += await consistent(hands)
    for account in ledger.accounts:
        found += [f"{account.username}: {fault}" for fault in await _account(hands, account)]
    found += await _chain(stage, hands)
    found += await _signing_keys(stage, crowd)
    found += await left_open(stage)
    found += in_logs(stage.log_text())
    return found


async def consistent(hands: Service) -> list[str]:
    """Return what the database holds of only one half, as one snapshot shows it; true at any moment."""

    async def look(tx: Transaction) -> list[str]:
        found = []
        await tx.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        for what, statement in _TOGETHER.items():
            rows = [row[0] for row in (await tx.execute(text(statement))).all()]
            if rows:
                found.append(f"{len(rows)} {what}: {', '.join(map(str, rows[:3]))}")
        return found

    return await hands.within(look)


async def behind_what_was_told(hands: Service, ledger: Ledger) -> list[str]:
    """
    Return the live sessions of which the database knows less than their owners were told; true at any moment.

    What was told is looked at first: the database may only be ahead of it.
    """
    told = {session.id: (len(session.tokens) - 1, session) for account in ledger.accounts for session in account.live}
    rows = await hands.execute(select(refresh_families.c.id, refresh_families.c.generation))
    stored = {row.id: row.generation for row in rows}
    behind = [
        f"{family}: told {generation}, stored {stored.get(family)}"
        for family, (generation, session) in told.items()
        if stored.get(family, -1) < generation and not session.over
    ]
    return [f"{len(behind)} sessions are behind what was told: {', '.join(behind[:3])}"] if behind else []


# -- one account ------------------------------------------------------------------------------------------------------


async def _account(hands: Service, account: Account) -> list[str]:
    """Compare an account with its rows: what was acknowledged is there, and nothing else but what nobody knew of."""
    row = (await hands.execute(select(users).where(users.c.id == account.id)))[0]
    found = []
    if row.name != account.name:
        found.append(f"the acknowledged name is {account.name!r}, the stored one {row.name!r}")
    if not row.enabled:
        found.append("is disabled although an operator was told otherwise")
    families = await hands.execute(select(refresh_families).where(refresh_families.c.user_id == account.id))
    stored = {family.id: family for family in families}
    for session in account.sessions:
        found += _session(hands, session, stored.get(session.id), row.epoch)
    recorded = Counter[str]()
    told = audit_events.c.target.in_([str(account.id), *map(str, stored), *(key.id for key in account.keys)])
    mine = audit_events.c.actor == str(account.id)
    for event in await hands.execute(select(audit_events.c.event).where(told | mine)):
        recorded[event.event] += 1
    expected = account.done + Counter({name: int(account.registered) for name in _ON_REGISTRATION})
    for event in sorted({*expected, *account.unknown, *recorded} - {"sign_in.failed", "api_key.refused"}):
        least, most = expected[event], expected[event] + account.unknown[event]
        if not least <= recorded[event] <= most:
            found.append(f"{event} was acknowledged {least} to {most} times, and recorded {recorded[event]} times")
    return found


def _session(hands: Service, session: Session, row: Any, epoch: int) -> Iterator[str]:
    """Compare a session with its row: its newest token is the one that was handed out last, after exactly as many."""
    if row is None:
        yield f"the session {session.id} was acknowledged, and is not there"
        return
    over = row.revoked_at is not None or row.user_epoch != epoch
    if over is not bool(session.over):
        yield f"the session {session.id} is {session.over or 'live'} as far as its owner knows; over in fact: {over}"
    tokens = [hands.services.families.read(Secret(token)) for token in session.tokens]
    generations = [token.generation for token in tokens if token is not None]
    if generations != list(range(len(session.tokens))):
        yield f"the tokens of {session.id} are of the generations {generations}"
    # A session that ended may have moved on once more: that its owner heard nothing of it is why it ended.
    newest = GenuineToken(row.id, row.generation, row.nonce)
    parent = GenuineToken(row.id, row.generation - 1, row.parent_nonce or b"")
    if tokens[-1] != newest and not (session.over == "reuse" and tokens[-1] == parent):
        yield f"the newest token of {session.id} that was handed out is not the stored one ({row.generation})"


# -- the service as a whole -------------------------------------------------------------------------------------------


async def _chain(stage: Stage, hands: Service) -> list[str]:
    """Seal what is left, and walk along the whole chain; every seal that a replica logged must be in it."""
    anchors = [Anchor(line["seq"], bytes.fromhex(line["mac"])) for line in logged(stage, "audit.sealed")]
    while (sealed := await hands.within(hands.services.audit_chain.seal)).count:
        anchors.append(Anchor(sealed.seq, sealed.mac))
    walk = hands.services.audit_chain.verification(*anchors)
    while await hands.within(walk.advance):
        pass
    found = [] if walk.fault is None else [f"the audit chain does not hold at {walk.fault.seq}: {walk.fault.sentence}"]
    return found + ([f"{walk.unsealed} audit rows could not be sealed"] if walk.unsealed else [])


async def _signing_keys(stage: Stage, crowd: Crowd) -> list[str]:
    """One key signs, at every replica the same, and one waits; every replica publishes all that can matter."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        rows = await crowd.hands.execute(text(_KEYS))
        standing = {state: {row.kid for row in rows if row.state == state} for state in ("active", "next", "retiring")}
        published = {row.kid for row in rows}
        seen = {replica.name: await replica.published() for replica in stage.serving}
        signing = {replica.name: await _signs_with(replica, crowd.clients.machine) for replica in stage.serving}
        if (
            len(standing["active"]) == len(standing["next"]) == 1
            and all(kids == published for kids in seen.values())
            and set(signing.values()) <= standing["active"]
        ):
            return []
        if time.monotonic() > deadline:
            return [f"signing keys: {standing}; published: {seen}; signing: {signing}"]
        await asyncio.sleep(0.1)


async def _signs_with(replica: Replica, machine: Registered) -> str:
    async with connected() as http:
        form = {"grant_type": "client_credentials", **machine.form}
        answer = await http.post(f"{replica.url}/token", data=form)
    return key_id(answer.json()["access_token"]) if answer.status_code == 200 else f"none: {answer.status_code}"


async def left_open(stage: Stage) -> list[str]:
    """Return the sessions of PostgreSQL that stay in a transaction in which nothing happens."""
    deadline = time.monotonic() + _PATIENCE
    with await asyncio.to_thread(stage.connect) as connection:
        before = {pid: (name, since) for pid, name, since in connection.execute(_IDLE)}
        while before:
            await asyncio.sleep(0.05)
            now = {pid: since for pid, _, since in connection.execute(_IDLE)}
            # The same transaction, only older: jobs have short ones all the time.
            before = {pid: told for pid, told in before.items() if now.get(pid, told[1]) > told[1]}
            if before and time.monotonic() > deadline:
                return [f"{len(before)} connections are left idle in a transaction: {before}"]
    return []


def in_logs(log: str) -> list[str]:
    """Return what a log says that speaks of a fault of ours."""
    lines = [line for line in log.splitlines() if _BAD_LOG.search(line)]
    return [f"logged, {len(lines)} such lines: {line[:_LONGEST_LINE]}" for line in lines[:3]]


def logged(stage: Stage, event: str) -> Iterator[dict[str, Any]]:
    """Yield the replicas' log lines about one event; a line that a kill has cut off is none."""
    for line in stage.log_text().splitlines():
        if f'"event":"{event}"' in line and line.startswith("{") and line.endswith("}"):
            yield json.loads(line)


# -- by its behaviour -------------------------------------------------------------------------------------------------


async def one_live_token_each(stage: Stage, crowd: Crowd, most: int) -> list[str]:
    """
    Use up some sessions: the newest token works, and once; every older one is refused, and takes the session with it.

    What was acknowledged is shown to another replica than the one that says so, as far as there are two.
    """
    app, found = crowd.clients.app, []
    origins = [replica.url for replica in stage.serving]
    sessions = [session for account in crowd.ledger.accounts for session in account.live][-most:]
    if not all(map(crowd.ledger.rested, sessions)):
        await asyncio.sleep(REST)

    async with connected() as http:

        async def refresh(token: str, at: int) -> Any:
            form = {"grant_type": "refresh_token", "refresh_token": token, **app.form}
            return await http.post(f"{origins[at % len(origins)]}/token", data=form)

        for number, session in enumerate(sessions):
            first = await refresh(session.tokens[-1], number)
            if first.status_code != 200:
                found.append(f"the newest token of {session.id} is refused: {first.text}")
                continue
            older = session.tokens[-1 - number % len(session.tokens)]
            if (again := await refresh(older, number + 1)).status_code != 400:
                found.append(f"an older token of {session.id} still works: {again.status_code}")
            if (newer := await refresh(first.json()["refresh_token"], number)).status_code != 400:
                found.append(f"{session.id} has outlived the replay of an older token: {newer.status_code}")
    return found
