"""The partition table is read as sfdisk wrote it, and refused when it is damaged."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from provisioner.core.manifest import Partition
from provisioner.errors import RequestError
from provisioner.imaging.gpt import (
    BIOS_BOOT,
    EFI_SYSTEM,
    LINUX_FILESYSTEM,
    firmware_of,
    read_partitions,
    root_partition,
)

MIB = 1024 * 1024
TABLE = f"""label: gpt
1: start=2048, size=2048, type={BIOS_BOOT}, name=bios
2: start=4096, size=4096, type={EFI_SYSTEM}, name=esp
4: start=8192, size=4096, type={LINUX_FILESYSTEM}
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(
        ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(path)],
        input=TABLE.encode(),
        check=True,
    )
    return path


def test_partitions_are_read_as_written(disk: Path) -> None:
    partitions = read_partitions(disk)
    assert partitions == (
        Partition(1, "bios", BIOS_BOOT, MIB, MIB),
        Partition(2, "esp", EFI_SYSTEM, 2 * MIB, 2 * MIB),
        Partition(4, "partition-4", LINUX_FILESYSTEM, 4 * MIB, 2 * MIB),
    )
    assert root_partition(partitions) == partitions[2]
    assert root_partition((*partitions, partitions[2])) is None
    assert firmware_of(partitions) == ("bios", "uefi")


@pytest.mark.parametrize("place", [512, 512 + 40, 512 + 72, 1024, 1024 + 3 * 128])
def test_one_flipped_bit_is_noticed(disk: Path, place: int) -> None:
    data = bytearray(disk.read_bytes())
    data[place] ^= 1
    disk.write_bytes(data)
    with pytest.raises(RequestError, match="partition table"):
        read_partitions(disk)


def test_disk_without_a_table_is_refused_with_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "empty.raw"
    path.write_bytes(bytes(MIB))
    with pytest.raises(RequestError) as caught:
        read_partitions(path)
    assert caught.value.hint


def test_file_shorter_than_a_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.raw"
    path.write_bytes(b"x")
    with pytest.raises(RequestError):
        read_partitions(path)


def test_truncated_image_is_refused(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.truncate(5 * MIB)
    with pytest.raises(RequestError):
        read_partitions(disk)


def test_absurd_entry_count_is_refused_though_the_checksum_is_right(disk: Path) -> None:
    data = bytearray(disk.read_bytes())
    struct.pack_into("<I", data, 512 + 80, 0xFFFFFFFF)
    struct.pack_into("<I", data, 512 + 16, 0)
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(bytes(data[512 : 512 + 92])))
    disk.write_bytes(data)
    with pytest.raises(RequestError):
        read_partitions(disk)
