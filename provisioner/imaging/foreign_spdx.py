"""The SPDX document of a stranger's packages, made in a process that may use only so much.

The libraries that make it were written for what dpkg wrote. They are given little (see
`foreign_packages`), and what they still make of it ends with the process:
`python -m provisioner.imaging.foreign_spdx CPU_SECONDS` reads a request from its standard input and
writes the document to its standard output.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from provisioner.imaging.foreign_packages import described_packages
from provisioner.imaging.spdx import InstalledPackages, spdx_document

# 4793 packages of Debian's took 5 seconds of a processor and 150 MB, and gave 7 MB.
DESCRIBE_LIMIT: Final = timedelta(minutes=3)
DESCRIBE_CPU_LIMIT: Final = timedelta(minutes=1)
DESCRIBE_MEMORY_BYTES: Final = 1024 * 1024 * 1024
DOCUMENT_BYTES_MAX: Final = 64 * 1024 * 1024


def foreign_spdx(
    status: str,
    *,
    image: str,
    version: str,
    architecture: str,
    release_id: str,
    created_at: datetime,
    cpu_limit: timedelta = DESCRIBE_CPU_LIMIT,
) -> bytes | None:
    """Return the SPDX document of packages that `foreign_packages` let pass.

    None when they cannot be described in one, or not within the limits: an image is not
    worse for it.
    """
    try:
        described = described_packages(status)
    except ValueError:
        return None
    if not described:
        return None
    request = {
        "status": described,
        "image": image,
        "version": version,
        "architecture": architecture,
        "release_id": release_id,
        "created_at": created_at.isoformat(),
    }
    return _made_apart(json.dumps(request).encode(), cpu_limit)


def _made_apart(request: bytes, cpu_limit: timedelta) -> bytes | None:
    """Have a process of its own make the document; None when it failed or met a limit."""
    # The folder is ours and so goes with what a process leaves that was stopped.
    with (
        tempfile.TemporaryDirectory(prefix="foreign-spdx-") as folder,
        (Path(folder) / "document").open("w+b") as document,
    ):
        try:
            subprocess.run(
                [sys.executable, "-m", __name__, str(round(cpu_limit.total_seconds()))],
                input=request,
                stdout=document,
                stderr=subprocess.DEVNULL,
                env={
                    "PATH": os.defpath,
                    "LC_ALL": "C.UTF-8",
                    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
                    "TMPDIR": folder,
                    # Each further arena takes 128 MiB of the address space that is limited.
                    "MALLOC_ARENA_MAX": "2",
                },
                timeout=DESCRIBE_LIMIT.total_seconds(),
                check=True,
            )
        except subprocess.SubprocessError:
            return None
        document.seek(0)
        return document.read()


def main() -> None:
    """Make the document; the process fails when it cannot, in whatever way."""
    _limit(int(sys.argv[1]))
    # With python3-apt, its parser in C++ would read the list: this way the same code does
    # everywhere, and an import gives the same document.
    for name in ("apt", "apt_pkg"):
        sys.modules[name] = None  # type: ignore[assignment]  # how Python is told: there is none
    request = json.load(sys.stdin.buffer)
    document = spdx_document(
        InstalledPackages(request["status"]),
        image=request["image"],
        version=request["version"],
        architecture=request["architecture"],
        release_id=request["release_id"],
        created_at=datetime.fromisoformat(request["created_at"]),
    )
    sys.stdout.buffer.write(document)


def _limit(cpu_s: int) -> None:
    """Take from this process what it does not need, for good."""
    for what, most in (
        (resource.RLIMIT_AS, DESCRIBE_MEMORY_BYTES),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, DOCUMENT_BYTES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
