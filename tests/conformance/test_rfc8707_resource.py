"""RFC 8707: resource indicators, which choose the audience of a token."""

from typing import Any

import httpx2
import pytest

from tests.support.reading import unverified_claims
from tests.support.refusals import refusal, written
from tests.support.service import ISSUER, PASSWORD, SIBLING, Registered, Service
from tests.support.wire import post

BILLS = "https://bills.example/api"


async def ask(service: Service, client: Registered, *resources: str, **form: str) -> httpx2.Response:
    """Ask for a token for these resources, by client credentials unless `form` says otherwise."""
    form = form or {"grant_type": "client_credentials"}
    return await post(service, [*form.items(), *(("resource", each) for each in resources)], client=client)


def audience(answer: httpx2.Response) -> Any:
    """Return the `aud` of an issued access token."""
    assert answer.status_code == 200, answer.text
    return unverified_claims(answer.json()["access_token"])["aud"]


@pytest.mark.rfc("8707", "2")
async def test_unasked_a_token_is_for_the_clients_first_audience(embedded: Service) -> None:
    """For a client that has none it is the issuer: our own API."""
    assert audience(await ask(embedded, await embedded.a_client(audiences=(SIBLING, ISSUER)))) == SIBLING
    assert audience(await ask(embedded, await embedded.a_client(audiences=(ISSUER, SIBLING)))) == ISSUER
    bare = await embedded.a_client(audiences=())
    assert audience(await ask(embedded, bare)) == ISSUER
    assert audience(await ask(embedded, bare, ISSUER)) == ISSUER
    assert audience(await ask(embedded, bare, "")) == ISSUER
    refusal(await ask(embedded, bare, SIBLING), "invalid_target", SIBLING)


@pytest.mark.rfc("8707", "2")
@pytest.mark.case("TOK-08")
async def test_a_token_is_for_the_resources_that_were_named(embedded: Service) -> None:
    """Text for one, a list for several, each once, in the order asked for."""
    client = await embedded.a_client(audiences=(ISSUER, SIBLING, BILLS))
    assert audience(await ask(embedded, client, SIBLING)) == SIBLING
    assert audience(await ask(embedded, client, SIBLING, SIBLING)) == SIBLING
    assert audience(await ask(embedded, client, BILLS, SIBLING)) == [BILLS, SIBLING]
    assert audience(await ask(embedded, client, ISSUER)) == ISSUER


FOREIGN = (
    *("https://evil.example", "orders", "*", "/", f"{SIBLING}/", f"{SIBLING}#x", f"{SIBLING}?x", SIBLING.upper()),
    *(
        "http://orders.example",
        "https://orders.example:443",
        "https://orders.example.evil",
        f" {SIBLING}",
        "javascript:1",
    ),
)


@pytest.mark.rfc("8707", "2")
@pytest.mark.case("JWT-28")
@pytest.mark.parametrize("grant_type", ["client_credentials", "password"])
async def test_a_resource_that_is_not_the_clients_is_an_invalid_target(
    embedded: Service, grant_type: str, subtests: pytest.Subtests
) -> None:
    """Compared exactly, and each of several; nothing is written, and no password is looked at."""
    client, user = await embedded.a_client(), await embedded.a_user()
    form = {"grant_type": grant_type, "username": user.username, "password": PASSWORD}
    before = await written(embedded)
    for resource in FOREIGN:
        with subtests.test(resource):
            refusal(await ask(embedded, client, resource, **form), "invalid_target", resource, PASSWORD)
            refusal(await ask(embedded, client, SIBLING, resource, **form), "invalid_target", resource)
            refusal(await ask(embedded, client, resource, SIBLING, **form), "invalid_target", resource)
    assert await written(embedded) == before


@pytest.mark.rfc("9700", "2.3")
@pytest.mark.parametrize("grant_type", ["client_credentials", "password"])
async def test_the_issuer_is_never_combined_with_a_sibling(embedded: Service, grant_type: str) -> None:
    """A sibling that steals such a token could use it at our own API."""
    client, user = await embedded.a_client(), await embedded.a_user()
    form = {"grant_type": grant_type, "username": user.username, "password": PASSWORD}
    for pair in ((ISSUER, SIBLING), (SIBLING, ISSUER)):
        refusal(await ask(embedded, client, *pair, **form), "invalid_target")


@pytest.mark.rfc("9068", "4")
@pytest.mark.case("JWT-10")
async def test_a_token_for_a_sibling_is_useless_at_our_own_api(service: Service) -> None:
    """The same sign-in opens it with a token for the issuer."""
    client, user = await service.a_client(), await service.a_user()
    tokens = await service.sign_in(client, user)
    assert (await service.me(tokens["access_token"])).status_code == 200
    narrowed = await service.refresh(client, tokens["refresh_token"], resource=SIBLING)
    assert audience(narrowed) == SIBLING
    assert (await service.me(narrowed.json()["access_token"])).status_code == 401


@pytest.mark.rfc("8707", "2.2")
async def test_a_sign_in_that_names_no_resource_covers_all_of_the_clients(service: Service) -> None:
    """Each refresh may choose anew, and unasked gets the default."""
    client, user = await service.a_client(audiences=(ISSUER, SIBLING, BILLS)), await service.a_user()
    token = (await service.sign_in(client, user))["refresh_token"]
    for resources, expected in (
        ((SIBLING,), SIBLING),
        ((), ISSUER),
        ((BILLS, SIBLING), [BILLS, SIBLING]),
        ((), ISSUER),
    ):
        answer = await ask(service, client, *resources, grant_type="refresh_token", refresh_token=token)
        assert audience(answer) == expected
        token = answer.json()["refresh_token"]


@pytest.mark.rfc("8707", "2.2")
async def test_a_sign_in_that_names_a_resource_covers_that_one_only(service: Service) -> None:
    """A refresh for another one is refused and consumes nothing; a resource of the client is not one of the grant."""
    client, user = await service.a_client(audiences=(ISSUER, SIBLING, BILLS)), await service.a_user()
    token = (await service.sign_in(client, user, resource=SIBLING))["refresh_token"]
    before = await written(service)
    for resources in ((ISSUER,), (BILLS,), (SIBLING, BILLS), ("https://evil.example",)):
        answer = await ask(service, client, *resources, grant_type="refresh_token", refresh_token=token)
        refusal(answer, "invalid_target", token)
    assert await written(service) == before
    answer = await service.refresh(client, token)
    assert audience(answer) == SIBLING
    assert audience(await service.refresh(client, answer.json()["refresh_token"], resource=SIBLING)) == SIBLING


@pytest.mark.rfc("8693", "2.1")
async def test_the_audience_parameter_means_nothing_to_these_grants(embedded: Service) -> None:
    """It is token exchange's; here it neither chooses nor is refused."""
    client = await embedded.a_client()
    body = [("grant_type", "client_credentials"), ("audience", "https://evil.example"), ("audience", SIBLING)]
    assert audience(await post(embedded, body, client=client)) == ISSUER


async def test_many_resources_are_refused_like_any_flood(embedded: Service) -> None:
    """Repeating is allowed, a hundred times."""
    client = await embedded.a_client()
    assert audience(await ask(embedded, client, *([SIBLING] * 99))) == SIBLING
    refusal(await ask(embedded, client, *([SIBLING] * 100)), "invalid_request")
