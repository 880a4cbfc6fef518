"""What the edge does to every request and every answer, with nothing behind it but a stub."""

import ipaddress
from typing import Any

import pytest

from identity_service.web.asgi import Reply
from identity_service.web.edge import Edge
from tests.support.asking import ask

PROTECTION = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
HSTS = "strict-transport-security"
PROXY = "10.1.2.3"


class Stub:
    """An endpoint, or what stands for the framework: counts, and answers what the test wants."""

    methods = ("GET", "POST")
    quiet = True

    def __init__(self, **state: Any) -> None:
        self.state = state
        self.asked: list[str] = []
        self.fault: Exception | None = None
        self.begun = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        scope["state"].update(self.state)
        if self.begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if self.fault is not None:
            raise self.fault
        await Reply(200, b"{}").send(send)


@pytest.fixture
def endpoint() -> Stub:
    return Stub()


@pytest.fixture
def framework() -> Stub:
    return Stub()


def edge_of(endpoint: Stub, framework: Stub, *, https: bool = False, proxies: tuple[str, ...] = ()) -> Edge:
    """An edge before both: the endpoint answers `/token`, a document and the probes, the framework the rest."""
    return Edge(
        framework,
        endpoints=dict.fromkeys(("/token", "/.well-known/jwks.json", "/healthz", "/readyz"), endpoint),
        allowed_hosts=("127.0.0.1",),
        https=https,
        access_log=True,
        trusted_proxies=[ipaddress.ip_network(entry) for entry in proxies],
    )


# -- headers ----------------------------------------------------------------------------------------------------------


async def test_a_page_that_has_a_policy_of_its_own_keeps_it_alone(endpoint: Stub) -> None:
    """A browser obeys every policy it is sent: a second one would forbid the page its own style."""

    class Page(Stub):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await Reply(200, b"", ((b"content-security-policy", b"form-action 'self'"),)).send(send)

    answer = await ask(edge_of(endpoint, Page()), b"/verify-email", method="GET")
    policies = [value for name, value in answer.headers if name == "content-security-policy"]
    assert policies == ["form-action 'self'"]
    assert answer.header("x-frame-options") == "DENY"


@pytest.mark.case("INP-23")
@pytest.mark.parametrize("https", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(
    ("target", "method", "host", "status"),
    [
        (b"/token", "GET", b"127.0.0.1", 200),
        (b"/token", "PUT", b"127.0.0.1", 405),
        (b"/v1/anything", "GET", b"127.0.0.1", 200),
        (b"/healthz", "GET", b"x", 200),
        (b"/token/", "GET", b"127.0.0.1", 404),
        (b"/token", "GET", b"x", 404),
        (b"/v1/%00", "GET", b"127.0.0.1", 400),
        (b"/" + b"x" * 9000, "GET", b"127.0.0.1", 414),
    ],
    ids=["endpoint", "method", "framework", "probe", "spelling", "host", "nul", "length"],
)
async def test_every_answer_is_protected(
    endpoint: Stub, framework: Stub, https: bool, target: bytes, method: str, host: bytes, status: int
) -> None:
    """HSTS only where clients come by https; no other page may embed an answer; each has an id."""
    answer = await ask(edge_of(endpoint, framework, https=https), target, method=method, host=[(b"host", host)])
    assert answer.status == status
    for name, value in PROTECTION.items():
        assert answer.header(name) == value
    assert answer.header(HSTS) == ("max-age=31536000; includeSubDomains" if https else None)
    assert answer.header("cross-origin-resource-policy") == "same-origin"
    assert len(answer.header("x-request-id") or "") == 16
    assert answer.header("server") is None


@pytest.mark.case("INP-23")
@pytest.mark.parametrize("target", [b"/.well-known/jwks.json", b"/.well-known/nothing"])
async def test_public_documents_may_be_embedded_anywhere(endpoint: Stub, framework: Stub, target: bytes) -> None:
    """Or a page that isolates itself could not load the keys."""
    answer = await ask(edge_of(endpoint, framework), target)
    assert answer.header("cross-origin-resource-policy") == "cross-origin"


@pytest.mark.parametrize("target", [b"/token", b"/v1/anything"], ids=["endpoint", "framework"])
async def test_what_lower_layers_say_about_a_request_is_in_its_answer(target: bytes) -> None:
    """Whichever the answer is: they know the budget before anybody knows the outcome."""
    said = [(b"ratelimit-limit", b"60"), (b"ratelimit-remaining", b"7")]
    stub = Stub(headers=said)
    edge = edge_of(stub, stub)
    for fault in (None, RuntimeError("planted")):
        stub.fault = fault
        answer = await ask(edge, target)
        assert answer.status == (500 if fault else 200)
        assert answer.header("ratelimit-limit") == "60"
        assert answer.header("ratelimit-remaining") == "7"
    other = await ask(edge, b"/nothing/")
    assert other.header("ratelimit-limit") is None, "it was said about another request"


@pytest.mark.case("SEC-10")
@pytest.mark.parametrize("target", [b"/token", b"/.well-known/jwks.json", b"/v1/anything"])
async def test_a_fault_of_an_endpoint_is_a_problem_that_tells_nothing(
    endpoint: Stub, framework: Stub, target: bytes
) -> None:
    """Not the server's own page, which has neither an id nor protection."""
    endpoint.fault = framework.fault = RuntimeError("a canary in the exception")
    answer = await ask(edge_of(endpoint, framework), target, (b"accept", b"text/html"))
    assert answer.status == 500
    assert answer.header("content-type") == "application/problem+json"
    assert answer.header("x-request-id")
    assert answer.header("x-content-type-options") == "nosniff"
    assert b"canary" not in answer.body


async def test_an_answer_that_has_begun_is_not_followed_by_another(endpoint: Stub, framework: Stub) -> None:
    """The server cuts it off: half an answer must not look like a whole one."""
    endpoint.begun, endpoint.fault = True, RuntimeError("planted")
    with pytest.raises(RuntimeError, match="planted"):
        await ask(edge_of(endpoint, framework), b"/token")


# -- how a path is spelled --------------------------------------------------------------------------------------------

CANONICAL = [
    *(b"/", b"/token", b"/v1/users/me", b"/.well-known/jwks.json", b"/docs/oauth2-redirect", b"/v1/a.b/..c/.d/e.."),
    *(b"/v1/admin/scopes/orders:read", b"/v1/admin/scopes/orders%3Aread", b"/v1/x%20y", b"/v1/%C3%A9", b"/v1/100%25"),
    *(b"/v1/~a_b-c", b"/v1/a+b@c,d=e!$&'()*", b"/v1/x%22%3c%3E", b"/v1/%25", b"/v1/%25zz"),
]
OTHERWISE = [
    *(b"//token", b"/token/", b"/token//", b"//", b"/./token", b"/token/.", b"/x/../token", b"/..", b"/.", b"/x/.."),
    *(
        b"/%2e%2e/token",
        b"/%2E/token",
        b"/.%2e/token",
        b"/x/%2e%2E/token",
        b"/token%2f",
        b"/%2Ftoken",
        b"/x%5c..%5ctoken",
    ),
    *(b"/%74oken", b"/tok%65n", b"/%54oken", b"/token%2d", b"/v1%5fx", b"/%7euser", b"/v%31/users", b"/t%6Fken"),
    *(
        b"/token;a=b",
        b"/;/token",
        b"/x/..;/token",
        b"/v1/users;/me",
        b"/token\\",
        b"/x\\..\\token",
        b"/%252e%252e/token",
    ),
    *(
        b"/%2574oken",
        b"/token%",
        b"/token%2",
        b"/token%zz",
        b"/token%u0041",
        b"*",
        b"",
        b"token",
        b"/a b",
        b"/<script>",
    ),
    *(b'/"', b"/{}", b"/a|b", b"/a^b", b"/`", b"/[1]", b"/token\x7f", b"/token\t", b"/token\n", b"/a\nb/..\n"),
]


@pytest.mark.case("INP-13")
@pytest.mark.parametrize("target", CANONICAL)
async def test_a_path_in_its_one_spelling_gets_through(endpoint: Stub, framework: Stub, target: bytes) -> None:
    answer = await ask(edge_of(endpoint, framework), target)
    assert answer.status == 200
    assert len(endpoint.asked + framework.asked) == 1


@pytest.mark.case("INP-13")
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("target", OTHERWISE)
async def test_a_path_that_is_spelled_otherwise_is_nowhere(
    endpoint: Stub, framework: Stub, target: bytes, method: str
) -> None:
    """404 and never a redirect; nothing behind the edge hears of it."""
    answer = await ask(edge_of(endpoint, framework), target, method=method)
    assert answer.status == 404
    assert answer.header("location") is None
    assert endpoint.asked + framework.asked == []


@pytest.mark.case("INP-18")
@pytest.mark.parametrize(
    "target",
    [
        *(
            b"/v1/users/%00",
            b"/v1/%FF",
            b"/v1/%C0%AF",
            b"/v1/%ED%A0%80",
            b"/v1/%F4%90%80%80",
            b"/v1/%C3",
            b"/v1/a%00b/c",
        ),
        *(b"/v1/users?q=%00", b"/v1/users?%00", b"/v1/users?q=a%FFb", b"/v1/users?q=%ED%A0%80", b"/v1/users?q=\xff"),
        *(b"/v1/users?a=b&q=%C3&c=d", b"/v1/users?q=\0"),
    ],
)
async def test_the_api_is_asked_in_utf_8_without_nul(endpoint: Stub, framework: Stub, target: bytes) -> None:
    """The database could not hold it, and the framework would replace it in silence."""
    answer = await ask(edge_of(endpoint, framework), target)
    assert answer.status == 400
    assert answer.header("content-type") == "application/problem+json"
    assert framework.asked == []


@pytest.mark.parametrize(
    "target", [b"/v1/users?q=%C3%A9%20%F0%9F%94%91", b"/v1/users?q=%", b"/v1/users?q=%zz&&=", b"/v1/users?q=a+b%2Fc%25"]
)
async def test_any_text_may_be_searched_for(endpoint: Stub, framework: Stub, target: bytes) -> None:
    assert (await ask(edge_of(endpoint, framework), target)).status == 200


# -- https ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ([], 200),
        ([b"https"], 200),
        ([b"http"], 400),
        ([b"HTTP"], 400),
        ([b" http "], 400),
        ([b"https, http"], 200),
        ([b"https", b"http"], 200),
        ([b"http,https"], 400),
        ([b"http", b"https"], 400),
        ([b""], 200),
        ([b"httpx"], 200),
    ],
)
async def test_a_proxy_that_was_reached_by_http_is_sent_away(
    endpoint: Stub, framework: Stub, said: list[bytes], status: int
) -> None:
    """A secret that came in the clear is to be noticed; what counts is how the outermost proxy was reached."""
    headers = [(b"x-forwarded-proto", value) for value in said]
    edge = edge_of(endpoint, framework, https=True, proxies=("10.0.0.0/8",))
    for target in (b"/token", b"/v1/users/me", b"/.well-known/jwks.json", b"/nothing"):
        answer = await ask(edge, target, *headers, peer=PROXY)
        assert answer.status == status
        if status == 400:
            assert answer.json["title"] == "This service is reached by https only."
    for probe in (b"/healthz", b"/readyz"):
        assert (await ask(edge, probe, *headers, peer=PROXY)).status == 200, "the platform asks without a proxy"


@pytest.mark.parametrize("peer", ["192.0.2.9", "::1", "unknown", "", "10.0.0.1x"])
async def test_who_is_no_proxy_is_not_believed_about_it(endpoint: Stub, framework: Stub, peer: str) -> None:
    edge = edge_of(endpoint, framework, https=True, proxies=("10.0.0.0/8",))
    assert (await ask(edge, b"/token", (b"x-forwarded-proto", b"http"), peer=peer)).status == 200


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8::5"])
async def test_a_proxy_may_be_known_by_either_kind_of_address(endpoint: Stub, framework: Stub, peer: str) -> None:
    edge = edge_of(endpoint, framework, https=True, proxies=("10.0.0.0/8", "2001:db8::/64"))
    assert (await ask(edge, b"/token", (b"x-forwarded-proto", b"http"), peer=peer)).status == 400


@pytest.mark.parametrize(
    ("https", "proxies"), [(False, ("10.0.0.0/8",)), (True, ())], ids=["http issuer", "no proxies"]
)
async def test_without_https_or_known_proxies_the_header_says_nothing(
    endpoint: Stub, framework: Stub, https: bool, proxies: tuple[str, ...]
) -> None:
    edge = edge_of(endpoint, framework, https=https, proxies=proxies)
    assert (await ask(edge, b"/token", (b"x-forwarded-proto", b"http"), peer=PROXY)).status == 200
