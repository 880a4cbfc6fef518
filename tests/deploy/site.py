"""Everything that is in deploy/, as data, beside what the code says; a mutant is a copy in which one thing is wrong."""

import copy
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final
from unittest import mock

import yaml

from identity_service.main import create_app
from identity_service.settings import Settings, load_settings
from identity_service.web import health
from identity_service.web.documented import routes_of
from identity_service.web.forms import LARGEST_BODY
from tests.support.service import BOOTSTRAP_SECRET, test_settings

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
Document = dict[str, Any]

SERVER: Final = {"app.kubernetes.io/name": "identity-service", "app.kubernetes.io/component": "server"}
"""The labels by which the server's pods are told from the migration's, and from an operator's."""
MIGRATION: Final = {**SERVER, "app.kubernetes.io/component": "migration"}
OPERATOR: Final = {**SERVER, "app.kubernetes.io/component": "operator"}

_WORKLOADS = ("Deployment", "Job", "StatefulSet", "DaemonSet", "ReplicaSet", "CronJob", "Pod")


# -- reading and changing nested data ---------------------------------------------------------------------------------


def dig(document: Any, *path: str | int, default: Any = None) -> Any:
    """Return what stands at a path of keys and positions, or `default` where the path ends early."""
    for step in path:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return default
    return document


def put(document: Any, *path: str | int, value: Any) -> None:
    """Write at a path whose parent is there."""
    *parents, last = path
    for step in parents:
        document = document[step]
    document[last] = value


def drop(document: Any, *path: str | int) -> None:
    """Remove what stands at a path; it must be there."""
    *parents, last = path
    for step in parents:
        document = document[step]
    del document[last]


def documents(*files: Path) -> list[Document]:
    """Return the YAML documents of some files."""
    return [found for file in files for found in yaml.safe_load_all(file.read_text("utf-8")) if found]


# -- what the code says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What manifests must agree with, read from the code itself."""

    settings: frozenset[str]
    secret_settings: frozenset[str]
    defaults: Mapping[str, Any]
    public_paths: frozenset[str]
    management_paths: frozenset[str]
    largest_body: int
    readiness_patience: float
    version: str

    @classmethod
    def of_the_code(cls) -> "Facts":
        """Ask the application, with everything switched on, and its settings."""
        everything = test_settings(
            "sqlite+aiosqlite:///never-opened.db",
            registration="open",
            bootstrap_secret=BOOTSTRAP_SECRET,
            smtp_host="127.0.0.1",
            mail_from="identity@id.example",
        )
        app = create_app(everything)
        app.state.services.hasher.close()
        fields = Settings.model_fields
        secret = {name for name, field in fields.items() if "SecretStr" in repr(field.annotation)}
        return cls(
            settings=frozenset(f"IDENTITY_{name.upper()}" for name in fields),
            secret_settings=frozenset(f"IDENTITY_{name.upper()}" for name in secret),
            defaults={f"IDENTITY_{name.upper()}": field.default for name, field in fields.items()},
            public_paths=frozenset((*app.edge._endpoints, *(route.path for route in routes_of(app.routes)))),
            management_paths=frozenset(app.management._endpoints),
            largest_body=LARGEST_BODY,
            readiness_patience=health._PATIENCE,
            version=_project()["version"],
        )


def _project() -> dict[str, str]:
    """Return the plain texts of pyproject.toml's table `project`."""
    project: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


# -- what is in deploy/ -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pod:
    """A pod that some workload makes."""

    where: str
    labels: dict[str, str]
    spec: Document

    def containers(self) -> Iterator[tuple[str, Document]]:
        """Yield every container with a name for messages, those that run first included."""
        for kind in ("initContainers", "containers"):
            for container in self.spec.get(kind) or []:
                yield f"{self.where}/{container.get('name')}", container


@final
@dataclass
class Site:
    """The whole of deploy/."""

    production: list[Document]
    migrate: list[Document]
    namespace: list[Document]
    dev: list[Document]
    ingress: list[Document]
    tracing: list[Document]
    examples: list[Document]
    kustomizations: dict[str, Document]
    compose: Document
    units: dict[str, dict[str, list[str]]]
    roles: str
    readme: str
    backup: str
    texts: dict[str, str]
    facts: Facts

    @classmethod
    def as_shipped(cls, facts: Facts) -> "Site":
        """Read it."""
        kubernetes = DEPLOY / "kubernetes"
        rendered = kubernetes / "rendered"
        return cls(
            production=documents(rendered / "production.yaml"),
            migrate=documents(rendered / "migrate.yaml"),
            namespace=documents(rendered / "namespace.yaml"),
            dev=documents(rendered / "dev.yaml"),
            ingress=[
                found
                for found in documents(*sorted((kubernetes / "components" / "ingress").glob("*.yaml")))
                if found["kind"] != "Component"
            ],
            tracing=documents(kubernetes / "components" / "tracing" / "networkpolicy.yaml"),
            examples=documents(*sorted((kubernetes / "secrets.example").glob("*.yaml"))),
            kustomizations={
                path.parent.relative_to(kubernetes).as_posix(): documents(path)[0]
                for path in sorted(kubernetes.rglob("kustomization.yaml"))
            },
            compose=documents(DEPLOY / "compose" / "compose.yaml")[0],
            units={path.name: unit(path.read_text("utf-8")) for path in sorted((DEPLOY / "systemd").glob("*.service"))},
            roles=(DEPLOY / "postgresql" / "roles.sql").read_text("utf-8"),
            readme=(DEPLOY / "README.md").read_text("utf-8"),
            backup=(ROOT / "docs" / "backup.md").read_text("utf-8"),
            texts={
                path.relative_to(DEPLOY).as_posix(): path.read_text("utf-8")
                for path in sorted(DEPLOY.rglob("*"))
                if path.is_file() and path.relative_to(DEPLOY).parts[:2] != ("compose", "secrets")
            },
            facts=facts,
        )

    def copy(self) -> "Site":
        """Return a copy that can be broken."""
        return copy.deepcopy(self)

    def with_ingress(self) -> list[Document]:
        """Return what production would be with the Ingress objects in the place of the Gateway's routes."""
        gateway = [found for found in self.production if found["kind"] == "HTTPRoute" or _name(found) == _GATEWAY]
        return [found for found in self.production if found not in gateway] + self.ingress

    def find(self, kind: str, name: str, among: list[Document] | None = None) -> Document:
        """Return one object of production (or of `among`), or an empty one where there is none."""
        for found in self.production if among is None else among:
            if found["kind"] == kind and _name(found) == name:
                return found
        return {}

    def all(self, kind: str, among: list[Document] | None = None) -> list[Document]:
        """Return all objects of a kind, of production or of `among`."""
        return [found for found in (self.production if among is None else among) if found["kind"] == kind]

    def pods(self) -> Iterator[Pod]:
        """Yield every pod there is, of every environment."""
        for environment, found in (("production", self.production), ("migrate", self.migrate), ("dev", self.dev)):
            for document in found:
                if document["kind"] in _WORKLOADS:
                    yield pod_of(document, environment)

    def containers(self) -> Iterator[tuple[str, Document]]:
        """Yield every container of every pod, with a name for messages."""
        for pod in self.pods():
            yield from pod.containers()

    @property
    def deployment(self) -> Document:
        """The server's Deployment in production."""
        return self.find("Deployment", "identity-service")

    @property
    def pod(self) -> Pod:
        """The server's pod in production."""
        return pod_of(self.deployment, "production")

    @property
    def server(self) -> Document:
        """The server's container in production."""
        found: Document = dig(self.pod.spec, "containers", 0, default={})
        return found

    @property
    def schema_check(self) -> Document:
        """The container that waits for the migration."""
        found: Document = dig(self.pod.spec, "initContainers", 0, default={})
        return found

    @property
    def operator_deployment(self) -> Document:
        """The Deployment in production that operators' commands are run in while no server is."""
        return self.find("Deployment", "identity-service-operator")

    @property
    def operator_pod(self) -> Pod:
        """The operator's pod in production."""
        return pod_of(self.operator_deployment, "production")

    @property
    def operator(self) -> Document:
        """The operator's container in production."""
        found: Document = dig(self.operator_pod.spec, "containers", 0, default={})
        return found

    @property
    def job(self) -> Document:
        """The migration of production."""
        return self.find("Job", "identity-service-migrate", self.migrate)

    @property
    def migrate_secret(self) -> Document:
        """What fetches the migration's password."""
        return self.find("ExternalSecret", "identity-database-migrator", self.migrate)

    @property
    def migration_pod(self) -> Pod:
        """The migration's pod."""
        return pod_of(self.job, "migrate")

    @property
    def migrator(self) -> Document:
        """The migration's container."""
        found: Document = dig(self.migration_pod.spec, "containers", 0, default={})
        return found

    @property
    def config(self) -> dict[str, str]:
        """The plain settings of production."""
        for found in self.all("ConfigMap"):
            if _name(found).startswith("identity-service"):
                return found.get("data") or {}
        return {}

    def setting(self, name: str) -> Any:
        """Return a setting as production has it: what the ConfigMap says, or the default."""
        return self.config.get(name, self.facts.defaults.get(name))


_GATEWAY = "identity-service-from-gateway"


def _name(document: Document) -> str:
    return str(dig(document, "metadata", "name", default=""))


def pod_of(workload: Document, environment: str) -> Pod:
    """Return the pod that a workload makes."""
    template = dig(workload, "spec", "template", default={})
    labels = dig(template, "metadata", "labels", default={})
    where = f"{environment}/{workload.get('kind', '')}/{_name(workload)}"
    return Pod(where, labels, template.get("spec") or {})


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Return whether a selector picks a pod: an empty one every pod, one that says more than labels none."""
    wanted = dict(selector or {})
    matching = wanted.pop("matchLabels", None) or {}
    return not wanted and matching.items() <= labels.items()


def settings_of(environment: Mapping[str, str]) -> Settings:
    """Return the settings of a process with this environment and no other. Raises UnsafeSettings."""
    with mock.patch.dict(os.environ, environment, clear=True):
        return load_settings()


def unit(text: str) -> dict[str, list[str]]:
    """Return the directives of a systemd unit: each with all its values, in order."""
    directives: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and line[0] not in "#;[" and "=" in line:
            name, _, value = line.partition("=")
            directives.setdefault(name, []).append(value)
    return directives
