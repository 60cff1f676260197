"""Makes a small FAT16 file system with a handful of files: the CIDATA volume.

One folder, files in one piece, long names, no dates: the same files give the same bytes.
Pure. It cannot read or change a file system.

Source: Microsoft FAT specification 1.03.
"""

import struct
from collections.abc import Mapping
from typing import Final

SECTOR_BYTES: Final = 512
ROOT_ENTRIES: Final = 512
FILES_MAX: Final = 16
_RESERVED_SECTORS: Final = 1
_ROOT_SECTORS: Final = ROOT_ENTRIES * 32 // SECTOR_BYTES
_END_OF_CHAIN: Final = 0xFFFF
# FAT16 is what it is by its number of clusters: 4085 to 65524 of them.
_CLUSTERS_MIN: Final = 4085
_CLUSTERS_MAX: Final = 65524
_LABEL_ATTRIBUTE: Final = 0x08
_LONG_NAME: Final = 0x0F
_ARCHIVE: Final = 0x20
_MIDNIGHT_1980: Final = 0x0021
_LETTERS_A_PIECE: Final = 13
_BOOT: Final = struct.Struct("<3s8sHBHBHHBHHHIIBBBI11s8s")
_NAMES_ALLOWED: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.")


def fat_image(files: Mapping[str, bytes], *, label: str, size_bytes: int) -> bytes:
    """Return a file system of size_bytes with these files in its one folder.

    Names are of lower-case letters, digits, '-' and '.'. Raises ValueError for other
    names, and when the files do not fit.
    """
    sectors = size_bytes // SECTOR_BYTES
    fat_sectors = _fat_sectors(sectors)
    data_at = _RESERVED_SECTORS + 2 * fat_sectors + _ROOT_SECTORS
    clusters = sectors - data_at
    if not _CLUSTERS_MIN <= clusters <= _CLUSTERS_MAX or sectors > 0xFFFF:
        raise ValueError(f"{size_bytes} bytes are no size for this file system")
    if len(files) > FILES_MAX or any(not _is_name(name) for name in files):
        raise ValueError(f"these names cannot be written: {sorted(files)}")
    fat, folder, data = _lay_out(files, label)
    if len(data) > clusters * SECTOR_BYTES:
        raise ValueError(f"files of {len(data)} bytes do not fit into {clusters} sectors")
    table = struct.pack(f"<{len(fat)}H", *fat).ljust(fat_sectors * SECTOR_BYTES, b"\0")
    root = folder.ljust(_ROOT_SECTORS * SECTOR_BYTES, b"\0")
    image = _boot_sector(sectors, fat_sectors, label) + table + table + root + data
    return image.ljust(size_bytes, b"\0")


def _lay_out(files: Mapping[str, bytes], label: str) -> tuple[list[int], bytes, bytes]:
    """Return the allocation table, the folder and the data area, one file after another."""
    fat = [0xFFF8, _END_OF_CHAIN]
    folder = _short_entry(_padded(label), _LABEL_ATTRIBUTE, 0, 0)
    data = b""
    for number, (name, content) in enumerate(sorted(files.items()), start=1):
        first = len(fat) if content else 0
        length = -(-len(content) // SECTOR_BYTES)
        fat += [len(fat) + step for step in range(1, length)]
        fat += [_END_OF_CHAIN] if length else []
        data += content.ljust(length * SECTOR_BYTES, b"\0")
        # Nobody sees the short name; it only has to be there, and to be no other file's.
        short = f"SEED{number:04d}".encode().ljust(11)
        folder += _long_entries(name, short)
        folder += _short_entry(short, _ARCHIVE, first, len(content))
    return fat, folder, data


def _fat_sectors(sectors: int) -> int:
    """Return how long each table is, so that it covers the clusters that it leaves."""
    length = 1
    while (sectors - _RESERVED_SECTORS - _ROOT_SECTORS - 2 * length + 2) * 2 > length * 512:
        length += 1
    return length


def _boot_sector(sectors: int, fat_sectors: int, label: str) -> bytes:
    start = _BOOT.pack(
        b"\xeb\x3c\x90", b"PROVISNR", SECTOR_BYTES, 1, _RESERVED_SECTORS, 2, ROOT_ENTRIES,
        sectors, 0xF8, fat_sectors, 63, 255, 0, 0, 0x80, 0, 0x29, 0x50524F56,
        _padded(label), b"FAT16   ",
    )  # fmt: skip
    return start.ljust(510, b"\0") + b"\x55\xaa"


def _short_entry(name: bytes, attribute: int, first: int, size_bytes: int) -> bytes:
    return struct.pack(
        "<11sBBBHHHHHHHI", name, attribute, 0, 0, 0, _MIDNIGHT_1980, _MIDNIGHT_1980, 0, 0,
        _MIDNIGHT_1980, first, size_bytes,
    )  # fmt: skip


def _long_entries(name: str, short: bytes) -> bytes:
    """Return the pieces of a long name, the last one first, each tied to the short name."""
    text = name if len(name) % _LETTERS_A_PIECE == 0 else name + "\0"
    pieces = [text[at : at + _LETTERS_A_PIECE] for at in range(0, len(text), _LETTERS_A_PIECE)]
    entries = []
    for order, piece in enumerate(pieces, start=1):
        letters = piece.encode("utf-16-le").ljust(2 * _LETTERS_A_PIECE, b"\xff")
        last = 0x40 if order == len(pieces) else 0
        head = struct.pack("<B10sBBB", order | last, letters[:10], _LONG_NAME, 0, _sum(short))
        entries.append(head + letters[10:22] + b"\0\0" + letters[22:])
    return b"".join(reversed(entries))


def _sum(short: bytes) -> int:
    total = 0
    for letter in short:
        total = (((total & 1) << 7) + (total >> 1) + letter) & 0xFF
    return total


def _padded(label: str) -> bytes:
    return label.encode("ascii").ljust(11)[:11]


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 64 and _NAMES_ALLOWED.issuperset(name)
