"""Thousands of requests as no client sends them: never a fault, always an answer that a client can read."""

import base64
import random
import re
from collections import Counter
from collections.abc import Callable
from urllib.parse import quote_plus

import pytest
from sqlalchemy import text

from tests.support.asking import WireAnswer
from tests.support.refusals import CODES, written
from tests.support.service import ISSUER, PASSWORD, SIBLING, Registered, Service
from tests.support.waiting import until
from tests.support.wire import FORM, send

SEED = 20260101
REQUESTS = 2500
"""At each endpoint."""
_DESCRIPTION = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]+")
Headers = list[tuple[bytes, bytes]]

NASTY = (
    *(b"", b"%00", b"%", b"%%", b"%zz", b"%u0041", b"%FF", b"\xff\xfe", b"%ED%A0%80", b"\xed\xa0\x80", b"%F4%90%80%80"),
    *(
        b"+",
        b"=",
        b";",
        b"%0d%0a",
        b"\r\n",
        b"'",
        b'"',
        b"\\",
        b"' OR 1=1--",
        b"$(id)",
        b"{{7*7}}",
        b"<script>",
        b"null",
    ),
    *(
        b"a" * 300,
        b"a" * 5000,
        b"%E2%80%AE",
        b"%F0%9F%94%91",
        b"\xc3\xa9",
        b"-1",
        b"1e400",
        b"NaN",
        b"[]",
        b"{}",
        b"%20",
    ),
    *(
        b"rt_",
        b"rt_0",
        b"rt_" + b"z" * 100,
        b"cl_",
        b"cl_" + b"0" * 22,
        b"cs_x",
        b"idk_x_y",
        b"a.b.c",
        b"eyJhbGciOiJub25lIn0.e30.",
    ),
    *(
        b"openid",
        b"account:read",
        b"account:read  orders:read",
        b"*",
        b"https://orders.example",
        b"http://127.0.0.1:8000",
    ),
)
NAMES = (
    *(b"grant_type", b"client_id", b"client_secret", b"username", b"password", b"refresh_token", b"scope", b"resource"),
    *(b"audience", b"token", b"token_type_hint", b"code", b"code_verifier", b"redirect_uri", b"client_assertion"),
    *(
        b"client_assertion_type",
        b"device_code",
        b"subject_token",
        b"",
        b"%67rant_type",
        b"grant_type%00",
        b"Grant_Type",
    ),
)
GRANTS = (b"password", b"refresh_token", b"client_credentials", b"authorization_code", b"%70assword", b"x")
HEADER_NAMES = (
    *(
        b"authorization",
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"idempotency-key",
        b"x-forwarded-for",
    ),
    *(
        b"origin",
        b"cookie",
        b"accept",
        b"expect",
        b"transfer-encoding",
        b"forwarded",
        b"x-request-id",
        b"dpop",
        b"host",
    ),
)


class Caller:
    """Makes requests: mostly good ones with something wrong about them, so that each gets as far as it can."""

    def __init__(
        self, seed: int, clients: list[Registered], username: str, tokens: Callable[[], tuple[str, str]]
    ) -> None:
        """`tokens` returns an access and a refresh token that may still be good."""
        self._random = random.Random(seed)  # noqa: S311  # the point is that it is the same every time
        self._clients = clients
        self._username = username
        self._tokens = tokens

    def body(self) -> bytes:
        """Return a form, or what was one."""
        pick = self._random
        client = pick.choice(self._clients)
        grant = pick.choice(GRANTS[:3] if pick.random() < 0.7 else GRANTS)
        pairs: list[tuple[bytes, bytes]] = [(b"grant_type", grant)]
        pairs += [(key.encode(), value.encode()) for key, value in client.form.items()]
        if pick.random() < 0.8:
            pairs += [(b"username", self._username.encode()), (b"password", quote_plus(PASSWORD).encode())]
            access, refresh = self._tokens()
            pairs += [(b"refresh_token", refresh.encode()), (b"token", pick.choice((access, refresh)).encode())]
        if pick.random() < 0.2:
            known = quote_plus(pick.choice((ISSUER, SIBLING))).encode()
            pairs.append((b"resource", pick.choice((known, known, self._value()))))
        if pick.random() < 0.2:
            pairs.append((b"scope", pick.choice((b"account:read", b"orders:read+account:write", self._value()))))
        for _ in range(pick.choice((0, 0, 0, 1, 1, 1, 2, 8))):
            change = pick.random()
            if change < 0.35:
                index = pick.randrange(len(pairs))
                pairs[index] = (pairs[index][0], self._value())
            elif change < 0.65:
                pairs.append((pick.choice(NAMES), self._value()))
            elif change < 0.8 and len(pairs) > 1:
                del pairs[pick.randrange(len(pairs))]
            elif change < 0.9:
                pairs.append(pick.choice(pairs))
            else:
                pick.shuffle(pairs)
        body = pick.choice((*[b"&"] * 20, b"&&", b";")).join(name + b"=" + value for name, value in pairs)
        if pick.random() < 0.1:
            body = self._mangled(body)
        return body

    def _value(self) -> bytes:
        pick = self._random
        if pick.random() < 0.7:
            return pick.choice(NASTY)
        return bytes(pick.randrange(256) for _ in range(pick.choice((1, 3, 20, 200))))

    def _mangled(self, body: bytes) -> bytes:
        pick = self._random
        what = pick.randrange(5)
        if what == 0:
            return pick.randbytes(pick.choice((1, 50, 3000)))
        if what == 1:
            return body[: pick.randrange(len(body) + 1)]
        if what == 2:
            position = pick.randrange(len(body) + 1)
            return body[:position] + pick.randbytes(4) + body[position:]
        return body * pick.choice((2, 40, 400)) if what == 3 else b"&" * pick.choice((50, 150, 70_000))

    def headers(self) -> Headers:
        """Return header lines, most often just those a form needs."""
        pick = self._random
        headers: Headers = [FORM]
        if pick.random() < 0.3:
            client = pick.choice(self._clients)
            inside = pick.choice(
                (f"{client.id}:{client.secret}".encode(), b"a:b", b":", b"\xff:\xff", client.id.encode())
            )
            scheme = pick.choice((b"Basic ", b"basic ", b"Bearer ", b"Basic", b""))
            headers.append((b"authorization", scheme + base64.b64encode(inside)[: pick.choice((999, 999, 5))]))
        for _ in range(pick.choice((0,) * 30 + (1,) * 12 + (2, 2, 120))):
            value = self._value().translate(None, b"\r\n\0")
            headers.append((pick.choice(HEADER_NAMES), value))
        if pick.random() < 0.05:
            headers.pop(0)
        return headers

    def query(self) -> bytes:
        """Return a query, seldom."""
        return self._value() + b"=" + self._value() if self._random.random() < 0.05 else b""

    def pieces(self, body: bytes) -> list[bytes]:
        """Cut a body as a network may."""
        if self._random.random() < 0.9 or not body:
            return [body]
        cut = self._random.randrange(len(body))
        return [body[:cut], b"", body[cut:]]

    def peer(self) -> str:
        """Return an address; what one of them uses up is not what this is about."""
        return f"198.51.{self._random.randrange(256)}.{self._random.randrange(256)}"


def check(answer: WireAnswer, path: str) -> str:
    """Assert that an answer is one a client can read, and return a word for it."""
    assert answer.status < 500, (answer.status, answer.body)
    assert answer.header("content-length") == str(len(answer.body))
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("cache-control") == "no-store"
    assert answer.header("pragma") == "no-cache"
    assert answer.header("location") is None
    assert answer.header("set-cookie") is None
    if answer.status == 200:
        if path == "/token":
            assert {"access_token", "token_type", "expires_in", "scope"} <= answer.json.keys()
        elif path == "/introspect":
            assert answer.json == {"active": False} or answer.json["active"] is True
            return "active" if answer.json["active"] else "good"
        else:
            assert answer.body == b""
        return "good"
    if answer.header("content-type") == "application/problem+json":
        assert answer.status in (400, 404, 414, 431)
        return "problem"
    assert answer.header("content-type") == "application/json"
    body = answer.json
    assert set(body) == {"error", "error_description"}
    assert body["error"] in CODES
    assert _DESCRIPTION.fullmatch(body["error_description"])
    assert answer.status == {"invalid_client": 401, "temporarily_unavailable": 429}.get(body["error"], answer.status)
    assert answer.status in (400, 401, 413, 429) or (answer.status, path) == (403, "/introspect")
    return str(body["error"])


@pytest.mark.case("INP-24")
@pytest.mark.case("TOK-11")
async def test_no_request_at_all_is_answered_with_a_fault(service: Service) -> None:
    """The same thousands in each run; afterwards no connection is left in a transaction and everything still works."""
    clients = [
        await service.a_client(introspect=(ISSUER,)),
        await service.a_client(public=True),
        await service.a_client(audiences=()),
    ]
    user = await service.a_user()
    body = await service.sign_in(clients[0], user)
    held = body["access_token"], body["refresh_token"]
    caller = Caller(SEED, clients, user.username, lambda: held)
    seen: Counter[str] = Counter()
    for number in range(3 * REQUESTS):
        path = ("/token", "/revoke", "/introspect")[number % 3]
        pieces, headers, query = caller.pieces(caller.body()), caller.headers(), caller.query()
        answer = await send(service, path, pieces, headers=headers, query=query, peer=caller.peer())
        word = check(answer, path)
        seen[f"{path} {word}"] += 1
        if word == "good" and path == "/token" and "refresh_token" in answer.json:
            held = answer.json["access_token"], answer.json["refresh_token"]
        if number % 50 == 0:
            service.clock.advance(7)
    for word in ("good", "invalid_request", "invalid_client", "problem"):
        assert seen[f"/token {word}"] > 20, seen
        assert seen[f"/revoke {word}"] > 20, seen
        assert seen[f"/introspect {word}"] > 20, seen
    assert seen["/introspect active"] > 20, seen
    for word in ("invalid_grant", "invalid_scope", "invalid_target", "unsupported_grant_type", "unauthorized_client"):
        assert seen[f"/token {word}"] > 5, seen
    hanging = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
    )

    async def none_hangs() -> bool:
        return (await service.execute(hanging))[0][0] == 0

    await until(none_hangs, "a connection is left in a transaction")
    service.clock.advance(3600)
    before = await written(service)
    assert await service.sign_in(clients[0], user)
    assert await written(service) != before
