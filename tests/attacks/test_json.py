"""Bodies of the JSON API are read strictly: whatever comes is an answer, soon, and never an echo."""

import json
import time
from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.support.people import Person, signed_in
from tests.support.service import Service, running, test_settings

JSON = {"content-type": "application/json"}
MARK = "zebra"  # what is sent must not come back

NOT_JSON = {
    "nothing": b"",
    "garbage": b"{zebra",
    "trailing garbage": b'{"name":"Mika"} zebra',
    "two values": b'{"name":"Mika"}{"name":"zebra"}',
    "single quotes": b"{'name':'zebra'}",
    "a comment": b'{"name":"Mika"/*zebra*/}',
    "a trailing comma": b'{"name":"zebra",}',
    "NaN": b'{"name":NaN}',
    "Infinity": b'{"name":-Infinity}',
    "UTF-16": '{"name":"zebra"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"name":"zebra"}'.encode("utf-16-le"),
    "a byte order mark": b'\xef\xbb\xbf{"name":"zebra"}',
    "Latin-1": '{"name":"zébra"}'.encode("latin-1"),
    "an overlong slash": b'{"name":"zebra\xc0\xaf"}',
    "a raw control character": b'{"name":"zebra\n"}',
    "deeper than any stack": b'{"name":' * 100_000 + b"1" + b"}" * 100_000,
}
NOT_MEANT = {
    "a lone surrogate": b'{"name":"zebra\\ud800"}',
    "a lone surrogate as a member": b'{"zebra\\udfff":1}',
    "NUL": b'{"name":"zebra\\u0000"}',
    "a member twice": b'{"name":"Mika","name":"zebra"}',
    "a member twice, spelt otherwise": b'{"name":"Mika","\\u006eame":"zebra"}',
    "a number of 5,000 digits": b'{"name":' + b"9" * 5000 + b"}",
    "a number no float holds": b'{"name":1e999}',
    "a long fraction": b'{"name":0.' + b"1" * 5000 + b"}",
    "an array": b'["zebra"]',
    "null": b"null",
    "a text": b'"zebra"',
    "a number": b"7",
    "an unknown member": b'{"zebra":true}',
    "__proto__": b'{"__proto__":{"role":"super_admin"}}',
    "nested in a text's place": b'{"name":{"name":"zebra"}}',
    "nine deep": b'{"name":' * 9 + b"1" + b"}" * 9,
    "a number for a text": b'{"name":5}',
    "true for a text": b'{"name":true}',
}


@pytest.fixture
async def mika(embedded: Service) -> Person:
    return await signed_in(embedded, await embedded.a_user("mika"))


async def patch(mika: Person, body: bytes, headers: dict[str, str]) -> httpx2.Response:
    """Change the profile with these very bytes."""
    return await mika.service.http.patch("/v1/users/me", content=body, headers={**mika.headers, **headers})


async def refused(mika: Person, body: bytes, headers: dict[str, str] = JSON) -> httpx2.Response:
    """Return the refusal of a body, which came soon, repeats nothing and changed nothing."""
    began = time.perf_counter()
    answer = await patch(mika, body, headers)
    assert time.perf_counter() - began < 30  # the listed attacks take minutes where they work
    assert answer.headers["content-type"] == "application/problem+json"
    assert MARK not in answer.text
    assert (await mika("GET")).json()["name"] is None
    return answer


@pytest.mark.case("INP-04")
@pytest.mark.parametrize("kind", NOT_JSON)
async def test_what_is_not_json_is_refused_as_such(mika: Person, kind: str) -> None:
    answer = await refused(mika, NOT_JSON[kind])
    # An empty body is a missing one; one beyond the limit is not read at all.
    expected = {"nothing": 422, "deeper than any stack": 413}.get(kind, 400)
    assert answer.status_code == expected, answer.text


@pytest.mark.case("INP-02")
@pytest.mark.case("INP-04")
@pytest.mark.parametrize("kind", NOT_MEANT)
async def test_json_that_cannot_be_meant_is_refused(mika: Person, kind: str) -> None:
    assert (await refused(mika, NOT_MEANT[kind])).status_code == 422


@pytest.mark.case("INP-02")
@pytest.mark.parametrize("half", [r"\ud800", r"a\udfffb", r"\udc00\ud800", r"\u0000"])
@pytest.mark.parametrize("member", ["current_password", "new_password"])
async def test_half_a_character_is_no_password(mika: Person, member: str, half: str) -> None:
    """Which would be hashed as bytes, and has none; nor has any hash algorithm a use for NUL."""
    body = {"current_password": "a long enough one", "new_password": "another that is long", member: "HALF"}
    sent = json.dumps(body).replace("HALF", half + " of a long password").encode()
    headers = {**mika.headers, **JSON}
    answer = await mika.service.http.post("/v1/users/me/password", content=sent, headers=headers)
    assert (answer.status_code, "cannot be stored" in answer.text) == (422, True), answer.text


@pytest.mark.case("INP-04")
async def test_json_that_is_as_deep_as_the_limit_on_size_allows_is_refused(mika: Person) -> None:
    """The reader's own limit on recursion must not become a fault of ours."""
    assert (await refused(mika, b"[" * 30_000 + b"]" * 30_000)).status_code in (400, 422)


@pytest.mark.case("INP-04")
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
async def test_a_text_of_ten_megabytes_is_not_read(mika: Person, announced: bool) -> None:
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        yield b'{"name":"'
        for _ in range(1000):
            read += 10_000
            yield b"z" * 10_000
        yield b'"}'

    length = {"content-length": "10000011"} if announced else {}
    answer = await mika.service.http.patch("/v1/users/me", content=chunks(), headers={**mika.headers, **JSON, **length})
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    assert read <= 1_000_000


@pytest.mark.case("ADM-11")
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "json",
        "",
        None,
    ],
)
async def test_json_must_be_sent_as_json(mika: Person, content_type: str | None) -> None:
    """A page of another site can send the first three without asking (Fetch, CORS-safelisted); nothing reads them."""
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await refused(mika, b'{"name":"Mika"}', headers)
    assert (answer.status_code, answer.json()["title"]) == (415, "The body must be sent as application/json.")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
async def test_how_the_type_is_written_does_not_matter(mika: Person, content_type: str) -> None:
    """RFC 9110 §8.3.1; JSON is UTF-8 whatever a parameter says (RFC 8259 §8.1)."""
    answer = await patch(mika, b'{"name":"Mika"}', {"content-type": content_type})
    assert (answer.status_code, answer.json()["name"]) == (200, "Mika")


@pytest.fixture
async def api(sqlite_url: str) -> AsyncIterator[Service]:
    async with running(test_settings(sqlite_url, registration="open")) as service:
        yield service


async def test_a_refusal_says_what_would_be_right(api: Service) -> None:
    """From the route's own rules: members, bounds, forms."""
    mika = await signed_in(api, await api.a_user("mika"))

    async def said(method: str, path: str, json: object = None) -> dict[str, str]:
        answer = await api.http.request(method, path, json=json, headers=mika.headers)
        assert answer.status_code == 422, answer.text
        return {fault["pointer"]: fault["detail"] for fault in answer.json()["errors"]}

    assert await said("PATCH", "/v1/users/me", {"nmae": "x"}) == {
        "": "has a member that is not known; known: name, username"
    }
    assert await said("GET", "/v1/users/me/sessions?limit=1000") == {"/limit": "must be at most 100"}
    assert await said("GET", "/v1/users/me/sessions?limit=x") == {"/limit": "must be a whole number"}
    assert await said("POST", "/v1/users/me/api-keys", {"name": "k", "scope": [], "expires_at": "tomorrow"}) == {
        "/scope": "must have at least 1 items",
        "/expires_at": "must be an instant of RFC 3339, as 2030-01-31T12:00:00Z",
    }
    assert await said("DELETE", "/v1/users/me/sessions/first") == {"/session_id": "must be a UUID"}
    assert await said("PATCH", "/v1/users/me", {"username": "u" * 300}) == {
        "/username": "must have at most 254 characters"
    }
