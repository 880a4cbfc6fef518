"""Whoever reads an access token comes to the same verdict: the verifier, introspection, and our own API."""

import base64
import json
import re
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from joserfc import jwe
from joserfc.jwk import import_key

from identity_service.verifier import KeysUnavailable, TokenRefused, TokenVerifier, VerifiedClaims
from identity_service.verifier.core import LEEWAY, verify
from identity_service.verifier.jwks import Keys, read_key_set
from identity_service.web.forms import LARGEST_BODY
from tests.contracts.torture import AUDIENCE, GROUPS, ISSUER, NOW, Case, build, document, libraries
from tests.contracts.torture.encryption import made
from tests.contracts.torture.forge import Forge, dumped
from tests.contracts.torture.keys import load
from tests.contracts.torture.primitives import deflated_zeros
from tests.contracts.torture.rows import settle
from tests.support.asking import WireAnswer
from tests.support.clock import FrozenClock
from tests.support.issuer import JWKS
from tests.support.issuer import Issuer as KeyServer
from tests.support.service import Service, running, test_settings
from tests.support.tokens import b64, parts_of, unb64
from tests.support.wire import FORM, send

_DOCS = Path(__file__).parents[2] / "docs"
_TORTURE = Path(__file__).with_name("torture")
_GOOD = "good"

_ROWS = ("JWT-01", "JWT-03", "JWT-04", "JWT-05", "JWT-07", "JWT-10", "JWT-11", "JWT-12", "JWT-14", "JWT-15")


def tortured(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that takes every case, and so proves what they are all about."""
    for mark in (*map(pytest.mark.case, _ROWS), pytest.mark.rfc("9068", "4"), pytest.mark.rfc("8725", "3.1")):
        test = mark(test)
    return test


@cache
def published() -> dict[str, Any]:
    """Return docs/torture.json as others read it."""
    document: dict[str, Any] = json.loads((_DOCS / "torture.json").read_bytes())
    return document


@cache
def cases() -> tuple[Case, ...]:
    """Return the published cases."""
    return tuple(Case(**case) for case in published()["cases"])


@cache
def own_cases() -> tuple[Case, ...]:
    """Return the cases for the issuer's own API."""
    return tuple(build(audience=ISSUER))


def disagreements(wanted: Callable[[Case], object], said: Mapping[str, object], among: tuple[Case, ...]) -> list[str]:
    """Return what differs, a line for each; every case must have been answered."""
    assert said.keys() == {case.id for case in among}
    return [
        f"{case.id}: wanted {wanted(case)!r}, got {said[case.id]!r} ({case.what})"
        for case in among
        if said[case.id] != wanted(case)
    ]


def verdict(read: Callable[[str], VerifiedClaims], token: str) -> str:
    """Return why a token is refused, or that it is good and says what it says; other exceptions by their names."""
    try:
        claims = read(token)
    except TokenRefused as refused:
        return refused.reason
    except KeysUnavailable:
        return "keys unavailable"
    except Exception as error:
        return repr(error)
    return _GOOD if dict(claims.claims) == parts_of(token)[1] else "claims differ"


def reason(case: Case) -> str:
    return case.reason or _GOOD


# -- the set itself ---------------------------------------------------------------------------------------------------


def test_the_published_file_is_what_the_builder_makes() -> None:
    """Byte for byte, on every machine."""
    same = (_DOCS / "torture.json").read_text("ascii") == document()
    assert same, "docs/torture.json is not what the builder makes: run `make torture`"


def test_the_set_is_large_and_no_case_stands_in_it_twice() -> None:
    """A verifier that refuses everything fails as well."""
    assert len(cases()) >= 1000
    assert len({case.id for case in cases()}) == len(cases())
    assert len({case.token for case in cases()}) == len(cases())
    assert {case.group for case in cases()} == GROUPS.keys()
    assert sum(case.accept for case in cases()) >= 50
    assert all(case.accept is (case.reason is None) for case in cases())
    assert {case.level for case in cases()} == {"must", "strict"}
    assert published()["leeway"] == LEEWAY


def test_every_reason_to_refuse_is_in_the_set() -> None:
    """Each word of the verifier's code that says why is the answer to some case; no check goes untried."""
    source = Path(sys.modules[verify.__module__].__file__ or "").read_text("utf-8")
    words = set(re.findall(r'TokenRefused\("(\w+)"\)', source))
    timed = {f"{name}_missing_or_malformed" for name in ("exp", "iat", "nbf", "sub", "client_id", "jti")}
    assert len(words) >= 15
    assert words | timed == {case.reason for case in cases() if case.reason}


def test_a_case_tells_what_it_is_about() -> None:
    """In one sentence each, and in letters that everybody has."""
    assert all(case.what.endswith(".") and 20 < len(case.what) < 250 for case in cases())
    assert all(re.fullmatch(r"[a-z0-9-]+/[a-z0-9_+.-]+", case.id) for case in cases())
    assert max(len(case.token) for case in cases()) < 100_000


def test_the_encrypted_tokens_can_really_be_opened() -> None:
    """Whoever has the key finds a good token in them, so that refusing them means something."""
    forge, keys = Forge(ISSUER, AUDIENCE, NOW), json.loads((_TORTURE / "keys.json").read_bytes())["keys"]
    names = {"RSA-OAEP": "good", "RSA-OAEP-256": "good", "RSA1_5": "good", "ECDH-ES": "curve"}
    names |= {"A256KW": "shared", "dir": "shared", "PBES2-HS256+A128KW": "password"}
    keys["password"] = {"kty": "oct", "k": b64(b"secret")}
    registry = jwe.JWERegistry(algorithms=[*names, "A128GCM", "A128CBC-HS256", "DEF"], strict_check_header=False)
    inside = {forge.token(), dumped(forge.claims)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some of these algorithms are old
        opened = {
            slug: jwe.decrypt_compact(token, import_key(keys[names[alg]]), registry=registry).plaintext
            for slug, _, token in made(forge)
            for alg in (json.loads(unb64(token.split(".")[0]))["alg"],)
        }
    assert len(opened) == 10
    assert zlib.decompress(deflated_zeros(4000), wbits=-15) == bytes(1 + 258 * 4000)
    assert {slug for slug, plain in opened.items() if plain is None or plain.decode() not in inside} == set()


# -- the verifier -----------------------------------------------------------------------------------------------------


def usable_keys() -> Keys:
    """Return the published keys that the verifier takes, warnings of short ones being ignored as elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_key_set(json.dumps(published()["jwks"]).encode())


@tortured
def test_the_core_gives_each_case_its_verdict() -> None:
    """And for the very reason that the case is about, so nothing else is wrong with it."""
    keys = usable_keys()
    assert keys.keys() == {load().good.kid, load().second.kid}, "the other keys are not for access tokens"
    for audience, among in ((AUDIENCE, cases()), (ISSUER, own_cases())):

        def read(token: str, audience: str = audience) -> VerifiedClaims:
            return verify(token, key_of=keys.get, issuer=ISSUER, audiences=(audience,), now=NOW)

        assert disagreements(reason, {case.id: verdict(read, case.token) for case in among}, among) == []


def test_a_token_of_two_million_letters_is_not_read() -> None:
    """Although nothing else is wrong with it; such a one would only make the published file large."""
    keys = usable_keys()
    with pytest.raises(TokenRefused, match="malformed"):
        verify(enormous(AUDIENCE), key_of=keys.get, issuer=ISSUER, audiences=(AUDIENCE,), now=NOW)


def enormous(audience: str) -> str:
    return Forge(ISSUER, audience, NOW).token(claims={"x": "x" * 1_500_000})


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    """A server that has the published key set and nothing else."""
    with KeyServer() as server:
        server.answer(JWKS, body=json.dumps(published()["jwks"]).encode())
        yield server


@tortured
async def test_the_verifier_agrees_with_fetched_keys(key_server: KeyServer) -> None:
    """Awaited or called, every case gets the core's verdict."""
    verifier = TokenVerifier(ISSUER, AUDIENCE, jwks_uri=key_server.origin + JWKS, clock=lambda: float(NOW))
    awaited = {}
    for case in cases():
        try:
            claims = await verifier.verify(case.token)
            awaited[case.id] = verdict(lambda _, claims=claims: claims, case.token)
        except TokenRefused as refused:
            awaited[case.id] = refused.reason
        except Exception as error:
            awaited[case.id] = repr(error)
    assert disagreements(reason, awaited, cases()) == []
    called = {case.id: verdict(verifier.verify_sync, case.token) for case in cases()}
    assert disagreements(reason, called, cases()) == []


@tortured
def test_the_verifier_agrees_with_keys_from_a_file(key_server: KeyServer, tmp_path: Path) -> None:
    """The issuer is away: where it would have to be asked for a key, nobody can tell, and that is no yes either."""
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(published()["jwks"]), "ascii")
    key_server.go_down()
    address = key_server.origin + JWKS
    verifier = TokenVerifier(ISSUER, AUDIENCE, jwks_uri=address, jwks_file=path, clock=lambda: float(NOW))
    said = {case.id: verdict(verifier.verify_sync, case.token) for case in cases()}

    def wanted(case: Case) -> str:
        return "keys unavailable" if case.reason == "kid_unknown" else reason(case)

    assert disagreements(wanted, said, cases()) == []


# -- the service ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def issuer(database_url: str) -> AsyncIterator[Service]:
    """The service as the issuer of the tokens, at their instant."""
    settings = test_settings(database_url, issuer=ISSUER)
    async with running(settings, FrozenClock(datetime.fromtimestamp(NOW, UTC))) as service:
        yield service


def peer(number: int) -> str:
    """Return a network of its own for each request, so that no limit ends the test."""
    return f"10.{number >> 8}.{number & 255}.1"


@tortured
@pytest.mark.rfc("7662", "2.2")
@pytest.mark.case("INT-03")
async def test_introspection_gives_each_case_its_verdict(issuer: Service) -> None:
    """The very tokens of the file; whatever is wrong with one, the answer is the same."""
    client = await settle(issuer)
    assert client.auth is not None
    authorization = b"Basic " + base64.b64encode(":".join(client.auth).encode())

    async def ask(token: str, number: int) -> WireAnswer:
        body = urlencode({"token": token}).encode()
        return await send(
            issuer, "/introspect", body, headers=(FORM, (b"authorization", authorization)), peer=peer(number)
        )

    said = {case.id: told(await ask(case.token, number), case) for number, case in enumerate(cases())}

    def wanted(case: Case) -> tuple[int, object]:
        if not case.token:  # a parameter without a value is not there (RFC 6749 §3.1)
            return 400, "invalid_request"
        if "\0" in case.token:  # no parameter has a use for it
            return 400, "invalid_request"
        return 200, _GOOD if case.accept else {"active": False}

    assert disagreements(wanted, said, cases()) == []
    assert (await ask(enormous(AUDIENCE), 0)).status == 413
    assert len(enormous(AUDIENCE)) > LARGEST_BODY > max(len(case.token) for case in cases())


def told(answer: WireAnswer, case: Case) -> tuple[int, object]:
    """Return the status, and what an answer says in short where that is all the token says, or which error it is."""
    said = answer.json
    if case.accept and said == {**parts_of(case.token)[1], "active": True, "token_type": "Bearer"}:
        return answer.status, _GOOD
    return answer.status, said.get("error", said)


@tortured
@pytest.mark.rfc("6750", "3.1")
async def test_our_own_api_gives_each_case_its_verdict(issuer: Service) -> None:
    """The same cases with the issuer's own API as audience; a good token may still allow too little, or be nobody's."""
    await settle(issuer)

    async def ask(token: str, number: int) -> tuple[int, str | None]:
        header = (b"authorization", b"Bearer " + token.encode("utf-8"))
        answer = await send(issuer, "/v1/users/me", method="GET", headers=(header,), peer=peer(number))
        return answer.status, answer.header("www-authenticate")

    said: dict[str, object] = {case.id: await ask(case.token, number) for number, case in enumerate(own_cases())}
    good = {case.token for case in own_cases() if case.accept}

    def wanted(case: Case) -> tuple[int, str | None]:
        # Blanks around a token belong to the header field and not to the token (RFC 9110 §5.5, RFC 6750 §2.1).
        token = case.token.strip(" ")
        if len(token) > 32 * 1024:
            return 431, None
        if token not in good:
            return 401, 'Bearer error="invalid_token"'
        claims = parts_of(token)[1]
        if "account:read" not in claims.get("scope", "").split():
            return 403, 'Bearer error="insufficient_scope", scope="account:read"'
        return (200, None) if "sid" in claims else (401, 'Bearer error="invalid_token"')

    assert disagreements(wanted, said, own_cases()) == []
    assert Counter(wanted(case)[0] for case in own_cases())[200] >= 40
    assert (await ask(enormous(ISSUER), 0))[0] == 431


# -- others -----------------------------------------------------------------------------------------------------------

# Good tokens that a library refuses, and why; the settings are those of tests/contracts/torture/libraries.py.
_UNKNOWN_HEADERS = {f"headers/{slug}" for slug in ("unknown", "iss", "nonce", "long", "apu", "almost")}
_REFUSED_BY = {
    "PyJWT": {"time/exp-last-moment"},  # cuts off fractions of a second
    "joserfc": _UNKNOWN_HEADERS,  # RFC 7515 §4 says to ignore them
    "Authlib": _UNKNOWN_HEADERS | {"claims/scope-empty", "claims/roles-empty"},  # takes empty for missing
}


@pytest.mark.parametrize("library", sorted(libraries.LIBRARIES))
def test_other_libraries_take_the_good_tokens(library: str) -> None:
    """What others accept is good by more than our own word, and the set is of use to them."""
    reader, refusal = libraries.LIBRARIES[library](ISSUER, AUDIENCE, NOW)
    answers = {case.id: libraries.answer(reader, refusal, case.token) for case in cases()}
    refused = {case.id for case in cases() if case.accept and answers[case.id] != "accepted"}
    assert refused <= _REFUSED_BY[library]
    assert sum(answers[case.id] != "accepted" for case in cases() if not case.accept) > 800


def test_the_documented_example_runs() -> None:
    """As it stands on the page, from the root of the repository."""
    page = (_DOCS / "torture.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=_DOCS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"holds {len(cases())} tokens" in page
    assert f"{sum(case.accept for case in cases())} of them good" in page
    assert "headers/plain" not in done.stdout
    assert "json/nan-payload" in done.stdout
