"""What the outside reaches, path by path (DEP-11): by the Gateway's routes, and by the Ingress objects."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.deploy.promises import promise
from tests.deploy.site import Document, Site, dig, drop, put

CASES = ("DEP-11",)
NOWHERE = ("/v1/bootstrap", "/healthz", "/readyz", "/metrics")
"""Paths that no route leads to."""
_PART = "nginx.org/mergeable-ingress-type"
ADMIN = "/v1/admin"
"""What is only at the operators' host."""


@dataclass(frozen=True)
class Route:
    """One path of one host, and where it leads."""

    kind: str
    host: str
    exact: bool
    path: str
    service: str
    port: Any

    def leads(self, path: str) -> bool:
        """Return whether a request for a path comes this way. Prefixes are of whole segments in both kinds."""
        return path == self.path or (not self.exact and path.startswith(f"{self.path}/"))


def routes(site: Site) -> Iterator[Route]:
    """Yield every route of both kinds."""
    for found in site.all("HTTPRoute"):
        for host in dig(found, "spec", "hostnames", default=["*"]):
            for rule in dig(found, "spec", "rules", default=[]):
                for match in rule.get("matches") or [{}]:
                    path = match.get("path") or {"type": "PathPrefix", "value": ""}
                    for backend in rule.get("backendRefs") or []:
                        if path["type"] not in ("Exact", "PathPrefix"):
                            continue  # no implementation has to know it
                        exact = path["type"] == "Exact"
                        yield Route("gateway", host, exact, path["value"].rstrip("/"), backend["name"], backend["port"])
    for found in site.all("Ingress", site.ingress):
        for rule in dig(found, "spec", "rules", default=[]):
            for path in dig(rule, "http", "paths", default=[]):
                if path["pathType"] not in ("Exact", "Prefix"):
                    continue  # what the others mean is the controller's to say
                service = dig(path, "backend", "service", default={})
                port = dig(service, "port", "name", default=dig(service, "port", "number"))
                exact = path["pathType"] == "Exact"
                yield Route("ingress", rule.get("host", "*"), exact, path["path"].rstrip("/"), service["name"], port)


def winner(ways: Iterable[Route], path: str) -> Route | None:
    """Return the route that a request takes: the exact one, else the longest."""
    leading = [way for way in ways if way.leads(path)]
    return max(leading, key=lambda way: (way.exact, len(way.path)), default=None)


def public_host(site: Site) -> str:
    """Return the host of the issuer."""
    return urlsplit(site.setting("IDENTITY_ISSUER")).netloc


def _sample(path: str) -> str:
    """Return a path with something in the place of each parameter."""
    return re.sub(r"\{\w+\}", "x", path)


def public(site: Site) -> Document:
    """Return the route of the public host."""
    return site.find("HTTPRoute", "identity-service")


def ingress(site: Site, name: str) -> Document:
    """Return one of the Ingress objects."""
    return site.find("Ingress", name, site.ingress)


def _paths(site: Site) -> list[Document]:
    found: list[Document] = dig(ingress(site, "identity-service-public"), "spec", "rules", 0, "http", "paths")
    return found


@promise
def everything_that_is_for_the_public_is_routed(site: Site) -> Iterator[str]:
    """The code is asked what it serves; what is not for everybody is named here, and nothing else is left out."""
    for kind in ("gateway", "ingress"):
        ways = [route for route in routes(site) if route.kind == kind and route.host == public_host(site)]
        for path in sorted(site.facts.public_paths):
            hidden = path in NOWHERE or path == ADMIN or path.startswith(f"{ADMIN}/")
            if not hidden and not any(way.leads(_sample(path)) for way in ways):
                yield f"{kind}: {path}"


everything_that_is_for_the_public_is_routed.broken_by(
    "nobody can revoke a token", lambda site: drop(public(site), "spec", "rules", 1, "matches", 1)
)
everything_that_is_for_the_public_is_routed.broken_by(
    "people's API is not there under Ingress", lambda site: drop(_paths(site), 6)
)


@promise
def nothing_is_routed_that_nobody_serves(site: Site) -> Iterator[str]:
    """A path that a later version starts to serve must not be open before somebody has thought about it."""
    served = [_sample(path) for path in site.facts.public_paths]
    for route in routes(site):
        if not any(route.leads(path) for path in served):
            yield f"{route.kind}: {route.path}"


nothing_is_routed_that_nobody_serves.broken_by(
    "a route for a page that is not there yet",
    lambda site: (
        put(public(site), "spec", "rules", 1, "matches", 0, "path", value={"type": "Exact", "value": "/login"})
        or public(site)["spec"]["rules"][1]["matches"].append({"path": {"type": "Exact", "value": "/token"}})
    ),
)


@promise
def the_public_never_reaches_the_admin_api(site: Site) -> Iterator[str]:
    """Its only way is the operators' host, on a gateway that the outside does not reach."""
    for route in routes(site):
        admin = route.leads(ADMIN) or route.leads(f"{ADMIN}/users")
        if admin and route.host == public_host(site):
            yield f"{route.kind}: {route.host}{route.path}"
        if not admin and route.host != public_host(site):
            yield f"{route.kind}: {route.host}{route.path} is more than the admin API"
    parents = [dig(found, "spec", "parentRefs", 0, "name") for found in site.all("HTTPRoute")]
    classes = {
        found["metadata"]["name"]: dig(found, "spec", "ingressClassName") for found in site.all("Ingress", site.ingress)
    }
    if sorted(map(str, parents)) != ["internal", "public"]:
        yield f"gateways: {parents}"
    if classes.pop("identity-service-admin", None) in classes.values():
        yield "the operators' Ingress is served by the public's controller"


the_public_never_reaches_the_admin_api.broken_by(
    "the whole of /v1 is public",
    lambda site: put(public(site), "spec", "rules", 1, "matches", 6, "path", "value", value="/v1"),
)
the_public_never_reaches_the_admin_api.broken_by(
    "the admin API is on the public gateway",
    lambda site: put(site.find("HTTPRoute", "identity-service-admin"), "spec", "parentRefs", 0, "name", value="public"),
)
the_public_never_reaches_the_admin_api.broken_by(
    "the admin API is on the public controller",
    lambda site: put(ingress(site, "identity-service-admin"), "spec", "ingressClassName", value="nginx"),
)


@promise
def what_is_for_nobody_outside_has_no_route(site: Site) -> Iterator[str]:
    """The first operator, the probes, the metrics; and no route takes everything that is left."""
    for route in routes(site):
        for path in (*NOWHERE, "/docs", "/openapi.json", "/anything/else"):
            if route.leads(path):
                yield f"{route.kind}: {route.host}{route.path} leads to {path}"


what_is_for_nobody_outside_has_no_route.broken_by(
    "the metrics are public",
    lambda site: public(site)["spec"]["rules"][1]["matches"].append({"path": {"type": "Exact", "value": "/metrics"}}),
)
what_is_for_nobody_outside_has_no_route.broken_by(
    "the rest goes to the service, too",
    lambda site: _paths(site).append({**_paths(site)[0], "path": "/", "pathType": "Prefix"}),
)


@promise
def keys_and_metadata_come_from_every_replica_that_runs(site: Site) -> Iterator[str]:
    """Everything else from those that are ready; by ports that the Services have."""
    services = {
        service["metadata"]["name"]: dig(service, "spec", "ports", default=[]) for service in site.all("Service")
    }
    for kind in ("gateway", "ingress"):
        ways = [way for way in routes(site) if (way.kind, way.host) == (kind, public_host(site))]
        for path in sorted(site.facts.public_paths):
            way = winner(ways, _sample(path))
            wanted = "identity-service" + "-discovery" * path.startswith("/.well-known/")
            if way is not None and way.service != wanted:
                yield f"{kind}: {path} leads to {way.service}"
    for route in routes(site):
        ports = {value for port in services.get(route.service, []) for value in (port["port"], port["name"])}
        if route.port not in ports:
            yield f"{route.kind}: {route.service} has no port {route.port}"


keys_and_metadata_come_from_every_replica_that_runs.broken_by(
    "the keys come from ready replicas only",
    lambda site: put(public(site), "spec", "rules", 0, "backendRefs", 0, "name", value="identity-service"),
)
keys_and_metadata_come_from_every_replica_that_runs.broken_by(
    "tokens come by a port that the Service does not have",
    lambda site: put(public(site), "spec", "rules", 1, "backendRefs", 0, "port", value=8000),
)


@promise
def routed_hosts_are_those_that_the_service_answers_to(site: Site) -> Iterator[str]:
    """The issuer's, and the operators', which the service must be told of."""
    own = {public_host(site), *str(site.config.get("IDENTITY_ALLOWED_HOSTS", "")).split(",")}
    for kind in ("gateway", "ingress"):
        found = {route.host for route in routes(site) if route.kind == kind}
        if found != own:
            yield f"{kind}: {found}, the service answers to {own}"


routed_hosts_are_those_that_the_service_answers_to.broken_by(
    "the issuer has moved", lambda site: put(site.config, "IDENTITY_ISSUER", value="https://login.example")
)
routed_hosts_are_those_that_the_service_answers_to.broken_by(
    "the service was not told of the operators' host", lambda site: drop(site.config, "IDENTITY_ALLOWED_HOSTS")
)


@promise
def both_kinds_of_routes_say_the_same(site: Site) -> Iterator[str]:
    """Whoever changes one of them changes the other."""
    kinds: dict[str, set[tuple[str, bool, str, str]]] = {"gateway": set(), "ingress": set()}
    for route in routes(site):
        kinds[route.kind].add((route.host, route.exact, route.path, route.service))
    for host, _, path, service in sorted(kinds["gateway"] ^ kinds["ingress"]):
        yield f"{host}{path} → {service}"


both_kinds_of_routes_say_the_same.broken_by(
    "a prefix in one is a path in the other",
    lambda site: put(_paths(site), 2, "pathType", value="Prefix"),
)


@promise
def the_public_ingresses_are_parts_of_one_host(site: Site) -> Iterator[str]:
    """A master with the certificate and no path, and two minions with the paths, all of one controller."""
    found = {
        each["metadata"]["name"]: (
            dig(each, "metadata", "annotations", _PART),
            dig(each, "spec", "ingressClassName"),
            [rule.get("host") for rule in dig(each, "spec", "rules", default=[])],
            "tls" in each["spec"],
        )
        for each in site.all("Ingress", site.ingress)
    }
    [host] = dig(ingress(site, "identity-service"), "spec", "tls", 0, "hosts", default=[None])
    wanted = {
        "identity-service": ("master", "nginx", [host], True),
        "identity-service-public": ("minion", "nginx", [host], False),
        "identity-service-discovery": ("minion", "nginx", [host], False),
    }
    admin = found.pop("identity-service-admin", (None,))
    if found != wanted or admin[0] is not None:
        yield f"{found} {admin}"


the_public_ingresses_are_parts_of_one_host.broken_by(
    "two Ingresses claim the host",
    lambda site: drop(ingress(site, "identity-service-discovery"), "metadata", "annotations", _PART),
)
