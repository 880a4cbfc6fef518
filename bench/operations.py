"""The operations that are measured. To add one, write how it is prepared and add a line to `OPERATIONS`."""

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from bench.load import Call, Plan
from bench.service import Service, bearer_call, get_call

Prepare = Callable[[Service, int], list[Call]]


@dataclass(frozen=True, slots=True)
class Operation:
    """
    One thing that the service does for a caller.

    `prepare` makes one call for each of the `connections`, outside the measured time. A right answer has the `status`
    (0: any) and contains `marker`; `carry` names the member of the answer that the next request on the same connection
    needs. `beside` is what others ask for meanwhile, as much as they can.
    """

    name: str
    prepare: Prepare
    marker: str
    carry: str = ""
    connections: int = 16
    status: int = 200
    beside: "Operation | None" = None

    def plan(self, service: Service) -> Plan:
        """Prepare the operation on a running service and return the load to put on it."""
        calls = tuple(self.prepare(service, self.connections))
        return Plan(port=service.port, calls=calls, marker=self.marker, status=self.status, carry=self.carry)


def _client_credentials(service: Service, connections: int) -> list[Call]:
    return [service.machine_call()] * connections


def _refresh_token(service: Service, connections: int) -> list[Call]:
    """
    Start a family for each connection; one user holds them all, as one row read by many costs no waiting.

    Each time another user: who has too many sessions loses the oldest.
    """
    person = service.user(f"bench-refresh-{secrets.token_hex(3)}")
    return [
        service.refresh_call(service.ask(service.sign_in_call(person), "refresh_token")) for _ in range(connections)
    ]


def _jwks(_: Service, connections: int) -> list[Call]:
    return [get_call("/.well-known/jwks.json")] * connections


def _password(service: Service, connections: int) -> list[Call]:
    """Sign each user in on one connection only: people do not sign in twice at the same instant."""
    return [service.sign_in_call(service.user(f"bench-person-{number}")) for number in range(connections)]


def _users_me(service: Service, connections: int) -> list[Call]:
    person = service.user("bench-reader")
    token = service.ask(service.sign_in_call(person), "access_token")
    return [bearer_call("/v1/users/me", token)] * connections


def _introspect(service: Service, connections: int) -> list[Call]:
    """Ask about a user's tokens, another one on each connection; all are live, so the database is asked every time."""
    person = service.user("bench-introspected")
    return [
        service.introspection_call(service.ask(service.sign_in_call(person), "access_token"))
        for _ in range(connections)
    ]


def _token_exchange(service: Service, connections: int) -> list[Call]:
    """Exchange API keys of a service, another one on each connection."""
    return [service.exchange_call(key) for key in service.create_api_keys(connections)]


def _sign_ins(service: Service, connections: int) -> list[Call]:
    """Sign more people in than the hashing pool can take."""
    return [service.sign_in_call(person) for person in service.import_people(connections)]


def _user_search(service: Service, connections: int) -> list[Call]:
    """Search a million users by the beginnings of names, of one letter and of more, and by role and state."""
    service.seed_users(MANY_USERS)
    token = service.operator_token()
    first, *others = [
        bearer_call(f"/v1/admin/users?limit=50&{wanted}", token)
        for wanted in (
            *("q=a", "q=m", "q=user0", "q=ab1", "q=f00d", "q=c@", "q=9z9", "", "role=moderator", "state=disabled"),
            *("q=a&role=moderator", "q=user&role=moderator", "q=f&role=moderator&state=disabled"),
        )
    ]
    return [dataclasses.replace(first, turns=tuple(other.head for other in others))] * connections


MANY_USERS = 1_000_000
# The pool computes two hashes and lets 64 wait, each for two seconds: this many keep it full and beg for more.
SATURATION = Operation("sign-ins", _sign_ins, marker="", status=0, connections=40)

OPERATIONS = (
    Operation("client_credentials", _client_credentials, '"access_token"'),
    Operation("refresh_token", _refresh_token, '"access_token"', carry="refresh_token"),
    Operation("jwks", _jwks, '"keys"'),
    Operation("introspect", _introspect, '"active":true'),
    Operation("token_exchange", _token_exchange, '"access_token"'),
    Operation("users_me", _users_me, "bench-reader"),
    # Argon2 runs in a bounded pool that refuses when its queue is full, so the load stays below it.
    Operation("password", _password, '"access_token"', connections=4),
    Operation("refresh beside sign-ins", _refresh_token, '"access_token"', carry="refresh_token", beside=SATURATION),
    Operation("jwks beside sign-ins", _jwks, '"keys"', connections=4, beside=SATURATION),
    # The last one, because it fills the database.
    Operation("user_search", _user_search, '"items"', connections=4),
)
