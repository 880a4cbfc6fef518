"""
Who waits for keys and who does not, with a clock that the test moves and an issuer that does what the test says.

The fetches run in threads, as always; where a test looks at what one has changed, it has waited for its end.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.verifier import KeysUnavailable, TokenRefused
from identity_service.verifier.jwks import BadKeySet, Fetched, Keys
from identity_service.verifier.keys import Flight, KeyCache
from tests.support.clock import UnixClock
from tests.support.issuer import private_key, wait_for_fetches

START = 1_800_000_000.0
FRESH, USABLE, MAX_STALE = 300.0, 900.0, 86400.0
_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds


class Script:
    """A source of keys. `asked` has an entry for each fetch: whether it was to go past the caches."""

    issuer = "https://id.example"

    def __init__(self, *kids: str) -> None:
        self.fetched = Fetched(keys_named(*kids), FRESH, USABLE)
        self.fault: Exception | None = None
        self.asked: list[bool] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def fetch(self, *, past_caches: bool) -> Fetched:
        self.asked.append(past_caches)
        assert self.may_answer.wait(_PATIENCE)
        if self.fault:
            raise self.fault
        return self.fetched


def keys_named(*kids: str) -> Keys:
    return {kid: private_key("k1").public_key() for kid in kids}


class Stage:
    """
    A cache, its source and its clock.

    Whatever changes the scene waits first until every fetch has ended, so that none of them sees half of the change.
    """

    def __init__(self, *kids: str, **options: Any) -> None:
        self.clock = UnixClock(START)
        self.source = Script(*kids)
        self.cache = KeyCache(self.source, self.clock, **{"max_stale": MAX_STALE, **options})  # type: ignore[arg-type]

    # -- the scene ------------------------------------------------------------------------------------------------

    def at(self, seconds: float) -> None:
        """Let it be so many seconds after the start."""
        self._settle()
        self.clock.ahead = seconds

    def publish(self, *kids: str, usable: float = USABLE) -> None:
        """Let the issuer answer with these keys from now on."""
        self._settle()
        self.source.fetched = Fetched(keys_named(*kids), FRESH, usable)

    def fail(self, fault: Exception | None = None) -> None:
        """Let every fetch fail from now on."""
        self._settle()
        self.source.fault = fault or ConnectionRefusedError("nobody there")

    def recover(self) -> None:
        """Let them succeed again."""
        self._settle()
        self.source.fault = None

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Hold the answers back until the block is left."""
        self._settle()
        self.source.may_answer.clear()
        try:
            yield
        finally:
            self.source.may_answer.set()

    def _settle(self) -> None:
        if self.source.may_answer.is_set():
            wait_for_fetches()

    # -- the play -------------------------------------------------------------------------------------------------

    @property
    def asked(self) -> list[bool]:
        """The fetches so far: whether each was to go past the caches."""
        self._settle()
        return self.source.asked

    @property
    def fetches(self) -> int:
        """How many fetches there were."""
        return len(self.asked)

    @property
    def fresh(self) -> bool:
        """Whether k1 is had without a word to anybody."""
        self._settle()
        return self.cache.find("k1") is not None

    def look(self, kid: str = "k1", *, waited: bool = False) -> rsa.RSAPublicKey | Flight:
        """Ask as a request does that finds no fresh key."""
        return self.cache.look(kid, waited=waited)

    def at_once(self, kid: str = "k1") -> bool:
        """Return whether the key is had without waiting."""
        return isinstance(self.look(kid), rsa.RSAPublicKey)

    def known(self, kid: str = "k1") -> bool:
        """Ask as a request does, which waits for as many fetches as it is told to; return whether the key is had."""
        for flights in range(4):
            found = self.look(kid, waited=flights > 0)
            if not isinstance(found, Flight):
                return True
            found.landed.result(_PATIENCE)
        pytest.fail("nobody should have to wait for a fifth fetch")

    def refused(self, kid: str) -> bool:
        """Ask likewise; return whether the key is known not to be published."""
        with pytest.raises(TokenRefused) as refused:
            self.known(kid)
        return refused.value.reason == "kid_unknown"

    def unavailable(self, kid: str = "k1") -> bool:
        """Ask likewise; return whether nobody can tell."""
        with pytest.raises(KeysUnavailable):
            self.known(kid)
        return True


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    wait_for_fetches()


@pytest.fixture
def stage() -> Stage:
    """A cache that has just fetched the key k1."""
    stage = Stage("k1")
    assert stage.known("k1")
    return stage


# -- while all is well ------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_before_it_is_needed() -> None:
    stage = Stage("k1")
    assert not stage.fresh
    assert stage.fetches == 0


@pytest.mark.rfc("9111", "4.2")
def test_a_fresh_key_is_found_without_asking(stage: Stage) -> None:
    assert stage.cache.find("k1") is stage.source.fetched.keys["k1"]
    assert stage.look("k1") is stage.source.fetched.keys["k1"]
    stage.at(0.75 * FRESH - 0.01)
    assert stage.fresh
    assert stage.at_once()
    assert stage.asked == [False]


@pytest.mark.rfc("5861", "3")
def test_a_refresh_begins_before_the_keys_are_stale_and_nobody_waits_for_it(stage: Stage) -> None:
    stage.at(0.9 * FRESH)
    assert not stage.fresh, "somebody has to notice"
    with stage.silence():
        assert all(stage.at_once() for _ in range(100))
    assert stage.asked == [False, False], "one fetch, for however many requests"
    assert stage.fresh, "fresh again"
    stage.at(0.9 * FRESH + 0.75 * FRESH - 0.01)
    assert stage.fresh


@pytest.mark.rfc("9111", "4.2.3")
def test_the_time_that_an_answer_takes_is_part_of_its_age(stage: Stage) -> None:
    stage.at(1000)
    with stage.silence():
        flight = stage.look()
        assert isinstance(flight, Flight)
        stage.at(1100)
    assert stage.known()
    stage.at(1000 + 0.9 * FRESH)
    assert not stage.fresh
    stage.fail()
    stage.at(1000 + MAX_STALE)
    assert stage.unavailable()


def test_a_fleet_that_started_together_does_not_ask_together() -> None:
    """Each refreshes at a time of its own, between three quarters and nine tenths of the freshness."""
    fleet = [Stage("k1") for _ in range(64)]

    def have_asked_after(part: float) -> int:
        for stage in fleet:
            stage.at(part * FRESH)
            assert stage.at_once()
        return sum(stage.fetches > 1 for stage in fleet)

    assert all(stage.known() for stage in fleet)
    assert have_asked_after(0.7499) == 0
    assert 0 < have_asked_after(0.825) < len(fleet)
    assert have_asked_after(0.9) == len(fleet)


@pytest.mark.rfc("5861", "3")
def test_until_the_keys_are_overdue_nobody_waits(stage: Stage) -> None:
    stage.at(USABLE - 0.01)
    with stage.silence():
        assert stage.at_once()


@pytest.mark.rfc("5861", "3")
def test_for_overdue_keys_everybody_waits(stage: Stage) -> None:
    """What has not been asked for so long may be anything by now."""
    stage.publish("k2")
    stage.at(USABLE)
    with stage.silence():
        flight = stage.look("k1")
        assert isinstance(flight, Flight)
        assert stage.look("k2") is flight
        assert not flight.landed.cancel(), "who stops waiting does not end it for the others"
        assert not flight.landed.done()
    assert stage.known("k2")
    assert stage.refused("k1")


def test_a_set_without_grace_is_waited_for_when_it_is_stale_and_not_before() -> None:
    """The issuer said nothing about using it while it is asked again."""
    for now, waits in ((FRESH - 0.01, False), (FRESH, True)):
        stage = Stage()
        stage.publish("k1", usable=FRESH)
        assert stage.known()
        stage.at(now)
        with stage.silence():
            assert stage.at_once() is not waits


@pytest.mark.case("JWT-08")
def test_a_key_that_has_left_the_set_is_refused_from_the_next_fetch_on() -> None:
    stage = Stage("k1", "k2")
    assert stage.known("k1")
    stage.publish("k2")
    stage.at(0.9 * FRESH)
    assert stage.at_once("k1"), "nobody has told yet"
    assert not stage.fresh
    assert stage.refused("k1")
    assert stage.known("k2")


@pytest.mark.case("JWT-18")
def test_a_key_that_came_after_the_last_fetch_is_found_by_one_more(stage: Stage) -> None:
    """As after an emergency, when the new key could not be published before it signed."""
    stage.publish("k1", "k2")
    stage.at(1)
    assert stage.known("k2")
    assert stage.known("k1")
    assert stage.asked == [False, True], "and that one past every cache on the way"


def test_a_key_that_was_published_before_it_signs_costs_nobody_a_wait(stage: Stage) -> None:
    stage.publish("k1", "k2")
    stage.at(0.9 * FRESH)
    assert stage.at_once("k1")
    with stage.silence():
        assert stage.at_once("k2")
    assert stage.asked == [False, False]


def test_who_is_held_up_on_the_way_to_the_lock_causes_no_fetch_of_his_own() -> None:
    """The clock is read under the lock: whoever reads it before would find newer keys overdue."""
    stage = Stage("k1")
    inside, go_on = threading.Event(), threading.Event()
    read = stage.cache._clock

    def clock() -> float:
        now = read()
        if threading.current_thread().name == "held up":
            inside.set()
            go_on.wait(0.3)
        return now

    stage.cache._clock = clock
    slow = threading.Thread(target=stage.look, name="held up")
    slow.start()
    assert inside.wait(_PATIENCE)
    stage.clock.ahead += 1
    assert stage.known()
    go_on.set()
    slow.join(_PATIENCE)
    assert stage.fetches == 1


# -- while the issuer is away -----------------------------------------------------------------------------------------


def test_stale_keys_are_used_while_the_issuer_fails_and_only_the_first_has_to_wait(stage: Stage) -> None:
    stage.fail()
    stage.at(USABLE + 3600)
    assert isinstance(stage.look(), Flight)
    assert stage.known()
    assert stage.fetches == 2
    with stage.silence():
        assert stage.at_once()
        stage.at(USABLE + 3601)
        assert stage.at_once(), "although a fetch is under way"
    assert stage.fetches == 3


def test_nobody_waits_if_the_refresh_in_the_background_has_failed(stage: Stage) -> None:
    stage.fail()
    stage.at(0.9 * FRESH)
    assert stage.at_once()
    stage.at(USABLE)
    with stage.silence():
        assert stage.at_once()


def test_attempts_back_off_to_half_a_minute(stage: Stage) -> None:
    stage.fail()
    now = 0.9 * FRESH
    for attempt, pause in enumerate((1, 2, 4, 8, 16, 30, 30, 30), 2):
        stage.at(now)
        assert stage.at_once()
        assert stage.fetches == attempt
        now += pause
        stage.at(now - 0.01)
        assert stage.at_once()
        assert stage.fetches == attempt, f"{pause} seconds have not passed yet"


def test_after_a_success_all_is_as_before(stage: Stage) -> None:
    stage.fail()
    for now in (1000, 1001, 1003):
        stage.at(now)
        assert stage.at_once() or stage.known()
    assert stage.fetches == 4
    stage.recover()
    stage.at(1007)
    assert stage.at_once()
    assert stage.fresh
    stage.at(1007 + USABLE)
    assert isinstance(stage.look(), Flight), "who finds overdue keys waits again"
    stage.fail()
    stage.at(1007 + 2 * USABLE)
    assert stage.known()
    stage.at(1007 + 2 * USABLE + 1)
    assert stage.at_once()
    assert stage.fetches == 8, "and the pauses are short again"


@pytest.mark.parametrize("max_stale", [3600.0, MAX_STALE])
def test_keys_that_nobody_has_confirmed_for_too_long_are_given_up(max_stale: float) -> None:
    stage = Stage("k1", max_stale=max_stale)
    assert stage.known()
    stage.fail()
    stage.at(max_stale - 0.01)
    assert stage.known()
    stage.at(max_stale)
    assert stage.unavailable()
    asked = stage.fetches
    assert stage.unavailable()
    assert stage.fetches == asked, "the pauses between attempts are kept"
    stage.at(max_stale + 60)
    assert isinstance(stage.look(), Flight)
    stage.recover()
    stage.at(max_stale + 120)
    assert stage.known(), "when the issuer is back, so are they"


def test_an_outage_may_last_as_long_as_it_likes() -> None:
    stage = Stage("k1", max_stale=10 * MAX_STALE)
    assert stage.known()
    stage.fail()
    now = 1000.0
    for _ in range(1100):
        stage.at(now)
        assert stage.known()
        now += 31
    stage.recover()
    stage.at(now)
    assert stage.at_once()
    assert stage.fresh


def test_failed_attempts_prolong_nothing(stage: Stage) -> None:
    stage.fail()
    for now in range(1000, int(MAX_STALE), 5000):
        stage.at(now)
        assert stage.known()
    stage.at(MAX_STALE)
    assert stage.unavailable()


def test_with_no_tolerance_keys_are_used_for_as_long_as_the_issuer_allows() -> None:
    stage = Stage("k1", max_stale=0)
    assert stage.known()
    stage.fail()
    stage.at(USABLE - 0.01)
    assert stage.at_once()
    stage.at(USABLE)
    assert stage.unavailable()


def test_without_any_keys_nobody_can_tell(stage: Stage) -> None:
    stage = Stage("k1")
    stage.fail()
    assert stage.unavailable()
    assert stage.fetches == 1
    stage.at(0.99)
    assert stage.unavailable()
    assert stage.fetches == 1, "an issuer in trouble is not asked for every token"
    stage.recover()
    stage.at(1)
    assert stage.known()


def test_a_set_of_no_use_does_not_replace_a_good_one(stage: Stage) -> None:
    """Half a deployment, an error page with status 200: the keys that are held are still the issuer's."""
    stage.fail(BadKeySet("the key set holds no RS256 key"))
    stage.at(0.9 * FRESH)
    assert stage.at_once()
    stage.at(USABLE)
    assert stage.at_once()


def test_whatever_a_fetch_dies_of_the_next_one_can_begin(stage: Stage) -> None:
    for number, fault in enumerate((TimeoutError(), MemoryError(), RecursionError(), UnicodeError(), RuntimeError())):
        stage.fail(fault)
        stage.at(1000 * (number + 1))
        assert stage.known()
    stage.recover()
    stage.at(10_000)
    assert stage.known()
    assert stage.fresh


def test_a_machine_that_has_no_more_threads_goes_on_with_what_it_has(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert Stage("k1").unavailable()
        stage.at(USABLE)
        assert stage.known()
        assert stage.unavailable("k2")
    stage.at(USABLE + 60)
    assert stage.known()
    assert stage.fresh


def test_a_failure_is_logged_with_its_cause_and_new_keys_by_name(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "identity_service.verifier")
    stage.fail(BadKeySet("https://id.example/jwks answered 502"))
    stage.at(1000)
    assert stage.known()
    failed = "the keys of https://id.example could not be fetched: BadKeySet: https://id.example/jwks answered 502"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, failed)]
    caplog.clear()
    stage.recover()
    stage.publish("k3", "k2")
    stage.at(1100)
    assert stage.known("k2")
    stage.at(1100 + USABLE)
    assert stage.known("k2")
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert said == [(logging.INFO, "the keys of https://id.example are now: k2, k3")], "once, not with every fetch"


# -- a clock that was set ---------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_makes_old_keys_no_younger(stage: Stage) -> None:
    stage.at(-3600)
    assert not stage.fresh
    assert isinstance(stage.look(), Flight)
    assert stage.fresh
    stage.at(-3600 + 0.9 * FRESH)
    assert not stage.fresh, "counted by the clock as it is now"


def test_a_clock_that_was_set_back_during_an_outage_leaves_what_there_is(stage: Stage) -> None:
    stage.fail()
    stage.at(-3600)
    assert stage.known()
    assert stage.at_once()
    stage.recover()
    stage.at(-3500)
    assert stage.at_once()
    assert stage.fresh


def test_a_clock_that_was_set_back_after_a_failure_does_not_keep_anybody_from_trying(stage: Stage) -> None:
    stage.fail()
    stage.at(1000)
    assert stage.known()
    stage.recover()
    stage.at(500)
    assert stage.at_once()
    assert stage.fresh


def test_a_clock_that_was_set_back_after_a_stranger_came_lets_the_next_be_looked_for(stage: Stage) -> None:
    assert stage.refused("stranger")
    stage.at(-100)
    assert stage.known("k1")
    stage.publish("k1", "k2")
    assert stage.known("k2")


def test_a_clock_that_jumped_ahead_costs_one_fetch(stage: Stage) -> None:
    stage.at(10 * MAX_STALE)
    assert stage.known()
    assert stage.fetches == 2


# -- ids that nobody knows --------------------------------------------------------------------------------------------


@pytest.mark.case("JWT-05")
def test_strangers_cause_one_fetch_in_half_a_minute_however_many_they_are(stage: Stage) -> None:
    for start in (0, 30, 60):
        stage.at(start)
        assert stage.refused(f"first-{start}")
        for number in range(200):
            stage.at(start + number * 0.149)
            assert stage.refused(f"stranger-{start}-{number}")
            assert stage.at_once("k1"), "nobody else waits"
    assert stage.asked == [False, True, True, True]


def test_a_stranger_has_to_wait_only_where_a_fetch_may_help(stage: Stage) -> None:
    with stage.silence():
        assert isinstance(stage.look("stranger"), Flight)
        assert stage.look("other") is stage.look("stranger"), "the same fetch answers both"
        assert stage.at_once("k1")
    wait_for_fetches()
    with pytest.raises(TokenRefused):
        stage.look("third")


@pytest.mark.case("JWT-05")
def test_an_id_that_was_looked_for_in_vain_is_looked_for_ever_more_rarely(stage: Stage) -> None:
    now, asked = 0.0, 1
    for pause in (30, 60, 120, 240, 300, 300, 300):
        stage.at(now)
        assert stage.known("k1")
        asked = stage.fetches
        assert stage.refused("stranger")
        assert stage.fetches == asked + 1
        stage.at(now + pause - 0.01)
        assert stage.known("k1")
        asked = stage.fetches
        assert stage.refused("stranger")
        assert stage.fetches == asked, f"{pause} seconds have not passed yet"
        now += pause


def test_who_did_not_wait_is_not_held_to_have_been_looked_for(stage: Stage) -> None:
    """A new key is first met in the shadow of a stranger; it is looked for as soon as that is allowed again."""
    assert stage.refused("stranger")
    stage.publish("k1", "k2")
    stage.at(29)
    assert stage.refused("k2")
    stage.at(30)
    assert stage.known("k2")


def test_an_id_that_was_unknown_is_accepted_as_soon_as_it_is_published(stage: Stage) -> None:
    assert stage.refused("k2")
    stage.at(30)
    assert stage.refused("k2")
    stage.publish("k1", "k2")
    stage.at(60)
    assert stage.refused("k2"), "it is looked for every minute by now"
    assert stage.refused("another"), "whose fetch brings the new set"
    assert stage.known("k2")


@pytest.mark.case("JWT-05")
def test_of_the_ids_that_were_looked_for_in_vain_a_thousand_are_remembered(stage: Stage) -> None:
    """They come from strangers, who could fill any memory; the oldest are forgotten."""
    kids = [f"stranger-{number}" for number in range(1500)]

    def look_for(some: Sequence[str]) -> None:
        with stage.silence():
            flights = {stage.look(kid) for kid in some}
        wait_for_fetches()
        assert all(isinstance(flight, Flight) for flight in flights)
        assert len(flights) == 1
        for kid in some:
            with pytest.raises(TokenRefused):
                stage.look(kid, waited=True)

    look_for(kids)
    assert len(stage.cache._unknown) == 1000
    stage.at(30)
    look_for([kids[0], kids[-1]])
    assert len(stage.cache._unknown) == 1000
    stage.at(61)
    with pytest.raises(TokenRefused):
        stage.look(kids[-1])  # remembered from before: looked for every minute by now
    assert isinstance(stage.look(kids[0]), Flight)  # had been forgotten: met for the first time half a minute ago


def test_while_the_issuer_fails_an_unknown_id_may_be_a_new_key(stage: Stage) -> None:
    """To refuse its tokens would sign people out for an outage."""
    stage.fail()
    assert stage.unavailable("k2")
    assert stage.asked == [False, True]
    stage.at(1)
    assert stage.unavailable("k2")
    assert stage.unavailable("k3")
    assert stage.fetches == 2, "one attempt in half a minute"
    assert stage.fresh, "known keys are none the worse for it"
    stage.recover()
    stage.publish("k1", "k2")
    stage.at(30)
    assert stage.known("k2")
    assert stage.refused("k3")


def test_a_fetch_that_is_under_way_is_awaited_before_another_is_sent_past_the_caches(stage: Stage) -> None:
    """It may bring the key; and if a cache on the way answered it, the next one asks the issuer itself."""
    stage.at(0.9 * FRESH)
    with stage.silence():
        assert stage.at_once("k1")
        ordinary = stage.look("k2")
        assert isinstance(ordinary, Flight)
        assert not ordinary.past_caches
    ordinary.landed.result(_PATIENCE)
    stage.publish("k1", "k2")
    with stage.silence():
        second = stage.look("k2", waited=True)
        assert isinstance(second, Flight)
        assert second.past_caches
    second.landed.result(_PATIENCE)
    assert stage.at_once("k2")
    assert stage.asked == [False, False, True]


def test_for_an_unknown_id_on_a_cold_cache_the_issuer_is_asked_past_the_caches_too() -> None:
    """A cache on the way may have answered the first fetch with a set from before the rotation."""
    stage = Stage("k1")
    assert stage.refused("k2")
    assert stage.asked == [False, True]


# -- keys to begin with -----------------------------------------------------------------------------------------------


def test_initial_keys_do_while_the_issuer_has_not_answered() -> None:
    stage = Stage(initial=keys_named("k1"))
    stage.fail()
    assert stage.known("k1")
    assert stage.fetches == 1, "it is asked first"
    assert stage.at_once("k1")
    assert stage.unavailable("k2")
    stage.at(MAX_STALE - 0.01)
    assert stage.at_once("k1")
    stage.at(MAX_STALE)
    assert stage.unavailable("k1")


def test_initial_keys_are_gone_when_the_issuer_has_answered() -> None:
    stage = Stage("k2", initial=keys_named("k1"))
    assert stage.known("k2")
    assert stage.refused("k1")
    stage.fail()
    stage.at(USABLE)
    assert stage.known("k2")
    stage.at(USABLE + 100)
    assert stage.unavailable("k1")


def test_initial_keys_do_no_longer_than_any_others() -> None:
    stage = Stage(initial=keys_named("k1"), max_stale=0)
    stage.fail()
    assert stage.unavailable("k1")
