"""
Measure what a sibling service pays to check a token, beside the one RSA operation that nobody can do without.

Runs in a process of its own (`python -m bench.verifier`) on the service's core. The contenders take turns in short
rounds, so that whatever disturbs the machine disturbs all of them, and each round is compared with the bare RSA
operation of the same round. They check thousands of different tokens, so that nobody can remember one.
"""

import asyncio
import base64
import contextlib
import gc
import json
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from joserfc import jwt as jose
from joserfc.jwk import RSAKey

from bench import machine
from bench.service import BenchError
from identity_service.verifier import TokenRefused, TokenVerifier
from tests.support.issuer import AUDIENCE, JWKS, Issuer

BARE = "RSA verify (cryptography)"
VERIFY = "TokenVerifier.verify"
VERIFY_SYNC = "TokenVerifier.verify_sync"
PYJWT = "PyJWT decode"
JOSERFC = "joserfc decode"

ROUNDS = 9
ROUND_SECONDS = 0.3
TOKENS = 2048
BATCH = 64
LIFETIME = 600
ISSUER = "https://id.example"
_CACHING = {"Cache-Control": "public, max-age=300, stale-while-revalidate=600, stale-if-error=3600"}

Contender = Callable[[slice], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Verification:
    """CPU microseconds per token, by contender, one value for each round."""

    rounds: Mapping[str, Sequence[float]]

    def microseconds(self, name: str) -> float:
        """Tell what a token costs, in microseconds, the median of the rounds."""
        return median(self.rounds[name])

    def ratio(self, name: str) -> float:
        """Tell how much of a token's cost is RSA: 1 is the best there is. The median of the rounds' own ratios."""
        return median(bare / own for bare, own in zip(self.rounds[BARE], self.rounds[name], strict=True))


def measure_verifier(core: int) -> Verification:
    """Measure on `core`, where nothing else should run; takes about 15 s. Raises BenchError."""
    with machine.on_core(core):
        done = subprocess.run([sys.executable, "-m", "bench.verifier"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchError("The measurement of the verifier ended; its own words are above.")
    return Verification(json.loads(done.stdout))


def _token(key: RSAKey) -> str:
    """Return an access token with the header and the claims that the service gives to a user's."""
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "sub": str(uuid.uuid4()),
        "aud": AUDIENCE,
        "client_id": f"cl_{secrets.token_urlsafe(16)}",
        "iat": now,
        "exp": now + LIFETIME,
        "jti": secrets.token_urlsafe(16),
        "scope": "orders:read orders:write",
        "roles": ["user"],
        "sid": str(uuid.uuid4()),
        "auth_time": now,
        "amr": ["pwd"],
    }
    return jose.encode({"alg": "RS256", "typ": "at+jwt", "kid": key.kid}, claims, key, default_type=None)


async def _verifier_of(key: RSAKey) -> TokenVerifier:
    """Return a verifier that has fetched the keys, and has them fresh for longer than the measurement takes."""
    key_set = json.dumps({"keys": [{**key.as_dict(private=False), "use": "sig", "alg": "RS256"}]}).encode()

    with Issuer() as server:
        server.answer(JWKS, headers=_CACHING, body=key_set)
        verifier = TokenVerifier(ISSUER, AUDIENCE, jwks_uri=server.origin + JWKS)
        await verifier.verify(_token(key))
    return verifier


def _contenders(key: RSAKey, tokens: Sequence[str], verifier: TokenVerifier) -> dict[str, Contender]:
    """Return who takes part; each checks the part of the tokens that it is told to, by as short a loop as there is."""
    public: RSAPublicKey = key.public_key
    algorithms, padding, digest = ["RS256"], PKCS1v15(), SHA256()
    taken_apart = [
        (base64.urlsafe_b64decode(f"{signature}=="), signed.encode())
        for signed, _, signature in (token.rpartition(".") for token in tokens)
    ]
    required: Any = {"require": ["exp", "iat", "iss", "aud", "sub"]}
    rules = jose.JWTClaimsRegistry(
        leeway=30,
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": AUDIENCE},
        exp={"essential": True},
    )

    async def bare(part: slice) -> None:
        for signature, signed in taken_apart[part]:
            public.verify(signature, signed, padding, digest)

    async def verify(part: slice) -> None:
        for token in tokens[part]:
            await verifier.verify(token)

    async def verify_sync(part: slice) -> None:
        for token in tokens[part]:
            verifier.verify_sync(token)

    async def pyjwt(part: slice) -> None:
        for token in tokens[part]:
            jwt.decode(token, public, algorithms, required, issuer=ISSUER, audience=AUDIENCE, leeway=30)

    async def joserfc(part: slice) -> None:
        for token in tokens[part]:
            rules.validate(jose.decode(token, key, algorithms).claims)

    return {BARE: bare, VERIFY: verify, VERIFY_SYNC: verify_sync, PYJWT: pyjwt, JOSERFC: joserfc}


async def _microseconds(contender: Contender) -> float:
    """Let a contender check tokens for one round and return the CPU microseconds of each."""
    checked, used = 0, 0.0
    began = time.process_time()
    while used < ROUND_SECONDS:
        first = checked % TOKENS
        await contender(slice(first, first + BATCH))
        checked += BATCH
        used = time.process_time() - began
    return used / checked * 1e6


async def _measure() -> dict[str, list[float]]:
    """Make the tokens, let everybody check all of them once, then let the rounds begin."""
    key = RSAKey.generate_key(2048, auto_kid=True)
    tokens = [_token(key) for _ in range(TOKENS)]
    verifier = await _verifier_of(key)
    contenders = _contenders(key, tokens, verifier)
    for contender in contenders.values():
        await contender(slice(TOKENS))
    forged = f"{tokens[0].rpartition('.')[0]}.{tokens[1].rpartition('.')[2]}"
    with contextlib.suppress(TokenRefused):
        await verifier.verify(forged)
        raise AssertionError("a token with another token's signature was accepted")
    gc.collect()
    gc.freeze()
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            rounds[name].append(await _microseconds(contender))
    return rounds


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_measure())))
