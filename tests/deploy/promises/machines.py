"""One machine: the same restrictions under compose and under systemd."""

import re
from collections.abc import Iterator
from typing import Any

from tests.deploy.promises import promise
from tests.deploy.site import Document, Site, drop, put

_OURS = ("migrate", "identity-service")
_ONCE = ("migrate", "grants")
_LOOPBACK = "127.0.0.1:"
_CLOSING = 10  # seconds that a server has left when the drain is over

_SWITCHES = frozenset(
    [
        "NoNewPrivileges",
        "ProtectHome",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateUsers",
        "PrivateIPC",
        "ProtectClock",
        "ProtectControlGroups",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "RemoveIPC",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "DynamicUser",
    ]
)
_VALUES = {
    "ProtectSystem": ["strict"],
    "ProtectProc": ["invisible"],
    "CapabilityBoundingSet": [""],
    "AmbientCapabilities": [""],
    "RestrictAddressFamilies": ["AF_INET AF_INET6 AF_UNIX"],
    "SystemCallArchitectures": ["native"],
    "UMask": ["0077"],
}


def _services(site: Site) -> dict[str, Document]:
    found: dict[str, Document] = site.compose["services"]
    return found


def _ours(site: Site) -> Document:
    return _services(site)["identity-service"]


def _seconds(text: Any) -> int:
    match = re.fullmatch(r"(\d+)s?", str(text))
    return int(match[1]) if match else 0


# -- compose ----------------------------------------------------------------------------------------------------------


@promise
def composed_containers_can_do_nothing_but_their_work(site: Site) -> Iterator[str]:
    """All of them: read-only, without capabilities or a way to get any, as a user, bounded in memory and processes."""
    for name, service in _services(site).items():
        wanted = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
        for key, value in wanted.items():
            if service.get(key) != value:
                yield f"{name}: {key} {service.get(key)}"
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", service.get("user", "")):
            yield f"{name}: user {service.get('user')}"
        for key in service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}:
            yield f"{name}: {key}"
        if not service.get("mem_limit") or not service.get("pids_limit"):
            yield f"{name}: not bounded"


composed_containers_can_do_nothing_but_their_work.broken_by(
    "the service's root is writable", lambda site: drop(_ours(site), "read_only")
)
composed_containers_can_do_nothing_but_their_work.broken_by(
    "the database keeps its capabilities", lambda site: put(_services(site), "postgres", "cap_drop", value=[])
)
composed_containers_can_do_nothing_but_their_work.broken_by(
    "the mail catcher runs as root", lambda site: drop(_services(site), "mail", "user")
)


@promise
def composed_containers_run_as_the_user_of_the_image(site: Site) -> Iterator[str]:
    """As in the cluster, with /tmp as the only place to write."""
    for name in _OURS:
        service = _services(site)[name]
        if service.get("user") != "10001:10001":
            yield f"{name}: {service.get('user')}"
        places = [entry.partition(":") for entry in service.get("tmpfs") or []]
        if [place for place, _, _ in places] != ["/tmp"] or "noexec" not in places[0][2] or service.get("volumes"):  # noqa: S108
            yield f"{name}: writes to {places} {service.get('volumes')}"


composed_containers_run_as_the_user_of_the_image.broken_by(
    "the migration runs as somebody else", lambda site: put(_services(site), "migrate", "user", value="1000:1000")
)


@promise
def composed_commands_are_those_that_there_are(site: Site) -> Iterator[str]:
    """`command` alone would be put behind whatever the image's entry point is."""
    for name, command in (("migrate", ["migrate"]), ("identity-service", ["serve"])):
        service = _services(site)[name]
        if service.get("entrypoint") != ["identity-service"] or service.get("command") != command:
            yield f"{name}: {service.get('entrypoint')} {service.get('command')}"


composed_commands_are_those_that_there_are.broken_by(
    "the program is named in the command", lambda site: put(_ours(site), "command", value=["identity-service", "serve"])
)


@promise
def composed_ports_are_of_this_machine_only(site: Site) -> Iterator[str]:
    """A port without an address is open to the network, past the firewall; database and Redis have none at all."""
    for name, service in _services(site).items():
        for port in service.get("ports") or []:
            if not str(port).startswith(_LOOPBACK):
                yield f"{name}: {port}"
        if name in ("postgres", "redis") and (service.get("ports") or service.get("networks") != ["inside"]):
            yield f"{name}: {service.get('networks')}"
    if site.compose["networks"]["inside"].get("internal") is not True:
        yield "the inside has a way out"


composed_ports_are_of_this_machine_only.broken_by(
    "the service is open to the network", lambda site: put(_ours(site), "ports", value=["8000:8000"])
)
composed_ports_are_of_this_machine_only.broken_by(
    "the database is open to this machine",
    lambda site: put(_services(site), "postgres", "ports", value=["127.0.0.1:5432:5432"]),
)


@promise
def composed_services_start_in_order(site: Site) -> Iterator[str]:
    """Database, migration, grants, service; each when the one before is really there, or has ended well."""
    wanted = {
        "migrate": {"postgres": "service_healthy"},
        "grants": {"migrate": "service_completed_successfully"},
        "identity-service": {"grants": "service_completed_successfully", "redis": "service_healthy"},
    }
    for name, conditions in wanted.items():
        found = _services(site)[name].get("depends_on") or {}
        for other, condition in conditions.items():
            if found.get(other, {}).get("condition") != condition:
                yield f"{name} waits for {found}"


composed_services_start_in_order.broken_by(
    "the service does not wait for the migration", lambda site: drop(_ours(site), "depends_on", "grants")
)
composed_services_start_in_order.broken_by(
    "the migration starts before the database answers",
    lambda site: put(_services(site), "migrate", "depends_on", "postgres", "condition", value="service_started"),
)


@promise
def composed_services_are_asked_how_they_are(site: Site) -> Iterator[str]:
    """Each that goes on running; ours for its readiness, at the management port."""
    for name, service in _services(site).items():
        if name not in _ONCE and not service.get("healthcheck", {}).get("test"):
            yield name
    asked = str(_ours(site).get("healthcheck", {}).get("test"))
    if f":{_ours(site)['environment'].get('IDENTITY_MANAGEMENT_PORT')}/readyz" not in asked:
        yield f"identity-service: {asked}"


composed_services_are_asked_how_they_are.broken_by(
    "nobody asks Redis", lambda site: drop(_services(site), "redis", "healthcheck")
)
composed_services_are_asked_how_they_are.broken_by(
    "the probes have moved", lambda site: put(_ours(site), "environment", "IDENTITY_MANAGEMENT_PORT", value="9001")
)


@promise
def the_composed_service_may_leave_in_good_order(site: Site) -> Iterator[str]:
    """The default of ten seconds would cut its drain short."""
    drain = int(
        _ours(site)["environment"].get("IDENTITY_SHUTDOWN_GRACE", site.facts.defaults["IDENTITY_SHUTDOWN_GRACE"])
    )
    if _seconds(_ours(site).get("stop_grace_period")) < drain + _CLOSING:
        yield f"{_ours(site).get('stop_grace_period')}"


the_composed_service_may_leave_in_good_order.broken_by(
    "ten seconds as compose has them", lambda site: drop(_ours(site), "stop_grace_period")
)


@promise
def composed_images_have_a_version(site: Site) -> Iterator[str]:
    """Nothing that changes from one day to the next."""
    for name, service in _services(site).items():
        tag = service.get("image", "").partition(":")[2]
        if not tag or tag == "latest":
            yield f"{name}: {service.get('image')}"


composed_images_have_a_version.broken_by(
    "the latest mail catcher", lambda site: put(_services(site), "mail", "image", value="axllent/mailpit")
)


@promise
def no_secret_is_in_the_compose_file(site: Site) -> Iterator[str]:
    """They are files of this machine; only the service is shown the master key, and only the migrator its password."""
    for name, service in _services(site).items():
        for variable, value in (service.get("environment") or {}).items():
            secret = variable in site.facts.secret_settings or variable.endswith("PASSWORD")
            if secret and variable != "IDENTITY_REDIS_URL":
                yield f"{name}: {variable}={value}"
    if any("file" not in secret for secret in site.compose["secrets"].values()):
        yield "a secret is no file"
    if [name for name, each in _services(site).items() if "master_key" in (each.get("secrets") or [])] != [
        "identity-service"
    ]:
        yield "the master key is shown to others"
    if [
        name for name, each in _services(site).items() if "secrets/migrate.env" in (each.get("env_file") or [])
    ] != list(_ONCE):
        yield "the migrator's password is shown to others"


no_secret_is_in_the_compose_file.broken_by(
    "the database's password is in it",
    lambda site: put(_services(site), "postgres", "environment", "POSTGRES_PASSWORD", value="hunter2"),
)
no_secret_is_in_the_compose_file.broken_by(
    "the service runs as the migrator", lambda site: put(_ours(site), "env_file", value=["secrets/migrate.env"])
)


# -- systemd ----------------------------------------------------------------------------------------------------------


def _server(site: Site) -> dict[str, list[str]]:
    return site.units["identity-service.service"]


def _migration(site: Site) -> dict[str, list[str]]:
    return site.units["identity-service-migrate.service"]


@promise
def units_can_do_nothing_but_their_work(site: Site) -> Iterator[str]:
    """Every restriction that the service does not notice is on."""
    for name, directives in site.units.items():
        for switch in sorted(_SWITCHES):
            if directives.get(switch) != ["yes"]:
                yield f"{name}: {switch}={directives.get(switch)}"
        for directive, values in _VALUES.items():
            if directives.get(directive) != values:
                yield f"{name}: {directive}={directives.get(directive)}"
        calls = directives.get("SystemCallFilter") or [""]
        if calls[0] != "@system-service" or not any(each.startswith("~@privileged") for each in calls[1:]):
            yield f"{name}: SystemCallFilter={calls}"
        if "MemoryMax" not in directives or "TasksMax" not in directives:
            yield f"{name}: not bounded"
        if directives.keys() & {"User", "Group", "ReadWritePaths", "StateDirectory"}:
            yield f"{name}: a place or a name of its own"


units_can_do_nothing_but_their_work.broken_by(
    "the unit may write to the system", lambda site: put(_server(site), "ProtectSystem", value=["full"])
)
units_can_do_nothing_but_their_work.broken_by(
    "the migration may gain privileges", lambda site: drop(_migration(site), "NoNewPrivileges")
)


@promise
def hashing_threads_may_still_step_back(site: Site) -> Iterator[str]:
    """setpriority is among @resources: without it a busy password pool would slow every signature."""
    if any("@resources" in each for each in _server(site).get("SystemCallFilter", [])):
        yield f"{_server(site)['SystemCallFilter']}"


hashing_threads_may_still_step_back.broken_by(
    "the server may not change priorities", lambda site: _server(site)["SystemCallFilter"].append("~@resources")
)


@promise
def the_unit_leaves_in_good_order(site: Site) -> Iterator[str]:
    """Its own process is told, and has the time for its drain; systemd brings it back when it fails."""
    environment = " ".join(_server(site).get("Environment", []))
    drain = re.search(r"IDENTITY_SHUTDOWN_GRACE=(\d+)", environment)
    if drain is None or _seconds((_server(site).get("TimeoutStopSec") or ["0"])[0]) < int(drain[1]) + _CLOSING:
        yield f"TimeoutStopSec={_server(site).get('TimeoutStopSec')}"
    if _server(site).get("Restart") != ["on-failure"] or _server(site).get("KillMode") != ["mixed"]:
        yield f"Restart={_server(site).get('Restart')} KillMode={_server(site).get('KillMode')}"


the_unit_leaves_in_good_order.broken_by(
    "ten seconds to leave", lambda site: put(_server(site), "TimeoutStopSec", value=["10"])
)
the_unit_leaves_in_good_order.broken_by("nobody brings it back", lambda site: drop(_server(site), "Restart"))


@promise
def the_unit_only_looks_at_the_schema(site: Site) -> Iterator[str]:
    """Migrating is another unit, as another role, that nothing starts by itself."""
    if _server(site).get("ExecStartPre") != ["/opt/identity-service/bin/identity-service migrate --check"]:
        yield f"ExecStartPre={_server(site).get('ExecStartPre')}"
    if _migration(site).get("Type") != ["oneshot"] or _migration(site).keys() & {"WantedBy", "RequiredBy"}:
        yield "the migration starts by itself"
    files = [unit.get("EnvironmentFile") for unit in (_server(site), _migration(site))]
    if files != [["/etc/identity-service/service.env"], ["/etc/identity-service/migrate.env"]]:
        yield f"{files}"


the_unit_only_looks_at_the_schema.broken_by(
    "every start migrates",
    lambda site: put(_server(site), "ExecStartPre", value=["/opt/identity-service/bin/identity-service migrate"]),
)
the_unit_only_looks_at_the_schema.broken_by(
    "both run as one role",
    lambda site: put(_migration(site), "EnvironmentFile", value=["/etc/identity-service/service.env"]),
)


@promise
def the_unit_alone_is_shown_the_master_key(site: Site) -> Iterator[str]:
    """As a credential, which no other process of the machine can read; the migration has none."""
    if _server(site).get("LoadCredential") != ["master.keys:/etc/identity-service/master.keys"]:
        yield f"LoadCredential={_server(site).get('LoadCredential')}"
    if not any("IDENTITY_MASTER_KEY_FILE=%d/master.keys" in each for each in _server(site).get("Environment", [])):
        yield f"{_server(site).get('Environment')}"
    if "LoadCredential" in _migration(site):
        yield "the migration is shown it, too"


the_unit_alone_is_shown_the_master_key.broken_by(
    "the key is a file that the unit must be let read", lambda site: drop(_server(site), "LoadCredential")
)


@promise
def units_listen_on_the_loopback_only(site: Site) -> Iterator[str]:
    """A proxy of the same machine ends TLS; probes and metrics are for this machine."""
    environment = " ".join(_server(site).get("Environment", [])).split()
    for name in ("IDENTITY_HOST", "IDENTITY_MANAGEMENT_HOST"):
        if f"{name}=127.0.0.1" not in environment:
            yield name


units_listen_on_the_loopback_only.broken_by(
    "the unit is open to the network",
    lambda site: _server(site)["Environment"].remove("IDENTITY_HOST=127.0.0.1 IDENTITY_PORT=8000"),
)
