"""
Every metric of the service: the one place to look, beside `docs/metrics.md`, which a test compares with it.

They carry no user, address or token, and every label has few values, so that nobody outside can make them grow. What
is true of the database and not of this process (keys, jobs, mails) is shown by every replica: take its maximum, never
its sum.
"""

from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from identity_service.infra.telemetry.tracing import METHODS

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the counters, and nothing of ours reads them

# -- requests ---------------------------------------------------------------------------------------------------------

REQUESTS = Counter(
    "identity_http_requests_total",
    "Requests answered, by method, route and status; `none` where nobody was left to answer.",
    ["method", "route", "status"],
)
REQUEST_SECONDS = Histogram(
    "identity_http_request_seconds",
    "Time to answer a request, by route and outcome: answered (below 400), refused (4xx), failed (5xx).",
    ["route", "outcome"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
CONNECTIONS_SHED = Counter(
    "identity_connections_shed_total",
    "Connections ended because there were too many: idle ones, or new ones.",
    ["which"],
)
LIMITS_HIT = Counter("identity_limits_hit_total", "Requests refused by a limit.", ["limit"])
LIMITER_DEGRADED = Gauge("identity_limiter_degraded", "1 while limits are kept in this process because Redis is away.")

# -- tokens -----------------------------------------------------------------------------------------------------------

TOKENS = Counter(
    "identity_tokens_total", "Token requests, by grant, client and outcome.", ["grant", "client", "outcome"]
)
REFRESH_VERDICTS = Counter(
    "identity_refresh_verdicts_total", "Refresh tokens that were refused, by verdict.", ["verdict"]
)
SIGN_INS = Counter(
    "identity_sign_ins_total", "Passwords that were judged, by outcome: succeeded, or why not.", ["outcome"]
)

# -- signing keys -----------------------------------------------------------------------------------------------------

SIGNING_READY = Gauge("identity_signing_ready", "1 while this replica can sign a token.")
SIGNING_KEYS = Gauge("identity_signing_keys", "Published signing keys, by state.", ["state"])
SIGNING_KEY_AGE = Gauge(
    "identity_signing_key_age_seconds", "Time since the oldest key of a state was published; NaN for none.", ["state"]
)
SIGNING_KEY_ACTIVATION = Gauge(
    "identity_signing_key_next_activation_seconds", "Time until the waiting key begins to sign; NaN for none."
)
SIGNING_KEY_STEPS = Gauge(
    "identity_signing_key_steps_due", "Steps that the key schedule owes: keys to make, and keys to retire."
)
SIGNING_KEYS_READ = Gauge(
    "identity_signing_keys_read_timestamp_seconds", "When this replica last read the key schedule, Unix time."
)
SIGNING_KEYS_BROKEN = Gauge("identity_signing_keys_unusable", "Published signing keys that could not be unwrapped.")

# -- password hashing -------------------------------------------------------------------------------------------------

_HASHING_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)

HASHING_PENDING = Gauge("identity_hashing_pending", "Passwords that wait for a thread, or are being hashed.")
HASHING_CAPACITY = Gauge("identity_hashing_capacity", "How many passwords may wait or be hashed at once.")
HASHING_WAIT = Histogram(
    "identity_hashing_wait_seconds", "Time that a password waited for a thread.", buckets=_HASHING_SECONDS
)
HASHING_WORK = Histogram(
    "identity_hashing_work_seconds", "Time that a thread worked on a password.", buckets=_HASHING_SECONDS
)
HASHING_REFUSED = Counter("identity_hashing_refused_total", "Passwords that were not looked at, by reason.", ["reason"])

# -- the database -----------------------------------------------------------------------------------------------------

DATABASE_IN_USE = Gauge("identity_database_connections_in_use", "Connections that a transaction of this process holds.")
DATABASE_POOL_SIZE = Gauge("identity_database_pool_size", "Connections that this process may hold; 0 on SQLite.")
DATABASE_WAIT = Histogram(
    "identity_database_pool_wait_seconds",
    "Time that a transaction waited for its connection, the opening of a new one included.",
    buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 1, 2),
)
DATABASE_ERRORS = Counter(
    "identity_database_errors_total",
    "Transactions that the database did not carry out, by kind: unavailable, pool_exhausted, conflict.",
    ["kind"],
)

# -- what one replica does for all ------------------------------------------------------------------------------------

JOB_RUNS = Counter(
    "identity_job_runs_total", "Runs of a background job in this replica, by outcome.", ["job_name", "outcome"]
)
JOB_DONE = Gauge(
    "identity_job_last_done_timestamp_seconds",
    "When a background job last ended well in any replica, Unix time.",
    ["job_name"],
)
JOB_INTERVAL = Gauge("identity_job_interval_seconds", "How often a background job is due.", ["job_name"])
AUDIT_CHAIN_BROKEN = Gauge(
    "identity_audit_chain_broken",
    "1 while a job finds the audit trail tampered with, and therefore stops.",
    ["job_name"],
)
MAILS = Counter("identity_mails_total", "Attempts to send a mail, by outcome.", ["outcome"])
MAILS_WAITING = Gauge("identity_mails_waiting", "Mails that wait to be sent.")
OLDEST_MAIL = Gauge(
    "identity_mails_oldest_timestamp_seconds", "When the oldest mail that waits was ordered; 0 when none does."
)
TRACES_LOST = Counter("identity_traces_lost_total", "Spans that the collector did not take.")

# A counter that appears with its first event shows no increase for it, and alerts would miss that one.
for _kind in ("unavailable", "pool_exhausted", "conflict"):
    DATABASE_ERRORS.labels(_kind)
for _reason in ("queue_full", "waited_too_long", "shutting_down"):
    HASHING_REFUSED.labels(_reason)
for _which in ("idle", "new"):
    CONNECTIONS_SHED.labels(_which)
for _outcome in ("succeeded", "wrong_password", "unknown_user"):
    SIGN_INS.labels(_outcome)

# -- counting what happens often --------------------------------------------------------------------------------------

OTHER: Final = "other"
"""What stands for label values beyond those that are counted one by one."""
MOST_CLIENTS: Final = 200
"""Clients that a process counts by themselves: whoever may register clients must not make the metrics grow."""

_requests: Final[dict[tuple[str, str, int], tuple[Counter, Histogram | None]]] = {}
_tokens: Final[dict[tuple[str, str, str], Counter]] = {}
_clients: Final[set[str]] = set()


def count_request(method: str, route: str, status: int, seconds: float) -> None:
    """
    Count one request and how long it took; `status` is 0 when nobody was left to answer.

    `route` is a name of ours, never a path as sent. Looking the series up once and keeping them makes this 1 µs.
    """
    if method not in METHODS:
        method = OTHER
    known = _requests.get((method, route, status))
    if known is None:
        outcome = "answered" if status < 400 else "refused" if status < 500 else "failed"
        known = _requests[(method, route, status)] = (
            REQUESTS.labels(method, route, status or "none"),
            REQUEST_SECONDS.labels(route, outcome) if status else None,
        )
    counted, timed = known
    counted.inc()
    if timed is not None:
        timed.observe(seconds)


def count_token(grant: str, client: str, outcome: str) -> None:
    """Count one token request; `client` is a registered client's id, `outcome` an OAuth error code or `issued`."""
    known = _tokens.get((grant, client, outcome))
    if known is None:
        if len(_clients) < MOST_CLIENTS:
            _clients.add(client)
        known = TOKENS.labels(grant, client if client in _clients else OTHER, outcome)
        if client in _clients:
            _tokens[(grant, client, outcome)] = known
    known.inc()


EXPOSITION_TYPE: Final = CONTENT_TYPE_LATEST
"""The content type of what `exposition` returns."""


def exposition() -> bytes:
    """Return everything that is counted in this process, in the text format of Prometheus."""
    return generate_latest()
