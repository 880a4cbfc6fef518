"""Bad bearer tokens at our own API. Where only one thing is wrong with a token, its signature is right."""

import base64
import hmac
import io
import json
import logging
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from joserfc import jwe
from joserfc.jwk import OctKey, RSAKey
from sqlalchemy import update

from identity_service.infra.tables import clients
from identity_service.verifier.core import LEEWAY
from tests.support.service import ISSUER, SIBLING, Registered, Service
from tests.support.tokens import OMIT, b64, changed, compact, parts_of


@dataclass
class Forger:
    """Somebody who holds a genuine token, and for once the key that signed it."""

    service: Service
    token: str
    key: rsa.RSAPrivateKey
    header: dict[str, Any]
    claims: dict[str, Any]
    refresh_token: str
    client: Registered
    user: Any = field(repr=False)

    def forge(
        self, header: Mapping[str, Any] | None = None, claims: Mapping[str, Any] | None = None, **other: Any
    ) -> str:
        """Return the genuine token with some headers and claims changed, signed by the published key."""
        return compact(
            changed(self.header, header or {}), changed(self.claims, claims or {}), other.get("key", self.key)
        )

    async def refused(self, tokens: Iterable[str]) -> None:
        """Check that each token is answered as a bad one and nothing more is said, and quickly."""
        for token in tokens:
            began = time.process_time()
            answer = await self.service.me(token)
            took = time.process_time() - began
            check_refused(answer, token)
            assert took < 0.5, token[:200]
        assert (await self.service.me(self.token)).status_code == 200, "the genuine one still works"


def check_refused(answer: httpx2.Response, token: str) -> None:
    assert answer.status_code == 401, (token[:300], answer.status_code, answer.text)
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "type": "about:blank",
        "title": "A valid access token or API key is needed.",
        "status": 401,
    }


@pytest.fixture
async def forger(service: Service) -> Forger:
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    header, claims = parts_of(tokens["access_token"])
    key = service.services.signing_keys._loaded[header["kid"]].private
    made = Forger(service, tokens["access_token"], key, header, claims, tokens["refresh_token"], client, user)
    assert (await service.me(made.forge())).status_code == 200, "a forgery with nothing wrong is as good as genuine"
    return made


@pytest.fixture(scope="module")
def stranger() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


# -- header -----------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("8725", "3.1")
@pytest.mark.case("JWT-01")
async def test_only_one_algorithm_is_taken(forger: Forger) -> None:
    """Signed or, as `none` would have it, not."""
    odd = ("none", "None", "nOnE", "NONE", "", OMIT, ["RS256"], ["none"], None, 0, True, {"alg": "RS256"}, "rs256")
    forged = [forger.forge({"alg": alg}) for alg in odd]
    await forger.refused(forged)
    await forger.refused([token.rsplit(".", 1)[0] + "." for token in (*forged, forger.token)])


@pytest.mark.rfc("8725", "3.1")
@pytest.mark.case("JWT-03")
async def test_the_published_key_works_with_no_other_algorithm(forger: Forger) -> None:
    """Really signed that way, by the right key: RS384, RS512, PS256; and an HMAC under the public key."""
    signed: list[str] = []
    for alg, scheme, digest in (
        ("RS384", padding.PKCS1v15(), hashes.SHA384()),
        ("RS512", padding.PKCS1v15(), hashes.SHA512()),
        ("PS256", padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
    ):
        for said in (alg, "RS256"):
            text = (
                f"{b64(json.dumps({**forger.header, 'alg': said}).encode())}.{b64(json.dumps(forger.claims).encode())}"
            )
            signed.append(f"{text}.{b64(forger.key.sign(text.encode(), scheme, digest))}")
    public = forger.key.public_key()
    secrets = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        (await forger.service.http.get("/.well-known/jwks.json")).content,
        b"",
    ]
    for secret in secrets:
        text = (
            f"{b64(json.dumps({**forger.header, 'alg': 'HS256'}).encode())}.{b64(json.dumps(forger.claims).encode())}"
        )
        signed.append(f"{text}.{b64(hmac.digest(secret, text.encode(), 'sha256'))}")
    await forger.refused(signed)
    await forger.refused(forger.forge({"alg": alg}) for alg in ("ES256", "EdDSA", "HS256", "RSA-OAEP", "RS256K"))


@pytest.fixture
def canary() -> Iterator[socket.socket]:
    """A listener at which nobody may knock."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.rfc("8725", "3.10")
@pytest.mark.case("JWT-04")
async def test_a_token_cannot_bring_its_own_key(
    forger: Forger, stranger: rsa.RSAPrivateKey, canary: socket.socket
) -> None:
    """Inline or by address, signed by that key or by ours; no address is ever fetched."""
    jwk = RSAKey.import_key(stranger.public_key()).as_dict(private=False)
    where = f"http://127.0.0.1:{canary.getsockname()[1]}/keys"
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "us")])
    certificate = (
        x509.CertificateBuilder(name, name, stranger.public_key(), x509.random_serial_number())
        .not_valid_before(forger.service.clock.now())
        .not_valid_after(forger.service.clock.now().replace(year=2040))
        .sign(stranger, hashes.SHA256())
    )
    chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
    for extra in ({"jwk": jwk}, {"jku": where}, {"x5u": where}, {"x5c": chain}, {"jwk": None}, {"jku": ""}):
        await forger.refused(forger.forge(extra, key=key) for key in (stranger, forger.key))
        await forger.refused([forger.forge({**extra, "kid": "theirs"}, key=stranger)])
    await forger.refused([forger.forge(key=stranger), forger.forge({"kid": jwk.get("kid", "theirs")}, key=stranger)])


@pytest.mark.rfc("8725", "3.10")
@pytest.mark.case("JWT-05")
async def test_a_kid_is_looked_up_among_the_published_keys_and_nowhere_else(forger: Forger) -> None:
    known = forger.header["kid"]
    odd: list[Any] = [
        *("unknown", "", "../../etc/passwd", "/dev/null", "' OR 1=1--", "\0", known + "\0", known[:-1], known.lower()),
        *(known + " ", "k" * 10240, "\ud800", "%00", "é", OMIT, None, 0, 1, True, [known], {"kid": known}, 1e308),
    ]
    await forger.refused(forger.forge({"kid": kid}) for kid in odd)
    waiting = max(forger.service.services.signing_keys.records, key=lambda record: record.activates_at)
    await forger.refused([forger.forge({"kid": waiting.kid})])


@pytest.mark.rfc("7515", "4.1.11")
@pytest.mark.case("JWT-07")
async def test_critical_extensions_are_not_understood(forger: Forger) -> None:
    """Nor is a payload that is not encoded (RFC 7797)."""
    extensions: list[dict[str, Any]] = [
        {"crit": ["x"], "x": 1},
        {"crit": ["b64"], "b64": False},
        {"crit": ["b64"], "b64": True},
        {"b64": False},
        {"crit": []},
        {"crit": "exp"},
        {"crit": None},
        {"crit": {"x": 1}},
        {"crit": ["alg"]},
    ]
    await forger.refused(forger.forge(extra) for extra in extensions)
    header = b64(json.dumps({**forger.header, "crit": ["b64"], "b64": False}).encode())
    payload = json.dumps(forger.claims).replace(".", "").replace(" ", "")
    signature = forger.key.sign(f"{header}.{payload}".encode(), padding.PKCS1v15(), hashes.SHA256())
    await forger.refused([f"{header}.{payload}.{b64(signature)}", f"{header}..{b64(signature)}"])


@pytest.mark.rfc("9068", "4")
async def test_a_token_of_another_type_is_not_an_access_token(forger: Forger) -> None:
    odd = ("JWT", "jwt", OMIT, None, "", "id+jwt", "logout+jwt", "dpop+jwt", ["at+jwt"], "application/jwt")
    await forger.refused(forger.forge({"typ": typ}) for typ in odd)


# -- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("9068", "4")
@pytest.mark.case("JWT-10")
async def test_a_token_for_somebody_else_is_useless_here(forger: Forger) -> None:
    """Also one that names us among others: we never issue such."""
    odd: list[Any] = [
        *(SIBLING, [SIBLING], [], "", None, OMIT, 0, {ISSUER: 1}, [ISSUER, SIBLING], [SIBLING, ISSUER], [[ISSUER]]),
        *(
            ISSUER + "/",
            ISSUER.upper(),
            ISSUER[:-1],
            f"{ISSUER} {SIBLING}",
            [ISSUER, None],
            "*",
            ISSUER + ".evil.example",
        ),
    ]
    await forger.refused(forger.forge(claims={"aud": aud}) for aud in odd)
    issued = await forger.service.sign_in(forger.client, forger.user, resource=SIBLING)
    await forger.refused([issued["access_token"]])


@pytest.mark.rfc("8725", "3.8")
@pytest.mark.case("JWT-11")
async def test_the_issuer_is_compared_exactly(forger: Forger) -> None:
    odd: list[Any] = [
        *(OMIT, None, "", ISSUER + "/", ISSUER[:-1], ISSUER + "0", ISSUER.upper(), ISSUER.replace("http:", "https:")),
        *([ISSUER], {"iss": ISSUER}, ISSUER + "\0", " " + ISSUER, ISSUER + ".evil.example", "http://localhost:8000"),
    ]
    await forger.refused(forger.forge(claims={"iss": iss}) for iss in odd)


@pytest.mark.rfc("7519", "4.1.4")
@pytest.mark.case("JWT-12")
async def test_a_token_has_an_end_and_it_is_a_time(forger: Forger) -> None:
    now = int(forger.service.clock.now().timestamp())
    odd: list[Any] = [OMIT, None, "", str(now + 600), True, [], {}, -1, 0, now - LEEWAY, 2**63, 2**64, 10**400, "NaN"]
    await forger.refused(forger.forge(claims={"exp": exp}) for exp in odd)
    await forger.refused(forger.forge(claims={"iat": iat}) for iat in [*odd[:8], now + LEEWAY + 1, 2**63, 10**400])
    await forger.refused(forger.forge(claims={"nbf": nbf}) for nbf in (now + LEEWAY + 1, None, "0", -1, 2**63, 10**400))
    for number in ("NaN", "Infinity", "-Infinity", "1e400", "1" * 5000):
        payload = json.dumps({**forger.claims, "exp": 0}).replace('"exp": 0', f'"exp": {number}')
        await forger.refused([compact(forger.header, payload, forger.key)])


@pytest.mark.rfc("9068", "4")
@pytest.mark.case("JWT-12")
async def test_a_token_ends_when_it_says_plus_the_leeway(service: Service) -> None:
    tokens = await service.sign_in(await service.a_client(), await service.a_user())
    service.clock.advance(tokens["expires_in"] + LEEWAY - 1)
    assert (await service.me(tokens["access_token"])).status_code == 200
    service.clock.advance(1)
    check_refused(await service.me(tokens["access_token"]), tokens["access_token"])


@pytest.mark.rfc("9068", "2.2")
async def test_a_token_without_its_other_claims_is_refused(forger: Forger) -> None:
    for name in ("sub", "client_id", "jti"):
        await forger.refused(forger.forge(claims={name: value}) for value in (OMIT, None, "", 7, [], {"a": 1}))
    for name in ("scope", "sid"):
        await forger.refused(forger.forge(claims={name: value}) for value in (7, [], {"a": 1}, True))


@pytest.mark.rfc("6750", "3.1")
async def test_a_token_without_the_scope_may_not(forger: Forger) -> None:
    """That is no bad token; the answer says what is missing."""
    for scope in (OMIT, "", "orders:read", "account:reads", "ACCOUNT:READ", "account:write"):
        answer = await forger.service.me(forger.forge(claims={"scope": scope}))
        assert answer.status_code == 403
        assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="account:read"'


async def test_a_dead_token_is_dead_whatever_it_allows(forger: Forger) -> None:
    """Who brings one without the scope shall get a new one, not ask for more."""
    token = forger.forge(claims={"scope": "account:write"})
    assert (await forger.service.revoke(forger.client, token)).status_code == 200
    check_refused(await forger.service.me(token), token)


# -- shape ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """All that is logged while the test runs, down to the last detail."""
    before, root = structlog.get_config(), logging.getLogger()
    said, level = io.StringIO(), root.level
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(said),
    )
    handler = logging.StreamHandler(said)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield said
    root.setLevel(level)
    root.removeHandler(handler)
    structlog.configure(**before)


@pytest.mark.rfc("8725", "3.11")
@pytest.mark.case("JWT-14")
async def test_what_is_no_token_is_refused_and_not_written_down(forger: Forger, everything_logged: io.StringIO) -> None:
    header, payload, signature = forger.token.split(".")
    canary = "CANARYCANARYCANARY"
    claims = {**forger.claims, "x": canary}
    shapes = [
        *("", ".", "..", "...", canary, f"{canary}.{canary}", f"{canary}.{canary}.{canary}", "a.b.c.d.e"),
        *(f"{header}.{payload}", f"{header}.{payload}.", f"{header}..{signature}", f".{payload}.{signature}"),
        *(f"{header}=.{payload}.{signature}", f"{header}.{payload}.{signature}==", f"{header}.{payload}.{signature}A"),
        *(f"{header}.{payload}.{signature[:-4]}", f"{header}.{payload}.{signature}.{canary}"),
        *(forger.token.replace("_", "/"), forger.token + ",", "Bearer " + forger.token, f'"{forger.token}"'),
        compact([forger.header], claims, forger.key),
        compact(forger.header, [claims], forger.key),
        *(compact(forger.header, text, forger.key) for text in ('"x"', "null", "7", "", "{", "[" * 5000, canary)),
        compact(forger.header, b'{"iss":"\xff\xfe' + canary.encode() + b'"}', forger.key),
        compact(forger.header, json.dumps(claims).encode("utf-16"), forger.key),
        compact(forger.header, json.dumps(claims)[:-1] + ', "exp": 99999999999}', forger.key),
        compact(json.dumps(forger.header)[:-1] + ', "alg": "none"}', claims, forger.key),
        compact({**forger.header, "x": "h" * 600, "alg": canary}, claims, forger.key),
        compact(forger.header, {**forger.claims, "x": canary * 800}, forger.key),
    ]
    shapes = [shape for shape in shapes if shape != forger.token]
    await forger.refused(shapes)
    said = everything_logged.getvalue()
    assert canary not in said
    for part in (*forger.token.split("."), signature[:-4]):
        assert part not in said


@pytest.mark.case("JWT-14")
async def test_enormous_tokens_are_refused_at_the_door(forger: Forger) -> None:
    for size in (200_000, 2_000_000):
        token = compact(forger.header, {**forger.claims, "x": "x" * size}, forger.key)
        took = []
        for _ in range(3):  # what else this process has to do meanwhile is not there each time
            began = time.process_time()
            answer = await forger.service.me(token)
            took.append(time.process_time() - began)
            assert answer.status_code in (401, 431)
        assert min(took) < 0.1


@pytest.mark.rfc("7516", "5.2")
@pytest.mark.case("JWT-15")
async def test_an_encrypted_token_is_not_decrypted(forger: Forger) -> None:
    """
    Whether for our public key or by a password that takes for ever, or full of compressed nothing.

    Even one whose content would be a good token.
    """
    public = RSAKey.import_key(forger.key.public_key())
    registry = jwe.JWERegistry(algorithms=["RSA-OAEP", "A128GCM", "dir", "DEF"])
    inner = forger.token.encode()
    made = [
        jwe.encrypt_compact(
            {"alg": "RSA-OAEP", "enc": "A128GCM", "cty": "JWT", "kid": forger.header["kid"], **extra},
            inner,
            public,
            registry=registry,
        )
        for extra in ({}, {"zip": "DEF"}, {"typ": "at+jwt"})
    ]
    bomb = b"\0" * 5_000_000
    made.append(
        jwe.encrypt_compact(
            {"alg": "dir", "enc": "A128GCM", "zip": "DEF"}, bomb, OctKey.import_key(b"k" * 16), registry=registry
        )
    )
    slow = {"alg": "PBES2-HS512+A256KW", "enc": "A128CBC-HS256", "p2c": 2**31, "p2s": "AAAA", **forger.header}
    for header in (slow, {**slow, "alg": "PBES2-HS512+A256KW"}, {"alg": "RSA1_5", "enc": "A128GCM"}):
        made += [
            f"{b64(json.dumps(header).encode())}.AAAA.AAAA.AAAA.AAAA",
            f"{b64(json.dumps(header).encode())}.AAAA.AAAA",
        ]
    made.append(forger.forge({"enc": "A128GCM", "zip": "DEF"}))
    await forger.refused(token for token in made if len(token) < 30_000)


# -- live state -------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6750", "2.1")
async def test_the_token_comes_in_the_header_once_and_nowhere_else(forger: Forger) -> None:
    """Without a usable one there is only the bare challenge (RFC 6750 §3.1)."""
    http, good = forger.service.http, f"Bearer {forger.token}"
    for headers in (
        [],
        [("authorization", "Basic Zm9vOmJhcg==")],
        [("authorization", forger.token)],
        [("authorization", f"Token {forger.token}")],
        [("authorization", good), ("authorization", good)],
        [("authorization", ""), ("authorization", good)],
        [("cookie", f"access_token={forger.token}")],
        [("x-access-token", forger.token)],
    ):
        answer = await http.get("/v1/users/me", headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"] == "Bearer"
    assert (await http.get("/v1/users/me", params={"access_token": forger.token})).status_code == 401
    assert (await http.get("/v1/users/me", headers={"authorization": f"bEaReR {forger.token}"})).status_code == 200


@pytest.mark.case("REF-22")
async def test_a_disabled_persons_token_ends_at_once_and_for_good(forger: Forger) -> None:
    await forger.service.disable(forger.user)
    check_refused(await forger.service.me(forger.token), forger.token)
    await forger.service.enable(forger.user)
    check_refused(await forger.service.me(forger.token), forger.token)


@pytest.mark.rfc("7009", "2.1")
async def test_a_token_ends_with_its_session(forger: Forger) -> None:
    """And no other session of the person with it."""
    service, form = forger.service, {"token": forger.refresh_token}
    other = await service.sign_in(forger.client, forger.user)
    assert (await service.http.post("/revoke", data=form, auth=forger.client.auth)).status_code == 200
    check_refused(await service.me(forger.token), forger.token)
    assert (await service.me(other["access_token"])).status_code == 200


@pytest.mark.case("REF-02")
async def test_a_token_ends_when_its_refresh_token_is_replayed(forger: Forger) -> None:
    service = forger.service
    renewed = (await service.refresh(forger.client, forger.refresh_token)).json()
    assert (await service.me(forger.token)).status_code == 200, "a refresh leaves the token before it alone"
    assert (await service.refresh(forger.client, forger.refresh_token)).status_code == 400
    for token in (forger.token, renewed["access_token"]):
        check_refused(await service.me(token), token)


async def test_a_token_ends_with_a_new_password(forger: Forger) -> None:
    """Every session's, by one counter on the person."""
    other = await forger.service.sign_in(forger.client, forger.user)
    await forger.service.change_password(forger.user, "a wholly different phrase")
    for token in (forger.token, other["access_token"]):
        check_refused(await forger.service.me(token), token)


@pytest.mark.case("REF-23")
@pytest.mark.parametrize("how", ["here", "by another replica"])
async def test_a_disabled_clients_tokens_end_within_a_second(forger: Forger, how: str) -> None:
    """Its own row may be a second old where another replica changed it; enabling it again revives nothing."""
    service = forger.service
    services = service.services
    if how == "here":
        await service.within(lambda tx: services.clients.set_enabled(tx, forger.client.id, False))
    else:
        now = service.clock.now()
        await service.execute(
            update(clients)
            .where(clients.c.id == forger.client.id)
            .values(enabled=False, epoch=clients.c.epoch + 1, epoch_at=now)
        )
        service.clock.advance(1)
    check_refused(await service.me(forger.token), forger.token)
    await service.within(lambda tx: services.clients.set_enabled(tx, forger.client.id, True))
    check_refused(await service.me(forger.token), forger.token)


async def test_a_token_of_an_unknown_session_or_client_is_refused(forger: Forger) -> None:
    other = await forger.service.a_client()
    made: list[dict[str, Any]] = [
        {"sid": "00000000-0000-7000-8000-000000000000"},
        {"client_id": other.id},
        {"client_id": "cl_" + "0" * 22},
        {"client_id": "x"},
        {"client_id": "cl_\0"},
        {"sid": OMIT},
    ]
    await forger.refused(forger.forge(claims=claims) for claims in made)


@pytest.mark.rfc("6750", "3.1")
@pytest.mark.case("REF-30")
async def test_a_refresh_token_is_no_bearer_token(forger: Forger) -> None:
    token = forger.refresh_token
    await forger.refused([token, token[3:], f"{token}.{token}.{token}", f"{forger.token.rsplit('.', 1)[0]}.{token}"])
    answer = await forger.service.refresh(forger.client, token)
    assert answer.status_code == 200, "having been shown in the wrong place did not use it up"


@pytest.mark.rfc("9068", "5")
async def test_a_clients_own_token_is_nobodys_account(service: Service) -> None:
    """With the right scope or without; and also after the client was disabled and enabled again."""
    client = await service.a_client()
    with_scope = (await service.token(client, grant_type="client_credentials")).json()
    assert "account:read" in with_scope["scope"].split()
    check_refused(await service.me(with_scope["access_token"]), with_scope["access_token"])
    without = (await service.token(client, grant_type="client_credentials", scope="orders:read")).json()
    assert (await service.me(without["access_token"])).status_code == 403
    service.clock.advance(1)
    await service.bump_client_epoch(client)
    check_refused(await service.me(with_scope["access_token"]), with_scope["access_token"])


@pytest.mark.case("JWT-08")
async def test_a_key_that_is_not_published_verifies_nothing(forger: Forger) -> None:
    """Although this process still holds it in memory."""
    keys = forger.service.services.signing_keys
    now = forger.service.clock.now()
    await forger.service.within(lambda tx: _compromise(forger.service, tx, forger.header["kid"]))
    assert (await forger.service.me(forger.token)).status_code == 200, "nobody has polled yet"
    await forger.service.within(keys.poll)
    check_refused(await forger.service.me(forger.token), forger.token)
    assert forger.service.clock.now() == now


async def _compromise(service: Service, tx: Any, kid: str) -> list[str]:
    from identity_service.oauth.signing_keys import Plan

    keys = service.services.signing_keys
    return await keys.compromise(tx, [kid], await keys.prepare(Plan(create=(service.clock.now(),) * 2)))


@pytest.mark.parametrize("claim", ["sid", "sub"])
@pytest.mark.parametrize("value", ["x", "\0", "00000000-0000-0000-0000-00000000000g"])
async def test_an_identifier_that_is_none_is_refused_even_with_our_signature(
    service: Service, claim: str, value: str
) -> None:
    """A token that only we could have made still gets 401 and not a fault."""
    client, user = await service.a_client(), await service.a_user()
    claims = parts_of((await service.sign_in(client, user))["access_token"])[1]
    answer = await service.me(service.services.signing_keys.sign({**claims, claim: value}, typ="at+jwt"))
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
