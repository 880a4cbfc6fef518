"""Break the image and the manifests on purpose: a check that cannot fail proves nothing."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.image.building import ROOT, Recipe, copy_of_the_source, replace_in
from tests.deploy.image.contents import check_contents, look_into
from tests.deploy.image.engine import discard
from tests.deploy.image.faults import GONE, IN_IMAGES, IN_IMAGES_THAT_RUN, IN_MANIFESTS, Fault
from tests.deploy.image.manifest import read
from tests.deploy.image.report import Impossible, Report, require, say

_TAG = "localhost/identity-service:sound"
_BROKEN = "localhost/identity-service:broken"


def check_mutants(made: Recipe, deploy: Path, keys: Sequence[str]) -> Sequence[str]:
    """Try every fault, or those that the named checks must see; return what no check has noticed."""
    unseen: list[str] = []

    def wanted(faults: Sequence[Fault]) -> Iterator[Fault]:
        return (fault for fault in faults if not keys or fault.seen_by in keys)

    def judge(fault: Fault, failed: Sequence[str]) -> None:
        if fault.seen_by in failed:
            also = [key for key in failed if key != fault.seen_by]
            say(f"seen    [{fault.seen_by}] {fault.what}" + (f" (and by {', '.join(also)})" if also else ""))
        else:
            say(f"UNSEEN  [{fault.seen_by}] {fault.what}; what failed: {', '.join(failed) or 'nothing'}")
            unseen.append(fault.what)

    sound = made.build(_TAG, ROOT)
    for fault in wanted(IN_IMAGES):
        judge(fault, _failed_in_image(fault, made))
    for fault in wanted(IN_IMAGES_THAT_RUN):
        with copy_of_the_source(*fault.edits) as copy:
            image = made.build(_BROKEN, copy)
        judge(fault, _failed_when_running(image, deploy, fault.seen_by))
        discard(_BROKEN)
    for fault in wanted(IN_MANIFESTS):
        with _broken(deploy, fault) as broken:
            judge(fault, _failed_when_running(sound, broken, fault.seen_by))
    discard(_TAG)
    say(f"{len(unseen)} faults went unseen" + "".join(f"\n  {fault}" for fault in unseen))
    return unseen


def _failed_in_image(fault: Fault, made: Recipe) -> Sequence[str]:
    """Return the keys of the checks that fail when the image is built and looked into."""
    report = Report(quiet=True)
    with copy_of_the_source(*fault.edits) as copy:
        try:
            image = made.build(_BROKEN, copy)
        except Impossible:
            return ["build"]
        check_contents(report, look_into(image), made)
        discard(_BROKEN)
        if fault.seen_by == "digest":
            with report.check("digest", "", ""):
                require(made.build(_BROKEN, copy, cached=False) == image, "two builds differ")
            discard(_BROKEN)
    return report.failed


def _failed_when_running(image: str, deploy: Path, until: str) -> Sequence[str]:
    """Return the keys of the checks that fail when the image runs as the manifests in `deploy` say."""
    words = ["unshare", "--net", "--", sys.executable, "-m", "tests.deploy.image.running", "--until", until]
    ended = subprocess.run([*words, image, str(deploy)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found: list[str] = json.loads(ended.stdout.splitlines()[-1])["failed"]
    return found


@contextmanager
def _broken(deploy: Path, fault: Fault) -> Iterator[Path]:
    """Yield a copy of what is read of `deploy`, with a fault in it."""
    with tempfile.TemporaryDirectory(prefix="identity-mutant-") as folder:
        copy = Path(folder) / "deploy"
        for part in ("kubernetes/rendered", "postgresql"):
            shutil.copytree(deploy / part, copy / part)
        for edit in fault.edits:
            replace_in(copy, *edit)
        if fault.settings:
            objects = list(read(copy / fault.manifest))
            for where, value in fault.settings:
                _set(objects, where, value)
            (copy / fault.manifest).write_text(yaml.safe_dump_all(objects), "utf-8")
        yield copy


def _set(objects: Sequence[Any], where: str, value: Any) -> None:
    """Set the field `Kind/name:path.to.field`; the name may go on, as kustomize lets a ConfigMap's."""
    place, _, path = where.partition(":")
    kind, _, name = place.partition("/")
    # A ConfigMap's name goes on with a digest, and what is called otherwise goes on as well: the shortest is meant.
    alike = [it for it in objects if it["kind"] == kind and it["metadata"]["name"].startswith(name)]
    found: Any = min(alike, key=lambda it: len(it["metadata"]["name"]))
    *steps, last = path.split(".")
    for step in steps:
        found = found[int(step) if isinstance(found, list) else step]
    if value is GONE:
        del found[last]
    else:
        found[last] = value
