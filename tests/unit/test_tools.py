"""How the suite comes by programs that it does not hold: its finder, with a package manager of the test's own."""

import subprocess
from pathlib import Path

import pytest

from tests.support import tools
from tests.support.tools import ToolMissing, tool

NAME = "a-program-of-no-package"
DOWNLOAD = """
for last; do :; done
touch "${last}_1.0_all.deb"
"""
UNPACK = f"""
case "$1" in
  -f) test "$3" = Pre-Depends || echo 'libfirst0 (>= 1), libc6, some-data' ;;
  -x) mkdir -p "$3/usr/sbin" "$3/usr/lib/x86_64-linux-gnu"
      case "$2" in
        *libfirst0*) echo first > "$3/usr/lib/x86_64-linux-gnu/libfirst.so.0" ;;
        *) printf '#!/bin/sh\\necho "$1 with $LD_LIBRARY_PATH"\\n' > "$3/usr/sbin/{NAME}"
           chmod 755 "$3/usr/sbin/{NAME}" ;;
      esac ;;
esac
"""
NOTHING_LACKS = "echo '  libc.so.6 => /lib/libc.so.6 (0x0)'"
LIBFIRST_LACKS = """
IFS=:
for folder in $LD_LIBRARY_PATH; do test -e "$folder/libfirst.so.0" && exit 0; done
echo '  libfirst.so.0 => not found'
"""


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs come before the system's."""
    folder = tmp_path / "first"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def with_apt(folder: Path, *, lacking: str = NOTHING_LACKS, download: str = DOWNLOAD) -> None:
    for name, body in (("apt-get", download), ("dpkg-deb", UNPACK), ("ldd", lacking)):
        script(folder, name, body)


def said_by(program: Path) -> str:
    return subprocess.run([program, "hello"], capture_output=True, text=True, check=True).stdout.strip()


def test_a_program_of_this_machine_is_taken_as_it_is(bin_folder: Path, tmp_path: Path) -> None:
    """And nothing is brought."""
    there = script(bin_folder, NAME, "echo")
    assert tool(NAME, folder=tmp_path / "tools") == there
    assert not (tmp_path / "tools").exists()


def test_a_program_is_taken_out_of_its_package_once(bin_folder: Path, tmp_path: Path) -> None:
    """It runs by itself when this machine has its libraries, and the second time nobody asks for the package."""
    with_apt(bin_folder)
    brought = tool(NAME, folder=tmp_path / "tools")
    assert brought == tmp_path / "tools" / "bin" / NAME
    assert said_by(brought) == "hello with"
    script(bin_folder, "apt-get", "exit 1")
    assert tool(NAME, folder=tmp_path / "tools") == brought
    assert [path.name for path in (tmp_path / "tools").iterdir() if path.name != ".lock"] == ["bin"]


def test_a_library_that_the_machine_lacks_is_brought_along(bin_folder: Path, tmp_path: Path) -> None:
    """Beside the program, which finds it wherever the folder is moved to."""
    with_apt(bin_folder, lacking=LIBFIRST_LACKS)
    brought = tool(NAME, folder=tmp_path / "tools")
    brought = (tmp_path / "tools").rename(tmp_path / "elsewhere") / "bin" / NAME
    libraries = Path(said_by(brought).removeprefix("hello with "))
    assert sorted(path.name for path in libraries.iterdir()) == [NAME, "libfirst.so.0"]


def test_without_apt_the_message_says_what_to_install(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, say."""
    monkeypatch.setenv("PATH", str(bin_folder))
    monkeypatch.setattr(tools, "_ELSEWHERE", ())
    with pytest.raises(ToolMissing, match="promtool: install prometheus") as caught:
        tool("promtool", folder=bin_folder / "tools")
    assert "no apt" in str(caught.value)


def test_what_the_package_manager_says_is_passed_on(bin_folder: Path, tmp_path: Path) -> None:
    """No network, no such package: the reader need not guess."""
    with_apt(bin_folder, download="echo 'E: Unable to fetch' >&2; exit 100")
    with pytest.raises(ToolMissing, match=f"install {NAME} .*E: Unable to fetch"):
        tool(NAME, folder=tmp_path / "tools")
    assert not (tmp_path / "tools" / "bin" / NAME).exists()
