"""The log of a server in a process of its own is searched for secrets when it has ended."""

import pytest

from tests.support.canary import SCANNER
from tests.support.server_process import ServerProcess

TOKEN = "rt_" + "0aZ" * 20


@pytest.mark.case("SEC-01")
def test_a_secret_in_the_log_of_a_server_process_is_seen(sqlite_url: str) -> None:
    """However it ended; taken here, so that it does not fail this test."""
    for end in (ServerProcess.stop, ServerProcess.kill):
        with ServerProcess(sqlite_url) as server:
            end(server)
            with server._log.open("a", encoding="utf-8") as log:
                log.write(f'{{"event":"planted","seen":"{TOKEN}"}}\n')
            assert SCANNER.take() == []
        assert [str(leak) for leak in SCANNER.take()] == ["refresh token in the event 'planted' of a server process"]
