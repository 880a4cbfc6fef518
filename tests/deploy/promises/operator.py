"""A pod for an operator's commands while no server runs: nobody's way in, and gone when its work is done."""

from collections.abc import Iterator

from identity_service.settings import UnsafeSettings
from tests.deploy.promises import promise
from tests.deploy.promises.pods import (
    containers_run_the_commands_that_there_are,
    only_tmp_can_be_written,
    root_file_systems_are_read_only,
    server_operator_and_migration_have_accounts_of_their_own,
    the_migration_is_of_the_version_that_will_serve,
)
from tests.deploy.site import OPERATOR, Document, Site, dig, drop, pod_of, put, selects, settings_of

_NAME = "identity-service-operator"
_WAYS = {("UDP", 53), ("TCP", 53), ("TCP", 5432)}
_NOT_ITS = frozenset(("IDENTITY_REDIS_URL", "IDENTITY_SMTP_PASSWORD"))
"""What the servers connect to and no command does."""


def _clusters(site: Site) -> tuple[tuple[str, list[Document]], ...]:
    return ("production", site.production), ("with Ingress", site.with_ingress()), ("dev", site.dev)


def _operator(site: Site, among: list[Document]) -> Document:
    return site.find("Deployment", _NAME, among)


# -- as many as are asked for -----------------------------------------------------------------------------------------


@promise
def an_operator_s_pod_is_there_only_when_somebody_asks_for_it(site: Site) -> Iterator[str]:
    """The manifests take it back to none, no autoscaler has a say, and there are never two to choose from."""
    for where, among in _clusters(site):
        spec = _operator(site, among).get("spec") or {}
        if spec.get("replicas") != 0:
            yield f"{where}: {spec.get('replicas')} replicas"
        if dig(spec, "strategy", "type") != "Recreate":
            yield f"{where}: {spec.get('strategy')}"
        if spec.get("selector") != {"matchLabels": OPERATOR}:
            yield f"{where}: {spec.get('selector')}"
        for scaler in site.all("HorizontalPodAutoscaler", among):
            if dig(scaler, "spec", "scaleTargetRef", "name") == _NAME:
                yield f"{where}: scaled by {scaler['metadata']['name']}"


an_operator_s_pod_is_there_only_when_somebody_asks_for_it.broken_by(
    "an operator's pod always runs", lambda site: put(site.operator_deployment, "spec", "replicas", value=1)
)
an_operator_s_pod_is_there_only_when_somebody_asks_for_it.broken_by(
    "whoever left an operator's pod running finds it there",
    lambda site: drop(site.operator_deployment, "spec", "replicas"),
)
an_operator_s_pod_is_there_only_when_somebody_asks_for_it.broken_by(
    "development has an operator's pod at all times",
    lambda site: put(_operator(site, site.dev), "spec", "replicas", value=1),
)
an_operator_s_pod_is_there_only_when_somebody_asks_for_it.broken_by(
    "an operator's pod is scaled by the load",
    lambda site: site.production.append(
        {
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": _NAME, "namespace": "identity"},
            "spec": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": _NAME}},
        }
    ),
)
an_operator_s_pod_is_there_only_when_somebody_asks_for_it.broken_by(
    "an operator's pod is replaced by a second one beside it",
    lambda site: drop(site.operator_deployment, "spec", "strategy"),
)


@promise
def an_operator_s_pod_soon_ends(site: Site) -> Iterator[str]:
    """`sleep` as process 1 does not hear SIGTERM: the whole grace is waited out, by whoever drains a node, too."""
    for where, among in _clusters(site):
        grace = pod_of(_operator(site, among), where).spec.get("terminationGracePeriodSeconds", 30)
        if not 5 <= grace <= 15:
            yield f"{where}: {grace} s"


an_operator_s_pod_soon_ends.broken_by(
    "an operator's pod has a server's grace",
    lambda site: put(site.operator_pod.spec, "terminationGracePeriodSeconds", value=60),
)
an_operator_s_pod_soon_ends.broken_by(
    "a command is cut off at once",
    lambda site: put(site.operator_pod.spec, "terminationGracePeriodSeconds", value=0),
)


# -- who reaches whom -------------------------------------------------------------------------------------------------


@promise
def nobody_comes_to_an_operator_s_pod(site: Site) -> Iterator[str]:
    """It listens to nothing: no port, no Service or budget that picks it, no probe that would end what it does."""
    for where, among in _clusters(site):
        pod = pod_of(_operator(site, among), where)
        for _, container in pod.containers():
            for key in ("ports", "startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):
                if key in container:
                    yield f"{where}: {key}"
        for kind in ("Service", "PodDisruptionBudget", "PodMonitor"):
            for found in site.all(kind, among):
                selector = dig(found, "spec", "selector")
                if selects({"matchLabels": selector} if kind == "Service" else selector, pod.labels):
                    yield f"{where}: {kind}/{found['metadata']['name']} picks it"
        for name, _ in _rules(among, "ingress", pod.labels):
            yield f"{where}: {name} lets somebody in"


def _rules(among: list[Document], direction: str, labels: dict[str, str]) -> Iterator[tuple[str, Document]]:
    """Yield the rules of every policy that is about pods with these labels, with the policy's name."""
    for policy in among:
        if policy["kind"] == "NetworkPolicy" and selects(dig(policy, "spec", "podSelector"), labels):
            for rule in dig(policy, "spec", direction, default=[]):
                yield policy["metadata"]["name"], rule


nobody_comes_to_an_operator_s_pod.broken_by(
    "an operator's pod has a port", lambda site: put(site.operator, "ports", value=[{"containerPort": 8000}])
)
nobody_comes_to_an_operator_s_pod.broken_by(
    "an operator's pod is ended while the database is away",
    lambda site: put(
        site.operator, "livenessProbe", value={"exec": {"command": ["identity-service", "migrate", "--check"]}}
    ),
)
nobody_comes_to_an_operator_s_pod.broken_by(
    "the budget counts an operator's pod",
    lambda site: drop(
        site.find("PodDisruptionBudget", "identity-service"),
        *("spec", "selector", "matchLabels", "app.kubernetes.io/component"),
    ),
)
nobody_comes_to_an_operator_s_pod.broken_by(
    "the gateway reaches an operator's pod",
    lambda site: site.production.append(_let_in()),
)


def _let_in() -> Document:
    gateway = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}
    return {
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{_NAME}-from-gateway", "namespace": "identity"},
        "spec": {
            "podSelector": {"matchLabels": OPERATOR},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [gateway], "ports": [{"protocol": "TCP", "port": 8000}]}],
        },
    }


@promise
def an_operator_s_commands_go_out_to_postgresql_and_nowhere_else(site: Site) -> Iterator[str]:
    """And ask DNS where that is."""
    for where, among in _clusters(site):
        labels = pod_of(_operator(site, among), where).labels
        found = {
            (opening.get("protocol", "TCP"), opening.get("port"))
            for _, rule in _rules([*among, *site.tracing], "egress", labels)
            for opening in rule.get("ports") or [{}]
        }
        if found != _WAYS:
            yield f"{where}: {sorted(found, key=str)}"


an_operator_s_commands_go_out_to_postgresql_and_nowhere_else.broken_by(
    "an operator's commands do not reach the database",
    lambda site: site.production.remove(site.find("NetworkPolicy", f"{_NAME}-to-postgresql")),
)
an_operator_s_commands_go_out_to_postgresql_and_nowhere_else.broken_by(
    "an operator's commands ask DNS by UDP only",
    lambda site: drop(site.find("NetworkPolicy", f"{_NAME}-to-dns"), "spec", "egress", 0, "ports", 1),
)
an_operator_s_commands_go_out_to_postgresql_and_nowhere_else.broken_by(
    "an operator's commands may carry things away",
    lambda site: site.find("NetworkPolicy", f"{_NAME}-to-postgresql")["spec"]["egress"][0]["ports"].append(
        {"protocol": "TCP", "port": 443}
    ),
)


# -- what it is told --------------------------------------------------------------------------------------------------


def _environment(site: Site, among: list[Document], name: str) -> dict[str, str]:
    """Return the environment of a Deployment's container; what comes from a Secret is only named."""
    container = dig(site.find("Deployment", name, among), "spec", "template", "spec", "containers", 0, default={})
    environment: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        environment |= site.find("ConfigMap", dig(source, "configMapRef", "name"), among).get("data") or {}
    for variable in container.get("env") or []:
        reference = dig(variable, "valueFrom", "secretKeyRef", default={})
        url = f"postgresql+psycopg://{reference.get('name')}@{reference.get('key')}/d"
        environment[variable["name"]] = variable.get("value", url)
    return environment


@promise
def an_operator_s_commands_have_the_settings_of_the_servers(site: Site) -> Iterator[str]:
    """All of them but what only servers connect to, so that a command does what a server would; and they suffice."""
    for where, among in _clusters(site):
        operator, server = (_environment(site, among, name) for name in (_NAME, "identity-service"))
        wanted = {name: value for name, value in server.items() if name not in _NOT_ITS}
        if operator != wanted:
            yield f"{where}: {sorted(dict(operator.items() ^ wanted.items()))}"
        try:
            settings_of(operator)
        except UnsafeSettings as error:
            yield f"{where}: {error}"


an_operator_s_commands_have_the_settings_of_the_servers.broken_by(
    "an operator's commands know no settings", lambda site: drop(site.operator, "envFrom")
)
an_operator_s_commands_have_the_settings_of_the_servers.broken_by(
    "an operator's commands are a developer's",
    lambda site: site.operator["env"].append({"name": "IDENTITY_ENVIRONMENT", "value": "development"}),
)
an_operator_s_commands_have_the_settings_of_the_servers.broken_by(
    "an operator's commands in development go to another database",
    lambda site: put(
        _operator(site, site.dev),
        *("spec", "template", "spec", "containers", 0, "env", 0, "valueFrom", "secretKeyRef", "name"),
        value="identity-database-migrator",
    ),
)


# -- and what holds for every pod -------------------------------------------------------------------------------------


only_tmp_can_be_written.broken_by(
    "the trail that an operator reads is on the node's disk",
    lambda site: drop(site.operator_pod.spec, "volumes", 0, "emptyDir", "medium"),
)
root_file_systems_are_read_only.broken_by(
    "an operator may change the program",
    lambda site: drop(site.operator, "securityContext", "readOnlyRootFilesystem"),
)
server_operator_and_migration_have_accounts_of_their_own.broken_by(
    "the operator uses the server's account",
    lambda site: put(site.operator_pod.spec, "serviceAccountName", value="identity-service"),
)
containers_run_the_commands_that_there_are.broken_by(
    "the operator's pod waits behind the image's entry point",
    lambda site: site.operator.update(args=site.operator.pop("command")),
)
containers_run_the_commands_that_there_are.broken_by(
    "the operator's pod is a server", lambda site: put(site.operator, "command", value=["identity-service", "serve"])
)
the_migration_is_of_the_version_that_will_serve.broken_by(
    "an operator's commands are of another version",
    lambda site: put(site.operator, "image", value="registry.example/identity-service@sha256:" + "0" * 64),
)
