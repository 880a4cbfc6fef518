"""RFC 7517: the key set that everybody may read, and how long they may keep it."""

import json
import re

import pytest
from joserfc.jwk import KeySet, RSAKey

from identity_service.main import step_keys
from identity_service.oauth.signing_keys import KeyPolicy
from identity_service.verifier.jwks import LONGEST_CACHED
from tests.support.service import ISSUER, Service
from tests.support.tokens import parts_of, unb64

JWKS = "/.well-known/jwks.json"
DOCUMENTS = [JWKS, "/.well-known/oauth-authorization-server", "/.well-known/openid-configuration"]
PUBLIC = {"kty", "use", "alg", "kid", "n", "e"}


@pytest.mark.rfc("7517", "9.3")
@pytest.mark.case("JWT-17")
async def test_the_set_holds_public_members_only(service: Service) -> None:
    """No private exponent, no prime, no shared secret, and no key that is too short (RFC 7518 §3.3)."""
    answer = await service.http.get(JWKS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"keys"}
    assert len(document["keys"]) == 2
    for key in document["keys"]:
        assert set(key) == PUBLIC
        assert (key["kty"], key["use"], key["alg"], key["e"]) == ("RSA", "sig", "RS256", "AQAB")
        assert int.from_bytes(unb64(key["n"]), "big").bit_length() == 2048
        assert "=" not in key["n"]
    for name in ("d", "p", "q", "dp", "dq", "qi", "oth", "k"):
        assert f'"{name}"' not in answer.text


@pytest.mark.rfc("7638", "3")
@pytest.mark.case("JWT-21")
async def test_a_kid_is_the_thumbprint_of_its_key(service: Service) -> None:
    """Computed by another implementation. So an id can never come to stand for another key."""
    keys = (await service.http.get(JWKS)).json()["keys"]
    for key in keys:
        bare = RSAKey.import_key({"kty": key["kty"], "n": key["n"], "e": key["e"]})
        assert bare.thumbprint() == key["kid"]
    assert len({key["kid"] for key in keys}) == len(keys)


@pytest.mark.rfc("7517", "5")
async def test_the_set_holds_the_key_that_signs_and_the_one_that_will(service: Service) -> None:
    """The document is a key set to another implementation, and every token finds its key in it by name."""
    keys = KeySet.import_key_set((await service.http.get(JWKS)).json())
    answer = await service.token(await service.a_client(), grant_type="client_credentials")
    kid = parts_of(answer.json()["access_token"])[0]["kid"]
    assert keys.get_by_kid(kid).kid == kid
    assert len(keys.keys) == 2


@pytest.mark.rfc("9111", "5.2.2")
@pytest.mark.case("JWT-22")
async def test_the_set_may_be_kept_no_longer_than_the_schedule_reckons_with(service: Service) -> None:
    cache_control = (await service.http.get(JWKS)).headers["cache-control"]
    assert cache_control == "public, max-age=300, stale-while-revalidate=600, stale-if-error=3600"
    fresh, stale = (int(seconds) for seconds in re.findall(r"(?:max-age|revalidate)=(\d+)", cache_control))
    assert fresh <= 300
    assert fresh + stale <= KeyPolicy().cache.total_seconds()
    assert KeyPolicy().cache.total_seconds() >= LONGEST_CACHED  # and our own verifier keeps to it whatever it is told


@pytest.mark.rfc("9110", "13.1.2")
@pytest.mark.case("JWT-22")
@pytest.mark.parametrize("path", DOCUMENTS)
async def test_who_has_the_document_is_told_so(service: Service, path: str) -> None:
    """Weak comparison, in a list or alone; a 304 repeats the tag and the caching rules and nothing else."""
    first = await service.http.get(path)
    etag = first.headers["etag"]
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', etag), "a strong tag"
    for held in (etag, f"W/{etag}", f'"x", {etag}', f'"x",W/{etag} , "y"', "*"):
        answer = await service.http.get(path, headers={"if-none-match": held})
        assert answer.status_code == 304, held
        assert answer.content == b""
        assert answer.headers["etag"] == etag
        assert answer.headers["cache-control"] == first.headers["cache-control"]
        assert "content-type" not in answer.headers
    for held in ('"x"', etag.strip('"'), etag[:-2] + '"', "", f'"{etag}'):
        answer = await service.http.get(path, headers={"if-none-match": held})
        assert (answer.status_code, answer.content) == (200, first.content), held


@pytest.mark.rfc("9110", "9.3.2")
@pytest.mark.parametrize("path", DOCUMENTS)
async def test_head_says_what_get_would(service: Service, path: str) -> None:
    got, asked = await service.http.get(path), await service.http.head(path)
    assert asked.status_code == 200
    assert asked.content == b""
    for name in ("content-type", "content-length", "etag", "cache-control"):
        assert asked.headers[name] == got.headers[name]
    assert int(asked.headers["content-length"]) == len(got.content)
    unchanged = await service.http.head(path, headers={"if-none-match": got.headers["etag"]})
    assert unchanged.status_code == 304


@pytest.mark.rfc("9110", "15.5.6")
@pytest.mark.parametrize("path", DOCUMENTS)
async def test_the_documents_are_there_to_be_read(service: Service, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = await service.http.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == "GET, HEAD"
    assert (await service.http.get(path + "/")).status_code == 404


@pytest.mark.rfc("9110", "8.8.3")
async def test_the_tag_changes_when_a_key_joins_and_only_then(service: Service) -> None:
    """A rotation changes which key signs, not which keys are published; the successor's successor does."""
    keys = service.services.signing_keys
    before = await service.http.get(JWKS)
    assert (await service.http.get(JWKS)).headers["etag"] == before.headers["etag"]
    waiting = max(keys.records, key=lambda record: record.activates_at)
    service.clock.set(waiting.activates_at)
    assert (await service.http.get(JWKS)).content == before.content
    await step_keys(service.services)
    after = await service.http.get(JWKS)
    assert after.headers["etag"] != before.headers["etag"]
    old, new = ({key["kid"] for key in json.loads(answer.content)["keys"]} for answer in (before, after))
    assert old < new
    assert len(new) == 3


@pytest.mark.rfc("8414", "3.2")
async def test_the_metadata_leads_to_the_key_set(service: Service) -> None:
    """Both names of the document say the same, and the issuer is the one tokens name."""
    plain, openid = [(await service.http.get(path)).json() for path in DOCUMENTS[1:]]
    assert plain == openid
    assert plain["issuer"] == ISSUER
    assert plain["jwks_uri"] == ISSUER + JWKS
    assert plain["token_endpoint"] == f"{ISSUER}/token"


@pytest.mark.case("JWT-21")
async def test_the_embedded_database_keeps_the_same_set(embedded: Service) -> None:
    """SQLite keeps the public halves as it was given them."""
    for key in (await embedded.http.get(JWKS)).json()["keys"]:
        assert set(key) == PUBLIC
        assert RSAKey.import_key({name: key[name] for name in ("kty", "n", "e")}).thumbprint() == key["kid"]
