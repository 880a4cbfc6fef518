"""
For each alert, series that make it ring and series that come close and do not.

Numbers stand near their thresholds, and moments near the end of the time that an alert waits, so that a mistake in
either shows. What two replicas show differs wherever it matters which of them is asked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

NAMESPACE = {"namespace": "identity"}
REPLICAS = [{**NAMESPACE, "job": "identity-service", "pod": pod, "instance": f"{pod}:9000"} for pod in ("a", "b")]
STEADY = "x400"  # so many minutes


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation, a minute apart; and whether the alert rings, with which labels, at a minute."""

    title: str
    at: str
    series: Mapping[str, str]
    rings: tuple[Mapping[str, str], ...] = ()


@dataclass
class Cases:
    """The cases of one alert."""

    alert: str
    cases: list[Case] = field(default_factory=list)

    def rings(self, title: str, at: str, series: Mapping[str, str], *labels: Mapping[str, str]) -> "Cases":
        self.cases.append(Case(title, at, series, labels or (NAMESPACE,)))
        return self

    def silent(self, title: str, at: str, series: Mapping[str, str]) -> "Cases":
        self.cases.append(Case(title, at, series))
        return self


def of(name: str, replica: int = 0, **labels: str) -> str:
    """Return a series as a replica shows it."""
    inside = ",".join(f"{label}={json.dumps(value)}" for label, value in {**REPLICAS[replica], **labels}.items())
    return f"{name}{{{inside}}}"


def both(name: str, values: str, **labels: str) -> dict[str, str]:
    """Return a series that every replica shows alike."""
    return {of(name, 0, **labels): values, of(name, 1, **labels): values}


READY, UNREADABLE = "identity_signing_ready", "identity_signing_keys_unusable"
STEPS, READ = "identity_signing_key_steps_due", "identity_signing_keys_read_timestamp_seconds"
VERDICTS, SIGN_INS = "identity_refresh_verdicts_total", "identity_sign_ins_total"
LIMITS, BROKEN = "identity_limits_hit_total", "identity_audit_chain_broken"
REQUESTS, BUCKETS = "identity_http_requests_total", "identity_http_request_seconds_bucket"
SHED, DEGRADED = "identity_connections_shed_total", "identity_limiter_degraded"
REFUSED, PENDING, CAPACITY = "identity_hashing_refused_total", "identity_hashing_pending", "identity_hashing_capacity"
ERRORS, IN_USE, POOL = (
    "identity_database_errors_total",
    "identity_database_connections_in_use",
    "identity_database_pool_size",
)
DONE, EVERY = "identity_job_last_done_timestamp_seconds", "identity_job_interval_seconds"
OLDEST = "identity_mails_oldest_timestamp_seconds"


def answered(replica: int, route: str, outcome: str, **within: int) -> dict[str, str]:
    """Return a histogram of 100 answers a minute: how many of them took no longer than 0.5, 1 and 2.5 seconds."""
    bounds = {"0.5": within["half"], "1": within["one"], "2.5": 100, "+Inf": 100}
    return {
        of(BUCKETS, replica, route=route, outcome=outcome, le=bound): f"0+{count}{STEADY}"
        for bound, count in bounds.items()
    }


ALL = [
    Cases("NoUsableSigningKey")
    .rings("one replica of two", "1m", {of(READY): f"0{STEADY}", of(READY, 1): f"1{STEADY}"}, REPLICAS[0])
    .silent("just begun", "0m", both(READY, f"0{STEADY}"))
    .silent("all can sign", "10m", both(READY, f"1{STEADY}")),
    Cases("SigningKeyUnreadable")
    .rings("in one replica", "2m", {of(UNREADABLE): f"1{STEADY}", of(UNREADABLE, 1): f"0{STEADY}"})
    .silent("just begun", "1m", both(UNREADABLE, f"1{STEADY}"))
    .silent("none", "10m", both(UNREADABLE, f"0{STEADY}")),
    Cases("SigningKeyRotationLate")
    .rings(
        "a replica reads it and sees it due",
        "15m",
        {of(STEPS): f"1{STEADY}", of(READ): f"-100+60{STEADY}", of(STEPS, 1): f"0{STEADY}", of(READ, 1): f"0{STEADY}"},
    )
    .silent("just begun", "14m", {**both(STEPS, f"1{STEADY}"), **both(READ, f"0+60{STEADY}")})
    .silent("nothing is due", "30m", {**both(STEPS, f"0{STEADY}"), **both(READ, f"0+60{STEADY}")})
    .silent(
        "what a replica saw that reads it no more",
        "30m",
        {
            of(STEPS): f"1{STEADY}",
            of(READ): f"-150+60{STEADY}",
            of(STEPS, 1): f"0{STEADY}",
            of(READ, 1): f"0+60{STEADY}",
        },
    ),
    Cases("SigningKeyScheduleNotRead")
    .rings("one replica of two", "5m", {of(READ): f"-400+60{STEADY}", of(READ, 1): f"0+60{STEADY}"}, REPLICAS[0])
    .silent("just begun", "4m", both(READ, f"-400+60{STEADY}"))
    .silent("a slow poll", "30m", both(READ, f"-200+60{STEADY}")),
    Cases("RefreshTokenReplaySpike")
    .rings(
        "each kind makes up a third",
        "20m",
        {
            of(VERDICTS, 0, verdict="reuse_detected"): f"0+1{STEADY}",
            of(VERDICTS, 1, verdict="foreign_client"): f"0+1{STEADY}",
            of(VERDICTS, 1, verdict="ahead_of_record"): f"0+1{STEADY}",
        },
    )
    .rings("all at once", "10m", {of(VERDICTS, verdict="reuse_detected"): f"0x7 0+30{STEADY}"})
    .silent("just begun", "9m", {of(VERDICTS, verdict="reuse_detected"): f"0x7 0+30{STEADY}"})
    .silent("a few", "20m", both(VERDICTS, f"0+0.75{STEADY}", verdict="reuse_detected"))
    .silent(
        "tokens that are simply dead",
        "20m",
        {
            **both(VERDICTS, f"0+50{STEADY}", verdict="expired"),
            **both(VERDICTS, f"0+50{STEADY}", verdict="revoked"),
            **both(VERDICTS, f"0+50{STEADY}", verdict="unknown"),
        },
    ),
    Cases("SignInFailureSpike")
    .rings(
        "wrong passwords, unknown names and refused guesses together",
        "20m",
        {
            of(SIGN_INS, 0, outcome="wrong_password"): f"0+4{STEADY}",
            of(SIGN_INS, 1, outcome="unknown_user"): f"0+4{STEADY}",
            of(LIMITS, 1, limit="sign_in.account"): f"0+3{STEADY}",
            of(LIMITS, 1, limit="sign_in.network"): f"0+4{STEADY}",
            **both(SIGN_INS, f"0+5{STEADY}", outcome="succeeded"),
        },
    )
    .rings("nobody gets in at all", "20m", both(SIGN_INS, f"0+8{STEADY}", outcome="wrong_password"))
    .rings("all at once", "11m", both(SIGN_INS, f"0x7 0+100{STEADY}", outcome="wrong_password"))
    .silent("just begun", "10m", both(SIGN_INS, f"0x7 0+100{STEADY}", outcome="wrong_password"))
    .silent("a few", "20m", both(SIGN_INS, f"0+4{STEADY}", outcome="wrong_password"))
    .silent(
        "what comes with more that succeed",
        "20m",
        {
            **both(SIGN_INS, f"0+8{STEADY}", outcome="wrong_password"),
            of(SIGN_INS, 0, outcome="succeeded"): f"0+17{STEADY}",
        },
    )
    .silent(
        "more that succeed than all that fails",
        "20m",
        {
            of(SIGN_INS, 0, outcome="wrong_password"): f"0+12{STEADY}",
            of(LIMITS, 1, limit="sign_in.network"): f"0+4{STEADY}",
            of(SIGN_INS, 0, outcome="succeeded"): f"0+9{STEADY}",
            of(SIGN_INS, 1, outcome="succeeded"): f"0+8{STEADY}",
        },
    )
    .rings(
        "fewer that succeed than all that fails",
        "20m",
        {
            of(SIGN_INS, 0, outcome="wrong_password"): f"0+12{STEADY}",
            of(LIMITS, 1, limit="sign_in.network"): f"0+4{STEADY}",
            of(SIGN_INS, 0, outcome="succeeded"): f"0+14{STEADY}",
        },
    )
    .silent("other limits", "20m", both(LIMITS, f"0+100{STEADY}", limit="client")),
    Cases("AuditChainBroken")
    .rings(
        "one job in one replica",
        "0m",
        {of(BROKEN, 0, job_name="audit_seal"): f"1{STEADY}", of(BROKEN, 1, job_name="audit_seal"): f"0{STEADY}"},
        {**NAMESPACE, "job_name": "audit_seal"},
    )
    .silent("whole", "10m", both(BROKEN, f"0{STEADY}", job_name="audit_seal")),
    Cases("ServiceNotScraped")
    .rings("another service is", "5m", {'up{job="something-else"}': f"1{STEADY}"}, {})
    .silent("just begun", "4m", {'up{job="something-else"}': f"1{STEADY}"})
    .silent("one replica is", "20m", {of(READY): f"1{STEADY}"}),
    Cases("HighErrorRate")
    .rings(
        "eight in a hundred, beside many good probes",
        "10m",
        {
            of(REQUESTS, 0, method="POST", route="/token", status="500"): f"0+4{STEADY}",
            of(REQUESTS, 1, method="GET", route="/v1/users/me", status="503"): f"0+4{STEADY}",
            of(REQUESTS, 1, method="POST", route="/token", status="200"): f"0+92{STEADY}",
            of(REQUESTS, 1, method="GET", route="/healthz", status="200"): f"0+500{STEADY}",
            of(REQUESTS, 1, method="GET", route="/readyz", status="200"): f"0+500{STEADY}",
        },
    )
    .silent(
        "just begun",
        "5m",
        {of(REQUESTS, 0, method="POST", route="/token", status="500"): f"0+50{STEADY}"},
    )
    .silent(
        "four in a hundred",
        "20m",
        {
            of(REQUESTS, 0, method="POST", route="/token", status="500"): f"0+4{STEADY}",
            of(REQUESTS, 0, method="POST", route="/token", status="200"): f"0+48{STEADY}",
            of(REQUESTS, 1, method="POST", route="/token", status="200"): f"0+48{STEADY}",
        },
    )
    .silent(
        "refusals, and probes that say not ready",
        "20m",
        {
            of(REQUESTS, 0, method="POST", route="/token", status="401"): f"0+50{STEADY}",
            of(REQUESTS, 0, method="GET", route="/readyz", status="503"): f"0+50{STEADY}",
            of(REQUESTS, 0, method="GET", route="/healthz", status="500"): f"0+50{STEADY}",
            of(REQUESTS, 1, method="POST", route="/token", status="200"): f"0+50{STEADY}",
        },
    ),
    Cases("TokenLatencyHigh")
    .rings(
        "four in a hundred of one replica take between 1 s and 2.5 s",
        "15m",
        {**answered(0, "/token", "answered", half=90, one=100), **answered(1, "/token", "answered", half=90, one=96)},
    )
    .silent("just begun", "10m", answered(0, "/token", "answered", half=90, one=96))
    .silent("nearly all are within half a second", "30m", answered(0, "/token", "answered", half=98, one=100))
    .silent("refusals leave late on purpose", "30m", answered(0, "/token", "refused", half=50, one=50))
    .silent("another route", "30m", answered(0, "/v1/users/me/export", "answered", half=50, one=50)),
    Cases("ConnectionsRefused")
    .rings("new ones", "10m", {of(SHED, which="new"): f"0+1{STEADY}"})
    .silent("just begun", "5m", {of(SHED, which="new"): f"0+1{STEADY}"})
    .silent("idle ones make room", "20m", {of(SHED, which="idle"): f"0+10{STEADY}"})
    .silent("long ago", "60m", {of(SHED, which="new"): "0+1x10 10x400"}),
    Cases("RateLimiterDegraded")
    .rings("in one replica", "5m", {of(DEGRADED): f"1{STEADY}", of(DEGRADED, 1): f"0{STEADY}"})
    .silent("just begun", "4m", both(DEGRADED, f"1{STEADY}"))
    .silent("nowhere", "20m", both(DEGRADED, f"0{STEADY}")),
    Cases("PasswordHashingSaturated")
    .rings("some were refused", "10m", {of(REFUSED, reason="queue_full"): f"0+1{STEADY}"})
    .rings(
        "one queue is nearly full",
        "5m",
        {of(PENDING): f"60{STEADY}", of(PENDING, 1): f"0{STEADY}", **both(CAPACITY, f"66{STEADY}")},
    )
    .silent("just begun", "4m", {of(PENDING): f"60{STEADY}", of(CAPACITY): f"66{STEADY}"})
    .silent("half full", "20m", {**both(PENDING, f"33{STEADY}"), **both(CAPACITY, f"66{STEADY}")})
    .silent("a server that stops", "20m", {of(REFUSED, reason="shutting_down"): f"0+1{STEADY}"}),
    Cases("DatabaseErrors")
    .rings("nine a minute, of two replicas", "8m", both(ERRORS, f"0+4.5{STEADY}", kind="unavailable"))
    .silent("just begun", "2m", both(ERRORS, f"0+30{STEADY}", kind="unavailable"))
    .silent("four a minute", "20m", {of(ERRORS, kind="unavailable"): f"0+4.5{STEADY}"})
    .silent(
        "lost deadlocks and a full pool",
        "20m",
        {**both(ERRORS, f"0+50{STEADY}", kind="conflict"), **both(ERRORS, f"0+50{STEADY}", kind="pool_exhausted")},
    ),
    Cases("DatabasePoolSaturated")
    .rings("somebody waited in vain", "10m", {of(ERRORS, kind="pool_exhausted"): f"0+1{STEADY}"})
    .rings(
        "all of one replica's are in use",
        "5m",
        {of(IN_USE): f"10{STEADY}", of(IN_USE, 1): f"1{STEADY}", **both(POOL, f"10{STEADY}")},
    )
    .silent("just begun", "4m", {**both(IN_USE, f"10{STEADY}"), **both(POOL, f"10{STEADY}")})
    .silent("six of ten", "20m", {**both(IN_USE, f"6{STEADY}"), **both(POOL, f"10{STEADY}")})
    .silent("SQLite has no pool", "20m", {**both(IN_USE, f"1{STEADY}"), **both(POOL, f"0{STEADY}")})
    .silent("another kind of trouble", "20m", both(ERRORS, f"0+50{STEADY}", kind="unavailable")),
    Cases("JobStuck")
    .rings(
        "fifteen minutes after the last good end of a job that is due every minute",
        "10m",
        {**both(EVERY, f"60{STEADY}", job_name="cleanup"), **both(DONE, f"-900+60{STEADY}", job_name="cleanup")},
        {**NAMESPACE, "job_name": "cleanup"},
    )
    .rings(
        "never in four hours, while another is done",
        "4h",
        {
            **both(EVERY, f"60{STEADY}", job_name="cleanup"),
            **both(EVERY, f"3600{STEADY}", job_name="purge"),
            **both(DONE, f"0+60{STEADY}", job_name="cleanup"),
        },
        {**NAMESPACE, "job_name": "purge"},
    )
    .silent("never in two hours", "2h", both(EVERY, f"3600{STEADY}", job_name="purge"))
    .silent(
        "just begun",
        "4m",
        {**both(EVERY, f"60{STEADY}", job_name="cleanup"), **both(DONE, f"-900+60{STEADY}", job_name="cleanup")},
    )
    .silent(
        "twelve minutes late",
        "20m",
        {
            of(EVERY, 0, job_name="cleanup"): f"60{STEADY}",
            of(EVERY, 1, job_name="cleanup"): f"30{STEADY}",
            **both(DONE, f"-740+60{STEADY}", job_name="cleanup"),
        },
    )
    .silent("one that nobody runs", "4h", both(DONE, f"0{STEADY}", job_name="outbox"))
    .silent(
        "another replica did it",
        "4h",
        {
            **both(EVERY, f"60{STEADY}", job_name="cleanup"),
            of(DONE, 0, job_name="cleanup"): f"0{STEADY}",
            of(DONE, 1, job_name="cleanup"): f"0+60{STEADY}",
        },
    ),
    Cases("OutboxStuck")
    .rings("twenty minutes", "26m", both(OLDEST, f"-1200+60{STEADY}"))
    .silent("just begun", "25m", both(OLDEST, f"-1200+60{STEADY}"))
    .silent("ten minutes", "60m", both(OLDEST, f"-600+60{STEADY}"))
    .silent(
        "another replica has sent what this one last saw waiting",
        "60m",
        {of(OLDEST, 0): f"-600+60{STEADY}", of(OLDEST, 1): f"-1200+60{STEADY}"},
    )
    .silent("none waits", "3h", both(OLDEST, f"0{STEADY}")),
]
CASES = {cases.alert: cases.cases for cases in ALL}
