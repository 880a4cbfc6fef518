"""Where a key may be used from."""

import ipaddress
from collections.abc import Sequence
from typing import TypeAlias

Networks: TypeAlias = tuple[str, ...]
"""Addresses and networks in their one spelling; none at all means anywhere."""

MOST_NETWORKS = 20
_FINEST_IPV6 = 64  # a request from IPv6 is known by its /64 only


def parse_networks(entries: Sequence[str]) -> Networks:
    """Return an allow-list, each entry once and in its one spelling; raises ValueError with what is wrong."""
    if len(entries) > MOST_NETWORKS:
        raise ValueError(f"at most {MOST_NETWORKS} networks")
    found = []
    for entry in entries:
        try:
            network = ipaddress.ip_network(entry)
        except ValueError:
            raise ValueError("addresses or networks, as 192.0.2.0/24; no bits behind the prefix") from None
        if isinstance(network, ipaddress.IPv6Network) and (network.prefixlen > _FINEST_IPV6 or "%" in entry):
            raise ValueError("of IPv6 a /64 is the smallest, since one machine may use all of it")
        found.append(str(network))
    return tuple(dict.fromkeys(found))


def is_within(network: str, permitted: Sequence[str]) -> bool:
    """Return whether `network`, an IPv4 address or an IPv6 /64, is in one of `permitted`."""
    try:
        asking = ipaddress.ip_network(network)
    except ValueError:
        return False  # an address that nobody could read is in no network
    if isinstance(asking, ipaddress.IPv4Network):
        return any(asking.subnet_of(ipaddress.IPv4Network(entry)) for entry in permitted if "." in entry)
    return any(asking.subnet_of(ipaddress.IPv6Network(entry)) for entry in permitted if ":" in entry)
