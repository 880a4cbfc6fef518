"""What fetching keys and exchanging API keys share, as far as their own tests do not show it."""

import gc
import weakref

from identity_service.verifier import ApiKeyExchanger, TokenVerifier


def test_what_forgets_in_a_child_process_is_not_kept_alive_for_that() -> None:
    """A process may make a verifier for each request: none of them stays."""
    verifier = TokenVerifier("https://id.example", "https://orders.example")
    exchanger = ApiKeyExchanger(verifier, client_id="cl", client_secret="cs")
    seen = [weakref.ref(each) for each in (verifier, verifier._keys, exchanger)]
    del verifier, exchanger
    gc.collect()
    assert [each() for each in seen] == [None] * 3
