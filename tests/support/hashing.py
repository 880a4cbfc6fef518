"""Seeing which passwords the service really computes a hash for."""

from typing import Any

import pytest

from identity_service.infra.runtime.hashing import PasswordHasher


def watch_verifications(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """
    Return a list that grows with every verification, in whichever thread; the work goes on as usual.

    An entry is the password and whether it was compared with a stored hash (False: with the decoy).
    """
    seen: list[tuple[str, bool]] = []
    verify = PasswordHasher._verify

    def watched(hasher: PasswordHasher, password: Any, stored: str | None, form: int) -> Any:
        seen.append((password.reveal(), stored is not None))
        return verify(hasher, password, stored, form)

    monkeypatch.setattr(PasswordHasher, "_verify", watched)
    return seen
