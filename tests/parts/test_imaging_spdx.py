"""The list of packages beside a release: valid SPDX, complete, and always the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from provisioner.imaging.spdx import COPYRIGHT_BYTES_MAX, InstalledPackages, spdx_document

ROOT: Final = Path(__file__).parent.parent.parent
RELEASE: Final[dict[str, Any]] = {
    "image": "web",
    "version": "2026.11.1",
    "architecture": "amd64",
    "release_id": "0123456789abcdef" * 2,
    "created_at": datetime(2026, 11, 24, 2, 12, 15, 400, tzinfo=UTC),
}


def paragraph(package: str, version: str = "1.0-1", *more: str) -> str:
    lines = (
        f"Package: {package}",
        "Status: install ok installed",
        "Maintainer: Somebody <somebody@example.org>",
        "Architecture: amd64",
        f"Version: {version}",
        *more,
        f"Description: the package {package}",
    )
    return "".join(f"{line}\n" for line in lines)


STATUS: Final = "\n".join(
    (
        paragraph("tool", "2:1.5-3+deb12u1", "Source: suite (1.5-3)", "Depends: awk, lib (>= 1)"),
        paragraph("lib", "1.0-1", "Multi-Arch: same"),
        paragraph("mawk", "1.3-1", "Provides: awk"),
        paragraph("gawk", "5.2-1", "Provides: awk"),
        paragraph("original-awk", "1:2012-1", "Provides: awk"),
    )
)
LICENCE: Final = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020 Somebody
License: Expat
 Permission is hereby granted.
"""
INSTALLED: Final = InstalledPackages(STATUS, "", {"lib": LICENCE, "gawk": "no format at all\n"})


def problems_in(document: bytes, folder: Path) -> list[str]:
    """Return what the SPDX project's own tools find wrong with a document."""
    path = folder / "release.spdx.json"
    path.write_bytes(document)
    return [str(message) for message in validate_full_spdx_document(parse_file(str(path)))]


def test_a_document_is_valid_and_says_what_is_installed(tmp_path: Path) -> None:
    data = spdx_document(INSTALLED, **RELEASE)
    assert problems_in(data, tmp_path) == []
    document = json.loads(data)
    assert document["name"] == "web@2026.11.1"
    assert document["creationInfo"]["created"] == "2026-11-24T02:12:15Z"
    address = document["documentNamespace"]
    assert address.endswith("/web-2026.11.1-01234567-89ab-cdef-0123-456789abcdef")
    packages = {package["SPDXID"]: package for package in document["packages"]}
    assert packages["SPDXRef-tool-amd64"]["versionInfo"] == "2:1.5-3+deb12u1"
    assert packages["SPDXRef-suite-1.5-3-srcpkg"]["name"] == "suite"
    assert packages["SPDXRef-lib-1.0-1-srcpkg"]["licenseDeclared"] == "MIT"
    assert packages["SPDXRef-web"]["versionInfo"] == "2026.11.1"
    depends = {
        relation["relatedSpdxElement"]
        for relation in document["relationships"]
        if relation["relationshipType"] == "DEPENDS_ON"
    }
    # Whoever provides awk: the first by name, and not the first that a set hands out.
    assert depends == {"SPDXRef-lib-amd64", "SPDXRef-gawk-amd64"}


def test_the_same_packages_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Python hashes text differently in each process, and debsbom works with sets."""
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.parts.test_imaging_spdx import RELEASE\n"
        "from provisioner.imaging.spdx import InstalledPackages, spdx_document\n"
        "installed = InstalledPackages.of(Path(sys.argv[1]))\n"
        "sys.stdout.buffer.write(spdx_document(installed, **RELEASE))\n"
    )
    documents = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "TZ": zone},
            cwd=tmp_path,
            capture_output=True,
            check=True,
            timeout=180,
        ).stdout
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"), ("3", "UTC"))
    }
    assert len(documents) == 1


def test_another_release_has_another_address() -> None:
    one = json.loads(spdx_document(INSTALLED, **RELEASE))
    other = json.loads(spdx_document(INSTALLED, **RELEASE | {"release_id": "f" * 32}))
    assert one["documentNamespace"] != other["documentNamespace"]
    assert one["packages"] == other["packages"]


def test_a_whole_debian_system_makes_a_valid_document(tmp_path: Path) -> None:
    """This machine's own packages are as good an example as any."""
    installed = InstalledPackages.of(Path("/"))
    data = spdx_document(installed, **RELEASE)
    assert problems_in(data, tmp_path) == []
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n"],
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    ).stdout
    wanted = {line.split()[1] for line in listed.splitlines() if line.startswith("installed ")}
    found = {
        package["name"]
        for package in json.loads(data)["packages"]
        if not package["SPDXID"].endswith("-srcpkg")
    }
    assert wanted <= found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with dpkg's status and one package's copyright."""
    root = tmp_path / "tree"
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    (root / "usr/share/doc/lib").mkdir(parents=True)
    (root / "usr/share/doc/lib/copyright").write_text(LICENCE)
    return root


def test_links_between_packages_are_followed_and_links_out_of_the_tree_are_not(tree: Path) -> None:
    secret = tree.parent / "secret"
    secret.write_text("not of this tree")
    doc = tree / "usr/share/doc"
    (doc / "tool").symlink_to("lib")
    for name, target in (("mawk", secret), ("gawk", Path("../../../../../secret"))):
        (doc / name).mkdir()
        (doc / name / "copyright").symlink_to(target)
    found = InstalledPackages.of(tree).copyrights
    assert dict(found) == {"lib": LICENCE, "tool": LICENCE}


def test_an_endless_copyright_file_is_left_out(tree: Path) -> None:
    with (tree / "usr/share/doc/lib/copyright").open("w") as file:
        file.truncate(COPYRIGHT_BYTES_MAX + 1)
    assert InstalledPackages.of(tree).copyrights == {}
