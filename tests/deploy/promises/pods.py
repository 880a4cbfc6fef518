"""Pods that can do nothing but their work (Pod Security "restricted" and beyond), DEP-01 and DEP-07."""

from collections.abc import Iterator

from tests.deploy.promises import promise
from tests.deploy.site import OPERATOR, Site, dig, drop, put

CASES = ("DEP-01", "DEP-07")
_USER = 10001
_LEVEL = "pod-security.kubernetes.io/"
_TMP = "/tmp"  # noqa: S108
_WRITABLE = (_TMP, "Memory", "64Mi")
_FOR_A_TRAIL = (_TMP, "Memory", "256Mi")


@promise
def the_namespace_admits_restricted_pods_only(site: Site) -> Iterator[str]:
    """Whoever writes a pod, admission refuses one that could gain rights."""
    [*namespaces] = site.all("Namespace", site.namespace)
    if len(namespaces) != 1:
        yield f"{len(namespaces)} namespaces"
    for namespace in namespaces:
        labels = dig(namespace, "metadata", "labels", default={})
        for mode in ("enforce", "audit", "warn"):
            if labels.get(_LEVEL + mode) != "restricted":
                yield f"{mode}: {labels.get(_LEVEL + mode)}"


the_namespace_admits_restricted_pods_only.broken_by(
    "the namespace enforces the baseline only",
    lambda site: put(site.namespace, 0, "metadata", "labels", _LEVEL + "enforce", value="baseline"),
)


@promise
def everything_is_in_the_namespace(site: Site) -> Iterator[str]:
    """What is applied without `-n` must not end up in `default`."""
    name = dig(site.namespace, 0, "metadata", "name")
    for found in (*site.production, *site.migrate, *site.dev):
        if dig(found, "metadata", "namespace") != name:
            yield f"{found['kind']}/{found['metadata']['name']}: {dig(found, 'metadata', 'namespace')}"


everything_is_in_the_namespace.broken_by(
    "the budget is in the default namespace",
    lambda site: drop(site.find("PodDisruptionBudget", "identity-service"), "metadata", "namespace"),
)


@promise
def pods_run_as_a_user_without_a_name(site: Site) -> Iterator[str]:
    """The user that the image's files are made for, never root, whatever the image says."""
    for pod in site.pods():
        context = pod.spec.get("securityContext") or {}
        if context.get("runAsNonRoot") is not True:
            yield f"{pod.where}: root is not refused"
        if (context.get("runAsUser"), context.get("runAsGroup")) != (_USER, _USER):
            yield f"{pod.where}: runs as {context.get('runAsUser')}:{context.get('runAsGroup')}"
        for where, container in pod.containers():
            own = container.get("securityContext") or {}
            if own.keys() & {"runAsUser", "runAsGroup"} or own.get("runAsNonRoot") is False:
                yield f"{where}: says otherwise than its pod"


pods_run_as_a_user_without_a_name.broken_by(
    "the pod does not refuse root",
    lambda site: drop(site.pod.spec, "securityContext", "runAsNonRoot"),
)
pods_run_as_a_user_without_a_name.broken_by(
    "the server runs as root", lambda site: put(site.server, "securityContext", "runAsUser", value=0)
)


@promise
def containers_cannot_gain_privileges(site: Site) -> Iterator[str]:
    """No setuid program, and no privileged container, gives back what the pod gave up."""
    for where, container in site.containers():
        context = container.get("securityContext") or {}
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{where}: may escalate"
        if context.get("privileged"):
            yield f"{where}: privileged"


containers_cannot_gain_privileges.broken_by(
    "the server may escalate",
    lambda site: drop(site.server, "securityContext", "allowPrivilegeEscalation"),
)
containers_cannot_gain_privileges.broken_by(
    "the schema check is privileged",
    lambda site: put(site.schema_check, "securityContext", "privileged", value=True),
)


@promise
def containers_hold_no_capability(site: Site) -> Iterator[str]:
    """All are dropped, and none is added: the ports are above 1024."""
    for where, container in site.containers():
        capabilities = dig(container, "securityContext", "capabilities", default={})
        if capabilities.get("drop") != ["ALL"]:
            yield f"{where}: drops {capabilities.get('drop')}"
        if capabilities.get("add"):
            yield f"{where}: adds {capabilities['add']}"


containers_hold_no_capability.broken_by(
    "the migration keeps its capabilities",
    lambda site: drop(site.migrator, "securityContext", "capabilities"),
)
containers_hold_no_capability.broken_by(
    "the server may bind low ports",
    lambda site: put(site.server, "securityContext", "capabilities", "add", value=["NET_BIND_SERVICE"]),
)


@promise
def root_file_systems_are_read_only(site: Site) -> Iterator[str]:
    """Nothing that breaks in can change a program or leave one."""
    for where, container in site.containers():
        if dig(container, "securityContext", "readOnlyRootFilesystem") is not True:
            yield where


root_file_systems_are_read_only.broken_by(
    "the server's root is writable",
    lambda site: put(site.server, "securityContext", "readOnlyRootFilesystem", value=False),
)


@promise
def system_calls_are_filtered(site: Site) -> Iterator[str]:
    """By the runtime's own profile, on the pod, so that no container forgets it."""
    for pod in site.pods():
        if dig(pod.spec, "securityContext", "seccompProfile", "type") != "RuntimeDefault":
            yield pod.where
        for where, container in pod.containers():
            if dig(container, "securityContext", "seccompProfile") is not None:
                yield f"{where}: a profile of its own"


system_calls_are_filtered.broken_by(
    "the pod is unconfined",
    lambda site: put(site.pod.spec, "securityContext", "seccompProfile", "type", value="Unconfined"),
)


@promise
def pods_share_nothing_with_their_node(site: Site) -> Iterator[str]:
    """Neither its network, its processes, nor its files."""
    for pod in site.pods():
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(name):
                yield f"{pod.where}: {name}"
        for volume in pod.spec.get("volumes") or []:
            if "hostPath" in volume:
                yield f"{pod.where}: hostPath {volume['hostPath']}"
        for where, container in pod.containers():
            if any("hostPort" in port for port in container.get("ports") or []):
                yield f"{where}: hostPort"


pods_share_nothing_with_their_node.broken_by(
    "the pod is on the node's network", lambda site: put(site.pod.spec, "hostNetwork", value=True)
)
pods_share_nothing_with_their_node.broken_by(
    "the migration sees the node's files",
    lambda site: put(site.migration_pod.spec, "volumes", 0, value={"name": "tmp", "hostPath": {"path": "/tmp"}}),  # noqa: S108
)


@promise
def only_tmp_can_be_written(site: Site) -> Iterator[str]:
    """And it is memory, of a size that the memory limit was made for; an operator's takes a trail that was exported."""
    for pod in site.pods():
        wanted = _FOR_A_TRAIL if pod.labels.items() >= OPERATOR.items() else _WRITABLE
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or []}
        for name, volume in volumes.items():
            if volume.keys() - {"name", "emptyDir", "secret"}:
                yield f"{pod.where}: volume {name}"
        for where, container in pod.containers():
            for mount in container.get("volumeMounts") or []:
                volume = volumes.get(mount["name"], {})
                if mount.get("readOnly") is True and "emptyDir" not in volume:
                    continue
                bounds = volume.get("emptyDir") or {}
                found = (mount["mountPath"], bounds.get("medium"), bounds.get("sizeLimit"))
                if found != wanted:
                    yield f"{where}: {found}"


@promise
def every_container_has_a_tmp(site: Site) -> Iterator[str]:
    """Libraries look for a place to write, and the root has none."""
    for where, container in site.containers():
        if not any(mount["mountPath"] == _TMP for mount in container.get("volumeMounts") or []):
            yield where


every_container_has_a_tmp.broken_by(
    "the migration has nowhere to write", lambda site: drop(site.migrator, "volumeMounts")
)


only_tmp_can_be_written.broken_by(
    "what may be written has no bound", lambda site: drop(site.pod.spec, "volumes", 0, "emptyDir", "sizeLimit")
)
only_tmp_can_be_written.broken_by(
    "what is written is on the node's disk",
    lambda site: drop(site.migration_pod.spec, "volumes", 0, "emptyDir", "medium"),
)


@promise
def no_pod_holds_a_token_of_the_cluster(site: Site) -> Iterator[str]:
    """Nobody here talks to the cluster's API, so nobody can be made to."""
    for found in (*site.production, *site.migrate):
        if found["kind"] == "ServiceAccount" and found.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{found['metadata']['name']}"
    for pod in site.pods():
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.where
        for volume in pod.spec.get("volumes") or []:
            if "serviceAccountToken" in str(volume):
                yield f"{pod.where}: volume {volume['name']}"


no_pod_holds_a_token_of_the_cluster.broken_by(
    "the pod mounts its token", lambda site: put(site.pod.spec, "automountServiceAccountToken", value=True)
)
no_pod_holds_a_token_of_the_cluster.broken_by(
    "the migration's account hands out tokens",
    lambda site: drop(
        site.find("ServiceAccount", "identity-service-migrate", site.migrate), "automountServiceAccountToken"
    ),
)


@promise
def server_operator_and_migration_have_accounts_of_their_own(site: Site) -> Iterator[str]:
    """So that whatever is granted to one of them some day is not granted to the others."""
    server, operator, migration = (
        pod.spec.get("serviceAccountName") for pod in (site.pod, site.operator_pod, site.migration_pod)
    )
    if len({server, operator, migration}) != 3:
        yield f"they are {server}, {operator} and {migration}"
    for name, among in ((server, site.production), (operator, site.production), (migration, site.migrate)):
        if not name or name == "default" or not site.find("ServiceAccount", name, among):
            yield f"there is no account {name}"


server_operator_and_migration_have_accounts_of_their_own.broken_by(
    "the migration uses the server's account",
    lambda site: put(site.migration_pod.spec, "serviceAccountName", value="identity-service"),
)


@promise
def nobody_is_granted_rights_in_the_cluster(site: Site) -> Iterator[str]:
    """No role, and no binding to one."""
    for found in (*site.production, *site.migrate, *site.dev):
        if found["kind"] in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
            yield f"{found['kind']}/{found['metadata']['name']}"


nobody_is_granted_rights_in_the_cluster.broken_by(
    "the server may read Secrets",
    lambda site: site.production.append(
        {"kind": "RoleBinding", "metadata": {"name": "reads-secrets", "namespace": "identity"}}
    ),
)


@promise
def pods_are_not_told_of_other_services(site: Site) -> Iterator[str]:
    """Service links would put IDENTITY_SERVICE_PORT and the like into the environment, where settings are read."""
    for pod in site.pods():
        if pod.spec.get("enableServiceLinks") is not False:
            yield pod.where


pods_are_not_told_of_other_services.broken_by(
    "the migration has service links", lambda site: drop(site.migration_pod.spec, "enableServiceLinks")
)


@promise
def containers_are_called_what_they_are(site: Site) -> Iterator[str]:
    """Dashboards and alerts look for them by name, and kubectl by the annotation."""
    pods = (site.pod, site.operator_pod, site.migration_pod)
    names = [container.get("name") for pod in pods for _, container in pod.containers()]
    if names != ["schema", "identity-service", "operator", "migrate"]:
        yield f"{names}"
    annotations = dig(site.deployment, "spec", "template", "metadata", "annotations", default={})
    if annotations.get("kubectl.kubernetes.io/default-container") != "identity-service":
        yield f"{annotations}"


containers_are_called_what_they_are.broken_by(
    "the server has another name", lambda site: put(site.server, "name", value="server")
)


@promise
def the_schema_is_only_looked_at_before_serving(site: Site) -> Iterator[str]:
    """The pod waits for a migration; it never runs one, for several would start at once, under the wrong role."""
    commands = [container.get("command") for container in site.pod.spec.get("initContainers") or []]
    if commands != [["identity-service", "migrate", "--check"]]:
        yield f"before serving: {commands}"


the_schema_is_only_looked_at_before_serving.broken_by(
    "every pod migrates", lambda site: site.schema_check["command"].remove("--check")
)
the_schema_is_only_looked_at_before_serving.broken_by(
    "nobody looks at the schema", lambda site: drop(site.pod.spec, "initContainers")
)


@promise
def containers_run_the_commands_that_there_are(site: Site) -> Iterator[str]:
    """Spelled out, so that an image's entry point cannot put anything before them. An operator's pod runs none yet."""
    for pod in site.pods():
        waits = pod.labels.items() >= OPERATOR.items()
        wanted = [["sleep", "infinity"]] if waits else [["identity-service", name] for name in ("serve", "migrate")]
        for where, container in pod.containers():
            if container.get("args") or container.get("command", [])[:2] not in wanted:
                yield f"{where}: {container.get('command')} {container.get('args')}"


containers_run_the_commands_that_there_are.broken_by(
    "the development server runs in production",
    lambda site: put(site.server, "command", value=["identity-service", "dev"]),
)


# -- images -----------------------------------------------------------------------------------------------------------


def _image(container: dict[str, str]) -> tuple[str, str]:
    name, at, digest = container.get("image", "").partition("@")
    if at:
        return name, digest
    name, _, tag = name.rpartition(":")
    return name, tag


@promise
def images_of_production_are_pinned(site: Site) -> Iterator[str]:
    """By this version's tag until somebody pins the digest that they have tested; never by a name that moves."""
    pods = (site.pod, site.operator_pod, site.migration_pod)
    for where, container in (each for pod in pods for each in pod.containers()):
        name, pin = _image(container)
        if not name or not (pin == site.facts.version or (pin.startswith("sha256:") and len(pin) == 71)):
            yield f"{where}: {container.get('image')}"


images_of_production_are_pinned.broken_by(
    "all images are the latest",
    lambda site: [
        put(container, "image", value="registry.example/identity-service:latest")
        for container in (site.server, site.schema_check, site.operator, site.migrator)
    ],
)


@promise
def the_migration_is_of_the_version_that_will_serve(site: Site) -> Iterator[str]:
    """One image for the server, for what looks at the schema, for what changes it, and for an operator's commands."""
    containers = (site.server, site.schema_check, site.operator, site.migrator)
    images = {container.get("image") for container in containers if container}
    if len(images) != 1:
        yield f"{images}"


the_migration_is_of_the_version_that_will_serve.broken_by(
    "the migration is of another version",
    lambda site: put(site.migrator, "image", value="registry.example/identity-service@sha256:" + "0" * 64),
)


@promise
def an_image_is_pulled_once(site: Site) -> Iterator[str]:
    """It is pinned, so a node that has it needs no registry to start a replica."""
    for where, container in site.containers():
        if container.get("imagePullPolicy") != "IfNotPresent":
            yield f"{where}: {container.get('imagePullPolicy')}"


an_image_is_pulled_once.broken_by(
    "every start asks the registry", lambda site: put(site.server, "imagePullPolicy", value="Always")
)


@promise
def only_overlays_name_images(site: Site) -> Iterator[str]:
    """`images:` in the base or in a component that all share silently wins over an overlay's pin."""
    for where, kustomization in site.kustomizations.items():
        if "images" in kustomization and not where.startswith("overlays/"):
            yield where


only_overlays_name_images.broken_by(
    "the base renames the image",
    lambda site: put(site.kustomizations, "base", "images", value=[{"name": "identity-service", "newName": "x"}]),
)
