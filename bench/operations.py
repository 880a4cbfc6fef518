"""The operations that are measured. To add one, write how it is prepared and add a line to `OPERATIONS`."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.load import Call, Plan
from bench.service import Service, bearer_call, get_call

Prepare = Callable[[Service, int], list[Call]]


@dataclass(frozen=True, slots=True)
class Operation:
    """
    One thing that the service does for a caller.

    `prepare` makes one call for each of the `connections`, outside the measured time. A right answer is 200 and
    contains `marker`; `carry` names the member of the answer that the next request on the same connection needs.
    """

    name: str
    prepare: Prepare
    marker: str
    carry: str = ""
    connections: int = 16

    def plan(self, service: Service) -> Plan:
        """Prepare the operation on a running service and return the load to put on it."""
        calls = tuple(self.prepare(service, self.connections))
        return Plan(port=service.port, calls=calls, marker=self.marker, carry=self.carry)


def _client_credentials(service: Service, connections: int) -> list[Call]:
    return [service.machine_call()] * connections


def _refresh_token(service: Service, connections: int) -> list[Call]:
    """Start a family for each connection; one user holds them all, as one row read by many costs no waiting."""
    person = service.create_user("bench-refresh")
    return [
        service.refresh_call(service.ask(service.sign_in_call(person), "refresh_token")) for _ in range(connections)
    ]


def _jwks(_: Service, connections: int) -> list[Call]:
    return [get_call("/.well-known/jwks.json")] * connections


def _password(service: Service, connections: int) -> list[Call]:
    """Sign each user in on one connection only: people do not sign in twice at the same instant."""
    return [service.sign_in_call(service.create_user(f"bench-person-{number}")) for number in range(connections)]


def _users_me(service: Service, connections: int) -> list[Call]:
    person = service.create_user("bench-reader")
    token = service.ask(service.sign_in_call(person), "access_token")
    return [bearer_call("/v1/users/me", token)] * connections


def _introspect(service: Service, connections: int) -> list[Call]:
    """Ask about a user's tokens, another one on each connection; all are live, so the database is asked every time."""
    person = service.create_user("bench-introspected")
    return [
        service.introspection_call(service.ask(service.sign_in_call(person), "access_token"))
        for _ in range(connections)
    ]


OPERATIONS = (
    Operation("client_credentials", _client_credentials, '"access_token"'),
    Operation("refresh_token", _refresh_token, '"access_token"', carry="refresh_token"),
    Operation("jwks", _jwks, '"keys"'),
    Operation("introspect", _introspect, '"active":true'),
    Operation("users_me", _users_me, "bench-reader"),
    # Argon2 runs in a bounded pool that refuses when its queue is full, so the load stays below it.
    Operation("password", _password, '"access_token"', connections=4),
)
