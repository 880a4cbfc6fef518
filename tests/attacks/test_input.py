"""What no client sends, at every endpoint: never a fault, never a redirect, never a word about the inside."""

import gzip
import random
import re
from collections import Counter

import httpx2
import pytest

from identity_service.accounts.clients import InvalidClientMetadata, NewClient
from identity_service.infra.database import Database
from tests.support.asking import ask
from tests.support.service import PASSWORD, Service
from tests.support.wire import FORM, send

SEED = 20260202
TARGETS = 4000
CANARY = "canary-4711-of-the-caller"
FORMS = ("/token", "/revoke", "/introspect")
_DETAIL = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]+")


# -- bodies of forms --------------------------------------------------------------------------------------------------


@pytest.mark.case("INP-03")
@pytest.mark.parametrize(
    "value", [b"%FF", b"\xff", b"%C0%AF", b"%ED%A0%80", b"\xed\xa0\x80", b"%F4%90%80%80", b"%C3", b"a%00b", b"\0"]
)
@pytest.mark.parametrize("path", FORMS)
async def test_a_form_is_utf_8_without_nul(embedded: Service, path: str, value: bytes) -> None:
    """In a value or in a name, of a parameter that matters or of one that is ignored."""
    client = await embedded.a_client(introspect=("https://orders.example",))
    good = f"client_id={client.id}&client_secret={client.secret}&token=x&grant_type=client_credentials".encode()
    assert (await send(embedded, path, good)).status == 200
    for body in (good + b"&other=" + value, good + b"&" + value + b"=x", good.replace(b"token=x", b"token=" + value)):
        answer = await send(embedded, path, body)
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")
        assert set(answer.json) == {"error", "error_description"}


MULTIPART = b"".join(
    b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\nb\r\n' % number for number in range(999)
)


@pytest.mark.case("INP-07")
@pytest.mark.case("INP-14")
@pytest.mark.parametrize("path", FORMS)
async def test_what_is_not_a_plain_form_is_not_unpacked(embedded: Service, path: str) -> None:
    """Parts without number or end, a boundary without end, a small body that would unpack to a large one."""
    bomb = gzip.compress(b"a" * 10_000_000)
    kinds = (
        ([(b"content-type", b"multipart/form-data; boundary=x")], MULTIPART),
        ([(b"content-type", b"multipart/form-data; boundary=x")], b"--x\r\nX-Endless: " + b"a" * 60_000),
        ([(b"content-type", b"multipart/form-data; boundary=" + b"x" * 30_000)], MULTIPART),
        ([(b"content-type", b"multipart/form-data")], MULTIPART),
        ([(b"content-type", b"multipart/mixed; boundary=x"), FORM], MULTIPART),
        ([FORM, (b"content-encoding", b"gzip")], bomb),
        ([FORM, (b"content-encoding", b"identity, gzip")], bomb),
        ([FORM, (b"content-encoding", b"GZIP")], bomb),
        ([FORM, (b"transfer-encoding", b"gzip, chunked")], bomb),
    )
    for headers, body in kinds:
        answer = await send(embedded, path, body, headers=headers)
        assert answer.status == 400
        assert answer.json["error"] == "invalid_request"
    large = await send(
        embedded, path, [MULTIPART * 20], headers=[(b"content-type", b"multipart/form-data; boundary=x")]
    )
    assert large.status in (400, 413)
    boundary = [(b"content-type", b"multipart/form-data; boundary=" + b"x" * 1_000_000)]
    assert (await send(embedded, path, MULTIPART, headers=boundary)).status == 431


# -- what is answered -------------------------------------------------------------------------------------------------

ACCEPTS = (
    *("*/*", "text/html", "application/xml", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1", "", ";;;=,", "\xff"),
    *("application/json;q=0", "image/png", "a" * 4000, "text/html, " * 300),
)


async def refusals(service: Service, headers: dict[str, str]) -> dict[str, httpx2.Response]:
    """Return one answer of each kind that is no success."""
    http = service.http
    form = {"grant_type": CANARY, "username": CANARY, "password": CANARY}
    return {
        "400 form": await http.post(
            "/token", data={**form, "client_id": ""}, headers=headers, params={"scope": CANARY}
        ),
        "400 host": await http.get("/token", headers=[*headers.items(), ("host", "127.0.0.1"), ("host", CANARY)]),
        "401 client": await http.post("/token", data={**form, "client_id": CANARY}, headers=headers),
        "401 bearer": await http.get("/v1/users/me", headers={**headers, "authorization": f"Bearer {CANARY}"}),
        "404 path": await http.get(f"/{CANARY}", params={"x": CANARY}, headers=headers),
        "404 host": await http.get("/token", headers={**headers, "host": f"{CANARY}.example"}),
        "404 spelling": await http.get(f"/{CANARY}/", headers=headers),
        "405 endpoint": await http.get("/token", params={"x": CANARY}, headers=headers),
        "405 route": await http.put("/v1/users/me", content=CANARY, headers=headers),
        "413": await http.post("/token", data={**form, "x": "x" * 70_000}, headers=headers),
        "414": await http.get(f"/{CANARY * 500}", headers=headers),
        "431": await http.get("/token", headers={**headers, "x-a": CANARY * 1500}),
    }


@pytest.mark.case("SEC-10")
@pytest.mark.case("INP-16")
async def test_every_refusal_is_json_with_an_id_and_nothing_of_the_inside(
    embedded: Service, subtests: pytest.Subtests
) -> None:
    """Whatever form or language is asked for; what was sent is not said again."""
    for accept in ACCEPTS:
        headers = {"accept": accept.encode("latin-1"), "accept-language": "de-DE, " * 700}
        for name, answer in (await refusals(embedded, headers)).items():  # type: ignore[arg-type]  # bytes will do
            with subtests.test(accept=accept[:20], name=name):
                assert answer.status_code == int(name[:3])
                assert answer.headers["content-type"] in ("application/json", "application/problem+json")
                assert answer.headers["cache-control"] == "no-store"
                assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
                body = answer.json()
                assert set(body) in ({"error", "error_description"}, {"type", "title", "status"})
                assert all(_DETAIL.fullmatch(str(value)) for value in body.values())
                told = answer.text.lower() + repr(answer.headers).lower()
                for word in (CANARY, "traceback", "uvicorn", "starlette", "fastapi", "python", ".py", "sql", "<html"):
                    assert word not in told


@pytest.mark.case("SEC-10")
@pytest.mark.case("INP-23")
@pytest.mark.parametrize("path", ["/token", "/v1/users/me", "/readyz"])
async def test_a_fault_of_ours_is_as_silent(embedded: Service, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Whether an endpoint before the framework fails or a route behind it."""
    client, user = await embedded.a_client(), await embedded.a_user()
    token = (await embedded.sign_in(client, user))["access_token"]
    embedded.clock.advance(2)  # type: ignore[attr-defined]  # the tests' own clock

    def broken(*_: object) -> None:
        raise RuntimeError(f"{CANARY} in users.password_hash")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "transaction", broken)
        patched.setattr(Database, "revision", broken)
        form = {"grant_type": "password", "username": user.username, "password": PASSWORD}
        if path == "/token":
            answer = await embedded.token(client, headers={"accept": "text/html"}, **form)
        else:
            headers = {"accept": "text/html", "authorization": f"Bearer {token}"}
            answer = await embedded.http.get(path, headers=headers)
    assert answer.status_code == 500
    assert answer.headers["content-type"] in ("application/json", "application/problem+json")
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "recorded" in answer.text
    for word in (CANARY, "password_hash", "runtimeerror", "traceback"):
        assert word not in answer.text.lower()


# -- any target at all ------------------------------------------------------------------------------------------------

PIECES = (
    *(b"/", b"//", b"v1", b"users", b"me", b"token", b".well-known", b"jwks.json", b"docs", b"admin", b"healthz"),
    *(b".", b"..", b"%2e", b"%2f", b"%5c", b"%00", b"%FF", b"%25", b"%C3%A9", b"%ED%A0%80", b"%0d%0a", b"%zz", b"%"),
    *(b";", b"=", b"&", b"?", b"#", b"+", b"*", b"~", b"{}", b"'", b'"', b"<x>", b"\\", b"|", b"^", b"`", b"[", b"]"),
    *(b"0192f0c0-0000-7000-8000-000000000000", b"0192F0C0", b"-1", b"9" * 400, b"a" * 9000, b"limit=-1", b"cursor=%00"),
)


@pytest.mark.case("INP-24")
@pytest.mark.case("INP-13")
@pytest.mark.case("INP-18")
async def test_no_target_at_all_is_a_fault_or_leads_elsewhere(embedded: Service) -> None:
    """The same thousands in each run, with every method; most of what begins as a real path goes on as none."""
    pick = random.Random(SEED)  # noqa: S311  # the point is that it is the same every time
    beginnings = (b"/", b"/v1/", b"/v1/users/", b"/v1/users/me", b"/token", b"/.well-known/", b"/docs", b"")
    seen: Counter[int] = Counter()
    for _ in range(TARGETS):
        target = pick.choice(beginnings) + b"".join(pick.choice(PIECES) for _ in range(pick.randrange(5)))
        method = pick.choice(("GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"))
        peer = f"198.51.{pick.randrange(256)}.{pick.randrange(256)}"  # what one of them uses up is another matter
        answer = await ask(embedded.app, target, (b"origin", b"https://evil.example"), method=method, peer=peer)
        assert answer.status < 500, target
        assert not 300 <= answer.status < 400, target
        assert answer.header("location") is None
        assert answer.header("x-content-type-options") == "nosniff"
        assert len(answer.header("x-request-id") or "") == 16
        seen[answer.status] += 1
    assert all(seen[status] > 10 for status in (200, 400, 401, 404, 405, 414)), seen


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.case("INP-21")
@pytest.mark.parametrize(
    "name",
    [
        "a\u202eb",
        "\u200b",
        "a\u200db",
        "a\u2066b",
        "a\ufeffb",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "a\u2028b",
        "\ud800",
        "",
        "\xa0",
    ],
    ids=[
        "rtl",
        "zero width",
        "joiner",
        "isolate",
        "bom",
        "nul",
        "newline",
        "escape",
        "line",
        "surrogate",
        "none",
        "nbsp",
    ],
)
def test_a_clients_name_holds_no_tricks(name: str) -> None:
    """It is shown to people who decide by it."""
    with pytest.raises(InvalidClientMetadata, match="printable"):
        NewClient(name=name).check()


@pytest.mark.case("INP-21")
async def test_a_clients_name_is_bounded_and_kept_as_it_is(embedded: Service) -> None:
    """A thousand marks on one letter are too many; two hundred characters of any script come back as they were."""
    with pytest.raises(InvalidClientMetadata, match="200"):
        NewClient(name="a" + "\u0301" * 1000).check()
    for name in ("a" + "\u0301" * 199, "\u05e9\u05dc\u05d5\u05dd", "\U0001f511" * 200):
        client = await embedded.a_client(name=name)
        found = await embedded.within(lambda tx, wanted=client.id: embedded.services.clients.find(tx, wanted))
        assert found is not None
        assert found.name == name
