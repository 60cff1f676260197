"""Turn a base tree into the root file system of one version, from nothing or on a parent's.

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

from provisioner.errors import ProvisionerError, RequestError
from provisioner.imaging.ext4 import Ext4
from provisioner.imaging.ext4_sync import make_empty, sync
from provisioner.imaging.file_manifest import FileEntry, to_bytes
from provisioner.imaging.finishing import BUILD_FOLDER
from provisioner.imaging.sparse import copy_part
from provisioner.imaging.spdx import InstalledPackages
from provisioner.imaging.tools import run
from provisioner.imaging.tree import read_tree

RELEASE_FILE: Final = "usr/lib/provisioner/release.json"
FILE_SYSTEM: Final = "root.ext4"
"""In `out`: the file system."""
FILES: Final = "files.json"
"""In `out`: what the file system shall hold."""
SUMMARY: Final = "summary.json"
"""In `out`: {"packages": {name: version}, "without_parent": why the parent was no use, or null}."""
INSTALLED: Final = "installed.json"
"""In `out`: the fields of InstalledPackages."""
ERROR: Final = "error.json"
"""In `out`, when it failed with an error of ours: what ProvisionerError.as_dict says."""
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
    """What the child process needs.

    out receives FILE_SYSTEM, FILES, SUMMARY, INSTALLED, and the boot loaders' files (a
    folder `boot`). uuid and hash_seed are the file system's; epoch_s its times, in seconds
    since 1970. parent is a raw disk image whose root file system, parent_start_bytes
    into it, is to be built on.
    """

    base: str
    work: str
    out: str
    size_bytes: int
    uuid: str
    hash_seed: str
    epoch_s: int
    files: dict[str, str]
    image: str
    version: str
    parent: str | None = None
    parent_start_bytes: int = 0

    def to_json(self) -> str:
        """Return the form that main() reads."""
        return json.dumps(asdict(self))


def main(arguments: list[str]) -> int:
    """Do what the RootSpec (JSON) in the file named by the one argument says."""
    spec = RootSpec(**json.loads(Path(arguments[0]).read_text()))
    try:
        make_root(spec)
    except ProvisionerError as error:
        (Path(spec.out) / ERROR).write_text(json.dumps(error.as_dict(), default=str))
        sys.stderr.write(f"{error.message}\n{error.found or ''}\n")
        return 1
    return 0


def make_root(spec: RootSpec) -> None:
    """Unpack the base tree, add what belongs to this version, and make the file system."""
    tree = Path(tempfile.mkdtemp(prefix="tree-", dir=spec.work))
    tree.chmod(0o755)
    out = Path(spec.out)
    try:
        packages = _make_tree(tree, spec)
        (out / INSTALLED).write_text(json.dumps(asdict(InstalledPackages.of(tree))))
        entries = read_tree(tree)
        (out / FILES).write_bytes(to_bytes(entries))
        without_parent = _make_file_system(tree, entries, spec)
        summary = {"packages": packages, "without_parent": without_parent}
        (out / SUMMARY).write_text(json.dumps(summary))
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _make_tree(tree: Path, spec: RootSpec) -> dict[str, str]:
    """Make the folder that holds what the root shall hold; return the installed packages."""
    _unpack(Path(spec.base), tree)
    shutil.move(tree / BUILD_FOLDER / "boot", Path(spec.out) / "boot")
    shutil.rmtree(tree / BUILD_FOLDER)
    # mmdebstrap left it out with the devices in it; the kernel mounts its own there.
    (tree / "dev").mkdir(mode=0o755, exist_ok=True)
    # e2fsck wants it, and mke2fs makes it.
    (tree / "lost+found").mkdir(mode=0o700, exist_ok=True)
    packages = installed_packages((tree / "var/lib/dpkg/status").read_text())
    _forget_identity(tree)
    _trust_compiled_python(tree)
    for path, content in spec.files.items():
        _write(tree, path, content, spec.epoch_s)
    _name_the_version(tree, spec)
    _settle_times(tree, spec.epoch_s)
    return packages


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


def _settle_times(tree: Path, epoch_s: int) -> None:
    """Give everything that the build itself touched the inputs' date."""
    for folder, _, files in os.walk(tree):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            if os.lstat(path).st_mtime > epoch_s:
                os.utime(path, (epoch_s, epoch_s), follow_symlinks=False)


def _make_file_system(tree: Path, entries: tuple[FileEntry, ...], spec: RootSpec) -> str | None:
    """Make the file system; return why it is not built on the parent's, if that was asked for."""
    work, image = Path(spec.work), Path(spec.out) / FILE_SYSTEM
    make_empty(image, spec.size_bytes, spec.uuid, spec.hash_seed, spec.epoch_s)
    without_parent = None
    if spec.parent is not None:
        try:
            _sync_onto_parent(image, tree, entries, spec)
        except RequestError as error:
            # Not the end: what does not fit beside a parent's leftovers may fit alone.
            without_parent = f"{error.message}: {error.found}" if error.found else error.message
        else:
            return None
    sync(image, tree, entries, work, spec.epoch_s)
    return without_parent


def _sync_onto_parent(
    image: Path, tree: Path, entries: tuple[FileEntry, ...], spec: RootSpec
) -> None:
    """Replace the empty file system by the parent's, synced.

    Raises RequestError when it is of another shape, or does not hold the files; the
    empty one is then still there.
    """
    assert spec.parent is not None
    start = spec.parent_start_bytes
    with Path(spec.parent).open("rb") as old, image.open("rb") as new:
        found, expected = Ext4(old, start).geometry, Ext4(new).geometry
    if found != expected:
        raise RequestError("the parent's root file system has another shape")
    grown = image.with_suffix(".parent")
    try:
        copy_part(Path(spec.parent), start, spec.size_bytes, grown)
        sync(grown, tree, entries, Path(spec.work), spec.epoch_s)
        grown.rename(image)
    finally:
        grown.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
