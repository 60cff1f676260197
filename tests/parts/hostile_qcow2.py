"""qcow2 files that lead elsewhere, loop, lie or are cut: sound ones with a few bytes changed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from provisioner.imaging.qcow2 import EXTENSIONS_MAX
from provisioner.imaging.qcow2_tables import L1_BYTES_MAX

MIB: Final = 1024 * 1024
CLUSTER: Final = 4096
SIZE_MAX: Final = 1 << 40
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62


class Patched:
    """A sound qcow2 with small clusters and two L2 tables, to be made unsound byte by byte."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.l1 = self.get(40)
        self.l2 = [self.get(self.l1 + 8 * index) & ~COPIED for index in range(2)]
        self.refcounts = self.get(48)
        self.block = self.get(self.refcounts)

    def get(self, place: int) -> int:
        return int(struct.unpack_from(">Q", self.data, place)[0])

    def put(self, place: int, value: int, form: str = ">Q") -> None:
        struct.pack_into(form, self.data, place, value)

    def extend(self, kind: int, content: bytes, length: int | None = None) -> None:
        """Make this the only header extension."""
        place = self.length
        head = struct.pack(">II", kind, len(content) if length is None else length)
        whole = head + content + bytes(-len(content) % 8 + 8)
        self.data[place : place + len(whole)] = whole

    @property
    def length(self) -> int:
        return int(struct.unpack_from(">I", self.data, 100)[0])


def backing(name: str) -> Callable[[Patched], None]:
    def patch(image: Patched) -> None:
        image.data[2048 : 2048 + len(name)] = name.encode()
        image.put(8, 2048)
        image.put(16, len(name), ">I")

    return patch


def put(place: int, value: int, form: str = ">Q") -> Callable[[Patched], None]:
    return lambda image: image.put(place, value, form)


def l1_entry(index: int, value: Callable[[Patched], int]) -> Callable[[Patched], None]:
    return lambda image: image.put(image.l1 + 8 * index, value(image))


def l2_entry(index: int, value: Callable[[Patched], int]) -> Callable[[Patched], None]:
    return lambda image: image.put(image.l2[0] + 8 * index, value(image))


def refcount_entry(index: int, value: Callable[[Patched], int]) -> Callable[[Patched], None]:
    return lambda image: image.put(image.refcounts + 8 * index, value(image))


def extension(kind: int, content: bytes, length: int | None = None) -> Callable[[Patched], None]:
    return lambda image: image.extend(kind, content, length)


def cut(length: Callable[[Patched], int]) -> Callable[[Patched], None]:
    def patch(image: Patched) -> None:
        del image.data[length(image) :]

    return patch


def data_file_with_its_name(image: Patched) -> None:
    image.put(72, 4)
    image.extend(0x44415441, b"/etc/shadow")


def header_over_its_extensions(image: Patched) -> None:
    image.extend(0x6803F857, b"names of features")
    image.put(100, 1024, ">I")


def many_extensions(image: Patched) -> None:
    for number in range(EXTENSIONS_MAX + 1):
        place = image.length + 8 * number
        image.data[place : place + 16] = struct.pack(">IIII", 0x1000 + number, 0, 0, 0)


def extension_twice(image: Patched) -> None:
    twice = struct.pack(">IIIIQ", 0x1234, 0, 0x1234, 0, 0)
    image.data[image.length : image.length + len(twice)] = twice


def no_end_of_extensions(image: Patched) -> None:
    image.extend(0x1234, bytes(CLUSTER - image.length - 16))
    image.data[CLUSTER - 8 : CLUSTER] = struct.pack(">II", 0x1235, 0)


def version_2_with_zero_flag(image: Patched) -> None:
    image.put(4, 2, ">I")
    image.put(72, 0)  # where the extensions of version 2 begin
    image.put(image.l2[0] + 8 * 100, 1)


HOSTILE: dict[str, tuple[str, Callable[[Patched], None]]] = {
    "backing file": ("backing file", backing("/etc/passwd")),
    "backing by json": (
        "backing file",
        backing('json:{"driver":"file","filename":"/etc/shadow"}'),
    ),
    "backing over the network": ("backing file", backing("nbd://127.0.0.1:10809/x")),
    "backing place without length": ("backing file", put(8, 2048)),
    "backing length without place": ("backing file", put(16, 11, ">I")),
    "backing format": ("stands alone", extension(0xE2792ACA, b"raw")),
    "data file": ("data file", put(72, 4)),
    "data file and its name": ("data file", data_file_with_its_name),
    "name of a data file without the bit": (
        "stands alone",
        extension(0x44415441, b"/etc/shadow"),
    ),
    "raw data file": ("no unknown feature", put(88, 2)),
    "aes": ("no encryption", put(32, 1, ">I")),
    "luks": ("no encryption", put(32, 2, ">I")),
    "encryption header": ("stands alone", extension(0x0537BE77, bytes(16))),
    "bitmaps": ("stands alone", extension(0x23852875, bytes(24))),
    "bitmaps bit": ("no bitmaps", put(88, 1)),
    "snapshots": ("no internal snapshots", put(60, 1, ">I")),
    "dirty": ("closed", put(72, 1)),
    "corrupt": ("sound image", put(72, 2)),
    "compression without its type": ("zlib or zstd", put(72, 8)),
    "compression type without the bit": ("zlib or zstd", put(104, 1, ">B")),
    "unknown header field": ("header field", put(105, 1, ">B")),
    "subclusters": ("plain L2 entries", put(72, 16)),
    "next incompatible bit": ("no unknown feature", put(72, 32)),
    "last incompatible bit": ("no unknown feature", put(72, 1 << 63)),
    "unknown compatible bit": ("no unknown feature", put(80, 1 << 20)),
    "unknown autoclear bit": ("no unknown feature", put(88, 1 << 20)),
    "another magic": ("a qcow2 header", put(0, 0x51464900, ">I")),
    "version 1": ("version 2 or 3", put(4, 1, ">I")),
    "version 4": ("version 2 or 3", put(4, 4, ">I")),
    "clusters of 256 bytes": ("clusters of", put(20, 8, ">I")),
    "clusters of 4 MiB": ("clusters of", put(20, 22, ">I")),
    "clusters beyond all reason": ("clusters of", put(20, 0xFFFFFFFF, ">I")),
    "reference counts of 128 bits": ("reference counts", put(96, 7, ">I")),
    "no size": ("virtual size", put(24, 0)),
    "an exabyte": ("virtual size", put(24, 1 << 60)),
    "the whole number": ("virtual size", put(24, (1 << 64) - 1)),
    "a sector more than the limit": ("virtual size", put(24, SIZE_MAX + 512)),
    "half a sector": ("whole sectors", put(24, 4 * MIB - 256)),
    "more clusters than we follow": ("clusters", put(24, 1 << 39)),
    "more disk than the L1 table maps": ("L1 table of", put(24, 64 * MIB)),
    "header shorter than its fields": ("a header of", put(100, 72, ">I")),
    "header of odd length": ("a header of", put(100, 108, ">I")),
    "header longer than its cluster": ("a header of", put(100, CLUSTER + 8, ">I")),
    "header beyond all reason": ("a header of", put(100, 0xFFFFFFF8, ">I")),
    "header over its extensions": ("header field", header_over_its_extensions),
    "extension longer than the file": (
        "header extensions",
        extension(0x1234, b"", 0xFFFFFFFF),
    ),
    "extension longer than the cluster": ("header extensions", extension(0x1234, b"", CLUSTER)),
    "extensions without end": ("an end of", no_end_of_extensions),
    "extension twice": ("extension once", extension_twice),
    "many extensions": ("at most", many_extensions),
    "cut in the header": ("a qcow2 header", cut(lambda _: 71)),
    "cut in version 3's header": ("a header of", cut(lambda _: 103)),
    "cut in the first cluster": ("within the file", cut(lambda _: 512)),
    "cut in the L1 table": ("L1 table of", cut(lambda image: image.l1 + 8)),
    "cut in an L2 table": ("", cut(lambda image: max(image.l2) + 100)),
    "no L1 entries": ("L1 table of", put(36, 0, ">I")),
    "too many L1 entries": ("L1 table of", put(36, L1_BYTES_MAX // 8 + 1, ">I")),
    "L1 entries beyond the file": ("within the file", put(36, 1 << 20, ">I")),
    "L1 table beyond the file": ("within the file", put(40, 1 << 30)),
    "L1 table at the end of numbers": ("within the file", put(40, (1 << 64) - CLUSTER)),
    "L1 table askew": ("start of a cluster", put(40, 3 * CLUSTER + 8)),
    "L1 table in the header": ("used once", put(40, 0)),
    "L1 table in the refcount table": ("used once", lambda i: i.put(40, i.refcounts)),
    "L1 to the header": ("with a place", l1_entry(0, lambda _: COPIED)),
    "L1 to itself": ("used once", l1_entry(0, lambda i: i.l1)),
    "L1 to the refcount table": ("used once", l1_entry(0, lambda i: i.refcounts)),
    "L1 to a refcount block": ("used once", l1_entry(0, lambda i: i.block)),
    "L1 twice to one L2": ("used once", l1_entry(0, lambda i: i.l2[1])),
    "L1 beyond the file": ("within the file", l1_entry(0, lambda _: 1 << 40)),
    "L1 askew": ("start of a cluster", l1_entry(0, lambda i: i.l2[0] + 512)),
    "L1 with an unknown bit": ("unknown bit", l1_entry(0, lambda i: i.l2[0] | 1 << 60)),
    # Its entries are whatever the data is.
    "L1 to data": ("", l1_entry(0, lambda i: i.get(i.l2[1] + 8 * 256) & ~COPIED)),
    "L2 to itself": ("used once", l2_entry(0, lambda i: i.l2[0] | COPIED)),
    "L2 to another L2": ("used once", l2_entry(0, lambda i: i.l2[1] | COPIED)),
    "L2 to the L1 table": ("used once", l2_entry(0, lambda i: i.l1 | COPIED)),
    "L2 to the header": ("lead to a cluster", l2_entry(0, lambda _: COPIED)),
    "L2 to the refcount table": ("used once", l2_entry(0, lambda i: i.refcounts)),
    "L2 to a refcount block": ("used once", l2_entry(0, lambda i: i.block)),
    "L2 twice to one cluster": ("used once", l2_entry(0, lambda i: i.get(i.l2[0] + 8))),
    "L2 zero at another's place": ("used once", l2_entry(0, lambda i: i.get(i.l2[0] + 8) | 1)),
    "L2 beyond the file": ("within the file", l2_entry(0, lambda _: 1 << 50)),
    "L2 askew": ("lead to a cluster", l2_entry(0, lambda i: i.get(i.l2[0]) + 512)),
    "L2 with an unknown bit": ("lead to a cluster", l2_entry(0, lambda i: i.get(i.l2[0]) | 4)),
    "zero flag in version 2": ("lead to a cluster", version_2_with_zero_flag),
    "compressed L2 to the L1": ("used once", l2_entry(0, lambda i: COMPRESSED | i.l1)),
    "compressed L2 to data": (
        "used once",
        l2_entry(2, lambda i: COMPRESSED | i.get(i.l2[0]) & ~COPIED),
    ),
    "no refcount table": ("a refcount table", put(56, 0, ">I")),
    "refcount table beyond all reason": ("a refcount table", put(56, 0xFFFFFFFF, ">I")),
    "refcount table in the header": ("used once", put(48, 0)),
    "refcount table beyond the file": ("within the file", put(48, 1 << 40)),
    "refcount table askew": ("start of a cluster", put(48, CLUSTER + 512)),
    "refcount block in the table": ("used once", refcount_entry(0, lambda i: i.refcounts)),
    "refcount block twice": ("used once", refcount_entry(1, lambda i: i.block)),
    "refcount block in the L1": ("used once", refcount_entry(0, lambda i: i.l1)),
    "refcount block beyond the file": ("within the file", refcount_entry(0, lambda _: 1 << 40)),
    "refcount block askew": ("start of a cluster", refcount_entry(0, lambda i: i.block + 1)),
}
