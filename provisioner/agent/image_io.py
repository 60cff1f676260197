"""Reads an image's chunks from a disk into a region's buffer, and says which are not right."""

import hashlib
import mmap

from provisioner.agent.console import say
from provisioner.agent.disk_io import DiskFile, chunk_buffer
from provisioner.agent.problems import DiskFailed
from provisioner.agent.regions import Span, chunks_in_region
from provisioner.core.manifest import Manifest


class ImageOnDisk:
    """The place on a disk where an image belongs. Safe to use from several threads."""

    def __init__(self, disk: DiskFile, manifest: Manifest) -> None:
        self.disk = disk
        self.manifest = manifest
        self._region_chunks = chunks_in_region(manifest.chunk_bytes)
        self._zeros = bytes(self._region_chunks * manifest.chunk_bytes)

    def region_buffer(self) -> mmap.mmap:
        """Return a buffer that takes one region."""
        return chunk_buffer(len(self._zeros))

    def steps(self, region: Span) -> list[Span]:
        """Cut a region into spans that fit its buffer; only one of zeros may be longer."""
        size = self._region_chunks
        return [
            Span(begin, min(begin + size, region.end), region.is_zero)
            for begin in range(region.begin, region.end, size)
        ]

    def place(self, begin: int, end: int) -> tuple[int, int]:
        """Return offset and length, in bytes, of the chunks from begin to before end."""
        offset = begin * self.manifest.chunk_bytes
        return offset, min(end * self.manifest.chunk_bytes, self.manifest.size_bytes) - offset

    def data_bytes(self, span: Span) -> int:
        """Return the bytes of the span's chunks that are not all zero."""
        if span.is_zero:
            return 0
        manifest = self.manifest
        return sum(manifest.chunk_length(i) for i in span.indexes if manifest.chunks[i])

    def differing(self, buffer: mmap.mmap, span: Span) -> list[int]:
        """Read a span into the start of the buffer; return which of its chunks are not right."""
        offset, length = self.place(span.begin, span.end)
        self.disk.read_into(buffer, length, offset)
        with memoryview(buffer) as view:
            if span.is_zero and self._is_zero(view, 0, length):
                return []
            return [index for index in span.indexes if not self._is_right(view, index, span)]

    def to_be_written(self, buffer: mmap.mmap, span: Span) -> list[int]:
        """Return what `differing` does, and the whole span when it cannot be read.

        A disk replaces a bad sector once that is written to, and what is written is read
        back: old data that is lost must not fail a deployment that wants none of it.
        """
        try:
            return self.differing(buffer, span)
        except DiskFailed as error:
            say(f"{error.message}: {error.found}; taken for different")
            return list(span.indexes)

    def fill_zeros(self, buffer: mmap.mmap, span: Span, index: int) -> None:
        """Put a chunk of zeros into its place in a buffer that stands for the span."""
        at, length = self.within(index, span)
        buffer[at : at + length] = self._zeros[:length]

    def within(self, index: int, span: Span) -> tuple[int, int]:
        """Return a chunk's place in a buffer that stands for the span: start and length."""
        at = (index - span.begin) * self.manifest.chunk_bytes
        return at, self.manifest.chunk_length(index)

    def _is_right(self, view: memoryview, index: int, span: Span) -> bool:
        at, length = self.within(index, span)
        digest = self.manifest.chunks[index]
        if digest is None:
            return self._is_zero(view, at, length)
        with view[at : at + length] as part:
            return hashlib.sha256(part).hexdigest() == digest

    def _is_zero(self, view: memoryview, at: int, length: int) -> bool:
        # Many times as fast as hashing, and as `==`, which copies or goes byte by byte.
        with view[at : at + length] as part:
            return self._zeros.startswith(part)
