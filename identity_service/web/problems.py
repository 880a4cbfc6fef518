"""
What the JSON API answers when it does not do what it was asked (RFC 9457), as exceptions.

They are raised inside the transaction, so that the rollback leaves nothing half done. Texts are constants and never
repeat what was sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a body: where (a JSON pointer, RFC 6901) and what, without the value."""

    pointer: str
    detail: str


class Problem(HTTPException):
    """A refusal of the JSON API; `title` is for whoever wrote the caller."""

    def __init__(
        self, status: int, title: str, *, faults: Sequence[Fault] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, title, dict(headers) if headers else None)
        self.faults = tuple(faults)

    @property
    def members(self) -> dict[str, Any]:
        """What the answer says besides title and status."""
        if not self.faults:
            return {}
        return {"errors": [{"pointer": fault.pointer, "detail": fault.detail} for fault in self.faults]}


class BadRequest(Problem):
    """The request contradicts itself or cannot be read."""

    def __init__(self, title: str) -> None:
        super().__init__(400, title)


class Forbidden(Problem):
    """The caller is known and may not do this to that."""

    def __init__(self, title: str = "You may not do this.") -> None:
        super().__init__(403, title)


class NotFound(Problem):
    """There is no such thing, or none the caller may know of: the same words for both."""

    def __init__(self) -> None:
        super().__init__(404, "There is nothing here.")


class Conflict(Problem):
    """The request was right and contradicts what is."""

    def __init__(self, title: str) -> None:
        super().__init__(409, title)


class PreconditionFailed(Problem):
    """Somebody else changed it since the caller looked (RFC 9110 §13.1.1)."""

    def __init__(self) -> None:
        super().__init__(412, "It was changed meanwhile. Read it again.")


class Invalid(Problem):
    """The body says something that cannot be."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(422, "The request is not valid.", faults=faults)
