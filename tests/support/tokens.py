"""Access tokens as an attacker, or a fault of ours, would make them: any header, any claims, any signature."""

import base64
import json
from collections.abc import Mapping
from typing import Any, Final, final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa


@final
class Omit:
    """Says that a header or a claim is to be left out."""

    def __repr__(self) -> str:
        return "OMIT"  # the same in every process, for the names of cases


OMIT: Final = Omit()


def b64(raw: bytes) -> str:
    """Return base64url without padding (RFC 7515 §2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def unb64(text: str) -> bytes:
    """Return what `b64` made a text of."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def parts_of(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a token's header and claims, unchecked."""
    header, payload, _ = token.split(".")
    return json.loads(unb64(header)), json.loads(unb64(payload))


def changed(members: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `members` with some of them replaced, added or, where the change is `OMIT`, left out."""
    return {name: value for name, value in {**members, **changes}.items() if value is not OMIT}


def compact(header: object, payload: object, key: rsa.RSAPrivateKey) -> str:
    """
    Sign with RS256, whatever the header says; return a compact JWS.

    Text and bytes go in as they are, everything else as JSON.
    """
    signed = f"{b64(_raw(header))}.{b64(_raw(payload))}"
    return f"{signed}.{b64(key.sign(signed.encode('ascii'), padding.PKCS1v15(), hashes.SHA256()))}"


def _raw(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8")
