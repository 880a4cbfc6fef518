"""Probes that ask the right thing, and a way out on which no request is lost (OPS-20)."""

from collections.abc import Iterator

from tests.deploy.promises import promise
from tests.deploy.site import Document, Site, dig, drop, put

CASES = ("OPS-20",)
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
_CLOSING = 10  # seconds that the server has left when the drain is over
_DEFAULTS = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3, "successThreshold": 1}


def _probe(site: Site, kind: str) -> Document:
    return {**_DEFAULTS, **(site.server.get(kind) or {})}


def _seconds(site: Site, kind: str) -> int:
    """Return how long a probe may fail before something happens."""
    probe = _probe(site, kind)
    seconds: int = probe["periodSeconds"] * probe["failureThreshold"]
    return seconds


def _ports(site: Site) -> dict[str, int]:
    return {port.get("name", ""): port["containerPort"] for port in site.server.get("ports") or []}


@promise
def ports_are_those_that_the_server_listens_on(site: Site) -> Iterator[str]:
    """On every address of the pod: probes and clients come from outside of it."""
    wanted = {
        "http": int(site.setting("IDENTITY_PORT")),
        "management": int(site.setting("IDENTITY_MANAGEMENT_PORT") or 0),
    }
    if _ports(site) != wanted:
        yield f"{_ports(site)} are declared, {wanted} are open"
    for name in ("IDENTITY_HOST", "IDENTITY_MANAGEMENT_HOST"):
        if site.setting(name) not in ("0.0.0.0", "::"):  # noqa: S104
            yield f"{name} is {site.setting(name)}"


ports_are_those_that_the_server_listens_on.broken_by(
    "the server listens on another port", lambda site: put(site.config, "IDENTITY_PORT", value="8080")
)
ports_are_those_that_the_server_listens_on.broken_by(
    "nobody listens for the probes", lambda site: drop(site.config, "IDENTITY_MANAGEMENT_PORT")
)
ports_are_those_that_the_server_listens_on.broken_by(
    "the server listens within the pod only", lambda site: drop(site.config, "IDENTITY_HOST")
)


@promise
def probes_ask_the_management_port(site: Site) -> Iterator[str]:
    """A crowd on the public port must not get a healthy replica killed."""
    for kind in _PROBES:
        if dig(site.server, kind, "httpGet", "port") != "management":
            yield f"{kind}: {dig(site.server, kind)}"


probes_ask_the_management_port.broken_by(
    "liveness asks the public port",
    lambda site: put(site.server, "livenessProbe", "httpGet", "port", value="http"),
)
probes_ask_the_management_port.broken_by("there is no startup probe", lambda site: drop(site.server, "startupProbe"))


@promise
def probes_ask_for_what_is_served_there(site: Site) -> Iterator[str]:
    """The code of the management listener is asked which paths it knows."""
    for kind in _PROBES:
        path = dig(site.server, kind, "httpGet", "path", default="/" if kind in site.server else None)
        if path is not None and path not in site.facts.management_paths:
            yield f"{kind}: {path}"


probes_ask_for_what_is_served_there.broken_by(
    "liveness asks for nothing in particular", lambda site: drop(site.server, "livenessProbe", "httpGet", "path")
)
probes_ask_for_what_is_served_there.broken_by(
    "readiness asks for a path of another product",
    lambda site: put(site.server, "readinessProbe", "httpGet", "path", value="/health/ready"),
)


@promise
def only_a_dead_process_is_restarted(site: Site) -> Iterator[str]:
    """No restart mends a database, and all replicas would restart at once."""
    for kind in ("startupProbe", "livenessProbe"):
        if dig(site.server, kind, "httpGet", "path") not in (None, "/healthz"):
            yield f"{kind}: {dig(site.server, kind, 'httpGet', 'path')}"


only_a_dead_process_is_restarted.broken_by(
    "liveness asks the database",
    lambda site: put(site.server, "livenessProbe", "httpGet", "path", value="/readyz"),
)


@promise
def only_a_replica_that_can_answer_is_sent_requests(site: Site) -> Iterator[str]:
    """Readiness asks for database, schema and keys."""
    if dig(site.server, "readinessProbe", "httpGet", "path") in (None, "/healthz", "/metrics"):
        yield f"{site.server.get('readinessProbe')}"


only_a_replica_that_can_answer_is_sent_requests.broken_by(
    "readiness asks for the process only",
    lambda site: put(site.server, "readinessProbe", "httpGet", "path", value="/healthz"),
)


@promise
def a_slow_start_is_waited_for(site: Site) -> Iterator[str]:
    """Two minutes, on a node that is busy pulling; within the time that a rollout is given."""
    if _seconds(site, "startupProbe") < 120:
        yield f"{_seconds(site, 'startupProbe')} s"
    if dig(site.deployment, "spec", "progressDeadlineSeconds", default=600) < 2 * _seconds(site, "startupProbe"):
        yield "the rollout is given up before a slow replica is"


a_slow_start_is_waited_for.broken_by(
    "a start may take ten seconds", lambda site: put(site.server, "startupProbe", "failureThreshold", value=5)
)
a_slow_start_is_waited_for.broken_by(
    "a rollout may take a minute", lambda site: put(site.deployment, "spec", "progressDeadlineSeconds", value=60)
)


@promise
def a_replica_that_hangs_is_noticed_soon(site: Site) -> Iterator[str]:
    """Within ten seconds nothing more is sent to it, within half a minute it is restarted; not for one late answer."""
    if not 20 <= _seconds(site, "livenessProbe") <= 40:
        yield f"liveness: {_seconds(site, 'livenessProbe')} s"
    if not 5 < _seconds(site, "readinessProbe") <= 10:
        yield f"readiness: {_seconds(site, 'readinessProbe')} s"
    for kind in _PROBES:
        if _probe(site, kind)["failureThreshold"] < 2:
            yield f"{kind}: one late answer is enough"


a_replica_that_hangs_is_noticed_soon.broken_by(
    "readiness is looked at once a minute", lambda site: put(site.server, "readinessProbe", "periodSeconds", value=60)
)
a_replica_that_hangs_is_noticed_soon.broken_by(
    "one late answer kills", lambda site: put(site.server, "livenessProbe", "failureThreshold", value=1)
)


@promise
def probes_wait_longer_than_the_server_thinks(site: Site) -> Iterator[str]:
    """It answers after its own patience with the database has ended; a probe that has left by then learns nothing."""
    patience = site.facts.readiness_patience
    if _probe(site, "readinessProbe")["timeoutSeconds"] <= patience:
        yield f"readiness: {_probe(site, 'readinessProbe')['timeoutSeconds']} s, the server takes up to {patience} s"
    for kind in _PROBES:
        if not 2 <= _probe(site, kind)["timeoutSeconds"] <= _probe(site, kind)["periodSeconds"]:
            yield f"{kind}: waits {_probe(site, kind)['timeoutSeconds']} s of {_probe(site, kind)['periodSeconds']} s"


probes_wait_longer_than_the_server_thinks.broken_by(
    "readiness waits for the default second", lambda site: drop(site.server, "readinessProbe", "timeoutSeconds")
)


# -- leaving ----------------------------------------------------------------------------------------------------------


def _sleep(site: Site) -> int:
    found: int = dig(site.server, "lifecycle", "preStop", "sleep", "seconds", default=0)
    return found


@promise
def a_replica_serves_until_everybody_knows_that_it_leaves(site: Site) -> Iterator[str]:
    """Proxies hear of it some seconds later; the platform's own sleep needs no shell in the image."""
    if not 5 <= _sleep(site) <= 15:
        yield f"preStop: {dig(site.server, 'lifecycle', 'preStop')}"


a_replica_serves_until_everybody_knows_that_it_leaves.broken_by(
    "no sleep before SIGTERM", lambda site: drop(site.server, "lifecycle")
)
a_replica_serves_until_everybody_knows_that_it_leaves.broken_by(
    "the sleep takes a shell",
    lambda site: put(site.server, "lifecycle", "preStop", value={"exec": {"command": ["sh", "-c", "sleep 10"]}}),
)


@promise
def nobody_is_killed_who_leaves_in_good_order(site: Site) -> Iterator[str]:
    """The grace is longer than the sleep, the delay and the drain together, and what is to be closed then."""
    delay, drain = float(site.setting("IDENTITY_SHUTDOWN_DELAY")), float(site.setting("IDENTITY_SHUTDOWN_GRACE"))
    needed = _sleep(site) + delay + drain + _CLOSING
    if site.pod.spec.get("terminationGracePeriodSeconds", 30) < needed:
        yield f"{site.pod.spec.get('terminationGracePeriodSeconds')} s, but {needed:g} s may be needed"


nobody_is_killed_who_leaves_in_good_order.broken_by(
    "the default grace", lambda site: drop(site.pod.spec, "terminationGracePeriodSeconds")
)
nobody_is_killed_who_leaves_in_good_order.broken_by(
    "a longer drain without a longer grace", lambda site: put(site.config, "IDENTITY_SHUTDOWN_GRACE", value="55")
)


@promise
def a_drain_outlasts_the_slowest_request(site: Site) -> Iterator[str]:
    """The routes give up on a request after 30 s at the latest; a mail or a hash takes less."""
    if float(site.setting("IDENTITY_SHUTDOWN_GRACE")) < 20:
        yield f"{site.setting('IDENTITY_SHUTDOWN_GRACE')} s"


a_drain_outlasts_the_slowest_request.broken_by(
    "a drain of two seconds", lambda site: put(site.config, "IDENTITY_SHUTDOWN_GRACE", value="2")
)


@promise
def a_rollout_never_takes_a_replica_away_first(site: Site) -> Iterator[str]:
    """One more comes, is ready and stays so for a while, and then one goes."""
    strategy = dig(site.deployment, "spec", "strategy", default={})
    if strategy.get("type", "RollingUpdate") != "RollingUpdate":
        yield f"{strategy}"
    rolling = strategy.get("rollingUpdate") or {}
    if rolling.get("maxUnavailable") != 0 or rolling.get("maxSurge") != 1:
        yield f"{rolling}"
    if dig(site.deployment, "spec", "minReadySeconds", default=0) < 5:
        yield f"minReadySeconds: {dig(site.deployment, 'spec', 'minReadySeconds')}"


a_rollout_never_takes_a_replica_away_first.broken_by(
    "one may be missing",
    lambda site: put(site.deployment, "spec", "strategy", "rollingUpdate", "maxUnavailable", value=1),
)
a_rollout_never_takes_a_replica_away_first.broken_by(
    "all are replaced at once", lambda site: put(site.deployment, "spec", "strategy", value={"type": "Recreate"})
)
a_rollout_never_takes_a_replica_away_first.broken_by(
    "ready is ready at once", lambda site: drop(site.deployment, "spec", "minReadySeconds")
)


@promise
def there_is_something_to_go_back_to(site: Site) -> Iterator[str]:
    """The last versions stay known, so that a rollout can be undone."""
    if not 2 <= dig(site.deployment, "spec", "revisionHistoryLimit", default=10) <= 10:
        yield f"revisionHistoryLimit: {site.deployment['spec']['revisionHistoryLimit']}"


there_is_something_to_go_back_to.broken_by(
    "no version before this one is known", lambda site: put(site.deployment, "spec", "revisionHistoryLimit", value=0)
)


# -- the migration ----------------------------------------------------------------------------------------------------


@promise
def the_migration_is_a_target_of_its_own(site: Site) -> Iterator[str]:
    """A Job cannot be changed, so applying a rollout with it in it fails; and it goes before, as another role."""
    for kind in ("Job", "CronJob"):
        for found in site.all(kind):
            yield f"production: {kind}/{found['metadata']['name']}"
    if not site.job:
        yield "there is no migration"
    for found in site.migrate:
        if found["kind"] in ("Deployment", "Service"):
            yield f"migrate: {found['kind']}/{found['metadata']['name']}"


the_migration_is_a_target_of_its_own.broken_by(
    "the migration is applied with the rollout", lambda site: site.production.append(site.job)
)


@promise
def the_migration_ends(site: Site) -> Iterator[str]:
    """Well, or after a few tries, or when its time is over; and it is cleared away, after it was waited for."""
    spec = site.job.get("spec") or {}
    if site.migration_pod.spec.get("restartPolicy") != "Never":
        yield f"restartPolicy: {site.migration_pod.spec.get('restartPolicy')}"
    if not 1 <= spec.get("backoffLimit", 6) <= 5:
        yield f"backoffLimit: {spec.get('backoffLimit')}"
    if not 600 <= spec.get("activeDeadlineSeconds", 0) <= 7200:
        yield f"activeDeadlineSeconds: {spec.get('activeDeadlineSeconds')}"
    if not 3600 <= spec.get("ttlSecondsAfterFinished", 0) <= 7 * 86400:
        yield f"ttlSecondsAfterFinished: {spec.get('ttlSecondsAfterFinished')}"


the_migration_ends.broken_by("a migration has no end", lambda site: drop(site.job, "spec", "activeDeadlineSeconds"))
the_migration_ends.broken_by(
    "nobody can read why it failed", lambda site: put(site.job, "spec", "ttlSecondsAfterFinished", value=0)
)
the_migration_ends.broken_by(
    "a failed migration is restarted in place",
    lambda site: put(site.migration_pod.spec, "restartPolicy", value="OnFailure"),
)
