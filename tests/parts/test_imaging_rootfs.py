"""The root file system of a version: from a base tree, as root or in a namespace, on a parent."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provisioner.imaging import rootfs
from provisioner.imaging.ext4_sync import prove
from provisioner.imaging.file_manifest import FileEntry, boot_file, parse
from provisioner.imaging.finishing import BUILD_FOLDER
from tests.parts.ext4_trees import MIB, UUID, moved_bytes

PROJECT = Path(__file__).resolve().parents[2]
EPOCH_S = 1_790_000_000
STATUS = "Package: bash\nStatus: install ok installed\nVersion: 5.2-1\nArchitecture: amd64\n"
CAPABILITY = bytes.fromhex("0100000200200000" + 12 * "00")
FOLDERS = ("etc/ssh", "usr/lib/python3", "var/lib/dpkg", "var/log/apt", "boot")
LINKS = {"vmlinuz": "boot/vmlinuz-6", "bin": "usr/bin"}
FILES = {
    "var/lib/dpkg/status": STATUS,
    "usr/lib/os-release": 'ID=debian\nIMAGE_ID=old\nVERSION_ID="12"\n',
    "etc/ssh/ssh_host_rsa_key": "of no host",
    "etc/machine-id": "0123",
    "etc/hostname": "builder\n",
    "etc/resolv.conf": "nameserver 192.0.2.1\n",
    "var/log/apt/term.log": "a log",
    "boot/vmlinuz-6": "a kernel",
    "usr/lib/python3/m.pyc": "abcd\3\0\0\0code",
    f"{BUILD_FOLDER}/boot/usr/lib/shim": "a boot loader",
}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="maps ids as only root may")


def make_base(path: Path, more: dict[str, str] | None = None, xattr: bytes = b"") -> Path:
    """Write a base tree such as mmdebstrap's: a tar of everything, owned by several users."""
    plain = path.with_suffix("")
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in FOLDERS:
            entry = _entry(name, tarfile.DIRTYPE, 0o755)
            archive.addfile(entry)
        for name, target in LINKS.items():
            entry = _entry(name, tarfile.SYMTYPE, 0o777)
            entry.linkname = target
            archive.addfile(entry)
        for name, text in {**FILES, **(more or {})}.items():
            entry = _entry(name, tarfile.REGTYPE, 0o644)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
        ping = _entry("usr/bin/ping", tarfile.REGTYPE, 0o755)
        ping.pax_headers = {"SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1")}
        if xattr:
            ping.pax_headers["SCHILY.xattr.user.note"] = xattr.decode()
        archive.addfile(ping)
        mail = _entry("var/mail", tarfile.DIRTYPE, 0o2775)
        mail.uid, mail.gid = 33, 8
        archive.addfile(mail)
    subprocess.run(["zstd", "-q", "--rm", "-o", str(path), str(plain)], check=True)
    return path


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, EPOCH_S - 1000
    return entry


def a_spec(folder: Path, base: Path, version: str = "1") -> rootfs.RootSpec:
    """Return a spec whose work and out folders are new ones below the folder."""
    work = folder / f"work-{time.monotonic_ns()}"
    (work / "out").mkdir(parents=True)
    return rootfs.RootSpec(
        base=str(base),
        work=str(work),
        out=str(work / "out"),
        size_bytes=32 * MIB,
        uuid=UUID,
        hash_seed=UUID,
        epoch_s=EPOCH_S,
        files={f"/{rootfs.RELEASE_FILE}": f'{{"version":"{version}"}}\n'},
        image="tiny",
        version=version,
    )


def made(spec: rootfs.RootSpec) -> Path:
    """Make the root file system, and return it after comparing it with its files."""
    rootfs.make_root(spec)
    image = Path(spec.out) / rootfs.FILE_SYSTEM
    prove(image, wanted(spec))
    return image


def wanted(spec: rootfs.RootSpec) -> tuple[FileEntry, ...]:
    return parse((Path(spec.out) / rootfs.FILES).read_bytes())


def without_parent(spec: rootfs.RootSpec) -> str | None:
    found: str | None = json.loads((Path(spec.out) / rootfs.SUMMARY).read_text())["without_parent"]
    return found


def on(parent: Path, spec: rootfs.RootSpec, start_bytes: int = 0) -> rootfs.RootSpec:
    return replace(spec, parent=str(parent), parent_start_bytes=start_bytes)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.tar.zst")


@needs_root
def test_the_tree_is_that_of_this_version_and_of_no_host(base: Path, tmp_path: Path) -> None:
    spec = a_spec(tmp_path, base)
    image = made(spec)
    found = {entry.path: entry for entry in prove(image, wanted(spec))}
    for gone in ("/etc/hostname", "/etc/ssh/ssh_host_rsa_key", "/var/log/apt/term.log"):
        assert gone not in found
    assert f"/{BUILD_FOLDER}" not in found
    assert found["/etc/machine-id"].size == 0
    assert found["/etc/resolv.conf"].target == "../run/systemd/resolve/stub-resolv.conf"
    assert found["/usr/bin/ping"].xattrs == {"security.capability": CAPABILITY.hex()}
    mail = found["/var/mail"]
    assert (mail.mode, mail.uid, mail.gid) == (0o2775, 33, 8)
    assert found["/dev"].type == "dir"
    kernel = boot_file(found.values(), "/vmlinuz")
    assert kernel is not None
    assert kernel.path == "/boot/vmlinuz-6"
    assert (Path(spec.out) / "boot/usr/lib/shim").read_text() == "a boot loader"
    assert max(entry.mtime for entry in found.values()) == EPOCH_S


@needs_root
def test_a_later_build_of_the_same_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    first = made(a_spec(tmp_path, base))
    # Wherever the clock gets into an image, a second shows.
    time.sleep(1.1)
    assert made(a_spec(tmp_path, base)).read_bytes() == first.read_bytes()


@needs_root
def test_a_build_on_a_parent_holds_the_same_and_moves_little(base: Path, tmp_path: Path) -> None:
    """The parent is a partition of a disk, and stays as it is."""
    first = made(a_spec(tmp_path, base))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(MIB) + first.read_bytes() + bytes(MIB))
    spec, fresh = on(disk, a_spec(tmp_path, base, "2"), MIB), a_spec(tmp_path, base, "2")
    image = made(spec)
    assert without_parent(spec) is None
    assert disk.read_bytes() == bytes(MIB) + first.read_bytes() + bytes(MIB)
    made(fresh)
    assert wanted(spec) == wanted(fresh)
    # The super block, two files that name the version, and their inodes.
    assert moved_bytes(first, image) <= 6 * 4096


@needs_root
def test_a_parent_that_is_no_use_is_told_and_does_without(base: Path, tmp_path: Path) -> None:
    alone = made(a_spec(tmp_path, base)).read_bytes()
    larger = made(replace(a_spec(tmp_path, base), size_bytes=64 * MIB))
    none = tmp_path / "none.raw"
    none.write_bytes(bytes(MIB))
    noted = make_base(tmp_path / "noted.tar.zst", xattr=b"n" * 2000)
    stuck = made(a_spec(tmp_path, noted))
    for parent, why in ((larger, "shape"), (none, "not as we read it"), (stuck, "in place")):
        spec = on(parent, a_spec(tmp_path, base))
        assert made(spec).read_bytes() == alone
        assert why in (without_parent(spec) or "")


@needs_root
def test_a_namespace_makes_what_root_makes(base: Path, tmp_path: Path) -> None:
    """So a build needs no root: there, user 0 is user 100000 of this machine."""
    if not is_for_everybody(PROJECT / "provisioner"):
        pytest.skip("other users do not reach our code")
    alone = made(a_spec(tmp_path, base)).read_bytes()
    with world_readable_folder() as folder:
        shutil.copy(base, folder / "base.tar.zst")
        spec = a_spec(folder, folder / "base.tar.zst")
        (folder / "root.json").write_text(spec.to_json())
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 100_000, 100_000)
        command = [
            python_for_everybody(),
            "-m",
            "provisioner.imaging.rootfs",
            str(folder / "root.json"),
        ]
        in_a_namespace(command)
        image = Path(spec.out) / rootfs.FILE_SYSTEM
        assert image.stat().st_uid == 100_000
        assert image.read_bytes() == alone


def test_files_that_do_not_fit_end_the_child_with_an_error_to_act_on(tmp_path: Path) -> None:
    too_much = make_base(tmp_path / "large.tar.zst", {"large": "x" * 40 * MIB})
    spec = a_spec(tmp_path, too_much)
    (tmp_path / "root.json").write_text(spec.to_json())
    assert rootfs.main([str(tmp_path / "root.json")]) == 1
    error = json.loads((Path(spec.out) / rootfs.ERROR).read_text())
    assert error["code"] == "request"
    assert "larger" in error["hint"]
    assert not list(Path(spec.work).glob("tree-*"))


@contextlib.contextmanager
def world_readable_folder() -> Iterator[Path]:
    """Yield a folder that everybody reaches."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def python_for_everybody() -> str:
    """Return a Python like ours that other users reach; skip where there is none."""
    for path in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if os.path.exists(path) and is_for_everybody(path):
            return path
    pytest.skip("no Python that other users reach")


def is_for_everybody(path: str | Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in Path(path).resolve().parents)


def in_a_namespace(command: list[str]) -> None:
    """Run a command as root of a user namespace with the ids from 100000 on."""
    waiting = 'read -r go && exec setpriv --reuid 0 --regid 0 --clear-groups -- "$@"'
    with subprocess.Popen(
        ["unshare", "--user", "--keep-caps", "--", "sh", "-c", waiting, "sh", *command],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{sysconfig.get_path('purelib')}"},
        text=True,
    ) as process:
        ours = os.readlink("/proc/self/ns/user")
        while os.readlink(f"/proc/{process.pid}/ns/user") == ours:
            assert process.poll() is None
            time.sleep(0.01)
        for kind in ("uid", "gid"):
            Path(f"/proc/{process.pid}/{kind}_map").write_text("0 100000 65536\n")
        process.communicate("go\n", timeout=180)
    assert process.returncode == 0
