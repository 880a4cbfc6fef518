"""What the tests of the verifier are handed: an issuer, a clock, and a verifier that knows both."""

import time
from collections.abc import Iterator

import pytest

from identity_service.verifier import TokenVerifier
from tests.support.clock import UnixClock
from tests.support.issuer import AUDIENCE, Issuer, wait_for_fetches


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
