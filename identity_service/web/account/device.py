"""What a person recognises a session by: the program and the system that a user agent speaks of."""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from identity_service.infra.tables import LONGEST_USER_AGENT

if TYPE_CHECKING:
    from ua_parser import Parser


@cache
def _parser() -> "Parser":
    # Only who looks at sessions pays for the library and its tables: a tenth of a second, and 6 MB.
    from ua_parser import BasicResolver, Parser, load_lazy_builtins

    return Parser(BasicResolver(load_lazy_builtins()))


def device_of(user_agent: str | None) -> str | None:
    """
    Return "Firefox on Linux" for what Firefox says on Linux, or None where nothing is recognised.

    Only words of the library's tables are shown, and what a pattern of theirs took from the text: one printable line.
    """
    if not user_agent:
        return None
    from ua_parser import Domain

    found = _parser()(user_agent[:LONGEST_USER_AGENT], Domain.USER_AGENT | Domain.OS)
    program = found.user_agent.family if found.user_agent else None
    system = found.os.family if found.os else None
    words = " on ".join(word for word in (program, system) if word and word != "Other")
    return words if words and words.isprintable() else None


def devices_of(user_agents: Iterable[str | None]) -> dict[str | None, str | None]:
    """Return what each user agent is shown as. Takes milliseconds for many, so call it beside the event loop."""
    return {user_agent: device_of(user_agent) for user_agent in set(user_agents)}
