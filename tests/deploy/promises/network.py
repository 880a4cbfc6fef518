"""Who may reach whom: default deny both ways, and openings that each name a peer and a port."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from tests.deploy.promises import promise
from tests.deploy.site import MIGRATION, OPERATOR, SERVER, Document, Pod, Site, dig, drop, put, selects

_DNS = {("UDP", 53), ("TCP", 53)}
_RESOLVER = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
_GATEWAY = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}
_CONTROLLER = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "nginx-ingress"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "nginx-ingress"}},
}
_PROMETHEUS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
}


def _policies(among: list[Document]) -> list[Document]:
    return [found for found in among if found["kind"] == "NetworkPolicy"]


def _policy(site: Site, name: str, among: list[Document] | None = None) -> Document:
    return site.find("NetworkPolicy", f"identity-service-{name}", among)


def _way(site: Site, name: str, among: list[Document] | None = None) -> Any:
    """Return the one rule of a policy."""
    spec = _policy(site, name, among)["spec"]
    return (spec.get("ingress") or spec["egress"])[0]


def _everywhere(site: Site) -> tuple[list[Document], ...]:
    return site.production, site.migrate, site.ingress, site.tracing


def _rules(among: list[Document], direction: str, pod: Pod) -> Iterator[tuple[str, Document]]:
    """Yield the rules (`ingress` or `egress`) of every policy that is about a pod, with the policy's name."""
    for policy in _policies(among):
        about = direction.capitalize() in (dig(policy, "spec", "policyTypes") or ())
        if about and selects(dig(policy, "spec", "podSelector"), pod.labels):
            for rule in dig(policy, "spec", direction, default=[]):
                yield policy["metadata"]["name"], rule


def _port(site: Site, port: Any) -> int:
    """Return the number of a port, which may be named as the server's container names it."""
    named = {each.get("name"): each["containerPort"] for each in site.server.get("ports") or []}
    return int(named.get(port, -1)) if isinstance(port, str) else int(port)


def _openings(site: Site, among: list[Document], direction: str, pod: Pod) -> set[tuple[str, int]]:
    return {
        (opening.get("protocol", "TCP"), _port(site, opening.get("port", 0)))
        for _, rule in _rules(among, direction, pod)
        for opening in rule.get("ports") or [{}]
    }


@promise
def nothing_comes_in_or_goes_out_by_default(site: Site) -> Iterator[str]:
    """For every pod of the namespace, those that nobody has thought of included."""
    for policy in _policies(site.production):
        spec = policy["spec"]
        if spec.get("podSelector") == {} and not spec.get("ingress") and not spec.get("egress"):
            if set(spec.get("policyTypes") or []) != {"Ingress", "Egress"}:
                yield f"only {spec.get('policyTypes')}"
            return
    yield "no policy is about every pod"


nothing_comes_in_or_goes_out_by_default.broken_by(
    "what goes out is not denied",
    lambda site: put(site.find("NetworkPolicy", "default-deny"), "spec", "policyTypes", value=["Ingress"]),
)
nothing_comes_in_or_goes_out_by_default.broken_by(
    "only the server is denied", lambda site: site.production.remove(site.find("NetworkPolicy", "default-deny"))
)


@promise
def the_migration_is_shut_off_before_anything_else_is_there(site: Site) -> Iterator[str]:
    """It runs before the base is applied, so its own policies deny both ways; nobody reaches it."""
    kinds: set[str] = set()
    for policy in _policies(site.migrate):
        if selects(policy["spec"].get("podSelector"), site.migration_pod.labels):
            kinds |= set(policy["spec"].get("policyTypes") or [])
    if kinds != {"Ingress", "Egress"}:
        yield f"denied: {kinds}"
    for among in (site.production, site.migrate, site.ingress):
        for name, _ in _rules(among, "ingress", site.migration_pod):
            yield f"{name} lets somebody in"


def _drop_ingress(site: Site) -> None:
    for policy in _policies(site.migrate):
        put(policy, "spec", "policyTypes", value=["Egress"])


the_migration_is_shut_off_before_anything_else_is_there.broken_by(
    "the migration may be reached until the base is there", _drop_ingress
)


@promise
def every_opening_names_its_peer_and_its_port(site: Site) -> Iterator[str]:
    """No rule without a peer, which would mean everybody, nor without a port, which would mean every port."""
    for policy in (each for among in _everywhere(site) for each in _policies(among)):
        name = policy["metadata"]["name"]
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction) or []:
                if not rule.get(peers) or not rule.get("ports"):
                    yield f"{name}: {rule}"
                for peer in rule.get(peers) or []:
                    block = dig(peer, "ipBlock", "cidr", default="0.0.0.0/0" if "ipBlock" in peer else None)
                    if peer == {} or peer.get("namespaceSelector") == {}:
                        yield f"{name}: everybody"
                    if block is not None and ipaddress.ip_network(block).prefixlen < 16:
                        yield f"{name}: {block}"
                for opening in rule.get("ports") or []:
                    named = "port" in opening and "endPort" not in opening
                    if not named or opening.get("protocol") not in ("TCP", "UDP"):
                        yield f"{name}: {opening}"


every_opening_names_its_peer_and_its_port.broken_by(
    "PostgreSQL may be anywhere",
    lambda site: put(_way(site, "to-postgresql"), "to", 0, "ipBlock", "cidr", value="0.0.0.0/0"),
)
every_opening_names_its_peer_and_its_port.broken_by(
    "any port of the gateway's choice",
    lambda site: drop(_way(site, "from-gateway"), "ports"),
)


@promise
def only_prometheus_comes_to_the_management_port(site: Site) -> Iterator[str]:
    """One pod of one namespace; the kubelet's probes come from the node and need no opening."""
    found = []
    for name, rule in _rules(site.production, "ingress", site.pod):
        if any(_port(site, opening.get("port", 0)) == _port(site, "management") for opening in rule.get("ports") or []):
            found.append(name)
            for peer in rule.get("from") or []:
                if peer != _PROMETHEUS:
                    yield f"{name}: {peer}"
    if len(found) != 1:
        yield f"openings: {found}"


only_prometheus_comes_to_the_management_port.broken_by(
    "every pod of the monitoring may come",
    lambda site: drop(_way(site, "from-prometheus"), "from", 0, "podSelector"),
)
only_prometheus_comes_to_the_management_port.broken_by(
    "the gateway may come, too",
    lambda site: _way(site, "from-gateway")["ports"].append({"protocol": "TCP", "port": 9000}),
)


@promise
def only_a_proxy_comes_to_the_public_port(site: Site) -> Iterator[str]:
    """The gateway's namespace, or the Ingress controller's, whose X-Forwarded-For is believed."""
    for among, wanted in ((site.production, _GATEWAY), (site.with_ingress(), _CONTROLLER)):
        peers = [
            peer
            for _, rule in _rules(among, "ingress", site.pod)
            if any(_port(site, opening.get("port", 0)) == _port(site, "http") for opening in rule.get("ports") or [])
            for peer in rule.get("from") or []
        ]
        if peers != [wanted]:
            yield f"{peers}"


only_a_proxy_comes_to_the_public_port.broken_by(
    "every pod of the namespace may come",
    lambda site: _way(site, "from-gateway")["from"].append({"podSelector": {}}),
)
only_a_proxy_comes_to_the_public_port.broken_by(
    "the Ingress controller cannot come",
    lambda site: site.ingress.remove(_policy(site, "from-ingress", site.ingress)),
)


@promise
def the_server_goes_out_to_what_its_settings_name_and_nowhere_else(site: Site) -> Iterator[str]:
    """DNS; PostgreSQL and Redis at the ports of the examples' addresses; the mail server at the port of the setting."""
    addresses = {found["metadata"]["name"]: dig(found, "stringData", "url", default="") for found in site.examples}
    ports = re.findall(r":(\d+)/", f"{addresses.get('identity-database')} {addresses.get('identity-redis')}")
    wanted = _DNS | {("TCP", int(port)) for port in (*ports, site.setting("IDENTITY_SMTP_PORT"))}
    found = _openings(site, site.production, "egress", site.pod)
    if found != wanted:
        yield f"{sorted(found)} are open, {sorted(wanted)} are needed"


the_server_goes_out_to_what_its_settings_name_and_nowhere_else.broken_by(
    "the mail server listens elsewhere", lambda site: put(site.config, "IDENTITY_SMTP_PORT", value="465")
)
the_server_goes_out_to_what_its_settings_name_and_nowhere_else.broken_by(
    "nobody lets the server to Redis",
    lambda site: site.production.remove(_policy(site, "to-redis")),
)
the_server_goes_out_to_what_its_settings_name_and_nowhere_else.broken_by(
    "the server may fetch from the network's instances",
    lambda site: _policy(site, "to-redis")["spec"]["egress"].append(
        {"to": [{"ipBlock": {"cidr": "192.0.2.0/28"}}], "ports": [{"protocol": "TCP", "port": 443}]}
    ),
)


@promise
def the_migration_goes_out_to_postgresql_and_nowhere_else(site: Site) -> Iterator[str]:
    """And asks DNS where that is."""
    for environment, among in (("migrate", site.migrate), ("production", site.production)):
        found = _openings(site, among, "egress", site.migration_pod)
        wanted = _DNS | {("TCP", 5432)} if environment == "migrate" else set()
        if found != wanted:
            yield f"{environment}: {sorted(found)}"


the_migration_goes_out_to_postgresql_and_nowhere_else.broken_by(
    "the server's way to Redis is the migration's, too",
    lambda site: drop(_policy(site, "to-redis"), "spec", "podSelector", "matchLabels", "app.kubernetes.io/component"),
)
the_migration_goes_out_to_postgresql_and_nowhere_else.broken_by(
    "the migration asks DNS by UDP only",
    lambda site: drop(_way(site, "migrate-to-dns", site.migrate), "ports", 1),
)


@promise
def names_are_asked_of_the_cluster_s_own_resolver(site: Site) -> Iterator[str]:
    """An open port 53 to anybody is a tunnel."""
    for among, pod in (
        (site.production, site.pod),
        (site.production, site.operator_pod),
        (site.migrate, site.migration_pod),
    ):
        for name, rule in _rules(among, "egress", pod):
            if any(opening.get("port") == 53 for opening in rule.get("ports") or []):
                for peer in rule.get("to") or []:
                    if peer != _RESOLVER:
                        yield f"{name}: {peer}"


names_are_asked_of_the_cluster_s_own_resolver.broken_by(
    "any pod may be asked for names",
    lambda site: drop(_way(site, "to-dns"), "to", 0, "podSelector"),
)


@promise
def all_go_to_the_same_database(site: Site) -> Iterator[str]:
    """Whoever moves it and forgets one of them finds out in the middle of a rollout, or of a restore."""
    for among, beside in ((site.production, site.migrate), (site.dev, site.dev)):
        ways = [
            [rule.get("to") for _, rule in _rules(found, "egress", pod) if "5432" in str(rule.get("ports"))]
            for found, pod in ((among, site.pod), (among, site.operator_pod), (beside, site.migration_pod))
        ]
        if not ways[0] == ways[1] == ways[2]:
            yield f"{ways}"


all_go_to_the_same_database.broken_by(
    "an operator's commands in development are let to another one",
    lambda site: put(_way(site, "operator-to-postgresql", site.dev), "to", 0, "ipBlock", "cidr", value="192.0.2.16/28"),
)
all_go_to_the_same_database.broken_by(
    "an operator's commands are let to another one",
    lambda site: put(_way(site, "operator-to-postgresql"), "to", 0, "ipBlock", "cidr", value="192.0.2.16/28"),
)
all_go_to_the_same_database.broken_by(
    "the migration is let to another one",
    lambda site: put(
        _way(site, "migrate-to-postgresql", site.migrate), "to", 0, "ipBlock", "cidr", value="192.0.2.16/28"
    ),
)


@promise
def the_gateway_that_routes_hang_on_may_come_in(site: Site) -> Iterator[str]:
    """Its namespace is named twice: where the routes hang, and where the way in is opened."""
    opened = {
        dig(peer, "namespaceSelector", "matchLabels", "kubernetes.io/metadata.name")
        for rule in dig(_policy(site, "from-gateway"), "spec", "ingress", default=[])
        for peer in rule.get("from") or []
    }
    for route in site.all("HTTPRoute"):
        hangs = {parent.get("namespace", "identity") for parent in dig(route, "spec", "parentRefs", default=[])}
        if hangs != opened:
            yield f"{route['metadata']['name']} hangs in {hangs}, {opened} may come"


the_gateway_that_routes_hang_on_may_come_in.broken_by(
    "the public gateway is in another namespace",
    lambda site: put(site.find("HTTPRoute", "identity-service"), "spec", "parentRefs", 0, "namespace", value="edge"),
)


@promise
def every_policy_is_about_the_pods_that_it_means(site: Site) -> Iterator[str]:
    """A selector with a typing error opens or denies nothing, one that says less opens for others, too."""
    for among in _everywhere(site):
        for policy in _policies(among):
            name = policy["metadata"]["name"]
            of_operator = name.startswith("identity-service-operator-")
            labels = MIGRATION if among is site.migrate else OPERATOR if of_operator else SERVER
            wanted = {} if name == "default-deny" else {"matchLabels": labels}
            if dig(policy, "spec", "podSelector") != wanted:
                yield f"{policy['metadata']['name']}: {dig(policy, 'spec', 'podSelector')}"


every_policy_is_about_the_pods_that_it_means.broken_by(
    "a policy for a pod that is called otherwise",
    lambda site: put(
        _policy(site, "from-ingress", site.ingress),
        *("spec", "podSelector", "matchLabels", "app.kubernetes.io/name"),
        value="identity",
    ),
)


@promise
def every_policy_says_which_way_it_is_about(site: Site) -> Iterator[str]:
    """What is left to a default is read differently by who reads it; a direction that is not named opens nothing."""
    for among in _everywhere(site):
        for policy in _policies(among):
            spec = policy.get("spec") or {}
            opened = {direction.capitalize() for direction in ("ingress", "egress") if spec.get(direction)}
            wanted = {"Ingress", "Egress"} if among is site.migrate or not opened else opened
            if set(spec.get("policyTypes") or []) != wanted:
                yield f"{policy['metadata']['name']}: {spec.get('policyTypes')}"


every_policy_says_which_way_it_is_about.broken_by(
    "the way to the collector is about nothing", lambda site: drop(site.tracing, 0, "spec", "policyTypes")
)
every_policy_says_which_way_it_is_about.broken_by(
    "the way to the mail server is about the way in",
    lambda site: put(_policy(site, "to-smtp"), "spec", "policyTypes", value=["Ingress"]),
)
