"""How PostgreSQL runs the statements of the service, noted in the driver while they run."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest


def note_plans(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[str], bool]) -> list[str]:
    """Return a list to which each statement from now on that is `wanted` adds its plan, as EXPLAIN prints it."""
    plans: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def noting(cursor: Any, query: Any, *given: Any, **named: Any) -> Any:
        statement = query.decode() if isinstance(query, bytes) else query
        if wanted(statement):
            await execute(cursor, f"EXPLAIN {statement}", *given, **named)
            plans.append("\n".join(row[0] for row in await cursor.fetchall()))
        return await execute(cursor, query, *given, **named)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", noting)
    return plans
