"""RFC 6749 §3.2 and §5: what the token endpoint reads, and how it refuses."""

from typing import Any

import anyio
import pytest
from sqlalchemy import update

from identity_service.infra.database import Database
from identity_service.infra.tables import clients
from identity_service.settings import UnsafeSettings
from identity_service.web import forms
from tests.support.reading import unverified_claims
from tests.support.refusals import refusal, written
from tests.support.servers import PostgresServer
from tests.support.service import ISSUER, PASSWORD, SIBLING, Registered, Service, running, test_settings
from tests.support.wire import FORM, post, send

CANARY = "canary-4711-of-the-caller"
PASSWORD_FORM = {"grant_type": "password", "username": "user1", "password": PASSWORD}


async def accepted(service: Service, client: Registered, token: str) -> None:
    """Assert that a refresh token is still good, and so was not consumed."""
    answer = await service.refresh(client, token)
    assert answer.status_code == 200, answer.text


# -- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "3.2")
@pytest.mark.case("TOK-01")
@pytest.mark.parametrize("path", ["/token", "/revoke"])
async def test_only_post_is_a_method(service: Service, path: str, subtests: pytest.Subtests) -> None:
    """Every other method is 405, names POST, and does nothing."""
    client, user = await service.a_client(), await service.a_user()
    before = await written(service)
    form = {**client.form, "grant_type": "password", "username": user.username, "password": PASSWORD}
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"):
        with subtests.test(method):
            answer = await service.http.request(method, path, data=form)
            assert answer.status_code == 405
            assert answer.headers["allow"] == "POST"
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["pragma"] == "no-cache"
            assert b"access_token" not in answer.content
            assert bool(answer.content) == (method != "HEAD")
    assert await written(service) == before


@pytest.mark.case("TOK-02")
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "evil.example"])
@pytest.mark.parametrize("path", ["/token/", "/revoke/", "/v1/users/me/", "/token//", "//token"])
async def test_a_path_with_a_slash_too_many_is_not_found(embedded: Service, path: str, host: str) -> None:
    """A redirect would carry the credentials to whatever origin the Host header names."""
    client = await embedded.a_client()
    answer = await embedded.http.post(
        path, data={"grant_type": "client_credentials"}, auth=client.auth, headers={"host": host}
    )
    assert answer.status_code == 404
    assert "location" not in answer.headers
    assert "evil" not in answer.text


@pytest.mark.rfc("9112", "3.2")
@pytest.mark.case("INP-10")
async def test_a_request_names_exactly_one_known_host(embedded: Service) -> None:
    """None or two hosts is a malformed request; another host's name leads nowhere."""
    client = await embedded.a_client()
    assert client.secret is not None
    body = f"grant_type=client_credentials&client_id={client.id}&client_secret={client.secret}".encode()

    async def status(*hosts: bytes) -> int:
        headers = [FORM, *((b"host", host) for host in hosts)]
        return (await send(embedded, "/token", body, headers=headers, host=False)).status

    assert await status(b"127.0.0.1:8000") == 200
    assert await status(b"LOCALHOST") == 200
    assert await status() == 400
    assert await status(b"127.0.0.1:8000", b"127.0.0.1:8000") == 400
    assert await status(b"evil.example") == 404
    assert await status(b"127.0.0.1:8000@evil.example") == 404
    assert await status(b"127.0.0.1.evil.example") == 404
    assert await status(b"") == 404


@pytest.mark.rfc("6749", "3.2")
@pytest.mark.case("TOK-04")
@pytest.mark.case("INP-17")
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "multipart/form-data; boundary=x",
        "application/json",
        "text/plain",
        "application/x-www-form-urlencoded-not",
        "application/x-www-form-urlencoded; charset=utf-16",
        "application/x-www-form-urlencoded; charset=iso-8859-1",
        "application/x-www-form-urlencoded, text/plain",
    ],
)
async def test_nothing_but_a_plain_form_is_read(embedded: Service, content_type: str | None) -> None:
    """The body is a good form each time; what it is called decides."""
    client = await embedded.a_client()
    body = f"grant_type=client_credentials&client_id={client.id}&client_secret={client.secret}".encode()
    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    answer = await send(embedded, "/token", body, headers=headers)
    assert (answer.status, answer.json["error"]) == (400, "invalid_request")


@pytest.mark.rfc("6749", "3.2")
async def test_the_form_may_say_that_it_is_utf_8(embedded: Service) -> None:
    """Some client libraries add the charset."""
    client = await embedded.a_client()
    for content_type in (
        "application/x-www-form-urlencoded; charset=UTF-8",
        'Application/X-WWW-Form-Urlencoded;charset="utf-8"',
    ):
        answer = await post(
            embedded, "grant_type=client_credentials", client=client, headers={"content-type": content_type}
        )
        assert answer.status_code == 200, answer.text


@pytest.mark.case("TOK-04")
@pytest.mark.case("INP-07")
async def test_uploaded_files_are_no_parameters(service: Service) -> None:
    """Multipart is refused before any part of it is read, be it a password as a file or ten thousand parts."""
    client, user = await service.a_client(), await service.a_user()
    form = {**client.form, "grant_type": "password", "username": user.username}
    before = await written(service)
    answer = await service.http.post("/token", data=form, files={"password": ("p.txt", PASSWORD.encode())})
    refusal(answer, "invalid_request", PASSWORD, user.username)
    many = {f"part{number}": ("a", b"a") for number in range(10_000)}
    refusal(await service.http.post("/token", files=many), "invalid_request")
    assert await written(service) == before


@pytest.mark.rfc("6749", "3.1")
@pytest.mark.case("TOK-05")
async def test_a_request_without_grant_type_is_malformed(embedded: Service, subtests: pytest.Subtests) -> None:
    """An empty parameter counts as an absent one."""
    client = await embedded.a_client()
    for body in ("", "grant_type=", "grant_type", "&&&", "=password", "scope=account:read", "grant_type+=password"):
        with subtests.test(body):
            refusal(await post(embedded, body, client=client), "invalid_request")
    refusal(await embedded.http.post("/token"), "invalid_request")


@pytest.mark.rfc("6749", "5.2")
async def test_an_unknown_grant_type_is_told_apart_from_a_forbidden_one(embedded: Service) -> None:
    """Names are compared exactly; grants this version lacks are unknown, registered or not."""
    device = "urn:ietf:params:oauth:grant-type:device_code"
    client = await embedded.a_client(grant_types=("client_credentials", "authorization_code", device))
    for grant_type in ("magic", "PASSWORD", "client_credentials ", "implicit", "authorization_code", device):
        refusal(await embedded.token(client, grant_type=grant_type), "unsupported_grant_type", grant_type)
    refusal(await embedded.token(client, **PASSWORD_FORM), "unauthorized_client", PASSWORD)
    refusal(await embedded.token(client, grant_type="refresh_token", refresh_token="rt_x"), "unauthorized_client")


REPEATABLE_ONCE = (
    *("grant_type", "client_id", "client_secret", "refresh_token", "code", "code_verifier", "scope", "username"),
    *("password", "redirect_uri", "token", "something_unknown"),
)


@pytest.mark.rfc("6749", "3.2")
@pytest.mark.case("TOK-07")
@pytest.mark.parametrize("name", REPEATABLE_ONCE)
async def test_a_repeated_parameter_is_refused(embedded: Service, name: str) -> None:
    """Equal, different or empty: two readers of one request must never see two different values."""
    client, user = await embedded.a_client(), await embedded.a_user()
    good = [*client.form.items(), ("grant_type", "password"), ("username", user.username), ("password", PASSWORD)]
    first = {"scope": "account:read", **dict(good)}.get(name, CANARY)
    others = [pair for pair in good if pair[0] != name]
    before = await written(embedded)
    for pair in ((first, first), (first, CANARY), (CANARY, first), (first, ""), ("", first)):
        answer = await post(embedded, [*others, *((name, value) for value in pair)])
        refusal(answer, "invalid_request", CANARY, PASSWORD, client.secret or "")
    encoded = "".join(f"%{ord(letter):02x}" for letter in name)
    answer = await post(embedded, [*others, (name, first)])
    assert answer.status_code == 200, "sent once, each of these is fine"
    after_success = await written(embedded)
    body = "&".join(f"{key}={value}" for key, value in others)
    refusal(await post(embedded, f"{body}&{name}={first}&{encoded}={first}"), "invalid_request", PASSWORD)
    assert after_success != before
    assert await written(embedded) == after_success


@pytest.mark.case("TOK-07")
async def test_a_repeated_refresh_token_is_not_consumed(service: Service) -> None:
    """The same token twice in one request is one malformed request, not a reuse."""
    client, user = await service.a_client(), await service.a_user()
    token = (await service.sign_in(client, user))["refresh_token"]
    form = [("grant_type", "refresh_token"), ("refresh_token", token), ("refresh_token", token)]
    refusal(await post(service, form, client=client), "invalid_request", token)
    await accepted(service, client, token)


@pytest.mark.rfc("8707", "2")
@pytest.mark.case("TOK-08")
async def test_resource_and_audience_may_be_repeated(embedded: Service) -> None:
    """Each resource is looked at; `audience` means nothing to these grants."""
    client = await embedded.a_client(audiences=(ISSUER, SIBLING, "https://bills.example"))
    form = [("grant_type", "client_credentials"), ("resource", SIBLING), ("resource", "https://bills.example")]
    answer = await post(embedded, [*form, ("audience", "a"), ("audience", "b")], client=client)
    assert unverified_claims(answer.json()["access_token"])["aud"] == [SIBLING, "https://bills.example"]
    refusal(await post(embedded, [*form, ("resource", "https://no.example")], client=client), "invalid_target")


IN_URL = {
    "grant_type": "refresh_token",
    "client_id": "cl_x",
    "client_secret": CANARY,
    "username": CANARY,
    "password": CANARY,
    "refresh_token": CANARY,
    "scope": "account:read",
    "code": CANARY,
    "token": CANARY,
    "%70assword": CANARY,
}


@pytest.mark.rfc("6749", "2.3.1")
@pytest.mark.case("TOK-09")
async def test_parameters_in_the_url_are_refused_and_never_read(service: Service, subtests: pytest.Subtests) -> None:
    """URLs end up in logs and histories; whoever puts a secret there must notice at once."""
    client, user = await service.a_client(), await service.a_user()
    token = (await service.sign_in(client, user))["refresh_token"]
    whole = f"grant_type=refresh_token&refresh_token={token}&client_id={client.id}&client_secret={client.secret}"
    before = await written(service)
    for name, value in IN_URL.items():
        for path in ("/token", "/revoke"):
            with subtests.test(f"{path} {name}"):
                refusal(await post(service, whole, path=f"{path}?{name}={value}"), "invalid_request", value, token)
    refusal(await post(service, "", path=f"/token?{whole}"), "invalid_request", token)
    assert await written(service) == before
    fine = await post(service, f"grant_type=refresh_token&refresh_token={token}", path="/token?a=b", client=client)
    assert fine.status_code == 200, "what means nothing is ignored, in the URL as in the body"


@pytest.mark.rfc("6749", "3.2")
async def test_unknown_parameters_are_ignored(embedded: Service) -> None:
    """Clients written for other servers send more than we know."""
    client = await embedded.a_client()
    answer = await embedded.token(client, grant_type="client_credentials", nonce="n", foo="bar", state="s" * 1000)
    assert answer.status_code == 200
    assert CANARY not in answer.text


# -- what is too much, or no text -------------------------------------------------------------------------------------


@pytest.mark.case("INP-06")
async def test_many_fields_are_refused_before_they_are_read(embedded: Service) -> None:
    """A hundred will do."""
    client = await embedded.a_client()
    fits = "&".join(["grant_type=client_credentials", *(f"f{number}=1" for number in range(99))])
    assert (await post(embedded, fits, client=client)).status_code == 200
    refusal(await post(embedded, f"{fits}&more=1", client=client), "invalid_request")
    refusal(await post(embedded, "&" * 60_000, client=client), "invalid_request")
    many = "&".join(f"f{number}=1" for number in range(200_000))
    refusal(await post(embedded, many, client=client), "invalid_request", status=413)


@pytest.mark.case("TOK-12")
async def test_a_body_is_at_most_64_kib(embedded: Service) -> None:
    """Announced or not; the limit is exact."""
    client = await embedded.a_client()
    base = "grant_type=client_credentials&padding="
    fits = (base + "x" * (64 * 1024 - len(base))).encode()
    assert (await post(embedded, fits, client=client)).status_code == 200
    refusal(await post(embedded, fits + b"x", client=client), "invalid_request", status=413)
    unannounced = await send(embedded, "/token", [fits[:40_000], fits[40_000:], b"x"])
    assert (unannounced.status, unannounced.json["error"]) == (413, "invalid_request")
    exactly = await send(embedded, "/token", [fits[:1], fits[1:40_000], fits[40_000:], b""])
    assert (exactly.status, exactly.json["error"]) == (401, "invalid_client"), "complete, and read"


@pytest.mark.case("INP-07")
@pytest.mark.parametrize("length", [b"-1", b"+5", b"0x10", b"5,5", b"", b" 5", "٣".encode(), b"9" * 30])
async def test_a_length_that_is_no_number_is_refused(embedded: Service, length: bytes) -> None:
    """Also from a server in front of us that let it pass."""
    answer = await send(embedded, "/token", b"grant_type=password", headers=[FORM, (b"content-length", length)])
    if length == b"":
        assert answer.json["error"] == "invalid_client", "no length, a body in chunks"
    else:
        assert answer.json["error"] == "invalid_request"
    assert answer.status in (400, 401, 413)


async def test_a_body_that_never_comes_is_not_waited_for(embedded: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its first byte nor its last; the connection and the request's memory are given back."""
    monkeypatch.setattr(forms, "_BODY_DEADLINE", 0.05)
    for first in ([], [{"type": "http.request", "body": b"grant_type=", "more_body": True}]):
        answers: list[Any] = []
        messages = list(first)

        async def receive(messages: list[Any] = messages) -> Any:
            if messages:
                return messages.pop(0)
            return await anyio.sleep_forever()

        async def take(message: Any, answers: list[Any] = answers) -> None:
            answers.append(message)

        headers = [(b"host", b"localhost"), FORM, (b"content-length", b"30")]
        scope = {"type": "http", "method": "POST", "path": "/token", "query_string": b"", "headers": headers}
        with anyio.fail_after(30):
            await embedded.app({**scope, "client": ("127.0.0.1", 1), "raw_path": b"/token"}, receive, take)
        assert answers[0]["status"] == 400
        assert b"took too long" in answers[1]["body"]


async def test_a_client_that_hangs_up_gets_no_answer(embedded: Service) -> None:
    """Half a request is none."""
    client = await embedded.a_client()
    before = await written(embedded)
    sent: list[Any] = []
    messages: list[Any] = [
        {
            "type": "http.request",
            "body": f"grant_type=client_credentials&client_id={client.id}".encode(),
            "more_body": True,
        },
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def take(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/token", "query_string": b"", "raw_path": b"/token"}
    await embedded.app({**scope, "headers": [(b"host", b"localhost"), FORM], "client": ("127.0.0.1", 1)}, receive, take)
    assert sent == []
    assert await written(embedded) == before


@pytest.mark.case("INP-03")
@pytest.mark.parametrize("name", ["grant_type", "client_id", "client_secret", "username", "password", "unknown"])
async def test_bytes_that_are_no_utf_8_are_refused(embedded: Service, name: str, subtests: pytest.Subtests) -> None:
    """Replaced or read as Latin-1, two different passwords would become one."""
    client, user = await embedded.a_client(), await embedded.a_user()
    form = {**client.form, "grant_type": "password", "username": user.username, "password": "wrong", "unknown": ""}
    before = await written(embedded)
    for bad in (b"%FF", b"\xff", b"%C0%AF", b"%ED%A0%80", b"\xed\xa0\x80", b"%F8%88%80%80%80", b"a%80", b"%C3", b"%00"):
        with subtests.test(bad.hex()):
            pairs = [f"{key}={value}".encode() for key, value in form.items() if key != name]
            body = b"&".join([*pairs, name.encode() + b"=" + bad])
            refusal(await post(embedded, body), "invalid_request", client.secret or "")
            refusal(await post(embedded, b"&".join([*pairs, bad + b"=x"])), "invalid_request")
    assert await written(embedded) == before


@pytest.mark.case("INP-14")
async def test_a_compressed_body_is_refused_unread(embedded: Service) -> None:
    """We would be the ones to unpack a bomb."""
    client = await embedded.a_client()
    for coding in ("gzip", "deflate", "br", "identity, gzip", "GZIP"):
        answer = await post(embedded, b"\x1f\x8b" + b"\0" * 100, client=client, headers={"content-encoding": coding})
        refusal(answer, "invalid_request")
    both = await send(
        embedded,
        "/token",
        b"grant_type=client_credentials",
        headers=[FORM, (b"content-encoding", b"gzip"), (b"content-encoding", b"identity")],
    )
    assert both.json["error"] == "invalid_request"


@pytest.mark.case("INP-17")
async def test_a_body_of_two_types_is_refused(embedded: Service) -> None:
    """A filter in front of us may have looked at the other one."""
    for second in (b"text/plain", b"application/x-www-form-urlencoded"):
        headers = [(b"content-type", second), FORM]
        answer = await send(embedded, "/token", b"grant_type=client_credentials", headers=headers)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")


@pytest.mark.case("INP-16")
async def test_the_answer_is_json_whatever_is_asked_for(embedded: Service) -> None:
    """There is only one kind of answer to a client."""
    client = await embedded.a_client()
    for accept in ("*/*", "text/html", "application/xml", "garbage;;;q=x", "", "text/html;q=1, */*;q=0"):
        headers = {"accept": accept, "accept-language": "de," * 3000}
        good = await embedded.token(client, headers=headers, grant_type="client_credentials")
        assert (good.status_code, good.headers["content-type"]) == (200, "application/json")
        refusal(await embedded.token(client, headers=headers, grant_type="x"), "unsupported_grant_type")


# -- scope ------------------------------------------------------------------------------------------------------------

MALFORMED = (
    *("account:read  orders:read", " account:read", "account:read ", " ", 'account:"read"', "account:\\read"),
    *("account:read\torders:read", "account:read\norders:read", "\x01", "\x7f", "läuft", "\u200b", "a" * 129),
    *("account:read\u00a0orders:read", " ".join(f"s{number}" for number in range(101))),
    " ".join(f"s{number}" for number in range(5000)),
)


@pytest.mark.rfc("6749", "3.3")
@pytest.mark.case("TOK-15")
async def test_a_malformed_scope_is_refused(embedded: Service, subtests: pytest.Subtests) -> None:
    """Only single spaces between words of the grammar; and not more words than any client has."""
    client = await embedded.a_client()
    for number, scope in enumerate(MALFORMED):
        with subtests.test(str(number)):
            answer = await embedded.token(client, grant_type="client_credentials", scope=scope)
            refusal(answer, "invalid_scope", scope)
    huge = await embedded.token(client, grant_type="client_credentials", scope="a " * 500_000)
    refusal(huge, "invalid_request", status=413)


@pytest.mark.rfc("6749", "3.3")
@pytest.mark.case("TOK-16")
@pytest.mark.parametrize("grant_type", ["client_credentials", "password"])
async def test_a_scope_the_client_may_not_have_is_refused(
    embedded: Service, grant_type: str, subtests: pytest.Subtests
) -> None:
    """Words are compared whole and exactly; a wider wish is refused, not silently cut."""
    client = await embedded.a_client(scope=("account:read", "orders:read"))
    user = await embedded.a_user()
    form = {"grant_type": grant_type, "username": user.username, "password": PASSWORD}
    before = await written(embedded)
    for scope in (
        *("account:write", "*", "ACCOUNT:READ", "Account:read", "account", "account:", "account:read:all", "account:*"),
        *("account:read account:write", "orders:read admin", "account:read,orders:read", "openid", "offline_access"),
    ):
        with subtests.test(scope):
            refusal(await embedded.token(client, **form, scope=scope), "invalid_scope", scope)
    assert await written(embedded) == before
    narrowed = await embedded.token(client, **form, scope="orders:read orders:read")
    assert narrowed.json()["scope"] == unverified_claims(narrowed.json()["access_token"])["scope"] == "orders:read"


# -- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.rfc("6749", "5.1")
async def test_a_token_answer_is_not_cacheable_json(embedded: Service) -> None:
    """The members, their types, and the headers of §5.1."""
    client, user = await embedded.a_client(), await embedded.a_user()
    answer = await embedded.token(client, grant_type="password", username=user.username, password=PASSWORD)
    assert answer.headers["content-type"] == "application/json"
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    body = answer.json()
    assert set(body) == {"access_token", "token_type", "expires_in", "refresh_token", "scope"}
    assert body["token_type"] == "Bearer"
    assert 570 <= body["expires_in"] <= 600
    claims = unverified_claims(body["access_token"])
    assert claims["exp"] - claims["iat"] == body["expires_in"]


@pytest.mark.rfc("6749", "5.2")
@pytest.mark.case("TOK-11")
@pytest.mark.case("TOK-12")
@pytest.mark.case("INP-11")
async def test_no_refusal_repeats_what_was_sent(service: Service, subtests: pytest.Subtests) -> None:
    """Every way to be refused, with a value that would be noticed, and with what splits headers or breaks JSON."""
    client, user = await service.a_client(), await service.a_user()
    other = await service.a_client(grant_types=("client_credentials",))
    public = await service.a_client(public=True)
    good = {"grant_type": "password", "username": user.username, "password": PASSWORD}
    for evil in (
        CANARY,
        f'{CANARY}","x":"',
        f"{CANARY}\r\nSet-Cookie: a=b",
        f"<script>{CANARY}",
        f"{CANARY}' OR 1=1--",
    ):
        long = evil + "x" * 3000
        cases: list[tuple[str, int, Registered | None, dict[str, str]]] = [
            ("invalid_request", 400, client, {evil: evil}),
            ("unsupported_grant_type", 400, client, {"grant_type": evil}),
            ("unauthorized_client", 400, other, {**good, "username": evil, "password": evil}),
            ("invalid_client", 401, Registered(evil.split("\r")[0], evil), {"grant_type": "client_credentials"}),
            (
                "invalid_client",
                401,
                None,
                {"grant_type": "client_credentials", "client_id": evil, "client_secret": evil},
            ),
            ("invalid_client", 401, public, {**good, "client_secret": evil}),
            ("invalid_grant", 400, client, {**good, "username": evil}),
            ("invalid_grant", 400, client, {**good, "password": evil}),
            ("invalid_request", 400, client, {**good, "password": long}),
            ("invalid_grant", 400, client, {**good, "username": long}),
            ("invalid_scope", 400, client, {**good, "scope": evil}),
            ("invalid_scope", 400, client, {**good, "scope": f"{CANARY}:read"}),
            ("invalid_target", 400, client, {**good, "resource": evil}),
            ("invalid_target", 400, client, {**good, "resource": f"https://{CANARY}.example/"}),
            ("invalid_grant", 400, client, {"grant_type": "refresh_token", "refresh_token": evil}),
            ("invalid_request", 400, client, {"grant_type": "refresh_token", "token": evil}),
        ]
        for number, (code, status, caller, form) in enumerate(cases):
            with subtests.test(f"{evil} {number} {code}"):
                answer = await service.token(caller, **form)
                refusal(answer, code, CANARY, PASSWORD, client.secret or "", status=status)
        key = await service.token(
            client,
            headers={"idempotency-key": evil.split("\r")[0] * 20},
            grant_type="refresh_token",
            refresh_token="rt_x",
        )
        refusal(key, "invalid_request", CANARY)


@pytest.mark.case("TOK-12")
@pytest.mark.case("INP-17")
async def test_a_json_body_is_refused_without_a_look(embedded: Service) -> None:
    """The framework's own answer would have repeated it."""
    client = await embedded.a_client()
    for body in ({"password": {"a": CANARY}}, {"grant_type": "password", "password": CANARY}, [CANARY], CANARY, None):
        refusal(await embedded.http.post("/token", json=body, auth=client.auth), "invalid_request", CANARY)


@pytest.mark.rfc("6749", "5.2")
@pytest.mark.case("TOK-11")
async def test_a_fault_of_ours_says_nothing_about_itself(embedded: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is in our log."""
    client = await embedded.a_client()

    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"SELECT {CANARY}")

    monkeypatch.setattr(Database, "run", broken)
    answer = await embedded.token(client, **PASSWORD_FORM)
    assert (answer.status_code, answer.json()["error"]) == (500, "server_error")
    assert answer.headers["cache-control"] == "no-store"
    assert CANARY not in answer.text
    assert "Runtime" not in answer.text


@pytest.mark.rfc("7009", "2.2.1")
@pytest.mark.case("OPS-01")
async def test_an_outage_never_tells_a_client_that_its_tokens_are_bad(
    service: Service, database_url: str, postgres_server: PostgresServer
) -> None:
    """A client that hears `invalid_grant` throws its refresh token away; the documents need no database."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    postgres_server.drop_database(database_url.rsplit("/", 1)[1])
    for form in (
        {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]},
        {"grant_type": "password", "username": user.username, "password": PASSWORD},
        {"grant_type": "password", "username": "nobody", "password": PASSWORD},
    ):
        refusal(await service.token(client, **form), "temporarily_unavailable", status=503)
    revoked = await service.http.post("/revoke", data={"token": tokens["refresh_token"]}, auth=client.auth)
    refusal(revoked, "temporarily_unavailable", status=503)
    service.clock.advance(2)  # nothing is remembered about the client any more
    cached = await service.token(client, grant_type="client_credentials")
    refusal(cached, "temporarily_unavailable", status=503)
    assert (await service.me(tokens["access_token"])).status_code == 503
    assert (await service.http.get("/.well-known/jwks.json")).status_code == 200
    assert (await service.http.get("/.well-known/oauth-authorization-server")).status_code == 200
    assert (await service.http.get("/healthz")).status_code == 200
    assert (await service.http.get("/readyz")).status_code == 503


# -- browsers and headers ---------------------------------------------------------------------------------------------


@pytest.mark.rfc("9700", "2.6")
@pytest.mark.case("TOK-14")
async def test_no_script_of_another_origin_reads_an_answer(embedded: Service) -> None:
    """Neither an answer nor a preflight names an origin that the client does not have."""
    client = await embedded.a_client(public=True, cors_origins=("https://app.example",))
    user = await embedded.a_user()
    for origin in ("https://evil.example", "null", "https://app.example.evil.example", "http://app.example"):
        headers = {"origin": origin}
        good = await embedded.token(
            client, headers=headers, grant_type="password", username=user.username, password=PASSWORD
        )
        bad = await embedded.token(client, headers=headers, grant_type="x")
        asked = {**headers, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await embedded.http.options("/token", headers=asked)
        assert good.status_code == 200
        for answer in (good, bad, preflight, await embedded.http.get("/v1/users/me", headers=headers)):
            assert "access-control-allow-origin" not in answer.headers
            assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.case("INP-23")
async def test_every_answer_carries_the_protective_headers(sqlite_url: str) -> None:
    """Good, refused, missing or broken; and none says what it was made with."""
    settings = test_settings(
        sqlite_url,
        environment="production",
        allow_sqlite=True,
        issuer="https://id.example",
        argon2_memory_kib=19456,
        argon2_time_cost=2,
        refusal_delay=0.1,
    )
    async with running(settings) as service:
        client = await service.a_client(audiences=())
        answers = [
            await service.token(client, grant_type="client_credentials"),
            await service.token(client, grant_type="x"),
            await service.http.get("/token"),
            await service.http.get("/nothing"),
            await service.http.get("/docs"),
            await service.http.get("/openapi.json"),
            await service.http.get("/metrics"),
            await service.http.get("/v1/users/me"),
            await service.http.get("/.well-known/jwks.json"),
            await service.http.get("/healthz"),
            await service.http.get("/readyz"),
            await service.http.get("/token", headers={"host": "evil.example"}),
            await service.http.get("/" + "x" * 9000),
        ]
        statuses = [answer.status_code for answer in answers]
        assert statuses == [200, 400, 405, 404, 404, 404, 404, 401, 200, 200, 200, 404, 414]
    for answer in answers:
        headers = answer.headers
        assert headers["strict-transport-security"].startswith("max-age=31536000")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert len(headers["x-request-id"]) == 16
        assert "server" not in headers
        assert "x-powered-by" not in headers


# -- the client of development ----------------------------------------------------------------------------------------


async def test_the_default_client_stands_in_where_none_is_named(sqlite_url: str) -> None:
    """Only at the token endpoint, only when nothing at all is said about a client, and only for a public one."""
    async with running(test_settings(sqlite_url)) as service:
        public, confidential = await service.a_client(public=True), await service.a_client()
        user = await service.a_user()
    form = {"grant_type": "password", "username": user.username, "password": PASSWORD}
    async with running(test_settings(sqlite_url, default_client_id=public.id)) as service:
        answer = await service.token(None, **form)
        assert unverified_claims(answer.json()["access_token"])["client_id"] == public.id
        refusal(await service.token(None, **form, client_secret="x"), "invalid_client", status=401)
        refusal(await service.token(Registered("cl_x", "x"), **form), "invalid_client", status=401)
        revoked = await service.http.post("/revoke", data={"token": answer.json()["refresh_token"]})
        refusal(revoked, "invalid_client", status=401)
    for unfit in (confidential.id, "cl_0000000000000000000000"):
        with pytest.raises(UnsafeSettings, match="public first-party client"):
            async with running(test_settings(sqlite_url, default_client_id=unfit)):
                pass
    async with running(test_settings(sqlite_url)) as service:
        refusal(await service.token(None, **form), "invalid_client", status=401)


@pytest.mark.rfc("9700", "2.4")
async def test_the_password_grant_is_refused_to_a_client_of_somebody_else(embedded: Service) -> None:
    """Even if its registration says it may: the fence does not hang on one record."""
    client, user = await embedded.a_client(), await embedded.a_user()
    await embedded.execute(update(clients).where(clients.c.id == client.id).values(first_party=False))
    embedded.clock.advance(2)
    before = await written(embedded)
    answer = await embedded.token(client, grant_type="password", username=user.username, password=PASSWORD)
    refusal(answer, "unauthorized_client", PASSWORD)
    assert await written(embedded) == before
