"""What the outside can make us believe, how long it may take, and what is kept on the way (DEP-11)."""

import re
from collections.abc import Callable, Iterator

from tests.deploy.promises import promise
from tests.deploy.promises.routes import ingress, public, routes
from tests.deploy.site import Site, dig, drop, put

CASES = ("DEP-11",)
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


def _snippet(site: Site, name: str, change: Callable[[str], str]) -> None:
    """Write the nginx directives of an Ingress anew."""
    annotations = ingress(site, name)["metadata"]["annotations"]
    annotations["nginx.org/location-snippets"] = change(annotations["nginx.org/location-snippets"])


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
    "the public route hangs on every listener", lambda site: drop(public(site), "spec", "parentRefs", 0, "sectionName")
)
nobody_comes_by_plain_http.broken_by(
    "the operators' host has no certificate",
    lambda site: drop(ingress(site, "identity-service-admin"), "spec", "tls"),
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
    lambda site: public(site)["spec"]["rules"][1]["filters"][0]["requestHeaderModifier"]["remove"].remove(
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
    lambda site: public(site)["spec"]["rules"][1]["filters"][0]["requestHeaderModifier"]["remove"].append(
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
    lambda site: public(site)["spec"]["rules"][0]["filters"].append(
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
    lambda site: put(public(site), "spec", "rules", 1, "timeouts", "request", value="300s"),
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
        ingress(site, "identity-service-public"), "metadata", "annotations", "nginx.org/client-max-body-size"
    ),
)
