"""Counts what a move from one raw image to another takes, for chunks of any size.

The manifest knows no chunk below 64 KiB, so this does its own cutting; frames, batches and the
agent's unpacking are the project's own.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import zstandard

from provisioner.agent.disk_io import chunk_buffer
from provisioner.agent.frames import Unpacker
from provisioner.core.batches import BATCH_BYTES_MAX, LENGTH
from provisioner.core.manifest import Manifest
from provisioner.imaging.chunks import ZSTD_LEVEL
from provisioner.imaging.sparse import data_ranges

KIB: Final = 1024
SIZES: Final = (16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB)
REGION_BYTES: Final = 4 * 1024 * KIB
# As the archive packs manifests.
INDEX_LEVEL: Final = 12
WORKERS: Final = 2

Digests = list[str | None]


@dataclass(frozen=True)
class Image:
    """One release as a raw file, with what its manifest says beside the chunks."""

    raw: Path
    manifest: Manifest
    signature_bytes: int

    @cached_property
    def digests(self) -> dict[int, Digests]:
        """The digest of each chunk by size of chunk; None where all is zero."""
        return _cut(self.raw, self.manifest.size_bytes)


@dataclass(frozen=True)
class Move:
    """What a host that holds the one image, untouched, fetches to become the other.

    index_bytes are the manifest's and its signatures'; chunk_bytes those of the frames with
    their lengths, as batches carry them. requests counts all.
    """

    index_bytes: int
    chunks: int
    chunk_bytes: int
    requests: int

    @property
    def bytes(self) -> int:
        return self.index_bytes + self.chunk_bytes


@dataclass(frozen=True)
class Cutting:
    """One size of chunk: the new image stored whole, the moves to it, and two times.

    hash_s is what one thread needs to hash all that is not zero, unpack_s what one thread of
    the agent needs to unpack and check all of it.
    """

    size: int
    index_bytes: int
    stored_bytes: int
    hash_s: float
    unpack_s: float


class Frames:
    """The frames of all chunks of one image at one size of chunk."""

    def __init__(self, image: Image, size: int) -> None:
        self._image = image
        self._size = size
        self._frames = self._compress()

    def cutting(self) -> Cutting:
        stored = sum(map(len, self._frames.values()))
        return Cutting(
            self._size, self._index_bytes, stored, self._hash_seconds(), self._unpack_seconds()
        )

    def move_from(self, old: Image) -> Move:
        """Return what it takes to become this image, by the digests of both."""
        before, after = old.digests[self._size], self._image.digests[self._size]
        wanted = [
            (index, digest)
            for index, digest in enumerate(after)
            if digest and (index >= len(before) or before[index] != digest)
        ]
        sizes = [len(self._frames[digest]) + LENGTH.size for _, digest in wanted]
        # The first chunk comes by itself; the others by regions of a batch each. Then there
        # are the manifest and its signatures.
        batch = max(BATCH_BYTES_MAX // self._size, 1)
        regions = {(index - 1) // batch for index, _ in wanted}
        return Move(self._index_bytes, len(wanted), sum(sizes), len(regions) + 2)

    @cached_property
    def _index_bytes(self) -> int:
        fields = json.loads(self._image.manifest.to_bytes())
        fields |= {"chunk_bytes": self._size, "chunks": self._image.digests[self._size]}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return len(packed(text.encode())) + self._image.signature_bytes

    def _compress(self) -> dict[str, bytes]:
        places: dict[str, int] = {}
        for index, digest in enumerate(self._image.digests[self._size]):
            if digest:
                places.setdefault(digest, index * self._size)
        parts = [list(places.items())[number::WORKERS] for number in range(WORKERS)]

        def one(part: Iterable[tuple[str, int]]) -> dict[str, bytes]:
            compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
            with self._image.raw.open("rb") as file:
                found = {}
                for digest, place in part:
                    file.seek(place)
                    found[digest] = compress(file.read(self._size))
                return found

        with ThreadPoolExecutor(WORKERS) as pool:
            return {
                digest: frame for found in pool.map(one, parts) for digest, frame in found.items()
            }

    def _hash_seconds(self) -> float:
        seconds = 0.0
        with self._image.raw.open("rb") as file:
            for place, length in data_ranges(file, 0, self._image.manifest.size_bytes):
                for start in range(place, place + length, REGION_BYTES):
                    file.seek(start)
                    region = memoryview(file.read(min(REGION_BYTES, place + length - start)))
                    began = time.perf_counter()
                    for at in range(0, len(region), self._size):
                        hashlib.sha256(region[at : at + self._size]).hexdigest()
                    seconds += time.perf_counter() - began
        return seconds

    def _unpack_seconds(self) -> float:
        last = len(self._image.digests[self._size]) - 1
        buffer = chunk_buffer(self._size)
        unpacker = Unpacker(buffer, self._size)
        began = time.perf_counter()
        for index, digest in enumerate(self._image.digests[self._size]):
            # The last one may be short, and one does not matter here.
            if digest and index != last:
                found = unpacker.unpack(memoryview(self._frames[digest]), 0, self._size)
                assert found == digest, found
        return time.perf_counter() - began


def packed(data: bytes) -> bytes:
    """Return the text as a release's manifest is stored."""
    return zstandard.ZstdCompressor(level=INDEX_LEVEL).compress(data)


def _cut(raw: Path, size_bytes: int) -> dict[int, Digests]:
    """Hash all chunks of all sizes in one pass over what is no hole."""
    digests: dict[int, Digests] = {size: [None] * -(-size_bytes // size) for size in SIZES}
    with raw.open("rb") as file:
        starts: Sequence[int] = sorted(
            {
                start
                for place, length in data_ranges(file, 0, size_bytes)
                for start in range(
                    place // REGION_BYTES * REGION_BYTES, place + length, REGION_BYTES
                )
            }
        )

    def region(start: int) -> None:
        with raw.open("rb") as file:
            file.seek(start)
            data = file.read(REGION_BYTES)
        for size in SIZES:
            for at in range(0, len(data), size):
                part = data[at : at + size]
                if part.strip(b"\0"):
                    digests[size][(start + at) // size] = hashlib.sha256(part).hexdigest()

    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(region, starts):
            pass
    return digests
