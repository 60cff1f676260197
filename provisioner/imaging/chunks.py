"""Cut a raw image into chunks, and read them back. Knows no releases and no keys.

Holds a few regions at a time in memory, however large the image is.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zstandard

from provisioner.errors import NotFound, TrustError, Unavailable
from provisioner.imaging.blobs import Blobs

CHUNK_BYTES: Final = 64 * 1024
# A worker deals with so much of the image at a time, or with one chunk where that is more.
REGION_BYTES: Final = 4 * 1024 * 1024
# More than there are processors: most of the time of one goes into waiting for the disk.
WORKERS: Final = 4
# Measured on a Debian root in chunks of 64 KiB: level 3 takes 12 % more than the whole image in
# one frame, 6 takes 6 %, 9 takes 5 % at a third less speed.
ZSTD_LEVEL: Final = 6
# A chunk that does not compress grows by the frame's own few bytes; nothing grows by more.
FRAME_OVERHEAD_BYTES_MAX: Final = 64 * 1024
_READ_BYTES: Final = 1024 * 1024


@dataclass
class Chunked:
    """The digest of each chunk (None for zeros), what the distinct ones take, what is new.

    stored maps each distinct digest to the bytes of its blob; added are the names of blobs
    that were not there before, for whoever has to take them back.
    """

    chunks: list[str | None]
    stored: dict[str, int] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)

    @property
    def stored_bytes(self) -> int:
        return sum(self.stored.values())


def chunk_name(digest: str) -> str:
    """Return the name of a chunk's blob: one zstd frame of its raw bytes."""
    return f"chunks/{digest[:2]}/{digest}"


class ChunkWriter:
    """Stores the chunks of one image; each is durable when `store` returns.

    After an error `result.added` still tells which blobs are new.
    """

    def __init__(self, raw: Path, blobs: Blobs, chunk_bytes: int) -> None:
        self._raw = raw
        self._blobs = blobs
        self._chunk_bytes = chunk_bytes
        self._size_bytes = raw.stat().st_size
        self._lock = threading.Lock()
        self.result = Chunked([None] * -(-self._size_bytes // chunk_bytes))

    def store(self, progress: Callable[[int], None]) -> Chunked:
        """Store every chunk that is not stored yet; a damaged one is written anew.

        progress gets the bytes of the image dealt with so far. Raises Unavailable when
        the space is used up.
        """
        descriptor = os.open(self._raw, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                regions = _data_regions(descriptor, self._region_bytes, self._size_bytes)

                def one(start: int) -> int:
                    self._store_region(descriptor, start)
                    return start

                # In short batches, so that a huge image queues little work at once.
                for batch in _batches(regions, 4 * WORKERS):
                    for start in pool.map(one, batch):
                        progress(min(start + self._region_bytes, self._size_bytes))
        finally:
            os.close(descriptor)
        progress(self._size_bytes)
        return self.result

    @property
    def _region_bytes(self) -> int:
        return max(REGION_BYTES, self._chunk_bytes)

    def _store_region(self, descriptor: int, start: int) -> None:
        region = _read_at(descriptor, start, self._region_bytes, self._size_bytes)
        for offset in range(0, len(region), self._chunk_bytes):
            data = region[offset : offset + self._chunk_bytes]
            if data.strip(b"\0"):
                digest = hashlib.sha256(data).hexdigest()
                self.result.chunks[(start + offset) // self._chunk_bytes] = digest
                self._store_chunk(digest, data)

    def _store_chunk(self, digest: str, data: bytes) -> None:
        with self._lock:
            if digest in self.result.stored:
                return
            # Whoever comes first stores it; nobody reads the size before all are done.
            self.result.stored[digest] = 0
        name = chunk_name(digest)
        known = self._blobs.size(name)
        with suppress(NotFound, TrustError):
            if known is not None:
                read_chunk(self._blobs, digest, len(data))
                self.result.stored[digest] = known
                return
        frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)
        if known is None:
            with self._lock:
                self.result.added.add(name)
        self._blobs.write(name, frame)
        self.result.stored[digest] = len(frame)


def read_chunk(blobs: Blobs, digest: str, length: int) -> bytes:
    """Return the raw bytes of a stored chunk of this length.

    Raises NotFound when the blob is missing, TrustError when its content is not what
    the digest says; a frame that claims another length is never unpacked.
    """
    return unpack(blobs.read(chunk_name(digest), length + FRAME_OVERHEAD_BYTES_MAX), digest, length)


def unpack(frame: bytes, digest: str, length: int) -> bytes:
    """Return the raw bytes in a chunk's frame. Raises TrustError unless they fit the digest."""
    try:
        if zstandard.get_frame_parameters(frame).content_size != length:
            raise TrustError(f"chunk {digest} is damaged", expected=f"{length} bytes")
        data = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise TrustError(f"chunk {digest} is damaged", found="not a zstd frame") from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise TrustError("a chunk is damaged", expected=digest, found=found)
    return data


def digest_of_span(raw: Path, start_bytes: int, size_bytes: int) -> str:
    """Return the sha256 of a part of a file, in hex."""
    hasher = hashlib.sha256()
    with raw.open("rb") as file:
        file.seek(start_bytes)
        left = size_bytes
        while left and (data := file.read(min(left, _READ_BYTES))):
            hasher.update(data)
            left -= len(data)
    return hasher.hexdigest()


def data_bytes(raw: Path) -> int:
    """Return the bytes of the file that are not holes."""
    descriptor = os.open(raw, os.O_RDONLY)
    try:
        return sum(end - start for start, end in _extents(descriptor, raw.stat().st_size))
    finally:
        os.close(descriptor)


def _read_at(descriptor: int, start: int, length: int, size_bytes: int) -> bytes:
    """Return exactly the bytes asked for, up to the end of the image."""
    wanted = min(length, size_bytes - start)
    data = os.pread(descriptor, wanted, start)
    if len(data) != wanted:
        raise Unavailable("the image became shorter while it was read")
    return data


def _data_regions(descriptor: int, region_bytes: int, size_bytes: int) -> Iterator[int]:
    """Yield the start of each region that is not wholly a hole of the sparse file, in order."""
    following = 0
    for start, end in _extents(descriptor, size_bytes):
        first = max(start // region_bytes, following)
        following = -(-end // region_bytes)
        yield from (index * region_bytes for index in range(first, following))


def _extents(descriptor: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the data in a sparse file. A file system without holes has one."""
    end = 0
    while end < size_bytes:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _batches(items: Iterator[int], length: int) -> Iterator[list[int]]:
    while batch := list(itertools.islice(items, length)):
        yield batch
