"""Password hashing: what verifies, what is renewed by what, and a pool that is bounded whatever happens."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from argon2 import PasswordHasher as Argon2
from argon2 import Type
from passlib import hash as foreign

from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import NFKC_FORM, RAW_FORM, HashingBusy, PasswordHasher
from tests.support.waiting import until

PASSWORD = "correct horse battery staple"
FOREIGN: dict[str, Callable[[str], str]] = {
    "bcrypt": foreign.bcrypt.using(rounds=4).hash,
    "bcrypt_2y": foreign.bcrypt.using(rounds=4, ident="2y").hash,
    "bcrypt_sha256": foreign.bcrypt_sha256.using(rounds=4).hash,
    "scrypt": foreign.scrypt.using(rounds=4).hash,
    "pbkdf2_sha256": foreign.pbkdf2_sha256.using(rounds=10).hash,
    "pbkdf2_sha512": foreign.pbkdf2_sha512.using(rounds=10).hash,
    "pbkdf2_sha1": foreign.pbkdf2_sha1.using(rounds=10).hash,
    "django_pbkdf2_sha256": foreign.django_pbkdf2_sha256.using(rounds=10).hash,
    "django_pbkdf2_sha1": foreign.django_pbkdf2_sha1.using(rounds=10).hash,
    "django_bcrypt": foreign.django_bcrypt.using(rounds=4).hash,
    "django_bcrypt_sha256": foreign.django_bcrypt_sha256.using(rounds=4).hash,
    "django_argon2i": foreign.django_argon2.using(type="I", memory_cost=64, time_cost=1, parallelism=1).hash,
    "argon2i": Argon2(memory_cost=512, time_cost=8, parallelism=1, type=Type.I).hash,
    "argon2id, cheaper": Argon2(memory_cost=16, time_cost=1, parallelism=1, type=Type.ID).hash,
}


def hasher_of(**given: Any) -> PasswordHasher:
    return PasswordHasher(**{"memory_kib": 32, "time_cost": 2, "threads": 1, "queue": 2, "wait": 60.0, **given})


@pytest.fixture
async def hasher() -> AsyncIterator[PasswordHasher]:
    made = hasher_of()
    yield made
    made.close()


async def right(hasher: PasswordHasher, text: str, stored: str, form: int = NFKC_FORM) -> bool:
    return (await hasher.verify(Secret(text), stored, form=form)).right


# -- hashes -----------------------------------------------------------------------------------------------------------


async def test_our_own_hashes_are_argon2id_with_the_configured_cost(hasher: PasswordHasher) -> None:
    """A fresh salt each time, and nothing to renew."""
    one, other = await hasher.hash(Secret(PASSWORD)), await hasher.hash(Secret(PASSWORD))
    assert one != other
    assert one.startswith("$argon2id$v=19$m=32,t=2,p=1$")
    found = await hasher.verify(Secret(PASSWORD), one, form=NFKC_FORM)
    assert found.right
    assert found.renewed is None
    assert not await right(hasher, PASSWORD + "r", one)


@pytest.mark.parametrize("scheme", FOREIGN)
async def test_imported_hashes_verify_and_are_renewed(hasher: PasswordHasher, scheme: str) -> None:
    """The first right sign-in replaces them by a hash of our own, of the same password."""
    stored = FOREIGN[scheme](PASSWORD)
    wrong = await hasher.verify(Secret("Tr0ub4dor&3"), stored, form=RAW_FORM)
    assert (wrong.right, wrong.renewed) == (False, None)
    found = await hasher.verify(Secret(PASSWORD), stored, form=RAW_FORM)
    assert found.right
    assert found.renewed is not None
    assert found.renewed.startswith("$argon2id$v=19$m=32,t=2,p=1$")
    assert await right(hasher, PASSWORD, found.renewed)
    assert not await right(hasher, "Tr0ub4dor&3", found.renewed)


@pytest.mark.parametrize("prefix", ["", "argon2"])
@pytest.mark.parametrize("form", [RAW_FORM, NFKC_FORM])
@pytest.mark.parametrize("cost", [(64, 2), (32, 3), (128, 1)])
async def test_a_costlier_imported_hash_is_left_alone(
    hasher: PasswordHasher, cost: tuple[int, int], form: int, prefix: str
) -> None:
    """It is never traded for a cheaper one of ours; Django's spelling of it neither."""
    stored = prefix + Argon2(memory_cost=cost[0], time_cost=cost[1], parallelism=1, type=Type.ID).hash(PASSWORD)
    found = await hasher.verify(Secret(PASSWORD), stored, form=form)
    assert found.right
    assert found.renewed is None


async def test_a_hash_of_equal_cost_is_renewed_once_for_its_form(hasher: PasswordHasher) -> None:
    """Imported, it matches one spelling only; renewed, it matches all."""
    stored = Argon2(memory_cost=32, time_cost=2, parallelism=1, type=Type.ID).hash("A\u030angstro\u0308m")
    assert not await right(hasher, "Ångström", stored, RAW_FORM)
    found = await hasher.verify(Secret("A\u030angstro\u0308m"), stored, form=RAW_FORM)
    assert found.renewed is not None
    assert await right(hasher, "Ångström", found.renewed)
    assert await right(hasher, "A\u030angstro\u0308m", found.renewed)


@pytest.mark.case("ACC-14")
@pytest.mark.parametrize("letter", ["x", "🙂"])
async def test_passwords_equal_in_their_first_72_bytes_are_two(hasher: PasswordHasher, letter: str) -> None:
    """Nothing is cut off."""
    start = letter * (72 // len(letter.encode()))
    stored = await hasher.hash(Secret(start + "one"))
    assert await right(hasher, start + "one", stored)
    assert not await right(hasher, start + "two", stored)
    assert not await right(hasher, start, stored)


@pytest.mark.case("ACC-14")
@pytest.mark.parametrize("scheme", ["bcrypt", "django_bcrypt", "bcrypt_sha256", "django_bcrypt_sha256"])
async def test_a_long_password_verifies_against_imported_bcrypt(hasher: PasswordHasher, scheme: str) -> None:
    """Bcrypt looks at 72 bytes, and the library raises beyond them; after the renewal all of them count."""
    text = "ü" * 50
    cut = text.encode()[:72].decode()
    stored = FOREIGN[scheme](cut if scheme in ("bcrypt", "django_bcrypt") else text)
    found = await hasher.verify(Secret(text), stored, form=RAW_FORM)
    assert found.right
    assert found.renewed is not None
    assert await right(hasher, text, found.renewed)
    assert not await right(hasher, cut, found.renewed)


MALFORMED = [
    *("", " ", "x", "$", "$$$", "$argon2id$", "$argon2id$v=19$m=19456,t=2,p=1$", "plain text password"),
    *("$argon2id$v=19$m=x,t=2,p=1$c29tZXNhbHQ$aGFzaA", "$argon2id$v=19$m=19456,t=2,p=1$!$!", "$2b$12$short"),
    *(
        "$2b$99$" + "." * 53,
        "$2b$04$" + "\0" * 53,
        "bcrypt$",
        "bcrypt$$2b$",
        "pbkdf2_sha256$x$salt$hash",
        "pbkdf2_sha256$",
    ),
    *(
        "$scrypt$ln=99,r=8,p=1$c2FsdA$aGFzaA",
        "$scrypt$ln=4,r=8,p=1$!$!",
        "!unusable",
        "sha1$salt$hash",
        "$6$rounds=5000$x$y",
    ),
    *("argon2$argon2id$v=19$m=1$x", "\ud800", "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHRzYWx0$" + "A" * 2000),
]


@pytest.mark.parametrize("stored", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("text", [PASSWORD, "plain text password", "ü" * 80])
async def test_a_malformed_hash_refuses_and_does_not_raise(hasher: PasswordHasher, stored: str, text: str) -> None:
    """A damaged import is one person's trouble and no 500."""
    for form in (RAW_FORM, NFKC_FORM):
        found = await hasher.verify(Secret(text), stored, form=form)
        assert (found.right, found.renewed) == (False, None)


async def test_nobody_and_an_impossible_password_cost_a_hash_too(
    hasher: PasswordHasher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time must not tell whether there is such a user, has a password, or has a damaged one."""
    work: list[str] = []
    context = hasher._context
    monkeypatch.setattr(hasher, "_context", _Watched(context, work))
    stored = context.hash(PASSWORD)
    for given, kept in [("x", None), ("a\0b", stored), ("x", stored), ("x", "damaged")]:
        work.clear()
        assert not (await hasher.verify(Secret(given), kept, form=NFKC_FORM)).right
        assert sum(known.startswith("$argon2id$v=19$m=32,t=2") for known in work) == 1


class _Watched:
    """Passes on, and notes what was verified."""

    def __init__(self, context: Any, work: list[str]) -> None:
        self._context, self._work = context, work

    def verify(self, text: Any, stored: str) -> bool:
        self._work.append(stored)
        return bool(self._context.verify(text, stored))

    def hash(self, text: str) -> str:
        return str(self._context.hash(text))


# -- the pool ---------------------------------------------------------------------------------------------------------


class Gate:
    """Stands in for a hash that takes as long as the test wants."""

    def __init__(self, hasher: PasswordHasher) -> None:
        self.open = threading.Event()
        self.running = threading.Semaphore(0)
        self.begun = 0
        self._hasher = hasher

    def _pass(self) -> str:
        self.begun += 1
        self.running.release()
        assert self.open.wait(60)
        return "hash"

    def enter(self) -> asyncio.Task[str]:
        return asyncio.create_task(self._hasher._in_pool(self._pass))

    async def someone_runs(self) -> None:
        assert await asyncio.to_thread(self.running.acquire, timeout=60)


@pytest.fixture
async def gate(hasher: PasswordHasher) -> AsyncIterator[Gate]:
    made = Gate(hasher)
    yield made
    made.open.set()


@pytest.mark.case("ACC-42")
async def test_a_full_queue_turns_people_away_at_once(hasher: PasswordHasher, gate: Gate) -> None:
    """One runs, two wait, the fourth hears so; when they are through there is room again."""
    tasks = [gate.enter() for _ in range(3)]
    await gate.someone_runs()
    await until(lambda: hasher.pending == 3)
    with pytest.raises(HashingBusy, match="queue_full"):
        await hasher.hash(Secret(PASSWORD))
    assert gate.begun == 1
    gate.open.set()
    assert await asyncio.gather(*tasks) == ["hash"] * 3
    await until(lambda: hasher.pending == 0)
    assert await hasher.hash(Secret(PASSWORD))


@pytest.mark.case("ACC-42")
async def test_whoever_waits_too_long_is_turned_away_and_never_computed() -> None:
    """The place in the queue is free at once; who had already begun is answered, however late."""
    hasher = hasher_of()
    gate = Gate(hasher)
    first = gate.enter()
    await gate.someone_runs()
    hasher._wait = 0.05  # from now on: on a busy machine the first one's thread may take longer to begin
    second = gate.enter()
    with pytest.raises(HashingBusy, match="waited_too_long"):
        await second
    assert hasher.pending == 1
    gate.open.set()
    assert await first == "hash"
    assert gate.begun == 1
    hasher.close()


@pytest.mark.case("ACC-43")
async def test_whoever_stops_waiting_gives_their_place_back(hasher: PasswordHasher, gate: Gate) -> None:
    """Five hundred people who hang up neither use the pool up nor let it take more than it has."""
    running = gate.enter()
    await gate.someone_runs()
    for _ in range(250):
        waiting = [gate.enter(), gate.enter()]
        await asyncio.sleep(0)
        await until(lambda: hasher.pending == 3)
        for task in waiting:
            task.cancel()
        for task in waiting:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert hasher.pending == 1
    running.cancel()  # what a thread is computing keeps its place until the thread is done
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert hasher.pending == 1
    gate.open.set()
    await until(lambda: hasher.pending == 0)
    assert gate.begun == 1
    assert await asyncio.gather(*(hasher.hash(Secret(PASSWORD)) for _ in range(3)))


async def test_a_fault_in_the_pool_gives_the_place_back(hasher: PasswordHasher) -> None:
    """The fault is the caller's to hear."""

    def fail() -> str:
        raise RuntimeError("planted")

    for _ in range(10):
        with pytest.raises(RuntimeError, match="planted"):
            await hasher._in_pool(fail)
    await until(lambda: hasher.pending == 0)


async def test_a_closed_pool_is_busy(hasher: PasswordHasher) -> None:
    """A request that comes while the service stops hears 503."""
    hasher.close()
    with pytest.raises(HashingBusy, match="shutting_down"):
        await hasher.hash(Secret(PASSWORD))
    assert hasher.pending == 0


@pytest.mark.case("ACC-42")
async def test_hashing_threads_step_back(hasher: PasswordHasher) -> None:
    """On Linux they run at nice 19, and nobody else does: signatures and health checks go first."""
    nice = await hasher._in_pool(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert nice == (19 if sys.platform == "linux" else os.getpriority(os.PRIO_PROCESS, 0))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19
    assert await hasher._in_pool(lambda: threading.current_thread().name.startswith("password"))
