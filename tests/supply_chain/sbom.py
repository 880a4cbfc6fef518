"""The bill of materials of the server in CycloneDX (ECMA-424), the same bytes wherever and whenever it is made."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from tests.supply_chain.licences import Policy, policy
from tests.supply_chain.lock import ROOT, SERVER, SERVER_WITH_TRACES, Locked, read

FOLDER: Final = ROOT / "build"
FILES: Final = {"sbom.cdx.json": SERVER, "sbom-otel.cdx.json": SERVER_WITH_TRACES}
"""The documents, each with the lock that it is made of."""
_SPECIFICATION: Final = "1.6"
# What the image runs on; what is not installed there is listed as optional, wherever the list is made.
_IMAGE: Final = {
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "python_full_version": "3.13.0",
    "python_version": "3.13",
    "sys_platform": "linux",
}


def bill(packages: Sequence[Locked], rules: Policy, project: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the document. It has neither serial number nor time: both are optional, and would differ each time.

    A release at PyPI is several files, of which one is installed; their digests stand at the release.
    """
    references = {package.name: _reference(package) for package in packages}
    name = canonicalize_name(project["name"])
    root = f"pkg:pypi/{name}@{project['version']}"
    wants: dict[str, list[str]] = {root: [], **{reference: [] for reference in references.values()}}
    for package in packages:
        for by in package.via:
            wants[root if by == name else references[by]].append(references[package.name])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": _SPECIFICATION,
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "pre-build"}],
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": name,
                "version": project["version"],
                "description": project["description"],
                "licenses": [{"license": {"id": project["license"]}}],
                "purl": root,
            },
        },
        "components": [_component(package, rules.packages[package.name]) for package in packages],
        "dependencies": [{"ref": ref, "dependsOn": sorted(on)} for ref, on in sorted(wants.items())],
    }


def _reference(package: Locked) -> str:
    return f"pkg:pypi/{package.name}@{package.version}"


def _component(package: Locked, licence: str) -> dict[str, Any]:
    several = " AND " in licence or " OR " in licence
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": _reference(package),
        "name": package.name,
        "version": package.version,
        "scope": "required" if package.marker is None or Marker(package.marker).evaluate(_IMAGE) else "optional",
        "licenses": [{"expression": licence} if several else {"license": {"id": licence}}],
        "purl": _reference(package),
        "externalReferences": [
            {
                "type": "distribution",
                "url": f"https://pypi.org/project/{package.name}/{package.version}/#files",
                "hashes": [{"alg": "SHA-256", "content": digest} for digest in package.hashes],
            }
        ],
    }
    if package.marker is not None:
        found["properties"] = [{"name": "identity-service:installed-where", "value": package.marker}]
    return found


def text(lock: Path = SERVER) -> str:
    """Return the bill of materials of a server that is installed from this lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return json.dumps(bill(read(lock), policy(), project), indent=2, ensure_ascii=False) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the documents, and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lock in FILES.items():
        (folder / name).write_text(text(lock), "utf-8")
    return [folder / name for name in FILES]
