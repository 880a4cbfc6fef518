"""What the outside reaches, path by path, and what it can make us believe (DEP-11): Gateway routes and Ingress."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.deploy.promises import promise
from tests.deploy.site import Document, Site, dig, drop, put

NOWHERE = ("/v1/bootstrap", "/healthz", "/readyz", "/metrics")
"""Paths that no route leads to."""
ADMIN = "/v1/admin"
"""What is only at the operators' host."""
CLAIMS = frozenset(
    [
        "forwarded",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-prefix",
        "x-forwarded-server",
        "x-forwarded-user",
        "x-forwarded-client-cert",
        "x-real-ip",
        "x-original-url",
        "x-rewrite-url",
        "x-http-method-override",
        "x-client-cert",
        "x-ssl-client-cert",
        "ssl-client-cert",
        "client-cert",
        "client-cert-chain",
    ]
)
"""What a client could say about itself, or about what it asks, by a header that a proxy means to write."""
_REWRITTEN_BY_NGINX = frozenset(("x-forwarded-host", "x-forwarded-port", "x-real-ip"))


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
                        exact = path["type"] == "Exact"
                        yield Route("gateway", host, exact, path["value"].rstrip("/"), backend["name"], backend["port"])
    for found in site.all("Ingress", site.ingress):
        for rule in dig(found, "spec", "rules", default=[]):
            for path in dig(rule, "http", "paths", default=[]):
                service = dig(path, "backend", "service", default={})
                port = dig(service, "port", "name", default=dig(service, "port", "number"))
                exact = path["pathType"] == "Exact"
                yield Route("ingress", rule.get("host", "*"), exact, path["path"].rstrip("/"), service["name"], port)


def winner(site: Site, kind: str, host: str, path: str) -> Route | None:
    """Return the route that a request takes: the exact one, else the longest."""
    ways = [way for way in routes(site) if (way.kind, way.host) == (kind, host) and way.leads(path)]
    return max(ways, key=lambda way: (way.exact, len(way.path)), default=None)


def public_host(site: Site) -> str:
    """Return the host of the issuer."""
    return urlsplit(site.setting("IDENTITY_ISSUER")).netloc


def _sample(path: str) -> str:
    """Return a path with something in the place of each parameter."""
    return re.sub(r"\{\w+\}", "x", path)


def _public(site: Site) -> Document:
    return site.find("HTTPRoute", "identity-service")


def _ingress(site: Site, name: str) -> Document:
    return site.find("Ingress", name, site.ingress)


def _snippet(site: Site, name: str, change: Callable[[str], str]) -> None:
    """Write the nginx directives of an Ingress anew."""
    annotations = _ingress(site, name)["metadata"]["annotations"]
    annotations["nginx.org/location-snippets"] = change(annotations["nginx.org/location-snippets"])


def _paths(site: Site) -> list[Document]:
    found: list[Document] = dig(_ingress(site, "identity-service-public"), "spec", "rules", 0, "http", "paths")
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
    "nobody can revoke a token", lambda site: drop(_public(site), "spec", "rules", 1, "matches", 1)
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
        put(_public(site), "spec", "rules", 1, "matches", 0, "path", value={"type": "Exact", "value": "/login"})
        or _public(site)["spec"]["rules"][1]["matches"].append({"path": {"type": "Exact", "value": "/token"}})
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
    lambda site: put(_public(site), "spec", "rules", 1, "matches", 6, "path", "value", value="/v1"),
)
the_public_never_reaches_the_admin_api.broken_by(
    "the admin API is on the public gateway",
    lambda site: put(site.find("HTTPRoute", "identity-service-admin"), "spec", "parentRefs", 0, "name", value="public"),
)
the_public_never_reaches_the_admin_api.broken_by(
    "the admin API is on the public controller",
    lambda site: put(_ingress(site, "identity-service-admin"), "spec", "ingressClassName", value="nginx"),
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
    lambda site: _public(site)["spec"]["rules"][1]["matches"].append({"path": {"type": "Exact", "value": "/metrics"}}),
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
        for path in sorted(site.facts.public_paths):
            way = winner(site, kind, public_host(site), _sample(path))
            wanted = "identity-service" + "-discovery" * path.startswith("/.well-known/")
            if way is not None and way.service != wanted:
                yield f"{kind}: {path} leads to {way.service}"
    for route in routes(site):
        ports = {value for port in services.get(route.service, []) for value in (port["port"], port["name"])}
        if route.port not in ports:
            yield f"{route.kind}: {route.service} has no port {route.port}"


keys_and_metadata_come_from_every_replica_that_runs.broken_by(
    "the keys come from ready replicas only",
    lambda site: put(_public(site), "spec", "rules", 0, "backendRefs", 0, "name", value="identity-service"),
)
keys_and_metadata_come_from_every_replica_that_runs.broken_by(
    "tokens come by a port that the Service does not have",
    lambda site: put(_public(site), "spec", "rules", 1, "backendRefs", 0, "port", value=8000),
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
def nobody_comes_by_plain_http(site: Site) -> Iterator[str]:
    """Routes hang on the listener for https alone; every host of an Ingress has a certificate."""
    for found in site.all("HTTPRoute"):
        for parent in dig(found, "spec", "parentRefs", default=[{}]):
            if parent.get("sectionName") != "https":
                yield f"{found['metadata']['name']}: {parent}"
    certified = {
        host
        for found in site.all("Ingress", site.ingress)
        for entry in dig(found, "spec", "tls", default=[])
        if entry.get("secretName")
        for host in entry.get("hosts") or []
    }
    for host in sorted({route.host for route in routes(site) if route.kind == "ingress"} - certified):
        yield f"ingress: {host} has no certificate"


nobody_comes_by_plain_http.broken_by(
    "the public route hangs on every listener", lambda site: drop(_public(site), "spec", "parentRefs", 0, "sectionName")
)
nobody_comes_by_plain_http.broken_by(
    "the operators' host has no certificate",
    lambda site: drop(_ingress(site, "identity-service-admin"), "spec", "tls"),
)


def _cleared(annotations: dict[str, str]) -> set[str]:
    snippet = annotations.get("nginx.org/location-snippets", "")
    return {name.lower() for name in re.findall(r'^proxy_set_header (\S+) "";$', snippet, re.M)}


@promise
def nobody_outside_says_who_they_are_by_a_header(site: Site) -> Iterator[str]:
    """Each is removed on each way; X-Forwarded-Proto is written anew, X-Forwarded-For is read from the right."""
    for found in site.all("HTTPRoute"):
        for number, rule in enumerate(dig(found, "spec", "rules", default=[])):
            filters = [each.get("requestHeaderModifier") or {} for each in rule.get("filters") or []]
            removed = {name.lower() for each in filters for name in each.get("remove") or []}
            written = {each["name"].lower(): each["value"] for some in filters for each in some.get("set") or []}
            for name in sorted(CLAIMS - removed):
                yield f"{found['metadata']['name']}/{number}: {name}"
            if written != {"x-forwarded-proto": "https"}:
                yield f"{found['metadata']['name']}/{number}: sets {written}"
            if "x-forwarded-for" in removed:
                yield f"{found['metadata']['name']}/{number}: everybody has the gateway's address"
    for found in site.all("Ingress", site.ingress):
        if dig(found, "spec", "rules", 0, "http"):
            cleared = _cleared(dig(found, "metadata", "annotations", default={}))
            for name in sorted(CLAIMS - cleared - _REWRITTEN_BY_NGINX):
                yield f"{found['metadata']['name']}: {name}"


nobody_outside_says_who_they_are_by_a_header.broken_by(
    "a certificate may be claimed at the token endpoint",
    lambda site: _public(site)["spec"]["rules"][1]["filters"][0]["requestHeaderModifier"]["remove"].remove(
        "Client-Cert"
    ),
)
nobody_outside_says_who_they_are_by_a_header.broken_by(
    "the admin API hears Forwarded",
    lambda site: _snippet(
        site, "identity-service-admin", lambda text: text.replace('proxy_set_header Forwarded "";\n', "")
    ),
)
nobody_outside_says_who_they_are_by_a_header.broken_by(
    "everybody has the gateway's address",
    lambda site: _public(site)["spec"]["rules"][1]["filters"][0]["requestHeaderModifier"]["remove"].append(
        "X-Forwarded-For"
    ),
)


@promise
def answers_leave_as_the_server_wrote_them(site: Site) -> Iterator[str]:
    """Cache-Control above all: how long keys may be kept is for the server to say, which knows its key schedule."""
    for found in site.all("HTTPRoute"):
        for number, rule in enumerate(dig(found, "spec", "rules", default=[])):
            for each in (
                *(rule.get("filters") or []),
                *(f for b in rule["backendRefs"] for f in b.get("filters") or []),
            ):
                if each.get("type") != "RequestHeaderModifier":
                    yield f"{found['metadata']['name']}/{number}: {each.get('type')}"
    for found in site.all("Ingress", site.ingress):
        for name, value in dig(found, "metadata", "annotations", default={}).items():
            wrong = re.findall(
                r"proxy_hide_header|proxy_ignore_headers|proxy_cache_valid|add_header|expires|sub_filter", value
            )
            if wrong or name in ("nginx.org/proxy-hide-headers", "nginx.org/rewrites", "nginx.org/hsts"):
                yield f"{found['metadata']['name']}: {name} {wrong}"


answers_leave_as_the_server_wrote_them.broken_by(
    "the gateway sets Cache-Control",
    lambda site: _public(site)["spec"]["rules"][0]["filters"].append(
        {
            "type": "ResponseHeaderModifier",
            "responseHeaderModifier": {"set": [{"name": "Cache-Control", "value": "no-store"}]},
        }
    ),
)
answers_leave_as_the_server_wrote_them.broken_by(
    "the controller keeps keys for a day",
    lambda site: _snippet(site, "identity-service-discovery", lambda text: text + "proxy_cache_valid 200 1d;\n"),
)


@promise
def only_documents_are_kept_in_a_cache(site: Site) -> Iterator[str]:
    """By the path as it was sent, and not with a query: nobody's spelling of it stands in for another's."""
    for found in site.all("Ingress", site.ingress):
        snippet = dig(found, "metadata", "annotations", "nginx.org/location-snippets", default="")
        documents = found["metadata"]["name"] == "identity-service-discovery"
        directives = set(re.findall(r"^(proxy_(?:cache|no_cache)\w*) (.+);$", snippet, re.M))
        wanted = {
            ("proxy_cache", "identity"),
            ("proxy_cache_key", "$host$request_uri"),
            ("proxy_cache_bypass", "$args"),
            ("proxy_no_cache", "$args"),
            ("proxy_cache_lock", "on"),
        }
        kept = {each for each in directives if each[0] != "proxy_cache_valid"}
        if kept != (wanted if documents else set()):
            yield f"{found['metadata']['name']}: {sorted(kept)}"


only_documents_are_kept_in_a_cache.broken_by(
    "tokens are kept in a cache",
    lambda site: _snippet(site, "identity-service-public", lambda text: text + "proxy_cache identity;\n"),
)
only_documents_are_kept_in_a_cache.broken_by(
    "another spelling stands in for the keys",
    lambda site: _snippet(
        site, "identity-service-discovery", lambda text: text.replace("$host$request_uri", "$host$uri")
    ),
)


@promise
def a_key_is_known_everywhere_before_it_signs(site: Site) -> Iterator[str]:
    """Also behind a cache that goes on with what it has while we answer with errors."""
    if float(site.setting("IDENTITY_SIGNING_KEY_LEAD")) < 5000:
        yield f"{site.setting('IDENTITY_SIGNING_KEY_LEAD')} s"


a_key_is_known_everywhere_before_it_signs.broken_by(
    "keys sign half an hour after they are published",
    lambda site: put(site.config, "IDENTITY_SIGNING_KEY_LEAD", value="1920"),
)


@promise
def a_request_is_given_up_before_its_replica_is_gone(site: Site) -> Iterator[str]:
    """Every way has a bound in time, none longer than a replica that leaves goes on for."""
    longest = 10 + float(site.setting("IDENTITY_SHUTDOWN_GRACE"))
    for found in site.all("HTTPRoute"):
        for number, rule in enumerate(dig(found, "spec", "rules", default=[])):
            bound = re.fullmatch(r"(\d+)s", dig(rule, "timeouts", "request", default=""))
            if bound is None or not 5 <= int(bound[1]) <= longest:
                yield f"{found['metadata']['name']}/{number}: {dig(rule, 'timeouts')}"
    for found in site.all("Ingress", site.ingress):
        if dig(found, "spec", "rules", 0, "http"):
            bound = re.fullmatch(
                r"(\d+)s", dig(found, "metadata", "annotations", "nginx.org/proxy-read-timeout", default="")
            )
            if bound is None or not 5 <= int(bound[1]) <= longest:
                yield f"{found['metadata']['name']}: {bound}"


a_request_is_given_up_before_its_replica_is_gone.broken_by(
    "a request may take five minutes",
    lambda site: put(_public(site), "spec", "rules", 1, "timeouts", "request", value="300s"),
)
a_request_is_given_up_before_its_replica_is_gone.broken_by(
    "the operators' requests have no bound",
    lambda site: drop(site.find("HTTPRoute", "identity-service-admin"), "spec", "rules", 0, "timeouts"),
)


@promise
def bodies_are_bounded_before_they_reach_us(site: Site) -> Iterator[str]:
    """At what the service reads, and no less. (The Gateway API has no such bound; the service has its own.)"""
    for found in site.all("Ingress", site.ingress):
        if dig(found, "spec", "rules", 0, "http"):
            size = re.fullmatch(
                r"(\d+)k", dig(found, "metadata", "annotations", "nginx.org/client-max-body-size", default="")
            )
            if size is None or int(size[1]) * 1024 != site.facts.largest_body:
                yield f"{found['metadata']['name']}: {size}"


bodies_are_bounded_before_they_reach_us.broken_by(
    "the controller's own bound",
    lambda site: drop(
        _ingress(site, "identity-service-public"), "metadata", "annotations", "nginx.org/client-max-body-size"
    ),
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
