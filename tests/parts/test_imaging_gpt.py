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


def reseal(disk: Path, *, header: dict[int, int], entries: dict[int, int]) -> None:
    """Write 64-bit numbers into header and entries (by place), with right checksums again."""
    data = bytearray(disk.read_bytes())
    for place, value in entries.items():
        struct.pack_into("<Q", data, 1024 + place, value)
    struct.pack_into("<I", data, 512 + 88, zlib.crc32(bytes(data[1024 : 1024 + 128 * 128])))
    for place, value in header.items():
        struct.pack_into("<Q", data, 512 + place, value)
    struct.pack_into("<I", data, 512 + 16, 0)
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(bytes(data[512 : 512 + 92])))
    disk.write_bytes(data)


FIRST_OF_2, LAST_OF_2 = 128 + 32, 128 + 40


@pytest.mark.parametrize(
    ("header", "entries", "told"),
    [
        ({72: 1 << 54}, {}, "at sector 18014398509481984"),
        ({72: 1 << 63}, {}, "at sector 9223372036854775808"),
        ({72: 3}, {}, "at sector 3"),
        ({80: 128 << 32 | 56}, {}, "56 entries"),
        ({}, {LAST_OF_2: 5}, "sectors 4096 to 5"),
        ({}, {FIRST_OF_2: 0}, "sectors 0 to 8191"),
        ({40: 2}, {FIRST_OF_2: 33}, "sectors 33 to 8191"),
        ({}, {FIRST_OF_2: 3000}, "partition 2 from 3000"),
        ({}, {LAST_OF_2: 9000}, "partition 4 from 8192"),
        ({48: 12000}, {}, "sectors 8192 to 12287"),
        ({}, {FIRST_OF_2: 1 << 63, LAST_OF_2: (1 << 64) - 1}, "sectors 9223372036854775808"),
        ({}, {127 * 128: 1, 127 * 128 + 32: 13000, 127 * 128 + 40: 13001}, "no place for CIDATA"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_agent_could_not_write_is_refused_though_the_checksums_are_right(
    disk: Path, header: dict[int, int], entries: dict[int, int], told: str
) -> None:
    reseal(disk, header={}, entries={})
    read_partitions(disk)
    reseal(disk, header=header, entries=entries)
    with pytest.raises(RequestError, match="the partition table of") as refused:
        read_partitions(disk)
    assert told in str(refused.value.found)
    assert refused.value.expected


def test_an_image_of_part_of_a_sector_is_refused(disk: Path) -> None:
    with disk.open("ab") as file:
        file.write(b"x")
    with pytest.raises(RequestError) as refused:
        read_partitions(disk)
    assert refused.value.found == f"{8 * MIB + 1} bytes"


def test_absurd_entry_count_is_refused_though_the_checksum_is_right(disk: Path) -> None:
    data = bytearray(disk.read_bytes())
    struct.pack_into("<I", data, 512 + 80, 0xFFFFFFFF)
    struct.pack_into("<I", data, 512 + 16, 0)
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(bytes(data[512 : 512 + 92])))
    disk.write_bytes(data)
    with pytest.raises(RequestError):
        read_partitions(disk)
