"""What a refresh token that did not rotate is: every row of the table, their order, and the whole of it at random."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from identity_service.accounts.refresh_families import FamilyState, GenuineToken, Verdict, judge

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
FAMILY = uuid.UUID(int=1)
OURS, THEIRS = "cl_ours", "cl_theirs"
PARENT, CURRENT, STRANGE = b"parent--", b"current-", b"strange-"
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# Generation 5 of a live family, rotated 30 seconds ago under KEY.
LIVE = FamilyState(
    client_id=OURS,
    generation=5,
    nonce=CURRENT,
    parent_nonce=PARENT,
    retry_digest=KEY,
    rotated_at=at(-30),
    idle_expires_at=at(600),
    absolute_expires_at=at(6000),
    revoked=False,
    user_epoch=3,
    client_epoch=7,
    user_epoch_now=3,
    client_epoch_now=7,
)
REVOKED = replace(LIVE, revoked=True)
IDLE = replace(LIVE, idle_expires_at=NOW)
OVER = replace(LIVE, absolute_expires_at=NOW)


def token(generation: int, nonce: bytes) -> GenuineToken:
    return GenuineToken(FAMILY, generation, nonce)


NEWEST, PREDECESSOR, OLD = token(5, CURRENT), token(4, PARENT), token(3, b"older---")
AHEAD, TWIN = token(6, STRANGE), token(5, STRANGE)


def verdict(
    family: FamilyState | None,
    presented: GenuineToken,
    *,
    client: str = OURS,
    key: bytes | None = None,
    window: int = 0,
) -> Verdict:
    return judge(family, presented, client_id=client, retry_digest=key, retry_window=window, now=NOW)


# -- row by row -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presented", [NEWEST, PREDECESSOR, OLD, AHEAD, TWIN])
@pytest.mark.parametrize("client", [OURS, THEIRS])
def test_a_token_without_a_family_is_unknown(presented: GenuineToken, client: str) -> None:
    """No family, no verdict about anybody, whoever presents whatever."""
    assert verdict(None, presented, client=client, key=KEY, window=60) is Verdict.UNKNOWN


OUTDATED = {
    "user epoch on": replace(LIVE, user_epoch_now=4),
    "user epoch back": replace(LIVE, user_epoch_now=2),
    "client epoch on": replace(LIVE, client_epoch_now=8),
    "user disabled": replace(LIVE, user_epoch_now=None),
    "client disabled": replace(LIVE, client_epoch_now=None),
}
outdated_families = pytest.mark.parametrize("family", OUTDATED.values(), ids=OUTDATED)


@pytest.mark.parametrize("presented", [NEWEST, PREDECESSOR, OLD, AHEAD, TWIN])
@pytest.mark.parametrize("client", [OURS, THEIRS])
def test_a_revoked_family_comes_before_every_other_finding(presented: GenuineToken, client: str) -> None:
    """What is dead is not revoked again: not for a stranger, not for a replay, not for a restored database."""
    assert verdict(REVOKED, presented, client=client, key=KEY, window=60) is Verdict.REVOKED


@outdated_families
@pytest.mark.parametrize("presented", [NEWEST, PREDECESSOR, OLD, AHEAD, TWIN])
def test_an_epoch_that_moved_on_comes_before_a_stranger(family: FamilyState, presented: GenuineToken) -> None:
    """Whatever another client presents of a family that is over."""
    assert verdict(family, presented, client=THEIRS, key=KEY, window=60) is Verdict.REVOKED


@outdated_families
@pytest.mark.parametrize("presented", [NEWEST, PREDECESSOR, OLD])
def test_an_epoch_that_moved_on_comes_before_reuse_and_retries(family: FamilyState, presented: GenuineToken) -> None:
    """All that the row has seen is over."""
    assert verdict(family, presented, key=KEY, window=60) is Verdict.REVOKED


@outdated_families
@pytest.mark.parametrize("presented", [AHEAD, TWIN])
def test_a_token_from_a_time_that_is_lost_is_told_though_every_epoch_has_moved_on(
    family: FamilyState, presented: GenuineToken
) -> None:
    """As it does when a restored database is put right: these tokens show whom that concerns."""
    assert verdict(family, presented, key=KEY, window=60) is Verdict.AHEAD


@pytest.mark.parametrize("family", [LIVE, IDLE, OVER])
@pytest.mark.parametrize("presented", [NEWEST, PREDECESSOR, OLD, AHEAD, TWIN])
def test_another_client_ends_the_family_with_whatever_it_presents(family: FamilyState, presented: GenuineToken) -> None:
    """The client stands before generation, lifetime, key and window."""
    assert verdict(family, presented, client=THEIRS, key=KEY, window=60) is Verdict.FOREIGN_CLIENT


@pytest.mark.parametrize("family", [LIVE, IDLE, OVER])
@pytest.mark.parametrize("presented", [AHEAD, TWIN, token(6, CURRENT), token(500, PARENT), token(5, PARENT)])
def test_a_token_the_row_has_never_seen_means_a_restored_database(family: FamilyState, presented: GenuineToken) -> None:
    """It is not called reuse, and neither a key nor the window nor an end in time changes that."""
    assert verdict(family, presented, key=KEY, window=60) is Verdict.AHEAD


@pytest.mark.parametrize("family", [IDLE, OVER])
@pytest.mark.parametrize("key", [None, KEY, OTHER_KEY])
def test_the_current_token_past_an_end_is_expired(family: FamilyState, key: bytes | None) -> None:
    """At the very instant of the end, and before anybody looks at the key."""
    assert verdict(family, NEWEST, key=key) is Verdict.EXPIRED


def test_the_current_token_with_the_previous_key_is_a_mistake() -> None:
    """A key is for one rotation."""
    assert verdict(LIVE, NEWEST, key=KEY) is Verdict.KEY_REUSED


@pytest.mark.parametrize("key", [None, OTHER_KEY])
def test_the_current_token_of_a_live_family_is_to_be_tried_again(key: bytes | None) -> None:
    """It did not rotate a moment ago, and nothing is wrong with it."""
    assert verdict(LIVE, NEWEST, key=key) is Verdict.CURRENT


def test_a_row_without_a_key_is_not_equal_to_a_request_without_one() -> None:
    """Two absent keys are no evidence: neither of a retry nor of a key used twice."""
    unkeyed = replace(LIVE, retry_digest=None)
    assert verdict(unkeyed, NEWEST) is Verdict.CURRENT
    assert verdict(unkeyed, PREDECESSOR) is Verdict.REUSE


def test_the_predecessor_with_an_equal_key_is_a_retry() -> None:
    """However long ago the rotation was."""
    assert verdict(replace(LIVE, rotated_at=at(-599)), PREDECESSOR, key=KEY) is Verdict.RETRIED


@pytest.mark.parametrize(
    ("elapsed", "window", "expected"),
    [
        (0, 0, Verdict.REUSE),
        (-5, 0, Verdict.REUSE),
        (0, 1, Verdict.RETRIED),
        (-5, 1, Verdict.RETRIED),
        (-3600, 10, Verdict.RETRIED),
        (9.999999, 10, Verdict.RETRIED),
        (10, 10, Verdict.REUSE),
        (10.000001, 10, Verdict.REUSE),
        (59.999999, 60, Verdict.RETRIED),
        (60, 60, Verdict.REUSE),
    ],
)
def test_the_retry_window_is_half_open(elapsed: float, window: int, expected: Verdict) -> None:
    """No window admits nothing; a clock that went back counts as no time at all."""
    family = replace(LIVE, rotated_at=at(-elapsed))
    assert verdict(family, PREDECESSOR, window=window) is expected
    assert verdict(family, PREDECESSOR, key=OTHER_KEY, window=window) is expected


@pytest.mark.parametrize("family", [IDLE, OVER])
def test_a_permitted_retry_past_an_end_is_expired(family: FamilyState) -> None:
    """By its key or by the window: a retry does not outlive the family, and it is not called reuse."""
    assert verdict(family, PREDECESSOR, key=KEY) is Verdict.EXPIRED
    assert verdict(family, PREDECESSOR, window=60) is Verdict.EXPIRED


@pytest.mark.parametrize("family", [LIVE, IDLE, OVER])
@pytest.mark.parametrize(
    ("presented", "key", "window"),
    [
        (PREDECESSOR, None, 0),
        (PREDECESSOR, OTHER_KEY, 0),
        (PREDECESSOR, None, 30),
        (token(4, STRANGE), KEY, 60),
        (token(4, CURRENT), KEY, 60),
        (token(3, PARENT), KEY, 60),
        (OLD, KEY, 60),
        (token(0, STRANGE), KEY, 60),
    ],
    ids=["bare", "wrong key", "window over", "twin", "odd twin", "odd", "older", "first"],
)
def test_everything_else_is_reuse_even_past_an_end(
    family: FamilyState, presented: GenuineToken, key: bytes | None, window: int
) -> None:
    """Leniency is for the immediate predecessor, by generation and by nonce, and for nobody else."""
    assert verdict(family, presented, key=key, window=window) is Verdict.REUSE


def test_three_verdicts_end_the_family() -> None:
    """A retry, an expiry and a mistaken key cost nobody their session."""
    assert {found for found in Verdict if found.ends_family} == {Verdict.FOREIGN_CLIENT, Verdict.AHEAD, Verdict.REUSE}


# -- the table, written down a second time ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One question to the judge."""

    family: FamilyState | None
    presented: GenuineToken
    client: str
    key: bytes | None
    window: int


def outdated(case: Case) -> bool:
    return case.family.idle_expires_at <= NOW or case.family.absolute_expires_at <= NOW


def same_key(case: Case) -> bool:
    return case.key is not None and case.family.retry_digest is not None and case.key == case.family.retry_digest


def in_window(case: Case) -> bool:
    elapsed = max(0.0, (NOW - case.family.rotated_at).total_seconds())
    return case.window > 0 and elapsed < case.window


def is_current(case: Case) -> bool:
    return (case.presented.generation, case.presented.nonce) == (case.family.generation, case.family.nonce)


def is_predecessor(case: Case) -> bool:
    return (case.presented.generation + 1, case.presented.nonce) == (case.family.generation, case.family.parent_nonce)


def is_unseen(case: Case) -> bool:
    generation = case.family.generation
    return case.presented.generation > generation or (
        case.presented.generation == generation and case.presented.nonce != case.family.nonce
    )


TABLE: list[tuple[Callable[[Case], bool], Verdict]] = [
    (lambda case: case.family is None, Verdict.UNKNOWN),
    (lambda case: case.family.revoked, Verdict.REVOKED),
    (lambda case: is_unseen(case) and case.client == case.family.client_id, Verdict.AHEAD),
    (
        lambda case: (
            (case.family.user_epoch, case.family.client_epoch)
            != (case.family.user_epoch_now, case.family.client_epoch_now)
        ),
        Verdict.REVOKED,
    ),
    (lambda case: case.client != case.family.client_id, Verdict.FOREIGN_CLIENT),
    (lambda case: is_current(case) and outdated(case), Verdict.EXPIRED),
    (lambda case: is_current(case) and same_key(case), Verdict.KEY_REUSED),
    (is_current, Verdict.CURRENT),
    (lambda case: is_predecessor(case) and (same_key(case) or in_window(case)) and outdated(case), Verdict.EXPIRED),
    (lambda case: is_predecessor(case) and (same_key(case) or in_window(case)), Verdict.RETRIED),
    (lambda case: True, Verdict.REUSE),
]

instants = st.sampled_from((-61.0, -60.0, -10.0, -9.999999, -0.000001, 0.0, 0.000001, 5.0)).map(at)
nonces = st.sampled_from((PARENT, CURRENT, STRANGE))
keys = st.sampled_from((None, KEY, OTHER_KEY))
generations = st.integers(0, 3)


def often(usual: object, unusual: object) -> st.SearchStrategy[object]:
    """Deep rows of the table are met only when the rows before them do not match."""
    return st.sampled_from((usual, usual, usual, usual, usual, unusual))


states = st.builds(
    FamilyState,
    client_id=often(OURS, THEIRS),
    generation=generations,
    nonce=nonces,
    parent_nonce=st.one_of(st.none(), nonces),
    retry_digest=keys,
    rotated_at=instants,
    idle_expires_at=st.one_of(st.just(at(5)), instants),
    absolute_expires_at=st.one_of(st.just(at(5)), instants),
    revoked=often(False, True),
    user_epoch=st.just(1),
    client_epoch=st.just(1),
    user_epoch_now=st.one_of(st.just(1), often(1, 2), often(1, None)),
    client_epoch_now=st.one_of(st.just(1), often(1, 2), often(1, None)),
)
cases = st.builds(
    Case,
    family=st.one_of(states, states, states, states, st.none()),
    presented=st.builds(token, generations, nonces),
    client=often(OURS, THEIRS),
    key=keys,
    window=st.sampled_from((0, 0, 10, 60)),
)


@settings(max_examples=2000, derandomize=True, deadline=None)
@given(case=cases)
@example(case=Case(LIVE, NEWEST, OURS, KEY, 0))
@example(case=Case(IDLE, PREDECESSOR, OURS, KEY, 0))
@example(case=Case(IDLE, PREDECESSOR, OURS, None, 0))
def test_the_judge_agrees_with_the_table(case: Case) -> None:
    """The first row that matches wins, whatever the row, the token, the client, the key and the time."""
    expected = next(found for matches, found in TABLE if matches(case))
    assert verdict(case.family, case.presented, client=case.client, key=case.key, window=case.window) is expected


def test_the_random_cases_reach_every_row() -> None:
    """A property that never meets a row says nothing about it."""
    met: set[Verdict] = set()

    @settings(max_examples=800, derandomize=True, deadline=None)
    @given(case=cases)
    def collect(case: Case) -> None:
        met.add(next(found for matches, found in TABLE if matches(case)))

    collect()
    assert met == set(Verdict)
