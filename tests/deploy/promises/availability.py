"""Enough replicas, apart from each other, whatever is drained, scaled or full (DEP-10)."""

import math
import re
from collections.abc import Iterator

from tests.deploy.promises import promise
from tests.deploy.site import SERVER, Document, Site, dig, drop, put, selects

CASES = ("DEP-10",)
_MIB = 2**20
_IDLE = 160 * _MIB  # of a replica that has served for a while, password hashing apart
_UNITS = {"Ki": 2**10, "Mi": _MIB, "Gi": 2**30}


def _bytes(quantity: str | None) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", quantity or "0Ki").groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit]


def _scaler(site: Site) -> Document:
    found: Document = site.find("HorizontalPodAutoscaler", "identity-service").get("spec") or {}
    return found


def _budget(site: Site) -> Document:
    found: Document = site.find("PodDisruptionBudget", "identity-service").get("spec") or {}
    return found


@promise
def the_number_of_replicas_belongs_to_the_autoscaler(site: Site) -> Iterator[str]:
    """A number in the Deployment would take back, at every rollout, what the load has asked for."""
    if "replicas" in site.deployment.get("spec", {}):
        yield f"replicas: {site.deployment['spec']['replicas']}"
    target = _scaler(site).get("scaleTargetRef")
    if target != {"apiVersion": "apps/v1", "kind": "Deployment", "name": "identity-service"}:
        yield f"scales {target}"


the_number_of_replicas_belongs_to_the_autoscaler.broken_by(
    "the Deployment has a number", lambda site: put(site.deployment, "spec", "replicas", value=3)
)
the_number_of_replicas_belongs_to_the_autoscaler.broken_by(
    "another Deployment is scaled", lambda site: put(_scaler(site), "scaleTargetRef", "name", value="identity")
)


@promise
def there_are_always_three_replicas(site: Site) -> Iterator[str]:
    """One may be drained while another dies, and somebody still answers."""
    if not 3 <= _scaler(site).get("minReplicas", 1) < _scaler(site).get("maxReplicas", 0):
        yield f"{_scaler(site).get('minReplicas')} to {_scaler(site).get('maxReplicas')}"


there_are_always_three_replicas.broken_by(
    "one replica at night", lambda site: put(_scaler(site), "minReplicas", value=1)
)


@promise
def load_is_measured_against_what_was_asked_for(site: Site) -> Iterator[str]:
    """A share of the CPU request: it must be there, and be left room before the next replica has started."""
    targets = [
        dig(metric, "resource", "target", "averageUtilization", default=0)
        for metric in _scaler(site).get("metrics") or []
        if (metric.get("type"), dig(metric, "resource", "name"), dig(metric, "resource", "target", "type"))
        == ("Resource", "cpu", "Utilization")
    ]
    if len(targets) != 1 or not 50 <= targets[0] <= 80:
        yield f"metrics: {_scaler(site).get('metrics')}"
    if dig(site.server, "resources", "requests", "cpu") is None:
        yield "no CPU was asked for"


load_is_measured_against_what_was_asked_for.broken_by(
    "more only when all is used",
    lambda site: put(_scaler(site), "metrics", 0, "resource", "target", "averageUtilization", value=100),
)


@promise
def more_replicas_come_at_once(site: Site) -> Iterator[str]:
    """A crowd is not waited out: at least one more in half a minute, and not all that there may be."""
    up = dig(_scaler(site), "behavior", "scaleUp", default={})
    if up.get("stabilizationWindowSeconds", 0) > 30:
        yield f"after {up['stabilizationWindowSeconds']} s"
    policies = [(each.get("type"), each.get("value"), each.get("periodSeconds")) for each in up.get("policies") or []]
    if not policies or any(
        kind != "Pods" or not 1 <= (value or 0) <= 4 or not 15 <= (seconds or 0) <= 30
        for kind, value, seconds in policies
    ):
        yield f"{policies}"


more_replicas_come_at_once.broken_by(
    "one more every five minutes",
    lambda site: put(_scaler(site), "behavior", "scaleUp", "policies", 0, "periodSeconds", value=300),
)


@promise
def replicas_leave_one_at_a_time(site: Site) -> Iterator[str]:
    """Slower than one takes to drain, and not for a pause in the load."""
    down = dig(_scaler(site), "behavior", "scaleDown", default={})
    policies = down.get("policies") or []
    grace = site.pod.spec.get("terminationGracePeriodSeconds", 30)
    if down.get("stabilizationWindowSeconds", 300) < 300:
        yield f"after {down['stabilizationWindowSeconds']} s"
    if len(policies) != 1 or policies[0].get("type") != "Pods" or policies[0].get("value") != 1:
        yield f"{policies}"
    elif policies[0].get("periodSeconds", 0) < grace:
        yield f"one each {policies[0].get('periodSeconds')} s, and leaving may take {grace} s"


replicas_leave_one_at_a_time.broken_by(
    "half of them leave at once",
    lambda site: put(
        _scaler(site),
        "behavior",
        "scaleDown",
        "policies",
        value=[{"type": "Percent", "value": 50, "periodSeconds": 15}],
    ),
)


@promise
def drains_take_one_replica_at_a_time(site: Site) -> Iterator[str]:
    """A budget in absolute terms, which no number of replicas turns into none or all."""
    if _budget(site).get("maxUnavailable") != 1 or "minAvailable" in _budget(site):
        yield f"{_budget(site)}"
    if not selects(_budget(site).get("selector"), site.pod.labels):
        yield f"it is about {_budget(site).get('selector')}"


drains_take_one_replica_at_a_time.broken_by(
    "a drain may take them all", lambda site: put(_budget(site), "maxUnavailable", value="100%")
)
drains_take_one_replica_at_a_time.broken_by(
    "the budget is about nobody",
    lambda site: put(_budget(site), "selector", "matchLabels", "app.kubernetes.io/name", value="identity"),
)


@promise
def a_drain_leaves_more_than_one(site: Site) -> Iterator[str]:
    """At the smallest number that the autoscaler goes down to; and a drain is possible at all."""
    allowed, least = _budget(site).get("maxUnavailable"), _scaler(site).get("minReplicas", 1)
    if isinstance(allowed, str):
        allowed = math.ceil(least * int(allowed.rstrip("%")) / 100)
    if not allowed or least - allowed < 2:
        yield f"{allowed} of {least} may be away"


a_drain_leaves_more_than_one.broken_by(
    "a drain may take two of three", lambda site: put(_budget(site), "maxUnavailable", value=2)
)
a_drain_leaves_more_than_one.broken_by("no drain ever ends", lambda site: put(_budget(site), "maxUnavailable", value=0))


@promise
def unready_replicas_are_kept_for_the_keys_they_serve(site: Site) -> Iterator[str]:
    """With the database away all are unready and still answer for the keys: no drain may clear them out."""
    if _budget(site).get("unhealthyPodEvictionPolicy", "IfHealthyBudget") != "IfHealthyBudget":
        yield f"{_budget(site)['unhealthyPodEvictionPolicy']}"


unready_replicas_are_kept_for_the_keys_they_serve.broken_by(
    "unready replicas may always be evicted",
    lambda site: put(_budget(site), "unhealthyPodEvictionPolicy", value="AlwaysAllow"),
)


@promise
def replicas_stand_on_different_nodes_and_in_different_zones(site: Site) -> Iterator[str]:
    """Counted for each version by itself; nodes that take nobody are not counted."""
    wanted = {"kubernetes.io/hostname": "DoNotSchedule", "topology.kubernetes.io/zone": "ScheduleAnyway"}
    found = {each.get("topologyKey"): each for each in site.pod.spec.get("topologySpreadConstraints") or []}
    for key, otherwise in wanted.items():
        constraint = found.get(key, {})
        if constraint.get("maxSkew") != 1 or constraint.get("whenUnsatisfiable") != otherwise:
            yield f"{key}: {constraint}"
        elif constraint.get("matchLabelKeys") != ["pod-template-hash"] or constraint.get("nodeTaintsPolicy") != "Honor":
            yield f"{key}: counts {constraint}"
        elif not selects(constraint.get("labelSelector"), site.pod.labels):
            yield f"{key}: counts others"


replicas_stand_on_different_nodes_and_in_different_zones.broken_by(
    "all may be on one node", lambda site: drop(site.pod.spec, "topologySpreadConstraints", 0)
)
replicas_stand_on_different_nodes_and_in_different_zones.broken_by(
    "a rollout is spread by what it replaces",
    lambda site: drop(site.pod.spec, "topologySpreadConstraints", 1, "matchLabelKeys"),
)


@promise
def selectors_pick_the_server_and_nobody_else(site: Site) -> Iterator[str]:
    """Not the migration nor an operator's pod, which have the same name; and not nobody."""
    selectors = [("Deployment", dig(site.deployment, "spec", "selector")), ("budget", _budget(site).get("selector"))]
    selectors += [
        (f"Service/{found['metadata']['name']}", {"matchLabels": dig(found, "spec", "selector")})
        for found in site.all("Service")
    ]
    selectors += [
        (str(each.get("topologyKey")), each.get("labelSelector"))
        for each in site.pod.spec.get("topologySpreadConstraints") or []
    ]
    for where, selector in selectors:
        if selector != {"matchLabels": SERVER} or not selects(selector, site.pod.labels):
            yield f"{where}: {selector}"
        for pod in (site.migration_pod, site.operator_pod):
            if selects(selector, pod.labels):
                yield f"{where}: picks {pod.where}"


selectors_pick_the_server_and_nobody_else.broken_by(
    "a Service picks the other pods, too",
    lambda site: drop(site.find("Service", "identity-service"), "spec", "selector", "app.kubernetes.io/component"),
)


# -- sizes that hang together -----------------------------------------------------------------------------------------


@promise
def every_container_says_what_it_needs(site: Site) -> Iterator[str]:
    """CPU and memory asked for, memory bounded; no CPU limit, which would slow signing in bursts."""
    for where, container in site.containers():
        resources = container.get("resources") or {}
        for name, quantity in (*(resources.get("requests") or {}).items(), *(resources.get("limits") or {}).items()):
            if not re.fullmatch({"cpu": r"[1-9]\d*m?", "memory": r"[1-9]\d*[MG]i"}.get(name, ""), str(quantity)):
                yield f"{where}: {name} {quantity}"
        if (resources.get("requests") or {}).keys() < {"cpu", "memory"}:
            yield f"{where}: asks for {resources.get('requests')}"
        if (resources.get("limits") or {}).keys() != {"memory"}:
            yield f"{where}: is limited by {resources.get('limits')}"


every_container_says_what_it_needs.broken_by(
    "the migration has no bound", lambda site: drop(site.migrator, "resources", "limits")
)
every_container_says_what_it_needs.broken_by(
    "the migration asks for a quantity that is none",
    lambda site: put(site.migrator, "resources", "requests", "memory", value="128MB"),
)
every_container_says_what_it_needs.broken_by(
    "the server's CPU is limited", lambda site: put(site.server, "resources", "limits", "cpu", value="1")
)


@promise
def memory_is_enough_for_passwords_at_the_same_time(site: Site) -> Iterator[str]:
    """Idle, Argon2's memory for each hashing thread, and all of /tmp; what is asked for covers a busy replica."""
    hashing = int(site.setting("IDENTITY_ARGON2_MEMORY_KIB")) * 1024 * int(site.setting("IDENTITY_HASH_THREADS"))
    writable = sum(_bytes(dig(each, "emptyDir", "sizeLimit")) for each in site.pod.spec.get("volumes") or [])
    limit, request = (_bytes(dig(site.server, "resources", kind, "memory")) for kind in ("limits", "requests"))
    if limit < _IDLE + hashing + writable:
        yield f"limit {limit // _MIB} MiB; {(_IDLE + hashing + writable) // _MIB} MiB may be needed"
    if request < _IDLE + hashing:
        yield f"request {request // _MIB} MiB; {(_IDLE + hashing) // _MIB} MiB are needed when it is busy"


memory_is_enough_for_passwords_at_the_same_time.broken_by(
    "more hashing threads in the same memory", lambda site: put(site.config, "IDENTITY_HASH_THREADS", value="32")
)
memory_is_enough_for_passwords_at_the_same_time.broken_by(
    "less memory", lambda site: put(site.server, "resources", "limits", "memory", value="256Mi")
)
memory_is_enough_for_passwords_at_the_same_time.broken_by(
    "less is asked for than is used", lambda site: put(site.server, "resources", "requests", "memory", value="64Mi")
)


@promise
def a_command_may_take_what_it_needs(site: Site) -> Iterator[str]:
    """As much as a replica that is idle, for one password at a time, and a /tmp with a trail in it."""
    hashing = int(site.setting("IDENTITY_ARGON2_MEMORY_KIB")) * 1024
    writable = sum(_bytes(dig(each, "emptyDir", "sizeLimit")) for each in site.operator_pod.spec.get("volumes") or [])
    limit = _bytes(dig(site.operator, "resources", "limits", "memory"))
    if limit < _IDLE + hashing + writable:
        yield f"limit {limit // _MIB} MiB; {(_IDLE + hashing + writable) // _MIB} MiB may be needed"


a_command_may_take_what_it_needs.broken_by(
    "a trail leaves a command no memory",
    lambda site: put(site.operator, "resources", "limits", "memory", value="384Mi"),
)


def _number(pattern: str, text: str) -> int:
    """Return the number that a document states. Raises AttributeError where it does not."""
    return int(re.search(pattern, text)[1])  # type: ignore[index]


@promise
def all_replicas_together_fit_the_database(site: Site) -> Iterator[str]:
    """At the largest number, in the middle of a rollout, with some still leaving, and with an operator's pod."""
    surge = dig(site.deployment, "spec", "strategy", "rollingUpdate", "maxSurge", default=1)
    period = dig(site.deployment, "spec", "minReadySeconds", default=0) + 2  # a new replica, at the very soonest
    leaving = math.ceil(dig(site.server, "lifecycle", "preStop", "sleep", "seconds", default=0) / period) + 1
    replicas = _scaler(site).get("maxReplicas", 0) + surge + leaving
    needed = (replicas + 1) * int(site.setting("IDENTITY_DATABASE_POOL_SIZE"))
    allowed = _number(r"ROLE identity_service CONNECTION LIMIT (\d+);", site.roles)
    migrator = _number(r"ROLE identity_migrator CONNECTION LIMIT (\d+);", site.roles)
    server = _number(r"`max_connections` of at least (\d+)", site.readme)
    if needed > allowed:
        yield f"{replicas} replicas and a command may hold {needed} connections, the role has {allowed}"
    if allowed + migrator + 20 > server:
        yield f"the roles may take {allowed + migrator} of {server}"


all_replicas_together_fit_the_database.broken_by(
    "more replicas than connections", lambda site: put(_scaler(site), "maxReplicas", value=20)
)
all_replicas_together_fit_the_database.broken_by(
    "no connection is left for an operator",
    lambda site: setattr(site, "roles", site.roles.replace("CONNECTION LIMIT 150;", "CONNECTION LIMIT 140;")),
)
all_replicas_together_fit_the_database.broken_by(
    "larger pools", lambda site: put(site.config, "IDENTITY_DATABASE_POOL_SIZE", value="20")
)
all_replicas_together_fit_the_database.broken_by(
    "a smaller database than the role may fill",
    lambda site: setattr(site, "readme", site.readme.replace("of at least 200", "of at least 100")),
)
