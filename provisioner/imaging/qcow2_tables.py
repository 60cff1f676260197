"""Follow the tables of a qcow2: every place in the file may be used for one thing only.

So no table leads into another one or into itself, and a small file cannot stand for a large
disk but by compression. Knows nothing of headers, and writes nothing.

Source: QEMU's docs/interop/qcow2.txt, "Host cluster management" and "Cluster mapping".
"""

from __future__ import annotations

import heapq
import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# QEMU's own limits.
L1_BYTES_MAX: Final = 32 * 1024 * 1024
REFCOUNT_TABLE_BYTES_MAX: Final = 8 * 1024 * 1024
# So many compressed clusters are sorted at once: some 40 MiB, whatever the image's size.
RUN_LENGTH: Final = 1 << 20

_ENTRY_BYTES: Final = 8
_SECTOR_BITS: Final = 9
_PLACE: Final = 0x00FF_FFFF_FFFF_FE00
_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_READS_AS_ZERO: Final = 1

_HEADER, _REFCOUNTS, _REFCOUNT_BLOCK, _L1, _L2, _DATA, _PACKED = range(1, 8)
_NAMES: Final = (
    "",
    "the header",
    "the refcount table",
    "a refcount block",
    "the L1 table",
    "an L2 table",
    "data",
    "compressed data",
)


class Refusal(Exception):
    """Why a file is refused: what was expected, what was found, and what may help."""

    def __init__(self, expected: str, found: object, hint: str | None = None) -> None:
        super().__init__(expected)
        self.expected = expected
        self.found = str(found)
        self.hint = hint


@dataclass(frozen=True)
class Layout:
    """Where a header says that its tables are; places are in bytes from the file's start."""

    version: int
    file_bytes: int
    cluster_bits: int
    size_bytes: int
    l1_entries: int
    l1_place: int
    refcount_place: int
    refcount_clusters: int

    @property
    def cluster_bytes(self) -> int:
        """Return the bytes of a cluster, which is also the size of an L2 table."""
        return 1 << self.cluster_bits


def check_tables(descriptor: int, layout: Layout) -> int:
    """Return how many bytes of the disk the file holds data for, at most.

    Reads all tables, and no data. Memory is one byte per cluster of the file and eight
    per compressed cluster. Raises Refusal.
    """
    tables = _Tables(descriptor, layout)
    tables.claim(0, 1, _HEADER)
    tables.check_refcounts()
    for place in tables.check_l1():
        tables.check_l2(place)
    tables.check_packed()
    return min(tables.data_clusters * layout.cluster_bytes, layout.size_bytes)


class _Tables:
    """The file's clusters, and what each of them has been found to be used for."""

    def __init__(self, descriptor: int, layout: Layout) -> None:
        self._descriptor = descriptor
        self._layout = layout
        # The last cluster of a file need not be there in full.
        self._used = bytearray(-(-layout.file_bytes >> layout.cluster_bits))
        self._packed = PackedPlaces()
        self._nothing = bytes(layout.cluster_bytes)
        self.data_clusters = 0

    def claim(self, place: int, clusters: int, what: int) -> None:
        """Note that a table is here, and nothing else. place is in bytes."""
        first, within = divmod(place, self._layout.cluster_bytes)
        if within:
            raise Refusal(f"{_NAMES[what]} at the start of a cluster", f"at byte {place}")
        if first + clusters > len(self._used):
            raise Refusal(f"{_NAMES[what]} within the file", f"at byte {place}")
        for cluster in range(first, first + clusters):
            if self._used[cluster]:
                raise self._used_twice(cluster, what)
            self._used[cluster] = what

    def check_refcounts(self) -> None:
        """Claim the refcount table and its blocks; the counts themselves are not needed."""
        layout = self._layout
        length = layout.refcount_clusters << layout.cluster_bits
        if not 0 < length <= REFCOUNT_TABLE_BYTES_MAX:
            raise Refusal(
                f"a refcount table of up to {REFCOUNT_TABLE_BYTES_MAX} bytes", f"{length} bytes"
            )
        self.claim(layout.refcount_place, layout.refcount_clusters, _REFCOUNTS)
        for entry in self._entries(layout.refcount_place, length, _REFCOUNTS):
            if entry:
                self.claim(entry, 1, _REFCOUNT_BLOCK)

    def check_l1(self) -> list[int]:
        """Return where the L2 tables are."""
        layout = self._layout
        length = layout.l1_entries * _ENTRY_BYTES
        needed = -(-layout.size_bytes // (layout.cluster_bytes**2 // _ENTRY_BYTES))
        if not needed * _ENTRY_BYTES <= length <= L1_BYTES_MAX:
            raise Refusal(
                f"an L1 table of {needed} to {L1_BYTES_MAX // _ENTRY_BYTES} entries",
                layout.l1_entries,
            )
        self.claim(layout.l1_place, -(-length >> layout.cluster_bits), _L1)
        entries = self._entries(layout.l1_place, length, _L1)
        if any(entries[needed:]):
            raise Refusal("nothing behind the end of the disk", "a saved machine state")
        places = []
        for entry in entries[:needed]:
            if entry & ~(_PLACE | _COPIED):
                raise Refusal("no unknown bit in the L1 table", f"{entry:#x}")
            if entry & _PLACE:
                self.claim(entry & _PLACE, 1, _L2)
                places.append(entry & _PLACE)
            elif entry:
                raise Refusal("L1 entries with a place", f"{entry:#x}")
        return places

    def check_l2(self, place: int) -> None:
        """Claim what the entries of one L2 table lead to."""
        used, bits = self._used, self._layout.cluster_bits
        within = self._layout.cluster_bytes - 1
        zero = _READS_AS_ZERO if self._layout.version > 2 else 0
        known = _PLACE | _COPIED | zero
        for entry in self._entries(place, self._layout.cluster_bytes, _L2):
            if not entry:
                continue
            if entry & _COMPRESSED:
                self._claim_packed(entry)
                continue
            at = entry & _PLACE
            if entry & ~known or at & within or (entry & _COPIED and not at):
                raise Refusal("L2 entries that lead to a cluster", f"{entry:#x}")
            self.data_clusters += not entry & zero
            if not at:
                continue
            cluster = at >> bits
            if cluster >= len(used):
                raise Refusal("data within the file", f"at byte {at}")
            if used[cluster]:
                raise self._used_twice(cluster, _DATA)
            used[cluster] = _DATA

    def check_packed(self) -> None:
        """Refuse compressed clusters that overlap by more than a sector's tail and head."""
        earliest = 0
        for place, sectors in self._packed.in_order():
            if place < earliest:
                raise Refusal("each byte of the file used once", f"compressed twice at {place}")
            earliest = max(place + 1, (place >> _SECTOR_BITS) + sectors << _SECTOR_BITS)

    def _claim_packed(self, entry: int) -> None:
        """Claim the clusters in which one compressed cluster lies; others may lie there too."""
        bits = self._layout.cluster_bits
        place_bits = 62 - (bits - 8)
        place = entry & ((1 << place_bits) - 1)
        sectors = (entry & (_COMPRESSED - 1)) >> place_bits
        last = (place >> _SECTOR_BITS) + sectors << _SECTOR_BITS
        if entry & _COPIED or last >= self._layout.file_bytes:
            raise Refusal("compressed data within the file", f"{entry:#x}")
        self.data_clusters += 1
        for cluster in range(place >> bits, (last >> bits) + 1):
            if self._used[cluster] not in (0, _PACKED):
                raise self._used_twice(cluster, _PACKED)
            self._used[cluster] = _PACKED
        self._packed.add(place, sectors)

    def _entries(self, place: int, length: int, what: int) -> array[int]:
        """Return a table as numbers; an empty one for an L2 table full of zeros."""
        data = os.pread(self._descriptor, length, place)
        if len(data) < length:
            raise Refusal(f"{_NAMES[what]} of {length} bytes", f"{len(data)} bytes: a cut file")
        if what == _L2 and data == self._nothing:
            return array("Q")
        entries = array("Q", data)
        if sys.byteorder == "little":
            entries.byteswap()
        return entries

    def _used_twice(self, cluster: int, what: int) -> Refusal:
        place = cluster << self._layout.cluster_bits
        found = f"{_NAMES[self._used[cluster]]} and {_NAMES[what]} at byte {place}"
        return Refusal("each place in the file used once", found)


class PackedPlaces:
    """Places and lengths of compressed clusters, kept small and given back in order."""

    _SECTORS_BITS: Final = 14  # with clusters of 2 MiB the length has 13

    def __init__(self, run_length: int = RUN_LENGTH) -> None:
        self._run_length = run_length
        self._new: list[int] = []
        self._runs: list[array[int]] = []

    def add(self, place: int, sectors: int) -> None:
        """Take the byte at which a cluster starts, and how many further sectors it touches."""
        self._new.append(place << self._SECTORS_BITS | sectors)
        if len(self._new) == self._run_length:
            self._close_run()

    def in_order(self) -> Iterator[tuple[int, int]]:
        """Yield (place, further sectors) by place."""
        self._close_run()
        mask = (1 << self._SECTORS_BITS) - 1
        for packed in heapq.merge(*self._runs):
            yield packed >> self._SECTORS_BITS, packed & mask

    def _close_run(self) -> None:
        self._runs.append(array("Q", sorted(self._new)))
        self._new.clear()
