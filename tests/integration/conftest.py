"""What several of these tests are handed: an operator; for those of the verifier an issuer, a clock, a verifier."""

import time
from collections.abc import Iterator

import pytest

from identity_service.verifier import TokenVerifier
from tests.support.clock import UnixClock
from tests.support.issuer import AUDIENCE, Issuer, wait_for_fetches
from tests.support.operators import Operator, an_operator
from tests.support.service import Service


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """An issuer that has the key k1."""
    with Issuer() as issuer:
        yield issuer
    wait_for_fetches()


@pytest.fixture
def clock() -> UnixClock:
    """A clock that stands still at the time of the test."""
    return UnixClock(time.time())


@pytest.fixture
def verifier(issuer: Issuer, clock: UnixClock) -> TokenVerifier:
    """A verifier that has fetched nothing yet."""
    return TokenVerifier(issuer.url, AUDIENCE, clock=clock)


@pytest.fixture
async def boss(service: Service) -> Operator:
    """A signed-in operator who holds everything."""
    return await an_operator(service)
