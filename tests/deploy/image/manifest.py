"""
Read a rendered manifest the way a cluster does: into pods, with every reference resolved.

What bears on how a container runs is either understood or refused: a field that this module does not know raises
Unmapped, so that no line of a manifest passes for tested that was not.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.image.report import NotSo

Object = Mapping[str, Any]
Secrets = Callable[[str, str], str]
"""Return the value of a Secret's key: (secret, key)."""

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

# Where a pod is scheduled and how its copies are replaced says nothing about one container on one machine.
_ELSEWHERE_POD = (
    *(
        "affinity",
        "automountServiceAccountToken",
        "dnsPolicy",
        "enableServiceLinks",
        "imagePullSecrets",
        "nodeSelector",
    ),
    *("priorityClassName", "restartPolicy", "schedulerName", "serviceAccountName", "tolerations"),
    "topologySpreadConstraints",
)
_ELSEWHERE_CONTAINER = ("imagePullPolicy", "terminationMessagePath", "terminationMessagePolicy")


class Unmapped(NotSo):
    """The manifest says something that is not understood here."""


@dataclass(frozen=True, slots=True)
class Security:
    """What a container may do, from its own securityContext and the pod's."""

    user: int | None
    group: int | None
    non_root: bool
    read_only: bool
    escalation: bool
    privileged: bool
    seccomp: bool
    add: tuple[str, ...]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """An HTTP probe. Times are in seconds."""

    path: str
    port: int
    delay: float
    period: float
    timeout: float
    failures: int


@dataclass(frozen=True, slots=True)
class Container:
    """One container, as it is to be run."""

    name: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    env: Mapping[str, str]
    ports: Mapping[str, int]
    mounts: Mapping[str, tuple[str, bool]]
    memory: int | None
    security: Security
    startup: Probe | None
    liveness: Probe | None
    readiness: Probe | None
    pre_stop: float


@dataclass(frozen=True, slots=True)
class Volume:
    """Memory of some size, or files: their content and mode by name."""

    size: int | None = None
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod: what runs first, what runs then, and what they share."""

    first: tuple[Container, ...]
    containers: tuple[Container, ...]
    volumes: Mapping[str, Volume]
    groups: tuple[int, ...]
    fs_group: int | None
    grace: int


def read(path: Path) -> Sequence[Object]:
    """Return the objects of a rendered manifest."""
    return [found for found in yaml.safe_load_all(path.read_text("utf-8")) if found]


def one(objects: Iterable[Object], kind: str, name: str) -> Object:
    """Return the object of that kind and name; raises NotSo unless there is exactly one."""
    found = [it for it in objects if it["kind"] == kind and it["metadata"]["name"] == name]
    if len(found) != 1:
        raise NotSo(f"there are {len(found)} objects {kind} {name}")
    return found[0]


def pod_of(workload: Object, objects: Sequence[Object], secrets: Secrets) -> Pod:
    """Return the pod that a Deployment or a Job runs, with what it refers to. Raises Unmapped, and NotSo."""
    spec = workload["spec"]["template"]["spec"]
    known = ("containers", "initContainers", "securityContext", "terminationGracePeriodSeconds", "volumes")
    _only(spec, "pod", *_ELSEWHERE_POD, *known)
    shared = spec.get("securityContext", {})
    own = ("fsGroup", "fsGroupChangePolicy", "supplementalGroups")
    _only(shared, "pod.securityContext", *own, "runAsUser", "runAsGroup", "runAsNonRoot", "seccompProfile")
    reader = _Reader(objects, secrets, shared)
    return Pod(
        first=tuple(map(reader.container, spec.get("initContainers", ()))),
        containers=tuple(map(reader.container, spec["containers"])),
        volumes={volume["name"]: reader.volume(volume) for volume in spec.get("volumes", ())},
        groups=tuple(shared.get("supplementalGroups", ())),
        fs_group=shared.get("fsGroup"),
        grace=spec.get("terminationGracePeriodSeconds", 30),
    )


def target_port(service: Object, workload: Object, container: Container) -> int:
    """Return the port of the container that a Service leads to; raises NotSo where it leads nowhere."""
    labels = workload["spec"]["template"]["metadata"]["labels"]
    name = service["metadata"]["name"]
    if not service["spec"]["selector"].items() <= labels.items():
        raise NotSo(f"Service {name} selects other pods")
    port = service["spec"]["ports"][0]
    return _port(port.get("targetPort", port["port"]), container.ports, f"Service {name}")


class _Reader:
    def __init__(self, objects: Sequence[Object], secrets: Secrets, shared: Object) -> None:
        self._objects = objects
        self._secrets = secrets
        self._shared = shared

    def container(self, spec: Object) -> Container:
        known = ("args", "command", "env", "envFrom", "image", "lifecycle", "livenessProbe", "name", "ports")
        more = ("readinessProbe", "resources", "securityContext", "startupProbe", "volumeMounts")
        _only(spec, "container", *_ELSEWHERE_CONTAINER, *known, *more)
        env = self._env(spec)
        ports = {port["name"]: port["containerPort"] for port in spec.get("ports", ())}
        limits = spec.get("resources", {}).get("limits", {})
        _only(limits, "limits", "memory")
        probes = (_probe(spec.get(f"{kind}Probe"), ports) for kind in ("startup", "liveness", "readiness"))
        return Container(
            spec["name"],
            spec["image"],
            tuple(_expand(word, env) for word in spec.get("command", ())),
            tuple(_expand(word, env) for word in spec.get("args", ())),
            env,
            ports,
            {mount["mountPath"]: _mount(mount) for mount in spec.get("volumeMounts", ())},
            _bytes(limits["memory"]) if "memory" in limits else None,
            self._security(spec.get("securityContext", {})),
            *probes,
            _pre_stop(spec.get("lifecycle", {})),
        )

    def volume(self, spec: Object) -> Volume:
        if "emptyDir" in spec:
            directory = spec["emptyDir"] or {}
            _only(directory, "emptyDir", "medium", "sizeLimit")
            if directory.get("medium") != "Memory" or "sizeLimit" not in directory:
                raise Unmapped(f"volume {spec['name']}: an emptyDir in memory, with a limit, is what can be run here")
            return Volume(size=_bytes(directory["sizeLimit"]))
        if "secret" not in spec:
            raise Unmapped(f"volume {spec['name']}: {', '.join(spec.keys() - {'name'})}")
        secret = spec["secret"]
        _only(secret, "secret volume", "secretName", "defaultMode", "items")
        mode = secret.get("defaultMode", 0o644)
        if "items" not in secret:
            raise Unmapped(f"volume {spec['name']}: which keys of the Secret become files is not said")
        return Volume(
            files={
                item["path"]: (self._secrets(secret["secretName"], item["key"]), item.get("mode", mode))
                for item in secret["items"]
            }
        )

    def _env(self, spec: Object) -> Mapping[str, str]:
        env: dict[str, str] = {}
        for source in spec.get("envFrom", ()):
            _only(source, "envFrom", "configMapRef")
            env |= one(self._objects, "ConfigMap", source["configMapRef"]["name"])["data"]
        for entry in spec.get("env", ()):
            env[entry["name"]] = _expand(self._value(entry), env)
        wrong = [name for name, value in env.items() if not isinstance(value, str)]
        if wrong:
            raise NotSo(f"values that are no text: {', '.join(wrong)}")
        return env

    def _value(self, entry: Object) -> str:
        if "value" in entry:
            return str(entry["value"])
        source = entry.get("valueFrom", {})
        if reference := source.get("secretKeyRef"):
            return self._secrets(reference["name"], reference["key"])
        if reference := source.get("configMapKeyRef"):
            found: str = one(self._objects, "ConfigMap", reference["name"])["data"][reference["key"]]
            return found
        raise Unmapped(f"{entry['name']}: {', '.join(source) or 'no value'}")

    def _security(self, own: Object) -> Security:
        known = ("allowPrivilegeEscalation", "capabilities", "privileged", "readOnlyRootFilesystem")
        inherited = ("runAsGroup", "runAsNonRoot", "runAsUser", "seccompProfile")
        _only(own, "securityContext", *known, *inherited)
        both = {**{key: self._shared[key] for key in inherited if key in self._shared}, **own}
        profile = both.get("seccompProfile", {}).get("type", "Unconfined")
        if profile not in ("RuntimeDefault", "Unconfined"):
            raise Unmapped(f"seccompProfile {profile}")
        capabilities = own.get("capabilities", {})
        return Security(
            user=both.get("runAsUser"),
            group=both.get("runAsGroup"),
            non_root=both.get("runAsNonRoot", False),
            read_only=own.get("readOnlyRootFilesystem", False),
            escalation=own.get("allowPrivilegeEscalation", True),
            privileged=own.get("privileged", False),
            seccomp=profile == "RuntimeDefault",
            add=tuple(capabilities.get("add", ())),
            drop=tuple(capabilities.get("drop", ())),
        )


def _only(found: Object, where: str, *known: str) -> None:
    if unknown := found.keys() - set(known):
        raise Unmapped(f"{where}: {', '.join(sorted(unknown))}")


def _port(port: int | str, names: Mapping[str, int], where: str) -> int:
    if isinstance(port, int):
        return port
    if port not in names:
        raise NotSo(f"{where}: the container has no port named {port}")
    return names[port]


def _probe(spec: Object | None, ports: Mapping[str, int]) -> Probe | None:
    if spec is None:
        return None
    times = ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold")
    _only(spec, "probe", "httpGet", *times)
    request = spec["httpGet"]
    _only(request, "httpGet", "path", "port")
    return Probe(
        request.get("path", "/"),
        _port(request["port"], ports, "a probe"),
        spec.get("initialDelaySeconds", 0),
        spec.get("periodSeconds", 10),
        spec.get("timeoutSeconds", 1),
        spec.get("failureThreshold", 3),
    )


def _mount(spec: Object) -> tuple[str, bool]:
    _only(spec, "volumeMount", "mountPath", "name", "readOnly")
    return spec["name"], spec.get("readOnly", False)


def _pre_stop(lifecycle: Object) -> float:
    _only(lifecycle, "lifecycle", "preStop")
    hook = lifecycle.get("preStop", {})
    _only(hook, "preStop", "sleep")
    return float(hook["sleep"]["seconds"]) if hook else 0.0


def _bytes(quantity: str | int) -> int:
    found = re.fullmatch(r"(\d+)([kMG]i?|Ki)?", str(quantity))
    if found is None or (found[2] or "") not in _UNITS:
        raise Unmapped(f"quantity {quantity}")
    return int(found[1]) * _UNITS[found[2] or ""]


def _expand(text: str, env: Mapping[str, str]) -> str:
    """Put the variables' values in the place of $(NAME), which stands for itself where there is no such variable."""
    return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda match: env.get(match[1], match[0]), text)
