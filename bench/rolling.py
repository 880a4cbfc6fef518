"""
Replace every replica under load, as an orchestrator does, and count what the clients notice.

Three ways. With a new port a successor is ready before its predecessor is told to leave, and nginx is told to lead
elsewhere a moment later, when the predecessor has begun to drain. With the same port nginx is told to leave the replica
out before it leaves, and to lead to it again when it is back. And where nobody tells nginx anything, it finds out that
a replica has gone when that refuses a connection; whoever has been accepted and not yet served at that moment is lost,
so this way has no target.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from bench import clients, machine
from bench.clients import Phase
from bench.fleet import TWO, Fleet
from bench.load import Call
from bench.service import BenchError, get_call

NEW_PORT = "a new port"
SAME_PORT = "the same port"
NOT_TOLD = "the same port, nginx not told"
CLIENTS = 16
PER_SECOND = 200.0
ENDPOINTS_LATE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Rolled:
    """One rolling restart: what the clients saw before it and meanwhile."""

    way: str
    before: Phase
    meanwhile: Phase

    @property
    def failed(self) -> int:
        """How many requests got no good answer, although they were repeated where they could be."""
        return self.before.failed + self.meanwhile.failed

    @property
    def complaint(self) -> str:
        """What the first of those got, or nothing."""
        return self.before.complaint or self.meanwhile.complaint


class _Clients:
    """The clients' process."""

    def __init__(self, plan: clients.Plan, cores: Sequence[int]) -> None:
        with machine.on_core(*cores):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.clients"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self._say(json.dumps(dataclasses.asdict(plan)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def go_on_with(self, phase: str) -> None:
        """Note from now on under this name."""
        self._say(phase)

    def end(self) -> dict[str, Phase]:
        """End it, and return what was noted under each name."""
        answer, _ = self._process.communicate("\n")
        if self._process.returncode:
            raise BenchError("The clients' process ended; its own words are above.")
        return {phase["name"]: Phase(**phase) for phase in json.loads(answer)}

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def roll(fleet: Fleet, *, seconds: float) -> list[Rolled]:
    """Replace both replicas in each way, after `seconds` in which nothing happens."""
    ways: dict[str, Callable[[Fleet, int], None]] = {
        NEW_PORT: _new_port,
        SAME_PORT: _same_port,
        NOT_TOLD: _restart,
    }
    return [_rolled(fleet, way, replace, seconds) for way, replace in ways.items()]


def _rolled(fleet: Fleet, way: str, replace: Callable[[Fleet, int], None], seconds: float) -> Rolled:
    service = fleet.service
    person = service.user("bench-rolled")
    families = [service.ask(service.sign_in_call(person), "refresh_token") for _ in range(CLIENTS)]
    chains: tuple[Call, ...] = tuple(service.refresh_call(token) for token in families)
    calls = (service.machine_call(), get_call("/.well-known/jwks.json"))
    plan = clients.Plan(fleet.ports[TWO], calls, chains, PER_SECOND)
    with _Clients(plan, service.cores.everywhere) as load:
        time.sleep(1)  # what begins is not what is measured
        load.go_on_with("before")
        time.sleep(seconds)
        load.go_on_with("meanwhile")
        for number in range(len(fleet.replicas)):
            replace(fleet, number)
        time.sleep(1)
        phases: dict[str, Any] = load.end()
    service.port = fleet.replicas[0].port
    return Rolled(way, phases["before"], phases["meanwhile"])


def _new_port(fleet: Fleet, number: int) -> None:
    old = fleet.replicas[number]
    fleet.replicas[number] = successor = fleet.start()
    successor.wait_until_ready()
    old.leave()
    time.sleep(ENDPOINTS_LATE_SECONDS)  # until then it is still sent requests, and serves them
    fleet.nginx.lead_to(fleet.fronts())
    old.wait_until_gone()


def _same_port(fleet: Fleet, number: int) -> None:
    fleet.nginx.lead_to(fleet.fronts(without=number))
    _restart(fleet, number)
    fleet.nginx.lead_to(fleet.fronts())
    time.sleep(ENDPOINTS_LATE_SECONDS)


def _restart(fleet: Fleet, number: int) -> None:
    old = fleet.replicas[number]
    old.leave()
    old.wait_until_gone()
    fleet.replicas[number] = fleet.start(port=old.port)
    fleet.replicas[number].wait_until_ready()
