"""
Servers with something wrong, each in the way in which a service like this one is wrong most easily.

They show that the question which is asked after every fault can be answered with no.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from identity_service.accounts.refresh_families.statements import ROTATE
from identity_service.cli import main as serve
from identity_service.infra.audit import AuditTrail
from identity_service.infra.database import Database, DatabaseUnavailable, Transaction, transaction

PROGRAM: Final = "from tests.faults.broken import main; main({!r})"
"""What to start, once it is told what shall be wrong."""

_EPOCH: Final = "AND user_epoch = (SELECT u.epoch FROM users u WHERE u.id = refresh_families.user_id AND u.enabled)"


def _speak_before_the_commit() -> None:
    run = Database.run

    async def early(self: Database, work: Callable[[Transaction], Awaitable[Any]], **given: Any) -> Any:
        answers: list[Any] = []

        async def noted(tx: Transaction) -> Any:
            answers.append(await work(tx))
            return answers[-1]

        try:
            return await run(self, noted, **given)
        except DatabaseUnavailable:
            if not answers:
                raise
            return answers[-1]

    Database.run = early  # type: ignore[method-assign]


def _repeat_what_may_have_happened() -> None:
    translate = transaction.translate
    transaction.translate = lambda error, *, committing: translate(error, committing=False)


def _look_at_no_epoch() -> None:
    statement: Any = ROTATE.element
    assert _EPOCH in statement.text
    statement.text = statement.text.replace(_EPOCH, "")


def _record_apart() -> None:
    record = AuditTrail.record

    async def apart(self: AuditTrail, tx: Transaction, event: str, **given: Any) -> None:
        async with Transaction(tx._engine) as another:
            await record(self, another, event, **given)

    AuditTrail.record = apart  # type: ignore[method-assign]


WRONGS: Final[dict[str, Callable[[], None]]] = {
    "it speaks before the commit": _speak_before_the_commit,
    "it repeats what may have happened": _repeat_what_may_have_happened,
    "it looks at no epoch": _look_at_no_epoch,
    "it records apart from the act": _record_apart,
}


def main(wrong: str) -> None:
    """Do what the command line does, with something wrong."""
    WRONGS[wrong]()
    serve()
