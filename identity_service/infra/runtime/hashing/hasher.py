"""
Password hashing, in a bounded pool of its own.

Argon2id takes memory and processor time by design. It must never take the token endpoint, the JWKS or the health check
down with it: the pool has few threads, which run at the lowest priority, and a short queue; who finds it full is told
to come back.
"""

import asyncio
import contextlib
import ctypes
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, final

import structlog
from passlib.context import CryptContext

from identity_service.infra.runtime.hashing.foreign_hashes import (
    LIBRARY_SCHEMES,
    StoredHash,
    UnusableHash,
    read_hash,
)
from identity_service.infra.runtime.secret import Secret
from identity_service.infra.telemetry import child_span
from identity_service.infra.telemetry.metrics import (
    HASHING_CAPACITY,
    HASHING_PENDING,
    HASHING_REFUSED,
    HASHING_WAIT,
    HASHING_WORK,
)

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer")

_M_MMAP_THRESHOLD = -3  # malloc.h

RAW_FORM = 0
"""The password was hashed exactly as typed: an imported hash that was never renewed."""
NFKC_FORM = 1
"""The password was brought to Unicode NFKC before hashing; every hash of our own is."""

_LONGEST_INPUT = 1024  # characters; normalisation may multiply them, so this bounds the work before it starts


class HashingBusy(Exception):
    """
    The pool's queue is full, or the wait in it too long. Nothing was checked; the caller may try again.

    The message is the reason as logs and metrics name it.
    """


def normalise_password(password: Secret) -> Secret | None:
    """
    Return the password in NFKC, or None for one that nobody can have set.

    The same password typed on two keyboards must match (NIST SP 800-63B §5.1.1.2). Surrogates, unassigned code points
    and NUL are refused, since libraries and later Unicode versions disagree about them.
    """
    text = password.reveal()
    if not text or len(text) > _LONGEST_INPUT:
        return None
    if any(letter == "\0" or unicodedata.category(letter) in ("Cs", "Cn") for letter in text):
        return None
    return Secret(unicodedata.normalize("NFKC", text))


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the password was right, and, if the stored hash should be replaced, by what."""

    right: bool
    renewed: str | None = None


@final
class PasswordHasher:
    """Makes and checks password hashes, through `passlib.CryptContext`, on its own threads."""

    def __init__(
        self,
        *,
        memory_kib: int = 19456,
        time_cost: int = 2,
        parallelism: int = 1,
        threads: int = 2,
        queue: int = 64,
        wait: float = 2.0,
    ) -> None:
        """Prepare the pool; at most `queue` calls wait, none longer than `wait` seconds before it starts."""
        self._context = CryptContext(
            schemes=["argon2", *LIBRARY_SCHEMES],
            default="argon2",
            argon2__type="ID",
            argon2__memory_cost=memory_kib,
            argon2__time_cost=time_cost,
            argon2__parallelism=parallelism,
        )
        self._effort = memory_kib * time_cost
        self._wait = wait
        self._capacity = threads + queue
        self._pending = 0
        HASHING_CAPACITY.set(self._capacity)
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="password", initializer=_lowest_priority)
        _give_memory_back()
        self._decoy = self._context.hash("no password hashes to this one")

    @property
    def pending(self) -> int:
        """How many calls are waiting or being computed."""
        return self._pending

    async def hash(self, password: Secret) -> str:
        """Return the Argon2id hash of an already normalised password; raises HashingBusy."""
        hashed: str = await self._in_pool(lambda: self._context.hash(password.reveal()))
        return hashed

    async def verify(self, password: Secret, stored: str | None, *, form: int) -> Verification:
        """
        Check a password as typed against a stored hash; raises HashingBusy.

        Where there is nothing to check (no such user, no password, an impossible password) the same work is done on a
        decoy, so that the time does not tell.
        """
        return await self._in_pool(lambda: self._verify(password, stored, form))

    def close(self) -> None:
        """Let what runs finish and start nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _verify(self, password: Secret, stored: str | None, form: int) -> Verification:
        normal = normalise_password(password)
        if normal is None or stored is None:
            self._context.verify("wrong", self._decoy)
            return Verification(False)
        try:
            kept = read_hash(stored)
            right = kept.matches((password if form == RAW_FORM else normal).reveal(), self._context.verify)
        except ValueError as error:
            reason = str(error) if isinstance(error, UnusableHash) else type(error).__name__
            log.error("password_hash.unusable", reason=reason)
            self._context.verify("wrong", self._decoy)
            return Verification(False)
        if right and self._worth_renewing(kept, form):
            return Verification(True, self._context.hash(normal.reveal()))
        return Verification(right)

    def _worth_renewing(self, kept: StoredHash, form: int) -> bool:
        """
        Whether a hash of our own is better: a costlier imported one is never traded for a cheaper.

        One of the same cost is renewed for the sake of normalisation. Memory times passes is what guessing costs.
        """
        theirs, ours = kept.argon2id_effort, self._effort
        return theirs < ours or (theirs == ours and form == RAW_FORM)

    async def _in_pool(self, work: Callable[[], Answer]) -> Answer:
        span, failed = child_span("password.hash"), None
        try:
            return await self._queued(work)
        except HashingBusy as busy:
            failed = str(busy)
            HASHING_REFUSED.labels(failed).inc()
            raise
        finally:
            span.end(failed=failed)

    async def _queued(self, work: Callable[[], Answer]) -> Answer:
        with self._guard:
            if self._pending >= self._capacity:
                raise HashingBusy("queue_full")
            self._pending += 1
        HASHING_PENDING.inc()
        try:
            future = self._pool.submit(_timed, work, time.perf_counter())
        except RuntimeError:
            self._done()
            raise HashingBusy("shutting_down") from None
        # The place is given back when the thread is done with it, not when somebody stops waiting for the answer.
        future.add_done_callback(self._done)
        waiter = asyncio.wrap_future(future)
        try:
            await asyncio.wait({waiter}, timeout=self._wait)
        except asyncio.CancelledError:
            future.cancel()  # nobody waits for the answer any more: what has not begun need not begin
            raise
        if not waiter.done() and future.cancel():
            raise HashingBusy("waited_too_long")
        return await waiter

    def _done(self, _future: "Future[Answer] | None" = None) -> None:
        with self._guard:
            self._pending -= 1
        HASHING_PENDING.dec()


def _timed(work: Callable[[], Answer], queued_at: float) -> Answer:
    """Do the work, and say how long it waited for this thread and how long it took."""
    began_at = time.perf_counter()
    HASHING_WAIT.observe(began_at - queued_at)
    try:
        return work()
    finally:
        HASHING_WORK.observe(time.perf_counter() - began_at)


def _lowest_priority() -> None:
    """Run this thread at nice 19, so that signatures and health checks go first. Only Linux has it per thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _give_memory_back() -> None:
    """
    Let the memory of each hash return to the system when it is done.

    The C library learns from the first large block it frees, and then keeps blocks of that size for later: tens of
    megabytes a process. Where it is not glibc there is nothing to tell.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)
