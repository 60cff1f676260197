"""A stranger's list of packages: described like Debian's own, and never at any price."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from provisioner.errors import RequestError
from provisioner.imaging.foreign_packages import (
    PACKAGES_MAX,
    described_packages,
    foreign_packages,
)
from provisioner.imaging.foreign_spdx import (
    DESCRIBE_MEMORY_BYTES,
    foreign_spdx,
)
from provisioner.imaging.spdx import InstalledPackages, spdx_document

ROOT: Final = Path(__file__).parent.parent.parent
MIB: Final = 1024 * 1024
STATUS_BYTES: Final = 32 * MIB  # the most that is read of an image
# Of a processor, however many share it; the worst took 4 seconds.
SECONDS_MAX: Final = 30
# Of this process: the text itself, once more as Python's lines, and what it kept of it.
MEMORY_BYTES_MAX: Final = 700 * MIB

RELEASE: Final[dict[str, Any]] = {
    "image": "theirs",
    "version": "1",
    "architecture": "amd64",
    "release_id": "0123456789abcdef" * 2,
    "created_at": datetime(2026, 11, 24, 2, 12, 15, tzinfo=UTC),
}
BASH: Final = (
    "Package: bash\nStatus: install ok installed\nMaintainer: Somebody <a@example.org>\n"
    "Architecture: amd64\nVersion: 5.2\n"
)


def many(start: str, count: int, fields: str) -> str:
    """Return so many packages that are each installed and say the same."""
    installed = "Status: install ok installed\nArchitecture: amd64\nVersion: 1"
    return "\n".join(f"Package: {start}{n}\n{installed}\n{fields}\n" for n in range(count))


HOSTILE: Final = {
    "blanks between relations": BASH + f"Depends: a1{' ' * (STATUS_BYTES - 1000)}b1\n",
    "blanks, as long as a field may be": many("a1", 100, f"Depends: a1{' ' * 250_000}b1"),
    "blanks in a description": BASH + f"Description: a\n{' ' * 200_000}b\n",
    "blanks after a name": BASH + f"Homepage{' ' * (STATUS_BYTES - 1000)}\n",
    "tabs in lines of their own": BASH + "Depends: a1\n" + "\t\n" * 1_500_000,
    "commas": BASH + f"Depends: {'a,' * 15_000_000}a\n",
    "commas, as many as a field may have": many("a1", 120, f"Depends: {'a,' * 130_000}a"),
    "choices": BASH + f"Provides: {'a|' * 130_000}a\n",
    "brackets": BASH + f"Depends: {'a1 (' * 60_000}\n",
    "one huge field": BASH + f"Maintainer: {'x' * (STATUS_BYTES - 1000)}\n",
    "a huge field that nobody asks for": BASH + f"Conffiles: {'x' * (STATUS_BYTES - 1000)}\n",
    "a huge version": f"Package: a1\nStatus: install ok installed\nVersion: {'1' * 10_000_000}\n",
    "fields without end": BASH + "".join(f"X{n}: 1\n" for n in range(1_900_000)),
    "lines without end": BASH + "\n" * (STATUS_BYTES - 1000),
    "lines without a colon": BASH + "x\n" * 1_900_000,
    "one field again and again": BASH + "Depends: a1\n" * 1_000_000,
    "100,001 packages": many("a1", 100_001, ""),
    "control characters": BASH + "Description: \x1b[2J\x07\x85\u2028\u202e\x0b\x0c\x1e\n \x1b]0;\n",
    "control characters in a name": BASH.replace("bash", "ba\x1bsh"),
    "NULs": BASH + "Description: a\0b\nDepends: a\0b\n",
    "nothing but NULs": "\0" * STATUS_BYTES,
    "what no UTF-8 gives": BASH + "Description: \ud800\n",
    "a signature": BASH + "Description: a\n -----BEGIN PGP SIGNED MESSAGE-----\n",
    "another source": BASH + "Source: ../../x (1)\n",
    "no address at all": BASH + "Homepage: http://[\n",
}

# Prints the most memory that this process had, and that the one which it started had, in KiB.
DESCRIBE: Final = """
import re, resource, sys
from pathlib import Path
from provisioner.errors import RequestError
from provisioner.imaging.foreign_packages import foreign_packages
from provisioner.imaging.foreign_spdx import foreign_spdx
from tests.parts.test_imaging_foreign_packages import RELEASE
status = Path(sys.argv[1]).read_text("utf-8", "surrogatepass")
try:
    foreign_packages(status)
    Path(sys.argv[2]).write_bytes(foreign_spdx(status, **RELEASE) or b"")
except RequestError as error:
    print(error)
# Not ru_maxrss for ourselves: it begins with the size of the tests' process at the fork.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_no_list_takes_long_or_much(name: str, tmp_path: Path) -> None:
    """It is refused, left out, or described: in a process of its own, to see what that takes."""
    status, document = tmp_path / "status", tmp_path / "spdx.json"
    status.write_text(HOSTILE[name], "utf-8", "surrogatepass", newline="")
    before_s = computed_s()
    printed = subprocess.run(
        [sys.executable, "-c", DESCRIBE, str(status), str(document)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=600,
    ).stdout
    took_s = computed_s() - before_s
    *_, own_kib, childs_kib = printed.splitlines()
    assert int(own_kib) * 1024 < MEMORY_BYTES_MAX
    assert int(childs_kib) * 1024 < DESCRIBE_MEMORY_BYTES
    assert took_s < SECONDS_MAX
    made = document.read_text() if document.exists() else ""
    assert all(letter.isprintable() or letter == "\n" for letter in made)
    assert not made or problems_in(document) == []
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "something was left"


def test_what_is_of_debians_form_and_still_takes_too_long_is_ended() -> None:
    status = many("a1", PACKAGES_MAX, "Provides: x\nDepends: x")
    before_s = computed_s()
    assert foreign_spdx(status, **RELEASE, cpu_limit=timedelta(seconds=3)) is None
    assert computed_s() - before_s < SECONDS_MAX


def computed_s() -> float:
    """Return how long processes of ours that have ended have computed, and what they began."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def problems_in(document: Path) -> list[str]:
    """Return what the SPDX project's own tools find wrong with a document."""
    return [str(message) for message in validate_full_spdx_document(parse_file(str(document)))]


def test_debians_own_list_is_described_as_ever(tmp_path: Path) -> None:
    """This machine's: as the libraries describe it when they are given all of it."""
    status = Path("/var/lib/dpkg/status").read_text()
    document = foreign_spdx(status, **RELEASE)
    assert document == spdx_document(InstalledPackages(status), **RELEASE)
    (tmp_path / "spdx.json").write_bytes(document)
    assert problems_in(tmp_path / "spdx.json") == []


def test_only_what_a_document_tells_is_handed_on() -> None:
    status = (
        "PACKAGE : tool\nStatus: hold  ok installed\nVersion: 1\nDepends: a1   (>= 1),\n"
        "\tb1:any|c1 ,\nConffiles:\n /etc/tool 0123\nDescription: a  tool\n for\x1b\tall\n \n .\n"
        "\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\nDepends: ?\n"
    )
    assert described_packages(status) == (
        "package: tool\nstatus: install ok installed\nversion: 1\n"
        "depends: a1 (>= 1), b1:any|c1\ndescription: a  tool\n for\ufffd all\n .\n"
    )
    assert foreign_packages(status) == {"tool": "1"}


@pytest.mark.parametrize(
    "field",
    [
        "Depends: a1 (>= 1) b1",
        "Depends: A1",
        "Built-Using: a1 (= 1/2)",
        "Architecture: ../amd64",
        "Source: a1 (1) (2)",
        f"Maintainer: {'x' * 3000}",
    ],
)
def test_what_dpkg_would_not_write_leaves_the_document_out(field: str) -> None:
    status = f"Package: bash\nStatus: install ok installed\nVersion: 5.2\n{field}\n"
    assert foreign_packages(status) == {"bash": "5.2"}
    with pytest.raises(ValueError, match=r"too long|not as Debian writes it"):
        described_packages(status)
    assert foreign_spdx(status, **RELEASE) is None


def test_no_installed_package_makes_no_document() -> None:
    assert foreign_spdx("Package: a1\nStatus: deinstall ok config-files\n", **RELEASE) is None


def test_a_field_that_stands_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="list of packages is refused"):
        foreign_packages(f"{BASH}version: 6\n")
