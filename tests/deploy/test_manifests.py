"""What is in deploy/ is well-formed, and what is rendered is what it was rendered from; no network is needed for it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy import render
from tests.deploy.site import DEPLOY, ROOT, documents

_VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest Kubernetes that is supported, and the newest whose schema is at hand."""
_OF_OTHERS = frozenset(
    {
        ("gateway.networking.k8s.io/v1", "HTTPRoute"),
        ("external-secrets.io/v1", "ExternalSecret"),
        ("monitoring.coreos.com/v1", "ServiceMonitor"),
        ("monitoring.coreos.com/v1", "PrometheusRule"),
    }
)
"""Kinds that a cluster learns of from others; Kubernetes' own schema knows nothing of them."""
_KUBERNETES = render.KUBERNETES
_MANIFESTS = [
    *sorted(render.RENDERED.glob("*.yaml")),
    *sorted((_KUBERNETES / "secrets.example").glob("*.yaml")),
    *sorted(
        path for path in (_KUBERNETES / "components" / "ingress").glob("*.yaml") if "kustomization" not in path.name
    ),
]


def _by_name(text: str) -> dict[tuple[str, str], Any]:
    """Return the documents of a rendering, by what they are: versions of kustomize order and wrap them differently."""
    return {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(text)}


@pytest.mark.parametrize("path", _MANIFESTS, ids=lambda path: path.relative_to(_KUBERNETES).as_posix())
@pytest.mark.parametrize("version", _VERSIONS)
def test_kubernetes_own_schema_knows_every_field(path: Path, version: str) -> None:
    """Strictly: a field that it does not know would be dropped without a word."""
    for found in documents(path):
        if (found["apiVersion"], found["kind"]) not in _OF_OTHERS:
            kubernetes_validate.validate(found, version, strict=True)


def test_the_schema_would_find_a_field_that_is_spelled_wrongly() -> None:
    """The test above can fail."""
    [found] = [each for each in documents(render.RENDERED / "production.yaml") if each["kind"] == "PodDisruptionBudget"]
    found["spec"]["maxUnavailble"] = found["spec"].pop("maxUnavailable")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found, _VERSIONS[0], strict=True)


def test_every_kustomization_is_whole() -> None:
    """What it names is there, and every file beside it is named by it, or nobody would ever apply it."""
    for path in sorted(_KUBERNETES.rglob("kustomization.yaml")):
        [kustomization] = documents(path)
        named = [*kustomization.get("resources", []), *kustomization.get("components", [])]
        named += [entry for each in kustomization.get("configMapGenerator", []) for entry in each.get("envs", [])]
        for name in named:
            assert (path.parent / name).exists(), f"{path}: {name}"
        beside = {entry.name for entry in path.parent.iterdir() if entry.is_file()} - {"kustomization.yaml"}
        assert beside <= set(named), path


def test_what_the_readme_names_is_there() -> None:
    """Paths of this repository, in the text and in the commands."""
    text = (DEPLOY / "README.md").read_text("utf-8")
    named = set(re.findall(r"(?:deploy|tests|requirements)/[\w./-]*\w", text))
    named |= {f"deploy/kubernetes/{path}" for path in re.findall(r"`((?:overlays|components)/[\w./-]*\w)", text)}
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_nobody_changed_a_source_or_a_rendering_by_hand() -> None:
    """Where there is no kustomize as well: the digests were written by `make manifests`."""
    assert render.RECORD.read_text("utf-8") == render.digests(), "run make manifests"


def test_the_renderings_are_what_kustomize_makes() -> None:
    """Where there is one; elsewhere the digests must do."""
    command = render.kustomize()
    for name, source in render.TARGETS.items() if command else ():
        assert command is not None
        recorded = _by_name((render.RENDERED / name).read_text("utf-8"))
        assert recorded == _by_name(render.render(command, source)), f"{name}: run make manifests"


def test_compose_knows_every_field() -> None:
    """By the specification's own schema, which the checker brings along."""
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [checker, "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_has_no_fault_that_is_known() -> None:
    """By hadolint's rules, all of them, without an exception."""
    linter = Path(sys.executable).with_name("hadolint")
    command = [linter, "--disable-ignore-pragma", "--failure-threshold", "style", ROOT / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
