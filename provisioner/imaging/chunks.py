"""Cut a raw image into chunks, and read them back. Knows no releases and no keys.

Holds a few chunks at a time in memory, however large the image is.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

from provisioner.errors import NotFound, TrustError, Unavailable

CHUNK_BYTES: Final = 1024 * 1024
# Each worker holds one chunk raw and compressed: with the largest chunk, 16 MiB, this
# stays below 160 MiB.
WORKERS_MAX: Final = 4
# Level 3 stores a Debian root in a third of its size at the speed of a fast disk; higher
# levels cost a multiple of the time for a few percent.
ZSTD_LEVEL: Final = 3
# A chunk that does not compress grows by the frame's own few bytes; nothing grows by more.
FRAME_OVERHEAD_BYTES_MAX: Final = 1024 * 1024
_BATCH: Final = 256
_READ_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class Chunked:
    """The digest of each chunk (None for zeros), and the bytes the distinct ones take."""

    chunks: tuple[str | None, ...]
    stored_bytes: int


def store_chunks(
    raw: Path,
    *,
    chunk_bytes: int,
    existing: Callable[[str], Path],
    staging: Path,
    progress: Callable[[int], None],
) -> Chunked:
    """Write each chunk that is not stored yet to staging, named by its digest.

    existing tells where a stored chunk would be; a damaged one is written anew.
    Each file in staging is whole and durable when this returns. progress gets
    the bytes of the image dealt with so far. Raises Unavailable when the disk is
    full.
    """
    size_bytes = raw.stat().st_size
    digests: list[str | None] = [None] * -(-size_bytes // chunk_bytes)
    sizes: dict[str, int] = {}
    descriptor = os.open(raw, os.O_RDONLY)

    def store(index: int) -> tuple[int, str | None, int]:
        data = _read_at(descriptor, index * chunk_bytes, chunk_bytes, size_bytes)
        if not data.strip(b"\0"):
            return index, None, 0
        digest = hashlib.sha256(data).hexdigest()
        return index, digest, _store(data, digest, existing(digest), staging)

    try:
        with ThreadPoolExecutor(min(WORKERS_MAX, os.cpu_count() or 1)) as pool:
            for batch in _batches(_data_chunks(descriptor, chunk_bytes, size_bytes)):
                for index, digest, stored_bytes in pool.map(store, batch):
                    digests[index] = digest
                    if digest:
                        sizes[digest] = stored_bytes
                    progress(min((index + 1) * chunk_bytes, size_bytes))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable(
            f"the disk filled up while chunks were written to {staging.parent.parent}",
            hint="free some space and publish again; nothing was left behind",
        ) from error
    finally:
        os.close(descriptor)
    progress(size_bytes)
    return Chunked(tuple(digests), sum(sizes.values()))


def read_chunk(path: Path, digest: str, length: int) -> bytes:
    """Return the raw bytes of a stored chunk of this length.

    Raises NotFound when the file is missing, TrustError when its content is not
    what the digest says; a frame that claims another length is never unpacked.
    """
    try:
        with path.open("rb") as file:
            frame = file.read(length + FRAME_OVERHEAD_BYTES_MAX)
    except FileNotFoundError as error:
        raise NotFound(f"chunk {digest} is missing from the archive") from error
    try:
        if zstandard.get_frame_parameters(frame).content_size != length:
            raise TrustError(f"chunk {digest} is damaged", expected=f"{length} bytes")
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=length)
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


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file that is on the disk, not only in memory, when this returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _store(data: bytes, digest: str, existing: Path, staging: Path) -> int:
    """Keep this chunk, and return the bytes it takes stored."""
    with suppress(NotFound, TrustError):
        read_chunk(existing, digest, len(data))
        return existing.stat().st_size
    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)
    # Two workers may meet the same content at once: the first to create the file writes it.
    with suppress(FileExistsError):
        write_durably(staging / digest, frame)
    return len(frame)


def _read_at(descriptor: int, start: int, length: int, size_bytes: int) -> bytes:
    """Return exactly the bytes asked for, up to the end of the image."""
    wanted = min(length, size_bytes - start)
    data = os.pread(descriptor, wanted, start)
    if len(data) != wanted:
        raise Unavailable("the image became shorter while it was read")
    return data


def _data_chunks(descriptor: int, chunk_bytes: int, size_bytes: int) -> Iterator[int]:
    """Yield the index of each chunk that is not wholly a hole of the sparse file, in order."""
    following = 0
    for start, end in _extents(descriptor, size_bytes):
        first = max(start // chunk_bytes, following)
        following = -(-end // chunk_bytes)
        yield from range(first, following)


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


def _batches(items: Iterator[int]) -> Iterator[list[int]]:
    """Yield the items in short lists, so that a huge image queues little work at once."""
    batch: list[int] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
