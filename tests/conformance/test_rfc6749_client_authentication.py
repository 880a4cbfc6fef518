"""RFC 6749 §2.3: how a client proves who it is, by Basic or in the body."""

import base64
import hashlib
from datetime import timedelta
from urllib.parse import quote

import httpx2
import pytest
from sqlalchemy import insert, select

from identity_service.accounts.clients import AUTH_METHODS, InvalidClientMetadata, NewClient
from identity_service.infra.runtime import new_id
from identity_service.infra.tables import client_secrets, clients
from tests.support.reading import unverified_claims
from tests.support.refusals import refusal, written
from tests.support.service import PASSWORD, Registered, Service
from tests.support.wire import FORM, post, send

CREDENTIALS = "grant_type=client_credentials"


def basic(client_id: str | bytes, secret: str | bytes, *, scheme: str = "Basic") -> dict[str, str]:
    """Return an Authorization header with exactly these bytes inside."""
    name, word = (part if isinstance(part, bytes) else part.encode() for part in (client_id, secret))
    return {"authorization": f"{scheme} {base64.b64encode(name + b':' + word).decode()}"}


async def by_header(service: Service, header: dict[str, str]) -> httpx2.Response:
    """Ask for a client's own token with this Authorization header."""
    return await post(service, CREDENTIALS, headers=header)


async def a_secret(service: Service, client: Registered, secret: str) -> None:
    """Give a client a secret of the test's choosing; generated ones have letters and digits only."""
    digest = hashlib.sha256(secret.encode()).digest()
    values = {"id": new_id(), "client_id": client.id, "digest": digest, "created_at": service.clock.now()}
    await service.execute(insert(client_secrets).values(**values))
    service.clock.advance(2)


# -- the two mechanisms -----------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "2.3.1")
async def test_a_client_authenticates_by_basic_or_in_the_body(service: Service) -> None:
    """Either way the token is the client's own; naming oneself in the body as well does no harm."""
    client = await service.a_client()
    in_body = await post(service, [("grant_type", "client_credentials"), *client.form.items()])
    by_basic = await post(service, CREDENTIALS, client=client)
    named_twice = await post(service, f"{CREDENTIALS}&client_id={client.id}", client=client)
    for answer in (in_body, by_basic, named_twice):
        assert answer.status_code == 200, answer.text
        assert unverified_claims(answer.json()["access_token"])["sub"] == client.id


@pytest.mark.rfc("6749", "2.3")
@pytest.mark.case("CLI-02")
async def test_two_mechanisms_in_one_request_are_refused(service: Service) -> None:
    """Both right, or one of them wrong, or two different clients; at both endpoints, and nothing happens."""
    client, other = await service.a_client(), await service.a_client()
    token = (await service.sign_in(client, await service.a_user()))["refresh_token"]
    grant = [("grant_type", "refresh_token"), ("refresh_token", token), ("token", token)]
    before = await written(service)
    for body in (
        client.form,
        {"client_secret": "wrong"},
        {"client_secret": client.secret},
        other.form,
        {"client_id": other.id},
    ):
        for path in ("/token", "/revoke"):
            answer = await post(service, [*grant, *body.items()], client=client, path=path)
            refusal(answer, "invalid_request", token, client.secret or "", other.secret or "", other.id)
    assert await written(service) == before
    assert (await service.refresh(client, token)).status_code == 200


@pytest.mark.rfc("7617", "2")
@pytest.mark.case("CLI-06")
@pytest.mark.parametrize("scheme", ["basic", "BASIC", "bAsIc"])
async def test_the_scheme_is_not_case_sensitive(embedded: Service, scheme: str) -> None:
    """RFC 9110 §11.1."""
    client = await embedded.a_client()
    assert (await by_header(embedded, basic(client.id, client.secret or "", scheme=scheme))).status_code == 200


@pytest.mark.rfc("6749", "2.3.1")
@pytest.mark.case("CLI-07")
async def test_id_and_secret_are_form_urlencoded_inside_basic(service: Service, subtests: pytest.Subtests) -> None:
    """Colon, per cent, plus, slash, space and letters beyond ASCII survive; the secret may hold colons."""
    for number, secret in enumerate(("a:b%c+d/e é", "100%25", "+", "%", "::", "p=q&r", "\U0001f511")):
        with subtests.test(secret):
            client = await service.a_client(name=f"client {number}")
            await a_secret(service, client, secret)
            encoded = quote(secret, safe="")
            assert (await by_header(service, basic(client.id, encoded))).status_code == 200
            assert (await by_header(service, basic(client.id, encoded.replace("%20", "+")))).status_code == 200
            assert (
                await by_header(service, basic(quote(client.id.replace("c", "%63", 1), safe="%"), encoded))
            ).status_code == 200
            in_body = {"client_id": client.id, "client_secret": secret, "grant_type": "client_credentials"}
            assert (await service.http.post("/token", data=in_body)).status_code == 200
            refused = await by_header(service, basic(client.id, quote(encoded, safe="")))
            refusal(refused, "invalid_client", encoded, status=401)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "5.2")
async def test_an_unknown_client_and_a_wrong_secret_are_answered_alike(service: Service) -> None:
    """Nobody learns which clients exist, or which are disabled; only Basic is answered with a challenge."""
    client, disabled = await service.a_client(), await service.a_client()
    public = await service.a_client(public=True)
    await service.within(lambda tx: service.services.clients.set_enabled(tx, disabled.id, False))
    unknown = client.id[:-1] + ("x" if client.id[-1] != "x" else "y")
    pairs = [
        (client.id, "wrong"),
        (unknown, client.secret),
        ("nobody", "x"),
        (disabled.id, disabled.secret),
        (public.id, "x"),
    ]
    seen = set()
    for client_id, secret in pairs:
        header = await by_header(service, basic(client_id, secret or ""))
        refusal(header, "invalid_client", client_id, secret or "", status=401)
        assert header.headers["www-authenticate"].startswith("Basic ")
        body = await service.http.post(
            "/token", data={"grant_type": "client_credentials", "client_id": client_id, "client_secret": secret}
        )
        refusal(body, "invalid_client", client_id, secret or "", status=401)
        for answer in (header, body):
            kept = tuple((name, value) for name, value in answer.headers.items() if name != "x-request-id")
            seen.add((answer.request.headers.get("authorization") is None, answer.content, kept))
    assert len(seen) == 2, "one answer for Basic, one for the body"


@pytest.mark.rfc("6749", "3.2.1")
@pytest.mark.case("CLI-03")
async def test_a_confidential_client_cannot_pose_as_a_public_one(service: Service) -> None:
    """Its id alone, in the body or in the header, opens nothing anywhere and consumes nothing."""
    client, user = await service.a_client(), await service.a_user()
    token = (await service.sign_in(client, user))["refresh_token"]
    families = (await written(service))[:-1]
    forms = (
        {"grant_type": "refresh_token", "refresh_token": token},
        {"grant_type": "password", "username": user.username, "password": PASSWORD},
        {"grant_type": "client_credentials"},
    )
    for path, form in (*(("/token", form) for form in forms), ("/revoke", {"token": token})):
        alone = await post(service, [*form.items(), ("client_id", client.id)], path=path)
        refusal(alone, "invalid_client", token, client.id, status=401)
        empty = await post(service, [*form.items(), ("client_id", client.id), ("client_secret", "")], path=path)
        refusal(empty, "invalid_client", token, client.id, status=401)
        header = await post(service, form.items(), path=path, headers=basic(client.id, ""))
        refusal(header, "invalid_client", token, client.id, status=401)
        nobody = await post(service, form.items(), path=path)
        refusal(nobody, "invalid_client", token, status=401)
    assert (await written(service))[:-1] == families
    assert (await service.refresh(client, token)).status_code == 200


async def test_a_public_client_has_nothing_to_prove_and_cannot_pretend_to(embedded: Service) -> None:
    """Its id suffices; a secret it does not have is wrong, whatever it is."""
    client, user = await embedded.a_client(public=True), await embedded.a_user()
    form = {"grant_type": "password", "username": user.username, "password": PASSWORD, "client_id": client.id}
    assert (await embedded.http.post("/token", data=form)).status_code == 200
    refusal(await embedded.http.post("/token", data={**form, "client_secret": "x"}), "invalid_client", status=401)
    refusal(await post(embedded, form.items(), headers=basic(client.id, "x")), "invalid_client", status=401)
    refusal(await post(embedded, form.items(), headers=basic(client.id, "")), "invalid_client", status=401)


ODD = ("é", "\U0001f511", "\x7f", "\u202e", "ﬁ", "a" * 3000, "\x01")


@pytest.mark.case("CLI-05")
async def test_a_secret_of_any_text_is_merely_wrong(service: Service, subtests: pytest.Subtests) -> None:
    """Comparing it must not fail; what is no text at all is malformed in a body, and no credentials in a header."""
    client = await service.a_client()
    for secret in ODD:
        with subtests.test(ascii(secret[:20])):
            answer = await post(
                service, [("grant_type", "client_credentials"), ("client_id", client.id), ("client_secret", secret)]
            )
            refusal(answer, "invalid_client", secret, status=401)
            refusal(
                await by_header(service, basic(client.id, quote(secret)[:3000])), "invalid_client", secret, status=401
            )
            refusal(await by_header(service, basic(client.id, secret)), "invalid_client", secret, status=401)
            refusal(await by_header(service, basic(secret, "x")), "invalid_client", secret, status=401)
    for raw in ("%00", "%ED%A0%80", "%FF", f"{client.secret}%00"):
        with subtests.test(raw):
            body = await post(service, f"{CREDENTIALS}&client_id={client.id}&client_secret={raw}")
            refusal(body, "invalid_request", client.secret or "")
            for header in (basic(client.id, raw), basic(raw, client.secret or "")):
                refusal(await by_header(service, header), "invalid_client", client.secret or "", status=401)


def _broken_headers(client: Registered) -> list[str]:
    secret = client.secret or ""
    whole = base64.b64encode(f"{client.id}:{secret}".encode()).decode()
    return [
        *(
            "",
            "Basic",
            "Basic ",
            "Basic  ",
            "Basic =",
            "Basic ====",
            "Basic !!!!",
            f"Basic {whole[:-3]}",
            f"Basic {whole}x",
        ),
        *(
            f"Basic {whole}\t{whole}",
            f"Basic {whole},{whole}",
            f"Basic {whole} realm=x",
            f"Basic:{whole}",
            f"Bearer {whole}",
        ),
        *(f"Digest {whole}", whole, f"{client.id}:{secret}", "Basic " + base64.b64encode(client.id.encode()).decode()),
        "Basic " + base64.b64encode(f":{secret}".encode()).decode(),
        "Basic " + base64.b64encode(f"{client.id}:".encode()).decode(),
        "Basic " + base64.b64encode(b":").decode(),
        "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(),
        "Basic " + base64.b64encode(f"{client.id}:{secret}\n".encode()).decode(),
        "Basic " + base64.b64encode(f"{client.id} :{secret}".encode()).decode(),
        "Basic " + base64.b64encode(f"{client.id}:{secret}".encode("utf-16")).decode(),
        "Basic " + base64.b64encode(b"x" * 6000 + b":" + b"y" * 6000).decode(),
    ]


@pytest.mark.rfc("7617", "2")
@pytest.mark.case("CLI-06")
async def test_an_unreadable_header_authenticates_nobody(embedded: Service, subtests: pytest.Subtests) -> None:
    """Nor is it skipped in favour of what stands in the body."""
    client = await embedded.a_client()
    for number, value in enumerate(_broken_headers(client)):
        with subtests.test(f"{number} {value[:20]}"):
            embedded.clock.advance(120)  # what is looked at here is no guessing
            answer = await by_header(embedded, {"authorization": value})
            refusal(answer, "invalid_client", client.secret or "", client.id, status=401)
            named = f"{CREDENTIALS}&client_id={client.id}&client_secret={client.secret}"
            answer = await post(embedded, named, headers={"authorization": value})
            assert (answer.status_code, answer.json()["error"]) in ((401, "invalid_client"), (400, "invalid_request"))


@pytest.mark.case("CLI-06")
async def test_two_authorization_headers_authenticate_nobody(embedded: Service) -> None:
    """Even if they are equal, and even if one of them is right."""
    client = await embedded.a_client()
    good = basic(client.id, client.secret or "")["authorization"].encode()
    for pair in ((good, good), (good, b"Basic x"), (b"Basic x", good), (b"Bearer x", good)):
        headers = [FORM, *((b"authorization", value) for value in pair)]
        answer = await send(embedded, "/token", CREDENTIALS.encode(), headers=headers)
        assert (answer.status, answer.json["error"]) == (401, "invalid_client")
        assert (answer.header("www-authenticate") or "").startswith("Basic ")


@pytest.mark.case("CLI-06")
@pytest.mark.case("INP-09")
async def test_headers_beyond_the_limit_are_refused(embedded: Service) -> None:
    """64 KB of credentials, many headers, a long cookie, a long URL."""
    client = await embedded.a_client()
    assert (await by_header(embedded, basic("x" * 65536, "y"))).status_code == 431
    body = CREDENTIALS.encode()
    credentials = (b"authorization", basic(client.id, client.secret or "")["authorization"].encode())
    for extra, status in (
        ([(b"x-%d" % number, b"1") for number in range(90)], 200),
        ([(b"x-%d" % number, b"1") for number in range(1000)], 431),
        ([(b"cookie", b"c" * 65536)], 431),
        ([(b"cookie", b"c" * 30_000)], 200),
        ([(b"x" * 40_000, b"1")], 431),
    ):
        answer = await send(embedded, "/token", body, headers=[FORM, credentials, *extra])
        assert answer.status == status
    assert (await send(embedded, "/token", body, headers=[FORM, credentials], query=b"q" * 1_000_000)).status == 414


# -- what a registration holds ----------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "2.3.1")
@pytest.mark.case("CLI-09")
async def test_a_rotated_secret_overlaps_with_its_successor(service: Service) -> None:
    """Old and new are good during the overlap, then only the new one; a third one ends the oldest at once."""
    client = await service.a_client()
    first = client.secret or ""

    async def rotate(overlap: float) -> str:
        secret = await service.within(
            lambda tx: service.services.clients.rotate_secret(tx, client.id, overlap=timedelta(seconds=overlap))
        )
        return secret.text.reveal()

    async def statuses(*secrets: str) -> list[int]:
        return [(await by_header(service, basic(client.id, secret))).status_code for secret in secrets]

    second = await rotate(60)
    assert await statuses(first, second) == [200, 200]
    service.clock.advance(59)
    assert await statuses(first, second) == [200, 200]
    service.clock.advance(1)
    assert await statuses(first, second) == [401, 200]
    service.clock.advance(3600)
    third = await rotate(60)
    fourth = await rotate(60)
    assert await statuses(first, second, third, fourth) == [401, 401, 200, 200]
    service.clock.advance(61)
    fifth = await rotate(0)
    assert await statuses(third, fourth, fifth) == [401, 401, 200]
    assert len(await service.execute(select(client_secrets.c.id))) <= 2


async def test_secrets_are_stored_as_digests_only(embedded: Service) -> None:
    """256 random bits need no slow hash, and a dump of the database opens nothing."""
    client = await embedded.a_client()
    secret = client.secret or ""
    row = (await embedded.execute(select(client_secrets)))[0]
    assert row.digest == hashlib.sha256(secret.encode()).digest()
    assert secret not in repr(tuple(row))
    assert secret.startswith("cs_")
    assert len(secret) >= 46


@pytest.mark.rfc("9700", "4.15")
@pytest.mark.case("TOK-19")
async def test_client_ids_are_generated_and_can_equal_no_subject(embedded: Service) -> None:
    """Nobody chooses one, and their form is not that of a user's id."""
    made = [(await embedded.a_client()).id for _ in range(5)]
    user = await embedded.a_user()
    assert len(set(made)) == 5
    assert all(client_id.startswith("cl_") and len(client_id) == 25 for client_id in made)
    assert not str(user.id).startswith("cl_")
    with pytest.raises(TypeError):
        NewClient(id=str(user.id), name="x")  # type: ignore[call-arg]  # that it cannot be given is the point


async def test_a_disabled_client_is_refused_within_a_second(service: Service) -> None:
    """Its row may be remembered for that long, in another process; enabled again, it may come back."""
    client = await service.a_client()
    assert (await post(service, CREDENTIALS, client=client)).status_code == 200
    await service.execute(clients.update().where(clients.c.id == client.id).values(enabled=False))
    service.clock.advance(1)
    refusal(await post(service, CREDENTIALS, client=client), "invalid_client", status=401)
    await service.execute(clients.update().where(clients.c.id == client.id).values(enabled=True))
    service.clock.advance(1)
    assert (await post(service, CREDENTIALS, client=client)).status_code == 200


IMPOSSIBLE = {
    "password for a client of somebody else": {"grant_types": ("password",), "first_party": False},
    "client credentials without authentication": {
        "grant_types": ("client_credentials",),
        "token_endpoint_auth_method": "none",
    },
    "a public client without PKCE": {"token_endpoint_auth_method": "none", "require_pkce": False},
    "an unknown grant": {"grant_types": ("magic",)},
    "an unknown method": {"token_endpoint_auth_method": "private_key_jwt"},
    "a scope with a space": {"scope": ("a b",)},
    "an empty scope": {"scope": ("",)},
    "an audience that is no URI": {"audiences": ("orders",)},
    "an audience with a fragment": {"audiences": ("https://orders.example/#x",)},
    "a redirect URI with a fragment": {"redirect_uris": ("https://app.example/#x",)},
    "a redirect URI without encryption": {"redirect_uris": ("http://app.example/",)},
    "a redirect URI that is a script": {"redirect_uris": ("javascript:alert(1)",)},
    "any origin": {"cors_origins": ("*",)},
    "an origin with a path": {"cors_origins": ("https://app.example/x",)},
    "a window of more than a minute": {"refresh_retry_window": 61},
    "an access token for two hours": {"access_token_ttl": 7200},
    "a name with a line break": {"name": "a\nb"},
    "no name": {"name": ""},
}


@pytest.mark.rfc("7591", "2")
@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_registration_that_cannot_be_is_refused(what: str) -> None:
    """The message names the member and repeats no value."""
    with pytest.raises(InvalidClientMetadata):
        NewClient(**{"name": "Test", **IMPOSSIBLE[what]}).check()


def test_the_methods_are_those_the_metadata_names() -> None:
    """A registration may name each of them."""
    for method in AUTH_METHODS:
        NewClient(name="Test", token_endpoint_auth_method=method).check()
