"""What was checked, and what came of it: one line for each fact."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class NotSo(Exception):
    """The fact does not hold; the message says what was seen instead."""


class Impossible(Exception):
    """Nothing can be checked: a tool is missing, or a build failed for reasons that are none of the image's."""


@dataclass(slots=True)
class Report:
    """
    Collects the facts that did not hold, and prints each one as it is checked.

    A fact has a key of its own, by which a mutant names the check that must see it. Where only that one matters,
    nothing is tried after it (`until`), and nothing is printed (`quiet`).
    """

    failed: list[str] = field(default_factory=list)
    passed: int = 0
    until: str = ""
    quiet: bool = False

    @contextmanager
    def check(self, key: str, row: str, fact: str, *, needed: bool = False) -> Iterator[list[str]]:
        """
        Check one fact in a `with` block, which raises NotSo where it does not hold; what is put into the list is shown.

        What follows a fact that is `needed` is not tried without it: NotSo goes on to the caller.
        """
        seen: list[str] = []
        try:
            yield seen
        except Impossible:
            raise
        except Exception as reason:  # an answer in a form that nobody expected is an answer that is wrong
            self.failed.append(key)
            told = str(reason) if isinstance(reason, NotSo) else traceback.format_exc().strip()
            self._say(f"FAILED  {row:7} {fact} [{key}]\n        " + told.replace("\n", "\n        "))
            if needed:
                raise NotSo(fact) from None
        else:
            self.passed += 1
            self._say(f"ok      {row:7} {fact}" + (f" ({', '.join(seen)})" if seen else ""))
        if key == self.until:
            raise NotSo("what follows is not tried")

    def _say(self, line: str) -> None:
        if not self.quiet:
            say(line)


def require(holds: object, otherwise: str) -> None:
    """Raise NotSo with the message unless something holds."""
    if not holds:
        raise NotSo(otherwise)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
