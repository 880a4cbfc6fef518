"""
The life of a signing key: next → active → retiring → retired, or compromised at any time; and the JWKS.

Every instant is stored on the key and never computed again from settings, so a changed setting cannot strand a token.
A key is published long before it signs and stays published long after, so a verifier whose cache is as old as our
headers allow never meets a token it cannot check (RFC 7517; the waiting times are `KeyPolicy`).

Replicas hold the keys in memory. A replica signs with the uncompromised published key whose activation came last, by
its own clock: a rotation happens at its instant even if nobody polls, and the old key is retired afterwards, when some
replica sees that its successor is active.
"""

from identity_service.oauth.signing_keys.acts import Actor, KeyActs
from identity_service.oauth.signing_keys.keyring import NoUsableKey, SigningKeys
from identity_service.oauth.signing_keys.material import Document, NewKey
from identity_service.oauth.signing_keys.schedule import KeyPolicy, KeyRecord, KeyState, Plan, plan, signer, state

__all__ = [
    "Actor",
    "Document",
    "KeyActs",
    "KeyPolicy",
    "KeyRecord",
    "KeyState",
    "NewKey",
    "NoUsableKey",
    "Plan",
    "SigningKeys",
    "plan",
    "signer",
    "state",
]
