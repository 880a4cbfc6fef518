"""
API keys: credentials for programs, of a person or of a service, narrower than their owner and ended one by one.

A key is `idk_<id>_<secret><checksum>`. The database holds only a keyed digest of id and secret, so a dump of it holds
no key; scanners recognise the form, and what has not got it costs no query. Nothing about a key is remembered between
two requests: what ends it acts at once, on every replica.
"""

from identity_service.accounts.api_keys.key import (
    ApiKey,
    InvalidKey,
    KeyRefused,
    LiveKey,
    NewKey,
    Owner,
    PresentedKey,
    TooManyKeys,
)
from identity_service.accounts.api_keys.keys import ApiKeys
from identity_service.accounts.api_keys.networks import MOST_NETWORKS

__all__ = [
    "MOST_NETWORKS",
    "ApiKey",
    "ApiKeys",
    "InvalidKey",
    "KeyRefused",
    "LiveKey",
    "NewKey",
    "Owner",
    "PresentedKey",
    "TooManyKeys",
]
