"""
More than a thousand tokens, each with what a strict verifier of RS256 access tokens (RFC 9068) has to make of it.

`build` makes them anew, the same bytes each time, for any issuer and audience; `docs/torture.json` holds those for
ISSUER, AUDIENCE and NOW. The module `forge` says what a good token is, the others are its enemies, group by group.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from tests.contracts.torture.algorithms import hmac_with_public_key, none, other
from tests.contracts.torture.claims import LEEWAY, audience, issuer, others, time
from tests.contracts.torture.encryption import encryption
from tests.contracts.torture.forge import Forge, Group, Level
from tests.contracts.torture.json_texts import texts
from tests.contracts.torture.key_choice import critical, embedded, kid
from tests.contracts.torture.keys import load
from tests.contracts.torture.shapes import serialization, size, spelling
from tests.contracts.torture.signatures import signature
from tests.contracts.torture.types import headers, nested, types

ISSUER = "https://id.example"
AUDIENCE = "https://orders.example"
NOW = 1_800_000_000  # 2027-01-15T08:00:00Z
GROUPS: dict[str, Group] = {
    "headers": headers,
    "alg-none": none,
    "alg-hmac": hmac_with_public_key,
    "alg-other": other,
    "kid": kid,
    "embedded-key": embedded,
    "critical": critical,
    "signature": signature,
    "encryption": encryption,
    "serialization": serialization,
    "base64": spelling,
    "size": size,
    "json": texts,
    "type": types,
    "nested": nested,
    "issuer": issuer,
    "audience": audience,
    "time": time,
    "claims": others,
}
_DESCRIPTION = (
    "Tokens to try a verifier of RS256 access tokens (RFC 9068) on: forged, malformed and borderline ones. Each has"
    " the answer that is right for this issuer, this audience, this key set and this instant. docs/torture.md tells how"
    " to use it. All keys, the private ones too, are public: trust none of them."
)


@dataclass(frozen=True, slots=True)
class Case:
    """
    A token and the right answer.

    `level` is "must" where a specification demands the answer, and "strict" where it leaves room and the strict answer
    is meant; `reason` is the word our own verifier gives for a refusal.
    """

    id: str
    group: str
    what: str
    accept: bool
    level: Level
    reason: str | None
    token: str


def build(issuer: str = ISSUER, audience: str = AUDIENCE, now: int = NOW) -> list[Case]:
    """Return every case; with `audience` the issuer itself, as its own API must take them. `now` is in seconds."""
    forge = Forge(issuer, audience, now)
    return [
        Case(f"{name}/{draft.slug}", name, draft.what, draft.reason is None, draft.level, draft.reason, draft.token)
        for name, group in GROUPS.items()
        for draft in group(forge)
    ]


def document() -> str:
    """Return the text of docs/torture.json: one case is one line."""
    head: dict[str, Any] = {
        "description": _DESCRIPTION,
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "now": NOW,
        "leeway": LEEWAY,
        "jwks": load().jwks,
    }
    cases = ",\n".join(json.dumps(asdict(case)) for case in build())
    return f'{json.dumps(head, indent=2)[:-2]},\n  "cases": [\n{cases}\n  ]\n}}\n'
