"""The pages that mailed links open."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from urllib.parse import urlencode

import httpx2
import pytest
from sqlalchemy import select, update

from identity_service.accounts.recovery import Recovery
from identity_service.infra.database import DatabaseUnavailable
from identity_service.infra.tables import email_tokens, users
from tests.support.people import an_app, link, mails, signed_in
from tests.support.service import PASSWORD, Service, running, test_settings
from tests.support.wire import FORM, send

NEW = "a quite different phrase"
DEAD = "This link is no longer good."
PAGES = {"/verify-email": "verify_email", "/change-email": "change_email", "/reset-password": "reset_password"}


@pytest.fixture
async def people(any_url: str) -> AsyncIterator[Service]:
    """The service with its pages."""
    async with running(test_settings(any_url, service_name='Lab & "Portal" <b>')) as service:
        yield service


class Page(HTMLParser):
    """What a browser makes of a page: its words, its forms' fields, and everything it would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.forms: list[dict[str, str | None]] = []
        self.fields: dict[str, str | None] = {}
        self.styles: list[str] = []
        self.foreign: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = tag
        if tag == "form":
            self.forms.append(given)
        elif tag == "input":
            self.fields[given["name"] or ""] = given.get("value")
        if tag in ("script", "img", "link", "iframe", "object", "base", "a") or given.keys() & {"src", "href", "style"}:
            self.foreign.append(tag)
        self.foreign += [name for name in given if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.styles.append(data)
        elif data.strip():
            self.words.append(data.strip())


def seen(answer: httpx2.Response, status: int = 200) -> Page:
    """Return a page, after looking at what every page must be: complete in itself, and nothing to keep."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8"), answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    page = Page(answer.text)
    assert page.foreign == []
    [style] = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    [policy] = answer.headers.get_list("content-security-policy")
    assert set(policy.split("; ")) == {
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    }
    assert 'Lab & "Portal" <b>' in page.words
    return page


async def a_link(service: Service, path: str) -> str:
    """Return a token for a page, of a user `mika` with an unproven address."""
    user = await service.a_user("mika", verified=False)
    if path == "/change-email":
        mika = await signed_in(service, user)
        await mika("POST", "/email", {"email": "new@example.org", "password": PASSWORD})
        return await link(service, "new@example.org", "change_email")
    what = "password-reset" if path == "/reset-password" else "email-verification"
    await service.http.post(f"/v1/{what}", json={"email": user.email})
    return await link(service, user.email, PAGES[path])


async def post(service: Service, path: str, **fields: str) -> httpx2.Response:
    """Press the button of a form."""
    return await service.http.post(path, data=fields)


async def held_about(service: Service) -> tuple[list[object], ...]:
    """Return all that a page could have changed."""
    return (await service.execute(select(users)), await service.execute(select(email_tokens)))


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-26")
@pytest.mark.parametrize("path", PAGES)
async def test_opening_a_link_uses_nothing(people: Service, path: str) -> None:
    """However often, and by whom: scanners open links before people do. The form sends the token to the same page."""
    token = await a_link(people, path)
    before = await held_about(people)
    for _ in range(3):
        page = seen(await people.http.get(path, params={"token": token}))
        assert page.forms == [{"method": "post", "action": path}]
        assert page.fields["token"] == token
        assert (await people.http.head(path, params={"token": token})).status_code in (200, 405)
    assert await held_about(people) == before
    assert [row.event for name in ("email.verified", "email.changed") for row in await people.events(name)] == []


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_knows_only_links_of_its_own_kind(people: Service, path: str) -> None:
    """What is none, or another's, is no longer good, whatever it is; nothing of it is on the page."""
    tokens = {path: await a_link(people, path)}
    other = "/reset-password" if path != "/reset-password" else "/verify-email"
    what = "password-reset" if other == "/reset-password" else "email-verification"
    await people.http.post(f"/v1/{what}", json={"email": "mika@example.org"})
    tokens[other] = await link(people, "mika@example.org", PAGES[other])
    for wrong in (tokens[other], tokens[path][:-1], '"><script>alert(1)</script>', "\u00e9", "\0", ""):
        answer = await people.http.get(path, params={"token": wrong})
        assert DEAD in seen(answer, 400).words
        assert not wrong or wrong not in answer.text
    for query in ("", f"?token={tokens[path]}&token={tokens[path]}", f"?TOKEN={tokens[path]}"):
        assert DEAD in seen(await people.http.get(path + query), 400).words


# -- pressing ---------------------------------------------------------------------------------------------------------


async def test_an_address_is_proven_by_pressing_the_button(people: Service) -> None:
    """Once; the second time the link is no longer good."""
    token = await a_link(people, "/verify-email")
    assert "Done" in seen(await post(people, "/verify-email", token=token)).words
    assert DEAD in seen(await post(people, "/verify-email", token=token), 400).words
    assert DEAD in seen(await people.http.get("/verify-email", params={"token": token}), 400).words
    [(proven,)] = await people.execute(select(users.c.email_verified_at))
    assert proven == people.clock.now()


async def test_a_new_address_is_proven_by_pressing_the_button(people: Service) -> None:
    """And is the account's from then on; the old one is told."""
    token = await a_link(people, "/change-email")
    await people.execute(update(users).values(email_verified_at=people.clock.now()))
    assert "Done" in seen(await post(people, "/change-email", token=token)).words
    assert [email for (email,) in await people.execute(select(users.c.email))] == ["new@example.org"]
    assert ("email_changed", "mika@example.org") in await mails(people)


async def test_an_address_that_was_taken_meanwhile_is_told_on_the_page(people: Service) -> None:
    """409, as a page."""
    token = await a_link(people, "/change-email")
    await people.a_user("new")
    page = seen(await post(people, "/change-email", token=token), 409)
    assert "The address belongs to another account meanwhile." in page.words


async def test_a_password_is_chosen_on_its_page(people: Service) -> None:
    """One that is refused is told why and can be typed again; nobody is signed in."""
    token = await a_link(people, "/reset-password")
    for wrong in ("short", "password1", None):
        fields = {"token": token} | ({"new_password": wrong} if wrong else {})
        answer = await post(people, "/reset-password", **fields)
        page = seen(answer, 422)
        assert page.fields == {"token": token, "new_password": None}
        assert any(word.startswith("The password") for word in page.words)
        assert wrong is None or wrong not in answer.text
    answer = await post(people, "/reset-password", token=token, new_password=NEW)
    assert "Done" in seen(answer).words
    assert "set-cookie" not in answer.headers
    assert DEAD in seen(await post(people, "/reset-password", token=token, new_password=NEW), 400).words
    signed = await people.token(await an_app(people), grant_type="password", username="mika", password=NEW)
    assert signed.status_code == 200


# -- what is sent -----------------------------------------------------------------------------------------------------

TYPE = FORM[0]
BAD_FORMS: dict[str, tuple[bytes, tuple[tuple[bytes, bytes], ...], int]] = {
    "nothing": (b"", (FORM,), 400),
    "no token": (b"new_password=x", (FORM,), 400),
    "two tokens": (b"token=a&token=b", (FORM,), 400),
    "nul": (b"token=%00", (FORM,), 400),
    "not utf-8": (b"token=%ff", (FORM,), 400),
    "json": (b'{"token":"x"}', ((TYPE, b"application/json"),), 400),
    "multipart": (b"--x--", ((TYPE, b"multipart/form-data; boundary=x"),), 400),
    "no type": (b"token=x", (), 400),
    "two types": (b"token=x", (FORM, FORM), 400),
    "another charset": (b"token=x", ((TYPE, FORM[1] + b"; charset=utf-16"),), 400),
    "compressed": (b"token=x", (FORM, (b"content-encoding", b"gzip")), 400),
    "too large": (b"token=" + b"x" * 70_000, (FORM,), 413),
    "too many": (b"&".join(b"f%d=x" % number for number in range(200)), (FORM,), 400),
}


@pytest.mark.parametrize("kind", BAD_FORMS)
@pytest.mark.parametrize("path", PAGES)
async def test_a_form_that_is_none_gets_a_page_that_says_so(sqlite_url: str, path: str, kind: str) -> None:
    """Never a fault of ours, never the framework's words, and nothing of what was sent."""
    body, headers, status = BAD_FORMS[kind]
    async with running(test_settings(sqlite_url)) as service:
        answer = await send(service, path, body, headers=headers)
        assert (answer.status, answer.header("content-type")) == (status, "text/html; charset=utf-8")
        assert Page(answer.body.decode()).forms == []
        assert await service.execute(select(users)) == []


BAD_TYPES: dict[str, tuple[tuple[bytes, bytes], ...]] = {
    "none": (),
    "plain text, which other sites can send": ((TYPE, b"text/plain"),),
    "multipart": ((TYPE, b"multipart/form-data"),),
    "two": (FORM, FORM),
    "another charset": ((TYPE, FORM[1] + b"; charset=utf-16"),),
    "compressed": (FORM, (b"content-encoding", b"gzip")),
}


@pytest.mark.parametrize("kind", BAD_TYPES)
async def test_a_good_link_is_used_by_a_proper_form_only(sqlite_url: str, kind: str) -> None:
    """What is no urlencoded form by its type uses nothing."""
    async with running(test_settings(sqlite_url)) as service:
        token = await a_link(service, "/verify-email")
        answer = await send(service, "/verify-email", f"token={token}".encode(), headers=BAD_TYPES[kind])
        assert answer.status == 400
        assert [row.email_verified_at for row in await service.execute(select(users))] == [None]
        assert (await send(service, "/verify-email", f"token={token}".encode())).status == 200


async def test_a_client_that_hangs_up_is_no_fault(sqlite_url: str) -> None:
    """Whoever goes away in the middle of a form is answered to nobody."""
    async with running(test_settings(sqlite_url)) as service:
        pieces = [{"type": "http.request", "body": b"token=", "more_body": True}, {"type": "http.disconnect"}]
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return pieces.pop(0)

        async def sending(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/verify-email", "raw_path": b"/verify-email", "query_string": b"", "root_path": "",
            "headers": [(b"host", b"127.0.0.1:8000"), FORM], "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        await service.app(scope, receive, sending)
        assert sent[0]["status"] != 500


async def test_a_token_in_the_address_of_a_form_counts_for_nothing(people: Service) -> None:
    """Only what the form sends does: addresses are kept by proxies and histories."""
    token = await a_link(people, "/verify-email")
    answer = await people.http.post(f"/verify-email?{urlencode({'token': token})}", data={"other": "x"})
    assert DEAD in seen(answer, 400).words
    assert (await post(people, "/verify-email", token=token)).status_code == 200


async def test_who_tries_links_on_pages_has_to_wait(people: Service) -> None:
    """As at the API, with which the pages share the limit; the answer is a page that says for how long."""
    statuses = [(await people.http.get("/verify-email", params={"token": "x"})).status_code for _ in range(16)]
    statuses += [
        (await people.http.post("/v1/email-verification/confirm", json={"token": "x"})).status_code for _ in range(14)
    ]
    assert set(statuses) == {400}
    answer = await post(people, "/reset-password", token="x", new_password=NEW)
    seen(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1


async def test_pages_are_not_in_the_api_document(sqlite_url: str) -> None:
    """They are for people."""
    async with running(test_settings(sqlite_url)) as service:
        document = (await service.http.get("/openapi.json")).json()
        assert not document["paths"].keys() & PAGES.keys()


async def test_an_outage_is_told_on_a_page(people: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with Retry-After, and the link stays good."""

    async def gone(*_given: object, **_named: object) -> bool:
        raise DatabaseUnavailable("a test")

    token = await a_link(people, "/verify-email")
    with monkeypatch.context() as patched:
        patched.setattr(Recovery, "verify", gone)
        answer = await post(people, "/verify-email", token=token)
        seen(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1
    assert (await post(people, "/verify-email", token=token)).status_code == 200


async def test_a_fault_of_ours_is_not_shown(people: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """500, and nothing about the inside."""

    async def broken(*_given: object, **_named: object) -> bool:
        raise RuntimeError("an inner secret")

    monkeypatch.setattr(Recovery, "verify", broken)
    answer = await post(people, "/verify-email", token=await a_link(people, "/verify-email"))
    assert answer.status_code == 500
    assert not re.search(r"secret|Traceback|RuntimeError", answer.text)
