"""The lines of an import file: which become users, which are refused, and that no line harms the next."""

import contextlib
import io
import json
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from identity_service.accounts.user_imports import (
    FIELDS,
    LONGEST_LINE,
    FileRefused,
    ImportRules,
    Line,
    LineRefused,
    export_line,
    read_csv,
    read_jsonl,
    write_csv,
    write_jsonl,
)
from identity_service.accounts.users.imports import ImportedUser
from identity_service.infra.runtime.hashing import NFKC_FORM, RAW_FORM

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
RULES = ImportRules(NOW, frozenset({"user", "moderator"}))
HASH = "$2b$12$GhvMmNVjRW29ulnudl.LbuAnUtN/LRfe1JsBm1Xu6LE3059z5Tr8m"
CANARY = "hunter2"
ADA = {"username": "ada", "email": "ada@example.org"}


def jsonl(*lines: bytes | dict[str, Any]) -> list[Line]:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    return list(read_jsonl(io.BytesIO(b"".join(texts))))


def table(text: str | bytes, *, ignore_unknown: bool = False) -> list[Line]:
    content = text.encode() if isinstance(text, str) else text
    return list(read_csv(io.BytesIO(content), ignore_unknown=ignore_unknown))


def accept(fields: dict[str, Any], rules: ImportRules = RULES) -> ImportedUser:
    return rules.accept(Line(1, fields))[0]


def reason(line: Line | dict[str, Any], rules: ImportRules = RULES) -> str:
    with pytest.raises(LineRefused) as refusal:
        rules.accept(line if isinstance(line, Line) else Line(1, line))
    assert CANARY not in str(refusal.value)
    return str(refusal.value)


class Counted(io.BytesIO):
    """Notes the most that was asked for at once."""

    most = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size > 0
        self.most = max(self.most, size)
        return super().readline(size)


# -- JSON lines -------------------------------------------------------------------------------------------------------


def test_each_line_of_json_is_a_record() -> None:
    """Blank lines are passed over and counted; a byte order mark, CR and a missing last line end do not matter."""
    found = jsonl(b"\xef\xbb\xbf" + json.dumps(ADA).encode() + b"\r\n", b"\n", b"  \t\r\n", b'{"username": "bob"}')
    assert found == [Line(1, ADA), Line(4, {"username": "bob"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"username": "ada", "username": "bob"}', "two members of one name"),
        (b'{"username": "ada", "\\u0075sername": "bob"}', "two members of one name"),
        (b'{"x": {"a": 1, "a": 2}}', "two members of one name"),
        (b"{", "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": "raw \x01 control"}', "not valid JSON"),
        (b"[" * 60_000, "not valid JSON"),
        (b'{"a":' * 10_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"17", "not a JSON object"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"a": "\xc0\x80"}', "not valid UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not valid UTF-8"),
        (b'{"username": "' + b"x" * LONGEST_LINE + b'"}', "longer than 64 KiB"),
    ],
    ids=range(22),
)
def test_a_line_that_is_no_object_is_refused_and_the_next_is_read(line: bytes, said: str) -> None:
    """Whatever is wrong with it."""
    found = jsonl(ADA, line + b"\n", ADA)
    assert [record.number for record in found] == [1, 2, 3]
    assert said in reason(found[1])
    assert accept(dict(found[0].fields)) == accept(dict(found[2].fields))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=["LF", "CRLF", "nothing"])
@pytest.mark.parametrize("over", [0, 1, 2, 3, 200_000])
def test_a_line_has_at_most_64_kib(over: int, end: bytes) -> None:
    """However it ends; no more of a longer one is held than that."""
    frame = b'{"x": ""}'
    line = b'{"x": "' + b"y" * (LONGEST_LINE - len(frame) + over) + b'"}'
    source = Counted(line + end + (json.dumps(ADA).encode() if end else b""))
    found = list(read_jsonl(source))
    assert (found[0].refused is not None) == (over > 0)
    assert [record.number for record in found] == ([1, 2] if end else [1])
    assert source.most <= LONGEST_LINE + 2


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""], ids=["marked", "unmarked"])
@pytest.mark.parametrize("filling", [b"x", b"\r"])
def test_the_rest_of_a_long_line_is_no_line(start: bytes, filling: bytes) -> None:
    """Also in the first one, after a byte order mark, and if the cut goes through a line end."""
    for size in (LONGEST_LINE, LONGEST_LINE + 1, LONGEST_LINE + 2, LONGEST_LINE + 3, 3 * LONGEST_LINE):
        long = start + b"y" * (LONGEST_LINE + 3 - size % 7) + filling * size
        found = jsonl(long + b"\n", ADA)
        assert [(line.number, line.fields) for line in found] == [(1, {}), (2, ADA)]


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_each_record_of_a_table_is_one() -> None:
    """Cells in quotes may hold commas, quotes and line breaks; an empty cell is none; a record is its first line."""
    found = table(
        "\ufeffusername,email,enabled,note\r\n"
        'ada,ada@example.org,TRUE,"one\r\ntwo\n""three"", four"\r\n'
        "\r\n"
        "bob,bob@example.org,false,\r\n"
        '"cy",cy@example.org,"",""',
        ignore_unknown=True,
    )
    assert found == [
        Line(2, ADA | {"enabled": True, "note": 'one\r\ntwo\n"three", four'}),
        Line(6, {"username": "bob", "email": "bob@example.org", "enabled": False}),
        Line(7, {"username": "cy", "email": "cy@example.org"}),
    ]
    rules = ImportRules(NOW, frozenset({"user"}), ignore_unknown=True)
    assert [accept(dict(line.fields), rules).username for line in found] == ["ada", "bob", "cy"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('x,"never closed', "not valid CSV"),
        ('"never closed', "not valid CSV"),
        ('x,"closed" too early,y', "not valid CSV"),
        ('x,quo"te,y', "not valid CSV"),
        ("x,carriage\rreturn", "not valid CSV"),
        ("x", "not as many cells"),
        ("x,y,z,a,b", "not as many cells"),
        (",,,", "username: "),
        ("x," + "y" * LONGEST_LINE, "longer than 64 KiB"),
        ('x,"' + "y" * LONGEST_LINE + '"', "longer than 64 KiB"),
        ('x,"y\n' + "z" * (LONGEST_LINE - 3) + '"', "not valid CSV"),
        (b"x,\xff,,", "not valid UTF-8"),
        (b'x,"\xed\xa0\x80\n",,', "not valid UTF-8"),
        (b"x,\xff\xfe\x00", "not valid UTF-8"),
    ],
    ids=range(14),
)
def test_a_line_that_is_no_record_is_refused_and_the_next_is_read(line: str | bytes, said: str) -> None:
    """A quote that is never closed swallows nothing of what follows."""
    content = line if isinstance(line, bytes) else line.encode()
    found = table(b"username,email,name,role\nada,ada@example.org,,\n" + content + b"\nbob,bob@example.org,,\n")
    assert said in reason(found[1])
    assert found[0] == Line(2, ADA)
    assert found[-1] == Line(
        4 + line.count(b"\n" if isinstance(line, bytes) else "\n"),
        {  # type: ignore[arg-type]
            "username": "bob",
            "email": "bob@example.org",
        },
    )


def test_quotes_that_nobody_closes_take_no_time() -> None:
    """Each refuses its own line, and looks at most 64 KiB ahead for its end."""
    good = "\n".join(f"user{number},user{number}@example.org" for number in range(3000))
    begun = time.monotonic()
    found = table(f'username,email\n"open,1\n{good}\n"open,2\n{good}\n"open,3')
    assert time.monotonic() - begun < 20
    assert [line.number for line in found if line.refused] == [2, 3003, 6004]
    assert len(found) == 6003


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("username,name", "lacks email"),
        ("name", "lacks email, username"),
        ("username,email,email", "a column twice"),
        ("username,email,password", "other columns"),
        ("username,email,Name", "other columns"),
        ('username,"email', "not valid CSV"),
        ("username;email", "lacks"),
        ("x" * 70_000, "64 KiB"),
    ],
    ids=range(10),
)
def test_a_table_without_a_right_header_is_refused_whole(header: str, said: str) -> None:
    """Every line would be."""
    with pytest.raises(FileRefused, match=said):
        table(header + "\n")


# -- users ------------------------------------------------------------------------------------------------------------


def test_a_username_and_an_address_are_enough() -> None:
    """Everything else has a default, the safe one: nothing proven, no role, no password."""
    assert accept({"username": "Ada.L", "email": "Ada@Example.ORG"}) == ImportedUser(
        id=None,
        username="ada.l",
        email="Ada@Example.ORG",
        email_canonical="ada@example.org",
        email_verified=False,
        name=None,
        role="user",
        enabled=True,
        created_at=None,
        password_hash=None,
        password_form=RAW_FORM,
    )


def test_a_full_line_is_kept_as_it_is() -> None:
    """The id, so that other systems' references stay right, and the instant, in UTC."""
    subject = uuid.uuid4()
    fields = {
        "id": str(subject).upper(),
        "username": "ada",
        "email": "ada@example.org",
        "email_verified": True,
        "name": " Ada, Countess of Lovelace ",
        "role": "moderator",
        "enabled": False,
        "created_at": "1990-12-10T01:02:03.5+02:00",
        "password_hash": HASH,
        "password_form": "nfkc",
    }
    assert set(fields) == set(FIELDS)
    user, kept = RULES.accept(Line(1, fields))
    assert user == ImportedUser(
        id=subject,
        username="ada",
        email="ada@example.org",
        email_canonical="ada@example.org",
        email_verified=True,
        name="Ada, Countess of Lovelace",
        role="moderator",
        enabled=False,
        created_at=datetime(1990, 12, 9, 23, 2, 3, 500_000, tzinfo=UTC),
        password_hash=HASH,
        password_form=NFKC_FORM,
    )
    assert kept is not None
    assert (kept.scheme, kept.weak) == ("bcrypt", False)


@pytest.mark.parametrize("absent", [None, ""], ids=["null", "empty"])
def test_null_and_an_empty_text_are_absent(absent: str | None) -> None:
    """As an empty cell is."""
    optional = ("name", "role", "created_at", "password_hash", "password_form", "id")
    assert accept(ADA | dict.fromkeys(optional, absent)) == accept(ADA)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"email": "ada@example.org"}, "username: "),
    ({"username": "ada"}, "email: "),
    *[
        (ADA | {"username": name}, "username: ")
        for name in ("", None, "-ada", "a b", "ädä", "\u0430", "a" * 65, "ada\n", "a@b.org", "~ada", "ada\u200b")
    ],
    *[
        (ADA | {"email": address}, "email: ")
        for address in (
            *("", "ada", "ada@", "@x.org", "ada@localhost", "m\u0131ke@example.org", "a@x.org\n", "a b@x.org"),
            "x@deleted.invalid",
        )
    ],
    *[
        (ADA | {name: 7}, f"{name}: must be a text")
        for name in ("username", "email", "name", "role", "id", "created_at")
    ],
    *[(ADA | {name: [CANARY]}, f"{name}: must be a text") for name in ("password_hash", "password_form")],
    (ADA | {"username": False}, "username: must be a text"),
    *[
        (ADA | {name: value}, f"{name}: must be true or false")
        for name in ("email_verified", "enabled")
        for value in ("true", "yes", 1, 0, None, "", [])
    ],
    (ADA | {"role": "admin"}, "role: "),
    (ADA | {"role": "super_admin"}, "role: "),
    (ADA | {"role": "User"}, "role: "),
    (ADA | {"role": "nobody"}, "role: "),
    (ADA | {"name": "x" * 201}, "name: "),
    (ADA | {"name": "two\nlines"}, "name: "),
    (ADA | {"name": "right\u202eleft"}, "name: "),
    (ADA | {"name": "nul\0"}, "NUL or half"),
    (ADA | {"name": "half \ud83d"}, "NUL or half"),
    (ADA | {"password_hash": "\ud800"}, "NUL or half"),
    *[
        (ADA | {"id": value}, "id: not a UUID")
        for value in ("7", "x" * 36, "{" + str(uuid.uuid4()) + "}", uuid.uuid4().hex, "urn:uuid:" + str(uuid.uuid4()))
    ],
    *[
        (ADA | {"created_at": value}, "created_at: ")
        for value in (
            *("yesterday", "1600000000", "2020-01-01", "2020-01-01T00:00:00", "2020-13-01T00:00:00Z"),
            *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-12-31T23:59:59Z"),
            (NOW + timedelta(days=1, seconds=1)).isoformat(),
        )
    ],
    (ADA | {"password_hash": CANARY}, "password_hash: the format is not known"),
    (ADA | {"password_hash": "!" + CANARY}, "password_hash: the format is not known"),
    (ADA | {"password_hash": HASH.replace("$12$", "$15$")}, "password_hash: bcrypt with more than"),
    (ADA | {"password_hash": "sha1$salt$" + CANARY}, "password_hash: the format is not known"),
    (ADA | {"password_form": "nfc"}, "password_form: one of raw, nfkc"),
    (ADA | {"password": CANARY}, "there is no field password"),
    (ADA | {f"{CANARY} is my password": ""}, "there is no field"),
    (ADA | {"Username": "ada"}, "there is no field Username"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), REFUSED, ids=range(len(REFUSED)))
def test_a_line_that_breaks_a_rule_is_refused_with_a_reason(fields: dict[str, Any], said: str) -> None:
    """Which names the field and repeats none of its secrets."""
    assert reason(fields).startswith(said) or said in reason(fields)


def test_a_clock_that_is_ahead_is_no_reason() -> None:
    """Another machine's clock, or a careless time zone."""
    assert accept(ADA | {"created_at": (NOW + timedelta(hours=14)).isoformat()}).created_at


def test_unknown_fields_are_passed_over_when_asked_for() -> None:
    """But not what could not be stored anywhere."""
    rules = ImportRules(NOW, frozenset({"user"}), ignore_unknown=True)
    assert accept(ADA | {"password": CANARY, "groups": [{"a": None}], "Username": 7}, rules) == accept(ADA)
    assert "NUL or half" in reason(ADA | {"note": "nul\0"}, rules)


def test_only_the_roles_of_the_run_are_given() -> None:
    """Those above `user` are named by whoever starts it."""
    assert accept(ADA | {"role": "moderator"}).role == "moderator"
    only_users = ImportRules(NOW, frozenset({"user"}))
    assert "role: " in reason(ADA | {"role": "moderator"}, only_users)
    everything = ImportRules(NOW, frozenset({"user", "super_admin"}))
    assert accept(ADA | {"role": "super_admin"}, everything).role == "super_admin"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("Ada L", "Ada L"),
        ("", ""),
        ("ädä", "ädä"),
        ("x" * 65, None),
        ("bell\a", None),
        ("\u202e", None),
        ("\ud800", None),
        (7, None),
        (None, None),
    ],
    ids=range(9),
)
def test_a_report_shows_a_username_only_if_it_can_be_printed(given: Any, shown: str | None) -> None:
    """It may be shown on a terminal."""
    assert Line(1, {"username": given}).username == shown


# -- both ways --------------------------------------------------------------------------------------------------------

LETTERS = st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" ,\";='")
USERS = st.builds(
    ImportedUser,
    id=st.uuids(),
    username=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True),
    email=st.just("Ada@Example.org"),
    email_canonical=st.just("ada@example.org"),
    email_verified=st.booleans(),
    name=st.none() | st.text(LETTERS, min_size=1, max_size=200).map(str.strip).filter(bool),
    role=st.sampled_from(["user", "moderator"]),
    enabled=st.booleans(),
    created_at=st.datetimes(datetime(1970, 1, 1), datetime(2025, 12, 31), timezones=st.just(UTC)),  # noqa: DTZ001
    password_hash=st.just(HASH),
    password_form=st.sampled_from([RAW_FORM, NFKC_FORM]),
)


@given(users=st.lists(USERS, max_size=5))
def test_what_is_written_is_read_as_the_same(users: list[ImportedUser]) -> None:
    """In both formats, names with commas, quotes and equals signs too."""
    lines = [export_line(user, with_password_hash=True) for user in users]
    as_json = list(read_jsonl(io.BytesIO(write_jsonl(lines).encode())))
    as_table = table(write_csv(lines, header=True))
    assert [RULES.accept(line)[0] for line in as_json] == users
    assert [RULES.accept(line)[0] for line in as_table] == users


def test_hashes_are_written_only_when_asked_for() -> None:
    """And not the form of a hash that is not there."""
    user, _ = RULES.accept(Line(1, ADA | {"password_hash": HASH}))
    assert export_line(user, with_password_hash=True)["password_hash"] == HASH
    assert not {"password_hash", "password_form"} & set(export_line(user, with_password_hash=False))
    without, _ = RULES.accept(Line(1, ADA))
    assert not {"password_hash", "password_form"} & set(export_line(without, with_password_hash=True))
    header, row = write_csv([export_line(user, with_password_hash=False)], header=True).splitlines()
    assert header == ",".join(FIELDS)
    assert HASH not in row


def _checked(lines: Iterable[Line]) -> None:
    for line in lines:
        with contextlib.suppress(LineRefused):
            ImportRules(NOW, frozenset({"user"}), ignore_unknown=True).accept(line)


PIECES = st.sampled_from(
    [
        *(b'"', b",", b"\n", b"\r\n", b"\r", b'""', b"username", b"email", b"ada", b"\xff", b"\0", b"{", b"}", b":"),
        b"a@b.cd",
    ]
)


@given(pieces=st.lists(PIECES | st.binary(max_size=5), max_size=60))
@example([b"username,email\n", b'"'])
@example([b'"'])
def test_no_file_is_a_fault(pieces: list[bytes]) -> None:
    """Whatever it holds, each line is a user or refused."""
    content = b"".join(pieces)
    _checked(read_jsonl(io.BytesIO(content)))
    _checked(read_csv(io.BytesIO(b"username,email\n" + content), ignore_unknown=True))
    with contextlib.suppress(FileRefused):
        _checked(read_csv(io.BytesIO(content), ignore_unknown=True))


@given(
    fields=st.dictionaries(
        st.sampled_from(FIELDS) | st.text(max_size=5),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=40)
        | st.floats()
        | st.lists(st.text(), max_size=2),
    )
)
def test_no_object_is_a_fault(fields: dict[str, Any]) -> None:
    """Whatever it holds."""
    _checked([Line(1, ADA | fields)])
