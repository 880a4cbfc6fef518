"""RFC 8414: authorization server metadata, read with somebody else's library."""

from typing import Any

import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata

from tests.support.service import Service, running, test_settings

OAUTH, OPENID = "/.well-known/oauth-authorization-server", "/.well-known/openid-configuration"
# The library wants at least one response type; there is none before there is an authorization endpoint.
NOT_YET = {"response_types_supported"}


async def metadata(service: Service, path: str = OAUTH) -> dict[str, Any]:
    """Return the document."""
    answer = await service.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.rfc("8414", "2")
async def test_the_metadata_is_valid(sqlite_url: str) -> None:
    """Every member the library knows, for an issuer as in production."""
    async with running(test_settings(sqlite_url, issuer="https://id.example")) as service:
        document = AuthorizationServerMetadata(await metadata(service))
    for name in document.REGISTRY_KEYS:
        if name not in NOT_YET:
            getattr(document, f"validate_{name}")()
    assert document["response_types_supported"] == []


@pytest.mark.rfc("8414", "3.3")
async def test_the_issuer_is_the_one_that_tokens_name(sqlite_url: str) -> None:
    """Exactly, and never what the Host header says."""
    settings = test_settings(sqlite_url, issuer="https://id.example", allowed_hosts=("other.example",))
    async with running(settings) as service:
        for host in ("id.example", "other.example", "id.example:8443"):
            for headers in ({}, {"x-forwarded-host": "evil.example", "forwarded": "host=evil.example"}):
                answer = await service.http.get(OAUTH, headers={"host": host, **headers})
                assert answer.json()["issuer"] == "https://id.example"
                assert "evil" not in answer.text
                assert "other" not in answer.text


@pytest.mark.rfc("8414", "2")
async def test_every_endpoint_that_is_named_exists(embedded: Service) -> None:
    """And none is named that does not."""
    document = await metadata(embedded)
    endpoints = {name for name in document if name.endswith("_endpoint") or name == "jwks_uri"}
    assert endpoints == {"token_endpoint", "revocation_endpoint", "introspection_endpoint", "jwks_uri"}
    for name in endpoints:
        assert document[name].startswith(document["issuer"] + "/")
        answer = await embedded.http.get(document[name])
        assert answer.status_code == (200 if name == "jwks_uri" else 405)


@pytest.mark.rfc("8414", "2")
async def test_every_method_that_is_named_authenticates(embedded: Service) -> None:
    """At the token endpoint and at the revocation endpoint."""
    document = await metadata(embedded)
    methods = ["client_secret_basic", "client_secret_post", "none"]
    assert document["token_endpoint_auth_methods_supported"] == methods
    assert document["revocation_endpoint_auth_methods_supported"] == methods
    client, public = await embedded.a_client(), await embedded.a_client(public=True)
    for path, form in (("/token", {"grant_type": "refresh_token", "refresh_token": "x"}), ("/revoke", {"token": "x"})):
        answers = [
            await embedded.http.post(path, data=form, auth=client.auth),
            await embedded.http.post(path, data={**form, **client.form}),
            await embedded.http.post(path, data={**form, **public.form}),
        ]
        assert {answer.status_code for answer in answers} == {400 if path == "/token" else 200}


@pytest.mark.rfc("8414", "2")
@pytest.mark.case("PWG-09")
async def test_every_grant_that_is_named_is_switched_on(sqlite_url: str) -> None:
    """A grant that is switched off is not named, and unknown at the token endpoint."""
    for on in (True, False):
        async with running(test_settings(sqlite_url, password_grant=on)) as service:
            named = (await metadata(service))["grant_types_supported"]
            client = await service.a_client()
            for grant_type in ("password", "refresh_token", "client_credentials", "authorization_code"):
                answer = await service.token(client, grant_type=grant_type)
                assert (answer.json().get("error") == "unsupported_grant_type") == (grant_type not in named)
            assert ("password" in named) == on


@pytest.mark.rfc("8414", "3")
async def test_both_well_known_paths_serve_the_same_document(embedded: Service) -> None:
    """Clients of either kind find it."""
    assert await metadata(embedded, OAUTH) == await metadata(embedded, OPENID)


@pytest.mark.rfc("9110", "13.1.2")
async def test_the_document_is_cacheable_and_revalidates(embedded: Service) -> None:
    """A strong tag; 304 without body or length; HEAD with the length and no body."""
    first = await embedded.http.get(OAUTH)
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "public, max-age=300"
    assert tag.startswith('"')
    for asked in (tag, f'"x", {tag}', f"W/{tag}", "*"):
        again = await embedded.http.get(OAUTH, headers={"if-none-match": asked})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["cache-control"] == "public, max-age=300"
        assert again.headers.get("content-length") in (None, first.headers["content-length"])
    for asked in ('"x"', "", tag.strip('"'), f'{tag[:-1]}x"'):
        assert (await embedded.http.get(OAUTH, headers={"if-none-match": asked})).status_code == 200
    head = await embedded.http.head(OAUTH)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == first.headers["content-length"]
    for method in ("POST", "PUT", "DELETE"):
        refused = await embedded.http.request(method, OAUTH)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
