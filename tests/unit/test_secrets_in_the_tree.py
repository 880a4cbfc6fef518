"""A secret that somebody leaves in the tree is found; the ones here are put together while the tests run."""

import base64
import hashlib
import os
import re
import secrets as randomness
import shutil
import string
import subprocess
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from identity_service.infra.runtime.envelope import new_master_key
from tests.supply_chain import secrets
from tests.supply_chain.lock import ROOT
from tests.support.tokens import compact

LETTERS = "".join(map(randomness.choice, 40 * [string.ascii_letters + string.digits]))
ALLOWED = ROOT / "tests" / "supply_chain" / "secrets.toml"


def pem() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain).decode()


def token() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return compact({"alg": "RS256", "typ": "at+jwt"}, {"sub": "ada"}, key)


SECRETS = {
    "a private key": pem,
    "a private JWK": lambda: '{"kty": "oct", "k": "' + randomness.token_urlsafe(32) + '"}',
    "a client secret of ours": lambda: "cs_" + LETTERS,
    "a refresh token of ours": lambda: "rt_" + LETTERS,
    "a token from a mail of ours": lambda: "pr_" + LETTERS,
    "an API key of ours": lambda: "idk_" + LETTERS[:11] + "_" + LETTERS,
    "a JWT": token,
    "an AWS key": lambda: "AKIA" + "IOSFODNN7ABCDEFG",
    "a GitHub token": lambda: "ghp_" + LETTERS[:36],
    "a GitLab token": lambda: "glpat-" + LETTERS[:20],
    "a Slack token": lambda: "xoxb-" + LETTERS[:24],
    "a Google API key": lambda: "AIza" + LETTERS[:35],
    "a Stripe key": lambda: "sk_live_" + LETTERS[:24],
    "a package registry's token": lambda: "npm_" + LETTERS[:36],
    "a password in an address": lambda: "postgresql://identity:" + LETTERS[:14] + "@db.example/identity",
    "a secret in hexadecimal": lambda: "SECRET_KEY = '" + randomness.token_hex(32) + "'",
    "something random": new_master_key,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of everything that is in the repository, without its history."""
    copy = tmp_path / "tree"
    for name in secrets.files(ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    return copy


def test_there_is_no_secret_in_the_tree() -> None:
    """And everything that is allowed is still there."""
    assert secrets.faults() == []
    assert len(secrets.files(ROOT)) > 300


def test_every_kind_is_tried_here() -> None:
    """A pattern that matches nothing would look like a clean tree."""
    assert SECRETS.keys() == secrets._KINDS.keys()


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_not_repeated(kind: str) -> None:
    """Whichever kind, in the midst of code; the report names file, line and kind, and not the secret."""
    secret = SECRETS[kind]()
    found = list(secrets.scan("somewhere.py", f"first = 1\n\nsecond = {secret}\n"))
    assert [(each.line, each.kind) for each in found][:1] == [(3, kind)]
    assert not any(line and line in str(each) for line in secret.splitlines() for each in found)


def test_secrets_that_are_planted_in_a_copy_of_the_tree_are_found(tree: Path) -> None:
    """In code, configuration, documents and tests, old files and new ones; each at its place, and nothing else."""
    planted = {
        "identity_service/settings.py": "a private key",
        "deploy/kubernetes/base/config.env": "something random",
        "README.md": "an API key of ours",
        "tests/unit/test_settings.py": "a JWT",
        "docs/new.md": "a GitHub token",
    }
    expected = set()
    for place, kind in planted.items():
        path = tree / place
        before = path.read_text("utf-8") if path.exists() else ""
        path.write_text(f"{before}\n{SECRETS[kind]()}\n")
        expected.add((place, before.count("\n") + 2, kind))
    (tree / "deploy" / ".env").write_text("x\n")
    expected.add(("deploy/.env", 1, "a file of a kind that holds secrets"))
    found = set()
    for fault in secrets.faults(tree):
        match = re.fullmatch(r"(.+):(\d+): (.+) \(sha256 [0-9a-f]{64}\)", fault)
        assert match is not None, fault
        found.add((match[1], int(match[2]), match[3]))
    lines_of_the_key = {each for each in found if each[0] == "identity_service/settings.py"} - expected
    assert {kind for _path, _line, kind in lines_of_the_key} == {"something random"}
    assert found - lines_of_the_key == expected


@pytest.mark.parametrize(
    "name", [".env", ".env.production", "keys/server.pem", "tls.key", ".pgpass", "home/id_ed25519"]
)
def test_a_file_that_is_made_to_hold_secrets_is_found_by_its_name(name: str) -> None:
    """Whatever is in it."""
    [found] = secrets.scan(name, "x\n")
    assert found.kind == "a file of a kind that holds secrets"


@pytest.mark.parametrize("name", ["tests/support/keys.py", "environment.md", "keys/README.md", "monkey", "a.pem.md"])
def test_a_file_that_only_sounds_like_it_is_left_alone(name: str) -> None:
    """What is in it is what counts."""
    assert list(secrets.scan(name, "x\n")) == []


@pytest.mark.parametrize(
    "text",
    [
        "--hash=sha256:" + hashlib.sha256(b"x").hexdigest(),
        "uses: actions/checkout@" + hashlib.sha1(b"x", usedforsecurity=False).hexdigest(),
        "01a1fe29-0cd3-7511-ace9-2fd6b1bbbe5d",
        "postgresql+psycopg://identity:PASSWORD@db/identity",
        "https://id.example:8000/token?x=y@z",
        "redis://redis:6379/0",
        "identity_service/infra/ratelimit/catalogue/and/so/on/and/on",
        "test_a_secret_that_is_planted_in_a_copy_of_the_tree_is_found",
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    """Digests, identifiers, places to put a password, alphabets."""
    assert list(secrets.scan("somewhere.py", text)) == []


def test_what_is_allowed_is_allowed_there_and_nowhere_else(tree: Path) -> None:
    """A vector that is copied to another file, or changed, has to be looked at again."""
    entry = next(entry for entry in allowed() if entry["path"] == "tests/unit/test_canary.py")
    line = next(
        match
        for match in secrets.scan(entry["path"], (ROOT / entry["path"]).read_text("utf-8"))
        if match.digest == entry["digest"]
    ).line
    vector = (ROOT / entry["path"]).read_text("utf-8").splitlines()[line - 1]
    (tree / "docs" / "copied.md").write_text(f"{vector}\n")
    [found] = secrets.faults(tree)
    assert found.startswith("docs/copied.md:1: a JWT")


def test_a_file_that_is_allowed_as_a_whole_is_so_as_it_is(tree: Path) -> None:
    """One byte more, and all that is in it counts."""
    vectors = tree / "docs" / "torture.json"
    vectors.write_bytes(vectors.read_bytes() + b"\n")
    found = secrets.faults(tree)
    assert len(found) > 100
    assert found[-1].startswith("docs/torture.json: what was allowed is not there any more")


def test_a_permission_that_nothing_needs_fails(tree: Path) -> None:
    """Otherwise the list would grow for ever, and nobody would read it."""
    (tree / "tests" / "unit" / "test_canary.py").unlink()
    [found] = secrets.faults(tree)
    assert found.startswith("tests/unit/test_canary.py: what was allowed is not there any more")


def allowed() -> list[dict[str, str]]:
    entries: list[dict[str, str]] = tomllib.loads(ALLOWED.read_text("utf-8"))["allowed"]
    return entries


def test_every_permission_has_a_reason_of_its_own() -> None:
    """One by one: a path, a digest, and why."""
    assert len(allowed()) < 30
    for entry in allowed():
        assert entry.keys() == {"path", "digest", "why"}
        assert len(entry["why"].split()) > 3
    assert len({entry["why"] for entry in allowed()}) == len(allowed())


def test_what_git_does_not_keep_is_not_looked_at(tmp_path: Path) -> None:
    """A key that `make run` has made is where it belongs; a new file that is not ignored counts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, env=environment)
    (tmp_path / ".gitignore").write_text("keys/\n")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "master.key").write_text(new_master_key())
    (tmp_path / "new.txt").write_text(base64.b64encode(randomness.token_bytes(32)).decode())
    permissions = tmp_path / "none.toml"
    permissions.write_text("allowed = []\n")
    [found] = secrets.faults(tmp_path, permissions)
    assert found.startswith("new.txt:1: something random")
