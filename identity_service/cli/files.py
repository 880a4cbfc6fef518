"""What the commands that export share: the formats, and a file that is there when all of it is."""

import contextlib
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from identity_service.cli.common import Refused


class Format(StrEnum):
    """What a file is written in: one JSON object a line, or a table."""

    JSONL = "jsonl"
    CSV = "csv"


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[TextIO]:
    """
    Yield a file for its owner only, which gets its name in one step when the work is done, and never if it fails.

    Until then it is a hidden one in the same folder, which only a killed process leaves behind. Without `force` it
    takes nobody's place, not even that of a file which came meanwhile. Raises Refused, before anything is written for
    what is no file or is there already.
    """
    _check_free(path, force)
    descriptor, name = tempfile.mkstemp(prefix=".export-", dir=path.parent)
    unfinished = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
        if force:
            unfinished.replace(path)
        else:
            _name(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_free(path: Path, force: bool) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Refused(f"{path} is not a file")
        if not force:
            raise _taken(path)


def _name(unfinished: Path, path: Path) -> None:
    """Give a file its name unless there is one of that name; raises Refused."""
    try:
        try:
            path.hardlink_to(unfinished)
        except FileExistsError:
            raise
        except OSError:  # some file systems have no links (vfat): there the name is taken first, with nothing in it
            path.touch(mode=0o600, exist_ok=False)
            unfinished.replace(path)
    except FileExistsError:
        raise _taken(path) from None


def _taken(path: Path) -> Refused:
    return Refused(f"{path} exists; --force replaces it")
