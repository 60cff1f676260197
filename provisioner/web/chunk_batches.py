"""Answers for batches of chunks: what a release's chunks are, and their frames in one body.

Trusts nothing and signs nothing: the agent checks every chunk.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import structlog

from provisioner.core.batches import BATCH_BYTES_MAX, indexes_in, pack
from provisioner.core.manifest import Manifest
from provisioner.errors import NotFound, ProvisionerError, RequestError

from .file_source import FileSource

# A rollout moves between two releases; a few of them run side by side.
INDEXES_MAX: Final = 16
# A release that is not there is not looked for again at once; one that arrives is soon seen.
MISS_KEPT_S: Final = 5.0
MISSES_MAX: Final = 256
_DIGEST_BYTES: Final = 32
_ZEROS: Final = bytes(_DIGEST_BYTES)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ChunkIndex:
    """The digests of a release's chunks, 32 bytes each; zeros for a chunk that is all zero."""

    size_bytes: int
    chunk_bytes: int
    digests: bytes

    @classmethod
    def of(cls, manifest: Manifest) -> "ChunkIndex":
        digests = b"".join(bytes.fromhex(one) if one else _ZEROS for one in manifest.chunks)
        return cls(manifest.size_bytes, manifest.chunk_bytes, digests)

    def paths(self, indexes: list[int]) -> list[str]:
        """Return where these chunks are stored.

        Raises RequestError when they are too many bytes, do not exist or are all zero.
        """
        count = len(self.digests) // _DIGEST_BYTES
        if indexes[-1] >= count:
            raise RequestError(
                "the release has fewer chunks",
                expected=f"0 to {count - 1}",
                found=str(indexes[-1]),
            )
        if len(indexes) > 1 and len(indexes) * self.chunk_bytes > BATCH_BYTES_MAX:
            raise RequestError(
                "too much for one batch",
                expected=f"at most {max(BATCH_BYTES_MAX // self.chunk_bytes, 1)} chunks",
                found=str(len(indexes)),
            )
        return [self._path(index) for index in indexes]

    def _path(self, index: int) -> str:
        digest = self.digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]
        if digest == _ZEROS:
            raise RequestError("a chunk that is all zero is not stored", found=str(index))
        name = digest.hex()
        return f"chunks/{name[:2]}/{name}"


class ChunkIndexes:
    """The indexes of the last few releases. A release never changes, so none is stale.

    Safe to use from several threads. `clock` counts seconds.
    """

    def __init__(self, files: FileSource, clock: Callable[[], float]) -> None:
        self._files = files
        self._clock = clock
        # Guards what follows, and is never held while a file is read.
        self._lock = threading.Lock()
        self._known: OrderedDict[str, ChunkIndex] = OrderedDict()
        self._missed: OrderedDict[str, tuple[float, NotFound]] = OrderedDict()
        self._loading: dict[str, Future[ChunkIndex]] = {}

    def of(self, release: str) -> ChunkIndex:
        """Return a release's index. A rack that starts at once reads its manifest once.

        Raises NotFound when there is no such release, or its manifest is damaged.
        """
        with self._lock:
            if (index := self._known.get(release)) is not None:
                self._known.move_to_end(release)
                return index
            self._refuse_missed(release)
            loading = self._loading.get(release)
            if loading is None:
                mine = self._loading[release] = Future()
        return loading.result() if loading is not None else self._load_for_all(release, mine)

    def _refuse_missed(self, release: str) -> None:
        if (missed := self._missed.get(release)) is not None:
            until, why = missed
            if self._clock() < until:
                raise NotFound(why.message, hint=why.hint)

    def _load_for_all(self, release: str, mine: Future[ChunkIndex]) -> ChunkIndex:
        """Load an index, and tell those who wait for it what came of that."""
        try:
            index = self._load(release)
        except BaseException as error:
            self._note(release, error)
            mine.set_exception(error)
            raise
        self._note(release, index)
        mine.set_result(index)
        return index

    def _note(self, release: str, outcome: ChunkIndex | BaseException) -> None:
        with self._lock:
            del self._loading[release]
            if isinstance(outcome, ChunkIndex):
                self._known[release] = outcome
                if len(self._known) > INDEXES_MAX:
                    self._known.popitem(last=False)
            elif isinstance(outcome, NotFound):
                self._missed[release] = (self._clock() + MISS_KEPT_S, outcome)
                self._missed.move_to_end(release)
                if len(self._missed) > MISSES_MAX:
                    self._missed.popitem(last=False)

    def _load(self, release: str) -> ChunkIndex:
        data = self._files.read(f"releases/{release}/manifest.json")
        if data is None:
            raise NotFound(f"there is no release {release}")
        try:
            if hashlib.sha256(data).hexdigest() == release:
                return ChunkIndex.of(Manifest.parse(data))
        except ProvisionerError as error:
            log.warning("a release's manifest cannot be read", release=release, error=str(error))
        # Not a failure of ours to the agent: it may still have each chunk by its digest.
        raise NotFound(
            f"the manifest of release {release} is damaged", hint="provisioner image verify"
        )


class ChunkBatches:
    """Batches of any release in the store.

    Safe to use from several threads.
    """

    def __init__(self, files: FileSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._indexes = ChunkIndexes(files, clock)

    def paths(self, release: str, spec: str) -> list[str]:
        """Return where the chunks of a request are stored, in order. Raises as `answer`."""
        return self._indexes.of(release).paths(indexes_in(spec))

    def answer(self, release: str, spec: str) -> bytes:
        """Return the body for a request.

        Raises NotFound for a release or a chunk that is not in the store, and RequestError
        for chunks that may not be asked for.
        """
        frames = self._files.read_many(self.paths(release, spec))
        found = [frame for frame in frames if frame is not None]
        if len(found) < len(frames):
            missing = indexes_in(spec)[frames.index(None)]
            raise NotFound(
                f"chunk {missing} of release {release} is missing from the store",
                hint="provisioner image verify",
            )
        return pack(found)
