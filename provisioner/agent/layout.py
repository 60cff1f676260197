"""Where things go on the disk: the image's partition table fitted to a larger disk.

Pure: bytes in, bytes out. The image brings a GPT; we move its backup to the end of the disk
and add one partition, CIDATA, before it. Partitions of the image stay where they are.

Source: UEFI specification 2.10, chapter 5.3 (GUID Partition Table).
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Final

from provisioner.agent.problems import DiskTooSmall, ImageUnfit

SECTOR_BYTES: Final = 512
MIB: Final = 1024 * 1024
CIDATA_BYTES: Final = 4 * MIB
CIDATA_LABEL: Final = "CIDATA"
# What lies behind CIDATA: the backup table, and nothing that an older layout left there.
TAIL_BYTES: Final = MIB
ENTRY_BYTES: Final = 128
ENTRIES: Final = 128
TABLE_SECTORS: Final = ENTRIES * ENTRY_BYTES // SECTOR_BYTES
# The protective MBR, the header and the entries: what makes a disk boot.
HEAD_BYTES: Final = (2 + TABLE_SECTORS) * SECTOR_BYTES

_HEADER: Final = struct.Struct("<8s4sIIIQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_SIGNATURE: Final = b"EFI PART"
_REVISION: Final = b"\0\0\1\0"
# "Microsoft basic data", which is what a FAT file system is kept in.
# EBD0A0A2-B9E5-4433-87C0-68B6B72699C7, as the table stores it.
_BASIC_DATA: Final = bytes.fromhex("a2a0d0ebe5b9334487c068b6b72699c7")


@dataclass(frozen=True)
class Part:
    """One partition, in sectors; last is inclusive, as in the table."""

    number: int
    type_guid: bytes
    guid: bytes
    first: int
    last: int
    attributes: int
    name: str


@dataclass(frozen=True)
class Table:
    """A GPT: the disk's GUID, the protective MBR sector with its boot code, the partitions."""

    mbr: bytes
    disk_guid: bytes
    first_usable: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """What to write where, beside the image's own chunks. Offsets in bytes.

    head replaces the first HEAD_BYTES of the image, backup goes to backup_at at the disk's
    end, the seed's file system to cidata_at.
    """

    head: bytes
    backup: bytes
    backup_at: int
    cidata_at: int
    table: Table


def plan_layout(
    head: bytes, *, image_bytes: int, disk_bytes: int, disk: str = "the disk"
) -> Layout:
    """Fit the table in `head` (the image's first HEAD_BYTES or more) to the disk.

    `disk` is what an error calls it.

    Raises ImageUnfit when there is no sound GPT, DiskTooSmall when the image, CIDATA and
    the backup table do not fit side by side.
    """
    table = read_table(head)
    disk_sectors = disk_bytes // SECTOR_BYTES
    cidata_at = (disk_sectors * SECTOR_BYTES - TAIL_BYTES - CIDATA_BYTES) // MIB * MIB
    if cidata_at < image_bytes:
        raise DiskTooSmall(
            f"{disk} is too small for the image and its seed; nothing was written",
            expected=f"at least {smallest_disk_bytes(image_bytes)} bytes",
            found=f"{disk_bytes} bytes",
            hint="let the profile's disk rule pick a larger disk, or give the host one",
        )
    table = replace(table, mbr=_protective_mbr(table.mbr, disk_sectors))
    fitted = _with_cidata(table, cidata_at, image_bytes)
    entries = _entries(fitted)
    backup_at = (disk_sectors - 1 - TABLE_SECTORS) * SECTOR_BYTES
    primary = _header(fitted, entries, disk_sectors, is_backup=False)
    backup = _header(fitted, entries, disk_sectors, is_backup=True)
    return Layout(
        head=fitted.mbr + primary + entries,
        backup=entries + backup,
        backup_at=backup_at,
        cidata_at=cidata_at,
        table=fitted,
    )


def smallest_disk_bytes(image_bytes: int) -> int:
    """Return the size of the smallest disk that takes such an image."""
    return -(-image_bytes // MIB) * MIB + CIDATA_BYTES + TAIL_BYTES


def read_table(head: bytes) -> Table:
    """Return the GPT in the first HEAD_BYTES of a disk or an image. Raises ImageUnfit."""
    header = head[SECTOR_BYTES : 2 * SECTOR_BYTES]
    if len(head) < HEAD_BYTES or header[:8] != _SIGNATURE:
        raise ImageUnfit("the image has no GPT at its start")
    fields = _HEADER.unpack_from(header)
    header_bytes, header_sum, entries_at, count, entry_bytes, entries_sum = (
        fields[2], fields[3], fields[10], fields[11], fields[12], fields[13],
    )  # fmt: skip
    if (header_bytes, entries_at, count, entry_bytes) != (_HEADER.size, 2, ENTRIES, ENTRY_BYTES):
        raise ImageUnfit(
            "the image's GPT is not laid out as we expect",
            expected=f"{ENTRIES} entries of {ENTRY_BYTES} bytes at sector 2",
            found=f"{count} entries of {entry_bytes} bytes at sector {entries_at}",
        )
    entries = head[2 * SECTOR_BYTES : HEAD_BYTES]
    zeroed = header[:16] + bytes(4) + header[20 : _HEADER.size]
    if zlib.crc32(zeroed) != header_sum or zlib.crc32(entries) != entries_sum:
        raise ImageUnfit("the image's GPT has a wrong checksum")
    return Table(
        mbr=head[:SECTOR_BYTES],
        disk_guid=fields[9],
        first_usable=fields[7],
        parts=tuple(_parts(entries)),
    )


def _parts(entries: bytes) -> list[Part]:
    parts = []
    for number, fields in enumerate(_ENTRY.iter_unpack(entries), start=1):
        type_guid, guid, first, last, attributes, name = fields
        if type_guid != bytes(16):
            text = name.decode("utf-16-le", "replace").rstrip("\0")
            parts.append(Part(number, type_guid, guid, first, last, attributes, text))
    return parts


def _with_cidata(table: Table, cidata_at: int, image_bytes: int) -> Table:
    """Return the table with CIDATA in the first free place behind the image's partitions."""
    number = max((part.number for part in table.parts), default=0) + 1
    beyond = [part for part in table.parts if part.last * SECTOR_BYTES >= image_bytes]
    if number > ENTRIES or beyond:
        raise ImageUnfit(
            "the image's partitions leave no place for CIDATA",
            found=[part.number for part in beyond] or number - 1,
        )
    first = cidata_at // SECTOR_BYTES
    part = Part(
        number=number,
        type_guid=_BASIC_DATA,
        # Told apart from other partitions, and the same each time: the table can be compared.
        guid=hashlib.sha256(table.disk_guid + b"CIDATA").digest()[:16],
        first=first,
        last=first + CIDATA_BYTES // SECTOR_BYTES - 1,
        attributes=0,
        name=CIDATA_LABEL,
    )
    return replace(table, parts=(*table.parts, part))


def _entries(table: Table) -> bytes:
    data = bytearray(ENTRIES * ENTRY_BYTES)
    for part in table.parts:
        name = part.name.encode("utf-16-le")
        _ENTRY.pack_into(
            data,
            (part.number - 1) * ENTRY_BYTES,
            part.type_guid,
            part.guid,
            part.first,
            part.last,
            part.attributes,
            name,
        )
    return bytes(data)


def _header(table: Table, entries: bytes, disk_sectors: int, *, is_backup: bool) -> bytes:
    last = disk_sectors - 1
    here, there = (last, 1) if is_backup else (1, last)
    fields = [
        _SIGNATURE, _REVISION, _HEADER.size, 0, 0, here, there, table.first_usable,
        last - TABLE_SECTORS - 1, table.disk_guid, last - TABLE_SECTORS if is_backup else 2,
        ENTRIES, ENTRY_BYTES, zlib.crc32(entries),
    ]  # fmt: skip
    fields[3] = zlib.crc32(_HEADER.pack(*fields))
    return _HEADER.pack(*fields).ljust(SECTOR_BYTES, b"\0")


def _protective_mbr(mbr: bytes, disk_sectors: int) -> bytes:
    """Return the MBR with its boot code, and with the protective entry grown to the disk."""
    sector = bytearray(mbr)
    size = min(disk_sectors - 1, 0xFFFFFFFF)
    for at in range(446, 510, 16):
        if sector[at + 4] == 0xEE:
            struct.pack_into("<I", sector, at + 12, size)
            # CHS fields: "beyond what can be said".
            sector[at + 5 : at + 8] = b"\xff\xff\xff"
    return bytes(sector)
