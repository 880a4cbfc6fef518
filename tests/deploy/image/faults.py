"""Images and manifests that are wrong in one place each, and the check that must notice it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_USER = "USER 10001:10001"
_DEPLOYMENT = "Deployment/identity-service:spec.template.spec."
_FIRST = f"{_DEPLOYMENT}initContainers.0."
_SERVER = f"{_DEPLOYMENT}containers.0."
_SETTINGS = "ConfigMap/identity-service:data."
_PRODUCTION = "kubernetes/rendered/production.yaml"
_GRANTS = "postgresql/grants.sql"

GONE = object()
"""The value that takes a field out of a manifest."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, and the key of the check that must see it."""

    seen_by: str
    what: str
    edits: Sequence[tuple[str, str, str]] = ()
    """Replacements of text: (file, old, new); the first occurrence of each."""
    settings: Sequence[tuple[str, Any]] = ()
    """Fields of manifests: ("Kind/name:path.to.field", value)."""
    manifest: str = _PRODUCTION


def _image(seen_by: str, what: str, old: str, new: str, *further: tuple[str, str, str]) -> Fault:
    return Fault(seen_by, what, [("Dockerfile", old, new), *further])


def _step(seen_by: str, what: str, command: str) -> Fault:
    """Return a build with one step more, which root takes at its end."""
    return _image(seen_by, what, _USER, f"RUN {command}\n{_USER}")


def _pod(seen_by: str, what: str, *settings: tuple[str, Any]) -> Fault:
    return Fault(seen_by, what, settings=settings)


IN_IMAGES = (
    _step("digest", "a file says when it was built", "date +%N > /app/venv/built"),
    _image("setuid", "the base's setuid programs are left as they are", "-exec chmod ug-s {} +", "-print"),
    _step("setuid", "a program is made setuid", "chmod u+s /usr/bin/env"),
    _step("owned", "the service's account owns its folder", "chown 10001:10001 /app"),
    _step("owned", "everybody may write to the libraries", "chmod 777 /app/venv/lib"),
    _step("compilers", "a compiler stays", "cp /usr/bin/env /usr/bin/x86_64-linux-gnu-gcc-12"),
    _image("installers", "pip stays", "-name ensurepip -o -name pip -o", "-name nothing -o"),
    _step("installers", "git stays", "cp /usr/bin/env /usr/bin/git"),
    _image("leftovers", "the libraries' own tests stay", "-name tests -o", "-name nothing -o"),
    _image(
        *("leftovers", "the whole folder is copied, with whatever lies in it", _USER, f"COPY . /app/source\n{_USER}"),
        (".dockerignore", "*\n", "\n"),
    ),
    _image(
        *("leftovers", "what is hidden in the package is not held back", "-name .gitignore", "-name nothing"),
        (".dockerignore", "**/.*\n", ""),
    ),
    _image("scripts", "the libraries' programs stay", "-type f ! -name identity-service", "-type f -name nothing"),
    _image(
        "locked",
        "a library comes in that is not on the list",
        '${REQUIREMENTS}.txt"',
        '${REQUIREMENTS}.txt" -r build.txt',
    ),
    _image("bytecode", "bytecode depends on a time", "--invalidation-mode checked-hash", "-f"),
    _image("bytecode", "there is no bytecode of our own", "print(*identity_service.__path__)", 'print("/app/none")'),
    Fault(
        *("bytecode", "the wheel lacks the migrations"),
        [("pyproject.toml", 'migrations = "identity_service/migrations"', 'migrations = "identity_service/elsewhere"')],
    ),
    _image("account", "it runs as root", _USER, "USER root"),
    _image("account", "its user is a name, which no kubelet can tell from root", _USER, "USER identity"),
    _image("entry", "a shell stands before the service", '["/app/venv/bin/', '["sh", "-c", "'),
    _image("entry", "no signal is named", "STOPSIGNAL SIGTERM\n", ""),
    _image("ports", "the management port is not exposed", "EXPOSE 8000 9000", "EXPOSE 8000"),
    _image("production", "it is for development", "ENVIRONMENT=production", "ENVIRONMENT=development"),
    _image("production", "it brings a setting", "_PORT=9000", "_PORT=9000 IDENTITY_ISSUER=https://id.example"),
    _image("labels", "it says another version", 'version="0.1.0"', 'version="0.0.1"'),
    _step("size", "a large file stays", "head -c 60000000 /dev/zero > /usr/lib/large"),
    Fault("build", "a library has other hashes", [("requirements/server.txt", "hash=sha256:", "hash=sha512:00")] * 2),
    Fault(
        "build", "a library has no hash", [("requirements/build.txt", "hatchling==", "tomlkit==0.15.2\nhatchling==")]
    ),
)

IN_IMAGES_THAT_RUN = (
    _image("refusal", "it starts without settings", "ENVIRONMENT=production", "ENVIRONMENT=development"),
    _image("drain", "it is told to leave by SIGKILL", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL"),
)


def _through_a_shell(command: str) -> tuple[str, Any]:
    return f"{_SERVER}command", ["sh", "-c", command]


IN_MANIFESTS = (
    _pod("manifests", "a field says what nothing here understands", (f"{_DEPLOYMENT}hostNetwork", True)),
    _pod("manifests", "temporary memory has no limit", (f"{_DEPLOYMENT}volumes.0.emptyDir.sizeLimit", GONE)),
    _pod("manifests", "a ConfigMap is not there", ("ConfigMap/identity-service:metadata.name", "other")),
    _pod("manifests", "a Service selects nobody", ("Service/identity-service:spec.selector", {"app": "other"})),
    _pod("unmigrated", "nobody looks at the schema", (f"{_FIRST}command", ["identity-service", "--help"])),
    Fault(
        *("migration", "the migration has the service's own role"),
        settings=[
            (
                "Job/identity-service-migrate:spec.template.spec.containers.0.env.0.valueFrom.secretKeyRef.name",
                "identity-database",
            )
        ],
        manifest="kubernetes/rendered/migrate.yaml",
    ),
    Fault(
        *("init", "the service may not see the revision"),
        [(_GRANTS, "REVOKE INSERT, UPDATE, DELETE ON alembic_version", "REVOKE ALL ON alembic_version")],
    ),
    _pod(
        *("start", "the startup probe asks at another port"),
        (f"{_SERVER}startupProbe.httpGet.port", 9001),
        (f"{_SERVER}startupProbe.failureThreshold", 5),
    ),
    _pod(
        *("start", "the management listener has another port than the probes"),
        (f"{_SETTINGS}IDENTITY_MANAGEMENT_PORT", "9002"),
        (f"{_SERVER}startupProbe.failureThreshold", 5),
    ),
    _pod("start", "readiness is asked for elsewhere", (f"{_SERVER}readinessProbe.httpGet.path", "/ready")),
    _pod("start", "liveness is asked for elsewhere", (f"{_SERVER}livenessProbe.httpGet.path", "/live")),
    _pod("start", "the service may not read the master key", (f"{_DEPLOYMENT}securityContext.fsGroup", GONE)),
    _pod("uid", "it is another account", (f"{_DEPLOYMENT}securityContext.runAsUser", 10002)),
    _pod("uid", "it is in root's group", (f"{_DEPLOYMENT}securityContext.runAsGroup", 0)),
    _pod("capabilities", "no capability is dropped", (f"{_SERVER}securityContext.capabilities", GONE)),
    _pod("capabilities", "rights can be gained", (f"{_SERVER}securityContext.allowPrivilegeEscalation", GONE)),
    _pod("seccomp", "system calls are not filtered", (f"{_DEPLOYMENT}securityContext.seccompProfile", GONE)),
    _pod("read-only", "everything can be written", (f"{_SERVER}securityContext.readOnlyRootFilesystem", False)),
    _pod("temporary", "temporary memory is where nobody looks", (f"{_SERVER}volumeMounts.0.mountPath", "/temporary")),
    _pod("memory", "there is no limit of memory", (f"{_SERVER}resources.limits", {})),
    _pod("endpoints", "it is for development", (f"{_SETTINGS}IDENTITY_ENVIRONMENT", "development")),
    Fault(
        *("seeds", "there is a client that everybody knows"),
        [
            (
                *(_GRANTS, "COMMIT;"),
                "INSERT INTO clients SELECT 'demo', 'Demo', true, 'none', '[]', '[]', '', '[]', '[]', '[]', false,"
                " NULL, NULL, NULL, 0, true, 1, now(), now(), now(), '[]'; COMMIT;",
            )
        ],
    ),
    _pod("metrics", "the Service misses them", ("Service/identity-service-management:spec.ports.0.targetPort", "http")),
    _pod("sign-in", "nobody may sign in by password", (f"{_SETTINGS}IDENTITY_PASSWORD_GRANT", "false")),
    _pod(
        "endpoints", "the Service leads elsewhere", ("Service/identity-service:spec.ports.0.targetPort", "management")
    ),
    _pod("grace", "there is no preStop hook", (f"{_SERVER}lifecycle", GONE)),
    _pod("grace", "the grace is shorter than the drain", (f"{_DEPLOYMENT}terminationGracePeriodSeconds", 30)),
    _pod(
        *("hook", "it goes before it is told to, once somebody has signed in"),
        _through_a_shell(
            "identity-service serve > /tmp/log & until grep -q users/me /tmp/log; do sleep 0.2; done;"
            " sleep 3; kill -9 $!; sleep 60"
        ),
    ),
    _pod("drain", "what is in flight is given no time", (f"{_SETTINGS}IDENTITY_SHUTDOWN_GRACE", "0")),
    _pod(
        *("drain", "a shell stands before the service and keeps the signal"),
        _through_a_shell("identity-service serve; true"),
        (f"{_DEPLOYMENT}terminationGracePeriodSeconds", 20),
    ),
    _pod("secrets", "a container prints its environment", (f"{_FIRST}command", ["sh", "-c", "env; exit 0"])),
)
