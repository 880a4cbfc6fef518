"""
Whatever fits the OpenAPI document, and much that does not, is answered as the document says, and never with a fault.

Requests are generated from the document (bounded and seeded, so that a failure can be repeated) and sent to a real
server on real PostgreSQL, by an operator who may do everything.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from identity_service.accounts.access import PERMISSIONS, SELF_SERVICE
from tests.support.server_process import ServerProcess
from tests.support.service import BOOTSTRAP_SECRET, PASSWORD, Service, running, test_settings

EXAMPLES = int(os.environ.get("TEST_OPENAPI_EXAMPLES", "6"))  # of each operation and each way of generating
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Operator:
    """Signs in, and again whenever what was generated has ended the session."""

    def __init__(self, base: str, client_id: str, username: str) -> None:
        self._base = base
        self._form = {
            "grant_type": "password",
            "client_id": client_id,
            "username": username,
            "password": PASSWORD,
        }
        self.headers: dict[str, str] = {}
        self.sign_in()

    def sign_in(self) -> None:
        """Get a new token."""
        answer = requests.post(f"{self._base}/token", data=self._form, timeout=10)
        assert answer.status_code == 200, answer.text
        self.headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}


async def prepare(service: Service) -> str:
    """Make an operator who holds everything, and a client for them; return its id."""
    client = await service.a_client(public=True, scope=sorted(SELF_SERVICE | PERMISSIONS), audiences=[])
    await service.a_user("boss", role="super_admin")
    await service.a_user("other", role="super_admin")  # so that the last one is not the one who asks
    return client.id


@pytest.fixture
def prepared(database_url: str) -> str:
    async def work() -> str:
        async with running(test_settings(database_url)) as service:
            return await prepare(service)

    return asyncio.run(work())


@pytest.fixture
def server(database_url: str, prepared: str) -> Iterator[ServerProcess]:
    with ServerProcess(
        database_url,
        registration="open",
        bootstrap_secret=BOOTSTRAP_SECRET,
        client_rate="100000",
        database_pool_size="4",
    ) as process:
        yield process


@pytest.mark.case("INP-24")
def test_what_the_openapi_document_describes_is_what_happens(server: ServerProcess, prepared: str) -> None:
    """No 5xx, no status and no media type that the document does not declare, and no answer of another shape."""
    document = requests.get(f"{server.url}/openapi.json", timeout=10).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    operator = Operator(server.url, prepared, "boss")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 50
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @seed(1)
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def conforms(case: schemathesis.Case) -> None:
                answer = case.call(headers=operator.headers, timeout=20)
                if answer.status_code == 401:
                    operator.sign_in()
                    answer = case.call(headers=operator.headers, timeout=20)
                case.validate_response(answer, checks=CHECKS)

            with contextlib.suppress(Unsatisfiable):  # where nothing is sent, nothing can be wrong with it
                conforms()
