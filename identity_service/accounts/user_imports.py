"""
The lines of an import file, from bytes to users that could be stored.

A file is what another system let go of, so nothing in it is believed: each line is taken apart strictly, and one that
breaks a rule is refused with a reason that repeats none of its secrets, while the run goes on. Nothing here knows the
database.
"""

import csv
import io
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, BinaryIO, final

from identity_service.accounts.users import LOWEST_ROLE, InvalidUser, Users, check_display_name
from identity_service.accounts.users.imports import ImportedUser
from identity_service.infra.runtime import parse_uuid
from identity_service.infra.runtime.hashing import NFKC_FORM, RAW_FORM, StoredHash, UnusableHash, read_hash

LONGEST_LINE = 64 * 1024
"""Bytes, without what ends the line."""

FIELDS = (
    "id",
    "username",
    "email",
    "email_verified",
    "name",
    "role",
    "enabled",
    "created_at",
    "password_hash",
    "password_form",
)
"""What a line may hold; only `username` and `email` it must."""

ROLE_NOT_ALLOWED = "role: not one that this run may give"
"""Why a line is refused whose role is not among those that the run may give."""

PASSWORD_FORMS = {"raw": RAW_FORM, "nfkc": NFKC_FORM}
"""How the password was brought into form before it was hashed; other systems leave it as it was typed."""

_FLAGS = ("email_verified", "enabled")
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_CLOCK_SKEW = timedelta(days=1)  # the other system's clock, and a careless time zone
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
_UTF8_MARK = b"\xef\xbb\xbf"
# What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection), in full width too, and the same behind
# our marks.
_FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")  # noqa: RUF001  # those are meant
_MARKED = re.compile(rf"'+{_FORMULA.pattern}")
_TO_BE_MARKED = re.compile(rf"'*{_FORMULA.pattern}")


class LineRefused(ValueError):
    """A line cannot be imported; the message says why and holds neither a secret nor the line."""


class FileRefused(ValueError):
    """The file cannot be read as what it is said to be; the message says why."""


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One record of a file: the number of its first line, and its fields or why it has none."""

    number: int
    fields: Mapping[str, Any]
    refused: str | None = None

    @property
    def username(self) -> str | None:
        """The username as it stands in the file, if it may be shown."""
        given = self.fields.get("username")
        return given if isinstance(given, str) and len(given) <= 64 and given.isprintable() else None


# -- reading ----------------------------------------------------------------------------------------------------------


def _lines(source: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield every line with its number, and None for one that is too long, of which no more than that was read."""
    at_once = LONGEST_LINE + 2  # it may end with two characters
    number = 0
    while piece := source.readline(at_once):
        number += 1
        cut = len(piece) == at_once and not piece.endswith(b"\n")
        line = piece.removeprefix(_UTF8_MARK) if number == 1 else piece  # spreadsheets begin a file with it
        yield number, None if cut or len(line.rstrip(b"\r\n")) > LONGEST_LINE else line
        while cut:
            piece = source.readline(at_once)
            cut = len(piece) == at_once and not piece.endswith(b"\n")


def read_jsonl(source: BinaryIO) -> Iterator[Line]:
    """Yield the record of every line that is not blank."""
    for number, line in _lines(source):
        if line is None:
            yield Line(number, {}, "the line is longer than 64 KiB")
        elif line.strip():
            try:
                yield Line(number, _object(line))
            except LineRefused as error:
                yield Line(number, {}, str(error))


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise LineRefused("the line is not valid UTF-8") from None
    except LineRefused:
        raise
    except (ValueError, RecursionError):
        raise LineRefused("the line is not valid JSON") from None
    if not isinstance(value, dict):
        raise LineRefused("the line is not a JSON object")
    return value


def _distinct(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's members; parsers disagree about which of two of one name counts (RFC 8259 §4)."""
    found = dict(members)
    if len(found) < len(members):
        raise LineRefused("a JSON object has two members of one name")
    return found


def _no_number(_word: str) -> None:
    raise LineRefused("the line is not valid JSON")  # NaN and Infinity


def is_formula(cell: str) -> bool:
    """Return whether a spreadsheet would take a cell for a formula and run it."""
    return _FORMULA.match(cell) is not None


def read_csv(source: BinaryIO, *, ignore_unknown: bool) -> Iterator[Line]:
    """
    Yield the record of every line after the header (RFC 4180); a quoted cell may hold line breaks.

    An empty cell is an absent field, and the mark that `write_csv` puts before a formula is taken off.
    Raises FileRefused for a header that cannot be.
    """
    records = _csv_records(source)
    _, header = next(records, (1, "the file is empty"))
    if isinstance(header, str):
        raise FileRefused(f"the header: {header}")
    if len(set(header)) < len(header):
        raise FileRefused("the header names a column twice")
    if missing := {"username", "email"} - set(header):
        raise FileRefused(f"the header lacks {', '.join(sorted(missing))}")
    if not ignore_unknown and not set(header) <= set(FIELDS):
        raise FileRefused(f"the header has other columns than {', '.join(FIELDS)}")
    for number, cells in records:
        if isinstance(cells, str):
            yield Line(number, {}, cells)
        elif len(cells) != len(header):
            yield Line(number, {}, "the line has not as many cells as the header")
        else:
            yield Line(number, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell})


def _cell(name: str, cell: str) -> Any:
    """Return what a cell stands for; spreadsheets write TRUE and FALSE."""
    if _MARKED.match(cell):
        return cell[1:]
    return {"true": True, "false": False}.get(cell.lower(), cell) if name in _FLAGS else cell


# A cell in quotes, or one that holds nothing that would need them. The quantifiers give nothing back, so the time is
# linear whatever the file holds.
_CELL = rb'(?:"(?:[^"]++|"")*+"|[^",\r\n]*+)'
_RECORD = re.compile(rb"%b(?:,%b)*+\r?\n?" % (_CELL, _CELL))
_UNFINISHED = re.compile(rb'(?:%b,)*+"(?:[^"]++|"")*+' % _CELL)


def _csv_records(source: BinaryIO) -> Iterator[tuple[int, list[str] | str]]:
    """
    Yield the cells of every record that is not blank, or why it has none.

    A quote that is never closed refuses the line it stands in, and reading goes on with the next line: it must not
    swallow what follows.
    """
    lines = _lines(source)
    kept: list[tuple[int, bytes | None]] = []  # read, and not yet part of a record
    while kept or (kept := list(islice(lines, 1))):
        number, text = kept[0]
        too_long, taken = text is None, 1
        while text is not None and _UNFINISHED.fullmatch(text):
            if taken == len(kept):
                kept += islice(lines, 1)
            more = kept[taken][1] if taken < len(kept) else None
            text = None if more is None or len(text) + len(more) > LONGEST_LINE else text + more
            taken += 1
        if too_long:
            yield number, "the line is longer than 64 KiB"
        elif text is None or not _RECORD.fullmatch(text):
            taken = 1
            yield number, "the line is not valid CSV"
        elif text.strip():
            yield number, _cells(text)
        del kept[:taken]


def _cells(record: bytes) -> list[str] | str:
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError:
        return "the line is not valid UTF-8"
    return next(csv.reader(io.StringIO(text, newline=""), strict=True))


# -- checking ---------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class ImportRules:
    """What a line must be in this run."""

    now: datetime
    roles: frozenset[str]
    """The roles that the run may give."""
    ignore_unknown: bool = False

    def accept(self, line: Line) -> tuple[ImportedUser, StoredHash | None]:
        """Return the user of a line and what their hash says, if they have one; raises LineRefused."""
        if line.refused is not None:
            raise LineRefused(line.refused)
        fields = line.fields
        for name, value in fields.items():
            if name not in FIELDS and not self.ignore_unknown:
                shown = f" {name}" if _FIELD_NAME.fullmatch(name) else ""
                raise LineRefused(f"there is no field{shown}")
            if isinstance(value, str) and _IMPOSSIBLE.search(value):
                raise LineRefused("a text holds a NUL or half of a surrogate pair")
        try:
            username, canonical = Users.check_names(_text(fields, "username") or "", _text(fields, "email") or "")
            display_name = check_display_name(_text(fields, "name"))
        except InvalidUser as error:
            raise LineRefused(str(error)) from None
        if (role := _text(fields, "role") or LOWEST_ROLE) not in self.roles:
            raise LineRefused(ROLE_NOT_ALLOWED)
        kept, form = _hash(fields)
        user = ImportedUser(
            id=_id(_text(fields, "id")),
            username=username,
            email=fields["email"],
            email_canonical=canonical,
            email_verified=_flag(fields, "email_verified", False),
            name=display_name,
            role=role,
            enabled=_flag(fields, "enabled", True),
            created_at=self._instant(_text(fields, "created_at")),
            password_hash=_text(fields, "password_hash"),
            password_form=form,
        )
        return user, kept

    def _instant(self, text: str | None) -> datetime | None:
        if text is None:
            return None
        try:
            moment = datetime.fromisoformat(text)
            if moment.tzinfo is None:
                raise LineRefused("created_at: needs an offset from UTC, such as Z")
            if not _EARLIEST <= moment <= self.now + _CLOCK_SKEW:
                raise LineRefused("created_at: lies in the future, or before 1970")
            return moment.astimezone(UTC)
        except LineRefused:
            raise
        except ValueError:
            raise LineRefused("created_at: not an ISO 8601 date and time") from None


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    """Return a text; an empty one is none, as in a table's empty cell."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise LineRefused(f"{name}: must be a text")
    return value or None


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise LineRefused(f"{name}: must be true or false")
    return value


def _id(text: str | None) -> uuid.UUID | None:
    if text is None:
        return None
    if (user_id := parse_uuid(text)) is None:
        raise LineRefused("id: not a UUID")
    return user_id


def _hash(fields: Mapping[str, Any]) -> tuple[StoredHash | None, int]:
    """Return what the hash of a line says, and the form that the password was in."""
    form = PASSWORD_FORMS.get(_text(fields, "password_form") or "raw")
    if form is None:
        raise LineRefused(f"password_form: one of {', '.join(PASSWORD_FORMS)}")
    if (stored := _text(fields, "password_hash")) is None:
        return None, form
    try:
        return read_hash(stored), form
    except UnusableHash as error:
        raise LineRefused(f"password_hash: {error}") from None


# -- writing ----------------------------------------------------------------------------------------------------------


def export_line(user: ImportedUser, *, with_password_hash: bool) -> dict[str, Any]:
    """Return a user as the fields of a line; what they do not have is left out."""
    form = next(name for name, number in PASSWORD_FORMS.items() if number == user.password_form)
    secret = {"password_hash": user.password_hash, "password_form": form} if user.password_hash else {}
    fields = {
        "id": str(user.id) if user.id else None,
        "username": user.username,
        "email": user.email,
        "email_verified": user.email_verified,
        "name": user.name,
        "role": user.role,
        "enabled": user.enabled,
        "created_at": user.created_at.isoformat() if user.created_at else None,
        **(secret if with_password_hash else {}),
    }
    return {name: value for name, value in fields.items() if value is not None}


def write_jsonl(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return records as lines of JSON."""
    return "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in lines)


def write_csv(lines: Sequence[Mapping[str, Any]], *, header: bool) -> str:
    """
    Return records as lines of a table with every column.

    An apostrophe marks what a spreadsheet would take for a formula, as well as what looks marked already, so that
    `read_csv` gives back exactly what there was.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(FIELDS)
    for fields in lines:
        writer.writerow([_written(fields.get(name, "")) for name in FIELDS])
    return text.getvalue()


def _written(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and _TO_BE_MARKED.match(value) else value
