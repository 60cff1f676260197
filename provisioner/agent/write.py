"""Puts the chunks of a release onto a disk, and reads them back.

A few threads, each with one buffer of one chunk: fetch, unpack, verify, write. Memory does
not grow with the image. The first chunk, which holds the partition table, is not touched
here: whoever calls writes it last.
"""

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import zstandard

from provisioner.agent.client import FileClient
from provisioner.agent.disk_io import ZERO_STEP_BYTES, DiskFile, chunk_buffer
from provisioner.agent.parallel import run_parallel
from provisioner.agent.permission import Permission
from provisioner.agent.problems import ChunkCorrupt, ReadBackMismatch
from provisioner.agent.progress import Progress
from provisioner.core.manifest import Manifest

CORRUPT_TRIES_MAX: Final = 3
SAMPLES: Final = 8
# A frame of bytes that do not compress is a little larger than the bytes.
FRAME_EXTRA_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Piece:
    """A chunk of the image, or a run of chunks that are all zero (digest is None)."""

    index: int
    digest: str | None
    offset: int
    length: int


def pieces_of(manifest: Manifest, *, begin: int = 1) -> Iterator[Piece]:
    """Yield what the image is made of, in order, from chunk `begin` on.

    Zero chunks come as runs of at most ZERO_STEP_BYTES.
    """
    run: Piece | None = None
    for index in range(begin, len(manifest.chunks)):
        digest, length = manifest.chunks[index], manifest.chunk_length(index)
        offset = index * manifest.chunk_bytes
        if digest is None and run is not None and run.length + length <= ZERO_STEP_BYTES:
            run = Piece(run.index, None, run.offset, run.length + length)
            continue
        if run is not None:
            yield run
            run = None
        piece = Piece(index, digest, offset, length)
        if digest is None:
            run = piece
        else:
            yield piece
    if run is not None:
        yield run


class ChunkFetcher:
    """Fetches chunks into one aligned buffer, each verified. For one thread."""

    def __init__(self, files: FileClient, chunk_bytes: int, stop: threading.Event) -> None:
        self.buffer = chunk_buffer(chunk_bytes)
        self._files = files
        self._stop = stop
        self._packed = bytearray(chunk_bytes + FRAME_EXTRA_BYTES)
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=max(chunk_bytes, 1 << 23))

    def fetch(self, piece: Piece) -> int:
        """Fill the buffer with the piece's bytes; return how many bytes were fetched for it.

        Raises ChunkCorrupt when it came wrong CORRUPT_TRIES_MAX times, ChunkUnavailable when
        it did not come.
        """
        digest = piece.digest or ""
        path = f"/chunks/{digest[:2]}/{digest}"
        fetched = 0
        found = ""
        for _ in range(CORRUPT_TRIES_MAX):
            length = self._files.fetch(path, self._packed, self._stop)
            fetched += length
            found = self._unpack(length, piece.length) or self.digest(piece.length)
            if found == digest:
                return fetched
        raise ChunkCorrupt(
            f"chunk {piece.index} came wrong {CORRUPT_TRIES_MAX} times; it was not written",
            expected=digest,
            found=found,
            hint="check the release in the archive: provisioner image verify",
        )

    def digest(self, length: int) -> str:
        """Return the sha256 of the first `length` bytes of the buffer."""
        with memoryview(self.buffer) as view, view[:length] as part:
            return hashlib.sha256(part).hexdigest()

    def close(self) -> None:
        """Close the connection."""
        self._files.close()

    def _unpack(self, packed: int, length: int) -> str:
        """Unpack into the buffer; return what is wrong, or nothing."""
        with memoryview(self._packed) as whole, whole[:packed] as frame:
            try:
                with self._unpacker.stream_reader(frame) as reader:
                    return self._read_exactly(reader, length)
            except zstandard.ZstdError as error:
                return f"not a zstd frame: {error}"

    def _read_exactly(self, reader: "zstandard.ZstdDecompressionReader", length: int) -> str:
        have = 0
        with memoryview(self.buffer) as view:
            while have < length:
                with view[have:length] as rest:
                    count = reader.readinto(rest)
                if count == 0:
                    return f"{have} of {length} bytes"
                have += count
        return f"more than {length} bytes" if reader.read(1) else ""


class ImageWriter:
    """Writes one release to one disk, with `threads` threads."""

    def __init__(
        self,
        disk: DiskFile,
        manifest: Manifest,
        open_files: Callable[[], FileClient],
        permission: Permission,
        progress: Progress,
        *,
        threads: int,
    ) -> None:
        self.disk = disk
        self.manifest = manifest
        self.permission = permission
        self.progress = progress
        # Chunks that were already there. They were read from the disk and hashed in this run,
        # and nothing writes to them, so that reading them once more would show nothing new.
        self.found_equal: set[int] = set()
        self._open_files = open_files
        self._threads = threads

    def first_chunk(self) -> bytes:
        """Return the image's first chunk, verified. Nothing is written."""
        digest, length = self.manifest.chunks[0], self.manifest.chunk_length(0)
        if digest is None:
            return bytes(length)
        fetcher = self.fetcher()
        try:
            self.progress.add(fetched=fetcher.fetch(Piece(0, digest, 0, length)))
            return fetcher.buffer[:length]
        finally:
            fetcher.close()

    def looks_like_an_earlier_release(self) -> bool:
        """Say whether some chunks, spread over the disk, already are those of the release.

        When none is, comparing every chunk before fetching it would only cost time.
        """
        stored = [piece for piece in pieces_of(self.manifest) if piece.digest]
        step = max(1, len(stored) // SAMPLES)
        with chunk_buffer(self.manifest.chunk_bytes) as buffer:
            return any(
                is_on_disk(self.disk, buffer, piece)
                for piece in stored[step // 2 :: step][:SAMPLES]
            )

    def write(self, *, compare_first: bool) -> None:
        """Make every chunk but the first right. Raises what stopped it."""
        self._enter("writing")
        self._run(lambda: _Writer(self, compare_first=compare_first))
        self.disk.flush()

    def read_back(self) -> None:
        """Read every chunk but the first from the disk, zeros included, after its last write.

        Raises ReadBackMismatch.
        """
        self._enter("verifying")
        self._run(lambda: _Verifier(self))

    def _enter(self, phase: str) -> None:
        self.progress.enter(phase, self.manifest.used_bytes)
        self.permission.beat_now()

    def fetcher(self) -> ChunkFetcher:
        """Return a fetcher with a connection of its own."""
        return ChunkFetcher(self._open_files(), self.manifest.chunk_bytes, self.permission.stop)

    def _run(self, make_worker: Callable[[], "_Writer | _Verifier"]) -> None:
        run_parallel(
            pieces_of(self.manifest), make_worker, threads=self._threads, stop=self.permission.stop
        )
        # A refused heartbeat lets the workers end early, and says so here.
        self.permission.check()


class _Writer:
    """One thread of `ImageWriter.write`."""

    def __init__(self, job: ImageWriter, *, compare_first: bool) -> None:
        self._job = job
        self._compare_first = compare_first
        self._fetcher = job.fetcher()

    def work(self, piece: Piece) -> None:
        if piece.digest is None:
            self._job.permission.check()
            self._job.disk.zero(piece.offset, piece.length)
            return
        buffer = self._fetcher.buffer
        if self._compare_first and is_on_disk(self._job.disk, buffer, piece):
            self._job.found_equal.add(piece.index)
            self._job.progress.add(done=piece.length)
            return
        fetched = self._fetcher.fetch(piece)
        self._job.permission.check()
        self._job.disk.write_from(buffer, piece.length, piece.offset)
        self._job.progress.add(done=piece.length, fetched=fetched, written=piece.length)

    def close(self) -> None:
        self._fetcher.close()


class _Verifier:
    """One thread of `ImageWriter.read_back`."""

    def __init__(self, job: ImageWriter) -> None:
        self._job = job
        self._step = job.manifest.chunk_bytes
        self._buffer = chunk_buffer(self._step)
        self._zeros = bytes(self._step)

    def work(self, piece: Piece) -> None:
        if piece.index not in self._job.found_equal:
            self._read(piece)
        if piece.digest is not None:
            self._job.progress.add(done=piece.length)

    def close(self) -> None:
        self._buffer.close()

    def _read(self, piece: Piece) -> None:
        for offset in range(piece.offset, piece.offset + piece.length, self._step):
            length = min(self._step, piece.offset + piece.length - offset)
            part = Piece(piece.index, piece.digest, offset, length)
            if not is_on_disk(self._job.disk, self._buffer, part, self._zeros):
                raise ReadBackMismatch(
                    f"disk {self._job.disk.name} does not return what was written at {offset}",
                    expected=piece.digest or "zeros",
                    found=hashlib.sha256(self._buffer[:length]).hexdigest(),
                    hint="the disk or its controller is failing; replace it",
                )


def is_on_disk(disk: DiskFile, buffer: mmap.mmap, piece: Piece, zeros: bytes = b"") -> bool:
    """Read the piece's place into the buffer, and say whether it holds the piece's bytes.

    zeros is as long as a chunk, for pieces that are all zero.
    """
    disk.read_into(buffer, piece.length, piece.offset)
    with memoryview(buffer) as view, view[: piece.length] as part:
        if piece.digest is None:
            # Many times as fast as hashing, and as `==`, which copies or goes byte by byte.
            return zeros.startswith(part)
        return hashlib.sha256(part).hexdigest() == piece.digest
