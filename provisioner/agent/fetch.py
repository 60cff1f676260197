"""Fetches chunks into a buffer, each verified: in batches from the service, and what that does
not give one by one from there and from the mirrors.

What came whole before a connection was cut is kept, and not asked for again. Writes nothing.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from provisioner.agent.client import OK, PATIENCE_S, FileClient
from provisioner.agent.disk_io import chunk_buffer
from provisioner.agent.frames import Unpacker
from provisioner.agent.http import AnswerTooLarge, BodyCut, lazy_buffer
from provisioner.agent.patience import FIRST_PAUSE_S, PAUSE_MAX_S
from provisioner.agent.problems import ChunkCorrupt, ChunkUnavailable
from provisioner.agent.progress import Progress
from provisioner.agent.regions import Span, chunks_in_region
from provisioner.agent.sources import Source, Sources
from provisioner.core.batches import LENGTH, frame_bytes_max, frames_in, spec_of
from provisioner.core.manifest import Manifest

# How often the service may send a chunk wrong in a batch, before it is asked for otherwise.
CORRUPT_TRIES_MAX: Final = 3


def buffer_bytes(chunk_bytes: int) -> int:
    """Return the memory that one fetcher takes at most: its region, raw and packed."""
    count = chunks_in_region(chunk_bytes)
    return count * (chunk_bytes + frame_bytes_max(chunk_bytes) + LENGTH.size)


@dataclass(eq=False)
class _Chunk:
    """One chunk that is still wanted, its place in the buffer, and what was tried.

    is_refused: the service gives no batch that holds it. verdicts says, by source, why
    asking there again is of no use; found is what came instead of it at last.
    """

    index: int
    digest: str
    at: int
    length: int
    is_refused: bool = False
    wrong_in_batch: int = 0
    verdicts: dict[Source, str] = field(default_factory=dict)
    found: str = ""

    @property
    def comes_in_batches(self) -> bool:
        return not self.is_refused and self.wrong_in_batch < CORRUPT_TRIES_MAX


class ChunkFetcher:
    """Fetches chunks of one release into one region's buffer. For one thread."""

    def __init__(
        self,
        sources: Sources,
        manifest: Manifest,
        progress: Progress,
        stop: threading.Event,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        size = chunks_in_region(manifest.chunk_bytes)
        self.buffer = chunk_buffer(size * manifest.chunk_bytes)
        self._packed = lazy_buffer(size * (frame_bytes_max(manifest.chunk_bytes) + LENGTH.size))
        self._unpacker = Unpacker(self.buffer, manifest.chunk_bytes)
        self._sources = sources
        self._clients: dict[Source, FileClient] = {}
        self._manifest = manifest
        self._progress = progress
        self._stop = stop
        self._patience_s = patience_s

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def fetch(self, region: Span, indexes: Sequence[int]) -> None:
        """Fill the places of these chunks in the buffer, which stands for the region.

        indexes are of the region, ascending, and none is a chunk that is all zero. Raises
        ChunkCorrupt when every source sent one wrong, and ChunkUnavailable when it is
        nowhere, or did not come in time.
        """
        missing = [self._chunk(index, region) for index in indexes]
        ends_at = time.monotonic() + self._patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            before = len(missing)
            failure = self._ask_everybody(missing, ends_at)
            if not missing:
                return
            if len(missing) < before:
                pause_s = FIRST_PAUSE_S
            if time.monotonic() + pause_s > ends_at or self._stop.wait(pause_s):
                raise ChunkUnavailable(
                    f"could not fetch {len(missing)} chunks, the first of them number "
                    f"{missing[0].index}, for {self._patience_s:.0f} s",
                    expected=f"an answer from {self._sources}",
                    found=failure or "answers too slow for all of them",
                )
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    def _chunk(self, index: int, region: Span) -> _Chunk:
        at = (index - region.begin) * self._manifest.chunk_bytes
        digest = self._manifest.chunks[index] or ""
        return _Chunk(index, digest, at, self._manifest.chunk_length(index))

    def _is_over(self, ends_at: float) -> bool:
        return self._stop.is_set() or time.monotonic() >= ends_at

    def _ask_everybody(self, missing: list[_Chunk], ends_at: float) -> str:
        """Ask each source that may help; what came right is no longer in `missing`.

        Returns the last failure to answer. Raises when a chunk is right nowhere. Many chunks
        and many slow places would make this last for hours, so that every question is the
        last one once the time is over, or the agent has to stop.
        """
        failure = self._ask_in_batches(missing, ends_at)
        for chunk in list(missing):
            places = self._sources.mirrors if chunk.comes_in_batches else self._sources.everywhere
            for source in places:
                if self._is_over(ends_at):
                    return failure
                if source in chunk.verdicts or source.is_resting:
                    continue
                try:
                    is_right = self._ask_for_one(chunk, source)
                except OSError as error:
                    self._sources.failed(source)
                    failure = f"{source.origin}: {error}"
                    continue
                if is_right:
                    missing.remove(chunk)
                    break
            else:
                self._refuse_the_hopeless(chunk)
        return failure

    def _ask_in_batches(self, missing: list[_Chunk], ends_at: float) -> str:
        """Ask the service for as long as it answers something new; return its failure, if any."""
        service = self._sources.service
        while not service.is_resting and not self._is_over(ends_at):
            wanted = [chunk for chunk in missing if chunk.comes_in_batches]
            if not wanted:
                break
            try:
                for chunk in self._ask_for_batch(wanted):
                    missing.remove(chunk)
            except OSError as error:
                self._sources.failed(service)
                return f"{service.origin}: {error}"
        return ""

    def _ask_for_batch(self, wanted: list[_Chunk]) -> list[_Chunk]:
        """Ask once; return the chunks that came right, and note what else came of it.

        Raises OSError when nothing came of it.
        """
        spec = spec_of([chunk.index for chunk in wanted])
        path = f"/releases/{self._sources.release}/chunks/{spec}"
        cut: BodyCut | None = None
        try:
            status, length = self._client(self._sources.service).get(path, self._packed)
        except BodyCut as error:
            cut, status, length = error, error.status, error.received
        except AnswerTooLarge:
            status = length = 0
        self._progress.add(fetched=length)
        if status != OK:
            for chunk in wanted:
                chunk.is_refused = True
            return []
        came, right = 0, []
        with memoryview(self._packed) as view, view[:length] as answer:
            for chunk, frame in zip(wanted, frames_in(answer), strict=False):
                came += 1
                if self._place(frame, chunk):
                    right.append(chunk)
                else:
                    chunk.wrong_in_batch += 1
        if cut is not None and came == 0:
            raise cut
        if cut is None and came < len(wanted):
            # Its length is wrong, and so nothing behind it can be found.
            wanted[came].wrong_in_batch += 1
            wanted[came].found = "an answer that ends within it"
        return right

    def _ask_for_one(self, chunk: _Chunk, source: Source) -> bool:
        """Ask one source for one chunk; say whether it came right. Raises OSError."""
        path = f"/chunks/{chunk.digest[:2]}/{chunk.digest}"
        try:
            status, length = self._client(source).get(path, self._packed)
        except BodyCut as error:
            self._progress.add(fetched=error.received)
            raise
        except AnswerTooLarge as error:
            chunk.found = str(error)
            chunk.verdicts[source] = "sent too much"
            return False
        self._progress.add(fetched=length)
        if status != OK:
            chunk.verdicts[source] = f"answered {status}"
            return False
        with memoryview(self._packed) as view, view[:length] as frame:
            is_right = self._place(frame, chunk)
        if not is_right:
            chunk.verdicts[source] = "sent it wrong"
        return is_right

    def _place(self, frame: memoryview, chunk: _Chunk) -> bool:
        found = self._unpacker.unpack(frame, chunk.at, chunk.length)
        if found != chunk.digest:
            chunk.found = found
        return found == chunk.digest

    def _refuse_the_hopeless(self, chunk: _Chunk) -> None:
        """Raise when every source has given its verdict on the chunk."""
        if any(source not in chunk.verdicts for source in self._sources.everywhere):
            return
        said = "; ".join(f"{source.origin} {what}" for source, what in chunk.verdicts.items())
        if chunk.found:
            raise ChunkCorrupt(
                f"chunk {chunk.index} is right at no source; it was not written ({said})",
                expected=chunk.digest,
                found=chunk.found,
                hint="check the release in the archive: provisioner image verify",
            )
        raise ChunkUnavailable(
            f"chunk {chunk.index} is at no source ({said})",
            expected=chunk.digest,
            hint="check the release in the archive: provisioner image verify",
        )

    def _client(self, source: Source) -> FileClient:
        client = self._clients.get(source)
        if client is None:
            client = self._clients[source] = FileClient(source.origin, stop=self._stop)
        return client


def first_chunk(manifest: Manifest, fetcher: ChunkFetcher) -> bytes:
    """Return the image's first chunk, verified; the fetcher is closed. Raises as `fetch`."""
    length = manifest.chunk_length(0)
    try:
        if manifest.chunks[0] is None:
            return bytes(length)
        fetcher.fetch(Span(0, 1, is_zero=False), [0])
        return fetcher.buffer[:length]
    finally:
        fetcher.close()
