"""Secrets come by reference, each to who needs it; settings are settings that exist."""

import re
from collections.abc import Iterator
from typing import Any

from identity_service.settings import UnsafeSettings
from tests.deploy.promises import promise
from tests.deploy.site import Document, Site, dig, drop, put, settings_of

_NAME = re.compile(r"IDENTITY_[A-Z0-9_]+")
_MIGRATOR = "identity-database-migrator"


def _references(container: Document) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, secret, key) for each variable that comes from a Secret."""
    for variable in container.get("env") or []:
        if reference := dig(variable, "valueFrom", "secretKeyRef"):
            yield variable["name"], reference.get("name", ""), reference.get("key", "")


def _used(site: Site) -> set[tuple[str, str]]:
    """Return every (secret, key) that a pod of production or the migration reads."""
    used = set()
    for pod in (site.pod, site.operator_pod, site.migration_pod):
        for _, container in pod.containers():
            used |= {(secret, key) for _, secret, key in _references(container)}
        for volume in pod.spec.get("volumes") or []:
            for item in dig(volume, "secret", "items", default=[]):
                used.add((volume["secret"]["secretName"], item["key"]))
    return used


@promise
def secrets_come_by_reference_only(site: Site) -> Iterator[str]:
    """No manifest holds a secret: not as a value, not in the ConfigMap, not as a Secret of its own."""
    for environment, found in (("production", site.production), ("migrate", site.migrate), ("dev", site.dev)):
        for secret in site.all("Secret", found):
            yield f"{environment}: Secret/{secret['metadata']['name']}"
        for config in site.all("ConfigMap", found):
            for name in (config.get("data") or {}).keys() & site.facts.secret_settings:
                yield f"{environment}: {name} is in a ConfigMap"
    for where, container in site.containers():
        for variable in container.get("env") or []:
            if variable["name"] in site.facts.secret_settings and "value" in variable:
                yield f"{where}: {variable['name']} is a value"
        for source in container.get("envFrom") or []:
            if "secretRef" in source:
                yield f"{where}: takes a whole Secret into its environment"


secrets_come_by_reference_only.broken_by(
    "the password of the mail server is in the ConfigMap",
    lambda site: put(site.config, "IDENTITY_SMTP_PASSWORD", value="hunter2"),
)
secrets_come_by_reference_only.broken_by(
    "the database's address is a value",
    lambda site: put(
        site.server, "env", 0, value={"name": "IDENTITY_DATABASE_URL", "value": "postgresql+psycopg://u:p@h/d"}
    ),
)
secrets_come_by_reference_only.broken_by(
    "a Secret is among the manifests",
    lambda site: site.production.append({"kind": "Secret", "metadata": {"name": "x", "namespace": "identity"}}),
)


@promise
def the_master_key_is_a_file_that_only_server_and_operator_read(site: Site) -> Iterator[str]:
    """0440 for the user's group, read-only, at the path that the setting names, in one container of each pod."""
    path = site.config.get("IDENTITY_MASTER_KEY_FILE", "")
    for pod, reader in ((site.pod, site.server), (site.operator_pod, site.operator)):
        volumes = [volume for volume in pod.spec.get("volumes") or [] if "secret" in volume]
        if len(volumes) != 1 or dig(volumes, 0, "secret", "secretName") != "identity-master-key":
            yield f"{pod.where}: volumes: {volumes}"
            continue
        [volume] = volumes
        if dig(volume, "secret", "defaultMode") != 0o440:
            yield f"{pod.where}: mode {dig(volume, 'secret', 'defaultMode')}"
        if dig(pod.spec, "securityContext", "fsGroup") != dig(pod.spec, "securityContext", "runAsGroup"):
            yield f"{pod.where}: the file is not of the user's group"
        mounts = [mount for mount in reader.get("volumeMounts") or [] if mount["name"] == volume["name"]]
        files = [f"{dig(mounts, 0, 'mountPath')}/{item['path']}" for item in dig(volume, "secret", "items", default=[])]
        if len(mounts) != 1 or mounts[0].get("readOnly") is not True or files != [path]:
            yield f"{pod.where}: {path} is mounted as {files} by {mounts}"
        for where, container in pod.containers():
            mounted = any(mount["name"] == volume["name"] for mount in container.get("volumeMounts") or [])
            if mounted and container is not reader:
                yield f"{where}: reads it, too"


the_master_key_is_a_file_that_only_server_and_operator_read.broken_by(
    "everybody in the pod may read the key",
    lambda site: put(site.pod.spec, "volumes", 1, "secret", "defaultMode", value=0o444),
)
the_master_key_is_a_file_that_only_server_and_operator_read.broken_by(
    "the key is of no group of ours", lambda site: drop(site.pod.spec, "securityContext", "fsGroup")
)
the_master_key_is_a_file_that_only_server_and_operator_read.broken_by(
    "the setting names another path",
    lambda site: put(site.config, "IDENTITY_MASTER_KEY_FILE", value="/etc/identity/master.key"),
)
the_master_key_is_a_file_that_only_server_and_operator_read.broken_by(
    "what looks at the schema sees the key",
    lambda site: site.schema_check["volumeMounts"].append(dict(site.server["volumeMounts"][1])),
)
the_master_key_is_a_file_that_only_server_and_operator_read.broken_by(
    "an operator's commands find no key", lambda site: drop(site.operator, "volumeMounts", 1)
)


@promise
def the_migration_has_a_database_role_of_its_own(site: Site) -> Iterator[str]:
    """The server never holds what can change the tables' form, nor the migration what opens tokens."""
    for where, container in (*site.pod.containers(), *site.operator_pod.containers()):
        if any(secret == _MIGRATOR for _, secret, _ in _references(container)):
            yield f"{where}: holds the migrator's password"
    if list(_references(site.migrator)) != [("IDENTITY_DATABASE_URL", _MIGRATOR, "url")]:
        yield f"the migration holds {list(_references(site.migrator))}"
    if any("secret" in volume for volume in site.migration_pod.spec.get("volumes") or []):
        yield "the migration mounts a Secret"


the_migration_has_a_database_role_of_its_own.broken_by(
    "the migration runs as the service's role",
    lambda site: put(site.migrator, "env", 0, "valueFrom", "secretKeyRef", "name", value="identity-database"),
)
the_migration_has_a_database_role_of_its_own.broken_by(
    "the schema is looked at as the migrator",
    lambda site: put(site.schema_check, "env", 0, "valueFrom", "secretKeyRef", "name", value=_MIGRATOR),
)
the_migration_has_a_database_role_of_its_own.broken_by(
    "an operator's commands run as the migrator",
    lambda site: put(site.operator, "env", 0, "valueFrom", "secretKeyRef", "name", value=_MIGRATOR),
)


@promise
def each_container_is_told_what_it_connects_to(site: Site) -> Iterator[str]:
    """By the secrets that are there for it, and no other."""
    database = ("IDENTITY_DATABASE_URL", "identity-database", "url")
    redis = ("IDENTITY_REDIS_URL", "identity-redis", "url")
    smtp = ("IDENTITY_SMTP_PASSWORD", "identity-smtp", "password")
    for container, wanted in (
        (site.schema_check, {database}),
        (site.server, {database, redis, smtp}),
        (site.operator, {database}),
    ):
        if container and set(_references(container)) != wanted:
            yield f"{container.get('name')}: {sorted(_references(container))}"


each_container_is_told_what_it_connects_to.broken_by(
    "the server is told of no database", lambda site: drop(site.server, "env", 0)
)
each_container_is_told_what_it_connects_to.broken_by(
    "what looks at the schema holds the mail server's password",
    lambda site: site.schema_check["env"].append(site.server["env"][2]),
)
each_container_is_told_what_it_connects_to.broken_by(
    "an operator's commands hold the mail server's password",
    lambda site: site.operator["env"].append(site.server["env"][2]),
)


@promise
def every_secret_has_an_example(site: Site) -> Iterator[str]:
    """Who makes them by hand finds all of them, and none that nobody reads."""
    shown = {(found["metadata"]["name"], key) for found in site.examples for key in found.get("stringData") or {}}
    for secret, key in sorted(_used(site) ^ shown):
        yield f"{secret}/{key}"


every_secret_has_an_example.broken_by(
    "the example of Redis is gone",
    lambda site: site.examples.remove(site.find("Secret", "identity-redis", site.examples)),
)


@promise
def every_secret_is_fetched_from_the_store(site: Site) -> Iterator[str]:
    """Each by an ExternalSecret of its own, and what vanishes from the store stays with us."""
    fetched = set()
    for found in (*site.all("ExternalSecret"), *site.all("ExternalSecret", site.migrate)):
        spec = found.get("spec") or {}
        target = dig(spec, "target", "name", default="")
        fetched |= {(target, item.get("secretKey")) for item in spec.get("data") or []}
        if dig(spec, "target", "deletionPolicy") != "Retain":
            yield f"{target}: goes when the store forgets it"
        if spec.get("secretStoreRef") != {"kind": "ClusterSecretStore", "name": "identity"}:
            yield f"{target}: from {spec.get('secretStoreRef')}"
        if dig(spec, "target", "creationPolicy") != "Owner" or spec.get("refreshInterval") != "1h":
            yield f"{target}: {spec.get('target')} each {spec.get('refreshInterval')}"
        for item in spec.get("data") or []:
            entry = f"identity/{target.removeprefix('identity-')}"
            if item.get("remoteRef") != {"key": entry, "property": item.get("secretKey")}:
                yield f"{target}: {item.get('remoteRef')}"
    for secret, key in sorted(_used(site) ^ fetched, key=str):
        yield f"{secret}/{key}"


every_secret_is_fetched_from_the_store.broken_by(
    "the master key goes when the store forgets it",
    lambda site: drop(site.find("ExternalSecret", "identity-master-key"), "spec", "target", "deletionPolicy"),
)
every_secret_is_fetched_from_the_store.broken_by(
    "the service's password is fetched for the migrator",
    lambda site: put(site.migrate_secret, "spec", "data", 0, "remoteRef", "key", value="identity/database"),
)
every_secret_is_fetched_from_the_store.broken_by(
    "nobody fetches the password of the mail server",
    lambda site: site.production.remove(site.find("ExternalSecret", "identity-smtp")),
)


@promise
def no_example_is_a_secret(site: Site) -> Iterator[str]:
    """What stands in the examples is refused by the service, or by who is asked for it."""
    for found in site.examples:
        for key, value in (found.get("stringData") or {}).items():
            if "REPLACE" not in value:
                yield f"{found['metadata']['name']}/{key}: {value}"
    for where, kustomization in site.kustomizations.items():
        if "secretGenerator" in kustomization or "secrets.example" in str(kustomization):
            yield f"{where}: takes the examples in"


no_example_is_a_secret.broken_by(
    "an example holds a password", lambda site: put(site.examples, 3, "stringData", "password", value="hunter2")
)
no_example_is_a_secret.broken_by(
    "production takes the examples in",
    lambda site: site.kustomizations["overlays/production"]["resources"].append("../../secrets.example"),
)


# -- settings ---------------------------------------------------------------------------------------------------------


def _named(site: Site) -> Iterator[tuple[str, str]]:
    """Yield (where, name) for every setting that any manifest sets."""
    for found in (*site.production, *site.migrate, *site.dev):
        if found["kind"] == "ConfigMap":
            for name in found.get("data") or {}:
                yield f"ConfigMap/{found['metadata']['name']}", name
    for where, container in site.containers():
        for variable in container.get("env") or []:
            yield where, variable["name"]
    for service, definition in site.compose["services"].items():
        for name in definition.get("environment") or {}:
            if "identity-service" in str(definition.get("image")):
                yield f"compose/{service}", name
    for name, directives in site.units.items():
        for line in directives.get("Environment", []):
            for assignment in line.split():
                yield name, assignment.partition("=")[0]


@promise
def every_setting_that_is_set_exists(site: Site) -> Iterator[str]:
    """A setting with a wrong name is ignored without a word, and the default holds."""
    for where, name in _named(site):
        if name not in site.facts.settings:
            yield f"{where}: {name}"


every_setting_that_is_set_exists.broken_by(
    "a setting of an older version", lambda site: put(site.config, "IDENTITY_METRICS_PORT", value="9100")
)
every_setting_that_is_set_exists.broken_by(
    "the unit misspells one",
    lambda site: site.units["identity-service.service"]["Environment"].append("IDENTITY_PROT=1"),
)


@promise
def every_setting_that_is_written_about_exists(site: Site) -> Iterator[str]:
    """In comments and in the README, too."""
    for where, text in {**site.texts, "README.md": site.readme}.items():
        for name in sorted(set(_NAME.findall(text)) - site.facts.settings):
            yield f"{where}: {name}"


every_setting_that_is_written_about_exists.broken_by(
    "the README tells of a setting that was",
    lambda site: setattr(site, "readme", f"{site.readme}\n`IDENTITY_METRICS_PORT`\n"),
)


@promise
def the_service_starts_with_the_settings_of_production(site: Site) -> Iterator[str]:
    """As production, with nothing relaxed."""
    try:
        settings = settings_of({**site.config, "IDENTITY_DATABASE_URL": "postgresql+psycopg://u@h/d"})
    except UnsafeSettings as error:
        yield str(error)
    else:
        if not settings.production:
            yield "it is a development server"
        if not settings.trusted_proxies:
            yield "no proxy is trusted, so that everybody shares its limits"
        if not settings.sends_mail:
            yield "nobody can reset a password: no mail is sent"


the_service_starts_with_the_settings_of_production.broken_by(
    "the issuer is not https", lambda site: put(site.config, "IDENTITY_ISSUER", value="http://id.example")
)
the_service_starts_with_the_settings_of_production.broken_by(
    "production is a development server", lambda site: put(site.config, "IDENTITY_ENVIRONMENT", value="development")
)
the_service_starts_with_the_settings_of_production.broken_by(
    "every address is a trusted proxy", lambda site: put(site.config, "IDENTITY_TRUSTED_PROXIES", value="0.0.0.0/0")
)
the_service_starts_with_the_settings_of_production.broken_by(
    "no mail server is named", lambda site: drop(site.config, "IDENTITY_SMTP_HOST")
)
the_service_starts_with_the_settings_of_production.broken_by(
    "no proxy is trusted", lambda site: drop(site.config, "IDENTITY_TRUSTED_PROXIES")
)


def _development(site: Site) -> dict[str, str]:
    found: dict[str, str] = dig(site.all("ConfigMap", site.dev), 0, "data", default={})
    return found


@promise
def the_development_cluster_needs_nothing_but_a_database(site: Site) -> Iterator[str]:
    """One replica that tells it is for development, reached by plain http, with its mails where it may write."""
    try:
        settings = settings_of({**_development(site), "IDENTITY_DATABASE_URL": "postgresql+psycopg://u@h/d"})
    except UnsafeSettings as error:
        yield str(error)
    else:
        if settings.production or settings.public_issuer != f"http://127.0.0.1:{settings.port}":
            yield f"{settings.environment} at {settings.public_issuer}"
        if settings.mailbox is None or not settings.mailbox.is_relative_to("/tmp"):  # noqa: S108
            yield f"mails go to {settings.mailbox}"
    server = site.find("Deployment", "identity-service", site.dev)
    if dig(server, "spec", "replicas") != 1 or site.all("HorizontalPodAutoscaler", site.dev):
        yield f"{dig(server, 'spec', 'replicas')} replicas"
    for variable in dig(server, "spec", "template", "spec", "containers", 0, "env", default=[]):
        reference = dig(variable, "valueFrom", "secretKeyRef", default={})
        if reference.get("name") != "identity-database" and reference.get("optional") is not True:
            yield f"needs {reference}"


the_development_cluster_needs_nothing_but_a_database.broken_by(
    "mails are written where nothing can be", lambda site: drop(_development(site), "IDENTITY_DATA_DIR")
)
the_development_cluster_needs_nothing_but_a_database.broken_by(
    "the development cluster takes itself for production", lambda site: drop(_development(site), "IDENTITY_ENVIRONMENT")
)


@promise
def the_migration_is_told_of_its_database_only(site: Site) -> Iterator[str]:
    """It needs neither issuer nor master key, nor what looks at the schema the latter."""
    names = [variable["name"] for variable in site.migrator.get("env") or []]
    if names != ["IDENTITY_DATABASE_URL"] or site.migrator.get("envFrom"):
        yield f"{names} {site.migrator.get('envFrom')}"


the_migration_is_told_of_its_database_only.broken_by(
    "the migration reads all settings",
    lambda site: put(site.migrator, "envFrom", value=[{"configMapRef": {"name": "identity-service"}}]),
)


@promise
def a_changed_setting_is_a_rollout(site: Site) -> Iterator[str]:
    """The ConfigMap's name carries a digest of its content, and every container reads that very one."""
    names = [found["metadata"]["name"] for found in site.all("ConfigMap")]
    if len(names) != 1 or not re.fullmatch(r"identity-service-[a-z0-9]{10}", names[0]):
        yield f"ConfigMaps: {names}"
    for where, container in (*site.pod.containers(), *site.operator_pod.containers()):
        read = [dig(source, "configMapRef", "name") for source in container.get("envFrom") or []]
        if read != names:
            yield f"{where}: reads {read}"


def _rename(site: Site) -> Any:
    put(site.all("ConfigMap")[0], "metadata", "name", value="identity-service")
    for container in (site.server, site.schema_check, site.operator):
        put(container, "envFrom", 0, "configMapRef", "name", value="identity-service")


a_changed_setting_is_a_rollout.broken_by("the ConfigMap has a fixed name", _rename)
a_changed_setting_is_a_rollout.broken_by(
    "the server reads a ConfigMap of before",
    lambda site: put(site.server, "envFrom", 0, "configMapRef", "name", value="identity-service-0000000000"),
)
a_changed_setting_is_a_rollout.broken_by(
    "an operator's commands have settings of before",
    lambda site: put(site.operator, "envFrom", 0, "configMapRef", "name", value="identity-service-0000000000"),
)
