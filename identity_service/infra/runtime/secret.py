"""Texts that must not be seen."""

from typing import final


@final
class Secret:
    """
    A text that must not be seen: a password, a token, a key.

    Printing, formatting, logging or pickling it shows nothing. `reveal` is the one way to the text, and a word to
    search the code for. Compare secrets through digests or `hmac.compare_digest`, never with `==`.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "Secret(…)"

    def __reduce__(self) -> tuple[type, tuple[str]]:
        raise TypeError("a Secret does not leave the process")

    def __bool__(self) -> bool:
        return bool(self._text)
