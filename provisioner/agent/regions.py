"""What a release's image is made of, cut into pieces of work. Pure.

A region is a few MiB of the image: read, compared, fetched and written as one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from provisioner.core.batches import BATCH_BYTES_MAX
from provisioner.core.manifest import Manifest

# One request to zero this much keeps the permission's check and the heartbeat lively.
ZERO_REGION_BYTES_MAX: Final = 64 * 1024 * 1024
# Fewer zeros than this between data are written with it; more are left to the disk's own means.
ZERO_BY_DISK_BYTES_MIN: Final = 512 * 1024


@dataclass(frozen=True)
class Span:
    """The chunks from `begin` to before `end`. is_zero: they are all zero, and many."""

    begin: int
    end: int
    is_zero: bool

    @property
    def indexes(self) -> range:
        return range(self.begin, self.end)


def chunks_in_region(chunk_bytes: int) -> int:
    """Return how many chunks a region has: as many as one batch, and at least one."""
    return max(BATCH_BYTES_MAX // chunk_bytes, 1)


def regions_of(manifest: Manifest, *, begin: int = 1) -> Iterator[Span]:
    """Yield the regions of the image in order, from chunk `begin` on; they cover all of it.

    Zeros that would fill a region come as regions of their own, up to ZERO_REGION_BYTES_MAX.
    """
    step = chunks_in_region(manifest.chunk_bytes)
    zero_step = max(ZERO_REGION_BYTES_MAX // manifest.chunk_bytes, 1)
    start = at = begin
    for is_zero, group in groupby(manifest.chunks[begin:], lambda digest: digest is None):
        end = at + sum(1 for _ in group)
        if is_zero and end - at >= step:
            yield from _cut(start, at, step, is_zero=False)
            yield from _cut(at, end, zero_step, is_zero=True)
            start = end
        at = end
    yield from _cut(start, at, step, is_zero=False)


def _cut(begin: int, end: int, step: int, *, is_zero: bool) -> Iterator[Span]:
    for first in range(begin, end, step):
        yield Span(first, min(first + step, end), is_zero)


def stretches_of(indexes: Sequence[int], manifest: Manifest) -> list[Span]:
    """Return how to write these chunks (ascending) with few requests, in order.

    Short zeros count as data: one request more costs more than their bytes.
    """
    zeros_min = ZERO_BY_DISK_BYTES_MIN // manifest.chunk_bytes
    found: list[Span] = []
    for begin, end in neighbours(indexes):
        data = at = begin
        for is_zero, group in groupby(manifest.chunks[begin:end], lambda digest: digest is None):
            after = at + sum(1 for _ in group)
            if is_zero and after - at >= zeros_min:
                found += [Span(data, at, is_zero=False)] if data < at else []
                found.append(Span(at, after, is_zero=True))
                data = after
            at = after
        found += [Span(data, at, is_zero=False)] if data < at else []
    return found


def neighbours(indexes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each run of consecutive numbers; they are ascending."""
    at = 0
    for _, group in groupby(index - count for count, index in enumerate(indexes)):
        length = sum(1 for _ in group)
        yield indexes[at], indexes[at] + length
        at += length
