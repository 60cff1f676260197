"""Judge a qcow2 file by its bytes, before any program that would follow it opens it.

Accepted is what `qemu-img convert -O qcow2` makes: one disk that stands alone. Everything
that leads elsewhere, that we do not know, or that is there twice is refused. Writes nothing.

Source: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from provisioner.errors import RequestError
from provisioner.imaging.qcow2_tables import Layout, Refusal, check_tables

MAGIC: Final = b"QFI\xfb"
# Both of clusters on the disk and of clusters in the file: 2 TiB with the usual 64 KiB, and
# 16 GiB with the smallest of 512 bytes. It bounds our memory (one byte each) and time.
CLUSTERS_MAX: Final = 1 << 25
EXTENSIONS_MAX: Final = 64
_CLUSTER_BITS: Final = range(9, 22)

# Magic, version, backing file's place and length, cluster bits, virtual size, encryption,
# L1 entries, L1 place, refcount table's place and clusters, snapshots and their place.
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
# Version 3 goes on: incompatible, compatible and autoclear features, refcount order, and
# the header's length. The compression type may follow.
_HEADER_3: Final = struct.Struct(">QQQII")
_HEADER_3_BYTES: Final = _HEADER.size + _HEADER_3.size
_HEADER_BYTES_MAX: Final = 4096
_EXTENSION: Final = struct.Struct(">II")

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_LAZY_REFCOUNTS: Final = 1
_ZSTD: Final = 1
_REFCOUNT_ORDER_MAX: Final = 6

_CONVERT_AGAIN: Final = "make a plain copy where the image was made: qemu-img convert -O qcow2"
_FEATURES_REFUSED: Final = (
    (_DIRTY, "an image that was closed", "one marked as in use", _CONVERT_AGAIN),
    (_CORRUPT, "a sound image", "one marked as corrupt", None),
    (_DATA_FILE, "no external data file", "one", _CONVERT_AGAIN),
    (_EXTENDED_L2, "plain L2 entries", "extended ones (subclusters)", _CONVERT_AGAIN),
    (~_COMPRESSION, "no unknown feature", "incompatible features we do not know", _CONVERT_AGAIN),
)
_FEATURE_NAMES: Final = 0x6803F857
# Extensions with a meaning for us, which is that the image is more than one plain disk.
# The table of feature names says nothing; others may be ignored by the specification.
_EXTENSIONS_REFUSED: Final = {
    0xE2792ACA: "the format of a backing file",
    0x44415441: "the name of an external data file",
    0x0537BE77: "an encryption header",
    0x23852875: "bitmaps",
}


@dataclass(frozen=True)
class Qcow2:
    """What a conversion will make: a disk of size_bytes, at most data_bytes of it not zero."""

    size_bytes: int
    data_bytes: int


def judge(image: BinaryIO, *, size_bytes_max: int) -> Qcow2:
    """Return how large the disk in the qcow2 is, if the file is one plain, sound disk.

    image is the opened file. Raises RequestError, with what was expected and what was
    found, for a backing file, an external data file, encryption, internal snapshots,
    bitmaps, subclusters, unknown features, damage, a virtual size beyond
    size_bytes_max, and tables that overlap, lead outside the file or use a place twice.
    """
    status = os.fstat(image.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise RequestError(f"{image.name} is not a regular file")
    try:
        layout = _read_header(image.fileno(), status.st_size, size_bytes_max)
        data_bytes = check_tables(image.fileno(), layout)
    except Refusal as refusal:
        raise RequestError(
            f"{Path(image.name).name} is refused",
            expected=refusal.expected,
            found=refusal.found,
            hint=refusal.hint,
        ) from None
    return Qcow2(layout.size_bytes, data_bytes)


def _read_header(descriptor: int, file_bytes: int, size_bytes_max: int) -> Layout:
    header = os.pread(descriptor, _HEADER_BYTES_MAX, 0)
    if len(header) < _HEADER.size or header[:4] != MAGIC:
        raise Refusal("a qcow2 header", "none")
    fields = _HEADER.unpack_from(header)
    _, version, backing_place, backing_bytes, cluster_bits, size_bytes, encryption = fields[:7]
    l1_entries, l1_place, refcount_place, refcount_clusters, snapshots, _ = fields[7:]
    if version not in (2, 3):
        raise Refusal("qcow2 version 2 or 3", version)
    if backing_place or backing_bytes:
        raise Refusal("no backing file", "one", _CONVERT_AGAIN)
    if encryption:
        raise Refusal("no encryption", "some", _CONVERT_AGAIN)
    if snapshots:
        # What they hold beside the disk would be lost without a word, and they are the only
        # reason for two tables to share a cluster.
        raise Refusal("no internal snapshots", snapshots, _CONVERT_AGAIN)
    if cluster_bits not in _CLUSTER_BITS:
        raise Refusal("clusters of 512 bytes to 2 MiB", f"2^{cluster_bits} bytes")
    if not 0 < size_bytes <= size_bytes_max:
        raise Refusal(f"a virtual size of up to {size_bytes_max} bytes", size_bytes)
    if size_bytes % 512:
        raise Refusal("a virtual size of whole sectors of 512 bytes", size_bytes)
    if max(size_bytes, file_bytes) > CLUSTERS_MAX << cluster_bits:
        raise Refusal(
            f"at most {CLUSTERS_MAX} clusters",
            f"{max(size_bytes, file_bytes)} bytes in clusters of {1 << cluster_bits}",
            _CONVERT_AGAIN,
        )
    header_bytes = _check_version_3(header, cluster_bits) if version == 3 else _HEADER.size
    _check_extensions(os.pread(descriptor, 1 << cluster_bits, 0), header_bytes)
    return Layout(
        version=version,
        file_bytes=file_bytes,
        cluster_bits=cluster_bits,
        size_bytes=size_bytes,
        l1_entries=l1_entries,
        l1_place=l1_place,
        refcount_place=refcount_place,
        refcount_clusters=refcount_clusters,
    )


def _check_version_3(header: bytes, cluster_bits: int) -> int:
    """Return the header's length after refusing every feature that we do not convert."""
    if len(header) < _HEADER_3_BYTES:
        raise Refusal(f"a header of {_HEADER_3_BYTES} bytes", f"{len(header)} bytes")
    features = _HEADER_3.unpack_from(header, _HEADER.size)
    incompatible, compatible, autoclear, refcount_order, header_bytes = features
    for bits, expected, found, hint in _FEATURES_REFUSED:
        if incompatible & bits:
            raise Refusal(expected, f"{found} ({incompatible:#x})", hint)
    if compatible & ~_LAZY_REFCOUNTS or autoclear:
        found = f"compatible {compatible:#x}, autoclear {autoclear:#x}"
        raise Refusal("no unknown feature and no bitmaps", found, _CONVERT_AGAIN)
    if refcount_order > _REFCOUNT_ORDER_MAX:
        raise Refusal("reference counts of up to 64 bits", f"2^{refcount_order} bits")
    header_bytes_max = min(1 << cluster_bits, _HEADER_BYTES_MAX, len(header))
    if header_bytes % 8 or not _HEADER_3_BYTES <= header_bytes <= header_bytes_max:
        raise Refusal(
            f"a header of {_HEADER_3_BYTES} to {header_bytes_max} bytes", f"{header_bytes} bytes"
        )
    further = header[_HEADER_3_BYTES:header_bytes]
    compression = further[0] if further else 0
    if compression != (_ZSTD if incompatible & _COMPRESSION else 0):
        raise Refusal("compression by zlib or zstd", f"type {compression}")
    # A field that is zero is as good as absent.
    if any(further[1:]):
        raise Refusal("no unknown header field", "one", _CONVERT_AGAIN)
    return int(header_bytes)


def _check_extensions(cluster: bytes, place: int) -> None:
    """Walk the header extensions, which end within the first cluster of the file."""
    seen: set[int] = set()
    while len(seen) <= EXTENSIONS_MAX:
        if place + _EXTENSION.size > len(cluster):
            raise Refusal("an end of the header extensions", "none in the first cluster")
        kind, length = _EXTENSION.unpack_from(cluster, place)
        if kind == 0:
            return
        place += _EXTENSION.size
        if place + length > len(cluster):
            raise Refusal("header extensions in the first cluster", f"one of {length} bytes")
        if kind in _EXTENSIONS_REFUSED:
            found = f"a header extension with {_EXTENSIONS_REFUSED[kind]}"
            raise Refusal("an image that stands alone", found, _CONVERT_AGAIN)
        if kind in seen:
            raise Refusal("each header extension once", f"{kind:#x} twice")
        seen.add(kind)
        place += (length + 7) // 8 * 8
    raise Refusal(f"at most {EXTENSIONS_MAX} header extensions", "more")
