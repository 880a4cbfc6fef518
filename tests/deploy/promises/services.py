"""The Services: what leads to whom within the cluster."""

from collections.abc import Iterator

from tests.deploy.promises import promise
from tests.deploy.site import Site, dig, drop, put


@promise
def services_lead_to_ports_that_there_are(site: Site) -> Iterator[str]:
    """By the names that the container gives them."""
    names = {port.get("name") for port in site.server.get("ports") or []}
    for service in site.all("Service"):
        for port in dig(service, "spec", "ports", default=[]):
            if port.get("targetPort") not in names:
                yield f"{service['metadata']['name']}: {port}"


services_lead_to_ports_that_there_are.broken_by(
    "a Service leads to a port of another product",
    lambda site: put(site.find("Service", "identity-service"), "spec", "ports", 0, "targetPort", value="web"),
)


@promise
def services_are_for_the_inside_of_the_cluster(site: Site) -> Iterator[str]:
    """What comes from outside comes through a route."""
    for service in site.all("Service"):
        if dig(service, "spec", "type", default="ClusterIP") != "ClusterIP" or "externalIPs" in service["spec"]:
            yield service["metadata"]["name"]


services_are_for_the_inside_of_the_cluster.broken_by(
    "a Service opens a port of every node",
    lambda site: put(site.find("Service", "identity-service"), "spec", "type", value="NodePort"),
)


@promise
def unready_replicas_still_serve_the_keys(site: Site) -> Iterator[str]:
    """Of their own accord: by a Service that lists all, which no client's request goes through."""
    wanted = {"identity-service": False, "identity-service-discovery": True, "identity-service-management": True}
    found = {
        service["metadata"]["name"]: bool(dig(service, "spec", "publishNotReadyAddresses", default=False))
        for service in site.all("Service")
    }
    if found != wanted:
        yield f"{found}"


unready_replicas_still_serve_the_keys.broken_by(
    "the keys go away with the database",
    lambda site: drop(site.find("Service", "identity-service-discovery"), "spec", "publishNotReadyAddresses"),
)
unready_replicas_still_serve_the_keys.broken_by(
    "requests go to replicas that cannot answer",
    lambda site: put(site.find("Service", "identity-service"), "spec", "publishNotReadyAddresses", value=True),
)


@promise
def no_service_for_clients_leads_to_the_management_port(site: Site) -> Iterator[str]:
    """It has a Service of its own, without an address, that no route names."""
    for service in site.all("Service"):
        targets = {port.get("targetPort") for port in dig(service, "spec", "ports", default=[])}
        own = service["metadata"]["name"] == "identity-service-management"
        if targets & {"management", 9000} and (not own or len(targets) > 1):
            yield service["metadata"]["name"]
        if own and dig(service, "spec", "clusterIP") != "None":
            yield "Prometheus would ask one replica at random"
        ports = [(port.get("name"), port.get("port")) for port in dig(service, "spec", "ports", default=[])]
        if own and ports != [("management", int(site.setting("IDENTITY_MANAGEMENT_PORT") or 0))]:
            yield f"{ports}"


no_service_for_clients_leads_to_the_management_port.broken_by(
    "metrics beside the API",
    lambda site: site.find("Service", "identity-service")["spec"]["ports"].append(
        {"name": "metrics", "port": 9000, "targetPort": "management"}
    ),
)
no_service_for_clients_leads_to_the_management_port.broken_by(
    "Prometheus looks for the port in vain",
    lambda site: drop(site.find("Service", "identity-service-management"), "spec", "ports"),
)
no_service_for_clients_leads_to_the_management_port.broken_by(
    "Prometheus sees one replica at a time",
    lambda site: drop(site.find("Service", "identity-service-management"), "spec", "clusterIP"),
)


@promise
def prometheus_finds_every_replica(site: Site) -> Iterator[str]:
    """By the labels of the management Service, the name of its port, and a path that is served there."""
    monitors = site.all("ServiceMonitor")
    service = site.find("Service", "identity-service-management")
    labels = dig(service, "metadata", "labels", default={})
    ports = {port.get("name") for port in dig(service, "spec", "ports", default=[])}
    if len(monitors) != 1 or dig(monitors, 0, "spec", "namespaceSelector") is not None:
        yield f"{len(monitors)} monitors"
    for monitor in monitors:
        wanted = dig(monitor, "spec", "selector", "matchLabels", default={})
        if not wanted or not wanted.items() <= labels.items():
            yield f"looks for {wanted}, there is {labels}"
        for endpoint in dig(monitor, "spec", "endpoints", default=[]):
            if endpoint.get("port") not in ports or endpoint.get("path") not in site.facts.management_paths:
                yield f"asks {endpoint}"


prometheus_finds_every_replica.broken_by(
    "Prometheus looks for a Service with other labels",
    lambda site: put(
        site.find("Service", "identity-service-management"),
        *("metadata", "labels", "app.kubernetes.io/component"),
        value="server",
    ),
)
prometheus_finds_every_replica.broken_by(
    "Prometheus asks for a port of another name",
    lambda site: put(site.all("ServiceMonitor")[0], "spec", "endpoints", 0, "port", value="metrics"),
)
