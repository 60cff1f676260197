"""Puts a release onto a disk, region by region, and reads it back.

A few threads, each with one buffer of one region: read and compare, fetch what differs,
write. Memory does not grow with the image. The first chunk, which holds the partition
table, is not touched here: whoever calls writes it last.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Final

from provisioner.agent.disk_io import DiskFile
from provisioner.agent.fetch import ChunkFetcher, buffer_bytes, first_chunk
from provisioner.agent.image_io import ImageOnDisk
from provisioner.agent.parallel import run_parallel
from provisioner.agent.permission import Permission
from provisioner.agent.problems import ReadBackMismatch
from provisioner.agent.progress import Progress
from provisioner.agent.regions import Span, neighbours, regions_of, stretches_of
from provisioner.agent.sources import Sources
from provisioner.core.manifest import Manifest

# Of a release built on the one that is there, most chunks are equal; of the worst upgrade
# that we measured, half. Some 32 samples miss that less than once in a billion times.
SAMPLES: Final = 32
THREADS_MIN: Final = 2
THREADS_MAX: Final = 16
# All buffers of all threads: a host with 768 MiB has room for as much again.
BUFFERS_BYTES_MAX: Final = 128 * 1024 * 1024


def thread_count(chunk_bytes: int, processors: int) -> int:
    """Return how many threads to work with: some wait for the network while others hash."""
    affordable = BUFFERS_BYTES_MAX // buffer_bytes(chunk_bytes)
    return max(min(max(2 * processors, 4), THREADS_MAX, affordable), THREADS_MIN)


class ImageWriter:
    """Writes one release to one disk, with `threads` threads."""

    def __init__(
        self,
        disk: DiskFile,
        manifest: Manifest,
        sources: Sources,
        permission: Permission,
        progress: Progress,
        *,
        threads: int,
    ) -> None:
        self.image = ImageOnDisk(disk, manifest)
        self.permission = permission
        self.progress = progress
        # One byte for each chunk, 1 once it is being written. The others were read from the
        # disk and hashed in this run, and nothing writes to them, so that reading them once
        # more would show nothing new.
        self.rewritten = bytearray(len(manifest.chunks))
        self._sources = sources
        self._threads = threads

    @property
    def disk(self) -> DiskFile:
        return self.image.disk

    @property
    def manifest(self) -> Manifest:
        return self.image.manifest

    def first_chunk(self) -> bytes:
        """Return the image's first chunk, verified. Nothing is written."""
        return first_chunk(self.manifest, self.fetcher())

    def looks_like_an_earlier_release(self) -> bool:
        """Say whether some chunks, spread over the disk, already are those of the release.

        When none is, comparing every chunk before fetching it would only cost time.
        """
        stored = [index for index, _ in self.manifest.stored_chunks() if index]
        step = max(1, len(stored) // SAMPLES)
        with self.image.region_buffer() as buffer:
            return any(
                not self.image.to_be_written(buffer, Span(index, index + 1, is_zero=False))
                for index in stored[step // 2 :: step][:SAMPLES]
            )

    def write(self, *, compare_first: bool) -> None:
        """Make every chunk but the first right. Raises what stopped it.

        With compare_first only what is not right yet is fetched and written; without, all is.
        """
        self._enter("writing")
        self._run(lambda: _Writer(self, compare_first=compare_first))
        self.disk.flush()

    def read_back(self) -> None:
        """Read every chunk that was written from the disk, zeros included.

        Raises ReadBackMismatch.
        """
        self._enter("verifying")
        self._run(lambda: _Reader(self))

    def fetcher(self) -> ChunkFetcher:
        """Return a fetcher for one thread."""
        return ChunkFetcher(self._sources, self.manifest, self.progress, self.permission.stop)

    def _enter(self, phase: str) -> None:
        self.progress.enter(phase, self.manifest.used_bytes)
        self.permission.beat_now()

    def _run(self, make_worker: Callable[[], "_Writer | _Reader"]) -> None:
        regions = regions_of(self.manifest)
        stop = self.permission.stop
        try:
            run_parallel(regions, make_worker, threads=self._threads, stop=stop)
        finally:
            # A refused heartbeat lets the workers end early, and says here why.
            self.permission.raise_refusal()


class _Writer:
    """One thread of `ImageWriter.write`."""

    def __init__(self, job: ImageWriter, *, compare_first: bool) -> None:
        self._job = job
        self._image = job.image
        self._compare_first = compare_first
        self._fetcher = job.fetcher()

    def work(self, region: Span) -> None:
        if region.is_zero and not self._compare_first:
            self._note(region.indexes)
            self._put(region, region)
            return
        for span in self._image.steps(region):
            self._make_right(span)
            self._job.progress.add(done=self._image.data_bytes(span))

    def close(self) -> None:
        self._fetcher.close()

    def _make_right(self, span: Span) -> None:
        buffer, chunks = self._fetcher.buffer, self._job.manifest.chunks
        wrong: Sequence[int] = span.indexes
        if self._compare_first:
            wrong = self._image.to_be_written(buffer, span)
        if stored := [index for index in wrong if chunks[index]]:
            self._fetcher.fetch(span, stored)
        self._note(wrong)
        for stretch in stretches_of(wrong, self._job.manifest):
            self._put(stretch, span)

    def _note(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            self._job.rewritten[index] = 1

    def _put(self, stretch: Span, span: Span) -> None:
        """Write a stretch of the span that the buffer stands for, or zero it."""
        offset, length = self._image.place(stretch.begin, stretch.end)
        if not stretch.is_zero:
            for index in stretch.indexes:
                if self._job.manifest.chunks[index] is None:
                    self._image.fill_zeros(self._fetcher.buffer, span, index)
        self._job.permission.check()
        if stretch.is_zero:
            self._job.disk.zero(offset, length)
            return
        at = offset - self._image.place(span.begin, span.end)[0]
        self._job.disk.write_from(self._fetcher.buffer, length, offset, at=at)
        self._job.progress.add(written=length)


class _Reader:
    """One thread of `ImageWriter.read_back`."""

    def __init__(self, job: ImageWriter) -> None:
        self._job = job
        self._image = job.image
        self._buffer = job.image.region_buffer()

    def work(self, region: Span) -> None:
        for span in self._image.steps(region):
            written = list(compress(span.indexes, self._job.rewritten[span.begin : span.end]))
            for begin, end in neighbours(written):
                self._check(Span(begin, end, span.is_zero))
            self._job.progress.add(done=self._image.data_bytes(span))

    def close(self) -> None:
        self._buffer.close()

    def _check(self, span: Span) -> None:
        for index in self._image.differing(self._buffer, span)[:1]:
            at, length = self._image.within(index, span)
            raise ReadBackMismatch(
                f"disk {self._job.disk.name} does not return what was written at "
                f"{self._image.place(index, index + 1)[0]}",
                expected=self._job.manifest.chunks[index] or "zeros",
                found=hashlib.sha256(self._buffer[at : at + length]).hexdigest(),
                hint="the disk or its controller is failing; replace it",
            )
