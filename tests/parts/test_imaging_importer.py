"""Images of strangers: formats are named, other files are never opened, identity is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from provisioner.errors import RequestError, Unavailable
from provisioner.imaging.foreign_packages import PACKAGES_MAX, foreign_packages
from provisioner.imaging.gpt import BIOS_BOOT, EFI_SYSTEM, LINUX_FILESYSTEM, ROOT_ARCHITECTURES
from provisioner.imaging.importer import (
    RELEASE_FILE_BYTES_MAX,
    STATUS_BYTES_MAX,
    ImportRequest,
    imported_image,
)
from provisioner.imaging.sandbox import SOURCE, TARGET, Limits, run_in_sandbox
from provisioner.imaging.tools import ToolFailed
from provisioner.own_identity import own_version

MIB = 1024 * 1024
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
RELEASE_ID = "ab" * 16
STATUS = "Package: bash\nStatus: install ok installed\nVersion: 5.2\n\nPackage: gone\n" + (
    "Status: deinstall ok config-files\nVersion: 1\n"
)


def make_image(
    path: Path,
    release: object,
    *,
    boots_from: str | None = BIOS_BOOT,
    status: str = STATUS,
    status_bytes: int = 0,
    plain: bool = False,
    root_type: str = LINUX_FILESYSTEM,
) -> Path:
    """Write a 16 MiB disk with a small ext4 root that holds release.json, unless release is
    None, and dpkg's status."""
    tree = path.parent / "tree"
    for name, content in (
        ("usr/lib/provisioner/release.json", str(release) if plain else json.dumps(release)),
        ("var/lib/dpkg/status", status),
    )[release is None :]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    if status_bytes:
        os.truncate(tree / "var/lib/dpkg/status", status_bytes)
    with path.open("wb") as disk:
        disk.truncate(16 * MIB)
    boot = f"start=2048, size=2048, type={boots_from}\n" if boots_from else ""
    table = f"label: gpt\n{boot}start=4096, size=24576, type={root_type}\n"
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
    assert disk.read_bytes() == before


def test_whenever_a_file_is_imported_it_is_the_same_release(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    written_s = int.from_bytes(disk.read_bytes()[2 * MIB + 1072 :][:4], "little")
    found = []
    for days in (0, 3):
        now = NOW + timedelta(days=days)
        with imported_image(request(disk), work=tmp_path / "work", now=now) as imported:
            found.append(imported.facts)
    assert found[0].built_at == f"{datetime.fromtimestamp(written_s, UTC):%FT%TZ}"
    assert found[0].record["imported_at"] != found[1].record["imported_at"]
    # The log and the record lie beside the manifest.
    assert replace(found[0], log="", record={}) == replace(found[1], log="", record={})


@pytest.mark.parametrize("names", [(), ("shim-signed",), ("shim-signed", "grub-efi-amd64-signed")])
def test_signed_boot_loaders_make_an_image_for_secure_boot(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    lines = "Status: install ok installed\nVersion: 1\n\n"
    status = STATUS + "\n" + "".join(f"Package: {name}\n{lines}" for name in names)
    disk = make_image(tmp_path / "disk.raw", release(), boots_from=EFI_SYSTEM, status=status)
    with imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported:
        assert imported.facts.firmware == (
            ("uefi", "secure-boot") if len(names) == 2 else ("uefi",)
        )


def test_what_is_known_of_the_origin_is_recorded(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    with imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported:
        facts = imported.facts
    digest = hashlib.sha256(disk.read_bytes()).hexdigest()
    assert facts.record == {
        "imported_at": "2026-11-23T12:00:00Z",
        "imported_by": f"provisioner {own_version()}",
        "imported_from": {
            "file": "disk.raw",
            "format": "raw",
            "size_bytes": 16 * MIB,
            "sha256": digest,
        },
    }
    assert digest in facts.log
    assert facts.kernel is None
    assert facts.initrd is None


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "compat=0.10"),
        ("-o", "compat=1.1"),
        ("-o", "cluster_size=512"),
        ("-o", "cluster_size=2M"),
        ("-c", "-o", "compression_type=zlib"),
        ("-c", "-o", "compression_type=zstd"),
        ("-c", "-o", "compression_type=zstd,cluster_size=2M"),
    ],
)
def test_qcow2_is_converted_and_the_copy_removed(tmp_path: Path, options: tuple[str, ...]) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    qcow2 = tmp_path / "disk.qcow2"
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(disk), str(qcow2)]
    subprocess.run(command, check=True)
    before = qcow2.read_bytes()
    work = tmp_path / "work"
    with imported_image(request(qcow2, "qcow2"), work=work, now=NOW) as imported:
        assert imported.raw.read_bytes() == disk.read_bytes()
        assert imported.raw.stat().st_uid == os.geteuid()
        assert imported.facts.packages == {"bash": "5.2"}
        assert imported.facts.record["imported_from"]["format"] == "qcow2"
    assert not list(work.iterdir())
    assert qcow2.read_bytes() == before


def test_holes_stay_holes(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    with disk.open("r+b") as longer:
        longer.truncate(3 << 30)
    qcow2 = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(disk), str(qcow2)], check=True)
    with imported_image(request(qcow2, "qcow2"), work=tmp_path / "work", now=NOW) as imported:
        found = imported.raw.stat()
        assert found.st_size == 3 << 30
        assert found.st_blocks * 512 < 16 * MIB


def test_qcow2_that_reads_another_file_would_not_get_it_from_a_converter_either(
    tmp_path: Path,
) -> None:
    """What if we had judged wrongly: the sandbox holds nothing that could be read."""
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"root:secret" * 100_000)
    hostile = tmp_path / "hostile.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret)]
    subprocess.run([*command, str(hostile)], check=True)
    target = tmp_path / "target.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(hostile), str(target)], check=True)
    assert b"root:secret" in target.read_bytes()
    target.write_bytes(bytes(2 * MIB))
    limits = Limits(
        time=timedelta(seconds=120),
        cpu_time=timedelta(seconds=120),
        memory_bytes=768 * MIB,
        written_bytes=2 * MIB,
        printed_bytes=0,
    )
    convert = ("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", SOURCE, TARGET)
    with (
        hostile.open("rb") as reads,
        target.open("r+b") as writes,
        pytest.raises(ToolFailed) as caught,
    ):
        run_in_sandbox(convert, source=reads, target=writes, limits=limits)
    assert "No such file or directory" in str(caught.value.found)
    assert b"root" not in target.read_bytes()


def test_disk_that_does_not_fit_is_refused_before_it_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    options = "preallocation=metadata,cluster_size=2M"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), "1T"]
    subprocess.run(command, check=True)
    work = tmp_path / "work"
    with (
        pytest.raises(Unavailable, match="space"),
        imported_image(request(path, "qcow2"), work=work, now=NOW),
    ):
        pass
    assert not list(work.iterdir())


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed"])
def test_raw_that_is_another_format_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    disk, other = make_image(tmp_path / "disk.raw", release()), tmp_path / "other"
    command = ["qemu-img", "convert", "-f", "raw", "-O", kind, str(disk), str(other)]
    subprocess.run(command, check=True)
    with (
        pytest.raises(RequestError, match="not a raw disk image") as caught,
        imported_image(request(other), work=tmp_path / "work", now=NOW),
    ):
        pass
    assert {"vpc": "VHD"}.get(kind, kind).lower() in str(caught.value.found).lower()
    wanted = "--format qcow2" if kind == "qcow2" else "qemu-img convert"
    assert wanted in str(caught.value.hint)


@pytest.mark.parametrize("program", ["gzip", "xz", "zstd", "bzip2", "tar"])
def test_raw_that_is_packed_is_refused_with_what_to_do(tmp_path: Path, program: str) -> None:
    disk, other = make_image(tmp_path / "disk.raw", release()), tmp_path / "other"
    arguments = ("--create",) if program == "tar" else ("-1", "-c")
    with other.open("wb") as packed:
        subprocess.run([program, *arguments, disk.name], cwd=tmp_path, stdout=packed, check=True)
    with (
        pytest.raises(RequestError, match="not a raw disk image") as caught,
        imported_image(request(other), work=tmp_path / "work", now=NOW),
    ):
        pass
    assert "first" in str(caught.value.hint)


def test_list_of_packages_without_end_is_not_read(tmp_path: Path) -> None:
    status = tmp_path / "tree/var/lib/dpkg/status"
    disk = make_image(tmp_path / "disk.raw", release(), status_bytes=STATUS_BYTES_MAX + MIB)
    assert status.stat().st_size > STATUS_BYTES_MAX
    with imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported:
        assert imported.facts.packages == {}


def test_packages_are_listed_in_spdx_the_same_each_time(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    documents = []
    for days in (0, 3):
        now = NOW + timedelta(days=days)
        with imported_image(request(disk), work=tmp_path / "work", now=now) as imported:
            documents.append(imported.facts.attachments["spdx.json"])
    assert documents[0] == documents[1]
    document = json.loads(documents[0])
    assert document["spdxVersion"] == "SPDX-2.3"
    assert "bash" in {package["name"] for package in document["packages"]}


@pytest.mark.parametrize(
    "status",
    [
        "Package: ../../../etc/shadow\nStatus: install ok installed\nVersion: 1\n",
        "Package: bash\nStatus: install ok installed\nVersion: 1\r\rpackage : /etc\r",
        "Package: bash\nStatus: install ok installed\n",
        "Status: install ok installed\nVersion: 1\n",
        "Package: bash\nStatus: install ok installed\nVersion: ../1\n",
        "Package: a1\n\n" * (PACKAGES_MAX + 1),
    ],
)
def test_list_of_packages_that_dpkg_did_not_write_is_refused(status: str) -> None:
    with pytest.raises(RequestError, match="list of packages is refused"):
        foreign_packages(status)


def test_list_of_packages_that_cannot_be_described_is_left_out(tmp_path: Path) -> None:
    status = STATUS.replace("Version: 5.2", f"Version: 5.2\nHomepage: {'x' * 10_000}")
    disk = make_image(tmp_path / "disk.raw", release(), status=status)
    with imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported:
        assert imported.facts.packages == {"bash": "5.2"}
        assert imported.facts.attachments == {}
        assert "no list of packages in SPDX" in imported.facts.log


def test_list_of_packages_that_is_no_text_is_not_read(tmp_path: Path) -> None:
    """One byte of bash's version is made one that UTF-8 never has."""
    disk = make_image(tmp_path / "disk.raw", release())
    content = disk.read_bytes()
    assert content.count(b"Version: 5.2") == 1
    disk.write_bytes(content.replace(b"Version: 5.2", b"Version: 5.\xff"))
    with imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported:
        assert imported.facts.packages == {}
        assert imported.facts.attachments == {}


@pytest.mark.parametrize("seed", range(6))
def test_damaged_file_system_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    chance = random.Random(seed)
    with disk.open("r+b") as damaged:
        for _ in range(400):
            damaged.seek(2 * MIB + chance.randrange(1024, 512 * 1024))
            damaged.write(chance.randbytes(4))
    with (
        contextlib.suppress(RequestError),
        imported_image(request(disk), work=tmp_path / "work", now=NOW) as imported,
    ):
        assert imported.facts.release_id == RELEASE_ID


def test_raw_file_that_is_called_qcow2_is_refused_and_not_probed(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    with (
        pytest.raises(RequestError),
        imported_image(request(disk, "qcow2"), work=tmp_path / "work", now=NOW),
    ):
        pass


@pytest.mark.parametrize(
    "content",
    [
        release(version="2"),
        release(image="other"),
        release(release_id="x"),
        [],
        "x",
        release(more="x" * RELEASE_FILE_BYTES_MAX),
    ],
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
    disk = make_image(tmp_path / "disk.raw", None)
    asked = request(disk, release_id=RELEASE_ID)
    with imported_image(asked, work=tmp_path, now=NOW) as imported:
        assert imported.facts.release_id == RELEASE_ID


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (release(), RELEASE_ID),
        (release(image="other"), "other@1"),
        (release(version="2"), "theirs@2"),
        ({"image": "theirs", "version": "1"}, "None"),
        ([], "can be read"),
    ],
    ids=str,
)
def test_a_named_id_does_not_outvote_what_stands_in_the_image(
    tmp_path: Path, content: object, found: str
) -> None:
    disk = make_image(tmp_path / "disk.raw", content)
    with (
        pytest.raises(RequestError) as refused,
        imported_image(request(disk, release_id="cd" * 16), work=tmp_path, now=NOW),
    ):
        pass
    assert found in str(refused.value.found)


def test_an_id_may_be_named_that_also_stands_in_the_image(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release())
    asked = request(disk, release_id=RELEASE_ID)
    with imported_image(asked, work=tmp_path, now=NOW) as imported:
        assert imported.facts.release_id == RELEASE_ID


def test_json_without_end_is_refused(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", "[" * 30_000, plain=True)
    with (
        pytest.raises(RequestError, match="does not say which release"),
        imported_image(request(disk), work=tmp_path, now=NOW),
    ):
        pass


def test_named_id_must_be_one(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", [])
    with (
        pytest.raises(RequestError, match="not a release id"),
        imported_image(request(disk, release_id="x"), work=tmp_path, now=NOW),
    ):
        pass


@pytest.mark.parametrize(("root_type", "architecture"), ROOT_ARCHITECTURES.items())
def test_the_type_of_the_root_says_for_which_architecture_it_is(
    tmp_path: Path, root_type: str, architecture: str
) -> None:
    disk = make_image(tmp_path / "disk.raw", release(), root_type=root_type)
    if architecture == "amd64":
        with imported_image(request(disk), work=tmp_path, now=NOW) as imported:
            assert imported.facts.architecture == "amd64"
            assert imported.facts.root_partition == 2
        return
    with (
        pytest.raises(RequestError, match="another architecture") as refused,
        imported_image(request(disk), work=tmp_path, now=NOW),
    ):
        pass
    assert "amd64" in str(refused.value.expected)
    assert architecture in str(refused.value.found)


def test_image_that_no_firmware_starts_is_refused(tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", release(), boots_from=None)
    with (
        pytest.raises(RequestError, match="firmware"),
        imported_image(request(disk), work=tmp_path, now=NOW),
    ):
        pass
