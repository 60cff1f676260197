"""Read the GUID partition table of a raw disk image. Writes nothing, and trusts nothing it reads.

Source: UEFI Specification 2.10, chapter 5 (GUID Partition Table disk layout).
"""

from __future__ import annotations

import struct
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Final

from provisioner.agent import layout
from provisioner.agent.problems import ImageUnfit
from provisioner.core.manifest import Partition
from provisioner.errors import RequestError

SECTOR_BYTES: Final = layout.SECTOR_BYTES
# The header's last usable sector, of which the agent takes no notice: it writes a header anew.
_LAST_USABLE: Final = struct.Struct(f"<{SECTOR_BYTES + 48}xQ")

LINUX_FILESYSTEM: Final = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
# Discoverable Partitions Specification: the types of a root, and Debian's names of what it runs on.
ROOT_ARCHITECTURES: Final = {
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "amd64",
    "B921B045-1DF0-41C3-AF44-4C6F280D3FAE": "arm64",
    "69DAD710-2CE4-4E3C-B16C-21A1D49ABED3": "armhf",
    "44479540-F297-41B2-9AF7-D131D5F0458A": "i386",
    "77055800-792C-4F94-B39A-98C91B762BB6": "loong64",
    "C31C45E6-3F39-412E-80FB-4809C4980599": "ppc64el",
    "72EC70A6-CF74-40E6-BD49-4BDA08E8F224": "riscv64",
    "5EEAD9A9-FE09-4A1E-A1D7-520D00531306": "s390x",
}
EFI_SYSTEM: Final = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT: Final = "21686148-6449-6E6F-744E-656564454649"


def read_partitions(image: Path) -> tuple[Partition, ...]:
    """Return the used partitions of a raw image with 512-byte sectors, by number.

    Raises RequestError for what the agent would refuse to write, by the agent's own reader;
    and for partitions that overlap or lie outside of the usable sectors or the image.
    """
    size_bytes = image.stat().st_size
    if size_bytes % SECTOR_BYTES:
        raise _refusal(image, f"whole sectors of {SECTOR_BYTES} bytes", f"{size_bytes} bytes")
    with image.open("rb") as disk:
        head = disk.read(layout.HEAD_BYTES)
    try:
        table = layout.read_table(head)
        _check_places(image, table, *_usable(table, head, size_bytes))
        layout.plan_layout(
            head, image_bytes=size_bytes, disk_bytes=layout.smallest_disk_bytes(size_bytes)
        )
    except ImageUnfit as error:
        expected, found = error.expected, error.found
        if expected is None:
            expected, found = "a GUID partition table that the agent can write", error.message
        raise _refusal(image, str(expected), found) from error
    return tuple(_partition(part) for part in table.parts)


def root_partition(partitions: tuple[Partition, ...]) -> Partition | None:
    """Return the root partition, when the types leave no doubt which one it is."""
    marked = [part for part in partitions if part.type in ROOT_ARCHITECTURES]
    plain = [part for part in partitions if part.type == LINUX_FILESYSTEM]
    for candidates in (marked, plain):
        if len(candidates) == 1:
            return candidates[0]
    return None


def architectures_of(partitions: tuple[Partition, ...]) -> tuple[str, ...]:
    """Return what the roots are for, sorted, as far as their types say so."""
    types = {part.type for part in partitions}
    return tuple(sorted(ROOT_ARCHITECTURES[one] for one in types & ROOT_ARCHITECTURES.keys()))


def firmware_of(partitions: tuple[Partition, ...]) -> tuple[str, ...]:
    """Return the firmware that the partitions prepare for, in manifest order."""
    types = {part.type for part in partitions}
    pairs = (("bios", BIOS_BOOT), ("uefi", EFI_SYSTEM))
    return tuple(name for name, guid in pairs if guid in types)


def _usable(table: layout.Table, head: bytes, size_bytes: int) -> tuple[int, int]:
    """Return the first and the last sector in which partitions may lie."""
    last = _LAST_USABLE.unpack_from(head)[0]
    return (
        max(table.first_usable, layout.HEAD_BYTES // SECTOR_BYTES),
        min(last, size_bytes // SECTOR_BYTES - 1),
    )


def _check_places(image: Path, table: layout.Table, lowest: int, highest: int) -> None:
    for part in table.parts:
        if not lowest <= part.first <= part.last <= highest:
            raise _refusal(
                image,
                f"partition {part.number} within the sectors {lowest} to {highest}",
                f"sectors {part.first} to {part.last}",
            )
    for one, other in pairwise(sorted(table.parts, key=lambda part: part.first)):
        if other.first <= one.last:
            raise _refusal(
                image,
                "partitions that do not overlap",
                f"partition {one.number} in the sectors {one.first} to {one.last}, "
                f"partition {other.number} from {other.first}",
            )


def _partition(part: layout.Part) -> Partition:
    return Partition(
        number=part.number,
        name=part.name.split("\0")[0] or f"partition-{part.number}",
        type=str(uuid.UUID(bytes_le=part.type_guid)).upper(),
        start_bytes=part.first * SECTOR_BYTES,
        size_bytes=(part.last - part.first + 1) * SECTOR_BYTES,
    )


def _refusal(image: Path, expected: str, found: object) -> RequestError:
    return RequestError(
        f"the partition table of {image.name} is refused",
        expected=expected,
        found=str(found),
        hint="a release is a whole disk with a GPT; `sgdisk --mbrtogpt` makes one, "
        "`sgdisk --verify` says more of it",
    )
