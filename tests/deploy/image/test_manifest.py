"""How a manifest is read, and what it becomes for podman: nothing is passed over in silence."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.image.faults import IN_IMAGES, IN_IMAGES_THAT_RUN, IN_MANIFESTS
from tests.deploy.image.manifest import Pod, Unmapped, one, pod_of, target_port
from tests.deploy.image.pods import Runner
from tests.deploy.image.report import NotSo

DEPLOYMENT = """
kind: Deployment
metadata: {name: identity-service}
spec:
  template:
    metadata: {labels: {app: identity, tier: server}}
    spec:
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      securityContext:
        {runAsUser: 10001, runAsGroup: 10001, runAsNonRoot: true, fsGroup: 10001,
         seccompProfile: {type: RuntimeDefault}}
      volumes:
      - {name: tmp, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
      - {name: master, secret: {secretName: keys, defaultMode: 288, items: [{key: keys, path: keys}]}}
      containers:
      - name: identity-service
        image: registry.example/identity-service:1.0
        command: [identity-service, serve]
        envFrom: [{configMapRef: {name: config}}]
        env:
        - {name: IDENTITY_DATABASE_URL, valueFrom: {secretKeyRef: {name: database, key: url}}}
        - {name: IDENTITY_GREETING, value: "$(IDENTITY_PORT) and $(NOTHING)"}
        ports: [{name: http, containerPort: 8000}, {name: management, containerPort: 9000}]
        startupProbe: {httpGet: {path: /healthz, port: management}, periodSeconds: 2, failureThreshold: 60}
        resources: {limits: {memory: 768Mi}}
        lifecycle: {preStop: {sleep: {seconds: 10}}}
        securityContext:
          {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        volumeMounts: [{name: tmp, mountPath: /tmp}, {name: master, mountPath: /etc/master, readOnly: true}]
"""
CONFIG = {"kind": "ConfigMap", "metadata": {"name": "config"}, "data": {"IDENTITY_PORT": "8000"}}
SERVICE = {
    "kind": "Service",
    "metadata": {"name": "identity-service"},
    "spec": {"selector": {"app": "identity"}, "ports": [{"port": 80, "targetPort": "http"}]},
}

Spec = dict[str, Any]


@pytest.fixture
def deployment() -> Spec:
    """A Deployment that says everything that is understood."""
    found: Spec = yaml.safe_load(DEPLOYMENT)
    return found


def read(deployment: Spec) -> Pod:
    """Return the pod of a Deployment; the value of each secret is its own name."""
    return pod_of(deployment, [CONFIG, SERVICE], lambda name, key: f"secret {name}/{key}")


def spec_of(deployment: Spec) -> Spec:
    found: Spec = deployment["spec"]["template"]["spec"]
    return found


def server_of(deployment: Spec) -> Spec:
    found: Spec = spec_of(deployment)["containers"][0]
    return found


def test_values_come_from_where_the_manifest_refers_to(deployment: Spec) -> None:
    pod = read(deployment)
    assert pod.containers[0].env == {
        "IDENTITY_PORT": "8000",
        "IDENTITY_DATABASE_URL": "secret database/url",
        "IDENTITY_GREETING": "8000 and $(NOTHING)",
    }
    assert pod.volumes["master"].files == {"keys": ("secret keys/keys", 0o440)}
    assert pod.volumes["tmp"].size == 64 * 2**20
    assert pod.containers[0].memory == 768 * 2**20
    assert (pod.grace, pod.containers[0].pre_stop) == (60, 10.0)
    probe = pod.containers[0].startup
    assert probe is not None
    assert (probe.port, probe.period, probe.failures, probe.timeout) == (9000, 2, 60, 1)


def test_the_flags_say_what_the_manifest_says(deployment: Spec, tmp_path: Path) -> None:
    pod = read(deployment)
    flags = Runner(pod, "image", tmp_path).flags(pod.containers[0])
    assert {
        *("--read-only", "--read-only-tmpfs=false", "--user=10001:10001", "--group-add=10001"),
        *("--security-opt=no-new-privileges", "--cap-drop=ALL", f"--memory={768 * 2**20}"),
        f"--tmpfs=/tmp:rw,nosuid,nodev,noexec,size={64 * 2**20},mode=1777",
        f"--volume={tmp_path}/volume-master:/etc/master:ro",
    } <= set(flags)
    file = tmp_path / "volume-master/keys"
    assert file.read_text() == "secret keys/keys"
    assert file.stat().st_mode & 0o777 == 0o440
    assert (tmp_path / "identity-service.env").stat().st_mode & 0o777 == 0o600
    assert not [flag for flag in flags if "secret" in flag]


def test_what_the_manifest_leaves_out_is_left_out(deployment: Spec, tmp_path: Path) -> None:
    """A cluster's defaults are lax, and a test that is stricter than the cluster proves nothing."""
    spec_of(deployment)["securityContext"] = {}
    server_of(deployment)["securityContext"] = {}
    del server_of(deployment)["resources"]
    pod = read(deployment)
    flags = Runner(pod, "image", tmp_path).flags(pod.containers[0])
    strict = ("--read-only", "--user", "--group-add", "--security-opt=no-new-privileges", "--cap-drop", "--memory")
    assert not [flag for flag in flags if flag.startswith(strict) and flag != "--read-only-tmpfs=false"]
    assert "--security-opt=seccomp=unconfined" in flags


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(hostNetwork=True),
        lambda spec: spec["securityContext"].update(sysctls=[]),
        lambda spec: spec["securityContext"].update(seccompProfile={"type": "Localhost"}),
        lambda spec: spec["volumes"][0]["emptyDir"].pop("sizeLimit"),
        lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda spec: spec["volumes"][1]["secret"].pop("items"),
        lambda spec: spec["containers"][0].update(stdin=True),
        lambda spec: spec["containers"][0]["securityContext"].update(procMount="Unmasked"),
        lambda spec: spec["containers"][0]["resources"]["limits"].update(cpu="1"),
        lambda spec: spec["containers"][0]["resources"]["limits"].update(memory="1e9"),
        lambda spec: spec["containers"][0]["startupProbe"].update(successThreshold=1),
        lambda spec: spec["containers"][0].update(livenessProbe={"exec": {"command": ["true"]}}),
        lambda spec: spec["containers"][0]["lifecycle"].update(postStart={"sleep": {"seconds": 1}}),
        lambda spec: spec["containers"][0]["lifecycle"].update(preStop={"exec": {"command": ["sleep"]}}),
        lambda spec: spec["containers"][0]["volumeMounts"][0].update(subPath="x"),
        lambda spec: spec["containers"][0]["envFrom"].append({"secretRef": {"name": "x"}}),
        lambda spec: spec["containers"][0]["env"].append({"name": "X", "valueFrom": {"fieldRef": {}}}),
    ],
)
def test_what_is_not_understood_is_refused(deployment: Spec, change: Callable[[Spec], object]) -> None:
    change(spec_of(deployment))
    with pytest.raises(Unmapped):
        read(deployment)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda server: server["envFrom"][0]["configMapRef"].update(name="other"), "0 objects ConfigMap other"),
        (lambda server: server["startupProbe"]["httpGet"].update(port="metrics"), "no port named metrics"),
    ],
)
def test_references_that_lead_nowhere_are_faults(
    deployment: Spec, change: Callable[[Spec], object], reason: str
) -> None:
    change(server_of(deployment))
    with pytest.raises(NotSo, match=reason):
        read(deployment)


@pytest.mark.parametrize("user", [{"runAsUser": 0}, {"runAsUser": None}])
def test_root_is_not_run_as_non_root(
    deployment: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: Spec
) -> None:
    """As a kubelet refuses it: by the number, which only the image has where the manifest has none."""
    monkeypatch.setattr("tests.deploy.image.pods.inspect", lambda *_: {"Config": {"User": "identity"}})
    spec_of(deployment)["securityContext"].update(user)
    pod = read(deployment)
    with pytest.raises(NotSo, match="does not run user"):
        Runner(pod, "image", tmp_path).flags(pod.containers[0])


def test_a_service_leads_to_a_port_of_the_pods_it_selects(deployment: Spec) -> None:
    container = read(deployment).containers[0]
    service = copy.deepcopy(SERVICE)
    assert target_port(service, deployment, container) == 8000
    service["spec"]["selector"] = {"app": "other"}
    with pytest.raises(NotSo, match="selects other pods"):
        target_port(service, deployment, container)
    service["spec"] = {"selector": {"app": "identity"}, "ports": [{"port": 80, "targetPort": "https"}]}
    with pytest.raises(NotSo, match="no port named https"):
        target_port(service, deployment, container)


def test_an_object_is_found_once() -> None:
    with pytest.raises(NotSo, match="2 objects ConfigMap config"):
        one([CONFIG, CONFIG], "ConfigMap", "config")


def test_every_check_has_a_fault_that_it_must_see() -> None:
    """A check without one might be unable to fail."""
    modules = [
        Path(__file__).with_name(f"{name}.py").read_text("utf-8") for name in ("__main__", "contents", "running")
    ]
    checks = {part.split('"')[1] for text in modules for part in text.split("report.check(")[1:]}
    faults = {fault.seen_by for fault in (*IN_IMAGES, *IN_IMAGES_THAT_RUN, *IN_MANIFESTS)}
    assert checks == faults - {"build"}
