"""Images of strangers: formats are named, other files are never opened, identity is read."""

from __future__ import annotations

import json
import struct
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from provisioner.errors import RequestError
from provisioner.imaging.gpt import BIOS_BOOT, LINUX_FILESYSTEM
from provisioner.imaging.importer import ImportRequest, check_qcow2, imported_image

MIB = 1024 * 1024
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
RELEASE_ID = "ab" * 16
STATUS = "Package: bash\nStatus: install ok installed\nVersion: 5.2\n\nPackage: gone\n" + (
    "Status: deinstall ok config-files\nVersion: 1\n"
)


def make_image(path: Path, release: object, *, bootable: bool = True) -> Path:
    """Write a 16 MiB disk with a small ext4 root that holds release.json and dpkg's status."""
    tree = path.parent / "tree"
    for name, content in (
        ("usr/lib/provisioner/release.json", json.dumps(release)),
        ("var/lib/dpkg/status", STATUS),
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    with path.open("wb") as disk:
        disk.truncate(16 * MIB)
    bios = f"start=2048, size=2048, type={BIOS_BOOT}\n" if bootable else ""
    table = f"label: gpt\n{bios}start=4096, size=24576, type={LINUX_FILESYSTEM}\n"
    command = ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(path)]
    subprocess.run(command, input=table.encode(), check=True)
    options = ["-q", "-F", "-t", "ext4", "-E", f"offset={2 * MIB}", "-d", str(tree)]
    subprocess.run(["mke2fs", *options, str(path), "12M"], check=True)
    return path


def release(**changes: str) -> dict[str, str]:
    return {"image": "theirs", "version": "1", "release_id": RELEASE_ID} | changes


def request(file: Path, kind: str = "raw", release_id: str | None = None) -> ImportRequest:
    return ImportRequest(file, kind, "theirs", "1", release_id=release_id)


def test_raw_image_says_what_it_is(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    before = disk.read_bytes()
    with imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported:
        assert imported.raw == disk
        assert imported.facts.release_id == RELEASE_ID
        assert imported.facts.packages == {"bash": "5.2"}
        assert imported.facts.firmware == ("bios",)
        assert imported.facts.root_partition == 2
        assert imported.facts.built_at == "2026-11-23T12:00:00Z"
    assert disk.read_bytes() == before


def test_qcow2_is_converted_and_the_copy_removed(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    qcow2 = tmp_path / "disk.qcow2"
    command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(disk), str(qcow2)]
    subprocess.run(command, check=True)
    work = tmp_path / "work"
    with imported_image(request(qcow2, "qcow2"), work=work, now=NOW) as imported:
        assert imported.raw.read_bytes() == disk.read_bytes()
    assert not list(work.iterdir())


def test_qcow2_that_reads_another_file_is_refused_and_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"root:secret" * 100_000)
    hostile = tmp_path / "hostile.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret)]
    subprocess.run([*command, str(hostile)], check=True)
    work = tmp_path / "work"
    with (
        pytest.raises(RequestError) as caught,
        imported_image(request(hostile, "qcow2"), work=work, now=NOW),
    ):
        pass
    assert caught.value.expected == "no backing file"
    assert not list(work.iterdir())


def test_qcow2_with_its_data_elsewhere_is_refused(tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.qcow2"
    option = f"data_file={tmp_path / 'data.raw'},data_file_raw=on"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", option, str(hostile), "1M"]
    subprocess.run(command, check=True)
    with pytest.raises(RequestError) as caught:
        check_qcow2(hostile)
    assert caught.value.expected == "no external data file"


@pytest.mark.parametrize(
    ("place", "form", "value"),
    [
        (0, ">4s", b"QFI\0"),
        (4, ">I", 1),
        (8, ">Q", 512),
        (16, ">I", 9),
        (20, ">I", 63),
        (24, ">Q", 0),
        (24, ">Q", 1 << 60),
        (32, ">I", 2),
        (72, ">Q", 1),
        (72, ">Q", 2),
        (72, ">Q", 4),
        (72, ">Q", 1 << 40),
    ],
)
def test_each_dangerous_header_field_is_refused(
    tmp_path: Path, place: int, form: str, value: bytes | int
) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    assert check_qcow2(path) == MIB
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, place, value)
    path.write_bytes(data)
    with pytest.raises(RequestError):
        check_qcow2(path)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"QFI\xfb" + bytes(20)])
def test_short_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(content)
    with pytest.raises(RequestError):
        check_qcow2(path)


def test_raw_file_that_is_called_qcow2_is_refused_and_not_probed(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    with (
        pytest.raises(RequestError),
        imported_image(request(disk, "qcow2"), work=tmp_path / "work", now=NOW),
    ):
        pass


@pytest.mark.parametrize(
    "content", [release(version="2"), release(image="other"), release(release_id="x"), [], "x"]
)
def test_image_that_says_it_is_another_release_or_none_is_refused(
    tmp_path: Path, content: object
) -> None:
    disk = make_image(tmp_path / "disk.raw", content)
    with (
        pytest.raises(RequestError, match="release"),
        imported_image(request(disk), work=tmp_path, now=NOW),
    ):
        pass


def test_id_may_be_named_where_it_cannot_be_read(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", [])
    asked = request(disk, release_id=RELEASE_ID)
    with imported_image(asked, work=tmp_path, now=NOW) as imported:
        assert imported.facts.release_id == RELEASE_ID


def test_image_that_no_firmware_starts_is_refused(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release(), bootable=False)
    with (
        pytest.raises(RequestError, match="firmware"),
        imported_image(request(disk), work=tmp_path, now=NOW),
    ):
        pass
