"""
Key rotation under load, in its short form; `make prove-rotation` does the same with twenty rotations.

Two replicas as processes of their own, ten siblings with copies of the JWKS as old as its headers allow, three
rotations in accelerated time: at one of them both replicas stand at the lock at once, at one a replica is killed
between its writing and its commit, and one is forced by a compromise of the active key. What is done, and how, is
told in tests/rotation.
"""

import secrets
from collections.abc import Iterator

import pytest

from identity_service.infra.migrate import migrate
from tests.rotation.conductor import Trouble
from tests.rotation.proof import Outcome, Plan, prove
from tests.rotation.record import Record
from tests.support.servers import PostgresServer


@pytest.fixture
def keyless_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a migrated database in which nobody has made a key yet."""
    name = f"rotation_{secrets.token_hex(4)}"
    url = postgres_server.create_database(name)
    try:
        migrate(url)
        yield url
    finally:
        postgres_server.drop_database(name)


@pytest.mark.case("JWT-08")
@pytest.mark.case("JWT-18")
@pytest.mark.case("JWT-19")
@pytest.mark.case("OPS-13")
@pytest.mark.case("OPS-14")
async def test_rotation_under_load_with_a_kill_and_a_compromise_hurts_nobody(keyless_url: str) -> None:
    """
    One run of 20 seconds, and everything it has shown; it did enough to mean something only if all of this holds.

    No valid token is refused, from its first second to its last, however old a sibling's copy of the JWKS. No token
    is signed by a key that some cache might not have, or that leaves the JWKS before the token expires. Whoever meets
    or is killed on the way, every step is taken once, and nobody who asks for a token notices. Once a replica has
    polled, it neither signs with a compromised key, nor publishes it, nor accepts its tokens.
    """
    outcome = await prove(keyless_url, Plan.of(3))
    record = outcome.record
    assert record.refused.examples == []
    assert record.unpublished.examples == []
    assert record.resurrected.examples == []
    assert record.not_issued.examples == []
    assert record.faults.examples == []
    assert record.rotations == {Trouble.MEETING: 1, Trouble.KILLED_WRITING: 1, Trouble.COMPROMISE: 1}
    assert record.kills == {Trouble.KILLED_WRITING: 1}
    assert outcome.faults == []


def test_a_run_that_did_nothing_is_no_proof() -> None:
    """All three numbers are zero, and it fails on every count of what must have been done."""
    nothing = Outcome(Plan.of(3), Record(), notice=0, lived=0, took=0, waited=0)
    assert len(nothing.faults) == len(nothing.enough())
