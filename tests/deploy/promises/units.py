"""One machine under systemd: the restrictions of the cluster, in systemd's words."""

import itertools
import re
import shlex
from collections.abc import Iterator
from typing import Any

from identity_service.settings import UnsafeSettings
from tests.deploy.promises import promise
from tests.deploy.site import Site, drop, put, settings_of

_CLOSING = 10  # seconds that a server has left when the drain is over
_DESCRIPTORS = 200  # that a server needs besides those of its connections
_PROGRAM = "/opt/identity-service/bin/identity-service"
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


def _seconds(text: Any) -> int:
    match = re.fullmatch(r"(\d+)s?", str(text))
    return int(match[1]) if match else 0


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
        if calls[0] != "@system-service" or not {"~@privileged", "~@privileged @resources"} & set(calls[1:]):
            yield f"{name}: SystemCallFilter={calls}"
        memory, tasks = (" ".join(directives.get(bound, [])) for bound in ("MemoryMax", "TasksMax"))
        if not re.fullmatch(r"[1-9]\d*M", memory) or not re.fullmatch(r"[1-9]\d*", tasks):
            yield f"{name}: MemoryMax={memory} TasksMax={tasks}"
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
def the_unit_is_never_given_up(site: Site) -> Iterator[str]:
    """A start fails at once while the database is away: who counts starts leaves the server down when it is back."""
    if (
        _server(site).get("StartLimitIntervalSec") != ["0"]
        or _seconds((_server(site).get("RestartSec") or ["0"])[0]) < 1
    ):
        yield f"StartLimitIntervalSec={_server(site).get('StartLimitIntervalSec')} {_server(site).get('RestartSec')}"


the_unit_is_never_given_up.broken_by(
    "ten starts in two minutes",
    lambda site: put(_server(site), "StartLimitIntervalSec", value=["120"]),
)
the_unit_is_never_given_up.broken_by("starts without a pause", lambda site: drop(_server(site), "RestartSec"))


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


@promise
def units_run_the_commands_that_there_are(site: Site) -> Iterator[str]:
    """The server when the machine starts, the migration when somebody says so."""
    found = [
        (unit.get("Type"), unit.get("ExecStart"), unit.get("WantedBy")) for unit in (_server(site), _migration(site))
    ]
    wanted = [(["exec"], [f"{_PROGRAM} serve"], ["multi-user.target"]), (["oneshot"], [f"{_PROGRAM} migrate"], None)]
    if found != wanted:
        yield f"{found}"


units_run_the_commands_that_there_are.broken_by(
    "the unit serves a demo", lambda site: put(_server(site), "ExecStart", value=[f"{_PROGRAM} dev"])
)
units_run_the_commands_that_there_are.broken_by(
    "the unit does not come up with the machine", lambda site: drop(_server(site), "WantedBy")
)


@promise
def the_unit_starts_with_its_settings(site: Site) -> Iterator[str]:
    """What the unit says itself; who the service is and what it connects to is in a file beside it."""
    assignments = [each.partition("=") for line in _server(site).get("Environment", []) for each in line.split()]
    environment = {name: value.replace("%d", "/run/credentials/x") for name, _, value in assignments}
    needed = {"IDENTITY_ISSUER": "https://id.example", "IDENTITY_DATABASE_URL": "postgresql+psycopg://u@h/d"}
    try:
        settings = settings_of({**environment, **needed})
    except UnsafeSettings as error:
        yield str(error)
        return
    if (settings.host, settings.management_address) != ("127.0.0.1", ("127.0.0.1", 9000)):
        yield f"listens on {settings.host} and {settings.management_address}"
    if int((_server(site).get("LimitNOFILE") or ["0"])[0]) < settings.max_connections + _DESCRIPTORS:
        yield f"LimitNOFILE={_server(site).get('LimitNOFILE')}"


the_unit_starts_with_its_settings.broken_by(
    "the unit names a port that is none",
    lambda site: put(_server(site), "Environment", 0, value="IDENTITY_HOST=127.0.0.1 IDENTITY_PORT=http"),
)
the_unit_starts_with_its_settings.broken_by(
    "the unit has the descriptors of a shell", lambda site: drop(_server(site), "LimitNOFILE")
)


# -- an operator's commands -------------------------------------------------------------------------------------------


def _command(site: Site) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the unit that the README runs a command as, and its properties."""
    found = re.search(r"^systemd-run .*?[^\\]$", site.readme, re.DOTALL | re.MULTILINE)
    words = shlex.split(found[0].replace("\\\n", " ")) if found else []
    properties: dict[str, list[str]] = {}
    for option, assignment in itertools.pairwise(words):
        if option == "-p":
            name, _, value = assignment.partition("=")
            properties.setdefault(name, []).append(value)
    [unit] = [word.partition("=")[2] for word in words if word.startswith("--unit=")] or [""]
    return unit, properties


@promise
def a_command_beside_the_unit_is_told_what_the_unit_is_told(site: Site) -> Iterator[str]:
    """Its settings, and the master key at the place where systemd shows it to a unit of that name."""
    unit, properties = _command(site)
    for name in ("DynamicUser", "UMask", "EnvironmentFile", "LoadCredential"):
        if properties.get(name) != _server(site).get(name):
            yield f"{name}={properties.get(name)}, the unit has {_server(site).get(name)}"
    [credential] = properties.get("LoadCredential") or [""]
    path = f"/run/credentials/{unit}.service/{credential.partition(':')[0]}"
    if properties.get("Environment") != [f"IDENTITY_MASTER_KEY_FILE={path}"]:
        yield f"Environment={properties.get('Environment')}, the key is at {path}"


def _as_written(site: Site, old: str, new: str) -> None:
    """Write something else in the README's command. Raises ValueError where the old words are not there."""
    if old not in site.readme:
        raise ValueError(f"{old!r} is not written")
    site.readme = site.readme.replace(old, new)


a_command_beside_the_unit_is_told_what_the_unit_is_told.broken_by(
    "a command looks for the key where another unit has it",
    lambda site: _as_written(site, "--unit=identity-service-command", "--unit=identity-command"),
)
a_command_beside_the_unit_is_told_what_the_unit_is_told.broken_by(
    "a command has the migrator's settings",
    lambda site: _as_written(site, "EnvironmentFile=/etc/identity-service/service", "EnvironmentFile=/etc/x/migrate"),
)
