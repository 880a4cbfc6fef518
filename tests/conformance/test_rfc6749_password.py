"""RFC 6749 §4.3: the resource owner password credentials grant, as fenced here."""

import asyncio
import threading
from typing import Any

import pytest
from prometheus_client import REGISTRY

from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import PasswordHasher
from tests.support.hashing import watch_verifications
from tests.support.reading import unverified_claims
from tests.support.refusals import refusal, written
from tests.support.service import ISSUER, PASSWORD, Service, running, test_settings

Verifications = list[tuple[str, bool]]
DEPRECATED = "@1735689600"
"""RFC 9700 was published in January 2025."""


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> Verifications:
    """Every password a hash was really computed for."""
    return watch_verifications(monkeypatch)


@pytest.mark.rfc("6749", "4.3.3")
async def test_a_user_signs_in_and_reads_their_own_account(service: Service) -> None:
    """The token of a sign-in opens our own API."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    answer = await service.me(tokens["access_token"])
    assert answer.status_code == 200
    assert answer.json()["username"] == user.username


@pytest.mark.rfc("6749", "4.3.3")
async def test_the_embedded_default_signs_in_as_well(embedded: Service) -> None:
    """SQLite and limits in memory answer as PostgreSQL and Redis do."""
    client, user = await embedded.a_client(), await embedded.a_user()
    tokens = await embedded.sign_in(client, user)
    assert (await embedded.me(tokens["access_token"])).status_code == 200


@pytest.mark.rfc("6749", "4.3.2")
async def test_a_username_or_an_address_will_do_in_any_case(embedded: Service) -> None:
    """Either leads to the same person; the password itself is taken as it is."""
    client, user = await embedded.a_client(), await embedded.a_user("demo", email="Demo.Person@example.org")
    subjects = set()
    for name in ("demo", "DEMO", "demo.person@example.org", "Demo.Person@Example.ORG"):
        answer = await embedded.token(client, grant_type="password", username=name, password=PASSWORD)
        subjects.add(unverified_claims(answer.json()["access_token"])["sub"])
    assert subjects == {str(user.id)}
    for password in (PASSWORD.upper(), f" {PASSWORD}", f"{PASSWORD} "):
        answer = await embedded.token(client, grant_type="password", username="demo", password=password)
        refusal(answer, "invalid_grant", password)
    spaced = await embedded.token(client, grant_type="password", username="demo ", password=PASSWORD)
    refusal(spaced, "invalid_grant")


@pytest.mark.rfc("9068", "2.2")
async def test_the_token_says_who_signed_in_how_and_when(service: Service) -> None:
    """And no name or address of the person."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    claims = unverified_claims(tokens["access_token"])
    assert set(claims) == {
        *("iss", "sub", "aud", "client_id", "iat", "exp", "jti", "scope"),
        *("roles", "sid", "auth_time", "amr"),
    }
    assert (claims["sub"], claims["client_id"], claims["iss"]) == (str(user.id), client.id, ISSUER)
    assert (claims["roles"], claims["amr"]) == (["user"], ["pwd"])
    assert claims["auth_time"] == claims["iat"] == int(service.clock.now().timestamp())
    assert claims["sid"] == str((await service.family_rows())[0].id)
    assert user.username not in str(claims)


async def test_a_client_without_the_refresh_grant_gets_no_refresh_token(embedded: Service) -> None:
    """The session exists all the same: the access token is checked against it."""
    client, user = await embedded.a_client(grant_types=("password",)), await embedded.a_user()
    tokens = await embedded.sign_in(client, user)
    assert "refresh_token" not in tokens
    assert (await embedded.me(tokens["access_token"])).status_code == 200
    await embedded.disable(user)
    assert (await embedded.me(tokens["access_token"])).status_code == 401


@pytest.mark.rfc("6749", "5.2")
@pytest.mark.case("PWG-01")
async def test_a_client_without_the_grant_learns_nothing_about_passwords(
    service: Service, verifications: Verifications
) -> None:
    """The name is not looked up, the password not looked at, no attempt counted."""
    client, user = await service.a_client(grant_types=("refresh_token",)), await service.a_user()
    before = await written(service)
    answers = [
        await service.token(client, grant_type="password", username=name, password=password)
        for name in (user.username, "nobody") * 8
        for password in (PASSWORD, "wrong")
    ]
    for answer in answers:
        refusal(answer, "unauthorized_client", user.username, PASSWORD)
    assert verifications == []
    assert await written(service) == before
    allowed = await service.a_client()
    assert await service.sign_in(allowed, user)


@pytest.mark.rfc("6749", "4.3.2")
@pytest.mark.case("PWG-05")
async def test_a_request_without_name_or_password_is_malformed(service: Service, verifications: Verifications) -> None:
    """Absent or empty; nothing is hashed, counted or written."""
    client, user = await service.a_client(), await service.a_user()
    before = await written(service)
    for form in ({}, {"username": user.username}, {"password": PASSWORD}):
        for empty in ({}, {"username": "", **form}, {"password": "", **form}, {"username": "", "password": "", **form}):
            answer = await service.token(client, grant_type="password", **{**empty, **form})
            refusal(answer, "invalid_request", user.username, PASSWORD)
    assert verifications == []
    assert await written(service) == before


IMPOSSIBLE = {
    "longer than any": "x" * 1025,
    "4097 characters": "x" * 4097,
    "60 000 characters": "x" * 60_000,
    "a code point that is none": "abcdefgh\U0003ffff",
    "a code point of no version": "abcdefgh\u0378",
}


@pytest.mark.case("PWG-10")
async def test_a_password_nobody_can_have_is_refused_before_hashing(
    service: Service, verifications: Verifications, subtests: pytest.Subtests
) -> None:
    """Alike for every name, so it says nothing about one; and it counts as no attempt."""
    client, user = await service.a_client(), await service.a_user()
    before = await written(service)
    for what, password in IMPOSSIBLE.items():
        with subtests.test(what):
            answers = [
                await service.token(client, grant_type="password", username=name, password=password)
                for name in (user.username, "nobody") * 6
            ]
            assert len({answer.content for answer in answers}) == 1
            refusal(answers[0], "invalid_request", password, user.username)
    for password in ("a\0b", "\0"):
        answer = await service.token(client, grant_type="password", username=user.username, password=password)
        refusal(answer, "invalid_request")
    mebibyte = await service.token(client, grant_type="password", username=user.username, password="x" * 2**20)
    refusal(mebibyte, "invalid_request", status=413)
    assert verifications == []
    assert await written(service) == before
    assert await service.sign_in(client, user)


@pytest.mark.case("PWG-10")
@pytest.mark.case("ACC-15")
async def test_the_longest_password_is_compared_whole(embedded: Service) -> None:
    """1024 characters sign in; the same with another last one do not."""
    password = "p" * 1023 + "!"
    client, user = await embedded.a_client(), await embedded.a_user(password=None)
    await embedded.patch_user(user, password_hash=await embedded.services.hasher.hash(Secret(password)))
    assert await embedded.sign_in(client, user, password)
    for other in (password[:-1], password[:-1] + "?", password[:72]):
        answer = await embedded.token(client, grant_type="password", username=user.username, password=other)
        refusal(answer, "invalid_grant", other)


@pytest.mark.rfc("6749", "3.3")
@pytest.mark.case("PWG-06")
async def test_a_scope_the_role_may_not_have_is_dropped_and_the_answer_says_so(service: Service) -> None:
    """Granted is: asked for, within the client's, within the role's. More than the client's is refused."""
    client = await service.a_client(scope=("account:read", "orders:read", "admin:everything"))
    user = await service.a_user()
    form = {"grant_type": "password", "username": user.username, "password": PASSWORD}
    for asked, granted in (
        ({"scope": "orders:read admin:everything"}, "orders:read"),
        ({"scope": "admin:everything"}, ""),
        ({}, "account:read orders:read"),
        ({"scope": "orders:read account:read"}, "orders:read account:read"),
    ):
        answer = await service.token(client, **form, **asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["scope"] == unverified_claims(answer.json()["access_token"])["scope"] == granted
    before = await written(service)
    refusal(await service.token(client, **form, scope="account:read account:write"), "invalid_scope")
    refusal(await service.token(client, **form, scope="openid"), "invalid_scope")
    refusal(await service.token(client, **form, scope="offline_access"), "invalid_scope")
    assert await written(service) == before


@pytest.mark.case("PWG-06")
async def test_a_scope_that_is_too_wide_is_refused_before_the_password_is_looked_at(
    service: Service, verifications: Verifications
) -> None:
    """So that it is no way to try passwords without being counted."""
    client, user = await service.a_client(), await service.a_user()
    for password in (PASSWORD, "wrong"):
        form = {"grant_type": "password", "username": user.username, "password": password}
        refusal(await service.token(client, **form, scope="admin"), "invalid_scope")
        refusal(await service.token(client, **form, resource="https://evil.example"), "invalid_target")
    assert verifications == []


@pytest.mark.rfc("9745", "2")
@pytest.mark.case("PWG-09")
async def test_each_use_is_marked_as_deprecated_audited_and_counted(service: Service) -> None:
    """By client; the audit row names the person, the session and the network, and holds no name or password."""
    client, user = await service.a_client(), await service.a_user()

    def count(outcome: str) -> float:
        labels = {"grant": "password", "client": client.id, "outcome": outcome}
        return REGISTRY.get_sample_value("identity_tokens_total", labels) or 0.0

    answer = await service.token(client, grant_type="password", username=user.username, password=PASSWORD)
    assert answer.headers["deprecation"] == DEPRECATED
    wrong = await service.token(client, grant_type="password", username=user.username, password="wrong password")
    refusal(wrong, "invalid_grant")
    assert (count("issued"), count("invalid_grant")) == (1.0, 1.0)
    (row,) = await service.events("grant.password")
    family = (await service.family_rows())[0]
    assert (row.actor, row.target, row.client_id) == (str(user.id), str(family.id), client.id)
    assert (row.network, row.request_id) == ("127.0.0.1", answer.headers["x-request-id"])
    (failed,) = await service.events("sign_in.failed")
    assert (failed.target, failed.client_id, failed.detail) == (str(user.id), client.id, {"reason": "wrong_password"})
    assert failed.request_id == wrong.headers["x-request-id"]
    assert user.username not in repr((tuple(row), tuple(failed)))
    assert "wrong password" not in repr(tuple(failed))


@pytest.mark.case("PWG-09")
async def test_switched_off_the_grant_is_unknown(sqlite_url: str) -> None:
    """Even to a client that is registered for it."""
    async with running(test_settings(sqlite_url, password_grant=False)) as service:
        client, user = await service.a_client(), await service.a_user()
        answer = await service.token(client, grant_type="password", username=user.username, password=PASSWORD)
        refusal(answer, "unsupported_grant_type", PASSWORD)


@pytest.mark.case("ACC-42")
async def test_a_full_hashing_pool_is_an_outage_and_no_verdict(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whoever comes too many is told to come back, whatever the name, and it counts as no attempt.

    What needs no hash is served meanwhile.
    """
    entered, free = threading.Event(), threading.Event()
    verify = PasswordHasher._verify

    def held(*given: Any) -> Any:
        entered.set()
        free.wait(120)
        return verify(*given)

    async with running(test_settings(sqlite_url, hash_threads=1, hash_queue=0)) as service:
        client, user = await service.a_client(), await service.a_user()
        monkeypatch.setattr(PasswordHasher, "_verify", held)
        first = asyncio.create_task(
            service.token(client, grant_type="password", username=user.username, password=PASSWORD)
        )
        assert await asyncio.to_thread(entered.wait, 60)
        before = await written(service)
        for name in (user.username, "nobody") * 12:
            answer = await service.token(client, grant_type="password", username=name, password=PASSWORD)
            refusal(answer, "temporarily_unavailable", PASSWORD, status=503)
        assert (await service.token(client, grant_type="client_credentials")).status_code == 200
        assert (await service.http.get("/.well-known/jwks.json")).status_code == 200
        assert (await service.http.get("/readyz")).status_code == 200
        assert await written(service) == before
        free.set()
        assert (await first).status_code == 200
        assert await service.sign_in(client, user)


async def test_a_name_that_somebody_typed_a_password_into_is_kept_as_a_keyed_hash(embedded: Service) -> None:
    """The audit trail of failures holds nothing that was typed, and tells equal names apart from others."""
    client = await embedded.a_client()
    for name in ("hunter2 oops", "hunter2 oops", "other"):
        answer = await embedded.token(client, grant_type="password", username=name, password="irrelevant")
        refusal(answer, "invalid_grant", name)
    rows = await embedded.events("sign_in.failed")
    assert "hunter2" not in repr([tuple(row) for row in rows])
    assert [row.target.startswith("name:") for row in rows] == [True] * 3
    assert rows[0].target == rows[1].target != rows[2].target
