"""The partition table and the CIDATA volume, judged by other people's tools."""

import subprocess
from pathlib import Path

import pytest

from provisioner.agent.deploy import seed_image
from provisioner.agent.fat import fat_image
from provisioner.agent.layout import (
    CIDATA_BYTES,
    HEAD_BYTES,
    Layout,
    plan_layout,
    read_table,
    smallest_disk_bytes,
)
from provisioner.agent.problems import DiskTooSmall, ImageUnfit, SeedUnfit
from tests.parts.agent_service import MIB, SEED, make_image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_image(tmp_path_factory.mktemp("image") / "image", size_mib=16)


def lay_out(image: bytes, disk: Path, disk_bytes: int) -> Layout:
    """Write image, tables and an empty CIDATA as the agent would."""
    layout = plan_layout(image, image_bytes=len(image), disk_bytes=disk_bytes)
    disk.write_bytes(image)
    with disk.open("r+b") as file:
        file.truncate(disk_bytes)
        for data, offset in ((layout.head, 0), (layout.backup, layout.backup_at)):
            file.seek(offset)
            file.write(data)
    return layout


@pytest.mark.parametrize("disk_bytes", [21 * MIB, 21 * MIB + 512, 64 * MIB, 3 << 40])
def test_other_tools_find_nothing_wrong(image: bytes, tmp_path: Path, disk_bytes: int) -> None:
    """sgdisk and sfdisk verify the table on the smallest disk, an odd one and a large one."""
    disk = tmp_path / "disk"
    layout = lay_out(image, disk, disk_bytes)
    checked = subprocess.run(["sgdisk", "-v", disk], capture_output=True, text=True, check=True)
    assert "No problems found" in checked.stdout
    verified = subprocess.run(["sfdisk", "-V", disk], capture_output=True, text=True, check=True)
    assert "No errors detected" in verified.stdout
    shown = subprocess.run(["sfdisk", "-d", disk], capture_output=True, text=True, check=True)
    [line] = [line for line in shown.stdout.splitlines() if 'name="CIDATA"' in line]
    fields = dict(field.strip().split("=") for field in line.partition(":")[2].split(","))
    assert int(fields["start"]) * 512 == layout.cidata_at


def test_the_partitions_of_the_image_stay_where_they_are(image: bytes) -> None:
    """Only CIDATA is added, behind the image, and the disk's identity is kept."""
    before = read_table(image)
    after = plan_layout(image, image_bytes=len(image), disk_bytes=64 * MIB).table
    assert after.parts[:-1] == before.parts
    assert after.disk_guid == before.disk_guid
    assert after.parts[-1].name == "CIDATA"
    assert after.parts[-1].first * 512 >= len(image)


def test_the_smallest_disk_is_as_small_as_we_say(image: bytes) -> None:
    """One sector less does not fit, and the error says what would."""
    least = smallest_disk_bytes(len(image))
    plan_layout(image, image_bytes=len(image), disk_bytes=least)
    with pytest.raises(DiskTooSmall) as caught:
        plan_layout(image, image_bytes=len(image), disk_bytes=least - 512)
    assert caught.value.expected == f"at least {least} bytes"


@pytest.mark.parametrize("at", [512, 512 + 16, 512 + 72, 1024 + 3])
def test_a_damaged_table_is_refused(image: bytes, at: int) -> None:
    """A flipped bit in header or entries is not deployed."""
    damaged = bytearray(image[:HEAD_BYTES])
    damaged[at] ^= 1
    with pytest.raises(ImageUnfit):
        read_table(bytes(damaged))


def test_the_seed_is_a_vfat_volume_with_the_four_documents(tmp_path: Path) -> None:
    """fsck.fat finds no fault, blkid the label, and mtools the bytes under their long names."""
    volume = tmp_path / "cidata"
    volume.write_bytes(seed_image(SEED))
    assert volume.stat().st_size == CIDATA_BYTES
    subprocess.run(["fsck.fat", "-n", volume], check=True, capture_output=True)
    label = ["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "TYPE", str(volume)]
    found = subprocess.run(label, check=True, capture_output=True, text=True).stdout.split()
    assert found == ["CIDATA", "vfat"]
    for name, text in SEED.items():
        got = subprocess.run(["mtype", "-i", volume, f"::{name}"], check=True, capture_output=True)
        assert got.stdout.decode() == text


def test_a_seed_that_does_not_fit_is_refused() -> None:
    """Neither more bytes than the partition, nor a document less or none."""
    with pytest.raises(SeedUnfit):
        seed_image({**SEED, "user-data": "x" * CIDATA_BYTES})
    with pytest.raises(SeedUnfit):
        seed_image({**SEED, "user-data": None})
    with pytest.raises(SeedUnfit):
        seed_image({})


@pytest.mark.parametrize("name", ["UPPER", "a/b", "", "a" * 65, "ü", "a b"])
def test_names_that_need_quoting_are_refused(name: str) -> None:
    """The volume holds names of ours only."""
    with pytest.raises(ValueError, match="names cannot be written"):
        fat_image({name: b""}, label="X", size_bytes=CIDATA_BYTES)


def test_long_names_and_empty_files_are_kept(tmp_path: Path) -> None:
    """A name of exactly 13 letters needs no end mark; an empty file no cluster."""
    files = {"a" * 13: b"1", "b" * 14: b"", "c" * 26: b"3" * 5000, "d" * 27: b"4"}
    volume = tmp_path / "volume"
    volume.write_bytes(fat_image(files, label="X", size_bytes=CIDATA_BYTES))
    subprocess.run(["fsck.fat", "-n", volume], check=True, capture_output=True)
    for name, content in files.items():
        got = subprocess.run(["mtype", "-i", volume, f"::{name}"], check=True, capture_output=True)
        assert got.stdout == content
