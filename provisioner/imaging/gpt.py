"""Read the GUID partition table of a raw disk image. Writes nothing, and trusts nothing it reads.

Source: UEFI Specification 2.10, chapter 5 (GUID Partition Table disk layout).
"""

from __future__ import annotations

import struct
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO, Final

from provisioner.core.manifest import PARTITIONS_MAX, Partition
from provisioner.errors import RequestError

SECTOR_BYTES: Final = 512
ENTRY_BYTES: Final = 128

# Signature, revision, header size, header CRC, reserved, this and the other header's
# sector, first and last usable sector, disk GUID, sector of the entries, their number,
# their size, their CRC.
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_UNUSED: Final = bytes(16)

LINUX_FILESYSTEM: Final = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
# Discoverable Partitions Specification: root on x86-64 and on 64-bit ARM.
LINUX_ROOTS: Final = frozenset(
    {"4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"}
)
EFI_SYSTEM: Final = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT: Final = "21686148-6449-6E6F-744E-656564454649"


def read_partitions(image: Path) -> tuple[Partition, ...]:
    """Return the used partitions of a raw image with 512-byte sectors, by number.

    Raises RequestError when there is no sound GPT, or when a partition ends
    behind the image.
    """
    size_bytes = image.stat().st_size
    with image.open("rb") as disk:
        entries = _entries(disk, image)
    partitions = []
    for index in range(len(entries) // ENTRY_BYTES):
        entry = entries[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES]
        if partition := _partition(index + 1, entry):
            if partition.start_bytes + partition.size_bytes > size_bytes:
                raise _refusal(image, f"partition {partition.number} within the image", "beyond")
            partitions.append(partition)
    return tuple(partitions)


def root_partition(partitions: tuple[Partition, ...]) -> Partition | None:
    """Return the root partition, when the types leave no doubt which one it is."""
    marked = [part for part in partitions if part.type in LINUX_ROOTS]
    plain = [part for part in partitions if part.type == LINUX_FILESYSTEM]
    for candidates in (marked, plain):
        if len(candidates) == 1:
            return candidates[0]
    return None


def firmware_of(partitions: tuple[Partition, ...]) -> tuple[str, ...]:
    """Return the firmware that the partitions prepare for, in manifest order."""
    types = {part.type for part in partitions}
    pairs = (("bios", BIOS_BOOT), ("uefi", EFI_SYSTEM))
    return tuple(name for name, guid in pairs if guid in types)


def _entries(disk: BinaryIO, image: Path) -> bytes:
    """Return the table's entries after checking both checksums."""
    disk.seek(SECTOR_BYTES)
    sector = disk.read(SECTOR_BYTES)
    if len(sector) < SECTOR_BYTES or sector[:8] != b"EFI PART":
        raise _refusal(image, "a GUID partition table", "none")
    fields = _HEADER.unpack_from(sector)
    header_bytes, header_crc = fields[2], fields[3]
    first_sector, count, entry_bytes, entries_crc = fields[10:14]
    if not _HEADER.size <= header_bytes <= SECTOR_BYTES:
        raise _refusal(image, "a GPT header of 92 to 512 bytes", header_bytes)
    blanked = sector[:16] + bytes(4) + sector[20:header_bytes]
    if zlib.crc32(blanked) != header_crc:
        raise _refusal(image, "a GPT header with a correct checksum", "a wrong one")
    if entry_bytes != ENTRY_BYTES or count > PARTITIONS_MAX:
        raise _refusal(
            image,
            f"at most {PARTITIONS_MAX} entries of {ENTRY_BYTES} bytes",
            f"{count} of {entry_bytes}",
        )
    disk.seek(first_sector * SECTOR_BYTES)
    entries = disk.read(count * entry_bytes)
    if zlib.crc32(entries) != entries_crc:
        raise _refusal(image, "GPT entries with a correct checksum", "a wrong one")
    return entries


def _partition(number: int, entry: bytes) -> Partition | None:
    kind, _unique, first, last, _attributes, label = _ENTRY.unpack(entry)
    if kind == _UNUSED:
        return None
    name = label.decode("utf-16-le", "replace").split("\0")[0]
    return Partition(
        number=number,
        name=name or f"partition-{number}",
        type=str(uuid.UUID(bytes_le=kind)).upper(),
        start_bytes=first * SECTOR_BYTES,
        size_bytes=(last - first + 1) * SECTOR_BYTES,
    )


def _refusal(image: Path, expected: str, found: object) -> RequestError:
    return RequestError(
        f"the partition table of {image.name} is refused",
        expected=expected,
        found=str(found),
        hint="a release is a whole disk with a GPT; make one with `sgdisk --mbrtogpt` or rebuild",
    )
