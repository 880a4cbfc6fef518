"""Lists in pages: opaque signed cursors, and entity tags for what is changed after it was looked at."""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar, final

from fastapi import Header, Query, Response
from pydantic import BaseModel

from identity_service.infra.data_keys import DataKeys
from identity_service.web.problems import Fault, Invalid, PreconditionFailed

Item = TypeVar("Item")

_MAC_BYTES = 16
_LONGEST_CURSOR = 1000

Limit = Annotated[int, Query(ge=1, le=100, description="The most to return.")]
CursorText = Annotated[
    str | None,
    Query(max_length=_LONGEST_CURSOR, description="`next_cursor` of the page before, with the same filters."),
]
IfMatch = Annotated[
    str | None,
    Header(max_length=500, description="The entity tag that was read; the change is refused if it moved on."),
]


class Page(BaseModel, Generic[Item]):
    """One page of a list; there are more as long as `next_cursor` is not null."""

    items: list[Item]
    next_cursor: str | None


@final
class Cursors:
    """
    Writes and reads the place where a page ended.

    Signed, so that nobody can put values of their own into a query's condition; bound to the list and its filters, so
    that a cursor is of no use elsewhere.
    """

    def __init__(self, keys: DataKeys) -> None:
        self._keys = keys

    def write(self, listing: str, filters: Any, place: Sequence[Any]) -> str:
        """Return the cursor for `place`, a list of JSON values."""
        payload = json.dumps(list(place), separators=(",", ":")).encode("ascii")
        return base64.urlsafe_b64encode(self._mac(listing, filters, payload) + payload).rstrip(b"=").decode("ascii")

    def read(self, listing: str, filters: Any, cursor: str | None) -> list[Any] | None:
        """Return the place a cursor stands for, None for none; raises Invalid for one that is not this list's."""
        if cursor is None:
            return None
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        mac, payload = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(listing, filters, payload)):
            raise Invalid(Fault("/cursor", "not a cursor of this list with these filters"))
        place: list[Any] = json.loads(payload)
        return place

    def page(
        self,
        listing: str,
        filters: Any,
        cursor: str | None,
        items: Sequence[Item],
        place_of: Callable[[Item], list[Any]],
        limit: int,
    ) -> tuple[list[Item], str | None]:
        """
        Return one page of a list that is short enough to be read at once, and the next page's cursor.

        The list is sorted by `place_of`, the greatest first. Raises Invalid for a cursor that is not this list's.
        """
        place = self.read(listing, filters, cursor)
        rest = [item for item in items if place is None or place_of(item) < place]
        page = rest[:limit]
        return page, self.write(listing, filters, place_of(page[-1])) if len(rest) > limit else None

    def _mac(self, listing: str, filters: Any, payload: bytes) -> bytes:
        bound = json.dumps([listing, filters], sort_keys=True, default=str).encode("ascii")
        return self._keys["cursors"].mac(len(bound).to_bytes(4, "big") + bound + payload)[:_MAC_BYTES]


def entity_tag(document: BaseModel) -> str:
    """Return the strong entity tag of what is shown (RFC 9110 §8.8.3): any change of it is another tag."""
    digest = hashlib.sha256(document.model_dump_json().encode("utf-8")).hexdigest()
    return f'"{digest[:32]}"'


def check_if_match(if_match: str | None, current: BaseModel) -> None:
    """Raise PreconditionFailed unless `current` is what the caller saw; no If-Match, no condition (§13.1.1)."""
    if if_match is None or if_match.strip() == "*":
        return
    if entity_tag(current) not in (tag.strip() for tag in if_match.split(",")):
        raise PreconditionFailed


def tagged(response: Response, document: Item) -> Item:
    """Return the document, its entity tag put into the answer's headers."""
    assert isinstance(document, BaseModel)  # noqa: S101  # what we show is always a model
    response.headers["etag"] = entity_tag(document)
    return document
