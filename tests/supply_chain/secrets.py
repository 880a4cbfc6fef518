"""Secrets that somebody has left in the tree: keys, tokens, passwords in addresses, and what looks like one."""

import hashlib
import math
import os
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.supply_chain.lock import ROOT

_ALLOWED: Final = Path(__file__).with_name("secrets.toml")
_BEFORE, _AFTER = r"(?<![0-9A-Za-z])", r"(?![0-9A-Za-z])"
_KINDS: Final = {
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a private JWK": r'"(?:d|p|q|dp|dq|qi|k)"\s*:\s*"[0-9A-Za-z_-]{22,}"',
    "a client secret of ours": rf"{_BEFORE}cs_[0-9A-Za-z]{{30,}}",
    "a refresh token of ours": rf"{_BEFORE}rt_[0-9A-Za-z]{{30,}}",
    "a token from a mail of ours": rf"{_BEFORE}(?:ev|pr|ec)_[0-9A-Za-z]{{30,}}",
    "an API key of ours": rf"{_BEFORE}idk_[0-9A-Za-z]{{11}}_[0-9A-Za-z]{{20,}}",
    "a JWT": r"eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}",
    "an AWS key": rf"{_BEFORE}(?:AKIA|ASIA)[0-9A-Z]{{16}}{_AFTER}",
    "a GitHub token": rf"{_BEFORE}(?:gh[pousr]_[0-9A-Za-z]{{36,}}|github_pat_[0-9A-Za-z_]{{50,}})",
    "a GitLab token": rf"{_BEFORE}glpat-[0-9A-Za-z_-]{{20,}}",
    "a Slack token": rf"{_BEFORE}xox[abeoprs]-[0-9A-Za-z-]{{20,}}",
    "a Google API key": rf"{_BEFORE}AIza[0-9A-Za-z_-]{{35}}",
    "a Stripe key": rf"{_BEFORE}[rs]k_live_[0-9A-Za-z]{{20,}}",
    "a package registry's token": rf"{_BEFORE}(?:pypi-AgE[0-9A-Za-z_-]{{40,}}|npm_[0-9A-Za-z]{{36}})",
    "a password in an address": r"[a-z][a-z0-9+.-]*://[^\s/:@\"'`<>{}$()]*:(?P<value>[^\s/@\"'`<>{}$()…]+)@",
    "a secret in hexadecimal": (
        r"(?i)(?:secret|passw(?:or)?d|token|api_?key|master_?key|private_?key)[\w-]*[\"']?\s*[:=]\s*[\"']?"
        r"(?P<value>[0-9a-f]{32,})\b"
    ),
    "something random": r"(?<![0-9A-Za-z+/_=-])(?P<value>[0-9A-Za-z+/_-]{32,}={0,2})(?![0-9A-Za-z+/_=-])",
}
_PATTERNS: Final = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
_RANDOM: Final = 4.0  # bits a letter; 24 bytes in base64 have 4.4 and more, words and paths rarely have 4
_PLACEHOLDERS: Final = {"password", "pass", "word", "replace", "changeme"}  # in addresses, whatever their case
_ALPHABETS: Final = ("abcdefghij", "0123456789")  # what spells one out is not random
_FILES: Final = re.compile(
    r"(?:^|/)(?:\.env(?:\..+)?|\.netrc|\.pgpass|\.pypirc|id_(?:rsa|ecdsa|ed25519)"
    r"|[^/]+\.(?:pem|key|p12|pfx|jks|keytab))$"
)
# Where nothing is read that git does not keep; only for a tree without git.
_LEFT_OUT: Final = {".git", ".venv", ".data", "build", "dist", "__pycache__", ".tools", ".mailbox"}


@dataclass(frozen=True, slots=True)
class Found:
    """A place that looks like a secret; `digest` stands for it in what is written down, and does not give it away."""

    path: str
    line: int
    kind: str
    digest: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind} (sha256 {self.digest})"


@dataclass(frozen=True, slots=True)
class Allowed:
    """Why one match, or with the digest of a whole file everything in it, is no secret."""

    path: str
    digest: str
    why: str


def faults(root: Path = ROOT, allowed: Path = _ALLOWED) -> list[str]:
    """Return a sentence for each secret in the tree, and for each permission that nothing needs any more."""
    permissions = [Allowed(**entry) for entry in tomllib.loads(allowed.read_text("utf-8"))["allowed"]]
    known = {(entry.path, entry.digest) for entry in permissions}
    used: set[tuple[str, str]] = set()
    found = []
    for path in files(root):
        content = (root / path).read_bytes()
        if (whole := (path, _digest(content))) in known:
            used.add(whole)
            continue
        for match in scan(path, content.decode("utf-8", "replace")):
            if (one := (match.path, match.digest)) in known:
                used.add(one)
            else:
                found.append(str(match))
    stale = [entry for entry in permissions if (entry.path, entry.digest) not in used]
    return found + [f"{entry.path}: what was allowed is not there any more: sha256 {entry.digest}" for entry in stale]


def scan(path: str, text: str) -> Iterator[Found]:
    """Yield what looks like a secret in a file, the kind that is known best first; nothing twice."""
    if _FILES.search(path):
        yield Found(path, 1, "a file of a kind that holds secrets", _digest(text.encode()))
    taken: list[tuple[int, int]] = []
    for kind, pattern in _PATTERNS.items():
        for match in pattern.finditer(text):
            group = "value" if "value" in pattern.groupindex else 0
            value, span = match[group], match.span(group)
            if any(span[0] < end and begin < span[1] for begin, end in taken) or not _credible(kind, value):
                continue
            taken.append(span)
            yield Found(path, text.count("\n", 0, span[0]) + 1, kind, _digest(value.encode()))


def files(root: Path) -> list[str]:
    """Return the files that are in the repository or would be after `git add`; without git, all there are."""
    if (root / ".git").exists():
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(root), "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        names = listed.decode().rstrip("\0").split("\0")
    else:
        places = (path.relative_to(root) for path in root.rglob("*"))
        names = [str(path) for path in places if not _LEFT_OUT & set(path.parts)]
    return sorted(name for name in names if (root / name).is_file() and not (root / name).is_symlink())


def _credible(kind: str, value: str) -> bool:
    if kind == "a password in an address":
        return len(value) > 2 and value.lower() not in _PLACEHOLDERS
    if kind == "something random":
        spelled_out = any(alphabet in value.lower() for alphabet in _ALPHABETS)
        mixed = all(any(map(kind_of, value)) for kind_of in (str.isupper, str.islower))
        return mixed and not spelled_out and _entropy(value) >= _RANDOM
    return True


def _entropy(value: str) -> float:
    """Return bits per letter (Shannon)."""
    counts: Mapping[str, int] = Counter(value)
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
