"""One machine under compose: the restrictions of the cluster, and everything in its place."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from identity_service.settings import UnsafeSettings
from tests.deploy.promises import promise
from tests.deploy.site import Document, Site, drop, put, settings_of

_OURS = ("migrate", "identity-service")
_ONCE = ("migrate", "grants")
_LOOPBACK = "127.0.0.1:"
_CLOSING = 10  # seconds that a server has left when the drain is over


def _services(site: Site) -> dict[str, Document]:
    found: dict[str, Document] = site.compose["services"]
    return found


def _ours(site: Site) -> Document:
    return _services(site)["identity-service"]


def _seconds(text: Any) -> int:
    match = re.fullmatch(r"(\d+)s?", str(text))
    return int(match[1]) if match else 0


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


@promise
def the_composed_service_starts_with_its_settings(site: Site) -> Iterator[str]:
    """As a development server that is reached where its issuer says, and writes where it may."""
    environment = {name: str(value) for name, value in _ours(site)["environment"].items()}
    try:
        settings = settings_of({**environment, "IDENTITY_DATABASE_URL": "postgresql+psycopg://u@postgres/identity"})
    except UnsafeSettings as error:
        yield str(error)
        return
    if settings.host != "0.0.0.0" or settings.management_address != ("127.0.0.1", 9000):  # noqa: S104
        yield f"listens on {settings.host} and {settings.management_address}"
    if _ours(site).get("ports") != [f"127.0.0.1:{urlsplit(settings.public_issuer).port}:{settings.port}"]:
        yield f"{settings.public_issuer} is not at {_ours(site).get('ports')}"
    if [str(settings.master_key_file)] != [f"/run/secrets/{name}" for name in _ours(site).get("secrets") or []]:
        yield f"{settings.master_key_file} of {_ours(site).get('secrets')}"
    if not settings.data_dir.is_relative_to("/tmp") or settings.registration != "open":  # noqa: S108
        yield f"{settings.data_dir}, {settings.registration}"


the_composed_service_starts_with_its_settings.broken_by(
    "production on plain http", lambda site: drop(_ours(site), "environment", "IDENTITY_ENVIRONMENT")
)
the_composed_service_starts_with_its_settings.broken_by(
    "the issuer is at another port", lambda site: put(_ours(site), "ports", value=["127.0.0.1:8080:8000"])
)
the_composed_service_starts_with_its_settings.broken_by(
    "the key is looked for elsewhere",
    lambda site: put(_ours(site), "environment", "IDENTITY_MASTER_KEY_FILE", value="/etc/master.key"),
)


@promise
def composed_services_reach_each_other(site: Site) -> Iterator[str]:
    """By the names that their settings have, on a network that both are on; what is named is declared."""
    environment = _ours(site)["environment"]
    hosts = {urlsplit(environment.get("IDENTITY_REDIS_URL", "")).hostname, environment.get("IDENTITY_SMTP_HOST")}
    for name, needed in (
        ("identity-service", {*hosts, "postgres"}),
        ("migrate", {"postgres"}),
        ("grants", {"postgres"}),
    ):
        for other in needed:
            shared = set(_services(site).get(other, {}).get("networks") or []) & set(_services(site)[name]["networks"])
            if not shared:
                yield f"{name} does not reach {other}"
    for name, service in _services(site).items():
        for kind in ("networks", "secrets"):
            for each in set(service.get(kind) or []) - site.compose[kind].keys():
                yield f"{name}: there is no {kind} {each}"
        if service.get("ports") and "outside" not in service["networks"]:
            yield f"{name}: nobody reaches its ports"


composed_services_reach_each_other.broken_by(
    "Redis has another name", lambda site: site.compose["services"].update(valkey=_services(site).pop("redis"))
)
composed_services_reach_each_other.broken_by(
    "the service is not on the inside", lambda site: put(_ours(site), "networks", value=["outside"])
)


@promise
def the_composed_database_is_as_it_is_documented(site: Site) -> Iterator[str]:
    """Its name, its connections, its roles, and passwords for them; what is mounted is there and cannot be changed."""
    postgres = _services(site)["postgres"]
    connections = re.search(r"`max_connections` of at least (\d+)", site.readme)
    if connections is None or f"max_connections={connections[1]}" not in (postgres.get("command") or []):
        yield f"{postgres.get('command')}"
    if (postgres.get("environment") or {}).get("POSTGRES_DB") != "identity":
        yield f"{postgres.get('environment')}"
    mounted = {
        target: source
        for name in ("postgres", "grants")
        for source, target, *mode in (entry.split(":") for entry in _services(site)[name].get("volumes") or [])
        if mode == ["ro"]
    }
    if mounted != {
        "/docker-entrypoint-initdb.d/10-roles.sql": "../postgresql/roles.sql",
        "/docker-entrypoint-initdb.d/20-passwords.sh": "./passwords.sh",
        "/grants.sql": "../postgresql/grants.sql",
    }:
        yield f"{mounted}"
    if postgres.get("secrets") != ["postgres_password", "migrator_password", "service_password"]:
        yield f"{postgres.get('secrets')}"


the_composed_database_is_as_it_is_documented.broken_by(
    "nobody makes the roles", lambda site: drop(_services(site), "postgres", "volumes", 1)
)
the_composed_database_is_as_it_is_documented.broken_by(
    "the database has fewer connections", lambda site: drop(_services(site), "postgres", "command")
)


@promise
def the_composed_image_is_built_once(site: Site) -> Iterator[str]:
    """From this checkout; the migration is of the version that serves."""
    images = {_services(site)[name].get("image") for name in _OURS}
    if len(images) != 1 or (_ours(site).get("build") or {}).get("context") != "../..":
        yield f"{images} of {_ours(site).get('build')}"


the_composed_image_is_built_once.broken_by(
    "compose migrates by another version",
    lambda site: put(_services(site), "migrate", "image", value="identity-service:older"),
)


@promise
def composed_services_come_back(site: Site) -> Iterator[str]:
    """What goes on running does so after a crash; what runs once does not."""
    for name, service in _services(site).items():
        if service.get("restart") != (None if name in _ONCE else "unless-stopped"):
            yield f"{name}: {service.get('restart')}"


composed_services_come_back.broken_by(
    "the database stays down", lambda site: drop(_services(site), "postgres", "restart")
)
