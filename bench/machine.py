"""What the machine can do and what a process has used of it: cores, RSA speed, CPU time, memory."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core the service has for itself, which one the load generator and the database share, and all there are."""

    service: int
    load: int
    everywhere: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether there is but one core, so that everything disturbs everything."""
        return self.service == self.load


@dataclass(frozen=True, slots=True)
class RsaSpeed:
    """One measurement of RSA-2048 signing on one core, in signatures per second, and the tool that made it."""

    per_second: float
    tool: str


def choose_cores() -> Cores:
    """Take the first two cores this process may run on; with one core only, both are that core."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(service=allowed[0], load=allowed[min(1, len(allowed) - 1)], everywhere=tuple(allowed))


@contextmanager
def on_core(*cores: int) -> Iterator[None]:
    """Run the block, and every process that is started in it, on these cores; children inherit them and keep them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_tree(pid: int, *cores: int) -> None:
    """Move process `pid`, all its threads and all its descendants to these cores; what they start inherits them."""
    for member in tree(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # a database's helpers come and go
            for thread in Path(f"/proc/{member}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)


def rsa_speed(core: int, seconds: int = 1) -> RsaSpeed:
    """
    Measure RSA-2048 signatures per second on `core`, for `seconds` seconds.

    `openssl speed` is the yardstick that anybody can check. Where the binary is missing, the `cryptography` package's
    own loop stands in for it; the result names the tool, because the two differ by a few per cent.
    """
    with on_core(core):
        binary = shutil.which("openssl")
        return _openssl_speed(binary, seconds) if binary else _cryptography_speed(seconds)


def _openssl_speed(binary: str, seconds: int) -> RsaSpeed:
    done = subprocess.run(
        [binary, "speed", "-seconds", str(seconds), "-mr", "rsa2048"], capture_output=True, text=True, check=True
    )
    # The machine-readable line is "+F2:<index>:<bits>:<signs per second>:<verifications per second>…".
    fields = next(line for line in done.stdout.splitlines() if line.startswith("+F2:")).split(":")
    version = subprocess.run([binary, "version"], capture_output=True, text=True, check=True).stdout.split()
    return RsaSpeed(float(fields[3]), f"openssl speed rsa2048 ({' '.join(version[:2])})")


def _cryptography_speed(seconds: int) -> RsaSpeed:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    message, pad, digest = b"x" * 500, padding.PKCS1v15(), SHA256()
    signatures = 0
    began = time.process_time()
    while (used := time.process_time() - began) < seconds:
        for _ in range(50):
            key.sign(message, pad, digest)
        signatures += 50
    return RsaSpeed(signatures / used, "cryptography's RSA-2048 sign loop (no openssl binary found)")


def tree(pid: int) -> list[int]:
    """List `pid` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for process in _processes():
        children.setdefault(_stat_fields(process)[1], []).append(process)
    found = [pid]
    for member in found:  # grows while it is walked
        found.extend(children.get(member, ()))
    return found


def parent(pid: int) -> int:
    """Tell the process id of the parent of `pid`."""
    return _stat_fields(pid)[1]


def cpu_seconds(pid: int) -> float:
    """
    Sum the CPU seconds (user and system) that `pid` and its descendants have used so far.

    Descendants that have ended count too, through the parent that waited for them. The kernel rounds each process down
    to a tick of 10 ms, so a difference over a run of a few seconds is good to about a microsecond per request.
    """
    ticks = sum(sum(_stat_fields(member)[11:15]) for member in tree(pid))  # utime, stime, cutime, cstime
    return ticks / TICKS_PER_SECOND


def busy_seconds(cores: Cores) -> float:
    """Sum the CPU seconds that anybody has used on `cores` so far, and those that the hypervisor gave to others."""
    names = {f"cpu{cores.service}", f"cpu{cores.load}"}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = sum(sum(map(int, (*line[1:4], *line[6:9]))) for line in lines if line and line[0] in names)
    return ticks / TICKS_PER_SECOND


def pss_bytes(pid: int) -> int:
    """Sum the proportional set size of `pid` and its descendants in bytes: shared pages count by their share."""
    return sum(_pss_of(member) for member in tree(pid))


def peak_bytes(pid: int) -> int:
    """Tell the largest resident set that process `pid` ever had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def fsync_seconds(folder: Path, times: int = 50) -> float:
    """Write 8 KiB to a file in `folder` and force it to the disk; return the median seconds of `times` times."""
    waits = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(times):
            began = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 8192, 0)
            os.fsync(file.fileno())
            waits.append(time.perf_counter() - began)
    return median(waits)


def load_average() -> float:
    """Tell how many processes wanted a core in the last minute, on average."""
    return os.getloadavg()[0]


def _pss_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat_fields(pid: int) -> list[int]:
    """Read /proc/PID/stat from the state on; a process that has just ended has no parent and used nothing."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return [0] * 15
    # The command stands in parentheses and may contain anything, so count from its last one. The state is a letter.
    return [0, *(int(field) for field in text.rpartition(")")[2].split()[1:15])]
