"""Turn a base tree into the root file system of one version, inside the raw image.

Run as a program by the builder, as root or as root of a user namespace, because the files
belong to many users. Mounts nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from provisioner.errors import ProvisionerError
from provisioner.imaging.finishing import BUILD_FOLDER
from provisioner.imaging.tools import run

RELEASE_FILE: Final = "usr/lib/provisioner/release.json"
# Debian 12's GRUB 2.06 cannot read file systems with these two features.
FEATURES: Final = "^metadata_csum_seed,^orphan_file"
# What makes a host this host. Made anew at its first boot.
IDENTITY: Final = (
    "etc/ssh/ssh_host_*",
    "etc/hostname",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/cloud/*",
    "var/log/*.log",
    "var/log/apt/*",
)


@dataclass(frozen=True)
class RootSpec:
    """What the child process needs: paths, and where the file system goes in the raw image.

    out receives the boot loaders' files (a folder `boot`) and packages.json. label,
    uuid and hash_seed are the file system's; epoch_s its times, in seconds since 1970.
    """

    base: str
    work: str
    out: str
    raw: str
    start_bytes: int
    size_bytes: int
    uuid: str
    hash_seed: str
    epoch_s: int
    files: dict[str, str]
    image: str
    version: str

    def to_json(self) -> str:
        """Return the form that main() reads."""
        return json.dumps(asdict(self))


def main(arguments: list[str]) -> int:
    """Do what the RootSpec (JSON) in the file named by the one argument says."""
    spec = RootSpec(**json.loads(Path(arguments[0]).read_text()))
    try:
        make_root(spec)
    except ProvisionerError as error:
        sys.stderr.write(f"{error.message}\n{error.found or ''}\n")
        return 1
    return 0


def make_root(spec: RootSpec) -> None:
    """Unpack the base tree, add what belongs to this version, and make the file system."""
    tree = Path(tempfile.mkdtemp(prefix="tree-", dir=spec.work))
    tree.chmod(0o755)
    try:
        _unpack(Path(spec.base), tree)
        shutil.move(tree / BUILD_FOLDER / "boot", Path(spec.out) / "boot")
        shutil.rmtree(tree / BUILD_FOLDER)
        # mmdebstrap left it out with the devices in it; the kernel mounts its own there.
        (tree / "dev").mkdir(mode=0o755, exist_ok=True)
        packages = installed_packages((tree / "var/lib/dpkg/status").read_text())
        (Path(spec.out) / "packages.json").write_text(json.dumps(packages))
        _forget_identity(tree)
        _trust_compiled_python(tree)
        for path, content in spec.files.items():
            _write(tree, path, content, spec.epoch_s)
        _name_the_version(tree, spec)
        _make_file_system(tree, spec)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def installed_packages(status: str) -> dict[str, str]:
    """Return {package: version} of all installed packages in dpkg's status file."""
    packages = {}
    for paragraph in status.split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in paragraph.splitlines()
            if ": " in line and not line.startswith(" ")
        )
        if fields.get("Status", "").endswith(" installed"):
            packages[fields["Package"]] = fields["Version"]
    return packages


def _unpack(base: Path, tree: Path) -> None:
    run(
        [
            "tar",
            "--extract",
            "--zstd",
            f"--file={base}",
            f"--directory={tree}",
            "--numeric-owner",
            "--same-permissions",
            "--xattrs",
            "--xattrs-include=*",
        ]
    )


def _forget_identity(tree: Path) -> None:
    """Remove what must differ between two hosts with the same release."""
    for pattern in IDENTITY:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    # Empty and not absent: without the file systemd takes the boot for the first after an
    # installation and enables every unit by its presets (machine-id(5), "First Boot
    # Semantics"); empty, it only makes a new id.
    (tree / "etc/machine-id").write_text("")
    resolv = tree / "etc/resolv.conf"
    resolv.unlink(missing_ok=True)
    resolv.symlink_to("../run/systemd/resolve/stub-resolv.conf")


def _trust_compiled_python(tree: Path) -> None:
    """Mark compiled Python files as not to be compared with their sources at each import.

    A build with SOURCE_DATE_EPOCH makes them "checked": Python then reads and hashes
    every source file at every start. In an image nobody edits, that is time lost at
    each of cloud-init's starts. dpkg compiles anew whatever it replaces.

    Source: PEP 552; the flags are the second 32-bit word, 0b11 checked, 0b01 unchecked.
    """
    for path in tree.glob("usr/lib/python3*/**/*.pyc"):
        times = path.stat()
        with path.open("r+b") as file:
            if file.read(8)[4:] == b"\3\0\0\0":
                file.seek(4)
                file.write(b"\1\0\0\0")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _name_the_version(tree: Path, spec: RootSpec) -> None:
    """Say in os-release which image this is (os-release(5), IMAGE_ID and IMAGE_VERSION)."""
    path = tree / "usr/lib/os-release"
    kept = [
        line
        for line in path.read_text().splitlines()
        if not line.startswith(("IMAGE_ID=", "IMAGE_VERSION="))
    ]
    named = [f"IMAGE_ID={spec.image}", f"IMAGE_VERSION={spec.version}"]
    _write(tree, "/usr/lib/os-release", "\n".join([*kept, *named, ""]), spec.epoch_s)


def _write(tree: Path, path: str, content: str, epoch_s: int) -> None:
    target = tree / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    target.chmod(0o644)
    os.utime(target, (epoch_s, epoch_s))


def _make_file_system(tree: Path, spec: RootSpec) -> None:
    """Make an ext4 holding the tree at its place in the raw image, which must be zero there."""
    block_bytes = 4096
    extended = (
        f"offset={spec.start_bytes}",
        f"hash_seed={spec.hash_seed}",
        "root_owner=0:0",
        # The image is zero outside of what mke2fs writes, and chunks that are zero are
        # made zero on the disk, too: nothing is left for the kernel to initialise later.
        "lazy_itable_init=0",
        "nodiscard",
    )
    run(
        [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            str(block_bytes),
            "-m",
            "1",
            "-L",
            "root",
            "-U",
            spec.uuid,
            "-O",
            FEATURES,
            "-E",
            ",".join(extended),
            "-d",
            str(tree),
            spec.raw,
            str(spec.size_bytes // block_bytes),
        ],
        environment={
            "SOURCE_DATE_EPOCH": str(spec.epoch_s),
            "E2FSPROGS_FAKE_TIME": str(spec.epoch_s),
        },
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
