"""Who calls a verifier: any number of coroutines, threads and loops at once, and processes that fork or end."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from identity_service.verifier import TokenRefused, TokenVerifier, VerifiedClaims
from tests.support.clock import UnixClock
from tests.support.issuer import AUDIENCE, JWKS, METADATA, Issuer

ROOT = Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds; what is waited for takes milliseconds


# -- many at once -----------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_before_a_token_comes(issuer: Issuer, verifier: TokenVerifier) -> None:
    for rubbish in ("", "x", "a.b.c", issuer.mint(header={"alg": "none"}), issuer.mint(header={"typ": "JWT"})):
        with pytest.raises(TokenRefused):
            verifier.verify_sync(rubbish)
    assert issuer.counts == (0, 0), "and not for a token that is refused whatever the keys are"


async def test_a_thousand_callers_on_a_cold_cache_cause_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    with issuer.silence():
        callers = [asyncio.create_task(verifier.verify(token)) for _ in range(1000)]
        await asyncio.to_thread(issuer.wait_until_asked, METADATA)
        assert not any(caller.done() for caller in callers)
    assert len({id(claims) for claims in await asyncio.gather(*callers)}) == 1000
    assert issuer.counts == (1, 1)


async def test_threads_and_coroutines_share_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    at_the_door = threading.Barrier(51)

    def in_a_thread() -> VerifiedClaims:
        at_the_door.wait(_PATIENCE)
        return verifier.verify_sync(token)

    with ThreadPoolExecutor(50) as threads:
        with issuer.silence():
            sync = [threads.submit(in_a_thread) for _ in range(50)]
            mixed = [asyncio.create_task(verifier.verify(token)) for _ in range(50)]
            await asyncio.to_thread(at_the_door.wait, _PATIENCE)
            await asyncio.to_thread(issuer.wait_until_asked, METADATA)
            await asyncio.sleep(0.1)  # lets whoever would ask for himself do so
        assert len(await asyncio.gather(*mixed)) == 50
        assert len([caller.result(_PATIENCE) for caller in sync]) == 50
    assert issuer.counts == (1, 1)


async def test_a_new_key_is_looked_for_once_by_all_who_wait_for_it(issuer: Issuer, verifier: TokenVerifier) -> None:
    assert await verifier.verify(issuer.mint())
    issuer.kids.append("k2")
    new, unknown = issuer.mint("k2"), issuer.mint("k3")
    results = await asyncio.gather(*(verifier.verify(token) for token in (new, unknown) * 100), return_exceptions=True)
    assert [type(result) for result in results] == [VerifiedClaims, TokenRefused] * 100
    assert issuer.counts == (1, 2)


def test_fifty_threads_on_a_cold_cache_cause_one_fetch(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    at_the_door = threading.Barrier(50)

    def in_a_thread(_: int) -> VerifiedClaims:
        at_the_door.wait(_PATIENCE)
        return verifier.verify_sync(token)

    issuer.answer(METADATA, delay=0.2)
    with ThreadPoolExecutor(50) as threads:
        assert len(list(threads.map(in_a_thread, range(50)))) == 50
    assert issuer.counts == (1, 1)


def test_two_loops_in_two_threads_share_one_verifier(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()

    async def callers() -> int:
        return len(await asyncio.gather(*(verifier.verify(token) for _ in range(20))))

    with ThreadPoolExecutor(2) as threads:
        with issuer.silence():
            loops = [threads.submit(asyncio.run, callers()) for _ in range(2)]
            issuer.wait_until_asked(METADATA)
            time.sleep(0.1)  # lets the other loop ask for itself, if it would
        assert [loop.result(_PATIENCE) for loop in loops] == [20, 20]
    assert issuer.counts == (1, 1)


def test_one_verifier_outlives_its_loops(issuer: Issuer, verifier: TokenVerifier, clock: UnixClock) -> None:
    """Also one that ended while somebody in it was waiting."""

    async def waits_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(verifier.verify(issuer.mint()), 0.1)

    with issuer.silence():
        asyncio.run(waits_in_vain())
    for ahead in (0, 1000, 2000):
        clock.ahead = ahead
        assert asyncio.run(verifier.verify(issuer.mint(now=clock())))


async def test_who_stops_waiting_does_not_end_the_fetch_for_others(issuer: Issuer, verifier: TokenVerifier) -> None:
    token = issuer.mint()
    with issuer.silence():
        first, second, third = (asyncio.create_task(verifier.verify(token)) for _ in range(3))
        await asyncio.to_thread(issuer.wait_until_asked, METADATA)
        first.cancel()
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
    assert (await second).subject == "user-1"
    assert third.cancelled()
    assert await verifier.verify(token)
    assert issuer.counts == (1, 1)


# -- processes --------------------------------------------------------------------------------------------------------

ENDING = """
import sys, threading, time
from identity_service.verifier import TokenVerifier

issuer, audience, token = sys.argv[1:]
ahead = 0
verifier = TokenVerifier(issuer, audience, timeout=600, clock=lambda: time.time() + ahead)
verifier.verify_sync(token)
print("verified", flush=True)
sys.stdin.readline()
ahead = 280
verifier.verify_sync(token)
assert any(thread.name == "jwks" for thread in threading.enumerate())
"""

FORKING = """
import logging, os, signal, sys, threading, time
from identity_service.verifier import KeysUnavailable, TokenVerifier

logging.disable()  # one of the fetches is meant to fail

issuer, audience, token = sys.argv[1:]
signal.alarm(120)  # whatever is stuck ends, and the test fails


def child_can_verify(verifier):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os._exit(0 if verifier.verify_sync(token).subject == "user-1" else 1)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def until(condition):
    while not condition():
        time.sleep(0.001)


def say(word):
    print(word, flush=True)
    return sys.stdin.readline()


# A fetch is under way: the child has nobody who would end it.
verifier = TokenVerifier(issuer, audience, timeout=60)
waiting = threading.Thread(target=verifier.verify_sync, args=(token,))
waiting.start()
until(lambda: any(thread.name == "jwks" for thread in threading.enumerate()))
say("waiting")
assert child_can_verify(verifier)
say("forked")
waiting.join()
assert child_can_verify(verifier)

# Another thread is in the middle of taking over what a fetch has brought.
inside, leave = threading.Event(), threading.Event()


def clock():
    if threading.current_thread().name == "jwks" and os.getpid() == parent:
        inside.set()
        leave.wait()
    return time.time()


parent = os.getpid()
say("down")
verifier = TokenVerifier(issuer, audience, timeout=60, clock=clock)


def fails():
    try:
        verifier.verify_sync(token)
    except KeysUnavailable:
        return


failing = threading.Thread(target=fails)
failing.start()
inside.wait()
say("inside")
assert child_can_verify(verifier)
leave.set()
failing.join()
print("done", flush=True)
"""


@contextmanager
def script(text: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a script in a process of its own, which is over when the block is left."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text, *arguments],  # later Pythons warn of forking
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_process_that_forks_while_keys_are_fetched_has_children_that_verify(issuer: Issuer) -> None:
    """As servers do that start their workers by forking: the child has neither the parent's thread nor its lock."""
    issuer.answer(METADATA, how="when told")
    with script(FORKING, issuer.url, AUDIENCE, issuer.mint()) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def hear(word: str) -> None:
            assert process.stdout.readline() == word + "\n", process.communicate()[1]

        def go_on() -> None:
            process.stdin.write("\n")
            process.stdin.flush()

        hear("waiting")
        issuer.wait_until_asked(METADATA)
        issuer.answer(METADATA)
        go_on()
        hear("forked")
        issuer.let_go()
        go_on()
        hear("down")
        issuer.go_down()
        go_on()
        hear("inside")
        issuer.come_back()
        go_on()
        hear("done")
        _, complaints = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 0
    assert complaints == ""


def test_a_process_ends_although_a_fetch_is_under_way(issuer: Issuer) -> None:
    with script(ENDING, issuer.url, AUDIENCE, issuer.mint()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "verified\n"
        issuer.answer(JWKS, how="when told")
        _, complaints = process.communicate("\n", timeout=_PATIENCE)
    assert process.returncode == 0
    assert complaints == ""


IMPORTS = """
import sys
{statement}
print(*set(sys.modules).intersection({names!r}))
"""
HEAVY = ("httpx2", "joserfc", "fastapi", "starlette", "pydantic", "sqlalchemy", "structlog")


@pytest.mark.parametrize(
    ("statement", "brought"),
    [
        ("import identity_service.verifier.core", set()),
        ("from identity_service.verifier import InsufficientScope, KeysUnavailable, TokenRefused", set()),
        ("from identity_service.verifier import TokenVerifier", {"httpx2", "joserfc"}),
    ],
    ids=["core", "what the server needs", "TokenVerifier"],
)
def test_an_import_brings_what_it_needs_and_no_more(statement: str, brought: set[str]) -> None:
    """The server reads tokens without an HTTP client; a sibling checks them without a web framework or a database."""
    with script(IMPORTS.format(statement=statement, names=HEAVY)) as process:
        told, complaints = process.communicate(timeout=30)
    assert complaints == ""
    assert set(told.split()) == brought


def test_the_package_names_what_it_has() -> None:
    import identity_service.verifier as package

    assert package.TokenVerifier is TokenVerifier
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError):
        package.JwksSource  # noqa: B018
